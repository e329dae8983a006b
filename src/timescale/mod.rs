//! TimescaleDB: everything that walferry knows of hypertables, chunks, compression, continuous aggregates and jobs. Other modules
//! ask here, and know nothing of it themselves.
//!
//! ```text
//!  source.rs        what a server has: extension, hypertables with dimensions, chunks with their ranges, aggregates, jobs
//!
//!  chunk.rs         TimescaleDB to TimescaleDB: a chunk as a table of the migration, applied to its hypertable
//!  prepare.rs       what is set on the source before the slot, and the extension's catalog as statements for the target
//!  copy.rs          a chunk with its compressed rows, as one
//!  exchange.rs      a chunk compared with the source again, and exchanged where it differs
//!  live.rs          the extension's own work in the stream, chunks that come and go
//!  pause.rs         the source's jobs at rest, and running again
//!  unseen.rs        changes of compressed rows that no stream shows, found before the fence and held back from then on
//!  settle.rs        what is carried and compared at the cutover
//!  recreate.rs      where the target cannot take over that catalog: all of it is made again there
//!  bare.rs          hypertables, aggregates and jobs without a chunk (`--schema-only`)
//!
//!  declaration.rs   plain tables to hypertables: what a table is to become, as a file says it; create.rs the SQL for that
//!  copying.rs       the rows of a plain table into it, by several sessions at once; compress.rs its chunks, while that goes on
//!  restore.rs       hypertables made on the target, between the schema and the rows
//!  suggest.rs       such a file, proposed from the source's statistics
//!  rows.rs          single rows of a hypertable on the target, whether compressed or not
//!  sets.rs          many changed rows of a chunk at once; place.rs the target's chunk that they are in
//!
//!  chunks.rs        single chunks as a backfill copies them: ranges as conditions, how they are compressed now, their sizes
//!  target.rs        chunks made on the target, and filled with compressed rows as they are
//!  policies.rs      jobs that rest while a hypertable is filled, and aggregates that are refreshed behind it
//! ```

pub mod bare;
pub mod chunk;
pub mod chunks;
pub mod compress;
pub mod copy;
pub mod copying;
pub mod create;
pub mod declaration;
pub(crate) mod exchange;
pub mod live;
pub mod pause;
pub(crate) mod place;
pub mod policies;
pub mod prepare;
pub mod recreate;
pub mod restore;
pub(crate) mod rows;
pub mod sets;
pub mod settle;
pub mod source;
pub mod suggest;
pub mod target;
pub mod unseen;

/// A condition on `c`, a row of `pg_class`: its rows are in chunks, so that `ONLY` would read none of them.
pub(crate) const HAS_CHUNKS: &str = "EXISTS (SELECT FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class k ON k.oid = i.inhrelid \
     JOIN pg_catalog.pg_namespace kn ON kn.oid = k.relnamespace \
     WHERE i.inhparent = c.oid AND kn.nspname = '_timescaledb_internal')";

pub use chunk::ChunkOf;
pub use recreate::recompute::Caggs;
pub use restore::marked;
pub use source::{Chunk, ContinuousAggregate, Database, Dimension, Extension, Hypertable, Job, Slice};
