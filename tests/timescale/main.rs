//! TimescaleDB, on real servers with the extension. Where it is not installed, each test says so on standard error and is skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;

mod backfill;
mod hypertables;
mod live;
mod many_chunks;
mod recreate;
mod sets;
mod source;
mod verify;
