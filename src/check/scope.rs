//! What the filters leave out that somebody may miss.

use super::report::{Finding, Severity, Side, first_ten};
use crate::source::scope::{LeftOut, Selection};

/// A condition on a relation's OID: it is moved, or is an index or a type beside those that are.
pub(super) fn moved(selection: Option<&Selection>, oid: &str) -> String {
    let Some(selection) = selection else { return "true".to_owned() };
    let oids: Vec<String> = selection.relations.iter().map(u32::to_string).collect();
    let table = format!("coalesce((SELECT x.indrelid FROM pg_catalog.pg_index x WHERE x.indexrelid = {oid}), {oid})");
    format!("{table} IN (SELECT unnest('{{{}}}'::oid[]))", oids.join(","))
}

/// What is wanted and cannot come, by name, with what it would need.
pub(super) fn findings(selection: Option<&Selection>) -> Vec<Finding> {
    let Some(selection) = selection else { return Vec::new() };
    let mut findings = Vec::new();
    if selection.relations.is_empty() {
        let message = "The filters leave no table: nothing would be moved.";
        findings.push(Finding::new(Severity::Blocker, Side::Source, "scope-empty", "filters", message));
    }
    let named = |left: &[LeftOut]| -> Vec<String> {
        left.iter().map(|left| format!("{} (needs {})", left.object, left.needs)).collect()
    };
    if !selection.impossible.is_empty() {
        let message = "It inherits from a table that is left out, and cannot be made without it. Include that one too, or exclude this one.";
        let names = first_ten(&named(&selection.impossible));
        findings.push(Finding::new(Severity::Blocker, Side::Source, "scope-inheritance", names, message));
    }
    if !selection.left_out.is_empty() {
        let message = "It needs a table that is left out, and so is not moved either. Bodies of functions are texts: what they read is \
                       not looked at.";
        let names = first_ten(&named(&selection.left_out));
        findings.push(Finding::new(Severity::Warning, Side::Source, "scope-left-out", names, message));
    }
    findings
}
