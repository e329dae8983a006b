//! Statements that are sent together, without waiting for an answer in between.
//!
//! ```text
//!   Requests: Parse, Bind, Execute, CopyData, …, Sync ───────────────► server
//!                                                                         │
//!   how many rows each statement met, or the first that was refused ◄─────┘
//! ```
//!
//! One round trip for all of them, a COPY's rows included ("Pipelining" and "COPY Operations" in the manual's message flow). A
//! server that refuses a statement leaves out all that come behind it, so an error is always that of the first.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncBufRead, AsyncWrite, BufReader};

use super::Stream;
use super::wire::{HEADER_BYTES, RawSession, lost, protocol, server_error, unexpected};
use crate::error::{Error, ErrorKind, Result};

/// A value of a statement, in the form in which the server sent it or another would.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    Null,
    Text(&'a [u8]),
    Binary(&'a [u8]),
}

/// What is to be sent at once.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    /// Whole messages, in order.
    messages: VecDeque<Bytes>,
    /// The newest of them.
    newest: BytesMut,
    statements: usize,
}

impl Requests {
    /// How many statements there are.
    pub(crate) fn len(&self) -> usize {
        self.statements
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.newest.is_empty()
    }

    /// Names a statement, to be executed by that name; no count is answered for this. Nothing is the name of one that is
    /// executed next and never again.
    ///
    /// # Errors
    /// [`Other`](crate::error::ErrorKind::Other) for a text that no statement can have.
    pub(crate) fn prepare(&mut self, name: &str, text: &str) -> Result<()> {
        frontend::parse(name, text, [], &mut self.newest).map_err(|error| protocol(&error.to_string()))
    }

    /// Forgets a name; no count is answered for this.
    ///
    /// # Errors
    /// As [`Requests::prepare`].
    pub(crate) fn close(&mut self, name: &str) -> Result<()> {
        frontend::close(b'S', name, &mut self.newest).map_err(|error| protocol(&error.to_string()))
    }

