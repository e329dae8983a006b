//! The progress of a running migration: bars on a terminal, lines in a log elsewhere.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::task::AbortHandle;
use tracing::Instrument;

use crate::observe::board::StatusBoard;
use crate::observe::format::{duration, percent, size, size_rate};
use crate::observe::locale::speaks_utf8;
use crate::observe::logging::LogFormat;
use crate::observe::render::{one_line, table_name};
use crate::observe::status::{Phase, Status, TableState};

/// How often bars are brought up to date, and a change of phase is looked for.
const REFRESH: Duration = Duration::from_millis(200);
/// How often a line of progress is logged where there are no bars.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// How progress is shown.
#[derive(Clone, Debug)]
pub enum ProgressMode {
    /// Bars on a terminal, drawn with what [`crate::observe::logging::init`] returned.
    Bars {
        /// What they are drawn with.
        bars: MultiProgress,
        /// How many tables have a bar at a time: the number of copy jobs.
        tables_max: usize,
    },
    /// A log line every 30 seconds and at every change of phase.
    Lines,
    /// Nothing.
    Off,
}

impl ProgressMode {
    /// Bars where stderr is a terminal that can move its cursor and the log is for people, otherwise lines.
    pub fn detect(format: LogFormat, bars: MultiProgress, copy_jobs: usize) -> ProgressMode {
        let dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        match format {
            LogFormat::Text if std::io::stderr().is_terminal() && !dumb => {
                ProgressMode::Bars { bars, tables_max: copy_jobs.max(1) }
            }
            _ => ProgressMode::Lines,
        }
    }
}

/// Running progress. When it is dropped, the bars are gone from the terminal.
#[derive(Debug)]
pub struct ProgressTask {
    task: Option<AbortHandle>,
    bars: Arc<Mutex<Option<Bars>>>,
}

impl Drop for ProgressTask {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        // An update that is under way holds the lock; none can come after this.
        if let Some(bars) = self.bars.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bars.clear();
        }
    }
}

/// Shows the progress of a board until the returned guard is dropped. Needs a tokio runtime.
pub fn start(board: StatusBoard, mode: ProgressMode) -> ProgressTask {
    match mode {
        ProgressMode::Off => ProgressTask { task: None, bars: Arc::default() },
        ProgressMode::Lines => {
            let task = tokio::spawn(log_lines(board).in_current_span());
            ProgressTask { task: Some(task.abort_handle()), bars: Arc::default() }
        }
        ProgressMode::Bars { bars, tables_max } => {
            let bars = Arc::new(Mutex::new(Some(Bars::new(bars, tables_max))));
            let shown = Arc::clone(&bars);
            let task = tokio::spawn(async move {
                let mut interval = tokio::time::interval(REFRESH);
                interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
                loop {
                    interval.tick().await;
                    let status = board.snapshot();
                    if let Some(bars) = shown.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                        bars.update(&status);
                    }
                }
            });
            ProgressTask { task: Some(task.abort_handle()), bars }
        }
    }
}

async fn log_lines(board: StatusBoard) {
    let mut interval = tokio::time::interval(REFRESH);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut lines = LineSchedule { phase: board.phase(), logged_at: Instant::now() };
    loop {
        interval.tick().await;
        if lines.is_due(board.phase(), Instant::now()) {
            tracing::info!("{}", one_line(&board.snapshot()));
        }
    }
}

/// When the next line of progress is due.
struct LineSchedule {
    phase: Phase,
    logged_at: Instant,
}

impl LineSchedule {
    /// Whether a line is due now; the next is due a change of phase or [`LINE_INTERVAL`] later.
    fn is_due(&mut self, phase: Phase, now: Instant) -> bool {
        let due = phase != self.phase || now.saturating_duration_since(self.logged_at) >= LINE_INTERVAL;
        if due {
            *self = LineSchedule { phase, logged_at: now };
        }
        due
    }
}

/// A bar for each table at work, one for the whole copy, and a live line below.
#[derive(Debug)]
struct Bars {
    bars: MultiProgress,
    tables_max: usize,
    /// By the table's place in the status, which never changes.
    tables: BTreeMap<usize, ProgressBar>,
    total: Option<ProgressBar>,
    line: ProgressBar,
}

impl Bars {
    fn new(bars: MultiProgress, tables_max: usize) -> Bars {
        let line = bars.add(ProgressBar::no_length().with_style(style("{spinner} {wide_msg}")));
        Bars { bars, tables_max, tables: BTreeMap::new(), total: None, line }
    }

    fn update(&mut self, status: &Status) {
        self.update_tables(status);
        self.update_total(status);
        self.line.set_message(one_line(status));
        self.line.tick();
    }

