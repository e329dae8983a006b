//! Reading a table under an exported snapshot, a transaction at a time.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::error::{Context, Error, Result};
use crate::source::catalog::Table;
use crate::source::snapshot;
use crate::sql;

/// Exported snapshots that belong together, as `SET TRANSACTION SNAPSHOT` takes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshots {
    /// On the source.
    pub source: String,
    /// On the target.
    pub target: String,
}

/// Begins a transaction that sees a snapshot, and locks the table. Answers whether the snapshot still shows the table's rows (H4):
/// TRUNCATE and a rewriting ALTER TABLE put a new file in the old one's place, whatever older snapshots see. A table that is there neither for
/// the snapshot nor now is no matter of this.
pub(super) async fn begin(client: &Client, snapshot: &str, table: &Table, left_over: bool) -> Result<bool> {
    if left_over {
        client.batch_execute("ROLLBACK").await?;
    }
    snapshot::import(client, snapshot).await?;
    let doing = || format!("locking the table {} for reading", table.qualified());
    let lock = format!("SAVEPOINT lock; LOCK TABLE ONLY {} IN ACCESS SHARE MODE", table.qualified());
    let is_locked = match client.batch_execute(&lock).await {
        Ok(()) => true,
        Err(error) if error.code().is_some_and(cannot_be_locked) => {
            client.batch_execute("ROLLBACK TO SAVEPOINT lock").await.context(doing)?;
            false
        }
        Err(error) => return Err(Error::from(error).context(doing())),
    };
    // The row is that of the snapshot; the function looks at what is there now.
    let statement = format!(
        "SELECT c.relkind <> 'r' OR c.relfilenode IS NOT DISTINCT FROM pg_catalog.pg_relation_filenode(c.oid) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE n.nspname = {} AND c.relname = {}",
        sql::literal(&table.schema),
        sql::literal(&table.name)
    );
    let found = client.query_typed(&statement, &[]).await.context(doing)?;
    Ok(match found.first() {
        Some(row) => is_locked && row.get::<_, bool>(0),
        None => true,
    })
}

/// There is no such table now.
fn cannot_be_locked(state: &SqlState) -> bool {
    *state == SqlState::UNDEFINED_TABLE || *state == SqlState::INVALID_SCHEMA_NAME
}
