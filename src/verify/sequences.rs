//! Compares where the sequences of both sides stand.
//!
//! The target may be ahead: the cutover leaves a margin on purpose, and a number that is skipped harms nobody. A target
//! that is behind would give out numbers a second time.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use tokio_postgres::Client;

use super::report::printable;
use crate::error::{Context, Result};
use crate::sql;

/// How all sequences of the source stand on the target.
#[derive(Clone, Debug, Serialize)]
pub struct SequencesReport {
    /// Whether no sequence of the source is missing or behind on the target.
    pub equal: bool,
    /// Every sequence of the source, in the order of their names.
    pub sequences: Vec<SequenceReport>,
}

/// One sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SequenceReport {
    /// `"schema"."name"`.
    pub sequence: String,
    /// How the target's stands to the source's.
    pub state: SequenceState,
    /// Where the source's is.
    pub source: Position,
    /// Where the target's is, if it exists.
    pub target: Option<Position>,
}

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Position {
    /// `last_value`.
    pub last_value: i64,
    /// Whether `last_value` has been given out.
    pub is_called: bool,
}

/// How a sequence of the target stands to the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SequenceState {
    /// The next value is the same.
    Equal,
    /// The target's next value comes later: fine.
    Ahead,
    /// The target would give out values that the source has given out.
    Behind,
    /// The target has no such sequence.
    MissingOnTarget,
}

/// Sequences of users, as in the catalog's list of tables: not those of the system, of extensions, or walferry's own.
const LIST: &str = "SELECT n.nspname, c.relname, s.seqincrement \
     FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
     JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid \
     WHERE c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
       AND n.nspname NOT LIKE 'pg\\_toast%' AND n.nspname NOT LIKE 'pg\\_temp\\_%' \
       AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass \
                       AND d.objid = c.oid AND d.deptype = 'e') \
     ORDER BY 1, 2";

/// Sequences read by one statement.
const CHUNK: usize = 200;

/// Compares every sequence of the source with the target's of the same name.
///
/// A sequence is not part of a snapshot: what is read is where it is now. Both sessions need SELECT on the sequences.
///
/// # Errors
/// Whatever a server says.
pub async fn compare(source: &Client, target: &Client) -> Result<SequencesReport> {
    let (source, target) = tokio::try_join!(positions(source, "source"), positions(target, "target"))?;
    let sequences: Vec<SequenceReport> = source
        .into_iter()
        .map(|(sequence, (position, increment))| {
            let other = target.get(&sequence).map(|(other, _)| *other);
            SequenceReport { state: state(position, other, increment), sequence, source: position, target: other }
        })
        .collect();
    let fine = |report: &SequenceReport| matches!(report.state, SequenceState::Equal | SequenceState::Ahead);
    Ok(SequencesReport { equal: sequences.iter().all(fine), sequences })
}

async fn positions(client: &Client, side: &str) -> Result<BTreeMap<String, (Position, i64)>> {
    let doing = || format!("reading the sequences of the {side}");
    let rows = client.query_typed(LIST, &[]).await.context(doing)?;
    let list: Vec<(String, i64)> =
        rows.into_iter().map(|row| (sql::qualified(row.get(0), row.get(1)), row.get(2))).collect();
    let mut positions = BTreeMap::new();
    for chunk in list.chunks(CHUNK) {
        let one = |(at, (name, _)): (usize, &(String, i64))| format!("SELECT {at}, last_value, is_called FROM {name}");
        let statement = chunk.iter().enumerate().map(one).collect::<Vec<_>>().join(" UNION ALL ");
        for row in client.query_typed(&statement, &[]).await.context(doing)? {
            let at: i32 = row.get(0);
            if let Some((name, increment)) = usize::try_from(at).ok().and_then(|at| chunk.get(at)) {
                let position = Position { last_value: row.get(1), is_called: row.get(2) };
                positions.insert(name.clone(), (position, *increment));
            }
        }
    }
    Ok(positions)
}

fn state(source: Position, target: Option<Position>, increment: i64) -> SequenceState {
    let Some(target) = target else { return SequenceState::MissingOnTarget };
    // The next value, in the direction in which the sequence runs. A sequence that cycled is taken at its number.
    let next = |position: Position| {
        let step = if position.is_called { i128::from(increment) } else { 0 };
        (i128::from(position.last_value) + step) * i128::from(increment.signum())
    };
    match next(target).cmp(&next(source)) {
        std::cmp::Ordering::Equal => SequenceState::Equal,
        std::cmp::Ordering::Greater => SequenceState::Ahead,
        std::cmp::Ordering::Less => SequenceState::Behind,
    }
}

impl fmt::Display for SequencesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for report in &self.sequences {
            let name = printable(&report.sequence);
            match (report.state, report.target) {
                (SequenceState::Behind, Some(target)) => writeln!(
                    f,
                    "sequence {name} is behind on the target: {} there, {} on the source",
                    target.last_value, report.source.last_value
                )?,
                (SequenceState::MissingOnTarget, _) => writeln!(f, "sequence {name} is missing on the target")?,
                _ => {}
            }
        }
        let behind = self
            .sequences
            .iter()
            .filter(|report| matches!(report.state, SequenceState::Behind | SequenceState::MissingOnTarget));
        match behind.count() {
            0 => write!(f, "All {} sequences are equal or ahead on the target.", self.sequences.len()),
            count => write!(f, "{count} of {} sequences are not safe to use on the target.", self.sequences.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(last_value: i64, is_called: bool) -> Position {
        Position { last_value, is_called }
    }

    #[test]
    fn the_next_value_decides_not_the_last() {
        let source = position(5, true);
        assert_eq!(state(source, Some(position(6, false)), 1), SequenceState::Equal);
        assert_eq!(state(source, Some(position(5, false)), 1), SequenceState::Behind);
        assert_eq!(state(source, Some(position(6, true)), 1), SequenceState::Ahead);
        assert_eq!(state(source, None, 1), SequenceState::MissingOnTarget);
        assert_eq!(state(position(i64::MAX, true), Some(position(i64::MAX, true)), 1), SequenceState::Equal);
    }

    #[test]
    fn a_descending_sequence_is_ahead_when_it_is_lower() {
        assert_eq!(state(position(-5, true), Some(position(-9, true)), -1), SequenceState::Ahead);
        assert_eq!(state(position(-5, true), Some(position(-4, true)), -1), SequenceState::Behind);
    }
}
