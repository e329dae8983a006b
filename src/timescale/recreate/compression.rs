//! Chunks of the target are compressed when all that the source has in their range is: while the migration runs, so that the target
//! needs no more room than it will keep. One that the source has decompressed since is decompressed.
//!
//! What is compressed is in the extension's own catalog: wherever this dies, the next look goes on. Nobody waits behind it for long
//! ([`super::super::compress`]).

use std::collections::{BTreeSet, HashMap};

use tokio_postgres::Client;

use super::super::live::overlap;
use super::super::source::{self, Chunk};
use super::places::Places;
use crate::error::{Context, Result};
use crate::sql;
use crate::target::ledger;

/// What is to be done with a chunk of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Compress it, or what of it is not.
    Compress,
    /// It is an ordinary chunk on the source.
    Decompress,
}

/// The chunks that are to be compressed or decompressed, the oldest first; none that somebody writes to.
///
/// # Errors
/// Whatever the servers say.
pub async fn candidates(source: &Client, target: &Client) -> Result<Vec<(String, Work)>> {
    let places = Places::read(source, target).await?;
    let copied: BTreeSet<u32> = ledger::tables(target)
        .await?
        .iter()
        .filter(|entry| entry.copied && entry.table.chunk.as_ref().is_some_and(|chunk| !chunk.is_gone))
        .map(|entry| entry.table.relid)
        .collect();
    let mut of_source: HashMap<i32, Vec<Chunk>> = HashMap::new();
    for chunk in source::chunks(source).await?.iter().filter_map(|chunk| places.chunk(chunk)) {
        of_source.entry(chunk.hypertable).or_default().push(chunk);
    }
    let busy: BTreeSet<u32> = target
        .query_typed(
            "SELECT DISTINCT relation FROM pg_catalog.pg_locks WHERE mode = 'RowExclusiveLock' AND relation IS NOT NULL \
               AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) \
               AND pid <> pg_catalog.pg_backend_pid()",
            &[],
        )
        .await
        .context(|| "looking which chunks are written to".into())?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let mut found = Vec::new();
    for chunk in source::chunks(target).await?.iter().filter(|chunk| !busy.contains(&chunk.relid)) {
        let others = of_source.get(&chunk.hypertable).map(Vec::as_slice).unwrap_or_default();
        let there: Vec<&Chunk> = others.iter().filter(|other| overlap(chunk, other)).collect();
        if let Some(work) = work(chunk, &there, &copied) {
            found.push((chunk.slices.first().map_or(0, |slice| slice.start), chunk.qualified(), work));
        }
    }
    found.sort_by_key(|(start, ..)| *start);
    Ok(found.into_iter().map(|(_, name, work)| (name, work)).collect())
}

/// What is to be done with a chunk of the target, by those of the source in its place and which of them are copied.
fn work(chunk: &Chunk, there: &[&Chunk], copied: &BTreeSet<u32>) -> Option<Work> {
    if there.is_empty() || chunk.is_frozen() || !there.iter().all(|other| copied.contains(&other.relid)) {
        return None;
    }
    let is_whole = |chunk: &Chunk| chunk.is_compressed() && chunk.status & (PARTIAL | UNORDERED) == 0;
    if there.iter().all(|other| other.is_compressed()) {
        let again = !is_whole(chunk) && there.iter().all(|other| is_whole(other));
        return (!chunk.is_compressed() || again).then_some(Work::Compress);
    }
    (chunk.is_compressed() && there.iter().all(|other| !other.is_compressed())).then_some(Work::Decompress)
}

const PARTIAL: i32 = 8;
const UNORDERED: i32 = 2;

/// The statement that decompresses a chunk.
pub fn decompress(extension: &str, chunk: &str) -> String {
    format!(
        "SELECT {}({}::pg_catalog.regclass, true)",
        sql::qualified(extension, "decompress_chunk"),
        sql::literal(chunk)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_compressed_when_all_in_its_place_is_and_has_been_copied() {
        let chunk = |relid: u32, status: i32| Chunk {
            id: 1,
            relid,
            schema: "s".into(),
            name: "c".into(),
            hypertable: 1,
            slices: Vec::new(),
            status,
            compressed: None,
            tiered: false,
        };
        let copied: BTreeSet<u32> = [1, 2].into();
        let (one, two, uncopied, ordinary) = (chunk(1, 1), chunk(2, 9), chunk(3, 1), chunk(2, 0));
        let of = |status: i32, there: &[&Chunk]| work(&chunk(9, status), there, &copied);
        assert_eq!(of(0, &[&one]), Some(Work::Compress));
        assert_eq!(of(0, &[&one, &two]), Some(Work::Compress), "its first compression");
        assert_eq!(of(9, &[&one, &two]), None, "the source has not compressed it again either");
        assert_eq!(of(9, &[&one]), Some(Work::Compress));
        assert_eq!(of(1, &[&one]), None);
        assert_eq!(of(0, &[&uncopied]), None);
        assert_eq!(of(0, &[&one, &ordinary]), None);
        assert_eq!(of(1, &[&ordinary]), Some(Work::Decompress));
        assert_eq!(of(1, &[]), None, "it is dropped in another way");
    }
}
