//! Names, values, passwords and strangers that mean harm, and servers that make one wait: through the real program.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod doors;
mod names;
mod passwords;
mod secrets;
mod waiting;
