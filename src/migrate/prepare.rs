//! Publications, slot, snapshot, schema and catalog, in that order (H2, H7, H8), recorded in the ledger as one transaction.
//!
//! How it dies: until that transaction, nothing of it counts, and the next start makes everything anew. After it, the slot's
//! snapshot is in the ledger (H1), and only the snapshot's session can be missing.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::{Direction, Running, hypertables};
use crate::check::tools;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::status::Level;
use crate::source::catalog::{self, Table};
use crate::source::identity;
use crate::source::snapshot::{self, HeldSnapshot};
use crate::source::version::Version;
use crate::source::{ddl, slot};
use crate::target::ddl::is_replicated;
use crate::target::ledger::{self, Migration, Prepared, SchemaItem};
use crate::target::{existing, schema};
use crate::timescale::recreate::recompute;
use crate::timescale::{self, recreate, restore};
use crate::unstreamed::materialized_view;

/// How often the preparation is made anew when the schema changes under it.
const ATTEMPTS: usize = 5;

/// A snapshot that is alive, and its number in the ledger when it is there already.
pub(super) struct Held {
    pub(super) snapshot: HeldSnapshot,
    /// The slot's own is recorded with the slot; another one is recorded with the plan that uses it.
    pub(super) is_recorded: bool,
    /// A copy has been planned under it: another plan needs another snapshot (H3).
    pub(super) was_planned: bool,
}

impl Running {
    /// Ends every session of this migration on a server, this process's own too, and waits until they are gone: those that a dead
    /// walferry left could still hold the slot, or write (H18).
    ///
    /// A connection that broke off may live on at its other end, for as long as that server's keepalive takes: with locks on
    /// rows and tables, and perhaps with a commit that is still on its way.
    pub(super) async fn end_sessions(&self, spec: &ConnectionSpec) -> Result<()> {
        // Another name, so that it does not end itself or what it is to end.
        end_sessions(&spec.connect("walferry").await?, &self.application_name).await
    }

    /// Makes what is missing until the copy can begin. The second answer is the slot's snapshot, if it was made just now.
    pub(super) async fn prepare(&self, target: &mut Client, migration: Migration) -> Result<(Migration, Option<Held>)> {
        if migration.consistent_point.is_some() {
            if self.config.replica_identity_full && self.direction == Direction::There {
                self.say_what_came_too_late(target).await?;
            }
            return Ok((migration, None));
        }
        self.directory.discard_queues(None)?;
        for _ in 0..ATTEMPTS {
            if let Some(held) = self.try_to_prepare(target, &migration).await? {
                return Ok((self.load(target).await?, Some(held)));
            }
            self.board.event(Level::Warn, "the source's tables changed while the slot was made; preparing anew");
        }
        Err(Error::new(ErrorKind::Transient, "the source's tables keep changing while the slot is made")
            .hint("Let no CREATE, ALTER or DROP TABLE run while the migration begins."))
    }

