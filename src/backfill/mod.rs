//! Old rows by pieces, beside an application that writes the new ones to both databases itself: for loads above what replication
//! sustains, and for ranges of single tables.
//!
//! ```text
//!   compare the tables ► plan ► let policies rest ► pieces, some at once ► compress what is left ► refresh aggregates ► let policies go on
//!                          │ ledger                    │ rows + ledger row in one transaction each
//! ```
//!
//! Rows at or past `--until` are the application's, and are neither read nor touched. A piece is there or not (`ledger`); the same command goes on
//! with those that are not, whatever died. The policies that rest are noted before, and go on in every outcome; after a `kill -9`, at the end of
//! the next start or by `walferry clean`.

mod compare;
mod foreign_keys;
pub mod ledger;
mod lost;
mod overlap;
mod piece;
pub mod plan;
mod worker;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::Client;

use crate::apply::conflict::OnConflict;
use crate::care::{self, tune::Tune};
use crate::connection::ConnectionSpec;
use crate::control::{self, ControlServer};
use crate::error::{Error, ErrorKind, Result};
use crate::migrate::{self, application_name};
use crate::observe::board::StatusBoard;
use crate::observe::status::{Level, Phase, TableState};
use crate::observe::{http, metrics};
use crate::pause::Pause;
use crate::source::scope::Scope;
use crate::sql;
use crate::state_directory::{Identity, LockedDirectory, StateDirectory};
use crate::target::role::ApplyRole;
use crate::timescale::chunks::{self, TimeType};
use crate::timescale::{policies, target as to};

use compare::There;
use ledger::Recorded;
use piece::How;
use plan::{Plan, PlannedPiece, PlannedTable, Work};

/// Where rows begin or end to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Microseconds since 1970.
    Time(i64),
    /// For tables whose time is a number.
    Integer(i64),
}

/// What a backfill needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server that has the old rows.
    pub source: ConnectionSpec,
    /// The server that gets them.
    pub target: ConnectionSpec,
    /// The state directory.
    pub directory: PathBuf,
    /// Rows from here on are the application's.
    pub until: Bound,
    /// Rows before are left out.
    pub from: Option<Bound>,
    /// Only these tables; `None` for all.
    pub tables: Option<Vec<String>>,
    /// Of tables that are no hypertables: the table, and the column that the bounds are about.
    pub time_columns: Vec<(String, String)>,
    /// What becomes of rows that are there already and are other ones.
    pub on_conflict: OnConflict,
    /// How many pieces at once, and how fast.
    pub care: care::Options,
    /// Where metrics and status are served.
    pub http_address: Option<SocketAddr>,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Of this object's format: 1.
    pub version: u32,
    /// Pieces that are on the target now.
    pub pieces: usize,
    /// Those of them that this start has brought.
    pub pieces_now: usize,
    /// Rows in all of them.
    pub rows: i64,
    /// Pieces of this start by how they came: `as_it_is`, `rows`, `merged`, `found`, `gone`.
    pub how: HashMap<&'static str, usize>,
    /// Chunks that were compressed on the target.
    pub compressed: usize,
    /// Continuous aggregates that were refreshed.
    pub aggregates: Vec<String>,
    /// Foreign keys that hold.
    pub foreign_keys: usize,
    /// How long this start took.
    pub seconds: f64,
}

/// Both servers, looked at.
struct Seen {
    source: Client,
    target: Client,
    role: ApplyRole,
    work: Vec<Work>,
    there: Vec<There>,
    /// The schema of the extension's functions on the target.
    extension: Option<String>,
}

impl Options {
    /// What a later start has to say the same of.
    fn wanted(&self) -> String {
        let tables = self.tables.as_ref().map_or("all tables".to_owned(), |tables| tables.join(","));
        let columns: Vec<String> =
            self.time_columns.iter().map(|(table, column)| format!(" {table}={column}")).collect();
        let from = self.from.map_or(String::new(), |from| format!(" from {from:?}"));
        format!("{tables}{from} until {:?}{}", self.until, columns.concat())
    }
}

