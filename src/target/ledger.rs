//! The ledger: the one truth about what the target holds (invariant I2).
//!
//! | table | one row is |
//! |---|---|
//! | `migration` | the migration: who it is, which slot and publications are its own, which phase it is in |
//! | `snapshot` | a snapshot that tables were copied under, with the WAL insert position read after it (I3, H6) |
//! | `source_table` | a migrated table as it is at the position of the apply, and the snapshot its rows come from |
//! | `part` | a range of pages of a table, and whether it has been copied |
//! | `schema_item` | a statement of the schema that `pg_dump` wrote, and whether it has been run |
//! | `fingerprint` | an object of the source and the hash of its definition (I11) |
//! | `apply_progress` | how far one apply session has come |
//! | `large_object`, `materialized_view` | what is in no stream, and the marker that it had when it was last brought up to date ([`crate::unstreamed`] makes them where there is anything) |
//! | `replica_identity` | what a table of the source was identified by, before walferry changed that (there only where it did) |
//!
//! A function here that takes a session runs inside whatever transaction that session has open: the caller makes
//! the row and the work one transaction.

mod heal;
mod part;
mod replica_identity;
mod schema_item;
mod upgrade;
mod way_back;

use std::collections::BTreeMap;

use futures_util::future::try_join5;
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tokio_postgres::types::{PgLsn, Type};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::record;
use crate::source::catalog::Table;
use crate::source::scope::Scope;
use crate::source::snapshot::SnapshotData;
use crate::target::role::ApplyRole;
use crate::target::route::Routing;
use crate::timescale;
use crate::timescale::declaration::Hypertable;

pub use heal::{Redefinition, Resynced, ThrownAway, compare_again, record_resynced};
pub use part::{Part, part_copied, plan_copy};
pub use replica_identity::{note_replica_identities, replica_identities};
pub use schema_item::{SchemaItem, Section, mark_done, pending_items};
pub use upgrade::renew_fingerprint;
pub use way_back::{Draft, WayBack, begin_at, complete_fingerprint, decide, draft, finished, prepared};

/// The version of the ledger's tables that this walferry writes (H18).
///
/// - 1: the first.
/// - 2: `migration.snapshot_floor`, `migration.queue` and `source_table.compared`.
/// - 3: `migration.way_back`.
/// - 4: `migration.apply_role`, and items of the schema that wait for the cutover or come after it.
/// - 5: `migration.scope`.
pub const FORMAT: i32 = 5;

/// The statements that make a ledger.
fn new_ledger() -> String {
    format!("{TABLES}{}", record::ledger::TABLE)
}

