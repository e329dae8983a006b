//! What was measured, and the table of it.

use std::fmt::Write as _;
use std::process::Command;
use std::sync::PoisonError;

use walferry::error::Result;

use crate::plot;
use crate::setting::{Options, Setting};

/// The values of one thing over the rounds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample(pub Vec<f64>);

impl Sample {
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            length if length % 2 == 1 => sorted[length / 2],
            length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
        }
    }

    fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// Round by round, how many times the other this one is.
    pub fn over(&self, other: &Sample) -> Sample {
        Sample(self.0.iter().zip(&other.0).map(|(one, other)| one / other).collect())
    }

    /// Median, and the least and the greatest where there are several.
    pub fn show(&self) -> String {
        let median = number(self.median());
        if self.0.len() < 2 {
            median
        } else {
            format!("{median} ({} – {})", number(self.least()), number(self.most()))
        }
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// What is asked of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// At least this many times the peer's speed.
    Speed(f64),
    /// At most this much, in the row's unit.
    AtMost(f64),
    /// At least this much, in the row's unit.
    AtLeast(f64),
    /// To be known.
    Reported,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// `B3`.
    pub id: &'static str,
    pub case: String,
    pub unit: &'static str,
    pub walferry: Sample,
    /// What it is compared with.
    pub peer: Option<(String, Sample)>,
    /// How many times the peer's speed walferry has, round by round.
    pub speed: Option<Sample>,
    pub bar: Bar,
}

impl Row {
    /// Times in seconds: the less the better.
    pub fn of_times(id: &'static str, case: &str, ours: &Sample, peer: (&str, &Sample), bar: Bar) -> Row {
        Row {
            id,
            case: case.to_owned(),
            unit: "s",
            walferry: ours.clone(),
            peer: Some((peer.0.to_owned(), peer.1.clone())),
            speed: Some(peer.1.over(ours)),
            bar,
        }
    }

    /// A value by itself.
    pub fn of_value(id: &'static str, case: &str, unit: &'static str, ours: Sample, bar: Bar) -> Row {
        Row { id, case: case.to_owned(), unit, walferry: ours, peer: None, speed: None, bar }
    }

    /// Whether the bar is reached; `None` where none is set.
    pub fn reached(&self) -> Option<bool> {
        let ours = self.walferry.median();
        match self.bar {
            Bar::Speed(least) => self.speed.as_ref().map(|speed| speed.median() >= least),
            Bar::AtMost(most) => Some(ours <= most),
            Bar::AtLeast(least) => Some(ours >= least),
            Bar::Reported => None,
        }
    }

    fn bar_text(&self) -> String {
        match self.bar {
            Bar::Speed(least) => format!("≥ {least:.2} × the speed"),
            Bar::AtMost(most) => format!("≤ {} {}", number(most), self.unit),
            Bar::AtLeast(least) => format!("≥ {} {}", number(least), self.unit),
            Bar::Reported => "reported".into(),
        }
    }
}

/// Everything of one run.
#[derive(Debug)]
pub struct Results {
    pub rows: Vec<Row>,
    pub notes: Vec<String>,
    /// The servers' version and settings.
    pub servers: String,
    begun: String,
    load_before: String,
    /// CPU seconds of walferry and row changes, of every drain.
    pub cpu: Vec<(String, f64, u64)>,
}

