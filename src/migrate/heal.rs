//! A migration that cannot just go on: the stream or the target has lost something, and tables are compared with the source again.
//!
//! | | what is lost | what is done before it goes on |
//! |---|---|---|
//! | `migrate --recopy TABLE…` | rows of some tables on the target | the ledger has these tables compared under a snapshot past all that was applied |
//! | `walferry resync` | the slot, the queue, the state directory, or commits of a server that failed over | a new slot and queue; the ledger has every table compared |
//!
//! How it dies: one transaction on the target says what is to be compared, and from which position of which slot the stream goes
//! on (I2). Before it, all is as it was, but for a slot that is gone or of which the ledger knows nothing: the stream does not
//! start from that one (H15). After it, `walferry migrate` goes on like after any other interruption. The queue of a new slot has a directory
//! of its own, which the ledger names: what the old slot sent cannot be taken for its own.

use super::prepare::{Held, identities};
use super::{Heal, Running};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::status::Level;
use crate::source::catalog::{self, Table};
use crate::source::replication::ReplicationSession;
use crate::source::slot;
use crate::source::snapshot;
use crate::state_directory::FIRST_QUEUE;
use crate::target::ledger::{self, Migration, Resynced};
use crate::verify;

impl Running {
    /// Does what the operator asked for, once: `heal` is nothing afterwards. Answers like the preparation.
    pub(super) async fn heal(&self, migration: Migration, heal: &mut Heal) -> Result<(Migration, Option<Held>)> {
        let held = match heal {
            Heal::Nothing => return Ok((migration, None)),
            Heal::Tables(names) => {
                self.compare_tables_again(names).await?;
                None
            }
            Heal::Everything => Some(self.resync(&migration).await?),
        };
        *heal = Heal::Nothing;
        Ok((self.load().await?, held))
    }

    async fn compare_tables_again(&self, names: &[String]) -> Result<()> {
        let mut target = self.target().await?;
        let tables: Vec<Table> = ledger::tables(&target).await?.into_iter().map(|entry| entry.table).collect();
        let relids: Vec<u32> = verify::choose(&tables, Some(names))?.iter().map(|table| table.relid).collect();
        // Whatever was applied is visible to a snapshot in which this transaction, which begins now, has ended (H1).
        let source = self.config.source.connect(&self.application_name).await?;
        let assigned: String = source
            .query_one("SELECT pg_catalog.pg_current_xact_id()::text", &[])
            .await
            .context(|| "asking the source for a transaction's id".into())?
            .get(0);
        let floor = assigned
            .parse()
            .map_err(|_| Error::new(ErrorKind::Other, format!("{assigned} is not a transaction's id")))?;
        ledger::compare_again(&mut target, &relids, floor).await?;
        self.board.event(Level::Info, format!("comparing with the source again: {}", names.join(", ")));
        Ok(())
    }

    /// A new slot, recorded, and a snapshot under which every table is compared.
    async fn resync(&self, migration: &Migration) -> Result<Held> {
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
        let recorded: Vec<Table> =
            ledger::tables(&self.target().await?).await?.into_iter().map(|entry| entry.table).collect();
        let published = still_there(&recorded, catalog::tables(&source).await?)?;
        self.board.event(
            Level::Info,
            "making a new slot; this waits for every transaction that is open on the source, then every table is compared",
        );
        slot::drop(&source, &migration.slot).await?;
        slot::create_publications(&source, &migration.publication, &migration.insert_only_publication, &published)
            .await?;
        let new = slot::create(&self.config.source, &self.application_name, &migration.slot).await?;
        snapshot::import(&source, &new.snapshot.name).await?;
        still_there(&recorded, catalog::tables(&source).await?)?;
        source.batch_execute("COMMIT").await?;

        let queue = queue_name(new.consistent_point);
        let resynced = Resynced {
            consistent_point: new.consistent_point,
            snapshot: &new.snapshot.data,
            source_timeline: i32::try_from(server.timeline).unwrap_or(i32::MAX),
            queue: &queue,
        };
        // One of this name can only be of an attempt that was not recorded.
        self.directory.discard_queues(Some(&migration.queue).filter(|name| **name != queue).map(String::as_str))?;
        ledger::record_resynced(&mut self.target().await?, &resynced).await?;
        self.board.event(
            Level::Info,
            format!("slot {} at {}: {} tables to compare", migration.slot, new.consistent_point, recorded.len()),
        );
        Ok(Held { snapshot: new.snapshot, is_recorded: true, was_planned: false })
    }
}

/// A name that no other slot's queue has: a new slot begins later than every one before it.
fn queue_name(consistent_point: Lsn) -> String {
    format!("{FIRST_QUEUE}-{}", consistent_point.to_string().replace('/', "-"))
}

/// The migrated tables as they are now. What has come since is for the comparison of catalogs to say (I11).
///
/// # Errors
/// `SchemaChanged` when one is gone, or has other columns or another key.
fn still_there(recorded: &[Table], now: Vec<Table>) -> Result<Vec<Table>> {
    let (before, mut after) = (identities(recorded), identities(&now));
    after.retain(|relid, _| before.contains_key(relid));
    let changed: Vec<String> = before
        .iter()
        .filter(|(relid, table)| after.get(relid) != Some(table))
        .map(|(_, (name, ..))| name.clone())
        .collect();
    if changed.is_empty() {
        return Ok(now.into_iter().filter(|table| before.contains_key(&table.relid)).collect());
    }
    let text =
        format!("these tables were dropped or changed on the source since they were recorded: {}", changed.join(", "));
    Err(Error::new(ErrorKind::SchemaChanged, text).hint(
        "Undo the change on the source, then run the same command again; or start the migration anew: `walferry clean`, then `walferry migrate`.",
    ))
}
