//! How a table is cut into ranges that are compared, or at least read, one by one.
//!
//! Every row of a side lies in exactly one range of that side: the first and last range are open, and a NULL in the
//! key (which only a damaged target has) belongs to the first.

use tokio_postgres::Client;

use super::layout::{Layout, Shared, Times};
use crate::error::{Context, Result};
use crate::sql;
use crate::timescale::chunks::TimeType;

/// A range of one side's table, as a condition on the alias `t`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Range {
    /// All rows.
    All,
    /// From a value of the key's first column up to, not including, another.
    Keys {
        /// Unquoted.
        column: String,
        from: Option<i64>,
        to: Option<i64>,
    },
    /// From a time up to, not including, another, of a hypertable on either side.
    Times {
        /// Unquoted.
        column: String,
        time: TimeType,
        from: Option<i64>,
        to: Option<i64>,
    },
    /// From a page up to, not including, another.
    Pages { from: i64, to: Option<i64> },
}

impl Range {
    pub(super) fn condition(&self) -> String {
        let (expression, from, to, or_null) = match self {
            Range::All => return "true".into(),
            Range::Keys { column, from, to } => {
                let column = format!("t.{}", sql::identifier(column));
                let constant = |value: &i64| format!("'{value}'::int8");
                let or_null = if from.is_none() { format!(" OR {column} IS NULL") } else { String::new() };
                (column, from.as_ref().map(constant), to.as_ref().map(constant), or_null)
            }
            Range::Times { column, time, from, to } => {
                let column = format!("t.{}", sql::identifier(column));
                let constant = |value: &i64| time.literal(*value);
                let or_null = if from.is_none() { format!(" OR {column} IS NULL") } else { String::new() };
                (column, from.as_ref().map(constant), to.as_ref().map(constant), or_null)
            }
            Range::Pages { from, to } => {
                let constant = |page: &i64| format!("'({page},0)'::tid");
                ("t.ctid".into(), Some(constant(from)), to.as_ref().map(constant), String::new())
            }
        };
        let from = from.map(|from| format!("{expression} >= {from}"));
        let to = to.map(|to| format!("{expression} < {to}"));
        let bounds: Vec<String> = from.into_iter().chain(to).collect();
        if bounds.is_empty() { "true".into() } else { format!("({}{or_null})", bounds.join(" AND ")) }
    }
}

/// The ranges of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Each range holds the same rows on both sides if the sides are equal, so each is compared by itself.
    Keys(Vec<Range>),
    /// The ranges are physical and each side's own. What is compared is cells of the hash, over all ranges together.
    Pages {
        source: Vec<Range>,
        target: Vec<Range>,
        /// Bits of the hash that make a cell.
        bits: u32,
    },
}

/// Pages read per range to learn how the keys are spread.
const SAMPLE_PAGES: f64 = 30.0;
/// Sampled keys kept at most.
const SAMPLE_ROWS_MAX: i64 = 200_000;
/// Rows per cell that the first pass aims at.
const CELL_ROWS: i64 = 1_000;
/// Cells of the first pass at most, as bits: what every range returns, and what is kept per table.
const CELL_BITS_MAX: u32 = 10;

/// Cuts a table into ranges of about `range_rows` rows.
pub(super) async fn plan(
    client: &Client,
    source: &Layout,
    target: &Layout,
    shared: &Shared,
    range_rows: i64,
) -> Result<Plan> {
    // The chunks' own ranges: of every other, no server opens more than it has to.
    if let Some(times) = source.times.as_ref().or(target.times.as_ref())
        && shared.columns.iter().any(|column| column.name == times.column)
    {
        return Ok(Plan::Keys(time_ranges(times, range_rows)));
    }
    let rows = source.rows();
    let ranges = usize::try_from(rows / range_rows.max(1)).unwrap_or(0) + 1;
    if ranges > 1 && shared.splits_by_key {
        let column = shared.columns[shared.key[0]].name.clone();
        let boundaries = boundaries(sample(client, source, &column, ranges).await?, ranges);
        // With few distinct values (a tenant's number, say) ranges would be very unequal.
        if boundaries.len() >= ranges / 2 && !boundaries.is_empty() {
            return Ok(Plan::Keys(key_ranges(&column, &boundaries)));
        }
    }
    let pages = |layout: &Layout| page_ranges(layout.pages, if layout.reads_page_ranges { ranges } else { 1 });
    Ok(Plan::Pages { source: pages(source), target: pages(target), bits: bits_for(rows / CELL_ROWS, CELL_BITS_MAX) })
}

/// The values of some of the table's pages.
async fn sample(client: &Client, source: &Layout, column: &str, ranges: usize) -> Result<Vec<i64>> {
    let percent = (100.0 * SAMPLE_PAGES * ranges as f64 / source.pages.max(1) as f64).min(100.0);
    let column = sql::identifier(column);
    let rows = client
        .query_typed(
            &format!(
                "SELECT t.{column}::int8 FROM {} AS t TABLESAMPLE SYSTEM ({percent:.6}) REPEATABLE (0) \
                 WHERE t.{column} IS NOT NULL LIMIT {SAMPLE_ROWS_MAX}",
                source.from
            ),
            &[],
        )
        .await
        .context(|| format!("sampling the keys of {}", source.from))?;
    Ok(rows.into_iter().map(|row| row.get(0)).collect())
}

/// Values that cut a sample into so many equal ranges; fewer where values repeat.
fn boundaries(mut sample: Vec<i64>, ranges: usize) -> Vec<i64> {
    sample.sort_unstable();
    let mut boundaries: Vec<i64> =
        (1..ranges).filter_map(|at| sample.get(at * sample.len() / ranges).copied()).collect();
    boundaries.dedup();
    boundaries
}

