//! TimescaleDB: everything that walferry knows of hypertables, chunks, compression, continuous aggregates and jobs. Other modules
//! ask here, and know nothing of it themselves.
//!
//! ```text
//!  source.rs   what a server has: extension, hypertables with dimensions, chunks with their ranges, aggregates, jobs
//!  chunks.rs   single chunks as a backfill copies them: ranges as conditions, how they are compressed now, their sizes
//!  target.rs   chunks made on the target, and filled with compressed rows as they are
//!  policies.rs jobs that rest while a hypertable is filled, and aggregates that are refreshed behind it
//! ```

pub mod chunks;
pub mod policies;
pub mod source;
pub mod target;

pub use source::{Chunk, ContinuousAggregate, Database, Dimension, Extension, Hypertable, Job, Slice};
