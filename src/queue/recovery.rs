//! Opening a queue: what the last process, or the last crash, left behind.
//!
//! The header of a segment says how its predecessor ended, and the predecessor was durable in full before the header
//! was written. So opening reads the headers of all segments, and the blocks of the last one alone; the blocks of the
//! others are checked when they are read. In the last segment the first thing that is no block is either the tail that
//! a crash tore, and everything from there on goes, or corruption, and nothing is touched. The blocks behind it tell:
//! each says how much of the segment was durable when it was written, and what was durable cannot have been torn.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::file_system::{File, FileSystem};
use super::format::{
    BLOCK_HEADER_BYTES, BlockHeader, Entry, FORMAT_VERSION, SEGMENT_HEADER_BYTES, SegmentHeader, find_block_magic,
    next_frame,
};
use super::segment::{
    BlockFault, Place, Segment, corrupt, create_segment, disk_error, read_block_header, read_payload,
    read_segment_header, remove_segment, segment_path, sequence_of, unpack,
};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;

/// What recovery found, and left durable.
pub(super) struct Recovered {
    pub segments: VecDeque<Segment>,
    pub start: Lsn,
    /// The newest boundary.
    pub end: Lsn,
    /// Where the last segment goes on: behind that boundary.
    pub end_place: Place,
    /// The last segment's file.
    pub file: Arc<dyn File>,
    /// An older walferry wrote it: its header does not speak for blocks of this one, which begin a segment of their own.
    pub outdated: bool,
}

struct Found {
    header: SegmentHeader,
    file: Arc<dyn File>,
    length: u64,
    modified: SystemTime,
}

/// Opens the segments of a directory, or makes the first.
pub(super) fn recover(file_system: &dyn FileSystem, directory: &Path, start: Lsn) -> Result<Recovered> {
    let doing = || format!("opening the queue in {}", directory.display());
    file_system.prepare(directory).map_err(|error| disk_error(error, doing()))?;
    let mut found = find_segments(file_system, directory)?;
    if found.is_empty() {
        let header = SegmentHeader {
            sequence: 1,
            first_lsn: start,
            continues: false,
            previous_bytes: 0,
            version: FORMAT_VERSION,
        };
        let file = create_segment(file_system, directory, &header).map_err(|error| disk_error(error, doing()))?;
        let segment = Segment {
            sequence: 1,
            first_lsn: start,
            continues: false,
            bytes: SEGMENT_HEADER_BYTES,
            release: None,
            last_write: SystemTime::now(),
        };
        let end_place = Place { sequence: 1, offset: SEGMENT_HEADER_BYTES };
        return Ok(Recovered {
            segments: VecDeque::from([segment]),
            start,
            end: start,
            end_place,
            file,
            outdated: false,
        });
    }
    cut_what_was_taken_back(directory, &mut found)?;
    let (end, end_place) = cut_tail(file_system, directory, &mut found)?;
    let start = start_of(directory, &found, end_place, end)?;
    let segments = describe(&found, end, end_place);
    // `cut_tail` leaves at least one segment, or fails.
    let Some(last) = found.pop() else { return Err(Error::new(ErrorKind::Other, "recovery lost its last segment")) };
    let outdated = last.header.version < FORMAT_VERSION;
    Ok(Recovered { segments, start, end, end_place, file: last.file, outdated })
}

/// All segments in order, their headers checked one against the other. The remains of a creation that a crash cut
/// short are removed.
fn find_segments(file_system: &dyn FileSystem, directory: &Path) -> Result<Vec<Found>> {
    let doing = || format!("looking for the queue's segments in {}", directory.display());
    let names = file_system.list(directory).map_err(|error| disk_error(error, doing()))?;
    let mut sequences: Vec<u64> = names.iter().filter_map(|name| sequence_of(name)).collect();
    sequences.sort_unstable();
    // A name that a crash could still take back must not be built upon.
    file_system.sync_directory(directory).map_err(|error| disk_error(error, doing()))?;

    let mut found: Vec<Found> = Vec::with_capacity(sequences.len());
    for (position, &sequence) in sequences.iter().enumerate() {
        let path = segment_path(directory, sequence);
        let opening = || format!("opening the queue's segment {}", path.display());
        let file = file_system.open(&path).map_err(|error| disk_error(error, opening()))?;
        let is_last = position + 1 == sequences.len();
        if is_last {
            // An fsync that failed after nobody listened any more shows here; and what the disk does not hold must
            // not be taken from the cache (H17).
            file.sync_data().map_err(|error| disk_error(error, opening()))?;
            if let Err(error) = file.evict() {
                tracing::debug!(%error, segment = sequence, "the queue's last segment is read from the cache");
            }
        }
        let newest = found.last().map(|previous| previous.header);
        if let Some(previous) = newest
            && previous.sequence + 1 != sequence
        {
            return Err(missing(file_system, directory, previous, sequence));
        }
        let Some(header) = read_segment_header(&*file, &path, sequence)? else {
            // The first segment of all holds nothing before its header is durable; of the others, the predecessor is
            // still there.
            if is_last && (sequence == 1 || newest.is_some()) {
                tracing::warn!(segment = %path.display(), "a segment whose creation was cut short is removed");
                remove_segment(file_system, directory, sequence).map_err(|error| disk_error(error, opening()))?;
                break;
            }
            let after = newest.map_or(Lsn::ZERO, |previous| previous.first_lsn);
            return Err(corrupt(&path, 0, after, Lsn::MAX, "it has no header"));
        };
        if let Some(previous) = newest
            && header.first_lsn < previous.first_lsn
        {
            return Err(corrupt(&path, 0, header.first_lsn, previous.first_lsn, "it starts before its predecessor"));
        }
        let length = file.len().map_err(|error| disk_error(error, opening()))?;
        let modified = file.modified().map_err(|error| disk_error(error, opening()))?;
        found.push(Found { header, file, length, modified });
    }
    Ok(found)
}

