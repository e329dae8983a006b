//! Whole migrations between servers of different versions: under load, with a comparison of walferry's and one by plain SQL, a
//! cutover, the way back, and nothing left over. The servers come from scripts/servers.sh.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

mod old;
mod pair;
mod servers;
mod standby;
#[path = "../support/mod.rs"]
mod support;
