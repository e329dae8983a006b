//! What the decision makes is tried before the fence, in a transaction that is rolled back.
//!
//! Triggers, foreign keys and rules that wait for the cutover (H23) are those of the preparation, and identity columns and what fires
//! become again what they were then. Where somebody has changed source and target alike since, a statement may no longer fit: behind
//! the fence that would cost applications a stall at every attempt.
//!
//! The apply is at work meanwhile. So the trial waits for no lock longer than [`LOCK_TIMEOUT`], well below what the apply or a deadlock
//! takes, and sends its statements without waiting for each answer. Where it does not get its locks, it is left out: behind the fence
//! nothing is applied, and the decision gets them.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::{Cutover, Sessions};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::target::late::{AtCutover, Waiting};
use crate::target::ledger::SchemaItem;
use crate::target::schema;

/// How long one statement waits for its lock.
const LOCK_TIMEOUT: &str = "100ms";
/// How often it is tried, and the rest in between.
const ATTEMPTS: u32 = 5;
const REST: Duration = Duration::from_millis(200);
/// As many as `join_all` polls in their order, in which they are sent.
const IN_FLIGHT: usize = 30;

impl Cutover<'_> {
    /// Reads what the decision is to make, and tables with what it gives back to them; tries both. What the ledger has otherwise than
    /// the source has it now, and the target refuses, is taken from there.
    ///
    /// # Errors
    /// `Aborted` with what the target refuses, and what to do; else what a server says.
    pub(super) async fn try_decision(&self, sessions: &Sessions, tables: &[&Table]) -> Result<(AtCutover, Vec<Table>)> {
        let mut renewed = BTreeSet::new();
        loop {
            let late = AtCutover::plan(&sessions.target).await?;
            let mut restorable = schema::restorable(&sessions.target, tables).await?;
            if self.scope.data_only {
                // Its triggers and rules were made there, and are as they were.
                restorable.iter_mut().for_each(|table| table.firing.clear());
            }
            // In the order of the deciding transaction.
            let mut others = schema::restore_identity(&restorable);
            others.extend(Some(self.scope.rename_schemas()).filter(|rename| !rename.is_empty()));
            let Some(refused) = hold(&sessions.target, &late, &others).await? else { return Ok((late, restorable)) };
            let Some(waiting) = refused.waiting.clone().filter(|waiting| renewed.insert(waiting.position)) else {
                return Err(refused.into_error(true));
            };
            let Some(now) = now(&sessions.source, &waiting.item).await? else { return Err(refused.into_error(false)) };
            let renew = "UPDATE walferry.schema_item SET statement = $1 WHERE position = $2 AND NOT done";
            let written = sessions.target.execute(renew, &[&now, &waiting.position]).await;
            written.context(|| "writing into the ledger what the source has now".into())?;
            tracing::info!(
                error = %refused.error,
                "{} {} is made as the source has it now",
                waiting.item.kind,
                waiting.item.name
            );
        }
    }
}

/// What the target refuses.
struct Refused {
    waiting: Option<Waiting>,
    statement: String,
    error: Error,
}

impl Refused {
    /// The texts of triggers may hold secrets, and are not shown (I10).
    fn into_error(self, is_on_source: bool) -> Error {
        let error = self.error.with_kind(ErrorKind::Aborted);
        let Some(Waiting { position, item }) = self.waiting else {
            return error
                .context(format!("trying what the decision is to do, before the fence: {}", self.statement))
                .hint("Nothing was touched. Make the target fit this statement, then cut over again.");
        };
        let gone = if is_on_source { "" } else { "The source does not have it any more. " };
        error
            .context(format!("trying {} {}, which the decision is to make, before the fence", item.kind, item.name))
            .hint(format!(
                "Nothing was touched. {gone}Make the target fit it, then cut over again. To leave it out, on the target: UPDATE \
                 walferry.schema_item SET done = true WHERE position = {position};"
            ))
    }
}

