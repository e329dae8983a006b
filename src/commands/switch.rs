//! `walferry cutover`, `switchback` and `finish`: who is the primary.

use std::io::IsTerminal;
use std::path::Path;

use serde_json::json;
use tracing::warn;

use super::databases::All;
use super::{either_or_known, print, print_json, read_status, stands_in_the_arguments};
use crate::cli;
use crate::connection::ConnectionSpec;
use crate::control::{Answer, Conversation, Request};
use crate::crashsafe;
use crate::cutover;
use crate::error::{Error, ErrorKind, Result};
use crate::migrate;
use crate::observe::status::{Phase, Status, WayBack};
use crate::state_directory::StateDirectory;

/// Which way a switch goes.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Way {
    There { reverse: bool },
    Back,
}

pub(super) async fn switch(options: cli::Switch, way: Way) -> Result<()> {
    if let Some(all) = All::of(&options.directory.dir)? {
        return all.switch(&options, way).await;
    }
    let directory = StateDirectory::at(&options.directory.dir);
    let status = read_status(&directory).await?;
    if let Some(over) = over(&status, way, directory.path()) {
        return Err(over);
    }
    if !options.yes && !options.dry_run && std::io::stdin().is_terminal() {
        ask(&status)?;
    }
    let mut how = cutover_options(&options.how)?;
    (how.no_reverse, how.back) = (way == Way::There { reverse: false }, way == Way::Back);
    let request = if options.dry_run { Request::Rehearse(how) } else { Request::Cutover(how) };
    let mut conversation = Conversation::begin(&directory, &request).await?;
    loop {
        match conversation.next().await? {
            Answer::Rehearsed(rehearsal) => return rehearsed(&rehearsal, options.json),
            Answer::Step(step) if !options.json => print(&format!("  {:<14}{:>9.1} ms\n", step.name, step.ms))?,
            Answer::CutOver(outcome) if options.json => return print_json(&outcome),
            Answer::CutOver(outcome) => {
                let next = if outcome.reverse == "armed" {
                    format!(
                        "The old primary is kept current: `walferry switchback --dir {0}` leads back, `walferry finish --dir {0}` ends that.\n",
                        directory.path().display()
                    )
                } else {
                    String::new()
                };
                let warnings: String = outcome.warnings.iter().map(|warning| format!("WARNING: {warning}\n")).collect();
                return print(&format!(
                    "Switched at {}. Writers waited {:.0} ms. {} sequences set.\n{} is the primary now.\n{next}{warnings}",
                    outcome.cutover_lsn, outcome.downtime_ms, outcome.sequences_synced, status.target.description
                ));
            }
            _ => {}
        }
    }
}

/// Why there is nothing left to switch, where no process runs: to start one would not bring it about.
fn over(status: &Status, way: Way, directory: &Path) -> Option<Error> {
    if status.process_alive {
        return None;
    }
    let text = match (status.phase, status.way_back, way) {
        (Phase::Reversed, ..) => "this migration has been switched back already",
        (Phase::CutOver, WayBack::None | WayBack::Impossible, Way::There { .. }) => {
            "this migration has been cut over already"
        }
        (Phase::CutOver, WayBack::None | WayBack::Impossible, Way::Back) => {
            "there is no way back: `walferry finish` has ended it, or the cutover made none"
        }
        _ => return None,
    };
    let hint =
        format!("Nothing was touched. `walferry clean --dir {}` removes what is left of it.", directory.display());
    Some(Error::new(ErrorKind::Aborted, text).hint(hint))
}

/// The status that was written down last says it too.
fn note_finished(directory: &StateDirectory) -> Result<()> {
    let Ok(written) = std::fs::read(directory.status()) else { return Ok(()) };
    let Ok(mut status) = serde_json::from_slice::<Status>(&written) else { return Ok(()) };
    // A switchback that was cut off is undone by then.
    (status.phase, status.way_back) = (Phase::CutOver, WayBack::None);
    let written = serde_json::to_vec(&status).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    crashsafe::replace(&directory.status(), &written)
}

pub(super) async fn finish(options: cli::Finish) -> Result<()> {
    if let Some(all) = All::of(&options.directory.dir)? {
        return all.finish(&options).await;
    }
    let directory = StateDirectory::at(&options.directory.dir);
    end_the_way_back(&directory, || either_or_known(&options.servers, directory.path())).await?;
    if options.json {
        return print_json(&json!({ "version": 1, "finished": true }));
    }
    print(&format!(
        "The way back has ended; the old primary stays read-only by default, and falls behind from now on.\n\
         When you need it no more: walferry clean --dir {}\n",
        directory.path().display()
    ))
}

/// Ends the way back of a migration, whether it runs or not.
pub(super) async fn end_the_way_back(
    directory: &StateDirectory,
    servers: impl FnOnce() -> Result<(Option<ConnectionSpec>, Option<ConnectionSpec>)>,
) -> Result<()> {
    let asked = async { Conversation::begin(directory, &Request::Finish).await?.next().await };
    match asked.await {
        Ok(Answer::Finished) => {}
        Ok(_) => return Err(Error::new(ErrorKind::Other, "the migration answered something else")),
        Err(error) => {
            // Where none runs, what it would do is done here; only where there is a directory: to lock it would make it.
            if !directory.path().is_dir() {
                return Err(error);
            }
            let Ok(_locked) = directory.lock() else { return Err(error) };
            let (source, target) = servers()?;
            let Some(target) = target else { return Err(error) };
            if let Some(left) = migrate::finish_without_process(&target, source.as_ref()).await? {
                warn!("{left}");
            }
            note_finished(directory)?;
        }
    }
    Ok(())
}

