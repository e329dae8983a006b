//! Ends our own transactions on the source when anybody waits behind their locks (H9).
//!
//! A copy holds ACCESS SHARE until its transaction ends. A statement that wants more (ALTER TABLE, TRUNCATE, VACUUM FULL)
//! waits for it, and every writer then waits behind that statement.
//!
//! The session is ended, not its statement: a backend that hangs in sending to us because the target takes nothing, or
//! that is idle in its transaction because the target is slow to commit, does not hear that its statement is cancelled.
//! Only waits for a table's lock count. CREATE INDEX CONCURRENTLY waits for our snapshot, and for that long is in nobody's way.

use std::convert::Infallible;
use std::time::Duration;

use crate::connection::ConnectionSpec;
use crate::error::Result;
use crate::observe::board::StatusBoard;
use crate::observe::status::Level;

const INTERVAL: Duration = Duration::from_millis(500);

/// Watches until it is dropped; a lost connection is made again.
pub(crate) async fn run(source: &ConnectionSpec, application_name: &str, board: &StatusBoard) -> Infallible {
    loop {
        if let Err(error) = watch(source, application_name, board).await {
            tracing::debug!(%error, "the watchdog of the copy's locks lost its connection");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn watch(source: &ConnectionSpec, application_name: &str, board: &StatusBoard) -> Result<()> {
    let client = source.connect(application_name).await?;
    let statement = client
        .prepare(
            "SELECT pg_catalog.pg_terminate_backend(ours.pid) FROM ( \
                 SELECT DISTINCT b.pid FROM pg_catalog.pg_stat_activity w, \
                        LATERAL unnest(pg_catalog.pg_blocking_pids(w.pid)) blocker(pid) \
                 JOIN pg_catalog.pg_stat_activity b ON b.pid = blocker.pid \
                 WHERE w.wait_event_type = 'Lock' AND w.wait_event = 'relation' \
                   AND b.application_name = $1 AND w.application_name <> $1) ours",
        )
        .await?;
    loop {
        let ended = client.query(&statement, &[&application_name]).await?;
        if !ended.is_empty() {
            board.event(Level::Info, "somebody waits for a lock on the source: the copy makes way");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
