//! The status as plain text: what `walferry status` prints, and the one line of a running migration.

use crate::lsn::Lsn;
use crate::observe::format::{count, counted, duration, percent, printable, size, size_rate};
use crate::observe::status::{Direction, Level, Phase, Status, Table, TableState, WayBack};
use crate::verify::Verification;

/// What to do where no migration runs and none has failed.
pub const HOW_TO_GO_ON: &str = "`walferry migrate` with the same options goes on where it was.";

/// Where the text of a line begins, after its label.
const LABEL_WIDTH: usize = 10;
/// A terminal narrower than this is treated as if it were this wide.
const WIDTH_MIN: usize = 30;
/// Tables that are listed; the rest are counted.
const TABLES_MAX: usize = 12;
/// Events that are listed.
const EVENTS_MAX: usize = 6;

/// The whole status as lines of at most `width` columns, ending with a newline. Long lines are wrapped under their text;
/// only a single word longer than a line, such as a name, stays whole. No colours, no escape sequences.
pub fn render(status: &Status, width: usize) -> String {
    let mut page = Page { text: String::new(), width: width.max(WIDTH_MIN) };
    page.line("phase", &phase_text(status));
    page.line("source", &status.source.description);
    page.line("target", &status.target.description);
    page.line("lag", &lag_text(status));
    let back = status.direction == Direction::Back;
    if !back {
        page.line("copy", &copy_text(status));
    }
    if status.indexes.total > 0 {
        let (done, total) = (count(status.indexes.done), count(status.indexes.total));
        page.line("indexes", &format!("{done} of {total} built"));
    }
    page.line("stream", &stream_text(status));
    page.line("queue", &queue_text(status));
    page.line("apply", &apply_text(status));
    page.line("verified", &status.verification.as_ref().map(Verification::text).unwrap_or_default());
    if let Some(error) = &status.error {
        page.line("error", &error.message);
        page.line("next", error.hint.as_deref().unwrap_or_default());
    } else if status.ready_to_cutover {
        let way_back = if status.way_back == WayBack::Ready { ", with a way back" } else { "" };
        let what = if back { "done; a switchback is ready".to_owned() } else { format!("ready{way_back}") };
        page.line("cutover", &format!("{what}{}", expected_downtime(status)));
    } else {
        let done = if back { "done; no switchback: " } else { "not yet: " };
        page.line("cutover", &format!("{done}{}", status.blockers.join("; ")));
    }
    if status.error.is_none() && !status.process_alive && !matches!(status.phase, Phase::CutOver | Phase::Reversed) {
        page.line("next", HOW_TO_GO_ON);
    }
    if let Some(last) = &status.cutover.last_given_up {
        page.line("last try", &format!("given up during {}, {}: {}", last.step, last.at, last.reason));
    }
    page.line("attention", &status.attention.join("; "));
    render_tables(&mut page, &status.tables);
    render_events(&mut page, status);
    page.line("as of", &status.updated_at);
    page.text
}

fn expected_downtime(status: &Status) -> String {
    status.cutover.expected_downtime_ms.map_or(String::new(), |ms| format!(", writers would wait about {ms:.0} ms"))
}

