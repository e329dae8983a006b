//! The report of a migration: one page for the change ticket, made from the state directory and, where it answers, the ledger.
//!
//! ```text
//!   record.jsonl, walferry.record ──┐
//!   history.jsonl ──────────────────┼─► gather ──► Report ──► JSON, or html.rs: one file, without scripts, with plot.rs's plots
//!   status.json, the ledger ────────┘
//! ```

mod html;
mod phases;
mod plot;

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::connection::ConnectionSpec;
use crate::cutover;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::status::{Event, Level, Status};
use crate::observe::wall_clock;
use crate::record::past::{self, Point};
use crate::record::{self, Entry, Server, What, merged};
use crate::state_directory::StateDirectory;
use crate::target::ledger;
use crate::verify::{self, Verification};

pub use html::render;
pub use phases::PhaseTime;

/// How long the target may take to answer; what it does not say is left out, and that is said.
const ANSWER_MAX: Duration = Duration::from_secs(15);
/// Tables that are named, the largest first.
const TABLES_MAX: usize = 50;

/// The fact that [`Moved`] is kept under, from the end of the copy on.
pub const MOVED: &str = "moved";

/// What is known of a migration.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The version of this object's form.
    pub version: u32,
    /// When it was made: RFC 3339, UTC. All times are.
    pub made_at: String,
    /// Which walferry made it.
    pub made_by: &'static str,
    /// The migration's id.
    pub id: Option<String>,
    /// How far it is, as `status` has it.
    pub phase: Option<String>,
    /// The server that is moved away from.
    pub source: ServerSeen,
    /// The server that is moved to.
    pub target: ServerSeen,
    /// When the first command began.
    pub began_at: Option<String>,
    /// The newest that is known.
    pub ended_at: Option<String>,
    /// What was copied.
    pub moved: Option<Moved>,
    /// Objects of the schema by kind; empty where the ledger could not be asked.
    pub objects: Vec<Count>,
    /// How long each phase took.
    pub phases: Vec<PhaseTime>,
    /// Cutovers and switchbacks that went through.
    pub switches: Vec<Switch>,
    /// The last comparison of both sides.
    pub verification: Option<Verification>,
    /// Warnings and errors, oldest first.
    pub incidents: Vec<Event>,
    /// How often what happened in the last process.
    pub counts: Vec<Count>,
    /// Who asked for what.
    pub commands: Vec<Command>,
    /// What changed a server.
    pub statements: Vec<Statement>,
    /// How many of each kind there were.
    pub statement_counts: Vec<StatementCount>,
    /// The plots' points.
    pub points: Vec<Point>,
    /// What this report lacks.
    pub lacks: Vec<String>,
}

/// A server.
#[derive(Debug, Default, Serialize)]
pub struct ServerSeen {
    /// Host, port and database.
    pub description: String,
    /// PostgreSQL's version.
    pub version: Option<String>,
}

/// What was copied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// Tables.
    pub tables: u64,
    /// Rows that were copied.
    pub rows: u64,
    /// Bytes of COPY data.
    pub bytes: u64,
    /// Indexes and constraints built after the rows.
    pub indexes: u64,
    /// The largest tables.
    pub largest: Vec<MovedTable>,
}

/// A table that was copied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MovedTable {
    /// `schema.name`, unquoted.
    pub name: String,
    /// Rows that were copied.
    pub rows: u64,
    /// Bytes of COPY data.
    pub bytes: u64,
}

impl Moved {
    /// Of a migration whose rows are all there.
    pub fn of(status: &Status) -> Moved {
        let mut largest: Vec<MovedTable> = status
            .tables
            .iter()
            .map(|table| MovedTable {
                name: format!("{}.{}", table.schema, table.name),
                rows: table.rows_done,
                bytes: table.bytes_done,
            })
            .collect();
        largest.sort_by_key(|table| std::cmp::Reverse(table.bytes));
        largest.truncate(TABLES_MAX);
        let copy = &status.copy;
        let (rows, bytes, indexes) = (copy.rows_done, copy.bytes_done, status.indexes.total);
        Moved { tables: copy.tables_total, rows, bytes, indexes, largest }
    }
}

/// Something counted.
#[derive(Debug, PartialEq, Serialize)]
pub struct Count {
    /// What.
    pub name: String,
    /// How many.
    pub count: u64,
}

/// A cutover or switchback that went through.
#[derive(Debug, Serialize)]
pub struct Switch {
    /// When it was over.
    pub at: String,
    /// Whether it was back to the old primary.
    pub back: bool,
    /// Its steps.
    pub outcome: cutover::Outcome,
}

