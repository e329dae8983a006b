//! The slot and its publications: everything that walferry makes on the source to see its changes.
//!
//! Order matters (H2, H8): the publications first, then the slot with its snapshot, then whatever is read of the
//! source under that snapshot. A table that was added to a publication later would lose what was in flight.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::catalog::Table;
use super::replication::ReplicationSession;
use super::snapshot::{HeldSnapshot, SnapshotData};
use super::version::Version;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::sql;

/// How often the slot is asked for again when its snapshot is too large (H7).
const ATTEMPTS_WITH_SNAPSHOT: usize = 3;

/// How often a slot is made because tables got other files meanwhile (see [`Relations`]). Where a TRUNCATE comes all the time, such
/// a slot is taken in the end: of 66 beside truncating and writing sessions, 47 could be decoded.
pub const ATTEMPTS_BESIDE_CHANGES: usize = 5;

/// What to do when the stream cannot go on where it was.
pub const RESYNC: &str = "`walferry resync` with the options of `migrate` makes a new slot, compares every table and copies only what \
    differs; then the migration goes on.";

/// A new slot and the snapshot that fits it.
pub struct NewSlot {
    /// Every transaction that commits at or after it comes over the stream.
    pub consistent_point: Lsn,
    /// What had been committed before.
    pub snapshot: HeldSnapshot,
}