/// Phase, progress, lag and rate in one line, for a live line or a log.
pub fn one_line(status: &Status) -> String {
    let eta = status.eta_seconds.map_or(String::new(), |seconds| format!(", {} left", duration(seconds)));
    let copy = &status.copy;
    let what = match status.phase {
        Phase::Preparing | Phase::Failed => String::new(),
        Phase::Copying => format!(
            "{} of {}, {} of {} ({}%), {}{eta}",
            count(copy.tables_done),
            counted(copy.tables_total, "table"),
            size(copy.bytes_done),
            size(copy.bytes_total),
            percent(copy.bytes_done, copy.bytes_total),
            size_rate(copy.bytes_per_second)
        ),
        Phase::Indexing => {
            format!("{} of {}", count(status.indexes.done), counted(status.indexes.total, "index build"))
        }
        Phase::CatchingUp | Phase::Following | Phase::CuttingOver | Phase::CutOver | Phase::Reversed => {
            format!(
                "lag {}, {} changes/s{eta}",
                lag_text(status),
                count(status.apply.changes_per_second.round() as u64)
            )
        }
    };
    let mut line = status.phase.title().to_string();
    for (holds, text) in [
        (!what.is_empty(), what.as_str()),
        (status.queue.full, "queue full"),
        (status.apply.paused, "apply paused"),
        (copy.paused && status.phase == Phase::Copying, "copy paused"),
        (copy.waits_for.is_some(), "copy waits for a standby of the source"),
        (
            !status.stream.connected && status.phase > Phase::Preparing && status.phase != Phase::Failed,
            "source not connected",
        ),
    ] {
        if holds {
            line.push_str(if line.len() == status.phase.title().len() { ": " } else { ", " });
            line.push_str(text);
        }
    }
    line
}

/// The name of a table as it is printed: `public.orders`.
pub(super) fn table_name(table: &Table) -> String {
    printable(&format!("{}.{}", table.schema, table.name))
}

/// Lines with a label in front, wrapped to a width.
struct Page {
    text: String,
    width: usize,
}

impl Page {
    /// A labelled line, wrapped under its text; nothing at all where there is no text.
    fn line(&mut self, label: &str, text: &str) {
        let text = printable(text);
        let mut column = 0;
        for word in unbroken(&text) {
            let word_width = word.chars().count();
            if column == 0 {
                self.text.push_str(&format!("{label:LABEL_WIDTH$}"));
                column = LABEL_WIDTH;
            } else if column + 1 + word_width > self.width {
                self.text.push_str(&format!("\n{:LABEL_WIDTH$}", ""));
                column = LABEL_WIDTH;
            } else {
                self.text.push(' ');
                column += 1;
            }
            self.text.push_str(&word);
            column += word_width;
        }
        if column > 0 {
            self.text.push('\n');
        }
    }
}

/// The words of a text, a number together with its unit.
fn unbroken(text: &str) -> Vec<String> {
    const UNITS: [&str; 9] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ms", "s"];
    let mut words: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let unit = word.trim_end_matches([',', ';']).trim_end_matches("/s");
        match words.last_mut() {
            Some(number) if UNITS.contains(&unit) && number.ends_with(|c: char| c.is_ascii_digit()) => {
                number.push(' ');
                number.push_str(word);
            }
            _ => words.push(word.to_string()),
        }
    }
    words
}

fn phase_text(status: &Status) -> String {
    let mut text = status.phase.title().to_string();
    if let Some(seconds) = status.eta_seconds {
        text.push_str(&format!(", {} left", duration(seconds)));
    }
    if status.direction == Direction::Back && status.phase == Phase::CutOver {
        text.push_str("; the old primary is kept current");
    }
    if !status.process_alive {
        text.push_str("; the process is not running");
    }
    text
}

fn lag_text(status: &Status) -> String {
    match (status.lag.bytes, status.lag.seconds) {
        (Some(bytes), Some(seconds)) => format!("{}, {}", size(bytes), duration(seconds)),
        (Some(bytes), None) => size(bytes),
        (None, Some(seconds)) => duration(seconds),
        (None, None) => "unknown".to_string(),
    }
}

pub(super) fn copy_text(status: &Status) -> String {
    let copy = &status.copy;
    if copy.tables_total == 0 {
        return String::new();
    }
    let rows = counted(copy.rows_done, "row");
    let tables = counted(copy.tables_total, "table");
    if copy.tables_done == copy.tables_total {
        return format!("{tables}, {}, {rows}: done", size(copy.bytes_done));
    }
    let (done, total) = (size(copy.bytes_done), size(copy.bytes_total));
    let (tables_done, percent) = (count(copy.tables_done), percent(copy.bytes_done, copy.bytes_total));
    let mut pace = if copy.paused { "paused".to_string() } else { size_rate(copy.bytes_per_second) };
    if let Some(rate) = copy.rate_max_bytes_per_second {
        pace.push_str(&format!(" of at most {}", size_rate(rate as f64)));
    }
    if copy.jobs > 0 {
        pace.push_str(&format!(" by {}", counted(copy.jobs, "job")));
    }
    format!("{tables_done} of {tables}, {done} of {total} ({percent}%), {rows}, {pace}")
}

