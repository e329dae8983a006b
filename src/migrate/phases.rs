//! The phases between the preparation and the cutover, each of which goes on where the ledger says.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::prepare::Held;
use super::{Direction, Running};
use crate::apply::change::{Adoption, Change};
use crate::apply::layout::Layout;
use crate::apply::reconcile::reconcile;
use crate::apply::{Applied, Apply, assemble::MARKER_PREFIX};
use crate::care::standbys;
use crate::control::{Answer, CutoverRequest};
use crate::copy::{self, Copier};
use crate::cutover::{self, Arming, Closed, Cutover, GivenUp, Measured, SOURCE_BLOCKER, WayBack};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::status::{Level, Phase as ShownPhase, TableState, WayBack as ShownWayBack};
use crate::queue::Queue;
use crate::source::catalog::{self, Table};
use crate::source::slot::ServerIdentity;
use crate::source::snapshot::HeldSnapshot;
use crate::sql;
use crate::target::ledger::{self, LedgerTable, Migration, Phase, Section};
use crate::target::writer::Writer;
use crate::target::{index, schema, warm};
use crate::verify;

/// How often the source's snapshot is used, so that nothing in between takes it for idle.
const SNAPSHOT_PING: Duration = Duration::from_secs(10);
/// How often the source's catalog is compared with what was migrated (I11).
const CATALOG_INTERVAL: Duration = Duration::from_secs(30);
/// How often it is looked at whether a cutover could begin.
const READINESS_INTERVAL: Duration = Duration::from_secs(1);
/// How long markers are waited for that only measure the way.
const MARKER_MAX: Duration = Duration::from_secs(10);
/// With more lag than this, a cutover would keep the applications waiting.
const READY_LAG_SECONDS: f64 = 5.0;

impl Running {
    pub(super) async fn target(&self) -> Result<Client> {
        self.config.target.connect(&self.application_name).await
    }

    pub(super) async fn load(&self, target: &Client) -> Result<Migration> {
        ledger::load(target).await?.ok_or_else(|| {
            Error::new(ErrorKind::Other, "the ledger (schema walferry) is gone from the target")
                .hint("Somebody removed it. Start anew: `walferry clean`, then `walferry migrate`.")
        })
    }

    /// Shows every table with what is known of its copy.
    pub(super) async fn show_tables(&self, target: &Client) -> Result<Vec<LedgerTable>> {
        let tables = ledger::tables(target).await?;
        for entry in &tables {
            let table = &entry.table;
            if self.board.table(table.relid).is_none() {
                let progress =
                    self.board.add_table(table.relid, &table.schema, &table.name, table.bytes.max(0).cast_unsigned());
                if entry.copied {
                    progress.add_recorded(table.bytes.max(0).cast_unsigned(), entry.rows_copied.max(0).cast_unsigned());
                    progress.set_state(TableState::Done);
                }
            }
        }
        Ok(tables)
    }

    pub(super) async fn restore_pre_data(&self, target: &mut Client, tables: &[LedgerTable]) -> Result<()> {
        let tables: Vec<Table> = tables.iter().map(|entry| entry.table.clone()).collect();
        self.board.event(Level::Info, "restoring the schema on the target");
        schema::restore_pre_data(target, &tables).await
    }

