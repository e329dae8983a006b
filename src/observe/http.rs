//! `GET /metrics`, `GET /healthz` and `GET /status`, and the page for people (`page.rs`); nothing else: control goes through
//! the Unix socket.
//!
//! What is served holds no secret and no row (invariant I10), but whoever reaches the address reads it: the default
//! is the loopback interface.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::routing::get;
use axum::serve::Listener;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::Sleep;

use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::metrics;
use crate::observe::page;
use crate::observe::status::{Level, Phase};

/// Where it listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:9617";

/// How long after the port was found occupied it is tried again, each time.
const AGAIN: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(5) };

/// A server that runs, or waits for its port; it ends when this is dropped.
#[derive(Debug)]
pub struct HttpServer {
    address: Option<SocketAddr>,
    task: AbortHandle,
}

impl HttpServer {
    /// Where it has listened from the start, with the real port where 0 was asked for; `None` when the port was occupied then.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves a board. An occupied port is an event, stands in the status for as long as it lasts, and is tried again: a migration is worth
/// more than its metrics.
///
/// # Errors
///
/// [`ErrorKind::Usage`] if the address cannot be listened on for any other reason.
pub async fn serve(address: SocketAddr, board: StatusBoard, metrics: PrometheusHandle) -> Result<HttpServer> {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let text = format!("no metrics and no page: {address} is in use by another program");
            let next = format!("tried again every {} s; --http-addr takes another address", AGAIN.as_secs());
            board.event(Level::Warn, format!("{text}. It is {next}"));
            board.set_not_served(Some(format!("{text} ({next})")));
            None
        }
        Err(error) => {
            let message = format!("listening on {address} for metrics: {error}");
            return Err(Error::new(ErrorKind::Usage, message).hint("--http-addr takes an address of this machine"));
        }
    };
    let listens_on = listener.as_ref().map(TcpListener::local_addr).transpose();
    let listens_on = listens_on.context(|| format!("listening on {address} for metrics"))?;
    let app = router(Served { board: board.clone(), metrics }).merge(page::router(board.clone()));
    // A port of 0 is chosen by the system: only this says which.
    let announce = |address| format!("its page is http://{address}/, and metrics are at /metrics");
    if let Some(address) = listens_on {
        board.event(Level::Info, announce(address));
    }
    let serving = tokio::spawn(async move {
        let listener = match listener {
            Some(listener) => listener,
            None => {
                let listener = bind_later(address).await;
                board.set_not_served(None);
                board.event(Level::Info, announce(address));
                listener
            }
        };
        accept(listener, app).await;
    });
    Ok(HttpServer { address: listens_on, task: serving.abort_handle() })
}

/// Serves on a listener, with the bounds of this module, until it is dropped.
pub(crate) async fn accept(listener: TcpListener, app: Router) {
    let listener = Bounded { listener, places: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    // An error of one connection does not end it.
    if let Err(error) = axum::serve(listener, app).await {
        tracing::warn!("the metrics' server ended: {error}");
    }
}

/// Waits until whoever has the port is gone.
pub(crate) async fn bind_later(address: SocketAddr) -> TcpListener {
    loop {
        tokio::time::sleep(AGAIN).await;
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => tracing::debug!("listening on {address} for metrics: {error}"),
        }
    }
}

#[derive(Clone)]
struct Served {
    board: StatusBoard,
    metrics: PrometheusHandle,
}

/// A migration is worth more than its metrics: those who never finish a request must not use up its files and memory. Others
/// wait in the kernel's queue until there is a place.
const CONNECTIONS_MAX: usize = 16;

/// How long a connection may live. Each serves one request.
const CONNECTION_TIME_MAX: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(10) };

