//! The panels of the view, from the top of the terminal to its bottom.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, BorderType, Padding, Sparkline};

use super::history::Measure;
use super::text::{cut, cut_middle, filled, width, wrapped};
use super::{Shown, TableState};
use crate::observe::format::{count, duration, percent, printable, size, size_rate};
use crate::observe::render::{HOW_TO_GO_ON, copy_text, table_name};
use crate::observe::status::{Direction, Level, Phase, Status, Table, WayBack};

const ACCENT: Color = Color::Cyan;
const GOOD: Color = Color::Green;
const WARN: Color = Color::Yellow;
const BAD: Color = Color::Red;
const MUTED: Color = Color::DarkGray;

/// Columns that a figure takes at least.
const FIGURE_WIDTH: u16 = 13;
/// Columns that a plot takes at least.
const PLOT_WIDTH: u16 = 27;

/// What somebody wants to know who looks at a cutover.
const HOW_IT_ENDS: &str = "Writers are held, or about to be. It ends by itself: switched, or given up after --timeout and --max-write-stall, and then it follows as before.";

fn muted() -> Style {
    Style::new().fg(MUTED)
}

fn bold(colour: Color) -> Style {
    Style::new().fg(colour).add_modifier(Modifier::BOLD)
}

fn panel<'a>(title: impl Into<String>) -> Block<'a> {
    let title = Line::styled(format!(" {} ", title.into()), bold(Color::Reset));
    Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(muted())
        .title(title)
        .padding(Padding::horizontal(1))
}

/// Where from, where to, and of when this is.
pub(super) fn header(frame: &mut Frame<'_>, area: Rect, shown: &Shown, status: &Status) {
    let time = status.updated_at.get(11..19).unwrap_or(&status.updated_at);
    let (right, style) = match (&shown.silent, status.process_alive) {
        (Some(why), _) => (cut(why, usize::from(area.width) / 3), bold(WARN)),
        (None, false) => (format!("not running since {time} UTC"), bold(WARN)),
        (None, true) => (format!("{time} UTC"), muted()),
    };
    let without_version = |text: &str| text.split(", ").next().unwrap_or_default().to_owned();
    let mut ends = [status.source.description.clone(), status.target.description.clone()];
    let mut name = " walferry  ";
    let room = |name: &str| usize::from(area.width).saturating_sub(width(name) + width(" → ") + width(&right) + 3);
    let taken = |ends: &[String; 2]| width(&ends[0]) + width(&ends[1]);
    if taken(&ends) > room(name) {
        ends = ends.map(|end| without_version(&end));
    }
    if taken(&ends) > room(name) {
        name = " ";
    }
    if taken(&ends) > room(name) {
        ends = ends.map(|end| cut_middle(&end, room(name) / 2));
    }
    let [source, target] = ends;
    let line = Line::from(vec![
        Span::styled(name, bold(ACCENT)),
        Span::raw(printable(&source)),
        Span::styled(" → ", muted()),
        Span::raw(printable(&target)),
    ]);
    frame.render_widget(line, area);
    frame.render_widget(Line::styled(format!("{right} "), style).alignment(Alignment::Right), area);
}

/// The phases that a migration goes through when nothing fails.
const WAY: [Phase; 7] = [
    Phase::Preparing,
    Phase::Copying,
    Phase::Indexing,
    Phase::CatchingUp,
    Phase::Following,
    Phase::CuttingOver,
    Phase::CutOver,
];

