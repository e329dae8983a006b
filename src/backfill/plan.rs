//! What is copied in which pieces: a chunk of a hypertable, a range of a table by its time, or a whole table.

use std::collections::HashMap;

use serde::Serialize;
use tokio_postgres::Client;

use super::ledger::Recorded;
use super::{Bound, Options};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::{self, Table};
use crate::sql;
use crate::timescale::chunks::{self, Chunk, Hypertable, TimeType};

/// A range of a table that is no hypertable is about so large.
const RANGE_BYTES: i64 = 1 << 30;
/// Ranges of one table at most.
const RANGES_MAX: i64 = 1000;

/// A table of the source, and what there is of it to copy.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) table: Table,
    pub(super) hypertable: Option<Hypertable>,
    /// The column that the bounds are about; `None` where the whole table is copied.
    pub(super) time: Option<(String, TimeType)>,
    pub(super) pieces: Vec<Piece>,
}

/// What is copied in one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which one it is, among those of its table: what the ledger knows it by.
    pub(super) place: String,
    /// The chunk that it is read from.
    pub(super) chunk: Option<(String, String)>,
    /// From a number up to, not including, another, as [`chunks`] has them; the smallest and the largest are no bound.
    pub(super) range: (i64, i64),
    /// Whether a bound cuts the chunk, so that not all of it is copied.
    pub(super) is_cut: bool,
    /// Whether the source has it compressed.
    pub(super) is_compressed: bool,
    /// What further dimensions demand of its rows.
    pub(super) further: Vec<String>,
    /// Size on the source.
    pub(super) bytes: i64,
}

impl Work {
    /// The condition on the alias `t` that the rows of a piece fulfil, and no others.
    pub(super) fn condition(&self, piece: &Piece) -> String {
        let mut conditions = Vec::new();
        if let Some((column, time)) = &self.time {
            let name = format!("t.{}", sql::identifier(column));
            let (from, to) = piece.range;
            let from = (from != i64::MIN).then(|| format!("{name} >= {}", time.literal(from)));
            let to = (to != i64::MAX).then(|| format!("{name} < {}", time.literal(to)));
            let bounds: Vec<String> = from.iter().cloned().chain(to).collect();
            if !bounds.is_empty() {
                // A row without a time is older than any.
                let or_null = if from.is_none() { format!(" OR {name} IS NULL") } else { String::new() };
                conditions.push(format!("({}{or_null})", bounds.join(" AND ")));
            }
        }
        conditions.extend(piece.further.iter().cloned());
        if conditions.is_empty() { "true".into() } else { conditions.join(" AND ") }
    }

    /// What the ledger is to know of the pieces.
    pub(super) fn recorded(&self) -> impl Iterator<Item = Recorded> + '_ {
        self.pieces.iter().map(|piece| Recorded {
            relation: self.table.qualified(),
            place: piece.place.clone(),
            range: piece.range,
            bytes: piece.bytes,
            copied: false,
            rows: 0,
        })
    }
}

/// The tables that are wanted, plain ones first, with their pieces. `known` has the pieces that an earlier start cut tables into.
///
/// # Errors
/// `Usage` for names that are not there, `Blocked` for tables that cannot be divided so.
pub(super) async fn read(source: &Client, options: &Options, known: &[Recorded]) -> Result<Vec<Work>> {
    let hypertables = match chunks::extension(source).await? {
        Some(_) => chunks::hypertables(source).await?,
        None => Vec::new(),
    };
    let mut hypertables: HashMap<(String, String), Hypertable> =
        hypertables.into_iter().map(|one| ((one.schema.clone(), one.name.clone()), one)).collect();
    let mut tables = catalog::tables(source).await?;
    tables.retain(|table| !table.schema.starts_with("_timescaledb_"));
    let chosen = crate::verify::choose(&tables, options.tables.as_deref())?;
    let mut work = Vec::new();
    let mut columns = options.time_columns.clone();
    for table in chosen {
        let hypertable = hypertables.remove(&(table.schema.clone(), table.name.clone()));
        let named = columns.iter().position(|(name, _)| is_called(table, name)).map(|at| columns.swap_remove(at).1);
        let mut one = Work {
            table: table.clone(),
            time: time_of(table, hypertable.as_ref(), named)?,
            hypertable,
            pieces: Vec::new(),
        };
        one.pieces = pieces(source, &one, options, known).await?;
        work.push(one);
    }
    if let Some((name, _)) = columns.first() {
        let text = format!("--time-column names {name}, which is not among the tables to copy");
        return Err(
            Error::new(ErrorKind::Usage, text).hint("Give it as schema.table=column, of a table that is copied.")
        );
    }
    work.sort_by_key(|one| one.hypertable.is_some());
    Ok(work)
}

