//! The side of the queue that the stream writes to: frames into blocks, blocks to the writer's thread, within bounds.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::Sender;
use tokio::sync::oneshot;

use super::format::{
    DATA_BYTES_MAX, DATA_FRAME_BYTES, Labels, TransactionHead, put_begin, put_commit, put_data, put_position,
};
use super::state::{Shared, State};
use super::writer::{Block, Message};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;

/// Bytes of the small frames at most; what a block is kept short of.
const SMALL_FRAME_BYTES: usize = 32;

/// Appends the stream to the queue; there is one per queue, used by the task that receives the stream.
///
/// Ask [`ready`](Appender::ready) before each message; the calls that append never wait. What is incomplete when the
/// appender is dropped goes; the drop waits until the rest is durable.
pub struct Appender {
    shared: Arc<Shared>,
    /// `None` only while it is being dropped.
    messages: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
    /// Frames of the block in the making.
    frames: Vec<u8>,
    /// How many bytes of `frames` lie before its last boundary; 0 where it holds none.
    boundary_bytes: usize,
    /// What the frames before that boundary are about, and those behind it.
    labels: Labels,
    open_labels: Labels,
    /// The newest boundary in what was sent.
    sent_lsn: Lsn,
    /// Whether what was sent ends inside a transaction.
    sent_inside: bool,
    /// The newest boundary.
    end: Lsn,
    /// The transaction in the making.
    transaction: Option<TransactionHead>,
    /// Whether a rewind was begun and not finished: where the stream goes on is not known.
    must_rewind: bool,
    /// Whether the operator was told that the queue is full, and goes on nevertheless, since there was room.
    told_full: bool,
    told_overrun: bool,
}

enum Room {
    Yes,
    /// The quota is used up, and nothing can make room but more of the stream.
    Overrun,
    /// The writer has to catch up.
    Behind,
    Full,
}

impl Appender {
    pub(super) fn new(shared: Arc<Shared>, messages: Sender<Message>, thread: JoinHandle<()>, end: Lsn) -> Appender {
        Appender {
            shared,
            messages: Some(messages),
            thread: Some(thread),
            frames: Vec::new(),
            boundary_bytes: 0,
            labels: Labels::default(),
            open_labels: Labels::default(),
            sent_lsn: end,
            sent_inside: false,
            end,
            transaction: None,
            must_rewind: false,
            told_full: false,
            told_overrun: false,
        }
    }

    /// The end LSN of the newest complete transaction or position appended, durable or not. The stream may repeat what
    /// the queue has: the caller drops a transaction whose commit LSN is below this, and a position at or below it.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Whether a transaction has begun and not ended.
    pub fn in_transaction(&self) -> bool {
        self.transaction.is_some()
    }

    /// Waits until a message may be appended: until fewer than [`Options::in_flight_bytes`](super::Options) wait for the
    /// disk, and the quota and the disk have room. A quota that the transaction in the making uses up alone, all that is
    /// complete being applied, is overrun with a warning: nothing else could ever make room.
    ///
    /// Can be cancelled without loss.
    ///
    /// # Errors
    /// [`ErrorKind::Disk`] when a write or an fsync has failed; [`rewind`](Appender::rewind) is the way back.
    pub async fn ready(&mut self) -> Result<()> {
        loop {
            let room = {
                let state = self.shared.lock();
                if let Some(error) = state.failed() {
                    return Err(error);
                }
                self.room(&state)
            };
            self.tell(&room);
            match room {
                _ if self.must_rewind => return Err(unfinished_rewind()),
                Room::Yes | Room::Overrun => return Ok(()),
                Room::Behind | Room::Full => {}
            }
            // What is complete here may be all that a reader waits for, and so all that can make room.
            self.flush()?;
            self.shared.room.notified().await;
        }
    }

    fn room(&self, state: &State) -> Room {
        let options = &self.shared.options;
        // The block in the making does not count: it is sent by what comes next, which must not wait for it.
        if state.in_flight_bytes >= options.in_flight_bytes {
            Room::Behind
        } else if state.disk_full {
            Room::Full
        } else if state.bytes < options.max_bytes {
            Room::Yes
        } else if state.all_is_applied() {
            Room::Overrun
        } else {
            Room::Full
        }
    }

