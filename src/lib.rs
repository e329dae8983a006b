//! walferry moves a live PostgreSQL or TimescaleDB database to another server.
//!
//! ```text
//!  source server                      walferry (one process, one state directory)                    target server
//! ┌──────────────┐  pgoutput   ┌────────┐  bytes   ┌─────────────┐  bytes  ┌────────┐ changes ┌───────┐  COPY/   ┌──────────┐
//! │ WAL ─ slot ──┼────────────►│ source │─────────►│    queue    │────────►│ decode │────────►│ apply │─────────►│  tables  │
//! │              │◄────────────┤        │  fsync,  │ disk, CRC,  │         │ (pure) │         │ batch │  MERGE   │  + the   │
//! │              │  ack = what │        │  then ack│ whole txns  │         │        │         │ route │          │  ledger  │
//! │              │  is on disk └────────┘          └─────────────┘         └────────┘         └───────┘          │          │
//! │ tables ──────┼── snapshot ──────────────────────► copy (parallel, COPY → COPY, never parsed) ────────────────►│          │
//! └──────────────┘                                                                                               └──────────┘
//! ```
//!
//! The modules below stand in the order of the data; [`migrate`] is the one place that knows all phases.
//! ARCHITECTURE.md in the repository says which invariant each part keeps, and which test guards it.

pub mod backfill;
pub mod migrate;

pub mod connection;
pub mod source;

pub mod queue;

pub mod decode;

pub mod apply;

pub mod care;
pub mod copy;
pub mod target;
pub mod timescale;

pub mod cutover;
pub mod unstreamed;
pub mod verify;

pub mod check;
pub mod clean;
pub mod control;
pub mod databases;
pub mod observe;
pub mod pause;
pub mod record;
pub mod report;
pub mod state_directory;

pub mod cli;
pub mod commands;
pub mod demo;
pub mod settings;

pub mod crashsafe;
pub mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod lsn;
pub mod sql;
