//! A target that has its tables already (`--data-only`): what is taken from it instead of being made.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use crate::error::{Context, Result};
use crate::source::catalog::Table;

/// Takes from the target which columns are `GENERATED ALWAYS AS IDENTITY`: these have to take given values for the time of the
/// migration (H22), whatever the source's are.
///
/// # Errors
/// Whatever the server says.
pub async fn take_identity_from(target: &Client, tables: &mut [Table]) -> Result<()> {
    let always = identity_columns(target, "attidentity = 'a'").await?;
    each_column(tables, |name, is_always| *is_always = always.contains(name));
    Ok(())
}

/// Forgets of the columns that the source has as `GENERATED ALWAYS AS IDENTITY` those that are no identity on the target.
///
/// # Errors
/// Whatever the server says.
pub async fn forget_other_identity(target: &Client, tables: &mut [Table]) -> Result<()> {
    let identity = identity_columns(target, "attidentity <> ''").await?;
    each_column(tables, |name, is_always| *is_always &= identity.contains(name));
    Ok(())
}

type Name = (String, String, String);

fn each_column(tables: &mut [Table], mut change: impl FnMut(&Name, &mut bool)) {
    for table in tables {
        for column in &mut table.columns {
            let name = (table.schema.clone(), table.name.clone(), column.name.clone());
            change(&name, &mut column.identity_always);
        }
    }
}

async fn identity_columns(target: &Client, which: &str) -> Result<BTreeSet<Name>> {
    let rows = target
        .query_typed(
            &format!(
                "SELECT n.nspname::text, c.relname::text, a.attname::text FROM pg_catalog.pg_attribute a \
                 JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE a.{which} AND a.attnum > 0 AND NOT a.attisdropped"
            ),
            &[],
        )
        .await
        .context(|| "looking for identity columns of the target".into())?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}
