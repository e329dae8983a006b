//! The queue against a model: a source whose every transaction is known, a target that remembers what it applied, and
//! a machine that fails. Whatever happens, the target gets exactly the source's transactions, each whole and once, and
//! nothing acknowledged is ever missing.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use proptest::prelude::*;

use super::faults::FaultyFileSystem;
use super::{Appender, Entry, Options, Queue, Reader, TransactionHead, open_on};
use crate::error::{ErrorKind, Result};
use crate::lsn::Lsn;

pub(super) const BASE: u64 = 1000;

/// The source's history is known in full: item i ends at `end_of(i)`.
pub(super) fn end_of(item: u64) -> Lsn {
    Lsn(BASE + (item + 1) * 100)
}

/// How many items end at or before an LSN.
pub(super) fn items_until(lsn: Lsn) -> u64 {
    (lsn.0 - BASE) / 100
}

/// The entries of an item: mostly small transactions, some positions, some larger than a block, few larger than
/// segments, one in a while larger than the quota.
pub(super) fn item(item: u64) -> Vec<Entry> {
    if item % 7 == 3 {
        return vec![Entry::Position(end_of(item))];
    }
    let (messages, bytes) = match item % 50 {
        49 => (60, 700),
        5 | 17 | 31 => (30, 300),
        11 => (1, 3000),
        20 => (0, 0),
        _ => (1 + item % 4, 40),
    };
    let head = TransactionHead { xid: item as u32, commit_lsn: Lsn(end_of(item).0 - 50), commit_time: item as i64 };
    let mut entries = vec![Entry::Begin(head)];
    for message in 0..messages {
        let mut random = (item << 20 | message << 1 | 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let content = (0..bytes).map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        });
        entries.push(Entry::Data(content.collect::<Vec<u8>>().into()));
    }
    entries.push(Entry::Commit { end_lsn: end_of(item) });
    entries
}

/// Small enough that a few transactions fill blocks, segments, buffers and the quota.
pub(super) fn small_options() -> Options {
    Options {
        max_bytes: 32 << 10,
        keep: Duration::ZERO,
        segment_bytes: 4096,
        block_bytes: 512,
        in_flight_bytes: 2048,
        sync_bytes: 1500,
        retry: Duration::from_millis(1),
    }
}

pub(super) fn append(appender: &mut Appender, entry: &Entry) -> Result<()> {
    match entry {
        Entry::Begin(head) => appender.begin(*head),
        Entry::Data(bytes) => appender.data(bytes),
        Entry::Commit { end_lsn } => appender.commit(*end_lsn),
        Entry::Position(lsn) => appender.position(*lsn),
    }
}

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[derive(Clone, Debug)]
enum Step {
    Append(u8),
    /// Begins an item, appends a part of it, and loses the connection.
    Break,
    Flush,
    Rewind,
    Read(u8),
    Trim,
    /// The machine dies after so many calls.
    DieAfter(u16),
    Crash,
    /// The process is killed.
    Kill,
    /// The process ends in order and starts again.
    Restart,
    FailSyncs(u8),
    /// The disk has room for so many more bytes.
    Limit(u16),
    Free,
}

struct World {
    disk: FaultyFileSystem,
    options: Options,
    parts: Option<(Queue, Appender, Reader)>,
    /// How often the queue was opened.
    openings: u64,
    /// The source's next item.
    next: u64,
    /// Items that the target has.
    applied: u64,
    /// The highest LSN that could have been acknowledged.
    acknowledged: Lsn,
}

impl World {
    fn new(seed: u64, options: Options) -> World {
        let disk = FaultyFileSystem::new(seed);
        let mut world = World { disk, options, parts: None, openings: 0, next: 0, applied: 0, acknowledged: Lsn(BASE) };
        world.open();
        world
    }

    fn applied_lsn(&self) -> Lsn {
        Lsn(BASE + self.applied * 100)
    }