async fn look(options: &Options, name: &str, known: &[Recorded]) -> Result<Seen> {
    let (source, target) = tokio::try_join!(options.source.connect(name), options.target.connect(name))?;
    let role = ApplyRole::allowed(&target).await?;
    let work = plan::read(&source, options, known).await?;
    let there = compare::compare(&source, &target, &work, role).await?;
    let extension = chunks::extension(&target).await?.map(|(_, schema)| schema);
    Ok(Seen { source, target, role, work, there, extension })
}

/// What a backfill would do. Nothing is changed.
///
/// # Errors
/// As [`run`]'s, as far as it can be known before.
pub async fn plan(options: &Options) -> Result<Plan> {
    let seen = look(options, "walferry backfill", &[]).await?;
    let relids = seen.relids();
    let (policies, aggregates) = match seen.extension {
        Some(_) => {
            (policies::policies(&seen.target, &relids).await?, policies::aggregates(&seen.target, &relids).await?)
        }
        None => (Vec::new(), Vec::new()),
    };
    let tables: Vec<PlannedTable> =
        seen.work.iter().zip(&seen.there).map(|(work, there)| planned(work, there)).collect();
    Ok(Plan {
        version: 1,
        bytes: seen.work.iter().flat_map(|work| &work.pieces).map(|piece| piece.bytes).sum(),
        tables,
        policies: policies
            .iter()
            .filter(|policy| policy.scheduled)
            .map(|policy| format!("job {}: {} of {}", policy.id, policy.procedure, policy.hypertable))
            .collect(),
        aggregates: aggregates.iter().map(policies::Aggregate::qualified).collect(),
        warnings: seen.warnings(&policies).await?,
    })
}

fn planned(work: &Work, there: &There) -> PlannedTable {
    let piece = |piece: &plan::Piece| PlannedPiece {
        name: piece.chunk.as_ref().map_or_else(|| piece.place.clone(), |(schema, name)| sql::qualified(schema, name)),
        rows_where: work.condition(piece),
        bytes: piece.bytes,
        how: match piece.is_compressed && !piece.is_cut {
            true if there.takes_batches => "compressed as it is",
            true if there.hypertable.as_ref().is_some_and(|hypertable| hypertable.has_compression) => {
                "rows, then compressed"
            }
            _ => "rows",
        },
    };
    PlannedTable { table: work.table.qualified(), pieces: work.pieces.iter().map(piece).collect() }
}

impl Seen {
    /// The tables on the target.
    fn relids(&self) -> Vec<u32> {
        self.there.iter().map(|there| there.relid).collect()
    }

    async fn warnings(&self, policies: &[policies::Policy]) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        for policy in policies.iter().filter(|policy| policy.procedure == "policy_retention" && policy.scheduled) {
            let Some(age) = &policy.drop_after else { continue };
            let of_table =
                self.work.iter().filter(|work| work.table.qualified() == unquoted_format(&policy.hypertable, work));
            let is_time = |work: &&Work| !matches!(work.time, Some((_, TimeType::Integer(_))) | None);
            let ends: Vec<i64> =
                of_table.filter(is_time).flat_map(|work| &work.pieces).map(|piece| piece.range.1).collect();
            let dropped = policies::would_be_dropped(&self.target, age, &ends).await?;
            if dropped > 0 {
                warnings.push(format!(
                    "the retention policy of {} on the target (job {}) drops what is older than {age}: {dropped} of {} pieces would go \
                     again as soon as it runs. Give it a longer age before, or leave them out with --from",
                    policy.hypertable,
                    policy.id,
                    ends.len()
                ));
            }
        }
        if chunks::extension(&self.source).await?.is_some() {
            let tables: Vec<u32> =
                self.work.iter().filter(|work| work.hypertable.is_some()).map(|work| work.table.relid).collect();
            for aggregate in policies::beyond_raw_rows(&self.source, &tables).await? {
                warnings.push(format!(
                    "the continuous aggregate {aggregate} on the source has buckets older than the oldest chunk of its hypertable: a backfill copies rows, \
                     and these can no longer be computed from them"
                ));
            }
        }
        Ok(warnings)
    }
}

