//! Whether every row on the target has the parents that the source's foreign keys want, where those are made only by the cutover (H23).
//!
//! They held when the schema was finished. Since then the source has looked after its own rows, and nobody after those that somebody
//! else puts on the target. This is before the fence, so it costs no downtime; what it has no time for is found when the foreign keys are
//! validated, after the release.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// The apply's sessions commit one after the other, so for a moment a child can be seen before its parent. One that has none stays.
const ATTEMPTS: usize = 10;
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(50);

/// A foreign key of the source.
#[derive(Debug)]
struct ForeignKey {
    name: String,
    child: String,
    parent: String,
    child_columns: Vec<String>,
    parent_columns: Vec<String>,
    /// By which a column of the parent is compared with that of the child, ready for SQL.
    operators: Vec<String>,
}

impl ForeignKey {
    /// A statement that gives a row when a child has no parent.
    fn violation(&self) -> String {
        let column = |alias: &str, name: &String| format!("{alias}.{}", sql::identifier(name));
        let known: Vec<String> =
            self.child_columns.iter().map(|name| format!("{} IS NOT NULL", column("c", name))).collect();
        let same: Vec<String> = self
            .parent_columns
            .iter()
            .zip(&self.operators)
            .zip(&self.child_columns)
            .map(|((parent, operator), child)| {
                format!("{} OPERATOR({operator}) {}", column("p", parent), column("c", child))
            })
            .collect();
        format!(
            "SELECT FROM {} c WHERE {} AND NOT EXISTS (SELECT FROM {} p WHERE {}) LIMIT 1",
            self.child,
            known.join(" AND "),
            self.parent,
            same.join(" AND ")
        )
    }
}

/// Looks at every valid foreign key of the source, for as long as it may take. Answers how many it had no time for.
///
/// # Errors
/// `Divergence` naming the first that the target's rows do not hold; else whatever a server says.
pub(super) async fn none(source: &Client, target: &Client, limit: Duration) -> Result<usize> {
    let end = Instant::now() + limit;
    let keys = foreign_keys(source).await?;
    let mut skipped = 0;
    for key in &keys {
        let left = end.saturating_duration_since(Instant::now()).as_millis();
        if left == 0 || !holds(target, key, left).await? {
            skipped += 1;
        }
    }
    target.batch_execute("SET statement_timeout = 0").await?;
    Ok(skipped)
}

/// False where there was no time to look.
async fn holds(target: &Client, key: &ForeignKey, limit_ms: u128) -> Result<bool> {
    target.batch_execute(&format!("SET statement_timeout = {limit_ms}")).await?;
    for attempt in 1.. {
        match target.query_typed(&key.violation(), &[]).await {
            Ok(rows) if rows.is_empty() => break,
            Ok(_) if attempt < ATTEMPTS => tokio::time::sleep(ATTEMPT_INTERVAL).await,
            Ok(_) => {
                let text = format!(
                    "rows of {} on the target have no parent in {}, against the foreign key {}",
                    key.child,
                    key.parent,
                    sql::identifier(&key.name)
                );
                return Err(Error::new(ErrorKind::Divergence, text).hint(
                    "Somebody else has written to the target. `walferry verify` names the rows, and `walferry repair` makes the tables \
                     what they are on the source.",
                ));
            }
            Err(error) if error.code() == Some(&SqlState::QUERY_CANCELED) => return Ok(false),
            Err(error) => {
                return Err(error).context(|| format!("looking for rows of {} without a parent", key.child));
            }
        }
    }
    Ok(true)
}

async fn foreign_keys(source: &Client) -> Result<Vec<ForeignKey>> {
    // The rows of a partitioned table are in its partitions.
    let named = |class: &str, schema: &str| {
        format!(
            "CASE WHEN {class}.relkind = 'p' THEN '' ELSE 'ONLY ' END || pg_catalog.format('%I.%I', {schema}.nspname, {class}.relname)"
        )
    };
    let columns = |table: &str, numbers: &str| {
        format!(
            "ARRAY(SELECT a.attname::text FROM unnest(k.{numbers}) WITH ORDINALITY u(number, place) \
                   JOIN pg_catalog.pg_attribute a ON a.attrelid = k.{table} AND a.attnum = u.number ORDER BY u.place)"
        )
    };
    let rows = source
        .query_typed(
            &format!(
                "SELECT k.conname::text, {}, {}, {}, {}, \
                        ARRAY(SELECT pg_catalog.format('%I.%s', s.nspname, o.oprname) \
                              FROM unnest(k.conpfeqop) WITH ORDINALITY u(operator, place) \
                              JOIN pg_catalog.pg_operator o ON o.oid = u.operator \
                              JOIN pg_catalog.pg_namespace s ON s.oid = o.oprnamespace ORDER BY u.place) \
                 FROM pg_catalog.pg_constraint k \
                 JOIN pg_catalog.pg_class c ON c.oid = k.conrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 JOIN pg_catalog.pg_class p ON p.oid = k.confrelid JOIN pg_catalog.pg_namespace m ON m.oid = p.relnamespace \
                 WHERE k.contype = 'f' AND k.conparentid = 0 AND k.convalidated AND n.nspname <> 'walferry' \
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass \
                                   AND d.objid = c.oid AND d.deptype = 'e') ORDER BY c.relpages, 1",
                named("c", "n"),
                named("p", "m"),
                columns("conrelid", "conkey"),
                columns("confrelid", "confkey"),
            ),
            &[],
        )
        .await
        .context(|| "listing the source's foreign keys".into())?;
    let key = |row: &tokio_postgres::Row| ForeignKey {
        name: row.get(0),
        child: row.get(1),
        parent: row.get(2),
        child_columns: row.get(3),
        parent_columns: row.get(4),
        operators: row.get(5),
    };
    Ok(rows.iter().map(key).collect())
}
