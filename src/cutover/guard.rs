//! What keeps writers out of tables that have moved while the rest of their database has not (`--fence tables`).
//!
//! A trigger on every migrated table calls one function of the schema `walferry`, which refuses each write. Triggers and function are
//! made by the session that holds the tables' locks, and committed with them right before the decision: who waited for a lock finds
//! the guard, and nobody comes in between. From then on it is the function's body that says whether writes are refused, so that
//! opening the tables again locks none of them. Rows, not statements: who writes through a partitioned table meets the triggers of
//! its partitions only row by row. Sessions that apply changes (`session_replication_role = replica`) fire no such trigger.

use tokio_postgres::{Client, Row};

use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::sql;

/// The triggers' names: the first of a table's, in the order in which they fire.
const ROWS: &str = "!walferry_moved";
const TRUNCATE: &str = "!walferry_moved_truncate";

/// How many tables get their triggers in one round trip.
const CHUNK: usize = 500;

/// Makes the guard in a transaction that holds `SHARE ROW EXCLUSIVE` on the tables; it counts from its commit on.
///
/// # Errors
/// Whatever the server says.
pub(super) async fn raise(client: &Client, tables: &[&Table]) -> Result<()> {
    client
        .batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS walferry; {}", function(true)))
        .await
        .context(|| "making the function that refuses writes to the tables that have moved".into())?;
    for chunk in tables.chunks(CHUNK) {
        let statements: Vec<String> = chunk.iter().map(|table| triggers(table)).collect();
        client
            .batch_execute(&statements.join(" "))
            .await
            .context(|| "making the triggers that refuse writes to the tables that have moved".into())?;
    }
    Ok(())
}

fn triggers(table: &Table) -> String {
    let (name, rows, truncate) = (table.qualified(), sql::identifier(ROWS), sql::identifier(TRUNCATE));
    // EXECUTE FUNCTION is of 11, and CREATE OR REPLACE TRIGGER of 14; those of an earlier cutover go under the lock that their making takes too.
    format!(
        "DO $guard$ BEGIN \
           IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = {relation}::pg_catalog.regclass AND tgname = {row_name}) THEN \
             CREATE TRIGGER {rows} BEFORE INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW EXECUTE PROCEDURE walferry.moved(); \
             CREATE TRIGGER {truncate} BEFORE TRUNCATE ON {name} FOR EACH STATEMENT EXECUTE PROCEDURE walferry.moved(); \
           END IF; END $guard$;",
        relation = sql::literal(&name),
        row_name = sql::literal(ROWS),
    )
}

/// The statement that has writes refused, or let through.
fn function(refuses: bool) -> String {
    let body = match refuses {
        true => format!(
            "BEGIN RAISE EXCEPTION 'table %.% has moved to another server', TG_TABLE_SCHEMA, TG_TABLE_NAME \
             USING ERRCODE = 'read_only_sql_transaction'; END {REFUSES}"
        ),
        false => "BEGIN IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END".to_owned(),
    };
    format!(
        "CREATE OR REPLACE FUNCTION walferry.moved() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS {};",
        sql::literal(&body)
    )
}

/// How a body that refuses is told from one that does not.
const REFUSES: &str = "/* refuses */";

/// Statements that open the tables again, where they were closed; for a transaction.
pub(super) fn open() -> String {
    // To be run where nothing was ever guarded, too.
    format!(
        "DO $open$ BEGIN IF pg_catalog.to_regprocedure('walferry.moved()') IS NOT NULL THEN {} END IF; END $open$;",
        function(false)
    )
}

/// Whether writes to tables that have moved are refused.
///
/// # Errors
/// Whatever the server says.
pub(super) async fn is_up(client: &Client) -> Result<bool> {
    let row = client
        .query_typed_one(
            &format!(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE oid = pg_catalog.to_regprocedure('walferry.moved()') \
                                AND pg_catalog.strpos(prosrc, {}) > 0)",
                sql::literal(REFUSES)
            ),
            &[],
        )
        .await
        .context(|| "looking whether writes to tables that have moved are refused".into())?;
    Ok(row.get(0))
}

/// Removes triggers and function, for `clean`; the schema too, where nothing else is in it. Answers whether there was a guard.
///
/// To drop a trigger locks its table against everybody. So each goes in a transaction of its own: whoever holds one lock and waits for
/// none cannot be part of a deadlock, in whatever order others (applications, or a cutover that reads the catalog) lock those tables.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn remove(client: &Client) -> Result<bool> {
    let exists: bool = client
        .query_typed_one("SELECT pg_catalog.to_regprocedure('walferry.moved()') IS NOT NULL", &[])
        .await
        .context(|| "looking for the guard of tables that have moved".into())?
        .get(0);
    if exists {
        for statement in drop_triggers(client).await? {
            client.batch_execute(&statement).await.context(|| "removing a trigger of the guard".into())?;
        }
        client
            .batch_execute(
                "DROP FUNCTION walferry.moved(); \
                 DO $clean$ BEGIN IF pg_catalog.to_regclass('walferry.migration') IS NULL THEN DROP SCHEMA walferry; END IF; END $clean$",
            )
            .await
            .context(|| "removing the guard of tables that have moved".into())?;
    }
    Ok(exists)
}

/// The statements that drop the triggers, a transaction each.
async fn drop_triggers(client: &Client) -> Result<Vec<String>> {
    let rows = client
        .query_typed(
            "SELECT n.nspname::text, c.relname::text, t.tgname::text FROM pg_catalog.pg_trigger t \
             JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE t.tgfoid = pg_catalog.to_regprocedure('walferry.moved()') ORDER BY t.oid",
            &[],
        )
        .await
        .context(|| "looking for the triggers of the guard".into())?;
    let drop = |row: &Row| {
        let (schema, table, trigger): (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
        format!("DROP TRIGGER IF EXISTS {} ON {}", sql::identifier(trigger), sql::qualified(schema, table))
    };
    Ok(rows.iter().map(drop).collect())
}
