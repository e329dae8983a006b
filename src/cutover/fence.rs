//! The fence: nobody but us writes to the source's database while it is up.
//!
//! | mode | up before the first marker | up before the second |
//! |---|---|---|
//! | `lock` | the tables are locked against writes | the database is read-only by default, all other sessions that began before are ended |
//! | `read-only` | the latter | the same, looked at again |
//! | `connections` | the latter, and the database takes no connections | the same, looked at again |
//! | `tables` | the tables are locked against writes, and their sequences | the locks; right before the decision they give way to a guard ([`guard`]) |
//! | `none` | nothing: the operator says so | as with `lock` |

use std::time::{Duration, SystemTime};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::guard;
use super::hook;
use super::options::{FenceMode, Options};
use super::record::{self, Lifted, Reach, Record, UNDO_PATIENCE, allow_connections};
use super::timer::Timer;
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

/// What is up on the source.
pub(super) struct Fence<'a> {
    source: &'a Client,
    target: &'a Client,
    source_spec: &'a ConnectionSpec,
    application_name: &'a str,
    /// What is in the ledger.
    record: Record,
    is_recorded: bool,
    /// With `lock`.
    locks: Option<Locks>,
    /// With `connections`: in another database, where alone those of this one can be refused and allowed.
    beside: Option<Client>,
    /// When the database was closed, by the source's clock.
    closed_at: Option<SystemTime>,
}

/// The session that locks the tables.
struct Locks {
    client: Client,
    backend_pid: i32,
    /// How many relations it has locked.
    count: usize,
}

fn not_locked(in_the_way: &str) -> Error {
    let text = format!("the tables could not be locked; in the way: {in_the_way}");
    Error::new(ErrorKind::Aborted, text).hint("End the long transaction, or give more time with --timeout.")
}

impl<'a> Fence<'a> {
    pub(super) fn new(
        source: &'a Client,
        target: &'a Client,
        source_spec: &'a ConnectionSpec,
        application_name: &'a str,
        options: &Options,
    ) -> Fence<'a> {
        let record = Record {
            cutover: super::unique(),
            fence: options.fence,
            hooks: options.hooks.clone(),
            ..Record::default()
        };
        let (locks, beside, closed_at) = (None, None, None);
        Fence { source, target, source_spec, application_name, record, is_recorded: false, locks, beside, closed_at }
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Everything that can be done before applications wait; at its end the ledger knows what is to come.
    pub(super) async fn prepare(&mut self, pgbouncer: Option<super::pgbouncer::Known>) -> Result<()> {
        if self.record.fence == FenceMode::Connections {
            self.beside = Some(record::beside(self.source_spec, self.application_name).await?);
        }
        self.record.previous = record::setting(self.source).await?;
        self.record.since = Some(
            self.source
                .query_typed_one("SELECT pg_catalog.clock_timestamp()::text", &[])
                .await
                .context(|| "asking the source for the time".into())?
                .get(0),
        );
        self.record.pgbouncer = pgbouncer;
        self.record.step = "fence".to_owned();
        // Before it is written: the answer may get lost, or the time be up.
        self.is_recorded = true;
        self.record.write(self.target).await
    }

    /// Holds the writers, as the mode says.
    pub(super) async fn raise(
        &mut self,
        source: &ConnectionSpec,
        tables: &[&Table],
        sequences: &[String],
        timer: &mut Timer<'_>,
    ) -> Result<()> {
        if let Some(pgbouncer) = &self.record.pgbouncer {
            // It waits for the transactions under way, and all others wait for it.
            timer.stall();
            timer.within(pgbouncer.pause()).await?;
        }
        match self.record.fence {
            FenceMode::Lock => Box::pin(self.lock(source, tables, &[], timer)).await,
            FenceMode::Tables => Box::pin(self.lock(source, tables, sequences, timer)).await,
            FenceMode::ReadOnly | FenceMode::Connections => {
                timer.stall();
                timer.within(self.close()).await
            }
            FenceMode::None => {
                timer.stall();
                Ok(())
            }
        }
    }

