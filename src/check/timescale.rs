//! TimescaleDB: whether what the source has of it can be moved, and how.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, first_ten};
use super::server::Server;
use super::{Inputs, Scope};
use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::timescale::recreate::recompute::{self, Caggs, Kept};
use crate::timescale::recreate::{self, Choice, Mode};
use crate::timescale::source::{self, ContinuousAggregate, Database, Job};
use crate::timescale::{pause, prepare};

/// The tables that need an identity of their own: those of continuous aggregates get one for the time of the migration.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn without_aggregates(client: &Client, tables: &[Table]) -> Result<Vec<Table>> {
    let aggregates = prepare::of_aggregates(client, tables).await?;
    let is_one = |table: &Table| aggregates.iter().any(|other| other.relid == table.relid);
    Ok(tables.iter().filter(|table| !is_one(table)).cloned().collect())
}

/// Everything about TimescaleDB; nothing where the source does not have it.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn findings(
    (on_source, source): (&Client, &Server),
    (on_target, target): (&Client, &Server),
    inputs: &Inputs<'_>,
) -> Result<Vec<Finding>> {
    let Some(database) = source::read(on_source).await? else { return Ok(Vec::new()) };
    let mut findings = of_source(&database);
    findings.extend(of_settings(on_source, source, &database).await?);
    let choice = recreate::choose(&database.extension, on_target, inputs.caggs).await?;
    findings.extend(of_target(on_target, target, &database, choice.as_ref()).await?);
    if let Some(choice) = &choice {
        findings.extend(of_aggregates((on_source, target), &database, choice, inputs).await?);
    }
    if choice.is_some_and(|choice| choice.mode != Mode::AsItIs) {
        findings.extend(of_old_format(on_source).await?);
    }
    findings.extend(firing(on_source, &database).await?);
    findings.extend(owners_of_jobs(on_target, &database, inputs).await?);
    if inputs.pause_source_jobs {
        findings.extend(of_jobs(on_source, source, &database).await?);
    }
    let scope = inputs.scope;
    if scope.is_part() || scope.data_only || !scope.map_schemas.is_empty() {
        let message = "A database with TimescaleDB is moved as a whole: filters, --data-only and --map-schema cannot be combined with it.";
        findings.push(blocker(Side::Source, "timescaledb-scope", &database, message));
    }
    Ok(findings)
}

/// What stands against the schema alone, whose hypertables come without a chunk; nothing where the source does not have it.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn of_schema(
    on_source: &Client,
    (on_target, target): (&Client, &Server),
    scope: &Scope,
) -> Result<Vec<Finding>> {
    let Some(database) = source::read(on_source).await? else { return Ok(Vec::new()) };
    let mut findings = of_source(&database);
    let choice = recreate::choose(&database.extension, on_target, Caggs::Copy).await?;
    findings.extend(of_target(on_target, target, &database, choice.as_ref()).await?);
    // The extension's catalog is taken over: nothing is made again here.
    findings.retain(|found| !matches!(found.code, "timescaledb-tiered" | "timescaledb-mode"));
    if let Some(Choice { mode: Mode::Recreated(why), .. }) = &choice {
        findings.retain(|found| found.code != "timescaledb-version" || found.side != Side::Target);
        let message = format!(
            "The schema alone comes to a server with the same version only, by a superuser of it; but {why}. A migration makes all of it \
             again on a target with a newer version."
        );
        let version = &database.extension.version;
        findings.push(blocker(Side::Target, "timescaledb-version", &database, message).fix(format!(
            "ALTER EXTENSION timescaledb UPDATE TO '{version}';  -- on the target, or the other way round on the source; as a superuser"
        )));
    }
    if scope.is_part() || !scope.map_schemas.is_empty() {
        let message = "The schema of a database with TimescaleDB comes as a whole: filters and --map-schema cannot be combined with it.";
        findings.push(blocker(Side::Source, "timescaledb-scope", &database, message));
    }
    Ok(findings)
}

fn blocker(side: Side, code: &'static str, database: &Database, message: impl Into<String>) -> Finding {
    Finding::new(Severity::Blocker, side, code, format!("timescaledb {}", database.extension.version), message)
}

