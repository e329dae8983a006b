//! What a server has of TimescaleDB, read from the extension's catalog (schema `_timescaledb_catalog`).
//!
//! The catalog has changed over the versions: a column that a version does not have is read as its default, by way of `to_jsonb`.
//! Read are versions from 2.14 on, which keep compression settings by relation and know no other servers; of older ones only the
//! extension itself is read, so that `check` can name the version.
//!
//! Times are in the extension's own unit: microseconds since 1970-01-01 00:00 UTC for timestamps, dates and UUIDs of version 7, the
//! number itself for integer columns, and a hash for space partitions.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::error::{Context, Result};
use crate::sql;

/// The first version whose catalog is read.
pub const OLDEST: (u32, u32) = (2, 14);

/// The extension as a database has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// Such as `2.28.3`.
    pub version: String,
    /// The schema of its functions, such as `public`.
    pub schema: String,
    /// `timescaledb.license`: `timescale` or `apache`, which lacks compression, continuous aggregates and policies.
    pub license: String,
    /// What the server's `shared_preload_libraries` has loaded, and so the setting could be read.
    pub loaded: bool,
}

impl Extension {
    /// Major and minor version; zeros where it reads otherwise.
    pub fn number(&self) -> (u32, u32) {
        let mut parts = self.version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    }

    /// Whether the catalog can be read ([`OLDEST`]).
    pub fn is_readable(&self) -> bool {
        self.number() >= OLDEST
    }
}

/// One dimension of a hypertable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dimension {
    /// Its id in the extension's catalog.
    pub id: i32,
    /// The column, unquoted.
    pub column: String,
    /// The column's type by `format_type`, such as `timestamp with time zone`.
    pub column_type: String,
    /// Length of a chunk for a time dimension, in the unit of the module's head; `None` for a space dimension.
    pub interval: Option<i64>,
    /// The number of partitions of a space dimension; `None` for a time dimension.
    pub partitions: Option<i16>,
    /// `"schema"."function"` that tells the current time of an integer dimension.
    pub integer_now: Option<String>,
    /// `"schema"."function"` that partitions by; for a time dimension it makes the time of the column's value.
    pub partitioning: Option<String>,
}

/// A hypertable, those of continuous aggregates included, those inside of compression not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hypertable {
    /// Its id in the extension's catalog.
    pub id: i32,
    /// The relation's OID.
    pub relid: u32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// The schema of its chunks, unquoted.
    pub chunk_schema: String,
    /// What the names of its chunks begin with, unquoted.
    pub chunk_prefix: String,
    /// In the order of their ids; the first is that of time.
    pub dimensions: Vec<Dimension>,
    /// Whether compression (the column store) is on.
    pub compression: bool,
    /// The hypertable inside of compression, by its id.
    pub compressed_hypertable: Option<i32>,
    /// Columns that a compressed row stands for, unquoted, in order.
    pub segment_by: Vec<String>,
    /// Columns by which compressed rows are in order, such as `time DESC NULLS FIRST`; the names quoted.
    pub order_by: Vec<String>,
    /// The continuous aggregate whose rows it holds, as `"schema"."view"`.
    pub materializes: Option<String>,
    /// How many servers each chunk is on, for one of a multi-node cluster; `None` for an ordinary one.
    pub replication_factor: Option<i16>,
}

impl Hypertable {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }
}

/// Where a chunk lies in one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slice {
    /// The dimension's id.
    pub dimension: i32,
    /// The first value in it; `i64::MIN` without a beginning.
    pub start: i64,
    /// The first value past it; `i64::MAX` without an end.
    pub end: i64,
}

/// A chunk of a hypertable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its id in the extension's catalog.
    pub id: i32,
    /// The relation's OID.
    pub relid: u32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// The hypertable's id.
    pub hypertable: i32,
    /// One for each dimension, in the order of their ids.
    pub slices: Vec<Slice>,
    /// Bits: 1 compressed, 2 compressed without order, 4 frozen, 8 with rows beside the compressed ones.
    pub status: i32,
    /// The relation of its compressed rows, where there is one.
    pub compressed: Option<CompressedChunk>,
    /// It stands for all that is in tiered storage.
    pub tiered: bool,
}

/// The relation that holds the compressed rows of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompressedChunk {
    /// Its id in the extension's catalog.
    pub id: i32,
    /// The relation's OID.
    pub relid: u32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
}

impl CompressedChunk {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }
}

