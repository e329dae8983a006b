//! Pieces that were copied and whose chunks the target has dropped since: by a retention policy between two starts, a job of the users' own, or
//! by hand. The ledger alone would take them for being there.

use std::collections::{HashMap, HashSet};

use tokio_postgres::Client;

use super::Seen;
use super::ledger::Recorded;
use crate::error::Result;
use crate::timescale::chunks;

/// The pieces with rows in whose range the target's hypertable has no chunk at all any more.
///
/// # Errors
/// Whatever the target says.
pub(super) async fn find(target: &Client, seen: &Seen, known: &[Recorded]) -> Result<Vec<Recorded>> {
    let mut copied: HashMap<&str, Vec<&Recorded>> = HashMap::new();
    for piece in known.iter().filter(|piece| piece.copied && piece.rows > 0) {
        copied.entry(piece.relation.as_str()).or_default().push(piece);
    }
    let mut lost = Vec::new();
    for (work, there) in seen.work.iter().zip(&seen.there) {
        let name = work.table.qualified();
        let (Some(hypertable), Some(copied)) = (&there.hypertable, copied.get(name.as_str())) else { continue };
        // What the source has dropped too is in no plan, and may be gone.
        let wanted: HashSet<&str> = work.pieces.iter().map(|piece| piece.place.as_str()).collect();
        let ranges: Vec<(i64, i64)> =
            chunks::chunks(target, hypertable, None).await?.iter().map(|chunk| chunk.range(hypertable)).collect();
        lost.extend(
            copied
                .iter()
                .filter(|piece| wanted.contains(piece.place.as_str()))
                .filter(|piece| !ranges.iter().any(|(from, to)| *from < piece.range.1 && piece.range.0 < *to))
                .map(|piece| (*piece).clone()),
        );
    }
    Ok(lost)
}
