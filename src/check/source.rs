//! What the source must be set up and allowed for: its settings, slots and sessions, and the rights of our role.

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, counted, first_ten, size};
use super::server::Server;
use crate::error::{Context, Result};
use crate::source::catalog::USER_RELATION;
use crate::source::scope::Selection;
use crate::sql;

/// Walsenders that a migration needs at once: one holds the slot's snapshot, one streams.
const WALSENDERS_NEEDED: i64 = 2;

/// Seconds after which a transaction counts as a long one.
pub(crate) const LONG_TRANSACTION: f64 = 60.0;

/// A finding on the source.
fn finding(severity: Severity, code: &'static str, object: impl Into<String>, message: impl Into<String>) -> Finding {
    Finding::new(severity, Side::Source, code, object, message)
}

/// Findings from the server's settings alone.
pub(crate) fn settings(server: &Server) -> Vec<Finding> {
    let mut findings = Vec::new();
    if server.setting("wal_level") != Some("logical") {
        let message = format!(
            "wal_level is {}; changes can be read from the WAL only at the level logical. It needs a restart of the server.",
            server.shown("wal_level")
        );
        let fix = match server.setting("rds.logical_replication") {
            Some(_) => "set rds.logical_replication to 1 in the parameter group, then reboot the instance",
            None => "ALTER SYSTEM SET wal_level = 'logical';  -- then restart the server",
        };
        findings.push(finding(Severity::Blocker, "wal-level", "wal_level", message).fix(fix));
    }
    if !server.replication {
        let role = sql::identifier(&server.role);
        let message = "The role may not replicate, so it can neither make a slot nor read from one.";
        let fix = match server.setting("rds.logical_replication") {
            Some(_) => format!("GRANT rds_replication TO {role};"),
            None => format!("ALTER ROLE {role} REPLICATION;"),
        };
        findings.push(finding(Severity::Blocker, "replication-role", role, message).fix(fix));
    }
    if !server.database_create {
        let (database, role) = (sql::identifier(&server.database), sql::identifier(&server.role));
        let message = "The role may not create in the database, and so cannot make the publication.";
        findings.push(
            finding(Severity::Blocker, "create-on-database", &database, message)
                .fix(format!("GRANT CREATE ON DATABASE {database} TO {role};")),
        );
    }
    match server.number("wal_sender_timeout") {
        0 => findings.push(finding(
            Severity::Info,
            "wal-sender-timeout",
            "wal_sender_timeout",
            "It is off: the server notices only by TCP when we are gone, and keeps the slot busy until then.",
        )),
        1..10_000 => findings.push(
            finding(
                Severity::Warning,
                "wal-sender-timeout",
                "wal_sender_timeout",
                format!(
                    "It is {}; a short stall of the network or of the queue's disk ends the stream, which then has to begin anew.",
                    server.shown("wal_sender_timeout")
                ),
            )
            .fix("ALTER SYSTEM SET wal_sender_timeout = '1min';\nSELECT pg_reload_conf();"),
        ),
        _ => {}
    }
    // These two cannot be set by a session for itself (H36).
    if server.setting("old_snapshot_threshold").is_some_and(|value| value != "-1") {
        let message = format!(
            "It is {}: a copy that reads longer than that under one snapshot fails with \"snapshot too old\".",
            server.shown("old_snapshot_threshold")
        );
        findings.push(
            finding(Severity::Warning, "old-snapshot-threshold", "old_snapshot_threshold", message)
                .fix("ALTER SYSTEM SET old_snapshot_threshold = -1;  -- then restart the server"),
        );
    }
    if server.number("idle_replication_slot_timeout") != 0 {
        let message = format!(
            "It is {}: when walferry is stopped for longer than that, the slot is lost and the migration must begin anew.",
            server.shown("idle_replication_slot_timeout")
        );
        findings.push(
            finding(Severity::Warning, "idle-slot-timeout", "idle_replication_slot_timeout", message)
                .fix("ALTER SYSTEM SET idle_replication_slot_timeout = 0;\nSELECT pg_reload_conf();"),
        );
    }
    if let Some(standbys) = server.setting("synchronous_standby_names").filter(|names| !names.is_empty()) {
        let message = format!(
            "It is {standbys:?}: a commit is visible, and streamed, only once a standby has answered. Should the standbys be away, \
             the source's commits wait, and so does making the slot."
        );
        findings.push(finding(Severity::Info, "synchronous-standbys", "synchronous_standby_names", message));
    }
    findings
}

