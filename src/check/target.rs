//! What the target must be: empty, and ours to write to.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::report::{Finding, Severity, Side, counted, first_ten, size};
use super::server::Server;
use crate::error::{Context, Result};
use crate::sql;
use crate::target::role::ApplyRole;

/// A finding on the target.
fn finding(severity: Severity, code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(severity, Side::Target, code, object, message)
}

/// The roles that managed services keep for themselves, as which no customer can log in: Amazon's, Azure's, Google's (two),
/// Supabase's and Neon's.
pub(crate) const SERVICE_OWNERS: &str =
    "'rdsadmin', 'azuresu', 'cloudsqladmin', 'alloydbadmin', 'supabase_admin', 'cloud_admin'";

/// Whether the database is empty: no relation, function, type or large object of a user, and no ledger.
///
/// What an extension has brought does not count, and neither does what belongs to a managed service's own role (unless that is ours):
/// the service has put it into every database.
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
    let service = |owner: &str| {
        format!("(pg_get_userbyid({owner}) IN ({SERVICE_OWNERS}) AND pg_get_userbyid({owner}) <> current_user)")
    };
    let rows = client
        .query_typed(
            &format!(
                "SELECT CASE c.relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' \
                          WHEN 'f' THEN 'foreign table' WHEN 'c' THEN 'type' ELSE 'table' END, \
                        format('%I.%I', n.nspname, c.relname), {} \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c') AND c.relpersistence <> 't' AND {own} AND NOT {} \
                 UNION ALL \
                 SELECT 'function', format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)), {} \
                 FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
                 WHERE {own} AND NOT {} \
                   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid \
                                   AND d.deptype = 'i') \
                 UNION ALL \
                 SELECT 'type', format('%I.%I', n.nspname, t.typname), {} \
                 FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace \
                 WHERE t.typtype IN ('e', 'd', 'r') AND {own} AND NOT {} \
                 UNION ALL \
                 (SELECT 'large object', oid::text, {} FROM pg_largeobject_metadata m ORDER BY oid LIMIT 11) \
                 UNION ALL \
                 SELECT 'schema', quote_ident(nspname), false FROM pg_namespace WHERE nspname = 'walferry' \
                 ORDER BY 1, 2",
                service("c.relowner"),
                extension("pg_class", "c.oid"),
                service("p.proowner"),
                extension("pg_proc", "p.oid"),
                service("t.typowner"),
                extension("pg_type", "t.oid"),
                service("m.lomowner"),
            ),
            &[],
        )
        .await
        .context(|| "looking whether the target is empty".into())?;
    let (preinstalled, rows): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.get::<_, bool>(2));
    let named = |rows: &[&tokio_postgres::Row]| -> Vec<String> {
        rows.iter().map(|row| format!("{} {}", row.get::<_, &str>(0), row.get::<_, &str>(1))).collect()
    };
    let mut findings = Vec::new();
    if !preinstalled.is_empty() {
        let message = "It belongs to the managed service's own role. It is left alone, and the target counts as empty.";
        findings.push(finding(Severity::Info, "preinstalled", first_ten(&named(&preinstalled)), message));
    }
    if rows.is_empty() {
        return Ok(findings);
    }
    let names = named(&rows);
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
    findings.push(finding(Severity::Blocker, "target-not-empty", first_ten(&names), message).fix(fix));
    Ok(findings)
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

/// Whether our role may write without firing triggers and foreign keys. Without, they are made at the cutover (H23); on the source,
/// where only the way back writes, they are there.
///
/// # Errors
/// Whatever the server says, but for the refusal itself.
pub(crate) async fn replica_role(client: &Client, server: &Server, side: Side) -> Result<Option<Finding>> {
    if ApplyRole::allowed(client).await? == ApplyRole::Replica {
        return Ok(None);
    }
    let (severity, code, message) = match side {
        Side::Source => (
            Severity::Warning,
            "way-back",
            "The role may not set it. After the cutover the way back writes to the source, where triggers must not fire a \
             second time; without it, only `cutover --no-reverse` switches.",
        ),
        _ => (
            Severity::Info,
            "replica-role",
            "The role may not set it, so triggers, rules and foreign keys are made only at the cutover: until then they are tried, \
             and taken back. Foreign keys are validated after it, while applications are at work.",
        ),
    };
    let finding = Finding::new(severity, side, code, "session_replication_role", message);
    // Before 15 nobody can grant it.
    Ok(Some(match server.major() {
        15.. => finding.fix(format!(
            "GRANT SET ON PARAMETER session_replication_role TO {};  -- where the service lets anybody",
            sql::identifier(&server.role)
        )),
        _ => finding,
    }))
}

/// What findings on the source mean where the target's role is no superuser: event triggers may be refused to it.
///
/// # Errors
/// Whatever the server says, but for the refusal itself.
pub(crate) async fn without_superuser(target: &Client, findings: &mut [Finding]) -> Result<()> {
    if findings.iter().any(|found| found.code == "event-trigger") && !makes_event_triggers(target).await? {
        for found in findings.iter_mut().filter(|found| found.code == "event-trigger") {
            found.severity = Severity::Blocker;
            found.message =
                "The target does not let our role make an event trigger: the schema could not be completed there."
                    .into();
            let drops = found.object.split(", ").map(|name| format!("DROP EVENT TRIGGER {name};"));
            found.fix = Some(format!(
                "{}  -- on the source; or migrate as a role of the target that may make it",
                drops.collect::<Vec<_>>().join("\n")
            ));
        }
    }
    Ok(())
}

/// Services let roles of theirs do it; PostgreSQL itself only a superuser. Tried in a transaction that is rolled back.
async fn makes_event_triggers(target: &Client) -> Result<bool> {
    let doing = || "trying to make an event trigger on the target".to_owned();
    let tried = target
        .batch_execute(
            "BEGIN READ WRITE; \
             CREATE FUNCTION pg_temp.walferry_trial() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; \
             CREATE EVENT TRIGGER walferry_trial ON ddl_command_end EXECUTE FUNCTION pg_temp.walferry_trial()",
        )
        .await;
    target.batch_execute("ROLLBACK").await.context(doing)?;
    match tried {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(false),
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