    /// Warns once when the quota ends, and once when it ends being so.
    fn tell(&mut self, room: &Room) {
        let max_bytes = self.shared.options.max_bytes;
        match room {
            Room::Yes if self.told_full || self.told_overrun => {
                tracing::info!("the queue has room again");
                self.told_full = false;
                self.told_overrun = false;
            }
            Room::Full if !self.told_full => {
                tracing::warn!(max_bytes, "the queue is full: the stream waits until the apply has made room");
                self.told_full = true;
            }
            Room::Overrun if !self.told_overrun => {
                tracing::warn!(
                    max_bytes,
                    after = %self.end,
                    "a transaction larger than the queue's quota: the queue grows until it has ended"
                );
                self.told_overrun = true;
            }
            _ => {}
        }
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] when one is open, or this one is not behind the queue's end.
    pub fn begin(&mut self, head: TransactionHead) -> Result<()> {
        self.check_usable()?;
        if let Some(open) = self.transaction {
            let text = format!("transaction {} begins inside transaction {} of the stream", head.xid, open.xid);
            return Err(Error::new(ErrorKind::Other, text));
        }
        if head.commit_lsn < self.end {
            return Err(self.out_of_order("a transaction with commit LSN", head.commit_lsn));
        }
        self.make_space(SMALL_FRAME_BYTES)?;
        put_begin(&mut self.frames, &head);
        self.transaction = Some(head);
        Ok(())
    }

