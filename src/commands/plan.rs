//! `walferry check --plan`.

use serde_json::json;

use super::{print, print_json};
use crate::cli;
use crate::error::Result;
use crate::record::plan::{self, Line, Options};

/// Prints what a migration with these options may run.
pub(super) fn print_plan(options: &cli::Check) -> Result<()> {
    let scope = options.filters.scope(Some(&options.place));
    let lines = plan::plan(&Options {
        replicate_ddl: options.replicate_ddl,
        replica_identity_full: options.replica_identity_full,
        roles: options.roles.roles,
        no_reverse: options.no_reverse,
        part: scope.is_part(),
        data_only: scope.data_only,
        map_schema: !scope.map_schemas.is_empty(),
        hypertables: !scope.hypertables.is_empty(),
        pause_source_jobs: options.timescale.pause_source_jobs,
    });
    if options.json {
        return print_json(&json!({ "version": 1, "statements": lines, "besides": BESIDES }));
    }
    let text: String = lines.iter().map(|line| shown(line, options.no_reverse)).collect();
    let on_the_source: Vec<String> =
        lines.iter().filter(|line| line.server != "target").map(|line| line.position.to_string()).collect();
    let with = if options.no_reverse { "" } else { ", the way back included (--no-reverse does without)" };
    print(&format!("{HEAD}\nOn the source{with}: {}.\n\n{text}\nBesides these: {BESIDES}\n", on_the_source.join(", ")))
}

/// How to read it.
const HEAD: &str = "Every statement that a migration with these options may run and that changes a server beyond its rows, in the order in which it comes to \
     them. <…> stands for names, numbers and lists, … for anything. Most run only where `when` holds. No server was asked for this.\n";

/// What is no line of it.
const BESIDES: &str = "reads (SELECT, COPY … TO, and all that pg_dump asks), settings of walferry's own sessions (SET), transactions (BEGIN, COMMIT), temporary tables of its own \
     sessions, locks of readers (LOCK … ACCESS SHARE), and on the target the rows: COPY … FROM, INSERT, UPDATE, DELETE of the tables that \
     are moved and of the ledger, schema walferry; on the way back likewise on the old primary. On this machine pg_dump and pg_restore are run, and \
     the commands that you give: --on-fence and its like, password commands. With --pgbouncer, its console is asked to PAUSE, RELOAD and RESUME.";

fn shown(line: &Line, no_reverse: bool) -> String {
    let server = match (line.server, line.without_way_back) {
        ("both", Some("source")) if !no_reverse => "on the source; for the way back on the target",
        ("both", Some(_)) if !no_reverse => "on the target; for the way back on the source",
        ("both", _) => "on either server",
        ("source", _) => "on the source",
        _ => "on the target",
    };
    format!(
        "{:>3}. {}\n       {server}; phase: {}\n       when: {}\n       taken back by: {}\n",
        line.position, line.statement, line.phase, line.condition, line.reverted_by
    )
}
