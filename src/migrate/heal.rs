//! A migration that cannot just go on: the stream or the target has lost something, and tables are compared with the source again.
//!
//! | | what is lost | what is done before it goes on |
//! |---|---|---|
//! | `migrate --recopy TABLE…` | rows of some tables on the target, or changes of them in the queue | the ledger has these tables compared under a snapshot past all that was applied or lost |
//! | `walferry resync` | the slot, the queue, the state directory, or commits of a server that failed over | a new slot and queue; the ledger has every table compared |
//!
//! How it dies: one transaction on the target says what is to be compared, and from which position of which slot the stream goes
//! on (I2). Before it, all is as it was, but for a slot that is gone or of which the ledger knows nothing: the stream does not
//! start from that one (H15). After it, `walferry migrate` goes on like after any other interruption. The queue of a new slot has a directory
//! of its own, which the ledger names: what the old slot sent cannot be taken for its own.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::prepare::{Held, identities};
use super::{Heal, Running, hypertables};
use crate::apply::reconcile::{self, Stream};
use crate::care::wal::GivenUp;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::status::Level;
use crate::queue;
use crate::source::catalog::{self, Table};
use crate::source::identity;
use crate::source::replication::ReplicationSession;
use crate::source::slot;
use crate::state_directory::queue_name;
use crate::target::ledger::{self, Migration, Resynced, ThrownAway};
use crate::timescale::live;
use crate::{unstreamed, verify};

impl Running {
    /// Does what the operator asked for, once: `heal` is nothing afterwards. Answers like the preparation.
    pub(super) async fn heal(
        &self,
        target: &mut Client,
        migration: Migration,
        heal: &mut Heal,
    ) -> Result<(Migration, Option<Held>)> {
        if *heal == Heal::Nothing {
            return Ok((migration, None));
        }
        // Before that there is nothing on the target to compare.
        if !migration.pre_data_restored {
            let tables = ledger::tables(target).await?;
            self.restore_pre_data(target, &tables).await?;
        }
        let held = match heal {
            Heal::Nothing => None,
            Heal::Tables(names) => {
                self.compare_tables_again(target, &migration, names).await?;
                None
            }
            Heal::Everything => Some(self.resync(target, &migration).await?),
        };
        *heal = Heal::Nothing;
        Ok((self.load(target).await?, held))
    }

    /// A queue of a name that the ledger does not have yet can only be of an attempt that was not recorded.
    fn make_way_for_queue(&self, name: &str, migration: &Migration) -> Result<()> {
        let kept = Some(migration.queue.as_str()).filter(|kept| *kept != name);
        self.directory.discard_queues(kept)
    }

    async fn compare_tables_again(&self, target: &mut Client, migration: &Migration, names: &[String]) -> Result<()> {
        let tables: Vec<Table> = ledger::tables(target).await?.into_iter().map(|entry| entry.table).collect();
        let chosen = hypertables::with_chunks(&tables, &verify::choose(&tables, Some(names))?);
        let source = self.config.source.connect(&self.application_name).await?;
        let lost = self.look_for_a_loss(migration, &source, target).await?;
        let up_to = match &lost {
            None => None,
            Some(Loss { labels: None, .. }) => {
                let text = "the queue is damaged, and which tables its lost part changed can no longer be told";
                return Err(Error::new(ErrorKind::Queue, text).hint(slot::RESYNC));
            }
            Some(Loss { labels: Some(labels), up_to }) => {
                let changed: Vec<&Table> = tables.iter().filter(|table| labels.contains(&table.relid)).collect();
                if !changed.iter().all(|table| chosen.iter().any(|other| other.relid == table.relid)) {
                    let text = "the queue is damaged, and its lost part changed other tables too";
                    return Err(Error::new(ErrorKind::Blocked, text)
                        .hint(format!("Give all of them: `{}`", Table::recopy_option(&changed))));
                }
                Some(*up_to)
            }
        };
        self.have_compared(&source, target, migration, &chosen, up_to).await
    }

