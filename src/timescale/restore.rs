//! Hypertables on the target, made between the schema's tables and their rows.
//!
//! ```text
//!   prepare: CREATE EXTENSION ─► the dump's items without ONLY, and what wakes the policies ─► ledger
//!   pre-data, one transaction: tables ─► create_hypertable … ─► mark         (all or nothing, I2)
//!   before the rows: their indexes and keys, because a chunk may be compressed as soon as its rows are there
//!   the deciding transaction: the policies wake
//! ```

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::create;
use super::declaration::Hypertable;
use super::source;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::target::ledger::{self, SchemaItem, Section};

/// A table with what is declared of it.
pub fn marked(table: Table, declared: &[Hypertable]) -> Table {
    let time = of(&table, declared).map(|hypertable| hypertable.time.clone());
    Table { hypertable: time, ..table }
}

/// What is declared of a table.
pub fn of<'a>(table: &Table, declared: &'a [Hypertable]) -> Option<&'a Hypertable> {
    declared.iter().find(|hypertable| (&hypertable.schema, &hypertable.name) == (&table.schema, &table.name))
}

/// The schema of the extension's functions; `None` where the database does not have it.
///
/// # Errors
/// Whatever the server says.
pub async fn extension(client: &Client) -> Result<Option<String>> {
    Ok(source::extension(client).await?.map(|extension| extension.schema))
}

/// Makes the extension where it is not, and answers the schema of its functions. Not a part of what a migration takes back: the
/// next try finds it.
///
/// # Errors
/// What the server says, with what to do.
pub async fn ensure_extension(target: &Client) -> Result<String> {
    if let Some(schema) = extension(target).await? {
        return Ok(schema);
    }
    target.batch_execute("CREATE EXTENSION timescaledb SCHEMA public").await.map_err(|error| {
        Error::from(error).context("creating the extension timescaledb on the target").hint(
            "Create it there yourself, as a role that may: CREATE EXTENSION timescaledb. Then run the same command again.",
        )
    })?;
    Ok("public".to_owned())
}

/// The schema's items as they work where these tables are hypertables, and behind them what the deciding transaction does.
pub fn fit_items(
    mut items: Vec<SchemaItem>,
    tables: &[Table],
    declared: &[Hypertable],
    extension: &str,
) -> Vec<SchemaItem> {
    let declared: Vec<(u32, &Hypertable)> =
        tables.iter().filter_map(|table| Some((table.relid, of(table, declared)?))).collect();
    for item in items.iter_mut().filter(|item| item.section != Section::PreData) {
        // A foreign key may be an item of the table that it refers to.
        let is_of = |(relid, hypertable): &(u32, &Hypertable)| {
            item.relid == Some(*relid) || create::alters_only(&item.statement, hypertable)
        };
        if declared.iter().any(is_of) {
            item.statement = create::without_only(&item.statement);
        }
    }
    items.extend(declared.into_iter().filter_map(|(relid, hypertable)| {
        Some(SchemaItem {
            section: Section::AtCutover,
            kind: WAKE.to_owned(),
            name: hypertable.qualified(),
            relid: Some(relid),
            statement: create::wake(hypertable, extension)?,
        })
    }));
    items
}

/// The kind of the items that wake policies.
pub(crate) const WAKE: &str = "TIMESCALEDB POLICIES";

/// Makes the hypertables in the transaction that has made their tables.
///
/// # Errors
/// What the server says, with the table; `Other` where the extension has gone since.
pub async fn create_all(client: &Client) -> Result<()> {
    let declared = ledger::load(client).await?.map(|migration| migration.scope.hypertables).unwrap_or_default();
    if declared.is_empty() {
        return Ok(());
    }
    let extension = extension(client).await?.ok_or_else(|| {
        Error::new(ErrorKind::Other, "the target does not have the extension timescaledb any more")
            .hint("CREATE EXTENSION timescaledb there, then run the same command again.")
    })?;
    let indexed: BTreeSet<i64> = client
        .query_typed(
            "SELECT DISTINCT relid FROM walferry.schema_item WHERE kind IN ('INDEX', 'CONSTRAINT') AND relid IS NOT NULL",
            &[],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    for entry in ledger::tables(client).await? {
        let Some(hypertable) = of(&entry.table, &declared) else { continue };
        let time_index = !indexed.contains(&i64::from(entry.table.relid));
        for statement in create::statements(hypertable, &extension, time_index) {
            client
                .batch_execute(&statement)
                .await
                .context(|| format!("making the hypertable {} on the target: {statement}", hypertable.qualified()))?;
        }
    }
    Ok(())
}
