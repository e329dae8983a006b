//! A session at the level of the protocol's messages, for what an ordinary client does not do: replication commands, and COPY OUT
//! by large pieces instead of by rows.
//!
//! Composed from `pgwire_replication`'s framing over our own byte stream, so that TLS, authentication and settings are those of every
//! other session. This file and `source/replication.rs` are the only ones that name the crate. Messages are as in "Message Formats" in the manual.

use std::collections::HashMap;
use std::time::Duration;

use bytes::BytesMut;
use pgwire_replication::PgWireError;
use pgwire_replication::protocol::framing::{
    BackendMessage, MessageReader, write_password_message, write_query, write_startup_message,
};
use pgwire_replication::protocol::messages::{ErrorFields, auth, parse_auth_request};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::{ChannelBindingPolicy, ConnectionSpec, Login, Session, Stream, no_password, open};
use crate::error::{Error, ErrorKind, Result, say_detail};

/// Protocol version 3.0.
const PROTOCOL_VERSION: i32 = 3 << 16;

/// What is read from the socket at once, in bytes.
const READ_BUFFER_BYTES: usize = 256 * 1024;

/// What messages are carved from, in bytes; a larger message gets a buffer of its own.
const MESSAGE_BUFFER_BYTES: usize = 64 * 1024;

/// How long the goodbye of a session may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes of a message's header: its tag, and its length, which counts itself.
pub(super) const HEADER_BYTES: usize = 5;

/// A session that runs one statement at a time.
pub(crate) struct RawSession {
    pub(super) wire: Wire,
    backend_pid: i32,
    /// What the server reported at the login, such as `server_version`.
    parameters: HashMap<String, String>,
    /// Whether the server waits for a statement: false while one runs, and for good when its end was never read.
    pub(super) usable: bool,
    /// Whether the connection is gone.
    pub(super) lost: bool,
}

impl RawSession {
    /// Logs in with the pinned settings.
    ///
    /// # Errors
    /// As [`ConnectionSpec::connect`].
    pub(crate) async fn connect(spec: &ConnectionSpec, application_name: &str) -> Result<RawSession> {
        open(spec, application_name).await
    }

    /// Logs in, with one more parameter of the start-up message.
    pub(crate) async fn log_in_with(
        stream: Stream,
        login: &Login,
        parameter: Option<(&str, &str)>,
    ) -> Result<RawSession> {
        let mut wire = Wire::new(stream);
        let mut parameters = vec![
            ("user", login.user.as_str()),
            ("database", login.database.as_str()),
            ("client_encoding", "UTF8"),
            ("application_name", login.application_name.as_str()),
            ("options", login.options.as_str()),
        ];
        parameters.extend(parameter);
        write_startup_message(&mut wire.stream, PROTOCOL_VERSION, &parameters).await.map_err(lost)?;
        authenticate(&mut wire, login).await?;
        let mut session = RawSession { wire, backend_pid: 0, parameters: HashMap::new(), usable: false, lost: false };
        loop {
            let message = session.wire.read().await?;
            match message.tag {
                b'Z' => {
                    session.usable = true;
                    return Ok(session);
                }
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

    /// Runs a statement or a replication command; the rows of all its results, as text.
    ///
    /// Not cancel-safe: a session whose call was dropped half way must not be used again.
    ///
    /// # Errors
    /// What the server says, with its SQLSTATE; [`ErrorKind::Transient`] when the connection is lost.
    pub(crate) async fn simple_query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        self.query(sql).await?;
        let (mut rows, mut refused) = (Vec::new(), None);
        loop {
            let message = self.read().await?;
            match message.tag {
                b'D' => rows.push(data_row(&message.payload)?),
                b'E' => refused = Some(server_error(&message.payload)),
                b'Z' => {
                    self.usable = true;
                    return refused.map_or(Ok(rows), Err);
                }
                // Row descriptions, completions, notices and changed parameters.
                b'T' | b'C' | b'I' | b'N' | b'S' => {}
                tag => return Err(unexpected(tag, "answering a query")),
            }
        }
    }

    /// Begins a `COPY … TO STDOUT`; its rows come from [`RawSession::copied`].
    ///
    /// # Errors
    /// As [`RawSession::simple_query`].
    pub(crate) async fn copy_out(&mut self, sql: &str) -> Result<()> {
        self.query(sql).await?;
        let mut refused = None;
        loop {
            let message = self.read().await?;
            match message.tag {
                b'H' => return Ok(()),
                b'E' => refused = Some(server_error(&message.payload)),
                b'Z' => {
                    self.usable = true;
                    return Err(refused.unwrap_or_else(|| protocol("the server did not begin the copy")));
                }
                b'N' | b'S' | b'C' | b'T' | b'D' => {}
                tag => return Err(unexpected(tag, "beginning a copy")),
            }
        }
    }

    /// Appends what a COPY sends to `chunk`, until that has at least `bytes` bytes or the copy ends; answers how many of the
    /// server's messages it was (each is a row; in binary the last is a trailer), and whether there is more.
    ///
    /// Not cancel-safe.
    ///
    /// # Errors
    /// As [`RawSession::simple_query`].
    pub(crate) async fn copied(&mut self, chunk: &mut BytesMut, bytes: usize) -> Result<(u64, bool)> {
        let mut messages = 0;
        while chunk.len() < bytes {
            let buffer = match self.wire.stream.fill_buf().await {
                Ok([]) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                buffer => buffer,
            };
            let buffer = buffer.map_err(|error: std::io::Error| {
                self.lost = true;
                lost(error.into())
            })?;
            // As many whole messages as have been read, without a look at what is in them.
            let mut at = 0;
            while let Some(payload) = first_copy_data(&buffer[at..]) {
                chunk.extend_from_slice(payload);
                at += HEADER_BYTES + payload.len();
                messages += 1;
            }
            if at > 0 {
                self.wire.stream.consume(at);
                continue;
            }
            // A message that is not whole yet, or larger than the buffer, or the end.
            let message = self.read().await?;
            match message.tag {
                b'd' => {
                    chunk.extend_from_slice(&message.payload);
                    messages += 1;
                }
                b'c' | b'N' | b'S' | b'C' => {}
                b'E' => {
                    // A server that ends the session says why, and nothing more.
                    let error = server_error(&message.payload);
                    let _ = self.end_of_statement().await;
                    return Err(error);
                }
                b'Z' => {
                    self.usable = true;
                    return Ok((messages, false));
                }
                tag => return Err(unexpected(tag, "copying")),
            }
        }
        Ok((messages, true))
    }

    async fn query(&mut self, sql: &str) -> Result<()> {
        self.usable = false;
        let sent = write_query(&mut self.wire.stream, sql).await.map_err(lost);
        self.lost |= sent.is_err();
        sent
    }

    async fn read(&mut self) -> Result<BackendMessage> {
        let read = self.wire.read().await;
        self.lost |= read.is_err();
        read
    }

    async fn end_of_statement(&mut self) -> Result<()> {
        while self.read().await?.tag != b'Z' {}
        self.usable = true;
        Ok(())
    }

    /// Whether another statement can be run: not after a lost connection, or a statement that was left before its end.
    pub(crate) fn is_usable(&self) -> bool {
        self.usable
    }

    /// Whether the connection is gone, by what the last statement met.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost
    }

    /// The process ID of the server's process for this session.
    pub(crate) fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// What the server reported at the login.
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    pub(crate) fn into_wire(self) -> Wire {
        self.wire
    }
}

impl Session for RawSession {
    // As for every session that copies: see the ordinary client's.
    const TCP_USER_TIMEOUT: Option<Duration> = None;

