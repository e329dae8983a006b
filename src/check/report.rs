//! What a check found, as a person reads it and as `--json` gives it.

use std::fmt::{self, Write};

use serde::Serialize;

use super::estimate::Estimate;

/// How much a finding matters, the gravest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The migration would fail or lose something: `migrate` does not begin.
    Blocker,
    /// The migration can work, and something may hurt on the way.
    Warning,
    /// Worth knowing.
    Info,
}

/// Which part of the migration a finding speaks of: the server on which its fix is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The server that is moved away from.
    Source,
    /// The server that is moved to.
    Target,
    /// The machine that walferry runs on.
    Local,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// Where it is, and where the fix belongs.
    pub side: Side,
    /// A stable name for scripts, such as `wal-level`.
    pub code: &'static str,
    /// What it was found on: a setting, a role, up to ten tables and how many more there are.
    pub object: String,
    /// What was found, and why it matters.
    pub message: String,
    /// The SQL or command that mends it, complete and ready to paste; several lines where several are needed.
    pub fix: Option<String>,
}

impl Finding {
    /// A finding without a fix.
    pub(crate) fn new(
        severity: Severity,
        side: Side,
        code: &'static str,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Finding {
        Finding { severity, side, code, object: object.into(), message: message.into(), fix: None }
    }

    /// The same with what mends it.
    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Finding {
        self.fix = Some(fix.into());
        self
    }
}

/// One of the two servers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerSummary {
    /// Host, port, database and user, without secrets.
    pub address: String,
    /// As the server says it, such as `15.18 (Debian 15.18-0+deb12u1)`.
    pub version: String,
    /// `server_version_num`, such as 150018.
    pub version_number: i32,
    /// The cluster's system identifier; none where the server does not let our role read it.
    pub system_identifier: Option<String>,
    /// The database's name.
    pub database: String,
    /// The role that we are there.
    pub role: String,
    /// Encoding of the database, such as `UTF8`.
    pub encoding: String,
    /// Collation of the database as `provider name version`, such as `libc en_US.UTF-8 2.36`.
    pub collation: String,
    /// Size of the database in bytes, with everything in it.
    pub bytes: i64,
}

/// Everything that a check has to say.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this format.
    pub version: u32,
    /// Whether a migration can begin: no finding is a blocker.
    pub ready: bool,
    /// The source; none when it was not reached.
    pub source: Option<ServerSummary>,
    /// The target; none when it was not reached.
    pub target: Option<ServerSummary>,
    /// Tables that hold rows of their own; a partition counts as one.
    pub tables: usize,
    /// Their size with TOAST, without indexes, in bytes.
    pub bytes: i64,
    /// What the source's planner believes the number of their rows to be, without the tables it does not know.
    pub rows_estimate: i64,
    /// Tables that were never analysed, and so are missing in `rows_estimate`.
    pub tables_never_analysed: usize,
    /// How long the copy is expected to take; none without a trial, and where the trial measured nothing.
    pub estimate: Option<Estimate>,
    /// The findings, blockers first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether a migration can begin. The caller exits with 0 if so, and with 3 otherwise.
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// The findings of one severity.
    pub fn of(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.severity == severity)
    }
}

/// Names of objects for one finding: the first ten, and how many more there are.
pub(crate) fn first_ten(names: &[String]) -> String {
    match names.len() {
        0..=10 => names.join(", "),
        all => format!("{} and {} more", names[..10].join(", "), thousands(all as i64 - 10)),
    }
}

/// `1 table`, `3 tables`.
pub(crate) fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{} {noun}s", thousands(count as i64)) }
}

/// How many findings stand against a migration, as the beginning of a sentence.
pub(crate) fn that_stand(blockers: usize) -> String {
    if blockers == 1 { "1 finding stands".to_owned() } else { format!("{} findings stand", thousands(blockers as i64)) }
}

