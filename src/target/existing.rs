//! A target that has its tables already (`--data-only`): what is taken from it instead of being made.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use crate::error::{Context, Result};
use crate::source::catalog::Table;

/// Takes from the server that is written to which columns are `GENERATED ALWAYS AS IDENTITY`: these have to take given values for the
/// time of the migration (H22), whatever those of the other server are.
///
/// # Errors
/// Whatever the server says.
pub async fn take_identity_from(server: &Client, tables: &mut [Table]) -> Result<()> {
    let rows = server
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, a.attname::text FROM pg_catalog.pg_attribute a \
             JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE a.attidentity = 'a' AND a.attnum > 0 AND NOT a.attisdropped",
            &[],
        )
        .await
        .context(|| "looking for identity columns".into())?;
    let always: BTreeSet<(&str, &str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    for table in tables {
        for column in &mut table.columns {
            column.identity_always = always.contains(&(&table.schema, &table.name, &column.name));
        }
    }
    Ok(())
}
