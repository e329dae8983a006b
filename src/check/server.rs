//! What both servers are asked alike: who they are, who we are there, how many connections are left.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use tokio_postgres::{Client, SimpleQueryMessage};

use super::report::{Finding, ServerSummary, Severity, Side};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// The oldest and the newest major version that walferry is tested with, on a side.
pub(crate) fn supported(side: Side) -> RangeInclusive<u32> {
    match side {
        Side::Target => 13..=18,
        _ => 10..=18,
    }
}

/// A server and our role on it.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) version_number: i32,
    pub(crate) version: String,
    /// None where the function is not ours to call.
    pub(crate) system_identifier: Option<String>,
    /// With the system identifier, tells a server from a copy of its files.
    pub(crate) started: String,
    pub(crate) database: String,
    pub(crate) bytes: i64,
    pub(crate) encoding: String,
    /// `libc`, `icu` or `builtin`.
    pub(crate) provider: String,
    /// Name of the locale that sorts, of whichever provider.
    pub(crate) collation: String,
    /// `LC_CTYPE` of the database.
    pub(crate) ctype: String,
    /// The provider's own version of the collation, where it has one.
    pub(crate) collation_version: Option<String>,
    pub(crate) in_recovery: bool,
    pub(crate) role: String,
    pub(crate) superuser: bool,
    /// The attribute, or membership in the role that stands for it on Amazon RDS.
    pub(crate) replication: bool,
    pub(crate) bypass_rls: bool,
    pub(crate) database_create: bool,
    /// May see the sessions of other roles.
    pub(crate) sees_sessions: bool,
    /// Connections that our role can still open, and what is in the way: a setting, the role, the database.
    pub(crate) free_connections: i64,
    pub(crate) settings: BTreeMap<String, Setting>,
}

/// A row of `pg_settings`.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// In the setting's own unit, as a new session of ours would have it.
    pub(crate) value: String,
    /// With its unit, as `SHOW` gives it.
    pub(crate) shown: String,
}

impl Server {
    /// The major version, such as 15.
    pub(crate) fn major(&self) -> u32 {
        u32::try_from(self.version_number / 10_000).unwrap_or(0)
    }

    /// A setting's value in its own unit; none where this version has no such setting.
    pub(crate) fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(|setting| setting.value.as_str())
    }

    /// A setting's value as a number in its own unit; 0 where this version has no such setting.
    pub(crate) fn number(&self, name: &str) -> i64 {
        self.setting(name).and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    /// A setting's value with its unit.
    pub(crate) fn shown(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", |setting| setting.shown.as_str())
    }

    pub(crate) fn summary(&self, address: String) -> ServerSummary {
        let mut collation = format!("{} {}", self.provider, self.collation);
        if let Some(version) = &self.collation_version {
            collation = format!("{collation} {version}");
        }
        ServerSummary {
            address,
            version: self.version.clone(),
            version_number: self.version_number,
            system_identifier: self.system_identifier.clone(),
            database: self.database.clone(),
            role: self.role.clone(),
            encoding: self.encoding.clone(),
            collation,
            bytes: self.bytes,
        }
    }
}

/// Makes a session of ours one that cannot change anything and does not wait for ever behind a lock.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn make_read_only(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "SET default_transaction_read_only = on; SET lock_timeout = '10s'; SET statement_timeout = '5min'; \
             SET search_path = pg_catalog; SET client_min_messages = error",
        )
        .await
        .context(|| "making the session of the check read-only".into())
}