    /// Executes a statement that has a name.
    pub(crate) fn execute(&mut self, name: &str, values: &[Value<'_>]) {
        self.statements += 1;
        let out = &mut self.newest;
        let start = begin(out, b'B');
        // The portal without a name.
        out.put_u8(0);
        out.put_slice(name.as_bytes());
        out.put_u8(0);
        out.put_u16(values.len() as u16);
        for value in values {
            out.put_u16(u16::from(matches!(value, Value::Binary(_))));
        }
        out.put_u16(values.len() as u16);
        for value in values {
            match value {
                Value::Null => out.put_i32(-1),
                Value::Text(bytes) | Value::Binary(bytes) => {
                    out.put_u32(bytes.len() as u32);
                    out.put_slice(bytes);
                }
            }
        }
        // No formats of results: there are none that anybody reads.
        out.put_u16(0);
        end(out, start);
        // The same portal, without a limit of rows.
        out.put_slice(&[b'E', 0, 0, 0, 9, 0, 0, 0, 0, 0]);
    }

    /// Executes a statement once.
    ///
    /// # Errors
    /// As [`Requests::prepare`].
    pub(crate) fn execute_text(&mut self, text: &str) -> Result<()> {
        self.prepare("", text)?;
        self.execute("", &[]);
        Ok(())
    }

    /// Executes a `COPY … FROM STDIN` that has a name. `messages` are those of the COPY: CopyData, and CopyDone at the end.
    pub(crate) fn copy(&mut self, name: &str, messages: Bytes) {
        self.execute(name, &[]);
        if messages.len() < COPIED_BYTES {
            self.newest.put_slice(&messages);
        } else {
            self.messages.push_back(self.newest.split().freeze());
            self.messages.push_back(messages);
        }
    }

    fn finish(mut self) -> VecDeque<Bytes> {
        frontend::sync(&mut self.newest);
        self.messages.push_back(self.newest.freeze());
        self.messages
    }
}

/// Up to so many bytes it is cheaper to copy a message than to send it by itself.
const COPIED_BYTES: usize = 16 * 1024;

/// Begins a message; answers where its length stands.
pub(crate) fn begin(out: &mut BytesMut, tag: u8) -> usize {
    out.put_u8(tag);
    out.put_u32(0);
    out.len() - 4
}

/// Ends a message, whose length counts itself and all behind it.
pub(crate) fn end(out: &mut BytesMut, start: usize) {
    let length = (out.len() - start) as u32;
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

/// What became of a pipeline that did not go through.
#[derive(Debug)]
pub(crate) struct Refused {
    /// Which of its statements was refused, counted from 0: those before it were executed, and none behind it.
    pub(crate) at: usize,
    /// Why, or that the connection is lost.
    pub(crate) error: Error,
}

impl RawSession {
    /// Runs statements; answers how many rows each has met, in their order.
    ///
    /// Not cancel-safe: a session whose call was dropped half way must not be used again.
    ///
    /// # Errors
    /// What the server says, with its SQLSTATE; `Transient` when the connection is lost.
    pub(crate) async fn run(&mut self, requests: Requests) -> Result<Vec<u64>, Refused> {
        if !self.is_usable() {
            let error = protocol("a session was used again whose last statement had been left before its end");
            return Err(Refused { at: 0, error });
        }
        self.usable = false;
        let mut answers = Answers::with_capacity(requests.len());
        let mut outbox = requests.finish();
        let stream = &mut self.wire.stream;
        let outcome = poll_fn(|context| exchange(stream, &mut outbox, &mut answers, context)).await;
        let at = answers.met.len();
        match (outcome, answers.refused) {
            (Ok(()), None) => {
                self.usable = true;
                Ok(answers.met)
            }
            (Ok(()), Some(error)) => {
                self.usable = true;
                Err(Refused { at, error })
            }
            // A server that ends the session says why, and nothing more.
            (Err(failed), refused) => {
                self.lost = true;
                Err(Refused { at, error: refused.unwrap_or(failed) })
            }
        }
    }
}

/// Sends and receives, whichever the server is ready for: one that waits until its answers are read would wait for ever.
fn exchange(
    stream: &mut BufReader<Stream>,
    outbox: &mut VecDeque<Bytes>,
    answers: &mut Answers,
    context: &mut Context<'_>,
) -> Poll<Result<()>> {
    let failed = |error: io::Error| lost(error.into());
    loop {
        while let Some(message) = outbox.front_mut() {
            match Pin::new(&mut *stream).poll_write(context, message) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(failed(io::ErrorKind::WriteZero.into()))),
                Poll::Ready(Ok(sent)) => message.advance(sent),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(failed(error))),
            }
            if message.is_empty() {
                outbox.pop_front();
            }
        }
        if let Poll::Ready(Err(error)) = Pin::new(&mut *stream).poll_flush(context) {
            return Poll::Ready(Err(failed(error)));
        }
        let received = match ready!(Pin::new(&mut *stream).poll_fill_buf(context)) {
            Ok([]) => return Poll::Ready(Err(failed(io::ErrorKind::UnexpectedEof.into()))),
            Ok(received) => received,
            Err(error) => return Poll::Ready(Err(failed(error))),
        };
        let count = received.len();
        let done = answers.take(received);
        Pin::new(&mut *stream).consume(count);
        match done {
            Ok(false) => {}
            Ok(true) => return Poll::Ready(Ok(())),
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

/// What the server has answered so far.
#[derive(Default)]
struct Answers {
    /// Bytes of messages that have not been read.
    inbox: BytesMut,
    met: Vec<u64>,
    refused: Option<Error>,
}

impl Answers {
    fn with_capacity(statements: usize) -> Answers {
        Answers { met: Vec::with_capacity(statements), ..Answers::default() }
    }

    /// Reads the messages that are whole; answers whether the server is ready for more.
    fn take(&mut self, received: &[u8]) -> Result<bool> {
        self.inbox.extend_from_slice(received);
        while let Some((header, rest)) = self.inbox.split_first_chunk::<HEADER_BYTES>() {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            let payload_bytes =
                length.checked_sub(4).ok_or_else(|| protocol("a message of the server has no length"))?;
            let Some(payload) = rest.get(..payload_bytes) else { break };
            match header[0] {
                // What a COMMIT answers when its transaction had failed. Nothing here asks for a rollback.
                b'C' if payload == b"ROLLBACK\0" => {
                    let text = "the server has rolled a transaction back instead of committing it";
                    self.refused.get_or_insert(Error::new(ErrorKind::Transient, text));
                }
                b'C' => self.met.push(rows_met(payload)),
                b'I' => self.met.push(0),
                b'E' => {
                    let error = server_error(payload);
                    self.refused.get_or_insert(error);
                }
                b'Z' => return Ok(true),
                // Parsed, bound, closed, ready for a COPY; rows, notices and changed parameters.
                b'1' | b'2' | b'3' | b'G' | b'D' | b'N' | b'S' => {}
                tag => return Err(unexpected(tag, "answering statements")),
            }
            self.inbox.advance(HEADER_BYTES + payload_bytes);
        }
        Ok(false)
    }
}

/// The number at the end of a command's tag: `UPDATE 3`, `INSERT 0 1`, `COPY 7`; others have none.
fn rows_met(tag: &[u8]) -> u64 {
    let tag = tag.strip_suffix(&[0]).unwrap_or(tag);
    let number = tag.rsplit(|&byte| byte == b' ').next().unwrap_or_default();
    std::str::from_utf8(number).ok().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_says_how_many_rows_it_was() {
        for (tag, rows) in [(&b"INSERT 0 12\0"[..], 12), (b"UPDATE 3\0", 3), (b"COPY 70000\0", 70000), (b"BEGIN\0", 0)]
        {
            assert_eq!(rows_met(tag), rows);
        }
    }

    #[test]
    fn answers_may_come_cut_anywhere() {
        let mut bytes = Vec::new();
        for (tag, payload) in [
            (b'1', &b""[..]),
            (b'2', b""),
            (b'C', b"UPDATE 3\0"),
            (b'N', b"C00000\0\0"),
            (b'C', b"BEGIN\0"),
            (b'Z', b"T"),
        ] {
            bytes.push(tag);
            bytes.extend((payload.len() as u32 + 4).to_be_bytes());
            bytes.extend(payload);
        }
        for cut in 1..bytes.len() {
            let mut answers = Answers::default();
            assert!(!answers.take(&bytes[..cut]).unwrap());
            assert!(answers.take(&bytes[cut..]).unwrap(), "cut at {cut}");
            assert_eq!(answers.met, [3, 0]);
        }
    }

    #[test]
    fn i02_a_commit_that_was_a_rollback_is_none() {
        let mut answers = Answers::default();
        let mut bytes = vec![b'C'];
        bytes.extend((b"ROLLBACK\0".len() as u32 + 4).to_be_bytes());
        bytes.extend(b"ROLLBACK\0");
        answers.take(&bytes).unwrap();
        assert!(answers.refused.unwrap().is_transient());
    }

    #[test]
    fn the_first_error_is_the_one_that_counts() {
        let error = |text: &str| {
            let payload = format!("SERROR\0C23505\0M{text}\0\0");
            let mut bytes = vec![b'E'];
            bytes.extend((payload.len() as u32 + 4).to_be_bytes());
            bytes.extend(payload.as_bytes());
            bytes
        };
        let mut answers = Answers::default();
        answers.take(&[error("first"), error("second")].concat()).unwrap();
        assert!(answers.refused.unwrap().to_string().contains("first"));
    }
}
