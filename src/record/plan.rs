//! Every statement that changes a server, beyond its rows: the one list that `check --plan` prints and that each statement of each
//! session is held against before it is sent (`wire.rs`). So what the list lacks does not stay unknown: it is recorded as
//! [`UNPLANNED`], and the tests that migrate look for that.
//!
//! Templates: `<…>` stands for a name, a number or a list, `…` for anything or nothing; words count in any case. A call of a
//! function counts wherever in a query it stands.

mod kinds;
mod timescale;

use std::sync::LazyLock;

use serde::Serialize;

use super::Server;
use crate::apply::ddl::statement::split;

pub use kinds::{KINDS, REPLICATED, SCHEMA, UNPLANNED};

/// Where a statement runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// The server that is moved away from.
    Source,
    /// The server that is moved to.
    Target,
    /// Either: the other one on the way back.
    Both,
}

/// What has to be so for a statement to run at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In every migration that comes to it.
    Always,
    /// `--replicate-ddl`
    ReplicateDdl,
    /// `--replica-identity-full`
    ReplicaIdentityFull,
    /// `--roles`
    Roles,
    /// A way back is made ready: no `--no-reverse`.
    WayBack,
    /// A part of a database: `--fence tables`.
    Part,
    /// The whole database, whose fence closes it.
    Whole,
    /// `--map-schema`
    MapSchema,
    /// Not with `--data-only`.
    WithSchema,
    /// `--hypertables`
    Hypertables,
    /// `--pause-source-jobs`
    PauseSourceJobs,
}

/// For which options the plan is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// `--replicate-ddl`
    pub replicate_ddl: bool,
    /// `--replica-identity-full`
    pub replica_identity_full: bool,
    /// `--roles`
    pub roles: bool,
    /// `--no-reverse`
    pub no_reverse: bool,
    /// Filters, or `--data-only`.
    pub part: bool,
    /// `--data-only`
    pub data_only: bool,
    /// `--map-schema`
    pub map_schema: bool,
    /// `--hypertables`
    pub hypertables: bool,
    /// `--pause-source-jobs`
    pub pause_source_jobs: bool,
}

impl When {
    fn holds(self, options: &Options) -> bool {
        match self {
            When::Always => true,
            When::ReplicateDdl => options.replicate_ddl,
            When::ReplicaIdentityFull => options.replica_identity_full,
            When::Roles => options.roles,
            When::WayBack => !options.no_reverse && !options.map_schema,
            When::Part => options.part,
            // By name the other fences can be asked for, too.
            When::Whole => true,
            When::MapSchema => options.map_schema,
            When::WithSchema => !options.data_only,
            When::Hypertables => options.hypertables,
            When::PauseSourceJobs => options.pause_source_jobs,
        }
    }
}

/// A kind of statement.
#[derive(Debug)]
pub struct Kind {
    /// What the record calls it.
    pub name: &'static str,
    /// Where it runs.
    pub on: On,
    /// In which phase.
    pub phase: &'static str,
    pub(super) when: When,
    /// When it runs, for people.
    pub condition: &'static str,
    /// The template.
    pub statement: &'static str,
    /// What takes it back.
    pub reverted_by: &'static str,
    /// It can hold what is not ours to keep (defaults, bodies, options): constants are left out of the record.
    pub(super) redact: bool,
    /// A power cut must not take its line back: nothing else knows of it, or its effect outlives everything of ours.
    pub(super) durable: bool,
}

const fn kind(
    name: &'static str,
    on: On,
    (phase, when, condition): (&'static str, When, &'static str),
    statement: &'static str,
    reverted_by: &'static str,
) -> Kind {
    Kind { name, on, phase, when, condition, statement, reverted_by, redact: false, durable: false }
}

const fn durable(kind: Kind) -> Kind {
    Kind { durable: true, ..kind }
}

const fn redacted(kind: Kind) -> Kind {
    Kind { redact: true, ..kind }
}

/// One line of `check --plan`.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Its number.
    pub position: usize,
    /// `source`, `target` or `both` (the other one on the way back).
    pub server: &'static str,
    /// Of one on `both`: the server on which it runs without a way back, where it is one of them.
    #[serde(skip)]
    pub without_way_back: Option<&'static str>,
    /// In which phase.
    pub phase: &'static str,
    /// What the record calls it.
    pub kind: &'static str,
    /// The template.
    pub statement: &'static str,
    /// When it runs.
    pub condition: &'static str,
    /// What takes it back.
    pub reverted_by: &'static str,
}

