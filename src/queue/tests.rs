//! What the queue promises, one claim at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

use super::examine::examine_on;
use super::faults::FaultyFileSystem;
use super::file_system::FileSystem;
use super::format::{BLOCK_HEADER_BYTES, FORMAT_VERSION, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::model::{BASE, append, block_on, end_of, item, small_options};
use super::{Appender, Entry, Options, Queue, Reader, TransactionHead, open, open_on};
use crate::error::{ErrorKind, Result};
use crate::lsn::Lsn;

fn try_open(disk: &FaultyFileSystem, options: Options) -> Result<(Queue, Appender)> {
    open_on(Arc::new(disk.clone()), Path::new("/q"), Lsn(BASE), options)
}

fn roomy() -> Options {
    Options { max_bytes: 1 << 20, ..small_options() }
}

/// Appends items one by one, each durable before the next.
fn append_durably(appender: &mut Appender, items: std::ops::Range<u64>) {
    for number in items {
        item(number).iter().for_each(|entry| append(appender, entry).unwrap());
        assert_eq!(block_on(appender.rewind()).unwrap(), end_of(number));
    }
}

fn read_all(reader: &mut Reader) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    while let Some(entry) = reader.next(Duration::ZERO)? {
        entries.push(entry);
    }
    Ok(entries)
}

fn items(range: std::ops::Range<u64>) -> Vec<Entry> {
    range.flat_map(item).collect()
}

fn segment(sequence: u64) -> PathBuf {
    super::segment::segment_path(Path::new("/q"), sequence)
}

/// A disk with so many items on it, closed in order.
fn written_disk(count: u64) -> FaultyFileSystem {
    let disk = FaultyFileSystem::new(1);
    let (_queue, mut appender) = try_open(&disk, roomy()).unwrap();
    append_durably(&mut appender, 0..count);
    disk
}

#[test]
fn a_new_queue_starts_where_it_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("queue");
    let (queue, mut appender) = open(&path, Lsn(BASE), small_options()).unwrap();
    assert_eq!((queue.start(), queue.written_end(), queue.durable_end()), (Lsn(BASE), Lsn(BASE), Lsn(BASE)));
    append_durably(&mut appender, 0..40);
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..40));
    drop((queue, appender));
    // On a real file system, opened again, with another start that no longer counts.
    let (queue, _appender) = open(&path, Lsn::MAX, small_options()).unwrap();
    assert_eq!((queue.start(), queue.durable_end()), (Lsn(BASE), end_of(39)));
    assert_eq!(read_all(&mut queue.reader(end_of(20)).unwrap()).unwrap(), items(21..40));
    queue.trim(end_of(38)).unwrap();
    assert!(queue.start() > Lsn(BASE));
    let names = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.into_iter().all(|name| name != segment(1).file_name().unwrap()));
}

#[test]
fn a_reader_starts_after_any_position() {
    let (queue, mut appender) = try_open(&FaultyFileSystem::new(1), roomy()).unwrap();
    append_durably(&mut appender, 0..60);
    for number in 0..60 {
        let mut exact = queue.reader(end_of(number)).unwrap();
        assert_eq!(read_all(&mut exact).unwrap(), items(number + 1..60), "after item {number}");
        // Between two boundaries too: what ends past the position comes, from its Begin.
        let mut between = queue.reader(Lsn(end_of(number).0 - 1)).unwrap();
        assert_eq!(read_all(&mut between).unwrap(), items(number..60), "just before the end of item {number}");
    }
    // A ledger that is ahead of the queue: what it has is left out when it comes again.
    let mut ahead = queue.reader(end_of(64)).unwrap();
    append_durably(&mut appender, 60..70);
    assert_eq!(read_all(&mut ahead).unwrap(), items(65..70));
}

#[test]
fn h15_reading_before_the_queues_start_is_refused() {
    let disk = FaultyFileSystem::new(1);
    let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
    let refused = queue.reader(Lsn(BASE - 1)).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Gap);
    append_durably(&mut appender, 0..60);
    queue.trim(end_of(50)).unwrap();
    let start = queue.start();
    assert!(start > Lsn(BASE) && start <= end_of(50), "{start}");
    let refused = queue.reader(Lsn(start.0 - 1)).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Gap);
    let text = refused.to_string();
    assert!(text.contains(&start.to_string()) && text.contains(&Lsn(start.0 - 1).to_string()), "{text}");
    let from_start = read_all(&mut queue.reader(start).unwrap()).unwrap();
    assert_eq!(from_start, items(super::model::items_until(start)..60));
    // After opening again the start is where the oldest segment says, no later.
    drop((queue, appender));
    let (queue, _appender) = try_open(&disk, roomy()).unwrap();
    assert!(queue.start() > Lsn(BASE) && queue.start() <= start);
    assert_eq!(queue.reader(Lsn(BASE)).err().unwrap().kind(), ErrorKind::Gap);
    assert!(queue.reader(queue.start()).is_ok());
}