const TABLES: &str = "
CREATE SCHEMA walferry;
COMMENT ON SCHEMA walferry IS 'walferry: the ledger of a running migration; `walferry clean` removes it';
CREATE TABLE walferry.migration (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    format integer NOT NULL,
    id text NOT NULL,
    source_system text NOT NULL,
    source_timeline integer NOT NULL,
    source_database text NOT NULL,
    slot text NOT NULL,
    publication text NOT NULL,
    insert_only_publication text NOT NULL,
    binary_format boolean NOT NULL DEFAULT false,
    apply_workers integer NOT NULL,
    phase text NOT NULL,
    consistent_point pg_lsn,
    pre_data_restored boolean NOT NULL DEFAULT false,
    post_data_restored boolean NOT NULL DEFAULT false,
    snapshot_floor bigint NOT NULL DEFAULT 0,
    queue text NOT NULL DEFAULT 'queue',
    fence jsonb,
    cutover jsonb,
    way_back text,
    apply_role text NOT NULL DEFAULT 'replica',
    scope text,
    started_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE walferry.snapshot (
    id integer PRIMARY KEY,
    first_running bigint NOT NULL,
    next bigint NOT NULL,
    running bigint[] NOT NULL,
    insert_lsn pg_lsn NOT NULL
);
CREATE TABLE walferry.source_table (
    relid bigint PRIMARY KEY,
    definition jsonb NOT NULL,
    insert_only boolean NOT NULL,
    routing text NOT NULL,
    snapshot integer REFERENCES walferry.snapshot,
    copied boolean NOT NULL DEFAULT false,
    compared boolean NOT NULL DEFAULT false,
    rows_copied bigint NOT NULL DEFAULT 0
);
CREATE TABLE walferry.part (
    relid bigint NOT NULL REFERENCES walferry.source_table,
    part integer NOT NULL,
    first_page bigint NOT NULL,
    end_page bigint,
    copied boolean NOT NULL DEFAULT false,
    rows bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (relid, part)
);
CREATE TABLE walferry.schema_item (
    position integer PRIMARY KEY,
    section text NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    relid bigint,
    statement text NOT NULL,
    done boolean NOT NULL DEFAULT false
);
CREATE TABLE walferry.fingerprint (object text PRIMARY KEY, hash text NOT NULL);
CREATE TABLE walferry.apply_progress (
    worker integer PRIMARY KEY,
    applied pg_lsn NOT NULL
) WITH (fillfactor = 50);
";

/// Who a migration is, and what on the source belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// Eight hexadecimal digits, also in the names of slot and publications.
    pub id: String,
    /// `pg_control_system().system_identifier` of the source.
    pub source_system: String,
    /// The source's timeline when the slot was made.
    pub source_timeline: i32,
    /// The database that is moved.
    pub source_database: String,
    /// The replication slot.
    pub slot: String,
    /// The publication of the tables with a usable replica identity.
    pub publication: String,
    /// The publication of the tables without one: inserts and truncates only (H27).
    pub insert_only_publication: String,
    /// Whether columns go over the wire in binary.
    pub binary: bool,
    /// How many sessions apply, which the routing of changes depends on.
    pub apply_workers: usize,
    /// The last phase that was entered.
    pub phase: Phase,
    /// The slot's consistent point; `None` until slot, catalog and schema are all recorded.
    pub consistent_point: Option<Lsn>,
    /// Whether the target has the schema's tables, types and functions.
    pub pre_data_restored: bool,
    /// Whether all of the schema is there.
    pub post_data_restored: bool,
    /// No snapshot with a smaller xmin may serve a table (H1).
    pub snapshot_floor: u64,
    /// The queue's directory in the state directory: another for each slot, so that what one slot sent is never taken for
    /// what another did.
    pub queue: String,
    /// What became of the way back; `None` where there is none.
    pub way_back: Option<WayBack>,
    /// In which role rows are written; never changed (H23).
    pub apply_role: ApplyRole,
    /// What of the database is moved.
    pub scope: Scope,
}

/// The phases of a migration, as the ledger knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Publications, slot and schema are being made; starting again starts over.
    Preparing,
    /// Tables are being copied, and their indexes built.
    Copying,
    /// All tables are copied; the queue is being drained.
    CatchingUp,
    /// The target is complete but for the lag.
    Following,
    /// The target is the primary.
    CutOver,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Preparing => "preparing",
            Phase::Copying => "copying",
            Phase::CatchingUp => "catching_up",
            Phase::Following => "following",
            Phase::CutOver => "cut_over",
        }
    }

    fn parse(name: &str) -> Result<Phase> {
        let all = [Phase::Preparing, Phase::Copying, Phase::CatchingUp, Phase::Following, Phase::CutOver];
        let known = all.into_iter().find(|phase| phase.name() == name);
        known.ok_or_else(|| {
            Error::new(ErrorKind::Other, format!("the ledger names a phase `{name}` that this version does not know"))
        })
    }
}

/// A table with what the ledger knows of its copy.
#[derive(Clone, Debug)]
pub struct LedgerTable {
    /// As the catalog had it when the slot was made, when it was last compared with the source again, or as the stream announced it
    /// since: what its rows are from the position of the apply on.
    pub table: Table,
    /// Its updates and deletes are not in the stream (H27).
    pub insert_only: bool,
    /// How its changes are spread over the apply sessions (H21).
    pub routing: Routing,
    /// The snapshot its rows come from; `None` before its copy has begun.
    pub snapshot: Option<i32>,
    /// Every part is on the target.
    pub copied: bool,
    /// The target has rows of it, which are compared with the snapshot instead of being copied once more.
    pub compared: bool,
    /// Rows that the finished parts held.
    pub rows_copied: i64,
}