fn stream_text(status: &Status) -> String {
    let stream = &status.stream;
    let connected = if stream.connected { "connected" } else { "not connected" };
    if stream.received_lsn == Lsn::ZERO && stream.bytes == 0 {
        return connected.to_string();
    }
    let mut text = format!("{connected}, at {}, {}", stream.received_lsn, size_rate(stream.bytes_per_second));
    text.push_str(&format!(
        "; {} in {}",
        counted(stream.changes, "change"),
        counted(stream.transactions, "transaction")
    ));
    if stream.reconnects > 0 {
        text.push_str(&format!("; {}", counted(stream.reconnects, "reconnect")));
    }
    if let Some(bytes) = status.source.retained_wal_bytes {
        text.push_str(&format!("; the source keeps {} of WAL", size(bytes)));
    }
    text
}

fn queue_text(status: &Status) -> String {
    let queue = &status.queue;
    if queue.limit_bytes == 0 {
        return String::new();
    }
    let full = if queue.full { ", FULL: the source is not read" } else { "" };
    format!("{} of {}, on disk up to {}{full}", size(queue.bytes), size(queue.limit_bytes), queue.durable_lsn)
}

fn apply_text(status: &Status) -> String {
    let apply = &status.apply;
    if apply.applied_lsn == Lsn::ZERO && !apply.paused {
        return "nothing yet".to_string();
    }
    let rate = count(apply.changes_per_second.round() as u64);
    let mut text = format!("at {}, {rate} changes/s", apply.applied_lsn);
    text.push_str(&format!("; {} in {}", counted(apply.changes, "change"), counted(apply.transactions, "transaction")));
    for (number, noun) in [
        (apply.serial_replays, "serial replay"),
        (apply.ddl_replayed, "DDL statement"),
        (apply.conflicts, "conflict"),
        (status.target.reconnects, "reconnect"),
    ] {
        if number > 0 {
            text.push_str(&format!("; {}", counted(number, noun)));
        }
    }
    if apply.paused {
        text.push_str("; PAUSED");
    }
    if apply.held {
        text.push_str("; held for a comparison");
    }
    text
}

/// The tables that are not complete, those at work first.
fn render_tables(page: &mut Page, tables: &[Table]) {
    let mut open: Vec<&Table> = tables.iter().filter(|table| table.state != TableState::Done).collect();
    if open.is_empty() {
        return;
    }
    open.sort_by_key(|table| match table.state {
        TableState::Copying => 0,
        TableState::Indexing => 1,
        TableState::Waiting | TableState::Done => 2,
    });
    let listed = &open[..open.len().min(TABLES_MAX)];
    // State, percent and both sizes take 41 columns beside the name; a narrow page has no room for the sizes.
    let sizes = page.width >= 64;
    let room = page.width - if sizes { 43 } else { 17 };
    let names: Vec<String> = listed.iter().map(|table| shorten(&table_name(table), room)).collect();
    let name_width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    page.text.push('\n');
    for (table, name) in listed.iter().zip(&names) {
        let state = table.state.name();
        let percent = percent(table.bytes_done, table.bytes_total.max(1));
        let mut line = format!("  {name:name_width$}  {state:8} {percent:3}%");
        if sizes {
            line.push_str(&format!("  {:>10} of {:>10}", size(table.bytes_done), size(table.bytes_total)));
        }
        page.text.push_str(&line);
        page.text.push('\n');
    }
    if open.len() > listed.len() {
        page.text.push_str(&format!("  and {}\n", counted((open.len() - listed.len()) as u64, "more table")));
    }
    page.text.push('\n');
}

