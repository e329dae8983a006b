//! Settings that differ between the servers: what an application would notice after the cutover.

use futures_util::future::try_join;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::report::{Finding, Severity, Side, first_ten};
use super::server::{Server, Setting};
use crate::error::{Context, Result};
use crate::sql;
use crate::target::roles::LISTS;

/// They decide what a statement answers or whether it runs at all. What our sessions pin cannot be seen by them; of those, what
/// the database sets is compared.
const BEHAVIOUR: [&str; 15] = [
    "backslash_quote",
    "default_tablespace",
    "default_text_search_config",
    "lc_numeric",
    "lc_time",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "password_encryption",
    "session_preload_libraries",
    "shared_preload_libraries",
    "synchronous_commit",
    "temp_tablespaces",
    "transform_null_equals",
    "xmlbinary",
    "zero_damaged_pages",
];

/// They decide how fast it is.
const SPEED: [&str; 22] = [
    "autovacuum",
    "autovacuum_max_workers",
    "autovacuum_naptime",
    "autovacuum_vacuum_cost_limit",
    "checkpoint_timeout",
    "cpu_tuple_cost",
    "default_statistics_target",
    "effective_cache_size",
    "effective_io_concurrency",
    "fsync",
    "huge_pages",
    "jit",
    "max_parallel_workers",
    "max_parallel_workers_per_gather",
    "max_wal_size",
    "max_worker_processes",
    "random_page_cost",
    "seq_page_cost",
    "shared_buffers",
    "wal_buffers",
    "wal_compression",
    "work_mem",
];

/// How much of a value is shown.
const SHOWN: usize = 60;

/// What differs, by how much it matters.
pub(crate) fn settings(source: &Server, target: &Server) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (here, there) = (source.number("max_connections"), target.number("max_connections"));
    if there < here {
        let message = format!(
            "The target allows {there}, the source {here}: pools that fit the source may find no connection after the cutover."
        );
        let fix = format!("ALTER SYSTEM SET max_connections = {here};  -- then restart the server");
        findings.push(finding(Severity::Warning, "max_connections".into(), message).fix(fix));
    }
    for (severity, names, what) in [
        (Severity::Warning, &BEHAVIOUR[..], "An application can notice it after the cutover"),
        (Severity::Info, &SPEED[..], "It can be faster or slower there"),
    ] {
        let differing: Vec<(&str, String)> =
            names.iter().filter_map(|name| Some((*name, difference(source, target, name)?))).collect();
        if differing.is_empty() {
            continue;
        }
        let names: Vec<&str> = differing.iter().map(|(name, _)| *name).collect();
        let each: Vec<String> = differing.into_iter().map(|(_, difference)| difference).collect();
        findings.push(finding(severity, names.join(", "), format!("{what}: {}.", each.join("; "))));
    }
    findings
}

/// What `ALTER DATABASE … SET` and `ALTER ROLE … IN DATABASE … SET` say on the source and not on the target, and privileges on the
/// database: `pg_dump` leaves them out.
///
/// # Errors
/// Whatever the servers say.
pub(crate) async fn of_the_database(source: &Client, target: &Client, name: &str) -> Result<Vec<Finding>> {
    let mut findings = Vec::from_iter(settings_of_the_database(source, target, name).await?);
    let (here, there) = try_join(beside_the_database(source, name), beside_the_database(target, name)).await?;
    let missing: Vec<&(String, String)> = here.iter().filter(|found| !there.contains(found)).collect();
    if !missing.is_empty() {
        let objects: Vec<String> = missing.iter().map(|(object, _)| object.clone()).collect();
        let fix: Vec<&str> = missing.iter().map(|(_, statement)| statement.as_str()).collect();
        let message = "The source has it for this database, and the target has not; it is not moved with the schema.";
        findings.push(
            Finding::new(Severity::Warning, Side::Target, "database-privileges", first_ten(&objects), message)
                .fix(fix.join("\n")),
        );
    }
    Ok(findings)
}

