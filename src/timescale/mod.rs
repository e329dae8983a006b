//! TimescaleDB: hypertables, their chunks, compression and policies.
//!
//! What the rest of the program asks is here; what is special about a hypertable stays here.

pub mod create;
pub mod declaration;
pub mod restore;
pub(crate) mod rows;

pub use restore::marked;
