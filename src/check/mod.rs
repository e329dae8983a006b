//! The preflight: proves on both servers that a migration can work, before anything is touched.
//!
//! ```text
//!  connect both ──► server (who, what, settings) ──► source  (rights, slots, sessions)  ─┐
//!                                               └──► objects (tables, what cannot move) ─┤
//!                                               └──► target  (empty, writable)          ─┼──► findings, by severity ──► Report
//!                                               └──► both    (do they fit)              ─┤
//!  a short trial of the copy ──► estimate ───────────────────────────────────────────────┤
//!  this machine ──► local (disk, directory, clock), tools (pg_dump)                     ─┘
//! ```
//!
//! Everything is read in sessions whose transactions are read-only, with a few queries over whole catalogs and none per
//! table; only the trial of a copy (`estimate`) writes, in a transaction that it rolls back. A finding says what was found on which object, why it matters, and the SQL that mends it.

mod all;
mod both;
mod ddl;
mod differing;
mod estimate;
pub(crate) mod existing;
mod hypertables;
mod local;
mod objects;
mod report;
mod scope;
mod server;
mod several;
mod source;
mod standby;
mod target;
mod timescale;
pub mod tools;
mod unstreamed;
mod versions;

use std::path::Path;
use std::time::Duration;

use futures_util::future::{join, try_join};
use tokio_postgres::Client;

pub use all::{AllChecked, Checked, all};
pub use estimate::{Estimate, TriedTable};
pub(crate) use report::that_stand;
pub use report::{Finding, Report, ServerSummary, Severity, Side};

use crate::care::connections::Jobs;
use crate::connection::ConnectionSpec;
use crate::connection::wire::RawSession;
use crate::error::{Context, ErrorKind, Result};
use crate::source::catalog;
use crate::source::scope::{Scope, Selection};
use crate::source::standby::Standbys;
use crate::source::version::Version;
use server::Server;
pub(crate) use target::SERVICE_OWNERS;

use crate::timescale::Caggs;
use crate::unstreamed::large_object::Owners;

/// The version of the report's format.
const REPORT_VERSION: u32 = 1;

/// What to check.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// The server that is moved away from.
    pub source: &'a ConnectionSpec,
    /// The server that is moved to.
    pub target: &'a ConnectionSpec,
    /// Standbys of the source that are to do the reading.
    pub standbys: &'a Standbys,
    /// Where the queue will be, if that is known already.
    pub state_directory: Option<&'a Path>,
    /// What is done at once.
    pub jobs: Jobs,
    /// Quota of the queue in bytes, if there is one.
    pub queue_max_bytes: Option<u64>,
    /// What of the database is moved.
    pub scope: &'a Scope,
    /// Whether a migration goes on that began before: its ledger, slot, publications and tables are expected.
    pub resuming: bool,
    /// Whether DDL is to be replicated.
    pub replicate_ddl: bool,
    /// Who is to own what on the target, and which roles are made there.
    pub owners: &'a Owners,
    /// Whether the migration will set `REPLICA IDENTITY FULL` where nothing else identifies a row.
    pub replica_identity_full: bool,
    /// Whether the source's TimescaleDB jobs are to be paused.
    pub pause_source_jobs: bool,
    /// What becomes of the rows of TimescaleDB's continuous aggregates.
    pub caggs: Caggs,
    /// How long a trial of the copy may take, from which its time is estimated; zero for no trial. There is none for a migration
    /// that goes on, either.
    pub estimate: Duration,
}

