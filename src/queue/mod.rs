//! A durable log of opaque bytes with LSN ranges, between the stream and the apply.
//!
//! ```text
//!   one task                 one thread                    directory                          plain threads
//! ┌──────────┐  blocks,  ┌────────────────┐  write   ┌──────────────────────┐  whole     ┌──────────────┐
//! │ Appender ├──────────►│     writer     ├─────────►│ 1.segment  applied,  │  trans-    │    Reader    │
//! │  frames  │  bounded  │  zstd, CRC32C, │  fsync   │            kept      │  actions   │ CRC, chain,  │
//! │  → block │  in bytes │  group commit  ├─────────►│ 2.segment            ├───────────►│ decompress   │
//! │          │◄──────────┤                │          │ 3.segment  being     │            │              │
//! └──────────┘   room    └───────┬────────┘          │            written   │            └──────────────┘
//!                                │                   └──────────▲───────────┘
//!                                ▼ written_end, durable_end     │ trim(applied)
//!                          ack to the source (I1)         what the target's ledger says (I2)
//! ```
//!
//! # Bytes
//!
//! ```text
//! segment = header{magic, version, sequence, first LSN, continues?, bytes of the segment before, CRC} block*
//! block   = header{magic, codec, lengths, own place, first LSN, last LSN, flags, durable offset, CRCs} labels payload
//! payload = frame*, zstd or as it is          frame = Begin | Data | Commit | Position
//! ```
//!
//! **A block that holds a boundary ends at one.** A boundary is the end of a transaction, or a position. So a block holds
//! whole transactions, or a piece of a single one and perhaps whole ones behind it, and all that is ever cut, by a crash, a
//! rewind or a failure, is whole blocks at the end. Blocks are chained: each names the boundary before it and its own
//! place, so that no block can be missing, repeated or moved unseen.
//!
//! # Progress
//!
//! ```text
//!    start ≤ applied ≤ durable_end ≤ written_end ≤ Appender::end
//!      │        │           │             └ readers go up to here
//!      │        │           └ on disk, may be acknowledged; never goes back
//!      │        └ durable on the target; only what is below can be trimmed
//!      └ every transaction that ends past this is held
//! ```
//!
//! `applied` can be past `durable_end` for a while, since readers need not wait for the fsync: the target then knows
//! of transactions that a crash takes from the queue. They come again from the source, and a reader that starts at the
//! ledger's position leaves them out.
//!
//! # What is durable when, and how it dies safely
//!
//! - *Append, sync, new segment, failed write, failed fsync (H17), full disk, rewind*: in the header of `writer`.
//! - *Open*: in the header of `recovery`. It syncs what it builds upon before it says that anything is durable. A
//!   last block that a bit flip destroyed cannot be told from a torn one: it is cut, the durable end lies before what the
//!   source was told, and the comparison at connect (H15) finds the gap.
//! - *Trim*: the start moves first, in memory, then the file goes, then the directory is synced, one segment after the
//!   other from the front. A crash leaves a whole prefix gone; segments that come back are trimmed again.
//! - *Quota*: `full` from `max_bytes` on; what is in flight then is still written. Applied segments that only
//!   `keep` holds go first. Then the stream waits, unless all that is complete is applied: then only the rest of the
//!   transaction in the making can help, and the queue grows past the quota with a warning. For the queue to know what
//!   is applied, the caller calls `trim` once after opening, with the ledger's position.
//! - *Labels*: each block says, beside its payload and with a checksum of their own, what its messages are about. Where a payload is
//!   damaged, [`examine()`] can still tell what was lost.
//! - *Bit flips*: no byte is handed out that its checksum does not vouch for. Blocks of the last segment are checked at
//!   opening, all others when they are read.

mod appender;
mod examine;
mod file_system;
mod format;
mod reader;
mod recovery;
mod segment;
mod state;
mod writer;

#[cfg(any(test, feature = "fuzzing"))]
mod faults;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use appender::Appender;
pub use examine::{Examined, examine};
pub use format::{Entry, TransactionHead};
pub use reader::Reader;

use self::file_system::{FileSystem, RealFileSystem};
use self::format::FORMAT_VERSION;
use self::recovery::recover;
use self::state::Shared;
use self::writer::Writer;
use crate::error::{Context, Result};
use crate::lsn::Lsn;

/// How large the queue may be, and how it writes.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The quota, in bytes on disk (`--queue-max`). What is in flight when it is reached, and one transaction larger than it, go past it.
    pub max_bytes: u64,
    /// How long applied segments are kept, for a target that loses its newest transactions (`--queue-keep`, H16).
    pub keep: Duration,
    /// The size at which a segment ends. At most a quarter of the quota is used, so that trimming can make room.
    pub segment_bytes: u64,
    /// The size of a block before compression. A larger message has a block of its own.
    pub block_bytes: usize,
    /// Bytes that may wait between the appender and its thread.
    pub in_flight_bytes: u64,
    /// Bytes in the file after which a sync does not wait for a pause of the stream.
    pub sync_bytes: u64,
    /// How long after a write that found the disk full it is tried again, if nothing makes room before.
    pub retry: Duration,
}