    /// `None` when a table came, went or changed meanwhile.
    async fn try_to_prepare(&self, target: &mut Client, migration: &Migration) -> Result<Option<Held>> {
        let source = self.config.source.connect(&self.application_name).await?;
        self.drop_slot(&source, &migration.slot).await?;
        let selection = migration.scope.select(&source).await?;
        self.prepare_hypertables(&source, target).await?;
        let recomputed = recompute::recorded(target).await?;
        if self.config.replica_identity_full {
            let mut moved = catalog::chosen(catalog::tables(&source).await?, selection.as_ref());
            recompute::without(&mut moved, &recomputed);
            self.set_replica_identities(&source, target, &moved).await?;
        }
        let mut published = catalog::chosen(catalog::tables(&source).await?, selection.as_ref());
        recompute::without(&mut published, &recomputed);
        let created =
            slot::create_publications(&source, &migration.publication, &migration.insert_only_publication, &published);
        if hypertables::is_only_gone(&published, created.await)? {
            return Ok(None);
        }
        identity::note(&source, &migration.publication, &ledger::replica_identities(target).await?).await?;
        // Before the slot: of every transaction that it sends, the DDL is told of.
        if is_replicated(&self.target().await?).await? {
            ddl::create(&source, &migration.id, &migration.publication, &migration.insert_only_publication).await?;
        }
        let paused = timescale::pause::noted(target).await?;
        let new = self.make_slot(&source, &migration.slot).await?;

        let selection = migration.scope.select(&source).await?;
        let mut tables = catalog::chosen(catalog::tables(&source).await?, selection.as_ref());
        recompute::without(&mut tables, &recomputed);
        let fingerprint = catalog::fingerprint_of(&source, selection.as_ref()).await?;
        let schemas = match &selection {
            Some(_) => Some(catalog::schemas_of_objects(&source).await?),
            None => None,
        };
        let again = match recreate::is_recreated(&self.target().await?).await? {
            true => recreate::schema::read(&source).await?,
            false => None,
        };
        let of_timescaledb = match migration.scope.data_only || again.is_some() {
            true => Vec::new(),
            false => timescale::prepare::catalog_items(&source, &paused, &self.config.owners).await?,
        };
        let of_chunks = hypertables::published(&source, migration, &tables).await?;
        source.batch_execute("COMMIT").await?;
        if !hypertables::are_published(&published, &tables, &of_chunks) {
            return Ok(None);
        }
        if target.is_closed() {
            // Making the slot may have taken hours.
            *target = self.target().await?;
        }
        let mut items = if migration.scope.data_only {
            // It has the schema already; what it makes of identity columns it gets back.
            existing::take_identity_from(target, &mut tables).await?;
            Vec::new()
        } else {
            let tools = tools::find_tools_for(Version::of(&source).await?.0, Version::of(target).await?.0)?;
            let dump = schema::Dump {
                tools: &tools,
                source: &self.config.source,
                application_name: &self.application_name,
                snapshot: &new.snapshot.name,
                directory: self.directory.directory().path(),
                owners: &self.config.owners,
                without_schema: again.as_ref().map(|_| recreate::schema::OF_CHUNKS),
                role: migration.apply_role,
            };
            let dumped = dump.read().await;
            if dumped.is_err() && hypertables::is_gone_since(&source, &tables).await? {
                return Ok(None);
            }
            match again {
                Some(again) => make_again(target, again, &mut tables, dumped?).await?,
                None => {
                    let items = schema::wanted(dumped?, selection.as_ref().zip(schemas.as_ref()))?;
                    self.fit_to_hypertables(target, migration, &mut tables, items).await?
                }
            }
        };
        items.extend(of_timescaledb);
        let binary = tables.iter().all(Table::binary_safe);
        let tables: Vec<(Table, bool)> = tables
            .into_iter()
            .map(|table| (!table.has_usable_identity(), table))
            .map(|(only, table)| (table, only))
            .collect();
        let prepared = Prepared {
            consistent_point: new.consistent_point,
            snapshot: &new.snapshot.data,
            tables: &tables,
            items: &items,
            fingerprint: &fingerprint,
            binary,
        };
        // Everything that the target will have when it first refreshes them is newer than what they show now.
        let views = materialized_view::list(&source, selection.as_ref()).await?;
        ledger::record_prepared(target, migration, &prepared).await?;
        materialized_view::remember(target, &views).await?;
        self.board.event(
            Level::Info,
            format!("slot {} at {}: {} tables to copy", migration.slot, new.consistent_point, tables.len()),
        );
        Ok(Some(Held { snapshot: new.snapshot, is_recorded: true, was_planned: false }))
    }
}

impl Running {
    /// The tables and the items of their schema as they are where some of them become hypertables.
    async fn fit_to_hypertables(
        &self,
        target: &Client,
        migration: &Migration,
        tables: &mut [Table],
        items: Vec<SchemaItem>,
    ) -> Result<Vec<SchemaItem>> {
        let declared = &migration.scope.hypertables;
        if declared.is_empty() {
            return Ok(items);
        }
        let extension = restore::ensure_extension(target).await?;
        for table in tables.iter_mut() {
            *table = restore::marked(table.clone(), declared);
        }
        Ok(restore::fit_items(items, tables, declared, &extension))
    }

    /// Has the whole old row identify every table that nothing else does (H27): before the slot, so that everything of the stream says
    /// which row it is (H2). Noted in the ledger before it is done.
    pub(super) async fn set_replica_identities(
        &self,
        source: &Client,
        target: &mut Client,
        tables: &[Table],
    ) -> Result<()> {
        let before = identity::lacking(source, tables).await?;
        if before.is_empty() {
            return Ok(());
        }
        ledger::note_replica_identities(target, &before).await?;
        for table in &before {
            let waits = |name: &str| {
                let text = format!("somebody uses {name}: its replica identity is set when nobody does");
                self.board.event(Level::Warn, text);
            };
            identity::set_full(source, table, waits).await?;
        }
        let names: Vec<String> = before.iter().map(|table| crate::sql::qualified(&table.schema, &table.name)).collect();
        let names = shortened(names.iter().map(String::as_str));
        self.board.event(Level::Info, format!("REPLICA IDENTITY FULL, until `walferry clean`: {names}"));
        Ok(())
    }

    /// What was in the stream before an identity was set says no row, so nothing is set once there is a slot (H2).
    async fn say_what_came_too_late(&self, target: &Client) -> Result<()> {
        let tables = ledger::tables(target).await?;
        let untold = tables.iter().filter(|entry| entry.insert_only && !entry.table.unlogged);
        let names: Vec<String> = untold.map(|entry| entry.table.qualified()).collect();
        if !names.is_empty() {
            let names = shortened(names.iter().map(String::as_str));
            let text =
                format!("--replica-identity-full comes too late for {names}: a migration takes it when it begins");
            self.board.event(Level::Warn, text);
        }
        Ok(())
    }
}

