//! B11 and B12: the queue and the decoder by themselves, without servers.

use std::time::{Duration, Instant};

use walferry::decode::{Message, decode};
use walferry::error::{Context, Error, ErrorKind, Result};
use walferry::lsn::Lsn;
use walferry::queue::{self, Appender, Entry, Queue, TransactionHead};

use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// Row changes in a transaction of the stream below.
const CHANGES: u64 = 100;
/// OID of its table.
const RELID: u32 = 16_384;

/// A pgoutput tuple in binary: a key, a number, a text of 32 letters that do not compress well, a time.
fn tuple(message: &mut Vec<u8>, number: u64) {
    message.extend_from_slice(&4u16.to_be_bytes());
    let scattered = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let text = format!("{scattered:016x}{:016x}", scattered.rotate_left(29).wrapping_mul(0xD6E8_FEB8_6659_FD93));
    let kind = (number % 1000) as u32;
    let columns: [&[u8]; 4] =
        [&number.to_be_bytes(), &kind.to_be_bytes(), text.as_bytes(), &(number * 1000).to_be_bytes()];
    for column in columns {
        message.push(b'b');
        message.extend_from_slice(&(column.len() as u32).to_be_bytes());
        message.extend_from_slice(column);
    }
}

/// One row change as pgoutput writes it: of ten, six inserts, three updates, one delete.
fn change(number: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(96);
    let (tag, part) = match number % 10 {
        0..=5 => (b'I', b'N'),
        6..=8 => (b'U', b'N'),
        _ => (b'D', b'K'),
    };
    message.push(tag);
    message.extend_from_slice(&RELID.to_be_bytes());
    message.push(part);
    tuple(&mut message, number);
    message
}

/// Changes a second on one core, each decoded and each of its columns looked at.
pub fn decoder(setting: &Setting, results: &mut Results) -> Result<()> {
    let messages: Vec<Vec<u8>> = (0..100_000).map(change).collect();
    let seconds = setting.options.size(3, 1);
    let mut rates = Sample::default();
    for _ in 0..setting.options.rounds() {
        let begun = Instant::now();
        let (mut changes, mut bytes) = (0u64, 0usize);
        while begun.elapsed() < Duration::from_secs(seconds) {
            for message in &messages {
                let tuple = match decode(message)? {
                    Message::Insert { new, .. } | Message::Update { new, .. } => new,
                    Message::Delete { old, .. } => old.tuple(),
                    other => return Err(Error::new(ErrorKind::Other, format!("decoded as something else: {other:?}"))),
                };
                bytes += tuple.columns().filter(|column| !matches!(column, walferry::decode::Datum::Null)).count();
            }
            changes += messages.len() as u64;
        }
        // Used, so that nothing of it can be left out.
        std::hint::black_box(bytes);
        rates.0.push(changes as f64 / begun.elapsed().as_secs_f64() / 1e6);
    }
    results.add(Row::of_value("B12", "decoder alone, one core", "M changes/s", rates, Bar::AtLeast(5.0)));
    Ok(())
}

/// Append until all is durable, then read all; beside `dd` to the same disk.
pub async fn queue(setting: &Setting, results: &mut Results) -> Result<()> {
    let megabytes: u64 = setting.options.size(2048, 512);
    let (mut appended, mut on_disk, mut read, mut dd) =
        (Sample::default(), Sample::default(), Sample::default(), Sample::default());
    for _ in 0..setting.options.rounds() {
        dd.0.push(megabytes as f64 / with_dd(setting, megabytes).await?.as_secs_f64());
        let directory = setting.directory("queue")?;
        std::fs::create_dir(&directory)?;
        let (queue, mut appender) = queue::open(&directory, Lsn(1), queue::Options::default())?;
        let begun = Instant::now();
        let (end, bytes) = fill(&queue, &mut appender, megabytes << 20).await?;
        let elapsed = begun.elapsed().as_secs_f64();
        appended.0.push(bytes as f64 / elapsed / f64::from(1 << 20));
        on_disk.0.push(queue.bytes() as f64 / elapsed / f64::from(1 << 20));
        let reading = queue.clone();
        let seconds = tokio::task::spawn_blocking(move || drain(&reading, end)).await;
        let seconds = seconds.map_err(|error| Error::new(ErrorKind::Other, error.to_string()))??;
        read.0.push(bytes as f64 / seconds.as_secs_f64() / f64::from(1 << 20));
        drop(appender);
        setting.directory("queue")?;
    }
    results.add(Row {
        id: "B11",
        case: format!("queue alone, append {megabytes} MiB of messages with fsync"),
        unit: "MiB/s",
        speed: Some(appended.over(&dd)),
        walferry: appended,
        peer: Some(("dd in blocks of 8 MiB, each synced".into(), dd)),
        bar: Bar::Speed(0.8),
    });
    results.add(Row::of_value("B11", "the same, in bytes on the disk (zstd)", "MiB/s", on_disk, Bar::Reported));
    results.add(Row::of_value("B11", "queue alone, read", "MiB/s", read, Bar::Reported));
    Ok(())
}

/// Appends transactions as the stream brings them, and waits until the last is on disk; answers its end and the bytes.
async fn fill(queue: &Queue, appender: &mut Appender, bytes_wanted: u64) -> Result<(Lsn, u64)> {
    // Made before, so that only the queue's work is timed.
    let messages: Vec<Vec<u8>> = (0..200_000).map(change).collect();
    let (mut bytes, mut transaction, mut at) = (0u64, 0u64, 0usize);
    let mut end = Lsn(1);
    while bytes < bytes_wanted {
        transaction += 1;
        let commit_lsn = Lsn(transaction * 16_384);
        appender.ready().await?;
        appender.begin(TransactionHead { xid: transaction as u32, commit_lsn, commit_time: 0 })?;
        for _ in 0..CHANGES {
            appender.ready().await?;
            appender.data(&messages[at])?;
            bytes += messages[at].len() as u64;
            at = (at + 1) % messages.len();
        }
        end = Lsn(commit_lsn.0 + 64);
        appender.commit(end)?;
    }
    appender.flush()?;
    let mut progress = queue.subscribe();
    while progress.borrow_and_update().durable_end < end {
        progress.changed().await.map_err(|_| Error::new(ErrorKind::Queue, "the queue's writer has ended"))?;
    }
    Ok((end, bytes))
}

fn drain(queue: &Queue, end: Lsn) -> Result<Duration> {
    let begun = Instant::now();
    let mut reader = queue.reader(Lsn(1))?;
    let mut bytes = 0usize;
    while let Some(entry) = reader.next(Duration::ZERO)? {
        match entry {
            Entry::Data(data) => bytes += data.len(),
            Entry::Commit { end_lsn } if end_lsn >= end => return Ok(begun.elapsed()),
            Entry::Begin(_) | Entry::Commit { .. } | Entry::Position(_) => {}
        }
    }
    Err(Error::new(ErrorKind::Queue, format!("the queue ended after {bytes} bytes, before its last transaction")))
}

async fn with_dd(setting: &Setting, megabytes: u64) -> Result<Duration> {
    let file = setting.scratch().join("dd");
    let script = format!("dd if=/dev/zero of={} bs=8M count={} oflag=dsync 2>/dev/null", file.display(), megabytes / 8);
    let elapsed = setting.shell(&script).await?;
    std::fs::remove_file(&file).context(|| "removing dd's file".into())?;
    Ok(elapsed)
}
