//! The decoder by itself: messages of several shapes, each decoded and each of its columns looked at. Per change.

#![allow(missing_docs)] // what criterion's macros make

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use walferry::decode::{Datum, Message, Tuple, decode};

#[allow(dead_code)] // each benchmark uses a part of it
#[path = "../stream.rs"]
mod stream;

const MESSAGES: u64 = 10_000;

/// Columns with a value.
fn values(tuple: Tuple<'_>) -> usize {
    tuple.columns().filter(|column| !matches!(column, Datum::Null | Datum::Unchanged)).count()
}

fn values_of(message: &[u8]) -> usize {
    match decode(message) {
        Ok(Message::Insert { new, .. } | Message::Update { old: None, new, .. }) => values(new),
        Ok(Message::Update { old: Some(old), new, .. }) => values(old.tuple()) + values(new),
        Ok(Message::Delete { old, .. }) => values(old.tuple()),
        other => panic!("decoded as something else: {other:?}"),
    }
}

fn decoder(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(MESSAGES));
    let shapes: [(&str, stream::Shape); 7] = [
        ("mixed", stream::change),
        ("insert", stream::insert),
        ("update", stream::update),
        ("update_with_old_row", stream::update_with_old_row),
        ("update_without_toast", stream::update_without_toast),
        ("delete", stream::delete),
        ("insert_of_50_columns", stream::insert_wide),
    ];
    for (name, shape) in shapes {
        group.bench_function(name, |bencher| {
            let messages: Vec<Vec<u8>> = (0..MESSAGES).map(shape).collect();
            bencher.iter(|| messages.iter().map(|message| values_of(black_box(message))).sum::<usize>());
        });
    }
    group.finish();
}

criterion_group!(benches, decoder);
criterion_main!(benches);
