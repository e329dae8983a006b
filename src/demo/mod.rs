//! The demonstration: two throwaway servers, a live write load, a whole migration, a report.
//!
//! ```text
//!  server ×2 ─► schema ─► load ─────────────────────────────────► switch ─► load ─► stop
//!                          │ writes, remembered in the book          ▲                │
//!                          └─ migration: migrate … status … cutover ─┘                ▼
//!                                                                      proof + compare ─► report ─► clean
//! ```
//!
//! The migration is the real one, run as a stranger runs it: our own program as a child process. What it claims is
//! never taken for granted; the proof reads both servers with plain SQL and uses nothing of walferry.

pub mod book;
pub mod compare;
pub mod load;
pub mod migration;
pub mod proof;
pub mod report;
pub mod schema;
pub mod server;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use self::book::Side;
use self::load::Application;
use self::migration::{Migration, Status};
use self::report::{Report, bytes, grouped};
use self::schema::{APPLICATION_ROLE, DATABASE, Sizes};
use self::server::{ServerPrograms, ServerUser, TemporaryDirectory, ThrowawayServer};
use crate::error::{Context, Error, ErrorKind, Result};

/// How long the migration may take to get ready for the cutover.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the application writes before the migration begins, so that it meets a database in use.
const WARM_UP: Duration = Duration::from_secs(1);
/// How often the migration is asked where it stands.
const POLL: Duration = Duration::from_millis(200);

/// What the demo is to do.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// About how many rows the shop has at the start.
    pub rows: u64,
    /// How many sessions write all the time.
    pub writers: u32,
    /// For how many seconds the migration follows, and again for how many the application goes on at the target.
    pub seconds: u32,
    /// Print the report as one JSON object on standard output, and all else on standard error.
    pub json: bool,
    /// The walferry to run; without one, this very program.
    pub program: Option<PathBuf>,
}

impl Default for DemoOptions {
    fn default() -> DemoOptions {
        DemoOptions { rows: 300_000, writers: 4, seconds: 5, json: false, program: None }
    }
}

/// Runs the demo and prints its report. Everything it made is gone when it returns, also after Ctrl-C.
///
/// # Errors
/// [`ErrorKind::Blocked`] when there are no server programs, [`ErrorKind::Interrupted`] after SIGINT or SIGTERM,
/// [`ErrorKind::Other`] when the report has a flaw, and whatever went wrong on the way.
pub async fn run(options: DemoOptions) -> Result<()> {
    let doing = || "listening to signals".to_owned();
    let mut interrupt = signal(SignalKind::interrupt()).context(doing)?;
    let mut terminate = signal(SignalKind::terminate()).context(doing)?;
    let stopped = async {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
    };
    // Dropping the demo in the middle ends its child processes and servers and removes its files.
    let report = tokio::select! {
        report = demonstrate(&options) => report?,
        () = stopped => return Err(Error::new(ErrorKind::Interrupted, "the demo was stopped; everything it made is removed")),
    };
    let text = if options.json {
        serde_json::to_string(&report).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))? + "\n"
    } else {
        report.render(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    };
    std::io::stdout().write_all(text.as_bytes()).context(|| "printing the report".to_owned())?;
    match report.flaws.first() {
        None => Ok(()),
        Some(first) => {
            let count = report.flaws.len();
            Err(Error::new(
                ErrorKind::Other,
                format!("the demo found {count} flaws in the migration; the first: {first}"),
            ))
        }
    }
}

