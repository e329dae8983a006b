//! The writer's thread: takes blocks in order, compresses, writes, syncs and says so.
//!
//! **What is durable when.** A block is written at the end of the last segment; then `written_end` moves and readers
//! see what is complete. When no block waits, or [`Options::sync_bytes`](super::Options) are written since the last
//! one, `fdatasync` makes it durable, and only then `durable_end` moves: a transaction that is acknowledged is on disk,
//! with all that came before it. A full segment is synced before its successor is made, the successor's header and name
//! are synced before a block follows: of all segments the last alone can be torn.
//!
//! **How it dies safely.** At any instruction a crash leaves: whole segments, then one whose tail behind the last sync
//! may be torn in any way, perhaps a file that has no whole header yet. Recovery knows all of these. Cutting back goes
//! from the last segment to the first, each removal durable before the next: no crash can leave a hole.
//!
//! **What a refused write does.** *No room:* the file is cut back to where the block began, the queue stays `full`,
//! and the same block is tried again until there is room, a rewind gives it up, or the appender is gone. *Any other
//! error, and every failed fsync (H17):* what lies past the last sync is never handed out or built upon again: readers
//! are taken back to `durable_end`, the file is cut at once (so that a process that dies now leaves nothing to mistake for
//! durable), all further blocks are dropped, and `ready` says why. A rewind then cuts to the last durable boundary
//! and goes on in a new segment, whose header records where its predecessor counts no more.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use crossbeam_channel::{Receiver, TryRecvError};
use tokio::sync::oneshot;

use super::file_system::{File, is_no_room};
use super::format::{
    BLOCK_HEADER_BYTES, BlockHeader, Codec, FORMAT_VERSION, Labels, SEGMENT_HEADER_BYTES, SegmentHeader,
};
use super::segment::{Place, Segment, create_segment, disk_error, remove_segment, segment_path};
use super::state::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;

/// zstd's fastest ordinary level: the queue must never be slower than the stream.
const COMPRESSION_LEVEL: i32 = 1;

/// Frames on their way to the disk. A block that holds a boundary ends at one.
pub(super) struct Block {
    pub frames: Vec<u8>,
    /// What they are about.
    pub labels: Labels,
    /// The newest boundary before the block.
    pub first_lsn: Lsn,
    /// The newest boundary in it; `first_lsn` where it holds none.
    pub last_lsn: Lsn,
    /// Whether it starts inside a transaction.
    pub starts_inside: bool,
    /// Whether it ends at a boundary.
    pub ends_at_boundary: bool,
}

/// What the appender sends.
pub(super) enum Message {
    Block(Block),
    /// Drops what is incomplete, makes the rest durable, and answers with its end.
    Rewind(oneshot::Sender<Result<Lsn>>),
}

/// Why a block is not on disk.
enum WriteFault {
    NoRoom(io::Error),
    Failed(Error),
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    messages: Receiver<Message>,
    /// The last segment.
    file: Arc<dyn File>,
    /// Where the next block goes.
    place: Place,
    /// How much of the last segment is durable.
    synced_offset: u64,
    /// The newest boundary that is written.
    chain: Lsn,
    /// Whether what is written ends inside a transaction.
    inside: bool,
    /// Whether a write or an fsync has failed since the last rewind: the last segment is not to be built upon.
    failed: bool,
    /// Whether blocks are dropped until the next rewind: after a failure, or because a rewind is on its way.
    dropping: bool,
    /// Whether the last segment is of an older format: the next block begins another.
    outdated: bool,
    compressor: zstd::bulk::Compressor<'static>,
    /// The block as it is written, header first.
    buffer: Vec<u8>,
}

impl Writer {
    pub fn new(
        shared: Arc<Shared>,
        messages: Receiver<Message>,
        file: Arc<dyn File>,
        outdated: bool,
        end_place: Place,
        end: Lsn,
    ) -> Result<Writer> {
        Ok(Writer {
            shared,
            messages,
            file,
            place: end_place,
            synced_offset: end_place.offset,
            chain: end,
            inside: false,
            failed: false,
            dropping: false,
            outdated,
            compressor: zstd::bulk::Compressor::new(COMPRESSION_LEVEL)?,
            buffer: Vec::new(),
        })
    }

