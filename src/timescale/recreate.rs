//! TimescaleDB to TimescaleDB where the target cannot take over the extension's catalog as it is: everything is made again there, by what
//! the extension offers to anybody.
//!
//! ```text
//!   check, and the first start: which way? ─────► walferry.timescaledb_recreation (never another one afterwards)
//!   prepare, under the slot's snapshot:  schema.rs   the dump without chunks, hypertables and aggregates as statements
//!   the copy:                            places.rs   which hypertable of the target stands for which; a chunk's rows go into it
//!   beside the copy and following:       compression.rs   chunks are compressed on the target when they are on the source
//!   the schema's end:                    recompute.rs  aggregates that are computed anew, where that was asked for
//!   the schema's end, and the cutover:   jobs.rs     policies and the users' jobs, asleep
//!   behind the fence:                    state.rs    up to where aggregates are materialized, and what of them is invalid
//! ```
//!
//! Each chunk of the source is copied by itself, decompressed by reading it, into the hypertable, like a chunk that came late
//! ([`super::live`]); the target's chunk is made with its range before, so that retention drops the same rows on both sides. Rows of continuous
//! aggregates are those of hypertables: copied and followed likewise, so nothing is computed anew, and what can no longer be computed is
//! kept.
//!
//! What it keeps, and how it dies: hypertables and aggregates are made in the transaction that makes the schema, all or nothing (I2). A
//! chunk's rows go with its row in the ledger; an empty chunk that a death leaves behind does no harm. What is compressed is in the
//! extension's own catalog, and the next look goes on. A job is made with its row in the ledger. The state of aggregates is written again at each
//! attempt of a cutover. Which change is applied to which chunk is decided as ever (I3), and no job runs before the decision (I8).

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::declaration;
use super::source::{self, Extension};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;

use recompute::Caggs;

pub(crate) mod compression;
pub(crate) mod jobs;
pub(crate) mod places;
pub mod recompute;
pub(crate) mod schema;
pub(crate) mod state;

/// How TimescaleDB comes to the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Same version: catalog and chunks as they are.
    AsItIs,
    /// Made again, because of this.
    Recreated(String),
}

/// What a target can do for a source, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// In which of the ways.
    pub mode: Mode,
    /// The version of the extension that the target will have.
    pub version: String,
    /// Whether it has it already.
    pub is_installed: bool,
}

impl Choice {
    /// Major and minor version; zeros where it reads otherwise.
    pub fn number(&self) -> (u32, u32) {
        let numbers = numbers(&self.version);
        let at = |place: usize| numbers.get(place).copied().unwrap_or_default();
        (at(0), at(1))
    }

    /// Whether the target's version is older than the source's: then it may lack what the source uses.
    pub fn is_older_than(&self, source: &Extension) -> bool {
        numbers(&self.version) < numbers(&source.version)
    }
}

/// A version's numbers.
fn numbers(version: &str) -> Vec<u32> {
    version.split(['.', '-']).map_while(|part| part.parse().ok()).collect()
}

/// Decides by what the target has and offers; `None` where it has no TimescaleDB at all.
///
/// # Errors
/// Whatever the target says.
pub async fn choose(source: &Extension, target: &Client, caggs: Caggs) -> Result<Option<Choice>> {
    let row = target
        .query_typed_one(
            &format!(
                "SELECT (SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'timescaledb'), \
                        (SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'timescaledb'), \
                        EXISTS (SELECT FROM pg_catalog.pg_available_extension_versions WHERE name = 'timescaledb' AND version = {}), \
                        (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)",
                sql::literal(&source.version)
            ),
            &[],
        )
        .await
        .context(|| "looking for the extension timescaledb on the target".into())?;
    let (installed, default): (Option<String>, Option<String>) = (row.get(0), row.get(1));
    let (is_offered, is_superuser): (bool, bool) = (row.get(2), row.get(3));
    let is_installed = installed.is_some();
    let version = match (installed, default) {
        (Some(installed), _) => installed,
        (None, Some(_)) if is_offered && is_superuser => source.version.clone(),
        (None, Some(default)) => default,
        (None, None) => return Ok(None),
    };
    let mode = if version != source.version {
        Mode::Recreated(format!("the source has version {}, and the target {version}", source.version))
    } else if !is_superuser {
        Mode::Recreated("our role is no superuser of the target".to_owned())
    } else if caggs == Caggs::Recompute {
        Mode::Recreated("--caggs recompute was asked for".to_owned())
    } else {
        Mode::AsItIs
    };
    Ok(Some(Choice { mode, version, is_installed }))
}

/// What is made again, as the ledger has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recreation {
    /// The hypertables of users.
    pub hypertables: Vec<declaration::Hypertable>,
    /// The continuous aggregates, those that others stand on first.
    pub aggregates: Vec<Aggregate>,
}

/// A continuous aggregate and where its rows are on the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aggregate {
    /// Schema of the view, unquoted.
    pub schema: String,
    /// Name of the view, unquoted.
    pub name: String,
    /// Schema and name of the source's hypertable with its rows, unquoted.
    pub rows: (String, String),
}

