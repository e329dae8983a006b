//! `--pause-source-jobs`: the jobs of the source rest for the time of the migration.
//!
//! Which ones did run is written down before any of them is stopped: in the ledger, and in the state directory, for a `clean` that
//! finds no ledger any more (I9). So they run again whatever dies: `clean` starts them, and so does a migration that goes on
//! without the option. They rest beyond the cutover: the source is closed to writers then, and jobs that retain, compress and refresh
//! would be its only writers; `clean` opens it, and starts them with that.
//!
//! Jobs are paused by `alter_job`, which their owners and superusers may call. What a job is in the middle of, it ends.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::settle;
use super::source::{self, Job};
use crate::connection::ConnectionSpec;
use crate::crashsafe;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// The file in the state directory.
pub const FILE: &str = "paused-jobs.json";

/// What [`pause`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Paused {
    /// The jobs that rest now and did not before, as `1001 (policy_retention)`.
    pub paused: Vec<String>,
    /// Those that run on, because our role may not alter them.
    pub not_ours: Vec<String>,
}

/// Stops the jobs that run on the source, and notes them before it does. May be repeated: what is noted stays noted.
///
/// # Errors
/// Whatever the servers or the disk say.
pub async fn pause(source: &Client, target: &mut Client, directory: &Path) -> Result<Paused> {
    let mut paused = Paused::default();
    let Some(extension) = source::extension(source).await?.filter(source::Extension::is_readable) else {
        return Ok(paused);
    };
    let not_ours = not_ours(source).await?;
    let running: Vec<Job> = source::jobs(source).await?.into_iter().filter(|job| job.scheduled).collect();
    let (others, ours): (Vec<&Job>, Vec<&Job>) = running.iter().partition(|job| not_ours.contains(&job.id));
    paused.not_ours = others.into_iter().map(shown).collect();
    let mut noted = noted(target).await?;
    noted.extend(noted_in(directory)?);
    noted.extend(ours.iter().map(|job| job.id));
    if noted.is_empty() {
        return Ok(paused);
    }
    note_in(directory, &noted)?;
    note(target, &noted).await?;
    for job in ours {
        alter(source, &extension.schema, job.id, false).await?;
        paused.paused.push(shown(job));
    }
    Ok(paused)
}

/// Starts the jobs again that were noted in the ledger, and forgets them there. Answers them as `1001 (policy_retention)`.
///
/// # Errors
/// Whatever the servers say.
pub async fn resume(source: &Client, target: &Client) -> Result<Vec<String>> {
    let noted = noted(target).await?;
    let started = start(source, &noted).await?;
    if !noted.is_empty() {
        target
            .batch_execute("DELETE FROM walferry.timescaledb_paused_job")
            .await
            .context(|| "noting that the source's jobs run again".into())?;
    }
    Ok(started)
}

/// Starts the jobs again that the state directory knows of, and forgets them there. Answers them likewise.
///
/// # Errors
/// Whatever the source or the disk says. A source that cannot be reached is left as it is where `is_gone` says that it may be gone.
pub async fn resume_noted_in(directory: &Path, source: &ConnectionSpec, is_gone: bool) -> Result<Vec<String>> {
    let noted = noted_in(directory)?;
    if noted.is_empty() {
        return Ok(Vec::new());
    }
    let client = match source.connect("walferry").await {
        Err(error) if is_gone && error.is_transient() => {
            let ids: Vec<String> = noted.iter().map(i32::to_string).collect();
            tracing::warn!(
                "the old server cannot be reached ({error}). Should it come back, its TimescaleDB jobs {} rest: SELECT alter_job(…, \
                 scheduled => true)",
                ids.join(", ")
            );
            return Ok(Vec::new());
        }
        connected => connected?,
    };
    let started = start(&client, &noted).await?;
    note_in(directory, &BTreeSet::new())?;
    Ok(started)
}

