//! The cutover: from "the target follows" to "the target is the primary", all or nothing (I8).
//!
//! ```text
//!   check ► fence ► marker, drain ► close ► settle (sequences, last check, second marker: at once) ► arm ► switch ► release
//!           └─────────── anything fails, or time is up: open, unlock, follow again ────────────────────┘ │
//!                                                                             one synchronous commit on the target
//! ```
//!
//! | step | what holds afterwards |
//! |---|---|
//! | fence | our session has locked every migrated table against writes, and waited for those in flight; applications wait |
//! | drain | our transactional marker went through source, queue and apply: so did every commit before it |
//! | close | the database is read-only by default and all other sessions have ended (H29, H30): releasing the locks lets nobody write |
//! | settle | sequences, read when nobody can call `nextval` any more (H31), are set on the target; the catalog is what was migrated (I11); tables whose updates the stream does not carry are compared whole (H27); deferrable constraints hold (H19); no change came between the markers, so nothing slipped through the fence |
//! | arm | the stream back to the server that is left begins behind all that was applied (H33) |
//! | switch | the lock session has proved that it still holds its locks; one synchronous commit on the target decides |
//!
//! What is done to the source stands in the ledger before it is done, so that after a crash [`lift_left_over_fence`] undoes it.

pub mod arming;
mod fence;
mod sequences;
mod unique;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_postgres::Client;

use crate::apply::Applied;
use crate::apply::assemble::MARKER_PREFIX;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::{self, Table};
use crate::target::ledger;
use crate::target::schema;
use crate::{sql, verify};

pub use arming::{Arming, WayBack};
pub use fence::Closed;
use fence::Fence;
pub(crate) use fence::{end_sessions_since, open_again};
pub use fence::{is_fence_left_over, lift_left_over_fence};

/// How a cutover is to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// How long it may take in all before it is given up.
    pub timeout_seconds: f64,
    /// How long writers may have to wait before it is given up.
    pub max_write_stall_seconds: f64,
    /// Objects whose change since the start does not matter, as the error names them (I11).
    pub waive: Vec<String>,
    /// Whether the way back is armed.
    pub reverse: bool,
    /// Whether it leads back to the server that was left: a switchback.
    pub back: bool,
}

/// What a cutover works on.
pub struct Cutover<'a> {
    /// The server that is left.
    pub source: &'a ConnectionSpec,
    /// The server that takes over.
    pub target: &'a ConnectionSpec,
    /// What our sessions call themselves; others are ended.
    pub application_name: &'a str,
    /// The migrated tables, and which of them the stream shows inserts of only.
    pub tables: &'a [(Table, bool)],
    /// How far the apply is.
    pub applied: watch::Receiver<Applied>,
    /// What stands against it, besides what it finds itself.
    pub blockers: Vec<String>,
    /// What the way back is made from, and how far it is; `None` on the way back itself.
    pub way_back: Option<(WayBack, watch::Receiver<Arming>)>,
    /// How the target was closed to writers by the cutover before, which this one takes back; `None` where there was none.
    pub target_closed: Option<Closed>,
}

/// A cutover that did not go through.
pub struct GivenUp {
    /// Why; its kind is `Aborted`.
    pub error: Error,
    /// The source may still be closed to writers: [`lift_left_over_fence`] has to be called until it succeeds.
    pub fence_is_left: bool,
}

/// A step that is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its name, as in the table of this module.
    pub name: String,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// A cutover that went through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The version of this object's form.
    pub version: u32,
    /// From the first lock to the release, in milliseconds.
    pub downtime_ms: f64,
    /// The source's position up to which everything is on the target.
    pub cutover_lsn: Lsn,
    /// Every step with its time.
    pub steps: Vec<Step>,
    /// How many sequences were set on the target.
    pub sequences_synced: usize,
    /// Whether all rows of all tables were compared; this cutover compares those of tables without a replica identity only.
    pub verified: bool,
    /// The way back: `armed` or `none`.
    pub reverse: String,
}

