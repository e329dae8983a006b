//! What a cutover has done to the world, as the ledger has it: written down before it is done, so that whoever comes after a
//! crash can undo it, or, after the decision, do what is left.
//!
//! | column of `walferry.migration` | what it holds |
//! |---|---|
//! | `fence` | a [`Record`]: from before the fence is up until it is lifted; after the decision, for good |
//! | `cutover` | after a try that was given up: `{"given_up": `[`GivenUpTry`]`}`; after the decision: position, time, and in `pending` what is left to do ([`Pending`]) |

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::guard;
use super::hook::{self, Hook};
use super::options::{FenceMode, Hooks, limit};
use super::pgbouncer;
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::wall_clock;
use crate::sql;

/// A fence that is going up, up, or being lifted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Names the cutover, so that no other one decides on its fence.
    #[serde(default)]
    pub(super) cutover: String,
    /// The step it is at.
    #[serde(default)]
    pub(super) step: String,
    #[serde(default)]
    pub(super) fence: FenceMode,
    /// The database's own `default_transaction_read_only`, in whose place ours comes.
    #[serde(default)]
    pub(super) previous: Option<String>,
    /// When the cutover began, by the source's clock, as text.
    #[serde(default)]
    pub(super) since: Option<String>,
    #[serde(default)]
    pub(super) pgbouncer: Option<pgbouncer::Known>,
    #[serde(default)]
    pub(super) hooks: Hooks,
    /// The source is open again, and the operator's command for that may not have been run yet.
    #[serde(default)]
    pub(super) lifted: bool,
    /// Why it was given up.
    #[serde(default)]
    pub(super) reason: Option<String>,
}

/// A cutover that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUpTry {
    /// Its name.
    pub id: String,
    /// The step it had come to.
    pub step: String,
    /// Why.
    pub reason: String,
    /// When: RFC 3339, UTC.
    pub at: String,
}

/// A fence that was lifted.
pub struct Lifted {
    /// Whose it was.
    pub given_up: GivenUpTry,
    /// What the operator's command for that said, when it failed.
    pub on_abort: Option<Error>,
}

/// What is left to do after the decision. Each of it can be done again without harm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Pending {
    pub(super) cutover: String,
    pub(super) on_switch: Option<String>,
    pub(super) hook_timeout_seconds: f64,
    pub(super) pgbouncer: Option<pgbouncer::Known>,
    /// The source's database takes connections again (they are read-only by default).
    pub(super) connections: bool,
}

impl Record {
    /// Writes it down, durably. Nothing may have been done yet.
    pub(super) async fn write(&self, target: &Client) -> Result<()> {
        let json = to_json(self)?;
        let statement = format!(
            "BEGIN; SET LOCAL synchronous_commit = on; UPDATE walferry.migration SET fence = {}; COMMIT",
            sql::literal(&json)
        );
        target.batch_execute(&statement).await.context(|| "writing the fence into the ledger".into())
    }

    /// Statements that begin the deciding transaction: they fail when this fence has been lifted meanwhile, and whoever wants to
    /// lift it waits for the transaction's end. So a decision that is still on its way when everybody thinks it lost does no harm.
    pub(super) fn still_up(&self) -> String {
        format!(
            "DO $decide$ BEGIN PERFORM FROM walferry.migration WHERE phase = 'following' AND fence->>'cutover' = {} \
                 AND NOT coalesce((fence->>'lifted')::boolean, false) FOR UPDATE; \
             IF NOT FOUND THEN RAISE EXCEPTION 'the fence of this cutover was lifted'; END IF; END $decide$;",
            sql::literal(&self.cutover)
        )
    }

    /// What is left after the decision, if anything is.
    pub(super) fn pending(&self) -> Option<Pending> {
        let connections = self.fence == FenceMode::Connections;
        (connections || self.hooks.on_switch.is_some() || self.pgbouncer.is_some()).then(|| Pending {
            cutover: self.cutover.clone(),
            on_switch: self.hooks.on_switch.clone(),
            hook_timeout_seconds: self.hooks.timeout_seconds,
            pgbouncer: self.pgbouncer.clone(),
            connections,
        })
    }

    /// What an operator runs when this could not be undone.
    pub(super) fn by_hand(&self, database: &str) -> String {
        let mut text = String::from("Run on the source");
        if self.fence == FenceMode::Connections {
            text.push_str(&format!(", in another database such as postgres: {};", allow_connections(database, true)));
            text.push_str(" then");
        }
        text.push_str(&format!(": {};", self.reopen(database)));
        if let Some(pgbouncer) = &self.pgbouncer {
            text.push_str(&format!(" and in PgBouncer's admin console: {};", pgbouncer.resume()));
        }
        text
    }