/// Reads what a server is, with its settings.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn read(client: &Client) -> Result<Server> {
    let doing = || "reading the server's version, role and database".to_string();
    // Columns of pg_database that not every version has are reached through JSON.
    let row = client
        .query_typed_one(
            "SELECT current_setting('server_version_num')::int4, current_setting('server_version'), \
                    pg_postmaster_start_time()::text, d.datname, pg_database_size(d.oid), \
                    pg_encoding_to_char(d.encoding), \
                    CASE to_jsonb(d)->>'datlocprovider' WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END, \
                    coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale', d.datcollate), d.datctype, \
                    pg_is_in_recovery(), r.rolname, r.rolsuper, \
                    r.rolsuper OR r.rolreplication OR EXISTS (SELECT FROM pg_roles m \
                       WHERE m.rolname = 'rds_replication' AND pg_has_role(m.oid, 'USAGE')), \
                    r.rolsuper OR r.rolbypassrls, has_database_privilege(d.oid, 'CREATE'), \
                    r.rolsuper OR EXISTS (SELECT FROM pg_roles m \
                       WHERE m.rolname = 'pg_read_all_stats' AND pg_has_role(m.oid, 'USAGE')), \
                    least( \
                      current_setting('max_connections')::int8 \
                        - CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int8 \
                             + coalesce(current_setting('reserved_connections', true), '0')::int8 END \
                        - (SELECT coalesce(sum(s.numbackends), 0) FROM pg_stat_database s)::int8, \
                      CASE WHEN d.datconnlimit < 0 OR r.rolsuper THEN 2147483647 ELSE d.datconnlimit \
                        - (SELECT s.numbackends FROM pg_stat_database s WHERE s.datid = d.oid) END::int8, \
                      CASE WHEN r.rolconnlimit < 0 OR r.rolsuper THEN 2147483647 ELSE r.rolconnlimit \
                        - (SELECT count(*) FROM pg_stat_activity a WHERE a.usesysid = r.oid) END::int8) \
             FROM pg_database d, pg_roles r WHERE d.datname = current_database() AND r.rolname = current_user",
            &[],
        )
        .await
        .context(doing)?;
    let mut server = Server {
        version_number: row.get(0),
        version: row.get(1),
        system_identifier: None,
        started: row.get(2),
        database: row.get(3),
        bytes: row.get(4),
        encoding: row.get(5),
        provider: row.get(6),
        collation: row.get(7),
        ctype: row.get(8),
        collation_version: None,
        in_recovery: row.get(9),
        role: row.get(10),
        superuser: row.get(11),
        replication: row.get(12),
        bypass_rls: row.get(13),
        database_create: row.get(14),
        sees_sessions: row.get(15),
        free_connections: row.get(16),
        settings: BTreeMap::new(),
    };
    // Below 15 there is none.
    let collation_version =
        if server.major() >= 15 { "pg_database_collation_actual_version(oid)" } else { "NULL::text" };
    let collation_version = format!("SELECT {collation_version} FROM pg_database WHERE datname = current_database()");
    let (identifier, collation_version, rows) = tokio::join!(
        client.query_typed_one("SELECT system_identifier::text FROM pg_control_system()", &[]),
        client.query_typed_one(&collation_version, &[]),
        // reset_val: this session has just set some of them for itself.
        client.query_typed(
            "SELECT name, coalesce(reset_val, setting, ''), coalesce(current_setting(name, true), '') FROM pg_settings",
            &[],
        ),
    );
    // Some managed services keep this function to themselves; without it, the check for one server on both sides is
    // left to the start time alone.
    server.system_identifier = identifier.ok().and_then(|row| row.get(0));
    server.collation_version = collation_version.context(doing)?.get(0);
    let rows = rows.context(|| "reading the server's settings".into())?;
    server.settings = rows.iter().map(|row| (row.get(0), Setting { value: row.get(1), shown: row.get(2) })).collect();
    Ok(server)
}

