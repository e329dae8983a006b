//! Whether the rows that came have their parents. Where rows are written in the replica role the server does not look (H23).

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::plan::Work;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// Looks at every foreign key of the tables that were filled, for the rows of the range. Answers how many keys hold.
///
/// # Errors
/// `Different` naming the first whose rows have no parent; else what the server says.
pub(super) async fn hold(target: &Client, work: &[(&Work, u32, String)]) -> Result<usize> {
    let mut held = 0;
    for (one, relid, condition) in work {
        let doing = || format!("looking for rows of {} without a parent", one.table.qualified());
        let rows = target
            .query_typed(
                "SELECT k.conname::text, pg_catalog.format('%I.%I', n.nspname, p.relname), \
                        ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY u(number, place) \
                              JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number ORDER BY u.place), \
                        ARRAY(SELECT a.attname::text FROM unnest(k.confkey) WITH ORDINALITY u(number, place) \
                              JOIN pg_catalog.pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number ORDER BY u.place), \
                        ARRAY(SELECT pg_catalog.format('%I.%s', s.nspname, o.oprname) \
                              FROM unnest(k.conpfeqop) WITH ORDINALITY u(operator, place) \
                              JOIN pg_catalog.pg_operator o ON o.oid = u.operator \
                              JOIN pg_catalog.pg_namespace s ON s.oid = o.oprnamespace ORDER BY u.place) \
                 FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class p ON p.oid = k.confrelid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = p.relnamespace \
                 WHERE k.contype = 'f' AND k.conrelid = $1 AND k.convalidated ORDER BY 1",
                &[(relid, Type::OID)],
            )
            .await
            .context(doing)?;
        for row in rows {
            let (name, parent): (&str, &str) = (row.get(0), row.get(1));
            let (children, parents, operators): (Vec<String>, Vec<String>, Vec<String>) =
                (row.get(2), row.get(3), row.get(4));
            let known: Vec<String> =
                children.iter().map(|column| format!("t.{} IS NOT NULL", sql::identifier(column))).collect();
            let same: Vec<String> = parents
                .iter()
                .zip(&operators)
                .zip(&children)
                .map(|((parent, operator), child)| {
                    format!("p.{} OPERATOR({operator}) t.{}", sql::identifier(parent), sql::identifier(child))
                })
                .collect();
            let statement = format!(
                "SELECT FROM {} t WHERE {condition} AND {} AND NOT EXISTS (SELECT FROM {parent} p WHERE {}) LIMIT 1",
                one.table.qualified(),
                known.join(" AND "),
                same.join(" AND ")
            );
            if !target.query_typed(&statement, &[]).await.context(doing)?.is_empty() {
                let text = format!(
                    "rows of {} on the target have no parent in {parent}, against the foreign key {}",
                    one.table.qualified(),
                    sql::identifier(name)
                );
                return Err(Error::new(ErrorKind::Different, text).hint(format!(
                    "All pieces are there. Copy the table that they refer to (--tables with {parent}, in a --dir of its own), then run the same command again."
                )));
            }
            held += 1;
        }
    }
    Ok(held)
}