/// Bytes as a person reads them: `0 B`, `1.5 KiB`, `12.3 GiB`.
pub(crate) fn size(bytes: i64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// A number with commas: `1,234,567`.
fn thousands(number: i64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0
            && (digits.len() - position).is_multiple_of(3)
            && digit.is_ascii_digit()
            && !grouped.ends_with('-')
        {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Width of the text under a finding, in characters.
const TEXT_WIDTH: usize = 100;

/// Lines of a fix that are shown to a person; `--json` has all of them.
const FIX_LINES_SHOWN: usize = 10;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (label, server) in [("source", &self.source), ("target", &self.target)] {
            match server {
                Some(server) => {
                    writeln!(f, "{label}  {}", server.address)?;
                    writeln!(
                        f,
                        "        PostgreSQL {}, {}, {}, {}",
                        server.version,
                        server.encoding,
                        server.collation,
                        size(server.bytes)
                    )?;
                }
                None => writeln!(f, "{label}  not reached")?,
            }
        }
        if self.source.is_some() {
            let tables = counted(self.tables, "table");
            write!(f, "moves   {tables}, {}, about {} rows", size(self.bytes), thousands(self.rows_estimate))?;
            match self.tables_never_analysed {
                0 => writeln!(f)?,
                some => writeln!(f, " (not counting {} never analysed)", counted(some, "table"))?,
            }
        }
        for (severity, title) in
            [(Severity::Blocker, "blockers"), (Severity::Warning, "warnings"), (Severity::Info, "worth knowing")]
        {
            let count = self.of(severity).count();
            if count > 0 {
                writeln!(f, "\n{title} ({count})")?;
            }
            self.of(severity).try_for_each(|finding| write_finding(f, finding))?;
        }
        match self.of(Severity::Blocker).count() {
            0 => write!(f, "\nready"),
            blockers => {
                // A terminal may have scrolled past them: their names once more.
                let mut codes: Vec<&str> = self.of(Severity::Blocker).map(|finding| finding.code).collect();
                codes.dedup();
                write!(f, "\nblocked by {}: {}", counted(blockers, "finding"), codes.join(", "))
            }
        }
    }
}

pub(super) fn write_finding(f: &mut fmt::Formatter<'_>, finding: &Finding) -> fmt::Result {
    let side = match finding.side {
        Side::Source => "source",
        Side::Target => "target",
        Side::Local => "here",
    };
    // A name may hold a newline or a terminal's control character; it must not leave its line.
    let object = wrapped(&printable(&finding.object));
    if object.len() == 1 {
        writeln!(f, "\n  {:<22} {side:<6}  {}", finding.code, object[0])?;
    } else {
        writeln!(f, "\n  {:<22} {side}", finding.code)?;
        object.iter().try_for_each(|line| writeln!(f, "      {line}"))?;
    }
    for line in wrapped(&printable(&finding.message)) {
        writeln!(f, "      {line}")?;
    }
    let Some(fix) = &finding.fix else { return Ok(()) };
    for (position, line) in fix.lines().take(FIX_LINES_SHOWN).enumerate() {
        writeln!(f, "      {} {}", if position == 0 { "fix:" } else { "    " }, printable(line))?;
    }
    match fix.lines().count().saturating_sub(FIX_LINES_SHOWN) {
        0 => Ok(()),
        more => writeln!(f, "           (and {}; --json has them all)", counted(more, "more line")),
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut width = 0;
    for word in text.split(' ') {
        let word_width = word.chars().count();
        if width > 0 && width + 1 + word_width > TEXT_WIDTH {
            lines.push(String::new());
            width = 0;
        }
        if let Some(line) = lines.last_mut() {
            let gap = if width > 0 { " " } else { "" };
            let _ = write!(line, "{gap}{word}");
            width += gap.len() + word_width;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(severity: Severity, code: &'static str) -> Finding {
        Finding::new(severity, Side::Source, code, "\"public\".\"t\"", "Something is so, and it matters.")
    }

    fn report(findings: Vec<Finding>) -> Report {
        let server = ServerSummary {
            address: "postgresql://app@db/shop".into(),
            version: "15.18".into(),
            version_number: 150_018,
            system_identifier: Some("7".into()),
            database: "shop".into(),
            role: "app".into(),
            encoding: "UTF8".into(),
            collation: "libc C".into(),
            bytes: 13_207_024_435,
        };
        Report {
            version: 1,
            ready: findings.iter().all(|finding| finding.severity != Severity::Blocker),
            source: Some(server),
            target: None,
            tables: 1212,
            bytes: 1536,
            rows_estimate: 1_234_567,
            tables_never_analysed: 1,
            estimate: None,
            findings,
        }
    }

    #[test]
    fn blockers_come_first_and_the_last_line_is_the_verdict() {
        let text = report(vec![
            finding(Severity::Info, "an-info"),
            finding(Severity::Blocker, "a-blocker").fix("ALTER SYSTEM;\n-- restart"),
            finding(Severity::Warning, "a-warning"),
        ])
        .to_string();
        let place = |code: &str| text.find(code).expect("every finding is shown");
        assert!(place("a-blocker") < place("a-warning") && place("a-warning") < place("an-info"));
        assert!(text.ends_with("\nblocked by 1 finding: a-blocker"), "{text}");
        assert!(text.contains("      fix: ALTER SYSTEM;\n           -- restart\n"), "{text}");
        assert!(text.contains("moves   1,212 tables, 1.5 KiB, about 1,234,567 rows (not counting 1 table never"));
        assert!(text.contains("target  not reached"));
    }

    #[test]
    fn without_blockers_it_is_ready() {
        let report = report(vec![finding(Severity::Warning, "a-warning")]);
        assert!(report.ready());
        assert!(report.to_string().ends_with("\nready"));
    }

    #[test]
    fn a_hostile_name_stays_on_its_line() {
        let mut hostile = finding(Severity::Blocker, "code");
        hostile.object = "a\nready\u{1b}[2J".into();
        assert!(!report(vec![hostile]).to_string().contains("\nready"));
    }

    #[test]
    fn a_long_fix_is_cut_for_a_person_and_whole_in_json() {
        let fix: Vec<String> = (0..12).map(|n| format!("ALTER {n};")).collect();
        let report = report(vec![finding(Severity::Blocker, "code").fix(fix.join("\n"))]);
        let text = report.to_string();
        assert!(text.contains("ALTER 9;") && !text.contains("ALTER 10;") && text.contains("(and 2 more lines"));
        let json = serde_json::to_value(&report).expect("a report is JSON");
        assert_eq!(json["findings"][0]["fix"], fix.join("\n"));
        assert_eq!(json["findings"][0]["severity"], "blocker");
        assert_eq!((json["version"].as_u64(), json["ready"].as_bool()), (Some(1), Some(false)));
    }

    #[test]
    fn many_names_become_ten_and_a_count() {
        let names: Vec<String> = (0..12).map(|n| n.to_string()).collect();
        assert_eq!(first_ten(&names), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more");
        assert_eq!(first_ten(&names[..2]), "0, 1");
    }

    #[test]
    fn long_text_is_wrapped_between_words() {
        let lines = wrapped(&"word ".repeat(50));
        assert!(lines.len() > 2 && lines.iter().all(|line| line.chars().count() <= TEXT_WIDTH));
        assert_eq!((size(0), size(1023), size(13_207_024_435)), ("0 B".into(), "1023 B".into(), "12.3 GiB".into()));
        assert_eq!((thousands(0), thousands(-1234), thousands(999)), ("0".into(), "-1,234".into(), "999".into()));
    }
}