/// Findings about a server that hold for whichever side it is on.
pub(crate) fn findings(server: &Server, side: Side) -> Vec<Finding> {
    let mut findings = Vec::new();
    let finding = |severity, code, object: String, message: String| Finding::new(severity, side, code, object, message);
    let version = || format!("PostgreSQL {}", server.version);
    let supported = supported(side);
    if server.major() < *supported.start() {
        let why = match side {
            Side::Source => "Older ones cannot stream their changes by pgoutput.",
            _ => "What pg_dump writes today an older one may not understand, and nobody mends its faults any more.",
        };
        let message = format!("walferry needs PostgreSQL {} or newer here. {why}", supported.start());
        findings.push(finding(Severity::Blocker, "server-version", version(), message));
    } else if server.major() > *supported.end() {
        let message = format!(
            "This version is newer than PostgreSQL {}, the newest that walferry was written for; a newer walferry may know it.",
            supported.end()
        );
        findings.push(finding(Severity::Blocker, "server-version", version(), message));
    } else if side == Side::Source && server.major() < 11 {
        let message = "TRUNCATE is in the stream only from PostgreSQL 11 on. After one, or a VACUUM FULL or CLUSTER, the cutover names \
                       the table and refuses, until it was copied again.";
        findings.push(finding(Severity::Warning, "no-truncate", version(), message.into()));
    }
    if server.in_recovery {
        let why = match side {
            Side::Source => "A migration writes to its source: publications, markers, the fence of the cutover.",
            _ => "Nothing can be written to it.",
        };
        let fix = match side {
            Side::Source => {
                "name its primary with --source, and this one with --copy-from (rows are read here), --stream-from (changes come from here), or both"
            }
            _ => "SELECT pg_promote();  -- only if it is meant to be a primary; otherwise name the primary",
        };
        findings.push(
            finding(
                Severity::Blocker,
                "in-recovery",
                server.database.clone(),
                format!("The server is a standby. {why}"),
            )
            .fix(fix),
        );
    }
    findings
}

/// What is missing when a server has too few connections left for us.
///
/// Fewer than `least` is a blocker; fewer than `wanted` a warning.
pub(crate) fn connections(server: &Server, side: Side, least: i64, wanted: i64, what: &str) -> Option<Finding> {
    let severity = match server.free_connections {
        free if free < least => Severity::Blocker,
        free if free < wanted => Severity::Warning,
        _ => return None,
    };
    let message = format!(
        "{} can open {} more connections here, and the migration takes {wanted} ({what}). max_connections is {}; the \
         limits of the role and the database count too.",
        sql::identifier(&server.role),
        server.free_connections.max(0),
        server.number("max_connections"),
    );
    let (role, database) = (sql::identifier(&server.role), sql::identifier(&server.database));
    let more = server.number("max_connections") + wanted - server.free_connections.min(wanted);
    let fix = format!(
        "ALTER SYSTEM SET max_connections = {more};  -- then restart the server; or give smaller --copy-jobs, --index-jobs, --apply-workers\n\
         ALTER ROLE {role} CONNECTION LIMIT -1;\n\
         ALTER DATABASE {database} CONNECTION LIMIT -1;"
    );
    Some(Finding::new(severity, side, "connections", "max_connections", message).fix(fix))
}

/// Detects a pooler between us and the server: slots, snapshots, locks and settings live in a session, and a pooler
/// that hands one server session to many clients breaks them all.
///
/// `first` and `second` are two open connections. A pooler gives the server session that the first has just left to
/// the second; a server never has two sessions with one process id.
///
/// # Errors
/// Whatever the server says; a pooler may also fail the statements themselves.
pub(crate) async fn is_pooled(first: &Client, second: &Client) -> Result<bool> {
    let before = backend(first, BACKEND).await?;
    // An open transaction holds the server session, so that the first has to be given another one.
    let other = backend(second, "BEGIN READ ONLY; SELECT pg_backend_pid()").await?;
    let after = backend(first, BACKEND).await?;
    second.batch_execute("ROLLBACK").await.context(|| "looking for a connection pooler".into())?;
    Ok(before == other || before != after)
}

const BACKEND: &str = "SELECT pg_backend_pid()";