/// Makes the ledger, with its one migration; one transaction.
///
/// # Errors
/// `Blocked` when the target holds a ledger already; else what the server says.
pub async fn create(client: &mut Client, migration: &Migration) -> Result<()> {
    let transaction = client.transaction().await?;
    transaction
        .batch_execute(&new_ledger())
        .await
        .context(|| "creating the ledger (schema walferry) on the target".into())?;
    transaction
        .execute(
            "INSERT INTO walferry.migration (format, id, source_system, source_timeline, source_database, slot, publication, \
                 insert_only_publication, apply_workers, phase, apply_role, scope) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            &[
                &FORMAT,
                &migration.id,
                &migration.source_system,
                &migration.source_timeline,
                &migration.source_database,
                &migration.slot,
                &migration.publication,
                &migration.insert_only_publication,
                &count(migration.apply_workers),
                &migration.phase.name(),
                &migration.apply_role.name(),
                &to_json(&migration.scope)?,
            ],
        )
        .await
        .context(|| "writing the migration into the ledger".into())?;
    transaction.commit().await?;
    Ok(())
}

/// The migration that the target's ledger speaks of, if it has a ledger.
///
/// # Errors
/// `Blocked` for a ledger that a newer walferry wrote (H18).
pub async fn load(client: &Client) -> Result<Option<Migration>> {
    let exists: bool = client
        .query_typed_one("SELECT pg_catalog.to_regclass('walferry.migration') IS NOT NULL", &[])
        .await
        .context(|| "looking for the ledger on the target".into())?
        .get(0);
    if !exists {
        return Ok(None);
    }
    let Some(row) = client.query_typed_opt("SELECT * FROM walferry.migration", &[]).await? else { return Ok(None) };
    let format: i32 = row.get("format");
    if format > FORMAT {
        return Err(Error::new(
            ErrorKind::Blocked,
            format!("the target's ledger has format {format}, and this walferry knows only up to {FORMAT}"),
        )
        .hint("Go on with the newer walferry that began this migration."));
    }
    if format < FORMAT {
        upgrade::to_newest(client).await?;
        return Box::pin(load(client)).await;
    }
    Ok(Some(Migration {
        id: row.get("id"),
        source_system: row.get("source_system"),
        source_timeline: row.get("source_timeline"),
        source_database: row.get("source_database"),
        slot: row.get("slot"),
        publication: row.get("publication"),
        insert_only_publication: row.get("insert_only_publication"),
        binary: row.get("binary_format"),
        apply_workers: usize::try_from(row.get::<_, i32>("apply_workers")).unwrap_or(1),
        phase: Phase::parse(row.get("phase"))?,
        consistent_point: row.get::<_, Option<PgLsn>>("consistent_point").map(Lsn::from),
        pre_data_restored: row.get("pre_data_restored"),
        post_data_restored: row.get("post_data_restored"),
        snapshot_floor: row.get::<_, i64>("snapshot_floor").cast_unsigned(),
        queue: row.get("queue"),
        way_back: row.get::<_, Option<&str>>("way_back").map(WayBack::parse).transpose()?,
        apply_role: ApplyRole::parse(row.get("apply_role"))?,
        scope: row.get::<_, Option<&str>>("scope").map(from_json).transpose()?.unwrap_or_default(),
    }))
}

/// Enters a phase, durably: all that earlier transactions wrote asynchronously is on disk when this returns.
///
/// # Errors
/// Whatever the server says.
pub async fn enter_phase(client: &Client, phase: Phase) -> Result<()> {
    let statement = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; UPDATE walferry.migration SET phase = '{}'; COMMIT",
        phase.name()
    );
    client.batch_execute(&statement).await.context(|| format!("entering the phase {}", phase.name()))
}

/// What the preparation found out, written as one transaction: without it nothing of the preparation counts.
pub struct Prepared<'a> {
    /// The slot's consistent point.
    pub consistent_point: Lsn,
    /// The slot's snapshot, number 0.
    pub snapshot: &'a SnapshotData,
    /// The tables under it, and which are insert-only.
    pub tables: &'a [(Table, bool)],
    /// The schema's statements, in `pg_dump`'s order.
    pub items: &'a [SchemaItem],
    /// The catalog's fingerprint under it.
    pub fingerprint: &'a BTreeMap<String, String>,
    /// Whether the stream is binary.
    pub binary: bool,
}