/// Rights that only the cutover needs: to close the database to writers, and to end the other sessions (H29).
pub(crate) async fn cutover(client: &Client, server: &Server, side: Side) -> Result<Vec<Finding>> {
    let row = client
        .query_typed_one(
            "SELECT pg_catalog.pg_has_role(current_user, d.datdba, 'USAGE'), \
                    pg_catalog.pg_has_role(current_user, 'pg_signal_backend', 'USAGE'), o.rolname::text, o.rolsuper \
             FROM pg_catalog.pg_database d JOIN pg_catalog.pg_roles o ON o.oid = d.datdba WHERE d.datname = pg_catalog.current_database()",
            &[],
        )
        .await
        .context(|| "reading what the role may do at the cutover".into())?;
    let (owns, signals, owner, is_superusers): (bool, bool, &str, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    let (database, role) = (sql::identifier(&server.database), sql::identifier(&server.role));
    // The target is left only on the way back.
    let (severity, when) = match side {
        Side::Target => (Severity::Warning, "switchback"),
        _ => (Severity::Blocker, "cutover"),
    };
    let mut findings = Vec::new();
    if !owns && !server.superuser {
        let message = format!("The role does not own the database, and so cannot close it to writers at the {when}.");
        // Whoever administers a managed service can grant a role of its own, and not that of its superuser.
        let fix = match is_superusers {
            true => format!("ALTER DATABASE {database} OWNER TO {role};"),
            false => format!("GRANT {} TO {role};", sql::identifier(owner)),
        };
        findings.push(Finding::new(severity, side, "database-owner", &database, message).fix(fix));
    }
    if !signals && !server.superuser {
        let message = format!(
            "The role may not end the sessions of other roles, which the {when} has to: a writer that waits for its locks would \
             otherwise write to the server that is left."
        );
        findings.push(
            Finding::new(severity, side, "signal-backend", &role, message)
                .fix(format!("GRANT pg_signal_backend TO {role};")),
        );
    }
    Ok(findings)
}

/// Slots and walsenders that are left, and what an earlier walferry left behind.
pub(crate) async fn replication(client: &Client, server: &Server, resuming: bool) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let row = client
        .query_typed_one(
            "SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_stat_replication), \
                    ARRAY(SELECT slot_name::text FROM pg_replication_slots WHERE slot_name LIKE 'walferry%' \
                            AND database = current_database() ORDER BY 1), \
                    ARRAY(SELECT pubname::text FROM pg_publication WHERE pubname LIKE 'walferry%' ORDER BY 1), \
                    ARRAY(SELECT pubname::text FROM pg_publication WHERE puballtables AND pubname NOT LIKE 'walferry%' \
                          ORDER BY 1), \
                    EXISTS (SELECT FROM pg_namespace WHERE nspname = 'walferry'), \
                    EXISTS (SELECT FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
                            JOIN pg_namespace n ON n.oid = c.relnamespace \
                            WHERE n.nspname = 'walferry' AND c.relname = 'migration' AND a.attname = 'only_row')",
            &[],
        )
        .await
        .context(|| "reading the source's slots and publications".into())?;
    let (slots, walsenders): (i64, i64) = (row.get(0), row.get(1));
    let (old_slots, old_publications, all_tables): (Vec<String>, Vec<String>, Vec<String>) =
        (row.get(2), row.get(3), row.get(4));
    let (old_schema, is_ledger): (bool, bool) = (row.get(5), row.get(6));

    if old_schema && !is_ledger {
        let message = "The source has a schema of this name that is not walferry's ledger. The ledger takes that name on the \
                       target, and nothing in a schema of this name is moved.";
        let fix = "ALTER SCHEMA walferry RENAME TO another_name;";
        findings.push(finding(Severity::Blocker, "schema-walferry", "\"walferry\"", message).fix(fix));
    }
    if !resuming {
        findings.extend(capacity("replication-slots", "max_replication_slots", server, slots, 1));
        findings.extend(capacity("walsenders", "max_wal_senders", server, walsenders, WALSENDERS_NEEDED));
        if !old_slots.is_empty() || !old_publications.is_empty() || is_ledger {
            let mut named: Vec<String> = old_slots.iter().map(|slot| format!("slot {slot}")).collect();
            named.extend(old_publications.iter().map(|publication| format!("publication {publication}")));
            named.extend(is_ledger.then(|| "schema walferry".to_string()));
            let message = "An earlier walferry left this behind. A slot that nobody reads keeps the WAL, until the \
                           source's disk is full; another migration may also still be running.";
            let fix = "walferry clean --source … --target …  # when no other migration runs";
            findings.push(finding(Severity::Warning, "leftovers", first_ten(&named), message).fix(fix));
        }
    }
    if !all_tables.is_empty() {
        let message = "A publication FOR ALL TABLES is there. Tables without a replica identity already refuse UPDATE \
                       and DELETE because of it, and whoever reads it must be moved to the target too.";
        findings.push(finding(Severity::Info, "publication-all-tables", first_ten(&all_tables), message));
    }
    Ok(findings)
}

