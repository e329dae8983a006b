//! What stands against a cutover, all of it at once: for the cutover itself, its rehearsal, and the status.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::options::{FenceMode, Options, limit};
use super::{Arming, Cutover, Sessions, fence, record, unlogged};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;
use crate::target::ledger;
use crate::verify;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, in a word or two that stay the same.
    pub name: String,
    /// Whether it stands against a cutover.
    pub weight: Weight,
    /// What was found.
    pub text: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// As it should be.
    Ok,
    /// The cutover goes through; somebody should know.
    Warning,
    /// The cutover does not begin.
    Blocks,
}

impl Finding {
    pub(super) fn ok(name: &str, text: impl Into<String>) -> Finding {
        Finding { name: name.to_owned(), weight: Weight::Ok, text: text.into(), hint: None }
    }

    fn warning(name: &str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { name: name.to_owned(), weight: Weight::Warning, text: text.into(), hint: Some(hint.into()) }
    }

    pub(super) fn blocks(name: &str, text: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { name: name.to_owned(), weight: Weight::Blocks, text: text.into(), hint: Some(hint.into()) }
    }

    /// A check that answers an error where something is wrong.
    pub(super) fn of(name: &str, fine: &str, outcome: Result<()>) -> Result<Finding> {
        match outcome {
            Ok(()) => Ok(Finding::ok(name, fine)),
            Err(error) if error.is_transient() => Err(error),
            Err(error) => {
                let hint = error.next_step().map(str::to_owned);
                Ok(Finding { name: name.to_owned(), weight: Weight::Blocks, text: error.to_string(), hint })
            }
        }
    }
}

/// The first that stands against it as an error, the others named too.
pub(super) fn nothing_stands_against_it(findings: &[Finding]) -> Result<()> {
    let blocking: Vec<&Finding> = findings.iter().filter(|finding| finding.weight == Weight::Blocks).collect();
    let Some(first) = blocking.first() else { return Ok(()) };
    let text: Vec<&str> = blocking.iter().map(|finding| finding.text.as_str()).collect();
    let hints: Vec<&str> = blocking.iter().filter_map(|finding| finding.hint.as_deref()).collect();
    let error = Error::new(ErrorKind::Aborted, text.join("; "));
    Err(error.hint(if hints.is_empty() { first.text.clone() } else { hints.join(" ") }))
}

/// What the operator should know of a cutover that went through.
pub(super) fn warnings(findings: &[Finding]) -> Vec<String> {
    findings.iter().filter(|finding| finding.weight == Weight::Warning).map(|finding| finding.text.clone()).collect()
}

/// What to look for when something was written behind the fence.
pub(super) fn who_writes_all_the_same(mode: FenceMode) -> &'static str {
    match mode {
        FenceMode::None => "The writers were not stopped: stop them, or let --fence lock hold them.",
        _ => "Somebody wrote without waiting for the fence; look for sessions with special rights.",
    }
}

impl Cutover<'_> {
    /// Everything that is looked at before anything is touched.
    pub(super) async fn preconditions(&self, sessions: &Sessions, options: &Options) -> Result<Vec<Finding>> {
        let Sessions { source, target, inspector, before, .. } = sessions;
        let migration = ledger::load(target).await?;
        let follows = migration.is_some_and(|migration| migration.phase == ledger::Phase::Following);
        let mut findings = vec![if follows {
            Finding::ok("phase", "the migration follows: copy, indexes and foreign keys are complete")
        } else {
            Finding::blocks("phase", "the migration does not follow yet", "`walferry status` says what it waits for.")
        }];
        findings.push(if self.blockers.is_empty() {
            Finding::ok("lag", "the target is close behind")
        } else {
            let text = format!("the migration is not ready: {}", self.blockers.join("; "));
            Finding::blocks("lag", text, "`walferry status` shows how it goes.")
        });
        findings.push(target_takes_writes(target).await?);
        findings.push(Finding::of(
            "catalog",
            "the source's tables, columns, indexes and functions are those that were migrated",
            // By the session that looks again while applications wait: the server then has it all at hand for that session.
            self.same_catalog(inspector, before, options).await,
        )?);
        if options.fence != FenceMode::Tables {
            findings.push(Finding::of(
                "prepared transactions",
                "there are none on the source",
                self.no_prepared_transactions(source).await,
            )?);
        }
        findings.push(verification(target, options).await?);
        if let Some((_, arming)) = self.way_back(options) {
            findings.push(way_back(&arming.borrow()));
        }
        let tables = self.tables_by_name();
        findings.extend(obstacles(source, &tables, options.fence, &options.waive).await?);
        if options.fence == FenceMode::Connections {
            findings.push(Finding::of(
                "another database",
                "it can be reached, so connections to the one that is moved can be refused and allowed again",
                record::beside(self.source, self.application_name).await.map(drop),
            )?);
        }
        Ok(findings)
    }
}