/// Privileges on the database, its comment, and what it sets for single roles: what it is, and the statement that makes it.
async fn beside_the_database(client: &Client, name: &str) -> Result<Vec<(String, String)>> {
    let rows = client
        .query_typed(
            "SELECT format('%s on the database for %s', a.privilege_type, role), \
                    format('GRANT %s ON DATABASE %I TO %s%s;', a.privilege_type, $1, role, \
                        CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END) \
             FROM pg_database d, aclexplode(d.datacl) a, \
                  LATERAL (SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS role) r \
             WHERE d.datname = current_database() AND a.grantee <> d.datdba \
             UNION ALL \
             SELECT 'no ' || p || ' on the database for PUBLIC', format('REVOKE %s ON DATABASE %I FROM PUBLIC;', p, $1) \
             FROM pg_database d, unnest(ARRAY['CONNECT', 'TEMPORARY']) p \
             WHERE d.datname = current_database() AND d.datacl IS NOT NULL \
               AND NOT EXISTS (SELECT FROM aclexplode(d.datacl) a WHERE a.grantee = 0 AND a.privilege_type = p) \
             UNION ALL \
             SELECT 'the comment on the database', \
                    format('COMMENT ON DATABASE %I IS %L;', $1, shobj_description(d.oid, 'pg_database')) \
             FROM pg_database d WHERE d.datname = current_database() AND shobj_description(d.oid, 'pg_database') IS NOT NULL \
             UNION ALL \
             SELECT format('%s for the role %I in the database', split_part(c, '=', 1), r.rolname), \
                    format('ALTER ROLE %I IN DATABASE %I SET %I = ', r.rolname, $1, split_part(c, '=', 1)) \
                        || CASE WHEN split_part(c, '=', 1) = ANY ($2) THEN substr(c, strpos(c, '=') + 1) \
                                ELSE quote_literal(substr(c, strpos(c, '=') + 1)) END || ';' \
             FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) c \
             WHERE d.datname = current_database() ORDER BY 1",
            &[(&name, Type::TEXT), (&LISTS.as_slice(), Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "reading privileges and settings of the database".into())?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn settings_of_the_database(source: &Client, target: &Client, name: &str) -> Result<Option<Finding>> {
    let (here, there) = try_join(database_settings(source), database_settings(target)).await?;
    // The fence sets this one.
    let missing: Vec<(&str, &str)> = here
        .iter()
        .filter(|setting| !there.contains(setting))
        .filter_map(|setting| setting.split_once('='))
        .filter(|(setting, _)| *setting != "default_transaction_read_only")
        .collect();
    if missing.is_empty() {
        return Ok(None);
    }
    let alter = |(setting, value): &(&str, &str)| {
        let value = if LISTS.contains(setting) { (*value).to_owned() } else { sql::literal(value) };
        format!("ALTER DATABASE {} SET {} = {value};", sql::identifier(name), sql::identifier(setting))
    };
    let names: Vec<&str> = missing.iter().map(|(setting, _)| *setting).collect();
    let message = "The source's database sets it by ALTER DATABASE, and the target's does not or otherwise; it is not moved with the schema.";
    let fix: Vec<String> = missing.iter().map(alter).collect();
    let found = Finding::new(Severity::Warning, Side::Target, "database-settings", names.join(", "), message);
    Ok(Some(found.fix(fix.join("\n"))))
}

async fn database_settings(client: &Client) -> Result<Vec<String>> {
    let row = client
        .query_typed_one(
            "SELECT coalesce((SELECT s.setconfig FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase \
                              WHERE d.datname = current_database() AND s.setrole = 0), '{}')",
            &[],
        )
        .await
        .context(|| "reading what the database sets".into())?;
    Ok(row.get(0))
}

fn difference(source: &Server, target: &Server, name: &str) -> Option<String> {
    // One that a version does not have cannot differ.
    let (here, there) = (found(source, name)?, found(target, name)?);
    // With units where there are any. A session of ours pins some of those without.
    let shown = |setting: &Setting| match setting.value.parse::<i64>() {
        Ok(_) => shortened(&setting.shown),
        Err(_) => shortened(&setting.value),
    };
    (here.value != there.value).then(|| format!("{name} is {} here and {} there", shown(here), shown(there)))
}

/// Some names have capitals (`DateStyle`).
fn found<'a>(server: &'a Server, name: &str) -> Option<&'a Setting> {
    server.settings.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, setting)| setting)
}

fn shortened(value: &str) -> String {
    let cut: String = value.chars().take(SHOWN).collect();
    match (cut.is_empty(), cut.len() < value.len()) {
        (true, _) => "empty".to_owned(),
        (_, true) => format!("{cut}…"),
        _ => cut,
    }
}

fn finding(severity: Severity, object: String, message: String) -> Finding {
    Finding::new(severity, Side::Target, "settings-differ", object, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::server::tests::server;

    #[test]
    fn what_differs_is_named_and_what_does_not_is_not() {
        let with = |values: &[(&str, &str)]| {
            let mut server = server();
            let setting = |value: &str| Setting { value: value.into(), shown: value.into() };
            server.settings.extend(values.iter().map(|(name, value)| ((*name).to_owned(), setting(value))));
            server
        };
        let here = [("XMLBinary", "base64"), ("work_mem", "4096"), ("max_connections", "200"), ("jit", "on")];
        let source = with(&here);
        assert_eq!(settings(&source, &with(&here)), []);
        let there = [("XMLBinary", "hex"), ("work_mem", "65536"), ("max_connections", "100"), ("jit", "on")];
        let found = settings(&source, &with(&there));
        let shown: Vec<(Severity, &str)> = found.iter().map(|found| (found.severity, found.object.as_str())).collect();
        let expected =
            [(Severity::Warning, "max_connections"), (Severity::Warning, "xmlbinary"), (Severity::Info, "work_mem")];
        assert_eq!(shown, expected);
        assert!(found[1].message.contains("xmlbinary is base64 here and hex there"), "{}", found[1].message);
    }
}