async fn backend(client: &Client, statements: &str) -> Result<String> {
    // The simple protocol: prepared statements are the first thing that fails behind a pooler.
    let messages = client.simple_query(statements).await.context(|| "looking for a connection pooler".into())?;
    let pid = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_string),
        _ => None,
    });
    pid.ok_or_else(|| Error::new(ErrorKind::Other, "pg_backend_pid() gave no row"))
}

/// The finding for a pooler.
pub(crate) fn pooler(side: Side, address: String) -> Finding {
    let message = "A connection pooler stands between us and the server: two connections of ours shared one server \
                   session, or another process of the server answers than the one that the login named. Snapshots, locks and \
                   settings belong to a session, and would be lost or mixed up.";
    Finding::new(Severity::Blocker, side, "pooler", address, message)
        .fix("give the host and port of the PostgreSQL server itself, not of the pooler")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};

    pub(crate) fn server() -> Server {
        Server {
            version_number: 150_018,
            version: "15.18".into(),
            system_identifier: Some("1".into()),
            started: "2026-01-01 00:00:00+00".into(),
            database: "shop".into(),
            bytes: 0,
            encoding: "UTF8".into(),
            provider: "libc".into(),
            collation: "en_US.UTF-8".into(),
            ctype: "en_US.UTF-8".into(),
            collation_version: Some("2.36".into()),
            in_recovery: false,
            role: "app".into(),
            superuser: false,
            replication: true,
            bypass_rls: false,
            database_create: true,
            sees_sessions: true,
            free_connections: 50,
            settings: BTreeMap::from([(
                "max_connections".to_string(),
                Setting { value: "100".into(), shown: "100".into() },
            )]),
        }
    }

    #[test]
    fn versions_outside_the_tested_ones_are_named() {
        let severity = |number, side| {
            let mut server = server();
            server.version_number = number;
            findings(&server, side).first().map(|finding| (finding.code, finding.severity))
        };
        let refused = Some(("server-version", Severity::Blocker));
        assert_eq!(severity(90_624, Side::Source), refused);
        assert_eq!(severity(120_022, Side::Target), refused);
        assert_eq!(severity(190_000, Side::Source), refused);
        assert_eq!(severity(190_000, Side::Target), refused);
        for number in [110_022, 130_023, 180_001] {
            assert_eq!(severity(number, Side::Source), None);
        }
        for number in [130_023, 180_001] {
            assert_eq!(severity(number, Side::Target), None);
        }
        assert_eq!(severity(100_023, Side::Source), Some(("no-truncate", Severity::Warning)));
    }

    #[test]
    fn a_standby_blocks_on_either_side() {
        let mut standby = server();
        standby.in_recovery = true;
        for side in [Side::Source, Side::Target] {
            assert_eq!(findings(&standby, side)[0].code, "in-recovery");
            assert_eq!(findings(&standby, side)[0].severity, Severity::Blocker);
        }
    }

    #[test]
    fn too_few_connections_block_and_few_warn() {
        let severity = |least, wanted| connections(&server(), Side::Target, least, wanted, "").map(|f| f.severity);
        assert_eq!(severity(51, 60), Some(Severity::Blocker));
        assert_eq!(severity(50, 51), Some(Severity::Warning));
        assert_eq!(severity(50, 50), None);
        let fix = connections(&server(), Side::Target, 51, 60, "").and_then(|finding| finding.fix).unwrap();
        assert!(fix.starts_with("ALTER SYSTEM SET max_connections = 110;"), "{fix}");
    }

    #[tokio::test]
    async fn h36_two_clients_on_one_server_session_are_taken_for_a_pooler() {
        let programs = ServerPrograms::find(None).unwrap();
        let throwaway = ThrowawayServer::start(&programs, "check-pooler", &[]).await.unwrap();
        let (first, second) =
            (throwaway.connect("postgres").await.unwrap(), throwaway.connect("postgres").await.unwrap());
        assert!(!is_pooled(&first, &second).await.unwrap());
        assert!(is_pooled(&first, &first).await.unwrap());
    }
}
