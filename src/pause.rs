//! Holding the apply or the copy: what the operator asked for, kept over restarts.
//!
//! The apply rests at the end of a unit, the copy at the end of a part (what slows it within one is `care::tune`); meanwhile the queue goes on receiving, so the source
//! keeps no WAL because of it.

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::crashsafe;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::state_directory::StateDirectory;

/// What rests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// Nothing is applied.
    pub apply: bool,
    /// No part is begun to be copied.
    pub copy: bool,
}

/// What an operator names in `walferry pause`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// The apply; the queue goes on receiving
    Apply,
    /// The initial copy
    Copy,
    /// Both
    All,
}

/// Steers what rests, and tells everybody.
#[derive(Clone)]
pub struct Pause {
    paused: watch::Sender<Paused>,
    directory: StateDirectory,
    board: StatusBoard,
}

impl Pause {
    /// As it was when the last process ended.
    pub fn restore(directory: &StateDirectory, board: &StatusBoard) -> Pause {
        let written = std::fs::read(directory.paused()).ok().and_then(|json| serde_json::from_slice(&json).ok());
        let pause =
            Pause { paused: watch::Sender::new(Paused::default()), directory: directory.clone(), board: board.clone() };
        pause.show(written.unwrap_or_default());
        pause
    }

    /// Holds something, or lets it go on; durably.
    ///
    /// # Errors
    /// When it cannot be written down; nothing is changed then.
    pub fn set(&self, what: What, rest: bool) -> Result<Paused> {
        let mut paused = *self.paused.borrow();
        if matches!(what, What::Apply | What::All) {
            paused.apply = rest;
        }
        if matches!(what, What::Copy | What::All) {
            paused.copy = rest;
        }
        let json = serde_json::to_vec(&paused).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        crashsafe::replace(&self.directory.paused(), &json)?;
        self.show(paused);
        Ok(paused)
    }

    /// To wait for it.
    pub fn subscribe(&self) -> watch::Receiver<Paused> {
        self.paused.subscribe()
    }

    fn show(&self, paused: Paused) {
        self.board.set_apply_paused(paused.apply);
        self.board.set_copy_paused(paused.copy);
        self.paused.send_replace(paused);
    }
}

/// Waits while the apply is to rest.
pub async fn apply_may_go_on(paused: &mut watch::Receiver<Paused>) {
    // Whoever steers is gone: then nobody holds it.
    let _ = paused.wait_for(|paused| !paused.apply).await;
}

/// Waits while the copy is to rest.
pub async fn copy_may_go_on(paused: &mut watch::Receiver<Paused>) {
    let _ = paused.wait_for(|paused| !paused.copy).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_paused_stays_paused_over_a_restart() {
        let path = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(path.path());
        let board = StatusBoard::new();
        let pause = Pause::restore(&directory, &board);
        assert_eq!(pause.set(What::Apply, true).unwrap(), Paused { apply: true, copy: false });
        let again = Pause::restore(&directory, &board);
        assert!(again.subscribe().borrow().apply);
        assert!(board.snapshot().apply.paused);
        again.set(What::All, false).unwrap();
        apply_may_go_on(&mut again.subscribe()).await;
        copy_may_go_on(&mut again.subscribe()).await;
        assert!(!board.snapshot().apply.paused);
    }
}
