//! From the queue to chunks: reads transactions, leaves out what a table's copy has seen, merges the rest into its net
//! effect, spreads it over the apply sessions and encodes it for COPY.
//!
//! Runs in a thread of its own, one chunk ahead of the target. A **unit** is what is committed together: whole
//! transactions of the source, as many as came meanwhile and fit. A **chunk** is what is in memory at once; a transaction
//! larger than that is a unit of several chunks (I4, I7).
//!
//! Where the chunks of a unit end depends on nothing but its transactions, so that after a crash between the sessions'
//! commits the same unit makes the same chunks again. "Its transactions" is what the source would send again too: the queue
//! may have lost its newest ones in that crash. So announcements of tables do not count (a new connection repeats them), and a
//! unit that is made again ends where it ended even if what it ended with, the position of an idle source, does not come again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::change::{Announced, Change};
use super::layout::Layout;
use super::net::{Effect, NeedsSerialReplay, Net, NetChanges};
use super::{MARKERS_MAX, Marker};
use crate::decode::{Datum, Message, Tuple, decode};
use crate::error::{Context, Result};
use crate::lsn::Lsn;
use crate::queue::{Entry, Reader, TransactionHead};
use crate::source::marker;
use crate::target::copy_rows::CopyRows;
use crate::target::writer::TableWrites;
use crate::timescale::live::OwnWork;
use crate::timescale::sets::TimeRange;

pub use crate::source::marker::PREFIX as MARKER_PREFIX;

/// A chunk is written once it has read this much of the queue. Part of the format: see the module's head.
///
/// A unit ends at `UNIT_BYTES`, so a backlog goes in units of 24 MiB. They cost two round trips each: with a target 20 ms away, inserts
/// went at 0.75 of their speed beside it in units of 16 MiB, and at 0.5 in units of 4 MiB. A target near at hand takes all alike, and
/// larger units only cost memory.
const CHUNK_BYTES: usize = 32 << 20;
const UNIT_BYTES: usize = 24 << 20;

/// What a change costs beside its own bytes, so that a chunk of tiny rows stays small in memory too (I7).
const CHANGE_BYTES: usize = 64;

/// A unit with at most so many rows is written by one session: the others' round trips would cost more.
const SMALL_UNIT_ROWS: usize = 200;

/// How long the queue is waited for before anything else is looked at.
const WAIT: Duration = Duration::from_millis(50);

/// How long a unit gathers transactions at least, when the one before it was hardly worth its commit, and when it was not: the
/// round trips of a unit cost the servers as much as many rows do. It is part of the lag.
///
/// Measured under TPC-B by 4 clients with all on two busy cores: the median lag is 16 to 21 ms, the 99th percentile 37 to 40 ms; with 5 ms
/// for a busy stream 11 ms and 23 ms. What that costs the source's rate was within the noise of that machine (it sustained 0.8 to 1.5
/// times its rate under a native subscription with 20 ms, 1.2 times with 5 ms), so the larger units stay: their lag is far from being felt.
const GATHER_QUIET: Duration = Duration::from_millis(2);
const GATHER_BUSY: Duration = Duration::from_millis(20);
/// Changes in a unit from which on the stream counts as busy.
const BUSY_CHANGES: u64 = 50;

/// What the sessions have to write next.
#[derive(Debug, Default)]
pub struct Chunk {
    /// For each session, in its number's place.
    pub writes: Vec<Vec<TableWrites>>,
    /// The whole of a unit that one session writes for all: its writes stand in the first session's place.
    pub small: bool,
    /// End LSN of the last transaction that is whole in this unit so far.
    pub complete: Lsn,
    /// Set in the last chunk of a unit.
    pub end: Option<UnitEnd>,
}

/// What is committed together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnitEnd {
    /// End LSN of its last transaction: what the ledger says afterwards.
    pub end_lsn: Lsn,
    /// Transactions of the source in it.
    pub transactions: u64,
    /// Changes of rows in it.
    pub changes: u64,
    /// Commit time of its last transaction, microseconds since 2000-01-01.
    pub commit_time: i64,
    /// Our own messages in it, with the changes of rows in it that came before each.
    pub markers: Vec<Marker>,
}