impl Cutover<'_> {
    /// Does it. Calls `step` after each step.
    ///
    /// # Errors
    /// `Aborted` when a precondition does not hold and nothing was touched, or with the step and the reason when it was given
    /// up: then the fence is lifted, and the migration follows as before.
    pub async fn run(&self, options: &Options, mut step: impl FnMut(&Step) + Send + Sync) -> Result<Outcome, GivenUp> {
        let mut timer = Timer::new(options, &mut step);
        let untouched = |error: Error| GivenUp { error: error.with_kind(ErrorKind::Aborted), fence_is_left: false };
        let begin = timer.within(async {
            let source = self.source.connect(self.application_name).await?;
            let target = self.target.connect(self.application_name).await?;
            // Sessions of their own for the last look at the catalog and the constraints, made while nobody waits.
            let inspector = self.source.connect(self.application_name).await?;
            let checker = self.target.connect(self.application_name).await?;
            let before = ledger::fingerprint(&target).await?;
            self.preconditions(&source, &target, &before, options).await?;
            Ok((source, target, inspector, checker, before))
        });
        let (source, target, inspector, checker, before) = begin.await.map_err(untouched)?;
        // Once without the fence: applications must not wait for a backlog. A target that is too far behind costs them nothing.
        self.drain(&source, &timer)
            .await
            .map_err(|error| {
                untouched(
                    error
                        .context("waiting until the target has caught up, before the fence")
                        .hint("Nothing was touched. Try again when `walferry status` shows little lag, or give more time with --timeout."),
                )
            })?;
        // As for the backlog: what can be known before applications wait is looked at before.
        let tables: Vec<&Table> = self.tables.iter().map(|(table, _)| table).collect();
        timer.within(unique::hold(&checker, &tables)).await.map_err(untouched)?;
        let way_back = self.way_back.as_ref().filter(|_| options.reverse);
        if let Some((way_back, arming)) = way_back {
            let migrated: Vec<Table> = tables.iter().map(|table| (*table).clone()).collect();
            let ready = async {
                wait_until_ready(arming.clone()).await?;
                way_back.draft(&target, &migrated).await
            };
            timer.within(ready).await.map_err(|error| {
                let waits = "Nothing was touched. The slot of the way back waits for every transaction that is open on the target's cluster: \
                             end the old ones that pg_stat_activity shows there, or cut over with --no-reverse.";
                let hint = error.next_step().unwrap_or(waits).to_owned();
                untouched(error.context("making the way back ready, before the fence").hint(hint))
            })?;
        }
        timer.done("check");

        let mut fence = Fence::new(&source, &target, self.source.database(), self.application_name);
        let outcome =
            self.switch((&source, &inspector), (&target, &checker), &mut fence, (&before, options), &mut timer).await;
        match outcome {
            Ok((cutover_lsn, sequences_synced)) => {
                // Decided: what is left to do takes nothing back.
                if let Err(error) = fence.release().await {
                    tracing::warn!(%error, "after the decision, sessions that wait for the source's locks could not be ended");
                }
                if let Some(since) = self.target_closed.as_ref().and_then(|closed| closed.since.as_deref())
                    && let Err(error) = end_sessions_since(&target, since, self.application_name).await
                {
                    tracing::warn!(%error, "after the decision, sessions that are still read-only could not be ended");
                }
                timer.done("release");
                Ok(Outcome {
                    version: 1,
                    downtime_ms: timer.stalled().as_secs_f64() * 1000.0,
                    cutover_lsn,
                    steps: timer.steps,
                    sequences_synced,
                    verified: false,
                    reverse: if way_back.is_some() { "armed" } else { "none" }.into(),
                })
            }
            Err(error) => {
                let at = timer.current();
                let lifted = fence.lift(self.source, self.target).await;
                let next = error.next_step().unwrap_or("Mend the reason, then try again.").to_owned();
                let error = Error::new(ErrorKind::Aborted, format!("the cutover was given up during {at}: {error}"));
                Err(match lifted {
                    Ok(()) => GivenUp {
                        error: error.hint(format!("The fence is lifted and the migration follows again. {next}")),
                        fence_is_left: false,
                    },
                    Err(lift) => GivenUp {
                        error: error
                            .context(format!(
                                "the fence could not be lifted yet ({lift}); this is tried again and again"
                            ))
                            .hint(fence.by_hand()),
                        fence_is_left: true,
                    },
                })
            }
        }
    }

    async fn preconditions(
        &self,
        source: &Client,
        target: &Client,
        before: &BTreeMap<String, String>,
        options: &Options,
    ) -> Result<()> {
        let migration = ledger::load(target).await?;
        if migration.is_none_or(|migration| migration.phase != ledger::Phase::Following) {
            return Err(Error::new(ErrorKind::Aborted, "the migration does not follow yet")
                .hint("`walferry status` says what it waits for."));
        }
        if !self.blockers.is_empty() {
            return Err(Error::new(
                ErrorKind::Aborted,
                format!("the migration is not ready: {}", self.blockers.join("; ")),
            ));
        }
        self.nothing_escaped(source, before, options).await
    }

    /// What table locks do not hold back: prepared transactions (H30), and DDL (I11).
    async fn nothing_escaped(
        &self,
        source: &Client,
        before: &BTreeMap<String, String>,
        options: &Options,
    ) -> Result<()> {
        self.no_prepared_transactions(source).await?;
        self.same_catalog(source, before, options).await
    }

    /// From the fence to the decision. Every error leads to the fence being lifted.
    async fn switch(
        &self,
        (source, inspector): (&Client, &Client),
        (target, checker): (&Client, &Client),
        fence: &mut Fence<'_>,
        (before, options): (&BTreeMap<String, String>, &Options),
        timer: &mut Timer<'_>,
    ) -> Result<(Lsn, usize)> {
        let tables: Vec<&Table> = self.tables.iter().map(|(table, _)| table).collect();
        fence.lock(self.source, &tables, timer).await?;
        timer.done("fence");
        let first = self.drain(source, timer).await?;
        timer.done("drain");

        timer.within(fence.close()).await?;
        timer.done("close");
        // At once, because applications wait: nobody writes any more, so their order does not matter.
        let settled = timer.within(async {
            tokio::try_join!(
                sequences::copy(source, target),
                self.drain(source, timer),
                self.nothing_escaped(inspector, before, options),
                self.insert_only_tables_are_equal(),
                unique::hold(checker, &tables),
            )
        });
        let (synced, second, (), (), ()) = settled.await?;
        if second.changes != first.changes {
            let count = second.changes - first.changes;
            return Err(Error::new(ErrorKind::Other, format!("{count} changes came through the fence"))
                .hint("Somebody wrote without waiting for the locks; look for sessions with special rights."));
        }
        timer.done("settle");

        let way_back = self.way_back.as_ref().filter(|_| options.reverse);
        if let Some((way_back, _)) = way_back {
            // All that was applied is before, and the sequences are set: from here on, what comes is the applications'.
            timer.within(way_back.arm(source, target)).await?;
        }
        timer.done("arm");

        timer.within(fence.end_sessions()).await?;
        timer.within(fence.prove(tables.len())).await?;
        let identity = schema::restore_identity(&tables.iter().map(|table| (*table).clone()).collect::<Vec<_>>());
        let decide = format!(
            "BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '2s'; {} {} {} {} \
             UPDATE walferry.migration SET phase = 'cut_over', cutover = jsonb_build_object('lsn', '{}', 'at', now()); COMMIT",
            fence.still_up(),
            identity.iter().map(|statement| format!("{statement}; ")).collect::<String>(),
            ledger::decide(way_back.is_some()),
            self.target_closed.as_ref().map_or(String::new(), |closed| closed.reopen(self.target.database())),
            second.lsn
        );
        let decided = timer
            .within(async { target.batch_execute(&decide).await.context(|| "deciding for the target".into()) })
            .await;
        if let Err(error) = decided
            && !self.is_decided().await
        {
            return Err(error);
        }
        timer.done("switch");
        Ok((second.lsn, synced))
    }

    /// Sends a marker through the stream, and waits until the apply has committed it (H34).
    async fn drain(&self, source: &Client, timer: &Timer<'_>) -> Result<Drained> {
        let content = format!("cutover {}", unique());
        timer
            .within(async {
                // `local`: with `off` it would not be flushed on return, with `on` a dead standby could hold it up.
                source.batch_execute("SET synchronous_commit = local").await?;
                let lsn: tokio_postgres::types::PgLsn = source
                    .query_one(
                        "SELECT pg_catalog.pg_logical_emit_message(true, $1, $2::text)",
                        &[&MARKER_PREFIX, &content],
                    )
                    .await
                    .context(|| "sending a marker into the stream".into())?
                    .get(0);
                let mut applied = self.applied.clone();
                let ours = |applied: &Applied| applied.marker.as_ref().is_some_and(|marker| marker.content == content);
                let changes = match applied.wait_for(ours).await {
                    Ok(applied) => applied.marker.as_ref().map_or(0, |marker| marker.changes),
                    Err(_) => return Err(Error::new(ErrorKind::Other, "the apply has ended")),
                };
                Ok(Drained { lsn: lsn.into(), changes })
            })
            .await
    }

    /// Whether the decision was committed, when its answer got lost. Lifting the fence after it would make two primaries, so this
    /// asks until there is an answer, and the fence stays up meanwhile.
    async fn is_decided(&self) -> bool {
        loop {
            let phase = async {
                let target = self.target.connect(self.application_name).await?;
                // The lost session may still be about to commit.
                let others = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                     WHERE application_name = $1 AND query LIKE '%cut_over%' AND pid <> pg_catalog.pg_backend_pid()";
                if !target.query(others, &[&self.application_name]).await?.is_empty() {
                    return Err(Error::new(ErrorKind::Transient, "the session that decides is still there"));
                }
                ledger::load(&target).await
            };
            match phase.await {
                Ok(migration) => return migration.is_some_and(|migration| migration.phase == ledger::Phase::CutOver),
                Err(error) => {
                    tracing::warn!(%error, "asking the target whether the decision was committed; the fence stays up")
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn no_prepared_transactions(&self, source: &Client) -> Result<()> {
        let count: i64 = source
            .query_typed_one(
                "SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()",
                &[],
            )
            .await?
            .get(0);
        if count == 0 {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Blocked,
            format!("{count} prepared transactions are open on the source: committed later, they would be lost"),
        )
        .hint("COMMIT PREPARED or ROLLBACK PREPARED what `SELECT gid FROM pg_prepared_xacts` names."))
    }

    /// I11: nothing that the stream does not show has come, gone or changed.
    async fn same_catalog(&self, source: &Client, before: &BTreeMap<String, String>, options: &Options) -> Result<()> {
        let now = catalog::fingerprint(source).await?;
        let changed: Vec<String> = changes(before, &now)
            .into_iter()
            .filter(|change| !options.waive.iter().any(|waived| is_waived(change, waived)))
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let shown = changed.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("; ");
        Err(Error::new(ErrorKind::Blocked, format!("{} objects of the source changed since the migration began: {shown}", changed.len()))
            .hint("Make the same change on the target, then name the object in --waive; or start anew with `walferry clean` and `walferry migrate`."))
    }

    /// H27: an update or delete of these would not be in the stream.
    async fn insert_only_tables_are_equal(&self) -> Result<()> {
        let tables: Vec<Table> =
            self.tables.iter().filter(|(_, insert_only)| *insert_only).map(|(table, _)| table.clone()).collect();
        if tables.is_empty() {
            return Ok(());
        }
        let default = verify::Options::default();
        let room = self.source.connections().room().min(self.target.connections().room());
        let options = verify::Options { jobs: default.jobs.min(room).max(1), ..default };
        let report = verify::compare(
            &tables,
            || self.source.connect(self.application_name),
            || self.target.connect(self.application_name),
            &options,
            &|_| {},
        )
        .await?;
        if report.equal {
            return Ok(());
        }
        let different: Vec<&str> =
            report.tables.iter().filter(|table| !table.equal).map(|table| table.table.as_str()).collect();
        Err(Error::new(
            ErrorKind::Different,
            format!(
                "rows of {} were updated or deleted, which the stream cannot tell without a replica identity",
                different.join(", ")
            ),
        )
        .hint(
            "ALTER TABLE … REPLICA IDENTITY FULL on the source, then start anew: `walferry clean`, `walferry migrate`.",
        ))
    }
}

/// What changed between two fingerprints, as people would say it.
pub fn changes(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let gone = before.keys().filter(|object| !now.contains_key(*object)).map(|object| format!("{object} is gone"));
    let other = now.iter().filter_map(|(object, hash)| match before.get(object) {
        None => Some(format!("{object} is new")),
        Some(was) if was != hash => Some(format!("{object} has changed")),
        Some(_) => None,
    });
    gone.chain(other).collect()
}

/// Whether a change is that of this object: `table public.a` is not `table public.ab`.
fn is_waived(change: &str, waived: &str) -> bool {
    change.strip_prefix(waived).is_some_and(|rest| matches!(rest, " is gone" | " is new" | " has changed"))
}

struct Drained {
    lsn: Lsn,
    /// Row changes that came before the marker.
    changes: u64,
}

/// The times of a cutover, and its limits.
struct Timer<'a> {
    began: Instant,
    step_began: Instant,
    stall_began: Option<Instant>,
    timeout: Duration,
    stall_max: Duration,
    steps: Vec<Step>,
    tell: &'a mut (dyn FnMut(&Step) + Send + Sync),
}

/// The steps in order: the one after the last that is done is under way.
const STEPS: [&str; 9] = ["check", "fence", "drain", "close", "settle", "arm", "switch", "release", "the end"];

impl<'a> Timer<'a> {
    fn new(options: &Options, tell: &'a mut (dyn FnMut(&Step) + Send + Sync)) -> Timer<'a> {
        let now = Instant::now();
        let limit = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Timer {
            began: now,
            step_began: now,
            stall_began: None,
            timeout: limit(options.timeout_seconds),
            stall_max: limit(options.max_write_stall_seconds),
            steps: Vec::new(),
            tell,
        }
    }

    fn done(&mut self, name: &str) {
        let step = Step { name: name.to_owned(), ms: self.step_began.elapsed().as_secs_f64() * 1000.0 };
        self.step_began = Instant::now();
        (self.tell)(&step);
        self.steps.push(step);
    }

    fn current(&self) -> &'static str {
        STEPS.get(self.steps.len()).copied().unwrap_or("the end")
    }

    /// Writers wait from now on.
    fn stall(&mut self) {
        self.stall_began.get_or_insert_with(Instant::now);
    }

    /// Writers wait no longer.
    fn resume(&mut self) {
        self.stall_began = None;
    }

    fn stalled(&self) -> Duration {
        self.stall_began.map(|began| began.elapsed()).unwrap_or_default()
    }

    /// What is left until one of the limits; how long writers may wait counts only while they do.
    fn left(&self) -> Duration {
        let left = self.timeout.saturating_sub(self.began.elapsed());
        match self.stall_began {
            Some(began) => left.min(self.stall_max.saturating_sub(began.elapsed())),
            None => left,
        }
    }

    /// Does something within the limits.
    async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let late = |_| {
            let waited = self.stall_began.is_some() && self.stalled() >= self.stall_max;
            let text = if waited {
                "writers had to wait longer than --max-write-stall"
            } else {
                "it took longer than --timeout"
            };
            Error::new(ErrorKind::Aborted, text)
        };
        tokio::time::timeout(self.left(), work).await.map_err(late)?
    }
}