    fn open(&mut self) {
        assert!(self.parts.is_none());
        let opened = loop {
            let result = open_on(std::sync::Arc::new(self.disk.clone()), Path::new("/q"), Lsn(BASE), self.options);
            match result {
                Ok(opened) => break opened,
                Err(_) if self.disk.is_dead() => self.disk.crash(),
                Err(error) => panic!("a crash was taken for corruption: {error}; {:?}", self.disk.names()),
            }
        };
        let (queue, appender) = opened;
        let durable_end = queue.durable_end();
        assert!(durable_end >= self.acknowledged, "{} was acknowledged, {durable_end} is there", self.acknowledged);
        assert!(queue.start() <= self.applied_lsn(), "what is not applied was trimmed");
        assert_eq!(appender.end(), durable_end);
        self.next = items_until(durable_end);
        self.openings += 1;
        let reader = queue.reader(self.applied_lsn()).unwrap();
        self.parts = Some((queue, appender, reader));
    }

    /// What an acknowledgement could have told the source by now.
    fn observe(&mut self) {
        let (queue, ..) = self.parts.as_ref().unwrap();
        let durable_end = queue.durable_end();
        assert!(durable_end >= self.acknowledged, "the durable end goes back");
        self.acknowledged = durable_end;
    }

    fn stop(&mut self) {
        self.observe();
        self.parts = None;
    }

    fn crash(&mut self) {
        self.observe();
        self.disk.die();
        self.parts = None;
        self.disk.crash();
        self.open();
    }

    /// After an error of the queue: the way back that the caller has.
    fn mend(&mut self) {
        for _ in 0..8 {
            if self.disk.is_dead() {
                return self.crash();
            }
            let (queue, appender, _) = self.parts.as_mut().unwrap();
            match block_on(appender.rewind()) {
                Ok(end) => {
                    assert_eq!(end, queue.durable_end());
                    self.next = items_until(end);
                    return self.observe();
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Disk, "{error}"),
            }
        }
        // The disk stays as bad as it is, with no room for a segment's header, say.
        self.disk.limit(None);
        self.disk.fail_syncs(0);
        self.mend();
    }

    /// Appends entries of the next item; false when the queue failed and was mended instead.
    fn append(&mut self, entries: &[Entry]) -> bool {
        let openings = self.openings;
        for entry in entries {
            loop {
                let (_, appender, _) = self.parts.as_mut().unwrap();
                match appender.ready().now_or_never() {
                    Some(Ok(())) => break,
                    Some(Err(_)) => {
                        self.mend();
                        return false;
                    }
                    None => {
                        self.read(1);
                        self.trim();
                        if self.openings != openings {
                            return false;
                        }
                        std::thread::yield_now();
                        let (queue, ..) = self.parts.as_ref().unwrap();
                        // Nobody else frees a disk whose room is used up by what is still needed.
                        if queue.subscribe().borrow().full && self.disk.is_limited() {
                            self.disk.widen(200);
                        }
                    }
                }
            }
            let (_, appender, _) = self.parts.as_mut().unwrap();
            append(appender, entry).unwrap();
        }
        true
    }

    fn trim(&mut self) {
        let (queue, ..) = self.parts.as_ref().unwrap();
        if let Err(error) = queue.trim(self.applied_lsn()) {
            assert!(self.disk.is_dead(), "{error}");
            self.crash();
        }
    }