/// What the assembler hands on.
#[derive(Debug)]
pub enum Assembled {
    /// To be written.
    Chunk(Chunk),
    /// The transaction that begins after `complete` cannot be merged (a TRUNCATE, DDL, a table that changed, or a history that only a
    /// replay can tell):
    /// what the unit has before it is to be applied up to `complete`, then that one transaction row by row.
    Serial {
        /// End LSN of the last transaction before it.
        complete: Lsn,
    },
    /// The transaction that begins after `complete` announces a table that nobody knows: what the unit has before it is to be applied up
    /// to there, and nothing of it before the table is known. Where the announcement comes, a replay may have had very many rows.
    Unknown {
        /// End LSN of the last transaction before it.
        complete: Lsn,
        /// The table.
        change: Box<Change>,
    },
}

/// Reads the queue from where a reader stands.
pub struct Assembler {
    layout: Arc<Layout>,
    reader: Reader,
    /// Ends the unit with the transaction that ends here, and then stops.
    until: Option<Lsn>,
    /// Whether some sessions have committed the unit already: then each change must go to the session it went to.
    recovering: bool,
    /// Whether a chunk of the unit has been handed over.
    begun: bool,
    /// End LSN of the last whole transaction.
    complete: Lsn,
    tables: BTreeMap<usize, NetChanges>,
    chunk_bytes: usize,
    unit: UnitEnd,
    /// What TimescaleDB does by itself in the transaction at work.
    own_work: OwnWork,
    /// When the unit's first transaction came.
    unit_begun: Instant,
    /// How long the unit waits for more, from then on.
    gather: Duration,
    head: Option<TransactionHead>,
}

