//! What the target must be: empty, and ours to write to.

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, counted, first_ten, size};
use super::server::Server;
use crate::error::{Context, Result};
use crate::sql;

/// A finding on the target.
fn finding(severity: Severity, code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(severity, Side::Target, code, object, message)
}

/// Whether the database is empty: no relation, function or type of a user, and no ledger.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn emptiness(client: &Client, server: &Server) -> Result<Vec<Finding>> {
    let own = "n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') AND n.nspname NOT LIKE 'pg\\_toast%' \
               AND n.nspname NOT LIKE 'pg\\_temp\\_%'";
    let extension = |class: &str, object: &str| {
        format!(
            "EXISTS (SELECT FROM pg_depend d WHERE d.classid = '{class}'::regclass AND d.objid = {object} AND d.deptype = 'e')"
        )
    };
    let rows = client
        .query_typed(
            &format!(
                "SELECT CASE c.relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' \
                          WHEN 'f' THEN 'foreign table' WHEN 'c' THEN 'type' ELSE 'table' END, \
                        format('%I.%I', n.nspname, c.relname) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c') AND c.relpersistence <> 't' AND {own} AND NOT {} \
                 UNION ALL \
                 SELECT 'function', format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) \
                 FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
                 WHERE {own} AND NOT {} \
                   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid \
                                   AND d.deptype = 'i') \
                 UNION ALL \
                 SELECT 'type', format('%I.%I', n.nspname, t.typname) \
                 FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace \
                 WHERE t.typtype IN ('e', 'd', 'r') AND {own} AND NOT {} \
                 UNION ALL \
                 SELECT 'schema', quote_ident(nspname) FROM pg_namespace WHERE nspname = 'walferry' \
                 ORDER BY 1, 2",
                extension("pg_class", "c.oid"),
                extension("pg_proc", "p.oid"),
                extension("pg_type", "t.oid"),
            ),
            &[],
        )
        .await
        .context(|| "looking whether the target is empty".into())?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<String> =
        rows.iter().map(|row| format!("{} {}", row.get::<_, &str>(0), row.get::<_, &str>(1))).collect();
    let ledger = names.iter().any(|name| name == "schema walferry");
    let mut message = format!(
        "The target is not empty ({}): what is there would collide with what is moved. Move into a database of its own.",
        counted(names.len(), "object")
    );
    let mut fix = new_database(server);
    if ledger {
        message.push_str(
            " The schema walferry is the ledger of a migration that began before: to go on with it, run migrate with its state directory.",
        );
        fix.push_str("\nwalferry clean --source … --target …  # to give the earlier migration up");
    }
    Ok(vec![finding(Severity::Blocker, "target-not-empty", first_ten(&names), message).fix(fix)])
}

/// A ledger of another migration, on a target that need not be empty.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn ledger_of_another(client: &Client) -> Result<Option<Finding>> {
    let row = client.query_typed_one("SELECT pg_catalog.to_regnamespace('walferry') IS NOT NULL", &[]).await?;
    let message = "The target holds the ledger of a migration that began before: to go on with it, run migrate with its state directory.";
    Ok(row.get::<_, bool>(0).then(|| {
        finding(Severity::Blocker, "target-not-empty", "schema walferry", message)
            .fix("walferry clean --source … --target …  # to give the earlier migration up")
    }))
}

/// A new, empty database like this one. Nothing is dropped: what is there may be somebody's.
fn new_database(server: &Server) -> String {
    format!(
        "CREATE DATABASE {} TEMPLATE template0;  -- and name it in --target",
        sql::identifier(&format!("{}_new", server.database))
    )
}

