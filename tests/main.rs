//! Whole migrations, run by the real program between real servers.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

mod all_databases;
mod care;
mod clean;
mod conflict;
mod copying;
mod cutover;
mod ddl;
mod fence;
mod flow;
mod heal;
mod hooks;
mod killed;
mod large_transaction;
mod occupied_port;
mod online;
mod pooler;
mod refused;
mod schema_change;
mod warm;
mod way_back;
