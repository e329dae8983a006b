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
//! | check | nothing stands against it, the target has no backlog, and the ledger knows what is going to be done |
//! | fence | writers are held as [`FenceMode`] says: by default our session has locked every migrated table against writes, and waited for those in flight; applications wait |
//! | on-fence | the operator's command, if there is one, has succeeded |
//! | drain | our transactional marker went through source, queue and apply: so did every commit before it |
//! | close | the database is read-only by default and all other sessions have ended (H29, H30): releasing the locks lets nobody write |
//! | settle | sequences, read when nobody can call `nextval` any more (H31), are set on the target; the catalog is what was migrated (I11); tables whose updates the stream does not carry are compared whole (H27); deferrable constraints hold (H19); large objects and extensions' configuration are equal (H14); no change came between the markers, so nothing slipped through the fence; unlogged tables are copied (H14) |
//! | arm | the stream back to the server that is left begins behind all that was applied (H33); not without a way back |
//! | switch | the fence has proved that it still stands; one synchronous commit on the target decides |
//! | on-switch, pgbouncer | the applications know of it. What fails from here on takes nothing back: it is said, and where it can be, done again at the next start |
//! | release | nobody waits any more |
//!
//! What is done to the source stands in the ledger before it is done (`record.rs`), so that after a crash [`lift_left_over_fence`]
//! undoes it; what is left to do after the decision stands in the deciding commit, and [`finish_pending`] does it.

mod afterwards;
pub mod arming;
mod automatic;
mod changes;
mod drain;
mod fence;
pub(crate) mod guard;
mod hook;
mod last_look;
mod options;
mod orphans;
mod pgbouncer;
mod prewarm;
mod ready;
mod record;
mod rehearse;
mod sequences;
mod sessions;
mod timer;
mod trial;
mod unique;
pub(crate) mod unlogged;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::apply::Applied;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::Table;
use crate::source::scope::Scope;
use crate::target::late::AtCutover;
use crate::target::ledger::{self, Migration};
use crate::target::schema;
use crate::timescale::compress;
use crate::unstreamed::large_object::Owners;
use crate::unstreamed::materialized_view::View;
use crate::{sql, timescale, unstreamed, verify};

pub use arming::{Arming, WayBack};
use arming::{Drafted, wait_until_ready};
pub use automatic::Automatic;
pub use changes::changes;
pub(crate) use drain::let_the_apply_pass;
use drain::{send_and_await_marker, unique};
use fence::Fence;
use hook::{Hook, Surroundings};
pub use options::{FenceMode, Hooks, Options, PgBouncer};
pub(crate) use ready::obstacles;
pub use ready::{Finding, Weight};
pub use record::{Closed, GivenUpTry, Lifted, finish_pending, is_fence_left_over, lift_left_over_fence};
pub(crate) use record::{is_closed_to_writers, last_given_up, may_refuse_connections, open_for_good};
pub(crate) use rehearse::Measured;
pub use rehearse::Rehearsal;
use sessions::Sessions;
use timer::Timer;

/// How a blocker of the status begins that a cutover looks at itself, because it can be waived or does not matter to every fence.
pub(crate) const SOURCE_BLOCKER: &str = "on the source, ";

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
    /// What of the source's database is moved; all of it on the way back.
    pub scope: &'a Scope,
    /// The same of what is in no stream, on the way back too.
    pub unstreamed: &'a Scope,
    /// How far the apply is.
    pub applied: watch::Receiver<Applied>,
    /// What stands against it, besides what it finds itself.
    pub blockers: Vec<String>,
    /// What the way back is made from, and how far it is; `None` on the way back itself.
    pub way_back: Option<(WayBack, watch::Receiver<Arming>)>,
    /// Whose large objects are on the target.
    pub owners: &'a Owners,
    /// How the target was closed to writers by the cutover before, which this one takes back; `None` where there was none.
    pub target_closed: Option<Closed>,
    /// As the ledger has it.
    pub migration: &'a Migration,
    /// The hypertables whose rows were counted before.
    pub counted: timescale::unseen::Counted,
}

