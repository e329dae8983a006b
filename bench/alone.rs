//! B11 and B12: the queue and the decoder by themselves, without servers.

use std::time::{Duration, Instant};

use walferry::decode::{Message, decode};
use walferry::error::{Context, Error, ErrorKind, Result};
use walferry::lsn::Lsn;
use walferry::queue;

use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;
use crate::stream;

/// Row changes in a transaction of the stream.
const CHANGES: usize = 100;

/// Changes a second on one core, each decoded and each of its columns looked at.
pub fn decoder(setting: &Setting, results: &mut Results) -> Result<()> {
    let messages: Vec<Vec<u8>> = (0..100_000).map(stream::change).collect();
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
    // Made before, so that only the queue's work is timed.
    let messages: Vec<Vec<u8>> = (0..200_000).map(stream::change).collect();
    let megabytes: u64 = setting.options.size(2048, 512);
    let (mut appended, mut on_disk, mut read, mut dd) =
        (Sample::default(), Sample::default(), Sample::default(), Sample::default());
    for _ in 0..setting.options.rounds() {
        dd.0.push(megabytes as f64 / with_dd(setting, megabytes).await?.as_secs_f64());
        let directory = setting.directory("queue")?;
        std::fs::create_dir(&directory)?;
        let (queue, mut appender) = queue::open(&directory, Lsn(1), queue::Options::default())?;
        let begun = Instant::now();
        let (end, bytes) = stream::fill(&queue, &mut appender, &messages, CHANGES, megabytes << 20).await?;
        let elapsed = begun.elapsed().as_secs_f64();
        appended.0.push(bytes as f64 / elapsed / f64::from(1 << 20));
        on_disk.0.push(queue.bytes() as f64 / elapsed / f64::from(1 << 20));
        let reading = queue.clone();
        let begun = Instant::now();
        let drained = tokio::task::spawn_blocking(move || stream::drain(reading.reader(Lsn(1))?, end)).await;
        drained.map_err(|error| Error::new(ErrorKind::Other, error.to_string()))??;
        read.0.push(bytes as f64 / begun.elapsed().as_secs_f64() / f64::from(1 << 20));
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

async fn with_dd(setting: &Setting, megabytes: u64) -> Result<Duration> {
    let file = setting.scratch().join("dd");
    let script = format!("dd if=/dev/zero of={} bs=8M count={} oflag=dsync 2>/dev/null", file.display(), megabytes / 8);
    let elapsed = setting.shell(&script).await?;
    std::fs::remove_file(&file).context(|| "removing dd's file".into())?;
    Ok(elapsed)
}