fn of_source(database: &Database) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !database.extension.is_readable() {
        let (major, minor) = source::OLDEST;
        let message = format!("TimescaleDB before {major}.{minor} is not moved: its catalog is another.");
        findings.push(
            blocker(Side::Source, "timescaledb-version", database, message).fix("ALTER EXTENSION timescaledb UPDATE;"),
        );
    }
    let distributed: Vec<String> = database.distributed().map(|hypertable| hypertable.qualified()).collect();
    if !distributed.is_empty() {
        let message = "It is distributed over several servers (multi-node), which no version of TimescaleDB since 2.14 has. Copy its rows \
                       into an ordinary hypertable first.";
        let found =
            Finding::new(Severity::Blocker, Side::Source, "timescaledb-distributed", first_ten(&distributed), message);
        findings.push(found);
    }
    let tiered: Vec<String> = database
        .tiered()
        .map(|chunk| database.hypertable(chunk.hypertable).map_or_else(|| chunk.qualified(), |of| of.qualified()))
        .collect();
    if !tiered.is_empty() {
        let message =
            "Chunks of it are in tiered storage, outside of the database. Bring them back with untier_chunk() first.";
        let found = Finding::new(Severity::Blocker, Side::Source, "timescaledb-tiered", first_ten(&tiered), message);
        findings.push(found);
    }
    findings
}

/// What the stream of compressed chunks depends on.
async fn of_settings(client: &Client, server: &Server, database: &Database) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    if !database.hypertables.iter().any(|hypertable| hypertable.compression) {
        return Ok(findings);
    }
    let markers: Option<String> = client
        .query_typed_one("SELECT pg_catalog.current_setting('timescaledb.enable_compression_wal_markers', true)", &[])
        .await
        .context(|| "reading a setting of TimescaleDB".into())?
        .get(0);
    if markers.as_deref() != Some("on") || server.major() < 14 {
        let message = "Without the markers of compression in the WAL, which PostgreSQL streams from 14 on, what compression does cannot be \
                       told from what users do.";
        findings.push(
            blocker(Side::Source, "timescaledb-markers", database, message)
                .fix("ALTER SYSTEM SET timescaledb.enable_compression_wal_markers = on;\nSELECT pg_reload_conf();"),
        );
    }
    let message = "Compressed chunks are followed with timescaledb.enable_compressed_direct_batch_delete off, which the migration sets for \
                   the database (and as a superuser for the server) before it begins. A session that is older than that, or sets it on \
                   itself, can delete whole compressed segments unseen: the cutover counts the rows, and refuses then. Compress beforehand \
                   what is to be compressed: chunks that are, are moved as they are.";
    let names: Vec<String> = database.hypertables.iter().filter(|of| of.compression).map(|of| of.qualified()).collect();
    findings.push(Finding::new(Severity::Info, Side::Source, "timescaledb-compression", first_ten(&names), message));
    Ok(findings)
}

/// Which jobs `--pause-source-jobs` pauses, and which it may not.
async fn of_jobs(client: &Client, server: &Server, database: &Database) -> Result<Vec<Finding>> {
    if !database.extension.is_readable() {
        return Ok(Vec::new());
    }
    let not_ours = pause::not_ours(client).await?;
    let running: Vec<&Job> = database.jobs.iter().filter(|job| job.scheduled).collect();
    let (others, ours): (Vec<&Job>, Vec<&Job>) = running.into_iter().partition(|job| not_ours.contains(&job.id));
    let names = |jobs: &[&Job]| first_ten(&jobs.iter().map(|job| pause::shown(job)).collect::<Vec<_>>());
    let mut findings = Vec::new();
    if !ours.is_empty() {
        let message =
            "--pause-source-jobs pauses these jobs from before the slot on; `walferry clean` has them run again.";
        findings.push(Finding::new(Severity::Info, Side::Source, "timescaledb-jobs", names(&ours), message));
    }
    if !others.is_empty() {
        let mut owners: Vec<String> = others.iter().map(|job| crate::sql::identifier(&job.owner)).collect();
        owners.sort();
        owners.dedup();
        let message = "--pause-source-jobs cannot pause these jobs: they belong to other roles, and run on.";
        let fix = format!("GRANT {} TO {};", owners.join(", "), crate::sql::identifier(&server.role));
        let found =
            Finding::new(Severity::Warning, Side::Source, "timescaledb-jobs-of-others", names(&others), message);
        findings.push(found.fix(fix));
    }
    Ok(findings)
}

