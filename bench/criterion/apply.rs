//! The apply with a null target: from pgoutput's bytes in the queue to the bytes of COPY that the sessions would send, and nobody to send them to.
//! Per change.
//!
//! `apply_merge` is the inner part of it: decoding and the net effect, without the queue, the threads and the encoding.

#![allow(missing_docs)] // what criterion's macros make
#![allow(clippy::unwrap_used)] // a benchmark that fails has nothing better to do

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use walferry::apply::assemble::{Assembled, Assembler, Chunk};
use walferry::apply::layout::Layout;
use walferry::apply::net::NetChanges;
use walferry::decode::{Message, decode};
use walferry::lsn::Lsn;
use walferry::queue;
use walferry::source::catalog::{Column, ReplicaIdentity, Table};
use walferry::source::snapshot::SnapshotData;
use walferry::target::ledger::LedgerTable;
use walferry::target::route::Routing;

#[allow(dead_code)] // each benchmark uses a part of it
#[path = "../stream.rs"]
mod stream;

const CHANGES: u64 = 20_000;
const WORKERS: usize = 4;
/// How many rows the hot case has.
const HOT_ROWS: u64 = 1000;

/// A history that its table shares: no key comes twice, but in the hot case.
const SHAPES: [(&str, stream::Shape); 3] =
    [("inserts", stream::insert), ("mixed", stream::change), ("updates_of_hot_rows", update_of_hot_row)];

fn update_of_hot_row(number: u64) -> Vec<u8> {
    stream::update(number % HOT_ROWS)
}

/// The stream's table.
fn table() -> Table {
    let column = |number: i16, name: &str, type_oid: u32, type_name: &str| Column {
        name: name.into(),
        number,
        type_oid,
        type_name: type_name.into(),
        type_modifier: -1,
        not_null: true,
        identity_always: false,
        binary_safe: true,
        byte_equal: true,
        equality_schema: Some("pg_catalog".into()),
    };
    Table {
        relid: stream::RELID,
        schema: "public".into(),
        name: "events".into(),
        unlogged: false,
        is_partition: false,
        identity: ReplicaIdentity::Default,
        columns: vec![
            column(1, "id", 20, "bigint"),
            column(2, "kind", 23, "integer"),
            column(3, "note", 25, "text"),
            column(4, "at", 1114, "timestamp without time zone"),
        ],
        key: vec![0],
        has_other_unique: false,
        pages: 0,
        bytes: 0,
        estimated_rows: 0.0,
        updates_and_deletes: 0,
        relfilenode: None,
        firing: Vec::new(),
        hypertable: None,
    }
}

/// One table, whose copy has seen none of the stream.
fn layout() -> Arc<Layout> {
    let table = table();
    let entry = LedgerTable {
        insert_only: false,
        routing: Routing::of(&table),
        snapshot: Some(1),
        copied: true,
        compared: false,
        rows_copied: 0,
        table,
    };
    let snapshot = SnapshotData { xmin: 0, xmax: 0, running: BTreeSet::new(), insert_lsn: Lsn(1) };
    Arc::new(Layout::new(vec![entry], &BTreeMap::from([(1, snapshot)]), true, WORKERS).unwrap())
}

/// What would be sent.
fn bytes_of(chunk: Chunk) -> usize {
    let tables = chunk.writes.into_iter().flatten();
    let copies = tables.flat_map(|table| [table.deletes, table.inserts].into_iter().chain(table.updates.into_values()));
    copies.filter(|rows| !rows.is_empty()).map(|mut rows| rows.finish().len()).sum()
}

fn assemble(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply_to_null_target");
    group.throughput(Throughput::Elements(CHANGES));
    for (name, shape) in SHAPES {
        group.bench_function(name, |bencher| {
            let layout = layout();
            let messages: Vec<Vec<u8>> = (0..CHANGES).map(shape).collect();
            let bytes: u64 = messages.iter().map(|message| message.len() as u64).sum();
            let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let (queue, mut appender) = queue::open(directory.path(), Lsn(1), queue::Options::default()).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let filled = stream::fill(&queue, &mut appender, &messages, 100, bytes);
            let (end, _) = runtime.block_on(filled).unwrap();
            bencher.iter(|| {
                let reader = queue.reader(Lsn(1)).unwrap();
                let mut chunks = Assembler::start(Arc::clone(&layout), reader, Lsn(1), Some(end), false).unwrap();
                let (mut sent, mut changes) = (0, 0);
                while let Some(chunk) = chunks.blocking_recv() {
                    let Assembled::Chunk(mut chunk) = chunk.unwrap() else { panic!("no history to replay") };
                    changes += chunk.end.take().map_or(0, |unit| unit.changes);
                    sent += bytes_of(chunk);
                }
                assert_eq!(changes, CHANGES);
                sent
            });
        });
    }
    group.finish();
}

fn merge(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply_merge");
    group.throughput(Throughput::Elements(CHANGES));
    for (name, shape) in SHAPES {
        group.bench_function(name, |bencher| {
            let messages: Vec<Bytes> = (0..CHANGES).map(|number| shape(number).into()).collect();
            bencher.iter(|| {
                let mut net = NetChanges::new(stream::RELID, &[0]);
                for message in &messages {
                    let merged = match decode(black_box(message)).unwrap() {
                        Message::Insert { new, .. } => net.insert(message, new),
                        Message::Update { old, new, .. } => net.update(message, old, new),
                        Message::Delete { old, .. } => net.delete(message, old),
                        other => panic!("decoded as something else: {other:?}"),
                    };
                    merged.unwrap();
                }
                net.take()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, assemble, merge);
criterion_main!(benches);
