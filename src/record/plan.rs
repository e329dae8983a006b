//! Every statement that changes a server, beyond its rows: the one list that `check --plan` prints and that each statement of each
//! session is held against before it is sent ([`super::wire`]). So what the list lacks does not stay unknown: it is recorded as
//! [`UNPLANNED`], and the tests that migrate look for that.
//!
//! Templates: `<…>` stands for a name, a number or a list, `…` for anything or nothing; words count in any case. A call of a
//! function counts wherever in a query it stands.

use std::sync::LazyLock;

use serde::Serialize;

use super::Server;
use crate::apply::ddl::statement::split;

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

use On::{Both, Source, Target};
use When::{Always, MapSchema, Part, ReplicaIdentityFull, ReplicateDdl, Roles, WayBack, Whole, WithSchema};

const ITSELF: &str = "nothing: it changes nothing that stays";
const CLEAN: &str = "walferry clean";
const END: &str = "the end of its transaction";
const DECISION: &str = "nothing: the target is the primary now (walferry switchback leads back)";

const PREPARING: &str = "preparing";
const COPYING: &str = "copying";
const FOLLOWING: &str = "following";
const CUTOVER: &str = "cutting over";
const CLEANING: &str = "clean";

/// A statement that fits none of the list.
pub static UNPLANNED: Kind = redacted(durable(kind(
    "unplanned",
    Both,
    ("any", Always, "a mistake in walferry's plan: please report it"),
    "",
    "",
)));

/// A statement out of `pg_dump`'s output; [`super::wire`] tells it by the settings that stand before it.
pub static SCHEMA: Kind = redacted(kind(
    "schema item",
    Target,
    (
        "preparing, copying (indexes and keys), catching up (the rest), cutting over (what waits for it)",
        WithSchema,
        "once for each object of the source's schema, exactly as pg_dump writes it",
    ),
    "… (a statement of pg_dump --schema-only)",
    "dropping the target database",
));

/// A statement of the source's applications that the target repeats.
pub static REPLICATED: Kind = redacted(kind(
    "replicated DDL",
    Target,
    ("following", ReplicateDdl, "for each DDL statement of the source, in its place among the rows"),
    "… (the statement of the source)",
    "nothing: it is the source's own",
));

