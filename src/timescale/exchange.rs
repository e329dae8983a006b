//! A chunk whose rows are on the target already, compared with the source again (`--recopy`, `repair`, `resync`).
//!
//! Its rows stand in whatever chunks the target has for its range, so what is compared is that range: the chunk's rows on the source, decompressed,
//! and those of the hypertable on the target that its slices demand. Where the sums of their hashes differ, the target's rows of
//! the range go, and the source's come in their place, by way of the hypertable; other chunks are not touched. They come uncompressed, and the policy compresses
//! them again after the cutover.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use tokio_postgres::Client;

use super::chunk::ChunkOf;
use super::chunks::{self, Hypertable};
use super::copy;
use crate::error::{Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::verify::RangeHash;

/// What chunks of one hypertable have in common, asked for once.
#[derive(Default)]
pub(crate) struct Hypertables(HashMap<i32, (Hypertable, RangeHash)>);

/// How the target has a chunk's rows.
pub(crate) enum Found {
    /// The snapshot does not show the rows any more (H4).
    Stale,
    /// As the source has them.
    Same,
    /// Otherwise.
    Other(Box<Other>),
}

/// What has to be exchanged.
pub(crate) struct Other {
    /// Takes the target's rows of the range away.
    pub(crate) delete: String,
    /// Reads those of the source.
    pub(crate) out: String,
    /// The hypertable on the target, to be written to.
    pub(crate) into: Table,
    /// How many rows the source has.
    pub(crate) rows: i64,
}

/// Has the extension at work in a session of the target, which may have been opened to copy chunks as ordinary tables.
pub(crate) const AT_WORK: &str = "SELECT pg_catalog.set_config('timescaledb.restoring', 'off', false) \
     WHERE pg_catalog.current_setting('timescaledb.restoring', true) = 'on'";

/// Compares a chunk: the session on the source is in a transaction under the snapshot, and has the chunk locked.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn look(
    source: &mut Client,
    target: &Client,
    (table, chunk): (&Table, &ChunkOf),
    format: &str,
    known: &mut Hypertables,
) -> Result<Found> {
    if copy::look(source, table, chunk).await?.is_none() {
        return Ok(Found::Stale);
    }
    target.batch_execute(AT_WORK).await?;
    let of = Table { schema: chunk.schema.clone(), name: chunk.name.clone(), chunk: None, ..table.clone() };
    let (schema, name) = chunk.hypertable_on_target();
    let into = Table { schema: schema.to_owned(), name: name.to_owned(), ..of.clone() };
    let (hypertable, hash) = match known.0.entry(chunk.hypertable) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => {
            let hypertable = chunks::hypertable_with_id(source, chunk.hypertable).await?.ok_or_else(|| {
                Error::new(ErrorKind::SchemaChanged, format!("{} is no hypertable any more", chunk.qualified()))
            })?;
            let hash = RangeHash::new((&of, source), (&into, target)).await?;
            place.insert((hypertable, hash))
        }
    };
    let Some(now) = chunks::chunks(source, hypertable, Some((&table.schema, &table.name))).await?.pop() else {
        return Ok(Found::Stale);
    };
    let condition = now.condition(hypertable);
    let (from, of_target) = (table.qualified(), chunk.qualified());
    let (here, there) = tokio::try_join!(hash.of(source, &from, "true"), hash.of(target, &of_target, &condition))?;
    if here == there {
        return Ok(Found::Same);
    }
    let out = format!("COPY (SELECT {} FROM {}) TO STDOUT (FORMAT {format})", table.column_list(), table.qualified());
    let delete = format!("DELETE FROM {of_target} AS t WHERE {condition}");
    Ok(Found::Other(Box::new(Other { delete, out, into, rows: here.rows })))
}