/// What a migration with these options may run, in the order in which it comes to it.
pub fn plan(options: &Options) -> Vec<Line> {
    let wanted = in_order().into_iter().filter(|kind| kind.when.holds(options));
    wanted
        .enumerate()
        .map(|(at, kind)| Line {
            position: at + 1,
            server: match kind.on {
                On::Source => "source",
                On::Target => "target",
                On::Both if options.no_reverse => on_one_way(kind),
                On::Both => "both",
            },
            without_way_back: (kind.on == On::Both && kind.when != When::WayBack)
                .then(|| on_one_way(kind))
                .filter(|server| *server != "both"),
            phase: kind.phase,
            kind: kind.name,
            statement: kind.statement,
            condition: kind.condition,
            reverted_by: kind.reverted_by,
        })
        .collect()
}

/// All of it: the schema's statements stand where the schema is made, and each group of TimescaleDB's before what follows it.
fn in_order() -> Vec<&'static Kind> {
    let first = |(name, phase): (&str, &str)| KINDS.iter().position(|kind| (kind.name, kind.phase) == (name, phase));
    let schema = KINDS.iter().position(|kind| kind.name == "identity column");
    let groups = timescale::GROUPS.map(|(before, kinds)| (first(before), kinds));
    let mut all = Vec::new();
    for (at, kind) in KINDS.iter().enumerate() {
        all.extend((schema == Some(at)).then_some(&SCHEMA));
        all.extend(groups.iter().filter(|(before, _)| *before == Some(at)).flat_map(|(_, kinds)| kinds.iter()));
        all.push(kind);
    }
    all.push(&REPLICATED);
    all
}

/// Without a way back most of it is one server's.
fn on_one_way(kind: &Kind) -> &'static str {
    match kind.name {
        // Whatever an earlier attempt with a way back left.
        "publication" | "slot" if kind.statement.contains("DROP ") || kind.statement.contains("_drop_") => "both",
        "publication" | "fence" | "guard" | "slot" | "marker" => "source",
        "session" | "replica identity" => "both",
        _ => "target",
    }
}

/// A word of a template.
#[derive(Debug, PartialEq)]
enum Word {
    /// This one.
    Is(String),
    /// One constant, or a body in dollar quotes that begins so.
    Begins(String),
    /// A name that begins so.
    Named(String),
    /// One or more.
    Some,
    /// Any number.
    Any,
}

struct Compiled {
    kind: &'static Kind,
    words: Vec<Word>,
    /// The function that is called.
    calls: Option<String>,
}

static COMPILED: LazyLock<Vec<Compiled>> = LazyLock::new(|| {
    KINDS.iter().chain(timescale::GROUPS.iter().flat_map(|(_, kinds)| kinds.iter())).map(compile).collect()
});

fn compile(kind: &'static Kind) -> Compiled {
    let statements = split(kind.statement).unwrap_or_default();
    let tokens: Vec<String> =
        statements.into_iter().flat_map(|statement| statement.tokens).map(|(_, token)| token).collect();
    let calls = (tokens.first().is_some_and(|first| first == "SELECT")).then(|| tokens.get(1).cloned()).flatten();
    let (mut words, mut open) = (Vec::new(), false);
    for token in tokens {
        match token.as_str() {
            "<" => {
                open = true;
                words.push(Word::Some);
            }
            ">" => open = false,
            _ if open && token.starts_with("WALFERRY_") => {
                words.pop();
                words.push(Word::Named(token.to_lowercase()));
            }
            _ if open => {}
            "…" => words.push(Word::Any),
            _ if token.starts_with('$') => {
                let tag = token[1..].find('$').map_or(token.as_str(), |end| &token[..end + 2]);
                words.push(Word::Begins(tag.to_owned()));
            }
            _ => words.push(Word::Is(token)),
        }
    }
    Compiled { kind, words, calls }
}

fn fits(words: &[Word], tokens: &[&str]) -> bool {
    match words.split_first() {
        None => tokens.is_empty(),
        Some((Word::Is(word), rest)) => tokens.first().is_some_and(|token| token == word) && fits(rest, &tokens[1..]),
        Some((Word::Begins(tag), rest)) => {
            tokens.first().is_some_and(|token| token.starts_with(tag.as_str())) && fits(rest, &tokens[1..])
        }
        Some((Word::Named(prefix), rest)) => {
            let is_named = |token: &&str| token.trim_start_matches('"').starts_with(prefix.as_str());
            tokens.first().is_some_and(is_named) && fits(rest, &tokens[1..])
        }
        Some((Word::Some, rest)) => (1..=tokens.len()).any(|taken| fits(rest, &tokens[taken..])),
        // What ends a template with anything fits at once, however long a statement is.
        Some((Word::Any, [])) => true,
        Some((Word::Any, rest)) => (0..=tokens.len()).any(|taken| fits(rest, &tokens[taken..])),
    }
}

