//! Chunks on the target: made with the source's ranges, and filled with compressed batches as they are.
//!
//! A chunk is made in a transaction of its own: making one locks its hypertable, and the application that writes there would wait for as long as
//! the rows take. An empty chunk that is left over does no harm.
//!
//! The table for compressed rows is the extension's own work: `compress_chunk` of an empty chunk makes it with its columns, indexes, storage and grants. Batches go into it
//! only where its columns and the settings of the chunk are the source's to the letter, and the versions are equal.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::chunks::Compressed;
use crate::error::{Context, Result};
use crate::sql;

/// Makes the chunk of these slices, or finds it. `None` where the target divides this range otherwise, or does not let us: rows find their way
/// without.
///
/// # Errors
/// When the connection is lost.
pub async fn make_chunk(target: &Client, hypertable: &str, slices_json: &str) -> Result<Option<(String, String)>> {
    let statement = "SELECT schema_name::text, table_name::text \
                     FROM _timescaledb_functions.create_chunk($1::text::regclass, $2::text::jsonb)";
    let made = target.query_typed(statement, &[(&hypertable, Type::TEXT), (&slices_json, Type::TEXT)]).await;
    match made.context(|| format!("making a chunk of {hypertable}")) {
        Ok(rows) => Ok(rows.first().map(|row| (row.get(0), row.get(1)))),
        Err(error) if error.is_transient() => Err(error),
        Err(error) => {
            tracing::debug!(%error, "no chunk with the source's range");
            Ok(None)
        }
    }
}

/// A column of a table for compressed rows: its name, its type, and whether the type can go in binary.
pub type Column = (String, String, bool);

