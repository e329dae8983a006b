//! The fence: nobody but us writes to the source's database while it is up.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::{Timer, reopen_statement};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;

/// How long one attempt may wait for locks: well below the default `deadlock_timeout` of a second, so that a deadlock with the
/// application ends by our stepping back, and not by the server ending the application's transaction (H32).
const LOCK_TIMEOUT: &str = "300ms";
/// Rest between two attempts, in which the applications that waited go on.
const LOCK_PAUSE: Duration = Duration::from_millis(200);
/// How often the sessions that should have ended are looked at.
const SESSIONS_INTERVAL: Duration = Duration::from_millis(5);

/// How long the lock session may take to let go before it is ended from another.
const UNLOCK_PATIENCE: Duration = Duration::from_secs(2);
/// How long lifting the fence may take before it is tried in another way.
const LIFT_PATIENCE: Duration = Duration::from_secs(5);

/// What is up on the source.
pub(super) struct Fence<'a> {
    source: &'a Client,
    target: &'a Client,
    database: &'a str,
    application_name: &'a str,
    /// Names this cutover in the ledger, so that no other one decides on its fence.
    id: String,
    locks: Option<Locks>,
    closed: Option<Closed>,
    /// When the database was closed, by the source's clock.
    closed_at: Option<std::time::SystemTime>,
}

/// What opening the database again needs to know of its closing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The setting that was in the place of ours.
    pub(crate) previous: Option<String>,
    /// When it was closed, by the source's clock, as text.
    pub(crate) since: Option<String>,
}

impl Closed {
    /// How the source of a ledger's migration was closed; `None` when it was not.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn load(ledger: &Client) -> Result<Option<Closed>> {
        let row = ledger
            .query_typed_opt(
                "SELECT fence->>'previous', fence->>'since' FROM walferry.migration WHERE fence IS NOT NULL",
                &[],
            )
            .await
            .context(|| "reading from the ledger how the source was closed".into())?;
        Ok(row.map(|row| Closed { previous: row.get(0), since: row.get(1) }))
    }

    /// Statements that open the database again; for a transaction.
    pub(super) fn reopen(&self, database: &str) -> String {
        format!("{};", reopen_statement(database, self.previous.as_deref()))
    }
}

/// The session that locks the tables.
struct Locks {
    client: Client,
    backend_pid: i32,
}

fn not_locked(in_the_way: &str) -> Error {
    let text = format!("the tables could not be locked; in the way: {in_the_way}");
    Error::new(ErrorKind::Aborted, text).hint("End the long transaction, or give more time with --timeout.")
}

