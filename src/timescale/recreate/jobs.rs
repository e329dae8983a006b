//! Policies and the users' own jobs, made on the target as they are on the source: with schedule, options, retries and owner, and with the
//! same number where our role may say so. They are made asleep; those that run on the source wake in the deciding transaction.
//!
//! They are made at the end of the schema, so that what cannot be made is found early, and brought up to date behind the fence: what has
//! not changed on the source since is left alone. How it dies: each goes with its row in the ledger, all in one transaction (I2).

use std::collections::BTreeMap;

use serde_json::Value;
use tokio_postgres::Client;

use super::super::{pause, settle, source};
use super::places::Places;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;
use crate::unstreamed::large_object::Owners;

/// A job of the source.
struct Job {
    id: i32,
    /// Without the number that the extension puts behind it.
    name: String,
    interval: String,
    max_runtime: String,
    max_retries: i32,
    retry_period: String,
    /// `schema.name`, quoted where it has to be; of the extension where the flag says so.
    procedure: String,
    is_of_extension: bool,
    owner: String,
    scheduled: bool,
    fixed_schedule: bool,
    initial_start: Option<String>,
    timezone: Option<String>,
    hypertable: Option<i32>,
    config: Option<String>,
    check: Option<String>,
}

impl Job {
    /// All but whether it runs: another text is another job.
    fn definition(&self, config: Option<&str>, owner: &str) -> String {
        format!(
            "{} {} {} {} {} {} {owner} {} {:?} {:?} {:?} {config:?} {:?}",
            self.name,
            self.interval,
            self.max_runtime,
            self.max_retries,
            self.retry_period,
            self.procedure,
            self.fixed_schedule,
            self.initial_start,
            self.timezone,
            self.hypertable,
            self.check
        )
    }
}

async fn of_source(source: &Client) -> Result<Vec<Job>> {
    let rows = source
        .query_typed(
            "SELECT j.id, pg_catalog.regexp_replace(j.application_name::text, ' \\[\\d+\\]$', ''), j.schedule_interval::text, \
                    j.max_runtime::text, j.max_retries, j.retry_period::text, format('%I.%I', j.proc_schema, j.proc_name), \
                    j.proc_schema IN ('_timescaledb_functions', '_timescaledb_internal'), r.rolname::text, j.scheduled, \
                    j.fixed_schedule, j.initial_start::text, pg_catalog.to_jsonb(j)->>'timezone', j.hypertable_id, j.config::text, \
                    CASE WHEN j.check_name IS NOT NULL THEN format('%I.%I', j.check_schema, j.check_name) END \
             FROM _timescaledb_catalog.bgw_job j JOIN pg_catalog.pg_roles r ON r.oid = j.owner WHERE j.id >= 1000 ORDER BY j.id",
            &[],
        )
        .await
        .context(|| "reading the jobs of TimescaleDB".into())?;
    let job = |row: &tokio_postgres::Row| Job {
        id: row.get(0),
        name: row.get(1),
        interval: row.get(2),
        max_runtime: row.get(3),
        max_retries: row.get(4),
        retry_period: row.get(5),
        procedure: row.get(6),
        is_of_extension: row.get(7),
        owner: row.get(8),
        scheduled: row.get(9),
        fixed_schedule: row.get(10),
        initial_start: row.get(11),
        timezone: row.get(12),
        hypertable: row.get(13),
        config: row.get(14),
        check: row.get(15),
    };
    Ok(rows.iter().map(job).collect())
}

