//! The replication connection: its commands, and the stream of a logical slot.
//!
//! Memory is bounded by what the caller takes: nothing is read ahead but one socket buffer. Messages are as in "Streaming Replication Protocol" and
//! "Message Formats" in the manual.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use pgwire_replication::Lsn as WireLsn;
use pgwire_replication::protocol::framing::{write_copy_data, write_copy_done, write_query};
use pgwire_replication::protocol::replication::{encode_standby_status_update, unix_to_pg_timestamp};

use super::version::Version;
use crate::connection::wire::{RawSession, Wire, lost, protocol, server_error, unexpected};
use crate::connection::{ConnectionSpec, Login, Session, Stream, open};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::sql;

/// How long [`ReplicationStream::stop`] waits for the server to end the stream.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection with `replication=database`: SQL and replication commands, one at a time.
pub struct ReplicationSession {
    session: RawSession,
}

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentifySystem {
    /// What tells one cluster from every other; the same on its physical standbys.
    pub system_id: String,
    /// The timeline; a promotion begins a new one.
    pub timeline: u32,
    /// How far the server's WAL is flushed.
    pub wal_flush: Lsn,
    /// The database of the connection.
    pub database: String,
}

impl ReplicationSession {
    /// Logs in with `replication=database` and the pinned settings.
    ///
    /// # Errors
    /// As [`ConnectionSpec::connect`].
    pub async fn connect(spec: &ConnectionSpec, application_name: &str) -> Result<ReplicationSession> {
        open(spec, application_name).await
    }

    /// Runs a statement or a replication command; the rows of all its results, as text.
    ///
    /// Not cancel-safe: a session whose call was dropped half way must not be used again.
    ///
    /// # Errors
    /// What the server says, with its SQLSTATE; [`ErrorKind::Transient`] when the connection is lost.
    pub async fn simple_query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        self.session.simple_query(sql).await
    }

    /// Asks which server this is, and how far its WAL is.
    ///
    /// # Errors
    /// As [`ReplicationSession::simple_query`].
    pub async fn identify_system(&mut self) -> Result<IdentifySystem> {
        let rows = self.simple_query("IDENTIFY_SYSTEM").await?;
        let answer = match rows.first().map(Vec::as_slice) {
            Some([Some(system_id), Some(timeline), Some(wal_flush), database, ..]) => {
                match (timeline.parse(), wal_flush.parse()) {
                    (Ok(timeline), Ok(wal_flush)) => Some(IdentifySystem {
                        system_id: system_id.clone(),
                        timeline,
                        wal_flush,
                        database: database.clone().unwrap_or_default(),
                    }),
                    _ => None,
                }
            }
            _ => None,
        };
        answer.ok_or_else(|| protocol("the answer to IDENTIFY_SYSTEM cannot be read"))
    }

    /// The process ID of the server's process for this session.
    pub fn backend_pid(&self) -> i32 {
        self.session.backend_pid()
    }

    /// The server's major version, such as 15.
    pub fn server_version(&self) -> Option<u32> {
        let version = self.session.parameter("server_version")?;
        version.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
    }

    /// Whether the stream can carry logical messages and binary values.
    pub fn streams_messages(&self) -> bool {
        self.server_version().is_none_or(|version| Version(version).streams_messages())
    }

    /// Starts the stream of a logical slot with pgoutput, protocol 1, with logical messages where the server has them.
    ///
    /// The server goes on from its own confirmed position where `from` is before it, without a word (H15): compare
    /// first. A publication that does not exist shows only at the first change.
    ///
    /// # Errors
    /// What the server says: a slot that is active elsewhere is [`ErrorKind::Transient`].
    pub async fn start(
        self,
        slot: &str,
        from: Lsn,
        publications: &[String],
        binary: bool,
    ) -> Result<ReplicationStream> {
        let with_messages = self.streams_messages();
        // Where there is nothing that could not go in binary, there may be nothing at all.
        let command = start_command(slot, from, publications, with_messages, binary && with_messages);
        let mut wire = self.session.into_wire();
        write_query(&mut wire.stream, &command).await.map_err(lost)?;
        let mut refused = None;
        loop {
            let message = wire.read().await?;
            match message.tag {
                b'W' => return Ok(ReplicationStream { wire }),
                b'E' => refused = Some(server_error(&message.payload)),
                b'Z' => {
                    let error = refused.unwrap_or_else(|| protocol("the server did not start the stream"));
                    return Err(error.context(format!("starting the stream of slot {slot:?}")));
                }
                b'N' | b'S' => {}
                tag => return Err(unexpected(tag, "starting the stream")),
            }
        }
    }

    /// Ends the session in good order.
    pub async fn close(self) {
        self.session.into_wire().terminate().await;
    }
}

