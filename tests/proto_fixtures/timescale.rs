//! What a server with TimescaleDB really sends, without the extension: chunks, its catalog, and its own work between markers. The
//! fixtures are one history of one hypertable; it goes through the queue and the apply's assembler as a migration has it, into a
//! target that is a map, and after each of them that map holds what the user has done, and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use walferry::apply::assemble::{Assembled, Assembler, Chunk};
use walferry::apply::layout::Layout;
use walferry::decode::{Datum, Message, Relation};
use walferry::error::ErrorKind;
use walferry::lsn::Lsn;
use walferry::queue::{self, Appender, Queue, TransactionHead};
use walferry::source::catalog::{Column, ReplicaIdentity, Table};
use walferry::timescale::ChunkOf;

use super::{Captured, decoded, directory, format, row, transactions};

const DIRECTORY: &str = "timescaledb";
const CATALOG: &str = "_timescaledb_catalog";
/// In the order in which they were captured.
const NAMES: [&str; 11] = [
    "new-chunk",
    "compression",
    "insert-into-compressed",
    "recompression",
    "update-of-compressed",
    "upsert-of-compressed",
    "delete-of-compressed",
    "decompression",
    "all-in-one",
    "unpublished-chunk",
    "dropped-chunks",
];
const COMPRESSION: [&str; 2] = ["::timescaledb-compression-start", "::timescaledb-compression-end"];
const DECOMPRESSION: [&str; 2] = ["::timescaledb-decompression-start", "::timescaledb-decompression-end"];