    /// Writes into the ledger that tables are compared with the source again, and that a piece of the stream is thrown away, if it is.
    pub(super) async fn have_compared(
        &self,
        source: &Client,
        target: &mut Client,
        migration: &Migration,
        chosen: &[&Table],
        up_to: Option<Lsn>,
    ) -> Result<()> {
        // Whatever was applied or lost is visible to a snapshot in which this transaction, which begins now, has ended (H1).
        let assigned: String = source
            .query_typed_one("SELECT pg_catalog.txid_current()::text", &[])
            .await
            .context(|| "asking the source for a transaction's id".into())?
            .get(0);
        let floor = assigned
            .parse()
            .map_err(|_| Error::new(ErrorKind::Other, format!("{assigned} is not a transaction's id")))?;
        let queue = up_to.map(queue_name);
        let thrown_away = up_to.zip(queue.as_deref()).map(|(up_to, queue)| ThrownAway { up_to, queue });
        let tables = reconcile::redefine(source, target, chosen, Stream::GoesOn { binary: migration.binary }).await?;
        if let Some(thrown_away) = &thrown_away {
            self.make_way_for_queue(thrown_away.queue, migration)?;
        }
        ledger::compare_again(target, &tables, floor, thrown_away.as_ref()).await?;
        let named = chosen
            .iter()
            .filter(|table| table.chunk.as_ref().is_none_or(|of| !chosen.iter().any(|root| root.relid == of.relid)));
        let names: Vec<String> = named.map(|table| format!("{}.{}", table.schema, table.name)).collect();
        self.board.event(Level::Info, format!("comparing with the source again: {}", names.join(", ")));
        if let Some(up_to) = up_to {
            let text = format!("the damaged queue is thrown away up to {up_to}; the source sends the rest again");
            self.board.event(Level::Warn, text);
        }
        Ok(())
    }

    /// What the queue no longer has of what the source has been told that it has.
    async fn look_for_a_loss(&self, migration: &Migration, source: &Client, target: &Client) -> Result<Option<Loss>> {
        let applied = ledger::apply_progress(target).await?.into_iter().min().unwrap_or(Lsn::ZERO);
        let Some(state) = self.slot_state(source, &migration.slot).await? else {
            return Err(Error::new(ErrorKind::Gap, format!("the slot {} is gone from the source", migration.slot))
                .hint(slot::RESYNC));
        };
        let directory = self.directory.directory().queue(&migration.queue);
        let examined = tokio::task::spawn_blocking(move || queue::examine(&directory, applied))
            .await
            .map_err(|error| Error::new(ErrorKind::Other, format!("looking at the queue failed: {error}")))??;
        // A new queue without a block ends where it begins.
        let end = examined.end.max(migration.consistent_point.unwrap_or(Lsn::ZERO)).max(applied);
        let has_all = end >= state.confirmed_flush;
        if has_all && !examined.damaged {
            return Ok(None);
        }
        let labels = examined.labels.filter(|_| has_all);
        Ok(Some(Loss { labels, up_to: state.confirmed_flush.max(applied) }))
    }

