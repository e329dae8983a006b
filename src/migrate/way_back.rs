//! The way back: after the cutover, the server that was left is kept current from the one that took over.
//!
//! It is a migration of its own whose copy is done: [`Running`] with both servers in each other's place. Its ledger stands on the old
//! server, and says that it follows from the release position on. So all that holds of following holds of it (I1 to I7): whatever
//! dies, the same command goes on where that ledger says.
//!
//! | what ends it | what is decided where |
//! |---|---|
//! | `walferry switchback` | the same cutover the other way: `phase = 'cut_over'` in the ledger on the old server |
//! | `walferry finish` | `way_back = 'finished'` in the ledger on the new one; the old server may be gone; where it answers, a switchback that was cut off is undone first |

use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tracing::Instrument;

use super::after_cutover::AfterCutover;
use super::prepare::end_sessions;
use super::{Backoff, Config, Direction, Heal, Over, Running, application_name};
use crate::apply::gate::Gate;
use crate::connection::ConnectionSpec;
use crate::control::{Answer, FinishRequest, Requests};
use crate::cutover::{self, arming::Names};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::status::{Level, Phase as ShownPhase, WayBack as ShownWayBack};
use crate::source::{catalog, ddl, slot};
use crate::sql;
use crate::target::ledger::{self, Migration, Phase, Section, WayBack};
use crate::target::schema;

/// How long the old primary may take to say whether a switchback is under way.
const OLD_PRIMARY_MAX: Duration = Duration::from_secs(15);
/// How often removing the slot is tried before that is left to `clean`.
const REMOVE_ATTEMPTS: usize = 4;

impl Config {
    /// The same with both servers in each other's place.
    pub(super) fn reversed(mut self) -> Config {
        std::mem::swap(&mut self.source, &mut self.target);
        std::mem::swap(&mut self.care.caps.source, &mut self.care.caps.target);
        self.owners = self.owners.reversed();
        self.standbys = self.standbys.reversed();
        self
    }
}

impl Running {
    /// Follows the other way, where the cutover armed that, until it is switched back or finished.
    ///
    /// `over` says whether the cutover was in this process: what was to be brought right before it is right.
    pub(super) async fn keep_the_old_primary_current(
        self,
        over: Over,
        requests: &mut Requests,
        finish: &mut mpsc::Receiver<FinishRequest>,
    ) -> Result<()> {
        let mut backoff = Backoff::new();
        let forward = loop {
            let loaded = async { self.load(&self.target().await?).await };
            match loaded.await {
                Err(error) if error.is_transient() => {
                    self.board.event(Level::Warn, format!("trying again: {error}"));
                    backoff.wait().await;
                }
                loaded => break loaded?,
            }
        };
        let is_armed = forward.way_back == Some(WayBack::Armed);
        let mut validating = JoinSet::new();
        let after = AfterCutover {
            new_primary: self.config.target.clone(),
            old_primary: is_armed.then(|| self.config.source.clone()),
            board: self.board.clone(),
        };
        validating.spawn(after.run().in_current_span());
        if !is_armed {
            // It may have been made ready, and would keep the new primary's WAL.
            self.remove_slot_of_the_way_back(&self.config.target, &forward).await;
            self.board.set_way_back(ShownWayBack::None, None);
            validating.join_next().await;
            return Ok(());
        }
        let mut config = self.config.reversed();
        if over == Over::Now {
            config.heal = Heal::Nothing;
        }
        self.board.turn_back(config.source.describe(), config.target.describe());
        self.board.show_connections(config.source.connections(), config.target.connections());
        self.board.event(
            Level::Info,
            "the way back is open: the old primary is kept current, until `walferry switchback` or `walferry finish`",
        );
        let mut back = Running {
            config,
            board: self.board,
            directory: self.directory,
            application_name: self.application_name,
            pause: self.pause,
            tune: self.tune,
            waits_for_snapshot: AtomicBool::new(false),
            direction: Direction::Back,
            gate: Gate::open(),
            ddl_key: OnceCell::new(),
        };
        loop {
            let asked = {
                let mut going = Box::pin(back.go(requests));
                let mut dropping = pin!(back.drop_old_slot(&forward));
                loop {
                    let request = tokio::select! {
                        outcome = &mut going => {
                            outcome?;
                            back.board.event(Level::Info, "switched back: the old primary is the primary again");
                            back.remove_slot_of_the_way_back(&back.config.source, &forward).await;
                            return Ok(());
                        }
                        never = &mut dropping => match never {},
                        request = finish.recv() => request,
                    };
                    let Some(request) = request else {
                        return Err(Error::new(ErrorKind::Other, "the control socket is gone"));
                    };
                    if back.board.phase() != ShownPhase::CuttingOver {
                        break request;
                    }
                    let error = Error::new(ErrorKind::Blocked, "a switchback is running").hint("Wait for its end.");
                    let _ = request.answers.send(Answer::from(&error));
                }
            };
            // Nothing of the way back is at work any more.
            back.config.heal = Heal::Nothing;
            match finish_on(&back.config.source, Some(&back.config.target), &forward, &back.application_name).await {
                Ok(left) => {
                    back.board.set_way_back(ShownWayBack::None, None);
                    back.board.event(Level::Info, "the way back has ended");
                    left.iter().for_each(|left| back.board.event(Level::Warn, left));
                    let _ = asked.answers.send(Answer::Finished);
                    // The process may end now: not before the answer is on its way.
                    let _ = tokio::time::timeout(Duration::from_secs(2), asked.answers.closed()).await;
                    validating.join_next().await;
                    return Ok(());
                }
                Err(error) => {
                    let _ = asked.answers.send(Answer::from(&error));
                }
            }
        }
    }