/// The size of a block, where nothing else is said.
const BLOCK_BYTES: usize = 256 << 10;

impl Options {
    /// The least quota that room can be made in: four segments of a block each.
    pub const MAX_BYTES_LEAST: u64 = 4 * BLOCK_BYTES as u64;
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_bytes: 64 << 30,
            keep: Duration::from_secs(3600),
            segment_bytes: 128 << 20,
            block_bytes: BLOCK_BYTES,
            in_flight_bytes: 32 << 20,
            sync_bytes: 8 << 20,
            retry: Duration::from_secs(1),
        }
    }
}

/// How far the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// See [`Queue::start`].
    pub start: Lsn,
    /// See [`Queue::written_end`].
    pub written_end: Lsn,
    /// See [`Queue::durable_end`].
    pub durable_end: Lsn,
    /// Bytes of all segments.
    pub bytes_on_disk: u64,
    /// Whether the quota is used up, or the disk has refused a write for want of room.
    pub full: bool,
}

/// A handle of the queue: for acknowledging, reading, trimming and watching. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Queue {
    shared: Arc<Shared>,
}

/// Opens the queue in a directory, or makes it, to begin at `start`: nothing that ends at or below is expected. Cuts
/// what a crash tore and the last transaction where it is incomplete. The caller's lock guarantees that nobody else uses
/// the directory, until queue, appender and readers are dropped.
///
/// # Errors
/// [`ErrorKind::Disk`](crate::error::ErrorKind::Disk) when the disk refuses; [`ErrorKind::Queue`](crate::error::ErrorKind::Queue) when a newer walferry has
/// written there (H18), a segment is missing among the others or shorter than it was, or the last one is corrupt before what a crash can have torn.
pub fn open(directory: &Path, start: Lsn, options: Options) -> Result<(Queue, Appender)> {
    open_on(Arc::new(RealFileSystem), directory, start, options)
}

fn open_on(
    file_system: Arc<dyn FileSystem>,
    directory: &Path,
    start: Lsn,
    options: Options,
) -> Result<(Queue, Appender)> {
    let block_bytes = options.block_bytes.clamp(64, 64 << 20);
    let segment_bytes = options.segment_bytes.min(options.max_bytes / 4).max(block_bytes as u64);
    let options = Options { block_bytes, segment_bytes, ..options };
    let recovered = recover(&*file_system, directory, start)?;
    let (end, end_place) = (recovered.end, recovered.end_place);
    tracing::info!(
        directory = %directory.display(), start = %recovered.start, %end,
        segments = recovered.segments.len(), version = FORMAT_VERSION, "the queue is open"
    );
    let shared =
        Shared::new(directory.to_owned(), file_system, options, recovered.segments, recovered.start, end, end_place);
    // Unbounded in messages, bounded in bytes: the appender waits in `ready`.
    let (messages, receiver) = crossbeam_channel::unbounded();
    let writer = Writer::new(Arc::clone(&shared), receiver, recovered.file, recovered.outdated, end_place, end)?;
    let span = tracing::Span::current();
    let thread = std::thread::Builder::new()
        .name("queue-writer".into())
        .spawn(move || span.in_scope(|| writer.run()))
        .context(|| "starting the queue's writer".into())?;
    let appender = Appender::new(Arc::clone(&shared), messages, thread, end);
    Ok((Queue { shared }, appender))
}

impl Queue {
    /// Every transaction with an end LSN past this is still held. Moves forward by trimming.
    pub fn start(&self) -> Lsn {
        self.shared.lock().start
    }

    /// The end LSN of the newest complete transaction or position that a reader can see. A failed write or fsync takes
    /// it back to [`durable_end`](Queue::durable_end).
    pub fn written_end(&self) -> Lsn {
        self.shared.lock().written_end
    }

    /// The end LSN up to which everything is on disk: may be acknowledged (I1). Never goes back.
    pub fn durable_end(&self) -> Lsn {
        self.shared.lock().durable_end
    }

    /// Follows the queue's progress.
    pub fn subscribe(&self) -> tokio::sync::watch::Receiver<Progress> {
        self.shared.progress.subscribe()
    }

    /// A reader whose first entry is the Begin of the first transaction with an end LSN past `after`, or a position past
    /// it. `after` may be past the queue's end.
    ///
    /// # Errors
    /// [`ErrorKind::Gap`](crate::error::ErrorKind::Gap) when `after` is before [`start`](Queue::start): what lies between is no longer there (H15).
    pub fn reader(&self, after: Lsn) -> Result<Reader> {
        Reader::open(Arc::clone(&self.shared), after)
    }

    /// Says that everything up to `applied` is durable on the target (I2): segments that hold nothing past it, and were
    /// last written longer ago than [`Options::keep`], are removed. When the queue is full they go earlier, with a
    /// warning. A position older than one said before changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Disk`](crate::error::ErrorKind::Disk) when a file cannot be removed; nothing else is harmed.
    pub fn trim(&self, applied: Lsn) -> Result<()> {
        self.shared.trim(applied)
    }

    /// The quota, in bytes.
    pub fn max_bytes(&self) -> u64 {
        self.shared.options.max_bytes
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.shared.lock().bytes
    }
}
