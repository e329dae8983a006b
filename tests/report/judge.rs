//! What `check --plan` and the record are held against: what the servers themselves logged. TimescaleDB's tests judge by it too.

use std::path::Path;

use serde_json::Value;

use crate::logged::{LogDirectory, fits, is_of_rows_or_the_session, statements};
use crate::support::{Migration, Servers};

/// Two servers that log every statement.
pub async fn servers(source: &LogDirectory, target: &LogDirectory, both: &[(&str, &str)]) -> Servers {
    let (source, target) = (source.settings(), target.settings());
    let borrowed = |settings: &'static [(&'static str, String)]| -> Vec<(&str, &str)> {
        settings.iter().map(|(name, value)| (*name, value.as_str())).chain(both.iter().copied()).collect()
    };
    let (source, target) = (borrowed(Box::leak(Box::new(source))), borrowed(Box::leak(Box::new(target))));
    Servers::with(&source, &target).await
}

/// The record of a state directory.
pub fn record(directory: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(directory.join("record.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn recorded(record: &[Value], server: &str) -> Vec<String> {
    let of = |line: &&Value| line["what"] == "statement" && line["server"] == server;
    record.iter().filter(of).map(|line| line["statement"].as_str().unwrap().to_owned()).collect()
}

pub async fn plan(migration: &Migration, options: &[&str]) -> Vec<Value> {
    let plan = migration.with_servers("check", &[&["--plan", "--json"], options].concat()).await;
    assert_eq!(plan.code, Some(0), "{}", plan.stderr);
    plan.json()["statements"].as_array().unwrap().clone()
}

/// Every statement in a server's log that is no read and no row fits a line of the plan for this server.
pub fn assert_planned(log: &LogDirectory, server: &str, plan: &[Value], replicated: &[&str]) -> Vec<String> {
    let mut changes = Vec::new();
    for message in log.messages() {
        let is_schema = message.contains("SET LOCAL check_function_bodies = false");
        let is_replicated = message.starts_with("/* replicated DDL */ ");
        for statement in statements(&message) {
            if is_of_rows_or_the_session(&statement) {
                continue;
            }
            let line = plan.iter().find(|line| {
                let template = line["statement"].as_str().unwrap();
                let here = line["server"] == server || line["server"] == "both";
                let kind = match line["kind"].as_str().unwrap() {
                    "schema item" => is_schema,
                    "replicated DDL" => is_replicated && replicated.contains(&statement.as_str()),
                    _ => fits(template, &statement),
                };
                here && kind
            });
            assert!(line.is_some(), "not in the plan for the {server}: {statement}\n(of: {message})");
            changes.push(statement);
        }
    }
    assert!(changes.len() > 3, "the {server}'s log has {changes:?}");
    changes
}

/// Nothing is in the record that the plan did not know, and the statements of each kind that matters are there.
pub fn assert_complete(record: &[Value], changes: &[String], server: &str) {
    let unplanned: Vec<&Value> = record.iter().filter(|line| line["kind"] == "unplanned").collect();
    assert!(unplanned.is_empty(), "{unplanned:#?}");
    let recorded = recorded(record, server).join("\n").to_lowercase();
    let counted: u64 =
        record.iter().filter(|line| line["what"] == "more").map(|line| line["count"].as_u64().unwrap()).sum();
    for change in changes.iter().filter(|change| !change.starts_with("SELECT")) {
        let words: Vec<&str> = change.split_whitespace().take(2).collect();
        let begins = words.join(" ").to_lowercase();
        assert!(recorded.contains(&begins) || counted > 0, "{server}: {change} is not in\n{recorded}");
    }
}
