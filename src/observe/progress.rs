//! The progress of a running migration: bars on a terminal, lines in a log elsewhere.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::task::AbortHandle;

use crate::observe::board::StatusBoard;
use crate::observe::format::{percent, size, size_rate};
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
            let task = tokio::spawn(log_lines(board));
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
    let mut lines = Lines { phase: board.phase(), logged_at: Instant::now() };
    loop {
        interval.tick().await;
        if lines.is_due(board.phase(), Instant::now()) {
            tracing::info!("{}", one_line(&board.snapshot()));
        }
    }
}

/// When the next line of progress is due.
struct Lines {
    phase: Phase,
    logged_at: Instant,
}

impl Lines {
    /// Whether a line is due now; the next is due a change of phase or [`LINE_INTERVAL`] later.
    fn is_due(&mut self, phase: Phase, now: Instant) -> bool {
        let due = phase != self.phase || now.saturating_duration_since(self.logged_at) >= LINE_INTERVAL;
        if due {
            *self = Lines { phase, logged_at: now };
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
                        "  {prefix:28!} {wide_bar} {percent:>3}% {binary_total_bytes:>10} {binary_bytes_per_sec:>12} {eta:>4}",
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
        total.set_message(format!(
            "{percent:>3}% {:>10} {:>12}",
            size(copy.bytes_total),
            size_rate(copy.bytes_per_second)
        ));
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
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ ")
}
