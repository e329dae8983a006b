//! A target that is about to take over: its statistics fresh, and what was copied vacuumed, so that the first queries after the switch
//! neither plan blindly nor visit every row to see whether it is visible.
//!
//! Autovacuum would come to it in its own time, or not at all where it is off. What is done here is done again by nobody: it looks at
//! what the server itself has recorded, at a pace that leaves room for the apply.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio_postgres::Client;

use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, Result};
use crate::source::catalog::USER_RELATION;
use crate::source::version::Version;
use crate::timescale::HAS_CHUNKS;
use crate::timescale::compress::COMPRESSING;

/// How often it is looked whether there is something to do.
const INTERVAL: Duration = Duration::from_secs(60);
/// How often it is looked whether the backlog is gone.
const CLOSE_INTERVAL: Duration = Duration::from_secs(1);
/// How long somebody may wait for a lock of ours.
const MAKE_WAY_INTERVAL: Duration = Duration::from_millis(500);
/// Like autovacuum's own delay: the apply comes first.
const SETTINGS: &str = "SET vacuum_cost_delay = '2ms'";

/// Vacuums and analyses what needs it, until it is dropped; a backlog comes first, of which `is_close` knows. It works while it has the
/// turn: others who have it use the same connections ([`crate::care::connections`]).
pub async fn keep_warm(
    target: ConnectionSpec,
    application_name: String,
    is_close: impl Fn() -> bool + Send + Sync,
    turn: Arc<Mutex<()>>,
) -> Infallible {
    loop {
        if !is_close() {
            tokio::time::sleep(CLOSE_INTERVAL).await;
            continue;
        }
        let in_turn = turn.lock().await;
        if let Err(error) = look_after(&target, &application_name).await {
            tracing::debug!(%error, "vacuuming the target waits");
        }
        drop(in_turn);
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Ends what [`keep_warm`] was at, compressing of chunks, and refreshes of materialized views: a cutover's statements must not wait for them.
///
/// # Errors
/// Whatever the server says.
pub async fn stop(target: &Client, application_name: &str) -> Result<()> {
    target
        .query(
            "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
             WHERE application_name = $1 AND (query ~ '^(VACUUM|ANALYZE|REFRESH) ' OR pg_catalog.strpos(query, $2) = 1) \
               AND pid <> pg_catalog.pg_backend_pid()",
            &[&application_name, &COMPRESSING],
        )
        .await
        .context(|| "ending our maintenance on the target".into())?;
    Ok(())
}

async fn look_after(target: &ConnectionSpec, application_name: &str) -> Result<()> {
    let session = target.connect(application_name).await?;
    let wanted = wanted(&session).await?;
    if wanted.is_empty() {
        return Ok(());
    }
    session.batch_execute(SETTINGS).await?;
    let pid: i32 = session.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.get(0);
    let watch = target.connect(application_name).await?;
    for statement in wanted {
        let outcome = tokio::select! {
            outcome = session.batch_execute(&statement) => outcome,
            error = make_way(&watch, pid) => return Err(error),
        };
        // Somebody holds it, dropped it, or waited for us: the next look finds what is left.
        if let Err(error) = outcome {
            tracing::debug!(%error, statement, "not vacuumed");
        }
        if session.is_closed() {
            break;
        }
    }
    Ok(())
}

/// Cancels the statement of a session as soon as anybody waits for it, as the server does with autovacuum. Returns when it cannot look.
pub(crate) async fn make_way(watch: &Client, pid: i32) -> Error {
    loop {
        tokio::time::sleep(MAKE_WAY_INTERVAL).await;
        let cancelled = watch
            .query(
                "SELECT pg_catalog.pg_cancel_backend($1) WHERE EXISTS ( \
                     SELECT FROM pg_catalog.pg_stat_activity w \
                     WHERE w.wait_event_type = 'Lock' AND $1 = ANY (pg_catalog.pg_blocking_pids(w.pid)))",
                &[&pid],
            )
            .await;
        if let Err(error) = cancelled {
            return error.into();
        }
    }
}

/// A statement for each table that needs one, the largest first.
///
/// Vacuum: less than half of its pages known to be visible to all, and not vacuumed just now; a frozen copy has them known already. One
/// vacuum may not be enough: while anybody's snapshot is older than the rows, it can mark nothing. Analyse: a tenth of it changed since,
/// or never analysed.
pub async fn wanted(client: &Client) -> Result<Vec<String>> {
    // On the way back this is the old server. Before 12 it waits for a lock, and whoever waits behind it ends it.
    let (vacuum, analyze) = match Version::of(client).await? {
        Version(12..) => ("'VACUUM (ANALYZE, SKIP_LOCKED) '", "'ANALYZE (SKIP_LOCKED) '"),
        _ => ("'VACUUM (ANALYZE) '", "'ANALYZE '"),
    };
    let rows = client
        .query_typed(
            &format!(
                "SELECT (CASE WHEN hidden THEN {vacuum} ELSE {analyze} END) \
                        || format('%I.%I', n.nspname, c.relname) \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 JOIN pg_catalog.pg_stat_user_tables s ON s.relid = c.oid, \
                 LATERAL (SELECT pg_catalog.pg_relation_size(c.oid) / 8192 AS pages) size, \
                 LATERAL (SELECT c.relallvisible * 2 < pages \
                              AND coalesce(greatest(s.last_vacuum, s.last_autovacuum) < now() - interval '1 minute', true) AS hidden) seen \
                 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND pages > 0 AND {USER_RELATION} \
                   AND (hidden OR s.n_mod_since_analyze > 50 + greatest(c.reltuples, 0) / 10 \
                        OR s.last_analyze IS NULL AND s.last_autoanalyze IS NULL) \
                 ORDER BY pages DESC"
            ),
            &[],
        )
        .await
        .context(|| "looking for what to vacuum on the target".into())?;
    let mut wanted: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    // The rows of a hypertable are in its chunks, which are among these; what the planner knows of all of them together is its own.
    let hypertables = client
        .query_typed(
            &format!(
                "SELECT 'ANALYZE ' || format('%I.%I', n.nspname, c.relname) \
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'r' AND {USER_RELATION} AND {HAS_CHUNKS} AND NOT EXISTS (SELECT FROM pg_catalog.pg_stats s \
                   WHERE s.schemaname = n.nspname AND s.tablename = c.relname AND s.inherited)"
            ),
            &[],
        )
        .await
        .context(|| "looking for hypertables to analyse on the target".into())?;
    wanted.extend(hypertables.iter().map(|row| row.get::<_, String>(0)));
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};

    #[tokio::test]
    async fn whoever_waits_for_our_vacuum_gets_the_lock_at_once() {
        let programs = ServerPrograms::find(None).unwrap();
        let server = ThrowawayServer::start(&programs, "warm", &[]).await.unwrap();
        let connect = || async { server.connect("postgres").await.unwrap() };
        let (ours, watch, waiting) = (connect().await, connect().await, connect().await);
        ours.batch_execute("CREATE TABLE t (id int)").await.unwrap();
        ours.batch_execute("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE").await.unwrap();
        let pid: i32 = ours.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        let held = async {
            let error = ours.batch_execute("SELECT pg_sleep(600)").await.unwrap_err();
            ours.batch_execute("ROLLBACK").await.unwrap();
            error
        };
        let (error, ()) = tokio::select! {
            both = async { tokio::join!(held, async { waiting.batch_execute("TRUNCATE t").await.unwrap() }) } => both,
            error = make_way(&watch, pid) => panic!("{error}"),
        };
        assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
    }
}