async fn of_target(
    client: &Client,
    server: &Server,
    database: &Database,
    choice: Option<&Choice>,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    match choice {
        Some(choice) => findings.extend(mode(server, choice, database)),
        None => findings.push(blocker(
            Side::Target,
            "timescaledb-version",
            database,
            "The target does not offer the extension timescaledb.",
        )),
    }
    let installed = source::extension(client).await?;
    if let Some(installed) = installed.filter(|installed| installed.schema != database.extension.schema) {
        let message = format!(
            "The target has the extension in the schema {}, and the source in {}, by which views and defaults name its functions.",
            installed.schema, database.extension.schema
        );
        findings.push(blocker(Side::Target, "timescaledb-schema", database, message).fix(format!(
            "DROP EXTENSION timescaledb;\nCREATE EXTENSION timescaledb SCHEMA {};  -- on the target, in a session of its own",
            crate::sql::identifier(&database.extension.schema)
        )));
    }
    if !server.setting("shared_preload_libraries").is_some_and(|loaded| loaded.contains("timescaledb")) {
        let message = "The target does not load TimescaleDB at its start.";
        findings.push(
            blocker(Side::Target, "timescaledb-preload", database, message)
                .fix("ALTER SYSTEM SET shared_preload_libraries = 'timescaledb';  -- with what is there already; then restart the server"),
        );
    }
    let license: Option<String> =
        client.query_typed_one("SELECT pg_catalog.current_setting('timescaledb.license', true)", &[]).await?.get(0);
    if database.extension.license != "apache" && license.as_deref() == Some("apache") {
        let message =
            "The target's timescaledb.license is apache, which has no compression, continuous aggregates and policies.";
        findings.push(
            blocker(Side::Target, "timescaledb-license", database, message)
                .fix("ALTER SYSTEM SET timescaledb.license = 'timescale';\nSELECT pg_reload_conf();"),
        );
    }
    Ok(findings)
}

/// Which way is chosen, why, and what stands against it.
fn mode(server: &Server, choice: &Choice, database: &Database) -> Vec<Finding> {
    let object = format!("timescaledb {}", choice.version);
    let why = match &choice.mode {
        Mode::AsItIs => {
            let message = "Same version on both servers: the whole database is moved with its chunks, compressed ones as they are, \
                           continuous aggregates with their rows, and jobs, which sleep on the target until the cutover. There is no way back.";
            return vec![Finding::new(Severity::Info, Side::Target, "timescaledb-mode", object, message)];
        }
        Mode::Recreated(why) => why,
    };
    let message = format!(
        "Made again on the target, because {why}: hypertables, settings, continuous aggregates, policies and jobs by what the extension \
         offers; rows are read decompressed and compressed there again where they are on the source; rows of aggregates are carried over, so \
         that nothing is lost that can no longer be computed. There is no way back."
    );
    let mut findings = vec![Finding::new(Severity::Info, Side::Target, "timescaledb-mode", object, message)];
    if choice.is_older_than(&database.extension) {
        let message = format!(
            "The target has TimescaleDB {}, older than the source's {}: it may lack what the source uses.",
            choice.version, database.extension.version
        );
        let fix = match choice.is_installed {
            true => {
                format!("ALTER EXTENSION timescaledb UPDATE TO '{}';  -- on the target", database.extension.version)
            }
            false => format!("# Install TimescaleDB {} or newer on the target.", database.extension.version),
        };
        findings.push(blocker(Side::Target, "timescaledb-version", database, message).fix(fix));
    }
    if !server.superuser && !choice.is_installed {
        let message = "Only a superuser of the target can make the extension there.";
        let fix = format!(
            "CREATE EXTENSION timescaledb SCHEMA {};  -- as a superuser, in a session of its own",
            crate::sql::identifier(&database.extension.schema)
        );
        findings.push(blocker(Side::Target, "timescaledb-superuser", database, message).fix(fix));
    }
    let own: Vec<String> = database
        .hypertables
        .iter()
        .filter(|hypertable| recreate::schema::own_partitioning(hypertable).is_some())
        .map(|hypertable| hypertable.qualified())
        .collect();
    if !own.is_empty() {
        let message = "It is partitioned by a function of the user's own, which is moved only where both servers have the same version and \
                       our role is a superuser of the target.";
        findings.push(Finding::new(
            Severity::Blocker,
            Side::Source,
            "timescaledb-partitioning",
            first_ten(&own),
            message,
        ));
    }
    findings
}

