//! What each command does: from the raw command line to the parts of the library, and back to a person or a script.

mod about;
mod backfill;
mod databases;
mod next;
mod plan;
mod record;
mod report;
mod suggest;
mod switch;
mod verify;
mod watch;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::MultiProgress;
use serde_json::json;
use tracing::warn;

use crate::care;
use crate::care::connections::Jobs;
use crate::care::tune::{COPY_JOBS, Change};
use crate::check::{self, Report};
use crate::clean;
use crate::cli::{self, Cli, Command};
use crate::connection::ConnectionSpec;
use crate::control::{Answer, Conversation, Request};
use crate::databases::overview;
use crate::demo::{self, DemoOptions};
use crate::error::{self, Error, ErrorKind, Result};
use crate::migrate::{self, Config, Heal};
use crate::observe::board::StatusBoard;
use crate::observe::format::{duration, size_rate};
use crate::observe::logging::LogFormat;
use crate::observe::progress::ProgressMode;
use crate::observe::status::{Phase, Status};
use crate::observe::{locale, logging, progress, render};
use crate::pause::What;
use crate::queue;
use crate::record::Server;
use crate::source::standby::Standbys;
use crate::state_directory::StateDirectory;
use crate::target::index;
use databases::All;
use switch::{Way, automatic, finish, switch};

/// Runs a command.
///
/// # Errors
/// Whatever it ends with; [`ErrorKind::exit_code`] is the exit code.
pub async fn run(cli: Cli) -> Result<()> {
    let log_format = cli.log_format;
    let bars = logging::init(log_format)?;
    for warning in &cli.warnings {
        warn!("{warning}");
    }
    if cli.log_detail {
        warn!("--log-detail: values of rows can be in this log");
        error::log_detail();
    }
    let begun = record::begin(&cli.command);
    let outcome = execute(cli.command, log_format, bars).await;
    if let Some(begun) = begun {
        begun.ended(outcome.as_ref().err());
    }
    outcome
}

async fn execute(command: Command, log_format: LogFormat, bars: MultiProgress) -> Result<()> {
    match command {
        Command::Check(options) => check(options).await,
        Command::Migrate(options) => {
            if options.all.which.all_databases {
                return databases::migrate(&options).await;
            }
            let heal = if options.recopy.is_empty() { Heal::Nothing } else { Heal::Tables(options.recopy) };
            if options.schema_only {
                return schema_only(&options.migrate).await;
            }
            migrate(&options.migrate, heal, log_format, bars).await
        }
        Command::Resync(options) => migrate(&options, Heal::Everything, log_format, bars).await,
        Command::Status(options) => status(options).await,
        Command::Cutover(options) => {
            let way = Way::There { reverse: !options.no_reverse };
            switch(options.switch, way).await
        }
        Command::Switchback(options) => switch(options, Way::Back).await,
        Command::Finish(options) => finish(options).await,
        Command::Pause(options) => pause(options, What::Apply, true).await,
        Command::Resume(options) => pause(options, What::All, false).await,
        Command::Tune(options) => tune(options).await,
        Command::Verify(options) => match options.dir.as_deref().map(All::of).transpose()?.flatten() {
            Some(all) => all.verify(options, log_format, bars).await,
            None => verify::verify(options, log_format, bars).await,
        },
        Command::Repair(options) => verify::repair(options).await,
        Command::Backfill(options) => backfill::backfill(options, log_format, bars).await,
        Command::Report(options) => report::report(options).await,
        Command::Clean(options) => clean(options).await,
        Command::Config(options) => about::config(options),
        Command::Completions(options) => about::completions(options.shell),
        Command::Man(options) => about::man(&options),
        Command::SuggestHypertables(options) => suggest::suggest_hypertables(options).await,
        Command::Demo(options) => {
            let cli::Demo { rows, writers, seconds, json } = options;
            demo::run(DemoOptions { rows, writers, seconds, json, program: None }).await
        }
    }
}

/// Both servers, which have to be given.
fn both(servers: &cli::Servers) -> Result<(ConnectionSpec, ConnectionSpec)> {
    let (source, target) = either(servers)?;
    let missing = |name: &str, variable: &str| {
        Error::new(ErrorKind::Usage, format!("--{name} is missing"))
            .hint(format!("Give --{name} or set {variable}; see `walferry help`."))
    };
    Ok((
        source.ok_or_else(|| missing("source", "WALFERRY_SOURCE"))?,
        target.ok_or_else(|| missing("target", "WALFERRY_TARGET"))?,
    ))
}