/// The error for a hole among the segments, with the range that it tears.
fn missing(file_system: &dyn FileSystem, directory: &Path, previous: SegmentHeader, next: u64) -> Error {
    let next_path = segment_path(directory, next);
    let header = file_system.open(&next_path).ok().map(|file| read_segment_header(&*file, &next_path, next));
    let up_to = match header {
        Some(Ok(Some(header))) => header.first_lsn,
        _ => Lsn::MAX,
    };
    let path = segment_path(directory, previous.sequence + 1);
    corrupt(&path, 0, previous.first_lsn, up_to, "the file is missing between its neighbours")
}

/// Cuts every segment but the last to the length at which its successor began, and refuses a shorter one.
fn cut_what_was_taken_back(directory: &Path, found: &mut [Found]) -> Result<()> {
    for position in 1..found.len() {
        let (before, after) = found.split_at_mut(position);
        let (Some(segment), Some(next)) = (before.last_mut(), after.first()) else { continue };
        let path = segment_path(directory, segment.header.sequence);
        let counted = next.header.previous_bytes;
        if counted < SEGMENT_HEADER_BYTES {
            // Cut there, it would lose its own header.
            let (path, from, up_to) =
                (segment_path(directory, next.header.sequence), segment.header.first_lsn, next.header.first_lsn);
            return Err(corrupt(&path, 0, from, up_to, "it says that the segment before it had no header"));
        }
        if segment.length < counted {
            let (from, up_to) = (segment.header.first_lsn, next.header.first_lsn);
            return Err(corrupt(&path, segment.length, from, up_to, "the file is shorter than it was"));
        }
        if segment.length > counted {
            tracing::warn!(segment = %path.display(), offset = counted, "what a failed fsync left is cut off");
            // Not synced: should the cut be lost, the successor's header says the same the next time.
            segment.file.truncate(counted).map_err(|error| disk_error(error, format!("cutting {}", path.display())))?;
            segment.length = counted;
        }
    }
    Ok(())
}

/// Cuts a torn tail and an incomplete last transaction, however many segments it has. Returns the last boundary.
fn cut_tail(file_system: &dyn FileSystem, directory: &Path, found: &mut Vec<Found>) -> Result<(Lsn, Place)> {
    let mut torn_may_be = true;
    while let Some(last) = found.last() {
        let sequence = last.header.sequence;
        let path = segment_path(directory, sequence);
        let tail = scan(last, &path, torn_may_be)?;
        let Some((end, offset)) = tail else {
            // All of it belongs to a transaction that did not end.
            if found.len() == 1 {
                let after = last.header.first_lsn;
                let what = "it starts inside a transaction that was durable and does not end in it any more";
                return Err(corrupt(&path, SEGMENT_HEADER_BYTES, after, Lsn::MAX, what));
            }
            tracing::info!(segment = %path.display(), "a segment of an incomplete transaction is removed");
            remove_segment(file_system, directory, sequence)
                .map_err(|error| disk_error(error, format!("removing {}", path.display())))?;
            found.pop();
            torn_may_be = false;
            continue;
        };
        if offset < last.length {
            tracing::info!(segment = %path.display(), offset, after = %end, "the queue's incomplete tail is cut off");
            let cut = last.file.truncate(offset).and_then(|()| last.file.sync_data());
            cut.map_err(|error| disk_error(error, format!("cutting the tail of {}", path.display())))?;
        }
        return Ok((end, Place { sequence, offset }));
    }
    Err(Error::new(ErrorKind::Other, "the queue has no segment to recover"))
}