/// `format('%I.%I')` quotes only where it must.
fn unquoted_format(formatted: &str, work: &Work) -> String {
    let plain = format!("{}.{}", work.table.schema, work.table.name);
    if formatted.replace('"', "") == plain { work.table.qualified() } else { String::new() }
}

/// Copies what is not there yet.
///
/// # Errors
/// `Blocked` when a precondition does not hold (nothing is changed then), `Divergence` for rows that are in the way, `Interrupted` on SIGINT and
/// SIGTERM; else what stopped it. Run again, it goes on.
pub async fn run(options: Options, board: &StatusBoard) -> Result<Outcome> {
    let began = std::time::Instant::now();
    let directory = StateDirectory::at(&options.directory).lock()?;
    let shown = directory.directory().clone();
    board.set_phase(Phase::Preparing);
    board.set_servers(options.source.describe(), options.target.describe());
    let outcome = tokio::select! {
        outcome = boxed(begin(&options, &directory, board)) => outcome,
        error = migrate::stop_signal() => Err(error),
    };
    // Whatever happened, what rests goes on; when the target is away, at the end of the next start.
    let restored = let_policies_go_on(&options, &directory, board).await;
    if let Err(error) = &outcome {
        if error.kind() == ErrorKind::Interrupted {
            board.event(Level::Info, "stopped by the operator; the same command goes on from here");
        } else {
            board.fail(error);
        }
    }
    migrate::write_status(&shown, board);
    let outcome = outcome?;
    restored?;
    Ok(Outcome { seconds: began.elapsed().as_secs_f64(), ..outcome })
}

/// Boxed: its type must not depend on a lifetime, or the whole could not be spawned.
fn boxed<'a, T>(work: impl Future<Output = T> + Send + 'a) -> Pin<Box<dyn Future<Output = T> + Send + 'a>> {
    Box::pin(work)
}

async fn let_policies_go_on(options: &Options, directory: &LockedDirectory, board: &StatusBoard) -> Result<()> {
    let Some(identity) = directory.directory().identity()? else { return Ok(()) };
    let restored = async {
        let target = options.target.connect(&application_name(&identity.id)).await?;
        // Those of another backfill are its own business.
        if ledger::is_of(&target, &identity.id).await? { ledger::restore_jobs(&target).await } else { Ok(Vec::new()) }
    };
    match restored.await {
        Ok(jobs) if jobs.is_empty() => Ok(()),
        Ok(jobs) => {
            board.event(Level::Info, format!("policies of the target are on their schedule again: jobs {jobs:?}"));
            Ok(())
        }
        Err(error) => {
            board.event(
                Level::Warn,
                format!("policies of the target still rest (`walferry clean` lets them go on): {error}"),
            );
            Err(error)
        }
    }
}

