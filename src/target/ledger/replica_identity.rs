//! What tables of the source were identified by, before walferry had the whole old row identify them.
//!
//! The table is made where it is needed: most migrations change no replica identity.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::error::{Context, Result};
use crate::source::identity::Before;

/// Notes what is going to be changed, durably: whatever dies from here on, `clean` knows it.
///
/// # Errors
/// Whatever the server says.
pub async fn note_replica_identities(client: &mut Client, tables: &[Before]) -> Result<()> {
    let relids: Vec<i64> = tables.iter().map(|table| i64::from(table.relid)).collect();
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let identities: Vec<&str> = tables.iter().map(|table| table.identity.as_str()).collect();
    let doing = || "noting replica identities in the ledger".to_owned();
    let transaction = client.transaction().await?;
    transaction
        .batch_execute(
            "SET LOCAL synchronous_commit = on; CREATE TABLE IF NOT EXISTS walferry.replica_identity \
             (relid bigint PRIMARY KEY, schema text NOT NULL, name text NOT NULL, identity text NOT NULL)",
        )
        .await
        .context(doing)?;
    // A table that was noted and not changed may have got another identity since.
    transaction
        .execute_typed(
            "INSERT INTO walferry.replica_identity SELECT * FROM unnest($1, $2, $3, $4) \
             ON CONFLICT (relid) DO UPDATE SET schema = excluded.schema, name = excluded.name, identity = excluded.identity",
            &[
                (&relids, Type::INT8_ARRAY),
                (&schemas, Type::TEXT_ARRAY),
                (&names, Type::TEXT_ARRAY),
                (&identities, Type::TEXT_ARRAY),
            ],
        )
        .await
        .context(doing)?;
    transaction.commit().await.context(doing)
}

/// All that was noted; none where nothing was ever changed.
///
/// # Errors
/// Whatever the server says.
pub async fn replica_identities(client: &Client) -> Result<Vec<Before>> {
    let doing = || "reading replica identities from the ledger".to_owned();
    let exists = "SELECT pg_catalog.to_regclass('walferry.replica_identity') IS NOT NULL";
    if !client.query_typed_one(exists, &[]).await.context(doing)?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let rows = client
        .query_typed("SELECT relid, schema, name, identity FROM walferry.replica_identity ORDER BY relid", &[])
        .await
        .context(doing)?;
    let before = |row: &tokio_postgres::Row| Before {
        relid: u32::try_from(row.get::<_, i64>(0)).unwrap_or_default(),
        schema: row.get(1),
        name: row.get(2),
        identity: row.get(3),
    };
    Ok(rows.iter().map(before).collect())
}
