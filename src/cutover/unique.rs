//! Whether the target's deferrable constraints hold (H19): in the replica role, in which rows are applied, nobody looks.
//!
//! A row that somebody else put on the target can then stand beside one of the source with the same unique value, unseen by the apply:
//! the unique index of a deferrable constraint takes both.

use tokio_postgres::Client;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;

/// A deferrable unique, primary key or exclusion constraint.
struct Deferrable {
    name: String,
    table: String,
    /// Quoted.
    columns: Vec<String>,
    /// Of an exclusion constraint: by which operator each column is compared, and for which rows, ready for SQL.
    operators: Option<Vec<String>>,
    predicate: Option<String>,
    nulls_are_equal: bool,
}

impl Deferrable {
    /// A statement that gives a row when the constraint does not hold.
    fn violation(&self) -> String {
        let Deferrable { table, columns, operators, .. } = self;
        if let Some(operators) = operators {
            let clash: Vec<String> = columns
                .iter()
                .zip(operators)
                .map(|(column, operator)| format!("a.{column} OPERATOR({operator}) b.{column}"))
                .collect();
            let rows = format!(
                "(SELECT ctid AS walferry_ctid, * FROM ONLY {table} WHERE {})",
                self.predicate.as_deref().unwrap_or("true")
            );
            return format!(
                "SELECT FROM {rows} a JOIN {rows} b ON a.walferry_ctid < b.walferry_ctid AND {} LIMIT 1",
                clash.join(" AND ")
            );
        }
        let list = columns.join(", ");
        let counted = if self.nulls_are_equal {
            String::new()
        } else {
            let known: Vec<String> = columns.iter().map(|column| format!("{column} IS NOT NULL")).collect();
            format!(" WHERE {}", known.join(" AND "))
        };
        format!("SELECT FROM ONLY {table}{counted} GROUP BY {list} HAVING pg_catalog.count(*) > 1 LIMIT 1")
    }
}

/// Looks at every row of every table that has such a constraint.
///
/// # Errors
/// `Divergence` naming the first that does not hold; else whatever the server says.
pub(super) async fn hold(target: &Client, tables: &[&Table]) -> Result<()> {
    for constraint in deferrable(target, tables).await? {
        let doing = || format!("looking whether the constraint {} of {} holds", constraint.name, constraint.table);
        if target.query_typed(&constraint.violation(), &[]).await.context(doing)?.is_empty() {
            continue;
        }
        let text = format!(
            "two rows of {} on the target have the same {}, against its constraint {}",
            constraint.table,
            constraint.columns.join(", "),
            sql::identifier(&constraint.name)
        );
        let named: Vec<&Table> = tables.iter().copied().filter(|table| table.qualified() == constraint.table).collect();
        return Err(Error::new(ErrorKind::Divergence, text).hint(format!(
            "Somebody else has written to the target. `walferry verify` names the rows, once both sides are quiet; \
             `walferry migrate {}` makes the table what it is on the source.",
            Table::recopy_option(&named)
        )));
    }
    Ok(())
}

async fn deferrable(target: &Client, tables: &[&Table]) -> Result<Vec<Deferrable>> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    // `indnullsnotdistinct` came with PostgreSQL 15.
    let rows = target
        .query(
            "SELECT c.conname, n.nspname, r.relname, \
                    ARRAY(SELECT a.attname FROM unnest(c.conkey) WITH ORDINALITY k(number, place) \
                          JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.number ORDER BY k.place)::text[], \
                    CASE WHEN c.contype = 'x' THEN \
                      ARRAY(SELECT pg_catalog.format('%I.%s', s.nspname, o.oprname) \
                            FROM unnest(c.conexclop) WITH ORDINALITY k(operator, place) \
                            JOIN pg_catalog.pg_operator o ON o.oid = k.operator \
                            JOIN pg_catalog.pg_namespace s ON s.oid = o.oprnamespace ORDER BY k.place) END, \
                    coalesce((pg_catalog.to_jsonb(i)->>'indnullsnotdistinct')::boolean, false), pg_catalog.pg_get_expr(i.indpred, i.indrelid) \
             FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_class r ON r.oid = c.conrelid \
             JOIN pg_catalog.pg_namespace n ON n.oid = r.relnamespace JOIN pg_catalog.pg_index i ON i.indexrelid = c.conindid \
             WHERE c.contype IN ('p', 'u', 'x') AND c.condeferrable AND 0 <> ALL (c.conkey) \
               AND (n.nspname, r.relname) IN (SELECT * FROM unnest($1::text[], $2::text[])) \
             ORDER BY 2, 3, 1",
            &[&schemas, &names],
        )
        .await
        .context(|| "listing the target's deferrable constraints".into())?;
    Ok(rows
        .iter()
        .map(|row| Deferrable {
            name: row.get(0),
            table: sql::qualified(row.get(1), row.get(2)),
            columns: row.get::<_, Vec<String>>(3).iter().map(|name| sql::identifier(name)).collect(),
            operators: row.get(4),
            nulls_are_equal: row.get(5),
            predicate: row.get(6),
        })
        .collect())
}