/// Whether `needed` more of something fit under a setting; one more than that is the headroom to begin again with.
fn capacity(code: &'static str, setting: &str, server: &Server, used: i64, needed: i64) -> Option<Finding> {
    let allowed = server.number(setting);
    let severity = match allowed - used {
        free if free < needed => Severity::Blocker,
        free if free < needed + 1 => Severity::Warning,
        _ => return None,
    };
    let message = format!(
        "{setting} is {allowed} and {used} are in use; the migration takes {needed}, and one more when a connection has to be made anew."
    );
    let fix = format!("ALTER SYSTEM SET {setting} = {};  -- then restart the server", used + needed + 2);
    Some(finding(severity, code, setting, message).fix(fix))
}

/// `max_slot_wal_keep_size` beside the rate at which the source writes WAL.
pub(crate) async fn slot_wal_limit(client: &Client, server: &Server) -> Result<Option<Finding>> {
    let limit_mib = server.number("max_slot_wal_keep_size");
    if server.setting("max_slot_wal_keep_size").is_none() || limit_mib < 0 {
        return Ok(None);
    }
    // From 14 on.
    let query = match server.major() {
        14.. => {
            "SELECT wal_bytes::float8, extract(epoch FROM clock_timestamp() - stats_reset)::float8 FROM pg_stat_wal"
        }
        _ => "SELECT 0::float8, NULL::float8",
    };
    let row = client.query_typed_one(query, &[]).await.context(|| "reading the source's WAL statistics".into())?;
    let (written, seconds): (f64, Option<f64>) = (row.get(0), row.get(1));
    let limit_bytes = limit_mib as f64 * 1024.0 * 1024.0;
    let rate = seconds.filter(|seconds| *seconds > 0.0).map_or(0.0, |seconds| written / seconds);
    let reach = if rate > 0.0 {
        format!(
            "The source wrote {} of WAL an hour on average since its statistics were reset, and reaches it in about {:.1} hours.",
            size((rate * 3600.0) as i64),
            limit_bytes / rate / 3600.0
        )
    } else {
        "The source's statistics do not say how fast it writes WAL.".to_string()
    };
    let message = format!(
        "It is {}: when walferry is stopped, or the queue is full, for as long as it takes to write that much, the \
         slot is lost and the migration must begin anew. {reach}",
        server.shown("max_slot_wal_keep_size")
    );
    Ok(Some(finding(Severity::Warning, "slot-wal-limit", "max_slot_wal_keep_size", message).fix(
        "ALTER SYSTEM SET max_slot_wal_keep_size = -1;  -- and watch the source's disk\nSELECT pg_reload_conf();",
    )))
}

