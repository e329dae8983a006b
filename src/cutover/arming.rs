//! The way back is made ready while the target follows, so that it costs no downtime (H33), and armed by the cutover.
//!
//! ```text
//!   while following                        before the fence            behind the fence           the decision
//!   publications and slot on the target ► draft of the ledger on ───► where the stream begins ► `way_back = 'armed'`
//!   the slot moved on all the time         the source                  (the release position)
//! ```
//!
//! How it dies: until the decision, nothing of it counts, and the next start makes it anew. The slot keeps WAL on the target, where
//! nobody but us writes; `clean` removes it.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard, watch};
use tokio_postgres::Client;
use tokio_postgres::types::{PgLsn, Type};

use crate::care::connections::Caps;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::{self, Table};
use crate::source::replication::ReplicationSession;
use crate::source::slot;
use crate::sql;
use crate::target::existing;
use crate::target::late::AtCutover;
use crate::target::ledger::{self, Draft, Migration, Phase};
use crate::target::role::ApplyRole;
use crate::unstreamed::silence_event_triggers;

/// How often the slot is moved on, and the longest time of writes that it keeps WAL for.
const ADVANCE_INTERVAL: Duration = Duration::from_secs(2);
/// How long the target may take for that. The first time, it may have much to read.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// Pause after an attempt that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// What else there is, wherever the way back is in the way.
pub const WITHOUT: &str = "or cut over with --no-reverse: then there is no way back";

/// How far the way back is.
#[derive(Clone, Debug, PartialEq)]
pub enum Arming {
    /// It is being made; why it is not yet there, where something went wrong.
    Preparing(Option<String>),
    /// The slot is there, and moves on.
    Ready,
    /// It cannot be, as things are; tried again all the same. The reason, and what mends it.
    Impossible(String, String),
}

/// What belongs to the way back of a migration, on the server that takes over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The slot.
    pub slot: String,
    /// The publication of the tables with a usable replica identity.
    pub publication: String,
    /// That of the others.
    pub insert_only_publication: String,
}

impl Names {
    /// Those of a migration.
    pub fn of(id: &str) -> Names {
        let name = format!("walferry_{id}_back");
        Names { insert_only_publication: format!("{name}_inserts"), publication: name.clone(), slot: name }
    }

    /// Removes all of it, where it is there. Answers what was.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn remove(&self, server: &Client) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        silence_event_triggers(server).await;
        if slot::state(server, &self.slot).await?.is_some() {
            slot::drop(server, &self.slot).await?;
            removed.push(format!("slot {}", self.slot));
        }
        let publications = server
            .query_typed(
                "SELECT pubname::text FROM pg_catalog.pg_publication WHERE pubname IN ($1, $2) ORDER BY 1",
                &[(&self.publication, Type::TEXT), (&self.insert_only_publication, Type::TEXT)],
            )
            .await
            .context(|| "looking for publications of the way back".into())?;
        slot::drop_publications(server, &self.publication, &self.insert_only_publication).await?;
        removed.extend(publications.iter().map(|row| format!("publication {}", row.get::<_, &str>(0))));
        Ok(removed)
    }
}

/// What the way back is made from.
#[derive(Clone)]
pub struct WayBack {
    /// The server that is left.
    pub source: ConnectionSpec,
    /// The server that takes over.
    pub target: ConnectionSpec,
    /// What our sessions call themselves.
    pub application_name: String,
    /// The migration whose way back it is.
    pub migration: Migration,
    /// The most connections that there may be.
    pub caps: Caps,
    /// Held by whoever works on it: while a cutover does, nothing is made anew, and the slot stands still. True from the decision on:
    /// then the slot belongs to the stream back, and nobody here touches it any more.
    pub work: Arc<Mutex<bool>>,
}

/// A way back that is drafted for one cutover, and changed by nobody until this is dropped.
pub(super) struct Drafted<'a> {
    way_back: &'a WayBack,
    draft: String,
    work: OwnedMutexGuard<bool>,
}

impl WayBack {
    fn names(&self) -> Names {
        Names::of(&self.migration.id)
    }