    /// Nobody reads from the slot of the way there any more, and it would keep the old primary's WAL.
    async fn drop_old_slot(&self, forward: &Migration) -> Infallible {
        let mut backoff = Backoff::new();
        loop {
            let dropped = async {
                // Another name: what an earlier process left is being ended by its own.
                let old = self.config.target.connect("walferry").await?;
                match &self.config.standbys.left {
                    Some(standby) => slot::drop(&standby.connect("walferry").await?, &forward.slot).await?,
                    None => slot::drop(&old, &forward.slot).await?,
                }
                // What tells of DDL needs the publications.
                ddl::remove(&old, &forward.id).await?;
                slot::drop_publications(&old, &forward.publication, &forward.insert_only_publication).await
            };
            match dropped.await {
                Ok(()) => return std::future::pending().await,
                Err(error) => self.board.event(Level::Warn, format!("dropping the old slot, trying again: {error}")),
            }
            backoff.wait().await;
        }
    }

    /// When nobody reads from it any more. `clean` does it where this cannot.
    async fn remove_slot_of_the_way_back(&self, server: &ConnectionSpec, forward: &Migration) {
        let mut backoff = Backoff::new();
        for attempt in 1..=REMOVE_ATTEMPTS {
            let removed = async { Names::of(&forward.id).remove(&server.connect("walferry").await?).await };
            match removed.await {
                Ok(_) => return,
                Err(error) if attempt == REMOVE_ATTEMPTS || !error.is_transient() => {
                    let text = format!("the slot of the way back keeps WAL until `walferry clean` drops it: {error}");
                    self.board.event(Level::Warn, text);
                    return;
                }
                Err(_) => backoff.wait().await,
            }
        }
    }

    /// What the old primary has to be for rows to be written to it. The same each time.
    pub(super) async fn fit_the_old_primary(&self, old: &Client) -> Result<()> {
        let tables: Vec<_> = ledger::tables(old).await?.into_iter().map(|entry| entry.table).collect();
        schema::relax_identity(old, &tables).await?;
        if ledger::fingerprint(old).await?.values().any(String::is_empty) {
            let new = self.config.source.connect(&self.application_name).await?;
            complete_fingerprint(&new, old).await?;
        }
        Ok(())
    }
}