/// A slot as the server shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// What the source holds as confirmed by us.
    pub confirmed_flush: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`; `None` before PostgreSQL 13.
    pub wal_status: Option<String>,
    /// The backend that reads from it.
    pub active_pid: Option<i32>,
    /// How many bytes of WAL the source keeps because of it; `None` when it has lost them.
    pub retained_bytes: Option<i64>,
}

impl SlotState {
    /// Whether the server still has what it needs to read from it.
    pub fn is_usable(&self) -> bool {
        self.wal_status.as_deref() != Some("lost")
    }
}

/// Makes both publications anew: one for the tables whose updates and deletes can be told, one for inserts only
/// (H27: a table without usable identity in the first would make the application's own updates fail).
///
/// # Errors
/// Whatever the server says, with the statement that gives the right.
pub async fn create_publications(
    client: &Client,
    publication: &str,
    insert_only: &str,
    tables: &[Table],
) -> Result<()> {
    drop_publications(client, publication, insert_only).await?;
    // A TRUNCATE that is not in the stream is in the fingerprint.
    let truncate = if Version::of(client).await?.streams_truncate() { ", truncate" } else { "" };
    let list = |wanted: bool| {
        let names: Vec<String> = tables
            .iter()
            .filter(|table| !table.unlogged && table.has_usable_identity() == wanted)
            .map(|table| format!("ONLY {}", table.qualified()))
            .collect();
        if names.is_empty() { String::new() } else { format!(" FOR TABLE {}", names.join(", ")) }
    };
    let statements = [(publication, list(true), "insert, update, delete"), (insert_only, list(false), "insert")];
    for (name, tables, events) in statements {
        let statement =
            format!("CREATE PUBLICATION {}{tables} WITH (publish = '{events}{truncate}')", sql::identifier(name));
        client.batch_execute(&statement).await.context(|| format!("creating the publication {name} on the source"))?;
    }
    Ok(())
}

/// Whether both publications are what [`create_publications`] makes of these tables.
///
/// # Errors
/// Whatever the server says.
pub async fn are_published(client: &Client, publication: &str, insert_only: &str, tables: &[Table]) -> Result<bool> {
    let rows = client
        .query(
            "SELECT r.prrelid, p.pubname = $2 FROM pg_catalog.pg_publication_rel r \
             JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid WHERE p.pubname IN ($1, $2)",
            &[&publication, &insert_only],
        )
        .await
        .context(|| format!("looking at the tables of the publication {publication}"))?;
    let published: BTreeSet<(u32, bool)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let mut wanted = BTreeSet::new();
    for table in tables.iter().filter(|table| !table.unlogged) {
        wanted.insert((table.relid, !table.has_usable_identity()));
    }
    Ok(published == wanted)
}

/// Drops both publications, where they are there.
///
/// # Errors
/// Whatever the server says.
pub async fn drop_publications(client: &Client, publication: &str, insert_only: &str) -> Result<()> {
    let names = sql::identifiers([publication, insert_only]);
    // Not in one statement of several commands, so that a missing one leaves no notice of an aborted transaction.
    client
        .batch_execute(&format!("DROP PUBLICATION IF EXISTS {names}"))
        .await
        .context(|| format!("dropping the publications {publication} and {insert_only} on the source"))
}

/// Makes the slot, on the source or on a standby of it, and a snapshot of the source for the tables.
///
/// The call returns once every transaction that is open on the source's cluster has ended (H33).
///
/// # Errors
/// Whatever the server says.
pub async fn create(
    source: &ConnectionSpec,
    standby: Option<&ConnectionSpec>,
    application_name: &str,
    slot: &str,
) -> Result<NewSlot> {
    if let Some(standby) = standby {
        let consistent_point = super::standby::create_slot(source, standby, application_name, slot).await?;
        return with_late_snapshot(source, application_name, consistent_point).await;
    }
    for attempt in 1..=ATTEMPTS_WITH_SNAPSHOT {
        match create_with_snapshot(source, application_name, slot).await {
            Err(error) if error.to_string().contains("initial slot snapshot too large") => {
                tracing::warn!(attempt, "the source has too many open transactions for the slot's snapshot (H7)");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
            outcome => return outcome,
        }
    }
    create_without_snapshot(source, application_name, slot).await
}

async fn create_with_snapshot(source: &ConnectionSpec, application_name: &str, slot: &str) -> Result<NewSlot> {
    let mut session = ReplicationSession::connect(source, application_name).await?;
    session.simple_query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let how = version(&session).use_snapshot();
    let command = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput {how}", sql::identifier(slot));
    let made = session.simple_query(&command).await.context(|| format!("creating the slot {slot} on the source"))?;
    let consistent_point = lsn_at(&made, 1)?;
    let taken = session
        .simple_query("SELECT pg_catalog.txid_current_snapshot()::text, pg_catalog.pg_export_snapshot()")
        .await?;
    let insert_lsn = lsn_at(&session.simple_query("SELECT pg_catalog.pg_current_wal_insert_lsn()").await?, 0)?;
    let data = SnapshotData::parse(text_at(&taken, 0)?, insert_lsn)?;
    let name = text_at(&taken, 1)?.to_owned();
    Ok(NewSlot { consistent_point, snapshot: HeldSnapshot::of_replication_session(name, data, session) })
}

/// The other way (H7): a slot without a snapshot, and a snapshot so late that nothing can be in neither.
async fn create_without_snapshot(source: &ConnectionSpec, application_name: &str, slot: &str) -> Result<NewSlot> {
    let mut session = ReplicationSession::connect(source, application_name).await?;
    let how = version(&session).no_snapshot();
    let command = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput {how}", sql::identifier(slot));
    let made = session.simple_query(&command).await.context(|| format!("creating the slot {slot} on the source"))?;
    let consistent_point = lsn_at(&made, 1)?;
    session.close().await;
    with_late_snapshot(source, application_name, consistent_point).await
}

async fn with_late_snapshot(source: &ConnectionSpec, application_name: &str, consistent_point: Lsn) -> Result<NewSlot> {
    let mut session = ReplicationSession::connect(source, application_name).await?;
    // Whatever began before now has a smaller xid than this one. The xmax of a snapshot would not do: it is the xid after the
    // last that has ended, and the commit that hangs after its record is in the WAL can be newer.
    let assigned = session.simple_query("SELECT pg_catalog.txid_current()::text").await?;
    let text = text_at(&assigned, 0)?;
    let next = text.parse().map_err(|_| Error::new(ErrorKind::Other, format!("{text} is not a transaction's id")))?;
    let identity = session.identify_system().await?;
    let server = ServerIdentity { system: identity.system_id, timeline: identity.timeline };
    let snapshot = HeldSnapshot::take(source, application_name, &server, next).await?;
    Ok(NewSlot { consistent_point, snapshot })
}

/// All relations of the source's database that have rows, each with the version of its row in `pg_class`.
///
/// What they are for (H37): PostgreSQL decodes a change under a snapshot of its catalogs, and the first of those that a new slot
/// works with lacks transactions that were committed in the first phase of its making (`SNAPBUILD_BUILDING_SNAPSHOT`, while it
/// waits for the transactions that were open when it began). Where one of them gave a table new files (TRUNCATE, VACUUM FULL, a
/// rewriting ALTER TABLE, a table that is new), the slot can come to changes of files that it knows of no table for, "could not
/// map filenode … to relation OID", and never gets past them. Every such transaction is visible to the slot's snapshot, and was
/// not before the slot was asked for: where no row of `pg_class` differs between the two, there was none. The copied rows are not
/// concerned: the slot's snapshot for them is built anew at the end. PostgreSQL's hackers discuss it as "Historic snapshot doesn't
/// track txns committed in BUILDING_SNAPSHOT state"; 15.18 has it, and the development sources of 2026 still.
#[derive(Debug, PartialEq, Eq)]
pub struct Relations(BTreeMap<u32, Relation>);

#[derive(Debug, PartialEq, Eq)]
struct Relation {
    /// For a TOAST table that of its table.
    name: String,
    /// The transaction that wrote its row in `pg_class`. What ANALYZE and VACUUM note there is written in place, and leaves it.
    written_by: String,
}

impl Relations {
    /// Reads them, under whatever snapshot the session has.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn read(client: &Client) -> Result<Relations> {
        // Of partitioned tables too: a partition is attached there. Temporary and unlogged ones are not in the WAL.
        let rows = client
            .query_typed(
                "SELECT class.oid, format('%I.%I', nspname, coalesce(owner.relname, class.relname)), class.xmin::text \
                 FROM pg_catalog.pg_class class LEFT JOIN pg_catalog.pg_class owner ON owner.reltoastrelid = class.oid \
                 JOIN pg_catalog.pg_namespace ON pg_namespace.oid = coalesce(owner.relnamespace, class.relnamespace) \
                 WHERE class.relkind IN ('r', 'p', 'm', 't') AND class.relpersistence = 'p'",
                &[],
            )
            .await
            .context(|| "reading which version of each table's definition there is".into())?;
        let relation = |row: &tokio_postgres::Row| Relation { name: row.get(1), written_by: row.get(2) };
        Ok(Relations(rows.iter().map(|row| (row.get(0), relation(row))).collect()))
    }

    /// The names of those that are new, gone or written since an earlier reading.
    pub fn changed_since<'a>(&'a self, before: &'a Relations) -> BTreeSet<&'a str> {
        let new = self.0.iter().filter(|(oid, now)| before.0.get(oid) != Some(now));
        let gone = before.0.iter().filter(|(oid, _)| !self.0.contains_key(oid));
        new.chain(gone).map(|(_, relation)| relation.name.as_str()).collect()
    }
}

/// Which server it is that the migration began on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerIdentity {
    /// The system identifier.
    pub system: String,
    /// The timeline.
    pub timeline: u32,
}

impl ServerIdentity {
    /// Compares the server at the other end with the one that the migration began on (H15): a name can lead to another one from
    /// one connection to the next.
    ///
    /// # Errors
    /// `Gap` when it is another, or has failed over.
    pub fn prove(&self, found: &ServerIdentity) -> Result<()> {
        let gap = |text: String, hint: &str| Err(Error::new(ErrorKind::Gap, text).hint(hint));
        if found.system != self.system {
            return gap(
                format!(
                    "this is another server: its system identifier is {}, the migration's source has {}",
                    found.system, self.system
                ),
                "Check --source: walferry has to connect to the server that the migration began on, or after `walferry resync` to a \
                 physical copy of it such as a promoted standby.",
            );
        }
        if found.timeline != self.timeline {
            return gap(
                format!(
                    "the source is on timeline {} and was on {} when its slot was made: it has failed over or was restored, \
                     and changes may be missing on it or here",
                    found.timeline, self.timeline
                ),
                RESYNC,
            );
        }
        Ok(())
    }
}

/// How the slot stands; `None` when there is none of that name.
///
/// # Errors
/// Whatever the server says.
pub async fn state(client: &Client, slot: &str) -> Result<Option<SlotState>> {
    let row = client
        .query_opt(
            "SELECT coalesce(confirmed_flush_lsn, '0/0'), pg_catalog.to_jsonb(s)->>'wal_status', active_pid, \
                    pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery() \
                        THEN greatest(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn()) \
                        ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn)::int8 \
             FROM pg_catalog.pg_replication_slots s WHERE slot_name = $1",
            &[&slot],
        )
        .await
        .context(|| format!("looking at the slot {slot}"))?;
    Ok(row.map(|row| SlotState {
        confirmed_flush: row.get::<_, tokio_postgres::types::PgLsn>(0).into(),
        wal_status: row.get(1),
        active_pid: row.get(2),
        retained_bytes: row.get(3),
    }))
}

/// Drops the slot, where it is there, after ending whoever still reads from it.
///
/// # Errors
/// Whatever the server says.
pub async fn drop(client: &Client, slot: &str) -> Result<()> {
    for _ in 0..100 {
        let Some(state) = state(client, slot).await? else { return Ok(()) };
        let Some(pid) = state.active_pid else {
            let dropped = client.query("SELECT pg_catalog.pg_drop_replication_slot($1)", &[&slot]).await;
            match dropped {
                Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::OBJECT_IN_USE) => continue,
                outcome => return outcome.map(|_| ()).context(|| format!("dropping the slot {slot}")),
            }
        };
        client.query("SELECT pg_catalog.pg_terminate_backend($1)", &[&pid]).await?;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    Err(Error::new(ErrorKind::Transient, format!("the slot {slot} stays in use by another session"))
        .hint("End the session that pg_replication_slots.active_pid names, then try again."))
}

/// The version of a session's server; the newest known where it does not tell.
fn version(session: &ReplicationSession) -> Version {
    Version(session.server_version().unwrap_or(u32::MAX))
}

fn text_at(rows: &[Vec<Option<String>>], column: usize) -> Result<&str> {
    let value = rows.first().and_then(|row| row.get(column)).and_then(Option::as_deref);
    value.ok_or_else(|| Error::new(ErrorKind::Other, "the server's answer has not the form that was expected"))
}

fn lsn_at(rows: &[Vec<Option<String>>], column: usize) -> Result<Lsn> {
    let text = text_at(rows, column)?;
    text.parse().map_err(|error| Error::new(ErrorKind::Other, format!("{text}: {error}")))
}