/// The jobs that rest for the migration of this ledger: to whoever asks what is to run, they run.
///
/// # Errors
/// Whatever the server says.
pub async fn noted(target: &Client) -> Result<BTreeSet<i32>> {
    let exists = "SELECT pg_catalog.to_regclass('walferry.timescaledb_paused_job') IS NOT NULL";
    let doing = || "reading which jobs of the source rest".to_owned();
    if !target.query_typed_one(exists, &[]).await.context(doing)?.get::<_, bool>(0) {
        return Ok(BTreeSet::new());
    }
    let rows = target.query_typed("SELECT id FROM walferry.timescaledb_paused_job", &[]).await.context(doing)?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The jobs that our role may not alter, by their ids.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn not_ours(source: &Client) -> Result<BTreeSet<i32>> {
    let rows = source
        .query_typed(
            "SELECT id FROM _timescaledb_catalog.bgw_job WHERE id >= 1000 AND NOT pg_catalog.pg_has_role(owner::pg_catalog.oid, 'USAGE')",
            &[],
        )
        .await
        .context(|| "looking whose the jobs of TimescaleDB are".into())?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A job for people.
pub(crate) fn shown(job: &Job) -> String {
    format!("{} ({})", job.id, job.proc_name)
}

async fn start(source: &Client, ids: &BTreeSet<i32>) -> Result<Vec<String>> {
    let Some(extension) = source::extension(source).await?.filter(|_| !ids.is_empty()) else { return Ok(Vec::new()) };
    let mut started = Vec::new();
    for job in source::jobs(source).await?.iter().filter(|job| ids.contains(&job.id) && !job.scheduled) {
        alter(source, &extension.schema, job.id, true).await?;
        started.push(shown(job));
    }
    Ok(started)
}

async fn alter(source: &Client, schema: &str, id: i32, scheduled: bool) -> Result<()> {
    let statement = format!(
        "SELECT {}(b.id, scheduled => {scheduled}, if_exists => true{}) FROM _timescaledb_catalog.bgw_job b WHERE b.id = {id}",
        sql::qualified(schema, "alter_job"),
        settle::with_timezone(source, "pg_catalog.to_jsonb(b)->>'timezone'").await?
    );
    let doing = if scheduled { "starting" } else { "pausing" };
    source.batch_execute(&statement).await.context(|| format!("{doing} the job {id} of TimescaleDB on the source"))
}

async fn note(target: &mut Client, ids: &BTreeSet<i32>) -> Result<()> {
    let doing = || "noting in the ledger which jobs of the source rest".to_owned();
    let ids: Vec<i32> = ids.iter().copied().collect();
    let transaction = target.transaction().await?;
    transaction
        .batch_execute(
            "SET LOCAL synchronous_commit = on; CREATE TABLE IF NOT EXISTS walferry.timescaledb_paused_job (id integer PRIMARY KEY)",
        )
        .await
        .context(doing)?;
    transaction
        .execute_typed(
            "INSERT INTO walferry.timescaledb_paused_job SELECT unnest($1) ON CONFLICT DO NOTHING",
            &[(&ids, Type::INT4_ARRAY)],
        )
        .await
        .context(doing)?;
    transaction.commit().await.context(doing)
}

fn file(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

fn noted_in(directory: &Path) -> Result<BTreeSet<i32>> {
    let path = file(directory);
    let text = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        read => read.context(|| format!("reading {}", path.display()))?,
    };
    serde_json::from_slice(&text).map_err(|error| {
        Error::new(ErrorKind::Other, format!("{} is not what was written there: {error}", path.display()))
    })
}

fn note_in(directory: &Path, ids: &BTreeSet<i32>) -> Result<()> {
    let path = file(directory);
    let text = serde_json::to_vec(ids).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    crashsafe::replace(&path, &text).context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_directory_knows_which_jobs_rest() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(noted_in(directory.path()).unwrap(), BTreeSet::new());
        note_in(directory.path(), &BTreeSet::from([1001, 1000])).unwrap();
        assert_eq!(noted_in(directory.path()).unwrap(), BTreeSet::from([1000, 1001]));
        std::fs::write(file(directory.path()), "?").unwrap();
        assert!(noted_in(directory.path()).unwrap_err().to_string().contains(FILE));
    }
}
