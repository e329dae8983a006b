//! The server that is moved away from: its catalog, its slot and snapshots, its stream. Knows nothing of the target.

pub mod catalog;
pub mod replication;
