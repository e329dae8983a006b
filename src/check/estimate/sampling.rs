//! Which pages are tried next, and what follows from how long they took.

use std::collections::VecDeque;
use std::ops::Range;

use tokio::time::Instant;

use super::{Estimate, STREAMS, Trial, TriedTable};
use crate::check::report::{first_ten, size};
use crate::observe::format;
use crate::source::catalog::Table;

/// Tables that are tried, at most: the largest.
const TABLES: usize = 8;
/// A table is tried in at most so many places.
const PLACES: i64 = 64;
/// The first piece of a table, in its bytes with TOAST, and the least there is between two places.
const FIRST_PIECE_BYTES: i64 = 1 << 20;
/// A piece takes at most so many times the pages of the one before.
const GROWTH: i64 = 4;

/// When what ends.
#[derive(Clone, Copy)]
pub(super) struct Clock {
    pub(super) copy_until: Instant,
    pub(super) until: Instant,
    pub(super) piece_seconds: f64,
}

/// A table that is tried.
pub(super) struct Sample<'a> {
    pub(super) table: &'a Table,
    /// Places from which pieces are taken: how many there are (a power of two), and how many were taken.
    pub(super) places: i64,
    pub(super) taken: i64,
    /// What pieces have left of their places, for when all places have been visited.
    pub(super) rest: VecDeque<Range<i64>>,
    /// Pages of the next piece.
    pub(super) piece_pages: i64,
    pub(super) pages_done: i64,
    pub(super) rows: u64,
    pub(super) seconds: f64,
    pub(super) in_flight: usize,
    pub(super) left_out: Option<String>,
}

/// A range of pages.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) sample: usize,
    pub(super) first_page: i64,
    pub(super) end_page: i64,
}

/// An index of the trial.
pub(super) struct Built {
    pub(super) bytes: i64,
    /// For as many rows as the whole table has: sorting n rows takes n log n.
    pub(super) seconds: f64,
}