impl Assembler {
    /// Starts a thread that sends chunks until nobody takes them, `until` is reached, or it fails. `recovering` says that
    /// some sessions have committed the unit up to `until`, and others have not.
    pub fn start(
        layout: Arc<Layout>,
        reader: Reader,
        after: Lsn,
        until: Option<Lsn>,
        recovering: bool,
    ) -> Result<mpsc::Receiver<Result<Assembled>>> {
        let (sender, receiver) = mpsc::channel(1);
        let mut assembler = Assembler {
            layout,
            reader,
            until,
            recovering,
            begun: false,
            complete: after,
            tables: BTreeMap::new(),
            chunk_bytes: 0,
            unit: UnitEnd::default(),
            own_work: OwnWork::default(),
            unit_begun: Instant::now(),
            gather: GATHER_QUIET,
            head: None,
        };
        std::thread::Builder::new().name("assemble".into()).spawn(move || {
            while !sender.is_closed() {
                match assembler.step(&sender) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        // Nobody listens any more: then nobody needs to know.
                        let _ = sender.blocking_send(Err(error));
                        break;
                    }
                }
            }
        })?;
        Ok(receiver)
    }

    /// Takes one entry of the queue; answers whether to go on.
    fn step(&mut self, sender: &mpsc::Sender<Result<Assembled>>) -> Result<bool> {
        // With something to write, only what comes soon is taken; the target should not wait for the source.
        let unit_is_open = self.unit.transactions > 0;
        let wait = if unit_is_open && self.head.is_none() && self.until.is_none() {
            self.gather.saturating_sub(self.unit_begun.elapsed())
        } else {
            WAIT
        };
        let Some(entry) = self.reader.next(wait)? else {
            // A unit with a given end waits for it, even where that has to be received again first.
            let hand_over = unit_is_open && self.head.is_none() && self.until.is_none();
            return Ok(!hand_over || self.send(sender, true)?);
        };
        match entry {
            Entry::Begin(head) => {
                if let Some(until) = self.until.filter(|until| head.commit_lsn >= *until) {
                    // The unit ended with a position that did not come again. A session that has committed it would
                    // take this transaction for a part of it, and leave its share out.
                    self.complete = until;
                    self.unit.end_lsn = until;
                    return self.send(sender, true);
                }
                if !unit_is_open {
                    self.unit_begun = Instant::now();
                }
                self.head = Some(head);
                self.own_work = OwnWork::default();
                self.unit.commit_time = head.commit_time;
                self.chunk_bytes += CHANGE_BYTES;
            }
            Entry::Data(bytes) => {
                let Some(head) = self.head else { return Ok(true) };
                let change = self.change(head, &bytes).context(|| {
                    format!("reading transaction {} that commits at {} from the queue", head.xid, head.commit_lsn)
                })?;
                if change == Err(NeedsSerialReplay) {
                    let complete = self.complete;
                    let assembled = match self.unknown(head, &bytes)? {
                        Some(change) => Assembled::Unknown { complete, change: Box::new(change) },
                        None => Assembled::Serial { complete },
                    };
                    // Whoever takes this starts another assembler.
                    let _ = sender.blocking_send(Ok(assembled));
                    return Ok(false);
                }
                if !matches!(bytes.first(), Some(b'R' | b'Y')) {
                    self.chunk_bytes += CHANGE_BYTES + bytes.len();
                }
                if self.chunk_bytes >= CHUNK_BYTES {
                    return self.send(sender, false);
                }
            }
            Entry::Commit { end_lsn } => {
                self.head = None;
                self.complete = end_lsn;
                self.unit.end_lsn = end_lsn;
                self.unit.transactions += 1;
                if self.is_full() {
                    return self.send(sender, true);
                }
            }
            Entry::Position(lsn) => {
                self.complete = lsn;
                self.unit.end_lsn = lsn;
                // An idle source moves on too; a unit of its own only where no other is in the making.
                if (!unit_is_open && self.until.is_none()) || self.is_full() {
                    return self.send(sender, true);
                }
            }
        }
        Ok(true)
    }

    /// Whether the unit ends with the transaction that has just ended.
    fn is_full(&self) -> bool {
        let wanted = self.until.is_some_and(|until| self.complete >= until);
        // Somebody waits for a marker; an empty transaction may be nobody's, and there may be many.
        let awaited = self.unit.markers.last().is_some_and(|last| !marker::is_of_empty_transaction(&last.content));
        // Whoever looks is to find it among those that are remembered.
        let many = self.unit.markers.len() >= MARKERS_MAX / 2;
        wanted || awaited || many || self.chunk_bytes >= UNIT_BYTES
    }

    /// The announcement of a table that is not known, where such come and go by themselves.
    fn unknown(&self, head: TransactionHead, bytes: &Bytes) -> Result<Option<Change>> {
        Ok(match decode(bytes)? {
            Message::Relation(relation)
                if self.layout.has_hypertables && self.layout.find(relation.relid).is_none() =>
            {
                Some(Change { head, announced: Announced::of(&relation) })
            }
            _ => None,
        })
    }

    fn change(&mut self, head: TransactionHead, bytes: &Bytes) -> Result<Result<(), NeedsSerialReplay>> {
        let (relid, kind) = match decode(bytes)? {
            Message::Relation(relation) => {
                // A table that is not what it was: everything before this transaction first; the replay judges it (I11).
                let expected = self.layout.check_relation(&relation, head.xid, head.commit_lsn);
                return Ok(expected.map_err(|_| NeedsSerialReplay));
            }
            Message::Logical { prefix, content, .. } => {
                if self.layout.is_ddl(prefix) {
                    return Ok(Err(NeedsSerialReplay));
                }
                self.own_work.note(prefix);
                if prefix == MARKER_PREFIX {
                    let content = String::from_utf8_lossy(content).into_owned();
                    self.unit.markers.push(Marker { content, changes: self.unit.changes });
                }
                return Ok(Ok(()));
            }
            Message::Truncate { relids, .. } => {
                for relid in relids {
                    if self.own_work.covers(&self.layout, relid) {
                        continue;
                    }
                    let place = self.layout.place(relid)?;
                    if !self.layout.copy_has_seen(place, head.xid, head.commit_lsn) {
                        return Ok(Err(NeedsSerialReplay));
                    }
                }
                return Ok(Ok(()));
            }
            Message::Insert { relid, new } => (relid, Kind::Insert(new)),
            Message::Update { relid, old, new } => (relid, Kind::Update(old, new)),
            Message::Delete { relid, old } => (relid, Kind::Delete(old)),
            Message::Begin { .. } | Message::Commit { .. } | Message::Origin { .. } | Message::Type { .. } => {
                return Ok(Ok(()));
            }
        };
        if self.own_work.covers(&self.layout, relid) {
            return Ok(Ok(()));
        }
        let place = self.layout.place(relid)?;
        if self.layout.copy_has_seen(place, head.xid, head.commit_lsn) {
            return Ok(Ok(()));
        }
        self.unit.changes += 1;
        let table = &self.layout.tables[place].table;
        match &kind {
            Kind::Insert(new) => self.layout.check_row(place, *new)?,
            Kind::Update(old, new) => {
                self.layout.check_row(place, *new)?;
                old.map_or(Ok(()), |old| self.layout.check_row(place, old.tuple()))?;
            }
            Kind::Delete(old) => self.layout.check_row(place, old.tuple())?,
        }
        let net = self.tables.entry(place).or_insert_with(|| {
            if table.key.is_empty() && table.chunk.is_some() {
                NetChanges::of_equal_rows()
            } else {
                NetChanges::new(relid, &table.key)
            }
        });
        Ok(match kind {
            Kind::Insert(new) => net.insert(bytes, new),
            Kind::Update(old, new) => net.update(bytes, old, new),
            Kind::Delete(old) => net.delete(bytes, old),
        })
    }

    /// Hands over what there is; `last` ends the unit. Answers whether to go on.
    fn send(&mut self, sender: &mpsc::Sender<Result<Assembled>>, last: bool) -> Result<bool> {
        let mut chunk = Chunk { complete: self.complete, ..Chunk::default() };
        let rows: usize = self.tables.values().map(NetChanges::len).sum();
        chunk.small = last && !self.begun && !self.recovering && rows <= SMALL_UNIT_ROWS;
        chunk.writes.resize_with(self.layout.workers, Vec::new);
        for (&place, net) in &mut self.tables {
            if !net.is_empty() {
                spread(&self.layout, place, net.take(), &mut chunk)?;
            }
        }
        self.chunk_bytes = 0;
        self.begun = !last;
        let mut go_on = true;
        if last {
            go_on = self.until.is_none_or(|until| self.complete < until);
            self.gather = if self.unit.changes < BUSY_CHANGES { GATHER_QUIET } else { GATHER_BUSY };
            let next = UnitEnd { commit_time: self.unit.commit_time, ..UnitEnd::default() };
            chunk.end = Some(std::mem::replace(&mut self.unit, next));
        }
        Ok(sender.blocking_send(Ok(Assembled::Chunk(chunk))).is_ok() && go_on)
    }
}