    async fn log_in(stream: Stream, login: &Login) -> Result<RawSession> {
        RawSession::log_in_with(stream, login, None).await
    }

    fn named_pid(&self) -> Option<i32> {
        (self.backend_pid != 0).then_some(self.backend_pid)
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

/// Messages over a buffered byte stream.
pub(crate) struct Wire {
    pub(crate) stream: BufReader<Stream>,
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
    pub(crate) async fn read(&mut self) -> Result<BackendMessage> {
        self.inside_message = true;
        let message = self.reader.read(&mut self.stream).await.map_err(lost)?;
        self.inside_message = false;
        Ok(message)
    }

    /// Gives `take` the payloads of the CopyData messages that lie in the buffer as a whole, up to the first of another kind.
    ///
    /// # Errors
    /// What `take` answers; what it refused is lost.
    pub(crate) fn take_buffered(&mut self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if self.inside_message {
            return Ok(());
        }
        let buffer = self.stream.buffer();
        let mut at = 0;
        let mut outcome = Ok(());
        while outcome.is_ok()
            && let Some(payload) = first_copy_data(&buffer[at..])
        {
            outcome = take(payload);
            at += HEADER_BYTES + payload.len();
        }
        self.stream.consume(at);
        outcome
    }

    pub(crate) fn has_whole_message(&self) -> bool {
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
    pub(crate) async fn terminate(&mut self) {
        let goodbye = async {
            self.stream.write_all(&[b'X', 0, 0, 0, 4]).await?;
            self.stream.shutdown().await
        };
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, goodbye).await;
    }
}

/// The payload of the CopyData that a buffer begins with, if it is one and all of it is there.
fn first_copy_data(buffer: &[u8]) -> Option<&[u8]> {
    let (header, rest) = buffer.split_first_chunk::<HEADER_BYTES>()?;
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if header[0] != b'd' { None } else { rest.get(..length.checked_sub(4)?) }
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
pub(crate) fn server_error(payload: &[u8]) -> Error {
    let fields = ErrorFields::parse(payload);
    say_detail(fields.message.as_deref().unwrap_or_default(), detail(payload));
    Error::from_server(fields.code.as_deref().unwrap_or("XX000"), fields.message.as_deref().unwrap_or("no message"))
}

/// The field `D` of an error: each is a byte that says which, and a text that ends with a zero.
fn detail(payload: &[u8]) -> Option<&str> {
    let field = payload.split(|&byte| byte == 0).find(|field| field.first() == Some(&b'D'))?;
    std::str::from_utf8(&field[1..]).ok()
}

/// An error of the line or of the framing.
pub(crate) fn lost(error: PgWireError) -> Error {
    let kind = if error.is_io() { ErrorKind::Transient } else { ErrorKind::Other };
    Error::new(kind, format!("the connection failed: {error}"))
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Server, message)
}

pub(crate) fn protocol(message: &str) -> Error {
    Error::new(ErrorKind::Other, message)
}

pub(crate) fn unexpected(tag: u8, doing: &str) -> Error {
    Error::new(ErrorKind::Other, format!("the server sent an unexpected message {:?} while {doing}", char::from(tag)))
}