pub(super) struct Progress<'a> {
    pub(super) samples: Vec<Sample<'a>>,
    pub(super) first: Option<Instant>,
    pub(super) last: Option<Instant>,
    /// Whether a stream has copied anything.
    pub(super) streams: [bool; STREAMS],
    pub(super) indexes: Vec<Built>,
    pub(super) notes: Vec<String>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(trial: &Trial<'a>) -> Progress<'a> {
        let tried = trial.tables.iter().filter(|table| table.pages > 0 && !table.columns.is_empty()).take(TABLES);
        let samples = tried.map(Sample::new).collect();
        Progress { samples, first: None, last: None, streams: [false; STREAMS], indexes: Vec::new(), notes: Vec::new() }
    }

    pub(super) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// What a stream copies next: of the table that has had the least time for its size.
    pub(super) fn next(&mut self, clock: &Clock) -> Option<Piece> {
        let left = clock.copy_until.saturating_duration_since(Instant::now()).as_secs_f64();
        if left == 0.0 {
            return None;
        }
        let had = |sample: &Sample<'_>| {
            (sample.seconds + sample.in_flight as f64 * clock.piece_seconds) / sample.table.bytes.max(1) as f64
        };
        let open = |sample: &Sample<'_>| sample.has_more() && sample.left_out.is_none();
        let (at, _) = self
            .samples
            .iter()
            .enumerate()
            .filter(|(_, sample)| open(sample))
            .min_by(|(_, one), (_, other)| had(one).total_cmp(&had(other)))?;
        self.samples[at].take(at, left)
    }

    /// The result, if anything was measured, or nothing is to be copied.
    pub(super) fn estimate(&self, trial: &Trial<'_>, bytes: i64, written: bool) -> Option<Estimate> {
        let mut tables = Vec::new();
        let (mut measured, mut spent, mut known, mut known_seconds) = (0.0, 0.0, 0, 0.0);
        for sample in &self.samples {
            let share = sample.pages_done as f64 / sample.table.pages as f64;
            let done = sample.table.bytes as f64 * share;
            if sample.pages_done > 0 {
                known += sample.table.bytes;
                known_seconds += sample.seconds / share;
            }
            measured += done;
            spent += sample.seconds;
            tables.push(TriedTable {
                table: sample.table.qualified(),
                bytes: sample.table.bytes,
                measured_bytes: done.round() as i64,
                measured_seconds: sample.seconds,
                left_out: sample.left_out.clone(),
            });
        }
        if bytes > 0 && measured == 0.0 {
            return None;
        }
        let streams = self.streams.iter().filter(|copied| **copied).count();
        // Tables that were not tried go at the rate of those that were.
        let rest = if measured > 0.0 { (bytes - known) as f64 * spent / measured } else { 0.0 };
        let seconds = (known_seconds + rest) / streams.max(1) as f64;
        let index_bytes = trial.index_bytes.unwrap_or(0);
        let (built, took) = self
            .indexes
            .iter()
            .fold((0, 0.0), |(bytes, seconds), index| (bytes + index.bytes, seconds + index.seconds));
        let at_once = streams.min(trial.index_jobs).max(1) as f64;
        let index_seconds = match (trial.index_bytes, built) {
            _ if bytes == 0 => Some(0.0),
            (Some(0), _) => Some(0.0),
            (Some(all), 1..) => Some(all as f64 * took / built as f64 / at_once),
            _ => None,
        };
        let with_pages = trial.tables.iter().filter(|table| table.pages > 0).count();
        let complete = with_pages == self.samples.len()
            && self.samples.iter().all(|sample| sample.pages_done == sample.table.pages);
        Some(Estimate {
            seconds,
            bytes,
            bytes_per_second: (bytes > 0).then(|| bytes as f64 / seconds.max(f64::MIN_POSITIVE)),
            index_seconds,
            index_bytes,
            measured_seconds: self.first.zip(self.last).map_or(0.0, |(first, last)| (last - first).as_secs_f64()),
            streams,
            written,
            complete,
            tables,
        })
    }

    /// The result in a few sentences.
    pub(super) fn message(&self, estimate: &Estimate, trial: &Trial<'_>, why_not_written: Option<&str>) -> String {
        let names = |tried: &mut dyn Iterator<Item = &TriedTable>| {
            first_ten(&tried.map(|table| table.table.clone()).collect::<Vec<_>>())
        };
        let measured = names(&mut estimate.tables.iter().filter(|table| table.measured_bytes > 0));
        let streams = if estimate.streams == 1 { "1 stream".into() } else { format!("{} streams", estimate.streams) };
        let rate = format::size_rate(estimate.bytes_per_second.unwrap_or_default());
        let mut message = match why_not_written {
            None => format!("The copy takes about {}", about(estimate.seconds)),
            Some(_) => format!("The reading alone takes about {}", about(estimate.seconds)),
        };
        message.push_str(&format!(
            ": {} at {rate}, measured for {} with {streams} of {measured}",
            size(estimate.bytes),
            format::duration(estimate.measured_seconds),
        ));
        if estimate.complete {
            message.push_str(", which is all there is");
        }
        match estimate.index_seconds {
            Some(0.0) => message.push_str("; there are no indexes."),
            Some(seconds) => message.push_str(&format!(
                "; indexes ({}) about {} more, by the keys of the same rows. They begin as soon as a table is copied.",
                size(estimate.index_bytes),
                about(seconds)
            )),
            None if why_not_written.is_some() => message.push('.'),
            None => message.push_str("; indexes were not tried."),
        }
        if let Some(why) = why_not_written {
            message.push_str(&format!(" Writing was not tried, and may be slower: {why}."));
        } else if trial.no_wal {
            message.push_str(" The target's wal_level is minimal: the trial wrote no WAL, and the copy will.");
        }
        if trial.copy_jobs > estimate.streams && !estimate.complete {
            message.push_str(&format!(
                " With {} copy jobs it may be faster; that was not tried and is not counted on.",
                trial.copy_jobs
            ));
        }
        let reasons = self.reasons();
        if !reasons.is_empty() {
            message.push_str(&format!(" Not all was tried: {reasons}."));
        }
        message
    }

    /// What was in the way.
    pub(super) fn reasons(&self) -> String {
        let tables = self.samples.iter().filter_map(|sample| {
            sample.left_out.as_ref().map(|reason| format!("{}: {reason}", sample.table.qualified()))
        });
        tables.chain(self.notes.iter().cloned()).collect::<Vec<_>>().join("; ")
    }
}

