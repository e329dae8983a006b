//! From "these cells differ" to "these keys differ", in bounded memory.
//!
//! A cell with many rows is split by more bits of the hash of the key; cells with few rows are fetched, some thousand
//! rows at a time, as key and one hash per column, and matched here. The search ends once enough rows are named, so a
//! table that differs everywhere costs no more than one that differs in a few places.

use std::collections::HashMap;

use futures_util::{Stream, StreamExt};
use tokio_postgres::{Client, Row};

use super::Options;
use super::compare::{Comparison, Digests, Pair};
use super::hash::Cells;
use super::plan::{Range, bits_for};
use super::report::{Difference, DifferenceKind, tuple};
use crate::error::{Context, Result};

/// Values fetched at a time and side: a hash of 8 bytes each.
const FETCH_VALUES: usize = 100_000;
/// Rows fetched at a time and side.
const FETCH_ROWS_MAX: i64 = 4_000;
/// Rows fetched at a time and side, however wide they are.
const FETCH_ROWS_MIN: i64 = 100;
/// Cells split in one statement; the others wait.
const SPLIT_CELLS: usize = 32;
/// Bits by which cells are split at once.
const SPLIT_BITS_MAX: u32 = 10;
/// Rows that are together in a cell of so many bits are copies of one row; splitting further is useless.
const BITS_MAX: u32 = 40;
/// A cell of at most so many rows is exchanged whole.
const CELL_ROWS_FINE: i64 = 8;
/// Cells that one split makes at most, as bits: they are kept in memory.
const FINE_CELLS_BITS_MAX: u32 = 18;
/// Cells of a table that are exchanged one by one; what differs beyond them is exchanged in coarser pieces.
const FINE_CELLS_MAX: usize = 1 << 20;
/// Characters of a value that are shown.
const VALUE_LENGTH: usize = 200;

/// Cells of a range that differ, with the rows in each (the larger number of both sides).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suspects {
    range: Range,
    bits: u32,
    cells: Vec<(i64, i64)>,
}

impl Suspects {
    /// The cells in which two sides differ, if there are any.
    pub(super) fn between(range: &Range, bits: u32, source: &Digests, target: &Digests) -> Option<Suspects> {
        let mut cells: Vec<(i64, i64)> = Vec::new();
        for (&cell, digest) in source {
            let other = target.get(&cell).copied().unwrap_or_default();
            if *digest != other {
                cells.push((cell, digest.rows.max(other.rows)));
            }
        }
        cells.extend(
            target.iter().filter(|(cell, _)| !source.contains_key(cell)).map(|(&cell, digest)| (cell, digest.rows)),
        );
        (!cells.is_empty()).then(|| Suspects { range: range.clone(), bits, cells })
    }