/// How far it is.
pub(super) fn phases(frame: &mut Frame<'_>, area: Rect, shown: &Shown, status: &Status) {
    let reached = shown.reached.unwrap_or(status.phase);
    let at = WAY.iter().position(|phase| *phase == reached).unwrap_or(WAY.len());
    let current = match status.phase {
        Phase::Failed => ("✘", format!("{}: failed", shown.reached.map_or("migration", Phase::title)), bold(BAD)),
        Phase::Reversed => ("✔", "switched back".to_owned(), bold(GOOD)),
        Phase::CutOver => ("✔", "cut over".to_owned(), bold(GOOD)),
        phase => ("●", phase.title().to_owned(), bold(ACCENT)),
    };
    let current = Span::styled(format!("{} {}", current.0, current.1), current.2);
    // All steps by name, with marks where there is room; else the one at work, and how many there are.
    for (past, future, between) in [("✔ ", "○ ", "   "), ("", "", "  "), ("", "", " ")] {
        let mut spans = vec![Span::raw(" ")];
        for (place, phase) in WAY.iter().enumerate() {
            if place > 0 {
                spans.push(Span::raw(between));
            }
            spans.push(match place.cmp(&at) {
                std::cmp::Ordering::Less => Span::styled(format!("{past}{}", phase.title()), Style::new().fg(GOOD)),
                std::cmp::Ordering::Equal => current.clone(),
                std::cmp::Ordering::Greater => Span::styled(format!("{future}{}", phase.title()), muted()),
            });
        }
        if at == WAY.len() {
            spans.extend([Span::raw(between), current.clone()]);
        }
        let line = Line::from(spans);
        if line.width() <= usize::from(area.width) {
            return frame.render_widget(line, area);
        }
    }
    let step = if at < WAY.len() { format!("  step {} of {}", at + 1, WAY.len()) } else { String::new() };
    frame.render_widget(Line::from(vec![Span::raw(" "), current, Span::styled(step, muted())]), area);
}

/// A number that matters, and what to make of it.
struct Figure {
    title: &'static str,
    value: String,
    style: Style,
    note: String,
}

fn figures_of(status: &Status) -> [Figure; 6] {
    let back = status.direction == Direction::Back;
    let lag = status.lag.seconds;
    let of_lag = match lag {
        Some(seconds) if seconds > 60.0 => bold(BAD),
        Some(seconds) if seconds > 10.0 => bold(WARN),
        Some(_) => bold(GOOD),
        None => Style::new(),
    };
    let (ready, of_ready) = match (status.ready_to_cutover, status.phase) {
        (true, _) => ("ready", bold(GOOD)),
        (false, Phase::CutOver | Phase::Reversed) => ("done", bold(GOOD)),
        (false, Phase::CuttingOver) => ("running", bold(WARN)),
        (false, _) => ("not yet", Style::new().add_modifier(Modifier::BOLD)),
    };
    let queue = &status.queue;
    let of_queue = match queue.limit_bytes {
        _ if queue.full => bold(BAD),
        limit if limit > 0 && queue.bytes > limit / 5 * 4 => bold(WARN),
        _ => Style::new().add_modifier(Modifier::BOLD),
    };
    let wal = (status.source.retained_wal_bytes, status.source.wal_max_bytes);
    let verified = status.verification.as_ref();
    [
        Figure {
            title: "Behind",
            value: lag.map_or_else(|| "–".to_owned(), duration),
            style: of_lag,
            note: status.lag.bytes.map_or_else(String::new, |bytes| format!("{} WAL", size(bytes))),
        },
        Figure {
            title: if back { "Switchback" } else { "Cutover" },
            value: ready.to_owned(),
            style: of_ready,
            note: status
                .cutover
                .expected_downtime_ms
                .map_or_else(String::new, |ms| format!("~{} wait", duration(ms / 1000.0))),
        },
        Figure {
            title: "Applied",
            value: format!("{}/s", count(status.apply.changes_per_second.round() as u64)),
            style: if status.apply.paused { bold(WARN) } else { Style::new().add_modifier(Modifier::BOLD) },
            note: if status.apply.paused {
                "paused".to_owned()
            } else if !status.stream.connected && status.process_alive && status.phase > Phase::Preparing {
                "no source".to_owned()
            } else {
                format!("{} txn/s", count(status.apply.transactions_per_second.round() as u64))
            },
        },
        Figure {
            title: "Queue",
            value: size(queue.bytes),
            style: of_queue,
            note: match queue.limit_bytes {
                _ if queue.full => "FULL".to_owned(),
                0 => String::new(),
                limit => format!("of {}", size(limit)),
            },
        },
        Figure {
            title: "WAL kept",
            value: wal.0.map_or_else(|| "–".to_owned(), size),
            style: if status.source.too_much_wal().is_some() {
                bold(BAD)
            } else {
                Style::new().add_modifier(Modifier::BOLD)
            },
            note: wal.1.map_or_else(|| "by source".to_owned(), |most| format!("max {}", size(most))),
        },
        Figure {
            title: "Compared",
            value: verified.map_or("not yet", |verified| if verified.equal { "equal" } else { "DIFFERENT" }).to_owned(),
            style: verified.map_or(Style::new(), |verified| bold(if verified.equal { GOOD } else { BAD })),
            note: verified.map_or_else(String::new, |verified| format!("{} ago", duration(verified.age_seconds))),
        },
    ]
}

