//! What the cutover has left to be done on the new primary while applications are at work again: foreign keys to be validated (H23).
//!
//! How it dies: each is run together with its mark in the ledger; the next start goes on with what is left.

use std::collections::BTreeMap;

use super::Backoff;
use super::way_back::complete_fingerprint;
use crate::connection::ConnectionSpec;
use crate::error::Result;
use crate::observe::board::StatusBoard;
use crate::observe::status::Level;
use crate::target::late::{self, Left};
use crate::target::ledger::{self, Section};

/// What is needed for it.
#[derive(Clone)]
pub(super) struct AfterCutover {
    /// The server that took over.
    pub(super) new_primary: ConnectionSpec,
    /// With a way back, whose ledger stands there.
    pub(super) old_primary: Option<ConnectionSpec>,
    pub(super) board: StatusBoard,
}

impl AfterCutover {
    /// Does all of it, however long it takes. What the rows do not hold is said, stays in the ledger, and is tried again at the next
    /// start. Nothing of it takes the cutover back.
    pub(super) async fn run(self) {
        let mut refused = BTreeMap::new();
        let mut backoff = Backoff::new();
        while let Err(error) = self.go_on(&mut refused).await {
            self.board.event(Level::Warn, format!("validating foreign keys, trying again: {error}"));
            backoff.wait().await;
        }
    }

    async fn go_on(&self, refused: &mut BTreeMap<i32, String>) -> Result<()> {
        // Another name: what an earlier process left is being ended by its own.
        let target = self.new_primary.connect("walferry").await?;
        let mut any = false;
        loop {
            // Each time anew: a session of an earlier process may have done one.
            let mut left = ledger::pending_items(&target, Section::AfterCutover).await?;
            self.show(left.len(), refused);
            left.retain(|(position, _)| !refused.contains_key(position));
            // One of a partitioned table reads all rows again, under a lock, as long as one of a leaf is not valid.
            left.retain(|(_, item)| item.kind != "FK CONSTRAINT" || refused.is_empty());
            let Some((position, item)) = left.into_iter().next() else { break };
            any = true;
            match late::run_left(&target, position, &item).await {
                Ok(Left::Done) => self.board.event(Level::Info, format!("the {} is valid", item.name)),
                Ok(Left::Waits) => tokio::time::sleep(late::REST).await,
                Err(error) if error.is_transient() => return Err(error),
                Err(error) => {
                    let next = error.next_step().unwrap_or_default().to_owned();
                    self.board.event(Level::Warn, format!("{error}. {next}"));
                    refused.insert(position, item.name);
                }
            }
        }
        if let (true, Some(old)) = (any, &self.old_primary) {
            complete_fingerprint(&target, &old.connect("walferry").await?).await?;
        }
        Ok(())
    }

    fn show(&self, left: usize, refused: &BTreeMap<i32, String>) {
        let names: Vec<&str> = refused.values().map(String::as_str).collect();
        self.board.set_left_by_cutover(match (left, names.is_empty()) {
            (0, _) => None,
            (left, true) => Some(format!("foreign keys are being validated on the new primary: {left} are left")),
            (left, false) => Some(format!(
                "{left} foreign keys are not validated on the new primary; the rows do not hold: {}",
                names.join(", ")
            )),
        });
    }
}