fn key_ranges(column: &str, boundaries: &[i64]) -> Vec<Range> {
    let from = std::iter::once(None).chain(boundaries.iter().copied().map(Some));
    let to = boundaries.iter().copied().map(Some).chain(std::iter::once(None));
    from.zip(to).map(|(from, to)| Range::Keys { column: column.to_owned(), from, to }).collect()
}

/// Ranges of whole chunks of about so many rows together, which hold every time.
fn time_ranges(times: &Times, range_rows: i64) -> Vec<Range> {
    let mut boundaries = Vec::new();
    let mut rows = 0;
    for (start, more) in &times.chunks {
        if rows >= range_rows && *start != i64::MIN && boundaries.last() != Some(start) {
            boundaries.push(*start);
            rows = 0;
        }
        rows += more;
    }
    let from = std::iter::once(None).chain(boundaries.iter().copied().map(Some));
    let to = boundaries.iter().copied().map(Some).chain(std::iter::once(None));
    let range = |(from, to)| Range::Times { column: times.column.clone(), time: times.time.clone(), from, to };
    from.zip(to).map(range).collect()
}

fn page_ranges(pages: i64, ranges: usize) -> Vec<Range> {
    let ranges = i64::try_from(ranges).unwrap_or(i64::MAX).min(pages);
    if ranges <= 1 {
        return vec![Range::All];
    }
    let start = |at: i64| (i128::from(pages) * i128::from(at) / i128::from(ranges)) as i64;
    let one = |at: i64| Range::Pages { from: start(at), to: (at + 1 < ranges).then(|| start(at + 1)) };
    (0..ranges).map(one).collect()
}

/// How many bits make at least so many cells.
pub(super) fn bits_for(cells: i64, bits_max: u32) -> u32 {
    if cells <= 1 { 0 } else { (i64::BITS - (cells - 1).leading_zeros()).min(bits_max) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(range: &Range, value: i64) -> bool {
        match range {
            Range::All => true,
            Range::Keys { from, to, .. } | Range::Times { from, to, .. } => {
                from.is_none_or(|from| value >= from) && to.is_none_or(|to| value < to)
            }
            Range::Pages { from, to } => value >= *from && to.is_none_or(|to| value < to),
        }
    }

    #[test]
    fn every_key_is_in_exactly_one_range() {
        let ranges = key_ranges("id", &boundaries((0..1000).map(|n| n * n - 500).collect(), 7));
        assert_eq!(ranges.len(), 7);
        for value in [i64::MIN, -501, -500, 0, 1, 100_000, 998_000, i64::MAX] {
            assert_eq!(ranges.iter().filter(|range| contains(range, value)).count(), 1, "{value}");
        }
    }

    #[test]
    fn ranges_hold_equal_shares_of_the_sample() {
        let sample: Vec<i64> = (0..900).map(|n| if n < 450 { n } else { n * 1_000_000 }).collect();
        let ranges = key_ranges("id", &boundaries(sample.clone(), 9));
        for range in &ranges {
            assert_eq!(sample.iter().filter(|&&value| contains(range, value)).count(), 100);
        }
    }

    #[test]
    fn repeated_values_make_fewer_ranges_and_never_empty_ones() {
        assert_eq!(boundaries(vec![5; 100], 4), [5]);
        assert_eq!(boundaries(vec![], 4), Vec::<i64>::new());
        assert_eq!(boundaries(vec![1, 1, 1, 1, 2, 2, 2, 2], 4), [1, 2]);
    }

    #[test]
    fn every_time_is_in_exactly_one_range_and_no_chunk_is_cut() {
        let chunks = vec![(i64::MIN, 5), (0, 600), (0, 600), (10, 50), (20, 960), (30, 1)];
        let time = TimeType::Integer("bigint".into());
        let ranges = time_ranges(&Times { column: "t".into(), time, chunks }, 1000);
        assert_eq!(ranges.len(), 3, "{ranges:?}");
        for value in [i64::MIN, -1, 0, 9, 10, 29, 30, i64::MAX] {
            assert_eq!(ranges.iter().filter(|range| contains(range, value)).count(), 1, "{value}");
        }
        assert_eq!(ranges[0].condition(), "(t.\"t\" < '10'::bigint OR t.\"t\" IS NULL)");
        assert_eq!(ranges[2].condition(), "(t.\"t\" >= '30'::bigint)");
    }

    #[test]
    fn every_page_is_in_exactly_one_range_also_those_added_later() {
        let ranges = page_ranges(10, 3);
        assert_eq!(ranges.len(), 3);
        for page in 0..20 {
            assert_eq!(ranges.iter().filter(|range| contains(range, page)).count(), 1, "{page}");
        }
        assert_eq!(page_ranges(0, 5), [Range::All]);
        assert_eq!(page_ranges(3, 100).len(), 3);
    }

    #[test]
    fn conditions_are_half_open_and_a_null_key_is_in_the_first() {
        let ranges = key_ranges("a\"b", &[-5]);
        assert_eq!(ranges[0].condition(), "(t.\"a\"\"b\" < '-5'::int8 OR t.\"a\"\"b\" IS NULL)");
        assert_eq!(ranges[1].condition(), "(t.\"a\"\"b\" >= '-5'::int8)");
        let pages = Range::Pages { from: 3, to: Some(7) };
        assert_eq!(pages.condition(), "(t.ctid >= '(3,0)'::tid AND t.ctid < '(7,0)'::tid)");
    }

    #[test]
    fn bits_make_enough_cells() {
        assert_eq!([0, 1, 2, 3, 4, 5, 1024, 1 << 40].map(|cells| bits_for(cells, 10)), [0, 0, 1, 2, 2, 3, 10, 10]);
    }
}