    fn update_tables(&mut self, status: &Status) {
        let copying = |place: usize| {
            status.phase == Phase::Copying
                && status.tables.get(place).is_some_and(|table| table.state == TableState::Copying)
        };
        let bars = &self.bars;
        self.tables.retain(|place, bar| {
            let keep = copying(*place);
            if !keep {
                bar.finish_and_clear();
                bars.remove(bar);
            }
            keep
        });
        for place in 0..status.tables.len() {
            if self.tables.len() >= self.tables_max {
                break;
            }
            if copying(place) && !self.tables.contains_key(&place) {
                let bar = ProgressBar::no_length()
                    .with_style(style(
                        "  {prefix:28!} {wide_bar} {percent:>3}% {binary_total_bytes:>10} {binary_bytes_per_sec:>12} {eta:>7}",
                    ))
                    .with_prefix(table_name(&status.tables[place]));
                // A table that was begun by an earlier process, or before there was room: no rate out of the past.
                bar.set_position(status.tables[place].bytes_done);
                bar.reset_eta();
                self.tables.insert(place, self.bars.insert_before(self.total.as_ref().unwrap_or(&self.line), bar));
            }
        }
        for (place, bar) in &self.tables {
            bar.set_length(status.tables[*place].bytes_total);
            bar.set_position(status.tables[*place].bytes_done);
        }
    }

    fn update_total(&mut self, status: &Status) {
        if status.phase != Phase::Copying {
            if let Some(total) = self.total.take() {
                total.finish_and_clear();
                self.bars.remove(&total);
            }
            return;
        }
        let copy = &status.copy;
        let total = self.total.get_or_insert_with(|| {
            let bar =
                ProgressBar::no_length().with_style(style("  {prefix:28!} {wide_bar} {msg}")).with_prefix("all tables");
            self.bars.insert_before(&self.line, bar)
        });
        total.set_length(copy.bytes_total.max(1));
        total.set_position(copy.bytes_done);
        let percent = percent(copy.bytes_done, copy.bytes_total);
        let (size, rate) = (size(copy.bytes_total), size_rate(copy.bytes_per_second));
        // As wide as what follows the bar of a table, so that the bars stand under each other.
        let eta = status.eta_seconds.map_or_else(String::new, duration);
        total.set_message(format!("{percent:>3}% {size:>10} {rate:>12} {eta:>7}"));
    }

    fn clear(&self) {
        for bar in self.tables.values().chain(&self.total).chain([&self.line]) {
            bar.finish_and_clear();
        }
        // A terminal that is gone has nothing to clear.
        let _ = self.bars.clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are the constants above, and a test draws each of them; a wrong one falls back to a plain bar.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    if speaks_utf8() { style.progress_chars("━╸ ") } else { style.progress_chars("=> ").tick_chars("|/-\\ ") }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;
    use crate::observe::logging::{AboveBars, filter, subscriber};

    /// A terminal of 100 columns that understands what indicatif sends, without end at the bottom.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<Lines>>);

    #[derive(Debug)]
    struct Lines {
        lines: Vec<Vec<char>>,
        row: usize,
        column: usize,
    }

    impl Default for Lines {
        fn default() -> Lines {
            Lines { lines: vec![Vec::new()], row: 0, column: 0 }
        }
    }

    impl Lines {
        fn put(&mut self, text: &str) {
            for character in text.chars() {
                match character {
                    '\n' => {
                        (self.row, self.column) = (self.row + 1, 0);
                        if self.lines.len() <= self.row {
                            self.lines.push(Vec::new());
                        }
                    }
                    '\r' => self.column = 0,
                    character => {
                        // What follows the last column begins the next line, but only once it comes.
                        if self.column == 100 {
                            self.put("\n");
                        }
                        let line = &mut self.lines[self.row];
                        if line.len() <= self.column {
                            line.resize(self.column + 1, ' ');
                        }
                        line[self.column] = character;
                        self.column += 1;
                    }
                }
            }
        }
    }

    impl Screen {
        fn text(&self) -> Vec<String> {
            let lines = self.0.lock().unwrap();
            let lines = lines.lines.iter().map(|line| line.iter().collect::<String>().trim_end().to_string());
            lines.filter(|line| !line.is_empty()).collect()
        }

        fn with(&self, change: impl FnOnce(&mut Lines)) -> io::Result<()> {
            change(&mut self.0.lock().unwrap());
            Ok(())
        }

        fn bars(&self) -> MultiProgress {
            MultiProgress::with_draw_target(ProgressDrawTarget::term_like(Box::new(self.clone())))
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            100
        }

        fn move_cursor_up(&self, rows: usize) -> io::Result<()> {
            self.with(|lines| lines.row = lines.row.saturating_sub(rows))
        }

        fn move_cursor_down(&self, rows: usize) -> io::Result<()> {
            self.with(|lines| lines.row = (lines.row + rows).min(lines.lines.len() - 1))
        }

        fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
            self.with(|lines| lines.column += columns)
        }

        fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
            self.with(|lines| lines.column = lines.column.saturating_sub(columns))
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.with(|lines| {
                lines.put(text);
                lines.put("\n");
            })
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.with(|lines| lines.put(text))
        }