    /// Takes out cells of together at most `rows_max` rows to fetch, or else some cells to split.
    fn take(&mut self, rows_max: i64) -> Step {
        let fits = |cell: &(i64, i64)| cell.1 <= rows_max;
        let hopeless = self.bits >= BITS_MAX;
        let mut rows = 0;
        let mut fetch = Vec::new();
        self.cells.retain(|cell| {
            let take = if fits(cell) { rows + cell.1 <= rows_max } else { hopeless && fetch.is_empty() };
            if take {
                rows += cell.1;
                fetch.push(cell.0);
            }
            !take
        });
        if !fetch.is_empty() {
            return Step::Fetch(Cells { bits: self.bits, cells: fetch });
        }
        let split: Vec<(i64, i64)> = self.cells.drain(..self.cells.len().min(SPLIT_CELLS)).collect();
        let largest = split.iter().map(|cell| cell.1).max().unwrap_or(0);
        let bits = bits_for(largest / (rows_max / 4).max(1), SPLIT_BITS_MAX).max(1);
        let cells = split.into_iter().map(|cell| cell.0).collect();
        Step::Split(Cells { bits: self.bits, cells }, (self.bits + bits).min(BITS_MAX))
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Fetch(Cells),
    /// Into cells of so many bits.
    Split(Cells, u32),
}

/// Cells of a range that are exchanged together.
pub(super) struct Piece {
    pub(super) range: Range,
    pub(super) cells: Cells,
}

/// Splits cells that differ until few equal rows are left in those that still do.
pub(super) async fn refine(comparison: &Comparison<'_>, pair: &Pair, suspects: Vec<Suspects>) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut kept = 0;
    let mut waiting = suspects;
    while let Some(Suspects { range, bits, cells }) = waiting.pop() {
        let room = FINE_CELLS_BITS_MAX.saturating_sub(bits_for(cells.len() as i64, FINE_CELLS_BITS_MAX));
        let (coarse, fine): (Vec<_>, Vec<_>) = cells
            .into_iter()
            .partition(|cell| cell.1 > CELL_ROWS_FINE && bits < BITS_MAX && room > 0 && kept < FINE_CELLS_MAX);
        if !fine.is_empty() {
            let cells = Cells { bits, cells: fine.into_iter().map(|cell| cell.0).collect() };
            kept += cells.cells.len();
            pieces.push(Piece { range: range.clone(), cells });
        }
        let Some(largest) = coarse.iter().map(|cell| cell.1).max() else { continue };
        let more = bits_for(largest / (CELL_ROWS_FINE / 2), SPLIT_BITS_MAX.min(room)).max(1);
        let finer = (bits + more).min(BITS_MAX);
        let rows: i64 = coarse.iter().map(|cell| cell.1).sum();
        let cells = Cells { bits, cells: coarse.into_iter().map(|cell| cell.0).collect() };
        let (source, target) = tokio::try_join!(
            comparison.digests(&pair.source, comparison.source, Some(&range), Some(&cells), finer),
            comparison.digests(&pair.target, comparison.target, Some(&range), Some(&cells), finer)
        )?;
        let Some(split) = Suspects::between(&range, finer, &source, &target) else { continue };
        // Where most of it differs, it is no use to name the cells.
        if split.cells.iter().map(|cell| cell.1).sum::<i64>() > rows / 2 {
            kept += cells.cells.len();
            pieces.push(Piece { range, cells });
        } else {
            waiting.push(split);
        }
    }
    Ok(pieces)
}

/// The differing rows of a table.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) named: Vec<Difference>,
    pub(super) total: u64,
    pub(super) complete: bool,
    pub(super) rows_fetched: u64,
}

impl Default for Found {
    fn default() -> Found {
        Found { named: Vec::new(), total: 0, complete: true, rows_fetched: 0 }
    }
}

/// A differing row, before it is put in words.
struct Differing {
    kind: DifferenceKind,
    key_hash: i64,
    /// Empty where there is no key.
    key: Key,
    words: String,
    columns: Vec<String>,
}

type Key = Vec<Option<Vec<u8>>>;

/// Names the rows that differ in these cells.
pub(super) async fn narrow(
    comparison: &Comparison<'_>,
    pair: &Pair,
    suspects: Vec<Suspects>,
    options: &Options,
) -> Result<Found> {
    let columns = comparison.shared.columns.len().max(1);
    let rows_max =
        i64::try_from(FETCH_VALUES / columns).unwrap_or(FETCH_ROWS_MAX).clamp(FETCH_ROWS_MIN, FETCH_ROWS_MAX);
    let mut found = Found::default();
    let mut waiting = suspects;
    // Taken from the end: the lowest range first, whichever was compared first.
    waiting.sort_by(|a, b| b.range.cmp(&a.range));
    while let Some(mut suspects) = waiting.pop() {
        if suspects.cells.is_empty() {
            continue;
        }
        if found.named.len() >= options.max_keys && found.total > 0 {
            found.complete = false;
            break;
        }
        let step = suspects.take(rows_max);
        let range = suspects.range.clone();
        waiting.push(suspects);
        match step {
            Step::Split(cells, bits) => {
                let (source, target) = tokio::try_join!(
                    comparison.digests(&pair.source, comparison.source, Some(&range), Some(&cells), bits),
                    comparison.digests(&pair.target, comparison.target, Some(&range), Some(&cells), bits)
                )?;
                waiting.extend(Suspects::between(&range, bits, &source, &target));
            }
            Step::Fetch(cells) => {
                let mut differing = if comparison.shared.key.is_empty() {
                    differing_by_hash(comparison, pair, &range, &cells, &mut found).await?
                } else {
                    differing_by_key(comparison, pair, &range, &cells, &mut found).await?
                };
                differing.sort_by(|a, b| (a.kind, &a.words).cmp(&(b.kind, &b.words)));
                differing.truncate(options.max_keys - found.named.len());
                let named = named(comparison, pair, &range, differing, options.show_values).await?;
                found.named.extend(named);
            }
        }
    }
    found.named.sort_by(|a, b| (a.kind, &a.key).cmp(&(b.kind, &b.key)));
    Ok(found)
}

