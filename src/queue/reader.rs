//! The side of the queue that the apply reads from: whole transactions, each checked before any of it is handed out.
//!
//! A reader goes up to the newest boundary that is written, so everything it meets is complete, and what a rewind cuts
//! lies behind it. One thing can take back what a reader may have seen: a failed fsync (H17). What was handed out whole
//! stays handed out, the target's ledger knows it, and when the stream brings it again the reader leaves it out. In the
//! middle of a transaction the reader cannot go on, and says so with a transient error.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::file_system::File;
use super::format::{BlockHeader, Entry, SEGMENT_HEADER_BYTES, next_frame};
use super::segment::{
    BlockFault, Place, Segment, corrupt, disk_error, read_block_header, read_payload, segment_path, unpack,
};
use super::state::{Shared, State};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;

/// Reads the queue in order, from a plain thread. Holds one block in memory.
pub struct Reader {
    shared: Arc<Shared>,
    /// What ends at or below this was handed out, or was not asked for.
    after: Lsn,
    /// Whether a transaction's Begin was handed out and not yet its Commit.
    handing_out: bool,
    /// Whether the frames at the cursor belong to a transaction that is left out.
    leaving_out: bool,
    /// The newest boundary before the cursor, handed out or not.
    passed: Lsn,
    /// Frames of the block being read, and how far it is.
    frames: Bytes,
    cursor: usize,
    /// The block that comes next.
    scan: Scan,
    /// What [`State::generation`] was when `scan` was known to be good.
    generation: u64,
    /// A block's payload as it is stored.
    stored: Vec<u8>,
    decompressor: zstd::bulk::Decompressor<'static>,
}

/// A place between two blocks, and what the block there has to say of what is before it.
#[derive(Clone)]
struct Scan {
    place: Place,
    /// The newest boundary before the place.
    chain: Lsn,
    /// Whether the place lies inside a transaction.
    inside: bool,
    /// The segment's file, once it was opened.
    file: Option<Arc<dyn File>>,
}

/// What there is at a place.
enum Ahead {
    /// A block, in a segment of which this much counts.
    Block { limit: u64 },
    /// The next segment.
    NextSegment(Scan),
    /// Nothing complete yet.
    End,
    /// The segment is gone.
    Trimmed,
}

impl Reader {
    pub(super) fn open(shared: Arc<Shared>, after: Lsn) -> Result<Reader> {
        let (generation, scan) = {
            let state = shared.lock();
            (state.generation, seek(&state, after)?)
        };
        Ok(Reader {
            shared,
            after,
            handing_out: false,
            leaving_out: scan.inside,
            passed: scan.chain,
            frames: Bytes::new(),
            cursor: 0,
            scan,
            generation,
            stored: Vec::new(),
            decompressor: zstd::bulk::Decompressor::new()?,
        })
    }

