//! What was done and by whom: the record, the plan that it is held against, and the report.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod judge;
mod logged;
mod page;
mod plan;

/// What a migration of a few rows needs; the disk of a test machine may have no more.
pub const SMALL_QUEUE: [&str; 2] = ["--queue-max-bytes", "128MiB"];