/// Fills in what the catalog of the new primary has become by the cutover. What that left to be done changes once more.
pub(super) async fn complete_fingerprint(new: &Client, old: &Client) -> Result<()> {
    let left = ledger::pending_items(new, Section::AfterCutover).await?;
    let mut now = catalog::fingerprint(new).await?;
    now.retain(|object, _| !left.iter().any(|(_, item)| item.name == *object));
    ledger::complete_fingerprint(old, &now).await
}

/// Ends the way back on the new primary. Answers what could not be removed, in words.
async fn finish_on(
    new_primary: &ConnectionSpec,
    old_primary: Option<&ConnectionSpec>,
    forward: &Migration,
    name: &str,
) -> Result<Option<String>> {
    no_switchback_is_left(new_primary, old_primary, forward, name).await?;
    // Another name: the sessions of the stream are ended, and would make the slot busy again.
    let new = new_primary.connect("walferry").await?;
    ledger::finished(&new).await?;
    let removed = async {
        end_sessions(&new, name).await?;
        Names::of(&forward.id).remove(&new).await
    };
    let left = |error: Error| format!("the slot of the way back keeps WAL until `walferry clean` drops it: {error}");
    Ok(removed.await.err().map(left))
}

/// A switchback that was decided is not undone by ending the way back, and one that was cut off has its fence lifted first: its ledger
/// stands on the old primary. Where that does not answer, the new primary shows whether it is closed to writers.
async fn no_switchback_is_left(
    new_primary: &ConnectionSpec,
    old_primary: Option<&ConnectionSpec>,
    forward: &Migration,
    name: &str,
) -> Result<()> {
    let look = async {
        let Some(old_primary) = old_primary else {
            return Err(Error::new(ErrorKind::Transient, "the old primary is not given"));
        };
        let old = old_primary.connect("walferry").await?;
        let back = ledger::load(&old).await?.filter(|back| back.id == forward.id);
        if back.is_some_and(|back| back.phase == Phase::CutOver) {
            return Ok(true);
        }
        Box::pin(cutover::lift_left_over_fence(new_primary, &old, old_primary, name)).await?;
        Ok(false)
    };
    let late = |_| Err(Error::new(ErrorKind::Transient, "the old primary does not answer"));
    match tokio::time::timeout(OLD_PRIMARY_MAX, look).await.unwrap_or_else(late) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::new(ErrorKind::Blocked, "there is no way back to finish: it has been switched back")
            .hint("`walferry migrate` does what may be left of that; then `walferry clean`.")),
        Err(error) if cutover::is_closed_to_writers(&new_primary.connect("walferry").await?).await? => {
            let database = sql::identifier(new_primary.database());
            let text = format!("the new primary is closed to writers by a switchback that was cut off, and {error}");
            Err(Error::new(ErrorKind::Blocked, text).hint(format!(
                "Run on the new primary: ALTER DATABASE {database} RESET default_transaction_read_only; then `walferry finish` again."
            )))
        }
        Err(_) => Ok(()),
    }
}

/// `walferry finish` where no process runs. The state directory has to be locked.
///
/// # Errors
/// `Blocked` when there is no way back; else what the server says.
pub(crate) async fn finish_without_process(
    new_primary: &ConnectionSpec,
    old_primary: Option<&ConnectionSpec>,
) -> Result<Option<String>> {
    let migration = ledger::load(&new_primary.connect("walferry").await?).await?;
    match migration {
        // One that was finished may still have its slot.
        Some(migration) if matches!(migration.way_back, Some(WayBack::Armed | WayBack::Finished)) => {
            finish_on(new_primary, old_primary, &migration, &application_name(&migration.id)).await
        }
        _ => Err(nothing_to_finish()),
    }
}

fn nothing_to_finish() -> Error {
    Error::new(ErrorKind::Blocked, "there is no way back to finish")
        .hint("A way back begins with `walferry cutover`; `walferry status` shows where the migration is.")
}

/// Before the cutover there is no way back to end.
pub(super) async fn refuse_to_finish(finish: &mut mpsc::Receiver<FinishRequest>) -> Infallible {
    while let Some(request) = finish.recv().await {
        let _ = request.answers.send(Answer::from(&nothing_to_finish()));
    }
    std::future::pending().await
}
