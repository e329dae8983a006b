//! The server that is moved to: its ledger, its schema, and the sessions that write rows. Knows nothing of slots.
//!
//! Every mark of progress is a row in the schema `walferry` of the target, written in the transaction that does the
//! work it speaks of (invariant I2). So after any death, of walferry or of the target, the ledger says exactly what
//! the target holds.

pub mod adopt;
pub mod copy_rows;
pub mod ddl;
pub mod existing;
pub mod harmless;
pub mod index;
pub mod late;
pub mod ledger;
pub mod role;
pub mod role_map;
pub mod roles;
pub mod route;
pub mod schema;
pub mod serial;
pub mod warm;
pub mod writer;
