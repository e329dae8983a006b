//! Standbys of the source that are to do the reading: whether they are that, and can.

use tokio_postgres::Client;

use super::Inputs;
use super::report::{Finding, Severity, Side, size};
use super::server::{self, Server};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Result};
use crate::source::replication::{IdentifySystem, ReplicationSession};
use crate::source::version::Version;
use crate::sql;

/// The first version that decodes on a standby.
const DECODES_FROM: i32 = 16;
/// What a standby may be behind by without being named.
const LAG_MAX: i64 = 64 << 20;

/// What a standby is to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Copy,
    Stream,
}

impl Work {
    fn option(self) -> &'static str {
        match self {
            Work::Copy => "--copy-from",
            Work::Stream => "--stream-from",
        }
    }
}

/// Looks at each standby that was named.
///
/// # Errors
/// A query of the check itself failed on the source.
pub(crate) async fn findings(inputs: &Inputs<'_>, primary: &Client, server: &Server) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (work, spec) in [(Work::Copy, &inputs.standbys.copy), (Work::Stream, &inputs.standbys.stream)] {
        let Some(spec) = spec else { continue };
        let looked = look(inputs, primary, work, spec, &mut findings).await;
        if let Err(error) = looked {
            let message = format!("The standby of {} cannot be looked at: {error}.", work.option());
            let mut found = Finding::new(Severity::Blocker, Side::Source, "standby", spec.describe(), message);
            found.fix = error.next_step().map(str::to_owned);
            findings.push(found);
        }
    }
    if inputs.standbys.stream.is_some() && Version(server.major()).logs_standby_snapshots() {
        findings.extend(may_log_snapshots(primary, server).await?);
    }
    Ok(findings)
}

/// Whether our role may ask for the record that a new slot on a standby waits for.
async fn may_log_snapshots(primary: &Client, server: &Server) -> Result<Option<Finding>> {
    let row = primary
        .query_typed_one("SELECT has_function_privilege('pg_catalog.pg_log_standby_snapshot()', 'EXECUTE')", &[])
        .await
        .context(|| "asking whether the role may log which transactions run".into())?;
    if row.get(0) {
        return Ok(None);
    }
    let message = "A new slot on a standby waits until the primary has logged which transactions run. The role may not ask for that, \
                   so it takes up to 15 seconds longer each time.";
    let fix = format!(
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_log_standby_snapshot() TO {};  -- in the source's database",
        sql::identifier(&server.role)
    );
    Ok(Some(
        Finding::new(Severity::Info, Side::Source, "standby-snapshot", "pg_log_standby_snapshot", message).fix(fix),
    ))
}