/// Timeouts that would end our sessions: our sessions set them for themselves, so they are only named (H36). On the
/// target a read-only default is more: the application inherits it.
pub(crate) async fn session_defaults(client: &Client, side: Side) -> Result<Vec<Finding>> {
    let rows = client
        .query_typed(
            "WITH overrides AS ( \
               SELECT split_part(c.setting, '=', 1) AS name, split_part(c.setting, '=', 2) AS value, \
                      concat_ws(' in ', 'role ' || quote_ident(r.rolname), 'database ' || quote_ident(d.datname)) AS place, \
                      format('ALTER %s RESET %I;', CASE WHEN r.oid IS NULL THEN format('DATABASE %I', d.datname) \
                        WHEN d.oid IS NULL THEN format('ROLE %I', r.rolname) \
                        ELSE format('ROLE %I IN DATABASE %I', r.rolname, d.datname) END, split_part(c.setting, '=', 1)) AS fix \
               FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) c(setting) \
               LEFT JOIN pg_database d ON d.oid = s.setdatabase LEFT JOIN pg_roles r ON r.oid = s.setrole \
               WHERE (s.setdatabase = 0 OR d.datname = current_database()) \
                 AND (s.setrole = 0 OR r.rolname = current_user)) \
             SELECT name, value, place, fix FROM overrides \
             WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout', \
                            'idle_session_timeout', 'lock_timeout', 'default_transaction_read_only') \
               AND value NOT IN ('0', 'off') \
             UNION ALL \
             SELECT name, concat_ws(' ', reset_val, unit), 'the server', '' FROM pg_settings \
             WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout', \
                            'idle_session_timeout', 'lock_timeout') \
               AND reset_val <> '0' AND name NOT IN (SELECT name FROM overrides) \
             ORDER BY 1, 3",
            &[],
        )
        .await
        .context(|| "reading the server's timeouts".into())?;
    let found = rows.iter().map(|row| {
        let (name, value, place, fix): (&str, &str, &str, &str) = (row.get(0), row.get(1), row.get(2), row.get(3));
        let object = format!("{name} of {place}");
        if name == "default_transaction_read_only" && side == Side::Target {
            let message = "Sessions begin read-only there. Ours do not, but the application's would after the cutover.";
            return Finding::new(Severity::Warning, side, "read-only", object, message).fix(fix);
        }
        let message =
            format!("It is {value}. walferry's own sessions set it for themselves; nothing needs to be done.");
        Finding::new(Severity::Info, side, "session-timeout", object, message)
    });
    Ok(found.collect())
}

/// Sessions and prepared transactions that making the slot and the fence would wait for (H30, H33).
pub(crate) async fn transactions(client: &Client, server: &Server, longer_than: f64) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    // The query's text is left out: it holds values.
    let rows = client
        .query_typed(
            &format!(
                "SELECT a.pid, coalesce(a.usename, '')::text, coalesce(a.application_name, ''), \
                        date_trunc('second', clock_timestamp() - a.xact_start)::text, a.backend_xid IS NOT NULL, \
                        coalesce(a.datname, '')::text \
                 FROM pg_stat_activity a \
                 WHERE a.backend_type = 'client backend' AND a.pid <> pg_backend_pid() \
                   AND a.xact_start < clock_timestamp() - interval '{longer_than} s' \
                 ORDER BY a.xact_start"
            ),
            &[],
        )
        .await
        .context(|| "reading the source's sessions".into())?;
    for (writes, severity, code, message) in [
        (
            true,
            Severity::Warning,
            "long-transactions",
            "These have been writing for more than a minute. Making the slot waits for every transaction that is open \
             anywhere in the cluster, and the cutover's fence for those in this database.",
        ),
        (
            false,
            Severity::Info,
            "long-readers",
            "These have been open for more than a minute without having written. While they hold locks the cutover's \
             fence waits for them.",
        ),
    ] {
        let these: Vec<_> = rows.iter().filter(|row| row.get::<_, bool>(4) == writes).collect();
        if these.is_empty() {
            continue;
        }
        let named: Vec<String> = these
            .iter()
            .map(|row| {
                let (pid, user, application): (i32, &str, &str) = (row.get(0), row.get(1), row.get(2));
                let (age, database): (&str, &str) = (row.get(3), row.get(5));
                format!("pid {pid} (user {user}, application {application:?}, database {database}, open for {age})")
            })
            .collect();
        let fix: Vec<String> =
            these.iter().map(|row| format!("SELECT pg_terminate_backend({});", row.get::<_, i32>(0))).collect();
        findings.push(finding(severity, code, first_ten(&named), message).fix(fix.join("\n")));
    }
    if !server.sees_sessions {
        let role = sql::identifier(&server.role);
        let message =
            "The role does not see what other roles' sessions do, so long transactions could not be looked for.";
        findings.push(
            finding(Severity::Info, "sessions-hidden", &role, message)
                .fix(format!("GRANT pg_read_all_stats TO {role};")),
        );
    }
    let rows = client
        .query_typed("SELECT gid, database::text, owner::text FROM pg_prepared_xacts ORDER BY prepared", &[])
        .await
        .context(|| "reading the source's prepared transactions".into())?;
    if !rows.is_empty() {
        let named: Vec<String> =
            rows.iter().map(|row| format!("{:?} in {}", row.get::<_, &str>(0), row.get::<_, &str>(1))).collect();
        let fix: Vec<String> = rows
            .iter()
            .map(|row| {
                format!(
                    "COMMIT PREPARED {};  -- in {}, or ROLLBACK PREPARED: as its coordinator decided",
                    sql::literal(row.get(0)).trim_start(),
                    row.get::<_, &str>(1)
                )
            })
            .collect();
        let message = format!(
            "{} still to be committed or rolled back. Making the slot waits until then, and the cutover refuses while there \
             is one in this database: committed after the fence, it would write past it.",
            counted(rows.len(), "prepared transaction")
        );
        // No blocker: an application that commits in two phases has one open at nearly any moment.
        findings
            .push(finding(Severity::Warning, "prepared-transactions", first_ten(&named), message).fix(fix.join("\n")));
    }
    Ok(findings)
}

