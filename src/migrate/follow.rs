//! Following: what comes is applied, until a cutover goes through; meanwhile it is looked at whether one could.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;
use tracing::Instrument;

use super::{Direction, Running};
use crate::apply::Applied;
use crate::apply::layout::Layout;
use crate::control::{Answer, CutoverRequest};
use crate::cutover::{self, Arming, Closed, Cutover, GivenUp, Measured, SOURCE_BLOCKER, WayBack};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::LAG_UNKNOWN;
use crate::observe::status::{Level, Phase as ShownPhase, WayBack as ShownWayBack};
use crate::queue::Queue;
use crate::record::What;
use crate::source::catalog::{self, Table};
use crate::source::scope::WHOLE_DATABASE;
use crate::target::{ddl, ledger, warm};
use crate::timescale::recreate;
use crate::timescale::unseen::Counted;
use crate::{unstreamed, verify};

/// How often the source's catalog is compared with what was migrated (I11).
const CATALOG_INTERVAL: Duration = Duration::from_secs(30);
/// The same while something differs and DDL is replicated: it may only be on its way.
const REPLICATED_DDL_INTERVAL: Duration = Duration::from_secs(3);
/// How often it is looked at whether a cutover could begin.
const READINESS_INTERVAL: Duration = Duration::from_secs(1);
/// How long markers are waited for that only measure the way.
const MARKER_MAX: Duration = Duration::from_secs(10);
/// With more lag than this, a cutover would keep the applications waiting.
const READY_LAG_SECONDS: f64 = 5.0;

impl Running {
    /// Applies what comes, until a cutover goes through.
    pub(super) async fn follow(
        &self,
        queue: &Queue,
        layout: &Arc<Layout>,
        requested: &mut mpsc::Receiver<CutoverRequest>,
    ) -> Result<()> {
        self.board.set_phase(ShownPhase::Following);
        let (applied, watching) = watch::channel(Applied::default());
        let mut applying = pin!(async move {
            let outcome = self.apply(queue, layout, None, &applied).await;
            // Whoever waits for it, as a cutover does, sees that it has ended.
            drop(applied);
            outcome.and(Err(Error::new(ErrorKind::Other, "the apply has ended")))
        });
        let mut warming = JoinSet::new();
        let turn = Arc::default();
        let keep_warm = |warming: &mut JoinSet<Infallible>| {
            let board = self.board.clone();
            let is_close = move || board.snapshot().lag.seconds.is_some_and(|lag| lag <= READY_LAG_SECONDS);
            let (target, name) = (self.config.target.clone(), self.application_name.clone());
            warming.spawn(warm::keep_warm(target, name, is_close, Arc::clone(&turn)).in_current_span());
        };
        let scope = self.load(&self.target().await?).await?.scope;
        let as_on_source = recreate::is_recreated(&self.target().await?).await?;
        let (tell_obstacles, obstacles) = watch::channel(Vec::new());
        let keep_current = |working: &mut JoinSet<Infallible>| {
            let keeper = unstreamed::Keeper {
                source: self.config.source.clone(),
                target: self.config.target.clone(),
                application_name: self.application_name.clone(),
                owners: self.config.owners.clone(),
                scope: scope.clone(),
                applied: watching.clone(),
                obstacles: tell_obstacles.clone(),
                board: self.board.clone(),
                turn: Arc::clone(&turn),
            };
            working.spawn(keeper.run().in_current_span());
            working.spawn(self.compressor(scope.clone(), as_on_source, Arc::clone(&turn)).run().in_current_span());
        };
        keep_warm(&mut warming);
        keep_current(&mut warming);
        let (tell, arming) = watch::channel(Arming::Preparing(None));
        // A task of its own: a cutover waits for it.
        let mut beside = JoinSet::new();
        // `check` says so.
        let is_one_way =
            !scope.map_schemas.is_empty() || !scope.hypertables.is_empty() || self.has_hypertables().await?;
        let way_back = if self.direction == Direction::There && self.config.reverse && !is_one_way {
            let way_back = self.way_back().await?;
            beside.spawn(way_back.clone().keep_ready(tell).in_current_span());
            Some((way_back, arming))
        } else {
            None
        };
        let arming = way_back.as_ref().map(|(_, arming)| arming.clone());
        let mut watching_readiness = Box::pin(self.watch_readiness(&watching, arming, obstacles));
        loop {
            let request = tokio::select! {
                outcome = &mut applying => return outcome,
                error = &mut watching_readiness => return Err(error),
                request = requested.recv() => request,
            };
            let request = request.ok_or_else(|| Error::new(ErrorKind::Other, "the control socket is gone"))?;
            if request.answers.is_closed() {
                // Whoever asked did not wait.
                continue;
            }
            warming.abort_all();
            // A cutover is never just dropped: it gives up by itself when the apply ends, and then lifts its fence.
            // On the heap: it is large, and the stack of an unoptimized build is not.
            let mut cutover = Box::pin(self.answer(queue, &watching, &way_back, request));
            let (went_through, ended) = tokio::select! {
                went_through = &mut cutover => (went_through, None),
                outcome = &mut applying => (cutover.await, Some(outcome)),
            };
            match (went_through, ended) {
                (CutOver::Done, _) => return Ok(()),
                (CutOver::GivenUp, None) => {
                    keep_warm(&mut warming);
                    keep_current(&mut warming);
                }
                (CutOver::GivenUp, Some(outcome)) => return outcome,
                (CutOver::FenceLeft, _) => {
                    return Err(Error::new(ErrorKind::Transient, "the cutover's fence is still up on the source"));
                }
            }
        }
    }