async fn look(
    inputs: &Inputs<'_>,
    primary: &Client,
    work: Work,
    spec: &ConnectionSpec,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let session = spec.connect("walferry check").await?;
    server::make_read_only(&session).await?;
    let found = server::read(&session).await?;
    let mut say = |severity, code, message: String, fix: &str| {
        let finding = Finding::new(severity, Side::Source, code, spec.describe(), message);
        findings.push(if fix.is_empty() { finding } else { finding.fix(fix) });
    };
    let option = work.option();
    if !found.in_recovery {
        let message = format!("What {option} names is no standby: it takes writes itself.");
        say(
            Severity::Blocker,
            "standby-promoted",
            message,
            "name a standby of --source; or, if this is the primary, give it as --source",
        );
        return Ok(());
    }
    let (here, there) = (identify(spec).await?, identify(inputs.source).await?);
    if here.system_id != there.system_id {
        let message = format!(
            "What {option} names is a standby of another server: its system identifier is {}, the source's {}.",
            here.system_id, there.system_id
        );
        say(Severity::Blocker, "standby-of-another", message, "name a physical standby of --source");
        return Ok(());
    }
    if here.timeline != there.timeline {
        let message = format!(
            "The standby of {option} is on timeline {}, and the source on {}: it does not follow the source.",
            here.timeline, there.timeline
        );
        say(
            Severity::Blocker,
            "standby-timeline",
            message,
            "rebuild the standby from the source (pg_rewind, pg_basebackup), or name another",
        );
        return Ok(());
    }
    if spec.database() != inputs.source.database() {
        let message =
            format!("{option} names the database {:?}, and --source {:?}.", spec.database(), inputs.source.database());
        say(Severity::Blocker, "standby-database", message, "name the same database in both");
    }
    if work == Work::Stream && found.major() < DECODES_FROM.cast_unsigned() {
        let message = format!(
            "Slots on a standby take PostgreSQL {DECODES_FROM}; this is {}. Rows can be read there (--copy-from).",
            found.version
        );
        say(Severity::Blocker, "standby-version", message, "leave --stream-from out");
        return Ok(());
    }
    if work == Work::Stream && found.setting("wal_level") != Some("logical") {
        let message = format!("wal_level of the standby is {}; a slot there takes logical.", found.shown("wal_level"));
        say(
            Severity::Blocker,
            "standby-wal-level",
            message,
            "ALTER SYSTEM SET wal_level = 'logical';  -- on the standby, then restart it",
        );
    }
    let delay = format!("max_standby_streaming_delay is {}", found.shown("max_standby_streaming_delay"));
    if found.setting("hot_standby_feedback") != Some("on") {
        let feedback = "ALTER SYSTEM SET hot_standby_feedback = on;\nSELECT pg_reload_conf();  -- both on the standby";
        match work {
            Work::Copy => {
                let message = format!(
                    "hot_standby_feedback of the standby is off and {delay}: when the primary removes rows that the copy still sees, \
                     the copy is cancelled, and begins again with the tables that are not complete."
                );
                say(Severity::Warning, "standby-feedback", message, feedback);
            }
            Work::Stream => {
                let message = "hot_standby_feedback of the standby is off: as soon as the primary removes rows of the catalog that the \
                               slot needs, the standby invalidates the slot, and the migration has to be taken up by a resync.";
                say(Severity::Blocker, "standby-feedback", message.into(), feedback);
            }
        }
    }
    if found.number("recovery_min_apply_delay") != 0 {
        let message = format!(
            "recovery_min_apply_delay of the standby is {}: what it shows and sends is as late, and while there are writes no snapshot \
             can be taken there.",
            found.shown("recovery_min_apply_delay")
        );
        let fix = "ALTER SYSTEM SET recovery_min_apply_delay = 0;\nSELECT pg_reload_conf();  -- both on the standby";
        say(Severity::Blocker, "standby-delay", message, fix);
    }
    if work == Work::Stream && found.setting("primary_slot_name").is_none_or(str::is_empty) {
        let message = "The standby has no primary_slot_name: what it needs of the primary's catalog is kept only while it is connected. \
                       When it reconnects after a while, it may invalidate the slot.";
        say(
            Severity::Warning,
            "standby-primary-slot",
            message.into(),
            "SELECT pg_create_physical_replication_slot('standby', true);  -- on the primary\n\
             ALTER SYSTEM SET primary_slot_name = 'standby';\nSELECT pg_reload_conf();  -- both on the standby",
        );
    }
    let lag = lag(primary, &session).await?;
    if lag.paused {
        let message = "The replay of the standby is paused: it shows nothing of what is written now.";
        say(Severity::Blocker, "standby-paused", message.into(), "SELECT pg_wal_replay_resume();  -- on the standby");
    } else if lag.bytes > LAG_MAX {
        let message = format!(
            "The standby is {} of WAL behind the source: the migration waits for that when it begins, and a stream from it is as late.",
            size(lag.bytes)
        );
        say(Severity::Warning, "standby-lag", message, "");
    }
    let (needed, what) = match work {
        Work::Copy => (inputs.jobs.copy as i64 + 3, "--copy-from: the copy jobs and three more"),
        Work::Stream => (4, "--stream-from: the stream and three more"),
    };
    if found.free_connections < needed {
        let message = format!(
            "The role can open {} more connections on the standby, and the migration takes {needed} there ({what}). max_connections is {}.",
            found.free_connections.max(0),
            found.number("max_connections")
        );
        let fix =
            "ALTER SYSTEM SET max_connections = …;  -- on the standby, then restart it; or give a smaller --copy-jobs";
        say(Severity::Blocker, "standby-connections", message, fix);
    }
    if work == Work::Stream {
        let used = session.query_typed_one("SELECT count(*) FROM pg_replication_slots", &[]).await?.get::<_, i64>(0);
        let allowed = found.number("max_replication_slots");
        if used >= allowed {
            let message = format!("max_replication_slots of the standby is {allowed}, and {used} are in use.");
            let fix =
                format!("ALTER SYSTEM SET max_replication_slots = {};  -- on the standby, then restart it", used + 3);
            say(Severity::Blocker, "standby-slots", message, &fix);
        }
    }
    Ok(())
}

async fn identify(spec: &ConnectionSpec) -> Result<IdentifySystem> {
    let mut session = ReplicationSession::connect(spec, "walferry check").await?;
    let answer = session.identify_system().await;
    session.close().await;
    answer.context(|| format!("asking {} who it is", spec.describe()))
}

struct Lag {
    bytes: i64,
    paused: bool,
}

async fn lag(primary: &Client, standby: &Client) -> Result<Lag> {
    let written = primary.query_typed_one("SELECT pg_current_wal_lsn()", &[]).await?;
    let written: tokio_postgres::types::PgLsn = written.get(0);
    let row = standby
        .query_typed_one("SELECT coalesce(pg_last_wal_replay_lsn(), '0/0'), pg_is_wal_replay_paused()", &[])
        .await?;
    let replayed: tokio_postgres::types::PgLsn = row.get(0);
    let bytes = i64::try_from(u64::from(written).saturating_sub(u64::from(replayed))).unwrap_or(i64::MAX);
    Ok(Lag { bytes, paused: row.get(1) })
}