fn figures_in_a_row(columns: u16) -> u16 {
    if columns.saturating_sub(4) >= 6 * FIGURE_WIDTH - 2 { 6 } else { 3 }
}

/// Rows that the figures take in a terminal of so many columns.
pub(super) fn figures_height(columns: u16) -> u16 {
    2 + 3 * 6 / figures_in_a_row(columns)
}

/// The figures, six beside each other or three above three.
pub(super) fn figures(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let block =
        Block::bordered().border_type(BorderType::Rounded).border_style(muted()).padding(Padding::horizontal(1));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let in_a_row = figures_in_a_row(area.width);
    for (place, figure) in (0u16..).zip(figures_of(status)) {
        let column = inner.width / in_a_row;
        let at = Rect {
            x: inner.x + place % in_a_row * column,
            y: inner.y + place / in_a_row * 3,
            width: column.saturating_sub(1),
            height: 3,
        };
        let room = usize::from(at.width);
        let lines = vec![
            Line::styled(figure.title, muted()),
            Line::styled(cut(&figure.value, room), figure.style),
            Line::styled(cut(&figure.note, room), muted()),
        ];
        frame.render_widget(Text::from(lines), at.intersection(inner));
    }
}

/// What somebody has to know now.
pub(super) struct Notice {
    title: &'static str,
    colour: Color,
    pub lines: Vec<Line<'static>>,
}

impl Notice {
    fn say(&mut self, columns: usize, style: Style, first: &str, text: &str) {
        for (place, line) in wrapped(text, columns.saturating_sub(width(first))).into_iter().enumerate() {
            let lead = if place == 0 { first.to_owned() } else { " ".repeat(width(first)) };
            self.lines.push(Line::from(vec![Span::styled(lead, muted()), Span::styled(line, style)]));
        }
    }
}