enum Kind<'a> {
    Insert(Tuple<'a>),
    Update(Option<crate::decode::OldTuple<'a>>, Tuple<'a>),
    Delete(crate::decode::OldTuple<'a>),
}

/// Encodes the net effect on one table for the sessions that write it.
fn spread(layout: &Layout, place: usize, mut rows: Vec<Net>, chunk: &mut Chunk) -> Result<()> {
    let entry = &layout.tables[place];
    let (key, binary) = (&entry.table.key, layout.binary);
    let small = chunk.small;
    let worker_of =
        |net: &Net| if small { 0 } else { entry.routing.worker(entry.table.routed_as(), net.hash, layout.workers) };
    let mut changed = vec![0; chunk.writes.len()];
    let is_change = |net: &Net| matches!(net.effect, Effect::Update | Effect::Replace | Effect::Delete);
    for net in rows.iter().filter(|net| is_change(net)) {
        changed[worker_of(net)] += 1;
    }
    // A chunk's rows all go to one session.
    let range = if entry.table.chunk.is_some() && changed.iter().any(|&rows| rows > layout.single_rows_max) {
        TimeRange::of(&entry.table, rows.iter().filter(|net| is_change(net)).map(|net| net.row.tuple()))
    } else {
        None
    };
    // A join with a staging table would have the extension decompress all of a chunk.
    let single_rows_max =
        if entry.table.chunk.is_some() && range.is_none() { usize::MAX } else { layout.single_rows_max };
    if changed.iter().any(|&rows| rows > single_rows_max) {
        // Neighbours in the key's index are found in the same pages of it, and often of the table.
        rows.sort_by_cached_key(|net| key_prefix(net, key));
    }
    for net in rows {
        if net.effect == Effect::Nothing {
            continue;
        }
        let worker = worker_of(&net);
        // Of a hypertable only a statement with the row's own values reaches just its chunk.
        let singly = changed[worker] <= single_rows_max || entry.table.hypertable.is_some();
        let writes = writes_to(&mut chunk.writes[worker], place, binary);
        if !singly && writes.range.is_none() {
            writes.range.clone_from(&range);
        }
        match net.effect {
            Effect::Insert => writes.inserts.push(net.row.tuple().columns())?,
            Effect::Delete if singly => {
                writes.single_deletes.extend(std::iter::repeat_n(net.row, net.times as usize));
            }
            Effect::Delete if key.is_empty() => {
                let times = u64::from(net.times);
                let (as_text, as_binary) = (times.to_string(), times.to_be_bytes());
                let times = if binary { Datum::Binary(&as_binary) } else { Datum::Text(as_text.as_bytes()) };
                let values: Vec<Datum<'_>> = net.row.tuple().columns().chain([times]).collect();
                let nulls = (0u16..).zip(&values).filter(|(_, datum)| **datum == Datum::Null).map(|(at, _)| at);
                let equal = writes.equal_deletes.entry(nulls.collect()).or_insert_with(|| CopyRows::new(binary));
                equal.push(values.into_iter())?;
            }
            Effect::Delete => {
                let values: Vec<Datum<'_>> = net.row.tuple().columns().collect();
                let key: Vec<Datum<'_>> = key.iter().filter_map(|&at| values.get(at).copied()).collect();
                writes.deletes.push(key.into_iter())?;
            }
            Effect::Update | Effect::Replace if singly => writes.single_updates.push(net.row),
            Effect::Update | Effect::Replace => {
                let unchanged = net.row.unchanged();
                let values: Vec<Datum<'_>> =
                    net.row.tuple().columns().filter(|datum| *datum != Datum::Unchanged).collect();
                writes.updates.entry(unchanged).or_insert_with(|| CopyRows::new(binary)).push(values.into_iter())?;
            }
            Effect::Nothing => {}
        }
    }
    Ok(())
}

/// The first bytes of the key, in their order.
fn key_prefix(net: &Net, key: &[usize]) -> u64 {
    let first = key.first().and_then(|&at| net.row.tuple().columns().nth(at));
    let Some(Datum::Text(value) | Datum::Binary(value)) = first else { return 0 };
    let mut prefix = [0; 8];
    let length = value.len().min(prefix.len());
    prefix[..length].copy_from_slice(&value[..length]);
    u64::from_be_bytes(prefix)
}

fn writes_to(tables: &mut Vec<TableWrites>, place: usize, binary: bool) -> &mut TableWrites {
    // Tables come one after the other, so the last is the one, or there is none yet.
    if tables.last().is_none_or(|last| last.place != place) {
        tables.push(TableWrites {
            place,
            deletes: CopyRows::new(binary),
            single_deletes: Vec::new(),
            updates: BTreeMap::new(),
            single_updates: Vec::new(),
            equal_deletes: BTreeMap::new(),
            range: None,
            inserts: CopyRows::new(binary),
        });
    }
    let last = tables.len() - 1;
    &mut tables[last]
}