/// The columns of a table for compressed rows, by name.
///
/// # Errors
/// Whatever the server says.
pub async fn columns(client: &Client, schema: &str, name: &str) -> Result<Vec<Column>> {
    let rows = client
        .query_typed(
            "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), t.typsend <> 0 AND t.typreceive <> 0 \
             FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
             JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1",
            &[(&schema, Type::TEXT), (&name, Type::TEXT)],
        )
        .await
        .context(|| format!("reading the columns of {}", sql::qualified(schema, name)))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

/// Gives an empty chunk a table for compressed rows that takes the source's as they are; answers its name. `None`, and nothing is changed, where the chunk
/// has rows or such a table would be another.
///
/// # Errors
/// Whatever the server says.
pub async fn prepare_for_batches(
    target: &Client,
    extension_schema: &str,
    (schema, name): (&str, &str),
    source: &Compressed,
    source_columns: &[Column],
) -> Result<Option<String>> {
    let chunk = sql::qualified(schema, name);
    let doing = || format!("making room for compressed rows in {chunk}");
    target.batch_execute("BEGIN").await.context(doing)?;
    let prepared = async {
        target.batch_execute(&format!("LOCK TABLE {chunk} IN SHARE MODE")).await?;
        if has_rows(target, &chunk).await? {
            return Ok(None);
        }
        let mut inner = of_chunk(target, schema, name).await?;
        if inner.is_none() {
            let compress = format!(
                "SELECT {}.compress_chunk({}::regclass)",
                sql::identifier(extension_schema),
                sql::literal(&chunk)
            );
            target.batch_execute(&compress).await?;
            inner = of_chunk(target, schema, name).await?;
        }
        let Some(inner) = inner.filter(|inner| inner.settings == source.settings) else { return Ok(None) };
        if columns(target, &inner.schema, &inner.name).await? != source_columns {
            return Ok(None);
        }
        Ok(Some(sql::qualified(&inner.schema, &inner.name)))
    };
    let prepared: Result<Option<String>> = prepared.await;
    let end = if matches!(prepared, Ok(Some(_))) { "COMMIT" } else { "ROLLBACK" };
    let ended = target.batch_execute(end).await.context(doing);
    let prepared = prepared.context(doing)?;
    ended?;
    Ok(prepared)
}

/// The table for compressed rows of a chunk.
///
/// # Errors
/// Whatever the server says.
async fn of_chunk(client: &Client, schema: &str, name: &str) -> Result<Option<Compressed>> {
    let rows = client
        .query_typed(
            "SELECT i.schema_name::text, i.table_name::text, \
                    coalesce((SELECT (pg_catalog.to_jsonb(k) - 'relid' - 'compress_relid')::text \
                     FROM _timescaledb_catalog.compression_settings k \
                     WHERE k.relid = pg_catalog.format('%I.%I', c.schema_name, c.table_name)::regclass), '') \
             FROM _timescaledb_catalog.chunk c JOIN _timescaledb_catalog.chunk i ON i.id = c.compressed_chunk_id \
             WHERE c.schema_name = $1 AND c.table_name = $2",
            &[(&schema, Type::TEXT), (&name, Type::TEXT)],
        )
        .await
        .context(|| format!("looking how {} is compressed", sql::qualified(schema, name)))?;
    Ok(rows.first().map(|row| Compressed { schema: row.get(0), name: row.get(1), settings: row.get(2) }))
}

/// Whether a chunk, or any table, has a row.
///
/// # Errors
/// Whatever the server says.
pub async fn has_rows(client: &Client, relation: &str) -> Result<bool> {
    let row = client.query_typed_one(&format!("SELECT EXISTS (SELECT FROM {relation})"), &[]).await;
    Ok(row.context(|| format!("looking for rows in {relation}"))?.get(0))
}

/// Says in the catalog what the compressed rows that came as they are took before and take now, where our role may: the extension wrote down an empty
/// chunk's sizes. Only its statistics speak of them.
///
/// # Errors
/// Whatever the server says, but for a refusal.
pub async fn record_sizes(target: &Client, (schema, name): (&str, &str), sizes: &[i64; 8]) -> Result<()> {
    let sizes: Vec<String> = sizes.iter().map(i64::to_string).collect();
    let statement = format!(
        "UPDATE _timescaledb_catalog.compression_chunk_size s SET (uncompressed_heap_size, uncompressed_toast_size, \
             uncompressed_index_size, compressed_heap_size, compressed_toast_size, compressed_index_size, \
             numrows_pre_compression, numrows_post_compression) = ROW ({}) \
         FROM _timescaledb_catalog.chunk c WHERE c.id = s.chunk_id AND c.schema_name = {} AND c.table_name = {} \
           AND pg_catalog.has_table_privilege('_timescaledb_catalog.compression_chunk_size', 'UPDATE')",
        sizes.join(", "),
        sql::literal(schema),
        sql::literal(name)
    );
    let may = "SELECT pg_catalog.has_table_privilege('_timescaledb_catalog.compression_chunk_size', 'UPDATE')";
    let doing = || "noting the sizes of a compressed chunk".to_owned();
    if target.query_typed_one(may, &[]).await.context(doing)?.get(0) {
        target.batch_execute(&statement).await.context(doing)?;
    }
    Ok(())
}

/// What [`record_sizes`] takes, as the source has it; `None` where it does not know.
///
/// # Errors
/// Whatever the server says.
pub async fn sizes(source: &Client, (schema, name): (&str, &str)) -> Result<Option<[i64; 8]>> {
    let rows = source
        .query_typed(
            "SELECT uncompressed_heap_size, uncompressed_toast_size, uncompressed_index_size, compressed_heap_size, \
                    compressed_toast_size, compressed_index_size, coalesce(numrows_pre_compression, 0), \
                    coalesce(numrows_post_compression, 0) \
             FROM _timescaledb_catalog.compression_chunk_size s JOIN _timescaledb_catalog.chunk c ON c.id = s.chunk_id \
             WHERE c.schema_name = $1 AND c.table_name = $2",
            &[(&schema, Type::TEXT), (&name, Type::TEXT)],
        )
        .await
        .context(|| "reading the sizes of a compressed chunk".into())?;
    Ok(rows.first().map(|row| std::array::from_fn(|at| row.get(at))))
}

/// Compresses a chunk, or what of it is not compressed yet.
///
/// # Errors
/// Whatever the server says.
pub async fn compress(target: &Client, extension_schema: &str, chunk: &str) -> Result<()> {
    let statement =
        format!("SELECT {}.compress_chunk({}::regclass, true)", sql::identifier(extension_schema), sql::literal(chunk));
    target.batch_execute(&statement).await.context(|| format!("compressing {chunk} on the target"))
}