impl Chunk {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }

    /// Whether rows of it are compressed.
    pub fn is_compressed(&self) -> bool {
        self.status & 1 != 0
    }

    /// Whether rows stand beside the compressed ones.
    pub fn is_partial(&self) -> bool {
        self.status & 8 != 0
    }

    /// Whether its compression is held back by hand.
    pub fn is_frozen(&self) -> bool {
        self.status & 4 != 0
    }
}

/// A continuous aggregate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContinuousAggregate {
    /// Schema of the view that people ask, unquoted.
    pub schema: String,
    /// Name of it, unquoted.
    pub name: String,
    /// The hypertable that holds its rows, by its id.
    pub materialization: i32,
    /// The hypertable whose rows it aggregates, by its id: that of another aggregate where they stand on each other.
    pub raw: i32,
    /// That other aggregate, by the id of its materialization.
    pub parent: Option<i32>,
    /// The query as it was written, without what the extension makes of it.
    pub definition: String,
    /// Whether the view leaves out what is not materialized yet.
    pub materialized_only: bool,
    /// Up to where it is materialized, in the unit of the module's head; before its first refresh the least that the time's type has.
    pub watermark: Option<i64>,
}

impl ContinuousAggregate {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }
}

/// A job that the extension runs: a policy, or one of the user's own. The extension's own (ids below 1000) are not among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its id, which users speak of.
    pub id: i32,
    /// Such as `Retention Policy [1001]`.
    pub name: String,
    /// The procedure's schema, unquoted.
    pub proc_schema: String,
    /// The procedure's name, unquoted: `policy_retention`, `policy_compression`, `policy_refresh_continuous_aggregate`,
    /// `policy_reorder`, or another.
    pub proc_name: String,
    /// How often it runs, as an interval reads.
    pub schedule_interval: String,
    /// When the first run is, as a timestamp with time zone reads, where it was given.
    pub initial_start: Option<String>,
    /// Whether runs stick to a grid, and do not follow the end of the one before.
    pub fixed_schedule: bool,
    /// The time zone of that grid.
    pub timezone: Option<String>,
    /// As whom it runs, unquoted.
    pub owner: String,
    /// Whether it runs at all.
    pub scheduled: bool,
    /// The hypertable that it is for, by its id.
    pub hypertable: Option<i32>,
    /// Its options, as JSON.
    pub config: Option<String>,
}

/// All that a database has of TimescaleDB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// The extension.
    pub extension: Extension,
    /// In the order of their ids.
    pub hypertables: Vec<Hypertable>,
    /// In the order of their ids; those that only hold compressed rows are within the others.
    pub chunks: Vec<Chunk>,
    /// In the order of their materializations' ids.
    pub aggregates: Vec<ContinuousAggregate>,
    /// In the order of their ids.
    pub jobs: Vec<Job>,
}

impl Database {
    /// The hypertable with an id.
    pub fn hypertable(&self, id: i32) -> Option<&Hypertable> {
        self.hypertables.iter().find(|hypertable| hypertable.id == id)
    }

    /// The hypertables on several servers, which are not moved.
    pub fn distributed(&self) -> impl Iterator<Item = &Hypertable> {
        self.hypertables.iter().filter(|hypertable| hypertable.replication_factor.is_some())
    }

    /// The chunks that stand for tiered storage, which are not moved.
    pub fn tiered(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().filter(|chunk| chunk.tiered)
    }
}

/// The extension in a database; `None` where it is not installed.
///
/// # Errors
/// Whatever the server says.
pub async fn extension(client: &Client) -> Result<Option<Extension>> {
    let row = client
        .query_typed_opt(
            "SELECT e.extversion, n.nspname, pg_catalog.current_setting('timescaledb.license', true), \
                    pg_catalog.current_setting('timescaledb.restoring', true) IS NOT NULL \
             FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace \
             WHERE e.extname = 'timescaledb'",
            &[],
        )
        .await
        .context(|| "looking for the extension timescaledb".into())?;
    Ok(row.map(|row| Extension {
        version: row.get(0),
        schema: row.get(1),
        license: row.get::<_, Option<String>>(2).unwrap_or_default(),
        loaded: row.get(3),
    }))
}

/// Everything that a database has of TimescaleDB; `None` where the extension is not installed. Of a version before [`OLDEST`] only
/// the extension.
///
/// Run it inside the transaction whose snapshot the answer has to describe.
///
/// # Errors
/// Whatever the server says.
pub async fn read(client: &Client) -> Result<Option<Database>> {
    let Some(extension) = extension(client).await? else { return Ok(None) };
    let nothing = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (hypertables, chunks, aggregates, jobs) = if extension.is_readable() {
        (hypertables(client).await?, chunks(client).await?, aggregates(client).await?, jobs(client).await?)
    } else {
        nothing
    };
    Ok(Some(Database { extension, hypertables, chunks, aggregates, jobs }))
}