#[test]
fn h16_applied_segments_are_kept_and_given_up_when_the_quota_is_reached() {
    let disk = FaultyFileSystem::new(1);
    let options = Options { keep: Duration::from_secs(3600), max_bytes: 20 << 10, ..small_options() };
    let (queue, mut appender) = try_open(&disk, options).unwrap();
    append_durably(&mut appender, 0..17);
    queue.trim(end_of(16)).unwrap();
    assert_eq!(queue.start(), Lsn(BASE), "a segment went before its time");
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..17));
    append_durably(&mut appender, 17..40);
    assert!(queue.start() > Lsn(BASE), "the quota was reached, and nothing was given up");
    assert!(queue.start() <= end_of(16), "what is not applied was given up");
}

#[test]
fn h17_after_a_failed_fsync_the_segment_is_never_trusted() {
    let disk = FaultyFileSystem::new(1);
    let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
    append_durably(&mut appender, 0..2);
    let trusted = disk.content(&segment(1));

    disk.fail_syncs(1);
    item(2).iter().for_each(|entry| append(&mut appender, entry).unwrap());
    appender.flush().unwrap();
    let error = loop {
        if let Err(error) = block_on(appender.ready()) {
            break error;
        }
        std::thread::yield_now();
    };
    assert_eq!(error.kind(), ErrorKind::Disk);
    assert_eq!((queue.durable_end(), queue.written_end()), (end_of(1), end_of(1)));
    // Another fsync would succeed and prove nothing.
    assert_eq!(block_on(appender.rewind()).unwrap(), end_of(1));
    append_durably(&mut appender, 2..6);
    assert_eq!(disk.content(&segment(1)), trusted, "the failed segment was written again");
    assert!(disk.names().contains(&segment(2)));
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..6));

    drop((queue, appender));
    disk.crash();
    let (queue, _appender) = try_open(&disk, roomy()).unwrap();
    assert_eq!(queue.durable_end(), end_of(5));
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..6));
}

#[test]
fn h17_what_a_dead_process_failed_to_sync_is_not_taken_from_the_cache() {
    let disk = FaultyFileSystem::new(1);
    let (_queue, mut appender) = try_open(&disk, roomy()).unwrap();
    append_durably(&mut appender, 0..2);
    // The fsync fails and the process dies before it can do anything about it.
    let (written, path) = (disk.content(&segment(1)), segment(1));
    disk.fail_syncs(1);
    item(2).iter().for_each(|entry| append(&mut appender, entry).unwrap());
    appender.flush().unwrap();
    while block_on(appender.ready()).is_ok() {
        std::thread::yield_now();
    }
    drop(appender);
    disk.restart_process();
    let (queue, appender) = try_open(&disk, roomy()).unwrap();
    assert_eq!(queue.durable_end(), end_of(1));
    assert_eq!(disk.content(&path), written);
    drop((queue, appender));
}

#[test]
fn h18_a_segment_of_a_newer_format_is_refused() {
    let disk = written_disk(3);
    let mut content = disk.content(&segment(1));
    content[8] = FORMAT_VERSION as u8 + 1;
    disk.set_content(&segment(1), content.clone());
    let error = try_open(&disk, roomy()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Queue);
    let newer = format!("format version {}", FORMAT_VERSION + 1);
    assert!(error.to_string().contains(&newer), "{error}");
    assert_eq!(disk.content(&segment(1)), content, "it was touched");
}

#[test]
fn h18_a_queue_of_an_older_format_goes_on_in_a_segment_of_this_one() {
    let disk = written_disk(3);
    let mut content = disk.content(&segment(1));
    let mut header = SegmentHeader::decode(content.first_chunk().unwrap()).unwrap();
    header.version = 1;
    content[..SEGMENT_HEADER_BYTES as usize].copy_from_slice(&header.encode());
    disk.set_content(&segment(1), content.clone());
    let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
    append_durably(&mut appender, 3..5);
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..5));
    assert_eq!(disk.content(&segment(1)), content, "something was appended under the old header");
    drop((queue, appender));
    let (queue, _appender) = try_open(&disk, roomy()).unwrap();
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..5));
}