/// The tables and the items of their schema where the hypertables of the source are made again; noted in the ledger.
async fn make_again(
    target: &Client,
    (recreation, mut instead): (recreate::Recreation, schema::Instead),
    tables: &mut [Table],
    dumped: Vec<schema::Dumped>,
) -> Result<Vec<SchemaItem>> {
    let is_superuser = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user";
    let is_superuser =
        target.query_typed_one(is_superuser, &[]).await.context(|| "asking the target for our rights".into())?;
    instead.by_owners = !is_superuser.get::<_, bool>(0);
    recreate::note(target, &recreation).await?;
    recreate::arrange(tables);
    let items = schema::wanted(schema::instead(dumped, instead), None)?;
    Ok(restore::fit_items(items, tables, &recreation.hypertables, ""))
}

/// How often it is looked who keeps the slot waiting.
const WAIT_INTERVAL: Duration = Duration::from_secs(1);

/// Transactions with an id, in every database: what the making of a slot waits for. The oldest first.
const OPEN_TRANSACTIONS: &str = "SELECT format('transaction of pid %s (%s, %s, database %s)', pid, coalesce(usename, backend_type), \
             coalesce(nullif(application_name, ''), 'unnamed'), datname) AS what, xact_start AS since \
         FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL AND application_name <> $1 \
     UNION ALL SELECT format('prepared transaction %L (%s, database %s)', gid, owner, database), prepared \
         FROM pg_catalog.pg_prepared_xacts ORDER BY since";

/// For how long the slot is made anew because tables got other files meanwhile: each time waits for whoever has a transaction open
/// by then.
const SLOT_PATIENCE: Duration = Duration::from_secs(300);

impl Running {
    /// Makes the slot, and says meanwhile whom that waits for. `source`, a session that is free for it, is afterwards in a
    /// transaction under the slot's snapshot.
    ///
    /// One that may be unable to decode what is written next ([`slot::Relations`]) is made anew.
    pub(super) async fn make_slot(&self, source: &Client, name: &str) -> Result<slot::NewSlot> {
        let begun = Instant::now();
        let mut attempt = 1;
        loop {
            let before = slot::Relations::read(source).await?;
            let text = "making the slot; this waits for every transaction that is open on the source";
            self.board.event(Level::Info, text);
            let new = tokio::select! {
                new = slot::create(&self.config.source, self.config.standbys.stream.as_ref(), &self.application_name, name) => new?,
                never = self.name_what_is_waited_for(source, "the slot") => match never {},
            };
            snapshot::import(source, &new.snapshot.name).await?;
            let now = slot::Relations::read(source).await?;
            let changed = now.changed_since(&before);
            if changed.is_empty() {
                return Ok(new);
            }
            let text = format!("emptied, rewritten or altered while the slot was made: {}", shortened(changed));
            if attempt == slot::ATTEMPTS_BESIDE_CHANGES || begun.elapsed() > SLOT_PATIENCE {
                let text =
                    format!("{text}; the slot is taken as it is, and if the source cannot decode it, that is said");
                self.board.event(Level::Warn, text);
                return Ok(new);
            }
            let text = format!("{text}; PostgreSQL may be unable to decode their changes from it, so it is made anew");
            self.board.event(Level::Warn, text);
            source.batch_execute("ROLLBACK").await?;
            drop(new);
            self.drop_slot(source, name).await?;
            attempt += 1;
        }
    }

    /// Says whom the slot or a snapshot waits for, whenever it is somebody else: an operator can end a forgotten transaction.
    pub(super) async fn name_what_is_waited_for(&self, source: &Client, waits: &str) -> Infallible {
        let mut said = String::new();
        loop {
            tokio::time::sleep(WAIT_INTERVAL).await;
            // Only a help: whatever is wrong with this connection, the making of the slot meets too.
            let Ok(open) = source.query(OPEN_TRANSACTIONS, &[&self.application_name]).await else { continue };
            let names = shortened(open.iter().map(|row| row.get(0)));
            if !names.is_empty() && names != said {
                self.board.event(Level::Warn, format!("{waits} waits for the end of: {names}"));
                said = names;
            }
        }
    }
}

/// The first few of many names.
fn shortened<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 3;
    let mut names = names.into_iter();
    let mut shown: Vec<String> = names.by_ref().take(SHOWN).map(str::to_owned).collect();
    let more = names.count();
    if more > 0 {
        shown.push(format!("{more} more"));
    }
    shown.join(", ")
}

/// Ends the sessions of a name, and returns when they are gone: they could still commit what they have begun.
pub(crate) async fn end_sessions(client: &Client, application_name: &str) -> Result<()> {
    for _ in 0..200 {
        let left = client
            .query(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE application_name = $1",
                &[&application_name],
            )
            .await
            .context(|| "ending sessions of an earlier walferry".into())?;
        if left.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(Error::new(
        ErrorKind::Transient,
        format!("sessions named {application_name} of an earlier walferry do not end"),
    )
    .hint("Look for them in pg_stat_activity on both servers, end them, then run the same command again."))
}

/// What decides how a table is published and read.
pub(super) fn identities(tables: &[Table]) -> BTreeMap<u32, (String, bool, Vec<catalog::Column>)> {
    tables
        .iter()
        .map(|table| (table.relid, (table.qualified(), table.has_usable_identity(), table.columns.clone())))
        .collect()
}