/// Checks both servers and this machine. Changes nothing: what the trial writes on the target it takes back.
///
/// A server that cannot be reached is a finding, so that the rest is still checked.
///
/// # Errors
/// A query of the check itself failed, or a connection broke on the way.
pub async fn run(inputs: &Inputs<'_>) -> Result<Report> {
    let mut findings = Vec::new();
    let mut of_target = Vec::new();
    let (source, target) =
        join(open(inputs.source, Side::Source, &mut findings), open(inputs.target, Side::Target, &mut of_target)).await;
    let source = source.context(|| "checking the source".into())?;
    let target = target.context(|| "checking the target".into())?;
    findings.append(&mut of_target);

    let mut tables = Vec::new();
    let mut references = None;
    if let Some((client, server)) = &source
        && server::supported(Side::Source).contains(&server.major())
    {
        let doing = || "checking the source".to_owned();
        // With what a migration began, its patterns may name nothing any more.
        let selection = match inputs.resuming {
            true => inputs.scope.select(client).await,
            false => inputs.scope.select_strictly(client).await,
        };
        let selection = selection.context(doing)?;
        findings.extend(scope::findings(selection.as_ref()));
        tables = catalog::chosen(catalog::tables(client).await.context(doing)?, selection.as_ref());
        references = Some(both::references(client, selection.as_ref()).await.context(doing)?);
        let source = check_source(inputs, client, server, &tables, selection.as_ref());
        findings.extend(source.await.context(doing)?);
        findings.extend(standby::findings(inputs, client, server).await.context(doing)?);
    }
    if let Some((client, server)) = &target
        && server::supported(Side::Target).contains(&server.major())
    {
        findings.extend(check_target(inputs, client, server).await.context(|| "checking the target".into())?);
        if let Some(references) = references.as_ref().filter(|_| !inputs.scope.data_only) {
            findings.extend(both::missing(client, server, references, inputs).await?);
            findings.extend(objects::locks(server, Side::Target, references.restore_locks(), "Restoring the schema"));
        }
    }
    if let (Some((_, server)), Some(references)) = (&source, &references) {
        findings.extend(objects::locks(
            server,
            Side::Source,
            references.dump_locks(),
            "Dumping the schema, or fencing the source at the cutover,",
        ));
    }
    if let (Some((on_source, source)), Some((on_target, target))) = (&source, &target) {
        findings.extend(both::servers(source, target));
        if server::supported(Side::Source).contains(&source.major()) {
            findings.extend(versions::identity_of_partitions(on_source, target).await?);
        }
        if inputs.scope.moves_configuration() {
            findings.extend(unstreamed::configuration(on_source, on_target, &target.role).await?);
        }
        findings.extend(differing::settings(source, target));
        findings.extend(differing::of_the_database(on_source, on_target, &target.database).await?);
        findings.extend(scope::mapped(on_source, on_target, inputs.scope, inputs.resuming).await?);
        findings.extend(timescale::findings((on_source, source), (on_target, target), inputs).await?);
        if inputs.scope.data_only {
            findings.extend(existing::compare(on_source, on_target, &tables, inputs).await?);
        } else {
            let tools = tools::find_tools_for(source.major(), target.major());
            findings.extend(tools::findings(&tools, source.major(), target.major()));
        }
        findings.push(target::disk(source.bytes));
        let declared = &inputs.scope.hypertables;
        if !declared.is_empty() && !inputs.resuming {
            let (found, extension) = hypertables::target(on_target, declared).await?;
            findings.extend(found);
            findings.extend(hypertables::source(on_source, &tables, declared, extension).await?);
        }
    }
    if let Some((client, server)) = &target
        && !server.superuser
        && !server.in_recovery
        && server::supported(Side::Target).contains(&server.major())
    {
        target::without_superuser(client, &mut findings).await?;
    }
    if let Some(directory) = inputs.state_directory {
        let source_bytes = source.as_ref().map(|(_, server)| server.bytes);
        findings.extend(local::state_directory(directory, inputs.queue_max_bytes, source_bytes));
    }

    let mut estimate = None;
    if let Some((_, server)) = &source
        && !inputs.estimate.is_zero()
        && !inputs.resuming
        && server::supported(Side::Source).contains(&server.major())
        && !Version(server.major()).scans_page_ranges()
    {
        let message = "The time of the copy is not estimated: before PostgreSQL 14 a few pages of a table cannot be read by themselves.";
        findings.push(Finding::new(
            Severity::Info,
            Side::Source,
            "estimate",
            format!("PostgreSQL {}", server.version),
            message,
        ));
    } else if let Some((client, server)) = &source
        && !inputs.estimate.is_zero()
        && !inputs.resuming
        && server::supported(Side::Source).contains(&server.major())
    {
        // What was found to be the wrong target gets no load.
        let wrong = findings.iter().any(|found| found.side == Side::Target && found.severity == Severity::Blocker);
        let usable =
            target.as_ref().filter(|(_, target)| server::supported(Side::Target).contains(&target.major()) && !wrong);
        let trial = estimate::Trial {
            source: inputs.standbys.copy.as_ref().unwrap_or(inputs.source),
            target: usable.map(|_| inputs.target),
            tables: &tables,
            index_bytes: estimate::index_bytes(client, &tables).await,
            copy_jobs: inputs.jobs.copy,
            index_jobs: inputs.jobs.index,
            free_connections: usable
                .map_or(i64::MAX, |(_, target)| target.free_connections)
                .min(server.free_connections)
                .min(count(inputs.source.connections().room().min(inputs.target.connections().room()))),
            no_wal: usable.is_some_and(|(_, target)| target.setting("wal_level") == Some("minimal")),
            limit: inputs.estimate,
        };
        let (found, finding) = estimate::run(&trial).await;
        estimate = found;
        findings.push(finding);
    }

    let (from, to) = ((inputs.source, source.as_ref()), (inputs.target, target.as_ref()));
    Ok(report(from, to, &tables, estimate, findings))
}

