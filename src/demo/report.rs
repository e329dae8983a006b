//! What the demo has to say at its end: numbers first, then the verdict.

use std::fmt::Write;

use serde::Serialize;

use super::book::{Book, Side};
use super::compare::TableComparison;
use super::migration::{Cutover, plain};
use super::proof::{self, Flaw};

/// How many flaws are shown; the rest is counted.
const FLAWS_SHOWN: usize = 10;

/// Everything the demo measured and proved.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this structure as JSON.
    pub version: u32,
    /// Rows before anybody wrote.
    pub rows: u64,
    /// Tables, partitions counted each.
    pub tables: u64,
    /// Bytes on the source, with indexes.
    pub bytes: u64,
    /// How many sessions wrote all the time.
    pub writers: u32,
    /// From the start of `migrate` to the end of copying and indexing.
    pub copy_seconds: f64,
    /// From the start of `migrate` to `ready_to_cutover`.
    pub ready_seconds: f64,
    /// The largest lag seen while following, as far as known.
    pub lag_seconds_max: Option<f64>,
    /// The same in bytes.
    pub lag_bytes_max: Option<f64>,
    /// As `cutover` says.
    pub downtime_ms: f64,
    /// Each step of the cutover and its milliseconds.
    pub steps: Vec<(String, f64)>,
    /// How often `cutover` was tried.
    pub cutover_attempts: u32,
    /// As `cutover` says.
    pub cutover_lsn: String,
    /// As `cutover` says.
    pub sequences_synced: String,
    /// For how long no write was acknowledged around the switch.
    pub application_gap_ms: Option<u64>,
    /// Before the switch.
    pub at_source: Tally,
    /// After it.
    pub at_target: Tally,
    /// Writes whose COMMIT was never answered.
    pub unknown: u64,
    /// Transactions that the application rolled back or that failed: none of them may be there.
    pub rolled_back: u64,
    /// What the application was told instead of an answer: server, words, how often.
    pub application_errors: Vec<(Side, String, u64)>,
    /// Every table.
    pub comparisons: Vec<TableComparison>,
    /// Everything that is not as it should be, in words. Empty: the demo has succeeded.
    pub flaws: Vec<String>,
    /// From the first server's start to the last one's end.
    pub total_seconds: f64,
}

/// Writes of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Their COMMIT was answered.
    pub acknowledged: u64,
    /// They are on the target with all they did.
    pub found: u64,
    /// They are not.
    pub missing: u64,
}

impl Report {
    /// A report of so many rows, tables and bytes, with nothing measured yet.
    pub fn new((rows, tables, bytes): (u64, u64, u64), writers: u32) -> Report {
        let nothing = Tally { acknowledged: 0, found: 0, missing: 0 };
        Report {
            version: 1,
            rows,
            tables,
            bytes,
            writers,
            copy_seconds: 0.0,
            ready_seconds: 0.0,
            lag_seconds_max: None,
            lag_bytes_max: None,
            downtime_ms: 0.0,
            steps: Vec::new(),
            cutover_attempts: 0,
            cutover_lsn: String::new(),
            sequences_synced: String::new(),
            application_gap_ms: None,
            at_source: nothing,
            at_target: nothing,
            unknown: 0,
            rolled_back: 0,
            application_errors: Vec::new(),
            comparisons: Vec::new(),
            flaws: Vec::new(),
            total_seconds: 0.0,
        }
    }

    /// Takes in what `cutover` said.
    pub fn note_cutover(&mut self, cutover: &Cutover, attempts: u32) {
        self.downtime_ms = cutover.downtime_ms;
        self.steps = cutover.steps.iter().map(|step| (step.name.clone(), step.ms)).collect();
        self.cutover_attempts = attempts;
        self.cutover_lsn = plain(&cutover.cutover_lsn);
        self.sequences_synced = match &cutover.sequences_synced {
            serde_json::Value::Array(sequences) => sequences.len().to_string(),
            other => plain(other),
        };
    }

    /// Takes in what the application knows and what of it is flawed.
    pub fn note_writes(&mut self, book: &Book, flaws: &[Flaw]) {
        let tally = |side| {
            let (acknowledged, missing) = (book.acknowledged_at(side), proof::missing(book, flaws, side));
            Tally { acknowledged, found: acknowledged - missing, missing }
        };
        (self.at_source, self.at_target) = (tally(Side::Source), tally(Side::Target));
        self.unknown = book.unknown.len() as u64;
        self.rolled_back = book.rolled_back.len() as u64;
        self.application_gap_ms = book.gap_ms();
        self.application_errors =
            book.errors.iter().map(|((side, text), count)| (*side, text.clone(), *count)).collect();
        self.flaws.extend(flaws.iter().map(|flaw| format!("write {}: {}", flaw.number, flaw.text)));
        if self.at_source.acknowledged == 0 || self.at_target.acknowledged == 0 {
            self.flaws.push("the application wrote nothing on one of the two sides, so nothing is proven".to_owned());
        }
        if book.refused_at_target > 0 {
            let count = book.refused_at_target;
            self.flaws.push(format!("the target refused the application {count} times what the source allowed"));
        }
        if book.unique_violations > 0 {
            let count = book.unique_violations;
            self.flaws.push(format!("the application met {count} duplicate keys: a sequence was left behind"));
        }
    }

