//! TimescaleDB: hypertables, their chunks, compression and policies.
//!
//! What the rest of the program asks is here; what is special about a hypertable stays here.

pub mod chunks;
pub mod policies;
pub mod target;