/// Rights and settings of the target.
pub(crate) fn settings(server: &Server) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (role, database) = (sql::identifier(&server.role), sql::identifier(&server.database));
    if !server.database_create {
        let message = "The role may not create schemas in the database.";
        findings.push(
            finding(Severity::Blocker, "create-on-database", &database, message)
                .fix(format!("GRANT CREATE ON DATABASE {database} TO {role};")),
        );
    }
    // Kilobytes and megabytes: the units of these two settings.
    if server.number("maintenance_work_mem") <= 64 * 1024 {
        let message = format!(
            "It is {}, no more than the default. Index builds get a quarter of shared_buffers ({}) together, if that is more; with \
             more memory they are faster: `migrate --index-memory`.",
            server.shown("maintenance_work_mem"),
            server.shown("shared_buffers")
        );
        findings.push(finding(Severity::Info, "maintenance-work-mem", "maintenance_work_mem", message));
    }
    if server.number("max_wal_size") <= 1024 {
        let message = format!(
            "It is {}, no more than the default. The copy writes much WAL, and checkpoints come one after the other.",
            server.shown("max_wal_size")
        );
        findings.push(
            finding(Severity::Info, "max-wal-size", "max_wal_size", message)
                .fix("ALTER SYSTEM SET max_wal_size = '16GB';\nSELECT pg_reload_conf();"),
        );
    }
    if server.setting("wal_level") != Some("logical") {
        let message = format!(
            "It is {}. The way back after the cutover reads the target's WAL, which works only at the level logical; without it, only \
             `cutover --no-reverse` switches. Set it while nobody uses the target.",
            server.shown("wal_level")
        );
        findings.push(
            finding(Severity::Warning, "way-back", "wal_level", message)
                .fix("ALTER SYSTEM SET wal_level = 'logical';  -- then restart the server"),
        );
    }
    if !server.replication {
        let message = "The role may not replicate. The way back after the cutover needs a slot on the target; without it, only \
                       `cutover --no-reverse` switches.";
        let fix = match server.setting("rds.logical_replication") {
            Some(_) => format!("GRANT rds_replication TO {role};"),
            None => format!("ALTER ROLE {role} REPLICATION;"),
        };
        findings.push(finding(Severity::Warning, "way-back", role, message).fix(fix));
    }
    findings
}

/// What SQL cannot see: whether the data fits.
pub(crate) fn disk(source_bytes: i64) -> Finding {
    let message = format!(
        "The source's database takes {} with its indexes. SQL cannot see how much room the target's disk has: it needs that much, and room for WAL and for the sorting of indexes.",
        size(source_bytes)
    );
    finding(Severity::Info, "target-disk", "data_directory", message)
}

/// Whether our role may write without firing triggers and foreign keys; tried in a transaction that is rolled back. On the source,
/// only the way back writes.
///
/// # Errors
/// Whatever the server says, but for the refusal itself.
pub(crate) async fn replica_role(client: &Client, server: &Server, side: Side) -> Result<Option<Finding>> {
    let doing = || "trying session_replication_role".to_string();
    client.batch_execute("BEGIN").await.context(doing)?;
    let tried = client.batch_execute("SET LOCAL session_replication_role = replica").await;
    client.batch_execute("ROLLBACK").await.context(doing)?;
    match tried {
        Ok(()) => Ok(None),
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) => {
            let (severity, code, message) = match side {
                Side::Source => (
                    Severity::Warning,
                    "way-back",
                    "The role may not set it. After the cutover the way back writes to the source, where triggers must not fire a \
                     second time; without it, only `cutover --no-reverse` switches.",
                ),
                _ => (
                    Severity::Blocker,
                    "replica-role",
                    "The role may not set it. Without it triggers fire a second time for every change that is \
                     applied, and foreign keys refuse rows whose parents come in another session.",
                ),
            };
            let fix = format!("GRANT SET ON PARAMETER session_replication_role TO {};", sql::identifier(&server.role));
            Ok(Some(Finding::new(severity, side, code, "session_replication_role", message).fix(fix)))
        }
        Err(error) => Err(error).context(doing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::server::Setting;
    use crate::check::server::tests::server;

    #[test]
    fn rights_and_settings_of_the_target_are_found() {
        let mut server = server();
        let mut set = |name: &str, value: &str| {
            server.settings.insert(name.into(), Setting { value: value.into(), shown: value.into() });
        };
        set("maintenance_work_mem", "65537");
        set("max_wal_size", "1025");
        set("wal_level", "logical");
        assert_eq!(settings(&server), []);
        server.database_create = false;
        server.settings.remove("wal_level");
        server.replication = false;
        let codes: Vec<&str> = settings(&server).iter().map(|finding| finding.code).collect();
        assert_eq!(codes, ["create-on-database", "way-back", "way-back"]);
    }
}
