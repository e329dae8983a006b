//! The commands on a directory of several migrations (`--all-databases`): each does for all what it does for one.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::MultiProgress;
use serde_json::{Value, json};

use super::switch::{Way, ask_on_terminal, cutover_options, end_the_way_back, rehearsal_page};
use super::{both, either, parse, print, print_json, read_status, standby_to_clean, standbys, verify};
use crate::care::connections::Jobs;
use crate::care::tune::COPY_JOBS;
use crate::check;
use crate::clean;
use crate::cli;
use crate::connection::ConnectionSpec;
use crate::control::{Answer, Conversation, Request};
use crate::cutover::{self, Outcome, Rehearsal};
use crate::databases::overview::{self, Member, Overview};
use crate::databases::run::{self, Options};
use crate::databases::summary::{Summary, is_switched, of_unmoved};
use crate::databases::{list, worst};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::migrate::Heal;
use crate::observe::logging::LogFormat;
use crate::observe::status::{Direction, Phase, Status};
use crate::pause::What;
use crate::state_directory::StateDirectory;

/// `migrate --all-databases`.
pub(super) async fn migrate(options: &cli::MigrateAgain) -> Result<()> {
    let config = super::config(&options.migrate, Heal::Nothing)?;
    let which = Options {
        include: options.all.which.include_database.clone(),
        exclude: options.all.which.exclude_database.clone(),
        skip_blocked: options.all.skip_blocked_databases,
    };
    let directory = config.directory.clone();
    let summary = run::run(config, &which).await?;
    if options.migrate.json {
        return print_json(&summary);
    }
    print(&format!(
        "{}When you need the databases that were left no more: walferry clean --dir {}\n",
        summary.render(),
        directory.display()
    ))
}

/// `check --all-databases`.
pub(super) async fn check(options: cli::Check) -> Result<()> {
    let (source, target) = both(&options.servers)?;
    let caps = options.connections.caps();
    let (from, to) = (source.connect("walferry check").await?, target.connect("walferry check").await?);
    let databases = list::databases(&from, &options.all.include_database, &options.all.exclude_database).await?;
    let databases: Vec<&list::Database> = databases.iter().collect();
    let share = |all: usize| (all / databases.len().max(1)).max(1);
    let jobs = Jobs {
        copy: share(options.parallelism.copy_jobs.unwrap_or(COPY_JOBS)),
        index: share(options.parallelism.index_jobs),
        apply: share(options.parallelism.apply_workers),
    };
    let scope = options.filters.scope(Some(&options.place));
    let owners = options.roles.owners();
    let inputs = check::Inputs {
        source: &source.with_connections_max(caps.source),
        target: &target.with_connections_max(caps.target),
        standbys: &standbys(&options.standbys, &options.servers)?,
        state_directory: options.dir.as_deref(),
        jobs,
        queue_max_bytes: options.parallelism.queue_max_bytes,
        scope: &scope,
        resuming: false,
        replicate_ddl: options.replicate_ddl,
        owners: &owners,
        replica_identity_full: options.replica_identity_full,
        pause_source_jobs: options.timescale.pause_source_jobs,
        caggs: options.timescale.caggs,
        // The trials come one after the other.
        estimate: Duration::from_secs(options.estimate_seconds) / u32::try_from(databases.len().max(1)).unwrap_or(1),
    };
    let checked = check::all(&from, &to, &databases, &inputs, true).await?;
    if options.json {
        print_json(&checked)?
    } else {
        print(&format!("{checked}\n"))?
    }
    if checked.ready {
        return Ok(());
    }
    let count = checked.blocked().count();
    Err(Error::new(ErrorKind::Blocked, format!("{count} of {} databases are refused", databases.len())))
}

/// The directory of several migrations, and what it holds.
pub(super) struct All {
    directory: PathBuf,
    overview: Overview,
}

impl All {
    /// `None` for any other directory.
    pub(super) fn of(directory: &Path) -> Result<Option<All>> {
        let overview = Overview::of(directory)?;
        Ok(overview.map(|overview| All { directory: directory.to_owned(), overview }))
    }

    fn state_of(&self, member: &Member) -> StateDirectory {
        overview::state_of(&self.directory, member)
    }

    /// Each with its status. One that has not begun only prepares.
    async fn statuses(&self) -> Vec<(Member, Status)> {
        let mut statuses = Vec::new();
        for member in &self.overview.members {
            let status = read_status(&self.state_of(member)).await;
            statuses.push((member.clone(), status.unwrap_or_else(|_| Status::not_running(Phase::Preparing))));
        }
        statuses
    }