/// What somebody has to know now, the worst first, and what can be done.
pub(super) fn notice(shown: &Shown, status: &Status, columns: usize) -> Notice {
    let mut notice = Notice { title: "", colour: WARN, lines: Vec::new() };
    let plain = Style::new();
    let over = matches!(status.phase, Phase::CutOver | Phase::Reversed);
    if let Some(error) = &status.error {
        (notice.title, notice.colour) = ("It has stopped", BAD);
        notice.say(columns, bold(BAD), "", &error.message);
        notice.say(columns, plain, "next: ", error.hint.as_deref().unwrap_or(HOW_TO_GO_ON));
    } else if !status.process_alive && !over {
        notice.title = "No migration is running";
        notice.say(columns, plain, "", &format!("This is how it was when it ended. {HOW_TO_GO_ON}"));
    } else if over && status.direction == Direction::There {
        (notice.title, notice.colour) = ("Done", GOOD);
        let who = if status.phase == Phase::Reversed {
            "The old primary is the primary again."
        } else {
            "The target is the primary now."
        };
        notice.say(columns, plain, "", who);
    } else if over && status.phase == Phase::CutOver {
        (notice.title, notice.colour) = ("The target is the primary", GOOD);
        let kept = if status.process_alive {
            "The old one is kept current: `walferry switchback` leads back, `walferry finish` ends that."
        } else {
            "The old one is not kept current while no `walferry migrate` runs."
        };
        notice.say(columns, plain, "", kept);
        for blocker in status.blockers.iter().filter(|_| status.process_alive) {
            notice.say(columns, Style::new().fg(WARN), "no switchback: ", blocker);
        }
    } else if over {
        (notice.title, notice.colour) = ("Switched back", GOOD);
        notice.say(columns, plain, "", "The old primary is the primary again.");
    } else if status.phase == Phase::CuttingOver {
        notice.title = "Cutting over";
        notice.say(columns, plain, "", HOW_IT_ENDS);
    } else if status.ready_to_cutover {
        (notice.title, notice.colour) = ("Ready to cut over", GOOD);
        let with = if status.way_back == WayBack::Ready { "With a way back. " } else { "" };
        notice.say(
            columns,
            plain,
            "",
            &format!("{with}`walferry cutover --dry-run` rehearses it, `walferry cutover` does it."),
        );
    } else if matches!(status.phase, Phase::CatchingUp | Phase::Following) && !status.blockers.is_empty() {
        notice.title = "In the way of a cutover";
        for blocker in &status.blockers {
            notice.say(columns, plain, "• ", blocker);
        }
    }
    if let Some(last) = status.cutover.last_given_up.as_ref().filter(|_| !over) {
        let when = last.at.get(11..19).unwrap_or(&last.at);
        notice.say(columns, plain, "last try: ", &format!("given up at {when} during {}: {}", last.step, last.reason));
    }
    if !status.attention.is_empty() {
        if notice.lines.is_empty() {
            notice.title = "To look after";
        }
        if notice.colour == GOOD {
            notice.colour = WARN;
        }
        for attention in &status.attention {
            notice.say(columns, Style::new().fg(WARN), "! ", attention);
        }
    }
    if notice.lines.is_empty() && shown.silent.is_some() {
        notice.title = "No answer";
        notice.say(columns, plain, "", shown.silent.as_deref().unwrap_or_default());
    }
    notice
}

pub(super) fn draw_notice(frame: &mut Frame<'_>, area: Rect, notice: Notice) {
    if area.height == 0 {
        return;
    }
    let title = Line::styled(format!(" {} ", notice.title), bold(notice.colour));
    let block = Block::bordered().border_type(BorderType::Rounded).border_style(Style::new().fg(notice.colour));
    let block = block.title(title).padding(Padding::horizontal(1));
    frame.render_widget(Text::from(notice.lines), block.inner(area));
    frame.render_widget(block, area);
}

/// A bar of so many columns.
fn bar(done: u64, total: u64, columns: usize, colour: Color) -> Vec<Span<'static>> {
    let share = if total == 0 { 1.0 } else { (done as f64 / total as f64).clamp(0.0, 1.0) };
    let full = (share * columns as f64) as usize;
    let tip = usize::from(full < columns && share > 0.0);
    vec![
        Span::styled(format!("{}{}", "━".repeat(full), if tip == 1 { "╸" } else { "" }), Style::new().fg(colour)),
        Span::styled("─".repeat(columns - full - tip), muted()),
    ]
}

