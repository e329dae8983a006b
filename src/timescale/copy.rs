//! A chunk is copied as one: its rows, and the relation of its compressed rows as it is, under one snapshot (H3), without
//! decompressing anything.
//!
//! That needs the target's catalog to say of the chunk what the source's said in that snapshot. It has been taken over under the
//! slot's snapshot ([`super::prepare`]); a copy under another may find the chunk compressed, recompressed or decompressed since. Then
//! the target's chunk is made an ordinary one, and the rows are read from the source decompressed. So is a chunk that came late, whose
//! rows go to the hypertable.
//!
//! How it dies: all of it is one transaction on the target, with the part's row in the ledger (I2).

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::chunk::ChunkOf;
use crate::connection::Session;
use crate::connection::wire::RawSession;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;

/// How the rows of a chunk go over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// As an ordinary table: nothing of it is compressed, or it stands for something else.
    AsTable,
    /// With the relation of its compressed rows, as both are: the statement that reads those and the one that writes them.
    Raw {
        /// Reads the compressed rows.
        out: String,
        /// Writes them.
        into: String,
    },
    /// Decompressed: the statement that reads them all.
    Rows(String),
    /// Not at all: a hypertable's rows are in its chunks.
    Nothing,
    /// The snapshot does not show it any more (H4).
    Stale,
}

/// Whether what was asked of a table shows that it is a chunk that the source has dropped.
pub fn is_dropped(table: &Table, answer: &Result<Vec<Option<String>>>) -> bool {
    let undefined = |state: &SqlState| matches!(*state, SqlState::UNDEFINED_TABLE | SqlState::INVALID_SCHEMA_NAME);
    table.chunk.is_some() && answer.as_ref().is_err_and(|error| error.sqlstate().is_some_and(undefined))
}

/// Whether a chunk that is gone was merged into one that was there beside it, of the ledger's `known`: then its rows are not gone.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn is_merged(source: &mut RawSession, chunk: &ChunkOf, known: impl Fn(u32) -> bool) -> Result<bool> {
    if chunk.ranges.is_empty() {
        return Ok(false);
    }
    let range = |(column, (start, end)): (&String, &(i64, i64))| {
        format!("({}, {start}::bigint, {end}::bigint)", sql::literal(column))
    };
    let ranges: Vec<String> = chunk.dimensions.iter().zip(&chunk.ranges).map(range).collect();
    let in_its_place = format!(
        "SELECT c.oid::text FROM _timescaledb_catalog.chunk k \
         JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(pg_catalog.format('%I.%I', k.schema_name, k.table_name)) \
         WHERE k.hypertable_id = {} AND k.id <> {} AND NOT EXISTS ( \
             SELECT FROM (VALUES {}) its(dimension, range_start, range_end) WHERE NOT EXISTS ( \
                 SELECT FROM _timescaledb_catalog.chunk_constraint n \
                 JOIN _timescaledb_catalog.dimension_slice s ON s.id = n.dimension_slice_id \
                 JOIN _timescaledb_catalog.dimension d ON d.id = s.dimension_id \
                 WHERE n.chunk_id = k.id AND d.column_name = its.dimension \
                   AND s.range_start < its.range_end AND its.range_start < s.range_end))",
        chunk.hypertable,
        chunk.chunk,
        ranges.join(", ")
    );
    let found =
        source.simple_query(&in_its_place).await.context(|| "looking for what a chunk was merged into".into())?;
    let relids = found.iter().filter_map(|row| row.first()?.as_deref()?.parse().ok());
    Ok(relids.into_iter().any(known))
}

/// The rows of a chunk are not where they were when the ledger took it up: which of them another chunk has brought over can no longer be
/// told.
pub fn was_merged_or_split(table: &Table) -> Error {
    let text = format!("{} was merged with another chunk, or split, before it was copied", table.qualified());
    Error::new(ErrorKind::SchemaChanged, text).hint(
        "merge_chunks, split_chunk, and compression with compress_chunk_time_interval do that; after the copy they are followed. Let none run \
         until then, and begin anew into an empty target: `walferry clean`, then `walferry migrate`.",
    )
}