    /// The thread: until the appender is gone and everything it sent is durable.
    pub fn run(mut self) {
        loop {
            let message = match self.messages.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    self.sync_or_fail();
                    match self.messages.recv() {
                        Ok(message) => message,
                        Err(_) => break,
                    }
                }
            };
            match message {
                Message::Block(block) => {
                    let bytes = block.frames.len() as u64;
                    self.take(block);
                    let mut state = self.shared.lock();
                    state.in_flight_bytes -= bytes;
                    self.shared.publish(&state);
                }
                Message::Rewind(reply) => {
                    let result = self.rewind();
                    // A caller that has given up waiting asks again: the appender insists on it.
                    let _ = reply.send(result);
                }
            }
        }
        self.sync_or_fail();
    }

    /// Writes a block, however long it takes, unless it is to be dropped.
    fn take(&mut self, block: Block) {
        if self.dropping {
            return;
        }
        if block.first_lsn != self.chain || block.starts_inside != self.inside {
            let text = format!("a block from {} was sent after {}", block.first_lsn, self.chain);
            self.fail(Error::new(ErrorKind::Other, text));
            return;
        }
        let mut header = match self.pack(&block) {
            Ok(header) => header,
            Err(error) => return self.fail(error),
        };
        loop {
            match self.write(&block, &mut header) {
                Ok(()) => break,
                Err(WriteFault::Failed(error)) => return self.fail(error),
                Err(WriteFault::NoRoom(error)) => {
                    if !self.wait_for_room(&error) {
                        self.dropping = true;
                        return;
                    }
                }
            }
        }
        if self.place.offset - self.synced_offset >= self.shared.options.sync_bytes {
            self.sync_or_fail();
        }
        self.make_room();
    }

    /// The payload into the buffer, behind room for the header. Where the block goes is filled in by `write`.
    fn pack(&mut self, block: &Block) -> Result<BlockHeader> {
        let raw = &block.frames;
        self.buffer.clear();
        self.buffer.resize(BLOCK_HEADER_BYTES, 0);
        block.labels.encode(&mut self.buffer);
        let payload = self.buffer.len();
        self.buffer.resize(payload + zstd::zstd_safe::compress_bound(raw.len()), 0);
        let compressed = self.compressor.compress_to_buffer(raw, &mut self.buffer[payload..])?;
        let (codec, stored) = if compressed < raw.len() { (Codec::Zstd, compressed) } else { (Codec::Raw, raw.len()) };
        self.buffer.truncate(payload + stored);
        if codec == Codec::Raw {
            self.buffer[payload..].copy_from_slice(raw);
        }
        let too_large = |_| Error::new(ErrorKind::Other, "a block of the queue is larger than its header can say");
        Ok(BlockHeader {
            codec,
            ends_at_boundary: block.ends_at_boundary,
            starts_inside: block.starts_inside,
            labels: block.labels.count(),
            stored_bytes: u32::try_from(stored).map_err(too_large)?,
            raw_bytes: u32::try_from(raw.len()).map_err(too_large)?,
            segment: 0,
            offset: 0,
            first_lsn: block.first_lsn,
            last_lsn: block.last_lsn,
            durable_offset: 0,
            payload_crc: crc32c::crc32c(&self.buffer[payload..]),
        })
    }

    /// One attempt. On `NoRoom` the segments are as before it.
    fn write(&mut self, block: &Block, header: &mut BlockHeader) -> Result<(), WriteFault> {
        let bytes = self.buffer.len() as u64;
        let has_blocks = self.place.offset > SEGMENT_HEADER_BYTES;
        if self.outdated || (has_blocks && self.place.offset + bytes > self.shared.options.segment_bytes) {
            self.sync().map_err(WriteFault::Failed)?;
            self.start_segment().map_err(|error| match is_no_room(&error) {
                true => WriteFault::NoRoom(error),
                false => WriteFault::Failed(disk_error(error, "making a new segment of the queue".into())),
            })?;
        }
        header.segment = self.place.sequence;
        header.offset = self.place.offset;
        header.durable_offset = self.synced_offset;
        self.buffer[..BLOCK_HEADER_BYTES].copy_from_slice(&header.encode());
        if let Err(error) = self.file.write_at(&self.buffer, self.place.offset) {
            if is_no_room(&error) && self.file.truncate(self.place.offset).is_ok() {
                return Err(WriteFault::NoRoom(error));
            }
            return Err(WriteFault::Failed(disk_error(error, self.doing("writing to"))));
        }
        self.place.offset += bytes;
        self.chain = block.last_lsn;
        self.inside = !block.ends_at_boundary;

        let mut state = self.shared.lock();
        state.bytes += bytes;
        state.disk_full = false;
        if let Some(segment) = state.segments.back_mut() {
            segment.bytes = self.place.offset;
            segment.last_write = SystemTime::now();
        }
        if block.ends_at_boundary {
            state.written_end = self.chain;
            state.written = self.place;
            let current = self.place.sequence;
            let waiting = state.segments.iter_mut().rev().skip_while(|segment| segment.sequence == current);
            for segment in waiting.take_while(|segment| segment.release.is_none()) {
                segment.release = Some(block.last_lsn);
            }
        }
        self.shared.publish(&state);
        Ok(())
    }

    /// Makes the last segment's successor, and goes on in it. The last segment is synced, or is not to be trusted past
    /// `self.place`.
    fn start_segment(&mut self) -> io::Result<()> {
        let header = SegmentHeader {
            sequence: self.place.sequence + 1,
            first_lsn: self.chain,
            continues: self.inside,
            previous_bytes: self.place.offset,
            version: FORMAT_VERSION,
        };
        self.file = create_segment(&*self.shared.file_system, &self.shared.directory, &header)?;
        self.place = Place { sequence: header.sequence, offset: SEGMENT_HEADER_BYTES };
        self.synced_offset = SEGMENT_HEADER_BYTES;
        self.outdated = false;

        let mut state = self.shared.lock();
        if let Some(sealed) = state.segments.back_mut() {
            sealed.release = (!header.continues).then_some(header.first_lsn);
        }
        state.segments.push_back(Segment {
            sequence: header.sequence,
            first_lsn: header.first_lsn,
            continues: header.continues,
            bytes: SEGMENT_HEADER_BYTES,
            release: None,
            last_write: SystemTime::now(),
        });
        state.bytes += SEGMENT_HEADER_BYTES;
        self.shared.publish(&state);
        Ok(())
    }

    /// Makes everything that is written durable (I1).
    fn sync(&mut self) -> Result<()> {
        if self.place.offset > self.synced_offset {
            self.file.sync_data().map_err(|error| disk_error(error, self.doing("syncing")))?;
            self.synced_offset = self.place.offset;
        }
        let mut state = self.shared.lock();
        if state.durable != state.written {
            // Only this thread moves `written`: all of it was in the file before the sync above, or in a segment that
            // was synced when it was full.
            state.durable = state.written;
            state.durable_end = state.written_end;
            self.shared.publish(&state);
        }
        Ok(())
    }

    fn sync_or_fail(&mut self) {
        if !self.dropping
            && let Err(error) = self.sync()
        {
            self.fail(error);
        }
    }

    /// Nothing past the last sync is trusted from here on.
    fn fail(&mut self, error: Error) {
        tracing::error!(%error, "the queue cannot be written; what is not durable is taken back");
        self.failed = true;
        self.dropping = true;
        {
            let mut state = self.shared.lock();
            state.failure = Some((error.kind(), error.to_string()));
            if state.written != state.durable {
                state.written = state.durable;
                state.written_end = state.durable_end;
                state.generation += 1;
                state.taken_back_to = state.durable;
            }
            self.shared.publish(&state);
        }
        // At once, so that a process which dies before the rewind leaves nothing that looks durable and is not. If this
        // fails, the rewind tries again.
        if let Err(error) = self.file.truncate(self.synced_offset) {
            tracing::warn!(%error, "the queue's failed segment cannot be cut yet");
        }
    }

    /// Back to the last boundary: the written one, or after a failure the durable one.
    fn rewind(&mut self) -> Result<Lsn> {
        if !self.failed
            && let Err(error) = self.sync()
        {
            self.fail(error);
        }
        // Written and durable are one now, on both ways.
        let (end, target) = {
            let state = self.shared.lock();
            (state.durable_end, state.durable)
        };
        self.cut_back(end, target)?;
        if self.failed {
            self.start_segment()
                .map_err(|error| disk_error(error, "making a new segment of the queue after a failure".into()))?;
            tracing::info!(after = %end, "the queue goes on in a new segment");
        }
        self.failed = false;
        self.dropping = false;
        let mut state = self.shared.lock();
        state.failure = None;
        state.rewinding = false;
        // Nothing is being tried again now: the next block finds out.
        state.disk_full = false;
        self.shared.publish(&state);
        Ok(end)
    }

    /// Cuts everything behind a boundary. Can be repeated after an error.
    fn cut_back(&mut self, end: Lsn, target: Place) -> Result<()> {
        // Until it is done, nothing may be appended to what is half cut.
        self.dropping = true;
        loop {
            let last = self.shared.lock().segments.back().map_or(target.sequence, |segment| segment.sequence);
            if last <= target.sequence {
                break;
            }
            remove_segment(&*self.shared.file_system, &self.shared.directory, last)
                .map_err(|error| disk_error(error, format!("removing the queue's segment {last}")))?;
            let mut state = self.shared.lock();
            if let Some(segment) = state.segments.pop_back() {
                state.bytes -= segment.bytes;
            }
        }
        if self.place.sequence != target.sequence {
            let path = segment_path(&self.shared.directory, target.sequence);
            self.file = self
                .shared
                .file_system
                .open(&path)
                .map_err(|error| disk_error(error, format!("opening the queue's segment {}", path.display())))?;
            // Full segments are synced; what is kept of this one is.
            self.synced_offset = target.offset;
        }
        self.place = target;
        let length = self.file.len().map_err(|error| disk_error(error, self.doing("cutting")))?;
        if length < target.offset {
            let text = format!("{length} bytes are left of {} that were durable", target.offset);
            return Err(Error::new(ErrorKind::Queue, text).context(self.doing("cutting")));
        }
        if length > target.offset {
            self.file.truncate(target.offset).map_err(|error| disk_error(error, self.doing("cutting")))?;
            if let Err(error) = self.file.sync_data() {
                // What is appended here next must not meet the old tail again after a crash. A new segment's header
                // says where this one counts no more, whether the cut is durable or not.
                tracing::warn!(%error, "the cut of the queue's segment is not durable");
                self.failed = true;
            }
        }
        self.synced_offset = target.offset;
        self.chain = end;
        self.inside = false;
        let mut state = self.shared.lock();
        let mut freed = 0;
        if let Some(segment) = state.segments.back_mut() {
            freed = segment.bytes.saturating_sub(target.offset);
            segment.bytes = target.offset;
            segment.release = None;
        }
        state.bytes -= freed;
        self.shared.publish(&state);
        Ok(())
    }

    /// Waits after a refused write; false where the block is to be given up.
    fn wait_for_room(&mut self, error: &io::Error) -> bool {
        let retry = self.shared.options.retry;
        {
            let mut state = self.shared.lock();
            if !state.disk_full {
                tracing::warn!(
                    %error, directory = %self.shared.directory.display(),
                    "the disk of the queue is full: the stream waits until there is room"
                );
                state.disk_full = true;
                self.shared.publish(&state);
            }
        }
        // Everything written so far can be acknowledged, applied and trimmed: that makes room.
        if let Err(error) = self.sync() {
            self.fail(error);
            return false;
        }
        self.make_room();
        let state = self.shared.lock();
        if state.rewinding || state.closing {
            return false;
        }
        let (state, _) =
            self.shared.writer.wait_timeout(state, retry).unwrap_or_else(std::sync::PoisonError::into_inner);
        !state.rewinding && !state.closing
    }

    /// Gives up applied segments that are only kept for `--queue-keep`, where the queue is full.
    fn make_room(&self) {
        if !self.shared.lock().is_full(&self.shared.options) {
            return;
        }
        if let Err(error) = self.shared.trim(Lsn::ZERO) {
            // The caller of `trim` meets it too, and can stop.
            tracing::warn!(%error, "the queue is full and an applied segment cannot be removed");
        }
    }

    fn doing(&self, what: &str) -> String {
        let path = segment_path(&self.shared.directory, self.place.sequence);
        format!("{what} the queue's segment {} at offset {}", path.display(), self.place.offset)
    }
}

impl Drop for Writer {
    /// However the thread ends, nobody waits for it for ever.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if state.failure.is_none() {
            state.failure = Some((ErrorKind::Queue, "the queue's writer has ended".into()));
        }
        self.shared.publish(&state);
    }
}