#[test]
fn a_torn_tail_is_cut_at_any_byte() {
    let whole = written_disk(3);
    let content = whole.content(&segment(1));
    let mut ends_before = Lsn(BASE);
    for length in 0..=content.len() {
        let disk = FaultyFileSystem::new(1);
        drop(try_open(&disk, roomy()).unwrap());
        disk.set_content(&segment(1), content[..length].to_vec());
        let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
        let end = queue.durable_end();
        assert!(end >= ends_before);
        ends_before = end;
        let there = super::model::items_until(end);
        assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..there));
        append_durably(&mut appender, there..4);
        assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..4));
    }
    assert_eq!(ends_before, end_of(2));
}

#[test]
fn corruption_in_the_middle_is_named() {
    // In the last segment, where a later block says that the place was durable.
    let disk = written_disk(3);
    let mut content = disk.content(&segment(1));
    content[SEGMENT_HEADER_BYTES as usize + BLOCK_HEADER_BYTES] ^= 1;
    disk.set_content(&segment(1), content.clone());
    let error = try_open(&disk, roomy()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Queue);
    let text = error.to_string();
    for part in ["00000000000000000001.segment", "at offset 64", &Lsn(BASE).to_string(), &end_of(1).to_string()] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(disk.content(&segment(1)), content, "it was touched");

    // In an older segment, where the reader meets it.
    let disk = written_disk(40);
    let mut content = disk.content(&segment(2));
    let last = content.len() - 1;
    content[last] ^= 1;
    disk.set_content(&segment(2), content);
    let (queue, _appender) = try_open(&disk, roomy()).unwrap();
    let error = read_all(&mut queue.reader(Lsn(BASE)).unwrap()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Queue);
    assert!(error.to_string().contains("00000000000000000002.segment is corrupt at offset"), "{error}");
}

#[test]
fn a_missing_or_shortened_segment_is_named() {
    let disk = written_disk(40);
    assert!(disk.names().len() >= 4);
    disk.delete(&segment(2));
    let error = try_open(&disk, roomy()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Queue);
    assert!(error.to_string().contains("00000000000000000002.segment"), "{error}");
    assert!(error.to_string().contains("missing"), "{error}");

    let disk = written_disk(40);
    let mut content = disk.content(&segment(2));
    content.truncate(content.len() - 1);
    disk.set_content(&segment(2), content);
    let error = try_open(&disk, roomy()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Queue);
    assert!(error.to_string().contains("shorter"), "{error}");
}

#[test]
fn a_rewind_drops_a_transaction_that_fills_many_segments() {
    let disk = FaultyFileSystem::new(1);
    let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
    append_durably(&mut appender, 0..2);
    let before = (queue.bytes(), disk.content(&segment(1)));
    let large = item(49);
    let head = TransactionHead { xid: 9, commit_lsn: end_of(1), commit_time: 0 };
    appender.begin(head).unwrap();
    for entry in &large[1..large.len() - 1] {
        block_on(appender.ready()).unwrap();
        append(&mut appender, entry).unwrap();
    }
    assert!(disk.names().len() > 4);
    assert_eq!(read_all(&mut queue.reader(end_of(1)).unwrap()).unwrap(), []);
    assert_eq!(block_on(appender.rewind()).unwrap(), end_of(1));
    assert_eq!((queue.bytes(), disk.content(&segment(1))), before);
    assert_eq!(disk.names().len(), 1);
    append_durably(&mut appender, 2..4);
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..4));
}

#[test]
fn a_full_queue_waits_until_trim_makes_room() {
    let max_bytes = 16 << 10;
    let options = Options { max_bytes, ..small_options() };
    let (queue, mut appender) = try_open(&FaultyFileSystem::new(1), options).unwrap();
    let mut next = 0;
    while queue.bytes() < max_bytes {
        append_durably(&mut appender, next..next + 1);
        next += 1;
    }
    assert!(queue.subscribe().borrow().full);
    assert!(appender.ready().now_or_never().is_none(), "the quota does not hold the stream back");
    // A rewind works while the queue is full, and does not make room.
    assert_eq!(block_on(appender.rewind()).unwrap(), end_of(next - 1));
    assert!(appender.ready().now_or_never().is_none());
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..next));
    queue.trim(end_of(next - 2)).unwrap();
    block_on(appender.ready()).unwrap();
    assert!(!queue.subscribe().borrow().full);
}