/// Brings the target's jobs in line with the source's, all of them asleep, and notes which are to wake. In the session's open transaction.
///
/// # Errors
/// What the servers say, with the job.
pub async fn bring_in_line(source: &Client, target: &Client, owners: &Owners) -> Result<()> {
    let places = Places::read(source, target).await?;
    let of_source = source::settings(source).await?;
    let Some(extension) = source::extension(target).await? else { return Ok(()) };
    let jobs = of_source_mapped(source, of_source.as_ref(), &places, owners).await?;
    let doing = || "reading from the ledger which jobs are made".to_owned();
    let made = target
        .query_typed("SELECT source, definition, id FROM walferry.timescaledb_job_made", &[])
        .await
        .context(doing)?;
    let made: BTreeMap<i32, (String, i32)> = made.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
    let stays = |id: &i32, definition: &str| jobs.iter().any(|job| job.job.id == *id && job.definition == definition);
    for (source, (_, id)) in made.iter().filter(|(id, (definition, _))| !stays(id, definition)) {
        let statement = format!(
            "SELECT {}(j.id) FROM _timescaledb_catalog.bgw_job j WHERE j.id = {id}; \
             DELETE FROM walferry.timescaledb_job_made WHERE source = {source}",
            sql::qualified(&extension.schema, "delete_job")
        );
        target.batch_execute(&statement).await.context(|| format!("removing job {id} of the target"))?;
    }
    let has_name: bool = target
        .query_typed_one(
            "SELECT coalesce(max(pronargs), 0) >= 9 FROM pg_catalog.pg_proc WHERE proname = 'add_job'",
            &[],
        )
        .await?
        .get(0);
    for job in
        jobs.iter().filter(|job| made.get(&job.job.id).is_none_or(|(definition, _)| *definition != job.definition))
    {
        make(target, job, &extension.schema, has_name, owners).await?;
    }
    // To whoever asks what is to run, what rests for the migration runs.
    let paused = pause::noted(target).await?;
    let scheduled: Vec<String> = jobs
        .iter()
        .filter(|job| job.job.scheduled || paused.contains(&job.job.id))
        .map(|job| job.job.id.to_string())
        .collect();
    let finish = format!(
        "{} WHERE pg_catalog.has_sequence_privilege(s.name, 'UPDATE'); \
         CREATE TABLE IF NOT EXISTS walferry.timescaledb_job (id integer PRIMARY KEY); DELETE FROM walferry.timescaledb_job; \
         INSERT INTO walferry.timescaledb_job SELECT id FROM walferry.timescaledb_job_made WHERE source = ANY ('{{{}}}')",
        next_id("(SELECT greatest(max(id) + 1, 1000) FROM _timescaledb_catalog.bgw_job)"),
        scheduled.join(",")
    );
    target.batch_execute(&finish).await.context(|| "noting which jobs run after the cutover".into())
}

/// A job as it is to be on the target.
struct Wanted {
    job: Job,
    config: Option<String>,
    definition: String,
    /// `"schema"."name"` of the target's hypertable.
    hypertable: Option<String>,
}

async fn of_source_mapped(
    source: &Client,
    settings: Option<&source::Database>,
    places: &Places,
    owners: &Owners,
) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    for job in of_source(source).await? {
        let config = match &job.config {
            Some(config) if job.is_of_extension => Some(mapped(config, settings, places)?),
            config => config.clone(),
        };
        let hypertable = job.hypertable.and_then(|id| places.by_id(id)).map(source::Hypertable::qualified);
        let definition = job.definition(config.as_deref(), owners.role(&job.owner));
        wanted.push(Wanted { job, config, definition, hypertable });
    }
    Ok(wanted)
}

/// A policy's options with the numbers and the names that the target has.
fn mapped(config: &str, of_source: Option<&source::Database>, places: &Places) -> Result<String> {
    let unreadable = |error: serde_json::Error| Error::new(ErrorKind::Other, format!("the options of a job: {error}"));
    let mut config: Value = serde_json::from_str(config).map_err(unreadable)?;
    let mut of_job = None;
    for key in ["hypertable_id", "mat_hypertable_id"] {
        let Some(value) = config.get_mut(key) else { continue };
        let id = value.as_i64().and_then(|id| i32::try_from(id).ok());
        if let Some((id, there)) = id.and_then(|id| Some((id, places.by_id(id)?))) {
            *value = there.id.into();
            of_job = Some((id, there));
        }
    }
    if let Some((id, there)) = of_job
        && let Some(here) = of_source.and_then(|database| database.hypertable(id))
        && let Some(index) = config.get_mut("index_name")
        && let Some(rest) = index.as_str().and_then(|index| index.strip_prefix(&here.name))
        && here.materializes.is_some()
    {
        *index = format!("{}{rest}", there.name).into();
    }
    Ok(config.to_string())
}