/// What becomes of the rows of continuous aggregates where they are made again, and what stands against it.
async fn of_aggregates(
    (on_source, target): (&Client, &Server),
    database: &Database,
    choice: &Choice,
    inputs: &Inputs<'_>,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    // A migration that goes on has decided it.
    if inputs.resuming || choice.mode == Mode::AsItIs || database.aggregates.is_empty() {
        return Ok(findings);
    }
    let object = |of: &[&ContinuousAggregate]| first_ten(&of.iter().map(|one| one.qualified()).collect::<Vec<_>>());
    let mut copied: Vec<&ContinuousAggregate> = database.aggregates.iter().collect();
    let looked;
    if inputs.caggs == Caggs::Recompute {
        looked = recompute::look(on_source, database, inputs.pause_source_jobs).await?;
        let computed: Vec<&ContinuousAggregate> =
            looked.iter().filter(|(_, kept)| kept.is_none()).map(|(one, _)| one).collect();
        if !computed.is_empty() {
            let message = "They are computed anew on the target when their raw rows are there, before the cutover. What changes after that \
                           is logged there, and computed by their policies after the cutover.";
            let found = Finding::new(Severity::Info, Side::Source, "timescaledb-recompute", object(&computed), message);
            findings.push(found);
            let (major, minor) = recompute::LOGS_ALL_WRITES_FROM;
            if choice.number() < recompute::LOGS_ALL_WRITES_FROM {
                let message = format!(
                    "--caggs recompute needs TimescaleDB {major}.{minor} on the target: older versions do not log what changes after a refresh."
                );
                let fix = "ALTER EXTENSION timescaledb UPDATE;  -- on the target; or use --caggs copy";
                findings.push(blocker(Side::Target, "timescaledb-recompute-version", database, message).fix(fix));
            }
        }
        copied = looked.iter().filter(|(_, kept)| kept.is_some()).map(|(one, _)| one).collect();
        for (aggregate, kept) in looked.iter().filter_map(|(one, kept)| Some((one, kept.as_ref()?))) {
            let why = match kept {
                Kept::RawIsGone(Some(from)) => format!("some of its raw rows are gone; they are there from {from} on"),
                Kept::RawIsGone(None) => "its raw rows are gone".to_owned(),
                Kept::RetentionRuns => {
                    "a retention policy may drop its raw rows meanwhile, unless --pause-source-jobs is given".to_owned()
                }
            };
            let message = format!("It is copied in spite of --caggs recompute: {why}.");
            let found = Finding::new(
                Severity::Warning,
                Side::Source,
                "timescaledb-not-recomputed",
                aggregate.qualified(),
                message,
            );
            findings.push(found);
        }
    }
    if !target.superuser && !copied.is_empty() {
        let message = "Up to where a continuous aggregate is materialized that is copied can only be written by a superuser of the target.";
        let found = Finding::new(Severity::Blocker, Side::Target, "timescaledb-superuser", object(&copied), message);
        findings.push(found.fix("# --caggs recompute computes those anew whose raw rows are there."));
    }
    Ok(findings)
}

/// Aggregates in the format of versions before 2.7, which no newer one makes.
async fn of_old_format(client: &Client) -> Result<Option<Finding>> {
    let rows = client
        .query_typed(
            "SELECT format('%I.%I', user_view_schema, user_view_name) FROM _timescaledb_catalog.continuous_agg a \
             WHERE pg_catalog.to_jsonb(a)->>'finalized' = 'false' ORDER BY 1",
            &[],
        )
        .await
        .context(|| "reading the format of continuous aggregates".into())?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let message = "It is in the format of TimescaleDB before 2.7, which cannot be made again by another version.";
    let fix = || {
        let calls: Vec<String> = names
            .iter()
            .map(|name| format!("CALL cagg_migrate({}, override => true);", crate::sql::literal(name)))
            .collect();
        calls.join("\n")
    };
    Ok((!names.is_empty()).then(|| {
        Finding::new(Severity::Blocker, Side::Source, "timescaledb-aggregate-format", first_ten(&names), message)
            .fix(fix())
    }))
}