/// One row of each side per hash, where there is no key: how often does each side have it?
async fn differing_by_hash(
    comparison: &Comparison<'_>,
    pair: &Pair,
    range: &Range,
    cells: &Cells,
    found: &mut Found,
) -> Result<Vec<Differing>> {
    let mut counts: HashMap<(i64, i64), (i64, i64)> = HashMap::new();
    for (client, from, is_source) in [(&pair.source, comparison.source, true), (&pair.target, comparison.target, false)]
    {
        let statement = comparison.statements.rows_by_hash(from, &range.condition(), cells);
        let mut rows = std::pin::pin!(stream(comparison, client, &statement).await?);
        while let Some(row) = rows.next().await {
            let row = row?;
            found.rows_fetched += 1;
            let hash = (row.get(0), row.get(1));
            let count = counts.entry(hash).or_default();
            if is_source {
                count.0 = row.get(2);
                continue;
            }
            count.1 = row.get(2);
            if count.0 == count.1 {
                counts.remove(&hash);
            }
        }
    }
    let differing = counts.into_iter().map(|((low, high), (source, target))| {
        found.total += source.abs_diff(target);
        let kind = if source > target { DifferenceKind::MissingOnTarget } else { DifferenceKind::ExtraOnTarget };
        let words = format!("row {low:016x}{high:016x}: {source} on the source, {target} on the target");
        Differing { kind, key_hash: low, key: Vec::new(), words, columns: Vec::new() }
    });
    Ok(differing.collect())
}

/// Matches the rows of both sides by key.
///
/// A key is unique on the source, but the target may lack the index that makes it so: each key holds a list.
async fn differing_by_key(
    comparison: &Comparison<'_>,
    pair: &Pair,
    range: &Range,
    cells: &Cells,
    found: &mut Found,
) -> Result<Vec<Differing>> {
    let mut rows_source: HashMap<Key, Vec<(i64, Vec<i64>)>> = HashMap::new();
    let statement = comparison.statements.rows_by_key(comparison.source, &range.condition(), cells);
    let mut rows = std::pin::pin!(stream(comparison, &pair.source, &statement).await?);
    while let Some(row) = rows.next().await {
        let row = row?;
        found.rows_fetched += 1;
        rows_source.entry(row.get(2)).or_default().push((row.get(0), row.get(1)));
    }
    // What the target has and the source has not exactly so.
    let mut rows_target: Vec<(Key, i64, Vec<i64>)> = Vec::new();
    let statement = comparison.statements.rows_by_key(comparison.target, &range.condition(), cells);
    let mut rows = std::pin::pin!(stream(comparison, &pair.target, &statement).await?);
    while let Some(row) = rows.next().await {
        let row = row?;
        found.rows_fetched += 1;
        let (key_hash, hashes, key): (i64, Vec<i64>, Key) = (row.get(0), row.get(1), row.get(2));
        let same = rows_source.get_mut(&key);
        let place = same.as_ref().and_then(|same| same.iter().position(|other| other.1 == hashes));
        match (same, place) {
            (Some(same), Some(place)) => drop(same.swap_remove(place)),
            _ => rows_target.push((key, key_hash, hashes)),
        }
    }
    let shared = comparison.shared;
    let name = |at: usize| shared.columns[at].name.as_str();
    let words = |key: &Key| tuple(shared.key.iter().map(|&at| name(at)), key);
    let mut differing = Vec::new();
    for (key, key_hash, hashes) in rows_target {
        let (kind, columns) = match rows_source.get_mut(&key).and_then(Vec::pop) {
            Some((_, others)) => {
                let differ = (0..shared.columns.len()).filter(|&at| hashes.get(at) != others.get(at));
                (DifferenceKind::Different, differ.map(|at| name(at).to_owned()).collect())
            }
            None => (DifferenceKind::ExtraOnTarget, Vec::new()),
        };
        differing.push(Differing { kind, key_hash, words: words(&key), key, columns });
    }
    for (key, rows) in rows_source {
        for (key_hash, _) in rows {
            let kind = DifferenceKind::MissingOnTarget;
            differing.push(Differing { kind, key_hash, words: words(&key), key: key.clone(), columns: Vec::new() });
        }
    }
    found.total += differing.len() as u64;
    Ok(differing)
}