    /// What was undone, for people.
    fn given_up(&self) -> GivenUpTry {
        let ended = "walferry ended in the middle of it".to_owned();
        GivenUpTry {
            id: self.cutover.clone(),
            step: if self.step.is_empty() { "close".to_owned() } else { self.step.clone() },
            reason: self.reason.clone().unwrap_or(ended),
            at: wall_clock::now_rfc3339(),
        }
    }
}

/// Notes the step that a cutover has come to. Not durably: it says what happened, and nothing depends on it.
pub(super) async fn note(target: &Client, cutover: &str, step: &str) -> Result<()> {
    let statement = format!(
        "BEGIN; SET LOCAL synchronous_commit = off; UPDATE walferry.migration SET fence = jsonb_set(fence, '{{step}}', to_jsonb({}::text)) \
         WHERE fence->>'cutover' = {}; COMMIT",
        sql::literal(step),
        sql::literal(cutover)
    );
    target.batch_execute(&statement).await.context(|| "noting the cutover's step in the ledger".into())
}

/// Lets others connect to a database, or nobody. To be run in another one: PostgreSQL refuses it for the database that it is run in.
pub(super) fn allow_connections(database: &str, allowed: bool) -> String {
    format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {allowed}", sql::identifier(database))
}

/// A dead standby must not hold up what a fence is made and unmade with (H34).
pub(super) const LOCAL_COMMITS: &str = "SET synchronous_commit = local";

/// A session in another database of the same server than the one that is moved.
pub(super) async fn beside(source: &ConnectionSpec, application_name: &str) -> Result<Client> {
    let mut first = None;
    for database in ["postgres", "template1"].into_iter().filter(|database| *database != source.database()) {
        match source.with_database(database).connect(application_name).await {
            Ok(client) => {
                client.batch_execute(LOCAL_COMMITS).await?;
                return Ok(client);
            }
            Err(error) => drop(first.get_or_insert(error)),
        }
    }
    let error = first.unwrap_or_else(|| Error::new(ErrorKind::Blocked, "there is no other database"));
    Err(error.context("connecting to another database than the one that is moved (postgres or template1)"))
}

/// Whether the ledger has a fence that was not decided on.
///
/// # Errors
/// Whatever the target says.
pub async fn is_fence_left_over(target: &Client) -> Result<bool> {
    let row = target
        .query_typed_one(
            "SELECT EXISTS (SELECT FROM walferry.migration WHERE fence IS NOT NULL AND phase <> 'cut_over')",
            &[],
        )
        .await
        .context(|| "looking for a fence in the ledger".into())?;
    Ok(row.get(0))
}

/// Whether the source may refuse every connection because of a cutover that was cut off.
///
/// # Errors
/// Whatever the target says.
pub(crate) async fn may_refuse_connections(target: &Client) -> Result<bool> {
    let row = target
        .query_typed_one(
            "SELECT EXISTS (SELECT FROM walferry.migration WHERE phase <> 'cut_over' AND fence->>'fence' = 'connections' \
                 OR (cutover->'pending'->>'connections')::boolean)",
            &[],
        )
        .await
        .context(|| "looking for a fence in the ledger".into())?;
    Ok(row.get(0))
}