    /// Does it, or rehearses it, and tells whoever asked.
    async fn answer(
        &self,
        queue: &Queue,
        applied: &watch::Receiver<Applied>,
        way_back: &Option<(WayBack, watch::Receiver<Arming>)>,
        mut request: CutoverRequest,
    ) -> CutOver {
        let known = async {
            self.is_the_right_way(&request)?;
            warm::stop(&self.target().await?, &self.application_name).await?;
            // As they are now: they can have changed since the migration began.
            let target = self.target().await?;
            let migration = self.load(&target).await?;
            let scope = migration.scope.clone();
            let entries = ledger::tables(&target).await?;
            let tables: Vec<(Table, bool)> =
                entries.into_iter().map(|entry| (entry.table, entry.insert_only)).collect();
            let target_closed = match self.direction {
                Direction::There => None,
                // The ledger of the way there stands on the server that took over.
                Direction::Back => Closed::load(&self.config.source.connect(&self.application_name).await?).await?,
            };
            Ok::<_, Error>((tables, target_closed, scope, migration))
        };
        let (tables, target_closed, scope, migration) = match known.await {
            Ok(known) => known,
            Err(error) => {
                let _ = request.answers.send(Answer::from(&error.with_kind(ErrorKind::Aborted)));
                return CutOver::GivenUp;
            }
        };
        if scope.is_part() && request.options.fence_by_default {
            // Nobody has asked for the rest of the database to be closed.
            request.options.fence = cutover::FenceMode::Tables;
        }
        // What stands against it on the source it looks at itself, and knows what is waived; the lag it measures.
        let measured = |blocker: &String| blocker.starts_with(SOURCE_BLOCKER) || blocker == LAG_UNKNOWN;
        let blockers = self.board.snapshot().blockers;
        let blockers: Vec<String> = blockers.into_iter().filter(|blocker| !measured(blocker)).collect();
        let counted = match request.dry_run || !blockers.is_empty() {
            true => Ok(Counted::default()),
            false => Box::pin(self.count_hypertables(&migration, queue, &request)).await,
        };
        let counted = match counted {
            Ok(counted) => counted,
            Err(error) => {
                self.board.event(Level::Warn, error.to_string());
                let _ = request.answers.send(Answer::from(&error.with_kind(ErrorKind::Aborted)));
                return CutOver::GivenUp;
            }
        };
        let cutover = Cutover {
            source: &self.config.source,
            target: &self.config.target,
            application_name: &self.application_name,
            tables: &tables,
            scope: if self.direction == Direction::There { &scope } else { &WHOLE_DATABASE },
            unstreamed: &scope,
            applied: applied.clone(),
            blockers,
            way_back: way_back.clone(),
            owners: &self.config.owners,
            target_closed,
            migration: &migration,
            counted,
        };
        if request.dry_run {
            let rehearsed = Box::pin(cutover.rehearse(&request.options)).await;
            if let Ok(Some(measured)) = rehearsed.as_ref().map(|rehearsal| rehearsal.estimate.as_ref()) {
                self.show_expected_downtime(measured);
            }
            let _ = request.answers.send(rehearsed.map_or_else(|error| Answer::from(&error), Answer::Rehearsed));
            return CutOver::GivenUp;
        }
        Box::pin(self.cut_over(&cutover, request)).await
    }