fn render_events(page: &mut Page, status: &Status) {
    let first = status.events.len().saturating_sub(EVENTS_MAX);
    for event in &status.events[first..] {
        // The time of day; the date is in `as of`, and in the JSON.
        let time = event.time.get(11..19).unwrap_or(&event.time);
        let level = match event.level {
            Level::Info => "",
            Level::Warn => "warning: ",
            Level::Error => "error: ",
        };
        page.line(time, &format!("{level}{}", event.text));
    }
}

/// A name in at most `width` columns; its end tells more than its middle.
fn shorten(name: &str, width: usize) -> String {
    let length = name.chars().count();
    if length <= width {
        return name.to_string();
    }
    let head = (width - 1) / 2;
    let tail = width - 1 - head;
    name.chars().take(head).chain(['…']).chain(name.chars().skip(length - tail)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::{Copy, Event, Failure, Indexes, Lag, Queue, Stream};

    fn copying() -> Status {
        let mut status = Status::not_running(Phase::Copying);
        status.process_alive = true;
        status.blockers = vec!["the target does not follow yet: copying".into()];
        status.updated_at = "2026-11-20T10:16:16.000Z".into();
        status.source.description = "db1.example.org:5432/shop, PostgreSQL 15.18".into();
        status.source.retained_wal_bytes = Some(48 << 20);
        status.target.description = "db2.example.org:5432/shop, PostgreSQL 15.18".into();
        status.lag = Lag { bytes: Some(12 << 20), seconds: Some(75.0) };
        status.copy = Copy {
            tables_total: 3,
            tables_done: 1,
            bytes_total: 10 << 30,
            bytes_done: 4 << 30,
            rows_done: 12_345_678,
            bytes_per_second: 85.0 * 1048576.0,
            ..Copy::default()
        };
        let table = |name: &str, bytes_done: u64, state| Table {
            schema: "public".into(),
            name: name.into(),
            bytes_total: 6 << 30,
            bytes_done,
            rows_done: 1,
            state,
        };
        status.tables = vec![
            table("customers", 6 << 30, TableState::Done),
            table("a_table_with_a_very_long_name_that_does_not_fit", 0, TableState::Waiting),
            table("orders", 3 << 30, TableState::Copying),
        ];
        status.indexes = Indexes { total: 7, done: 2 };
        status.stream = Stream {
            connected: true,
            received_lsn: Lsn(0x16_B374_D848),
            changes: 1234,
            transactions: 1,
            reconnects: 1,
            bytes_per_second: 1536.0,
            bytes: 0,
        };
        status.queue = Queue { bytes: 12 << 20, limit_bytes: 20 << 30, ..Queue::default() };
        status.eta_seconds = Some(185.0);
        let time = "2026-11-20T10:15:09.000Z".to_string();
        status.events.push(Event { time, level: Level::Warn, text: "the source went away".into() });
        status
    }

    #[test]
    fn a_status_at_eighty_columns() {
        let expected = r#"phase     copying, 3m 05s left
source    db1.example.org:5432/shop, PostgreSQL 15.18
target    db2.example.org:5432/shop, PostgreSQL 15.18
lag       12.0 MiB, 1m 15s
copy      1 of 3 tables, 4.0 GiB of 10.0 GiB (40%), 12,345,678 rows, 85.0 MiB/s
indexes   2 of 7 built
stream    connected, at 16/B374D848, 1.5 KiB/s; 1,234 changes in 1 transaction;
          1 reconnect; the source keeps 48.0 MiB of WAL
queue     12.0 MiB of 20.0 GiB, on disk up to 0/0
apply     nothing yet
cutover   not yet: the target does not follow yet: copying

  public.orders                          copying   50%     3.0 GiB of    6.0 GiB
  public.a_table_wit…_that_does_not_fit  waiting    0%         0 B of    6.0 GiB

10:15:09  warning: the source went away
as of     2026-11-20T10:16:16.000Z
"#;
        assert_eq!(render(&copying(), 80), expected);
    }

    #[test]
    fn a_status_at_forty_columns() {
        let expected = r#"phase     copying, 3m 05s left
source    db1.example.org:5432/shop,
          PostgreSQL 15.18
target    db2.example.org:5432/shop,
          PostgreSQL 15.18
lag       12.0 MiB, 1m 15s
copy      1 of 3 tables, 4.0 GiB of
          10.0 GiB (40%), 12,345,678
          rows, 85.0 MiB/s
indexes   2 of 7 built
stream    connected, at 16/B374D848,
          1.5 KiB/s; 1,234 changes in 1
          transaction; 1 reconnect; the
          source keeps 48.0 MiB of WAL
queue     12.0 MiB of 20.0 GiB, on disk
          up to 0/0
apply     nothing yet
cutover   not yet: the target does not
          follow yet: copying

  public.orders            copying   50%
  public.a_ta…oes_not_fit  waiting    0%

10:15:09  warning: the source went away
as of     2026-11-20T10:16:16.000Z
"#;
        assert_eq!(render(&copying(), 40), expected);
    }

    #[test]
    fn no_line_is_wider_than_the_page_at_any_width() {
        let mut status = copying();
        status.error = Some(Failure { kind: "gap".into(), message: "a b ".repeat(60), hint: Some("c d ".repeat(60)) });
        // "db1.example.org:5432/shop," is 26 columns after its label.
        for width in 40..200 {
            for line in render(&status, width).lines() {
                assert!(line.chars().count() <= width, "{width}: {line:?}");
                assert_eq!(line.trim_end(), line, "no trailing blanks");
            }
        }
        assert_eq!(render(&status, 0), render(&status, WIDTH_MIN));
    }

    #[test]
    fn many_tables_are_counted_and_those_at_work_come_first() {
        let mut status = copying();
        let (waiting, working) = (status.tables[1].clone(), status.tables[2].clone());
        status.tables = vec![waiting; 20];
        status.tables.push(working);
        let text = render(&status, 80);
        assert!(text.contains("  and 9 more tables\n"), "{text}");
        let first = text.lines().find(|line| line.starts_with("  p")).unwrap();
        assert!(first.trim_start().starts_with("public.orders"), "{first}");
    }

    #[test]
    fn what_stands_in_the_way_and_what_failed_is_said() {
        let mut status = copying();
        status.process_alive = false;
        status.error =
            Some(Failure { kind: "gap".into(), message: "the slot is gone".into(), hint: Some("start over".into()) });
        let text = render(&status, 80);
        assert!(text.contains("phase     copying, 3m 05s left; the process is not running\n"), "{text}");
        assert!(text.contains("error     the slot is gone\nnext      start over\n"), "{text}");
        status.error = None;
        status.ready_to_cutover = true;
        assert!(render(&status, 80).contains("cutover   ready\n"));
    }

    #[test]
    fn one_line_says_what_matters_in_each_phase() {
        let mut status = copying();
        let line = "copying: 1 of 3 tables, 4.0 GiB of 10.0 GiB (40%), 85.0 MiB/s, 3m 05s left";
        assert_eq!(one_line(&status), line);
        status.eta_seconds = None;
        status.phase = Phase::Indexing;
        assert_eq!(one_line(&status), "indexing: 2 of 7 index builds");
        status.phase = Phase::Following;
        status.apply.changes_per_second = 1234.4;
        assert_eq!(one_line(&status), "following: lag 12.0 MiB, 1m 15s, 1,234 changes/s");
        status.queue.full = true;
        status.stream.connected = false;
        assert!(one_line(&status).ends_with("changes/s, queue full, source not connected"));
        status = Status::not_running(Phase::Preparing);
        assert_eq!(one_line(&status), "preparing");
        status.apply.paused = true;
        assert_eq!(one_line(&status), "preparing: apply paused");
    }
}