/// Statements that change nothing but rows, the session or the transaction.
const HARMLESS: [&str; 30] = [
    "WITH",
    "SHOW",
    "SET",
    "RESET",
    "BEGIN",
    "START",
    "COMMIT",
    "END",
    "ROLLBACK",
    "ABORT",
    "SAVEPOINT",
    "RELEASE",
    "DISCARD",
    "DEALLOCATE",
    "FETCH",
    "DECLARE",
    "CLOSE",
    "MOVE",
    "COPY",
    "INSERT",
    "UPDATE",
    "DELETE",
    "MERGE",
    "EXPLAIN",
    "TABLE",
    "VALUES",
    "IDENTIFY_SYSTEM",
    "START_REPLICATION",
    "TIMELINE_HISTORY",
    "EXECUTE",
];

/// What a statement is; `None` where it changes nothing but rows, the session or the transaction.
pub(super) fn classify(server: Server, tokens: &[&str], is_schema_item: bool) -> Option<&'static Kind> {
    let first = *tokens.first()?;
    let is_read_lock = first == "LOCK" && tokens.windows(3).any(|three| three == ["IN", "ACCESS", "SHARE"]);
    let is_temporary = first == "CREATE" && tokens.get(1).is_some_and(|second| second.starts_with("TEMP"));
    if (HARMLESS.contains(&first) && !is_of_an_extensions_catalog(tokens)) || is_read_lock || is_temporary {
        return None;
    }
    if first == "SELECT" {
        let is_named = |token: &str, name: &str| token == name || token.trim_matches('"').to_uppercase() == *name;
        let is_called = |name: &String| tokens.windows(2).any(|two| two[1] == "(" && is_named(two[0], name));
        return COMPILED.iter().find(|compiled| compiled.calls.as_ref().is_some_and(is_called)).map(|found| found.kind);
    }
    // What begins otherwise is no statement of a schema, though the decision runs it beside some.
    let is_ours = matches!(tokens, ["ALTER", "DATABASE", ..] | ["DO", ..] | ["INSERT" | "DELETE", ..])
        || matches!(tokens, ["ALTER", "TABLE", .., "SET", "GENERATED", "ALWAYS"]);
    if is_schema_item && !is_ours {
        return Some(&SCHEMA);
    }
    let fitting = |compiled: &&Compiled| {
        compiled.calls.is_none()
            && match compiled.kind.on {
                On::Both => true,
                On::Source => server == Server::Source,
                On::Target => server == Server::Target,
            }
            && fits(&compiled.words, tokens)
    };
    // The one that says the most.
    let exactness = |compiled: &&Compiled| compiled.words.iter().filter(|word| matches!(word, Word::Is(_))).count();
    Some(COMPILED.iter().filter(fitting).max_by_key(exactness).map_or(&UNPLANNED, |found| found.kind))
}