    async fn cut_over(&self, cutover: &Cutover<'_>, request: CutoverRequest) -> CutOver {
        self.board.set_phase(ShownPhase::CuttingOver);
        self.board.event(Level::Info, "a cutover begins");
        let outcome = cutover
            .run(&request.options, |step| {
                // Whoever asked may have gone; the cutover goes on.
                let _ = request.answers.send(Answer::Step(step.clone()));
            })
            .await;
        let (answer, became) = match outcome {
            Ok(outcome) => {
                if let Some(record) = self.config.source.record() {
                    let back = self.direction == Direction::Back;
                    record.recorder().write(What::Switched { back, outcome: outcome.clone() }, true);
                }
                self.board.set_phase(ShownPhase::CutOver);
                self.board.event(
                    Level::Info,
                    format!("cut over at {} with {:.0} ms of downtime", outcome.cutover_lsn, outcome.downtime_ms),
                );
                for warning in &outcome.warnings {
                    self.board.event(Level::Warn, warning);
                }
                (Answer::CutOver(outcome), CutOver::Done)
            }
            Err(GivenUp { error, given_up, fence_is_left }) => {
                if let Some(given_up) = given_up {
                    self.board.set_given_up(given_up);
                }
                self.board.set_phase(ShownPhase::Following);
                self.board.event(Level::Warn, error.to_string());
                (Answer::from(&error), if fence_is_left { CutOver::FenceLeft } else { CutOver::GivenUp })
            }
        };
        if request.answers.send(answer).is_ok() {
            // The process may end now: not before the answer is on its way.
            let _ = tokio::time::timeout(Duration::from_secs(2), request.answers.closed()).await;
        }
        became
    }

    /// `cutover` and `switchback` are not each other's repetition.
    fn is_the_right_way(&self, request: &CutoverRequest) -> Result<()> {
        let (text, hint) = match (&self.direction, request.options.back) {
            (Direction::There, true) => {
                ("there is nothing to switch back from", "`walferry cutover` switches to the target.")
            }
            (Direction::Back, false) => (
                "this migration has been cut over already",
                "`walferry switchback` switches back to the old primary; `walferry finish` ends the way back.",
            ),
            _ => return Ok(()),
        };
        Err(Error::new(ErrorKind::Aborted, text).hint(hint))
    }

    fn show_way_back(&self, arming: &Arming) {
        match arming {
            Arming::Preparing(why) => self.board.set_way_back(ShownWayBack::Preparing, why.clone()),
            Arming::Ready => self.board.set_way_back(ShownWayBack::Ready, None),
            Arming::Impossible(why, _) => self.board.set_way_back(ShownWayBack::Impossible, Some(why.clone())),
        }
    }

    /// What the way back is made from.
    async fn way_back(&self) -> Result<WayBack> {
        Ok(WayBack {
            source: self.config.source.clone(),
            target: self.config.target.clone(),
            application_name: self.application_name.clone(),
            migration: self.load(&self.target().await?).await?,
            caps: self.config.care.caps,
            work: Arc::default(),
        })
    }

    fn show_expected_downtime(&self, measured: &Measured) {
        self.board.set_expected_downtime(measured.downtime_ms, measured.marker_ms, measured.at.clone());
    }