/// The servers that are given.
fn either(servers: &cli::Servers) -> Result<(Option<ConnectionSpec>, Option<ConnectionSpec>)> {
    let given = |name: &str, text: &Option<String>, command: &Option<String>| -> Result<Option<ConnectionSpec>> {
        let Some(text) = text else { return Ok(None) };
        let spec = parse(name, text, command)?;
        if spec.has_inline_password() && stands_in_the_arguments(text) {
            warn!(
                "the password in --{name} shows in the process list; a password file or --{name}-password-command does not"
            );
        }
        Ok(Some(spec))
    };
    Ok((
        given("source", &servers.source, &servers.source_password_command)?,
        given("target", &servers.target, &servers.target_password_command)?,
    ))
}

/// The servers that are given; in the place of one that is not, that of the migration whose state directory this is.
fn either_or_known(
    servers: &cli::Servers,
    directory: &Path,
) -> Result<(Option<ConnectionSpec>, Option<ConnectionSpec>)> {
    let (source, target) = either(servers)?;
    let Some(identity) = StateDirectory::at(directory).identity()? else { return Ok((source, target)) };
    let or_known = |spec: Option<ConnectionSpec>, name: &str, known: &str, command: &Option<String>| {
        spec.map_or_else(|| parse(name, known, command).map(Some), |spec| Ok(Some(spec)))
    };
    Ok((
        or_known(source, "source", &identity.source, &servers.source_password_command)?,
        or_known(target, "target", &identity.target, &servers.target_password_command)?,
    ))
}

/// Standbys of the source, whose passwords come from where the source's comes from.
fn standbys(options: &cli::StandbyOptions, servers: &cli::Servers) -> Result<Standbys> {
    let given = |name: &str, text: &Option<String>| -> Result<Option<ConnectionSpec>> {
        text.as_ref().map(|text| parse(name, text, &servers.source_password_command)).transpose()
    };
    Ok(Standbys {
        copy: given("copy-from", &options.copy_from)?,
        stream: given("stream-from", &options.stream_from)?,
        left: None,
    })
}

fn parse(name: &str, text: &str, command: &Option<String>) -> Result<ConnectionSpec> {
    let mut spec = ConnectionSpec::parse(text).map_err(|error| error.context(format!("--{name}")))?;
    if let Some(record) = record::ours() {
        spec = spec.recorded(record.of(if name == "target" { Server::Target } else { Server::Source }));
    }
    Ok(match command {
        Some(command) => spec.with_password_command(command.clone()),
        None => spec,
    })
}

/// Whether a connection string came by the command line, which the process list shows, and not by the environment.
fn stands_in_the_arguments(text: &str) -> bool {
    std::env::args_os().any(|argument| argument.to_string_lossy().contains(text))
}

async fn check(options: cli::Check) -> Result<()> {
    if options.all.all_databases {
        return databases::check(options).await;
    }
    if options.plan {
        return plan::print_plan(&options);
    }
    let (source, target) = both(&options.servers)?;
    // What a migration of its own has left on both servers is in nobody's way.
    let identity = options.dir.as_deref().map(|dir| StateDirectory::at(dir).identity()).transpose()?.flatten();
    let recorded = identity.as_ref().map(|identity| identity.scope.clone());
    let resuming = identity.is_some_and(|identity| {
        (identity.source, identity.target) == (source.without_password(), target.without_password())
    });
    let wanted = Jobs {
        copy: options.parallelism.copy_jobs.unwrap_or(COPY_JOBS),
        index: options.parallelism.index_jobs,
        apply: options.parallelism.apply_workers,
    };
    let caps = options.connections.caps();
    let (source, target) = (source.with_connections_max(caps.source), target.with_connections_max(caps.target));
    let given = options.filters.scope(Some(&options.place));
    let scope = recorded.filter(|_| resuming).unwrap_or(given.clone());
    scope.prove_same(&given)?;
    let report = check::run(&check::Inputs {
        source: &source,
        target: &target,
        standbys: &standbys(&options.standbys, &options.servers)?,
        state_directory: options.dir.as_deref(),
        jobs: caps.fit(wanted)?,
        queue_max_bytes: options.parallelism.queue_max_bytes,
        scope: &scope,
        resuming,
        replicate_ddl: options.replicate_ddl,
        owners: &options.roles.owners(),
        replica_identity_full: options.replica_identity_full,
        pause_source_jobs: options.timescale.pause_source_jobs,
        caggs: options.timescale.caggs,
        estimate: Duration::from_secs(options.estimate_seconds),
    })
    .await?;
    if options.json {
        print_json(&report)?
    } else {
        let next = if report.ready() { next_after_check(&options) } else { String::new() };
        print(&format!("{report}\n{next}"))?
    }
    if report.ready() { Ok(()) } else { Err(blocked(&report)) }
}