    /// Copies every table that is not complete, and builds the indexes of each as soon as it is.
    pub(super) async fn copy_and_index(&self, target: &mut Client, held: &mut Option<Held>) -> Result<()> {
        self.board.set_phase(ShownPhase::Copying);
        let tables = ledger::tables(target).await?;
        let relids: Vec<u32> = tables.iter().map(|entry| entry.table.relid).collect();
        let pending = ledger::pending_items(target, Section::PostData).await?;
        let mut items = schema::items_by_table(pending, &relids);
        self.board.set_indexes(items.values().map(|items| items.len() as u64).sum(), 0);
        // Partitioned tables have no rows to wait for, and their leaves' indexes hang on theirs.
        for (position, item) in items.remove(&0).unwrap_or_default() {
            schema::run_post_data_item(target, position, &item).await?;
            self.board.index_done();
        }
        let (copied, of_index_jobs) = mpsc::unbounded_channel();
        for entry in tables.iter().filter(|entry| entry.copied && items.contains_key(&entry.table.relid)) {
            let _ = copied.send(entry.table.relid);
        }
        let names = tables.iter().map(|entry| (entry.table.relid, entry.table.qualified())).collect();
        let indexing = index::run(
            &self.config.target,
            &self.application_name,
            items,
            names,
            self.config.index,
            of_index_jobs,
            &self.board,
        );
        let max_standby_lag = self.tune.max_standby_lag();
        let (source, name, pace) = (&self.config.source, &self.application_name, self.tune.pace());
        let copying = async {
            tokio::select! {
                outcome = self.copy(target, &tables, held, &copied) => outcome?,
                never = standbys::watch(source, name, &max_standby_lag, pace, &self.board) => match never {},
            }
            // The index jobs end when they have worked off what is in the channel.
            drop(copied);
            self.board.set_phase(ShownPhase::Indexing);
            Ok(())
        };
        tokio::try_join!(copying, indexing)?;
        // By the session that was open all the time: a target that crashed meanwhile has taken back the newest parts, which were
        // committed asynchronously, and has ended it. A new session would know nothing of that.
        // With a schema that is complete, tables were only compared again.
        let complete = self.load(target).await?.post_data_restored;
        ledger::enter_phase(target, if complete { Phase::Following } else { Phase::CatchingUp }).await
    }

    async fn copy(
        &self,
        target: &mut Client,
        tables: &[LedgerTable],
        held: &mut Option<Held>,
        copied: &mpsc::UnboundedSender<u32>,
    ) -> Result<()> {
        let copier = Arc::new(Copier {
            source: self.config.source.clone(),
            target: self.config.target.clone(),
            application_name: self.application_name.clone(),
            tables: tables.iter().map(|entry| (entry.table.relid, entry.table.clone())).collect::<HashMap<_, _>>(),
            board: self.board.clone(),
            paused: self.pause.subscribe(),
            tune: self.tune.clone(),
        });
        loop {
            let unfinished: Vec<LedgerTable> =
                ledger::tables(target).await?.into_iter().filter(|entry| !entry.copied).collect();
            if unfinished.is_empty() {
                return Ok(());
            }
            let (compared, copied_anew): (Vec<&LedgerTable>, Vec<_>) =
                unfinished.iter().partition(|entry| entry.compared);
            let to_compare = copy::plan(compared.iter().map(|entry| &entry.table), u64::MAX);
            let to_copy = copy::plan(copied_anew.iter().map(|entry| &entry.table), self.config.split_above_bytes);
            let held = self.living_snapshot(target, held).await?;
            let snapshot = (!held.is_recorded).then_some(&held.snapshot.data);
            let parts = [to_compare.as_slice(), to_copy.as_slice()].concat();
            ledger::plan_copy(target, snapshot, &parts).await?;
            held.is_recorded = true;
            for entry in &unfinished {
                if let Some(progress) = self.board.table(entry.table.relid) {
                    progress.restart();
                }
            }
            let name = held.snapshot.name.clone();
            // Tables that this snapshot could not serve (H4) are in the next round, under another.
            let both = async {
                copier.compare(&name, &to_compare, copied).await?;
                copier.run(&name, to_copy, copied).await
            };
            tokio::select! {
                stale = both => drop(stale?),
                error = keep_alive(&mut held.snapshot) => return Err(error),
            }
        }
    }

