//! Unlogged tables: nothing of them is in the stream, so they are copied behind the fence, all at once (H14).
//!
//! What their copy at the start brought is thrown away. So much that applications would wait for it for long is not copied: such a
//! table is made logged, or waived by name, and then stays as it was copied at the start.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::ready::Finding;
use crate::copy;
use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::sql;
use crate::target::role::ApplyRole;

/// Unlogged tables together that are copied while applications wait, in bytes with TOAST and without indexes.
pub const BYTES_MAX: i64 = 1 << 30;

const NAME: &str = "unlogged tables";

/// As they are waived. Not as the catalog's fingerprint names tables: waiving that a table has changed must not leave its rows behind.
fn object(table: &Table) -> String {
    let part = |name: &str| {
        let plain = name.bytes().enumerate().all(|(at, byte)| {
            byte == b'_' || byte.is_ascii_lowercase() || (at > 0 && (byte.is_ascii_digit() || byte == b'$'))
        });
        if plain && !name.is_empty() { name.to_owned() } else { sql::identifier(name) }
    };
    format!("unlogged table {}.{}", part(&table.schema), part(&table.name))
}

/// Those that have to be copied.
fn to_copy<'a>(tables: &[&'a Table], waive: &[String]) -> Vec<&'a Table> {
    tables.iter().copied().filter(|table| table.unlogged && !waive.contains(&object(table))).collect()
}

/// Whether they are small enough.
///
/// # Errors
/// Whatever the source says.
pub(super) async fn fit(source: &Client, tables: &[&Table], waive: &[String]) -> Result<Finding> {
    let tables = to_copy(tables, waive);
    if tables.is_empty() {
        return Ok(Finding::ok(NAME, "none has to be copied behind the fence"));
    }
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let row = source
        .query_typed_one(
            "SELECT coalesce(sum(pg_catalog.pg_table_size(c.oid)), 0)::int8 FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest($1, $2))",
            &[(&schemas, Type::TEXT_ARRAY), (&names, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "asking for the size of the source's unlogged tables".into())?;
    let bytes: i64 = row.get(0);
    let mib = bytes.div_euclid(1 << 20);
    if bytes <= BYTES_MAX {
        return Ok(Finding::ok(NAME, format!("{} with {mib} MiB, copied behind the fence", tables.len())));
    }
    let objects: Vec<String> = tables.iter().map(|table| object(table)).collect();
    let text = format!("{} would have to be copied while applications wait: {mib} MiB", objects.join(", "));
    let hint = format!(
        "Empty it, if its rows may go. Or --waive '{}': the target keeps its rows as they were copied at the start. Or, with a migration \
         that begins anew: {}",
        objects[0],
        set_logged(&tables)
    );
    Ok(Finding::blocks(NAME, text, hint))
}

/// What puts unlogged tables into the stream.
pub(crate) fn set_logged(tables: &[&Table]) -> String {
    let statements: Vec<String> =
        tables.iter().map(|table| format!("ALTER TABLE {} SET LOGGED;", table.qualified())).collect();
    statements.join(" ")
}

/// Copies them as they are now. Nobody writes any more.
///
/// # Errors
/// Whatever the servers say. The target's session is then of no more use.
pub(super) async fn copy(source: &Client, target: &Client, tables: &[&Table], waive: &[String]) -> Result<()> {
    let tables = to_copy(tables, waive);
    if tables.is_empty() {
        return Ok(());
    }
    // Together: only unlogged tables refer to unlogged tables, and one that is referred to is not emptied without the other.
    let names: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.qualified())).collect();
    let statements = format!(
        "BEGIN; {}; SET LOCAL lock_timeout = '2s'; TRUNCATE {}",
        ApplyRole::recorded(target).await?.begin_statement(),
        names.join(", ")
    );
    target.batch_execute(&statements).await.context(|| "emptying unlogged tables of the target".into())?;
    for table in &tables {
        copy::whole(source, target, table)
            .await
            .context(|| format!("copying the unlogged table {} behind the fence", table.qualified()))?;
    }
    target.batch_execute("COMMIT").await.context(|| "committing the copy of unlogged tables".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, unlogged: bool) -> Table {
        Table { unlogged, ..Table::plain("public", name) }
    }

    #[test]
    fn h14_unlogged_tables_are_copied_but_for_those_that_are_waived_by_name() {
        let (logged, cache, odd) = (table("orders", false), table("cache", true), table("Odd one", true));
        let all = [&logged, &cache, &odd];
        assert_eq!(to_copy(&all, &[]), [&cache, &odd]);
        assert_eq!(to_copy(&all, &["unlogged table public.cache".to_owned()]), [&odd]);
        assert_eq!(to_copy(&all, &["unlogged table public.\"Odd one\"".to_owned()]), [&cache]);
        assert_eq!(to_copy(&all, &["table public.cache".to_owned()]), [&cache, &odd]);
    }
}
