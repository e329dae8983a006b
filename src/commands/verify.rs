//! `verify` and `repair`.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use tracing::{info, warn};

use super::{both, either_or_known, print, print_json, read_status};
use crate::cli;
use crate::connection::ConnectionSpec;
use crate::control::{Answer, Conversation, Request};
use crate::databases::overview;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::format::{count, duration};
use crate::observe::logging::LogFormat;
use crate::observe::progress::ProgressMode;
use crate::observe::status::{Direction, Phase};
use crate::source::catalog::{self, Table};
use crate::state_directory::StateDirectory;
use crate::target::ledger::{self, LedgerTable};
use crate::unstreamed;
use crate::verify::online::Online;
use crate::verify::point::{APPLICATION_NAME, CommonPoint};
use crate::verify::{self, Progress, Report, Verification, record};

/// How often a line of progress is logged where there is no bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// How often it is looked how far a repair is.
const LOOK: Duration = Duration::from_millis(200);

pub(super) async fn verify(options: cli::Verify, log_format: LogFormat, bars: MultiProgress) -> Result<()> {
    let as_json = options.json;
    let compared = compare(options, log_format, bars).await?;
    if as_json {
        print_json(&compared.value)?
    } else {
        print(&compared.text)?
    }
    compared.verdict
}

/// What a comparison came to.
pub(super) struct Compared {
    /// As `--json` prints it.
    pub(super) value: Value,
    /// For people.
    pub(super) text: String,
    /// Whether all is equal.
    pub(super) verdict: Result<()>,
}

/// Compares, and keeps in the ledger what it came to.
async fn compare(options: cli::Verify, log_format: LogFormat, bars: MultiProgress) -> Result<Compared> {
    let (source, target) = match &options.dir {
        None => both(&options.servers)?,
        Some(directory) => known(either_or_known(&options.servers, directory)?, directory).await?,
    };
    compare_servers(options, (source, target), log_format, bars).await
}

/// The same for one of several databases, whose state directory `options.dir` is.
pub(super) async fn compare_member(
    options: cli::Verify,
    servers: Result<(Option<ConnectionSpec>, Option<ConnectionSpec>)>,
    log_format: LogFormat,
    bars: MultiProgress,
) -> Result<Compared> {
    let servers = known(servers?, options.dir.as_deref().unwrap_or(Path::new("."))).await?;
    compare_servers(options, servers, log_format, bars).await
}

