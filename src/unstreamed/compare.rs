//! Whether both sides have the same large objects: their content, hashed by each server, a page of objects at a time.
//!
//! They are in no stream, so at no moment but the cutover do both sides have to be the same. But what the ledger says to be copied as the
//! source has it now has to be so. The rest waits to be copied again, and is counted.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_postgres::Client;

use super::large_object;
use crate::error::{Context, Result};

/// How many that differ are named.
const NAMED_MAX: usize = 20;

/// What a comparison of large objects found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LargeObjects {
    /// Objects whose content was compared.
    pub compared: u64,
    /// Objects that were made, changed or removed on the source since they were last copied: copied again by the cutover at the latest.
    pub pending: u64,
    /// OIDs of objects that are not the same on both sides, the first 20 of them.
    pub different: Vec<u32>,
    /// How many there are.
    pub different_total: u64,
}

impl LargeObjects {
    fn differs(&mut self, oid: u32) {
        self.different_total += 1;
        if self.different.len() < NAMED_MAX {
            self.different.push(oid);
        }
    }
}

/// Compares them; `None` where neither side has any. `is_kept` says that a ledger on the target keeps what was copied of them; else both
/// sides have to be quiet.
///
/// # Errors
/// Whatever the servers say.
pub async fn large_objects(source: &Client, target: &Client, is_kept: bool) -> Result<Option<LargeObjects>> {
    if !large_object::are_there(source, target).await? {
        return Ok(None);
    }
    let mut found = LargeObjects::default();
    let marker = large_object::marker_query(source).await?;
    let mut after = 0_u32;
    loop {
        let page = large_object::page(source, &marker, after).await?;
        let last = large_object::last_of(&page);
        // What the ledger says and what is there, as of one moment.
        let begin = target.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await;
        begin.context(|| "comparing large objects".into())?;
        let there = large_object::there(target, is_kept, after, last).await?;
        let mut equal_by_ledger = Vec::new();
        let of_source: BTreeMap<u32, &str> = page.iter().map(|object| (object.oid, object.marker.as_str())).collect();
        for (oid, marker) in &of_source {
            match there.get(oid) {
                Some((is_there, known)) if is_kept && *known == Some((*marker).to_owned()) => match is_there {
                    true => equal_by_ledger.push(*oid),
                    false => found.differs(*oid),
                },
                _ if is_kept => found.pending += 1,
                Some((true, _)) => equal_by_ledger.push(*oid),
                _ => found.differs(*oid),
            }
        }
        for (oid, (is_there, known)) in there.iter().filter(|(oid, _)| !of_source.contains_key(oid)) {
            match known {
                Some(_) => found.pending += 1,
                None if *is_there => found.differs(*oid),
                None => {}
            }
        }
        let equal = large_object::equal_content(source, target, &equal_by_ledger).await?;
        found.compared += equal_by_ledger.len() as u64;
        equal_by_ledger.iter().filter(|oid| !equal.contains(oid)).for_each(|oid| found.differs(*oid));
        tokio::try_join!(source.batch_execute("ROLLBACK"), target.batch_execute("ROLLBACK"))
            .context(|| "comparing large objects".into())?;
        if last == u32::MAX {
            return Ok(Some(found));
        }
        after = last;
    }
}