impl Results {
    pub fn begin(options: &Options) -> Result<Results> {
        let mut notes = Vec::new();
        if options.quick {
            notes.push("A quick run: small sizes, in which fixed costs such as start-up weigh more.".into());
        }
        let load_before = load_average()?;
        let busy =
            load_before.split(' ').next().and_then(|load| load.parse::<f64>().ok()).is_some_and(|load| load > 0.5);
        if busy {
            notes.push(format!(
                "The machine was busy with other work when this began (load average {load_before}): only the ratios say anything."
            ));
        }
        Ok(Results {
            rows: Vec::new(),
            notes,
            servers: String::new(),
            begun: said_by("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            load_before,
            cpu: Vec::new(),
        })
    }

    pub fn note(&mut self, note: String) {
        eprintln!("{note}");
        self.notes.push(note);
    }

    /// Takes a line, and shows it.
    pub fn add(&mut self, row: Row) {
        eprintln!("{}", line(&row));
        self.rows.push(row);
    }

    /// B9 and B10: what walferry's own process used in all cases before.
    pub fn process(&mut self, setting: &Setting) {
        let footprints = setting.footprints.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for footprint in footprints {
            let peak = Sample(vec![footprint.peak_bytes as f64 / f64::from(1 << 20)]);
            self.add(Row::of_value("B9", &format!("peak memory, {}", footprint.case), "MiB", peak, Bar::AtMost(256.0)));
        }
        for (case, seconds, changes) in std::mem::take(&mut self.cpu) {
            let per_million = Sample(vec![seconds * 1e6 / changes.max(1) as f64]);
            let case = format!("CPU of our process per million changes, {case}");
            self.add(Row::of_value("B10", &case, "s", per_million, Bar::Reported));
        }
        self.rows.sort_by_key(|row| row.id[1..].parse::<u32>().unwrap_or(u32::MAX));
    }

    /// Writes the table and the plot.
    pub fn write(&self, options: &Options) -> Result<()> {
        std::fs::write(options.file("md"), self.markdown(options)?)?;
        std::fs::write(options.file("svg"), plot::svg(&self.rows))?;
        eprintln!("written: {} and {}", options.file("md").display(), options.file("svg").display());
        Ok(())
    }

    fn markdown(&self, options: &Options) -> Result<String> {
        let mut text = String::from("# Benchmark\n\n");
        let command = if options.quick { "make bench-quick" } else { "make bench" };
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let facts = [
            ("command", format!("`{command}` ({} rounds; arguments: `{}`)", options.rounds(), arguments.join(" "))),
            ("date", self.begun.clone()),
            (
                "machine",
                format!("{cores} × {}, {}", model.trim_start_matches([' ', '\t', ':']), said_by("uname", &["-sr"])),
            ),
            ("load average", format!("{} before, {} after", self.load_before, load_average()?)),
            ("servers", self.servers.clone()),
            (
                "walferry",
                format!("{} {}", env!("CARGO_PKG_VERSION"), said_by("git", &["rev-parse", "--short", "HEAD"])),
            ),
        ];
        for (name, value) in facts {
            let _ = writeln!(text, "- {name}: {value}");
        }
        text.push_str("\nSpeed is how many times as fast as the peer walferry is, the median over rounds in which both ran after each other; ");
        text.push_str("the other figures are medians with the least and the greatest. Everything runs on one machine, servers included.\n\n");
        text.push_str("| | case | walferry | peer | speed | bar | reached |\n|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let _ = writeln!(text, "{}", line(row));
        }
        let _ = writeln!(
            text,
            "\n![comparison]({})",
            options.file("svg").file_name().map(|name| name.to_string_lossy()).unwrap_or_default()
        );
        for note in &self.notes {
            let _ = write!(text, "\n{note}\n");
        }
        Ok(text)
    }
}

fn line(row: &Row) -> String {
    let peer = match &row.peer {
        Some((name, sample)) => format!("{name}: {} {}", sample.show(), row.unit),
        None => "–".into(),
    };
    let speed = row.speed.as_ref().map_or("–".into(), |speed| format!("{} ×", speed.show()));
    let reached = match row.reached() {
        Some(true) => "yes",
        Some(false) => "**no**",
        None => "–",
    };
    let (id, case, ours) = (row.id, &row.case, row.walferry.show());
    format!("| {id} | {case} | {ours} {} | {peer} | {speed} | {} | {reached} |", row.unit, row.bar_text())
}

/// The three averages of /proc/loadavg.
fn load_average() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

fn said_by(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