/// A command of an operator.
#[derive(Debug, Serialize)]
pub struct Command {
    /// When it began.
    pub at: String,
    /// Its name.
    pub command: String,
    /// The rest, without secrets.
    pub arguments: Vec<String>,
    /// Who, on which machine.
    pub user: String,
    /// When it ended; null while it runs, and where it was killed.
    pub ended_at: Option<String>,
    /// Its exit code.
    pub exit: Option<u8>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A statement that changed a server.
#[derive(Debug, Serialize)]
pub struct Statement {
    /// When it was about to be sent.
    pub at: String,
    /// Where to.
    pub server: Server,
    /// Which kind of the plan.
    pub kind: String,
    /// Its text.
    pub statement: String,
}

/// How many statements of a kind changed a server, those included that are not named.
#[derive(Debug, Serialize)]
pub struct StatementCount {
    /// Where.
    pub server: Server,
    /// Which kind of the plan.
    pub kind: String,
    /// How many.
    pub count: u64,
}

/// What the ledger says.
#[derive(Default)]
struct FromLedger {
    entries: Vec<Entry>,
    objects: Vec<Count>,
    tables: Option<(u64, u64)>,
    verification: Option<Verification>,
    id: Option<String>,
}

/// Puts together all that can be had.
///
/// # Errors
/// `Usage` when nothing at all is known of a migration there; else what the disk says.
pub async fn gather(
    directory: &Path,
    source: Option<&ConnectionSpec>,
    target: Option<&ConnectionSpec>,
) -> Result<Report> {
    let state = StateDirectory::at(directory);
    let identity = state.identity()?;
    let mut lacks = Vec::new();
    let from_ledger = match target {
        Some(target) => match tokio::time::timeout(ANSWER_MAX, ask(target)).await {
            Ok(Ok(from_ledger)) => from_ledger,
            Ok(Err(error)) => {
                lacks.push(format!("The ledger could not be read ({error}): this is what the state directory has."));
                FromLedger::default()
            }
            Err(_) => {
                lacks.push("The target did not answer: this is what the state directory has.".to_owned());
                FromLedger::default()
            }
        },
        None => FromLedger::default(),
    };
    let entries = merged(record::read(directory)?.into_iter().chain(from_ledger.entries));
    if identity.is_none() && entries.is_empty() && from_ledger.id.is_none() {
        let text = format!("there is no migration in {}", directory.display());
        return Err(Error::new(ErrorKind::Usage, text)
            .hint("Give the state directory of a migration with --dir; after `walferry clean` there is nothing left to report."));
    }
    let points = past::read(directory)?;
    let status: Option<Status> = match std::fs::read(state.status()) {
        Ok(written) => serde_json::from_slice(&written).ok(),
        Err(_) => None,
    };
    let fact = |wanted: &str| {
        entries.iter().rev().find_map(|entry| match &entry.what {
            What::Fact { name, value } if name == wanted => Some(value.clone()),
            _ => None,
        })
    };
    let seen = |spec: Option<&ConnectionSpec>, known: Option<&String>, name: &str| ServerSeen {
        description: spec
            .cloned()
            .or_else(|| known.and_then(|known| ConnectionSpec::parse(known).ok()))
            .map_or_else(|| "unknown".to_owned(), |spec| spec.describe()),
        version: fact(name),
    };
    let mut moved: Option<Moved> = fact(MOVED).and_then(|json| serde_json::from_str(&json).ok());
    if moved.is_none() {
        // As far as it went.
        moved = status.as_ref().filter(|status| status.copy.tables_total > 0).map(Moved::of);
    }
    if let (Some(moved), Some((tables, rows))) = (&mut moved, from_ledger.tables) {
        // What a process that went on has not copied itself.
        (moved.tables, moved.rows) = (moved.tables.max(tables), moved.rows.max(rows));
    }
    if entries.iter().any(|entry| matches!(entry.what, What::Shortened { .. })) {
        lacks.push("The record had grown too large once, and has lost lines of its middle.".to_owned());
    }
    let verification = from_ledger.verification.or_else(|| status.as_ref()?.verification.clone());
    let (statements, statement_counts) = statements(&entries);
    Ok(Report {
        version: 1,
        made_at: wall_clock::now_rfc3339(),
        made_by: env!("WALFERRY_VERSION"),
        id: identity.as_ref().map(|identity| identity.id.clone()).or(from_ledger.id),
        phase: status.as_ref().map(|status| status.phase.title().to_owned()),
        source: seen(source, identity.as_ref().map(|identity| &identity.source), "source_version"),
        target: seen(target, identity.as_ref().map(|identity| &identity.target), "target_version"),
        began_at: entries.first().map(|entry| entry.at.clone()),
        ended_at: entries.last().map(|entry| entry.at.clone()),
        moved,
        objects: from_ledger.objects,
        phases: phases::of(&entries, &points),
        switches: switches(&entries),
        verification,
        incidents: incidents(&entries),
        counts: status.as_ref().map(counts).unwrap_or_default(),
        commands: commands(&entries),
        statements,
        statement_counts,
        points,
        lacks,
    })
}

async fn ask(target: &ConnectionSpec) -> Result<FromLedger> {
    let client = target.connect("walferry").await?;
    let Some(migration) = ledger::load(&client).await? else { return Ok(FromLedger::default()) };
    let doing = || "reading the ledger for the report".to_owned();
    let objects = client
        .query_typed("SELECT lower(kind), count(*) FROM walferry.schema_item GROUP BY 1 ORDER BY 2 DESC, 1", &[])
        .await
        .context(doing)?;
    let tables = client
        .query_typed_one("SELECT count(*), coalesce(sum(rows_copied), 0)::int8 FROM walferry.source_table", &[])
        .await
        .context(doing)?;
    let objects = objects.iter().map(|row| Count { name: row.get(0), count: row.get::<_, i64>(1).unsigned_abs() });
    Ok(FromLedger {
        entries: record::ledger::load(&client).await?,
        objects: objects.collect(),
        tables: Some((tables.get::<_, i64>(0).unsigned_abs(), tables.get::<_, i64>(1).unsigned_abs())),
        verification: last_verification(&client).await,
        id: Some(migration.id),
    })
}

async fn last_verification(client: &Client) -> Option<Verification> {
    verify::last(client).await.ok().flatten()
}

fn switches(entries: &[Entry]) -> Vec<Switch> {
    let of = |entry: &Entry| match &entry.what {
        What::Switched { back, outcome } => {
            Some(Switch { at: entry.at.clone(), back: *back, outcome: outcome.clone() })
        }
        _ => None,
    };
    entries.iter().filter_map(of).collect()
}

fn incidents(entries: &[Entry]) -> Vec<Event> {
    let of = |entry: &Entry| match &entry.what {
        What::Event { event } if event.level > Level::Info => Some(event.clone()),
        _ => None,
    };
    entries.iter().filter_map(of).collect()
}

fn counts(status: &Status) -> Vec<Count> {
    let of = |name: &str, count| Count { name: name.to_owned(), count };
    [
        of("reconnects to the source", status.stream.reconnects),
        of("reconnects to the target", status.target.reconnects),
        of("batches replayed row by row", status.apply.serial_replays),
        of("conflicts", status.apply.conflicts),
        of("DDL statements replicated", status.apply.ddl_replayed),
    ]
    .into_iter()
    .filter(|count| count.count > 0)
    .collect()
}

fn commands(entries: &[Entry]) -> Vec<Command> {
    let outcome_of = |id: &str| {
        entries.iter().find_map(|entry| match &entry.what {
            What::Outcome { of, exit, error } if of == id => Some((entry.at.clone(), *exit, error.clone())),
            _ => None,
        })
    };
    let of = |entry: &Entry| match &entry.what {
        What::Command { command, arguments, user, host, .. } => {
            let outcome = outcome_of(&entry.id);
            Some(Command {
                at: entry.at.clone(),
                command: command.clone(),
                arguments: arguments.clone(),
                user: format!("{user}@{host}"),
                ended_at: outcome.as_ref().map(|(at, ..)| at.clone()),
                exit: outcome.as_ref().map(|(_, exit, _)| *exit),
                error: outcome.and_then(|(.., error)| error),
            })
        }
        _ => None,
    };
    entries.iter().filter_map(of).collect()
}

fn statements(entries: &[Entry]) -> (Vec<Statement>, Vec<StatementCount>) {
    let (mut named, mut counted) = (Vec::new(), Vec::<StatementCount>::new());
    let mut add = |server: Server, kind: &str, more: u64| match counted
        .iter_mut()
        .find(|known| known.server == server && known.kind == kind)
    {
        Some(known) => known.count += more,
        None => counted.push(StatementCount { server, kind: kind.to_owned(), count: more }),
    };
    for entry in entries {
        match &entry.what {
            What::Statement { server, kind, statement } => {
                add(*server, kind, 1);
                let (at, kind, statement) = (entry.at.clone(), kind.clone(), statement.clone());
                named.push(Statement { at, server: *server, kind, statement });
            }
            What::More { server, kind, count } => add(*server, kind, *count),
            _ => {}
        }
    }
    counted.sort_by_key(|one| (one.server, std::cmp::Reverse(one.count)));
    (named, counted)
}
