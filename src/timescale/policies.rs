//! Policies that would work against somebody who fills a hypertable, and continuous aggregates over it.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::chunks::TimeType;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// A job that drops, compresses, reorders or refreshes what is being filled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The extension's number of it.
    pub id: i32,
    /// Such as `policy_retention`.
    pub procedure: String,
    /// `"schema"."name"` of the hypertable or the continuous aggregate's inner table.
    pub hypertable: String,
    /// Whether it is scheduled.
    pub scheduled: bool,
    /// For a retention policy by age: how old rows are that it drops, as an interval.
    pub drop_after: Option<String>,
}

/// A continuous aggregate, to be refreshed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aggregate {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// The hypertable that its rows come from in the end.
    pub hypertable: (String, String),
    /// How wide a bucket is: an interval, or a number.
    pub bucket_width: String,
}

/// Every hypertable that depends on some, by their numbers: themselves, and what continuous aggregates over them keep.
const DEPENDENTS: &str = "WITH RECURSIVE root(id, root) AS ( \
         SELECT h.id, h.id FROM _timescaledb_catalog.hypertable h \
         WHERE pg_catalog.format('%I.%I', h.schema_name, h.table_name)::regclass::oid = ANY ($1) \
         UNION SELECT a.mat_hypertable_id, root.root FROM _timescaledb_catalog.continuous_agg a \
         JOIN root ON root.id = coalesce(a.parent_mat_hypertable_id, a.raw_hypertable_id)) ";

/// The policies of hypertables and of the continuous aggregates over them.
///
/// # Errors
/// Whatever the server says.
pub async fn policies(client: &Client, hypertables: &[u32]) -> Result<Vec<Policy>> {
    let rows = client
        .query_typed(
            &format!(
                "{DEPENDENTS} SELECT DISTINCT j.id, j.proc_name::text, pg_catalog.format('%I.%I', h.schema_name, h.table_name), \
                        j.scheduled, CASE WHEN j.config->>'drop_after' ~ '[^0-9-]' THEN j.config->>'drop_after' END \
                 FROM root JOIN _timescaledb_catalog.hypertable h USING (id) \
                 JOIN _timescaledb_config.bgw_job j ON j.hypertable_id = h.id \
                 WHERE j.proc_schema IN ('_timescaledb_functions', '_timescaledb_internal') AND j.proc_name IN ('policy_retention', \
                       'policy_compression', 'policy_recompression', 'policy_reorder', 'policy_refresh_continuous_aggregate') ORDER BY 1"
            ),
            &[(&hypertables, Type::OID_ARRAY)],
        )
        .await
        .context(|| "reading the policies of the target's hypertables".into())?;
    let policy = |row: &tokio_postgres::Row| Policy {
        id: row.get(0),
        procedure: row.get(1),
        hypertable: row.get(2),
        scheduled: row.get(3),
        drop_after: row.get(4),
    };
    Ok(rows.iter().map(policy).collect())
}

/// Lets a job run by itself or not. A job that is gone is no matter.
///
/// # Errors
/// `Blocked` when our role may not; else what the server says.
pub async fn schedule(client: &Client, extension_schema: &str, id: i32, scheduled: bool) -> Result<()> {
    let statement = format!(
        "SELECT {}.alter_job(b.id, scheduled => {scheduled}{}) FROM _timescaledb_config.bgw_job b WHERE b.id = {id}",
        sql::identifier(extension_schema),
        super::settle::with_timezone(client, "pg_catalog.to_jsonb(b)->>'timezone'").await?
    );
    client.batch_execute(&statement).await.context(|| format!("setting job {id} on the target")).map_err(|error| {
        if error.is_transient() {
            return error;
        }
        error.with_kind(ErrorKind::Blocked).hint(format!(
            "Connect as the owner of the job; or let its owner run it, before and after: SELECT alter_job({id}, scheduled => {scheduled})"
        ))
    })
}

/// Whether one of these jobs is at work.
///
/// # Errors
/// Whatever the server says.
pub async fn are_running(client: &Client, jobs: &[i32]) -> Result<bool> {
    let statement = "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity s JOIN unnest($1::int4[]) job(id) \
                     ON s.application_name LIKE '%[' || job.id || ']%' WHERE s.datname = pg_catalog.current_database())";
    let row = client.query_typed_one(statement, &[(&jobs, Type::INT4_ARRAY)]).await;
    Ok(row.context(|| "looking whether a policy is at work".into())?.get(0))
}

/// The continuous aggregates over hypertables, each after those that it is made of.
///
/// # Errors
/// Whatever the server says.
pub async fn aggregates(client: &Client, hypertables: &[u32]) -> Result<Vec<Aggregate>> {
    let rows = client
        .query_typed(
            &format!(
                "{DEPENDENTS} SELECT a.user_view_schema::text, a.user_view_name::text, h.schema_name::text, h.table_name::text, b.bucket_width \
                 FROM root JOIN _timescaledb_catalog.continuous_agg a ON a.mat_hypertable_id = root.id \
                 JOIN _timescaledb_catalog.hypertable h ON h.id = root.root \
                 JOIN _timescaledb_catalog.continuous_aggs_bucket_function b ON b.mat_hypertable_id = root.id \
                 ORDER BY a.mat_hypertable_id"
            ),
            &[(&hypertables, Type::OID_ARRAY)],
        )
        .await
        .context(|| "reading the continuous aggregates of the target".into())?;
    let aggregate = |row: &tokio_postgres::Row| Aggregate {
        schema: row.get(0),
        name: row.get(1),
        hypertable: (row.get(2), row.get(3)),
        bucket_width: row.get(4),
    };
    Ok(rows.iter().map(aggregate).collect())
}