/// How a cutover is to be done, from the command line.
pub(super) fn cutover_options(how: &cli::CutoverHow) -> Result<cutover::Options> {
    let pgbouncer = match &how.pgbouncer {
        Some(console) => {
            let spec = ConnectionSpec::parse(console).map_err(|error| error.context("--pgbouncer"))?;
            if spec.has_inline_password() && stands_in_the_arguments(console) {
                warn!(
                    "the password in --pgbouncer shows in the process list; a password file or WALFERRY_PGBOUNCER does not"
                );
            }
            if how.pgbouncer_include.is_none() && how.on_switch.is_none() {
                return Err(Error::new(ErrorKind::Usage, "nothing would point PgBouncer at the target").hint(
                    "Give --pgbouncer-include, a file that its configuration includes, or a command in --on-switch.",
                ));
            }
            let absolute = |path: &std::path::PathBuf| std::path::absolute(path);
            Some(cutover::PgBouncer {
                console: console.clone(),
                database: how.pgbouncer_database.clone(),
                include: how.pgbouncer_include.as_ref().map(absolute).transpose()?,
            })
        }
        None if how.pgbouncer_include.is_some() || how.pgbouncer_database.is_some() => {
            return Err(Error::new(ErrorKind::Usage, "--pgbouncer is missing")
                .hint("Give the connection string of PgBouncer's admin console."));
        }
        None => None,
    };
    Ok(cutover::Options {
        timeout_seconds: how.timeout.as_secs_f64(),
        max_write_stall_seconds: how.max_write_stall.as_secs_f64(),
        waive: how.waive.clone(),
        fence: how.fence.unwrap_or_default(),
        fence_by_default: how.fence.is_none(),
        sequence_margin: how.sequence_margin,
        hooks: cutover::Hooks {
            on_fence: how.on_fence.clone(),
            on_switch: how.on_switch.clone(),
            on_abort: how.on_abort.clone(),
            timeout_seconds: how.hook_timeout.as_secs_f64(),
        },
        pgbouncer,
        prewarm: how.prewarm,
        require_verified_seconds: how.require_verified.map(|age| age.as_secs_f64()),
        no_reverse: false,
        back: false,
    })
}

/// When a migration is to cut over by itself.
pub(super) fn automatic(options: &cli::Migrate) -> Result<Option<cutover::Automatic>> {
    let when = &options.when;
    if when.cutover == cli::CutoverStart::Asked {
        return Ok(None);
    }
    let mut how = cutover_options(&options.how)?;
    how.no_reverse = options.no_reverse;
    Ok(Some(cutover::Automatic {
        options: how,
        max_lag: when.max_lag,
        not_before: when.not_before.map(|time| time.0),
        not_after: when.not_after.map(|time| time.0),
        pause: when.retry_pause,
    }))
}

/// Shows what a rehearsal found; not ready is an error.
fn rehearsed(rehearsal: &cutover::Rehearsal, json: bool) -> Result<()> {
    if json {
        print_json(rehearsal)?;
    } else {
        print(&rehearsal_page(rehearsal))?;
    }
    if rehearsal.ready {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Aborted, "a cutover would not begin now; nothing was touched"))
}

/// What a rehearsal found, for people.
pub(super) fn rehearsal_page(rehearsal: &cutover::Rehearsal) -> String {
    let mut page = String::new();
    for finding in &rehearsal.preconditions {
        let sign = match finding.weight {
            cutover::Weight::Ok => "ok",
            cutover::Weight::Warning => "warning",
            cutover::Weight::Blocks => "NOT READY",
        };
        page.push_str(&format!("  {sign:<10}{}: {}\n", finding.name, finding.text));
        if let Some(hint) = &finding.hint {
            page.push_str(&format!("  {:<10}next: {hint}\n", ""));
        }
    }
    page.push_str(&format!("{} tables to lock, {} sequences to set.\n", rehearsal.tables_to_lock, rehearsal.sequences));
    if let Some(measured) = &rehearsal.estimate {
        page.push_str(&format!(
            "Writers would wait about {:.0} ms. Measured: {}.\n",
            measured.downtime_ms, rehearsal.estimated_from
        ));
    }
    page
}

/// Shows both ends, and asks.
fn ask(status: &Status) -> Result<()> {
    let lag = status.lag.seconds.map_or("unknown".to_owned(), |seconds| format!("{seconds:.1} s"));
    eprintln!("  from  {}\n  to    {}\n  lag   {lag}", status.source.description, status.target.description);
    for blocker in &status.blockers {
        eprintln!("  but   {blocker}");
    }
    ask_on_terminal("All other sessions of the source's database will be ended. Switch now?")
}

/// Goes on only after a yes.
pub(super) fn ask_on_terminal(question: &str) -> Result<()> {
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Aborted, "not switched"))
    }
}