/// Accepts so many connections at once, each for so long.
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Listener for Bounded {
    type Io = Limited;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Limited, SocketAddr) {
        // Never closed; if it were, nobody would be counted any more.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        // Waits and tries again where there are no files left.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Limited { stream, end: Box::pin(tokio::time::sleep(CONNECTION_TIME_MAX)), _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that breaks when its time is up.
struct Limited {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Limited {
    /// The stream, while there is time.
    fn stream(&mut self, cx: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        match self.end.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(Pin::new(&mut self.stream)),
        }
    }
}

impl AsyncRead for Limited {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Limited {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream(cx)?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_shutdown(cx)
    }
}

pub(crate) type Response = (StatusCode, [(HeaderName, &'static str); 3], String);

/// A method other than GET and HEAD on these paths is 405 by axum's own doing.
fn router(served: Served) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(health))
        .route("/status", get(status))
        .fallback(not_found)
        .with_state(served)
}

async fn metrics_page(State(served): State<Served>) -> Response {
    // As fresh as the scrape, not as the last tick.
    metrics::publish(&served.board.snapshot());
    response(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", served.metrics.render())
}

async fn health(State(served): State<Served>) -> Response {
    let phase = served.board.phase();
    let (code, word) = match phase {
        Phase::Failed => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
        _ => (StatusCode::OK, "ok"),
    };
    response(code, "application/json", format!("{{\"status\":\"{word}\",\"phase\":\"{}\"}}\n", phase.name()))
}

async fn status(State(served): State<Served>) -> Response {
    match serde_json::to_string(&served.board.snapshot()) {
        Ok(json) => response(StatusCode::OK, "application/json", json + "\n"),
        Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
    }
}

async fn not_found() -> Response {
    response(StatusCode::NOT_FOUND, "text/plain", "there are /, /metrics, /healthz and /status\n".to_string())
}

/// An answer that no cache keeps, on a connection of its own.
pub(crate) fn response(code: StatusCode, content_type: &'static str, body: String) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        // A place that is kept for the next scrape is one that somebody else waits for.
        (header::CONNECTION, "close"),
    ];
    (code, headers, body)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::observe::metrics::tests::{assert_every_metric_is_in, parse};
    use crate::observe::status::ConflictKind;
    use crate::observe::status::Status;

    async fn start(board: &StatusBoard) -> HttpServer {
        let any_port = "127.0.0.1:0".parse().unwrap();
        serve(any_port, board.clone(), metrics::install().unwrap()).await.unwrap()
    }

    /// The status line's code, the head and the body.
    async fn request(server: &HttpServer, method: &str, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(server.address().unwrap()).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, head.to_lowercase(), body.to_string())
    }

    #[tokio::test]
    async fn a_scrape_of_a_running_server_has_every_metric_and_parses() {
        let board = StatusBoard::new();
        board.add_table(1, "public", "a \"quoted\\name\"\nof two lines", 100);
        board.conflicts("public", "a \"quoted\\name\"\nof two lines", ConflictKind::InsertFoundRow, 1);
        let server = start(&board).await;
        let (code, head, body) = request(&server, "GET", "/metrics").await;
        assert_eq!(code, 200);
        assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        assert_every_metric_is_in(&parse(&body));
    }

    #[tokio::test]
    async fn health_is_503_once_the_migration_failed() {
        let board = StatusBoard::new();
        let server = start(&board).await;
        board.set_phase(Phase::Following);
        let (code, _, body) = request(&server, "GET", "/healthz").await;
        assert_eq!((code, body.trim()), (200, r#"{"status":"ok","phase":"following"}"#));
        board.fail(&Error::new(ErrorKind::Gap, "the slot is gone"));
        let (code, _, body) = request(&server, "GET", "/healthz").await;
        assert_eq!((code, body.trim()), (503, r#"{"status":"failed","phase":"failed"}"#));
    }

    #[tokio::test]
    async fn the_status_page_is_the_status() {
        let board = StatusBoard::new();
        let server = start(&board).await;
        let (code, head, body) = request(&server, "GET", "/status").await;
        assert_eq!(code, 200);
        assert!(head.contains("content-type: application/json"));
        let served: Status = serde_json::from_str(&body).unwrap();
        let mut expected = board.snapshot();
        expected.updated_at.clone_from(&served.updated_at);
        assert_eq!(served, expected);
    }

    #[tokio::test]
    async fn the_page_comes_whole_and_its_events_are_the_status() {
        let server = start(&StatusBoard::new()).await;
        for (path, kind) in [("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")] {
            let (code, head, body) = request(&server, "GET", path).await;
            assert_eq!(code, 200, "{path}");
            assert!(head.contains(kind) && head.contains("content-security-policy: default-src 'self'"), "{head}");
            assert!(body.len() > 500, "{path}");
        }
        let (code, _, history) = request(&server, "GET", "/history").await;
        assert!(code == 200 && serde_json::from_str::<serde_json::Value>(&history).unwrap().is_array(), "{history}");
        // Its time is up before it ends by itself here; one event is enough.
        let mut stream = TcpStream::connect(server.address().unwrap()).await.unwrap();
        stream.write_all(b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let data = answer.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or_else(|| panic!("{answer}"));
        assert_eq!(serde_json::from_str::<Status>(data).unwrap().phase, Phase::Preparing);
    }

    #[tokio::test]
    async fn other_paths_are_404_and_other_methods_405() {
        let server = start(&StatusBoard::new()).await;
        for path in ["/index.html", "/metrics/", "/status/x", "/cutover", "/healthz%00"] {
            assert_eq!(request(&server, "GET", path).await.0, 404, "{path}");
        }
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            for path in ["/", "/events", "/history", "/metrics", "/healthz", "/status"] {
                assert_eq!(request(&server, method, path).await.0, 405, "{method} {path}");
            }
        }
        assert_eq!(request(&server, "HEAD", "/metrics").await.0, 200);
    }

    #[tokio::test]
    async fn those_who_never_finish_a_request_are_few_and_go() {
        let server = start(&StatusBoard::new()).await;
        let mut slow = Vec::new();
        for begun in ["", "G", "GET /metrics HTTP/1.1\r\nHost: x\r\nX: "].into_iter().cycle().take(3 * CONNECTIONS_MAX)
        {
            let mut stream = TcpStream::connect(server.address().unwrap()).await.unwrap();
            stream.write_all(begun.as_bytes()).await.unwrap();
            slow.push(stream);
        }
        // Asked behind them all, and answered once the first of them have had their time.
        assert_eq!(request(&server, "GET", "/healthz").await.0, 200);
        let mut first = slow.remove(0);
        let mut nothing = Vec::new();
        let _ = first.read_to_end(&mut nothing).await;
        assert!(nothing.is_empty(), "{nothing:?}");
    }

    #[tokio::test]
    async fn a_huge_request_is_cut_off_and_another_served() {
        let server = start(&StatusBoard::new()).await;
        let mut stream = TcpStream::connect(server.address().unwrap()).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ").await.unwrap();
        let sent = async {
            let piece = [b'x'; 64 * 1024];
            let mut bytes = 0;
            while stream.write_all(&piece).await.is_ok() {
                bytes += piece.len();
            }
            bytes
        };
        let bytes = sent.await;
        assert!(bytes < 16 << 20, "{bytes} bytes of a header were read");
        assert_eq!(request(&server, "GET", "/healthz").await.0, 200);
        let body = "GET /status HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\nabc";
        let mut stream = TcpStream::connect(server.address().unwrap()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[tokio::test]
    async fn an_occupied_port_is_a_warning_until_it_is_free_and_a_foreign_address_an_error() {
        let board = StatusBoard::new();
        let occupied = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = occupied.local_addr().unwrap();
        let handle = metrics::install().unwrap();
        let server = serve(address, board.clone(), handle.clone()).await.unwrap();
        assert_eq!(server.address(), None);
        let status = board.snapshot();
        assert_eq!(status.events.last().map(|event| event.level), Some(Level::Warn));
        assert!(status.attention.iter().any(|text| text.contains(&address.to_string())), "{:?}", status.attention);
        drop(occupied);
        while !board.snapshot().attention.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let served = HttpServer { address: Some(address), task: server.task.clone() };
        assert_eq!(request(&served, "GET", "/healthz").await.0, 200);
        // 192.0.2.0/24 is for documentation (RFC 5737) and no machine's own.
        let error = serve("192.0.2.1:0".parse().unwrap(), board, handle).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}
