//! The queue by itself, on the disk that has cargo's target directory: whole transactions, appended until they are durable, and read. In bytes of
//! messages, before compression.

#![allow(missing_docs)] // what criterion's macros make
#![allow(clippy::unwrap_used)] // a benchmark that fails has nothing better to do

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use walferry::lsn::Lsn;
use walferry::queue::{self, Appender, Queue};

#[allow(dead_code)] // each benchmark uses a part of it
#[path = "../stream.rs"]
mod stream;

const BYTES: u64 = 8 << 20;

/// How many changes a transaction has.
const SIZES: [(&str, usize); 2] = [("of_1_change", 1), ("of_100_changes", 100)];

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn messages() -> Vec<Vec<u8>> {
    (0..10_000).map(stream::change).collect()
}

/// An empty queue.
fn open() -> (TempDir, Queue, Appender) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (queue, appender) = queue::open(directory.path(), Lsn(1), queue::Options::default()).unwrap();
    (directory, queue, appender)
}

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("queue_append_and_sync");
    group.throughput(Throughput::Bytes(BYTES)).sample_size(20);
    for (name, size) in SIZES {
        group.bench_function(name, |bencher| {
            let (runtime, messages) = (runtime(), messages());
            // What the routine answers is dropped outside of its time: ending the writer, and removing the files.
            let routine = |(directory, queue, mut appender): (TempDir, Queue, Appender)| {
                let filled = stream::fill(&queue, &mut appender, &messages, size, BYTES);
                black_box(runtime.block_on(filled).unwrap());
                (appender, queue, directory)
            };
            bencher.iter_batched(open, routine, BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("queue_read");
    group.throughput(Throughput::Bytes(BYTES)).sample_size(20);
    for (name, size) in SIZES {
        group.bench_function(name, |bencher| {
            let (_directory, queue, mut appender) = open();
            let (runtime, messages) = (runtime(), messages());
            let filled = stream::fill(&queue, &mut appender, &messages, size, BYTES);
            let (end, _) = runtime.block_on(filled).unwrap();
            bencher.iter(|| stream::drain(queue.reader(Lsn(1)).unwrap(), end).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, append, read);
criterion_main!(benches);
