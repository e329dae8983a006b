//! The ledger's side of a table that changed: its new definition, in the transaction that brings the first rows of it.

use tokio_postgres::Client;

use super::route::Routing;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;

/// Writes a table's new definition, and which objects of the catalog's fingerprint are dealt with by it.
///
/// # Errors
/// Whatever the server says.
pub async fn redefine(
    client: &Client,
    table: &Table,
    routing: Routing,
    fingerprint: &[(String, Option<String>)],
) -> Result<()> {
    let doing = || format!("writing into the ledger that {} has changed", table.qualified());
    let definition = serde_json::to_string(table).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    let updated = client
        .execute(
            "UPDATE walferry.source_table SET definition = $2::text::jsonb, routing = $3 WHERE relid = $1",
            &[&i64::from(table.relid), &definition, &routing.name()],
        )
        .await
        .context(doing)?;
    if updated != 1 {
        return Err(Error::new(ErrorKind::Other, "the ledger does not have that table").context(doing()));
    }
    let objects: Vec<&str> = fingerprint.iter().map(|(object, _)| object.as_str()).collect();
    let hashes: Vec<Option<&str>> = fingerprint.iter().map(|(_, hash)| hash.as_deref()).collect();
    client.execute("DELETE FROM walferry.fingerprint WHERE object = ANY ($1)", &[&objects]).await.context(doing)?;
    client
        .execute(
            "INSERT INTO walferry.fingerprint SELECT DISTINCT * FROM unnest($1::text[], $2::text[]) u(object, hash) \
             WHERE hash IS NOT NULL",
            &[&objects, &hashes],
        )
        .await
        .context(doing)?;
    Ok(())
}