    pub(super) async fn status(&self, options: &cli::Status) -> Result<()> {
        loop {
            // What has been noted since.
            let overview = Overview::of(&self.directory)?.unwrap_or_else(|| self.overview.clone());
            let all = All { directory: self.directory.clone(), overview };
            let summary = Summary::of(&all.overview, all.statuses().await);
            if options.json {
                print_json(&summary)?;
            } else {
                let page = summary.render();
                // Home and clear, so that nothing of the last page stays.
                print(&if options.watch && std::io::stdout().is_terminal() {
                    format!("\x1b[H\x1b[2J{page}")
                } else {
                    page
                })?;
            }
            if !options.watch {
                return if options.exit_code && !summary.is_healthy() {
                    Err(Error::new(ErrorKind::Other, "a migration has failed or is not running"))
                } else {
                    Ok(())
                };
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Cuts all over, or back: one after the other, after a rehearsal of all.
    pub(super) async fn switch(&self, options: &cli::Switch, way: Way) -> Result<()> {
        let mut how = cutover_options(&options.how)?;
        (how.no_reverse, how.back) = (way == Way::There { reverse: false }, way == Way::Back);
        let unmoved: Vec<&String> = self.overview.unmoved.iter().filter(|name| !waived(&how, name)).collect();
        if way != Way::Back
            && let Some(name) = unmoved.first()
        {
            return Err(Error::new(ErrorKind::Aborted, of_unmoved(name)).hint("Nothing was touched."));
        }
        let statuses = self.statuses().await;
        let (mut left, done): (Vec<_>, Vec<_>) = statuses.into_iter().partition(|(_, status)| match way {
            // Also what has been switched back is over.
            Way::There { .. } => !is_switched(status),
            Way::Back => status.phase == Phase::CutOver && status.direction == Direction::Back,
        });
        if way == Way::Back {
            left.reverse();
        }
        let done: Vec<&str> = done.iter().map(|(member, _)| member.database.as_str()).collect();
        if left.is_empty() {
            let text = match way {
                Way::Back => "no database has a way back open",
                Way::There { .. } => "all databases are cut over already",
            };
            return Err(Error::new(ErrorKind::Aborted, text)
                .hint(format!("walferry status --dir {}", self.directory.display())));
        }
        let rehearsed = self.rehearse(&left, &how).await;
        if options.dry_run || rehearsed.iter().any(|(_, outcome)| !is_ready(outcome)) {
            return show_rehearsals(&rehearsed, options);
        }
        if !options.yes && std::io::stdin().is_terminal() {
            for (member, status) in &left {
                eprintln!(
                    "  {:?}: from {} to {}",
                    member.database, status.source.description, status.target.description
                );
            }
            ask_on_terminal(
                "All other sessions of these databases will be ended, one database after another. Switch now?",
            )?;
        }
        self.switch_each(&left, &done, &how, options).await
    }

    async fn rehearse(&self, left: &[(Member, Status)], how: &cutover::Options) -> Vec<(String, Result<Rehearsal>)> {
        let mut rehearsed = Vec::new();
        for (member, _) in left {
            let asked = async {
                let request = Request::Rehearse(how.clone());
                match Conversation::begin(&self.state_of(member), &request).await?.next().await? {
                    Answer::Rehearsed(rehearsal) => Ok(rehearsal),
                    _ => Err(other_answer()),
                }
            };
            rehearsed.push((member.database.clone(), asked.await));
        }
        rehearsed
    }

    /// The first that fails ends it: those before have switched, those behind follow as before.
    async fn switch_each(
        &self,
        left: &[(Member, Status)],
        before: &[&str],
        how: &cutover::Options,
        options: &cli::Switch,
    ) -> Result<()> {
        let mut outcomes: Vec<Value> = Vec::new();
        let mut failed = None;
        for (member, _) in left {
            if !options.json {
                print(&format!("{:?}\n", member.database))?;
            }
            match switch_one(&self.state_of(member), how, options.json).await {
                Ok(outcome) => {
                    if !options.json {
                        let warnings = outcome.warnings.iter().map(|warning| format!("  WARNING: {warning}\n"));
                        print(&format!(
                            "  switched at {}; writers waited {:.0} ms; {} sequences set\n{}",
                            outcome.cutover_lsn,
                            outcome.downtime_ms,
                            outcome.sequences_synced,
                            warnings.collect::<String>()
                        ))?;
                    }
                    outcomes.push(json!({ "database": member.database, "outcome": outcome }));
                }
                Err(error) => {
                    failed = Some((member, error));
                    break;
                }
            }
        }
        let switched: Vec<&str> = left[..outcomes.len()].iter().map(|(member, _)| member.database.as_str()).collect();
        let behind: Vec<&str> =
            left[outcomes.len()..].iter().skip(1).map(|(member, _)| member.database.as_str()).collect();
        if options.json {
            print_json(&json!({
                "version": 1,
                "databases": outcomes,
                "switched_before": before,
                "failed": failed.as_ref().map(|(member, error)| json!({ "database": member.database, "error": error.to_string() })),
                "not_tried": behind,
            }))?;
        }
        let Some((member, error)) = failed else {
            if options.json {
                return Ok(());
            }
            let next = if how.back {
                ""
            } else {
                "`walferry switchback` leads all back, `walferry finish` ends their ways back.\n"
            };
            return print(&format!("All {} databases have switched.\n{next}", outcomes.len() + before.len()));
        };
        let mut text = format!("{:?} did not switch: {error}", member.database);
        text.push_str(&format!(". Switched, and they stay so: {}", listed(&switched)));
        text.push_str(&format!(". Not tried, and as they were: {}", listed(&behind)));
        Err(Error::new(error.kind(), text).hint(match error.next_step() {
            Some(next) => format!("{next} The same command goes on with those that have not switched."),
            None => "The same command goes on with those that have not switched.".to_owned(),
        }))
    }

    /// Does something for each, and shows what came of it; the worst of the errors is the command's.
    async fn each<T, F>(
        &self,
        json: bool,
        mut act: impl FnMut(Member) -> F,
        text: impl Fn(&T) -> (Value, String),
    ) -> Result<()>
    where
        F: Future<Output = Result<T>>,
    {
        let (mut values, mut errors) = (Vec::new(), Vec::new());
        for member in &self.overview.members {
            match act(member.clone()).await {
                Ok(done) => {
                    let (value, line) = text(&done);
                    if !json {
                        print(&format!("{:?}: {line}\n", member.database))?;
                    }
                    values.push(json!({ "database": member.database, "result": value }));
                }
                Err(error) => {
                    values.push(json!({ "database": member.database, "error": error.to_string() }));
                    errors.push((member.database.clone(), error));
                }
            }
        }
        if json {
            print_json(&json!({ "version": 1, "databases": values }))?;
        }
        worst(&errors).map_or(Ok(()), Err)
    }

    pub(super) async fn pause(&self, options: &cli::PauseOptions, otherwise: What, rest: bool) -> Result<()> {
        let request = Request::Pause { what: options.what.unwrap_or(otherwise), rest };
        let ask = |member: Member| {
            let (state, request) = (self.state_of(&member), request.clone());
            async move {
                match Conversation::begin(&state, &request).await?.next().await? {
                    Answer::Paused(paused) => Ok(paused),
                    _ => Err(other_answer()),
                }
            }
        };
        let state = |paused: bool| if paused { "paused" } else { "going on" };
        self.each(options.json, ask, |paused| {
            let line = format!("apply {}, copy {}", state(paused.apply), state(paused.copy));
            (json!({ "apply": paused.apply, "copy": paused.copy }), line)
        })
        .await
    }

    pub(super) async fn finish(&self, options: &cli::Finish) -> Result<()> {
        let end = |member: Member| {
            let state = self.state_of(&member);
            let servers = self.servers(&options.servers, &member);
            async move { end_the_way_back(&state, || servers).await }
        };
        self.each(options.json, end, |()| (json!({ "finished": true }), "the way back has ended".to_owned())).await
    }

    pub(super) async fn verify(&self, options: cli::Verify, log_format: LogFormat, bars: MultiProgress) -> Result<()> {
        if options.tables.is_some() {
            return overview::refuse(&self.directory, "verify --tables …");
        }
        let (mut values, mut errors) = (Vec::new(), Vec::new());
        for member in &self.overview.members {
            let mut one = options.clone();
            one.dir = Some(overview::path_of(&self.directory, member));
            // The member's own are in its directory, with the name of its database.
            (one.servers.source, one.servers.target) = (None, None);
            let compared =
                match verify::compare_member(one, self.servers(&options.servers, member), log_format, bars.clone())
                    .await
                {
                    Ok(compared) => compared,
                    Err(error) => {
                        values.push(json!({ "database": member.database, "error": error.to_string() }));
                        errors.push((member.database.clone(), error));
                        continue;
                    }
                };
            if !options.json {
                print(&format!("=== {:?}\n{}", member.database, compared.text))?;
            }
            values.push(json!({ "database": member.database, "result": compared.value }));
            if let Err(error) = compared.verdict {
                errors.push((member.database.clone(), error));
            }
        }
        if options.json {
            print_json(&json!({ "version": 1, "equal": errors.is_empty(), "databases": values }))?;
        }
        worst(&errors).map_or(Ok(()), Err)
    }

    /// Each that can be cleaned is; while one cannot, the directory of all stays, and the same command goes on.
    pub(super) async fn clean(&self, options: &cli::Clean) -> Result<()> {
        let locked = overview::lock(&self.directory).map_err(|error| match error.kind() {
            ErrorKind::Blocked => Error::new(ErrorKind::Blocked, "the migrations are still running")
                .hint("Stop them first (Ctrl-C or SIGTERM)."),
            _ => error,
        })?;
        let remove = |member: Member| {
            let path = overview::path_of(&self.directory, &member);
            let servers = self.servers(&options.servers, &member);
            let standby = standby_to_clean(options, Some(&path))
                .map(|spec| spec.map(|spec| spec.with_database(&member.database)));
            async move {
                if !path.is_dir() {
                    return Ok(Vec::new());
                }
                let (source, target) = servers?;
                clean::directory(&path, source, target, standby?).await
            }
        };
        self.each(options.json, remove, |removed| {
            let line = if removed.is_empty() {
                "nothing was left".to_owned()
            } else {
                format!("removed {}", removed.join("; "))
            };
            (json!({ "removed": removed }), line)
        })
        .await?;
        overview::remove(&self.directory)?;
        drop(locked);
        Ok(())
    }

    /// The servers of a member: those that are given, with its database, or those that it began with.
    fn servers(
        &self,
        given: &cli::Servers,
        member: &Member,
    ) -> Result<(Option<ConnectionSpec>, Option<ConnectionSpec>)> {
        let (source, target) = either(given)?;
        let or_known = |spec: Option<ConnectionSpec>, name: &str, known: &str, command: &Option<String>| -> Result<_> {
            let spec = spec.map_or_else(|| parse(name, known, command), Ok)?;
            Ok(Some(spec.with_database(&member.database)))
        };
        let known = &self.overview;
        let doing = || format!("the servers of {:?}", member.database);
        Ok((
            or_known(source, "source", &known.source, &given.source_password_command).context(doing)?,
            or_known(target, "target", &known.target, &given.target_password_command).context(doing)?,
        ))
    }
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
    }
}

fn waived(how: &cutover::Options, database: &str) -> bool {
    how.waive.iter().any(|waived| waived.strip_prefix("database ") == Some(database))
}

fn other_answer() -> Error {
    Error::new(ErrorKind::Other, "the migration answered something else")
}

fn is_ready(outcome: &Result<Rehearsal>) -> bool {
    outcome.as_ref().is_ok_and(|rehearsal| rehearsal.ready)
}

/// Shows what the rehearsals found; one that is not ready is an error.
fn show_rehearsals(rehearsed: &[(String, Result<Rehearsal>)], options: &cli::Switch) -> Result<()> {
    let ready = rehearsed.iter().all(|(_, outcome)| is_ready(outcome));
    if options.json {
        let each = |(database, outcome): &(String, Result<Rehearsal>)| match outcome {
            Ok(rehearsal) => json!({ "database": database, "rehearsal": rehearsal }),
            Err(error) => json!({ "database": database, "error": error.to_string() }),
        };
        let each: Vec<Value> = rehearsed.iter().map(each).collect();
        print_json(&json!({ "version": 1, "ready": ready, "databases": each }))?;
    } else {
        for (database, outcome) in rehearsed {
            match outcome {
                Ok(rehearsal) => print(&format!("=== {database:?}\n{}", rehearsal_page(rehearsal)))?,
                Err(error) => print(&format!("=== {database:?}\n  NOT READY {error}\n"))?,
            }
        }
    }
    if ready {
        return Ok(());
    }
    let not: Vec<&str> =
        rehearsed.iter().filter(|(_, outcome)| !is_ready(outcome)).map(|(database, _)| database.as_str()).collect();
    Err(Error::new(
        ErrorKind::Aborted,
        format!("a cutover of {} would not begin now; nothing was touched", listed(&not)),
    )
    .hint("All have to be ready before the first of them is switched."))
}

async fn switch_one(state: &StateDirectory, how: &cutover::Options, quiet: bool) -> Result<Outcome> {
    let mut conversation = Conversation::begin(state, &Request::Cutover(how.clone())).await?;
    loop {
        match conversation.next().await? {
            Answer::Step(step) if !quiet => print(&format!("  {:<14}{:>9.1} ms\n", step.name, step.ms))?,
            Answer::CutOver(outcome) => return Ok(outcome),
            _ => {}
        }
    }
}
