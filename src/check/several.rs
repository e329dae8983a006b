//! What a server has to have for several migrations at once (`--all-databases`): each of them finds enough for itself.

use tokio_postgres::Client;

use super::report::{Finding, Severity, Side};
use super::server;
use crate::care::connections::Jobs;
use crate::error::Result;

/// Walsenders of a migration: its stream, and what holds the snapshot of its slot. On the target, the stream of its way back.
const WALSENDERS: (i64, i64) = (2, 1);

/// What is too little for so many new migrations.
///
/// # Errors
/// Whatever a server says.
pub(crate) async fn findings(
    source: &Client,
    target: &Client,
    migrations: usize,
    jobs: Jobs,
    reverse: bool,
) -> Result<Vec<Finding>> {
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let mut findings = Vec::new();
    let of_the_way_back = if reverse { Jobs { copy: 0, index: 0, ..jobs }.target_connections() } else { 0 };
    for (client, side, connections, walsenders) in [
        (source, Side::Source, jobs.source_connections().max(of_the_way_back), WALSENDERS.0),
        (target, Side::Target, jobs.target_connections(), WALSENDERS.1),
    ] {
        let read = server::read(client).await?;
        let wanted = count(migrations * connections);
        let what = format!("for {migrations} databases, {connections} each");
        findings.extend(server::connections(&read, side, wanted, wanted, &what));
        if side == Side::Target && (!reverse || read.setting("wal_level") != Some("logical")) {
            // No way back, which each migration says by itself.
            continue;
        }
        for (setting, code, used, each) in [
            ("max_replication_slots", "replication-slots", "SELECT count(*) FROM pg_catalog.pg_replication_slots", 1),
            ("max_wal_senders", "walsenders", "SELECT count(*) FROM pg_catalog.pg_stat_replication", walsenders),
        ] {
            let (allowed, used): (i64, i64) = (read.number(setting), client.query_typed_one(used, &[]).await?.get(0));
            let needed = count(migrations) * each;
            if allowed - used >= needed {
                continue;
            }
            let message = format!(
                "{setting} is {allowed} and {used} are in use; {migrations} databases take {needed} at once, {each} each."
            );
            let fix = format!("ALTER SYSTEM SET {setting} = {};  -- then restart the server", used + needed + 2);
            // Without a way back on the target the migrations themselves go on.
            let severity = if side == Side::Source { Severity::Blocker } else { Severity::Warning };
            findings.push(Finding::new(severity, side, code, setting, message).fix(fix));
        }
    }
    Ok(findings)
}