    /// Takes in how the tables compare.
    pub fn note_tables(&mut self, comparisons: Vec<TableComparison>) {
        for table in comparisons.iter().filter(|table| !table.equal) {
            let TableComparison { table, source_rows, target_rows, .. } = table;
            self.flaws.push(format!(
                "the table {table} differs: {source_rows} rows on the source, {target_rows} on the target, hashes compared"
            ));
        }
        self.comparisons = comparisons;
    }

    /// Whether everything is as it should be.
    pub fn is_flawless(&self) -> bool {
        self.flaws.is_empty()
    }

    /// The report as text for a person, with colours or without.
    pub fn render(&self, colour: bool) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_to(&mut text, Paint { colour });
        text
    }

    fn write_to(&self, out: &mut String, paint: Paint) -> std::fmt::Result {
        writeln!(out, "\n{}", paint.bold("A web shop, moved to another server while people were buying"))?;
        let line = |out: &mut String, name: &str, value: String| writeln!(out, "  {name:<22}{value}");
        let (rows, tables) = (grouped(self.rows), self.tables);
        line(out, "the shop", format!("{rows} rows in {tables} tables, {}", bytes(self.bytes as f64)))?;
        let rate = self.bytes as f64 / self.copy_seconds.max(0.001);
        line(out, "copied and indexed", format!("in {:.1} s ({}/s)", self.copy_seconds, bytes(rate)))?;
        line(out, "ready to cut over", format!("after {:.1} s", self.ready_seconds))?;
        let seconds = self.lag_seconds_max.map(|lag| format!("{:.0} ms", lag * 1000.0));
        let in_bytes = self.lag_bytes_max.map(bytes);
        let lag: Vec<String> = [seconds, in_bytes].into_iter().flatten().collect();
        let lag = if lag.is_empty() { "not known".to_owned() } else { lag.join(", ") };
        line(out, "lag while following", format!("at most {lag}"))?;
        line(out, "downtime", paint.bold(&format!("{:.0} ms", self.downtime_ms)))?;
        for (name, ms) in &self.steps {
            writeln!(out, "    {name:<30}{ms:>9.1} ms")?;
        }
        let gap = self.application_gap_ms.map_or_else(|| "not known".to_owned(), |gap| format!("{} ms", grouped(gap)));
        line(out, "seen by the shop", format!("{gap} from its last write there to its first one here"))?;
        if self.cutover_attempts > 1 {
            line(out, "cutovers tried", format!("{} (an aborted one goes back to following)", self.cutover_attempts))?;
        }

        writeln!(out, "\n{}", paint.bold("Every write that was acknowledged, looked for on the target by plain SQL"))?;
        writeln!(out, "  {:<26}{:>14}{:>12}{:>12}", "", "acknowledged", "found", "missing")?;
        for (name, tally) in [("before, on the source", self.at_source), ("after, on the target", self.at_target)] {
            let (acknowledged, found) = (grouped(tally.acknowledged), grouped(tally.found));
            let missing = paint.verdict(&format!("{:>12}", grouped(tally.missing)), tally.missing == 0);
            writeln!(out, "  {name:<26}{acknowledged:>14}{found:>12}{missing}")?;
        }
        let writers = self.writers;
        writeln!(
            out,
            "  by {writers} writers; {} rolled back or refused, {} without an answer to COMMIT",
            self.rolled_back, self.unknown
        )?;
        if !self.application_errors.is_empty() {
            writeln!(out, "\n{}", paint.bold("What the application was told meanwhile"))?;
            for (side, words, count) in &self.application_errors {
                let side = if *side == Side::Source { "source" } else { "target" };
                writeln!(out, "  {count:>6} × {side}: {}", words.lines().next().unwrap_or_default())?;
            }
        }
        self.write_verdict(out, paint)
    }

    fn write_verdict(&self, out: &mut String, paint: Paint) -> std::fmt::Result {
        writeln!(out)?;
        if self.is_flawless() {
            let rows: i64 = self.comparisons.iter().map(|table| table.target_rows).sum();
            let rows = grouped(rows.unsigned_abs());
            let tick = paint.verdict("✓", true);
            writeln!(out, "  {tick} {} tables equal in all columns of {rows} rows", self.comparisons.len())?;
            writeln!(out, "  {tick} constraints, indexes, triggers, views, functions, types and grants equal")?;
            writeln!(out, "  {tick} {} sequences went along, and no key came twice", self.sequences_synced)?;
            writeln!(out, "  {tick} nothing left behind on either server")?;
            let verdict = format!("Nothing is missing. {:.0} s in all.", self.total_seconds);
            return writeln!(out, "\n{}", paint.verdict(&verdict, true));
        }
        for flaw in self.flaws.iter().take(FLAWS_SHOWN) {
            writeln!(out, "  {} {flaw}", paint.verdict("✗", false))?;
        }
        if self.flaws.len() > FLAWS_SHOWN {
            writeln!(out, "  … and {} more", self.flaws.len() - FLAWS_SHOWN)?;
        }
        let missing = self.at_source.missing + self.at_target.missing;
        let verdict = format!("The migration is NOT right: {} acknowledged writes are missing.", grouped(missing));
        writeln!(out, "\n{}", paint.verdict(&verdict, false))
    }
}

