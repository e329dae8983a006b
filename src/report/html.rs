//! The report as one HTML file: nothing from elsewhere, no scripts, every name and text escaped.

use std::fmt::Write;

use super::plot::{Series, plot};
use super::{Moved, Report, ServerSeen, Switch};
use crate::observe::format::{count, duration, size, size_rate};
use crate::observe::history::Point;
use crate::observe::status::Level;
use crate::observe::wall_clock::parse_rfc3339;
use crate::record::Server;

const STYLE: &str = include_str!("report.css");

/// Text as it stands between tags and in attributes; what cannot be printed is shown by its number.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(' '),
            // Also what turns the direction of the text around it.
            _ if letter.is_control() || matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
                let _ = write!(escaped, "\\u{{{:x}}}", u32::from(letter));
            }
            _ => escaped.push(letter),
        }
    }
    escaped
}

/// The page.
pub fn render(report: &Report) -> String {
    let name = report.id.as_deref().unwrap_or("unknown");
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Migration {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>Migration {}</h1>\n",
        escape(name),
        escape(name)
    );
    let _ = write!(
        page,
        "<p class=\"way\">{} → {}</p>\n<p class=\"muted\">Made {} by walferry {}. All times are UTC.</p>\n</header>\n<main>\n",
        server(&report.source),
        server(&report.target),
        moment(&report.made_at),
        escape(report.made_by)
    );
    cards(&mut page, report);
    if !report.lacks.is_empty() {
        let lacks: String = report.lacks.iter().map(|lack| format!("<p>{}</p>\n", escape(lack))).collect();
        section(&mut page, "What this report lacks", "", &lacks);
    }
    if let Some(moved) = &report.moved {
        section(&mut page, "What was moved", "", &what_was_moved(moved, report));
    }
    section(&mut page, "Phases", "", &phases(report));
    for switch in &report.switches {
        section(&mut page, if switch.back { "Switchback" } else { "Cutover" }, "", &switched(switch));
    }
    page.push_str(&plots(report));
    section(&mut page, "Verification", "", &verification(report));
    section(&mut page, "Incidents", "long", &incidents(report));
    section(&mut page, "Operator commands", "long", &commands(report));
    section(&mut page, "Statements that changed a server", "long", &statements(report));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn section(page: &mut String, title: &str, class: &str, content: &str) {
    let _ = writeln!(page, "<section class=\"{class}\">\n<h2>{title}</h2>\n{content}</section>");
}

fn server(server: &ServerSeen) -> String {
    // `15.18 (Debian …)`
    let version = server.version.as_ref().and_then(|version| version.split(' ').next());
    let version = version.map_or(String::new(), |version| format!(" (PostgreSQL {})", escape(version)));
    format!("{}{version}", escape(&server.description))
}

/// `2026-11-21 02:17:10`.
fn moment(rfc3339: &str) -> String {
    escape(&rfc3339.get(..19).map_or(rfc3339.to_owned(), |time| time.replace('T', " ")))
}

fn cards(page: &mut String, report: &Report) {
    let mut cards: Vec<(String, &str, &str)> = Vec::new();
    if let Some(phase) = &report.phase {
        cards.push((phase.clone(), "state", if phase == "failed" { "bad" } else { "" }));
    }
    if let Some(switch) = report.switches.iter().rev().find(|switch| !switch.back) {
        cards.push((format!("{:.0} ms", switch.outcome.downtime_ms), "writers waited", "good"));
    }
    if let Some(moved) = &report.moved {
        cards.push((count(moved.rows), "rows copied", ""));
        cards.push((size(moved.bytes), "of rows", ""));
        cards.push((count(moved.tables), "tables", ""));
    }
    if let (Some(began), Some(ended)) = (&report.began_at, &report.ended_at)
        && let (Some(began), Some(ended)) = (parse_rfc3339(began), parse_rfc3339(ended))
    {
        cards.push((duration((ended - began) as f64 / 1000.0), "from first to last", ""));
    }
    match &report.verification {
        Some(verification) if verification.equal => cards.push(("equal".into(), "last comparison", "good")),
        Some(_) => cards.push(("different".into(), "last comparison", "bad")),
        None => cards.push(("not compared".into(), "verification", "warn")),
    }
    cards.push((
        count(report.incidents.len() as u64),
        "warnings and errors",
        if report.incidents.is_empty() { "good" } else { "warn" },
    ));
    page.push_str("<ul class=\"cards\">\n");
    for (figure, what, class) in cards {
        let _ =
            writeln!(page, "<li><b class=\"{class}\">{}</b><span class=\"muted\">{what}</span></li>", escape(&figure));
    }
    page.push_str("</ul>\n");
}

/// A table; `rows` are HTML already. Columns whose heading begins with `#` are numbers.
fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for heading in headings {
        let _ = match heading.strip_prefix('#') {
            Some(number) => write!(text, "<th scope=\"col\" class=\"number\">{number}</th>"),
            None => write!(text, "<th scope=\"col\">{heading}</th>"),
        };
    }
    text.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        text.push_str("<tr>");
        for (cell, heading) in row.iter().zip(headings) {
            let class = match *heading {
                heading if heading.starts_with('#') => "number",
                "When" => "time",
                "Statement" => "statement wide",
                "Share" => "bar",
                "Text" | "Command" => "text",
                _ => "",
            };
            let _ = write!(text, "<td class=\"{class}\">{cell}</td>");
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</tbody>\n</table></div>\n");
    text
}

/// A bar for people who see it; the number stands beside it.
fn bar(part: f64, whole: f64) -> String {
    let percent = if whole > 0.0 { (part / whole * 100.0).clamp(0.0, 100.0) } else { 0.0 };
    format!(
        "<svg viewBox=\"0 0 100 10\" preserveAspectRatio=\"none\" aria-hidden=\"true\"><rect width=\"{percent:.2}\" height=\"10\"/></svg>"
    )
}

fn what_was_moved(moved: &Moved, report: &Report) -> String {
    let mut text = format!(
        "<p>{} tables with {} rows and {} of COPY data; {} indexes and constraints built after them.</p>\n",
        count(moved.tables),
        count(moved.rows),
        size(moved.bytes),
        count(moved.indexes)
    );
    if !report.objects.is_empty() {
        let kinds: Vec<String> =
            report.objects.iter().map(|kind| format!("{} {}", count(kind.count), escape(&kind.name))).collect();
        let _ = writeln!(text, "<p>Objects of the schema: {}.</p>", kinds.join(", "));
    }
    let rows: Vec<Vec<String>> = moved
        .largest
        .iter()
        .map(|table| {
            vec![escape(&table.name), count(table.rows), size(table.bytes), bar(table.bytes as f64, moved.bytes as f64)]
        })
        .collect();
    text.push_str(&table(&["Table", "#Rows", "#Size", "Share"], &rows));
    if moved.tables > moved.largest.len() as u64 {
        let _ =
            writeln!(text, "<p class=\"muted\">The largest {} of {}.</p>", moved.largest.len(), count(moved.tables));
    }
    text
}

fn phases(report: &Report) -> String {
    if report.phases.is_empty() {
        return "<p>Nothing is known of them.</p>\n".to_owned();
    }
    let whole: f64 = report.phases.iter().map(|phase| phase.seconds).sum();
    let row = |phase: &super::PhaseTime| {
        let times = if phase.times > 1 { format!(" ({} times)", phase.times) } else { String::new() };
        let name = format!("{}{times}", escape(&phase.phase));
        vec![name, moment(&phase.began_at), duration(phase.seconds), bar(phase.seconds, whole)]
    };
    table(&["Phase", "When", "#Took", "Share"], &report.phases.iter().map(row).collect::<Vec<_>>())
}

fn switched(switch: &Switch) -> String {
    let outcome = &switch.outcome;
    let mut text = format!(
        "<p>{}: writers waited <b>{:.0} ms</b>. At {} of the server that was left; {} sequences set; verified: {}; way back: {}.</p>\n",
        moment(&switch.at),
        outcome.downtime_ms,
        outcome.cutover_lsn,
        outcome.sequences_synced,
        if outcome.verified { "yes" } else { "no" },
        escape(&outcome.reverse)
    );
    let whole = outcome.steps.iter().map(|step| step.ms).fold(0.0, f64::max);
    let row = |step: &crate::cutover::Step| vec![escape(&step.name), format!("{:.1} ms", step.ms), bar(step.ms, whole)];
    text.push_str(&table(&["Step", "#Took", "Share"], &outcome.steps.iter().map(row).collect::<Vec<_>>()));
    text.push_str("<p class=\"muted\">Writers waited from the fence on, until the release; what comes before it does not hold them.</p>\n");
    for warning in &outcome.warnings {
        let _ = writeln!(text, "<p class=\"warn\">{}</p>", escape(warning));
    }
    text
}

fn plots(report: &Report) -> String {
    let series = |value: fn(&Point) -> Option<f64>| -> Series {
        report.points.iter().map(|point| (point.measured.time, value(&point.measured))).collect()
    };
    let marks: Vec<(i64, String)> = report
        .switches
        .iter()
        .filter_map(|switch| {
            Some((parse_rfc3339(&switch.at)?, if switch.back { "switchback" } else { "cutover" }.to_owned()))
        })
        .collect();
    let rate = |value: f64| size_rate(value);
    let text = [
        plot("copied", "Copied", &series(|point| Some(point.copied_bytes_per_second)), rate, &marks),
        plot(
            "received",
            "Received from the source",
            &series(|point| Some(point.received_bytes_per_second)),
            rate,
            &marks,
        ),
        plot(
            "applied",
            "Changes applied",
            &series(|point| Some(point.changes_per_second)),
            |value| format!("{}/s", count(value as u64)),
            &marks,
        ),
        plot("lag", "Lag", &series(|point| point.lag_seconds), |value| format!("{value:.1} s"), &marks),
        plot(
            "queue",
            "Queue on disk",
            &series(|point| Some(point.queue_bytes as f64)),
            |value| size(value as u64),
            &marks,
        ),
        plot(
            "wal",
            "WAL kept by the source",
            &series(|point| Some(point.retained_wal_bytes? as f64)),
            |value| size(value as u64),
            &marks,
        ),
    ]
    .concat();
    if text.is_empty() { String::new() } else { format!("<div class=\"plots\">\n{text}</div>\n") }
}

fn verification(report: &Report) -> String {
    let Some(last) = &report.verification else {
        return "<p>The two sides were not compared by <code>walferry verify</code>.</p>\n".to_owned();
    };
    let outcome = if last.equal { "<b class=\"good\">equal</b>" } else { "<b class=\"bad\">different</b>" };
    let mut text = format!(
        "<p>{}: {outcome}. {} rows of {} tables compared{}{}, in {}, at {} of the source.</p>\n",
        moment(&last.at),
        count(last.rows),
        count(last.tables),
        if last.complete { ", all there are" } else { ", not all" },
        if last.online { ", while writes went on" } else { "" },
        duration(last.seconds),
        last.source_lsn
    );
    if !last.equal {
        let tables: Vec<String> = last.differing_tables.iter().map(|table| escape(table)).collect();
        let _ = writeln!(text, "<p>{} rows differ, in {}.</p>", count(last.differing_rows), tables.join(", "));
    }
    text
}

fn incidents(report: &Report) -> String {
    let mut text = String::new();
    if !report.counts.is_empty() {
        let counts: Vec<String> =
            report.counts.iter().map(|one| format!("{} {}", count(one.count), escape(&one.name))).collect();
        let _ = writeln!(text, "<p>In the last process: {}.</p>", counts.join(", "));
    }
    if report.incidents.is_empty() {
        text.push_str("<p class=\"good\">No warning and no error.</p>\n");
        return text;
    }
    let row = |event: &crate::observe::status::Event| {
        let class = if event.level == Level::Error { "bad" } else { "warn" };
        let level = if event.level == Level::Error { "error" } else { "warning" };
        vec![moment(&event.time), format!("<span class=\"{class}\">{level}</span>"), escape(&event.text)]
    };
    text.push_str(&table(&["When", "What", "Text"], &report.incidents.iter().map(row).collect::<Vec<_>>()));
    text
}

fn commands(report: &Report) -> String {
    let row = |command: &super::Command| {
        let outcome = match (command.exit, &command.error) {
            (Some(0), _) => "<span class=\"good\">done</span>".to_owned(),
            (Some(exit), error) => {
                format!("<span class=\"bad\">exit {exit}</span> {}", escape(error.as_deref().unwrap_or_default()))
            }
            (None, _) => "<span class=\"warn\">no end is known</span>".to_owned(),
        };
        let typed = format!("<code>{} {}</code>", escape(&command.command), escape(&command.arguments.join(" ")));
        vec![moment(&command.at), escape(&command.user), typed, outcome]
    };
    table(&["When", "Who", "Command", "Outcome"], &report.commands.iter().map(row).collect::<Vec<_>>())
}

fn name(server: Server) -> &'static str {
    match server {
        Server::Source => "source",
        Server::Target => "target",
    }
}

fn statements(report: &Report) -> String {
    let row = |one: &super::StatementCount| vec![name(one.server).to_owned(), escape(&one.kind), count(one.count)];
    let mut text =
        table(&["Server", "Kind", "#Statements"], &report.statement_counts.iter().map(row).collect::<Vec<_>>());
    text.push_str(
        "<p class=\"muted\">Written down before each was sent, so one may have been refused. Constants of statements that are not walferry's own are left out.</p>\n",
    );
    let row = |one: &super::Statement| {
        vec![moment(&one.at), name(one.server).to_owned(), escape(&one.kind), escape(&one.statement)]
    };
    text.push_str(&table(
        &["When", "Server", "Kind", "Statement"],
        &report.statements.iter().map(row).collect::<Vec<_>>(),
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_text_is_text() {
        assert_eq!(
            escape("<img src=x onerror='a()'>&\"\u{202e}\n\u{1b}"),
            "&lt;img src=x onerror=&#39;a()&#39;&gt;&amp;&quot;\\u{202e} \\u{1b}"
        );
    }

    #[test]
    fn nothing_comes_from_elsewhere() {
        assert!(!STYLE.contains("url(") && !STYLE.contains("@import") && !STYLE.contains("http"));
    }
}