/// What to type when a check has found nothing in the way.
fn next_after_check(options: &cli::Check) -> String {
    let files = match options.dir {
        Some(_) => "",
        None => ", and --dir for its files: a directory that does not exist yet, on a disk with room for the queue",
    };
    format!("next: `walferry migrate` with the same options{files}\n")
}

fn blocked(report: &Report) -> Error {
    let count = report.of(check::Severity::Blocker).count();
    Error::new(ErrorKind::Blocked, format!("{} against the migration", check::that_stand(count)))
        .hint("Mend each by what it says, then run the same check again. Nothing was changed on either server.")
}

/// As much as the queue takes unless it is said: not so much that the disk is full before the queue stops taking changes.
fn default_quota(directory: &std::path::Path) -> u64 {
    let default = queue::Options::default().max_bytes;
    let room = StateDirectory::at(directory).room_for_queues();
    room.map_or(default, |room| default.min(room / 5 * 4))
}

async fn migrate(options: &cli::Migrate, heal: Heal, log_format: LogFormat, bars: MultiProgress) -> Result<()> {
    overview::refuse(&options.directory.dir, if heal == Heal::Everything { "resync" } else { "migrate" })?;
    let config = config(options, heal)?;
    let board = StatusBoard::new();
    let mode = ProgressMode::detect(log_format, bars, config.care.copy_jobs.unwrap_or(COPY_JOBS));
    let shown = progress::start(board.clone(), mode);
    let next = next::say(board.clone(), &options.directory.dir, options.when.cutover == cli::CutoverStart::Auto);
    let outcome = migrate::run(config, &board).await;
    drop((shown, next));
    outcome?;
    migrated(options, &board)
}

/// How a migration is to be done, from the command line.
fn config(options: &cli::Migrate, heal: Heal) -> Result<Config> {
    let (source, target) = both(&options.servers)?;
    let scope = options.filters.scope(Some(&options.place));
    if !scope.map_schemas.is_empty() && !options.no_reverse {
        return Err(Error::new(ErrorKind::Usage, "there is no way back to schemas of other names")
            .hint("Give --no-reverse beside --map-schema: the cutover is for good then."));
    }
    if !scope.hypertables.is_empty() && !options.no_reverse {
        return Err(Error::new(ErrorKind::Usage, "there is no way back from hypertables to plain tables")
            .hint("Give --no-reverse beside --hypertables: the cutover is for good then."));
    }
    Ok(Config {
        source,
        target,
        standbys: standbys(&options.standbys, &options.servers)?,
        directory: options.directory.dir.clone(),
        split_above_bytes: options.split_above,
        index: index::Options { jobs: options.parallelism.index_jobs, memory_bytes: options.index_memory },
        apply_workers: options.parallelism.apply_workers,
        queue: queue::Options {
            max_bytes: options.parallelism.queue_max_bytes.unwrap_or_else(|| default_quota(&options.directory.dir)),
            keep: options.queue_keep,
            ..queue::Options::default()
        },
        http_address: options.http_addr.0,
        heal,
        owners: options.roles.owners(),
        on_conflict: options.on_conflict,
        replica_identity_full: options.replica_identity_full,
        pause_source_jobs: options.timescale.pause_source_jobs,
        caggs: options.timescale.caggs,
        reverse: !options.no_reverse,
        replicate_ddl: options.replicate_ddl,
        scope,
        automatic: automatic(options)?,
        care: care::Options {
            copy_jobs: options.parallelism.copy_jobs,
            copy_rate: options.care.copy_rate,
            max_standby_lag: options.care.max_standby_lag,
            source_wal_max: options.care.source_wal_max,
            on_source_wal_max: options.care.on_source_wal_max,
            caps: options.connections.caps(),
        },
    })
}

