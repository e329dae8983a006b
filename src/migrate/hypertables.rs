//! Where the phases meet TimescaleDB: what is set before the slot, and chunks that come and go while it follows.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::prepare::identities;
use super::{Direction, Running};
use crate::apply::change::Change;
use crate::connection::ConnectionSpec;
use crate::control::CutoverRequest;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::status::Level;
use crate::queue::Queue;
use crate::source::catalog;
use crate::source::catalog::Table;
use crate::target::ledger::{LedgerTable, Migration, SchemaItem};
use crate::timescale::recreate::recompute;
use crate::timescale::unseen::{self, Counted};
use crate::timescale::{self, ChunkOf, live, pause, prepare, recreate};

impl Running {
    /// Sets what the stream of hypertables needs, and has the whole row identify those of continuous aggregates, before the slot (H2).
    pub(super) async fn prepare_hypertables(&self, source: &Client, target: &mut Client) -> Result<()> {
        if self.direction == Direction::Back {
            return Ok(());
        }
        let set = prepare::set_up(source, target).await?;
        if set.is_empty() {
            return Ok(());
        }
        let jobs_rest = self.config.pause_source_jobs;
        if recreate::decide(source, target, self.config.caggs, jobs_rest).await? {
            let text = "TimescaleDB is made again on the target; `walferry check` says why";
            self.board.event(Level::Info, text);
        }
        self.board.event(Level::Info, format!("on the source, until `walferry clean`: {}", set.join(", ")));
        let mut aggregates = prepare::of_aggregates(source, &catalog::tables(source).await?).await?;
        recompute::without(&mut aggregates, &recompute::recorded(target).await?);
        self.set_replica_identities(source, target, &aggregates).await
    }

    /// Pauses the source's jobs where that is asked for, and starts what an earlier run of this migration has paused where it is not.
    pub(super) async fn let_source_jobs_rest_or_run(&self, target: &mut Client) -> Result<()> {
        if self.direction == Direction::Back {
            return Ok(());
        }
        let directory = self.directory.directory().path();
        if self.config.pause_source_jobs {
            let source = self.config.source.connect(&self.application_name).await?;
            let paused = pause::pause(&source, target, directory).await?;
            if !paused.paused.is_empty() {
                let text =
                    format!("jobs of the source are paused, until `walferry clean`: {}", paused.paused.join(", "));
                self.board.event(Level::Info, text);
            }
            if !paused.not_ours.is_empty() {
                let text = format!("jobs of other roles run on: {}", paused.not_ours.join(", "));
                self.board.event(Level::Warn, text);
            }
            return Ok(());
        }
        let mut started = Vec::new();
        if !pause::noted(target).await?.is_empty() {
            let source = self.config.source.connect(&self.application_name).await?;
            started = pause::resume(&source, target).await?;
        }
        started.extend(pause::resume_noted_in(directory, &self.config.source, false).await?);
        if !started.is_empty() {
            let text = format!("jobs of the source that were paused run again: {}", started.join(", "));
            self.board.event(Level::Info, text);
        }
        Ok(())
    }

    /// Makes the extension on the target, where the source has it, and puts the session into restoring mode: to it, hypertables are
    /// ordinary tables from now on.
    pub(super) async fn make_timescaledb(&self, target: &Client) -> Result<()> {
        let source = self.config.source.connect(&self.application_name).await?;
        let Some(extension) = timescale::source::extension(&source).await? else { return Ok(()) };
        let recreated = recreate::is_recreated(target).await?;
        prepare::create_extension(&self.config.target, &self.application_name, &extension, !recreated).await?;
        if recreated { Ok(()) } else { self.restoring(target, true).await }
    }

    /// Puts a session of the target into restoring mode, or out of it, where the target has the extension.
    pub(super) async fn restoring(&self, target: &Client, on: bool) -> Result<()> {
        if timescale::source::extension(target).await?.is_some() {
            target
                .batch_execute(if on { "SET timescaledb.restoring = on" } else { timescale::exchange::AT_WORK })
                .await?;
        }
        Ok(())
    }

    /// Where rows are copied to and indexes built: in sessions to which hypertables are ordinary tables.
    pub(super) async fn target_of_copies(&self, target: &Client) -> Result<ConnectionSpec> {
        let is_there = prepare::is_of_timescaledb(target).await? && !recreate::is_recreated(target).await?;
        Ok(if is_there { prepare::restoring(&self.config.target) } else { self.config.target.clone() })
    }

    /// At the end of the schema: continuous aggregates are computed that are not copied.
    pub(super) async fn compute_aggregates(&self, target: &Client) -> Result<()> {
        if self.direction == Direction::Back || recompute::recorded(target).await?.is_empty() {
            return Ok(());
        }
        self.board.event(Level::Info, "computing continuous aggregates on the target (--caggs recompute)");
        let source = self.config.source.connect(&self.application_name).await?;
        let refreshed = recompute::refresh(&source, target).await?;
        self.board.event(Level::Info, format!("computed on the target: {}", refreshed.join(", ")));
        Ok(())
    }