/// Writes the decompressed rows of a chunk: into the target's chunk, or for one that came late into the hypertable.
pub fn copy_in_statement(table: &Table, format: &str) -> String {
    let is_late = table.chunk.as_ref().is_some_and(|chunk| chunk.is_late);
    let into = if is_late { table.inserted_into() } else { table.qualified() };
    format!("COPY {into} ({}) FROM STDIN (FORMAT {format})", table.column_list())
}

/// Decides how a chunk is copied, in the source's transaction under the part's snapshot; locks what is read.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn how(source: &mut RawSession, table: &Table, format: &str) -> Result<How> {
    let Some(chunk) = &table.chunk else {
        return Ok(if table.is_hypertable { How::Nothing } else { How::AsTable });
    };
    let rows = format!("COPY (SELECT {} FROM {}) TO STDOUT (FORMAT {format})", table.column_list(), table.qualified());
    let Some(now) = look(source, table, chunk).await? else { return Ok(How::Stale) };
    if !now.lies_where(chunk) {
        return Err(was_merged_or_split(table));
    }
    let Now { status, relation, .. } = now;
    if chunk.is_late {
        return Ok(How::Rows(rows));
    }
    let recorded = chunk.compressed.as_ref().map(|compressed| compressed.relid.to_string());
    let unchanged = status.as_deref() == Some(chunk.status.to_string().as_str()) && relation == recorded;
    Ok(match (&chunk.compressed, unchanged) {
        (_, false) => How::Rows(rows),
        (None, true) => How::AsTable,
        (Some(compressed), true) => {
            let name = compressed.qualified();
            How::Raw {
                out: format!("COPY {name} TO STDOUT (FORMAT binary)"),
                into: format!("COPY {name} FROM STDIN (FORMAT binary)"),
            }
        }
    })
}

/// How the source has a chunk in a snapshot.
pub(super) struct Now {
    /// The extension's bits, as text.
    status: Option<String>,
    /// The OID of the relation of its compressed rows, as text.
    relation: Option<String>,
    /// Where it lies, as text.
    ranges: Option<String>,
}

impl Now {
    /// Whether it lies where it did when the ledger took it up. Rows that another chunk has brought over would come twice else; a comparison
    /// takes it as it is.
    fn lies_where(&self, chunk: &ChunkOf) -> bool {
        let mut ranges = chunk.ranges.clone();
        ranges.sort_unstable();
        let recorded = ranges.iter().map(|(start, end)| format!("{start} {end}")).collect::<Vec<_>>().join(",");
        self.ranges.as_ref().is_none_or(|now| recorded.is_empty() || *now == recorded)
    }
}

