//! What `pg_dump` says of a database, as a judge that shares no code with walferry.

use std::collections::BTreeSet;

use crate::support::programs;

/// The items of a schema as `pg_dump` writes them, owners and privileges included; each with its header's `-- Name: …` line.
pub fn schema(url: &str) -> BTreeSet<String> {
    let output = std::process::Command::new(programs().bin("pg_dump"))
        .args(["--schema-only", "--exclude-schema=walferry", "--dbname", url])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let end = text.rfind("\n--\n-- PostgreSQL database dump complete").unwrap();
    text[..end].split("\n--\n-- Name: ").skip(1).map(|item| item.trim_end().to_owned()).collect()
}

/// The items that only one side has, each with `source: ` or `target: ` before it.
pub fn difference(source: &str, target: &str) -> Vec<String> {
    let (source, target) = (schema(source), schema(target));
    assert!(!source.is_empty() && !target.is_empty());
    let only = |here: &BTreeSet<String>, there: &BTreeSet<String>, name: &str| -> Vec<String> {
        here.difference(there).map(|item| format!("{name}: {item}")).collect()
    };
    [only(&source, &target, "source"), only(&target, &source, "target")].concat()
}