async fn begin(options: &Options, directory: &LockedDirectory, board: &StatusBoard) -> Result<Outcome> {
    let pause = Pause::restore(directory.directory(), board);
    let tune = Tune::restore(directory.directory(), board, &options.care, None)?;
    let (senders, requests, finish) = control::requests();
    // Nobody takes what only a migration can do: whoever asks is told that there is none.
    drop((requests, finish));
    let _control = ControlServer::start(directory.directory(), board.clone(), pause.clone(), tune.clone(), senders)?;
    let _http = match options.http_address {
        Some(address) => Some(http::serve(address, board.clone(), metrics::install()?).await?),
        None => None,
    };
    let _ticker = board.start_ticker();
    let _status = migrate::keep_status(directory.directory().clone(), board.clone());
    let id = identify(options, directory).await?;
    let name = application_name(&id);
    let mut outcome = Outcome { version: 1, ..Outcome::default() };
    let (mut seen, mut known) = prepare(options, &id, &name, board).await?;
    if let Some(schema) = &seen.extension {
        let policies = policies::policies(&seen.target, &seen.relids()).await?;
        for warning in seen.warnings(&policies).await? {
            board.event(Level::Warn, warning);
        }
        let_policies_rest(&seen.target, schema, &policies, board).await?;
    }
    show(board, &seen.work, &known);
    board.set_phase(Phase::Copying);
    let mut pieces = worker::Done::default();
    loop {
        let done = worker::Shared::new(options, &seen, &name, board, &pause, &tune, &known).run().await?;
        pieces.how.extend(done.how);
        pieces.compressed += done.compressed;
        // The old sessions may have been idle for days. And rows that came late can have made chunks that no plan knew.
        seen = look(options, &name, &ledger_of(options, &name).await?).await?;
        known = noted(&seen).await?;
        if !is_anything_left(&seen, &known) {
            break;
        }
    }
    if let Some(lost) = lost::find(&seen.target, &seen, &known).await?.first() {
        let text =
            format!("the target has dropped the chunk of {} of {} while it was filled", lost.place, lost.relation);
        return Err(Error::new(ErrorKind::Different, text).hint(
            "Its policies rest, so it was a job of your own, or somebody's drop_chunks. Stop that, then run the same command again: it copies again what is gone.",
        ));
    }
    for how in [How::AsItIs, How::Rows, How::Merged, How::Found, How::Gone] {
        let count = pieces.how.iter().filter(|one| **one == how).count();
        if count > 0 {
            outcome.how.insert(how.name(), count);
        }
    }
    outcome.pieces_now = pieces.how.len();
    outcome.compressed = pieces.compressed;
    finish_up(options, &seen, &known, &mut outcome, board).await?;
    ledger::complete(&seen.target).await?;
    let all = ledger::pieces(&seen.target).await?;
    outcome.pieces = all.iter().filter(|piece| piece.copied).count();
    outcome.rows = all.iter().map(|piece| piece.rows).sum();
    for work in &seen.work {
        if let Some(table) = board.table(work.table.relid) {
            table.set_state(TableState::Done);
        }
    }
    board.event(Level::Info, format!("the backfill is complete: {} pieces, {} rows", outcome.pieces, outcome.rows));
    Ok(outcome)
}

/// Who this backfill is: as the directory says, or new.
async fn identify(options: &Options, directory: &LockedDirectory) -> Result<String> {
    let target = options.target.connect("walferry backfill").await?;
    if crate::target::ledger::load(&target).await?.is_some() {
        return Err(Error::new(ErrorKind::Blocked, "the target has the ledger of a migration").hint(
            "A migration copies all rows itself. End it, and remove what it left with `walferry clean`, before rows are filled in by pieces.",
        ));
    }
    let (source, target) = (options.source.without_password(), options.target.without_password());
    if let Some(identity) = directory.directory().identity()? {
        if (&identity.source, &identity.target) != (&source, &target) {
            let text = format!("{} belongs to other servers", directory.directory().path().display());
            return Err(Error::new(ErrorKind::Blocked, text).hint("Choose another directory with --dir."));
        }
        return Ok(identity.id);
    }
    let id = migrate::new_id();
    directory.identify(&Identity::new(id.clone(), source, target, Scope::default()))?;
    Ok(id)
}

async fn ledger_of(options: &Options, name: &str) -> Result<Vec<Recorded>> {
    let target = options.target.connect(name).await?;
    if ledger::exists(&target).await? { ledger::pieces(&target).await } else { Ok(Vec::new()) }
}