/// Whether it writes rows that are no rows of users, but say what an extension makes of their tables.
fn is_of_an_extensions_catalog(tokens: &[&str]) -> bool {
    matches!(tokens, ["INSERT", "INTO", schema, ".", ..] | ["DELETE", "FROM", schema, ".", ..] | ["UPDATE", schema, ".", ..]
        if schema.trim_matches('"').eq_ignore_ascii_case("_timescaledb_catalog"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(server: Server, text: &str) -> Option<&'static str> {
        let statements = split(text).unwrap();
        let tokens: Vec<&str> = statements[0].tokens.iter().map(|(_, token)| token.as_str()).collect();
        classify(server, &tokens, false).map(|kind| kind.name)
    }

    #[test]
    fn what_changes_a_server_is_told_from_what_does_not() {
        for (text, kind) in [
            ("SELECT 1", None),
            ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", None),
            ("COPY t FROM STDIN", None),
            ("LOCK TABLE ONLY \"a\".\"b\" IN ACCESS SHARE MODE", None),
            ("CREATE TEMPORARY TABLE IF NOT EXISTS x ON COMMIT DELETE ROWS AS SELECT 1 WITH NO DATA", None),
            ("SELECT pg_catalog.pg_drop_replication_slot($1)", Some("slot")),
            ("SELECT count(*) FROM (SELECT pg_catalog.pg_terminate_backend(pid) FROM x) y", Some("session")),
            ("CREATE PUBLICATION \"p\" FOR TABLE ONLY \"a\".\"b\" WITH (publish = 'insert')", Some("publication")),
            ("LOCK TABLE ONLY \"a\".\"b\", ONLY \"c\" IN SHARE ROW EXCLUSIVE MODE", Some("fence")),
            ("ALTER DATABASE \"d\" SET default_transaction_read_only = 'off'", Some("fence")),
            ("ALTER DATABASE \"d\" SET work_mem = '1GB'", Some("unplanned")),
            ("DROP TABLE orders", Some("unplanned")),
            ("DROP SCHEMA walferry CASCADE", Some("ledger")),
            ("DROP SCHEMA public CASCADE", Some("unplanned")),
            ("DO $decide$ BEGIN x; END $decide$", Some("decision")),
            ("DO $x$ BEGIN x; END $x$", Some("unplanned")),
            ("GRANT SELECT ON LARGE OBJECT 5 TO \"x\" WITH GRANT OPTION", Some("large object")),
            ("GRANT \"a\" TO CURRENT_USER", Some("role")),
            ("CREATE SCHEMA \"walferry_trial_7\"", Some("trial")),
            ("CREATE SCHEMA shop", Some("unplanned")),
            ("ALTER TABLE \"a\".\"b\" ALTER COLUMN \"c\" SET GENERATED ALWAYS", Some("decision")),
            ("SELECT \"public\".\"alter_job\"(j.id, scheduled => true) FROM walferry.timescaledb_job j", Some("job")),
            ("INSERT INTO \"_timescaledb_catalog\".\"bgw_job\" SELECT r.* FROM x r", Some("hypertable")),
            ("INSERT INTO walferry.timescaledb_job SELECT 1", None),
            ("DELETE FROM _timescaledb_catalog.bgw_job WHERE id >= 1000", Some("hypertable")),
            ("UPDATE _timescaledb_catalog.chunk SET status = 0", Some("unplanned")),
            ("SELECT _timescaledb_functions.drop_chunk('a'::regclass)", Some("chunk")),
            (
                "ALTER TABLE \"a\".\"b\" SET (timescaledb.compress, timescaledb.compress_segmentby = '')",
                Some("hypertable"),
            ),
            ("ALTER TABLE \"a\".\"b\" SET (fillfactor = 10)", Some("unplanned")),
        ] {
            assert_eq!(of(Server::Target, text), kind, "{text}");
        }
        // What is the target's own may not run on the source.
        assert_eq!(of(Server::Source, "CREATE ROLE x LOGIN"), Some("unplanned"));
        for text in ["ALTER DATABASE \"d\" SET timescaledb.a = 'on'", "ALTER SYSTEM RESET timescaledb.a"] {
            assert_eq!(
                (of(Server::Source, text), of(Server::Target, text)),
                (Some("setting"), Some("unplanned")),
                "{text}"
            );
        }
        assert_eq!(of(Server::Source, "CREATE EXTENSION pg_prewarm SCHEMA walferry"), Some("unplanned"));
    }

    #[test]
    fn every_template_fits_itself_and_only_what_is_asked_for_is_planned() {
        for compiled in COMPILED.iter() {
            assert!(!compiled.words.is_empty(), "{} cannot be read", compiled.kind.statement);
        }
        let plain = plan(&Options::default());
        let has = |lines: &[Line], text: &str| lines.iter().any(|line| line.statement.contains(text));
        assert!(!has(&plain, "EVENT TRIGGER") && !has(&plain, "CREATE ROLE") && has(&plain, "pg_create_logical"));
        assert!(!has(&plain, "add_compression_policy") && has(&plain, "_timescaledb_catalog"));
        let number = |text: &str| plain.iter().position(|line| line.statement.contains(text)).unwrap();
        assert!(number("SET timescaledb.") < number("CREATE_REPLICATION_SLOT"), "before the slot");
        assert!(
            number("pg_dump") < number("INTO <_timescaledb_catalog")
                && number("$decide$") > number("FROM <_timescaledb")
        );
        let all = Options { replicate_ddl: true, roles: true, no_reverse: true, ..Options::default() };
        let all = plan(&all);
        assert!(has(&all, "EVENT TRIGGER") && has(&all, "CREATE ROLE") && !has(&all, "pg_create_logical"));
        assert!(
            all.iter().all(|line| line.server != "both"
                || ["session", "replica identity", "publication", "slot"].contains(&line.kind))
        );
    }
}