/// What the last comparison of both sides came to; it stands against a cutover only where it is asked for.
async fn verification(target: &Client, options: &Options) -> Result<Finding> {
    const NAME: &str = "verification";
    if let Some(seconds) = options.require_verified_seconds {
        let required = verify::record::require(target, limit(seconds)).await;
        return Finding::of(NAME, "all rows were found equal", required);
    }
    Ok(match verify::record::last(target).await? {
        None => Finding::ok(NAME, "not asked for; `walferry verify` compares all rows while writes go on"),
        Some(last) if last.equal => Finding::ok(NAME, format!("the last comparison: {}", last.text())),
        Some(last) => Finding::warning(
            NAME,
            format!("the last comparison: {}", last.text()),
            "`walferry repair` copies what differs again, then `walferry verify` looks again.",
        ),
    })
}

/// Whether the old primary could be kept current. One that is only not ready yet is waited for.
fn way_back(arming: &Arming) -> Finding {
    const NAME: &str = "way back";
    match arming {
        Arming::Ready => Finding::ok(NAME, "its slot is on the target, and moves on"),
        Arming::Preparing(None) => Finding::ok(NAME, "its slot is being made on the target"),
        Arming::Preparing(Some(why)) => Finding::warning(
            NAME,
            format!("it is not ready: {why}"),
            "A cutover waits for it up to --timeout; --no-reverse does without.",
        ),
        Arming::Impossible(why, mend) => Finding::blocks(NAME, format!("there would be no way back: {why}"), mend),
    }
}

async fn target_takes_writes(target: &Client) -> Result<Finding> {
    let row = target
        .query_typed_one(
            "SELECT pg_catalog.pg_is_in_recovery() OR pg_catalog.current_setting('transaction_read_only')::boolean",
            &[],
        )
        .await
        .context(|| "looking whether the target takes writes".into())?;
    Ok(if row.get(0) {
        Finding::blocks(
            "target",
            "the target takes no writes",
            "It is a standby, or read-only: see which server took over.",
        )
    } else {
        Finding::ok("target", "it takes writes")
    })
}

/// What stands against a fence on the source, whatever else does. Cheap, so that the status can ask often.
pub(crate) async fn obstacles(
    source: &Client,
    tables: &[&Table],
    mode: FenceMode,
    waive: &[String],
) -> Result<Vec<Finding>> {
    if mode == FenceMode::Tables {
        // The database stays open: who may close it does not matter.
        return Ok(vec![
            rights_to_guard(source).await?,
            subscriptions(source, waive).await?,
            background_workers(source).await?,
            vacuum_against_wraparound(source, tables, mode).await?,
            long_transactions(source).await?,
        ]);
    }
    Ok(vec![
        rights(source).await?,
        roles_that_write_all_the_same(source, waive).await?,
        subscriptions(source, waive).await?,
        background_workers(source).await?,
        vacuum_against_wraparound(source, tables, mode).await?,
        long_transactions(source).await?,
        unlogged::fit(source, tables, waive).await?,
    ])
}