fn is_called(table: &Table, name: &str) -> bool {
    *name == table.qualified() || *name == format!("{}.{}", table.schema, table.name)
}

fn time_of(
    table: &Table,
    hypertable: Option<&Hypertable>,
    named: Option<String>,
) -> Result<Option<(String, TimeType)>> {
    let refuse = |text: String| Error::new(ErrorKind::Blocked, format!("{}: {text}", table.qualified()));
    if let Some(hypertable) = hypertable {
        let Some(first) = hypertable.dimensions.first() else {
            return Err(refuse("a hypertable without a dimension".into()).hint("Name the other tables with --tables."));
        };
        if let Some(named) = named.filter(|named| *named != first.column) {
            let text = format!("--time-column says {named}, and the hypertable is divided by {}", first.column);
            return Err(Error::new(ErrorKind::Usage, text)
                .hint("Leave it out: hypertables say themselves what they are divided by."));
        }
        let Some(time) = first.time_type.clone() else {
            let text = format!(
                "its chunks are divided by {} of type {}, which no bound here can cut",
                first.column, first.type_name
            );
            return Err(
                refuse(text).hint("Leave it out (--tables names the others), and copy it with `walferry migrate`.")
            );
        };
        return Ok(Some((first.column.clone(), time)));
    }
    let Some(named) = named else { return Ok(None) };
    let Some(column) = table.columns.iter().find(|column| column.name == named) else {
        return Err(refuse(format!("it has no column {named}")).hint("--time-column takes schema.table=column."));
    };
    // `timestamp(3) with time zone` is one too.
    let name = if column.type_name.starts_with("timestamp") {
        if column.type_name.ends_with("with time zone") && !column.type_name.contains("without") {
            "timestamp with time zone"
        } else {
            "timestamp without time zone"
        }
    } else {
        &column.type_name
    };
    let Some(time) = TimeType::of(name) else {
        let text = format!("its column {named} is {}, which is no time", column.type_name);
        return Err(refuse(text).hint("A time column is a timestamp, a date or an integer."));
    };
    Ok(Some((named, time)))
}

/// The bounds in the numbers of a table's time; none for a whole table.
pub(super) fn bounds(work: &Work, options: &Options) -> Result<(i64, i64)> {
    let Some((column, time)) = &work.time else { return Ok((i64::MIN, i64::MAX)) };
    let number = |bound: Bound, option: &str| -> Result<i64> {
        let refuse = |text: &str| {
            let text =
                format!("{option} does not fit {} of {}: {text}", sql::identifier(column), work.table.qualified());
            Error::new(ErrorKind::Usage, text)
                .hint("Copy tables with times of another kind by themselves: --tables, and a bound of that kind.")
        };
        match (bound, time) {
            (Bound::Integer(number), TimeType::Integer(_)) => Ok(number),
            (Bound::Integer(_), _) => Err(refuse("the column is a time, and the bound is a number")),
            (Bound::Time(_), TimeType::Integer(_)) => Err(refuse("the column is a number, and the bound is a time")),
            (Bound::Time(number), TimeType::Date) if number % chunks::MICROSECONDS_PER_DAY != 0 => {
                Err(refuse("the column is a date, and the bound is not the beginning of a day (UTC)"))
            }
            (Bound::Time(number), _) => Ok(number),
        }
    };
    let from = options.from.map_or(Ok(i64::MIN), |from| number(from, "--from"))?;
    Ok((from, number(options.until, "--until")?))
}

