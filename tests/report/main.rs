//! What was done and by whom: the record, the plan that it is held against, and the report.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod logged;
mod page;
mod plan;