    /// At the end of the schema: jobs are made, asleep, where they do not come with the extension's catalog.
    pub(super) async fn make_jobs(&self, target: &mut Client) -> Result<()> {
        if self.direction == Direction::Back || !recreate::is_recreated(target).await? {
            return Ok(());
        }
        let source = self.config.source.connect(&self.application_name).await?;
        let transaction = target.transaction().await?;
        recreate::jobs::bring_in_line(&source, transaction.client(), &self.config.owners).await?;
        transaction.commit().await.context(|| "making the jobs of TimescaleDB on the target".into())
    }

    /// The apply has come to a table that nobody knows: a new chunk, or one that is gone again already.
    ///
    /// # Errors
    /// `Transient` when a chunk was published too late: the phases begin again, and copy it.
    pub(super) async fn take_up_chunks(&self, change: &Change) -> Result<()> {
        let (source, mut target) = (self.config.source.connect(&self.application_name).await?, self.target().await?);
        let migration = self.load(&target).await?;
        live::until_visible(&source, change.head.xid).await?;
        let found = live::take_up(&source, &mut target, &migration, Some(&change.announced)).await?;
        self.say_what_was_taken_up(&found)
    }

    /// Compares the source's chunks with the ledger, before anything is applied. Answers whether some have to be copied.
    pub(super) async fn take_up_all_chunks(&self, target: &mut Client) -> Result<bool> {
        if self.direction == Direction::Back || !prepare::is_of_timescaledb(target).await? {
            return Ok(false);
        }
        let source = self.config.source.connect(&self.application_name).await?;
        let migration = self.load(target).await?;
        let found = live::take_up(&source, target, &migration, None).await?;
        match self.say_what_was_taken_up(&found) {
            Err(error) if error.is_transient() => {
                self.board.event(Level::Info, error.to_string());
                Ok(true)
            }
            said => said.map(|()| false),
        }
    }

    /// Counts the rows of hypertables on both sides while applications go on, and has nothing of them change unseen from then on. What
    /// could not be counted is counted behind the fence.
    ///
    /// # Errors
    /// `Different` where there are not as many; `Aborted` when the cutover's time is up.
    pub(super) async fn count_hypertables(
        &self,
        migration: &Migration,
        queue: &Queue,
        request: &CutoverRequest,
    ) -> Result<Counted> {
        if self.direction == Direction::Back || !self.has_hypertables().await? {
            return Ok(Counted::default());
        }
        let points = self.point_taker(migration, queue);
        let limit = Duration::from_secs_f64(request.options.timeout_seconds);
        let counting = unseen::count(&points, &self.application_name);
        match tokio::time::timeout(limit, Box::pin(counting)).await {
            Ok(Ok(counted)) => {
                let text = "hypertables have as many rows on both sides, counted before the fence";
                self.board.event(Level::Info, format!("{} {text}", counted.len()));
                Ok(counted)
            }
            Ok(Err(error)) if error.kind() == ErrorKind::Different => Err(error),
            Ok(Err(error)) => {
                self.board.event(Level::Warn, format!("the rows of hypertables are counted behind the fence: {error}"));
                Ok(Counted::default())
            }
            Err(_) => {
                let text = format!(
                    "the rows of hypertables were not counted within the {:.0} s of --timeout",
                    limit.as_secs_f64()
                );
                Err(Error::new(ErrorKind::Aborted, text)
                    .hint(
                        "Nothing was touched. Transactions that have been writing to hypertables for long are waited for: end them, or give more \
                         with --timeout; applications do not wait for it.",
                    ))
            }
        }
    }

    /// Whether the source's hypertables are moved.
    pub(super) async fn has_hypertables(&self) -> Result<bool> {
        prepare::is_of_timescaledb(&self.target().await?).await
    }

    /// The guard: looks for chunks that are in no publication.
    ///
    /// # Errors
    /// `Transient` when there are any: the phases begin again, and copy them.
    pub(super) async fn look_for_late_chunks(&self, source: &Client, target: &Client) -> Result<()> {
        if self.direction == Direction::Back || !prepare::is_of_timescaledb(target).await? {
            return Ok(());
        }
        match live::are_all_published(source, target, &self.load(target).await?).await? {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Transient, "a session has made a chunk and not published it")),
        }
    }

    fn say_what_was_taken_up(&self, found: &live::TakenUp) -> Result<()> {
        let few = |names: &[String]| match names {
            [] => String::new(),
            [one] => one.clone(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        };
        if !found.new.is_empty() {
            self.board.event(Level::Info, format!("new chunks on the source: {}", few(&found.new)));
        }
        if !found.gone.is_empty() {
            let text = format!("chunks that the source has dropped are dropped on the target: {}", few(&found.gone));
            self.board.event(Level::Info, text);
        }
        if found.late.is_empty() {
            return Ok(());
        }
        let text = format!(
            "chunks that their session did not publish are copied under a snapshot of their own: {}",
            few(&found.late)
        );
        Err(Error::new(ErrorKind::Transient, text))
    }
}