impl<'a> Fence<'a> {
    pub(super) fn new(
        source: &'a Client,
        target: &'a Client,
        database: &'a str,
        application_name: &'a str,
    ) -> Fence<'a> {
        let id = super::unique();
        Fence { source, target, database, application_name, id, locks: None, closed: None, closed_at: None }
    }

    /// Locks every table against writes, and so waits for the writes in flight. Reading goes on.
    pub(super) async fn lock(
        &mut self,
        source: &ConnectionSpec,
        tables: &[&Table],
        timer: &mut Timer<'_>,
    ) -> Result<()> {
        let client = timer.within(source.connect(self.application_name)).await?;
        let backend_pid = timer.within(backend_pid(&client)).await?;
        let names: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.qualified())).collect();
        let statement = format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", names.join(", "));
        loop {
            client.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")).await?;
            if names.is_empty() {
                break;
            }
            timer.stall();
            // The time can be up in the middle of an attempt: then, too, it is the others' locks that it went by with.
            let Ok(locked) = timer.within(async { Ok(client.batch_execute(&statement).await) }).await else {
                return Err(not_locked(&self.who_is_in_the_way().await.unwrap_or_default()));
            };
            match locked {
                Ok(()) => break,
                Err(error)
                    if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
                        || error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) =>
                {
                    client.batch_execute("ROLLBACK").await?;
                    let in_the_way = self.who_is_in_the_way().await.unwrap_or_default();
                    timer.resume();
                    tracing::info!(sessions = in_the_way, "the fence waits for transactions that hold locks");
                    if timer.left() <= LOCK_PAUSE {
                        return Err(not_locked(&in_the_way));
                    }
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(error) => return Err(error).context(|| "locking the source's tables".into()),
            }
        }
        timer.stall();
        self.locks = Some(Locks { client, backend_pid });
        Ok(())
    }

    /// Sessions with open transactions, for the message.
    async fn who_is_in_the_way(&self) -> Result<String> {
        let rows = self
            .source
            .query(
                "SELECT format('pid %s (%s, %s, open for %s s)', pid, coalesce(usename, backend_type), \
                               coalesce(nullif(application_name, ''), 'unnamed'), extract(epoch FROM now() - xact_start)::int) \
                 FROM pg_catalog.pg_stat_activity \
                 WHERE datname = pg_catalog.current_database() AND xact_start IS NOT NULL AND application_name <> $1 \
                 ORDER BY xact_start LIMIT 3",
                &[&self.application_name],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join(", "))
    }

    /// Closes the database to writers and ends every other session (H29): a writer that waits for our lock would otherwise
    /// write to the old primary as soon as it is released.
    pub(super) async fn close(&mut self) -> Result<()> {
        let row = self
            .source
            .query_typed_one(
                "SELECT (SELECT substr(setting, 31) FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) setting \
                         WHERE s.setrole = 0 AND s.setdatabase = d.oid AND setting LIKE 'default_transaction_read_only=%'), \
                        pg_catalog.clock_timestamp()::text \
                 FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()",
                &[],
            )
            .await
            .context(|| "reading the database's settings".into())?;
        let (previous, since): (Option<String>, String) = (row.get(0), row.get(1));
        // First into the ledger, durably: after a crash, whoever resumes can undo it. And first of all here: the answer may get
        // lost, or the time be up.
        self.closed = Some(Closed { previous: previous.clone(), since: Some(since.clone()) });
        self.target
            .execute(
                "UPDATE walferry.migration SET fence = jsonb_build_object('previous', $1::text, 'since', $2::text, 'cutover', $3::text)",
                &[&previous, &since, &self.id],
            )
            .await
            .context(|| "writing the fence into the ledger".into())?;
        let close = format!("ALTER DATABASE {} SET default_transaction_read_only = on", sql::identifier(self.database));
        self.source.batch_execute(&close).await.context(|| "closing the source's database to writers".into())?;
        // A session that begins after this moment is read-only by default; one that began before is ended.
        self.closed_at = Some(self.source.query_typed_one("SELECT pg_catalog.clock_timestamp()", &[]).await?.get(0));
        self.end_sessions().await
    }

    /// Ends every other session that began before the database was closed, and waits until they are gone.
    ///
    /// Called again before the decision: a session that was still starting up may have read the old default and been seen
    /// by nobody the first time.
    pub(super) async fn end_sessions(&self) -> Result<()> {
        loop {
            let left = self
                .source
                .query(
                    "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                     WHERE datname = pg_catalog.current_database() AND backend_type = 'client backend' \
                       AND pid <> pg_catalog.pg_backend_pid() AND application_name <> $1 \
                       AND backend_start < $2",
                    &[&self.application_name, &self.closed_at],
                )
                .await
                .context(|| "ending the other sessions of the source's database".into())?;
            if left.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(SESSIONS_INTERVAL).await;
        }
    }

    /// The lock session itself says that it has its locks; if it has died, so has the fence (H29).
    pub(super) async fn prove(&self, tables: usize) -> Result<()> {
        let lost = || Error::new(ErrorKind::Other, "the session that locks the source's tables has lost its locks");
        let locks = self.locks.as_ref().ok_or_else(lost)?;
        let held: i64 = locks
            .client
            .query_typed_one(
                "SELECT count(*) FROM pg_catalog.pg_locks WHERE pid = pg_catalog.pg_backend_pid() AND granted \
                 AND locktype = 'relation' AND mode = 'ShareRowExclusiveLock'",
                &[],
            )
            .await
            .context(|| "asking for the source's locks".into())?
            .get(0);
        if usize::try_from(held) == Ok(tables) { Ok(()) } else { Err(lost()) }
    }

    /// After the decision: the locks go, the database stays closed.
    ///
    /// A session that asked for a read-write transaction by itself (H30) may wait for them: it is ended first, because it would
    /// write to the old primary.
    pub(super) async fn release(&mut self) -> Result<()> {
        let ended = if self.closed.is_some() { self.end_waiting_sessions().await } else { Ok(()) };
        self.unlock().await;
        ended
    }

    async fn end_waiting_sessions(&self) -> Result<()> {
        loop {
            let ended = self
                .source
                .query(
                    "SELECT pg_catalog.pg_terminate_backend(w.pid) FROM pg_catalog.pg_stat_activity w, \
                            LATERAL unnest(pg_catalog.pg_blocking_pids(w.pid)) blocker(pid) \
                     JOIN pg_catalog.pg_stat_activity b ON b.pid = blocker.pid \
                     WHERE w.wait_event_type = 'Lock' AND b.application_name = $1 AND w.application_name <> $1",
                    &[&self.application_name],
                )
                .await
                .context(|| "ending sessions that wait for the fence".into())?;
            if ended.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(SESSIONS_INTERVAL).await;
        }
    }

    async fn unlock(&mut self) {
        let Some(locks) = self.locks.take() else { return };
        // With the session gone, its locks are gone too; the decision stands either way.
        if tokio::time::timeout(UNLOCK_PATIENCE, locks.client.batch_execute("ROLLBACK")).await.is_err() {
            // The line is dead, and the server does not know it yet.
            let end = format!("SELECT pg_catalog.pg_terminate_backend({})", locks.backend_pid);
            let end = self.source.batch_execute(&end);
            let _ = tokio::time::timeout(UNLOCK_PATIENCE, end).await;
        }
    }

    /// Before the decision: as if nothing had been. By the sessions at hand, or else by new ones.
    pub(super) async fn lift(&mut self, source: &ConnectionSpec, target: &ConnectionSpec) -> Result<()> {
        let mut outcome = Ok(());
        if self.closed.is_some() {
            let (database, late) = (self.database, || {
                Error::new(ErrorKind::Transient, format!("no answer within {} s", LIFT_PATIENCE.as_secs()))
            });
            let at_hand = lift_left_over_fence(self.source, self.target, database, self.application_name);
            outcome = tokio::time::timeout(LIFT_PATIENCE, at_hand).await.unwrap_or_else(|_| Err(late())).map(|_| ());
            if outcome.is_err() {
                let anew = async {
                    let source = source.connect(self.application_name).await?;
                    let target = target.connect(self.application_name).await?;
                    lift_left_over_fence(&source, &target, database, self.application_name).await
                };
                outcome = tokio::time::timeout(LIFT_PATIENCE, anew).await.unwrap_or_else(|_| Err(late())).map(|_| ());
            }
        }
        self.unlock().await;
        outcome
    }

    /// Statements that begin the deciding transaction: they fail when this fence has been lifted meanwhile, and whoever wants to
    /// lift it waits for the transaction's end. So a decision that is still on its way when everybody thinks it lost does no harm.
    pub(super) fn still_up(&self) -> String {
        format!(
            "DO $decide$ BEGIN PERFORM FROM walferry.migration WHERE phase = 'following' AND fence->>'cutover' = {} FOR UPDATE; \
             IF NOT FOUND THEN RAISE EXCEPTION 'the fence of this cutover was lifted'; END IF; END $decide$;",
            sql::literal(&self.id)
        )
    }

    /// What an operator runs when the fence could not be lifted.
    pub(super) fn by_hand(&self) -> String {
        let previous = self.closed.as_ref().and_then(|closed| closed.previous.as_deref());
        format!("Run on the source: {};", reopen_statement(self.database, previous))
    }
}