    /// Appends a message of the transaction.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] outside a transaction, or when the message is larger than 2 GiB.
    pub fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.check_usable()?;
        if self.transaction.is_none() {
            return Err(Error::new(ErrorKind::Other, "a message outside a transaction cannot be queued"));
        }
        if bytes.len() > DATA_BYTES_MAX {
            let text = format!("a message of {} bytes is larger than the queue takes", bytes.len());
            return Err(Error::new(ErrorKind::Other, text));
        }
        self.make_space(bytes.len() + DATA_FRAME_BYTES)?;
        put_data(&mut self.frames, bytes);
        Ok(())
    }

    /// Says what the message that was appended last is about: numbers of the caller's own, which [`examine`](super::examine())
    /// gives back where the messages themselves cannot be read any more.
    pub fn label(&mut self, number: u32) {
        self.open_labels.insert(number);
    }

    /// Ends the transaction.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] outside a transaction, or when the end is not behind the queue's and the commit's start;
    /// the transaction then stays in the making, until a rewind.
    pub fn commit(&mut self, end_lsn: Lsn) -> Result<()> {
        self.check_usable()?;
        let Some(head) = self.transaction else {
            return Err(Error::new(ErrorKind::Other, "a commit outside a transaction cannot be queued"));
        };
        if end_lsn <= self.end || end_lsn < head.commit_lsn {
            return Err(self.out_of_order("a transaction with end LSN", end_lsn));
        }
        self.make_space(SMALL_FRAME_BYTES)?;
        put_commit(&mut self.frames, end_lsn);
        self.transaction = None;
        self.boundary(end_lsn);
        Ok(())
    }

    /// Appends the position of an idle source, so that what is acknowledged is in the queue too (H15). One that is not
    /// past the end says nothing new and is left out.
    ///
    /// # Errors
    /// [`ErrorKind::Other`] inside a transaction: a keepalive between two of its messages speaks of what was decoded, and
    /// must not be acknowledged before the transaction is here.
    pub fn position(&mut self, lsn: Lsn) -> Result<()> {
        self.check_usable()?;
        if self.transaction.is_some() {
            return Err(Error::new(ErrorKind::Other, "a position inside a transaction cannot be queued"));
        }
        if lsn <= self.end {
            return Ok(());
        }
        self.make_space(SMALL_FRAME_BYTES)?;
        put_position(&mut self.frames, lsn);
        self.boundary(lsn);
        Ok(())
    }

    /// Hands what is complete to the writer, to be called when the stream pauses. The transaction in the making stays
    /// here, within one block: nobody could read it yet.
    ///
    /// # Errors
    /// [`ErrorKind::Queue`] when the writer's thread is gone.
    pub fn flush(&mut self) -> Result<()> {
        if self.boundary_bytes == 0 {
            return Ok(());
        }
        let open_part = self.frames.split_off(self.boundary_bytes);
        let complete = std::mem::replace(&mut self.frames, open_part);
        self.boundary_bytes = 0;
        let labels = std::mem::take(&mut self.labels);
        self.send(complete, labels, true)
    }

    /// After a reconnect, and after a failed write or fsync: drops the transaction in the making, on disk too, and makes
    /// everything complete durable, or after a failure drops what is not. Returns the durable end: the stream has to
    /// start again there.
    ///
    /// Cancelled, it has to be called again before anything else.
    ///
    /// # Errors
    /// [`ErrorKind::Disk`] when the disk does not allow it; it can be called again.
    pub async fn rewind(&mut self) -> Result<Lsn> {
        self.flush()?;
        self.must_rewind = true;
        self.frames = Vec::new();
        self.open_labels.clear();
        self.transaction = None;
        {
            let mut state = self.shared.lock();
            state.rewinding = true;
            self.shared.publish(&state);
        }
        let (reply, answer) = oneshot::channel();
        self.to_writer(Message::Rewind(reply))?;
        let end = answer.await.map_err(|_| writer_is_gone())??;
        self.sent_lsn = end;
        self.sent_inside = false;
        self.end = end;
        self.must_rewind = false;
        Ok(end)
    }

    fn boundary(&mut self, lsn: Lsn) {
        self.end = lsn;
        self.boundary_bytes = self.frames.len();
        self.labels.extend(&self.open_labels);
        self.open_labels.clear();
    }

    /// Sees to it that a frame fits the block in the making, or finds it empty. A block that holds a boundary is sent
    /// up to it, so that whatever is cut later is whole blocks.
    fn make_space(&mut self, frame_bytes: usize) -> Result<()> {
        let block_bytes = self.shared.options.block_bytes;
        if self.frames.len() + frame_bytes <= block_bytes {
            return Ok(());
        }
        self.flush()?;
        if !self.frames.is_empty() && self.frames.len() + frame_bytes > block_bytes {
            let open_part = std::mem::take(&mut self.frames);
            let labels = std::mem::take(&mut self.open_labels);
            self.send(open_part, labels, false)?;
        }
        Ok(())
    }

    fn send(&mut self, frames: Vec<u8>, labels: Labels, ends_at_boundary: bool) -> Result<()> {
        // Frames behind the last boundary stay here while there is one, so a block that ends at one ends at the newest.
        let last_lsn = if ends_at_boundary { self.end } else { self.sent_lsn };
        let block = Block {
            frames,
            labels,
            first_lsn: self.sent_lsn,
            last_lsn,
            starts_inside: self.sent_inside,
            ends_at_boundary,
        };
        self.sent_lsn = last_lsn;
        self.sent_inside = !ends_at_boundary;
        self.shared.lock().in_flight_bytes += block.frames.len() as u64;
        self.to_writer(Message::Block(block))
    }

    fn to_writer(&self, message: Message) -> Result<()> {
        let messages = self.messages.as_ref().ok_or_else(writer_is_gone)?;
        messages.send(message).map_err(|_| writer_is_gone())
    }

    fn check_usable(&self) -> Result<()> {
        if self.must_rewind { Err(unfinished_rewind()) } else { Ok(()) }
    }

    fn out_of_order(&self, what: &str, lsn: Lsn) -> Error {
        let text = format!("{what} {lsn} cannot be queued: the queue's end is {} already", self.end);
        Error::new(ErrorKind::Other, text)
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        if !self.must_rewind
            && let Err(error) = self.flush()
        {
            tracing::warn!(%error, "the newest transactions do not reach the queue; the source still has them");
        }
        {
            let mut state = self.shared.lock();
            state.closing = true;
            self.shared.publish(&state);
        }
        self.messages = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the queue's writer ended by a panic");
        }
    }
}

fn unfinished_rewind() -> Error {
    Error::new(ErrorKind::Other, "the queue was being rewound and has to be rewound again before it is used")
}

fn writer_is_gone() -> Error {
    Error::new(ErrorKind::Queue, "the queue's writer has ended").hint("see its error in the log, and start again")
}