/// Whether the target has a table by this name: not a chunk whose rows go to its hypertable, nor, where aggregates are made again, the
/// inner table of one.
pub(super) fn is_on_target(table: &Table, is_recreated: bool) -> bool {
    match &table.chunk {
        Some(chunk) => !chunk.is_late,
        None => !is_recreated || !table.schema.starts_with("_timescaledb_"),
    }
}

/// Whether publishing these tables failed because one of them is gone: chunks go by retention, and the rest is looked at again then.
///
/// # Errors
/// What it failed by otherwise.
pub(super) fn is_only_gone(tables: &[Table], outcome: Result<()>) -> Result<bool> {
    match outcome {
        Err(error)
            if error.sqlstate() == Some(&SqlState::UNDEFINED_TABLE)
                && tables.iter().any(|table| table.chunk.is_some()) =>
        {
            Ok(true)
        }
        outcome => outcome.map(|()| false),
    }
}

/// Which tables are in the migration's publications, in the transaction under whose snapshot that is to be; nothing without chunks.
pub(super) async fn published(source: &Client, migration: &Migration, tables: &[Table]) -> Result<BTreeSet<u32>> {
    match tables.iter().any(|table| table.chunk.is_some()) {
        true => Ok(live::published(source, migration).await?.into_keys().collect()),
        false => Ok(BTreeSet::new()),
    }
}

/// Whether what was published before the slot is what its snapshot shows. Chunks come and go in between: one that is gone is missed by
/// nobody, and one that came is published too where its session did that, since its first moment and so since before the slot (H2).
pub(super) fn are_published(before: &[Table], now: &[Table], in_publication: &BTreeSet<u32>) -> bool {
    let chunks: BTreeSet<u32> = before.iter().chain(now).filter(|of| of.chunk.is_some()).map(|of| of.relid).collect();
    let (before, now) = (identities(before), identities(now));
    let stays = |relid: &u32| now.contains_key(relid) || chunks.contains(relid);
    let fits = |(relid, shape)| match before.get(relid) {
        Some(was) => was == shape,
        None => chunks.contains(relid) && in_publication.contains(relid),
    };
    before.keys().all(stays) && now.iter().all(fits)
}

/// Whether one of these chunks has gone, or the relation of its compressed rows by another compression: `pg_dump` under an older
/// snapshot cannot lock it.
pub(super) async fn is_gone_since(source: &Client, tables: &[Table]) -> Result<bool> {
    let chunks = tables.iter().filter_map(|table| Some((table.relid, table.chunk.as_ref()?)));
    let relations =
        |(relid, chunk): (u32, &ChunkOf)| std::iter::once(relid).chain(chunk.compressed.as_ref().map(|of| of.relid));
    let chunks: Vec<u32> = chunks.flat_map(relations).collect();
    let gone = "SELECT count(*) < cardinality($1) FROM pg_catalog.pg_class WHERE oid = ANY ($1)";
    Ok(!chunks.is_empty() && source.query_typed_one(gone, &[(&chunks, Type::OID_ARRAY)]).await?.get::<_, bool>(0))
}

/// The relation of compressed rows belongs to its chunk: so do the indexes of it.
pub(super) fn chunk_of_compressed(tables: &[LedgerTable]) -> Vec<(u32, u32)> {
    let pair = |table: &Table| Some((table.chunk.as_ref()?.compressed.as_ref()?.relid, table.relid));
    tables.iter().filter_map(|entry| pair(&entry.table)).collect()
}

/// The tables that are compared again where these are chosen: the rows of a hypertable are in its chunks.
pub(super) fn with_chunks<'a>(tables: &'a [Table], chosen: &[&'a Table]) -> Vec<&'a Table> {
    let roots: BTreeSet<u32> = chosen.iter().filter(|table| table.is_hypertable).map(|table| table.relid).collect();
    let is_chosen = |table: &Table| chosen.iter().any(|other| other.relid == table.relid);
    let is_of_root = |table: &Table| table.chunk.as_ref().is_some_and(|of| !of.is_gone && roots.contains(&of.relid));
    let more = tables.iter().filter(|table| is_of_root(table) && !is_chosen(table));
    chosen.iter().copied().chain(more).filter(|table| !live::is_gone(table)).collect()
}

/// The OIDs of chunks.
pub(super) fn chunks(tables: &[LedgerTable]) -> BTreeSet<u32> {
    tables.iter().filter(|entry| entry.table.chunk.is_some()).map(|entry| entry.table.relid).collect()
}

/// What the extension makes on every chunk when it is made on the hypertable: chunks that came on the target meanwhile have it then too.
pub(super) fn comes_with_hypertable(item: &SchemaItem) -> bool {
    matches!(item.kind.as_str(), "TRIGGER" | "FK CONSTRAINT")
}