/// `migrate --schema-only`.
async fn schema_only(options: &cli::Migrate) -> Result<()> {
    let (source, target) = both(&options.servers)?;
    let scope = options.filters.scope(Some(&options.place));
    let owners = options.roles.owners();
    let done = migrate::schema_only(&source, &target, &options.directory.dir, &scope, &owners).await?;
    for said in &done.said {
        warn!("{said}");
    }
    if options.json {
        return print_json(&json!({ "version": 1, "schema_only": true, "statements": done.statements }));
    }
    print(&format!(
        "The target has the schema with its keys and indexes, and no rows ({} statements).\n",
        done.statements
    ))
}

fn migrated(options: &cli::Migrate, board: &StatusBoard) -> Result<()> {
    if options.json {
        return print_json(&board.snapshot());
    }
    // A resumed migration may not have been given its filters again.
    let identity = StateDirectory::at(&options.directory.dir).identity()?;
    if identity.is_some_and(|identity| identity.scope.is_part()) {
        let text = "What was migrated has moved. The server that was left refuses writes to it, and has all its other tables as before.";
        return print(&format!(
            "{text}\nWhen it needs the moved tables no more: walferry clean --dir {}\n",
            options.directory.dir.display()
        ));
    }
    let who = match board.snapshot().phase {
        Phase::Reversed => "The old primary is the primary again. The other database stays read-only by default.",
        _ => "The target is the primary now. The source's database stays read-only by default.",
    };
    print(&format!("{who}\nWhen you need that one no more: walferry clean --dir {}\n", options.directory.dir.display()))
}