    /// Makes the slot and keeps it moving, until it is dropped. Tells how far it is.
    pub async fn keep_ready(self, tell: watch::Sender<Arming>) {
        let say = |now: Arming| {
            tell.send_if_modified(|said| {
                let news = *said != now;
                if news {
                    match &now {
                        Arming::Ready => tracing::info!("the way back is ready"),
                        Arming::Impossible(why, mend) => {
                            tracing::warn!(next = mend, "there is no way back as things are: {why}");
                        }
                        Arming::Preparing(Some(why)) => tracing::warn!("the way back is not ready: {why}"),
                        Arming::Preparing(None) => {}
                    }
                    *said = now;
                }
                news
            });
        };
        loop {
            let Err(error) = self.make_and_advance(&say).await;
            say(match error.is_transient() {
                true => Arming::Preparing(Some(error.to_string())),
                false => Arming::Impossible(
                    error.to_string(),
                    error.next_step().unwrap_or("Look at the target's log.").to_owned(),
                ),
            });
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Waits for its turn; for ever when the way back is open.
    async fn turn(&self) -> MutexGuard<'_, bool> {
        let work = self.work.lock().await;
        if *work { std::future::pending().await } else { work }
    }

    async fn make_and_advance(&self, say: &impl Fn(Arming)) -> Result<Infallible> {
        let work = self.turn().await;
        let target = self.target.connect(&self.application_name).await?;
        silence_event_triggers(&target).await;
        self.prove_possible(&target).await?;
        let names = self.names();
        let migrated: Vec<Table> = {
            let tables = ledger::tables(&target).await?;
            tables.into_iter().map(|entry| entry.table).collect()
        };
        let published = on_target(&target, &migrated).await?;
        slot::create_publications(&target, &names.publication, &names.insert_only_publication, &published).await?;
        let usable = slot::state(&target, &names.slot).await?.is_some_and(|state| state.is_usable());
        // One that a process left which died before it had looked at it may be unable to decode (H37).
        let is_prepared =
            ledger::load(&target).await?.is_some_and(|now| now.way_back == Some(ledger::WayBack::Prepared));
        if !usable || !is_prepared {
            ledger::prepared(&target, false).await?;
            make_slot(&target, &names.slot).await?;
            ledger::prepared(&target, true).await?;
        }
        // Also to find out now, and not behind the fence, whether it can be written.
        self.draft(&target, &migrated).await?;
        drop(work);
        loop {
            let work = self.turn().await;
            // To a position that is known before: a command that still lies in a connection which broke must not move the slot past a
            // release that comes after it.
            let moved = async {
                let flushed: PgLsn =
                    target.query_typed_one("SELECT pg_catalog.pg_current_wal_flush_lsn()", &[]).await?.get(0);
                target
                    .query_typed(
                        "SELECT pg_catalog.pg_replication_slot_advance($1, $2)",
                        &[(&names.slot, Type::TEXT), (&flushed, Type::PG_LSN)],
                    )
                    .await
                    .context(|| format!("moving the slot {} on", names.slot))
            };
            // On a connection that may be dead without looking it.
            let late = |_| Err(Error::new(ErrorKind::Transient, "the target does not answer"));
            tokio::time::timeout(ANSWER_MAX, moved).await.unwrap_or_else(late)?;
            drop(work);
            say(Arming::Ready);
            tokio::time::sleep(ADVANCE_INTERVAL).await;
        }
    }

    /// Drafts it as things are now, and has nobody change it any more. Before the fence.
    ///
    /// # Errors
    /// Whatever the servers say, or `Transient` when the slot is not there.
    pub(super) async fn draft_for_cutover(&self, target: &Client, migrated: &[Table]) -> Result<Drafted<'_>> {
        let work = Arc::clone(&self.work).lock_owned().await;
        let slot = self.names().slot;
        if !slot::state(target, &slot).await?.is_some_and(|state| state.is_usable()) {
            return Err(Error::new(ErrorKind::Transient, format!("the slot {slot} is not on the target")));
        }
        // Tables that replicated DDL has made, dropped, or given a key since.
        let (names, published) = (self.names(), on_target(target, migrated).await?);
        let fit = slot::are_published(target, &names.publication, &names.insert_only_publication, &published).await?;
        if !fit {
            slot::create_publications(target, &names.publication, &names.insert_only_publication, &published).await?;
        }
        let draft = self.draft(target, migrated).await?;
        Ok(Drafted { way_back: self, draft, work })
    }

