//! The ledger's side of a table that changed: its new definition, in the transaction that brings the first rows of it.

use tokio_postgres::Client;

use super::route::Routing;
use super::writer::Writer;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;

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
    let doing = || doing(table);
    let (definition, fingerprint) = statements(table, routing, fingerprint)?;
    known(client.execute(&definition, &[]).await.context(doing)?, table)?;
    for statement in fingerprint {
        client.execute(&statement, &[]).await.context(doing)?;
    }
    Ok(())
}

/// The same in the open transaction of an apply session.
///
/// # Errors
/// Whatever the server says.
pub async fn redefine_in(
    writer: &mut Writer,
    table: &Table,
    routing: Routing,
    fingerprint: &[(String, Option<String>)],
) -> Result<()> {
    let doing = || doing(table);
    let (definition, fingerprint) = statements(table, routing, fingerprint)?;
    known(writer.execute(definition, &[]).await.context(doing)?, table)?;
    for statement in fingerprint {
        writer.execute(statement, &[]).await.context(doing)?;
    }
    Ok(())
}

fn doing(table: &Table) -> String {
    format!("writing into the ledger that {} has changed", table.qualified())
}

fn known(updated: u64, table: &Table) -> Result<()> {
    if updated == 1 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Other, "the ledger does not have that table").context(doing(table)))
}

/// What writes the definition, and what writes the fingerprint.
fn statements(
    table: &Table,
    routing: Routing,
    fingerprint: &[(String, Option<String>)],
) -> Result<(String, Vec<String>)> {
    let definition = serde_json::to_string(table).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    let definition = format!(
        "UPDATE walferry.source_table SET definition = {}::jsonb, routing = {} WHERE relid = {}",
        sql::literal(&definition),
        sql::literal(routing.name()),
        table.relid
    );
    let objects: Vec<String> = fingerprint.iter().map(|(object, _)| sql::literal(object)).collect();
    let mut statements = Vec::new();
    if !objects.is_empty() {
        statements.push(format!("DELETE FROM walferry.fingerprint WHERE object IN ({})", objects.join(", ")));
    }
    let present = |(object, hash): &(String, Option<String>)| {
        hash.as_ref().map(|hash| format!("({}, {})", sql::literal(object), sql::literal(hash)))
    };
    let mut rows: Vec<String> = fingerprint.iter().filter_map(present).collect();
    rows.sort();
    rows.dedup();
    if !rows.is_empty() {
        statements.push(format!("INSERT INTO walferry.fingerprint (object, hash) VALUES {}", rows.join(", ")));
    }
    Ok((definition, statements))
}