/// Rights that our role lacks on schemas, tables and sequences, as grants ready to paste.
///
/// The schema is dumped as a whole, so every table has to be readable; only those that are moved have to be ours.
pub(crate) async fn privileges(
    client: &Client,
    server: &Server,
    selection: Option<&Selection>,
) -> Result<Vec<Finding>> {
    if server.superuser {
        return Ok(Vec::new());
    }
    let role = sql::identifier(&server.role);
    let mut findings = Vec::new();
    let rows = client
        .query_typed(
            &format!(
                "SELECT n.nspname::text, c.relname::text, c.relkind::text, \
                        has_schema_privilege(n.oid, 'USAGE'), \
                        CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, 'SELECT') \
                             ELSE has_table_privilege(c.oid, 'SELECT') END, \
                        c.relkind = 'S' OR pg_has_role(c.relowner, 'USAGE'), pg_get_userbyid(c.relowner)::text, \
                        row_security_active(c.oid), c.oid \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't' AND {USER_RELATION} ORDER BY 1, 2"
            ),
            &[],
        )
        .await
        .context(|| "reading our privileges on the source".into())?;

    let is_moved =
        |row: &tokio_postgres::Row| selection.is_none_or(|selection| selection.relations.contains(&row.get(8)));
    let name = |row: &tokio_postgres::Row| sql::qualified(row.get(0), row.get(1));
    let mut schemas: Vec<String> = Vec::new();
    let (mut tables, mut sequences, mut fixes) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        let schema = sql::identifier(row.get(0));
        if !row.get::<_, bool>(3) && schemas.last() != Some(&schema) {
            fixes.push(format!("GRANT USAGE ON SCHEMA {schema} TO {role};"));
            schemas.push(schema.clone());
        }
        if !row.get::<_, bool>(4) {
            let (list, kind) =
                if row.get::<_, &str>(2) == "S" { (&mut sequences, "SEQUENCES") } else { (&mut tables, "TABLES") };
            list.push(name(row));
            fixes.push(format!("GRANT SELECT ON ALL {kind} IN SCHEMA {schema} TO {role};"));
        }
    }
    fixes.sort();
    fixes.dedup();
    if !fixes.is_empty() {
        let missing = [("schema", &schemas), ("table", &tables), ("sequence", &sequences)];
        let counts: Vec<String> =
            missing.iter().filter(|(_, list)| !list.is_empty()).map(|(noun, list)| counted(list.len(), noun)).collect();
        let named: Vec<String> = schemas.iter().chain(&tables).chain(&sequences).cloned().collect();
        let message = format!(
            "{role} may not read {}. What it cannot read it cannot copy; new tables need the grant too, or the cutover will refuse them.",
            counts.join(", ")
        );
        findings.push(finding(Severity::Blocker, "select", first_ten(&named), message).fix(fixes.join("\n")));
    }

    let foreign: Vec<&tokio_postgres::Row> =
        rows.iter().filter(|row| is_moved(row) && !row.get::<_, bool>(5)).collect();
    if !foreign.is_empty() {
        let mut fix: Vec<String> =
            foreign.iter().map(|row| format!("GRANT {} TO {role};", sql::identifier(row.get(6)))).collect();
        fix.sort();
        fix.dedup();
        let named: Vec<String> = foreign.iter().map(|row| name(row)).collect();
        let message = "Only its owner can add a table to a publication, and lock it against writers at the cutover; the role must be a member of the owner. Where that is a superuser, better connect as it.";
        findings.push(finding(Severity::Blocker, "table-owner", first_ten(&named), message).fix(fix.join("\n")));
    }

    let hidden: Vec<String> = rows.iter().filter(|row| is_moved(row) && row.get(7)).map(name).collect();
    if !hidden.is_empty() {
        let message = "Row level security applies to our role, and would hide rows from the copy, or stop it.";
        findings.push(
            finding(Severity::Blocker, "row-level-security", first_ten(&hidden), message)
                .fix(format!("ALTER ROLE {role} BYPASSRLS;")),
        );
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::server::Setting;
    use crate::check::server::tests::server;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};

    fn with(settings: &[(&str, &str)]) -> Server {
        let mut server = server();
        for (name, value) in settings {
            let setting = Setting { value: value.to_string(), shown: value.to_string() };
            server.settings.insert(name.to_string(), setting);
        }
        server
    }

    fn codes(server: &Server) -> Vec<&'static str> {
        settings(server).iter().map(|finding| finding.code).collect()
    }

    #[test]
    fn a_source_as_it_should_be_has_no_finding() {
        let good = [("wal_level", "logical"), ("wal_sender_timeout", "60000"), ("old_snapshot_threshold", "-1")];
        assert_eq!(codes(&with(&good)), Vec::<&str>::new());
    }

    #[test]
    fn settings_that_end_a_session_or_a_slot_are_found() {
        let bad = [
            ("wal_level", "replica"),
            ("wal_sender_timeout", "5000"),
            ("old_snapshot_threshold", "60"),
            ("idle_replication_slot_timeout", "3600"),
            ("synchronous_standby_names", "*"),
        ];
        let expected =
            ["wal-level", "wal-sender-timeout", "old-snapshot-threshold", "idle-slot-timeout", "synchronous-standbys"];
        assert_eq!(codes(&with(&bad)), expected);
    }

    #[test]
    fn the_last_free_slot_is_a_warning_and_none_a_blocker() {
        let server = with(&[("max_replication_slots", "10")]);
        let severity = |used| capacity("slots", "max_replication_slots", &server, used, 1).map(|f| f.severity);
        assert_eq!((severity(8), severity(9), severity(10)), (None, Some(Severity::Warning), Some(Severity::Blocker)));
        let fix = capacity("slots", "max_replication_slots", &server, 10, 1).and_then(|finding| finding.fix).unwrap();
        assert!(fix.starts_with("ALTER SYSTEM SET max_replication_slots = 13;"));
    }

    #[tokio::test]
    async fn h33_a_transaction_that_has_written_is_told_from_one_that_reads() {
        let programs = ServerPrograms::find(None).unwrap();
        let throwaway = ThrowawayServer::start(&programs, "check-transactions", &[]).await.unwrap();
        let (checking, writer, reader) = (
            throwaway.connect("postgres").await.unwrap(),
            throwaway.connect("postgres").await.unwrap(),
            throwaway.connect("postgres").await.unwrap(),
        );
        writer.batch_execute("BEGIN; CREATE TABLE secret_name (id int)").await.unwrap();
        reader.batch_execute("BEGIN; SELECT 1").await.unwrap();
        let pid: i32 = writer.query_typed_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        let found = transactions(&checking, &server(), 0.0).await.unwrap();
        let codes: Vec<&str> = found.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, ["long-transactions", "long-readers"]);
        assert!(found[0].object.starts_with(&format!("pid {pid} (user postgres, ")), "{}", found[0].object);
        assert_eq!(found[0].fix, Some(format!("SELECT pg_terminate_backend({pid});")));
        assert!(!format!("{found:?}").contains("secret_name"));
        assert_eq!(transactions(&checking, &server(), LONG_TRANSACTION).await.unwrap(), []);
    }
}
