//! The status page: one page for people, at `/`, with what it needs beside it and nothing from elsewhere. It only reads.
//!
//! What moves comes by server-sent events; what was before somebody looked comes from the board (`history.rs`).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream::{self, Stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::observe::board::StatusBoard;
use crate::observe::status::{Status, TableState};

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = concat!(include_str!("page/uplot.js"), include_str!("page/page.js"));
const STYLE: &str = concat!(include_str!("page/uplot.css"), include_str!("page/page.css"));

/// Nothing from elsewhere, nothing inline, in no frame.
const POLICY: &str = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// How often whoever looks at the page is sent how it is.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);
/// Then the page asks again: a connection does not live longer than some seconds here.
const EVENTS_PER_CONNECTION: usize = 8;
/// How many may look at once; more of them ask now and then instead. Scrapes have to find a place.
const VIEWERS_MAX: usize = 8;
/// How many tables an event names. The sums speak of all of them.
const TABLES_SHOWN: usize = 100;

#[derive(Clone)]
struct Served {
    board: StatusBoard,
    viewers: Arc<Semaphore>,
}

/// The page and what it asks for.
pub(crate) fn router(board: StatusBoard) -> Router {
    let text = |content_type: &'static str, body: &'static str| get(move || async move { asset(content_type, body) });
    Router::new()
        .route("/", text("text/html; charset=utf-8", PAGE))
        .route("/page.js", text("text/javascript; charset=utf-8", SCRIPT))
        .route("/page.css", text("text/css; charset=utf-8", STYLE))
        .route("/history", get(history_page))
        .route("/events", get(events))
        .with_state(Served { board, viewers: Arc::new(Semaphore::new(VIEWERS_MAX)) })
}

fn asset(content_type: &'static str, body: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONNECTION, "close"),
    ];
    (headers, Body::from(body)).into_response()
}

async fn history_page(State(served): State<Served>) -> Response {
    match serde_json::to_string(&served.board.history()) {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json"), (header::CONNECTION, "close")], json).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// The status, once a second, for as long as a connection may live.
async fn events(State(served): State<Served>) -> Response {
    let Ok(place) = Arc::clone(&served.viewers).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many look at once; ask for /status\n").into_response();
    };
    ([(header::CONNECTION, "close")], Sse::new(stream_of(served.board, place))).into_response()
}

fn stream_of(
    board: StatusBoard,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = std::result::Result<Event, Infallible>> {
    stream::unfold((board, place, 0), |(board, place, sent)| async move {
        if sent == EVENTS_PER_CONNECTION {
            return None;
        }
        if sent > 0 {
            tokio::time::sleep(EVENT_INTERVAL).await;
        }
        // The page asks anew as soon as it ends.
        let json = serde_json::to_string(&shown(board.snapshot())).ok()?;
        let event = Event::default().retry(Duration::from_millis(200)).data(json);
        Some((Ok(event), (board, place, sent + 1)))
    })
}

/// A status with the tables that somebody wants to see: those at work, then those that wait, the largest first.
fn shown(mut status: Status) -> Status {
    if status.tables.len() > TABLES_SHOWN {
        let rank = |state: TableState| match state {
            TableState::Copying => 0,
            TableState::Indexing => 1,
            TableState::Waiting => 2,
            TableState::Done => 3,
        };
        status.tables.sort_by_key(|table| (rank(table.state), std::cmp::Reverse(table.bytes_total)));
        status.tables.truncate(TABLES_SHOWN);
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::{Phase, Table};

    fn table(name: &str, state: TableState, bytes_total: u64) -> Table {
        Table { schema: "public".into(), name: name.into(), bytes_total, bytes_done: 0, rows_done: 0, state }
    }

    #[test]
    fn of_many_tables_those_at_work_are_shown() {
        let mut status = Status::not_running(Phase::Copying);
        status.tables = (0..5000).map(|n| table(&format!("done {n}"), TableState::Done, 1 << 30)).collect();
        status.tables.push(table("waiting", TableState::Waiting, 7));
        status.tables.push(table("at work", TableState::Copying, 3));
        let names: Vec<String> = shown(status).tables.into_iter().map(|table| table.name).collect();
        assert_eq!((names.len(), names[0].as_str(), names[1].as_str()), (TABLES_SHOWN, "at work", "waiting"));
    }

    #[test]
    fn nothing_comes_from_elsewhere() {
        for text in [PAGE, include_str!("page/page.js"), include_str!("page/page.css"), include_str!("page/uplot.css")]
        {
            let links = text.replace("https://github.com/leeoniya/uPlot", "").replace("http://www.w3.org/2000/svg", "");
            assert!(!links.contains("http:") && !links.contains("https:") && !links.contains("//cdn"), "{links}");
        }
        // Names come from the databases: they are text, never markup.
        assert!(!include_str!("page/page.js").contains("innerHTML"));
    }
}
