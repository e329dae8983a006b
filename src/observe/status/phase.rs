//! The phases of a migration.

use serde::{Deserialize, Serialize};

/// What the migration is doing, in the order in which the phases come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Checks, slot, snapshot, schema.
    Preparing,
    /// Tables are copied; finished ones already get their indexes.
    Copying,
    /// All rows are there; indexes and constraints are still being built.
    Indexing,
    /// The backlog of the queue is applied in large batches.
    CatchingUp,
    /// The target follows the source closely.
    Following,
    /// A cutover runs.
    CuttingOver,
    /// The target is the primary; the old one is kept current until `finish`.
    CutOver,
    /// A switchback made the old primary the primary again.
    Reversed,
    /// The migration stopped with an error.
    Failed,
}

impl Phase {
    /// All phases, in their order.
    pub const ALL: [Phase; 9] = [
        Phase::Preparing,
        Phase::Copying,
        Phase::Indexing,
        Phase::CatchingUp,
        Phase::Following,
        Phase::CuttingOver,
        Phase::CutOver,
        Phase::Reversed,
        Phase::Failed,
    ];

    /// The name in JSON and in metrics: `catching_up`.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Preparing => "preparing",
            Phase::Copying => "copying",
            Phase::Indexing => "indexing",
            Phase::CatchingUp => "catching_up",
            Phase::Following => "following",
            Phase::CuttingOver => "cutting_over",
            Phase::CutOver => "cut_over",
            Phase::Reversed => "reversed",
            Phase::Failed => "failed",
        }
    }

    /// The name for people: `catching up`.
    pub fn title(self) -> &'static str {
        match self {
            Phase::CatchingUp => "catching up",
            Phase::CuttingOver => "cutting over",
            Phase::CutOver => "cut over",
            other => other.name(),
        }
    }
}
