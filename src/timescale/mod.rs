//! TimescaleDB: everything that walferry knows of hypertables, chunks, compression, continuous aggregates and jobs. Other modules
//! ask here, and know nothing of it themselves.
//!
//! ```text
//!  source.rs   what a server has: extension, hypertables with dimensions, chunks with their ranges, aggregates, jobs
//!  chunk.rs    a chunk as a table of the migration, applied to its hypertable
//!  prepare.rs  what is set on the source before the slot, and the extension's catalog as statements for the target
//!  copy.rs     a chunk with its compressed rows, as one
//!  live.rs     the extension's own work in the stream, chunks that come and go
//!  settle.rs   what is carried and compared at the cutover
//! ```

pub mod chunk;
pub mod copy;
pub mod live;
pub mod prepare;
pub mod settle;
pub mod source;

pub use chunk::ChunkOf;
pub use source::{Chunk, ContinuousAggregate, Database, Dimension, Extension, Hypertable, Job, Slice};