#[derive(Clone, Copy)]
struct Paint {
    colour: bool,
}

impl Paint {
    fn bold(self, text: &str) -> String {
        self.with(text, "1")
    }

    fn verdict(self, text: &str, good: bool) -> String {
        self.with(text, if good { "1;32" } else { "1;31" })
    }

    fn with(self, text: &str, code: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// `1234567` as `1 234 567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes as a person reads it, in powers of 1024.
pub fn bytes(number: f64) -> String {
    let mut value = number;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{value:.0} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::book::{AFTER_SWITCH, Write as ApplicationWrite};

    fn a_report(flaws: &[Flaw]) -> Report {
        let mut book = Book::default();
        for number in [1, 2, AFTER_SWITCH] {
            book.acknowledge(ApplicationWrite { number, facts: Vec::new() });
        }
        book.error(Side::Source, "terminating connection (SQLSTATE 57P01)".to_owned());
        let mut report = Report::new((300_123, 14, 182 << 20), 4);
        let cutover = serde_json::json!({"downtime_ms": 41.4, "cutover_lsn": "0/1", "sequences_synced": ["a", "b"],
                                         "steps": [{"name": "fence", "ms": 7.25}]});
        report.note_cutover(&serde_json::from_value(cutover).unwrap(), 1);
        report.note_writes(&book, flaws);
        let table = TableComparison { table: "stock".to_owned(), source_rows: 9, target_rows: 9, equal: true };
        report.note_tables(vec![table]);
        report
    }

    #[test]
    fn a_good_end_is_told_in_numbers() {
        let report = a_report(&[]);
        assert!(report.is_flawless());
        let text = report.render(false);
        for words in ["300 123 rows in 14 tables, 182.0 MiB", "41 ms", "7.2 ms", "2 sequences", "Nothing is missing"] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        assert!(text.contains("1 × source: terminating connection (SQLSTATE 57P01)"), "{text}");
        assert!(!text.contains('\x1b') && report.render(true).contains("\x1b[1;32m"));
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert_eq!(serde_json::to_value(&report).unwrap()["at_source"]["found"], 2);
    }

    #[test]
    fn one_missing_write_spoils_the_verdict() {
        let report = a_report(&[Flaw { number: 2, text: "its row is missing".to_owned() }]);
        let text = report.render(false);
        assert!(!report.is_flawless() && !text.contains("Nothing is missing") && !text.contains('✓'), "{text}");
        assert!(text.contains("✗ write 2: its row is missing") && text.contains("NOT right: 1 acknowledged"), "{text}");
        assert_eq!(report.at_source, Tally { acknowledged: 2, found: 1, missing: 1 });
    }

    #[test]
    fn what_proves_nothing_is_no_success() {
        let mut report = Report::new((1, 1, 1), 1);
        report.note_writes(&Book::default(), &[]);
        assert!(!report.is_flawless(), "nobody wrote");
        let mut report = a_report(&[]);
        let table = TableComparison { table: "stock".to_owned(), source_rows: 9, target_rows: 8, equal: false };
        report.note_tables(vec![table]);
        assert!(report.render(false).contains("the table stock differs: 9 rows on the source, 8"));
        let mut report = Report::new((1, 1, 1), 1);
        let book = Book { unique_violations: 2, ..Book::default() };
        report.note_writes(&book, &[]);
        assert!(report.flaws.iter().any(|flaw| flaw.contains("2 duplicate keys")));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1 000", "1 234 567"]);
        assert_eq!([0.0, 1023.0, 1536.0, 5_242_880.0].map(bytes), ["0 B", "1023 B", "1.5 KiB", "5.0 MiB"]);
    }
}
