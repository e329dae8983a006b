//! What comparisons came to, kept in the ledger for `status`, `cutover --require-verified` and reports.
//!
//! The table is made when the first comparison ends: an older walferry does not know it and does not miss it, so the ledger's
//! format stays what it is (H18).

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::report::Report;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::format::duration;

/// Comparisons that are kept.
const KEPT: i64 = 100;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS walferry.verification ( \
     id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), outcome jsonb NOT NULL)";

/// What a comparison came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// When it ended: RFC 3339, UTC, by the target's clock.
    #[serde(default)]
    pub at: String,
    /// How long ago that was when it was read, in seconds, by the target's clock.
    #[serde(default)]
    pub age_seconds: f64,
    /// The source's position at which both sides were compared.
    pub source_lsn: Lsn,
    /// Whether it was at one point while writes went on; otherwise both sides had to be quiet.
    pub online: bool,
    /// Whether every row of every table was compared.
    pub complete: bool,
    /// Whether no difference was found.
    pub equal: bool,
    /// Tables compared.
    pub tables: u64,
    /// Rows of the source compared.
    pub rows: u64,
    /// Rows found to differ; not all where there are many.
    pub differing_rows: u64,
    /// Tables that differ, as `"schema"."name"`.
    pub differing_tables: Vec<String>,
    /// Large objects that differ.
    #[serde(default)]
    pub differing_large_objects: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Verification {
    /// What a report came to. `all_tables` says whether it is of every table.
    pub fn of(report: &Report, source_lsn: Lsn, online: bool, all_tables: bool, took: Duration) -> Verification {
        let differing = || report.tables.iter().filter(|table| !table.equal);
        Verification {
            at: String::new(),
            age_seconds: 0.0,
            source_lsn,
            online,
            complete: all_tables && report.sample_percent.is_none() && report.stale.is_empty(),
            equal: report.equal,
            tables: report.tables.len() as u64,
            rows: report.tables.iter().map(|table| table.rows_source.max(0).cast_unsigned()).sum(),
            differing_rows: differing().map(|table| table.differences_total).sum(),
            differing_tables: differing().map(|table| table.table.clone()).collect(),
            differing_large_objects: report.large_objects.as_ref().map_or(0, |found| found.different_total),
            seconds: took.as_secs_f64(),
        }
    }

    /// In a line, for people.
    pub fn text(&self) -> String {
        let what = match self.differing_tables.as_slice() {
            [] if self.differing_large_objects > 0 => {
                format!("DIFFERENT: {} large objects", self.differing_large_objects)
            }
            [] => "equal".to_owned(),
            [one] => format!("DIFFERENT: {one}"),
            [one, others @ ..] => format!("DIFFERENT: {one} and {} more", others.len()),
        };
        let part = if self.complete { "" } else { ", of a part" };
        format!("{what}{part}, {} ago at {}", duration(self.age_seconds), self.source_lsn)
    }
}

/// Keeps what a comparison came to; on the target, where there is a ledger.
///
/// # Errors
/// Whatever the server says.
pub async fn record(target: &Client, verification: &Verification) -> Result<()> {
    let doing = || "keeping what the comparison came to in the ledger".to_owned();
    let outcome =
        serde_json::to_string(verification).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    target.batch_execute(TABLE).await.context(doing)?;
    target
        .execute(
            "WITH new AS (INSERT INTO walferry.verification (outcome) VALUES ($1::text::jsonb) RETURNING id) \
             DELETE FROM walferry.verification WHERE id <= (SELECT id FROM new) - $2",
            &[&outcome, &KEPT],
        )
        .await
        .context(doing)?;
    Ok(())
}

/// The newest, if there is one. For any session on the target, with a ledger or without.
///
/// # Errors
/// Whatever the server says.
pub async fn last(target: &Client) -> Result<Option<Verification>> {
    Ok(newest(target, "true").await?.map(|(_, verification)| verification))
}

/// Looks whether both sides were found to be equal within this time: every row of every table, and nothing different since.
///
/// # Errors
/// `Blocked` where they were not; else whatever the server says.
pub async fn require(target: &Client, age_max: Duration) -> Result<()> {
    let refuse = |text: String| {
        Err(Error::new(ErrorKind::Blocked, text).hint("`walferry verify` compares all rows while writes go on."))
    };
    let Some((complete_id, complete)) = newest(target, "(outcome->>'complete')::bool").await? else {
        return refuse("the two sides have not been compared".into());
    };
    let newer = newest(target, "NOT (outcome->>'equal')::bool").await?.filter(|(id, _)| *id >= complete_id);
    if let Some((_, different)) = newer {
        return refuse(format!("the two sides differ: {}", different.text()));
    }
    if complete.age_seconds > age_max.as_secs_f64() {
        let (age, max) = (duration(complete.age_seconds), duration(age_max.as_secs_f64()));
        return refuse(format!("the two sides were last compared {age} ago, and it has to be within {max}"));
    }
    Ok(())
}

async fn newest(target: &Client, condition: &str) -> Result<Option<(i64, Verification)>> {
    let doing = || "reading what the last comparison came to".to_owned();
    let exists = "SELECT pg_catalog.to_regclass('walferry.verification') IS NOT NULL";
    if !target.query_typed_one(exists, &[]).await.context(doing)?.get::<_, bool>(0) {
        return Ok(None);
    }
    let statement = format!(
        "SELECT outcome::text, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), \
                extract(epoch FROM clock_timestamp() - at)::float8, id \
         FROM walferry.verification WHERE {condition} ORDER BY id DESC LIMIT 1"
    );
    let Some(row) = target.query_typed_opt(&statement, &[]).await.context(doing)? else { return Ok(None) };
    let verification: Verification = serde_json::from_str(row.get(0))
        .map_err(|error| Error::new(ErrorKind::Other, format!("reading the ledger: {error}")))?;
    let age_seconds = row.get::<_, f64>(2).max(0.0);
    Ok(Some((row.get(3), Verification { at: row.get(1), age_seconds, ..verification })))
}