    /// Before the second marker every mode has the database closed and everybody else's sessions ended; but for `tables`, whose guard is
    /// then made, and counts when the locks go.
    pub(super) async fn complete(&mut self, tables: &[&Table]) -> Result<()> {
        match self.record.fence {
            FenceMode::Tables => match &self.locks {
                Some(locks) => guard::raise(&locks.client, tables).await,
                None => Err(Error::new(ErrorKind::Other, "the tables are not locked")),
            },
            FenceMode::Lock | FenceMode::None => self.close().await,
            // Who was still starting up when it was closed has shown up meanwhile.
            FenceMode::ReadOnly | FenceMode::Connections => self.end_sessions().await.map(|_| ()),
        }
    }

    /// Locks every table against writes, and so waits for the writes in flight. Reading goes on.
    /// Sequences by a statement for each that changes nothing and holds `nextval` back (H31).
    async fn lock(
        &mut self,
        source: &ConnectionSpec,
        tables: &[&Table],
        sequences: &[String],
        timer: &mut Timer<'_>,
    ) -> Result<()> {
        let client = timer.within(source.connect(self.application_name)).await?;
        let backend_pid = timer.within(backend_pid(&client)).await?;
        let names: Vec<String> = tables.iter().map(|table| format!("ONLY {}", table.qualified())).collect();
        let mut statement = format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", names.join(", "));
        for hold in sequences {
            statement.push_str("; ");
            statement.push_str(hold);
        }
        loop {
            timer.within(self.let_vacuum_make_way(&client, tables)).await?;
            client.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")).await?;
            if names.is_empty() {
                break;
            }
            timer.stall();
            // The time can be up in the middle of an attempt: then, too, it is the others' locks that it went by with.
            let Ok(locked) = timer.within(async { Ok(client.batch_execute(&statement).await) }).await else {
                return Err(not_locked(&self.who_is_in_the_way(tables).await.unwrap_or_default()));
            };
            match locked {
                Ok(()) => break,
                Err(error)
                    if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
                        || error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) =>
                {
                    client.batch_execute("ROLLBACK").await?;
                    let in_the_way = self.who_is_in_the_way(tables).await.unwrap_or_default();
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
        self.locks = Some(Locks { client, backend_pid, count: tables.len() + sequences.len() });
        Ok(())
    }

    /// An autovacuum makes way for a lock only after `deadlock_timeout`, which is longer than an attempt of ours: what it works on
    /// is asked for by itself first, in a mode for which no writer has to wait. One against wraparound stays (H32).
    async fn let_vacuum_make_way(&self, client: &Client, tables: &[&Table]) -> Result<()> {
        for (table, _) in maintained(self.source, tables).await? {
            let ask = format!(
                "BEGIN; SELECT pg_catalog.set_config('lock_timeout', (setting::int8 + 1000)::text, true) \
                     FROM pg_catalog.pg_settings WHERE name = 'deadlock_timeout'; \
                 LOCK TABLE ONLY {table} IN SHARE UPDATE EXCLUSIVE MODE; ROLLBACK"
            );
            if let Err(error) = client.batch_execute(&ask).await {
                if error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
                    return Err(error).context(|| format!("asking the maintenance of {table} to make way"));
                }
                client.batch_execute("ROLLBACK").await?;
            }
        }
        Ok(())
    }

    /// Sessions with open transactions, and those that maintain our tables, for the message.
    async fn who_is_in_the_way(&self, tables: &[&Table]) -> Result<String> {
        let rows = self
            .source
            .query(
                "SELECT format('pid %s (%s, %s, open for %s s)', pid, coalesce(usename, backend_type), \
                               coalesce(nullif(application_name, ''), 'unnamed'), extract(epoch FROM now() - xact_start)::int) \
                 FROM pg_catalog.pg_stat_activity \
                 WHERE datname = pg_catalog.current_database() AND xact_start IS NOT NULL AND application_name <> $1 \
                   AND backend_type IS DISTINCT FROM 'autovacuum worker' \
                 ORDER BY xact_start LIMIT 3",
                &[&self.application_name],
            )
            .await?;
        let mut named: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        named.extend(maintained(self.source, tables).await?.into_iter().map(|(_, who)| who));
        Ok(named.join(", "))
    }

    /// Closes the database to writers and ends every other session (H29): a writer that waits for our lock would otherwise
    /// write to the old primary as soon as it is released. That it may be done stands in the ledger already.
    async fn close(&mut self) -> Result<()> {
        let database = self.source_spec.database();
        let close = format!("ALTER DATABASE {} SET default_transaction_read_only = on", sql::identifier(database));
        let refuse = async {
            let Some(beside) = &self.beside else { return Ok(()) };
            let refuse = allow_connections(database, false);
            beside.batch_execute(&refuse).await.context(|| "refusing connections to the source's database".into())
        };
        let read_only = async {
            self.source.batch_execute(&close).await.context(|| "closing the source's database to writers".into())
        };
        // Read-only first: from then on everybody who gets in is.
        read_only.await?;
        refuse.await?;
        // A session that begins after this moment is read-only by default, or refused; one that began before is ended.
        self.closed_at = Some(self.source.query_typed_one("SELECT pg_catalog.clock_timestamp()", &[]).await?.get(0));
        self.end_sessions().await.map(|_| ())
    }

    /// Ends every other session that began before the database was closed, and waits until they are gone. Answers whether there
    /// were any.
    ///
    /// Called again before the decision: a session that was still starting up may have read the old default and been seen
    /// by nobody the first time.
    pub(super) async fn end_sessions(&self) -> Result<bool> {
        let mut any = false;
        loop {
            // Of a session whose role is not ours to look at, the server tells neither its kind nor its beginning.
            let left = self
                .source
                .query(
                    "SELECT backend_type IS NULL AND usesysid IS NOT NULL AND backend_start IS NULL, usename::text, \
                            CASE WHEN backend_type = 'client backend' THEN pg_catalog.pg_terminate_backend(pid) END \
                     FROM pg_catalog.pg_stat_activity \
                     WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid() AND application_name <> $1 \
                       AND (backend_type = 'client backend' AND backend_start < $2 \
                            OR backend_type IS NULL AND usesysid IS NOT NULL AND backend_start IS NULL)",
                    &[&self.application_name, &self.closed_at],
                )
                .await
                .context(|| "ending the other sessions of the source's database".into())?;
            if let Some(hidden) = left.iter().find(|row| row.get::<_, bool>(0)) {
                let role: Option<&str> = hidden.get(1);
                return Err(hidden_sessions(role.unwrap_or("another role"), self.source_spec.user()));
            }
            if left.is_empty() {
                return Ok(any);
            }
            any = true;
            tokio::time::sleep(SESSIONS_INTERVAL).await;
        }
    }

    /// Right before the decision: the fence is up, and was since it went up (H29).
    ///
    /// The lock session itself says that it has its locks; if it has died, so has the fence. Where there are no locks, a session
    /// that shows up only now could have written after the second marker.
    pub(super) async fn prove(&self) -> Result<()> {
        if self.record.fence == FenceMode::Tables {
            return self.locks_are_held().await;
        }
        let (late, closed, ()) = tokio::try_join!(self.end_sessions(), self.is_closed(), self.locks_are_held())?;
        if !closed {
            return Err(Error::new(ErrorKind::Other, "somebody has opened the source's database to writers again"));
        }
        if late && self.record.fence != FenceMode::Lock {
            return Err(Error::new(ErrorKind::Other, "a session that may have written showed up at the last moment"));
        }
        Ok(())
    }

    /// Lets the locks of `tables` give way to the guard, in one commit.
    pub(super) async fn hand_over(&self) -> Result<()> {
        let Some(locks) = self.locks.as_ref().filter(|_| self.record.fence == FenceMode::Tables) else { return Ok(()) };
        locks
            .client
            .batch_execute("SET LOCAL synchronous_commit = local; COMMIT")
            .await
            .context(|| "having writes to the tables that have moved refused".into())
    }

    async fn locks_are_held(&self) -> Result<()> {
        if !self.record.fence.locks() {
            return Ok(());
        }
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
        if usize::try_from(held) == Ok(locks.count) { Ok(()) } else { Err(lost()) }
    }

    /// Whether the database is closed as it was when we closed it, and nobody who got in all the same writes at this moment.
    async fn is_closed(&self) -> Result<bool> {
        let row = self
            .source
            .query(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_db_role_setting s WHERE s.setrole = 0 AND s.setdatabase = d.oid \
                                AND 'default_transaction_read_only=on' = ANY (s.setconfig)), d.datallowconn, \
                        EXISTS (SELECT FROM pg_catalog.pg_stat_activity a WHERE a.datid = d.oid AND a.backend_xid IS NOT NULL \
                                AND a.backend_type = 'client backend' AND a.application_name <> $1) \
                 FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()",
                &[&self.application_name],
            )
            .await
            .context(|| "looking whether the source's database is still closed".into())?;
        let Some(row) = row.first() else { return Ok(false) };
        let (read_only, connections, writes): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
        if writes && self.record.fence != FenceMode::Lock {
            return Err(Error::new(
                ErrorKind::Other,
                "a session writes behind the fence: it asked for a read-write transaction",
            ));
        }
        Ok(read_only && connections != (self.record.fence == FenceMode::Connections))
    }

