//! What several migrations serve, at one address: the metrics of all with the label `database`, the status of all, and a page for each.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Html;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

use super::overview::{Member, Overview};
use super::summary::Summary;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::http::{Response, accept, bind_later, response};
use crate::observe::metrics;
use crate::observe::page;
use crate::observe::status::Phase;

/// The boards of the migrations of this process.
#[derive(Clone)]
pub struct Boards {
    /// The directory of all.
    pub directory: PathBuf,
    /// Each with its database.
    pub boards: Vec<(Member, StatusBoard)>,
}

impl Boards {
    /// How they are.
    ///
    /// # Errors
    /// When `databases.json` cannot be read.
    pub fn summary(&self) -> Result<Summary> {
        let gone = || Error::new(ErrorKind::Other, format!("{} holds no migrations", self.directory.display()));
        let overview = Overview::of(&self.directory)?.ok_or_else(gone)?;
        let statuses = self.boards.iter().map(|(member, board)| (member.clone(), board.snapshot())).collect();
        Ok(Summary::of(&overview, statuses))
    }
}

/// A running server; it ends when this is dropped.
pub struct Server(AbortHandle);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves them. While the port is occupied it is tried again and again: the migrations are worth more than their metrics.
///
/// # Errors
/// `Usage` if the address cannot be listened on for any other reason.
pub async fn serve(address: SocketAddr, boards: Boards) -> Result<Server> {
    let announce =
        |address| tracing::info!("the page of all databases is http://{address}/, and metrics are at /metrics");
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => {
            announce(listener.local_addr()?);
            Some(listener)
        }
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            tracing::warn!("no metrics while {address} is in use; --http-addr takes another address");
            None
        }
        Err(error) => {
            let message = format!("listening on {address} for metrics: {error}");
            return Err(Error::new(ErrorKind::Usage, message).hint("--http-addr takes an address of this machine"));
        }
    };
    let mut app = Router::new()
        .route("/", get(index))
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(health))
        .route("/status", get(status))
        .fallback(not_found)
        .with_state(boards.clone());
    for (number, (_, board)) in (1..).zip(&boards.boards) {
        let one =
            page::router(board.clone()).merge(Router::new().route("/status", get(status_of)).with_state(board.clone()));
        // With a slash at its end: the page asks for what lies beside it.
        app = app.nest(&format!("/databases/{number}/"), one);
    }
    let serving = async move {
        let listener = match listener {
            Some(listener) => listener,
            None => {
                let listener = bind_later(address).await;
                announce(address);
                listener
            }
        };
        accept(listener, app).await;
    };
    Ok(Server(tokio::spawn(serving).abort_handle()))
}

/// Where to find the page of each.
async fn index(State(boards): State<Boards>) -> Html<String> {
    let mut page = String::from(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>walferry</title>\
         <meta name=\"viewport\" content=\"width=device-width\"></head><body><h1>walferry</h1><table>\
         <tr><th>database</th><th>phase</th></tr>\n",
    );
    for (number, (member, board)) in (1..).zip(&boards.boards) {
        page.push_str(&format!(
            "<tr><td><a href=\"databases/{number}/\">{}</a></td><td>{}</td></tr>\n",
            escaped(&member.database),
            board.phase().title()
        ));
    }
    page.push_str("</table><p><a href=\"status\">status</a>, <a href=\"metrics\">metrics</a></p></body></html>\n");
    Html(page)
}

/// A name as text of a page.
fn escaped(text: &str) -> String {
    text.chars()
        .map(|letter| match letter {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            '"' => "&quot;".to_owned(),
            letter => letter.to_string(),
        })
        .collect()
}

async fn metrics_page(State(boards): State<Boards>) -> Response {
    // As fresh as the scrape, not as the last tick.
    let scrapes: Vec<String> = boards.boards.iter().map(|(_, board)| board.scrape()).collect();
    response(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics::merge(&scrapes))
}

async fn health(State(boards): State<Boards>) -> Response {
    let failed = boards.boards.iter().any(|(_, board)| board.phase() == Phase::Failed);
    let (code, word) = if failed { (StatusCode::SERVICE_UNAVAILABLE, "failed") } else { (StatusCode::OK, "ok") };
    response(code, "application/json", format!("{{\"status\":\"{word}\"}}\n"))
}

async fn status(State(boards): State<Boards>) -> Response {
    match boards.summary().map(|summary| serde_json::to_string(&summary)) {
        Ok(Ok(json)) => response(StatusCode::OK, "application/json", json + "\n"),
        Ok(Err(error)) => response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
        Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
    }
}

async fn status_of(State(board): State<StatusBoard>) -> Response {
    match serde_json::to_string(&board.snapshot()) {
        Ok(json) => response(StatusCode::OK, "application/json", json + "\n"),
        Err(error) => response(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
    }
}

async fn not_found() -> Response {
    response(StatusCode::NOT_FOUND, "text/plain", "there are /, /metrics, /healthz and /status\n".to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::observe::metrics::tests::{assert_every_metric_is_in, parse};
    use crate::observe::status::ConflictKind;

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (code, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    #[tokio::test]
    async fn one_address_has_the_metrics_of_all_and_a_page_for_each() {
        let directory = tempfile::tempdir().unwrap();
        let mut overview = Overview::new(String::new(), String::new(), Vec::new(), Vec::new());
        overview.add(["shop".to_owned(), "<a\"\\b\n>".to_owned()]);
        overview.write(directory.path()).unwrap();
        let with_board = |member: &Member| (member.clone(), StatusBoard::of_database(&member.database).unwrap());
        let boards = Boards {
            directory: directory.path().to_owned(),
            boards: overview.members.iter().map(with_board).collect(),
        };
        let (_, shop) = &boards.boards[1];
        shop.add_table(1, "public", "t", 100);
        shop.conflicts("public", "t", ConflictKind::InsertFoundRow, 1);
        shop.set_phase(Phase::Following);
        // The server says only in its log which port it was given.
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let server = serve(address, boards.clone()).await.unwrap();

        let (code, text) = get(address, "/metrics").await;
        assert_eq!(code, 200);
        // Each metric is described once, and each sample is there once: `parse` sees to it.
        assert_every_metric_is_in(&parse(&text));
        assert!(text.contains("walferry_phase{database=\"shop\",phase=\"following\"} 1\n"), "{text}");
        assert!(text.contains("walferry_phase{database=\"<a\\\"\\\\b\\n>\",phase=\"preparing\"} 1\n"), "{text}");
        let (_, json) = get(address, "/status").await;
        let status: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(status["databases"][1]["status"]["phase"], "following");
        let (_, index) = get(address, "/").await;
        assert!(index.contains("<a href=\"databases/2/\">shop</a>") && index.contains("&lt;a&quot;"), "{index}");
        for path in ["/databases/2/", "/databases/2/page.js", "/databases/2/history", "/databases/2/status"] {
            assert_eq!(get(address, path).await.0, 200, "{path}");
        }
        assert_eq!(get(address, "/databases/3/").await.0, 404);
        assert_eq!(get(address, "/healthz").await.0, 200);
        shop.fail(&Error::new(ErrorKind::Gap, "gone"));
        assert_eq!(get(address, "/healthz").await.0, 503);
        drop(server);
    }
}