async fn hypertables(client: &Client) -> Result<Vec<Hypertable>> {
    let mut dimensions = dimensions(client).await?;
    let rows = client
        .query_typed(
            // `replication_factor` went with the other servers in 2.14; where it comes again, it is read.
            "SELECT h.id, c.oid, h.schema_name, h.table_name, h.associated_schema_name, h.associated_table_prefix, \
                    h.compression_state = 1, h.compressed_hypertable_id, \
                    coalesce(s.segmentby, '{}'), \
                    ARRAY(SELECT format('%I %s NULLS %s', o.name, CASE WHEN o.descending THEN 'DESC' ELSE 'ASC' END, \
                                        CASE WHEN o.nulls_first THEN 'FIRST' ELSE 'LAST' END) \
                          FROM unnest(s.orderby, s.orderby_desc, s.orderby_nullsfirst) WITH ORDINALITY \
                               o(name, descending, nulls_first, number) ORDER BY o.number), \
                    CASE WHEN a.mat_hypertable_id IS NOT NULL THEN format('%I.%I', a.user_view_schema, a.user_view_name) END, \
                    (pg_catalog.to_jsonb(h)->>'replication_factor')::int2 \
             FROM _timescaledb_catalog.hypertable h \
             JOIN pg_catalog.pg_namespace n ON n.nspname = h.schema_name \
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = h.table_name \
             LEFT JOIN _timescaledb_catalog.compression_settings s ON s.relid = c.oid \
             LEFT JOIN _timescaledb_catalog.continuous_agg a ON a.mat_hypertable_id = h.id \
             WHERE h.compression_state <> 2 ORDER BY h.id",
            &[],
        )
        .await
        .context(|| "reading the hypertables".into())?;
    let hypertable = |row: &tokio_postgres::Row| Hypertable {
        id: row.get(0),
        relid: row.get(1),
        schema: row.get(2),
        name: row.get(3),
        chunk_schema: row.get(4),
        chunk_prefix: row.get(5),
        dimensions: dimensions.remove(&row.get(0)).unwrap_or_default(),
        compression: row.get(6),
        compressed_hypertable: row.get(7),
        segment_by: row.get(8),
        order_by: row.get(9),
        materializes: row.get(10),
        replication_factor: row.get(11),
    };
    Ok(rows.iter().map(hypertable).collect())
}

async fn dimensions(client: &Client) -> Result<HashMap<i32, Vec<Dimension>>> {
    let rows = client
        .query_typed(
            "SELECT hypertable_id, id, column_name::text, pg_catalog.format_type(column_type, NULL), interval_length, num_slices, \
                    CASE WHEN integer_now_func IS NOT NULL THEN format('%I.%I', integer_now_func_schema, integer_now_func) END, \
                    CASE WHEN partitioning_func IS NOT NULL THEN format('%I.%I', partitioning_func_schema, partitioning_func) END \
             FROM _timescaledb_catalog.dimension ORDER BY hypertable_id, id",
            &[],
        )
        .await
        .context(|| "reading the dimensions of hypertables".into())?;
    let mut dimensions: HashMap<i32, Vec<Dimension>> = HashMap::new();
    for row in rows {
        dimensions.entry(row.get(0)).or_default().push(Dimension {
            id: row.get(1),
            column: row.get(2),
            column_type: row.get(3),
            interval: row.get(4),
            partitions: row.get(5),
            integer_now: row.get(6),
            partitioning: row.get(7),
        });
    }
    Ok(dimensions)
}