/// Jobs keep their owner: it has to be there, and the extension starts no job as a role that may not log in.
async fn owners_of_jobs(client: &Client, database: &Database, inputs: &Inputs<'_>) -> Result<Vec<Finding>> {
    if inputs.owners.no_owner || inputs.resuming {
        return Ok(Vec::new());
    }
    let owners: BTreeSet<&str> = database.jobs.iter().map(|job| inputs.owners.role(&job.owner)).collect();
    let owners: Vec<&str> = owners.into_iter().collect();
    let rows = client
        .query(
            "SELECT o.name, r.rolcanlogin FROM unnest($1::text[]) o(name) LEFT JOIN pg_catalog.pg_roles r ON r.rolname = o.name \
             WHERE r.rolcanlogin IS NOT TRUE ORDER BY 1",
            &[&owners],
        )
        .await
        .context(|| "looking for the owners of jobs on the target".into())?;
    let of = |is_there: bool| -> Vec<String> {
        let fitting = rows.iter().filter(|row| row.get::<_, Option<bool>>(1).is_some() == is_there);
        fitting.map(|row| crate::sql::identifier(row.get(0))).collect()
    };
    let mut findings = Vec::new();
    let foreign = client
        .query(
            "SELECT pg_catalog.quote_ident(r.rolname) FROM pg_catalog.pg_roles r \
             WHERE r.rolname = ANY ($1) AND NOT pg_catalog.pg_has_role(current_user, r.oid, 'MEMBER') ORDER BY 1",
            &[&owners],
        )
        .await
        .context(|| "looking for the owners of jobs on the target".into())?;
    let foreign: Vec<String> = foreign.iter().map(|row| row.get(0)).collect();
    if !foreign.is_empty() {
        let message = "It owns jobs of TimescaleDB, which only a member of it can make on the target.";
        let fix: Vec<String> = foreign.iter().map(|role| format!("GRANT {role} TO CURRENT_USER;")).collect();
        let found =
            Finding::new(Severity::Blocker, Side::Target, "timescaledb-job-membership", first_ten(&foreign), message);
        findings.push(found.fix(fix.join("\n")));
    }
    let (missing, without_login) = (of(false), of(true));
    if !missing.is_empty() && !inputs.owners.create_roles {
        let message = "It owns jobs of TimescaleDB on the source, and the target has no such role.";
        let fix = missing.iter().map(|role| format!("CREATE ROLE {role} LOGIN;")).collect::<Vec<_>>().join("\n");
        let found =
            Finding::new(Severity::Blocker, Side::Target, "timescaledb-job-owner", first_ten(&missing), message);
        findings.push(found.fix(fix));
    }
    if !without_login.is_empty() {
        let message = "It owns jobs of TimescaleDB, which the extension starts as no role that may not log in: they would not run on the target.";
        let fix = without_login.iter().map(|role| format!("ALTER ROLE {role} LOGIN;")).collect::<Vec<_>>().join("\n");
        let found =
            Finding::new(Severity::Warning, Side::Target, "timescaledb-job-login", first_ten(&without_login), message);
        findings.push(found.fix(fix));
    }
    Ok(findings)
}

/// Triggers that would fire for what is applied: on a hypertable they are on every chunk, also on those to come.
async fn firing(client: &Client, database: &Database) -> Result<Option<Finding>> {
    let relids: Vec<u32> = database.hypertables.iter().map(|hypertable| hypertable.relid).collect();
    let rows = client
        .query(
            "SELECT format('%I on %s', t.tgname, t.tgrelid::regclass) FROM pg_catalog.pg_trigger t \
             WHERE t.tgrelid = ANY ($1) AND NOT t.tgisinternal AND t.tgenabled IN ('A', 'R') ORDER BY 1",
            &[&relids],
        )
        .await
        .context(|| "looking for triggers of hypertables".into())?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let message = "It is ENABLE ALWAYS or REPLICA on a hypertable, and would fire on the target for every change that is applied.";
    Ok((!names.is_empty())
        .then(|| Finding::new(Severity::Blocker, Side::Source, "timescaledb-trigger", first_ten(&names), message)))
}
