//! A chunk as a table of the migration: it is copied by itself, under its own snapshot and with its own columns, and what changes in
//! it is applied to its hypertable.
//!
//! The stream names chunks, never the hypertable. On the target the same rows may stand in other chunks, since the extension there
//! makes and compresses them by itself; so what is applied goes to the hypertable, and the extension finds the chunk, makes it, or
//! decompresses of it what a change needs. All chunks of a hypertable go to one session: whoever makes a chunk locks the hypertable
//! until the commit, and a sibling that waits for that would wait at the barrier for ever.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::source::{self, Chunk, CompressedChunk, Database, Dimension, Hypertable};
use crate::error::Result;
use crate::source::catalog::Table;
use crate::sql;

/// What a table that is a chunk belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkOf {
    /// The hypertable's OID on the source, by which changes are spread over the sessions.
    pub relid: u32,
    /// The hypertable's schema, unquoted.
    pub schema: String,
    /// The hypertable's name, unquoted.
    pub name: String,
    /// The hypertable's id in the extension's catalog, the same on both servers.
    pub hypertable: i32,
    /// The chunk's id in the source's catalog.
    pub chunk: i32,
    /// Columns of the hypertable's dimensions: a condition on them leaves the other chunks alone.
    pub dimensions: Vec<String>,
    /// Its range in each of them, the end not in it; none where an earlier version recorded it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<(i64, i64)>,
    /// The target's chunk of just that range, as `"schema"."name"`, where a session has found it.
    #[serde(skip)]
    pub on_target: Option<String>,
    /// The relation of its compressed rows and the bits of its status, when the ledger took it up.
    pub compressed: Option<CompressedChunk>,
    /// Those bits (see [`Chunk::status`]).
    pub status: i32,
    /// It came after the slot, or hypertables are made again on the target: its rows go to the hypertable, and the target has no chunk of
    /// its name.
    #[serde(default)]
    pub is_late: bool,
    /// The source has dropped it: nothing more of it is applied.
    #[serde(default)]
    pub is_gone: bool,
    /// What the target calls the hypertable where that is another name: schema and name, unquoted. Read with the ledger, not kept in it.
    #[serde(skip)]
    pub stands_in: Option<(String, String)>,
}

impl ChunkOf {
    /// What a chunk of a hypertable belongs to.
    pub fn of(chunk: &Chunk, hypertable: &Hypertable) -> ChunkOf {
        let range = |dimension: &Dimension| {
            let slice = chunk.slices.iter().find(|slice| slice.dimension == dimension.id)?;
            Some((slice.start, slice.end))
        };
        ChunkOf {
            relid: hypertable.relid,
            schema: hypertable.schema.clone(),
            name: hypertable.name.clone(),
            hypertable: hypertable.id,
            chunk: chunk.id,
            dimensions: hypertable.dimensions.iter().map(|dimension| dimension.column.clone()).collect(),
            ranges: hypertable.dimensions.iter().map(range).collect::<Option<_>>().unwrap_or_default(),
            on_target: None,
            compressed: chunk.compressed.clone(),
            status: chunk.status,
            is_late: false,
            is_gone: false,
            stands_in: None,
        }
    }

    /// What changes of its rows are applied to.
    pub fn applied_to(&self) -> String {
        self.on_target.clone().unwrap_or_else(|| self.qualified())
    }

    /// The target's hypertable as `"schema"."name"`.
    pub fn qualified(&self) -> String {
        let (schema, name) = self.hypertable_on_target();
        sql::qualified(schema, name)
    }

    /// Schema and name of the target's hypertable, unquoted.
    pub fn hypertable_on_target(&self) -> (&str, &str) {
        self.stands_in.as_ref().map_or((&self.schema, &self.name), |(schema, name)| (schema, name))
    }

    /// Where it lies, as the extension's `create_chunk` takes it.
    pub fn slices_json(&self) -> String {
        let slices: BTreeMap<&String, &(i64, i64)> = self.dimensions.iter().zip(&self.ranges).collect();
        // A map of strings and numbers always has a JSON form.
        serde_json::to_string(&slices).unwrap_or_default()
    }
}

/// Relations that are chunks, compressed or not, and the empty hypertables inside of compression: they come and go by themselves.
/// A condition on a relation `c` or the table of an index `c`, where the extension is installed.
pub(crate) const NOT_A_CHUNK: &str = "coalesce((SELECT x.indrelid FROM pg_catalog.pg_index x WHERE x.indexrelid = c.oid), c.oid) NOT IN ( \
     SELECT chunk.oid FROM pg_catalog.pg_class chunk JOIN pg_catalog.pg_namespace s ON s.oid = chunk.relnamespace \
     JOIN _timescaledb_catalog.chunk k ON k.schema_name = s.nspname AND k.table_name = chunk.relname \
     UNION ALL SELECT chunk.oid FROM pg_catalog.pg_class chunk JOIN pg_catalog.pg_namespace s ON s.oid = chunk.relnamespace \
     JOIN _timescaledb_catalog.hypertable k ON k.schema_name = s.nspname AND k.table_name = chunk.relname \
     WHERE k.compression_state = 2)";

/// Says of tables which of them are chunks, and leaves out those that only hold compressed rows: they go with their chunk.
///
/// # Errors
/// Whatever the server says.
pub async fn arrange(client: &Client, tables: &mut Vec<Table>) -> Result<()> {
    let Some(database) = source::read(client).await? else { return Ok(()) };
    arrange_by(&database, tables);
    let inside = source::inside_compression(client).await?;
    tables.retain(|table| !inside.contains(&table.relid));
    Ok(())
}

fn arrange_by(database: &Database, tables: &mut Vec<Table>) {
    let hypertables: BTreeMap<i32, &Hypertable> = database.hypertables.iter().map(|of| (of.id, of)).collect();
    let chunks: BTreeMap<u32, &Chunk> = database.chunks.iter().map(|chunk| (chunk.relid, chunk)).collect();
    let compressed: BTreeSet<u32> =
        database.chunks.iter().filter_map(|chunk| Some(chunk.compressed.as_ref()?.relid)).collect();
    tables.retain(|table| !compressed.contains(&table.relid));
    let roots: BTreeSet<u32> = database.hypertables.iter().map(|hypertable| hypertable.relid).collect();
    for table in tables {
        table.is_hypertable = roots.contains(&table.relid);
        let chunk = chunks.get(&table.relid);
        table.chunk = chunk.and_then(|chunk| Some(ChunkOf::of(chunk, hypertables.get(&chunk.hypertable)?)));
    }
}