    /// What the servers have to be set up and allowed for, with the SQL that mends it.
    async fn prove_possible(&self, target: &Client) -> Result<()> {
        let blocked = |text: String, mend: String| {
            Err(Error::new(ErrorKind::Blocked, text).hint(format!("On {mend}, {WITHOUT}.")))
        };
        let level: String = target.query_typed_one("SELECT pg_catalog.current_setting('wal_level')", &[]).await?.get(0);
        if level != "logical" {
            return blocked(
                format!("the target's wal_level is {level}, and its changes can be read only at the level logical"),
                "the target: ALTER SYSTEM SET wal_level = 'logical', then restart it".into(),
            );
        }
        if let Some(needed) = self.caps.lacking_for_way_back(self.migration.apply_workers) {
            return blocked(
                format!(
                    "writing back with {} apply workers takes {needed} connections to the source",
                    self.migration.apply_workers
                ),
                format!("the command line of `migrate`: --max-source-connections {needed} or more"),
            );
        }
        let source = self.source.connect(&self.application_name).await?;
        if ApplyRole::allowed(&source).await? == ApplyRole::Origin {
            return blocked(
                "on the source our role may not set session_replication_role, so what is written back would fire triggers there".into(),
                "the source: GRANT SET ON PARAMETER session_replication_role TO our role (from PostgreSQL 15 on)".into(),
            );
        }
        Ok(())
    }

    /// Writes the ledger of the way back on the source, as things are now. It does not count before [`Drafted::arm`] and the decision.
    /// Answers its name.
    async fn draft(&self, target: &Client, migrated: &[Table]) -> Result<String> {
        let mut replication = ReplicationSession::connect(&self.target, &self.application_name).await?;
        let server = replication.identify_system().await.context(|| "asking the target who it is".into())?;
        replication.close().await;
        let mut tables = on_target(target, migrated).await?;
        if self.migration.scope.data_only {
            has_no_more_columns(&tables, migrated)?;
        }
        let mut fingerprint = catalog::fingerprint(target).await?;
        for object in changed_back(target, &tables).await? {
            // The deciding transaction gives them back what they are on the source.
            fingerprint.insert(object, String::new());
        }
        for object in late_objects(target).await? {
            // It makes them, and leaves some to be validated (H23).
            fingerprint.entry(object).or_default();
        }
        let mut source = self.source.connect(&self.application_name).await?;
        if self.migration.scope.data_only {
            // Each server has made its identity columns itself.
            existing::take_identity_from(&source, &mut tables).await?;
        }
        let names = self.names();
        let migration = Migration {
            source_system: server.system_id,
            source_timeline: i32::try_from(server.timeline).unwrap_or(i32::MAX),
            source_database: self.target.database().to_owned(),
            slot: names.slot,
            publication: names.publication,
            insert_only_publication: names.insert_only_publication,
            binary: tables.iter().all(Table::binary_safe),
            phase: Phase::Following,
            // Proved: see above.
            apply_role: ApplyRole::Replica,
            ..self.migration.clone()
        };
        let tables: Vec<(Table, bool)> = tables
            .into_iter()
            .map(|table| (!table.has_usable_identity(), table))
            .map(|(only, table)| (table, only))
            .collect();
        let name = super::unique();
        let draft = Draft { name: &name, migration: &migration, tables: &tables, fingerprint: &fingerprint };
        ledger::draft(&mut source, &draft).await?;
        Ok(name)
    }
}

impl Drafted<'_> {
    /// Decided: from here on the slot is the stream's.
    pub(super) fn is_open(&mut self) {
        *self.work = true;
    }

    /// Has the way back begin here and now: all that was applied is before, and nobody but us has written.
    ///
    /// # Errors
    /// Whatever the servers say.
    pub(super) async fn arm(&self, source: &Client, target: &Client) -> Result<()> {
        let release: PgLsn = target
            .query_typed_one("SELECT pg_catalog.pg_current_wal_insert_lsn()", &[])
            .await
            .context(|| "reading where the way back begins".into())?
            .get(0);
        tracing::debug!(release = %Lsn::from(release), slot = self.way_back.names().slot, "the way back begins");
        ledger::begin_at(source, &self.draft, release.into()).await
    }
}