    /// Reads up to so many items, as far as there are any.
    fn read(&mut self, items: u64) {
        for _ in 0..items {
            let expected = item(self.applied);
            let (_, _, reader) = self.parts.as_mut().unwrap();
            for (position, wanted) in expected.iter().enumerate() {
                match reader.next(Duration::ZERO) {
                    Ok(Some(entry)) => assert_eq!(&entry, wanted, "entry {position} of item {}", self.applied),
                    Ok(None) => {
                        assert_eq!(position, 0, "a part of item {} was handed out", self.applied);
                        return;
                    }
                    Err(error) if self.disk.is_dead() => {
                        let _ = error;
                        return self.crash();
                    }
                    Err(error) if error.kind() == ErrorKind::Transient => {
                        assert!(position > 0, "{error}");
                        let (queue, _, reader) = self.parts.as_mut().unwrap();
                        *reader = queue.reader(Lsn(BASE + self.applied * 100)).unwrap();
                        return;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            self.applied += 1;
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Append(count) => {
                for _ in 0..*count {
                    if self.append(&item(self.next)) {
                        self.next += 1;
                    }
                }
            }
            Step::Break => {
                let entries = item(self.next);
                if self.append(&entries[..entries.len() - 1]) {
                    self.mend();
                }
            }
            Step::Flush => self.parts.as_mut().unwrap().1.flush().unwrap(),
            Step::Rewind => self.mend(),
            Step::Read(count) => self.read(u64::from(*count)),
            Step::Trim => self.trim(),
            Step::DieAfter(calls) => self.disk.die_after(u64::from(*calls)),
            Step::Crash => self.crash(),
            Step::Kill => {
                self.observe();
                self.disk.die();
                self.parts = None;
                self.disk.restart_process();
                self.open();
            }
            Step::Restart => {
                self.stop();
                if self.disk.is_dead() {
                    self.disk.crash();
                } else {
                    self.disk.fail_syncs(0);
                    self.disk.limit(None);
                }
                self.open();
            }
            Step::FailSyncs(count) => self.disk.fail_syncs(u32::from(*count)),
            Step::Limit(bytes) => self.disk.limit(Some(u64::from(*bytes))),
            Step::Free => self.disk.limit(None),
        }
        self.observe();
    }

    /// Everything mended, all comes through.
    fn finish(&mut self) {
        if self.disk.is_dead() {
            self.crash();
        }
        self.disk.restart_process();
        self.mend();
        for _ in 0..3 {
            assert!(self.append(&item(self.next)));
            self.next += 1;
        }
        let end = Lsn(BASE + self.next * 100);
        let (_, appender, _) = self.parts.as_mut().unwrap();
        assert_eq!(block_on(appender.rewind()).unwrap(), end);
        self.read(self.next.saturating_sub(self.applied));
        assert!(self.applied >= self.next);
        self.stop();
        self.disk.crash();
        self.open();
        assert_eq!(self.parts.as_ref().unwrap().0.durable_end(), end);
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..12u8).prop_map(Step::Append),
        2 => Just(Step::Break),
        4 => Just(Step::Flush),
        1 => Just(Step::Rewind),
        6 => (1..16u8).prop_map(Step::Read),
        3 => Just(Step::Trim),
        2 => (0..60u16).prop_map(Step::DieAfter),
        1 => Just(Step::Crash),
        1 => Just(Step::Kill),
        1 => Just(Step::Restart),
        1 => (1..4u8).prop_map(Step::FailSyncs),
        1 => (0..3000u16).prop_map(Step::Limit),
        1 => Just(Step::Free),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn an_acknowledged_lsn_is_always_on_disk(seed: u64, steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new(seed, small_options());
        for step in &steps {
            world.step(step);
        }
        world.finish();
    }

    /// Here the reader runs beside the writer and the faults, as it does in life.
    #[test]
    fn a_reader_sees_whole_transactions_only(seed: u64, failures in prop::collection::vec(1..40u64, 0..6)) {
        let disk = FaultyFileSystem::new(seed);
        let options = Options { max_bytes: 1 << 20, ..small_options() };
        let (queue, mut appender) =
            open_on(std::sync::Arc::new(disk.clone()), Path::new("/q"), Lsn(BASE), options).unwrap();
        const ITEMS: u64 = 120;
        let reading = queue.clone();
        let thread = std::thread::spawn(move || {
            let mut applied = 0;
            'again: while applied < ITEMS {
                let mut reader = reading.reader(Lsn(BASE + applied * 100)).unwrap();
                while applied < ITEMS {
                    for (position, wanted) in item(applied).iter().enumerate() {
                        // Only the first entry may have to be waited for.
                        let wait = if position == 0 { Duration::from_secs(30) } else { Duration::ZERO };
                        match reader.next(wait) {
                            Ok(entry) => assert_eq!(entry.as_ref(), Some(wanted), "entry {position} of {applied}"),
                            Err(error) => {
                                assert!(error.is_transient() && position > 0, "{error}");
                                continue 'again;
                            }
                        }
                    }
                    applied += 1;
                    reading.trim(Lsn(BASE + applied * 100)).unwrap();
                }
            }
        });
        let mut failures = failures.into_iter();
        let mut next = 0;
        while next < ITEMS {
            let mut failed = false;
            for entry in item(next) {
                if block_on(appender.ready()).is_err() {
                    failed = true;
                    break;
                }
                append(&mut appender, &entry).unwrap();
            }
            if failed {
                next = items_until(block_on(appender.rewind()).unwrap());
                continue;
            }
            next += 1;
            if next % 20 == 0 && let Some(more) = failures.next() {
                if more % 2 == 0 {
                    disk.fail_syncs(1);
                } else {
                    let begun = item(next);
                    let part = begun.len() / 2;
                    let ready = begun[..part].iter().all(|entry| {
                        block_on(appender.ready()).is_ok() && append(&mut appender, entry).is_ok()
                    });
                    prop_assert!(ready || queue.written_end() == queue.durable_end());
                    next = items_until(loop {
                        // Twice where a failing sync is still on its way.
                        if let Ok(end) = block_on(appender.rewind()) {
                            break end;
                        }
                    });
                }
            }
            // The last of all must come through.
            if next == ITEMS {
                next = items_until(block_on(appender.rewind()).unwrap());
            }
        }
        thread.join().unwrap();
    }

    #[test]
    fn a_flipped_bit_is_never_handed_out(seed: u64, items in 1..40u64, file: prop::sample::Index, bit: prop::sample::Index) {
        let disk = FaultyFileSystem::new(seed);
        let shared: std::sync::Arc<FaultyFileSystem> = disk.clone().into();
        let options = Options { max_bytes: 1 << 20, ..small_options() };
        let (queue, mut appender) = open_on(shared.clone(), Path::new("/q"), Lsn(BASE), options).unwrap();
        for number in 0..items {
            item(number).iter().for_each(|entry| append(&mut appender, entry).unwrap());
            if number % 3 == 0 {
                block_on(appender.rewind()).unwrap();
            }
        }
        drop((queue, appender));
        let names = disk.names();
        let name = &names[file.index(names.len())];
        let mut content = disk.content(name);
        let bit = bit.index(content.len() * 8);
        content[bit / 8] ^= 1 << (bit % 8);
        disk.set_content(name, content);

        let Ok((queue, _appender)) = open_on(shared, Path::new("/q"), Lsn(BASE), options) else { return Ok(()) };
        let mut reader = queue.reader(Lsn(BASE)).unwrap();
        let all: Vec<Entry> = (0..items).flat_map(item).collect();
        let mut position = 0;
        let clean_end = loop {
            match reader.next(Duration::ZERO) {
                Ok(Some(entry)) => {
                    prop_assert_eq!(Some(&entry), all.get(position));
                    position += 1;
                }
                Ok(None) => break true,
                Err(error) => {
                    prop_assert_eq!(error.kind(), ErrorKind::Queue);
                    break false;
                }
            }
        };
        if clean_end {
            // Something may be cut, but then the queue says so: its end is what was handed out (H15 sees the rest).
            let handed_out: Vec<Entry> = (0..items_until(queue.durable_end())).flat_map(item).collect();
            prop_assert_eq!(position, handed_out.len());
        }
    }
}

#[test]
fn a_message_larger_than_a_block_comes_back_whole() {
    let disk = FaultyFileSystem::new(1);
    let (queue, mut appender) =
        open_on(std::sync::Arc::new(disk), Path::new("/q"), Lsn(BASE), small_options()).unwrap();
    let large = Bytes::from(vec![7; 5 << 20]);
    let head = TransactionHead { xid: 1, commit_lsn: Lsn(BASE), commit_time: 0 };
    appender.begin(head).unwrap();
    appender.data(b"small").unwrap();
    appender.data(&large).unwrap();
    appender.data(b"small").unwrap();
    appender.commit(end_of(0)).unwrap();
    block_on(appender.rewind()).unwrap();
    let mut reader = queue.reader(Lsn(BASE)).unwrap();
    let small = Entry::Data(Bytes::from_static(b"small"));
    for expected in [Entry::Begin(head), small.clone(), Entry::Data(large), small, Entry::Commit { end_lsn: end_of(0) }]
    {
        assert_eq!(reader.next(Duration::ZERO).unwrap(), Some(expected));
    }
}