/// `START_REPLICATION` for pgoutput. Its grammar has no escapes but doubled quotes, so a backslash is itself.
fn start_command(slot: &str, from: Lsn, publications: &[String], with_messages: bool, binary: bool) -> String {
    let names = sql::identifiers(publications.iter().map(String::as_str)).replace('\'', "''");
    let mut options = format!("proto_version '1', publication_names '{names}'");
    if with_messages {
        options.push_str(", messages 'true'");
    }
    if binary {
        options.push_str(", binary 'true'");
    }
    format!("START_REPLICATION SLOT {} LOGICAL {from} ({options})", sql::identifier(slot))
}

impl Session for ReplicationSession {
    // The server's sender reads our messages at once, so nothing stays unacknowledged for long but on a dead line.
    const TCP_USER_TIMEOUT: Option<Duration> = Some(Duration::from_secs(60));

    async fn log_in(stream: Stream, login: &Login) -> Result<ReplicationSession> {
        Ok(ReplicationSession {
            session: RawSession::log_in_with(stream, login, Some(("replication", "database"))).await?,
        })
    }

    fn named_pid(&self) -> Option<i32> {
        self.session.named_pid()
    }

    async fn first_row(&mut self, sql: &str) -> Result<Vec<Option<String>>> {
        self.session.first_row(sql).await
    }
}

/// What comes from the stream of a slot; its data owned, or a slice of what was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent<D = Bytes> {
    /// A message of the output plugin.
    Data {
        /// Where in the WAL the message belongs; zero for messages that have no position, such as a table's layout.
        wal_start: Lsn,
        /// For a logical slot the same as `wal_start`.
        wal_end: Lsn,
        /// When it was sent, by the server's clock, in microseconds since 2000-01-01 UTC.
        server_time: i64,
        /// The message of pgoutput.
        data: D,
    },
    /// How far the server has read its WAL for this slot, when there is nothing to send.
    KeepAlive {
        /// All that lies before it has been sent.
        wal_end: Lsn,
        /// When it was sent, by the server's clock, in microseconds since 2000-01-01 UTC.
        server_time: i64,
        /// The server wants to hear from us soon, or it ends the connection (`wal_sender_timeout`).
        reply_requested: bool,
    },
}

/// Bytes of an `XLogData` before its data: its kind, three numbers of 8 bytes.
const DATA_HEADER_BYTES: usize = 25;

impl<'a> StreamEvent<&'a [u8]> {
    /// Reads what a CopyData of the stream holds; `None` where it is nothing that the manual knows.
    fn parse(payload: &'a [u8]) -> Option<StreamEvent<&'a [u8]>> {
        let number = |at: usize| payload.get(at..)?.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes));
        match payload.first()? {
            b'w' => Some(StreamEvent::Data {
                wal_start: Lsn(number(1)?),
                wal_end: Lsn(number(9)?),
                server_time: number(17)?.cast_signed(),
                data: &payload[DATA_HEADER_BYTES..],
            }),
            b'k' => Some(StreamEvent::KeepAlive {
                wal_end: Lsn(number(1)?),
                server_time: number(9)?.cast_signed(),
                reply_requested: *payload.get(17)? != 0,
            }),
            _ => None,
        }
    }
}