fn captured(name: &str, mode: &str) -> Vec<Captured> {
    let file = directory().join(format!("{DIRECTORY}/{name}.{mode}.txt"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    format::read(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

#[test]
fn every_fixture_of_timescaledb_decodes_as_it_says() {
    let files = std::fs::read_dir(directory().join(DIRECTORY)).unwrap();
    let mut found: Vec<String> = files.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let mut known: Vec<String> =
        NAMES.iter().flat_map(|name| ["binary", "text"].map(|mode| format!("{name}.{mode}.txt"))).collect();
    known.sort();
    assert_eq!(found, known, "a fixture without a test, or the other way round");
    for name in NAMES {
        for mode in ["binary", "text"] {
            let captured = captured(name, mode);
            assert!(!captured.is_empty(), "{name}");
            for (one, message) in captured.iter().zip(decoded(&captured)) {
                let now = Captured { bytes: one.bytes.clone(), description: format::describe(&message) };
                assert_eq!(format::write(&now), format::write(one), "{name}, {mode}");
            }
        }
    }
}

/// What a transaction does, in words: markers, and what each kind of relation gets.
fn told(transaction: &[Message<'_>]) -> Vec<String> {
    let mut names: BTreeMap<u32, &'static str> = BTreeMap::new();
    let mut told: Vec<String> = Vec::new();
    for message in transaction {
        let (relid, what) = match message {
            Message::Relation(relation) => {
                let kind = match (relation.schema, relation.name) {
                    (CATALOG, "chunk") => "catalog",
                    (CATALOG, _) => "slice",
                    ("_timescaledb_internal", name) if name.starts_with("_hyper_1_") => "chunk",
                    ("public", "metrics") => "hypertable",
                    other => panic!("{other:?} is published"),
                };
                names.insert(relation.relid, kind);
                continue;
            }
            Message::Logical { prefix, transactional, .. } => {
                assert!(transactional, "its place among the rows is what it is for");
                told.push((*prefix).to_owned());
                continue;
            }
            Message::Truncate { relids, .. } => {
                let mut kinds: Vec<&str> = relids.clone().map(|relid| names[&relid]).collect();
                kinds.sort_unstable();
                told.push(format!("truncate {}", kinds.join(" ")));
                continue;
            }
            Message::Insert { relid, .. } => (relid, "insert"),
            Message::Update { relid, .. } => (relid, "update"),
            Message::Delete { relid, .. } => (relid, "delete"),
            Message::Type { .. } | Message::Origin { .. } => continue,
            other => panic!("{other:?} within a transaction"),
        };
        // One row after the other of the same kind is said once, with their number.
        let now = format!("{what} {}", names[relid]);
        match told.last_mut().filter(|last| last.split(" x").next() == Some(now.as_str())) {
            Some(last) => {
                let times: u32 = last.split(" x").nth(1).map_or(1, |times| times.parse().unwrap());
                *last = format!("{now} x{}", times + 1);
            }
            None => told.push(now),
        }
    }
    told
}

fn told_of(name: &str, mode: &str) -> Vec<Vec<String>> {
    let captured = captured(name, mode);
    let messages = decoded(&captured);
    transactions(&messages).into_iter().map(told).filter(|told| !told.is_empty()).collect()
}

/// What the design relies on, as the server said it.
#[test]
fn chunks_and_the_extensions_own_work_come_as_they_are_expected() {
    for mode in ["binary", "text"] {
        let of = |name| told_of(name, mode);
        // The catalog's rows stand before the chunk's, in the same transaction: whoever sees these finds those.
        let new = of("new-chunk").concat();
        let (of_catalog, of_chunk) = new.split_at(new.iter().position(|told| told.ends_with(" chunk x3")).unwrap());
        assert!(of_catalog.contains(&"insert catalog".to_owned()) && of_catalog.contains(&"insert slice".to_owned()));
        assert_eq!(of_chunk, ["insert chunk x3"]);

        let between = |told: &[String], markers: [&str; 2]| {
            let place = |marker: &str| told.iter().position(|one| one == marker).unwrap_or_else(|| panic!("{told:?}"));
            told[place(markers[0]) + 1..place(markers[1])].to_vec()
        };
        let has = |told: &[String], what: &str| told.iter().any(|one| one.split(" x").next() == Some(what));
        let first = between(&of("compression").concat(), COMPRESSION);
        assert!(!has(&first, "delete chunk") && !has(&first, "truncate chunk"), "emptied unseen: {first:?}");
        let insert = of("insert-into-compressed").concat();
        assert!(insert.iter().all(|told| !told.starts_with("::")) && has(&insert, "update catalog"), "{insert:?}");
        assert!(has(&insert, "insert chunk"));
        assert!(has(&between(&of("recompression").concat(), COMPRESSION), "delete chunk"), "a delete for each row");
        for (name, change) in [("update-of-compressed", "update chunk"), ("upsert-of-compressed", "update chunk")] {
            let told = of(name).concat();
            assert!(has(&between(&told, DECOMPRESSION), "insert chunk"), "{name}: {told:?}");
            assert_eq!(told.last().map(String::as_str), Some(change), "behind it, the user's own: {told:?}");
        }
        assert!(has(&between(&of("decompression").concat(), DECOMPRESSION), "insert chunk"), "an insert for each row");
        let unpublished = of("unpublished-chunk").concat();
        assert!(has(&unpublished, "insert catalog") && !has(&unpublished, "insert chunk"), "{unpublished:?}");
        let dropped = of("dropped-chunks");
        assert!(dropped[0].iter().all(|told| told.starts_with("delete catalog") || told.starts_with("delete slice")));
        assert!(dropped.concat().iter().any(|told| told.starts_with("truncate chunk")), "{dropped:?}");
        assert!(dropped.concat().iter().any(|told| told.contains("hypertable")), "{dropped:?}");
    }
}

/// By device and hour since the beginning of 2025, the value.
type Rows = BTreeMap<(i64, i64), i64>;

/// A migration that follows, without servers.
struct Bed {
    runtime: tokio::runtime::Runtime,
    _directory: tempfile::TempDir,
    queue: Queue,
    appender: Appender,
    layout: Layout,
    at: Lsn,
    /// The target's hypertable.
    rows: Rows,
    /// What the catalog's rows have said: the chunk's name, its id and its hypertable's.
    catalog: BTreeMap<String, (i32, i32)>,
    /// How often the apply stopped in front of a chunk that it did not know.
    learned: Vec<String>,
    /// Changes of rows that were applied.
    changes: u64,
    /// As if the server had sent no message.
    leaves_out_markers: bool,
}

/// How the assembler took a transaction.
enum Taken {
    Applied(Vec<Chunk>),
    /// It has to be replayed row by row.
    Serial,
    /// It announces a chunk that nobody knows.
    Unknown,
}

impl Bed {
    fn new(mode: &str) -> Bed {
        let directory = tempfile::tempdir().unwrap();
        let (queue, appender) = queue::open(directory.path(), Lsn(1), queue::Options::default()).unwrap();
        let mut layout = Layout::new(Vec::new(), &BTreeMap::new(), mode == "binary", 4).unwrap();
        layout.has_hypertables = true;
        Bed {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            _directory: directory,
            queue,
            appender,
            layout,
            at: Lsn(1),
            rows: Rows::new(),
            catalog: BTreeMap::new(),
            learned: Vec::new(),
            changes: 0,
            leaves_out_markers: false,
        }
    }

    /// Everything of a fixture; the answer says of each transaction whether the assembler took it.
    fn play(&mut self, name: &str, mode: &str) -> Vec<bool> {
        let captured = captured(name, mode);
        let mut taken = Vec::new();
        // The server says once for all of them what a relation is.
        let mut relations = BTreeMap::new();
        let mut rest = &captured[..];
        while let Some(end) = rest.iter().position(|one| one.bytes[0] == b'C') {
            let (transaction, after) = rest.split_at(end + 1);
            taken.push(self.transaction(transaction, &mut relations));
            rest = after;
        }
        taken
    }

    fn transaction<'a>(&mut self, captured: &'a [Captured], relations: &mut BTreeMap<u32, Relation<'a>>) -> bool {
        let messages = decoded(captured);
        let (Message::Begin { commit_lsn, commit_time, xid }, Message::Commit { end_lsn, .. }) =
            (&messages[0], &messages[messages.len() - 1])
        else {
            panic!("no transaction: {messages:?}")
        };
        self.appender.begin(TransactionHead { xid: *xid, commit_lsn: *commit_lsn, commit_time: *commit_time }).unwrap();
        for (one, message) in captured.iter().zip(&messages) {
            if let Message::Relation(relation) = message {
                relations.insert(relation.relid, *relation);
            }
            match relid_of(message) {
                // The extension's catalog is in no publication of walferry, which asks it.
                Some(relid) if relations[&relid].schema == CATALOG => self.note(&relations[&relid], message),
                _ if self.leaves_out_markers && one.bytes[0] == b'M' => {}
                _ if !matches!(one.bytes[0], b'B' | b'C') => self.appender.data(&one.bytes).unwrap(),
                _ => {}
            }
        }
        self.appender.commit(*end_lsn).unwrap();
        self.appender.flush().unwrap();
        let mut progress = self.queue.subscribe();
        self.runtime.block_on(async {
            while progress.borrow_and_update().durable_end < *end_lsn {
                progress.changed().await.unwrap();
            }
        });
        let unknown: Vec<Relation<'_>> = relations
            .values()
            .filter(|relation| relation.schema != CATALOG && relation.name != "metrics")
            .filter(|relation| self.layout.find(relation.relid).is_none())
            .copied()
            .collect();
        let mut taken = self.assemble(*end_lsn);
        if !unknown.is_empty() {
            assert!(matches!(taken, Taken::Unknown), "nothing is applied in front of a chunk that nobody knows");
            for relation in unknown {
                self.learn(&relation);
            }
            taken = self.assemble(*end_lsn);
        }
        self.at = *end_lsn;
        let Taken::Applied(chunks) = taken else { return false };
        chunks.into_iter().for_each(|chunk| self.write(chunk));
        true
    }

    fn assemble(&self, end: Lsn) -> Taken {
        let reader = self.queue.reader(self.at).unwrap();
        let mut assembled = Assembler::start(Arc::new(self.layout.clone()), reader, self.at, Some(end), false).unwrap();
        let mut chunks = Vec::new();
        while let Some(next) = assembled.blocking_recv() {
            match next.unwrap() {
                Assembled::Chunk(chunk) => chunks.push(chunk),
                Assembled::Serial { complete } => {
                    assert_eq!(complete, self.at, "everything before it is complete");
                    return Taken::Serial;
                }
                Assembled::Unknown { complete, .. } => {
                    assert_eq!(complete, self.at, "nothing of the transaction is begun");
                    return Taken::Unknown;
                }
            }
        }
        Taken::Applied(chunks)
    }

    /// A row of the catalog.
    fn note(&mut self, relation: &Relation<'_>, message: &Message<'_>) {
        let Message::Insert { new, .. } = message else { return };
        if relation.name != "chunk" {
            return;
        }
        let field = |name: &str| {
            let at = relation.columns().position(|column| column.name == name).unwrap();
            row(new)[at]
        };
        let text = |datum| match datum {
            Datum::Text(value) | Datum::Binary(value) => std::str::from_utf8(value).unwrap().to_owned(),
            other => panic!("{other:?}"),
        };
        let number = |datum| i32::try_from(number(datum)).unwrap();
        self.catalog.insert(text(field("table_name")), (number(field("id")), number(field("hypertable_id"))));
    }

    /// The apply has stopped in front of a chunk: what it is, the catalog says.
    fn learn(&mut self, relation: &Relation<'_>) {
        let refused = self.layout.check_relation(relation, 1, Lsn(u64::MAX)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::SchemaChanged);
        assert!(refused.to_string().contains(relation.name), "{refused}");
        let (chunk, hypertable) = self.catalog[relation.name];
        self.learned.push(relation.name.to_owned());
        self.layout.add(&table(relation, chunk, hypertable));
    }

    fn write(&mut self, chunk: Chunk) {
        self.changes += chunk.end.as_ref().map_or(0, |end| end.changes);
        let binary = self.layout.binary;
        for mut of_table in chunk.writes.into_iter().flatten() {
            let table = &self.layout.tables[of_table.place].table;
            assert_eq!((table.applied_to(), table.inserted_into()), (HYPERTABLE.to_owned(), HYPERTABLE.to_owned()));
            assert_eq!(table.routed_as(), HYPERTABLE_OID, "all chunks of it by one session");
            assert!(of_table.deletes.is_empty() && of_table.updates.is_empty(), "each row by a statement of its own");
            for gone in &of_table.single_deletes {
                let gone = key(&gone.tuple().columns().collect::<Vec<_>>());
                assert!(self.rows.remove(&gone).is_some(), "{gone:?} is deleted and was not there");
            }
            for changed in &of_table.single_updates {
                let (key, value) = key_and_value(&changed.tuple().columns().collect::<Vec<_>>());
                assert!(self.rows.insert(key, value).is_some(), "{key:?} is updated and was not there");
            }
            for (key, value) in copied(&of_table.inserts.finish(), binary) {
                assert_eq!(self.rows.insert(key, value), None, "{key:?} is inserted and was there");
            }
        }
    }
}

const HYPERTABLE: &str = "\"public\".\"metrics\"";
const HYPERTABLE_OID: u32 = 1;

fn relid_of(message: &Message<'_>) -> Option<u32> {
    match message {
        Message::Relation(relation) => Some(relation.relid),
        Message::Insert { relid, .. } | Message::Update { relid, .. } | Message::Delete { relid, .. } => Some(*relid),
        _ => None,
    }
}

fn table(relation: &Relation<'_>, chunk: i32, hypertable: i32) -> Table {
    let columns: Vec<Column> = (1i16..)
        .zip(relation.columns())
        .map(|(number, column)| Column {
            name: column.name.to_owned(),
            number,
            type_oid: column.type_oid,
            type_name: String::new(),
            type_modifier: column.type_modifier,
            not_null: column.is_key,
            identity_always: false,
            binary_safe: true,
            byte_equal: true,
            equality_schema: Some("pg_catalog".to_owned()),
        })
        .collect();
    Table {
        relid: relation.relid,
        schema: relation.schema.to_owned(),
        name: relation.name.to_owned(),
        unlogged: false,
        is_partition: false,
        identity: ReplicaIdentity::Default,
        columns,
        key: relation.columns().enumerate().filter(|(_, column)| column.is_key).map(|(at, _)| at).collect(),
        has_other_unique: false,
        pages: 0,
        bytes: 0,
        estimated_rows: 0.0,
        updates_and_deletes: 0,
        relfilenode: None,
        firing: Vec::new(),
        chunk: Some(ChunkOf {
            relid: HYPERTABLE_OID,
            schema: "public".to_owned(),
            name: "metrics".to_owned(),
            hypertable,
            chunk,
            dimensions: vec!["time".to_owned()],
            ranges: Vec::new(),
            on_target: None,
            compressed: None,
            status: 0,
            is_late: true,
            is_gone: false,
            stands_in: None,
        }),
        is_hypertable: false,
        hypertable: None,
    }
}

fn number(datum: Datum<'_>) -> i64 {
    match datum {
        Datum::Text(text) => std::str::from_utf8(text).unwrap().parse().unwrap(),
        Datum::Binary(bytes) => i64::from(i32::from_be_bytes(bytes.try_into().unwrap())),
        other => panic!("{other:?} is no number"),
    }
}

/// Hours since the beginning of 2025.
fn hours(datum: Datum<'_>) -> i64 {
    const DAYS_FROM_2000: i64 = 9132;
    match datum {
        Datum::Text(text) => {
            let text = std::str::from_utf8(text).unwrap();
            assert!(text.starts_with("2025-01-") && text.ends_with(":00:00"), "{text}");
            let (day, hour): (i64, i64) = (text[8..10].parse().unwrap(), text[11..13].parse().unwrap());
            (day - 1) * 24 + hour
        }
        Datum::Binary(bytes) => i64::from_be_bytes(bytes.try_into().unwrap()) / 3_600_000_000 - DAYS_FROM_2000 * 24,
        other => panic!("{other:?} is no time"),
    }
}

fn key(row: &[Datum<'_>]) -> (i64, i64) {
    (number(row[1]), hours(row[0]))
}

fn key_and_value(row: &[Datum<'_>]) -> ((i64, i64), i64) {
    (key(row), number(row[2]))
}

/// The rows of a COPY, out of the messages that carry it.
fn copied(mut messages: &[u8], binary: bool) -> Vec<((i64, i64), i64)> {
    let mut body = Vec::new();
    while messages.first() == Some(&b'd') {
        let length = u32::from_be_bytes(messages[1..5].try_into().unwrap()) as usize;
        body.extend_from_slice(&messages[5..1 + length]);
        messages = &messages[1 + length..];
    }
    if !binary {
        let lines = std::str::from_utf8(&body).unwrap().lines();
        let fields = |line: &str| line.split('\t').map(|field| field.as_bytes().to_vec()).collect::<Vec<_>>();
        return lines
            .map(|line| key_and_value(&fields(line).iter().map(|field| Datum::Text(field)).collect::<Vec<_>>()))
            .collect();
    }
    let mut rows = Vec::new();
    // Behind the signature, flags and the length of an extension of the header.
    let mut rest = body.get(19..).unwrap_or_default();
    while let [high, low, after @ ..] = rest {
        rest = after;
        let columns = i16::from_be_bytes([*high, *low]);
        let mut row = Vec::new();
        for _ in 0..columns {
            let length = i32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
            row.push(Datum::Binary(&rest[4..4 + length]));
            rest = &rest[4 + length..];
        }
        if columns >= 0 {
            rows.push(key_and_value(&row));
        }
    }
    rows
}

#[test]
fn of_the_captured_history_exactly_what_the_user_did_is_applied_to_the_hypertable() {
    for mode in ["text", "binary"] {
        let mut bed = Bed::new(mode);
        let mut expected = Rows::new();
        let mut done = 0;
        // What each does to the rows, and with how many changes.
        type Step = (&'static str, u64, &'static [((i64, i64), Option<i64>)]);
        let steps: [Step; 10] = [
            ("new-chunk", 3, &[((1, 1), Some(10)), ((1, 2), Some(20)), ((2, 1), Some(30))]),
            ("compression", 0, &[]),
            ("insert-into-compressed", 1, &[((1, 3), Some(40))]),
            ("recompression", 0, &[]),
            ("update-of-compressed", 1, &[((1, 2), Some(21))]),
            ("upsert-of-compressed", 1, &[((2, 1), Some(31))]),
            ("delete-of-compressed", 3, &[((1, 1), None), ((1, 2), None), ((1, 3), None)]),
            ("decompression", 0, &[]),
            ("all-in-one", 3, &[((3, 4), Some(50)), ((2, 1), Some(32)), ((3, 25), Some(60))]),
            ("unpublished-chunk", 0, &[]),
        ];
        for (name, changes, effects) in steps {
            assert!(bed.play(name, mode).iter().all(|taken| *taken), "{name} needs no replay");
            for (key, value) in effects {
                match value {
                    Some(value) => drop(expected.insert(*key, *value)),
                    None => drop(expected.remove(key)),
                }
            }
            assert_eq!(bed.rows, expected, "{name}, {mode}");
            done += changes;
            assert_eq!(bed.changes, done, "{name}, {mode}: no change but the user's own was looked at");
        }
        assert_eq!(bed.learned.len(), 2, "one chunk by itself, one in the middle of other work");
        assert_eq!(
            bed.catalog.len(),
            bed.learned.len() + 3,
            "twice one of compressed rows, and one that was not published"
        );
        // The retention's transaction has nothing for us; the TRUNCATE is replayed.
        assert_eq!(bed.play("dropped-chunks", mode).last(), Some(&false));
        assert_eq!((bed.rows, bed.changes), (expected, done));
    }
}

/// So it is by the markers that the extension's own work is told from a user's.
#[test]
fn without_its_markers_the_extensions_own_work_would_be_applied() {
    let (mut bed, mut unmarked) = (Bed::new("text"), Bed::new("text"));
    unmarked.leaves_out_markers = true;
    for name in &NAMES[..4] {
        bed.play(name, "text");
        unmarked.play(name, "text");
    }
    assert_eq!(NAMES[3], "recompression");
    let lost: Vec<_> = bed.rows.keys().filter(|key| !unmarked.rows.contains_key(key)).collect();
    assert_eq!(lost, [&(1, 3)], "the row that was inserted beside the compressed ones");
}