/// Whether we may close the database, and see and end the others' sessions.
async fn rights(source: &Client) -> Result<Finding> {
    const NAME: &str = "rights";
    let row = source
        .query_typed_one(
            "SELECT pg_catalog.pg_has_role(d.datdba, 'USAGE'), d.datname::text, current_user::text, \
                    (SELECT a.usename::text FROM pg_catalog.pg_stat_activity a WHERE a.datid = d.oid AND a.usesysid IS NOT NULL \
                         AND a.backend_type IS NULL AND a.backend_start IS NULL LIMIT 1), \
                    (SELECT r.rolsuper::text || ' ' || a.usename FROM pg_catalog.pg_stat_activity a JOIN pg_catalog.pg_roles r ON r.oid = a.usesysid \
                     CROSS JOIN (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) us \
                     WHERE a.datid = d.oid AND a.backend_type = 'client backend' AND NOT us.rolsuper \
                       AND (r.rolsuper OR NOT pg_catalog.pg_has_role(a.usesysid, 'USAGE') \
                                          AND NOT pg_catalog.pg_has_role('pg_signal_backend', 'USAGE')) ORDER BY 1 DESC LIMIT 1) \
             FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()",
            &[],
        )
        .await
        .context(|| "looking at our rights on the source".into())?;
    let (owns, database, us): (bool, &str, &str) = (row.get(0), row.get(1), row.get(2));
    let (hidden, not_ours): (Option<&str>, Option<&str>) = (row.get(3), row.get(4));
    let not_ours = not_ours.and_then(|found| found.split_once(' '));
    if !owns {
        let text = format!("the role {us} does not own the database {database}, and so cannot close it to writers");
        let (database, us) = (sql::identifier(database), sql::identifier(us));
        let fix = format!(
            "ALTER DATABASE {database} OWNER TO {us}; on the source, or make {us} a member of the role that owns it."
        );
        return Ok(Finding::blocks(NAME, text, fix));
    }
    if let Some(role) = hidden {
        let error = fence::hidden_sessions(role, us);
        return Ok(Finding::blocks(NAME, error.to_string(), error.next_step().unwrap_or_default()));
    }
    if let Some(("true", superuser)) = not_ours {
        let text = format!(
            "sessions of the superuser {superuser} are connected to the source's database, and only a superuser could end them"
        );
        return Ok(Finding::blocks(NAME, text, "Close them, or have whoever runs the server do it."));
    }
    if let Some((_, role)) = not_ours {
        let text = format!("sessions of {role} are connected to the source's database, and {us} may not end them");
        let fix = format!("GRANT pg_signal_backend TO {}; on the source.", sql::identifier(us));
        return Ok(Finding::blocks(NAME, text, fix));
    }
    Ok(Finding::ok(NAME, "the database can be closed, and the sessions that are there now ended"))
}

/// Whether we may make the function that refuses writes.
async fn rights_to_guard(source: &Client) -> Result<Finding> {
    const NAME: &str = "rights";
    let row = source
        .query_typed_one(
            "SELECT coalesce(pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace('walferry')::oid, 'CREATE'), \
                             pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')), \
                    pg_catalog.current_database()::text, current_user::text",
            &[],
        )
        .await
        .context(|| "looking at our rights on the source".into())?;
    let (may, database, us): (bool, &str, &str) = (row.get(0), row.get(1), row.get(2));
    if may {
        return Ok(Finding::ok(NAME, "the tables can be closed to writers by triggers"));
    }
    let text = format!("the role {us} may not make the schema walferry, and so cannot close the tables to writers");
    let fix =
        format!("GRANT CREATE ON DATABASE {} TO {}; on the source.", sql::identifier(database), sql::identifier(us));
    Ok(Finding::blocks(NAME, text, fix))
}

/// H30: to a role with a setting of its own the database's is nothing.
async fn roles_that_write_all_the_same(source: &Client, waive: &[String]) -> Result<Finding> {
    const NAME: &str = "role settings";
    let rows = source
        .query_typed(
            "SELECT DISTINCT r.rolname::text, d.datname::text FROM pg_catalog.pg_db_role_setting s \
             JOIN pg_catalog.pg_roles r ON r.oid = s.setrole LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase, \
                  unnest(s.setconfig) setting \
             WHERE (s.setdatabase = 0 OR d.datname = pg_catalog.current_database()) AND r.rolcanlogin \
               AND setting LIKE 'default_transaction_read_only=%' AND NOT substr(setting, 31)::boolean ORDER BY 1, 2",
            &[],
        )
        .await
        .context(|| "looking for roles with settings of their own".into())?;
    let waived = |role: &str| waive.iter().any(|waived| *waived == format!("role {role}"));
    let named: Vec<(&str, Option<&str>)> =
        rows.iter().map(|row| (row.get(0), row.get(1))).filter(|(role, _): &(&str, _)| !waived(role)).collect();
    if named.is_empty() {
        return Ok(Finding::ok(NAME, "no role is exempt from the database being read-only"));
    }
    let names: Vec<String> = named.iter().map(|(role, _)| format!("role {role}")).collect();
    let text = format!(
        "{} may write though the database is read-only: default_transaction_read_only is off for it",
        names.join(", ")
    );
    let fixes: Vec<String> = named
        .iter()
        .map(|(role, database)| {
            let within = database.map(|name| format!(" IN DATABASE {}", sql::identifier(name))).unwrap_or_default();
            format!("ALTER ROLE {}{within} RESET default_transaction_read_only;", sql::identifier(role))
        })
        .collect();
    let hint = format!("{} on the source; or, when it does not write, --waive '{}'.", fixes.join(" "), names[0]);
    Ok(Finding::blocks(NAME, text, hint))
}