impl Aggregate {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }

    /// Computes again what a range of the hypertable's rows is in: one bucket more at each end, because only whole buckets inside the range
    /// are computed. Rows that came with `session_replication_role = replica` have left no trace in the extension's log, so it is forced.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn refresh(
        &self,
        client: &Client,
        extension_schema: &str,
        time: &TimeType,
        range: (i64, i64),
    ) -> Result<()> {
        let doing = || format!("refreshing {}", self.qualified());
        let width = match time {
            TimeType::Integer(name) => format!("{}::{name}", sql::literal(&self.bucket_width)),
            _ => format!("{}::interval", sql::literal(&self.bucket_width)),
        };
        let end = |value: i64, sign: char| {
            let of_type = match time {
                TimeType::Date => "::date",
                _ => "",
            };
            format!("({} {sign} {width}){of_type}", time.literal(value))
        };
        // A procedure takes no expression of a subquery, but any other.
        let statement = format!(
            "CALL {}.refresh_continuous_aggregate({}::regclass, {}, {}, force => true)",
            sql::identifier(extension_schema),
            sql::literal(&self.qualified()),
            end(range.0, '-'),
            end(range.1, '+')
        );
        client.batch_execute(&statement).await.context(doing)
    }
}

/// How many of some ends of ranges lie before what a retention policy keeps: it would drop them.
///
/// # Errors
/// `Other` when the policy's age is no interval; else what the server says.
pub async fn would_be_dropped(client: &Client, drop_after: &str, ends: &[i64]) -> Result<usize> {
    let statement = "SELECT (EXTRACT(epoch FROM pg_catalog.now() - $1::text::interval) * 1000000)::int8";
    let row = client.query_typed_one(statement, &[(&drop_after, Type::TEXT)]).await;
    let row = row.map_err(Error::from).context(|| format!("reading the age {drop_after} of a retention policy"))?;
    let limit: i64 = row.get(0);
    Ok(ends.iter().filter(|end| **end <= limit).count())
}

/// The continuous aggregates over hypertables that have buckets from before their oldest chunk.
///
/// # Errors
/// Whatever the server says.
pub async fn beyond_raw_rows(client: &Client, hypertables: &[u32]) -> Result<Vec<String>> {
    let doing = || "looking what continuous aggregates keep".to_owned();
    let rows = client
        .query_typed(
            &format!(
                "{DEPENDENTS} SELECT pg_catalog.format('%I.%I', a.user_view_schema, a.user_view_name), \
                        pg_catalog.format('%I.%I', m.schema_name, m.table_name), pg_catalog.quote_ident(d.column_name), \
                        pg_catalog.format_type(d.column_type, NULL), \
                        (SELECT pg_catalog.format('%I.%I', h.schema_name, h.table_name) FROM _timescaledb_catalog.hypertable h WHERE h.id = root.root), \
                        (SELECT pg_catalog.quote_ident(r.column_name) FROM _timescaledb_catalog.dimension r \
                         WHERE r.hypertable_id = root.root ORDER BY r.id LIMIT 1), b.bucket_width \
                 FROM root JOIN _timescaledb_catalog.continuous_agg a ON a.mat_hypertable_id = root.id \
                 JOIN _timescaledb_catalog.hypertable m ON m.id = root.id \
                 JOIN _timescaledb_catalog.continuous_aggs_bucket_function b ON b.mat_hypertable_id = root.id \
                 JOIN LATERAL (SELECT * FROM _timescaledb_catalog.dimension d WHERE d.hypertable_id = m.id ORDER BY d.id LIMIT 1) d ON true"
            ),
            &[(&hypertables, Type::OID_ARRAY)],
        )
        .await
        .context(doing)?;
    let mut found = Vec::new();
    for row in rows {
        let (view, inner, bucket, type_name): (String, &str, &str, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3));
        let (raw, time, width): (&str, &str, &str) = (row.get(4), row.get(5), row.get(6));
        let width = match TimeType::of(type_name) {
            Some(TimeType::Integer(name)) => format!("{}::{name}", sql::literal(width)),
            _ => format!("{}::interval", sql::literal(width)),
        };
        // The oldest row of each: the indexes over time answer.
        let statement = format!(
            "SELECT coalesce((SELECT pg_catalog.min({bucket}) FROM {inner}) + {width} <= (SELECT pg_catalog.min({time}) FROM {raw}), false)"
        );
        if client.query_typed_one(&statement, &[]).await.context(doing)?.get(0) {
            found.push(view);
        }
    }
    Ok(found)
}