/// A time that nobody should take for exact.
fn about(seconds: f64) -> String {
    match seconds {
        ..1.0 => "a second".to_owned(),
        ..90.0 => format!("{seconds:.0} s"),
        ..5400.0 => format!("{:.0} min", seconds / 60.0),
        _ => {
            let minutes = (seconds / 60.0).round();
            format!("{:.0} h {:02.0} min", (minutes / 60.0).floor(), minutes % 60.0)
        }
    }
}

impl<'a> Sample<'a> {
    fn new(table: &'a Table) -> Sample<'a> {
        // Bytes of a page with what is TOASTed from it.
        let page_bytes = (table.bytes / table.pages).max(1);
        let piece_pages = (FIRST_PIECE_BYTES / page_bytes).max(1);
        // No place of a small table is larger than a piece, so that all of it is read.
        let places =
            ((table.pages + piece_pages - 1) / piece_pages).clamp(1, PLACES).cast_unsigned().next_power_of_two();
        Sample {
            table,
            places: places.cast_signed(),
            taken: 0,
            rest: VecDeque::new(),
            piece_pages,
            pages_done: 0,
            rows: 0,
            seconds: 0.0,
            in_flight: 0,
            left_out: None,
        }
    }

    fn has_more(&self) -> bool {
        self.taken < self.places || !self.rest.is_empty()
    }

    /// The next piece, of no more than what can be done in the time that is left.
    fn take(&mut self, sample: usize, seconds_left: f64) -> Option<Piece> {
        let range = if self.taken < self.places {
            // An odd step visits each place of a power of two once; with this one the first few are far apart.
            let place = self.taken * ((self.places * 5 / 8) | 1) % self.places;
            self.taken += 1;
            place * self.table.pages / self.places..(place + 1) * self.table.pages / self.places
        } else {
            self.rest.pop_front()?
        };
        let mut pages = self.piece_pages;
        if self.pages_done > 0 {
            let fits = self.pages_done as f64 / self.seconds.max(1e-6) * seconds_left;
            pages = pages.min(fits as i64).max(1);
        }
        let end_page = range.end.min(range.start + pages);
        if end_page < range.end {
            self.rest.push_back(end_page..range.end);
        }
        self.in_flight += 1;
        Some(Piece { sample, first_page: range.start, end_page })
    }

    pub(super) fn done(&mut self, piece: Piece, rows: u64, seconds: f64, piece_seconds: f64) {
        let pages = piece.end_page - piece.first_page;
        self.in_flight -= 1;
        self.pages_done += pages;
        self.rows += rows;
        self.seconds += seconds;
        let fits = (pages as f64 * piece_seconds / seconds.max(1e-6)) as i64;
        self.piece_pages = fits.clamp(1, self.piece_pages.saturating_mul(GROWTH));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::estimate::tests::trial;
    use crate::connection::ConnectionSpec;
    use crate::source::catalog::Column;

    fn table(name: &str, pages: i64, bytes: i64) -> Table {
        let column = Column {
            name: "id".into(),
            number: 1,
            type_oid: 20,
            type_name: "bigint".into(),
            type_modifier: -1,
            not_null: true,
            identity_always: false,
            binary_safe: true,
            byte_equal: true,
            equality_schema: Some("pg_catalog".into()),
        };
        Table { columns: vec![column], key: vec![0], pages, bytes, ..Table::plain("public", name) }
    }

    fn spec() -> ConnectionSpec {
        ConnectionSpec::parse("host=127.0.0.1 user=app dbname=shop").unwrap()
    }

    #[test]
    fn no_page_is_read_twice_none_is_forgotten_and_a_large_table_is_read_all_over() {
        for pages in [1, 2, 3, 127, 128, 129, 1000, 8191, 99_999] {
            let table = table("t", pages, pages * 8192);
            let mut sample = Sample::new(&table);
            let mut seen = vec![0; pages as usize];
            while let Some(piece) = sample.take(0, 1.0) {
                assert!(piece.first_page < piece.end_page);
                // As slow as it can be in the middle of it.
                sample.piece_pages = (sample.piece_pages / 3).max(1);
                (piece.first_page..piece.end_page).for_each(|page| seen[page as usize] += 1);
            }
            assert_eq!(seen, vec![1; pages as usize]);
        }
        let table = table("t", 1 << 20, 8 << 30);
        let mut sample = Sample::new(&table);
        let firsts: Vec<i64> = (0..64).map(|_| sample.take(0, 1.0).unwrap().first_page).collect();
        let mut sorted = firsts.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 64, "{firsts:?}");
        assert!(firsts[1].abs_diff(firsts[0]) > 1 << 18, "{firsts:?}");
    }

    #[test]
    fn a_piece_takes_no_longer_than_it_may_by_the_rate_of_those_before() {
        let table = table("t", 1 << 20, 8 << 30);
        let mut sample = Sample::new(&table);
        let piece = sample.take(0, 5.0).unwrap();
        assert_eq!(piece.end_page - piece.first_page, 128);
        // 128 pages in 10 ms: half a second would hold 6400, but it grows by four.
        sample.done(piece, 1, 0.01, 0.5);
        let piece = sample.take(0, 5.0).unwrap();
        assert_eq!(piece.end_page - piece.first_page, 512);
        sample.done(piece, 1, 5.12, 0.5);
        let piece = sample.take(0, 5.0).unwrap();
        assert_eq!(piece.end_page - piece.first_page, 50);
        sample.done(piece, 1, 0.5, 0.5);
        let piece = sample.take(0, 0.01).unwrap();
        assert_eq!(piece.end_page - piece.first_page, 1, "only what fits into the time that is left");
    }

    #[test]
    fn what_was_not_tried_goes_at_the_rate_of_what_was_and_streams_share_the_work() {
        let (spec, mut tables) = (spec(), vec![table("large", 1000, 8_000_000), table("slow", 100, 1_000_000)]);
        tables.extend((0..7).map(|_| table("small", 10, 100_000)));
        let trial = trial(&spec, &tables);
        let mut progress = Progress::new(&trial);
        assert_eq!(progress.samples.len(), TABLES);
        let whole = |sample, pages| Piece { sample, first_page: 0, end_page: pages };
        progress.samples[0].in_flight = 1;
        progress.samples[0].done(whole(0, 100), 10, 1.0, 0.5);
        progress.samples[1].in_flight = 1;
        progress.samples[1].done(whole(1, 50), 10, 3.0, 0.5);
        progress.streams = [true, true];
        progress.indexes.push(Built { bytes: 1 << 20, seconds: 0.5 });
        let estimate = progress.estimate(&trial, 9_700_000, true).unwrap();
        // 10 s and 6 s for the two; 1.3 MB in 4 s for the other 0.7 MB; by two streams.
        let seconds = (10.0 + 6.0 + 700_000.0 * 4.0 / 1_300_000.0) / 2.0;
        assert!((estimate.seconds - seconds).abs() < 1e-6, "{estimate:?}");
        assert!((estimate.bytes_per_second.unwrap() - 9_700_000.0 / seconds).abs() < 1e-3);
        assert!((estimate.index_seconds.unwrap() - 1.0).abs() < 1e-9, "4 MiB of indexes, 2 at once");
        assert_eq!((estimate.complete, estimate.streams, estimate.tables[0].measured_bytes), (false, 2, 800_000));
        let message = progress.message(&estimate, &trial, None);
        assert!(message.starts_with("The copy takes about 9 s: 9.3 MiB at "), "{message}");
        assert!(message.contains("with 2 streams of \"public\".\"large\", \"public\".\"slow\"; indexes"), "{message}");
        assert!(message.contains("With 4 copy jobs it may be faster; that was not tried"), "{message}");
        let message = progress.message(&estimate, &trial, Some("it is full"));
        assert!(message.starts_with("The reading alone takes about 9 s"), "{message}");
    }

    #[test]
    fn times_are_said_as_roughly_as_they_are_known() {
        let texts = [0.2, 42.4, 720.0, 5399.0, 90_000.0].map(about);
        assert_eq!(texts, ["a second", "42 s", "12 min", "90 min", "25 h 00 min"]);
    }
}