/// Which way the migration goes, and which aggregates are recomputed: what was decided when it began, and is decided now where nothing
/// was yet. `jobs_rest` where the source's jobs are paused.
///
/// # Errors
/// `Blocked` where the target has no TimescaleDB; else whatever it says.
pub async fn decide(source: &Client, target: &mut Client, caggs: Caggs, jobs_rest: bool) -> Result<bool> {
    let doing = || "noting in the ledger how TimescaleDB comes to the target".to_owned();
    if exists(target).await? {
        return is_recreated(target).await;
    }
    let Some(database) = source::read(source).await? else { return Ok(false) };
    let choice = choose(&database.extension, target, caggs).await?.ok_or_else(|| {
        Error::new(ErrorKind::Blocked, "the target does not offer the extension timescaledb")
            .hint("Install TimescaleDB on the target's server, and add it to shared_preload_libraries.")
    })?;
    let recreated = choice.mode != Mode::AsItIs;
    let recomputed = match caggs {
        Caggs::Copy => Vec::new(),
        Caggs::Recompute => recompute::look(source, &database, jobs_rest).await?,
    };
    let statement = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; {} \
         CREATE TABLE walferry.timescaledb_recreation (recreated boolean NOT NULL, definition jsonb); \
         INSERT INTO walferry.timescaledb_recreation VALUES ({recreated}); \
         CREATE TABLE walferry.timescaledb_job_made (source integer PRIMARY KEY, definition text NOT NULL, id integer NOT NULL); COMMIT",
        recompute::notes(&database, &recomputed)
    );
    let noted = target.batch_execute(&statement).await;
    if noted.is_err() {
        let _ = target.batch_execute("ROLLBACK").await;
    }
    noted.context(doing)?;
    Ok(recreated)
}

async fn exists(target: &Client) -> Result<bool> {
    let exists = "SELECT pg_catalog.to_regclass('walferry.timescaledb_recreation') IS NOT NULL";
    Ok(target.query_typed_one(exists, &[]).await.context(|| "looking at the ledger".into())?.get(0))
}

/// Whether TimescaleDB is made again on the target of this ledger.
///
/// # Errors
/// Whatever the target says.
pub async fn is_recreated(target: &Client) -> Result<bool> {
    if !exists(target).await? {
        return Ok(false);
    }
    let row = target.query_typed_one("SELECT recreated FROM walferry.timescaledb_recreation", &[]).await;
    Ok(row.context(|| "reading from the ledger how TimescaleDB comes to the target".into())?.get(0))
}

/// Writes into the ledger what is made again: before the schema, which the next attempt of the preparation writes anew.
///
/// # Errors
/// Whatever the target says.
pub async fn note(target: &Client, recreation: &Recreation) -> Result<()> {
    let definition =
        serde_json::to_string(recreation).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    let statement = format!(
        "UPDATE walferry.timescaledb_recreation SET definition = {}::pg_catalog.jsonb",
        sql::literal(&definition)
    );
    target.batch_execute(&statement).await.context(|| "noting hypertables in the ledger".into())
}

/// What the ledger says of hypertables that are made again; nothing where none are.
///
/// # Errors
/// Whatever the target says.
pub async fn recorded(target: &Client) -> Result<Recreation> {
    if !exists(target).await? {
        return Ok(Recreation::default());
    }
    let row = target
        .query_typed_one("SELECT definition::text FROM walferry.timescaledb_recreation", &[])
        .await
        .context(|| "reading the hypertables from the ledger".into())?;
    match row.get::<_, Option<&str>>(0) {
        Some(text) => serde_json::from_str(text)
            .map_err(|error| Error::new(ErrorKind::Other, format!("reading the ledger: {error}"))),
        None => Ok(Recreation::default()),
    }
}

/// What the ledger's tables are on a target where hypertables are made again.
#[derive(Debug, Default)]
pub struct Marks {
    recreation: Recreation,
    names: Vec<places::Named>,
}

/// Reads them.
///
/// # Errors
/// Whatever the target says.
pub async fn marks(target: &Client) -> Result<Marks> {
    let recreation = recorded(target).await?;
    let names = if recreation.aggregates.is_empty() { Vec::new() } else { places::names(target, &recreation).await? };
    Ok(Marks { recreation, names })
}

impl Marks {
    /// A table of the ledger with what it is on the target.
    #[must_use]
    pub fn mark(&self, table: Table) -> Table {
        let mut table =
            if table.hypertable.is_none() { super::marked(table, &self.recreation.hypertables) } else { table };
        if let Some(chunk) = &mut table.chunk {
            let named = self.names.iter().find(|named| named.source == (chunk.schema.clone(), chunk.name.clone()));
            chunk.stands_in = named.map(|named| named.target.clone());
        }
        table
    }
}

/// Says of the tables of a source that each chunk's rows go to its hypertable.
pub fn arrange(tables: &mut [Table]) {
    for chunk in tables.iter_mut().filter_map(|table| table.chunk.as_mut()) {
        chunk.is_late = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_version_is_told_by_its_numbers() {
        let extension = |version: &str| Extension {
            version: version.into(),
            schema: "public".into(),
            license: String::new(),
            loaded: true,
        };
        let choice = |version: &str| Choice { mode: Mode::AsItIs, version: version.into(), is_installed: true };
        assert!(choice("2.9.3").is_older_than(&extension("2.26.4")));
        assert!(!choice("2.28.3").is_older_than(&extension("2.26.4")));
        assert!(!choice("2.26.4").is_older_than(&extension("2.26.4")));
    }
}