#[test]
fn a_transaction_larger_than_the_quota_goes_through() {
    let (queue, mut appender) = try_open(&FaultyFileSystem::new(1), small_options()).unwrap();
    // About 42 KB that do not compress, into 32 KiB.
    let mut large = item(49);
    for entry in &large {
        block_on(appender.ready()).unwrap();
        append(&mut appender, entry).unwrap();
    }
    block_on(appender.rewind()).unwrap();
    assert!(queue.bytes() > small_options().max_bytes);
    // Now there is something to apply, and the stream waits for it.
    assert!(appender.ready().now_or_never().is_none());
    let mut reader = queue.reader(Lsn(BASE)).unwrap();
    assert_eq!(read_all(&mut reader).unwrap(), std::mem::take(&mut large));
    queue.trim(end_of(49)).unwrap();
    block_on(appender.ready()).unwrap();
}

#[test]
fn a_full_disk_loses_and_tears_nothing() {
    let disk = FaultyFileSystem::new(1);
    let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
    append_durably(&mut appender, 0..2);
    disk.limit(Some(100));
    for number in 4..6 {
        item(number).iter().for_each(|entry| append(&mut appender, entry).unwrap());
        appender.flush().unwrap();
    }
    while !queue.subscribe().borrow().full {
        std::thread::yield_now();
    }
    assert!(appender.ready().now_or_never().is_none());
    disk.limit(None);
    block_on(appender.ready()).unwrap();
    block_on(appender.rewind()).unwrap();
    let expected: Vec<Entry> = items(0..2).into_iter().chain(items(4..6)).collect();
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), expected);

    // A rewind while the disk is full gives up what does not fit, and the stream can go on afterwards.
    disk.limit(Some(100));
    item(10).iter().for_each(|entry| append(&mut appender, entry).unwrap());
    item(12).iter().for_each(|entry| append(&mut appender, entry).unwrap());
    appender.flush().unwrap();
    while !queue.subscribe().borrow().full {
        std::thread::yield_now();
    }
    let end = block_on(appender.rewind()).unwrap();
    assert_eq!((end, queue.durable_end()), (end_of(5), end_of(5)));
    disk.limit(None);
    block_on(appender.ready()).unwrap();
    append_durably(&mut appender, 10..12);
    assert_eq!(queue.durable_end(), end_of(11));
}

#[test]
fn what_is_out_of_order_is_refused() {
    let (_queue, mut appender) = try_open(&FaultyFileSystem::new(1), roomy()).unwrap();
    assert!(appender.data(b"x").is_err() && appender.commit(end_of(0)).is_err());
    append_durably(&mut appender, 0..2);
    let head = |commit_lsn| TransactionHead { xid: 1, commit_lsn, commit_time: 0 };
    assert!(appender.begin(head(Lsn(end_of(1).0 - 1))).is_err());
    appender.position(end_of(1)).unwrap();
    assert_eq!(appender.end(), end_of(1));
    appender.begin(head(end_of(1))).unwrap();
    assert!(appender.begin(head(end_of(1))).is_err() && appender.position(end_of(3)).is_err());
    assert!(appender.commit(end_of(1)).is_err());
    appender.commit(end_of(2)).unwrap();
    // A rewind that was not waited for has to be repeated: nobody knows where the stream goes on.
    let unfinished = appender.rewind().now_or_never();
    if unfinished.is_none() {
        assert!(appender.position(end_of(5)).is_err() && block_on(appender.ready()).is_err());
    }
    assert_eq!(block_on(appender.rewind()).unwrap(), end_of(2));
    appender.position(end_of(5)).unwrap();
}

