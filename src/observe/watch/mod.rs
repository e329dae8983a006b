//! `walferry status --watch`: the status of a migration as a view that fills the terminal.
//!
//! ```text
//!  Status, once a second ──► Shown ──► draw: header, phases, figures, notice, copy, plots, events ──► Screen ──► terminal
//!  keys, new sizes ────────────────────────────────▲
//! ```
//!
//! It shows what the page in a browser shows, from the same [`Status`], and only reads. What does not fit is left out from the least
//! important up; a terminal that is too small for any of it gets the lines that `walferry status` prints.

mod history;
mod panels;
mod screen;
mod text;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Text};

use crate::observe::history::Point;
use crate::observe::render;
use crate::observe::status::{Direction, Phase, Status, TableState};
use history::History;

pub use screen::{Screen, Signal};
pub use text::Look;

/// Below this a view with panels shows less than plain lines do.
const WIDTH_MIN: u16 = 50;
const HEIGHT_MIN: u16 = 14;

/// What is shown.
#[derive(Debug, Default)]
pub struct Shown {
    status: Option<Status>,
    /// Why nothing newer is known.
    silent: Option<String>,
    history: History,
    /// The furthest phase that was seen, for a migration that fails later.
    reached: Option<Phase>,
    /// The state directory, as commands take it.
    directory: String,
}

impl Shown {
    /// Nothing yet, of the migration in this state directory.
    pub fn new(directory: impl Into<String>) -> Shown {
        Shown { directory: directory.into(), ..Shown::default() }
    }

    /// Takes what the migration remembers of the last hour, before anything else: what the page's plots begin with, too.
    pub fn remember(&mut self, points: &[Point]) {
        self.history.remember(points);
    }

    /// Takes a new status.
    pub fn take(&mut self, status: Status) {
        self.history.add(&status);
        if status.phase != Phase::Failed {
            self.reached = Some(status.phase);
        }
        (self.status, self.silent) = (Some(status), None);
    }

    /// There is no new status, and why: what was known stays.
    pub fn take_silence(&mut self, why: impl Into<String>) {
        self.history.add_gap();
        self.silent = Some(why.into());
    }

    /// The newest status.
    pub fn status(&self) -> Option<&Status> {
        self.status.as_ref()
    }
}

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, shown: &Shown, look: Look) {
    let area = frame.area();
    match &shown.status {
        None => waiting(frame, area, shown),
        Some(status) if area.width < WIDTH_MIN || area.height < HEIGHT_MIN => {
            let lines = render::render(status, usize::from(area.width));
            frame.render_widget(Text::raw(lines), area);
        }
        Some(status) => panes(frame, area, shown, status),
    }
    look.apply(frame.buffer_mut());
}

fn waiting(frame: &mut Frame<'_>, area: Rect, shown: &Shown) {
    let why = shown.silent.as_deref().unwrap_or("waiting for the migration …");
    frame.render_widget(Line::styled(format!(" {why}"), Style::new().fg(Color::Yellow)), area);
}

fn panes(frame: &mut Frame<'_>, area: Rect, shown: &Shown, status: &Status) {
    let figures_height = panels::figures_height(area.width);
    let [header, phases, figures, rest, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(figures_height),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    panels::header(frame, header, shown, status);
    panels::phases(frame, phases, shown, status);
    panels::figures(frame, figures, status);
    panels::footer(frame, footer, shown, status);

    let notice = panels::notice(shown, status, usize::from(rest.width.saturating_sub(4)));
    let heights = share_out(rest.height, notice.lines.len(), copy_lines(status), status.events.len());
    let [at_notice, at_copy, at_plots, at_events] =
        Layout::vertical([heights.notice, heights.copy, heights.plots, heights.events].map(Constraint::Length))
            .areas(rest);
    panels::draw_notice(frame, at_notice, notice);
    panels::copy(frame, at_copy, status);
    panels::plots(frame, at_plots, shown, status);
    panels::events(frame, at_events, status);
}

/// How many rows each panel gets; 0 for one that there is no room for, or nothing to show in.
#[derive(Debug, PartialEq)]
struct Heights {
    notice: u16,
    copy: u16,
    plots: u16,
    events: u16,
}

/// A border above and below.
const BORDERS: u16 = 2;

/// First what somebody has to know, then the copy while there is one, then what happened, then the plots; what is left over goes to the
/// plots up to a good height, to the tables, and to the events.
fn share_out(total: u16, notice: usize, copy: usize, events: usize) -> Heights {
    const PLOTS_MIN: u16 = 5;
    const PLOTS_MAX: u16 = 10;
    let rows =
        |lines: usize| if lines == 0 { 0 } else { u16::try_from(lines).unwrap_or(u16::MAX).saturating_add(BORDERS) };
    let mut left = total;
    let mut take = |wanted: u16, least: u16| {
        let taken = if left < least { 0 } else { wanted.min(left) };
        left -= taken;
        taken
    };
    let notice = take(rows(notice).min((total / 2).max(4)), 3);
    let copy_wanted = rows(copy);
    let mut copy = if copy_wanted > 0 { take(copy_wanted.min(8), 3) } else { 0 };
    let mut plots = take(PLOTS_MIN, PLOTS_MIN + 3);
    let mut events_height = take(rows(events.max(1)).min(6), 3);
    copy += take(copy_wanted.saturating_sub(copy).min(14), 1);
    if plots > 0 {
        plots += take(PLOTS_MAX - PLOTS_MIN, 1);
    }
    // The last panel reaches the bottom, whether it has something to say or not.
    let rest = take(u16::MAX, 0);
    if events_height > 0 {
        events_height += rest
    } else if plots > 0 {
        plots += rest
    } else {
        copy += rest
    }
    Heights { notice, copy, plots, events: events_height }
}

/// How many lines there are to say of the copy: none when it is over, or never was.
fn copy_lines(status: &Status) -> usize {
    let open = status.tables.iter().filter(|table| table.state != TableState::Done).count();
    let over = status.direction == Direction::Back || status.copy.tables_total == 0 || status.phase >= Phase::Following;
    if over && open == 0 || status.direction == Direction::Back { 0 } else { 3 + open }
}

#[cfg(test)]
mod tests;
