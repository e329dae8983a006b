//! The schema of a TimescaleDB database without its rows (`--schema-only`): hypertables with their dimensions and settings, continuous
//! aggregates and jobs, and no chunk. What comes next fills it: `walferry backfill`, or an application that writes to both databases.
//!
//! Between servers of the same version the extension's catalog is taken over, as a migration does ([`super::prepare`]), but for what speaks of
//! chunks. Continuous aggregates are as if made `WITH NO DATA`: nothing of them is computed, and all of it is to be.
//!
//! Policies are as on the source, asleep or awake: on hypertables that are empty they find nothing to do, and `walferry backfill` has them rest by
//! itself. Jobs of the users' own sleep, because what they do the extension cannot know (mails, exports, deletes): they are named.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::prepare;
use super::settle;
use super::source::{self, Extension, Job};
use crate::error::{Context, Result};
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// Tables of the catalog that speak of chunks, and those of what aggregates have been computed from.
const OF_ROWS: [&str; 11] = [
    "chunk",
    "chunk_constraint",
    "chunk_index",
    "chunk_rewrite",
    "compression_chunk_size",
    "dimension_slice",
    "continuous_aggs_hypertable_invalidation_log",
    "continuous_aggs_invalidation_threshold",
    "continuous_aggs_materialization_invalidation_log",
    "continuous_aggs_materialization_ranges",
    "continuous_aggs_watermark",
];

/// As the extension has a continuous aggregate of which nothing is computed: up to the least that its time can be, and all of it is invalid.
const NOTHING_COMPUTED: &str = "
SET LOCAL timescaledb.restoring = off;
WITH aggregate AS (
    SELECT a.mat_hypertable_id, a.raw_hypertable_id, \
           (SELECT d.column_type FROM _timescaledb_catalog.dimension d WHERE d.hypertable_id = a.mat_hypertable_id ORDER BY d.id LIMIT 1) AS bucket, \
           (SELECT d.column_type FROM _timescaledb_catalog.dimension d WHERE d.hypertable_id = a.raw_hypertable_id ORDER BY d.id LIMIT 1) AS time
    FROM _timescaledb_catalog.continuous_agg a
), watermark AS (
    INSERT INTO _timescaledb_catalog.continuous_aggs_watermark (mat_hypertable_id, watermark)
    SELECT mat_hypertable_id, _timescaledb_functions.get_internal_time_min(bucket) FROM aggregate
), threshold AS (
    INSERT INTO _timescaledb_catalog.continuous_aggs_invalidation_threshold (hypertable_id, watermark)
    SELECT DISTINCT raw_hypertable_id, _timescaledb_functions.get_internal_time_min(time) FROM aggregate
)
INSERT INTO _timescaledb_catalog.continuous_aggs_materialization_invalidation_log
SELECT mat_hypertable_id, '-9223372036854775808'::int8, 9223372036854775807 FROM aggregate;
";

/// What the source has of TimescaleDB, without its rows.
#[derive(Debug)]
pub struct Bare {
    /// The extension.
    pub extension: Extension,
    /// OIDs of all chunks, and of the relations of compressed rows: they are left out of the dump.
    pub chunks: BTreeSet<u32>,
    catalog: Vec<String>,
    jobs: Vec<Job>,
    /// The argument of `alter_job` without which a job would lose its time zone.
    timezone: String,
}

impl Bare {
    /// Reads it, in the transaction under whose snapshot the schema is dumped; `None` without the extension.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn read(source: &Client, owners: &Owners) -> Result<Option<Bare>> {
        let Some(database) = source::read(source).await? else { return Ok(None) };
        let mut chunks: BTreeSet<u32> = database.chunks.iter().map(|chunk| chunk.relid).collect();
        let rows = source
            .query_typed(
                "SELECT c.oid FROM _timescaledb_catalog.chunk k JOIN pg_catalog.pg_namespace n ON n.nspname = k.schema_name \
                 JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = k.table_name",
                &[],
            )
            .await
            .context(|| "reading the chunks".into())?;
        chunks.extend(rows.iter().map(|row| row.get::<_, u32>(0)));
        let catalog = prepare::catalog_rows(source, owners, |name| match name {
            name if OF_ROWS.contains(&name) => None,
            "chunk_column_stats" => Some("WHERE coalesce((pg_catalog.to_jsonb(t)->>'chunk_id')::int4, 0) = 0"),
            "compression_settings" => Some(
                "WHERE t.relid::oid IN (SELECT c.oid FROM _timescaledb_catalog.hypertable h \
                 JOIN pg_catalog.pg_namespace n ON n.nspname = h.schema_name \
                 JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = h.table_name)",
            ),
            _ => Some(""),
        })
        .await?;
        let catalog = catalog.into_iter().map(|(_, statement)| statement).collect();
        // The target has the same version.
        let timezone = settle::with_timezone(source, "pg_catalog.to_jsonb(b)->>'timezone'").await?;
        Ok(Some(Bare { extension: database.extension, chunks, catalog, jobs: database.jobs, timezone }))
    }

    /// What comes behind the schema, in its transaction.
    pub fn statements(&self) -> String {
        let alter_job = sql::qualified(&self.extension.schema, "alter_job");
        let awake = self.jobs.iter().filter(|job| job.scheduled && is_policy(job));
        let wake = |job: &Job| {
            format!(
                "SELECT {alter_job}(b.id, scheduled => true{}) FROM _timescaledb_catalog.bgw_job b WHERE b.id = {};",
                self.timezone, job.id
            )
        };
        let awake: Vec<String> = awake.map(wake).collect();
        format!(";{};{NOTHING_COMPUTED}{}", self.catalog.join(";\n"), awake.concat())
    }

    /// What an operator is to know of it, in a sentence each.
    pub fn say(&self) -> Vec<String> {
        let alter_job = sql::qualified(&self.extension.schema, "alter_job");
        let own = self.jobs.iter().filter(|job| job.scheduled && !is_policy(job));
        own.map(|job| {
            let procedure = sql::qualified(&job.proc_schema, &job.proc_name);
            format!(
                "job {} ({procedure}) sleeps on the target; SELECT {alter_job}({0}, scheduled => true) wakes it",
                job.id
            )
        })
        .collect()
    }
}

/// A job that the extension itself knows what it does.
fn is_policy(job: &Job) -> bool {
    job.proc_schema.starts_with("_timescaledb_")
}