/// A text that no other cutover has.
fn unique() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", std::process::id(), now.as_nanos())
}

/// Waits until the slot of the way back is there.
///
/// # Errors
/// `Aborted` when it cannot be.
async fn wait_until_ready(mut arming: watch::Receiver<Arming>) -> Result<()> {
    let settled = |arming: &Arming| !matches!(arming, Arming::Preparing(_));
    let outcome = arming.wait_for(settled).await.map(|arming| arming.clone());
    match outcome {
        Ok(Arming::Impossible(why, mend)) => {
            Err(Error::new(ErrorKind::Aborted, format!("there would be no way back: {why}")).hint(mend))
        }
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(ErrorKind::Other, "nobody makes the way back ready")),
    }
}

/// Takes back the setting that closes a database to writers.
fn reopen_statement(database: &str, previous: Option<&str>) -> String {
    let database = sql::identifier(database);
    match previous {
        Some(value) => format!("ALTER DATABASE {database} SET default_transaction_read_only = {}", sql::literal(value)),
        None => format!("ALTER DATABASE {database} RESET default_transaction_read_only"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_as_people_would_say_them() {
        let map = |entries: &[(&str, &str)]| entries.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let before = map(&[("table a", "1"), ("table b", "1"), ("index c", "1")]);
        let now = map(&[("table a", "1"), ("table b", "2"), ("index d", "1")]);
        assert_eq!(changes(&before, &now), ["index c is gone", "index d is new", "table b has changed"]);
        assert!(changes(&before, &before).is_empty());
    }

    #[test]
    fn i11_one_object_is_waived_and_not_those_whose_names_begin_alike() {
        assert!(is_waived("table a.b is new", "table a.b"));
        assert!(is_waived("index a.b is gone", "index a.b"));
        for other in ["table a.b", "table a.bc is new", "column c of table a.b has changed"] {
            assert!(!is_waived(other, "table a.b"), "{other}");
        }
        assert!(!is_waived("table a.b is new", ""), "nothing named is nothing waived");
    }

    #[tokio::test]
    async fn a_cutover_ends_at_the_write_stall_or_the_timeout() {
        let options =
            Options { timeout_seconds: 30.0, max_write_stall_seconds: 0.0, waive: vec![], reverse: false, back: false };
        let mut tell = |_: &Step| {};
        let mut timer = Timer::new(&options, &mut tell);
        timer.stall();
        let error = timer.within(std::future::pending::<Result<()>>()).await.unwrap_err();
        assert!(error.to_string().contains("--max-write-stall"), "{error}");
        timer.resume();
        let short =
            Options { timeout_seconds: 0.0, max_write_stall_seconds: 9.0, waive: vec![], reverse: false, back: false };
        let mut tell = |_: &Step| {};
        let timer = Timer::new(&short, &mut tell);
        let error = timer.within(std::future::pending::<Result<()>>()).await.unwrap_err();
        assert!(error.to_string().contains("--timeout"), "{error}");
    }
}