/// What was found, in order.
fn report(
    (source_spec, source): (&ConnectionSpec, Option<&(Client, Server)>),
    (target_spec, target): (&ConnectionSpec, Option<&(Client, Server)>),
    tables: &[catalog::Table],
    estimate: Option<Estimate>,
    mut findings: Vec<Finding>,
) -> Report {
    // The order within a severity is that of the checks: settings first, single objects later.
    findings.sort_by_key(|finding| finding.severity);
    Report {
        version: REPORT_VERSION,
        ready: findings.iter().all(|finding| finding.severity != Severity::Blocker),
        source: source.map(|(_, server)| server.summary(source_spec.describe())),
        target: target.map(|(_, server)| server.summary(target_spec.describe())),
        tables: tables.len(),
        bytes: tables.iter().map(|table| table.bytes).sum(),
        rows_estimate: tables.iter().map(|table| table.estimated_rows.max(0.0) as i64).sum(),
        tables_never_analysed: tables.iter().filter(|table| table.estimated_rows < 0.0).count(),
        estimate,
        findings,
    }
}

/// Checks whether the schema alone could be brought.
///
/// # Errors
/// As [`run`].
pub async fn schema(
    source: &ConnectionSpec,
    target: &ConnectionSpec,
    scope: &Scope,
    owners: &Owners,
) -> Result<Report> {
    let inputs = Inputs {
        source,
        target,
        standbys: &Standbys::default(),
        state_directory: None,
        jobs: Jobs { copy: 0, index: 0, apply: 0 },
        queue_max_bytes: None,
        scope,
        resuming: false,
        replicate_ddl: false,
        owners,
        replica_identity_full: false,
        pause_source_jobs: false,
        caggs: Caggs::Copy,
        estimate: Duration::ZERO,
    };
    let mut findings = Vec::new();
    let mut of_target = Vec::new();
    let (from, to) = join(open(source, Side::Source, &mut findings), open(target, Side::Target, &mut of_target)).await;
    let (from, to) = (from.context(|| "checking the source".into())?, to.context(|| "checking the target".into())?);
    findings.append(&mut of_target);
    let mut tables = Vec::new();
    if let (Some((on_source, source)), Some((on_target, target))) = (&from, &to) {
        let selection = scope.select_strictly(on_source).await?;
        findings.extend(scope::findings(selection.as_ref()));
        findings.extend(scope::mapped(on_source, on_target, scope, false).await?);
        tables = catalog::chosen(catalog::tables(on_source).await?, selection.as_ref());
        let references = both::references(on_source, selection.as_ref()).await?;
        findings.extend(both::missing(on_target, target, &references, &inputs).await?);
        findings.extend(both::servers(source, target));
        findings.extend(timescale::of_schema(on_source, (on_target, target), scope).await?);
        findings.extend(target::emptiness(on_target, target).await?);
        findings.extend(objects::locks(source, Side::Source, references.dump_locks(), "Dumping the schema"));
        findings.extend(objects::locks(target, Side::Target, references.restore_locks(), "Restoring the schema"));
        let tools = tools::find_tools_for(source.major(), target.major());
        findings.extend(tools::findings(&tools, source.major(), target.major()));
    }
    Ok(report((source, from.as_ref()), (target, to.as_ref()), &tables, None, findings))
}