    /// The snapshot at hand if it can serve; otherwise a new one that misses nothing (H1).
    async fn living_snapshot<'a>(&self, target: &Client, held: &'a mut Option<Held>) -> Result<&'a mut Held> {
        let usable = match held {
            Some(held) if !held.was_planned => held.snapshot.ping().await.is_ok(),
            _ => false,
        };
        if !usable {
            *held = None;
            self.board.event(Level::Info, "taking a new snapshot of the source for the tables that are not complete");
            let migration = self.load(target).await?;
            let server =
                ServerIdentity { system: migration.source_system, timeline: migration.source_timeline.cast_unsigned() };
            let floor = migration.snapshot_floor;
            let source = self.config.source.connect(&self.application_name).await?;
            self.waits_for_snapshot.store(true, Ordering::Relaxed);
            let snapshot = tokio::select! {
                taken = HeldSnapshot::take(&self.config.source, &self.application_name, &server, floor) => taken,
                never = self.name_what_is_waited_for(&source, "the snapshot") => match never {},
            };
            self.waits_for_snapshot.store(false, Ordering::Relaxed);
            let snapshot = snapshot?;
            *held = Some(Held { snapshot, is_recorded: false, was_planned: false });
        }
        let held = held.as_mut().ok_or_else(|| Error::new(ErrorKind::Other, "there is no snapshot"))?;
        held.was_planned = true;
        Ok(held)
    }

    pub(super) async fn layout(&self, target: &Client, migration: &Migration) -> Result<Arc<Layout>> {
        let (tables, snapshots) = tokio::try_join!(ledger::tables(target), ledger::snapshots(target))?;
        Ok(Arc::new(Layout::new(tables, &snapshots, migration.binary, migration.apply_workers)?))
    }

    /// Applies until every table is past what its copy saw (H24).
    pub(super) async fn catch_up(&self, queue: &Queue, layout: &Arc<Layout>) -> Result<()> {
        self.board.set_phase(ShownPhase::CatchingUp);
        let (applied, _) = watch::channel(Applied::default());
        // An idle source may have nothing behind the last snapshot; this is.
        let source = self.config.source.connect(&self.application_name).await?;
        source
            .query("SELECT pg_catalog.pg_logical_emit_message(true, $1, 'catch up')", &[&MARKER_PREFIX])
            .await
            .context(|| "sending a marker into the stream".into())?;
        self.apply(queue, layout, Some(layout.snapshots_end()), &applied).await
    }

    /// Applies with sessions of its own, renewed now and then (H25), until `until` is reached.
    async fn apply(
        &self,
        queue: &Queue,
        layout: &Arc<Layout>,
        until: Option<Lsn>,
        applied: &watch::Sender<Applied>,
    ) -> Result<()> {
        let mut layout = Arc::clone(layout);
        let mut adoptions = Vec::new();
        loop {
            let target = self.target().await?;
            let progress = ledger::apply_progress(&target).await?;
            let least = progress.iter().copied().min().unwrap_or(Lsn::ZERO);
            if until.is_some_and(|until| least >= until) {
                return ledger::make_durable(&target).await;
            }
            self.board.resume_stream(queue.durable_end(), least);
            let open = (0..progress.len()).map(|_| Writer::open(&self.config.target, &self.application_name));
            let writers = futures_util::future::try_join_all(open).await?;
            let mut apply = Apply {
                layout,
                adoptions,
                change: None,
                queue: queue.clone(),
                writers,
                progress,
                on_conflict: self.config.on_conflict,
                board: self.board.clone(),
                paused: self.pause.subscribe(),
                gate: self.gate.clone(),
                applied: applied.clone(),
            };
            let outcome = apply.run(until).await;
            layout = apply.layout;
            adoptions = apply.adoptions;
            match (outcome, apply.change) {
                (Err(_), Some(change)) => adoptions.push(self.adopt(&layout, change, &adoptions).await?),
                (outcome, _) => {
                    outcome?;
                    adoptions.clear();
                }
            }
        }
    }

    /// A table has changed on the source: goes on if the target fits, and otherwise says what mends it (I11).
    async fn adopt(&self, layout: &Layout, change: Change, known: &[Adoption]) -> Result<Adoption> {
        if known.iter().any(|adoption| adoption.change == change) {
            return Err(Error::new(ErrorKind::Other, "a change of a table was adopted, and met again"));
        }
        let (source, target) = (self.config.source.connect(&self.application_name).await?, self.target().await?);
        let adoption = reconcile(&source, &target, layout, &change).await?;
        self.board.event(
            Level::Info,
            format!(
                "{} has changed on the source in transaction {} that commits at {}; the target has it likewise, and the apply goes on",
                adoption.table.qualified(),
                change.head.xid,
                change.head.commit_lsn
            ),
        );
        if layout.tables[layout.place(adoption.table.relid)?].table.has_usable_identity()
            && !adoption.table.has_usable_identity()
        {
            self.board.event(
                Level::Warn,
                format!(
                    "{} has no replica identity on the source any more: the source refuses its updates and deletes",
                    adoption.table.qualified()
                ),
            );
        }
        Ok(adoption)
    }

    /// What is left of the schema: attached indexes, foreign keys, triggers, rules; then materialized views. In `pg_dump`'s order.
    pub(super) async fn finish_schema(&self, target: &Client) -> Result<()> {
        let items = ledger::pending_items(target, Section::PostData).await?;
        self.board.event(
            Level::Info,
            format!("restoring foreign keys, triggers and the rest of the schema ({} items)", items.len()),
        );
        for (position, item) in &items {
            schema::run_post_data_item(target, *position, item).await?;
        }
        self.refresh_materialized_views(target).await?;
        target
            .batch_execute(
                "BEGIN; SET LOCAL synchronous_commit = on; UPDATE walferry.migration SET post_data_restored = true, phase = 'following'; COMMIT",
            )
            .await
            .context(|| "writing into the ledger that the schema is complete".into())
    }

    /// Those that have rows on the source, the older first. One that reads from another that is not refreshed yet is refused
    /// by the server, and comes after it.
    async fn refresh_materialized_views(&self, target: &Client) -> Result<()> {
        let source = self.config.source.connect(&self.application_name).await?;
        let views = source
            .query_typed(
                "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid",
                &[],
            )
            .await
            .context(|| "listing the source's materialized views".into())?;
        let mut waiting: Vec<String> = views.iter().map(|view| sql::qualified(view.get(0), view.get(1))).collect();
        while !waiting.is_empty() {
            let mut too_early = Vec::new();
            let mut refused = None;
            for name in &waiting {
                match target.batch_execute(&format!("REFRESH MATERIALIZED VIEW {name}")).await {
                    Err(error) if error.code() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) => {
                        too_early.push(name.clone());
                        refused = Some((error, name.clone()));
                    }
                    outcome => outcome.context(|| format!("refreshing the materialized view {name}"))?,
                }
            }
            if let Some((error, name)) = refused.filter(|_| too_early.len() == waiting.len()) {
                return Err(error).context(|| format!("refreshing the materialized view {name}"));
            }
            waiting = too_early;
        }
        Ok(())
    }

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
        let keep_warm = |warming: &mut JoinSet<Infallible>| {
            let board = self.board.clone();
            let is_close = move || board.snapshot().lag.seconds.is_some_and(|lag| lag <= READY_LAG_SECONDS);
            warming.spawn(warm::keep_warm(self.config.target.clone(), self.application_name.clone(), is_close));
        };
        keep_warm(&mut warming);
        let (tell, arming) = watch::channel(Arming::Preparing(None));
        // A task of its own: a cutover waits for it.
        let mut beside = JoinSet::new();
        let way_back = if self.direction == Direction::There && self.config.reverse {
            let way_back = self.way_back().await?;
            beside.spawn(way_back.clone().keep_ready(tell));
            Some((way_back, arming))
        } else {
            None
        };
        let arming = way_back.as_ref().map(|(_, arming)| arming.clone());
        let mut watching_readiness = Box::pin(self.watch_readiness(&watching, arming));
        loop {
            let request = tokio::select! {
                outcome = &mut applying => return outcome,
                error = &mut watching_readiness => return Err(error),
                request = requested.recv() => request,
            };
            let request = request.ok_or_else(|| Error::new(ErrorKind::Other, "the control socket is gone"))?;
            warming.abort_all();
            // A cutover is never just dropped: it gives up by itself when the apply ends, and then lifts its fence.
            // On the heap: it is large, and the stack of an unoptimized build is not.
            let mut cutover = Box::pin(self.answer(&watching, &way_back, request));
            let (went_through, ended) = tokio::select! {
                went_through = &mut cutover => (went_through, None),
                outcome = &mut applying => (cutover.await, Some(outcome)),
            };
            match (went_through, ended) {
                (CutOver::Done, _) => return Ok(()),
                (CutOver::GivenUp, None) => keep_warm(&mut warming),
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
        applied: &watch::Receiver<Applied>,
        way_back: &Option<(WayBack, watch::Receiver<Arming>)>,
        request: CutoverRequest,
    ) -> CutOver {
        let known = async {
            self.is_the_right_way(&request)?;
            warm::stop(&self.target().await?, &self.application_name).await?;
            // As they are now: they can have changed since the migration began.
            let tables = ledger::tables(&self.target().await?).await?;
            let target_closed = match self.direction {
                Direction::There => None,
                // The ledger of the way there stands on the server that took over.
                Direction::Back => Closed::load(&self.config.source.connect(&self.application_name).await?).await?,
            };
            Ok((tables, target_closed))
        };
        let (tables, target_closed): (Vec<(Table, bool)>, _) = match known.await {
            Ok((tables, closed)) => {
                (tables.into_iter().map(|entry| (entry.table, entry.insert_only)).collect(), closed)
            }
            Err(error) => {
                let error: Error = error;
                let _ = request.answers.send(Answer::from(&error.with_kind(ErrorKind::Aborted)));
                return CutOver::GivenUp;
            }
        };
        let blockers = self.board.snapshot().blockers;
        let cutover = Cutover {
            source: &self.config.source,
            target: &self.config.target,
            application_name: &self.application_name,
            tables: &tables,
            applied: applied.clone(),
            // What stands against it on the source it looks at itself, and knows what is waived.
            blockers: blockers.into_iter().filter(|blocker| !blocker.starts_with(SOURCE_BLOCKER)).collect(),
            way_back: way_back.clone(),
            target_closed,
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
    ) -> Error {
        let watch = async {
            let (source, target) = (self.config.source.connect(&self.application_name).await?, self.target().await?);
            if let Some(given_up) = cutover::last_given_up(&target).await? {
                self.board.set_given_up(given_up);
            }
            let mut changed = BTreeMap::new();
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
                if compared.is_none_or(|at| at.elapsed() >= CATALOG_INTERVAL) {
                    compared = Some(std::time::Instant::now());
                    let before = ledger::fingerprint(&target).await?;
                    let began = std::time::Instant::now();
                    let now = cutover::changes(&before, &catalog::fingerprint(&source).await?);
                    let looked = began.elapsed();
                    let fresh = now.iter().filter(|change| !changed.contains_key(*change));
                    for change in fresh {
                        self.board.event(Level::Warn, format!("on the source, {change}: the stream does not show it"));
                    }
                    changed = now.into_iter().map(|change| (change, ())).collect();
                    obstacles = self.obstacles(&source, &target).await?;
                    let measured = Measured::take(&source, &target, applied, looked);
                    // Where nothing moves there is nothing to say.
                    if let Ok(measured) = tokio::time::timeout(MARKER_MAX, measured).await {
                        self.show_expected_downtime(&measured?);
                    }
                }
                let mut blockers: Vec<String> =
                    changed.keys().chain(&obstacles).map(|obstacle| format!("{SOURCE_BLOCKER}{obstacle}")).collect();
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
        let tables: Vec<&Table> = tables.iter().map(|entry| &entry.table).collect();
        let findings = cutover::obstacles(source, &tables, cutover::FenceMode::default(), &[]).await?;
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

/// Uses the snapshot now and then; answers when it is gone.
async fn keep_alive(snapshot: &mut HeldSnapshot) -> Error {
    loop {
        tokio::time::sleep(SNAPSHOT_PING).await;
        if let Err(error) = snapshot.ping().await {
            return error.with_kind(ErrorKind::Transient);
        }
    }
}