/// Looks at a chunk in the session's snapshot, and locks the relation of its compressed rows; `None` where the snapshot does not show
/// its rows any more (H4).
///
/// # Errors
/// Whatever the server says.
pub(super) async fn look<S: Session>(source: &mut S, table: &Table, chunk: &ChunkOf) -> Result<Option<Now>> {
    let state = "SELECT k.status::text, zn.oid::text, pg_catalog.quote_ident(z.schema_name), pg_catalog.quote_ident(z.table_name), \
             (SELECT pg_catalog.string_agg(s.range_start || ' ' || s.range_end, ',' ORDER BY s.range_start, s.range_end) \
              FROM _timescaledb_catalog.chunk_constraint n JOIN _timescaledb_catalog.dimension_slice s ON s.id = n.dimension_slice_id \
              WHERE n.chunk_id = k.id) \
         FROM _timescaledb_catalog.chunk k LEFT JOIN _timescaledb_catalog.chunk z ON z.id = k.compressed_chunk_id \
         LEFT JOIN pg_catalog.pg_class zn ON zn.relname = z.table_name \
              AND zn.relnamespace = (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = z.schema_name)";
    let now = source.first_row(&format!("{state} WHERE k.id = {}", chunk.chunk)).await?;
    let field = |at: usize| now.get(at).cloned().flatten();
    let (Some(relid), Some(schema), Some(name)) = (field(1), field(2), field(3)) else {
        return Ok(Some(Now { status: field(0), relation: None, ranges: field(4) }));
    };
    let relation = format!("{schema}.{name}");
    // Locked until the copy is over. What decompression has dropped, or recompression emptied since, the snapshot does not show.
    let is_same = format!(
        "LOCK TABLE ONLY {relation} IN ACCESS SHARE MODE; \
         SELECT c.relfilenode = pg_catalog.pg_relation_filenode(c.oid) FROM pg_catalog.pg_class c \
         WHERE c.oid = {}::pg_catalog.regclass",
        sql::literal(&relation)
    );
    let is_same = match source.first_row(&is_same).await {
        Ok(row) => row.first().and_then(Option::as_deref) == Some("t"),
        Err(error) if error.sqlstate() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !is_same || !shows_rows_beside(source, table, field(0).as_deref()).await? {
        return Ok(None);
    }
    Ok(Some(Now { status: field(0), relation: Some(relid), ranges: field(4) }))
}

/// Whether the rows beside the compressed ones are read that the snapshot shows, by the chunk's status in it.
///
/// The extension reads its catalog as it is now, whatever the snapshot: of a chunk that has been recompressed since, and has no such rows now,
/// it reads the compressed ones only, and those are as the snapshot shows them. From the lock on, nobody can change that: whoever
/// takes the mark of such rows away needs EXCLUSIVE, and writers do not meet the lock.
async fn shows_rows_beside<S: Session>(source: &mut S, table: &Table, status: Option<&str>) -> Result<bool> {
    let is_partial = |status: Option<&str>| {
        status.and_then(|status| status.parse().ok()).is_some_and(|bits: i32| bits & PARTIAL != 0)
    };
    if !is_partial(status) {
        return Ok(true);
    }
    let name = table.qualified();
    let now = format!(
        "LOCK TABLE ONLY {name} IN ROW SHARE MODE; SELECT _timescaledb_functions.chunk_status({}::pg_catalog.regclass)::text",
        sql::literal(&name)
    );
    let now = source.first_row(&now).await?;
    Ok(is_partial(now.first().and_then(Option::as_deref)))
}

/// Of a chunk's status: rows stand beside the compressed ones.
const PARTIAL: i32 = 8;

/// Has the extension at work in the session's transaction, where it is not: who is no superuser may not say even that.
const AT_WORK: &str = "SELECT pg_catalog.set_config('timescaledb.restoring', 'off', true) \
     WHERE pg_catalog.current_setting('timescaledb.restoring', true) = 'on'";

/// Whether a statement of `pg_dump` makes an index of a relation with compressed rows.
pub fn is_of_compressed_rows(statement: &str) -> bool {
    let on = statement.split_once(" ON ").map_or("", |(_, on)| on.trim_start_matches("ONLY "));
    on.starts_with("_timescaledb_internal.compress_hyper_")
}

/// Makes the target's chunk ready for what comes, in the open transaction: empty, and an ordinary one where the rows come decompressed.
///
/// # Errors
/// Whatever the server says.
pub async fn make_ready(target: &Client, chunk: &ChunkOf, table: &Table, how: &How) -> Result<()> {
    let doing = || format!("making {} on the target ready for its rows", table.qualified());
    match how {
        How::AsTable | How::Nothing | How::Stale => Ok(()),
        // What an earlier copy left of it (H3).
        How::Raw { .. } => match &chunk.compressed {
            Some(compressed) => {
                target.batch_execute(&format!("TRUNCATE ONLY {}", compressed.qualified())).await.context(doing)
            }
            None => Ok(()),
        },
        How::Rows(_) => {
            target.batch_execute(AT_WORK).await.context(doing)?;
            if chunk.is_late {
                return Ok(());
            }
            let is_compressed: Option<(String, String)> = target
                .query_typed_opt(
                    &format!(
                        "SELECT z.schema_name::text, z.table_name::text FROM _timescaledb_catalog.chunk k \
                         JOIN _timescaledb_catalog.chunk z ON z.id = k.compressed_chunk_id WHERE k.id = {}",
                        chunk.chunk
                    ),
                    &[],
                )
                .await
                .context(doing)?
                .map(|row| (row.get(0), row.get(1)));
            let Some((schema, name)) = is_compressed else { return Ok(()) };
            let functions: String = target
                .query_typed_one(
                    "SELECT n.nspname::text FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace \
                     WHERE e.extname = 'timescaledb'",
                    &[],
                )
                .await
                .context(doing)?
                .get(0);
            let statements = format!(
                "SET LOCAL timescaledb.restoring = on; TRUNCATE ONLY {}; TRUNCATE ONLY {}; SET LOCAL timescaledb.restoring = off; \
                 SELECT {}({}::pg_catalog.regclass, true)",
                sql::qualified(&schema, &name),
                table.qualified(),
                sql::qualified(&functions, "decompress_chunk"),
                sql::literal(&table.qualified())
            );
            target.batch_execute(&statements).await.context(doing)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};
    use crate::source::catalog;

    const SETTINGS: [(&str, &str); 2] =
        [("shared_preload_libraries", "timescaledb"), ("timescaledb.telemetry_level", "off")];
    /// A chunk with 20 compressed rows and 5 beside them.
    const PARTIAL_CHUNK: &str = "CREATE TABLE m (time timestamptz NOT NULL, device int, v int); \
        SELECT create_hypertable('m', 'time', chunk_time_interval => interval '1 day'); \
        ALTER TABLE m SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time'); \
        INSERT INTO m SELECT '2025-01-01 00:00Z'::timestamptz + n * interval '1 minute', n % 2, n FROM generate_series(1, 20) n; \
        SELECT compress_chunk(c) FROM show_chunks('m') c; \
        INSERT INTO m SELECT '2025-01-01 12:00Z'::timestamptz + n * interval '1 minute', n % 2, n FROM generate_series(1, 5) n";
    const RECOMPRESS: &str = "SELECT compress_chunk(c, true) FROM show_chunks('m') c";

    /// A server with the extension, where this machine has it.
    async fn server() -> Option<ThrowawayServer> {
        let programs = ServerPrograms::find(None).unwrap();
        let shared = std::process::Command::new(programs.bin("pg_config")).arg("--sharedir").output();
        let shared = match shared {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            _ => format!("/usr/share/postgresql/{}", programs.major()),
        };
        if !std::path::Path::new(&shared).join("extension/timescaledb.control").exists() {
            eprintln!(
                "\n==== SKIPPED, NOT TESTED: recompression while a chunk is read: the extension timescaledb is not installed ====\n"
            );
            return None;
        }
        Some(ThrowawayServer::start(&programs, "recompressed", &SETTINGS).await.unwrap())
    }

    /// The chunk, and a session with a snapshot.
    async fn begun(server: &ThrowawayServer, database: &str) -> (Table, Client, Client) {
        let admin = server.connect("postgres").await.unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
        let other = server.connect(database).await.unwrap();
        other.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
        for statement in PARTIAL_CHUNK.split("; ") {
            other.batch_execute(statement).await.unwrap();
        }
        let chunk = catalog::tables(&other).await.unwrap().into_iter().find(|table| table.chunk.is_some()).unwrap();
        let reader = server.connect(database).await.unwrap();
        reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1").await.unwrap();
        (chunk, reader, other)
    }

    async fn rows(reader: &Client, table: &Table) -> i64 {
        let query = format!("SELECT count(*) FROM {}", table.qualified());
        reader.query_one(&query, &[]).await.unwrap().get(0)
    }

    #[tokio::test]
    async fn a_chunk_recompressed_behind_the_look_at_it_is_read_whole_and_is_stale_where_it_was_before() {
        let Some(server) = server().await else { return };
        let (table, mut reader, other) = begun(&server, "before").await;
        other.batch_execute(RECOMPRESS).await.unwrap();
        let chunk = table.chunk.clone().unwrap();
        assert!(
            look(&mut reader, &table, &chunk).await.unwrap().is_none(),
            "the rows beside the compressed ones are not read"
        );
        assert!(rows(&reader, &table).await < 25, "the snapshot shows 25 rows, and the extension reads fewer");

        let (table, mut reader, other) = begun(&server, "between").await;
        let chunk = table.chunk.clone().unwrap();
        assert!(look(&mut reader, &table, &chunk).await.unwrap().is_some());
        // Nobody is held up: what takes the mark of such rows away goes on without that where it does not get its lock.
        other.batch_execute("SET lock_timeout = '1s'; INSERT INTO m VALUES ('2025-01-01 13:00Z', 1, 1)").await.unwrap();
        other.batch_execute(RECOMPRESS).await.unwrap();
        assert_eq!(rows(&reader, &table).await, 25);
    }
}
