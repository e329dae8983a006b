//! Replica identities that walferry sets for the time of a migration, where the operator allowed it by name (H27).
//!
//! A table without a usable identity shows only its inserts in the stream. `REPLICA IDENTITY FULL` has PostgreSQL write the whole old
//! row of every update and delete, by which it is found. What a table had before is noted durably before it is changed
//! ([`ledger::note_replica_identities`](crate::target::ledger::note_replica_identities)), so `clean` puts back exactly what was changed.
//!
//! A target that is lost takes the ledger with it. So the note stands on the source too, in the comment of our publication.
//!
//! Changing it takes an ACCESS EXCLUSIVE lock for a moment, and whoever comes meanwhile waits behind it: so an attempt is short, and
//! there are as many as it takes.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::catalog::Table;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// How long one attempt may hold others up: less than PostgreSQL's `deadlock_timeout`.
const LOCK_TIMEOUT: &str = "500ms";
/// Between two attempts, in which those who waited go first.
const PAUSE: Duration = Duration::from_millis(500);
/// Attempts to put an identity back, a minute in all.
const RESTORE_ATTEMPTS: usize = 60;

/// What a table was told to be identified by, before it got `REPLICA IDENTITY FULL`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Its OID on the source.
    pub relid: u32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// As SQL: `DEFAULT`, `NOTHING` or `USING INDEX "name"`.
    pub identity: String,
}

/// On which server an identity is put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Where it was changed: tables are known by their OIDs, whatever they are called now.
    Source,
    /// Where it came with the schema: by their names.
    Target,
}

/// Of these tables, those whose updates and deletes would name no row. Statistics do not say which of them will be updated
/// during the migration, so these are all; unlogged ones are in no stream.
///
/// # Errors
/// Whatever the server says.
pub async fn lacking(client: &Client, tables: &[Table]) -> Result<Vec<Before>> {
    let without = tables.iter().filter(|table| !table.unlogged && !table.has_usable_identity());
    let relids: Vec<u32> = without.map(|table| table.relid).collect();
    let rows = client
        .query_typed(
            "SELECT c.oid, n.nspname::text, c.relname::text, CASE c.relreplident WHEN 'd' THEN 'DEFAULT' WHEN 'i' THEN coalesce( \
                    (SELECT format('USING INDEX %I', x.relname) FROM pg_catalog.pg_index i \
                     JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid AND i.indisreplident), 'NOTHING') \
                    ELSE 'NOTHING' END \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.oid = ANY ($1) AND c.relreplident <> 'f' ORDER BY c.oid",
            &[(&relids, Type::OID_ARRAY)],
        )
        .await
        .context(|| "reading the source's replica identities".into())?;
    let before = |row: &tokio_postgres::Row| Before {
        relid: row.get(0),
        schema: row.get(1),
        name: row.get(2),
        identity: row.get(3),
    };
    Ok(rows.iter().map(before).collect())
}

/// Has the whole old row identify a table, which was noted before. Waits for its lock for as long as it takes, and says so once.
///
/// # Errors
/// Whatever the server says.
pub async fn set_full(client: &Client, table: &Before, waits: impl Fn(&str)) -> Result<()> {
    let name = sql::qualified(&table.schema, &table.name);
    let mut said = false;
    while !alter(client, &name, "FULL").await? {
        if !std::mem::replace(&mut said, true) {
            waits(&name);
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Puts back what was noted, where it still is `FULL`; what somebody has set since stays. Answers the tables, in words.
///
/// # Errors
/// `Transient` when a table's lock cannot be had within a minute; else what the server says. What is put back stays so.
pub async fn restore(client: &Client, tables: &[Before], on: On) -> Result<Vec<String>> {
    let mut restored = Vec::new();
    for table in tables {
        let relid = if on == On::Source { table.relid } else { 0 };
        let now = client
            .query_typed_opt(
                "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relreplident = 'f' AND c.relkind = 'r' \
                   AND CASE WHEN $1 = 0 THEN (n.nspname, c.relname) = ($2, $3) ELSE c.oid = $1 END",
                &[(&relid, Type::OID), (&table.schema, Type::TEXT), (&table.name, Type::TEXT)],
            )
            .await
            .context(|| "looking at a replica identity".into())?;
        let Some(name) = now.map(|row| row.get::<_, String>(0)) else { continue };
        let mut attempts = 0;
        loop {
            attempts += 1;
            match alter(client, &name, &table.identity).await {
                Ok(true) => break restored.push(name),
                Ok(false) if attempts < RESTORE_ATTEMPTS => tokio::time::sleep(PAUSE).await,
                Ok(false) => {
                    let text = format!("{name} is in use, and its replica identity cannot be put back");
                    return Err(Error::new(ErrorKind::Transient, text).hint(
                        "End the long transaction that holds it, or wait for it; then run the same command again.",
                    ));
                }
                // Its index is gone, and it would be identified by nothing.
                Err(error) if error.sqlstate() == Some(&SqlState::UNDEFINED_OBJECT) => {
                    tracing::warn!(%error, "{name} keeps REPLICA IDENTITY FULL");
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(restored)
}

/// Writes what was noted into the comment of our publication, for a `clean` that finds no ledger.
///
/// # Errors
/// Whatever the server says.
pub async fn note(client: &Client, publication: &str, tables: &[Before]) -> Result<()> {
    if tables.is_empty() {
        return Ok(());
    }
    let note = Note { replica_identities: tables.to_vec() };
    let text = serde_json::to_string(&note).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    let statement = format!("COMMENT ON PUBLICATION {} IS {}", sql::identifier(publication), sql::literal(&text));
    client
        .batch_execute(&statement)
        .await
        .context(|| format!("noting replica identities at the publication {publication}"))
}

/// What [`note`] wrote; none where it wrote nothing, or somebody else did.
///
/// # Errors
/// Whatever the server says.
pub async fn noted(client: &Client, publication: &str) -> Result<Vec<Before>> {
    let row = client
        .query_typed_opt(
            "SELECT pg_catalog.obj_description(oid, 'pg_publication') FROM pg_catalog.pg_publication WHERE pubname = $1",
            &[(&publication, Type::TEXT)],
        )
        .await
        .context(|| format!("reading the comment of the publication {publication}"))?;
    let text = row.and_then(|row| row.get::<_, Option<String>>(0)).unwrap_or_default();
    Ok(serde_json::from_str::<Note>(&text).map_or_else(|_| Vec::new(), |note| note.replica_identities))
}

/// What the comment is, as JSON.
#[derive(Serialize, Deserialize)]
struct Note {
    replica_identities: Vec<Before>,
}

/// One attempt; false when somebody has the table.
async fn alter(client: &Client, table: &str, identity: &str) -> Result<bool> {
    let statement = format!("ALTER TABLE ONLY {table} REPLICA IDENTITY {identity}");
    let within = format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; {statement}; COMMIT");
    let Err(error) = client.batch_execute(&within).await else { return Ok(true) };
    client.batch_execute("ROLLBACK").await?;
    if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
        return Ok(false);
    }
    Err(error).context(|| statement)
}