/// The initial copy: all of it, then the tables at work.
pub(super) fn copy(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    if area.height == 0 {
        return;
    }
    let left = status.eta_seconds.filter(|_| status.phase <= Phase::Indexing);
    let left = left.map_or_else(String::new, |seconds| format!(" about {} left ", duration(seconds)));
    let block = panel("Copy").title_top(Line::styled(left, Style::new().fg(ACCENT)).alignment(Alignment::Right));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let room = usize::from(inner.width);
    let copy = &status.copy;
    let mut text = copy_text(status);
    if status.indexes.total > 0 {
        text.push_str(&format!("; {} of {} indexes", count(status.indexes.done), count(status.indexes.total)));
    }
    if let Some(whom) = &copy.waits_for {
        text = format!("waits for {whom}; {text}");
    }
    let style = if copy.paused || copy.waits_for.is_some() { Style::new().fg(WARN) } else { Style::new() };
    let mut whole = bar(copy.bytes_done, copy.bytes_total, room.saturating_sub(6), ACCENT);
    whole.push(Span::styled(
        format!(" {:>4}%", percent(copy.bytes_done, copy.bytes_total)),
        Style::new().add_modifier(Modifier::BOLD),
    ));
    let mut lines: Vec<Line<'_>> =
        wrapped(&text, room).into_iter().take(2).map(|line| Line::styled(line, style)).collect();
    lines.push(Line::from(whole));

    let mut open: Vec<&Table> = status.tables.iter().filter(|table| table.state != TableState::Done).collect();
    let rank = |table: &Table| match table.state {
        TableState::Copying => 0,
        TableState::Indexing => 1,
        TableState::Waiting | TableState::Done => 2,
    };
    open.sort_by_key(|table| (rank(table), std::cmp::Reverse(table.bytes_total)));
    let rows = usize::from(inner.height).saturating_sub(lines.len());
    let listed = if open.len() > rows { rows.saturating_sub(1) } else { open.len() };
    let names: Vec<String> = open[..listed].iter().map(|table| cut_middle(&table_name(table), room / 3)).collect();
    let name_width = names.iter().map(|name| width(name)).max().unwrap_or_default();
    // State, percentage and sizes beside the name and the bar.
    let sizes = room >= name_width + 60;
    let bar_width = room.saturating_sub(name_width + 19 + if sizes { 26 } else { 0 });
    for (table, name) in open.iter().zip(&names) {
        let colour = match table.state {
            TableState::Copying => ACCENT,
            TableState::Indexing => GOOD,
            TableState::Waiting | TableState::Done => MUTED,
        };
        let mut spans = vec![
            Span::raw(filled(name, name_width)),
            Span::styled(format!("  {:<9} ", table.state.name()), Style::new().fg(colour)),
        ];
        spans.extend(bar(table.bytes_done, table.bytes_total.max(1), bar_width, colour));
        spans.push(Span::raw(format!(" {:>4}%", percent(table.bytes_done, table.bytes_total.max(1)))));
        if sizes {
            let text = format!("{:>10} of {:>10}", size(table.bytes_done), size(table.bytes_total));
            spans.push(Span::styled(format!("  {text}"), muted()));
        }
        lines.push(Line::from(spans));
    }
    if open.len() > listed && rows > 0 {
        lines.push(Line::styled(format!("and {} more", count((open.len() - listed) as u64)), muted()));
    }
    frame.render_widget(Text::from(lines), inner);
}

/// What is measured, over the last hour at most: what the page plots. In a wide terminal all of it, in a narrow one what matters most now.
pub(super) fn plots(frame: &mut Frame<'_>, area: Rect, shown: &Shown, status: &Status) {
    if area.height == 0 {
        return;
    }
    let seconds = |value: f64| duration(value);
    let rate = |value: f64| format!("{}/s", count(value.round() as u64));
    let bytes = |value: f64| size(value as u64);
    let byte_rate = size_rate;
    type Plot<'a> = (&'static str, Measure, &'a dyn Fn(f64) -> String, Color);
    let lag: Plot<'_> = ("Behind", Measure::Lag, &seconds, Color::Yellow);
    let changes: Plot<'_> = ("Applied", Measure::Changes, &rate, Color::Green);
    let received: Plot<'_> = ("Received", Measure::Received, &byte_rate, Color::Blue);
    let copied: Plot<'_> = ("Copied", Measure::Copied, &byte_rate, Color::Cyan);
    let queue: Plot<'_> = ("Queue", Measure::Queue, &bytes, Color::Magenta);
    let wal: Plot<'_> = ("WAL kept", Measure::Wal, &bytes, Color::Magenta);
    let order = match status.phase {
        Phase::Preparing | Phase::Copying | Phase::Indexing => [copied, queue, received, wal, lag, changes],
        _ => [lag, changes, received, queue, wal, copied],
    };
    let beside = (area.width / PLOT_WIDTH).clamp(1, 6);
    let areas = Layout::horizontal((0..beside).map(|_| Constraint::Fill(1))).split(area);
    for ((title, measure, text, colour), at) in order.into_iter().zip(areas.iter()) {
        plot(frame, *at, shown, title, measure, text, colour);
    }
}