    /// Puts into an error about a damaged queue what heals it. Everything that stands in the way of that is left out: the error
    /// says enough without it.
    pub(super) async fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Queue {
            return error;
        }
        let command = async {
            let target = self.target().await?;
            let migration = self.load(&target).await?;
            let source = self.config.source.connect(&self.application_name).await?;
            let loss = self.look_for_a_loss(&migration, &source, &target).await?;
            let Some(Loss { labels: Some(labels), .. }) = loss else { return Ok(None) };
            let tables = ledger::tables(&target).await?;
            let changed: Vec<&Table> =
                tables.iter().map(|entry| &entry.table).filter(|table| labels.contains(&table.relid)).collect();
            // Lost changes of no table at all are healed by any.
            let named =
                if changed.is_empty() { tables.iter().map(|entry| &entry.table).take(1).collect() } else { changed };
            Result::<_>::Ok(Some(Table::recopy_option(&named)))
        };
        match command.await {
            Ok(Some(command)) => error.hint(format!(
                "Restore the file if there is a copy. Else the same command with `{command}` compares the tables that the lost part \
                 changed with the source, and copies only what differs; then the migration goes on."
            )),
            _ => error,
        }
    }

    /// A new slot, recorded, and a snapshot under which every table is compared.
    async fn resync(&self, target: &mut Client, migration: &Migration) -> Result<Held> {
        let source = self.config.source.connect(&self.application_name).await?;
        let mut session = ReplicationSession::connect(&self.config.source, &self.application_name).await?;
        let server = session.identify_system().await.context(|| "asking the source who it is".into())?;
        session.close().await;
        if server.system_id != migration.source_system {
            let text = format!(
                "this is another server: its system identifier is {}, the migration's source has {}",
                server.system_id, migration.source_system
            );
            return Err(Error::new(ErrorKind::Gap, text).hint(
                "Give a --source that is the migration's own, or a physical copy of it such as a promoted standby.",
            ));
        }
        let timeline = i32::try_from(server.timeline).unwrap_or(i32::MAX);
        if timeline < migration.source_timeline {
            let text = format!(
                "this server is on timeline {timeline}, and the migration's source has been on {}: it is one that was failed over from",
                migration.source_timeline
            );
            return Err(Error::new(ErrorKind::Gap, text).hint("Give the --source that is the primary now."));
        }
        let recorded: Vec<Table> = ledger::tables(target).await?.into_iter().map(|entry| entry.table).collect();
        let recorded: Vec<&Table> = recorded.iter().collect();
        let tables = reconcile::redefine(&source, target, &recorded, Stream::New).await?;
        let is_gone =
            |table: &&&Table| table.chunk.is_none() && !tables.iter().any(|now| now.table.relid == table.relid);
        for gone in recorded.iter().filter(is_gone) {
            let name = gone.qualified();
            let text =
                format!("{name} is gone from the source and is set aside: what the target has of it stays as it is");
            self.board.event(Level::Warn, text);
        }
        let chunks = live::unknown(&source, target, &recorded).await?;
        let published: Vec<Table> = tables.iter().map(|table| &table.table).chain(&chunks).cloned().collect();
        self.board.event(Level::Info, "a new slot is made, then every table is compared");
        self.drop_slot(&source, &migration.slot).await?;
        slot::create_publications(&source, &migration.publication, &migration.insert_only_publication, &published)
            .await?;
        identity::note(&source, &migration.publication, &ledger::replica_identities(target).await?).await?;
        let new = self.make_slot(&source, &migration.slot).await?;
        let (before, mut after) = (identities(&published), identities(&catalog::tables(&source).await?));
        after.retain(|relid, _| before.contains_key(relid));
        // Of one that the slot's snapshot shows, the stream has not all (H2).
        let missed = live::unknown(&source, target, &published.iter().collect::<Vec<_>>()).await?;
        source.batch_execute("COMMIT").await?;
        if before != after || !missed.is_empty() {
            return Err(Error::new(ErrorKind::Transient, "the source's tables changed while the slot was made"));
        }

        if target.is_closed() {
            // Making the slot may have taken hours.
            *target = self.target().await?;
        }
        let queue = queue_name(new.consistent_point);
        let resynced = Resynced {
            consistent_point: new.consistent_point,
            snapshot: &new.snapshot.data,
            source_timeline: timeline,
            queue: &queue,
            tables: &tables,
            chunks: &chunks,
        };
        self.make_way_for_queue(&queue, migration)?;
        unstreamed::forget(target).await?;
        ledger::record_resynced(target, &resynced).await?;
        GivenUp::forget(self.directory.directory());
        self.board.event(
            Level::Info,
            format!("slot {} at {}: {} tables to compare", migration.slot, new.consistent_point, published.len()),
        );
        Ok(Held { snapshot: new.snapshot, is_recorded: true, was_planned: false })
    }
}

/// A part of the queue that is gone.
struct Loss {
    /// What it changed, as the queue was told: the tables' OIDs. `None` where it is not known.
    labels: Option<BTreeSet<u32>>,
    /// Up to here the source does not send it again.
    up_to: Lsn,
}