/// A cutover that did not go through.
pub struct GivenUp {
    /// Why; its kind is `Aborted`.
    pub error: Error,
    /// At which step, once it had begun to touch anything.
    pub given_up: Option<GivenUpTry>,
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
    /// Whether all rows of all tables were found equal by the last complete `walferry verify`, and no difference since.
    pub verified: bool,
    /// The way back: `armed` or `none`.
    pub reverse: String,
    /// How writers were held.
    #[serde(default)]
    pub fence: FenceMode,
    /// What somebody has to look after by hand, a sentence each. The target is the primary all the same.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl Cutover<'_> {
    /// Does it. Calls `step` after each step.
    ///
    /// # Errors
    /// `Aborted` when a precondition does not hold and nothing was touched, or with the step and the reason when it was given
    /// up: then the fence is lifted, and the migration follows as before.
    pub async fn run(&self, options: &Options, mut step: impl FnMut(&Step) + Send + Sync) -> Result<Outcome, GivenUp> {
        let mut timer = Timer::new(options, self.way_back(options).is_some(), &mut step);
        let untouched =
            |error: Error| GivenUp { error: error.with_kind(ErrorKind::Aborted), given_up: None, fence_is_left: false };
        let sessions = timer.within(Box::pin(Sessions::open(self, options))).await.map_err(untouched)?;
        let begin = timer.within(async {
            let findings = Box::pin(self.preconditions(&sessions, options)).await?;
            ready::nothing_stands_against_it(&findings)?;
            let pgbouncer = match &options.pgbouncer {
                Some(pooler) => Some(Box::pin(pgbouncer::Known::look(pooler, self.source)).await?),
                None => None,
            };
            let verified = verify::record::require(&sessions.target, Duration::MAX).await.is_ok();
            Ok((findings, pgbouncer, verified))
        });
        let (findings, pgbouncer, verified) = begin.await.map_err(untouched)?;
        if options.prewarm {
            // It may take a part of the time, and leaves the rest for the cutover itself.
            let reading = prewarm::prewarm(&sessions.source, &sessions.target, timer.left() / 2);
            timer.within(Box::pin(reading)).await.map_err(untouched)?;
        }
        let unstreamed = async {
            let Sessions { source, checker, .. } = &sessions;
            let refused =
                unstreamed::bring_up_to_date(source, checker, self.owners, self.unstreamed, &self.applied).await?;
            let not_waived = |refused: &unstreamed::Refused| !options.waive.contains(&refused.view.object);
            refused.into_iter().find(not_waived).map_or(Ok(()), |refused| Err(refused.into_error()))
        };
        timer.within(Box::pin(unstreamed)).await.map_err(|error| {
            let hint = error
                .next_step()
                .unwrap_or("Nothing was touched. Try again, or give more time with --timeout.")
                .to_owned();
            untouched(
                error.context("bringing large objects and materialized views up to date, before the fence").hint(hint),
            )
        })?;
        let left = timer.left() / 4;
        timer
            .within(Box::pin(compress::recompress(&sessions.checker, &self.unstreamed.hypertables, left)))
            .await
            .map_err(untouched)?;
        // Once without the fence: applications must not wait for a backlog. A target that is too far behind costs them nothing.
        self.drain(&sessions.source, &timer)
            .await
            .map_err(|error| {
                untouched(
                    error
                        .context("waiting until the target has caught up, before the fence")
                        .hint("Nothing was touched. Try again when `walferry status` shows little lag, or give more time with --timeout."),
                )
            })?;
        // As for the backlog: what can be known before applications wait is looked at before.
        let tables = self.tables_by_name();
        let look_at_most = timer.left() / 3;
        let known = timer.within(async {
            unique::hold(&sessions.checker, &tables).await?;
            let (late, restorable) = self.try_decision(&sessions, &tables).await?;
            if !late.later().is_empty() {
                // It may take a part of the time, and leaves the rest for the cutover itself.
                let skipped = orphans::none(&sessions.source, &sessions.checker, look_at_most).await?;
                if skipped > 0 {
                    tracing::info!(
                        skipped,
                        "foreign keys that there was no time to look at are validated after the release"
                    );
                }
            }
            let margin = options.sequence_margin;
            let sequences = sequences::list(&sessions.source, &sessions.target, self.scope, margin).await?;
            Ok((sequences, (late, restorable)))
        });
        let (sequences, late) = known.await.map_err(untouched)?;
        let mut way_back = match self.way_back(options) {
            None => None,
            Some((way_back, arming)) => {
                let migrated: Vec<Table> = tables.iter().map(|table| (*table).clone()).collect();
                let ready = timer.within(async {
                    wait_until_ready(arming.clone()).await?;
                    way_back.draft_for_cutover(&sessions.target, &migrated).await
                });
                Some(Box::pin(ready).await.map_err(|error| {
                    let waits = "Nothing was touched. The slot of the way back waits for every transaction that is open on the target's \
                                 cluster: end the old ones that pg_stat_activity shows there, or cut over with --no-reverse.";
                    let hint = error.next_step().unwrap_or(waits).to_owned();
                    untouched(error.context("making the way back ready, before the fence").hint(hint))
                })?)
            }
        };
        let around = timer.within(async { Ok(Surroundings::gather(self.source, self.target).await) });
        let around = around.await.map_err(untouched)?;

        let mut fence = Fence::new(&sessions.source, &sessions.target, self.source, self.application_name, options);
        let prepared = timer.within(Box::pin(fence.prepare(pgbouncer))).await;
        let outcome = match prepared {
            Ok(()) => {
                timer.done();
                Box::pin(self.switch(
                    &sessions,
                    &mut fence,
                    (&sequences, &late, options, &around, way_back.as_ref()),
                    &mut timer,
                ))
                .await
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok((cutover_lsn, late)) => {
                // Decided: what is left to do takes nothing back.
                if let Some(way_back) = &mut way_back {
                    way_back.is_open();
                }
                let mut warnings = Box::pin(self.go_on(&mut fence, &around, &sessions.target, &mut timer)).await;
                let late = late.into_iter().filter(|view| !options.waive.contains(&view.object));
                let late = late.map(|view| view.renamed(self.scope)).collect();
                warnings.extend(afterwards::refresh_late(&sessions.target, late).await);
                warnings.extend(ready::warnings(&findings));
                warnings.extend(sequences.warnings());
                timer.done();
                Ok(Outcome {
                    version: 1,
                    downtime_ms: timer.stalled().as_secs_f64() * 1000.0,
                    cutover_lsn,
                    steps: timer.steps,
                    sequences_synced: sequences.count(),
                    verified,
                    reverse: if way_back.is_some() { "armed" } else { "none" }.into(),
                    fence: options.fence,
                    warnings,
                })
            }
            Err(error) => {
                let at = timer.current();
                let lifted = Box::pin(fence.lift(self.target, &error, at, &around)).await;
                let next = error.next_step().unwrap_or("Mend the reason, then try again.").to_owned();
                let error = Error::new(ErrorKind::Aborted, format!("the cutover was given up during {at}: {error}"));
                Err(match lifted {
                    Ok(lifted) => {
                        let mut text = "The fence is lifted and the migration follows again. ".to_owned();
                        if let Some(failed) = lifted.as_ref().and_then(|lifted| lifted.on_abort.as_ref()) {
                            text.push_str(&format!("But {failed}. "));
                        }
                        GivenUp {
                            error: error.hint(format!("{text}{next}")),
                            given_up: lifted.map(|lifted| lifted.given_up),
                            fence_is_left: false,
                        }
                    }
                    Err(lift) => GivenUp {
                        error: error
                            .context(format!(
                                "the fence could not be lifted yet ({lift}); this is tried again and again"
                            ))
                            .hint(fence.by_hand()),
                        given_up: None,
                        fence_is_left: true,
                    },
                })
            }
        }
    }

    /// The tables that both servers have by these names. Chunks are not among them: they come and go on each, and who writes to one goes
    /// by its hypertable.
    pub(super) fn tables_by_name(&self) -> Vec<&Table> {
        self.tables.iter().map(|(table, _)| table).filter(|table| table.chunk.is_none()).collect()
    }

    /// From the fence to the decision. Every error leads to the fence being lifted.
    async fn switch(
        &self,
        sessions: &Sessions,
        fence: &mut Fence<'_>,
        (sequences, (at_cutover, restorable), options, around, way_back): Prepared<'_>,
        timer: &mut Timer<'_>,
    ) -> Result<(Lsn, Vec<View>)> {
        let Sessions { source, target, inspector, checker, before, .. } = sessions;
        let tables = self.tables_by_name();
        // Which step is under way is noted in the ledger beside its work: applications wait.
        let id = fence.record().cutover.clone();
        let note = |step| record::note(target, &id, step);
        Box::pin(fence.raise(self.source, &tables, &sequences.holds(), timer)).await?;
        timer.done();
        if let Some(command) = &options.hooks.on_fence {
            let limit = options.hooks.timeout();
            let run = hook::run(Hook::Fence, command, limit, &id, around);
            tokio::try_join!(timer.within(run), timer.within(note(timer.current())))?;
            timer.done();
        }
        let (first, ()) = tokio::try_join!(self.drain(source, timer), timer.within(note(timer.current())))?;
        timer.done();

        tokio::try_join!(timer.within(note(timer.current())), timer.within(fence.complete(&tables)))?;
        timer.done();
        // At once, because applications wait: nobody writes any more, so their order does not matter.
        let settled = timer.within(async {
            tokio::try_join!(
                note(timer.current()),
                sequences.copy(source, target),
                self.drain(source, timer),
                Box::pin(self.insert_only_tables_are_equal(sessions, |table| !table.is_hypertable)),
                Box::pin(async {
                    let ((), (), is_any) = tokio::try_join!(
                        Box::pin(self.nothing_escaped(inspector, before, options)),
                        unique::hold(checker, &tables),
                        unstreamed::is_there_any(inspector, checker, self.unstreamed),
                    )?;
                    match is_any {
                        true => unstreamed::settle(inspector, checker, self.owners, self.unstreamed).await,
                        false => Ok(Vec::new()),
                    }
                }),
            )
        });
        let ((), (), second, (), late) = settled.await?;
        if second.changes != first.changes {
            let count = second.changes - first.changes;
            return Err(Error::new(ErrorKind::Other, format!("{count} changes came through the fence"))
                .hint(ready::who_writes_all_the_same(options.fence)));
        }
        timer.within(unlogged::copy(inspector, target, &tables, &options.waive)).await?;
        let wake_jobs = timer.within(Box::pin(self.settle_hypertables(sessions))).await?;
        timer.done();

        if let Some(way_back) = way_back {
            // All that was applied is before, and the sequences are set: from here on, what comes is the applications'.
            timer.within(way_back.arm(source, target)).await?;
            timer.done();
        }

        tokio::try_join!(timer.within(fence.prove()), timer.within(note(timer.current())))?;
        timer.within(fence.hand_over()).await?;
        let identity = schema::restore_identity(restorable);
        let pending = match fence.record().pending() {
            Some(pending) => {
                format!(" || jsonb_build_object('pending', {}::jsonb)", sql::literal(&record::to_json(&pending)?))
            }
            None => String::new(),
        };
        let decide = format!(
            // By its first word it is found when its answer is lost: the server shows the beginning of a long query only.
            "/* cut_over */ BEGIN; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '2s'; {} {} {} {} {} {} {wake_jobs} \
             UPDATE walferry.migration SET phase = 'cut_over', cutover = jsonb_build_object('lsn', '{}', 'at', now()){pending}; COMMIT",
            fence.record().still_up(),
            // Before what is said of triggers that it makes (H23).
            at_cutover.statements(),
            identity.iter().map(|statement| format!("{statement}; ")).collect::<String>(),
            ledger::decide(way_back.is_some()),
            self.target_closed.as_ref().map_or(String::new(), |closed| closed.reopen(self.target.database())),
            self.scope.rename_schemas(),
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
        timer.done();
        Ok((second.lsn, late))
    }

    /// What of TimescaleDB is carried over and compared behind the fence; answers what wakes its jobs.
    async fn settle_hypertables(&self, sessions: &Sessions) -> Result<String> {
        let Sessions { inspector: source, target, .. } = sessions;
        if !timescale::prepare::is_of_timescaledb(target).await? {
            return Ok(String::new());
        }
        // A session of its own, since it holds transactions.
        let mut own = self.target.connect(self.application_name).await?;
        timescale::settle::settle(source, &mut own, (self.migration, &self.counted), self.owners).await?;
        // Without the chunks that the source has dropped, which are gone only now.
        self.insert_only_tables_are_equal(sessions, |table| table.is_hypertable).await?;
        timescale::settle::wake_jobs(target).await
    }

    /// What the way back is made from, where there is to be one.
    fn way_back(&self, options: &Options) -> Option<&(WayBack, watch::Receiver<Arming>)> {
        self.way_back.as_ref().filter(|_| !options.no_reverse)
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
}

/// What is known before the fence: sequences, what the target makes only now, what the operator wants, where hooks are run, and the way
/// back.
type Prepared<'a> =
    (&'a sequences::Sequences, &'a (AtCutover, Vec<Table>), &'a Options, &'a Surroundings, Option<&'a Drafted<'a>>);
