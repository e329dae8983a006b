//! The body of the fuzz target of the queue's recovery.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::faults::FaultyFileSystem;
use super::file_system::FileSystem;
use super::format::{BLOCK_HEADER_BYTES, BlockHeader, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::segment::segment_path;
use super::{Appender, Entry, Options, Queue, TransactionHead, open_on};
use crate::error::{ErrorKind, Result};
use crate::lsn::Lsn;

const START: Lsn = Lsn(1000);
/// Entries read from a queue at most: lying headers could otherwise make one of any length.
const ENTRIES_MAX: usize = 100_000;

/// Small, so that a few transactions fill blocks and segments.
fn options() -> Options {
    Options {
        max_bytes: 1 << 20,
        keep: Duration::ZERO,
        segment_bytes: 2048,
        block_bytes: 256,
        in_flight_bytes: 4096,
        sync_bytes: 512,
        retry: Duration::from_millis(1),
    }
}

fn open(disk: &FaultyFileSystem) -> Result<(Queue, Appender)> {
    open_on(Arc::new(disk.clone()), directory(), START, options())
}

fn directory() -> &'static Path {
    Path::new("/q")
}

/// Opens and reads a queue that any bytes have made or damaged: opening and reading give what was written or an error, never a
/// panic, and what opened takes more and opens again.
///
/// The first byte says what the others are: segments as they stand (even), or damage done to a queue of a known content (odd).
///
/// # Panics
/// When one of these does not hold.
pub fn any_bytes(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    if first.is_multiple_of(2) {
        read_back(&made_of(rest), None);
        return;
    }
    let Some((transactions, damage)) = rest.split_first() else { return };
    let transactions = u64::from(transactions % 24);
    let disk = FaultyFileSystem::new(1);
    let written = write(&disk, transactions);
    let forged = spoil(&disk, damage);
    // A checksum that was made to fit vouches for anything.
    read_back(&disk, if forged { None } else { Some(&written) });
}

/// Segments, each a length of two bytes and its content.
fn made_of(mut bytes: &[u8]) -> FaultyFileSystem {
    let disk = FaultyFileSystem::new(1);
    let mut sequence = 0;
    while let [low, high, rest @ ..] = bytes {
        sequence += 1;
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let path = segment_path(directory(), sequence);
        if disk.create(&path).is_ok() {
            disk.set_content(&path, rest[..length].to_vec());
        }
        bytes = &rest[length..];
    }
    disk
}

/// The input that makes the segments of a disk, for a corpus.
pub fn as_input(transactions: u64) -> Vec<u8> {
    let disk = FaultyFileSystem::new(1);
    write(&disk, transactions);
    let mut input = vec![0];
    for path in segments(&disk) {
        let content = disk.content(&path);
        input.extend_from_slice(&u16::try_from(content.len()).unwrap_or(u16::MAX).to_le_bytes());
        input.extend_from_slice(&content);
    }
    input
}

fn segments(disk: &FaultyFileSystem) -> Vec<PathBuf> {
    disk.names().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "segment")).collect()
}

/// Transactions of all sizes, some of which do not fit into a segment, and positions between them.
fn entries_of(number: u64) -> Vec<Entry> {
    let end = Lsn(START.0 + 100 * (number + 1));
    if number % 5 == 4 {
        return vec![Entry::Position(end)];
    }
    let head = TransactionHead { xid: number as u32, commit_lsn: Lsn(end.0 - 10), commit_time: number as i64 };
    let bytes = [10, 700, 60, 2500][number as usize % 4];
    let data = |piece: u64| {
        let content = (0..bytes).map(|at: u64| ((at * (number + 3) * (piece + 7)) >> (at % 5)) as u8);
        Entry::Data(content.collect::<Vec<u8>>().into())
    };
    let mut entries = vec![Entry::Begin(head)];
    entries.extend((0..number % 3).map(data));
    entries.push(Entry::Commit { end_lsn: end });
    entries
}

fn append(appender: &mut Appender, entry: &Entry) -> Result<()> {
    match entry {
        Entry::Begin(head) => appender.begin(*head),
        Entry::Data(bytes) => appender.data(bytes),
        Entry::Commit { end_lsn } => appender.commit(*end_lsn),
        Entry::Position(lsn) => appender.position(*lsn),
    }
}

fn write(disk: &FaultyFileSystem, transactions: u64) -> Vec<Entry> {
    let written: Vec<Entry> = (0..transactions).flat_map(entries_of).collect();
    let (_queue, mut appender) = open(disk).unwrap_or_else(|error| panic!("{error:?}"));
    for entry in &written {
        append(&mut appender, entry).unwrap_or_else(|error| panic!("{error:?}"));
    }
    // Dropped, it writes what it has.
    written
}