/// Records the end of the preparation (H1: the slot's snapshot is in the ledger before anything uses it).
///
/// # Errors
/// Whatever the server says; nothing is recorded then.
pub async fn record_prepared(client: &mut Client, migration: &Migration, prepared: &Prepared<'_>) -> Result<()> {
    let relids: Vec<i64> = prepared.tables.iter().map(|(table, _)| i64::from(table.relid)).collect();
    let definitions = prepared.tables.iter().map(|(table, _)| to_json(table)).collect::<Result<Vec<String>>>()?;
    let insert_only: Vec<bool> = prepared.tables.iter().map(|(_, insert_only)| *insert_only).collect();
    let routings: Vec<&str> = prepared.tables.iter().map(|(table, _)| Routing::of(table).name()).collect();
    let sections: Vec<&str> = prepared.items.iter().map(|item| item.section.name()).collect();
    let kinds: Vec<&str> = prepared.items.iter().map(|item| item.kind.as_str()).collect();
    let names: Vec<&str> = prepared.items.iter().map(|item| item.name.as_str()).collect();
    let item_relids: Vec<Option<i64>> = prepared.items.iter().map(|item| item.relid.map(i64::from)).collect();
    let statements: Vec<&str> = prepared.items.iter().map(|item| item.statement.as_str()).collect();
    let (objects, hashes): (Vec<&str>, Vec<&str>) =
        prepared.fingerprint.iter().map(|(object, hash)| (object.as_str(), hash.as_str())).unzip();
    let consistent_point = PgLsn::from(prepared.consistent_point);
    let transaction = client.transaction().await?;
    insert_snapshot(transaction.client(), 0, prepared.snapshot).await?;
    // Sent in this order without waiting for each answer.
    try_join5(
        transaction.execute_typed(
            "INSERT INTO walferry.source_table (relid, definition, insert_only, routing) \
             SELECT r, d::jsonb, i, g FROM unnest($1, $2, $3, $4) u(r, d, i, g)",
            &[
                (&relids, Type::INT8_ARRAY),
                (&definitions, Type::TEXT_ARRAY),
                (&insert_only, Type::BOOL_ARRAY),
                (&routings, Type::TEXT_ARRAY),
            ],
        ),
        transaction.execute_typed(
            "INSERT INTO walferry.schema_item (position, section, kind, name, relid, statement) \
             SELECT (row_number() OVER ())::int4, s, k, n, r, t FROM unnest($1, $2, $3, $4, $5) u(s, k, n, r, t)",
            &[
                (&sections, Type::TEXT_ARRAY),
                (&kinds, Type::TEXT_ARRAY),
                (&names, Type::TEXT_ARRAY),
                (&item_relids, Type::INT8_ARRAY),
                (&statements, Type::TEXT_ARRAY),
            ],
        ),
        transaction.execute_typed(
            "INSERT INTO walferry.fingerprint SELECT * FROM unnest($1, $2)",
            &[(&objects, Type::TEXT_ARRAY), (&hashes, Type::TEXT_ARRAY)],
        ),
        transaction.execute_typed(
            "INSERT INTO walferry.apply_progress SELECT worker, $2 FROM generate_series(0, $1 - 1) worker",
            &[(&count(migration.apply_workers), Type::INT4), (&consistent_point, Type::PG_LSN)],
        ),
        transaction.execute_typed(
            "UPDATE walferry.migration SET consistent_point = $1, binary_format = $2, snapshot_floor = $3, phase = 'copying'",
            &[
                (&consistent_point, Type::PG_LSN),
                (&prepared.binary, Type::BOOL),
                (&prepared.snapshot.xmax.cast_signed(), Type::INT8),
            ],
        ),
    )
    .await
    .context(|| "recording the tables and the schema in the ledger".into())?;
    transaction.commit().await.context(|| "recording the slot, its snapshot and the schema in the ledger".into())
}