/// The chunks of all hypertables.
///
/// # Errors
/// Whatever the server says.
pub async fn chunks(client: &Client) -> Result<Vec<Chunk>> {
    // Up to 2.27 chunks share slices, and a table of constraints says which.
    let shared: bool = client
        .query_typed_one("SELECT pg_catalog.to_regclass('_timescaledb_catalog.chunk_constraint') IS NOT NULL", &[])
        .await?
        .get(0);
    let slices = if shared {
        "SELECT k.chunk_id, s.dimension_id, s.range_start, s.range_end FROM _timescaledb_catalog.chunk_constraint k \
         JOIN _timescaledb_catalog.dimension_slice s ON s.id = k.dimension_slice_id"
    } else {
        "SELECT chunk_id, dimension_id, range_start, range_end FROM _timescaledb_catalog.dimension_slice"
    };
    let rows = client
        .query_typed(&format!("{slices} ORDER BY 1, 2"), &[])
        .await
        .context(|| "reading the ranges of chunks".into())?;
    let mut slices: BTreeMap<i32, Vec<Slice>> = BTreeMap::new();
    for row in rows {
        let slice = Slice { dimension: row.get(1), start: row.get(2), end: row.get(3) };
        slices.entry(row.get(0)).or_default().push(slice);
    }
    let rows = client
        .query_typed(
            "SELECT k.id, c.oid, k.schema_name, k.table_name, k.hypertable_id, k.status, k.osm_chunk, \
                    z.id, zc.oid, z.schema_name, z.table_name \
             FROM _timescaledb_catalog.chunk k \
             JOIN _timescaledb_catalog.hypertable h ON h.id = k.hypertable_id AND h.compression_state <> 2 \
             JOIN pg_catalog.pg_namespace n ON n.nspname = k.schema_name \
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = k.table_name \
             LEFT JOIN _timescaledb_catalog.chunk z ON z.id = k.compressed_chunk_id \
             LEFT JOIN pg_catalog.pg_namespace zn ON zn.nspname = z.schema_name \
             LEFT JOIN pg_catalog.pg_class zc ON zc.relnamespace = zn.oid AND zc.relname = z.table_name \
             WHERE NOT coalesce((pg_catalog.to_jsonb(k)->>'dropped')::bool, false) ORDER BY k.id",
            &[],
        )
        .await
        .context(|| "reading the chunks of hypertables".into())?;
    let compressed = |row: &tokio_postgres::Row| {
        Some(CompressedChunk {
            id: row.get::<_, Option<i32>>(7)?,
            relid: row.get::<_, Option<u32>>(8)?,
            schema: row.get(9),
            name: row.get(10),
        })
    };
    let chunk = |row: &tokio_postgres::Row| Chunk {
        id: row.get(0),
        relid: row.get(1),
        schema: row.get(2),
        name: row.get(3),
        hypertable: row.get(4),
        slices: slices.remove(&row.get(0)).unwrap_or_default(),
        status: row.get(5),
        compressed: compressed(row),
        tiered: row.get(6),
    };
    Ok(rows.iter().map(chunk).collect())
}

async fn aggregates(client: &Client) -> Result<Vec<ContinuousAggregate>> {
    let rows = client
        .query_typed(
            "SELECT a.user_view_schema, a.user_view_name, a.mat_hypertable_id, a.raw_hypertable_id, a.parent_mat_hypertable_id, \
                    pg_catalog.pg_get_viewdef(c.oid), a.materialized_only, w.watermark \
             FROM _timescaledb_catalog.continuous_agg a \
             JOIN pg_catalog.pg_namespace n ON n.nspname = a.direct_view_schema \
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = a.direct_view_name \
             LEFT JOIN _timescaledb_catalog.continuous_aggs_watermark w ON w.mat_hypertable_id = a.mat_hypertable_id \
             ORDER BY a.mat_hypertable_id",
            &[],
        )
        .await
        .context(|| "reading the continuous aggregates".into())?;
    let aggregate = |row: &tokio_postgres::Row| ContinuousAggregate {
        schema: row.get(0),
        name: row.get(1),
        materialization: row.get(2),
        raw: row.get(3),
        parent: row.get(4),
        definition: row.get(5),
        materialized_only: row.get(6),
        watermark: row.get(7),
    };
    Ok(rows.iter().map(aggregate).collect())
}

/// The jobs with ids from 1000 on.
///
/// # Errors
/// Whatever the server says.
pub async fn jobs(client: &Client) -> Result<Vec<Job>> {
    let rows = client
        .query_typed(
            "SELECT j.id, j.application_name, j.proc_schema, j.proc_name, j.schedule_interval::text, j.initial_start::text, \
                    j.fixed_schedule, pg_catalog.to_jsonb(j)->>'timezone', r.rolname, j.scheduled, j.hypertable_id, j.config::text \
             FROM _timescaledb_catalog.bgw_job j JOIN pg_catalog.pg_roles r ON r.oid = j.owner WHERE j.id >= 1000 ORDER BY j.id",
            &[],
        )
        .await
        .context(|| "reading the jobs of TimescaleDB".into())?;
    let job = |row: &tokio_postgres::Row| Job {
        id: row.get(0),
        name: row.get(1),
        proc_schema: row.get(2),
        proc_name: row.get(3),
        schedule_interval: row.get(4),
        initial_start: row.get(5),
        fixed_schedule: row.get(6),
        timezone: row.get(7),
        owner: row.get(8),
        scheduled: row.get(9),
        hypertable: row.get(10),
        config: row.get(11),
    };
    Ok(rows.iter().map(job).collect())
}