/// Compares, makes the ledger and notes the plan in it.
async fn prepare(options: &Options, id: &str, name: &str, board: &StatusBoard) -> Result<(Seen, Vec<Recorded>)> {
    // Sessions of a walferry that died may be at work still: their piece would be in the way.
    for server in [&options.source, &options.target] {
        migrate::end_sessions(&server.connect("walferry").await?, name).await?;
    }
    let mut seen = look(options, name, &ledger_of(options, name).await?).await?;
    ledger::begin(&mut seen.target, id, &options.wanted()).await?;
    let mut known = noted(&seen).await?;
    let lost = lost::find(&seen.target, &seen, &known).await?;
    if !lost.is_empty() {
        let text = format!(
            "{} pieces that were copied are gone from the target (retention, or drop_chunks) and are copied again; the first is {} of {}",
            lost.len(),
            lost[0].place,
            lost[0].relation
        );
        board.event(Level::Warn, text);
        ledger::forget(&seen.target, &lost).await?;
        known = ledger::pieces(&seen.target).await?;
    }
    Ok((seen, known))
}

/// Notes the pieces that are new, and answers with all.
async fn noted(seen: &Seen) -> Result<Vec<Recorded>> {
    let pieces: Vec<Recorded> = seen.work.iter().flat_map(Work::recorded).collect();
    ledger::plan(&seen.target, &pieces).await?;
    ledger::pieces(&seen.target).await
}

fn is_anything_left(seen: &Seen, known: &[Recorded]) -> bool {
    let copied: HashSet<(&str, &str)> = known
        .iter()
        .filter(|piece| piece.copied)
        .map(|piece| (piece.relation.as_str(), piece.place.as_str()))
        .collect();
    let left =
        |work: &Work| work.recorded().any(|piece| !copied.contains(&(piece.relation.as_str(), piece.place.as_str())));
    seen.work.iter().any(left)
}