/// Every table of the migration, largest first.
///
/// # Errors
/// Whatever the server says.
pub async fn tables(client: &Client) -> Result<Vec<LedgerTable>> {
    let rows = client
        .query_typed(
            "SELECT definition::text, insert_only, snapshot, copied, rows_copied, routing, compared, \
                    (SELECT (scope::jsonb->'hypertables')::text FROM walferry.migration) FROM walferry.source_table \
             ORDER BY (definition->>'bytes')::int8 DESC, relid",
            &[],
        )
        .await
        .context(|| "reading the ledger's tables".into())?;
    let declared: Option<&str> = rows.first().and_then(|row| row.get(7));
    let declared: Vec<Hypertable> = declared.map(from_json).transpose()?.unwrap_or_default();
    let marks = timescale::recreate::marks(client).await?;
    rows.iter()
        .map(|row| {
            Ok(LedgerTable {
                table: marks.mark(timescale::marked(from_json(row.get(0))?, &declared)),
                insert_only: row.get(1),
                snapshot: row.get(2),
                copied: row.get(3),
                rows_copied: row.get(4),
                compared: row.get(6),
                routing: Routing::parse(row.get(5)).ok_or_else(|| {
                    Error::new(ErrorKind::Other, "the ledger has a routing that this version does not know")
                })?,
            })
        })
        .collect()
}

/// Every snapshot that rows on the target come from.
///
/// # Errors
/// Whatever the server says.
pub async fn snapshots(client: &Client) -> Result<BTreeMap<i32, SnapshotData>> {
    let rows =
        client.query_typed("SELECT id, first_running, next, running, insert_lsn FROM walferry.snapshot", &[]).await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let running: Vec<i64> = row.get(3);
            let data = SnapshotData {
                xmin: row.get::<_, i64>(1).cast_unsigned(),
                xmax: row.get::<_, i64>(2).cast_unsigned(),
                running: running.into_iter().map(i64::cast_unsigned).collect(),
                insert_lsn: row.get::<_, PgLsn>(4).into(),
            };
            (row.get(0), data)
        })
        .collect())
}

/// With the number after the newest's.
pub(super) async fn insert_next_snapshot(client: &Client, snapshot: &SnapshotData) -> Result<()> {
    let next: i32 = client.query_typed_one("SELECT max(id) + 1 FROM walferry.snapshot", &[]).await?.get(0);
    insert_snapshot(client, next, snapshot).await
}

async fn insert_snapshot(client: &Client, id: i32, snapshot: &SnapshotData) -> Result<()> {
    let running: Vec<i64> = snapshot.running.iter().map(|xid| xid.cast_signed()).collect();
    client
        .execute(
            "INSERT INTO walferry.snapshot (id, first_running, next, running, insert_lsn) VALUES ($1, $2, $3, $4, $5)",
            &[
                &id,
                &snapshot.xmin.cast_signed(),
                &snapshot.xmax.cast_signed(),
                &running,
                &PgLsn::from(snapshot.insert_lsn),
            ],
        )
        .await
        .context(|| "recording a snapshot in the ledger".into())?;
    Ok(())
}

/// How far each apply session has come, by its number.
///
/// # Errors
/// Whatever the server says.
pub async fn apply_progress(client: &Client) -> Result<Vec<Lsn>> {
    let rows = client
        .query_typed("SELECT applied FROM walferry.apply_progress ORDER BY worker", &[])
        .await
        .context(|| "reading the apply's progress".into())?;
    Ok(rows.into_iter().map(|row| row.get::<_, PgLsn>(0).into()).collect())
}

/// Makes all that this session has seen as committed durable: our asynchronous commits among it (I2).
///
/// # Errors
/// Whatever the server says. A server that crashed in between has ended the session, so this then fails.
pub async fn make_durable(client: &Client) -> Result<()> {
    // Commits are flushed in order: this one has to be a real one, with an xid and a record of its own.
    client
        .batch_execute("BEGIN; SET LOCAL synchronous_commit = on; SELECT pg_catalog.txid_current(); COMMIT")
        .await
        .context(|| "making the ledger durable on the target".into())
}

/// The catalog's fingerprint as it was recorded.
///
/// # Errors
/// Whatever the server says.
pub async fn fingerprint(client: &Client) -> Result<BTreeMap<String, String>> {
    let rows = client.query_typed("SELECT object, hash FROM walferry.fingerprint", &[]).await?;
    Ok(rows.into_iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))
}

fn from_json<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::new(ErrorKind::Other, format!("reading the ledger: {error}")))
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