/// The same, with the data as a slice of the payload that lives on its own.
fn owned_event(payload: &Bytes) -> Option<StreamEvent> {
    Some(match StreamEvent::parse(payload)? {
        StreamEvent::Data { wal_start, wal_end, server_time, data: _ } => {
            StreamEvent::Data { wal_start, wal_end, server_time, data: payload.slice(DATA_HEADER_BYTES..) }
        }
        StreamEvent::KeepAlive { wal_end, server_time, reply_requested } => {
            StreamEvent::KeepAlive { wal_end, server_time, reply_requested }
        }
    })
}

fn not_of_the_stream() -> Error {
    protocol("the server sent something into the stream that is neither data nor a keepalive")
}

/// The running stream of a slot.
pub struct ReplicationStream {
    wire: Wire,
}

impl ReplicationStream {
    /// The next event; waits for it without a limit.
    ///
    /// Cancel-safe: a call that is dropped loses nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Transient`] when the connection is lost or the server shuts down, otherwise what the server says.
    pub async fn next(&mut self) -> Result<StreamEvent> {
        loop {
            let message = self.wire.read().await?;
            match message.tag {
                b'd' => return owned_event(&message.payload).ok_or_else(not_of_the_stream),
                b'E' => return Err(server_error(&message.payload)),
                b'c' | b'C' | b'Z' => {
                    return Err(Error::new(
                        ErrorKind::Transient,
                        "the server ended the stream; it may be shutting down",
                    ));
                }
                b'N' | b'S' => {}
                tag => return Err(unexpected(tag, "streaming")),
            }
        }
    }

    /// Gives `take` all events that have already been read from the socket as a whole, in their order and where they lie,
    /// without waiting for anything. Notices and the end of the stream are left to [`ReplicationStream::next`].
    ///
    /// # Errors
    /// What `take` answers, after which the stream must not be used again; an event that cannot be read.
    pub fn take_buffered(&mut self, mut take: impl FnMut(StreamEvent<&[u8]>) -> Result<()>) -> Result<()> {
        self.wire.take_buffered(|payload| take(StreamEvent::parse(payload).ok_or_else(not_of_the_stream)?))
    }

    /// Whether a whole message has already been read from the socket, so that [`ReplicationStream::next`] will not wait
    /// (but for the rare notice that it passes over).
    ///
    /// False does not mean that the kernel holds nothing: what polls `next` once, and drops it, knows.
    pub fn has_buffered(&self) -> bool {
        self.wire.has_whole_message()
    }

    /// Tells the server that all before `flushed` is durable here: it may forget the WAL before it (I1).
    ///
    /// Written, flushed and applied are reported as one. Not cancel-safe.
    ///
    /// # Errors
    /// [`ErrorKind::Transient`] when the connection is lost.
    pub async fn send_status(&mut self, flushed: Lsn, reply_requested: bool) -> Result<()> {
        // A clock before 1970 is shown as 1970: the server only displays it.
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = unix_to_pg_timestamp(i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX));
        let status = encode_standby_status_update(WireLsn(flushed.0), now, reply_requested);
        write_copy_data(&mut self.wire.stream, &status).await.map_err(lost)
    }

    /// Ends the stream and the session in good order; what the server still sends is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Transient`] when the connection is lost, or the server does not end the stream within 2 s; the
    /// session is closed all the same.
    pub async fn stop(mut self) -> Result<()> {
        let ended = tokio::time::timeout(STOP_TIMEOUT, async {
            write_copy_done(&mut self.wire.stream).await.map_err(lost)?;
            loop {
                let message = self.wire.read().await?;
                match message.tag {
                    b'Z' => return Ok(()),
                    b'E' => return Err(server_error(&message.payload)),
                    _ => {}
                }
            }
        });
        let outcome = ended.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Transient, format!("the server did not end the stream within {STOP_TIMEOUT:?}")))
        });
        self.wire.terminate().await;
        outcome
    }
}