/// In the order in which a migration comes to them.
pub static KINDS: &[Kind] = &[
    // The trial of `check`.
    kind(
        "trial",
        Target,
        ("check", Always, "unless --estimate-seconds 0; rolled back"),
        "CREATE SCHEMA <walferry_trial>",
        END,
    ),
    kind(
        "trial",
        Target,
        ("check", Always, "unless --estimate-seconds 0; rolled back"),
        "CREATE TABLE <walferry_trial>.<table> ( … )",
        END,
    ),
    kind(
        "trial",
        Target,
        ("check", Always, "unless --estimate-seconds 0; rolled back"),
        "CREATE … INDEX <name> ON <walferry_trial>.<table> ( … )",
        END,
    ),
    // The ledger.
    durable(kind(
        "ledger",
        Both,
        (PREPARING, Always, "on the target; on the source when a way back is drafted"),
        "CREATE SCHEMA walferry",
        CLEAN,
    )),
    kind("ledger", Both, (PREPARING, Always, "beside it"), "COMMENT ON SCHEMA walferry IS <text>", CLEAN),
    kind(
        "ledger",
        Both,
        ("any", Always, "once for each table of the ledger"),
        "CREATE TABLE … walferry.<table> ( … ) …",
        CLEAN,
    ),
    kind("ledger", Both, (PREPARING, Always, "a ledger of an older walferry"), "ALTER TABLE walferry.<table> …", CLEAN),
    kind(
        "ledger",
        Both,
        ("any", Always, "what two sessions must not do at once"),
        "LOCK TABLE walferry.<tables> IN <mode> MODE",
        END,
    ),
    kind(
        "ledger",
        Target,
        ("resync", Always, "what was copied is not known any more"),
        "DROP TABLE IF EXISTS walferry.<tables>",
        ITSELF,
    ),
    kind(
        "ledger",
        Both,
        ("any", Always, "a preparation that was cut off, a draft of the way back"),
        "DROP SCHEMA IF EXISTS walferry CASCADE",
        ITSELF,
    ),
    // Roles.
    durable(redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "for each role that the target lacks"),
        "CREATE ROLE <name> …",
        "DROP ROLE, by hand",
    ))),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its attributes and settings"),
        "ALTER ROLE <name> …",
        "DROP ROLE, by hand",
    )),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its comment"),
        "COMMENT ON ROLE <name> IS <text>",
        "DROP ROLE, by hand",
    )),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its password, put together in the server"),
        "DO $$ BEGIN EXECUTE pg_catalog.format('ALTER ROLE %I PASSWORD %L', …); END $$",
        "DROP ROLE, by hand",
    )),
    redacted(kind(
        "role",
        Target,
        (PREPARING, Roles, "its memberships"),
        "GRANT <role> TO <member>",
        "REVOKE, by hand",
    )),
    // Publications and slot.
    durable(kind(
        "replica identity",
        Both,
        (
            PREPARING,
            ReplicaIdentityFull,
            "for each table whose updates and deletes would name no row; a moment of ACCESS EXCLUSIVE; clean puts back what was, on both servers",
        ),
        "ALTER TABLE ONLY <table> REPLICA IDENTITY <identity>",
        CLEAN,
    )),
    kind(
        "publication",
        Both,
        (PREPARING, Always, "what an earlier attempt left; on the target for the way back"),
        "DROP PUBLICATION IF EXISTS <names>",
        ITSELF,
    ),
    durable(kind(
        "publication",
        Both,
        (
            PREPARING,
            Always,
            "one for tables with a replica identity, one for those without; on the target for the way back",
        ),
        "CREATE PUBLICATION <name> …",
        CLEAN,
    )),
    durable(kind(
        "event trigger",
        Source,
        (
            PREPARING,
            ReplicateDdl,
            "their schema; then, within the applications' own DDL, the triggers run ALTER PUBLICATION … ADD or DROP TABLE",
        ),
        "CREATE SCHEMA <walferry_ddl>",
        CLEAN,
    )),
    kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "their schema"),
        "GRANT USAGE ON SCHEMA <walferry_ddl> TO PUBLIC",
        CLEAN,
    ),
    redacted(kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "their functions"),
        "CREATE FUNCTION <walferry_ddl>.<name> ( … ) …",
        CLEAN,
    )),
    redacted(kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "their functions"),
        "REVOKE … ON FUNCTION <walferry_ddl>.<name> ( … ) FROM <role>",
        CLEAN,
    )),
    durable(kind(
        "event trigger",
        Source,
        (PREPARING, ReplicateDdl, "three of them"),
        "CREATE EVENT TRIGGER <name> …",
        CLEAN,
    )),
    durable(kind(
        "slot",
        Source,
        (PREPARING, Always, "waits for every open transaction of the cluster, once"),
        "CREATE_REPLICATION_SLOT <slot> LOGICAL pgoutput …",
        CLEAN,
    )),
    // The schema stands here in time: SCHEMA.
    kind(
        "identity column",
        Both,
        (
            PREPARING,
            Always,
            "for each GENERATED ALWAYS identity, so that rows keep their values; on the source for the way back",
        ),
        "ALTER TABLE <table> ALTER COLUMN <column> SET GENERATED BY DEFAULT",
        "the cutover's decision; clean",
    ),
    kind(
        "trigger",
        Both,
        (
            PREPARING,
            Always,
            "for each trigger or rule that would fire for what is applied; back to what it was at the decision",
        ),
        "ALTER TABLE ONLY <table> ENABLE …",
        "the cutover's decision; clean",
    ),
    // Copy.
    kind(
        "copy",
        Target,
        (COPYING, Always, "a table that is copied whole, so that its rows arrive frozen"),
        "LOCK TABLE ONLY <table> IN ACCESS EXCLUSIVE MODE NOWAIT",
        END,
    ),
    kind(
        "copy",
        Both,
        (
            COPYING,
            Always,
            "a table that is copied whole, or once more from its beginning; unlogged tables behind the fence; a TRUNCATE of the source",
        ),
        "TRUNCATE <tables>",
        "nothing: its rows come from the source",
    ),
    kind(
        "maintenance",
        Both,
        (
            COPYING,
            Always,
            "each table once its rows are there, and when many have changed; on the old primary while the way back is open",
        ),
        "ANALYZE <table>",
        ITSELF,
    ),
    kind(
        "maintenance",
        Both,
        (FOLLOWING, Always, "each table whose pages are not known to be visible"),
        "VACUUM ( <options> ) <table>",
        ITSELF,
    ),
    kind(
        "materialized view",
        Both,
        (FOLLOWING, Always, "when the source's was refreshed"),
        "REFRESH MATERIALIZED VIEW <name> …",
        ITSELF,
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "where the source has any: created, written, removed"),
        "SELECT lo_create( <oid> )",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its content"),
        "SELECT lo_put( <oid>, <offset>, <bytes> )",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its content"),
        "SELECT lo_truncate64( <descriptor>, 0 )",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "that the source has no more"),
        "SELECT lo_unlink( <oid> )",
        "nothing: they are the source's",
    ),
    redacted(kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its comment"),
        "COMMENT ON LARGE OBJECT <oid> IS <text>",
        "nothing: they are the source's",
    )),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its owner"),
        "ALTER LARGE OBJECT <oid> OWNER TO <role>",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its privileges"),
        "GRANT <privilege> ON LARGE OBJECT <oid> TO <role>",
        "nothing: they are the source's",
    ),
    kind(
        "large object",
        Both,
        (FOLLOWING, Always, "its privileges"),
        "REVOKE ALL ON LARGE OBJECT <oid> FROM <role>",
        "nothing: they are the source's",
    ),
    // Following.
    kind(
        "marker",
        Both,
        (FOLLOWING, Always, "a transactional message in the WAL: the heartbeat, and the proofs of the cutover"),
        "SELECT pg_logical_emit_message( true, <prefix>, <text> )",
        ITSELF,
    ),
    durable(kind(
        "slot",
        Both,
        (FOLLOWING, WayBack, "the slot of the way back"),
        "SELECT pg_create_logical_replication_slot( <slot>, 'pgoutput' )",
        "walferry finish or clean",
    )),
    kind(
        "slot",
        Both,
        (FOLLOWING, WayBack, "it is moved on every few seconds"),
        "SELECT pg_replication_slot_advance( <slot>, <lsn> )",
        ITSELF,
    ),
    kind(
        "session",
        Both,
        (
            "any",
            Always,
            "sessions of a dead walferry or of ours that are in the way; behind the fence all others of the database",
        ),
        "SELECT pg_terminate_backend( <pid> )",
        ITSELF,
    ),
    kind(
        "session",
        Both,
        ("any", Always, "a vacuum of ours that somebody waits for"),
        "SELECT pg_cancel_backend( <pid> )",
        ITSELF,
    ),
    // Cutover.
    kind(
        "prewarm",
        Target,
        (CUTOVER, Always, "with --prewarm, where it is not there"),
        "CREATE EXTENSION pg_prewarm SCHEMA walferry",
        CLEAN,
    ),
    kind("prewarm", Target, (CUTOVER, Always, "with --prewarm"), "SELECT pg_prewarm( <table> )", ITSELF),
    kind(
        "fence",
        Both,
        (CUTOVER, Always, "a table that is being vacuumed: asked to make way"),
        "LOCK TABLE ONLY <table> IN SHARE UPDATE EXCLUSIVE MODE",
        END,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Always, "with --fence lock or tables: writers wait, readers go on"),
        "LOCK TABLE <tables> IN SHARE ROW EXCLUSIVE MODE",
        END,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Part, "with --fence tables: holds nextval back and changes nothing"),
        "ALTER SEQUENCE <sequence> CACHE <as it is>",
        END,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Whole, "the database becomes read-only by default"),
        "ALTER DATABASE <database> SET default_transaction_read_only = <on, or as it was>",
        "an abort at once; after the decision: walferry clean or switchback",
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Whole, "as it was before: at an abort, a switchback, or by clean"),
        "ALTER DATABASE <database> RESET default_transaction_read_only",
        ITSELF,
    ),
    kind(
        "fence",
        Both,
        (CUTOVER, Whole, "with --fence connections"),
        "ALTER DATABASE <database> WITH ALLOW_CONNECTIONS <true or false>",
        "the same with true, at an abort and after the decision",
    ),
    kind(
        "guard",
        Both,
        (CUTOVER, Part, "with --fence tables: their home"),
        "CREATE SCHEMA IF NOT EXISTS walferry",
        CLEAN,
    ),
    kind(
        "guard",
        Both,
        (CUTOVER, Part, "what refuses writes to tables that have moved"),
        "CREATE OR REPLACE FUNCTION walferry.moved ( ) …",
        "walferry switchback or clean",
    ),
    kind("guard", Both, (CUTOVER, Part, "its triggers on each table"), "DO $guard$ … CREATE TRIGGER … $guard$", CLEAN),
    kind(
        "guard",
        Both,
        (CUTOVER, Part, "lets writes through again, at an abort or a switchback"),
        "DO $open$ … $open$",
        ITSELF,
    ),
    kind(
        "sequence",
        Both,
        (CUTOVER, Always, "each sequence, to where the source's is"),
        "SELECT setval( <sequence>, <value>, <called> )",
        DECISION,
    ),
    kind(
        "decision",
        Both,
        (CUTOVER, WayBack, "the way back begins here: rows of its ledger"),
        "DO $begin$ … $begin$",
        CLEAN,
    ),
    kind(
        "decision",
        Both,
        (CUTOVER, Always, "proves that the fence is up; changes nothing"),
        "DO $decide$ … $decide$",
        ITSELF,
    ),
    kind(
        "decision",
        Both,
        (CUTOVER, Always, "identity columns as they were on the source"),
        "ALTER TABLE <table> ALTER COLUMN <column> SET GENERATED ALWAYS",
        DECISION,
    ),
    kind(
        "decision",
        Target,
        (
            CUTOVER,
            Always,
            "foreign keys that had to wait (our role may not set session_replication_role), validated afterwards",
        ),
        "ALTER TABLE … ADD CONSTRAINT <name> …",
        DECISION,
    ),
    kind("decision", Target, ("cut over", Always, "the same"), "ALTER TABLE … VALIDATE CONSTRAINT <name>", DECISION),
    kind("decision", Target, (CUTOVER, MapSchema, "--map-schema"), "ALTER SCHEMA <old> RENAME TO <new>", DECISION),
    // Clean.
    kind(
        "slot",
        Both,
        (CLEANING, Always, "also when a slot is made anew or given up, and by finish"),
        "SELECT pg_drop_replication_slot( <slot> )",
        ITSELF,
    ),
    kind(
        "event trigger",
        Source,
        (CLEANING, ReplicateDdl, "and after the cutover"),
        "DROP EVENT TRIGGER IF EXISTS <name>",
        ITSELF,
    ),
    kind(
        "event trigger",
        Source,
        (CLEANING, ReplicateDdl, "and after the cutover"),
        "DROP SCHEMA IF EXISTS <walferry_ddl> CASCADE",
        ITSELF,
    ),
    kind("guard", Both, (CLEANING, Part, "where there is a guard"), "DROP FUNCTION walferry.moved ( ) CASCADE", ITSELF),
    kind("guard", Both, (CLEANING, Part, "where nothing else is in it"), "DO $clean$ … $clean$", ITSELF),
    kind(
        "ledger",
        Both,
        (CLEANING, Always, "the ledger, with all that is recorded in it"),
        "DROP SCHEMA walferry CASCADE",
        ITSELF,
    ),
];

