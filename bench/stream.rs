//! A stream of changes as pgoutput writes it, and a queue filled with it, without a server: what the benchmark (`alone`) and those
//! of criterion (`criterion/`) have in common.

use std::time::Duration;

use walferry::error::{Error, ErrorKind, Result};
use walferry::lsn::Lsn;
use walferry::queue::{Appender, Entry, Queue, Reader, TransactionHead};

/// OID of the stream's table.
pub const RELID: u32 = 16_384;

/// Makes the message with a number.
pub type Shape = fn(u64) -> Vec<u8>;

/// A table's row in binary: a key, a number, a text of 32 letters that do not compress well, a time.
fn tuple(message: &mut Vec<u8>, number: u64) {
    let scattered = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let text = format!("{scattered:016x}{:016x}", scattered.rotate_left(29).wrapping_mul(0xD6E8_FEB8_6659_FD93));
    let kind = (number % 1000) as u32;
    let columns: [&[u8]; 4] =
        [&number.to_be_bytes(), &kind.to_be_bytes(), text.as_bytes(), &(number * 1000).to_be_bytes()];
    message.extend_from_slice(&4u16.to_be_bytes());
    columns.into_iter().for_each(|column| value(message, b'b', column));
}

fn value(message: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    message.push(kind);
    message.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    message.extend_from_slice(bytes);
}

fn head(tag: u8, part: u8) -> Vec<u8> {
    let mut message = Vec::with_capacity(96);
    message.push(tag);
    message.extend_from_slice(&RELID.to_be_bytes());
    message.push(part);
    message
}

fn whole(tag: u8, part: u8, number: u64) -> Vec<u8> {
    let mut message = head(tag, part);
    tuple(&mut message, number);
    message
}

/// A new row with this key.
pub fn insert(number: u64) -> Vec<u8> {
    whole(b'I', b'N', number)
}

/// New values for the row with this key.
pub fn update(number: u64) -> Vec<u8> {
    whole(b'U', b'N', number)
}

/// The row with this key goes.
pub fn delete(number: u64) -> Vec<u8> {
    whole(b'D', b'K', number)
}

/// One row change, each of another key: of ten, six inserts, three updates, one delete.
pub fn change(number: u64) -> Vec<u8> {
    match number % 10 {
        0..=5 => insert(number),
        6..=8 => update(number),
        _ => delete(number),
    }
}

/// The old row and the new one, as REPLICA IDENTITY FULL has them.
pub fn update_with_old_row(number: u64) -> Vec<u8> {
    let mut message = whole(b'U', b'O', number);
    message.push(b'N');
    tuple(&mut message, number);
    message
}

/// An update that leaves a TOASTed text unchanged.
pub fn update_without_toast(number: u64) -> Vec<u8> {
    let mut message = head(b'U', b'N');
    message.extend_from_slice(&2u16.to_be_bytes());
    value(&mut message, b'b', &number.to_be_bytes());
    message.push(b'u');
    message
}

/// A row of 50 columns in text, every tenth of them NULL.
pub fn insert_wide(number: u64) -> Vec<u8> {
    let mut message = head(b'I', b'N');
    message.extend_from_slice(&50u16.to_be_bytes());
    for column in 0..50 {
        match column % 10 {
            9 => message.push(b'n'),
            _ => value(&mut message, b't', (number * 50 + column).to_string().as_bytes()),
        }
    }
    message
}

/// Appends messages as transactions of so many, over and over, until there are so many bytes; waits until the last is on disk.
/// Answers its end and the bytes.
pub async fn fill(
    queue: &Queue,
    appender: &mut Appender,
    messages: &[Vec<u8>],
    transaction_size: usize,
    bytes_wanted: u64,
) -> Result<(Lsn, u64)> {
    let (mut bytes, mut transaction) = (0u64, 0u64);
    let mut end = Lsn(1);
    let mut next = messages.iter().cycle();
    while bytes < bytes_wanted {
        transaction += 1;
        let commit_lsn = Lsn(transaction * 16_384);
        appender.ready().await?;
        appender.begin(TransactionHead { xid: transaction as u32, commit_lsn, commit_time: 0 })?;
        for message in next.by_ref().take(transaction_size) {
            appender.ready().await?;
            appender.data(message)?;
            bytes += message.len() as u64;
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

/// Reads up to a transaction's end.
pub fn drain(mut reader: Reader, end: Lsn) -> Result<usize> {
    let mut bytes = 0usize;
    while let Some(entry) = reader.next(Duration::ZERO)? {
        match entry {
            Entry::Data(data) => bytes += data.len(),
            Entry::Commit { end_lsn } if end_lsn >= end => return Ok(bytes),
            Entry::Begin(_) | Entry::Commit { .. } | Entry::Position(_) => {}
        }
    }
    Err(Error::new(ErrorKind::Queue, format!("the queue ended after {bytes} bytes, before its last transaction")))
}