async fn status(options: cli::Status) -> Result<()> {
    if let Some(all) = All::of(&options.directory.dir)? {
        return all.status(&options).await;
    }
    let directory = StateDirectory::at(&options.directory.dir);
    if options.watch && watch::is_possible() {
        return healthy(&options, &watch::watch(&directory).await?);
    }
    let moves = std::io::stdout().is_terminal() && !watch::is_dumb();
    loop {
        let status = read_status(&directory).await?;
        if options.json {
            print_json(&status)?;
        } else {
            let page = render::render(&status, terminal_width());
            // Home and clear, so that nothing of the last page stays.
            print(&if options.watch && moves { format!("\x1b[H\x1b[2J{page}") } else { page })?;
        }
        if !options.watch {
            return healthy(&options, &status);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// With `--exit-code`, whether a migration runs or is over as it should be.
fn healthy(options: &cli::Status, status: &Status) -> Result<()> {
    let healthy = status.process_alive && status.phase != Phase::Failed;
    let over = matches!(status.phase, Phase::CutOver | Phase::Reversed);
    if options.exit_code && !healthy && !over {
        let next = status.error.as_ref().and_then(|error| error.hint.clone());
        return Err(Error::new(ErrorKind::Other, "the migration has failed or is not running")
            .hint(next.unwrap_or_else(|| render::HOW_TO_GO_ON.to_owned())));
    }
    Ok(())
}

/// From the running migration; where none runs, what it wrote down last.
async fn read_status(directory: &StateDirectory) -> Result<Status> {
    let asked = async {
        let mut conversation = Conversation::begin(directory, &Request::Status).await?;
        conversation.next().await
    };
    let error = match asked.await {
        Ok(Answer::Status(status)) => return Ok(*status),
        Ok(_) => Error::new(ErrorKind::Other, "the migration answered something else"),
        Err(error) => error,
    };
    let Ok(written) = std::fs::read(directory.status()) else {
        return if directory.identity()?.is_some() { Ok(Status::not_running(Phase::Preparing)) } else { Err(error) };
    };
    let mut status: Status = serde_json::from_slice(&written)
        .map_err(|error| Error::new(ErrorKind::Other, format!("{}: {error}", directory.status().display())))?;
    status.process_alive = false;
    status.ready_to_cutover = false;
    status.stream.connected = false;
    if !matches!(status.phase, Phase::CutOver | Phase::Reversed) {
        status.blockers = vec!["no migration is running".into()];
    }
    Ok(status)
}

async fn pause(options: cli::PauseOptions, otherwise: What, rest: bool) -> Result<()> {
    if let Some(all) = All::of(&options.directory.dir)? {
        return all.pause(&options, otherwise, rest).await;
    }
    let directory = StateDirectory::at(&options.directory.dir);
    let request = Request::Pause { what: options.what.unwrap_or(otherwise), rest };
    let Answer::Paused(paused) = Conversation::begin(&directory, &request).await?.next().await? else {
        return Err(Error::new(ErrorKind::Other, "the migration answered something else"));
    };
    if options.json {
        return print_json(&json!({ "version": 1, "apply": paused.apply, "copy": paused.copy }));
    }
    let state = |paused: bool| if paused { "paused" } else { "going on" };
    print(&format!("apply {}, copy {}\n", state(paused.apply), state(paused.copy)))
}

async fn tune(options: cli::TuneOptions) -> Result<()> {
    overview::refuse(&options.directory.dir, "tune")?;
    let directory = StateDirectory::at(&options.directory.dir);
    let cli::TuneOptions { copy_jobs, copy_rate, max_standby_lag, .. } = options;
    let request = Request::Tune(Change { copy_jobs, copy_rate, max_standby_lag });
    let Answer::Tuned(tuned) = Conversation::begin(&directory, &request).await?.next().await? else {
        return Err(Error::new(ErrorKind::Other, "the migration answered something else"));
    };
    if options.json {
        return print_json(&json!({
            "version": 1,
            "copy_jobs": tuned.copy_jobs,
            "copy_jobs_max": tuned.copy_jobs_max,
            "copy_rate_bytes_per_second": tuned.copy_rate_bytes_per_second,
            "max_standby_lag_seconds": tuned.max_standby_lag_seconds,
        }));
    }
    let fewer = copy_jobs.filter(|wanted| *wanted > tuned.copy_jobs);
    let fewer = fewer.map_or("", |_| " (no more fit below the most connections)");
    let rate = tuned.copy_rate_bytes_per_second.map_or("off".to_owned(), |rate| size_rate(rate as f64));
    let lag = tuned.max_standby_lag_seconds.map_or("off".to_owned(), duration);
    print(&format!("copy jobs {}{fewer}, copy rate {rate}, standby lag {lag}\n", tuned.copy_jobs))
}

/// The standby that a migration's slot may be on, as it is given or as its state directory knows it.
fn standby_to_clean(options: &cli::Clean, directory: Option<&Path>) -> Result<Option<ConnectionSpec>> {
    let identity = directory.map(|directory| StateDirectory::at(directory).identity()).transpose()?.flatten();
    let standby = options.stream_from.clone().or(identity.and_then(|identity| identity.stream_from));
    standby.map(|text| parse("stream-from", &text, &options.servers.source_password_command)).transpose()
}

async fn clean(options: cli::Clean) -> Result<()> {
    if let Some(all) = options.dir.as_deref().map(All::of).transpose()?.flatten() {
        return all.clean(&options).await;
    }
    let standby = standby_to_clean(&options, options.dir.as_deref())?;
    let removed = match &options.dir {
        Some(directory) => {
            let (source, target) = either_or_known(&options.servers, directory)?;
            clean::directory(directory, source, target, standby).await?
        }
        None => {
            let (source, target) = both(&options.servers)?;
            clean::servers(&source, &target, standby.as_ref(), None).await?
        }
    };
    if options.json {
        return print_json(&json!({ "version": 1, "removed": removed }));
    }
    if removed.is_empty() {
        return print("Nothing was left.\n");
    }
    print(&removed.iter().map(|what| format!("removed {what}\n")).collect::<String>())
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    print_exactly(&format!("{text}\n"))
}

/// Writes to standard output what people read.
fn print(text: &str) -> Result<()> {
    print_exactly(&locale::shown(text))
}

/// Writes to standard output. A reader who has gone away (`| head`) is no error.
fn print_exactly(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn terminal_width() -> usize {
    let width = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    // A terminal knows; a pipe is as wide as a page.
    width
        .or_else(|| rustix::termios::tcgetwinsize(std::io::stdout()).ok().map(|size| usize::from(size.ws_col)))
        .unwrap_or(80)
}