async fn compare_servers(
    options: cli::Verify,
    (source, target): (ConnectionSpec, ConnectionSpec),
    log_format: LogFormat,
    bars: MultiProgress,
) -> Result<Compared> {
    let caps = options.connections.caps();
    let jobs = caps.fit_comparison(options.jobs)?;
    let (source, target) = (source.with_connections_max(caps.source), target.with_connections_max(caps.target));
    // The tables that were migrated; without a ledger, those of the source.
    let ledger = target.connect(APPLICATION_NAME).await?;
    let migration = ledger::load(&ledger).await?;
    let moves_large_objects = migration.as_ref().is_none_or(|migration| migration.scope.moves_large_objects());
    let recorded: Option<Vec<LedgerTable>> = match migration {
        Some(migration) if migration.phase == ledger::Phase::CutOver && !migration.scope.map_schemas.is_empty() => {
            let text = "the cutover has given the target's schemas other names, and tables are compared by theirs";
            return Err(
                Error::new(ErrorKind::Other, text).hint("Compare before the cutover: --require-verified has it so.")
            );
        }
        Some(migration) if migration.consistent_point.is_some() => Some(ledger::tables(&ledger).await?),
        _ => None,
    };
    let tables: Vec<Table> = match &recorded {
        Some(recorded) => recorded.iter().map(|entry| entry.table.clone()).collect(),
        None => catalog::tables(&source.connect(APPLICATION_NAME).await?).await?,
    };
    // Of what was migrated, what the filters leave. On the way back, too, the ledger has the OIDs of the side that is followed.
    let filters = options.filters.scope(None);
    let selection = filters.select_strictly(&source.connect(APPLICATION_NAME).await?).await?;
    let mut tables = catalog::chosen(tables, selection.as_ref());
    let wanted = verify::Options {
        jobs,
        tables: options.tables.clone(),
        show_values: options.show_values,
        max_keys: usize::try_from(options.max_keys).unwrap_or(usize::MAX),
        sample_percent: options.sample.filter(|percent| *percent < 100.0),
        ..verify::Options::default()
    };
    let directory = options.dir.as_deref().map(StateDirectory::at);
    let conversation = match &directory {
        Some(directory) => Conversation::begin(directory, &Request::TakePoint).await.ok(),
        None => None,
    };
    if conversation.is_some() && wanted.tables.is_none() {
        // They are copied at the cutover; until then the stream does not carry them (H14).
        tables.retain(|table| !table.unlogged);
    }
    let rows = rows_to_compare(&source, &tables, &wanted).await?;
    let shown = Shown::new(rows, ProgressMode::detect(log_format, bars, jobs));
    let progress = |progress: Progress| shown.add(&progress);
    let began = Instant::now();
    let (report, point, held) = match (&directory, conversation) {
        (Some(directory), Some(conversation)) => {
            let online = Online { directory, source: &source, target: &target, tables: &tables };
            let compared = online.compare(conversation, &wanted, &progress).await?;
            (compared.report, Some(compared.point), Some(compared.snapshots_held))
        }
        _ => {
            if directory.is_some() {
                warn!("no migration is running there: both databases are compared as they are, and have to be quiet");
            }
            let (open_source, open_target) = (|| source.connect(APPLICATION_NAME), || target.connect(APPLICATION_NAME));
            (verify::compare(&tables, open_source, open_target, &wanted, &progress).await?, None, None)
        }
    };
    drop(shown);
    // As of another moment than the tables, since no stream carries them.
    let report =
        match wanted.tables.is_none() && wanted.sample_percent.is_none() && !filters.is_part() && moves_large_objects {
            true => {
                let (source, target) =
                    tokio::try_join!(source.connect(APPLICATION_NAME), target.connect(APPLICATION_NAME))?;
                report
                    .with_large_objects(unstreamed::compare::large_objects(&source, &target, recorded.is_some()).await?)
            }
            false => report,
        };
    let report = with_insert_only(report, recorded.as_deref().unwrap_or_default());
    if directory.is_some() && recorded.is_some() {
        keep(&target, &report, point.as_ref(), options.tables.is_none() && !filters.is_part(), began.elapsed()).await?;
    }
    let (value, text) = shown_as(&report, point.as_ref(), held, began.elapsed())?;
    Ok(Compared { value, text, verdict: verdict(&report, point.is_some()) })
}

fn verdict(report: &Report, online: bool) -> Result<()> {
    let differs = report.tables.iter().any(|table| !table.equal);
    if let Some(found) = report.large_objects.as_ref().filter(|found| !differs && found.different_total > 0) {
        let text = format!("{} large objects differ", found.different_total);
        let oids: Vec<String> = found.different.iter().map(u32::to_string).collect();
        let hint = format!(
            "Find out who writes to the target. There, DELETE FROM walferry.large_object WHERE loid IN ({}); has these copied again \
             within a minute while the migration follows, and by the cutover at the latest.",
            oids.join(", ")
        );
        let error = Error::new(ErrorKind::Different, text);
        return Err(if online { error.hint(hint) } else { error });
    }
    if !differs {
        if !report.stale.is_empty() {
            let text = format!(
                "not compared, because they are truncated or rewritten all the time: {}",
                report.stale.join(", ")
            );
            return Err(Error::new(ErrorKind::Other, text).hint("Compare these again when that has ended: --tables."));
        }
        return Ok(());
    }
    let different = report.tables.iter().filter(|table| !table.equal).count();
    let text = if different == 1 { "1 table differs".to_owned() } else { format!("{different} tables differ") };
    let error = Error::new(ErrorKind::Different, text);
    Err(if online {
        error.hint("Find out who writes to the target. `walferry repair` then copies again what differs.")
    } else {
        error
    })
}

