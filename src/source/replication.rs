//! The replication connection: its commands, and the stream of a logical slot.
//!
//! Composed from `pgwire_replication`'s framing over our own byte stream, so that TLS, authentication and settings are
//! those of every other session, and so that memory is bounded by what the caller takes: nothing is read ahead but one
//! socket buffer. This is the only file that names the crate. Messages are as in "Streaming Replication Protocol" and
//! "Message Formats" in the manual.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use pgwire_replication::protocol::framing::{
    BackendMessage, MessageReader, write_copy_data, write_copy_done, write_password_message, write_query,
    write_startup_message,
};
use pgwire_replication::protocol::messages::{ErrorFields, auth, parse_auth_request};
use pgwire_replication::protocol::replication::{
    ReplicationCopyData, encode_standby_status_update, parse_copy_data, unix_to_pg_timestamp,
};
use pgwire_replication::{Lsn as WireLsn, PgWireError};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use tokio::io::{AsyncWriteExt, BufReader};

use crate::connection::{ChannelBindingPolicy, ConnectionSpec, Login, Session, Stream, no_password, open};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::sql;

/// Protocol version 3.0.
const PROTOCOL_VERSION: i32 = 3 << 16;

/// What is read from the socket at once, in bytes.
const READ_BUFFER_BYTES: usize = 256 * 1024;

/// What messages are carved from, in bytes; a larger message gets a buffer of its own.
const MESSAGE_BUFFER_BYTES: usize = 64 * 1024;

/// How long [`ReplicationStream::stop`] waits for the server to end the stream.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The first version whose stream can carry binary values and logical messages.
const VERSION_WITH_MESSAGES: u32 = 14;