        fn clear_line(&self) -> io::Result<()> {
            self.with(|lines| {
                let row = lines.row;
                lines.lines[row].clear();
                lines.column = 0;
            })
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            self.with(|lines| lines.put(&text)).map(|()| bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn copying_three_of_four_tables() -> StatusBoard {
        let board = StatusBoard::new();
        board.set_phase(Phase::Copying);
        for (relid, name) in [(1, "customers"), (2, "orders"), (3, "items"), (4, "waiting")] {
            let table = board.add_table(relid, "public", name, 1000 << 20);
            if relid < 4 {
                table.set_state(TableState::Copying);
                table.add_recorded(u64::from(relid) * (100 << 20), 1);
            }
        }
        board
    }

    /// Updates are drawn at most some times a second: only what is forced is certain to be seen.
    fn update(bars: &mut Bars, board: &StatusBoard) {
        bars.update(&board.snapshot());
        for bar in bars.tables.values().chain(&bars.total).chain([&bars.line]) {
            bar.force_draw();
        }
    }

    #[test]
    fn tables_at_work_have_bars_and_the_total_and_the_live_line_come_below() {
        let (screen, board) = (Screen::default(), copying_three_of_four_tables());
        let mut bars = Bars::new(screen.bars(), 2);
        update(&mut bars, &board);
        let text = screen.text();
        assert_eq!(text.len(), 4, "two copy jobs, the total, the line: {text:#?}");
        assert!(text[0].contains("public.customers") && text[0].contains("10%"), "{text:#?}");
        assert!(text[0].contains("1000.00 MiB"), "{text:#?}");
        assert!(text[1].contains("public.orders") && text[1].contains("20%"), "{text:#?}");
        assert!(text[2].contains("all tables") && text[2].contains("15%"), "{text:#?}");
        assert!(text[3].contains("copying: 0 of 4 tables, 600.0 MiB of 3.9 GiB"), "{text:#?}");

        board.table(1).unwrap().set_state(TableState::Indexing);
        update(&mut bars, &board);
        let text = screen.text();
        assert_eq!(text.len(), 4, "{text:#?}");
        assert!(text[0].contains("public.orders") && text[1].contains("public.items"), "{text:#?}");

        board.set_phase(Phase::Following);
        update(&mut bars, &board);
        let text = screen.text();
        assert_eq!(text.len(), 1, "only the live line is left: {text:#?}");
        assert!(text[0].contains("following: lag unknown, 0 changes/s"), "{text:#?}");
        bars.clear();
        assert_eq!(screen.text(), [""; 0]);
    }

    #[test]
    fn log_lines_pass_above_the_bars_and_tear_none() {
        let (screen, board) = (Screen::default(), copying_three_of_four_tables());
        let shared = screen.bars();
        let mut bars = Bars::new(shared.clone(), 3);
        update(&mut bars, &board);
        let output = screen.clone();
        let writer = AboveBars { bars: shared, output: move || output.clone() };
        let subscriber = subscriber(LogFormat::Text, false, filter(None).unwrap(), writer);
        tracing::subscriber::with_default(subscriber, || {
            for number in 0..20 {
                tracing::info!("event {number}");
                update(&mut bars, &board);
            }
        });
        let text = screen.text();
        assert_eq!(text.len(), 25, "twenty lines, three tables, the total, the live line: {text:#?}");
        for (number, line) in text[..20].iter().enumerate() {
            assert!(line.ends_with(&format!("Z info  event {number}")), "{text:#?}");
        }
        for (line, begin) in text[20..23].iter().zip(["customers", "orders", "items"]) {
            assert!(line.starts_with(&format!("  public.{begin}")), "{text:#?}");
        }
    }

    #[tokio::test]
    async fn nothing_is_drawn_after_progress_was_dropped() {
        let screen = Screen::default();
        let progress = start(copying_three_of_four_tables(), ProgressMode::Bars { bars: screen.bars(), tables_max: 2 });
        // The first update comes at once; wait until it is seen, however long that takes.
        while screen.text().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(progress);
        assert_eq!(screen.text(), [""; 0]);
    }

    #[test]
    fn a_line_is_due_at_a_change_of_phase_and_every_thirty_seconds() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut lines = LineSchedule { phase: Phase::Copying, logged_at: start };
        assert!(!lines.is_due(Phase::Copying, at(29)));
        assert!(lines.is_due(Phase::Copying, at(30)));
        assert!(!lines.is_due(Phase::Copying, at(31)));
        assert!(lines.is_due(Phase::Indexing, at(32)));
        assert!(!lines.is_due(Phase::Indexing, at(61)));
        assert!(lines.is_due(Phase::Indexing, at(62)));
    }
}
