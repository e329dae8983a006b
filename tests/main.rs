//! Whole migrations, run by the real program between real servers.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

mod care;
mod clean;
mod conflict;
mod copying;
mod cutover;
mod flow;
mod heal;
mod killed;
mod large_transaction;
mod online;
mod refused;
mod schema_change;
mod warm;
mod way_back;