/// Puts differing rows in words, with their values if those are wanted.
async fn named(
    comparison: &Comparison<'_>,
    pair: &Pair,
    range: &Range,
    differing: Vec<Differing>,
    show_values: bool,
) -> Result<Vec<Difference>> {
    let mut values = (HashMap::new(), HashMap::new());
    if show_values && !differing.is_empty() {
        let hashes: Vec<i64> = differing.iter().map(|row| row.key_hash).collect();
        values = tokio::try_join!(
            rows_in_words(comparison, &pair.source, comparison.source, range, &hashes),
            rows_in_words(comparison, &pair.target, comparison.target, range, &hashes)
        )?;
    }
    let in_words = differing.into_iter().map(|row| {
        let identity = (row.key_hash, row.key);
        Difference {
            kind: row.kind,
            key: row.words,
            source_row: values.0.get(&identity).cloned(),
            target_row: values.1.get(&identity).cloned(),
            columns: row.columns,
        }
    });
    Ok(in_words.collect())
}

async fn rows_in_words(
    comparison: &Comparison<'_>,
    client: &Client,
    from: &str,
    range: &Range,
    key_hashes: &[i64],
) -> Result<HashMap<(i64, Key), String>> {
    let statement = comparison.statements.values(from, &range.condition(), key_hashes, VALUE_LENGTH);
    let mut rows = std::pin::pin!(stream(comparison, client, &statement).await?);
    let mut found = HashMap::new();
    while let Some(row) = rows.next().await {
        let row = row?;
        found.entry((row.get(0), row.get(1))).or_insert_with(|| {
            let values: Vec<Option<Vec<u8>>> = row.get(2);
            tuple(comparison.shared.columns.iter().map(|column| column.name.as_str()), &values)
        });
    }
    Ok(found)
}

async fn stream(
    comparison: &Comparison<'_>,
    client: &Client,
    statement: &str,
) -> Result<impl Stream<Item = Result<Row>> + use<>> {
    let table = comparison.table.to_owned();
    let doing = move || format!("reading the differing rows of table {table}");
    let rows = client.query_typed_raw(statement, Vec::<(i64, tokio_postgres::types::Type)>::new()).await;
    Ok(rows.context(&doing)?.map(move |row| row.context(&doing)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspects(bits: u32, cells: &[(i64, i64)]) -> Suspects {
        Suspects { range: Range::All, bits, cells: cells.to_vec() }
    }

    #[test]
    fn small_cells_are_fetched_together_and_no_more_than_fit() {
        let mut some = suspects(3, &[(0, 40), (1, 5000), (2, 50), (5, 30)]);
        assert_eq!(some.take(100), Step::Fetch(Cells { bits: 3, cells: vec![0, 2] }));
        assert_eq!(some.cells, [(1, 5000), (5, 30)]);
        assert_eq!(some.take(100), Step::Fetch(Cells { bits: 3, cells: vec![5] }));
        assert_eq!(some.take(100), Step::Split(Cells { bits: 3, cells: vec![1] }, 11));
        assert_eq!(some.cells, []);
    }

    #[test]
    fn splitting_always_ends() {
        let mut some = suspects(0, &[(0, i64::MAX)]);
        for _ in 0..BITS_MAX {
            match some.take(100) {
                Step::Fetch(_) => return,
                Step::Split(_, bits) => {
                    assert!(bits > some.bits);
                    some = suspects(bits, &[(0, i64::MAX)]);
                }
            }
        }
        panic!("a cell of copies of one row is split for ever");
    }

    #[test]
    fn a_cell_that_only_one_side_has_is_suspect() {
        let digests = Digests::from([(7, super::super::compare::Digest { rows: 2, ..Default::default() })]);
        let found = Suspects::between(&Range::All, 3, &Digests::new(), &digests).unwrap();
        assert_eq!(found.cells, [(7, 2)]);
        assert_eq!(Suspects::between(&Range::All, 3, &digests, &Digests::new()).unwrap().cells, [(7, 2)]);
        assert_eq!(Suspects::between(&Range::All, 3, &digests, &digests), None);
    }
}