fn plot(
    frame: &mut Frame<'_>,
    area: Rect,
    shown: &Shown,
    title: &str,
    measure: Measure,
    text: &dyn Fn(f64) -> String,
    colour: Color,
) {
    let known = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), text);
    let now = known(shown.history.now(measure));
    let most = format!(" most {} in {} ", known(shown.history.most(measure)), duration(shown.history.seconds() as f64));
    let mut block = panel(title).title_top(Line::styled(format!(" {now} "), bold(colour)).alignment(Alignment::Right));
    if width(&most) + 2 <= usize::from(area.width) {
        block = block.title_bottom(Line::styled(most, muted()).alignment(Alignment::Right));
    }
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let columns = shown.history.columns(measure, usize::from(inner.width));
    // In thousandths of the highest, so that seconds and bytes have the same resolution; never a flat line at the top for next to nothing.
    let highest = shown.history.most(measure).unwrap_or_default().max(1e-3);
    // More than nothing is more than no bar.
    let least = 1000 / (u64::from(inner.height.max(1)) * 8) + 1;
    let scaled = |value: f64| if value > 0.0 { ((value / highest * 1000.0) as u64).max(least) } else { 0 };
    let data: Vec<Option<u64>> = columns.into_iter().map(|column| column.map(scaled)).collect();
    // What is newest stands at the right.
    let taken = u16::try_from(data.len()).unwrap_or(inner.width).min(inner.width);
    let at = Rect { x: inner.x + inner.width - taken, width: taken, ..inner };
    let line = Sparkline::default().data(data).max(1000).style(Style::new().fg(colour)).absent_value_style(muted());
    frame.render_widget(line, at);
}

/// What happened, the newest first.
pub(super) fn events(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    if area.height == 0 {
        return;
    }
    let block = panel("Events");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let mut lines = Vec::new();
    for event in status.events.iter().rev().take(usize::from(inner.height)) {
        let time = event.time.get(11..19).unwrap_or(&event.time);
        let style = match event.level {
            Level::Info => Style::new(),
            Level::Warn => Style::new().fg(WARN),
            Level::Error => Style::new().fg(BAD),
        };
        let level = match event.level {
            Level::Info => "",
            Level::Warn => "warning: ",
            Level::Error => "error: ",
        };
        let room = usize::from(inner.width).saturating_sub(width(time) + 2);
        for (place, text) in wrapped(&format!("{level}{}", event.text), room).into_iter().enumerate() {
            let lead = if place == 0 { format!("{time}  ") } else { " ".repeat(width(time) + 2) };
            lines.push(Line::from(vec![Span::styled(lead, muted()), Span::styled(text, style)]));
        }
    }
    frame.render_widget(Text::from(lines), inner);
}

/// What can be done here.
pub(super) fn footer(frame: &mut Frame<'_>, area: Rect, shown: &Shown, status: &Status) {
    let keys = " q quits; it only shows";
    frame.render_widget(Line::styled(keys, muted()), area);
    let command = match status.phase {
        Phase::CutOver if status.direction == Direction::Back => "switchback",
        Phase::CutOver | Phase::Reversed => "clean",
        _ if status.ready_to_cutover => "cutover",
        _ => "status",
    };
    let text = format!("walferry {command} --dir {} ", shown.directory);
    let room = usize::from(area.width).saturating_sub(width(keys) + 2);
    if width(&text) <= room {
        frame.render_widget(Line::styled(cut(&text, room), muted()).alignment(Alignment::Right), area);
    }
}