    /// Says what stands against a cutover and how long it would take, until a connection breaks.
    async fn watch_readiness(
        &self,
        applied: &watch::Receiver<Applied>,
        arming: Option<watch::Receiver<Arming>>,
        unstreamed: watch::Receiver<Vec<String>>,
    ) -> Error {
        let watch = async {
            let (source, target) = (self.config.source.connect(&self.application_name).await?, self.target().await?);
            if let Some(given_up) = cutover::last_given_up(&target).await? {
                self.board.set_given_up(given_up);
            }
            let scope = self.load(&target).await?.scope;
            let mut changed = BTreeMap::new();
            // Replicated DDL is on the source before it is here: what is there for two looks is looked at.
            let (replicates, mut said) = (ddl::is_replicated(&target).await?, BTreeSet::new());
            let mut obstacles: Vec<String> = Vec::new();
            let mut compared: Option<std::time::Instant> = None;
            let mut tick = tokio::time::interval(READINESS_INTERVAL);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                if let Some(arming) = &arming {
                    self.show_way_back(&arming.borrow());
                }
                if self.board.phase() != ShownPhase::Following {
                    continue;
                }
                self.board.set_verification(verify::last(&target).await?);
                let interval =
                    if replicates && !changed.is_empty() { REPLICATED_DDL_INTERVAL } else { CATALOG_INTERVAL };
                if compared.is_none_or(|at| at.elapsed() >= interval) {
                    compared = Some(std::time::Instant::now());
                    let before = ledger::fingerprint(&target).await?;
                    let began = std::time::Instant::now();
                    let selection = match self.direction {
                        Direction::There => scope.select(&source).await?,
                        Direction::Back => None,
                    };
                    let now = catalog::fingerprint_of(&source, selection.as_ref()).await?;
                    let now = cutover::changes(&before, &now);
                    let looked = began.elapsed();
                    said.retain(|change| now.contains(change));
                    for change in now.iter().filter(|change| !replicates || changed.contains_key(*change)) {
                        if said.insert(change.clone()) {
                            let text = format!("on the source, {change}: the stream does not show it");
                            self.board.event(Level::Warn, text);
                        }
                    }
                    changed = now.into_iter().map(|change| (change, ())).collect();
                    self.look_for_late_chunks(&source, &target).await?;
                    obstacles = self.obstacles(&source, &target).await?;
                    let measured = Measured::take(&source, &target, applied, looked);
                    // Where nothing moves there is nothing to say.
                    if let Ok(measured) = tokio::time::timeout(MARKER_MAX, measured).await {
                        self.show_expected_downtime(&measured?);
                    }
                }
                let mut blockers: Vec<String> =
                    changed.keys().chain(&obstacles).map(|obstacle| format!("{SOURCE_BLOCKER}{obstacle}")).collect();
                blockers.extend(unstreamed.borrow().iter().map(|obstacle| format!("{SOURCE_BLOCKER}{obstacle}")));
                let lag = self.board.snapshot().lag.seconds;
                if let Some(lag) = lag.filter(|lag| *lag > READY_LAG_SECONDS) {
                    blockers.push(format!("the target is {lag:.0} s behind"));
                }
                self.board.set_blockers(blockers);
            }
        };
        let outcome: Result<()> = watch.await;
        outcome.err().unwrap_or_else(|| Error::new(ErrorKind::Other, "nobody looks at readiness any more"))
    }
}

impl Running {
    /// What on the source stands against the usual fence. Prepared transactions come and go, and are looked at by the cutover.
    async fn obstacles(&self, source: &Client, target: &Client) -> Result<Vec<String>> {
        let tables = ledger::tables(target).await?;
        let tables: Vec<&Table> =
            tables.iter().map(|entry| &entry.table).filter(|table| table.chunk.is_none()).collect();
        let is_part = self.load(target).await?.scope.is_part();
        let fence = if is_part { cutover::FenceMode::Tables } else { cutover::FenceMode::default() };
        let findings = cutover::obstacles(source, &tables, fence, &[]).await?;
        let blocking = findings.into_iter().filter(|finding| finding.weight == cutover::Weight::Blocks);
        Ok(blocking.map(|finding| finding.text).collect())
    }
}

/// What became of a cutover.
enum CutOver {
    /// The target is the primary.
    Done,
    /// As if it had not been.
    GivenUp,
    /// Given up, but the source is still closed to writers.
    FenceLeft,
}
