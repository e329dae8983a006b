//! TimescaleDB, on real servers with the extension. Where it is not installed, each test says so on standard error and is skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;

#[path = "../report/judge.rs"]
#[allow(dead_code)]
mod judge;
#[path = "../report/logged.rs"]
#[allow(dead_code)]
mod logged;

mod again;
mod backfill;
mod hypertables;
mod killed;
mod live;
mod many_chunks;
mod merged;
mod newer;
mod owner;
mod pieces;
mod plan;
mod recompute;
mod recreate;
mod sets;
mod source;
mod unseen;
mod verify;