/// Tries them: what waits for the cutover, then those that give columns, triggers and rules back what they were, then others.
async fn hold(target: &Client, late: &AtCutover, others: &[String]) -> Result<Option<Refused>> {
    let waiting = late.each().count();
    let statements: Vec<&str> = late.each().chain(others.iter().map(String::as_str)).collect();
    if statements.is_empty() {
        return Ok(None);
    }
    for attempt in 1..=ATTEMPTS {
        let tried = attempt_all(target, &statements).await;
        target.batch_execute("ROLLBACK").await.context(|| "taking back what the decision was tried with".into())?;
        let Err((place, error)) = tried else { return Ok(None) };
        if matches!(error.sqlstate(), Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED)) {
            tracing::debug!(attempt, %error, "the decision was not tried to its end");
            tokio::time::sleep(REST * attempt).await;
            continue;
        }
        if error.is_transient() {
            return Err(error);
        }
        let waiting = if place < waiting { late.item_at(place).cloned() } else { None };
        return Ok(Some(Refused { waiting, statement: statements[place].to_owned(), error }));
    }
    tracing::info!("the decision was not tried before the fence: others hold locks on the target");
    Ok(None)
}

/// All of them in a transaction that stays open; the place of the one that failed.
async fn attempt_all(target: &Client, statements: &[&str]) -> Result<(), (usize, Error)> {
    let begin = format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'");
    target.batch_execute(&begin).await.map_err(|error| (0, error.into()))?;
    for (chunk, statements) in statements.chunks(IN_FLIGHT).enumerate() {
        let answers = join_all(statements.iter().map(|statement| target.batch_execute(statement))).await;
        // Behind the first that fails, the server refuses all others.
        if let Some((place, error)) =
            answers.into_iter().enumerate().find_map(|(place, answer)| Some((place, answer.err()?)))
        {
            return Err((chunk * IN_FLIGHT + place, error.into()));
        }
    }
    Ok(())
}

/// The statement that makes an item as the source has it now; `None` where it does not.
async fn now(source: &Client, item: &SchemaItem) -> Result<Option<String>> {
    // `pg_dump` names them by table and name. The table may be called otherwise now; of a foreign key the ledger may know the other one.
    let row = source
        .query_opt(
            "WITH made(relid, place, name, statement) AS ( \
                 SELECT c.oid, format('%I.%I', n.nspname, c.relname), k.conname, \
                        format(E'ALTER TABLE %s%I.%I\n    ADD CONSTRAINT %I %s;', CASE WHEN c.relkind = 'p' THEN '' ELSE 'ONLY ' END, \
                               n.nspname, c.relname, k.conname, pg_catalog.pg_get_constraintdef(k.oid)) \
                 FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE k.contype = 'f' AND $3 = 'FK CONSTRAINT' \
                 UNION ALL \
                 SELECT c.oid, format('%I.%I', n.nspname, c.relname), t.tgname, \
                        pg_catalog.pg_get_triggerdef(t.oid) || ';' || CASE t.tgenabled WHEN 'O' THEN '' ELSE \
                        format(E'\nALTER TABLE %I.%I %s TRIGGER %I;', n.nspname, c.relname, CASE t.tgenabled WHEN 'A' THEN 'ENABLE ALWAYS' \
                               WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'DISABLE' END, t.tgname) END \
                 FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE NOT t.tgisinternal AND $3 = 'TRIGGER' \
                 UNION ALL \
                 SELECT c.oid, format('%I.%I', n.nspname, c.relname), w.rulename, \
                        pg_catalog.pg_get_ruledef(w.oid) || CASE w.ev_enabled WHEN 'O' THEN '' ELSE \
                        format(E'\nALTER TABLE %I.%I %s RULE %I;', n.nspname, c.relname, CASE w.ev_enabled WHEN 'A' THEN 'ENABLE ALWAYS' \
                               WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'DISABLE' END, w.rulename) END \
                 FROM pg_catalog.pg_rewrite w JOIN pg_catalog.pg_class c ON c.oid = w.ev_class \
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE w.rulename <> '_RETURN' AND $3 = 'RULE') \
             SELECT statement FROM made WHERE pg_catalog.right($2, length(name) + 1) = ' ' || name \
               AND (relid = $1 OR pg_catalog.strpos($4, place) > 0) \
             ORDER BY pg_catalog.strpos($4, place) > 0 DESC, relid = $1 DESC, length(name) DESC LIMIT 1",
            &[&item.relid, &item.name, &item.kind, &item.statement],
        )
        .await
        .context(|| format!("asking the source for {} {}", item.kind, item.name))?;
    Ok(row.map(|row| row.get(0)))
}