async fn pieces(source: &Client, work: &Work, options: &Options, known: &[Recorded]) -> Result<Vec<Piece>> {
    let (from, until) = bounds(work, options)?;
    if let Some(hypertable) = &work.hypertable {
        let all = chunks::chunks(source, hypertable, None).await?;
        let tiered: Vec<String> = all.iter().filter(|chunk| chunk.is_tiered).map(Chunk::qualified).take(10).collect();
        if !tiered.is_empty() {
            let text = format!("{} has chunks in object storage: {}", work.table.qualified(), tiered.join(", "));
            return Err(Error::new(ErrorKind::Blocked, text)
                .hint("Bring them back first (untier_chunk), or leave the table out with --tables."));
        }
        return Ok(all.iter().filter_map(|chunk| piece_of_chunk(hypertable, chunk, (from, until))).collect());
    }
    let range = |place: String, range: (i64, i64), bytes: i64| Piece {
        place,
        chunk: None,
        range,
        is_cut: false,
        is_compressed: false,
        further: Vec::new(),
        bytes,
    };
    let Some((column, time)) = &work.time else {
        return Ok(vec![range("whole".into(), (i64::MIN, i64::MAX), work.table.bytes)]);
    };
    // Cut once: a later start has to meet the same pieces.
    let name = work.table.qualified();
    let known: Vec<&Recorded> = known.iter().filter(|piece| piece.relation == name).collect();
    if !known.is_empty() {
        return Ok(known.iter().map(|piece| range(piece.place.clone(), piece.range, piece.bytes)).collect());
    }
    let expression = sql::identifier(column);
    let statement = format!(
        "SELECT pg_catalog.min({}) FROM ONLY {name} WHERE {expression} < {}",
        time.number_of(&expression),
        time.literal(until)
    );
    let row =
        source.query_typed_one(&statement, &[]).await.context(|| format!("looking for the oldest row of {name}"))?;
    let oldest: Option<i64> = row.get(0);
    let cuts = cuts((from, until), oldest, work.table.bytes, time);
    let bytes = work.table.bytes / i64::try_from(cuts.len()).unwrap_or(i64::MAX).max(1);
    let place = |cut: (i64, i64)| {
        let from = if cut.0 == i64::MIN { String::new() } else { cut.0.to_string() };
        format!("{from}..{}", cut.1)
    };
    Ok(cuts.into_iter().map(|cut| range(place(cut), cut, bytes)).collect())
}

fn piece_of_chunk(hypertable: &Hypertable, chunk: &Chunk, (from, until): (i64, i64)) -> Option<Piece> {
    let (first, end) = chunk.range(hypertable);
    let range = (first.max(from), end.min(until));
    (range.0 < range.1).then(|| Piece {
        place: chunk.slices_json(),
        chunk: Some((chunk.schema.clone(), chunk.name.clone())),
        range,
        is_cut: range != (first, end),
        is_compressed: chunk.compressed.is_some(),
        further: chunk.further_conditions(hypertable),
        bytes: chunk.bytes,
    })
}

/// Ranges that together are the whole, each of about equal length between the oldest row and the end.
fn cuts((from, until): (i64, i64), oldest: Option<i64>, bytes: i64, time: &TimeType) -> Vec<(i64, i64)> {
    if from >= until {
        return Vec::new();
    }
    let unit = if *time == TimeType::Date { chunks::MICROSECONDS_PER_DAY } else { 1 };
    let begin = oldest.map_or(until, |oldest| oldest.max(from)).min(until);
    let count = (bytes / RANGE_BYTES + 1).clamp(1, RANGES_MAX);
    let width = i128::from(until) - i128::from(begin);
    let at = |part: i64| {
        let value = i128::from(begin) + width * i128::from(part) / i128::from(count);
        i64::try_from(value.div_euclid(i128::from(unit)) * i128::from(unit)).unwrap_or(until)
    };
    let mut ends: Vec<i64> = (1..count).map(at).filter(|end| *end > from && *end < until).collect();
    ends.dedup();
    let starts = std::iter::once(from).chain(ends.clone());
    starts.zip(ends.iter().copied().chain([until])).collect()
}