    /// The next entry; `None` when nothing complete came within `wait`. After a Begin the rest of the transaction is
    /// there without waiting.
    ///
    /// # Errors
    /// [`ErrorKind::Queue`] when the next block is corrupt, [`ErrorKind::Disk`] when it cannot be read: nothing of it is handed out.
    /// [`ErrorKind::Transient`] when the rest of a transaction was taken back by a failed fsync: open a new reader at the
    /// ledger's position. [`ErrorKind::Gap`] when `trim` was told of more than this reader has handed out, and it is gone.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Entry>> {
        let deadline = Instant::now() + wait;
        loop {
            while self.cursor < self.frames.len() {
                if let Some(entry) = self.next_wanted()? {
                    return Ok(Some(entry));
                }
            }
            // The block goes before the next one comes: one is in memory at a time.
            self.frames = Bytes::new();
            self.cursor = 0;
            if !self.load(deadline)? {
                return Ok(None);
            }
        }
    }

    /// The frame at the cursor, or `None` where it is left out.
    fn next_wanted(&mut self) -> Result<Option<Entry>> {
        let frame = next_frame(&self.frames, &mut self.cursor);
        let Some(entry) = frame else {
            let place = self.scan.place;
            let what = "a block that ends here holds something that is no frame";
            let up_to = self.shared.lock().written_end;
            return Err(corrupt(&self.path(place.sequence), place.offset, self.passed, up_to, what));
        };
        match entry {
            Entry::Begin(_) => {
                // What follows a boundary that was handed out ends past it. Otherwise only its end tells.
                self.leaving_out = self.passed < self.after
                    && match self.transaction_end() {
                        Ok(end) => end <= self.after,
                        Err(error) if error.is_transient() => {
                            // Taken back, and nothing of it was handed out: look again from the start.
                            self.frames = Bytes::new();
                            self.cursor = 0;
                            let shared = Arc::clone(&self.shared);
                            let state = shared.lock();
                            self.generation = state.generation;
                            self.seek_again(&state)?;
                            return Ok(None);
                        }
                        Err(error) => return Err(error),
                    };
                self.handing_out = !self.leaving_out;
            }
            Entry::Data(_) => {}
            Entry::Commit { end_lsn } => {
                self.passed = end_lsn;
                if std::mem::take(&mut self.leaving_out) {
                    return Ok(None);
                }
                self.handing_out = false;
                self.after = end_lsn;
            }
            Entry::Position(lsn) => {
                self.passed = lsn;
                if lsn <= self.after {
                    return Ok(None);
                }
                self.after = lsn;
            }
        }
        Ok(if self.leaving_out { None } else { Some(entry) })
    }

    /// The next block with something to hand out into `frames`; false when there was none until the deadline.
    fn load(&mut self, deadline: Instant) -> Result<bool> {
        loop {
            let limit = {
                let shared = Arc::clone(&self.shared);
                let mut state = shared.lock();
                loop {
                    if state.generation != self.generation {
                        self.follow_taking_back(&state)?;
                    }
                    match ahead(&state, &self.scan) {
                        Ahead::Block { limit } => break limit,
                        Ahead::NextSegment(scan) => {
                            self.check_joint(&scan)?;
                            self.scan = scan;
                        }
                        Ahead::Trimmed if self.handing_out => return Err(gap(&state, self.after)),
                        Ahead::Trimmed => self.seek_again(&state)?,
                        Ahead::End => {
                            let left = deadline.saturating_duration_since(Instant::now());
                            if left.is_zero() {
                                return Ok(false);
                            }
                            let waited = shared.more.wait_timeout(state, left);
                            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
                        }
                    }
                }
            };
            let mut scan = self.scan.clone();
            match self.read_wanted(&mut scan, limit) {
                Ok(frames) => {
                    self.scan = scan;
                    if let Some(frames) = frames {
                        self.frames = frames;
                        return Ok(true);
                    }
                }
                Err(error) => {
                    // A failed fsync may have cut the file, or a trim removed it, while it was read.
                    let state = self.shared.lock();
                    let is_gone = matches!(ahead(&state, &self.scan), Ahead::Trimmed);
                    if state.generation == self.generation && !is_gone {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// The next block that may hold something wanted; `scan` moves behind it, or behind one that does not.
    fn read_wanted(&mut self, scan: &mut Scan, limit: u64) -> Result<Option<Bytes>> {
        let (block, file) = self.step(scan, limit)?;
        if !self.handing_out {
            if block.ends_at_boundary && block.last_lsn <= self.after {
                self.passed = block.last_lsn;
                self.leaving_out = false;
                return Ok(None);
            }
            if self.leaving_out && !block.ends_at_boundary {
                return Ok(None);
            }
        }
        self.payload(&block, &*file).map(Some)
    }

    /// Reads the header of the block at `scan`, which moves behind it.
    fn step(&self, scan: &mut Scan, limit: u64) -> Result<(BlockHeader, Arc<dyn File>)> {
        let Place { sequence, offset } = scan.place;
        let file = match &scan.file {
            Some(file) => Arc::clone(file),
            None => {
                let path = self.path(sequence);
                let opening = |error| disk_error(error, format!("opening the queue's segment {}", path.display()));
                self.shared.file_system.open(&path).map_err(opening)?
            }
        };
        let block = read_block_header(&*file, sequence, offset, limit).and_then(|block| {
            let follows = block.first_lsn == scan.chain && block.starts_inside == scan.inside;
            let what = "the block does not follow the one before it";
            if follows { Ok(block) } else { Err(BlockFault::Damaged(what)) }
        });
        let block = block.map_err(|fault| self.name(fault, scan.place, scan.chain))?;
        scan.file = Some(Arc::clone(&file));
        scan.place.offset += block.block_bytes();
        scan.chain = block.last_lsn;
        scan.inside = !block.ends_at_boundary;
        Ok((block, file))
    }

    fn payload(&mut self, block: &BlockHeader, file: &dyn File) -> Result<Bytes> {
        let frames = read_payload(file, block, &mut self.stored)
            .and_then(|()| unpack(block, &mut self.stored, &mut self.decompressor));
        let place = Place { sequence: block.segment, offset: block.offset };
        frames.map_err(|fault| self.name(fault, place, block.first_lsn))
    }

    fn name(&self, fault: BlockFault, place: Place, chain: Lsn) -> Error {
        let (up_to, durable) = {
            let state = self.shared.lock();
            (state.written_end, state.durable)
        };
        if place >= durable {
            // Between an fsync that fails and the writer's hearing of it, the kernel may have dropped what was written:
            // nothing acknowledged is harmed. If the fsync succeeds after all, the next try names the corruption.
            let text = format!("what was written after {chain} cannot be read back, and is not durable yet");
            return Error::new(ErrorKind::Transient, text);
        }
        fault.into_error(&self.path(place.sequence), place.offset, chain, up_to)
    }

    /// The end LSN of the transaction whose Begin was just read; it is complete, if not in this block.
    fn transaction_end(&mut self) -> Result<Lsn> {
        let mut frames = self.frames.clone();
        let mut cursor = self.cursor;
        let mut scan = self.scan.clone();
        loop {
            while let Some(entry) = next_frame(&frames, &mut cursor) {
                if let Entry::Commit { end_lsn } = entry {
                    return Ok(end_lsn);
                }
            }
            let next = {
                let state = self.shared.lock();
                if state.generation == self.generation { ahead(&state, &scan) } else { Ahead::Trimmed }
            };
            match next {
                Ahead::Block { limit } => {
                    let result = self.step(&mut scan, limit).and_then(|(block, file)| {
                        // Without a boundary there is no commit in it.
                        if block.ends_at_boundary { self.payload(&block, &*file).map(Some) } else { Ok(None) }
                    });
                    match result {
                        Ok(None) => {}
                        Ok(Some(more)) => {
                            frames = more;
                            cursor = 0;
                        }
                        Err(_) if self.shared.lock().generation != self.generation => {
                            return Err(taken_back(self.after));
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ahead::NextSegment(next) => scan = next,
                Ahead::End | Ahead::Trimmed => return Err(taken_back(self.after)),
            }
        }
    }

    /// Segments say how the one before ended: what they say has to be what was read.
    fn check_joint(&self, next: &Scan) -> Result<()> {
        if next.chain == self.scan.chain && next.inside == self.scan.inside {
            return Ok(());
        }
        let Place { sequence, offset } = self.scan.place;
        let what = "the segment ends elsewhere than the next one says";
        Err(corrupt(&self.path(sequence), offset, self.scan.chain, next.chain, what))
    }

    /// A failure has taken back what was written and not durable. What was read before that place is still good.
    fn follow_taking_back(&mut self, state: &State) -> Result<()> {
        let only_once = state.generation == self.generation + 1;
        if only_once && self.scan.place <= state.taken_back_to {
            self.generation = state.generation;
            return Ok(());
        }
        if self.handing_out {
            return Err(taken_back(self.after));
        }
        self.generation = state.generation;
        self.seek_again(state)
    }

    fn seek_again(&mut self, state: &State) -> Result<()> {
        self.scan = seek(state, self.after)?;
        self.passed = self.scan.chain;
        self.leaving_out = self.scan.inside;
        Ok(())
    }

    fn path(&self, sequence: u64) -> PathBuf {
        segment_path(&self.shared.directory, sequence)
    }
}

/// The start of the newest segment from which on everything past a position can be read.
fn seek(state: &State, after: Lsn) -> Result<Scan> {
    if after < state.start {
        return Err(gap(state, after));
    }
    let mut wanted = state
        .segments
        .iter()
        .filter(|segment| segment.sequence <= state.written.sequence && !state.is_done_with(segment));
    // A segment that starts inside a transaction does for those behind it alone. The oldest does in any case: what it
    // starts inside of ends at or before the queue's start.
    let oldest = wanted.clone().next();
    let newest = wanted.rfind(|segment| segment.first_lsn <= after && !segment.continues);
    Ok(match newest.or(oldest) {
        Some(segment) => start_of(segment),
        // All that is complete lies at or below the start.
        None => Scan { place: state.written, chain: state.written_end, inside: false, file: None },
    })
}

fn start_of(segment: &Segment) -> Scan {
    Scan {
        place: Place { sequence: segment.sequence, offset: SEGMENT_HEADER_BYTES },
        chain: segment.first_lsn,
        inside: segment.continues,
        file: None,
    }
}

fn ahead(state: &State, scan: &Scan) -> Ahead {
    let Place { sequence, offset } = scan.place;
    if scan.place >= state.written {
        return Ahead::End;
    }
    if sequence == state.written.sequence {
        return Ahead::Block { limit: state.written.offset };
    }
    let Some(segment) = state.segment(sequence) else { return Ahead::Trimmed };
    if state.is_done_with(segment) {
        return Ahead::Trimmed;
    }
    if offset < segment.bytes {
        return Ahead::Block { limit: segment.bytes };
    }
    match state.segment(sequence + 1) {
        Some(next) => Ahead::NextSegment(start_of(next)),
        None => Ahead::End,
    }
}

fn gap(state: &State, after: Lsn) -> Error {
    let text = format!(
        "the queue starts at {} and cannot be read from {after} on: what lies between is no longer there",
        state.start
    );
    Error::new(ErrorKind::Gap, text).hint(
        "the target lost progress that was applied longer ago than --queue-keep, or this is another migration's queue",
    )
}

fn taken_back(after: Lsn) -> Error {
    let text = format!("the transaction after {after} was taken back by a failed write to the queue's disk");
    Error::new(ErrorKind::Transient, text).hint("it comes again from the source; read again from the ledger's position")
}