/// Waits until the slot of the way back is there.
///
/// # Errors
/// `Aborted` when it cannot be.
pub(super) async fn wait_until_ready(mut arming: watch::Receiver<Arming>) -> Result<()> {
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

/// Makes the slot; anew, a few times, where a TRUNCATE was applied meanwhile, because it may then be unable to decode (H37).
async fn make_slot(target: &Client, name: &str) -> Result<()> {
    for _ in 0..slot::ATTEMPTS_BESIDE_CHANGES {
        slot::drop(target, name).await?;
        let before = slot::Relations::read(target).await?;
        // Waits for every transaction that is open on the target's cluster (H33); nobody waits for this.
        target
            .query_typed("SELECT pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput')", &[(&name, Type::TEXT)])
            .await
            .context(|| format!("creating the slot {name} on the target"))?;
        if slot::Relations::read(target).await? == before {
            break;
        }
        tracing::info!("tables of the target were emptied or altered while the slot of the way back was made");
    }
    Ok(())
}

/// The migrated tables as the target has them; identity columns, triggers and rules as the source has them, because the decision makes
/// them so.
async fn on_target(target: &Client, migrated: &[Table]) -> Result<Vec<Table>> {
    let mut tables = catalog::tables(target).await?;
    tables.retain(|table| migrated.iter().any(|other| same_name(table, other)));
    for table in &mut tables {
        let Some(other) = migrated.iter().find(|other| same_name(table, other)) else { continue };
        table.firing.clone_from(&other.firing);
        for column in &mut table.columns {
            column.identity_always =
                other.columns.iter().any(|other| other.name == column.name && other.identity_always);
        }
    }
    if let Some(gone) = migrated.iter().find(|table| !tables.iter().any(|other| same_name(table, other))) {
        return Err(Error::new(ErrorKind::Blocked, format!("the target has no table {}", gone.qualified()))
            .hint(format!("Somebody removed it there: `walferry resync` copies it again; {WITHOUT}.")));
    }
    Ok(tables)
}

/// With --data-only the target's tables can have columns that the old server's lack.
fn has_no_more_columns(tables: &[Table], migrated: &[Table]) -> Result<()> {
    for (table, other) in
        tables.iter().filter_map(|table| Some((table, migrated.iter().find(|other| same_name(table, other))?)))
    {
        let is_new = |column: &&catalog::Column| !other.columns.iter().any(|known| known.name == column.name);
        if let Some(column) = table.columns.iter().find(is_new) {
            let text =
                format!("the old server's table {} has no column {}", table.qualified(), sql::identifier(&column.name));
            return Err(Error::new(ErrorKind::Blocked, text).hint(format!("Add it there, {WITHOUT}.")));
        }
    }
    Ok(())
}

fn same_name(one: &Table, other: &Table) -> bool {
    (&one.schema, &one.name) == (&other.schema, &other.name)
}

/// How the catalog's fingerprint names what the deciding transaction makes: the triggers, constraints and rules that the source has
/// and the target does not, with their comments, and those that are valid only later.
async fn late_objects(target: &Client) -> Result<BTreeSet<String>> {
    let late = AtCutover::plan(target).await?;
    if late == AtCutover::default() {
        return Ok(BTreeSet::new());
    }
    let of_source = ledger::fingerprint(target).await?;
    let made = |object: &String| {
        let object = object.strip_prefix("comment on ").unwrap_or(object);
        ["trigger ", "constraint ", "rule ", "event trigger "].iter().any(|kind| object.starts_with(kind))
    };
    let made = of_source.into_keys().filter(made);
    Ok(made.chain(late.later().iter().cloned()).collect())
}

/// How the catalog's fingerprint names what the decision changes: the columns that are `GENERATED ALWAYS AS IDENTITY`, and the triggers
/// and rules that fire in replica sessions.
async fn changed_back(target: &Client, tables: &[Table]) -> Result<Vec<String>> {
    const RULE: &str = "";
    let objects = tables.iter().flat_map(|table| {
        let always = table.columns.iter().filter(|column| column.identity_always);
        let columns = always.map(|column| ("column %I of table %I.%I", column.name.as_str()));
        let firing = table
            .firing
            .iter()
            .map(|firing| (if firing.is_rule { RULE } else { "trigger %I on table %I.%I" }, firing.name.as_str()));
        columns.chain(firing).map(|(form, name)| ((form, name), (table.schema.as_str(), table.name.as_str())))
    });
    type Texts<'a> = Vec<&'a str>;
    let ((forms, names), (schemas, tables)): ((Texts<'_>, Texts<'_>), (Texts<'_>, Texts<'_>)) = objects.unzip();
    if forms.is_empty() {
        return Ok(Vec::new());
    }
    let rows = target
        .query_typed(
            // The fingerprint has the server's own description of a rule.
            "SELECT CASE WHEN f <> '' THEN format(f, o, s, t) \
                         ELSE (SELECT pg_catalog.pg_describe_object('pg_catalog.pg_rewrite'::regclass, w.oid, 0) FROM pg_catalog.pg_rewrite w \
                               WHERE w.ev_class = pg_catalog.to_regclass(format('%I.%I', s, t)) AND w.rulename = o) END \
             FROM unnest($1, $2, $3, $4) u(f, o, s, t)",
            &[
                (&forms, Type::TEXT_ARRAY),
                (&names, Type::TEXT_ARRAY),
                (&schemas, Type::TEXT_ARRAY),
                (&tables, Type::TEXT_ARRAY),
            ],
        )
        .await?;
    Ok(rows.iter().filter_map(|row| row.get(0)).collect())
}
