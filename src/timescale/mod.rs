//! TimescaleDB: everything that walferry knows of hypertables, chunks, compression, continuous aggregates and jobs. Other modules
//! ask here, and know nothing of it themselves.
//!
//! ```text
//!  source.rs   what a server has: extension, hypertables with dimensions, chunks with their ranges, aggregates, jobs
//! ```

pub mod source;

pub use source::{Chunk, ContinuousAggregate, Database, Dimension, Extension, Hypertable, Job, Slice};