#[test]
fn what_was_never_synced_may_reach_the_disk_in_any_order() {
    use super::format::BlockHeader;
    let disk = written_disk(2);
    let mut content = disk.content(&segment(1));
    let header_at = |content: &[u8], offset: usize| {
        BlockHeader::decode(content[offset..].first_chunk().unwrap(), 1, offset as u64).unwrap()
    };
    let first = SEGMENT_HEADER_BYTES as usize;
    let second = first + header_at(&content, first).block_bytes() as usize;
    // As if both blocks had been written without a sync between them, and the second alone came to the disk.
    let header = BlockHeader { durable_offset: SEGMENT_HEADER_BYTES, ..header_at(&content, second) };
    content[second..second + BLOCK_HEADER_BYTES].copy_from_slice(&header.encode());
    content[first..second].fill(0);
    disk.set_content(&segment(1), content);
    let (queue, mut appender) = try_open(&disk, roomy()).unwrap();
    assert_eq!(queue.durable_end(), Lsn(BASE));
    append_durably(&mut appender, 0..3);
    assert_eq!(read_all(&mut queue.reader(Lsn(BASE)).unwrap()).unwrap(), items(0..3));
}

/// Transactions of three messages, each labelled with its own number, in blocks of one or a few.
fn labelled_disk(count: u64) -> FaultyFileSystem {
    let disk = FaultyFileSystem::new(1);
    let (_queue, mut appender) = try_open(&disk, roomy()).unwrap();
    for number in 0..count {
        let head = TransactionHead { xid: 1, commit_lsn: Lsn(end_of(number).0 - 10), commit_time: 0 };
        appender.begin(head).unwrap();
        for message in 0..3 {
            block_on(appender.ready()).unwrap();
            // Nothing that compresses well, so that there is more than one segment.
            let bytes = 90 * (1 + message * number as usize % 9);
            let message: Vec<u8> = (0..bytes as u32).map(|at| (crc32c::crc32c(&at.to_le_bytes()) >> 7) as u8).collect();
            appender.data(&message).unwrap();
            appender.label(number as u32);
        }
        appender.commit(end_of(number)).unwrap();
        if number % 3 == 0 {
            block_on(appender.rewind()).unwrap();
        }
    }
    drop(appender);
    disk
}

#[test]
fn what_a_damaged_queue_has_lost_is_named_or_said_to_be_unknown() {
    const COUNT: u64 = 24;
    let whole = labelled_disk(COUNT);
    let all: std::collections::BTreeSet<u32> = (0..COUNT as u32).collect();
    let look = |disk: &FaultyFileSystem, after: Lsn| examine_on(disk, Path::new("/q"), after).unwrap();
    let found = look(&whole, Lsn(BASE));
    assert_eq!((found.damaged, found.labels, found.end), (false, Some(all.clone()), end_of(COUNT - 1)));
    // What is applied does not count, but for what shares a block with what is not.
    let rest = look(&whole, end_of(COUNT - 3)).labels.unwrap();
    assert!(rest.is_superset(&(COUNT as u32 - 2..COUNT as u32).collect()) && rest.len() < all.len(), "{rest:?}");

    // What is missing at the front is not known, however well the rest can be read.
    let front = whole.content(&segment(1));
    whole.delete(&segment(1));
    let found = look(&whole, Lsn(BASE));
    assert_eq!((found.damaged, found.labels), (true, None));
    whole.create(&segment(1)).unwrap();
    whole.set_content(&segment(1), front);

    let (mut named, mut unknown) = (0, 0);
    let segments: Vec<(PathBuf, Vec<u8>)> =
        whole.names().into_iter().map(|path| (path.clone(), whole.content(&path))).collect();
    assert!(
        segments.len() > 2,
        "{:?}",
        segments.iter().map(|(path, content)| (path, content.len())).collect::<Vec<_>>()
    );
    for (path, content) in &segments {
        for at in (0..content.len()).step_by(7) {
            let mut flipped = content.clone();
            flipped[at] ^= 1;
            whole.set_content(path, flipped);
            let found = look(&whole, Lsn(BASE));
            match found.labels {
                // Cut off as torn: the end says that it is not all.
                Some(labels) if found.end < end_of(COUNT - 1) => assert!(!found.damaged && labels.is_subset(&all)),
                Some(labels) => {
                    assert_eq!(labels, all, "byte {at} of {}", path.display());
                    named += u32::from(found.damaged);
                }
                None => unknown += 1,
            }
            whole.set_content(path, content[..at].to_vec());
            let found = look(&whole, Lsn(BASE));
            assert!(found.end < end_of(COUNT - 1) || found.labels.is_none(), "{} cut at {at}", path.display());
        }
        whole.set_content(path, content.clone());
    }
    assert!(named > 100 && unknown > 100, "{named} and {unknown}");
}
