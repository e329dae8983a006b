//! The status as plain text: what `walferry status` prints, and the one line of a running migration.

use crate::observe::format::{count, counted, duration, percent, printable, size, size_rate};
use crate::observe::status::{Level, Phase, Status, Table, TableState};

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
    page.line("copy", &copy_text(status));
    if status.indexes.total > 0 {
        let (done, total) = (count(status.indexes.done), count(status.indexes.total));
        page.line("indexes", &format!("{done} of {total} built"));
    }
    page.line("stream", &stream_text(status));
    page.line("queue", &queue_text(status));
    page.line("apply", &apply_text(status));
    if let Some(error) = &status.error {
        page.line("error", &error.message);
        page.line("next", error.hint.as_deref().unwrap_or_default());
    } else if status.ready_to_cutover {
        page.line("cutover", "ready");
    } else {
        page.line("cutover", &format!("not yet: {}", status.blockers.join("; ")));
    }
    render_tables(&mut page, &status.tables);
    render_events(&mut page, status);
    page.line("as of", &status.updated_at);
    page.text
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
        (!status.stream.connected && status.phase > Phase::Preparing, "source not connected"),
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
        for word in text.split_whitespace() {
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
            self.text.push_str(word);
            column += word_width;
        }
        if column > 0 {
            self.text.push('\n');
        }
    }
}

fn phase_text(status: &Status) -> String {
    let mut text = status.phase.title().to_string();
    if let Some(seconds) = status.eta_seconds {
        text.push_str(&format!(", {} left", duration(seconds)));
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

fn copy_text(status: &Status) -> String {
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
    let pace = if copy.paused { "paused".to_string() } else { size_rate(copy.bytes_per_second) };
    format!("{tables_done} of {tables}, {done} of {total} ({percent}%), {rows}, {pace}")
}

fn stream_text(status: &Status) -> String {
    let stream = &status.stream;
    let connected = if stream.connected { "connected" } else { "not connected" };
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
    let full = if queue.full { ", FULL: the source is not read" } else { "" };
    format!("{} of {}, on disk up to {}{full}", size(queue.bytes), size(queue.limit_bytes), queue.durable_lsn)
}

fn apply_text(status: &Status) -> String {
    let apply = &status.apply;
    let rate = count(apply.changes_per_second.round() as u64);
    let mut text = format!("at {}, {rate} changes/s", apply.applied_lsn);
    text.push_str(&format!("; {} in {}", counted(apply.changes, "change"), counted(apply.transactions, "transaction")));
    for (number, noun) in [
        (apply.serial_replays, "serial replay"),
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