/// One line of `check --plan`.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Its number.
    pub position: usize,
    /// `source`, `target` or `both` (the other one on the way back).
    pub server: &'static str,
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
    let (before, after) =
        KINDS.split_at(KINDS.iter().position(|kind| kind.name == "identity column").unwrap_or(KINDS.len()));
    let all = before.iter().chain([&SCHEMA]).chain(after).chain([&REPLICATED]);
    let wanted = all.filter(|kind| kind.when.holds(options));
    wanted
        .enumerate()
        .map(|(at, kind)| Line {
            position: at + 1,
            server: match kind.on {
                Source => "source",
                Target => "target",
                Both if options.no_reverse => on_one_way(kind),
                Both => "both",
            },
            phase: kind.phase,
            kind: kind.name,
            statement: kind.statement,
            condition: kind.condition,
            reverted_by: kind.reverted_by,
        })
        .collect()
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

static COMPILED: LazyLock<Vec<Compiled>> = LazyLock::new(|| KINDS.iter().map(compile).collect());

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
    if HARMLESS.contains(&first) || is_read_lock || is_temporary {
        return None;
    }
    if first == "SELECT" {
        let is_called = |name: &String| tokens.windows(2).any(|two| two[0] == *name && two[1] == "(");
        return COMPILED.iter().find(|compiled| compiled.calls.as_ref().is_some_and(is_called)).map(|found| found.kind);
    }
    // What begins otherwise is no statement of a schema, though the decision runs it beside some.
    let is_ours = matches!(tokens, ["ALTER", "DATABASE", ..] | ["DO", ..])
        || matches!(tokens, ["ALTER", "TABLE", .., "SET", "GENERATED", "ALWAYS"]);
    if is_schema_item && !is_ours {
        return Some(&SCHEMA);
    }
    let fitting = |compiled: &&Compiled| {
        compiled.calls.is_none()
            && match compiled.kind.on {
                Both => true,
                Source => server == Server::Source,
                Target => server == Server::Target,
            }
            && fits(&compiled.words, tokens)
    };
    // The one that says the most.
    let exactness = |compiled: &&Compiled| compiled.words.iter().filter(|word| matches!(word, Word::Is(_))).count();
    Some(COMPILED.iter().filter(fitting).max_by_key(exactness).map_or(&UNPLANNED, |found| found.kind))
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
        ] {
            assert_eq!(of(Server::Target, text), kind, "{text}");
        }
        // What is the target's own may not run on the source.
        assert_eq!(of(Server::Source, "CREATE ROLE x LOGIN"), Some("unplanned"));
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
        let all = Options { replicate_ddl: true, roles: true, no_reverse: true, ..Options::default() };
        let all = plan(&all);
        assert!(has(&all, "EVENT TRIGGER") && has(&all, "CREATE ROLE") && !has(&all, "pg_create_logical"));
        assert!(
            all.iter().all(|line| line.server != "both"
                || ["session", "replica identity", "publication", "slot"].contains(&line.kind))
        );
    }
}