    /// After the decision: the locks go, the database stays closed.
    ///
    /// A session that asked for a read-write transaction by itself (H30) may wait for them: it is ended first, because it would
    /// write to the old primary.
    pub(super) async fn release(&mut self) -> Result<()> {
        let ended = if self.locks.is_some() && self.record.fence == FenceMode::Lock {
            self.end_waiting_sessions().await
        } else {
            Ok(())
        };
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

    /// Before the decision: as if nothing had been. By the sessions at hand, or else by new ones. Then the operator's command for it.
    pub(super) async fn lift(
        &mut self,
        target: &ConnectionSpec,
        error: &Error,
        step: &str,
        around: &hook::Surroundings,
    ) -> Result<Option<Lifted>> {
        let outcome = if self.is_recorded { self.undo(target).await } else { Ok(None) };
        self.unlock().await;
        let Some((record, client)) = outcome? else { return Ok(None) };
        let record = Record { step: step.to_owned(), reason: Some(error.to_string()), ..record };
        let client = client.as_ref().unwrap_or(self.target);
        record::finish_lifting(client, &record, around).await.map(Some)
    }

    /// What was undone, and the session with the target by which, where it is a new one.
    async fn undo(&self, target: &ConnectionSpec) -> Result<Option<(Record, Option<Client>)>> {
        let late = |_| Err(Error::new(ErrorKind::Transient, format!("no answer within {} s", UNDO_PATIENCE.as_secs())));
        let at_hand = record::undo(self.source_spec, Reach::AtHand(self.source), self.target, self.application_name);
        let outcome = tokio::time::timeout(UNDO_PATIENCE, at_hand).await.unwrap_or_else(late);
        if let Ok(record) = outcome {
            return Ok(record.map(|record| (record, None)));
        }
        let anew = async {
            let target = target.connect(self.application_name).await?;
            let record = record::undo(self.source_spec, Reach::Anew, &target, self.application_name).await?;
            Ok(record.map(|record| (record, Some(target))))
        };
        tokio::time::timeout(UNDO_PATIENCE, anew).await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Transient, format!("no answer within {} s", UNDO_PATIENCE.as_secs())))
        })
    }

    /// What an operator runs when the fence could not be lifted.
    pub(super) fn by_hand(&self) -> String {
        self.record.by_hand(self.source_spec.database())
    }
}