/// H30: their workers are no sessions of applications, and nobody ends them.
async fn subscriptions(source: &Client, waive: &[String]) -> Result<Finding> {
    const NAME: &str = "subscriptions";
    let rows = source
        .query_typed(
            "SELECT subname::text FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid \
             WHERE subenabled AND d.datname = pg_catalog.current_database() ORDER BY 1",
            &[],
        )
        .await
        .context(|| "looking for subscriptions of the source".into())?;
    let names: Vec<String> = rows
        .iter()
        .map(|row| format!("subscription {}", row.get::<_, &str>(0)))
        .filter(|name| !waive.contains(name))
        .collect();
    if names.is_empty() {
        return Ok(Finding::ok(NAME, "none writes to the source"));
    }
    let fixes: Vec<String> = rows
        .iter()
        .map(|row| format!("ALTER SUBSCRIPTION {} DISABLE;", sql::identifier(row.get::<_, &str>(0))))
        .collect();
    let text = format!("{} writes to the source, and would go on when the target has taken over", names.join(", "));
    let hint =
        format!("{} on the source; or, when nothing migrated is in it, --waive '{}'.", fixes.join(" "), names[0]);
    Ok(Finding::blocks(NAME, text, hint))
}

/// H30: what an extension runs in the database.
async fn background_workers(source: &Client) -> Result<Finding> {
    const NAME: &str = "background workers";
    let rows = source
        .query_typed(
            "SELECT DISTINCT backend_type FROM pg_catalog.pg_stat_activity WHERE datname = pg_catalog.current_database() \
               AND backend_type NOT IN ('client backend', 'walsender', 'autovacuum worker', 'parallel worker') \
               AND backend_type NOT LIKE 'logical replication%' ORDER BY 1",
            &[],
        )
        .await
        .context(|| "looking for background workers of the source".into())?;
    let names: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    Ok(if names.is_empty() {
        Finding::ok(NAME, "none runs in the source's database")
    } else {
        Finding::warning(
            NAME,
            format!("background workers run in the source's database, and are not ended: {}", names.join(", ")),
            "See to it that they write nothing after the cutover.",
        )
    })
}

/// H32: it makes way for no lock, and holds it for as long as a whole table takes.
async fn vacuum_against_wraparound(source: &Client, tables: &[&Table], mode: FenceMode) -> Result<Finding> {
    const NAME: &str = "vacuum against wraparound";
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let rows = source
        .query(
            "SELECT format('%I.%I (pid %s)', n.nspname, c.relname, a.pid) FROM pg_catalog.pg_stat_activity a \
             JOIN pg_catalog.pg_locks l ON l.pid = a.pid AND l.locktype = 'relation' AND l.mode = 'ShareUpdateExclusiveLock' \
             JOIN pg_catalog.pg_class c ON c.oid = l.relation JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE a.datname = pg_catalog.current_database() AND a.backend_type = 'autovacuum worker' \
               AND a.query LIKE '%(to prevent wraparound)%' \
               AND (n.nspname, c.relname) IN (SELECT * FROM unnest($1::text[], $2::text[])) ORDER BY 1",
            &[&schemas, &names],
        )
        .await
        .context(|| "looking for vacuums of the source".into())?;
    let working: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    if working.is_empty() || !mode.locks() {
        return Ok(Finding::ok(NAME, "none holds a table that is to be locked"));
    }
    let text = format!("an autovacuum against wraparound works on {}, and makes way for no lock", working.join(", "));
    Ok(Finding::blocks(
        NAME,
        text,
        "Wait until it is done (pg_stat_progress_vacuum shows how far it is), or choose another --fence.",
    ))
}

/// Whoever is in the middle of something when the fence comes makes everybody else wait for its end.
async fn long_transactions(source: &Client) -> Result<Finding> {
    const NAME: &str = "long transactions";
    let rows = source
        .query_typed(
            "SELECT format('pid %s (%s, %s, open for %s s)', pid, usename, coalesce(nullif(application_name, ''), 'unnamed'), \
                           extract(epoch FROM now() - xact_start)::int) \
             FROM pg_catalog.pg_stat_activity WHERE datname = pg_catalog.current_database() AND backend_type = 'client backend' \
               AND xact_start < now() - interval '2 s' AND application_name NOT LIKE 'walferry%' ORDER BY xact_start LIMIT 5",
            &[],
        )
        .await
        .context(|| "looking for long transactions of the source".into())?;
    let named: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    Ok(if named.is_empty() {
        Finding::ok(NAME, "none is open on the source")
    } else {
        Finding::warning(
            NAME,
            format!("transactions are open on the source for longer than 2 s: {}", named.join(", ")),
            "A fence that locks waits for those that have written, and every writer with it; the other modes end them.",
        )
    })
}
