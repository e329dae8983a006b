//! The phases until it follows, each of which goes on where the ledger says; `follow.rs` has the rest.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, watch};
use tokio_postgres::Client;

use super::prepare::Held;
use super::{Running, hypertables};
use crate::apply::change::{Adoption, Change};
use crate::apply::ddl::Ddl;
use crate::apply::layout::Layout;
use crate::apply::reconcile::reconcile;
use crate::apply::{Applied, Apply};
use crate::care::standbys;
use crate::copy::{self, Copier};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::status::{Level, Phase as ShownPhase, TableState};
use crate::queue::Queue;
use crate::source::catalog::Table;
use crate::source::ddl::Key;
use crate::source::marker;
use crate::source::scope::Scope;
use crate::source::slot::ServerIdentity;
use crate::source::snapshot::HeldSnapshot;
use crate::source::version::Version;
use crate::target::ledger::{self, LedgerTable, Migration, Phase, Section};
use crate::target::role::ApplyRole;
use crate::target::writer::Writer;
use crate::target::{ddl, index, late, roles, schema, warm};
use crate::timescale::compress::Compressor;
use crate::timescale::copying;
use crate::unstreamed::materialized_view;
use crate::{timescale, unstreamed};

/// How often the source's snapshot is used, so that nothing in between takes it for idle.
const SNAPSHOT_PING: Duration = Duration::from_secs(10);
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
        if self.config.owners.create_roles {
            let source = self.config.source.connect(&self.application_name).await?;
            for said in roles::create_missing(&source, target, &self.config.owners, true).await? {
                self.board.event(Level::Info, said);
            }
        }
        self.board.event(Level::Info, "restoring the schema on the target");
        for left_out in schema::restore_pre_data(target, &tables).await? {
            self.board.event(Level::Warn, left_out);
        }
        Ok(())
    }

    /// Copies every table that is not complete, and builds the indexes of each as soon as it is.
    pub(super) async fn copy_and_index(&self, target: &mut Client, held: &mut Option<Held>) -> Result<()> {
        self.board.set_phase(ShownPhase::Copying);
        let tables = ledger::tables(target).await?;
        let of_compressed = hypertables::chunk_of_compressed(&tables);
        let relids: Vec<u32> =
            tables.iter().map(|entry| entry.table.relid).chain(of_compressed.iter().map(|pair| pair.0)).collect();
        let pending = ledger::pending_items(target, Section::PostData).await?;
        let mut items = schema::items_by_table(pending, &relids);
        for (compressed, chunk) in of_compressed {
            let of_chunk = items.remove(&compressed).unwrap_or_default();
            items.entry(chunk).or_default().extend(of_chunk);
        }
        self.board.set_indexes(items.values().map(|items| items.len() as u64).sum(), 0);
        // Partitioned tables have no rows to wait for, and their leaves' indexes hang on theirs. Those of hypertables cannot come behind
        // the compression of their chunks.
        let hypertables = tables.iter().filter(|entry| entry.table.hypertable.is_some());
        let first: Vec<u32> = std::iter::once(0).chain(hypertables.map(|entry| entry.table.relid)).collect();
        for (position, item) in first.iter().flat_map(|relid| items.remove(relid).unwrap_or_default()) {
            schema::run_post_data_item(target, position, &item).await?;
            self.board.index_done();
        }
        let (copied, of_index_jobs) = mpsc::unbounded_channel();
        for entry in tables.iter().filter(|entry| entry.copied && items.contains_key(&entry.table.relid)) {
            let _ = copied.send(entry.table.relid);
        }
        let is_recreated = timescale::recreate::is_recreated(target).await?;
        let names = tables
            .iter()
            .filter(|entry| hypertables::is_on_target(&entry.table, is_recreated))
            .map(|entry| (entry.table.relid, entry.table.qualified()))
            .collect();
        let into = self.target_of_copies(target).await?;
        let indexing =
            index::run(&into, &self.application_name, items, names, self.config.index, of_index_jobs, &self.board);
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
        let session = self.target().await?;
        let as_on_source = timescale::recreate::is_recreated(&session).await?;
        let compressor = self.compressor(self.load(&session).await?.scope, as_on_source, Arc::default());
        drop(session);
        let has_hypertables = as_on_source || !compressor.declared.is_empty();
        tokio::select! {
            // Boxed: the states of the copy are more than a thread's stack should hold.
            outcome = Box::pin(async { tokio::try_join!(copying, indexing) }) => outcome.map(drop)?,
            never = Box::pin(compressor.run()) => match never {},
        }
        if has_hypertables {
            // Its statement is not to stand in the way of the apply.
            warm::stop(target, &self.application_name).await?;
        }
        let source = self.config.source.connect(&self.application_name).await?;
        unstreamed::copy(&source, target, &self.config.owners, &self.load(target).await?.scope).await?;
        // By the session that was open all the time: a target that crashed meanwhile has taken back the newest parts, which were
        // committed asynchronously, and has ended it. A new session would know nothing of that.
        // With a schema that is complete, tables were only compared again.
        let complete = self.load(target).await?.post_data_restored;
        ledger::enter_phase(target, if complete { Phase::Following } else { Phase::CatchingUp }).await
    }

    /// Who keeps chunks of the target compressed.
    pub(super) fn compressor(&self, scope: Scope, as_on_source: bool, turn: Arc<Mutex<()>>) -> Compressor {
        Compressor {
            source: self.config.source.clone(),
            target: self.config.target.clone(),
            application_name: self.application_name.clone(),
            declared: scope.hypertables,
            as_on_source,
            turn,
        }
    }

    async fn copy(
        &self,
        target: &mut Client,
        tables: &[LedgerTable],
        held: &mut Option<Held>,
        copied: &mpsc::UnboundedSender<u32>,
    ) -> Result<()> {
        let version = Version::of(&self.config.source.connect(&self.application_name).await?).await?;
        // Where every range would be a scan of the whole table, tables are copied whole (H11).
        let split_above_bytes = if version.scans_page_ranges() { self.config.split_above_bytes } else { u64::MAX };
        let copier = Arc::new(Copier {
            source: self.config.copy_source().clone(),
            target: self.target_of_copies(target).await?,
            application_name: self.application_name.clone(),
            tables: tables.iter().map(|entry| (entry.table.relid, entry.table.clone())).collect::<HashMap<_, _>>(),
            role: self.load(target).await?.apply_role,
            board: self.board.clone(),
            paused: self.pause.subscribe(),
            tune: self.tune.clone(),
            freezes: !self.load(target).await?.scope.data_only,
            sorted: {
                let source = self.config.source.connect(&self.application_name).await?;
                copying::to_be_sorted(&source, &tables.iter().map(|entry| &entry.table).collect::<Vec<_>>()).await?
            },
            declared: self.load(target).await?.scope.hypertables,
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
            let to_copy = copy::plan(copied_anew.iter().map(|entry| &entry.table), split_above_bytes);
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
            Some(held) if !held.was_planned && held.snapshot.is_of_standby() == self.config.standbys.copy.is_some() => {
                held.snapshot.ping().await.is_ok()
            }
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
                taken = self.take_snapshot(&server, floor) => taken,
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
        let mut layout = Layout::new(tables, &snapshots, migration.binary, migration.apply_workers)?;
        layout.has_hypertables = timescale::prepare::is_of_timescaledb(target).await?;
        if ddl::is_replicated(target).await? {
            let prefix = crate::source::ddl::prefix(&migration.id);
            let read = async {
                let source = self.config.source.connect(&self.application_name).await?;
                Key::read(&source, &migration.id).await
            };
            let key = self.ddl_key.get_or_try_init(|| read).await?.clone();
            layout.ddl = Some(Ddl { prefix, key, owners: self.config.owners.clone() });
        }
        Ok(Arc::new(layout))
    }

    /// Applies until every table is past what its copy saw (H24), and past what was committed before now.
    pub(super) async fn catch_up(&self, queue: &Queue, layout: &Arc<Layout>) -> Result<()> {
        self.board.set_phase(ShownPhase::CatchingUp);
        let (applied, _) = watch::channel(Applied::default());
        // An idle source may have nothing behind the last snapshot; this is.
        let source = self.config.source.connect(&self.application_name).await?;
        let marker = marker::send(&source, "catch up").await?;
        // What the rest of the schema was refused for, after an earlier catch-up, may have been mended on the source since.
        let until = layout.snapshots_end().max(marker.lsn);
        self.apply(queue, layout, Some(until), &applied).await
    }

    /// Applies with sessions of its own, renewed now and then (H25), until `until` is reached.
    pub(super) async fn apply(
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
            let role = self.load(&target).await?.apply_role;
            let open = (0..progress.len()).map(|_| Writer::open(&self.config.target, &self.application_name, role));
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
                (Err(_), Some(change)) if layout.find(change.announced.relid).is_none() => {
                    self.take_up_chunks(&change).await?;
                    let target = self.target().await?;
                    layout = self.layout(&target, &self.load(&target).await?).await?;
                }
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
    ///
    /// What waits for the cutover is tried here, where nothing is applied (H23).
    pub(super) async fn finish_schema(&self, target: &mut Client) -> Result<()> {
        let items = ledger::pending_items(target, Section::PostData).await?;
        self.board.event(
            Level::Info,
            format!("restoring foreign keys, triggers and the rest of the schema ({} items)", items.len()),
        );
        // Event triggers are among the last of them.
        unstreamed::silence_event_triggers(target).await;
        let entries = ledger::tables(target).await?;
        let chunks = hypertables::chunks(&entries);
        let tables: Vec<Table> = entries.into_iter().map(|entry| entry.table).collect();
        for (position, item) in &items {
            if item.relid.is_some_and(|relid| chunks.contains(&relid)) && hypertables::comes_with_hypertable(item) {
                target.batch_execute(&ledger::mark_done(*position)).await?;
                continue;
            }
            if schema::would_fire(item) {
                schema::run_quieted_item(target, *position, item, &tables).await?;
                continue;
            }
            if let Some(left_out) = schema::run_post_data_item(target, *position, item).await? {
                self.board.event(Level::Warn, left_out);
            }
        }
        self.refresh_materialized_views(target).await?;
        self.compute_aggregates(target).await?;
        self.make_jobs(target).await?;
        // Waking a policy is nothing that rows could stand against.
        let policies =
            self.load(target).await?.scope.hypertables.iter().filter(|declared| declared.has_policies()).count();
        let late = late::prove(target).await?.saturating_sub(policies);
        if late > 0 {
            let text = format!(
                "{late} foreign keys, triggers and rules were tried on the target and taken back: they are made at the cutover, \
                 because our role may not set session_replication_role there"
            );
            self.board.event(Level::Info, text);
        }
        // Before anything is applied with them in place.
        let migration = self.load(target).await?;
        let relaxed = match migration.apply_role {
            // What the target had before is as it was, and `check` has found nothing there that fires.
            ApplyRole::Replica if migration.scope.data_only => Vec::new(),
            ApplyRole::Replica => schema::relax_firing(&tables),
            // They are not there.
            ApplyRole::Origin => Vec::new(),
        };
        let relaxed: String = relaxed.iter().map(|statement| format!("{statement}; ")).collect();
        target
            .batch_execute(&format!(
                "BEGIN; SET LOCAL synchronous_commit = on; {relaxed} \
                 UPDATE walferry.migration SET post_data_restored = true, phase = 'following'; COMMIT",
            ))
            .await
            .context(|| "writing into the ledger that the schema is complete".into())
    }

    /// Those that have rows on the source. One that cannot be refreshed stands against a cutover, and is tried again while following.
    async fn refresh_materialized_views(&self, target: &Client) -> Result<()> {
        let source = self.config.source.connect(&self.application_name).await?;
        let selection = self.load(target).await?.scope.select(&source).await?;
        let mut views = materialized_view::list(&source, selection.as_ref()).await?;
        views.retain(|view| view.is_populated);
        // With --data-only, the target has those that it has.
        let views = materialized_view::present(target, views).await?;
        let refused = materialized_view::refresh(target, &views).await?;
        materialized_view::forget(target, refused.iter().map(|refused| &refused.view)).await?;
        for refused in refused {
            self.board.event(Level::Warn, refused.into_error().to_string());
        }
        Ok(())
    }
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
