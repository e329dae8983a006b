//! Sequences: they are not in the stream, so the target gets the source's last values at the cutover.

use std::collections::BTreeSet;
use std::sync::Mutex;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::error::{Context, Result};
use crate::source::scope::Scope;
use crate::sql;

/// A sequence of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sequence {
    /// Ready for SQL.
    name: String,
    increment: i64,
    min: i64,
    max: i64,
    cycles: bool,
    cache: i64,
}

/// Every sequence of the source.
pub(super) struct Sequences {
    sequences: Vec<Sequence>,
    /// By how many values the target's are ahead.
    margin: u32,
    /// Those that have fewer values left than that.
    short: Mutex<Vec<String>>,
}

/// Asks for them before applications wait; one that comes or goes afterwards is a change of the catalog, and stops the cutover.
///
/// With --data-only, those that the target has.
pub(super) async fn list(source: &Client, target: &Client, scope: &Scope, margin: u32) -> Result<Sequences> {
    let selection = scope.select(source).await?;
    let rows = source
        .query_typed(
            "SELECT n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax, s.seqcycle, c.oid, s.seqcache \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid \
             WHERE c.relkind = 'S' AND c.relpersistence <> 't' \
               AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') \
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::regclass \
                               AND d.objid = c.oid AND d.deptype = 'e') \
             ORDER BY 1, 2",
            &[],
        )
        .await
        .context(|| "listing the source's sequences".into())?;
    let is_moved = |row: &&tokio_postgres::Row| {
        selection.as_ref().is_none_or(|selection| selection.relations.contains(&row.get(6)))
    };
    let mut sequences: Vec<Sequence> = rows
        .iter()
        .filter(is_moved)
        .map(|row| Sequence {
            name: sql::qualified(row.get(0), row.get(1)),
            increment: row.get(2),
            min: row.get(3),
            max: row.get(4),
            cycles: row.get(5),
            cache: row.get(7),
        })
        .collect();
    if scope.data_only {
        let names: Vec<&str> = sequences.iter().map(|sequence| sequence.name.as_str()).collect();
        let there = target
            .query_typed(
                "SELECT name FROM unnest($1) name WHERE pg_catalog.to_regclass(name) IS NOT NULL",
                &[(&names, Type::TEXT_ARRAY)],
            )
            .await
            .context(|| "looking for the target's sequences".into())?;
        let there: BTreeSet<String> = there.iter().map(|row| row.get(0)).collect();
        sequences.retain(|sequence| there.contains(&sequence.name));
    }
    Ok(Sequences { sequences, margin, short: Mutex::default() })
}

impl Sequences {
    pub(super) fn count(&self) -> usize {
        self.sequences.len()
    }

    /// Statements that hold the sequences of the source: each changes nothing, and lets `nextval` wait for the transaction's end (H31).
    pub(super) fn holds(&self) -> Vec<String> {
        let hold = |sequence: &Sequence| format!("ALTER SEQUENCE {} CACHE {}", sequence.name, sequence.cache);
        self.sequences.iter().map(hold).collect()
    }

    /// Sets every sequence on the target to where it is on the source, or ahead of it by the margin.
    ///
    /// Call it when nobody can call `nextval` any more (H31): table locks do not cover sequences.
    pub(super) async fn copy(&self, source: &Client, target: &Client) -> Result<()> {
        // One statement on each side, however many there are: this happens while applications wait.
        for part in self.sequences.chunks(1000) {
            let selects: Vec<String> = part
                .iter()
                .enumerate()
                .map(|(at, sequence)| format!("SELECT {at}::int4, last_value, is_called FROM {}", sequence.name))
                .collect();
            let values = source
                .query_typed(&selects.join(" UNION ALL "), &[])
                .await
                .context(|| "reading the source's sequences".into())?;
            let mut statements = Vec::with_capacity(part.len());
            for row in &values {
                let (at, last, called): (i32, i64, bool) = (row.get(0), row.get(1), row.get(2));
                let Some(sequence) = usize::try_from(at).ok().and_then(|at| part.get(at)) else { continue };
                let (value, is_whole) = sequence.ahead(last, self.margin);
                if !is_whole {
                    let mut short = self.short.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    short.push(sequence.name.clone());
                }
                let name = sql::literal(&sequence.name);
                statements.push(format!("SELECT pg_catalog.setval({name}::regclass, {value}, {called})"));
            }
            target.batch_execute(&statements.join("; ")).await.context(|| "setting the target's sequences".into())?;
        }
        Ok(())
    }

    /// For the operator, once they are copied.
    pub(super) fn warnings(&self) -> Vec<String> {
        let short = self.short.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if short.is_empty() {
            return Vec::new();
        }
        vec![format!(
            "fewer values are left of {} than --sequence-margin; they are where they were on the source",
            short.join(", ")
        )]
    }
}

impl Sequence {
    /// The value after so many more calls of `nextval`, as the sequence counts, and whether it has so many. One that has not, and
    /// does not begin again at its other end, stays where it is: there it can still be used.
    fn ahead(&self, last: i64, margin: u32) -> (i64, bool) {
        let (min, max, increment) = (i128::from(self.min), i128::from(self.max), i128::from(self.increment));
        let last = i128::from(last);
        // The end that it counts towards, and the one it then begins again from.
        let (end, start) = if increment > 0 { (max, min) } else { (min, max) };
        let left = (end - last) / increment;
        let margin = i128::from(margin);
        let value = if margin <= left {
            last + increment * margin
        } else if self.cycles {
            let round = (end - start) / increment + 1;
            start + increment * ((margin - left - 1) % round)
        } else {
            return (self.clamped(last), false);
        };
        (self.clamped(value), true)
    }

    fn clamped(&self, value: i128) -> i64 {
        i64::try_from(value).unwrap_or(self.max).clamp(self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(increment: i64, min: i64, max: i64, cycles: bool) -> Sequence {
        Sequence { name: "s".into(), increment, min, max, cycles, cache: 1 }
    }

    /// What the server does, one call after the other.
    fn called(sequence: &Sequence, last: i64, times: u32) -> Option<i64> {
        let mut value = i128::from(last);
        for _ in 0..times {
            value += i128::from(sequence.increment);
            if value > i128::from(sequence.max) || value < i128::from(sequence.min) {
                if !sequence.cycles {
                    return None;
                }
                value = i128::from(if sequence.increment > 0 { sequence.min } else { sequence.max });
            }
        }
        Some(i64::try_from(value).unwrap())
    }

    #[test]
    fn a_sequence_that_is_ahead_is_where_so_many_calls_would_have_brought_it() {
        let sequences = [
            sequence(1, 1, i64::MAX, false),
            sequence(-3, -100, -1, false),
            sequence(7, 1, 50, true),
            sequence(-7, -20, 50, true),
            sequence(1, 5, 5, true),
            sequence(i64::MAX, i64::MIN, i64::MAX, true),
        ];
        for sequence in &sequences {
            for last in [sequence.min, sequence.max, (sequence.min / 2 + sequence.max / 2).max(sequence.min)] {
                for margin in 0..200 {
                    let (value, is_whole) = sequence.ahead(last, margin);
                    match called(sequence, last, margin) {
                        Some(expected) => {
                            assert_eq!((value, is_whole), (expected, true), "{sequence:?} {last} {margin}")
                        }
                        None => assert_eq!((value, is_whole), (last, false), "{sequence:?} {last} {margin}"),
                    }
                }
            }
        }
    }
}