/// The whole story, from two empty servers to the report.
async fn demonstrate(options: &DemoOptions) -> Result<Report> {
    let begin = Instant::now();
    let programs = ServerPrograms::find(None)?;
    let program = match &options.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context(|| "looking for our own program".to_owned())?,
    };
    say(options, &format!("starting two throwaway PostgreSQL {} servers", programs.major()));
    let (source, target) = tokio::try_join!(
        ThrowawayServer::start(&programs, "source", &[("wal_level", "logical"), ("max_wal_size", "4GB")]),
        ThrowawayServer::start(&programs, "target", &[("wal_level", "logical"), ("max_wal_size", "4GB")]),
    )?;
    let sizes = Sizes::of_rows(options.rows);
    let client = schema::create_database(&source).await?;
    drop(schema::create_database(&target).await?);
    schema::fill(&client, sizes).await?;
    let size = schema::measure(&client).await?;
    drop(client);
    let mut report = Report::new(size, options.writers);
    say(options, &format!("the shop is open: {} rows, {}", grouped(size.0), bytes(size.2 as f64)));

    let application = Application::start(&application_url(&source), &application_url(&target), options.writers, sizes);
    say(options, &format!("{} writers are at work", options.writers));
    tokio::time::sleep(WARM_UP).await;

    let directory = TemporaryDirectory::create("demo", ServerUser::Ourselves)?;
    let (source_url, target_url) = (source.url_for(DATABASE), target.url_for(DATABASE));
    say(options, "walferry migrate");
    let mut migration = Migration::start(&program, &source_url, &target_url, &directory.path)?;
    wait_until_ready(options, &mut migration, &mut report).await?;
    follow(options, &mut migration, &mut report).await?;

    say(options, "walferry cutover");
    let (cutover, attempts) = migration.cutover().await?;
    application.switch();
    report.note_cutover(&cutover, attempts);
    say(options, &format!("switched in {:.0} ms; the shop goes on at the target", cutover.downtime_ms));
    tokio::time::sleep(Duration::from_secs(options.seconds.into())).await;
    let book = application.stop().await;

    let writes = grouped(book.acknowledged_at(Side::Source) + book.acknowledged_at(Side::Target));
    say(options, &format!("looking for all {writes} acknowledged writes"));
    let (on_source, on_target) = (source.connect(DATABASE).await?, target.connect(DATABASE).await?);
    let observed = proof::observe(&on_target, &book).await?;
    report.note_writes(&book, &proof::judge(&book, &observed));
    report.note_tables(compare::tables(&on_source, &on_target, &book).await?);
    report.flaws.extend(compare::sequences(&on_source, &on_target).await?);
    drop((on_source, on_target));

    say(options, "walferry clean");
    migration.finish_and_clean(cutover.reverse_is_armed()).await?;
    // Only now: for as long as the way back writes to the source, its identity columns take what they are given.
    report.flaws.extend(compare::objects(&source.connect(DATABASE).await?, &target.connect(DATABASE).await?).await?);
    for (side, server) in [("source", &source), ("target", &target)] {
        let left = compare::leftovers(server, DATABASE).await?;
        report.flaws.extend(left.into_iter().map(|what| format!("walferry clean left {what} on the {side}")));
    }
    drop((migration, directory, source, target));
    report.total_seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

/// The connection string that the shop's application has.
fn application_url(server: &ThrowawayServer) -> String {
    format!("postgres://{APPLICATION_ROLE}@127.0.0.1:{}/{DATABASE}", server.port())
}