/// The servers of the migration in a state directory: the one that is followed, and the one that follows. On the way back they have each
/// other's place.
async fn known(
    servers: (Option<ConnectionSpec>, Option<ConnectionSpec>),
    directory: &Path,
) -> Result<(ConnectionSpec, ConnectionSpec)> {
    let status = read_status(&StateDirectory::at(directory)).await;
    let is_way_back = status.is_ok_and(|status| status.direction == Direction::Back);
    match servers {
        (Some(source), Some(target)) if is_way_back => Ok((target, source)),
        (Some(source), Some(target)) => Ok((source, target)),
        _ => Err(Error::new(
            ErrorKind::Other,
            format!("{} is not the state directory of a migration", directory.display()),
        )
        .hint("Give the --dir of the migration, or both servers: walferry verify --source … --target …")),
    }
}

fn with_insert_only(mut report: Report, recorded: &[LedgerTable]) -> Report {
    for table in &mut report.tables {
        table.insert_only = recorded.iter().any(|entry| entry.insert_only && entry.table.qualified() == table.table);
    }
    report
}

/// Into the ledger, for `status` and `cutover`.
async fn keep(
    target: &ConnectionSpec,
    report: &Report,
    point: Option<&CommonPoint>,
    all_tables: bool,
    took: Duration,
) -> Result<()> {
    let client = target.connect(APPLICATION_NAME).await?;
    let source_lsn = match point {
        Some(point) => point.source_lsn,
        None => ledger::apply_progress(&client).await?.into_iter().min().unwrap_or_default(),
    };
    let verification = Verification::of(report, source_lsn, point.is_some(), all_tables, took);
    record::record(&client, &verification).await
}

fn shown_as(
    report: &Report,
    point: Option<&CommonPoint>,
    held: Option<Duration>,
    took: Duration,
) -> Result<(Value, String)> {
    let mut value = serde_json::to_value(report).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    value["seconds"] = json!(took.as_secs_f64());
    value["online"] = json!(point.is_some());
    value["source_lsn"] = json!(point.map(|point| point.source_lsn));
    value["apply_rested_ms"] = json!(point.map(|point| point.rested_ms));
    value["snapshots_held_seconds"] = json!(held.map(|held| held.as_secs_f64()));
    let took = duration(took.as_secs_f64());
    let at = match (point, held) {
        (Some(point), Some(held)) => format!(
            "Compared at {} while writes went on, in {took}. The apply rested {:.0} ms for it, the snapshots were held for {}.",
            point.source_lsn,
            point.rested_ms,
            duration(held.as_secs_f64())
        ),
        _ => format!("Compared in {took}."),
    };
    Ok((value, format!("{report}\n{at}\n")))
}

/// About how many rows there are to compare.
async fn rows_to_compare(source: &ConnectionSpec, tables: &[Table], wanted: &verify::Options) -> Result<f64> {
    let chosen = verify::choose(tables, wanted.tables.as_deref())?;
    let relids: Vec<u32> = chosen.iter().map(|table| table.relid).collect();
    let client = source.connect(APPLICATION_NAME).await?;
    let statement =
        "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::float8 FROM pg_catalog.pg_class WHERE oid = ANY ($1)";
    let rows = client.query_typed_one(statement, &[(&relids, Type::OID_ARRAY)]).await;
    let rows: f64 = rows.context(|| "asking the source how many rows there are".into())?.get(0);
    Ok(rows * wanted.sample_percent.map_or(1.0, |percent| percent / 100.0))
}

/// How far a comparison is: a line that is drawn anew on a terminal, lines in a log elsewhere.
struct Shown {
    began: Instant,
    rows_total: f64,
    rows: AtomicU64,
    bar: Option<ProgressBar>,
    line_at: Mutex<Instant>,
}

impl Shown {
    fn new(rows_total: f64, mode: ProgressMode) -> Shown {
        let bar = match mode {
            ProgressMode::Bars { bars, .. } => {
                let bar = bars.add(ProgressBar::new_spinner());
                bar.set_style(ProgressStyle::default_spinner());
                Some(bar)
            }
            ProgressMode::Lines | ProgressMode::Off => None,
        };
        Shown { began: Instant::now(), rows_total, rows: AtomicU64::new(0), bar, line_at: Mutex::new(Instant::now()) }
    }