async fn backend_pid(client: &Client) -> Result<i32> {
    Ok(client.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.get(0))
}

/// Somebody is there whom we cannot see well enough to end.
pub(super) fn hidden_sessions(role: &str, our_role: &str) -> Error {
    let text = format!("sessions of {role} are connected to the source's database, and our role may not look at them");
    Error::new(ErrorKind::Blocked, text)
        .hint(format!("GRANT pg_read_all_stats, pg_signal_backend TO {}; on the source.", sql::identifier(our_role)))
}

/// Tables of ours that somebody vacuums, analyzes or indexes, ready for SQL, and who.
async fn maintained(source: &Client, tables: &[&Table]) -> Result<Vec<(String, String)>> {
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let rows = source
        .query(
            "SELECT n.nspname::text, c.relname::text, format('pid %s (%s%s) on %I.%I', l.pid, coalesce(a.backend_type, 'another role''s'), \
                    CASE WHEN a.query LIKE '%(to prevent wraparound)%' THEN ', against wraparound, which makes way for nobody' ELSE '' END, \
                    n.nspname, c.relname) \
             FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
             WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'ShareUpdateExclusiveLock' \
               AND (n.nspname, c.relname) IN (SELECT * FROM unnest($1::text[], $2::text[])) \
               AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) \
             ORDER BY 1, 2",
            &[&schemas, &names],
        )
        .await
        .context(|| "looking who maintains the source's tables".into())?;
    Ok(rows.iter().map(|row| (sql::qualified(row.get(0), row.get(1)), row.get(2))).collect())
}