/// The last boundary of a segment and the offset behind it; `None` where it starts inside a transaction and has none.
fn scan(segment: &Found, path: &Path, torn_may_be: bool) -> Result<Option<(Lsn, u64)>> {
    let header = &segment.header;
    let mut boundary = if header.continues { None } else { Some((header.first_lsn, SEGMENT_HEADER_BYTES)) };
    let mut chain = header.first_lsn;
    let mut inside = header.continues;
    let mut offset = SEGMENT_HEADER_BYTES;
    let mut stored = Vec::new();
    while offset < segment.length {
        let block = read_block_header(&*segment.file, header.sequence, offset, segment.length).and_then(|block| {
            read_payload(&*segment.file, &block, &mut stored)?;
            if block.first_lsn != chain || block.starts_inside != inside {
                return Err(BlockFault::Damaged("the block does not follow the one before it"));
            }
            Ok(block)
        });
        let block = match block {
            Ok(block) => block,
            Err(fault @ BlockFault::Unreadable(_)) => return Err(fault.into_error(path, offset, chain, Lsn::MAX)),
            Err(fault) => {
                let proof = find_proof_of_corruption(segment, offset)
                    .map_err(|error| disk_error(error, format!("reading {}", path.display())))?;
                if let Some(later) = proof {
                    return Err(fault.into_error(path, offset, chain, later.last_lsn));
                }
                if !torn_may_be {
                    return Err(fault.into_error(path, offset, chain, Lsn::MAX));
                }
                tracing::warn!(segment = %path.display(), offset, after = %chain, ?fault, "the queue has a torn tail");
                return Ok(boundary);
            }
        };
        offset += block.block_bytes();
        chain = block.last_lsn;
        inside = !block.ends_at_boundary;
        if block.ends_at_boundary {
            boundary = Some((chain, offset));
        }
    }
    Ok(boundary)
}

/// A whole block behind a fault that was written when the fault's place was durable already: then it was not torn.
fn find_proof_of_corruption(segment: &Found, fault: u64) -> std::io::Result<Option<BlockHeader>> {
    const WINDOW_BYTES: u64 = 1 << 20;
    let overlap = BLOCK_HEADER_BYTES as u64;
    let mut window = Vec::new();
    let mut stored = Vec::new();
    let mut from = fault;
    while from < segment.length {
        let bytes = WINDOW_BYTES.min(segment.length - from);
        window.resize(bytes as usize, 0);
        segment.file.read_at(&mut window, from)?;
        let mut position = 0;
        while let Some(at) = find_block_magic(&window, position) {
            position = at + 1;
            let offset = from + at as u64;
            let Ok(block) = read_block_header(&*segment.file, segment.header.sequence, offset, segment.length) else {
                continue;
            };
            if block.durable_offset > fault && read_payload(&*segment.file, &block, &mut stored).is_ok() {
                return Ok(Some(block));
            }
        }
        from += if bytes > overlap { bytes - overlap.min(bytes - 1) } else { bytes };
        if bytes < WINDOW_BYTES {
            break;
        }
    }
    Ok(None)
}

/// Every transaction with an end LSN past this is held. Where the oldest segment starts inside a transaction, that one
/// is applied, or the segments before would not be gone; its end is the first boundary.
fn start_of(directory: &Path, found: &[Found], end_place: Place, end: Lsn) -> Result<Lsn> {
    let Some(first) = found.first() else { return Ok(end) };
    if !first.header.continues {
        return Ok(first.header.first_lsn);
    }
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    let mut stored = Vec::new();
    for segment in found {
        let sequence = segment.header.sequence;
        let path = segment_path(directory, sequence);
        let limit = if sequence == end_place.sequence { end_place.offset } else { segment.length };
        let mut offset = SEGMENT_HEADER_BYTES;
        while offset < limit {
            let fault = |fault: BlockFault| fault.into_error(&path, offset, segment.header.first_lsn, end);
            let block = read_block_header(&*segment.file, sequence, offset, limit).map_err(fault)?;
            if block.ends_at_boundary {
                read_payload(&*segment.file, &block, &mut stored).map_err(fault)?;
                let frames = unpack(&block, &mut stored, &mut decompressor).map_err(fault)?;
                let mut cursor = 0;
                while let Some(entry) = next_frame(&frames, &mut cursor) {
                    if let Entry::Commit { end_lsn } = entry {
                        return Ok(end_lsn);
                    }
                }
                return Err(fault(BlockFault::Damaged("no transaction ends in it though its header says so")));
            }
            offset += block.block_bytes();
        }
    }
    Ok(end)
}

/// The segments as the open queue knows them.
fn describe(found: &[Found], end: Lsn, end_place: Place) -> VecDeque<Segment> {
    let mut segments = VecDeque::with_capacity(found.len());
    for (position, segment) in found.iter().enumerate() {
        let is_last = segment.header.sequence == end_place.sequence;
        // A segment that ends inside a transaction is needed until that one is applied. It ends in the first later
        // segment that has a boundary, at the latest with that segment's last.
        let release = found.get(position + 1).map(|next| {
            if !next.header.continues {
                return next.header.first_lsn;
            }
            let mut later = found.iter().skip(position + 2).map(|one| one.header.first_lsn);
            later.find(|lsn| *lsn > next.header.first_lsn).unwrap_or(end)
        });
        segments.push_back(Segment {
            sequence: segment.header.sequence,
            first_lsn: segment.header.first_lsn,
            continues: segment.header.continues,
            bytes: if is_last { end_place.offset } else { segment.length },
            release,
            last_write: segment.modified,
        });
    }
    segments
}
