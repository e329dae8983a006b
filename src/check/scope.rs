//! What the filters leave out that somebody may miss.

use std::collections::BTreeSet;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::report::{Finding, Severity, Side, first_ten};
use crate::error::{Context, Result};
use crate::source::scope::{LeftOut, Scope, Selection};
use crate::target::role::ApplyRole;

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
    if !selection.stays.is_empty() {
        let message = "It stays, and refers to a table that moves: after the cutover its rows meet that table as it was, and the way back \
                       writes there without looking at it.";
        let names = first_ten(&named(&selection.stays));
        findings.push(Finding::new(Severity::Warning, Side::Source, "scope-foreign-key-stays", names, message));
    }
    if !selection.left_out.is_empty() {
        let message = "It needs a table that is left out, and so is not moved either. Bodies of functions are texts: what they read is \
                       not looked at.";
        let names = first_ten(&named(&selection.left_out));
        findings.push(Finding::new(Severity::Warning, Side::Source, "scope-left-out", names, message));
    }
    findings
}

/// Whether schemas can get other names, and which texts would go on with the old ones.
///
/// # Errors
/// Whatever the servers say.
pub(super) async fn mapped(source: &Client, target: &Client, scope: &Scope, resuming: bool) -> Result<Vec<Finding>> {
    if scope.map_schemas.is_empty() {
        return Ok(Vec::new());
    }
    const SCHEMAS: &str = "SELECT nspname::text FROM pg_catalog.pg_namespace";
    let read = |rows: Vec<tokio_postgres::Row>| rows.iter().map(|row| row.get(0)).collect::<BTreeSet<String>>();
    let doing = || "reading the schemas".to_owned();
    let here = read(source.query_typed(SCHEMAS, &[]).await.context(doing)?);
    let there = read(target.query_typed(SCHEMAS, &[]).await.context(doing)?);
    let mut findings = Vec::new();
    if ApplyRole::allowed(target).await? == ApplyRole::Origin {
        let message = "The role may not set session_replication_role on the target, so foreign keys are made at the cutover and validated \
                       after it, by the names that schemas have until then.";
        let finding = Finding::new(Severity::Blocker, Side::Target, "map-schema-role", "--map-schema", message);
        findings.push(finding.fix(
            "GRANT SET ON PARAMETER session_replication_role TO our role;  -- from PostgreSQL 15 on; or rename the schema after the cutover",
        ));
    }
    let (mut olds, mut news) = (BTreeSet::new(), BTreeSet::new());
    for (old, new) in &scope.map_schemas {
        let why = if !here.contains(old) {
            "The source has no such schema."
        } else if !olds.insert(old) || !news.insert(new) {
            "Each schema can have one other name, and each name one schema."
        } else if here.contains(new) || there.contains(new) && !resuming {
            "There is a schema of the other name already."
        } else if new.starts_with("pg_") || new == "walferry" || old == "walferry" || old.starts_with("pg_") {
            "These names are the server's own, or walferry's."
        } else {
            continue;
        };
        findings.push(Finding::new(Severity::Blocker, Side::Source, "map-schema", format!("{old}={new}"), why));
    }
    let olds: Vec<&str> = scope.map_schemas.iter().map(|(old, _)| old.as_str()).collect();
    let rows = source
        .query_typed(
            "SELECT pg_catalog.format('function %I.%I(%s)', n.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)) \
             FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace \
             WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_proc'::regclass \
                               AND d.objid = p.oid AND d.deptype = 'e') \
               AND EXISTS (SELECT FROM unnest($1) old \
                           WHERE strpos(lower(concat_ws(' ', p.prosrc, p.proconfig::text)), lower(old)) > 0) \
             UNION ALL \
             SELECT concat('setting of ', concat_ws(' in ', 'role ' || r.rolname, 'database ' || d.datname), ': ', c.setting) \
             FROM pg_catalog.pg_db_role_setting s CROSS JOIN unnest(s.setconfig) c(setting) \
             LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase \
             WHERE (s.setdatabase = 0 OR d.datname = pg_catalog.current_database()) AND c.setting LIKE 'search_path=%' \
               AND EXISTS (SELECT FROM unnest($1) old WHERE strpos(lower(c.setting), lower(old)) > 0) ORDER BY 1",
            &[(&olds, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "looking for texts that name schemas".into())?;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    if !names.is_empty() {
        let message = "Its text has the name of a schema that is to have another one. Views, defaults and constraints follow; texts do not: \
                       change it on the target after the cutover.";
        findings.push(Finding::new(Severity::Warning, Side::Source, "map-schema-text", first_ten(&names), message));
    }
    Ok(findings)
}