/// Does damage, six bytes of input at a time: what, to which segment, where (two bytes), with what (two bytes). Answers whether
/// any of it was given a valid checksum.
fn spoil(disk: &FaultyFileSystem, damage: &[u8]) -> bool {
    let mut forged = false;
    for act in damage.chunks_exact(6).take(32) {
        let all = segments(disk);
        if all.is_empty() {
            break;
        }
        let path = &all[usize::from(act[1]) % all.len()];
        let mut content = disk.content(path);
        let (place, value) = (usize::from(u16::from_le_bytes([act[2], act[3]])), u16::from_le_bytes([act[4], act[5]]));
        let at = place % content.len().max(1);
        match act[0] % 8 {
            0 if !content.is_empty() => content[at] ^= (value as u8).max(1),
            1 => content.truncate(at),
            2 => content.extend(std::iter::repeat_n(act[4], usize::from(act[5]))),
            3 if !content.is_empty() => drop(content.drain(at..(at + usize::from(value)).min(content.len()))),
            4 => {
                disk.delete(path);
                continue;
            }
            5 => {
                // Another segment's content under this name.
                content = disk.content(&all[place % all.len()]);
            }
            6 => forged |= forge_segment(&mut content, act[2] % 3, value),
            7 => forged |= forge_block(&mut content, place, act[4], act[5]),
            _ => {}
        }
        disk.set_content(path, content);
    }
    forged
}

fn forge_segment(content: &mut [u8], field: u8, value: u16) -> bool {
    let Some(bytes) = content.first_chunk_mut::<{ SEGMENT_HEADER_BYTES as usize }>() else { return false };
    let Ok(mut header) = SegmentHeader::decode(bytes) else { return false };
    match field {
        0 => header.continues = !header.continues,
        1 => header.first_lsn = Lsn(u64::from(value) * if value.is_multiple_of(2) { 1 } else { u64::MAX / 65_535 }),
        _ => header.previous_bytes = u64::from(value),
    }
    *bytes = header.encode();
    true
}

fn forge_block(content: &mut [u8], place: usize, field: u8, value: u8) -> bool {
    let mut from = 0;
    for _ in 0..=place % 16 {
        match super::format::find_block_magic(content, from) {
            Some(at) => from = at + 1,
            None => return false,
        }
    }
    let at = from - 1;
    let Some(bytes) = content.get_mut(at..).and_then(|bytes| bytes.first_chunk_mut::<BLOCK_HEADER_BYTES>()) else {
        return false;
    };
    let Ok(segment) = <[u8; 8]>::try_from(&bytes[16..24]) else { return false };
    let Ok(mut block) = BlockHeader::decode(bytes, u64::from_le_bytes(segment), at as u64) else { return false };
    let number = u64::from(value) * if value.is_multiple_of(2) { 1 } else { u64::MAX / 255 };
    match field % 8 {
        0 => block.ends_at_boundary = !block.ends_at_boundary,
        1 => block.starts_inside = !block.starts_inside,
        2 => block.raw_bytes = number as u32,
        3 => block.stored_bytes = number as u32,
        4 => block.first_lsn = Lsn(number),
        5 => block.last_lsn = Lsn(number),
        6 => block.durable_offset = number,
        _ => block.payload_crc = block.payload_crc.wrapping_add(u32::from(value)),
    }
    *bytes = block.encode();
    true
}

/// Opens and reads what is there; `written` is what it must be the beginning of.
fn read_back(disk: &FaultyFileSystem, written: Option<&[Entry]>) {
    let (queue, mut appender) = match open(disk) {
        Ok(opened) => opened,
        Err(error) => return assert_eq!(error.kind(), ErrorKind::Queue, "{error:?}"),
    };
    let read = read(&queue);
    if let Some(written) = written {
        let (read, whole) = match &read {
            Ok(read) => (read, true),
            // It stops at the corruption, and says so.
            Err((read, error)) => {
                assert_eq!(error.kind(), ErrorKind::Queue, "{error:?}");
                (read, false)
            }
        };
        let missing = written.len().checked_sub(read.len());
        // Where the first segments are gone, as after a trim, it begins later.
        let is_part = missing.is_some_and(|missing| (0..=missing).any(|from| written[from..].starts_with(read)));
        assert!(is_part, "{read:?} is no part of what was written");
        assert!(!whole || read.last().is_none_or(|entry| matches!(entry, Entry::Commit { .. } | Entry::Position(_))));
    }
    // Whatever it was, it goes on behind its end.
    let next = Lsn(queue.written_end().0.saturating_add(500));
    if next > queue.written_end() && next < Lsn::MAX {
        let appended = append(&mut appender, &Entry::Position(next));
        drop((appender, queue));
        if appended.is_ok() {
            let again = open(disk).map(|(queue, _)| queue.durable_end());
            assert!(matches!(again, Ok(end) if end == next), "{again:?} after {next}");
        }
    }
}

/// All entries, or those before an error.
fn read(queue: &Queue) -> Result<Vec<Entry>, (Vec<Entry>, crate::error::Error)> {
    let mut entries = Vec::new();
    let mut reader = queue.reader(queue.start()).map_err(|error| (Vec::new(), error))?;
    while entries.len() < ENTRIES_MAX {
        match reader.next(Duration::ZERO) {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => return Ok(entries),
            Err(error) => return Err((entries, error)),
        }
    }
    panic!("it does not end");
}
