//! The way back: after the cutover, the server that was left is kept current from the one that took over.
//!
//! It is a migration of its own whose copy is done: [`Running`] with both servers in each other's place. Its ledger stands on the old
//! server, and says that it follows from the release position on. So all that holds of following holds of it (I1 to I7): whatever
//! dies, the same command goes on where that ledger says.
//!
//! | what ends it | what is decided where |
//! |---|---|
//! | `walferry switchback` | the same cutover the other way: `phase = 'cut_over'` in the ledger on the old server |
//! | `walferry finish` | `way_back = 'finished'` in the ledger on the new one; the old server is not asked, because it may be gone |

use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_postgres::Client;

use super::prepare::end_sessions;
use super::{Backoff, Config, Direction, Running, application_name};
use crate::apply::gate::Gate;
use crate::connection::ConnectionSpec;
use crate::control::{Answer, FinishRequest, Requests};
use crate::cutover::arming::Names;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::status::{Level, Phase as ShownPhase};
use crate::source::{catalog, slot};
use crate::target::ledger::{self, Migration, WayBack};
use crate::target::schema;

impl Config {
    /// The same with both servers in each other's place.
    pub(super) fn reversed(mut self) -> Config {
        std::mem::swap(&mut self.source, &mut self.target);
        std::mem::swap(&mut self.care.caps.source, &mut self.care.caps.target);
        self
    }
}

impl Running {
    /// Follows the other way, where the cutover armed that, until it is switched back or finished.
    pub(super) async fn keep_the_old_primary_current(
        self,
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
        if forward.way_back != Some(WayBack::Armed) {
            return Ok(());
        }
        let config = self.config.reversed();
        self.board.turn_back(config.source.describe(), config.target.describe());
        self.board.show_connections(config.source.connections(), config.target.connections());
        self.board.event(
            Level::Info,
            "the way back is open: the old primary is kept current, until `walferry switchback` or `walferry finish`",
        );
        let back = Running {
            config,
            board: self.board,
            directory: self.directory,
            application_name: self.application_name,
            pause: self.pause,
            tune: self.tune,
            waits_for_snapshot: AtomicBool::new(false),
            direction: Direction::Back,
            gate: Gate::open(),
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
                            back.remove_slot_of_the_way_back(&forward).await;
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
            match finish_on(&back.config.source, &forward, &back.application_name).await {
                Ok(()) => {
                    back.board.event(Level::Info, "the way back has ended");
                    let _ = asked.answers.send(Answer::Finished);
                    // The process may end now: not before the answer is on its way.
                    let _ = tokio::time::timeout(Duration::from_secs(2), asked.answers.closed()).await;
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
                slot::drop(&old, &forward.slot).await?;
                slot::drop_publications(&old, &forward.publication, &forward.insert_only_publication).await
            };
            match dropped.await {
                Ok(()) => return std::future::pending().await,
                Err(error) => self.board.event(Level::Warn, format!("dropping the old slot, trying again: {error}")),
            }
            backoff.wait().await;
        }
    }

    /// After the switchback. `clean` does it where this cannot.
    async fn remove_slot_of_the_way_back(&self, forward: &Migration) {
        let removed = async {
            let new = self.config.source.connect(&self.application_name).await?;
            Names::of(&forward.id).remove(&new).await
        };
        if let Err(error) = removed.await {
            self.board.event(Level::Warn, format!("the slot of the way back could not be dropped: {error}"));
        }
    }

    /// What the old primary has to be for rows to be written to it. The same each time.
    pub(super) async fn fit_the_old_primary(&self, old: &Client) -> Result<()> {
        let tables: Vec<_> = ledger::tables(old).await?.into_iter().map(|entry| entry.table).collect();
        schema::relax_identity(old, &tables).await?;
        if ledger::fingerprint(old).await?.values().any(String::is_empty) {
            let new = self.config.source.connect(&self.application_name).await?;
            ledger::complete_fingerprint(old, &catalog::fingerprint(&new).await?).await?;
        }
        Ok(())
    }
}

/// Ends the way back on the new primary.
async fn finish_on(new_primary: &ConnectionSpec, forward: &Migration, name: &str) -> Result<()> {
    // Another name: the sessions of the stream are ended, and would make the slot busy again.
    let new = new_primary.connect("walferry").await?;
    ledger::finished(&new).await?;
    end_sessions(&new, name).await?;
    Names::of(&forward.id).remove(&new).await?;
    Ok(())
}

/// `walferry finish` where no process runs. The state directory has to be locked.
///
/// # Errors
/// `Blocked` when there is no way back; else what the server says.
pub(crate) async fn finish_without_process(new_primary: &ConnectionSpec) -> Result<()> {
    let migration = ledger::load(&new_primary.connect("walferry").await?).await?;
    match migration {
        Some(migration) if migration.way_back == Some(WayBack::Armed) => {
            finish_on(new_primary, &migration, &application_name(&migration.id)).await
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
