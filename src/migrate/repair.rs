//! What a comparison needs of a migration that runs: points that both sides have in common, and tables brought right again.
//!
//! A repair is `migrate --recopy` without a restart: the phases end, the ledger says which tables are compared with a new snapshot
//! (one transaction), and the phases begin again from there. The queue goes on receiving all the while, and from the snapshot on each
//! repaired table takes from it what the snapshot has not seen (I3). How it dies: before that transaction nothing has happened,
//! after it the next start does the same.

use tokio::sync::mpsc;

use super::{Running, hypertables};
use crate::control::{Answer, RepairRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::status::{Level, Phase};
use crate::queue::Queue;
use crate::source::catalog::Table;
use crate::source::slot::ServerIdentity;
use crate::target::ledger::{self, Migration};
use crate::verify;
use crate::verify::point::PointTaker;

impl Running {
    /// Who takes common points beside the phases.
    pub(super) fn point_taker(&self, migration: &Migration, queue: &Queue) -> PointTaker {
        let timeline = u32::try_from(migration.source_timeline).unwrap_or_default();
        PointTaker {
            source: self.config.source.clone(),
            target: self.config.target.clone(),
            server: ServerIdentity { system: migration.source_system.clone(), timeline },
            queue: queue.clone(),
            gate: self.gate.clone(),
            paused: self.pause.subscribe(),
            board: self.board.clone(),
        }
    }

    /// Waits for a repair that can be done now; the others are refused.
    pub(super) async fn repair_requested(&self, repairs: &mut mpsc::Receiver<RepairRequest>) -> RepairRequest {
        loop {
            let Some(request) = repairs.recv().await else { return std::future::pending().await };
            let phase = self.board.phase();
            if phase == Phase::Following {
                return request;
            }
            let text = format!("the migration is {}: only one that follows can be repaired", phase.title());
            let error = Error::new(ErrorKind::Blocked, text).hint("`walferry status` says what it waits for.");
            let _ = request.answers.send(Answer::from(&error));
        }
    }

    /// Has tables compared again; the phases, which have just ended, do it when they begin again.
    pub(super) async fn repair(&self, request: RepairRequest) {
        let answer = match self.have_repaired(&request.tables).await {
            Ok(()) => {
                // So that whoever asked does not take the phase before for the one after.
                self.board.set_phase(Phase::Copying);
                Answer::Repairing
            }
            Err(error) => {
                self.board.event(Level::Warn, format!("the repair was not begun: {error}"));
                Answer::from(&error)
            }
        };
        // Whoever asked may have gone; it is done all the same.
        let _ = request.answers.send(answer);
    }

    async fn have_repaired(&self, names: &[String]) -> Result<()> {
        // What the phases had open there could still commit, and would hold up the ledger.
        self.end_sessions(&self.config.target).await?;
        let mut target = self.target().await?;
        let migration = self.load(&target).await?;
        let tables: Vec<Table> = ledger::tables(&target).await?.into_iter().map(|entry| entry.table).collect();
        let chosen = hypertables::with_chunks(&tables, &verify::choose(&tables, Some(names))?);
        let source = self.config.source.connect(&self.application_name).await?;
        // The queue is open and goes on: nothing of it is lost.
        self.have_compared(&source, &mut target, &migration, &chosen, None).await
    }
}
