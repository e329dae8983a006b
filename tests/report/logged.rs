//! What a server says that was run on it: its log with `log_statement=all`, one JSON object per line, read by nothing of ours.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// A directory that a server may log into.
pub struct LogDirectory(tempfile::TempDir);

impl LogDirectory {
    pub fn new() -> LogDirectory {
        let directory = tempfile::tempdir().unwrap();
        let anybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path(), anybody).unwrap();
        LogDirectory(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Settings of a server that logs here.
    pub fn settings(&self) -> [(&'static str, String); 6] {
        [
            ("logging_collector", "on".into()),
            ("log_directory", self.path().display().to_string()),
            ("log_destination", "jsonlog".into()),
            ("log_rotation_size", "0".into()),
            ("log_statement", "all".into()),
            ("log_replication_commands", "on".into()),
        ]
    }

    /// Every statement of sessions that call themselves `walferry…`: each message of the protocol, as it was sent.
    pub fn messages(&self) -> Vec<String> {
        let files: Vec<PathBuf> = std::fs::read_dir(self.path()).unwrap().map(|file| file.unwrap().path()).collect();
        let text: String = files
            .iter()
            .filter(|file| file.extension().is_some_and(|extension| extension == "json"))
            .map(|file| std::fs::read_to_string(file).unwrap())
            .collect();
        text.lines().filter_map(|line| message(&serde_json::from_str(line).ok()?)).collect()
    }
}

fn message(line: &Value) -> Option<String> {
    let ours = line["application_name"].as_str().is_some_and(|name| name.starts_with("walferry"));
    let text = line["message"].as_str()?;
    if !ours || line["error_severity"] != "LOG" {
        return None;
    }
    if let Some(statement) =
        text.strip_prefix("statement: ").or_else(|| text.strip_prefix("received replication command: "))
    {
        return Some(statement.to_owned());
    }
    // `execute <unnamed>: …`, `execute s7/portal: …`
    let (_, statement) = text.strip_prefix("execute ")?.split_once(": ")?;
    Some(statement.to_owned())
}

/// Splits at semicolons that are in no quotes.
pub fn statements(message: &str) -> Vec<String> {
    let (mut all, mut now, mut rest) = (Vec::new(), String::new(), message);
    while let Some(first) = rest.chars().next() {
        let length = if first == '\'' || first == '"' {
            // A doubled quote ends one string and begins another: the same for this purpose.
            rest[1..].find(first).map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("/*") {
            rest = &rest[rest.find("*/").map_or(rest.len(), |end| end + 2)..];
            continue;
        } else if rest.starts_with("--") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
            continue;
        } else if let Some(tag) = dollar_tag(rest) {
            rest[tag.len()..].find(tag).map_or(rest.len(), |end| end + 2 * tag.len())
        } else {
            first.len_utf8()
        };
        if first == ';' {
            all.push(std::mem::take(&mut now));
        } else {
            now.push_str(&rest[..length]);
        }
        rest = &rest[length..];
    }
    all.push(now);
    all.into_iter().map(|statement| statement.trim().to_owned()).filter(|statement| !statement.is_empty()).collect()
}

fn dollar_tag(rest: &str) -> Option<&str> {
    let end = rest.strip_prefix('$')?.find('$')?;
    let tag = &rest[1..end + 1];
    (tag.chars().all(|letter| letter.is_alphanumeric() || letter == '_')
        && !tag.starts_with(|letter: char| letter.is_ascii_digit()))
    .then(|| &rest[..end + 2])
}

/// Whether a statement is a read, a setting of its own session, a transaction's beginning or end, or a row's.
pub fn is_of_rows_or_the_session(statement: &str) -> bool {
    let words: Vec<String> = statement.split_whitespace().take(3).map(str::to_lowercase).collect();
    let first = words.first().map_or("", String::as_str);
    if first == "select" {
        let squeezed = squeeze(statement);
        let changing = [
            "pg_terminate_backend(",
            "pg_cancel_backend(",
            "setval(",
            "pg_drop_replication_slot(",
            "pg_create_logical_replication_slot(",
            "pg_replication_slot_advance(",
            "pg_logical_emit_message(",
            "lo_create(",
            "lo_put(",
            "lo_unlink(",
            "lo_truncate64(",
            "pg_prewarm(",
            "nextval(",
            "pg_reload_conf(",
            "lo_import(",
            "pg_switch_wal(",
            "pg_create_restore_point(",
            "pg_rotate_logfile(",
            "alter_job(",
            "add_job(",
            "delete_job(",
            "alter_job_set_hypertable_id(",
            "create_hypertable(",
            "add_dimension(",
            "set_integer_now_func(",
            "_policy(",
            "create_chunk(",
            "drop_chunk(",
            "compress_chunk(",
            "timescaledb_pre_restore(",
            "timescaledb_post_restore(",
        ];
        return !changing.iter().any(|call| squeezed.contains(call));
    }
    let of_a_catalog = ["insertinto_timescaledb_", "deletefrom_timescaledb_", "update_timescaledb_"];
    if of_a_catalog.iter().any(|begins| squeeze(statement).starts_with(begins)) {
        // No rows of users, but what an extension makes of their tables.
        return statement.contains("_hyper_");
    }
    let plain = [
        "begin",
        "commit",
        "rollback",
        "savepoint",
        "release",
        "set",
        "reset",
        "show",
        "with",
        "copy",
        "insert",
        "update",
        "delete",
        "merge",
        "deallocate",
        "identify_system",
        "start_replication",
        "start",
        "explain",
        "declare",
        "fetch",
        "close",
        "discard",
    ];
    let is_temporary = first == "create" && words.get(1).is_some_and(|second| second.starts_with("temp"));
    let reads = first == "lock" && squeeze(statement).ends_with("inaccesssharemode");
    // pg_dump's own.
    let prepares = first == "prepare" && {
        let squeezed = squeeze(statement);
        squeezed.contains("asselect") || squeezed.contains("aswith")
    };
    plain.contains(&first) || is_temporary || reads || prepares || first == "execute"
}

/// Without white space and quotes of names, in lower case.
pub fn squeeze(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_whitespace() && *letter != '"').collect::<String>().to_lowercase()
}

/// Whether a statement is what a template of the plan says.
pub fn fits(template: &str, statement: &str) -> bool {
    let mut pieces = vec![String::new()];
    let mut open = false;
    for letter in template.chars() {
        match letter {
            '<' | '…' => {
                open = letter == '<';
                pieces.push(String::new());
            }
            '>' => open = false,
            _ if open => {}
            _ => pieces.last_mut().unwrap().push(letter),
        }
    }
    let pieces: Vec<String> = pieces.iter().map(|piece| squeeze(piece).replace("pg_catalog.", "")).collect();
    let statement = squeeze(statement).replace("pg_catalog.", "");
    // A call can be anywhere in a query.
    if let Some(call) = pieces[0].strip_prefix("select") {
        return statement.contains(&call[..=call.find('(').unwrap()]);
    }
    let Some(mut rest) = statement.strip_prefix(pieces[0].as_str()) else { return false };
    for piece in &pieces[1..] {
        let Some(at) = rest.find(piece.as_str()) else { return false };
        rest = &rest[at + piece.len()..];
    }
    pieces.len() > 1 && pieces.last().unwrap().is_empty() || statement.ends_with(pieces.last().unwrap().as_str())
}

#[test]
fn the_judge_can_say_no() {
    assert!(fits("CREATE PUBLICATION <name> …", "CREATE PUBLICATION \"a\" FOR TABLE b"));
    assert!(!fits("CREATE PUBLICATION <name> …", "DROP PUBLICATION a"));
    assert!(!fits("DROP SCHEMA walferry CASCADE", "DROP SCHEMA walferry_other CASCADE"));
    assert!(fits("SELECT pg_drop_replication_slot( <slot> )", "select x(pg_catalog.pg_drop_replication_slot($1))"));
    assert!(
        !is_of_rows_or_the_session("ALTER SYSTEM SET a = 1") && !is_of_rows_or_the_session("SELECT setval('a', 1)")
    );
    assert_eq!(statements("a; 'b;c' ; $x$ ; $x$;/* ; */ d"), ["a", "'b;c'", "$x$ ; $x$", "d"]);
}