    fn add(&self, progress: &Progress) {
        let more = progress.rows.max(0).cast_unsigned();
        let rows = self.rows.fetch_add(more, Ordering::Relaxed) + more;
        let text = self.text(rows, &progress.table);
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.tick();
            return;
        }
        let mut line_at = self.line_at.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if line_at.elapsed() >= LINE_INTERVAL {
            *line_at = Instant::now();
            info!("{text}");
        }
    }

    fn text(&self, rows: u64, table: &str) -> String {
        let seconds = self.began.elapsed().as_secs_f64().max(0.001);
        let rate = rows as f64 / seconds;
        let left = (self.rows_total - rows as f64).max(0.0);
        let eta =
            if rate > 0.0 && left > 0.0 { format!(", about {} left", duration(left / rate)) } else { String::new() };
        let total = count((self.rows_total.max(rows as f64)) as u64);
        format!("compared {} of about {total} rows, {} rows/s{eta}; now {table}", count(rows), count(rate as u64))
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

pub(super) async fn repair(options: cli::Repair) -> Result<()> {
    overview::refuse(&options.directory.dir, "repair")?;
    let path = &options.directory.dir;
    let directory = StateDirectory::at(path);
    let (_, target) = known(either_or_known(&options.servers, path)?, path).await?;
    let client = target.connect(APPLICATION_NAME).await?;
    if ledger::load(&client).await?.is_none() {
        return Err(Error::new(ErrorKind::Blocked, format!("{} holds no ledger of a migration", target.describe()))
            .hint("`walferry status` shows what runs in --dir; only a migration that follows can be repaired."));
    }
    let recorded: Vec<Table> = ledger::tables(&client).await?.into_iter().map(|entry| entry.table).collect();
    let Some(names) = what_to_repair(&client, options.tables).await? else {
        return if options.json {
            print_json(&json!({ "version": 1, "tables": [], "rows_copied": 0 }))
        } else {
            print("The last comparison found no difference: nothing to repair.\n")
        };
    };
    let chosen = verify::choose(&recorded, Some(&names))?;
    let request = Request::Repair { tables: names };
    let mut conversation = Conversation::begin(&directory, &request).await.map_err(|error| {
        error.hint(format!(
            "A repair needs the stream. Start the migration with these tables, which does the same before it goes on: \
             walferry migrate --dir {} … {}",
            path.display(),
            Table::recopy_option(&chosen)
        ))
    })?;
    let Answer::Repairing = conversation.next().await? else {
        return Err(Error::new(ErrorKind::Other, "the migration answered something else"));
    };
    follows_again(&directory).await?;
    let relids: Vec<i64> = chosen.iter().map(|table| i64::from(table.relid)).collect();
    // The rows of a hypertable are in its chunks.
    let statement = "SELECT coalesce(sum(rows_copied), 0)::int8 FROM walferry.source_table \
                     WHERE relid = ANY ($1) OR (definition->'chunk'->>'relid')::int8 = ANY ($1)";
    let row = client.query_typed_one(statement, &[(&relids, Type::INT8_ARRAY)]).await;
    let copied: i64 = row.context(|| "asking the ledger what was copied".into())?.get(0);
    let names: Vec<String> = chosen.iter().map(|table| table.qualified()).collect();
    if options.json {
        return print_json(&json!({ "version": 1, "tables": names, "rows_copied": copied }));
    }
    print(&format!(
        "Compared again with the source: {}. {copied} rows were copied again, and the migration follows.\n\
         `walferry verify` proves that both sides are equal now.\n",
        names.join(", ")
    ))
}

/// The tables that were named, or those that the last comparison found to differ; `None` when it found none.
async fn what_to_repair(target: &Client, named: Option<Vec<String>>) -> Result<Option<Vec<String>>> {
    if named.is_some() {
        return Ok(named);
    }
    let last = verify::last(target).await?.ok_or_else(|| {
        Error::new(ErrorKind::Blocked, "it is not known what differs")
            .hint("Let `walferry verify` find it out, or name the tables: --tables schema.name,…")
    })?;
    Ok(Some(last.differing_tables).filter(|tables| !tables.is_empty()))
}

/// Waits until the migration follows again.
async fn follows_again(directory: &StateDirectory) -> Result<()> {
    loop {
        let status = read_status(directory).await?;
        if !status.process_alive {
            let text = status.error.map_or("the migration has ended".to_owned(), |failure| failure.message);
            return Err(Error::new(ErrorKind::Other, text)
                .hint("`walferry migrate` with the same options goes on with the repair."));
        }
        if status.phase >= Phase::Following {
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
}
