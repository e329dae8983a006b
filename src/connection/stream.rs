//! A byte stream to a server: TCP or Unix socket, with or without TLS.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use super::count::Counted;
use crate::record::Recorded;
use crate::record::wire::Scanner;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// A socket file; on Linux, a path whose first character is NUL names an abstract socket.
    Unix(PathBuf),
}

/// When a silent peer counts as dead; applies to TCP only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalive {
    /// Whether the kernel probes an idle connection at all.
    pub(super) enabled: bool,
    /// Silence before the first probe.
    pub(super) idle: Duration,
    /// Time between probes.
    pub(super) interval: Duration,
    /// Probes without an answer after which the connection is dead.
    pub(super) count: u32,
    /// How long sent data may stay unacknowledged; zero for the kernel's default of about a quarter of an hour. `None`
    /// where the operator did not say: then it depends on the kind of session.
    pub(super) user_timeout: Option<Duration>,
}

impl Default for Keepalive {
    /// A dead peer of an idle connection is noticed within a minute. libpq leaves it to the kernel: two hours.
    fn default() -> Keepalive {
        Keepalive {
            enabled: true,
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
            user_timeout: None,
        }
    }
}

/// An open connection, ready for the start-up message.
pub(crate) struct Stream {
    transport: Transport,
    /// The hash of the server's certificate for SCRAM's channel binding (RFC 5929, `tls-server-end-point`).
    pub(super) end_point: Option<Vec<u8>>,
    /// Counts it until it is closed.
    _counted: Option<Counted>,
    /// Finds the statements that change the server.
    scanner: Option<Box<Scanner>>,
}

enum Transport {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Stream {
    /// Opens a connection without TLS.
    pub(super) async fn open(address: &Address, keepalive: &Keepalive) -> io::Result<Stream> {
        let transport = match address {
            Address::Unix(path) => Transport::Unix(UnixStream::connect(path).await?),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                configure(&stream, keepalive)?;
                Transport::Tcp(stream)
            }
        };
        Ok(Stream { transport, end_point: None, _counted: None, scanner: None })
    }

    /// The bare TCP stream, before TLS.
    pub(super) fn into_tcp(self) -> Option<TcpStream> {
        match self.transport {
            Transport::Tcp(stream) => Some(stream),
            Transport::Unix(_) | Transport::Tls(_) => None,
        }
    }

    /// A stream over a TLS session.
    pub(super) fn secured(stream: tokio_rustls::client::TlsStream<TcpStream>, end_point: Option<Vec<u8>>) -> Stream {
        Stream { transport: Transport::Tls(Box::new(stream)), end_point, _counted: None, scanner: None }
    }

    /// Has it counted until it is closed.
    pub(super) fn count(&mut self, counted: Counted) {
        self._counted = Some(counted);
    }

    /// Has what changes the server written down before it is sent, from the start-up message on.
    pub(super) fn record(&mut self, recorded: Recorded) {
        self.scanner = Some(Box::new(Scanner::new(recorded)));
    }

    /// Whether what goes through it is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        matches!(self.transport, Transport::Tls(_))
    }

    /// The hash of the server's certificate, where there is one.
    pub(crate) fn end_point(&self) -> Option<&[u8]> {
        self.end_point.as_deref()
    }
}

fn configure(stream: &TcpStream, keepalive: &Keepalive) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, keepalive.enabled)?;
    if keepalive.enabled {
        sockopt::set_tcp_keepidle(stream, keepalive.idle)?;
        sockopt::set_tcp_keepintvl(stream, keepalive.interval)?;
        sockopt::set_tcp_keepcnt(stream, keepalive.count)?;
    }
    let user_timeout = keepalive.user_timeout.unwrap_or_default().as_millis();
    if user_timeout > 0 {
        sockopt::set_tcp_user_timeout(stream, u32::try_from(user_timeout).unwrap_or(u32::MAX))?;
    }
    Ok(())
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Some(scanner) = &mut this.scanner {
            scanner.before(buffer);
        }
        let written = match &mut this.transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_write(cx, buffer),
            Transport::Unix(stream) => Pin::new(stream).poll_write(cx, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, buffer),
        };
        if let (Some(scanner), Poll::Ready(Ok(bytes))) = (&mut this.scanner, &written) {
            scanner.sent(*bytes);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.end_point {
            Some(hash) => ChannelBinding::tls_server_end_point(hash.clone()),
            None => ChannelBinding::none(),
        }
    }
}

/// Tells tokio-postgres that TLS is already negotiated, and hands it the channel binding.
pub(super) struct Negotiated;

impl TlsConnect<Stream> for Negotiated {
    type Stream = Stream;
    type Error = Infallible;
    type Future = Ready<Result<Stream, Infallible>>;

    fn connect(self, stream: Stream) -> Self::Future {
        ready(Ok(stream))
    }
}
