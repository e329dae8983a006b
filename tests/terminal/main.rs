//! What stands between walferry and a person or a script: settings files, completions, manual pages, the full-screen status, JSON.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod about;
mod newcomer;
mod pictures;
mod schema;
mod screen;
mod whole;