/// The plan, for people and scripts.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Of this object's format: 1.
    pub version: u32,
    /// Size of all pieces on the source, in bytes.
    pub bytes: i64,
    /// The tables, in the order in which they are copied.
    pub tables: Vec<PlannedTable>,
    /// Policies of the target that rest meanwhile, in a sentence each.
    pub policies: Vec<String>,
    /// Continuous aggregates that are refreshed at the end.
    pub aggregates: Vec<String>,
    /// What deserves a look before it begins.
    pub warnings: Vec<String>,
}

/// A table of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedTable {
    /// `"schema"."name"`.
    pub table: String,
    /// Its pieces.
    pub pieces: Vec<PlannedPiece>,
}

/// A piece of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedPiece {
    /// A chunk's name, a range, or `whole`.
    pub name: String,
    /// The condition that its rows fulfil.
    pub rows_where: String,
    /// Size on the source, in bytes.
    pub bytes: i64,
    /// `compressed as it is`, `rows, then compressed`, `rows`.
    pub how: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_each_other_from_the_first_bound_to_the_last() {
        for (from, oldest) in [(i64::MIN, Some(100)), (50, Some(100)), (500, Some(100)), (i64::MIN, None)] {
            for bytes in [0, 5 << 30, i64::MAX / 2] {
                let all = cuts((from, 10_000), oldest, bytes, &TimeType::TimestampTz);
                assert_eq!((all[0].0, all[all.len() - 1].1), (from, 10_000));
                assert!(all.windows(2).all(|pair| pair[0].1 == pair[1].0));
                assert!(all.iter().all(|(from, to)| from < to), "{all:?}");
            }
        }
        assert_eq!(cuts((i64::MIN, 10_000), Some(0), 4 << 30, &TimeType::Timestamp).len(), 5);
        assert_eq!(cuts((10, 10), Some(0), 0, &TimeType::Timestamp), []);
    }

    #[test]
    fn ranges_of_dates_are_whole_days() {
        let day = chunks::MICROSECONDS_PER_DAY;
        let all = cuts((i64::MIN, 10 * day), Some(0), 2 << 30, &TimeType::Date);
        assert!(all.len() > 1 && all.iter().all(|(_, to)| to % day == 0), "{all:?}");
    }

    #[test]
    fn the_chunk_that_a_bound_lies_in_is_cut_and_what_is_past_it_is_left_out() {
        let hypertable = Hypertable {
            id: 1,
            schema: "s".into(),
            name: "h".into(),
            dimensions: vec![chunks::Dimension {
                column: "t".into(),
                time_type: Some(TimeType::Integer("bigint".into())),
                type_name: "bigint".into(),
                function: None,
                is_hash: false,
            }],
            has_compression: false,
            skips_chunks: false,
        };
        let piece = |from, to| {
            let chunk = Chunk {
                schema: "s".into(),
                name: "c".into(),
                slices: [("t".to_owned(), (from, to))].into(),
                status: 0,
                compressed: None,
                bytes: 0,
                is_tiered: false,
            };
            piece_of_chunk(&hypertable, &chunk, (5, 25)).map(|piece| (piece.range, piece.is_cut))
        };
        assert_eq!(piece(0, 10), Some(((5, 10), true)));
        assert_eq!(piece(10, 20), Some(((10, 20), false)));
        assert_eq!(piece(20, 30), Some(((20, 25), true)));
        assert_eq!((piece(25, 35), piece(0, 5)), (None, None));
    }
}