/// Connects to a server and reads what it is. None, with a finding, when it cannot be reached or a pooler answers.
async fn open(spec: &ConnectionSpec, side: Side, findings: &mut Vec<Finding>) -> Result<Option<(Client, Server)>> {
    let connected = try_join(spec.connect("walferry check"), spec.connect("walferry check"));
    let (client, second) = match connected.await {
        Ok(clients) => clients,
        Err(error) => {
            let message = format!("It cannot be connected to: {error}.");
            let mut found = Finding::new(Severity::Blocker, side, "connection", spec.describe(), message);
            found.fix = error.next_step().map(str::to_string);
            findings.push(found);
            return Ok(None);
        }
    };
    // One that gives each of our sessions a server session of its own shows only in the process that the login names.
    let is_direct = match RawSession::connect(spec, "walferry check").await {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::Blocked => false,
        Err(error) => return Err(error),
    };
    if !is_direct || server::is_pooled(&client, &second).await? {
        findings.push(server::pooler(side, spec.describe()));
        return Ok(None);
    }
    drop(second);
    server::make_read_only(&client).await?;
    let server = server::read(&client).await?;
    findings.extend(server::findings(&server, side));
    findings.extend(local::clock(&client, side).await?);
    Ok(Some((client, server)))
}

async fn check_source(
    inputs: &Inputs<'_>,
    client: &Client,
    server: &Server,
    tables: &[catalog::Table],
    selection: Option<&Selection>,
) -> Result<Vec<Finding>> {
    let mut findings = source::settings(server);
    findings.extend(source::replication(client, server, inputs.resuming).await?);
    findings.extend(source::slot_wal_limit(client, server).await?);
    let Jobs { copy, apply, .. } = inputs.jobs;
    let needed = inputs.jobs.source_connections();
    // The way back applies to the source.
    let of_the_way_back = Jobs { copy: 0, index: 0, apply }.target_connections();
    let what = format!("for {copy} copy jobs, or later the way back's {apply} apply workers, and some more");
    findings.extend(server::connections(
        server,
        Side::Source,
        count(needed),
        count(needed.max(of_the_way_back)),
        &what,
    ));
    findings.extend(source::transactions(client, server, source::LONG_TRANSACTION).await?);
    findings.extend(source::privileges(client, server, selection).await?);
    findings.extend(source::cutover(client, server, Side::Source).await?);
    let own = timescale::without_aggregates(client, tables).await?;
    findings.extend(objects::tables(client, &own, inputs.replica_identity_full).await?);
    findings.extend(objects::others(client, selection).await?);
    findings.extend(unstreamed::findings(client, server, inputs.scope).await?);
    findings.extend(source::session_defaults(client, Side::Source).await?);
    findings.extend(target::replica_role(client, server, Side::Source).await?);
    if inputs.replicate_ddl {
        findings.extend(ddl::source(client, server).await?);
    }
    Ok(findings)
}

async fn check_target(inputs: &Inputs<'_>, client: &Client, server: &Server) -> Result<Vec<Finding>> {
    let mut findings = target::settings(server);
    let Jobs { copy, index, apply } = inputs.jobs;
    let needed = count(inputs.jobs.target_connections());
    let what = format!("for {copy} copy jobs and {index} index jobs, or later {apply} apply workers, and some more");
    findings.extend(server::connections(server, Side::Target, needed, needed, &what));
    findings.extend(target::replica_role(client, server, Side::Target).await?);
    findings.extend(source::cutover(client, server, Side::Target).await?);
    if !inputs.resuming {
        let found = target::emptiness(client, server).await?;
        // With --data-only it has tables, and only the ledger of another migration is in the way.
        findings.extend(found.into_iter().filter(|_| !inputs.scope.data_only));
        if inputs.scope.data_only {
            findings.extend(target::ledger_of_another(client).await?);
        }
    }
    findings.extend(source::session_defaults(client, Side::Target).await?);
    if inputs.replicate_ddl {
        findings.extend(ddl::target(client).await?);
    }
    Ok(findings)
}

/// A number of connections in the type that the server counts in.
fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