/// Says where the migration stands until it is ready to cut over.
async fn wait_until_ready(options: &DemoOptions, migration: &mut Migration, report: &mut Report) -> Result<()> {
    let begin = Instant::now();
    let mut last = Status::default();
    let mut copied = false;
    loop {
        if let Some(status) = migration.status().await? {
            copied |= matches!(status.phase.as_str(), "catching_up" | "following");
            if copied && report.copy_seconds == 0.0 {
                report.copy_seconds = begin.elapsed().as_secs_f64();
            }
            if status.phase != last.phase {
                let rows = status.copy.rows_done;
                let detail = if rows > 0 { format!(", {} rows copied", grouped(rows)) } else { String::new() };
                say(options, &format!("  {}{detail}", status.phase.replace('_', " ")));
            }
            if status.ready_to_cutover {
                report.ready_seconds = begin.elapsed().as_secs_f64();
                return Ok(());
            }
            last = status;
        }
        if begin.elapsed() > READY_TIMEOUT {
            let blockers: Vec<String> = last.blockers.iter().map(migration::plain).collect();
            let what =
                format!("the migration was not ready to cut over within {READY_TIMEOUT:?} (phase {:?})", last.phase);
            return Err(migration.failure(format!("{what}; in the way: {}", blockers.join("; "))));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Lets the migration follow the live load for a while, and notes the largest lag.
async fn follow(options: &DemoOptions, migration: &mut Migration, report: &mut Report) -> Result<()> {
    say(options, &format!("ready to cut over; following for {} s", options.seconds));
    let end = Instant::now() + Duration::from_secs(options.seconds.into());
    while Instant::now() < end {
        if let Some(status) = migration.status().await? {
            let larger = |known: Option<f64>, now: Option<f64>| match (known, now) {
                (Some(known), Some(now)) => Some(known.max(now)),
                (known, now) => known.or(now),
            };
            report.lag_seconds_max = larger(report.lag_seconds_max, status.lag.seconds);
            report.lag_bytes_max = larger(report.lag_bytes_max, status.lag.bytes);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// One line of progress; not in the way of JSON.
fn say(options: &DemoOptions, line: &str) {
    if options.json {
        eprintln!("{line}");
    } else {
        println!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    /// A small demo of a migration by the stand-in, which does harm or not.
    fn options(directory: &Path, harm: bool) -> DemoOptions {
        let programs = ServerPrograms::find(None).unwrap();
        let script = include_str!("stand_in.sh").replace("@BIN@", programs.bin("").to_str().unwrap());
        let script = if harm { script.replace("HARM=no", "HARM=yes") } else { script };
        let program = directory.join("walferry");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        DemoOptions { rows: 4_000, writers: 3, seconds: 2, json: true, program: Some(program) }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_right_migration_under_load_is_found_right() {
        let directory = tempfile::tempdir().unwrap();
        let report = demonstrate(&options(directory.path(), false)).await.unwrap();
        assert_eq!(report.flaws, [""; 0], "{}", report.render(false));
        assert!(report.at_source.acknowledged > 0 && report.at_target.acknowledged > 0, "{report:?}");
        assert_eq!(report.at_source.found, report.at_source.acknowledged);
        assert!(report.comparisons.iter().all(|table| table.target_rows > 0), "{:?}", report.comparisons);
        assert!(report.application_gap_ms.is_some() && report.lag_seconds_max == Some(0.01));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_harm_that_a_migration_does_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let report = demonstrate(&options(directory.path(), true)).await.unwrap();
        for words in [
            "its row in shop.ledger_entry is missing",
            "was made twice: an update before it is lost",
            "the table archived_order differs",
            "the table product differs",
            "only on the source: index CREATE INDEX open_order",
            "walferry clean left the publication forgotten on the target",
            "duplicate keys: a sequence was left behind",
        ] {
            assert!(report.flaws.iter().any(|flaw| flaw.contains(words)), "{words:?} is not in {:#?}", report.flaws);
        }
        assert!(report.at_source.missing > 0);
        assert!(report.render(false).contains("NOT right"));
    }

    #[tokio::test]
    async fn a_migration_that_fails_ends_the_demo_with_its_last_words_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut options = options(directory.path(), false);
        fs::write(options.program.as_ref().unwrap(), "#!/bin/sh\necho 'no such luck' >&2; exit 3\n").unwrap();
        options.rows = 100;
        let error = run(options).await.unwrap_err();
        assert!(error.to_string().contains("no such luck"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_demo_that_is_stopped_in_the_middle_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), false);
        let running = directory.path().join("running");
        let begun = async {
            while fs::read_to_string(&running).unwrap_or_default().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            report = demonstrate(&options) => panic!("it ended before it was stopped: {report:?}"),
            () = begun => {}
        }
        let running = fs::read_to_string(&running).unwrap();
        let [pid, state, source, target] = running.split_whitespace().collect::<Vec<_>>().try_into().unwrap();
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        assert!(rustix::process::test_kill_process(pid).is_err(), "the migration is gone");
        assert!(!Path::new(state).parent().unwrap().exists(), "its files are gone");
        for url in [source, target] {
            assert!(tokio_postgres::connect(url, tokio_postgres::NoTls).await.is_err(), "the servers are gone");
        }
    }
}