/// The cutover that was given up last, if the last one was.
///
/// # Errors
/// Whatever the target says.
pub(crate) async fn last_given_up(target: &Client) -> Result<Option<GivenUpTry>> {
    let row = target
        .query_typed_opt("SELECT (cutover->'given_up')::text FROM walferry.migration WHERE phase <> 'cut_over'", &[])
        .await?;
    let text: Option<String> = row.and_then(|row| row.get(0));
    // Of a newer walferry, perhaps: it is only shown.
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// How the source is reached to undo what was done to it.
#[derive(Clone, Copy)]
pub(super) enum Reach<'a> {
    /// By a session that is there already.
    AtHand(&'a Client),
    /// By a new one.
    Anew,
}

/// Opens the source again when a walferry died between closing it and deciding; runs what the operator wanted to be run then.
/// After the decision it stays closed.
///
/// The ledger's row is locked meanwhile: a session of the dead walferry that is about to decide comes first, and then the fence
/// stays, or comes later, and then it finds its fence gone (`Record::still_up`). Never both.
///
/// # Errors
/// Whatever the servers say: then it has to be called again.
pub async fn lift_left_over_fence(
    source: &ConnectionSpec,
    target: &Client,
    target_spec: &ConnectionSpec,
    application_name: &str,
) -> Result<Option<Lifted>> {
    let Some(record) = undo(source, Reach::Anew, target, application_name).await? else { return Ok(None) };
    let around = hook::Surroundings::gather(source, target_spec).await;
    finish_lifting(target, &record, &around).await.map(Some)
}

/// The first half of it: the source is as it was before.
pub(super) async fn undo(
    source: &ConnectionSpec,
    reach: Reach<'_>,
    target: &Client,
    application_name: &str,
) -> Result<Option<Record>> {
    // A ROLLBACK first: the session may come from a decision that failed.
    target.batch_execute("ROLLBACK; BEGIN; SET LOCAL synchronous_commit = on").await?;
    // Locked whatever it says, and read again after the wait.
    target.execute_typed("SELECT FROM walferry.migration FOR UPDATE", &[]).await?;
    let row = target
        .query_typed_opt(
            "SELECT fence::text FROM walferry.migration WHERE fence IS NOT NULL AND phase <> 'cut_over'",
            &[],
        )
        .await
        .context(|| "looking for a fence in the ledger".into())?;
    let Some(row) = row else {
        target.batch_execute("ROLLBACK").await?;
        return Ok(None);
    };
    let record: Record = from_json(row.get(0))?;
    if !record.lifted {
        record.open(source, reach, application_name).await?;
        target
            .batch_execute("UPDATE walferry.migration SET fence = jsonb_set(fence, '{lifted}', 'true'); COMMIT")
            .await
            .context(|| "noting in the ledger that the fence is lifted".into())?;
    } else {
        target.batch_execute("ROLLBACK").await?;
    }
    Ok(Some(record))
}

/// The second half: the operator's command, and then nothing of it is left in the ledger but how it ended.
pub(super) async fn finish_lifting(target: &Client, record: &Record, around: &hook::Surroundings) -> Result<Lifted> {
    let on_abort = match &record.hooks.on_abort {
        Some(command) => hook::run(Hook::Abort, command, record.hooks.timeout(), &record.cutover, around).await.err(),
        None => None,
    };
    let given_up = record.given_up();
    let statement = format!(
        "UPDATE walferry.migration SET fence = NULL, cutover = jsonb_build_object('given_up', {}::jsonb) \
         WHERE fence->>'cutover' IS NOT DISTINCT FROM {} AND phase <> 'cut_over'",
        sql::literal(&to_json(&given_up)?),
        if record.cutover.is_empty() { "NULL".to_owned() } else { sql::literal(&record.cutover) }
    );
    target.batch_execute(&statement).await.context(|| "removing the fence from the ledger".into())?;
    Ok(Lifted { given_up, on_abort })
}

impl Record {
    /// Everything that was done to the source and before it, undone.
    async fn open(&self, source: &ConnectionSpec, reach: Reach<'_>, application_name: &str) -> Result<()> {
        if self.fence == FenceMode::Connections {
            let client = beside(source, application_name).await?;
            let allow = allow_connections(source.database(), true);
            client
                .batch_execute(&allow)
                .await
                .context(|| "letting others connect to the source's database again".into())?;
        }
        match reach {
            Reach::AtHand(client) => self.open_to_writers(client, source.database(), application_name).await?,
            Reach::Anew => {
                let client = source.connect(application_name).await?;
                self.open_to_writers(&client, source.database(), application_name).await?;
            }
        }
        match &self.pgbouncer {
            Some(known) => known.give_back().await,
            None => Ok(()),
        }
    }

    /// Statements that take back what closed it to writers.
    fn reopen(&self, database: &str) -> String {
        match self.fence {
            FenceMode::Tables => guard::open().trim_end_matches(';').to_owned(),
            _ => reopen_statement(database, self.previous.as_deref()),
        }
    }

    /// Opens the database to writers again, and ends the sessions that began while it was closed: a session keeps the default it
    /// began with, and a pool that reconnected behind the fence would refuse its application's writes from then on.
    async fn open_to_writers(&self, source: &Client, database: &str, application_name: &str) -> Result<()> {
        source.batch_execute(LOCAL_COMMITS).await?;
        if self.fence == FenceMode::Tables {
            end_lock_sessions(source, application_name).await?;
        }
        let now = setting(source).await?;
        source.batch_execute(&self.reopen(database)).await.context(|| "opening the source's database again".into())?;
        let Some(since) = &self.since else { return Ok(()) };
        if now == self.previous || self.fence == FenceMode::Tables {
            // It had not been closed yet.
            return Ok(());
        }
        end_sessions_since(source, since, application_name).await
    }
}

/// Ends what of ours holds locks of a fence, and waits until it is gone: its commit may still be on its way, and would raise the guard
/// after it was taken back.
async fn end_lock_sessions(source: &Client, application_name: &str) -> Result<()> {
    loop {
        let left = source
            .query(
                "SELECT DISTINCT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a \
                 JOIN pg_catalog.pg_locks l ON l.pid = a.pid AND l.locktype = 'relation' AND l.mode = 'ShareRowExclusiveLock' \
                 WHERE a.application_name = $1 AND a.pid <> pg_catalog.pg_backend_pid()",
                &[&application_name],
            )
            .await
            .context(|| "ending the session that locks the source's tables".into())?;
        if left.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How a server was closed to writers by a cutover that went through: what opens it again when it takes over.
#[derive(Clone, Debug, PartialEq)]
pub struct Closed {
    record: Box<Record>,
}

impl Closed {
    /// Reads it from the ledger of that cutover; `None` where there was no fence.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn load(ledger: &Client) -> Result<Option<Closed>> {
        let row = ledger
            .query_typed_opt("SELECT fence::text FROM walferry.migration WHERE fence IS NOT NULL", &[])
            .await
            .context(|| "reading from the ledger how the source was closed".into())?;
        let record = row.map(|row| from_json::<Record>(row.get(0))).transpose()?;
        Ok(record.map(|record| Closed { record: Box::new(record) }))
    }

    /// Statements that open the database again; for a transaction.
    pub(super) fn reopen(&self, database: &str) -> String {
        format!("{};", self.record.reopen(database))
    }

    /// A session keeps the default that it began with.
    pub(super) async fn end_read_only_sessions(&self, server: &Client, application_name: &str) -> Result<()> {
        match &self.record.since {
            // Whose database was not closed has nobody to end.
            Some(_) if self.record.fence == FenceMode::Tables => Ok(()),
            Some(since) => end_sessions_since(server, since, application_name).await,
            None => Ok(()),
        }
    }
}

/// Ends the sessions that began since a moment, by the server's clock.
async fn end_sessions_since(server: &Client, since: &str, application_name: &str) -> Result<()> {
    server
        .query(
            "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
             WHERE datname = pg_catalog.current_database() AND backend_type = 'client backend' \
               AND pid <> pg_catalog.pg_backend_pid() AND application_name <> $1 \
               AND backend_start >= $2::text::timestamptz",
            &[&application_name, &since],
        )
        .await
        .context(|| "ending the sessions that began behind the fence".into())?;
    Ok(())
}

/// Takes back the setting that closes a database to writers.
fn reopen_statement(database: &str, previous: Option<&str>) -> String {
    let database = sql::identifier(database);
    match previous {
        Some(value) => format!("ALTER DATABASE {database} SET default_transaction_read_only = {}", sql::literal(value)),
        None => format!("ALTER DATABASE {database} RESET default_transaction_read_only"),
    }
}

/// Whether a server's database is read-only by default, or its tables refuse writes, as a fence makes it.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn is_closed_to_writers(server: &Client) -> Result<bool> {
    Ok(setting(server).await?.is_some_and(|setting| setting == "on") || guard::is_up(server).await?)
}

/// The database's own `default_transaction_read_only`.
pub(super) async fn setting(source: &Client) -> Result<Option<String>> {
    let row = source
        .query_typed_opt(
            "SELECT substr(setting, 31) FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase, \
                    unnest(s.setconfig) setting \
             WHERE s.setrole = 0 AND d.datname = pg_catalog.current_database() AND setting LIKE 'default_transaction_read_only=%'",
            &[],
        )
        .await
        .context(|| "reading the database's settings".into())?;
    Ok(row.map(|row| row.get(0)))
}

/// Opens the source again for `clean`, whether the cutover went through or not; answers whether there was a fence.
pub(crate) async fn open_for_good(source: &ConnectionSpec, target: &Client) -> Result<bool> {
    let row = target.query_typed_opt("SELECT fence::text FROM walferry.migration WHERE fence IS NOT NULL", &[]).await?;
    let Some(row) = row else { return Ok(false) };
    let record: Record = from_json(row.get(0))?;
    record.open(source, Reach::Anew, "walferry").await?;
    Ok(true)
}

/// Does what a walferry that died after the decision had left to do. Answers what went wrong, for the operator.
///
/// # Errors
/// Whatever the target says.
pub async fn finish_pending(
    source: &ConnectionSpec,
    target: &Client,
    target_spec: &ConnectionSpec,
) -> Result<Vec<String>> {
    let row = target
        .query_typed_opt(
            "SELECT (cutover->'pending')::text FROM walferry.migration WHERE phase = 'cut_over' AND cutover ? 'pending'",
            &[],
        )
        .await
        .context(|| "looking for what a cutover left to do".into())?;
    let Some(row) = row else { return Ok(Vec::new()) };
    if is_closed_to_writers(target).await? {
        // It has been left in its turn, by a switchback: nobody is to be sent there.
        return Ok(Vec::new());
    }
    let pending: Pending = from_json(row.get(0))?;
    let around = hook::Surroundings::gather(source, target_spec).await;
    let mut problems = Vec::new();
    let mut switched = true;
    if let Err(error) = pending.run_hook(&around).await {
        problems.push(pending.hook_failed(&error));
        switched = false;
    }
    if let Err(error) = pending.switch_pooler(target_spec, switched).await {
        problems.push(error.to_string());
        switched = false;
    }
    if let Err(error) = pending.let_in(source).await {
        problems.push(error.to_string());
        switched = false;
    }
    pending.settle(target, switched).await?;
    Ok(problems)
}

impl Pending {
    pub(super) async fn run_hook(&self, around: &hook::Surroundings) -> Result<()> {
        match &self.on_switch {
            Some(command) => {
                hook::run(Hook::Switch, command, limit(self.hook_timeout_seconds), &self.cutover, around).await
            }
            None => Ok(()),
        }
    }

    pub(super) fn hook_failed(&self, error: &Error) -> String {
        let command = self.on_switch.as_deref().unwrap_or_default();
        format!(
            "the target is the primary, but the command that tells the applications did not succeed ({error}). Do by hand what it \
             was to do: {command}"
        )
    }

    /// Points PgBouncer at the target and lets it go on. Not where that was the command's task and it failed.
    pub(super) async fn switch_pooler(&self, target: &ConnectionSpec, hook_succeeded: bool) -> Result<()> {
        let Some(known) = &self.pgbouncer else { return Ok(()) };
        let by_hand = |error: &Error| {
            Error::new(
                ErrorKind::Other,
                format!(
                    "PgBouncer still holds its clients ({error}). Point its database at {}, then in its admin console: RELOAD; {};",
                    target.describe(),
                    known.resume()
                ),
            )
        };
        if !hook_succeeded && !known.has_include() {
            return Err(by_hand(&Error::new(ErrorKind::Other, "the command that points it at the target failed")));
        }
        known.switch(target).await.map_err(|error| by_hand(&error))
    }

    /// Lets others connect again: they find the database read-only by default.
    pub(super) async fn let_in(&self, source: &ConnectionSpec) -> Result<()> {
        if !self.connections {
            return Ok(());
        }
        let allow = allow_connections(source.database(), true);
        let allowed = async { Ok(beside(source, "walferry").await?.batch_execute(&allow).await?) };
        allowed.await.map_err(|error: Error| {
            error.context(format!("the old database still refuses connections; run in another database: {allow}"))
        })
    }

    /// Nothing is left to do; or, where something may be, a later start tries again. A command that failed has been run, and is not
    /// run again on its own account.
    pub(super) async fn settle(&self, target: &Client, done: bool) -> Result<()> {
        if !done && (self.pgbouncer.is_some() || self.connections) {
            return Ok(());
        }
        target
            .batch_execute("UPDATE walferry.migration SET cutover = cutover - 'pending'")
            .await
            .context(|| "noting in the ledger that nothing of the cutover is left to do".into())
    }
}

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))
}

fn from_json<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::new(ErrorKind::Other, format!("reading the ledger: {error}")))
}

/// How long undoing may take before it is tried in another way.
pub(super) const UNDO_PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h18_the_fence_of_an_older_walferry_is_read() {
        let record: Record = from_json(r#"{"previous": null, "since": "2026-01-01", "cutover": "7-7"}"#).unwrap();
        assert_eq!((record.cutover.as_str(), record.fence, record.lifted), ("7-7", FenceMode::Lock, false));
        assert_eq!(record.since.as_deref(), Some("2026-01-01"));
        assert!(record.pending().is_none());
    }

    #[test]
    fn what_to_run_by_hand_names_everything_that_was_done() {
        let record = Record { fence: FenceMode::Connections, previous: Some("off".into()), ..Record::default() };
        let text = record.by_hand("sh\"op");
        assert!(text.contains("ALTER DATABASE \"sh\"\"op\" WITH ALLOW_CONNECTIONS true"), "{text}");
        assert!(text.contains("SET default_transaction_read_only = 'off'"), "{text}");
    }
}
