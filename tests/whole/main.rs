//! The whole of PostgreSQL, an area after the other: each has a schema file and a file of changes, is migrated while the changes are
//! made, and compared by plain SQL and by what `pg_dump` says of both sides.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod area;
mod large;
mod rows;