async fn backend_pid(client: &Client) -> Result<i32> {
    Ok(client.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.get(0))
}

/// Whether the ledger has a fence that was not decided on.
///
/// # Errors
/// Whatever the target says.
pub async fn is_fence_left_over(target: &Client) -> Result<bool> {
    let row = target
        .query_typed_one(
            "SELECT EXISTS (SELECT FROM walferry.migration WHERE fence IS NOT NULL AND phase <> 'cut_over')",
            &[],
        )
        .await
        .context(|| "looking for a fence in the ledger".into())?;
    Ok(row.get(0))
}

/// Opens the database to writers again, and ends the sessions that began while it was closed: a session keeps the default it
/// began with, and a pool that reconnected behind the fence would refuse its application's writes from then on.
pub(crate) async fn open_again(source: &Client, database: &str, closed: &Closed, application_name: &str) -> Result<()> {
    let reopen = reopen_statement(database, closed.previous.as_deref());
    source.batch_execute(&reopen).await.context(|| "opening the source's database again".into())?;
    let Some(since) = &closed.since else { return Ok(()) };
    end_sessions_since(source, since, application_name).await
}

/// Ends the sessions that began since a moment, by the server's clock.
pub(crate) async fn end_sessions_since(server: &Client, since: &str, application_name: &str) -> Result<()> {
    server
        .query(
            "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
             WHERE datname = pg_catalog.current_database() AND backend_type = 'client backend' \
               AND pid <> pg_catalog.pg_backend_pid() AND application_name <> $1 \
               AND backend_start >= $2::text::timestamptz",
            &[&application_name, &since],
        )
        .await
        .context(|| "ending the sessions that began behind the fence".into())?;
    Ok(())
}

/// Opens the source again when a walferry died between closing it and deciding. After the decision it stays closed.
///
/// The ledger's row is locked meanwhile: a session of the dead walferry that is about to decide comes first, and then the fence
/// stays, or comes later, and then it finds its fence gone (`Fence::still_up`). Never both.
///
/// # Errors
/// Whatever the servers say.
pub async fn lift_left_over_fence(
    source: &Client,
    target: &Client,
    database: &str,
    application_name: &str,
) -> Result<bool> {
    // A ROLLBACK first: the session may come from a decision that failed.
    target.batch_execute("ROLLBACK; BEGIN; SET LOCAL synchronous_commit = on").await?;
    // Locked whatever it says, and read again after the wait.
    target.execute_typed("SELECT FROM walferry.migration FOR UPDATE", &[]).await?;
    let row = target
        .query_typed_opt(
            "SELECT fence->>'previous', fence->>'since' FROM walferry.migration \
             WHERE fence IS NOT NULL AND phase <> 'cut_over'",
            &[],
        )
        .await
        .context(|| "looking for a fence in the ledger".into())?;
    let Some(row) = row else {
        target.batch_execute("ROLLBACK").await?;
        return Ok(false);
    };
    open_again(source, database, &Closed { previous: row.get(0), since: row.get(1) }, application_name).await?;
    target.batch_execute("UPDATE walferry.migration SET fence = NULL; COMMIT").await?;
    Ok(true)
}