/// Takes the policies that would be in the way off their schedule, and waits for those at work.
async fn let_policies_rest(
    target: &Client,
    schema: &str,
    policies: &[policies::Policy],
    board: &StatusBoard,
) -> Result<()> {
    let scheduled: Vec<i32> = policies.iter().filter(|policy| policy.scheduled).map(|policy| policy.id).collect();
    ledger::note_jobs(target, &scheduled).await?;
    for job in &scheduled {
        policies::schedule(target, schema, *job, false).await?;
    }
    if !scheduled.is_empty() {
        board.event(Level::Info, format!("policies of the target rest until the end: jobs {scheduled:?}"));
    }
    let all: Vec<i32> = policies.iter().map(|policy| policy.id).collect();
    while !all.is_empty() && policies::are_running(target, &all).await? {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

fn show(board: &StatusBoard, work: &[Work], known: &[Recorded]) {
    for one in work {
        let bytes: i64 = one.pieces.iter().map(|piece| piece.bytes).sum();
        let table = board.add_table(one.table.relid, &one.table.schema, &one.table.name, bytes.max(0).cast_unsigned());
        let name = one.table.qualified();
        let done = known.iter().filter(|piece| piece.relation == name && piece.copied);
        let (bytes, rows) = done.fold((0, 0), |(bytes, rows), piece| (bytes + piece.bytes, rows + piece.rows));
        table.add_recorded(bytes.max(0).cast_unsigned(), rows.max(0).cast_unsigned());
        let copied: HashSet<&str> = known
            .iter()
            .filter(|piece| piece.relation == name && piece.copied)
            .map(|piece| piece.place.as_str())
            .collect();
        if one.pieces.iter().all(|piece| copied.contains(piece.place.as_str())) {
            table.set_state(TableState::Done);
        }
    }
}

/// All that is done once every piece is there.
async fn finish_up(
    options: &Options,
    seen: &Seen,
    known: &[Recorded],
    outcome: &mut Outcome,
    board: &StatusBoard,
) -> Result<()> {
    let Some(schema) = &seen.extension else {
        return hold_foreign_keys(options, seen, outcome).await;
    };
    for (work, there) in seen.work.iter().zip(&seen.there) {
        outcome.compressed += compress_rest(seen, work, there, schema).await?;
    }
    let relids = seen.relids();
    for aggregate in policies::aggregates(&seen.target, &relids).await? {
        let work = seen
            .work
            .iter()
            .find(|work| (&work.table.schema, &work.table.name) == (&aggregate.hypertable.0, &aggregate.hypertable.1));
        let Some((work, (_, time))) = work.and_then(|work| Some((work, work.time.as_ref()?))) else { continue };
        let ranges = || known.iter().filter(|piece| piece.relation == work.table.qualified() && piece.copied);
        let first = ranges().map(|piece| piece.range.0).filter(|from| *from != i64::MIN).min();
        let last = ranges().map(|piece| piece.range.1).filter(|to| *to != i64::MAX).max();
        let (Some(first), Some(last)) = (first, last) else { continue };
        board.event(Level::Info, format!("refreshing {}", aggregate.qualified()));
        aggregate.refresh(&seen.target, schema, time, (first, last)).await?;
        outcome.aggregates.push(aggregate.qualified());
    }
    hold_foreign_keys(options, seen, outcome).await
}

async fn hold_foreign_keys(options: &Options, seen: &Seen, outcome: &mut Outcome) -> Result<()> {
    let mut filled = Vec::new();
    for (work, there) in seen.work.iter().zip(&seen.there) {
        let range = plan::bounds(work, options)?;
        let all = plan::Piece {
            place: String::new(),
            chunk: None,
            range,
            is_cut: false,
            is_compressed: false,
            further: Vec::new(),
            bytes: 0,
        };
        filled.push((work, there.relid, work.condition(&all)));
    }
    outcome.foreign_keys = foreign_keys::hold(&seen.target, &filled).await?;
    Ok(())
}

/// Compresses the chunks of the target whose rows were all compressed on the source, where the target divides them otherwise.
async fn compress_rest(seen: &Seen, work: &Work, there: &There, schema: &str) -> Result<usize> {
    let Some(hypertable) = there.hypertable.as_ref().filter(|one| one.has_compression) else { return Ok(0) };
    if !work.pieces.iter().any(|piece| piece.is_compressed) {
        return Ok(0);
    }
    let mut compressed = 0;
    // Of equal ranges each chunk was compressed when its piece was there.
    let all = chunks::chunks(&seen.target, hypertable, None).await?;
    for chunk in &all {
        if chunk.compressed.is_none() && was_compressed(work, chunk.range(hypertable)) {
            to::compress(&seen.target, schema, &chunk.qualified()).await?;
            compressed += 1;
        }
    }
    Ok(compressed)
}

/// Whether all pieces that have rows of a range are compressed on the source.
fn was_compressed(work: &Work, (from, to): (i64, i64)) -> bool {
    let mut over = work.pieces.iter().filter(|piece| piece.range.0 < to && from < piece.range.1).peekable();
    over.peek().is_some() && over.all(|piece| piece.is_compressed && !piece.is_cut)
}

/// A bound such as `2026-01-01T00:00:00Z`, `2026-01-01` or a number, as the command line gives it.
///
/// # Errors
/// A sentence that says what it should be.
pub fn parse_bound(text: &str) -> Result<Bound, String> {
    if let Ok(number) = text.parse() {
        return Ok(Bound::Integer(number));
    }
    let whole = if text.len() == "2026-01-01".len() { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let milliseconds = crate::observe::wall_clock::parse_rfc3339(&whole);
    milliseconds.map(|milliseconds| Bound::Time(milliseconds * 1000)).ok_or_else(|| {
        "expected a time such as 2026-01-01T00:00:00Z, a day (from its beginning in UTC), or a number for tables whose time is one".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_a_time_a_day_or_a_number() {
        assert_eq!(parse_bound("1970-01-02"), Ok(Bound::Time(86_400_000_000)));
        assert_eq!(parse_bound("1970-01-01T01:00:00+01:00"), Ok(Bound::Time(0)));
        assert_eq!(parse_bound("-5"), Ok(Bound::Integer(-5)));
        assert!(parse_bound("yesterday").is_err());
    }
}
