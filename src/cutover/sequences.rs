//! Sequences: they are not in the stream, so the target gets the source's last values at the cutover.

use tokio_postgres::Client;

use crate::error::{Context, Result};
use crate::sql;

/// Sets every sequence on the target to where it is on the source. Answers how many.
///
/// Call it when nobody can call `nextval` any more (H31): table locks do not cover sequences.
pub(super) async fn copy(source: &Client, target: &Client) -> Result<usize> {
    let names = source
        .query_typed(
            "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind = 'S' AND c.relpersistence <> 't' \
               AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass \
                               AND d.objid = c.oid AND d.deptype = 'e') \
             ORDER BY 1, 2",
            &[],
        )
        .await
        .context(|| "listing the source's sequences".into())?;
    // One statement on each side, however many there are: this happens while applications wait.
    let select = |row: &tokio_postgres::Row| {
        let name = sql::qualified(row.get(0), row.get(1));
        format!("SELECT {} AS name, last_value, is_called FROM {name}", sql::literal(&name))
    };
    let selects: Vec<String> = names.iter().map(select).collect();
    for part in selects.chunks(1000) {
        let values = source
            .query_typed(&part.join(" UNION ALL "), &[])
            .await
            .context(|| "reading the source's sequences".into())?;
        let set = |row: &tokio_postgres::Row| {
            let (name, last, called): (&str, i64, bool) = (row.get(0), row.get(1), row.get(2));
            format!("SELECT pg_catalog.setval({}::regclass, {last}, {called})", sql::literal(name))
        };
        let statements: Vec<String> = values.iter().map(set).collect();
        target.batch_execute(&statements.join("; ")).await.context(|| "setting the target's sequences".into())?;
    }
    Ok(names.len())
}
