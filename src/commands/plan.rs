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
    let text: String = lines.iter().map(shown).collect();
    print(&format!("{text}\nBesides these: {BESIDES}\n"))
}

/// What is no line of it.
const BESIDES: &str = "reads (SELECT, COPY … TO, and all that pg_dump asks), settings of walferry's own sessions (SET), transactions (BEGIN, COMMIT), temporary tables of its own \
     sessions, locks of readers (LOCK … ACCESS SHARE), and on the target the rows: COPY … FROM, INSERT, UPDATE, DELETE of the tables that \
     are moved and of the ledger, schema walferry. A server marked `both` is the other one on the way back.";

fn shown(line: &Line) -> String {
    format!(
        "{:>3}. {:<7} {}\n       {}\n       when: {}\n       taken back by: {}\n",
        line.position, line.server, line.statement, line.phase, line.condition, line.reverted_by
    )
}