/// A connection with `replication=database`: SQL and replication commands, one at a time.
pub struct ReplicationSession {
    wire: Wire,
    backend_pid: i32,
    /// What the server reported at the login, such as `server_version`.
    parameters: HashMap<String, String>,
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
        write_query(&mut self.wire.stream, sql).await.map_err(lost)?;
        let (mut rows, mut refused) = (Vec::new(), None);
        loop {
            let message = self.wire.read().await?;
            match message.tag {
                b'D' => rows.push(data_row(&message.payload)?),
                b'E' => refused = Some(server_error(&message.payload)),
                b'Z' => return refused.map_or(Ok(rows), Err),
                // Row descriptions, completions, notices and changed parameters.
                b'T' | b'C' | b'I' | b'N' | b'S' => {}
                tag => return Err(unexpected(tag, "answering a query")),
            }
        }
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
        self.backend_pid
    }

    /// The server's major version, such as 15.
    pub fn server_version(&self) -> Option<u32> {
        let version = self.parameters.get("server_version")?;
        version.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
    }

    /// Starts the stream of a logical slot with pgoutput, protocol 1, with logical messages.
    ///
    /// The server goes on from its own confirmed position where `from` is before it, without a word (H15): compare
    /// first. A publication that does not exist shows only at the first change.
    ///
    /// # Errors
    /// What the server says: a slot that is active elsewhere is [`ErrorKind::Transient`].
    pub async fn start(
        mut self,
        slot: &str,
        from: Lsn,
        publications: &[String],
        binary: bool,
    ) -> Result<ReplicationStream> {
        let with_messages = self.server_version().is_none_or(|version| version >= VERSION_WITH_MESSAGES);
        let command = start_command(slot, from, publications, with_messages, binary);
        write_query(&mut self.wire.stream, &command).await.map_err(lost)?;
        let mut refused = None;
        loop {
            let message = self.wire.read().await?;
            match message.tag {
                b'W' => return Ok(ReplicationStream { wire: self.wire }),
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
    pub async fn close(mut self) {
        self.wire.terminate().await;
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
        let mut wire = Wire::new(stream);
        let parameters = [
            ("user", login.user.as_str()),
            ("database", login.database.as_str()),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", login.application_name.as_str()),
            ("options", login.options.as_str()),
        ];
        write_startup_message(&mut wire.stream, PROTOCOL_VERSION, &parameters).await.map_err(lost)?;
        authenticate(&mut wire, login).await?;
        let mut session = ReplicationSession { wire, backend_pid: 0, parameters: HashMap::new() };
        loop {
            let message = session.wire.read().await?;
            match message.tag {
                b'Z' => return Ok(session),
                b'E' => return Err(server_error(&message.payload)),
                b'K' => session.backend_pid = integer(&message.payload).unwrap_or_default(),
                b'S' => {
                    let mut texts = message.payload.split(|&byte| byte == 0).map(String::from_utf8_lossy);
                    if let (Some(name), Some(value)) = (texts.next(), texts.next()) {
                        session.parameters.insert(name.into_owned(), value.into_owned());
                    }
                }
                b'N' | b'v' => {}
                tag => return Err(unexpected(tag, "logging in")),
            }
        }
    }

    async fn first_row(&mut self, sql: &str) -> Result<Vec<Option<String>>> {
        let rows = self.simple_query(sql).await?;
        rows.into_iter().next().ok_or_else(|| protocol("the server answered no row"))
    }
}

/// "Start-up" in the manual's message flow; ends with AuthenticationOk.
async fn authenticate(wire: &mut Wire, login: &Login) -> Result<()> {
    let password = || login.password.as_deref().ok_or_else(no_password);
    let mut bound = false;
    let mut scram: Option<ScramSha256> = None;
    let mut server_is_proven = true;
    loop {
        let message = wire.read().await?;
        match message.tag {
            b'E' => return Err(server_error(&message.payload)),
            b'N' | b'v' => continue,
            b'R' => {}
            tag => return Err(unexpected(tag, "authenticating")),
        }
        let (method, rest) = parse_auth_request(&message.payload).map_err(lost)?;
        let unbound_is_too_weak = login.channel_binding == ChannelBindingPolicy::Require && !bound;
        let answer = match method {
            auth::OK if unbound_is_too_weak || !server_is_proven => {
                return Err(refused("the server let us in without the proof of identity that was asked of it"));
            }
            auth::OK => return Ok(()),
            auth::CLEARTEXT_PASSWORD | auth::MD5_PASSWORD if unbound_is_too_weak => {
                return Err(refused("channel_binding=require, and the server asks for a password in another way"));
            }
            auth::CLEARTEXT_PASSWORD => zero_terminated(password()?),
            auth::MD5_PASSWORD => {
                let salt = rest.try_into().map_err(|_| protocol("the server's salt is not 4 bytes long"))?;
                zero_terminated(&md5_hash(login.user.as_bytes(), password()?.as_bytes(), salt))
            }
            auth::SASL => {
                let (mechanism, binding) = scram_mechanism(rest, wire, login)?;
                bound = mechanism == SCRAM_SHA_256_PLUS;
                server_is_proven = false;
                let exchange = scram.insert(ScramSha256::new(password()?.as_bytes(), binding));
                let mut answer = zero_terminated(mechanism);
                let length = i32::try_from(exchange.message().len()).unwrap_or(i32::MAX);
                answer.extend_from_slice(&length.to_be_bytes());
                answer.extend_from_slice(exchange.message());
                answer
            }
            auth::SASL_CONTINUE | auth::SASL_FINAL => {
                let exchange = scram.as_mut().ok_or_else(|| protocol("SCRAM goes on that never began"))?;
                let failed = |error| refused(format!("SCRAM authentication failed: {error}"));
                if method == auth::SASL_FINAL {
                    exchange.finish(rest).map_err(failed)?;
                    server_is_proven = true;
                    continue;
                }
                exchange.update(rest).map_err(failed)?;
                exchange.message().to_vec()
            }
            other => {
                return Err(refused(format!(
                    "the server asks for authentication method {other}, which is not supported"
                ))
                .hint("let the role in by scram-sha-256, md5, password, cert or trust in pg_hba.conf"));
            }
        };
        write_password_message(&mut wire.stream, &answer).await.map_err(lost)?;
    }
}

/// The strongest SCRAM mechanism that both sides know, and what binds it to the TLS session.
fn scram_mechanism(offered: &[u8], wire: &Wire, login: &Login) -> Result<(&'static str, ChannelBinding)> {
    let offers = |mechanism: &str| offered.split(|&byte| byte == 0).any(|name| name == mechanism.as_bytes());
    let end_point = match login.channel_binding {
        ChannelBindingPolicy::Disable => None,
        ChannelBindingPolicy::Prefer | ChannelBindingPolicy::Require => wire.stream.get_ref().end_point(),
    };
    match end_point {
        Some(hash) if offers(SCRAM_SHA_256_PLUS) => {
            Ok((SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(hash.to_vec())))
        }
        _ if login.channel_binding == ChannelBindingPolicy::Require => {
            Err(refused("channel_binding=require, and the connection or the server cannot do it"))
        }
        // The server learns that we could have: one that offered it and was cut off in between notices.
        Some(_) if offers(SCRAM_SHA_256) => Ok((SCRAM_SHA_256, ChannelBinding::unrequested())),
        None if offers(SCRAM_SHA_256) => Ok((SCRAM_SHA_256, ChannelBinding::unsupported())),
        _ => Err(refused("the server offers no SASL mechanism that is supported")),
    }
}

/// What comes from the stream of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// A message of the output plugin.
    Data {
        /// Where in the WAL the message belongs; zero for messages that have no position, such as a table's layout.
        wal_start: Lsn,
        /// For a logical slot the same as `wal_start`.
        wal_end: Lsn,
        /// When it was sent, by the server's clock, in microseconds since 2000-01-01 UTC.
        server_time: i64,
        /// The message of pgoutput.
        data: Bytes,
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
                b'd' => {
                    return Ok(match parse_copy_data(message.payload).map_err(lost)? {
                        ReplicationCopyData::XLogData { wal_start, wal_end, server_time_micros, data } => {
                            let (wal_start, wal_end) = (Lsn(wal_start.0), Lsn(wal_end.0));
                            StreamEvent::Data { wal_start, wal_end, server_time: server_time_micros, data }
                        }
                        ReplicationCopyData::KeepAlive { wal_end, server_time_micros, reply_requested } => {
                            let wal_end = Lsn(wal_end.0);
                            StreamEvent::KeepAlive { wal_end, server_time: server_time_micros, reply_requested }
                        }
                    });
                }
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

/// Messages over a buffered byte stream.
struct Wire {
    stream: BufReader<Stream>,
    reader: MessageReader,
    /// A message has been begun and not finished: a call was dropped, and the buffer is empty.
    inside_message: bool,
}

impl Wire {
    fn new(stream: Stream) -> Wire {
        Wire {
            stream: BufReader::with_capacity(READ_BUFFER_BYTES, stream),
            reader: MessageReader::with_capacity(MESSAGE_BUFFER_BYTES),
            inside_message: false,
        }
    }

    /// The next message; cancel-safe, since the reader keeps what it has.
    async fn read(&mut self) -> Result<BackendMessage> {
        self.inside_message = true;
        let message = self.reader.read(&mut self.stream).await.map_err(lost)?;
        self.inside_message = false;
        Ok(message)
    }

    fn has_whole_message(&self) -> bool {
        // A tag of one byte, then a length that counts itself ("Message Formats" in the manual).
        match self.stream.buffer() {
            [_, a, b, c, d, rest @ ..] if !self.inside_message => {
                let length = u32::from_be_bytes([*a, *b, *c, *d]);
                rest.len() as u64 + 4 >= u64::from(length)
            }
            _ => false,
        }
    }

    /// Says goodbye; a line that is dead already is not worth a word.
    async fn terminate(&mut self) {
        let goodbye = async {
            self.stream.write_all(&[b'X', 0, 0, 0, 4]).await?;
            self.stream.shutdown().await
        };
        let _ = tokio::time::timeout(STOP_TIMEOUT, goodbye).await;
    }
}

/// DataRow: the number of columns, then each as its length (-1 for NULL) and its bytes.
fn data_row(payload: &[u8]) -> Result<Vec<Option<String>>> {
    let broken = || protocol("a row of the answer cannot be read");
    let (count, mut rest) = payload.split_first_chunk::<2>().ok_or_else(broken)?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(broken)?;
        rest = after;
        row.push(match usize::try_from(i32::from_be_bytes(*length)) {
            Err(_) => None,
            Ok(length) => {
                let (value, after) = rest.split_at_checked(length).ok_or_else(broken)?;
                rest = after;
                Some(String::from_utf8(value.to_vec()).map_err(|_| broken())?)
            }
        });
    }
    Ok(row)
}

fn integer(payload: &[u8]) -> Option<i32> {
    payload.first_chunk::<4>().map(|bytes| i32::from_be_bytes(*bytes))
}

fn zero_terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// The server's error without its DETAIL, which can hold row values.
fn server_error(payload: &[u8]) -> Error {
    let fields = ErrorFields::parse(payload);
    Error::from_server(fields.code.as_deref().unwrap_or("XX000"), fields.message.as_deref().unwrap_or("no message"))
}

/// An error of the line or of the framing.
fn lost(error: PgWireError) -> Error {
    let kind = if error.is_io() { ErrorKind::Transient } else { ErrorKind::Other };
    Error::new(kind, format!("the replication connection failed: {error}"))
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Server, message)
}

fn protocol(message: &str) -> Error {
    Error::new(ErrorKind::Other, message)
}

fn unexpected(tag: u8, doing: &str) -> Error {
    Error::new(ErrorKind::Other, format!("the server sent an unexpected message {:?} while {doing}", char::from(tag)))
}