/// Has the sequence of jobs go on with a number, where the condition that follows lets it.
fn next_id(number: &str) -> String {
    format!(
        "SELECT pg_catalog.setval(s.name::pg_catalog.regclass, {number}, false) \
         FROM (SELECT pg_catalog.pg_get_serial_sequence('_timescaledb_catalog.bgw_job', 'id')) s(name)"
    )
}

async fn make(target: &Client, wanted: &Wanted, extension: &str, has_name: bool, owners: &Owners) -> Result<()> {
    let job = &wanted.job;
    let doing = || format!("making the job {} ({}) on the target", job.id, job.name);
    let or_null = |value: Option<&str>, of: &str| match value {
        Some(value) => format!("{}::{of}", sql::literal(value)),
        None => "NULL".to_owned(),
    };
    let same_number = format!(
        "{} WHERE pg_catalog.has_sequence_privilege(s.name, 'UPDATE') \
           AND NOT EXISTS (SELECT FROM _timescaledb_catalog.bgw_job j WHERE j.id = {})",
        next_id(&job.id.to_string()),
        job.id
    );
    let role = match owners.no_owner {
        true => String::new(),
        false => format!("; SET LOCAL ROLE {}", sql::identifier(owners.role(&job.owner))),
    };
    target.batch_execute(&format!("{same_number}{role}")).await.context(doing)?;
    let name = if has_name { format!(", job_name => {}", sql::literal(&job.name)) } else { String::new() };
    let add = format!(
        "SELECT {}({}::pg_catalog.regproc, {}::interval, config => {}, initial_start => {}, scheduled => false, check_config => {}, \
         fixed_schedule => {}, timezone => {}{name})",
        sql::qualified(extension, "add_job"),
        sql::literal(&job.procedure),
        sql::literal(&job.interval),
        or_null(wanted.config.as_deref(), "jsonb"),
        or_null(job.initial_start.as_deref(), "timestamptz"),
        or_null(job.check.as_deref(), "regproc"),
        job.fixed_schedule,
        or_null(job.timezone.as_deref(), "text")
    );
    let added = target.query_typed_one(&add, &[]).await.context(doing).map_err(|error| {
        error.hint(format!(
            "It belongs to {} there, which needs LOGIN for that, and rights on what it works on. Mend that, then run the same command again.",
            sql::identifier(owners.role(&job.owner))
        ))
    })?;
    let id: i32 = added.get(0);
    let alter = format!(
        "SELECT {}({id}, max_runtime => {}::interval, max_retries => {}, retry_period => {}::interval, scheduled => false{})",
        sql::qualified(extension, "alter_job"),
        sql::literal(&job.max_runtime),
        job.max_retries,
        sql::literal(&job.retry_period),
        settle::with_timezone(target, &or_null(job.timezone.as_deref(), "text")).await?
    );
    let of_hypertable = wanted.hypertable.as_ref().map_or_else(String::new, |name| {
        let relation = sql::literal(name);
        format!("; SELECT _timescaledb_functions.alter_job_set_hypertable_id({id}, {relation}::pg_catalog.regclass)")
    });
    let note = format!(
        "{alter}{of_hypertable}; RESET ROLE; INSERT INTO walferry.timescaledb_job_made VALUES ({}, {}, {id})",
        job.id,
        sql::literal(&wanted.definition)
    );
    target.batch_execute(&note).await.context(doing)
}
