//! What a comparison found, for people (`Display`) and for scripts (`Serialize`).

use std::fmt;

use serde::Serialize;

use crate::unstreamed::compare::LargeObjects;

/// Everything one comparison found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this object's format: 1.
    pub version: u32,
    /// Whether no table differs, and no large object.
    pub equal: bool,
    /// Every table that was compared, in the order of their names.
    pub tables: Vec<TableReport>,
    /// About how much of each table was compared, where it was not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_percent: Option<f64>,
    /// Tables that were not compared, because they were truncated, rewritten or dropped since the snapshots were taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stale: Vec<String>,
    /// What was found in large objects, where there are any and they were compared: those of a whole database.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub large_objects: Option<LargeObjects>,
}

/// What was found in one table.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TableReport {
    /// `"schema"."name"`.
    pub table: String,
    /// Rows counted on the source.
    pub rows_source: i64,
    /// Rows counted on the target.
    pub rows_target: i64,
    /// Whether both sides have the table, with the same columns and the same rows in it.
    pub equal: bool,
    /// Whether the stream carries only its inserts and truncates, so that it can differ until the cutover (H27).
    pub insert_only: bool,
    /// Whether the source has no such table (any more).
    pub missing_on_source: bool,
    /// Whether the target has no such table.
    pub missing_on_target: bool,
    /// Columns that only the source has; the rows were compared without them.
    pub columns_missing_on_target: Vec<String>,
    /// Columns that only the target has.
    pub columns_extra_on_target: Vec<String>,
    /// How many ranges it was compared in.
    pub ranges: usize,
    /// The differing rows that are named, at most `max_keys`.
    pub differences: Vec<Difference>,
    /// The differing rows that were found; more than are named if there were more than `max_keys`.
    pub differences_total: u64,
    /// Whether `differences_total` is all there are: the search ends once `max_keys` are named.
    pub differences_complete: bool,
    /// Rows of both sides whose keys and hashes were fetched to find them; 0 for an equal table.
    pub rows_fetched: u64,
}

/// One row that is not the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// How it differs.
    pub kind: DifferenceKind,
    /// The row's key as `(id)=(42)`; where the table has no key, the row's hash and how often each side has it.
    pub key: String,
    /// The source's row as `(id, name)=(42, x)`, when values were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_row: Option<String>,
    /// The target's row, when values were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_row: Option<String>,
    /// The columns whose values differ; empty unless `kind` is `different`.
    pub columns: Vec<String>,
}

/// How a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    /// The source has a row with this key, the target has none (or fewer of them).
    MissingOnTarget,
    /// The target has a row with this key, the source has none (or fewer of them).
    ExtraOnTarget,
    /// Both have a row with this key, and other columns differ.
    Different,
}

impl Report {
    /// A report of these tables.
    pub fn new(mut tables: Vec<TableReport>) -> Report {
        tables.sort_by(|a, b| a.table.cmp(&b.table));
        let equal = tables.iter().all(|table| table.equal);
        Report { version: 1, equal, tables, sample_percent: None, stale: Vec::new(), large_objects: None }
    }

    /// The same with what was found in large objects.
    #[must_use]
    pub fn with_large_objects(mut self, found: Option<LargeObjects>) -> Report {
        self.equal &= found.as_ref().is_none_or(|found| found.different_total == 0);
        self.large_objects = found;
        self
    }
}

impl fmt::Display for DifferenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DifferenceKind::MissingOnTarget => "missing on the target",
            DifferenceKind::ExtraOnTarget => "only on the target",
            DifferenceKind::Different => "different",
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |table: &TableReport| printable(&table.table);
        let width = self.tables.iter().map(|table| name(table).chars().count()).max().unwrap_or(0).clamp(5, 60);
        writeln!(f, "{:width$}  {:>15}  {:>15}", "table", "rows on source", "rows on target")?;
        for table in &self.tables {
            let verdict = if table.equal { "equal" } else { "DIFFERENT" };
            writeln!(f, "{:width$}  {:>15}  {:>15}  {verdict}", name(table), table.rows_source, table.rows_target)?;
            if !table.equal {
                table.explain(f)?;
            }
        }
        if let Some(LargeObjects { compared, pending, different, different_total }) = &self.large_objects {
            write!(f, "{compared} large objects compared")?;
            if *different_total > 0 {
                let named: Vec<String> = different.iter().map(u32::to_string).collect();
                let more = if *different_total > different.len() as u64 { ", …" } else { "" };
                write!(f, ", {different_total} DIFFERENT: {}{more}", named.join(", "))?;
            }
            if *pending > 0 {
                write!(
                    f,
                    "; {pending} were changed since they were last copied, and are copied again by the cutover at the latest"
                )?;
            }
            writeln!(f)?;
        }
        let different = self.tables.iter().filter(|table| !table.equal).count();
        if let Some(percent) = self.sample_percent {
            writeln!(f, "Compared about {percent} % of the rows.")?;
        }
        match different {
            0 => write!(f, "All {} tables are equal.", self.tables.len()),
            _ => write!(f, "{different} of {} tables differ.", self.tables.len()),
        }
    }
}

impl TableReport {
    fn explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.insert_only {
            writeln!(
                f,
                "    the stream carries only inserts into it (no replica identity): it can differ until the cutover"
            )?;
        }
        if self.missing_on_target {
            return writeln!(f, "    the target has no such table");
        }
        if self.missing_on_source {
            return writeln!(f, "    the source has no such table");
        }
        for column in &self.columns_missing_on_target {
            writeln!(f, "    column {} is missing on the target", printable(column))?;
        }
        for column in &self.columns_extra_on_target {
            writeln!(f, "    column {} is only on the target", printable(column))?;
        }
        for difference in &self.differences {
            write!(f, "    {}: {}", difference.key, difference.kind)?;
            if !difference.columns.is_empty() {
                let columns: Vec<String> = difference.columns.iter().map(|column| printable(column)).collect();
                write!(f, " in {}", columns.join(", "))?;
            }
            writeln!(f)?;
            for (side, row) in [("source", &difference.source_row), ("target", &difference.target_row)] {
                if let Some(row) = row {
                    writeln!(f, "        {side}: {row}")?;
                }
            }
        }
        let named = self.differences.len() as u64;
        if !self.differences_complete {
            writeln!(f, "    {} differing rows found, and there may be more", self.differences_total)?;
        } else if self.differences_total > named {
            writeln!(f, "    and {} more", self.differences_total - named)?;
        } else if named == 0 && self.columns_missing_on_target.is_empty() && self.columns_extra_on_target.is_empty() {
            writeln!(f, "    the difference was gone at the second look: is somebody writing to this table?")?;
        }
        Ok(())
    }
}

/// Text from a database without the control characters that would act on a terminal.
pub(super) fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            printable.extend(character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}

/// `(a, b)=(1, x)`.
pub(super) fn tuple<'a>(names: impl IntoIterator<Item = &'a str>, values: &[Option<Vec<u8>>]) -> String {
    let names: Vec<String> = names.into_iter().map(printable).collect();
    let value = |value: &Option<Vec<u8>>| match value {
        Some(bytes) => printable(&String::from_utf8_lossy(bytes)),
        None => "NULL".into(),
    };
    format!("({})=({})", names.join(", "), values.iter().map(value).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> TableReport {
        TableReport { table: name.into(), equal: true, differences_complete: true, ..TableReport::default() }
    }

    #[test]
    fn one_unequal_table_makes_the_report_unequal() {
        assert!(Report::new(vec![]).equal);
        assert!(Report::new(vec![table("b"), table("a")]).equal);
        let report = Report::new(vec![table("b"), TableReport { equal: false, ..table("a") }]);
        assert!(!report.equal);
        assert_eq!(report.tables[0].table, "a");
    }

    #[test]
    fn a_report_names_table_key_and_column() {
        let difference = Difference {
            kind: DifferenceKind::Different,
            key: tuple(["id"], &[Some(b"42".to_vec())]),
            source_row: None,
            target_row: None,
            columns: vec!["name".into()],
        };
        let differing = TableReport {
            equal: false,
            differences: vec![difference],
            differences_total: 3,
            ..table("\"public\".\"t\"")
        };
        let text = Report::new(vec![differing.clone()]).to_string();
        assert!(text.contains("(id)=(42): different in name"), "{text}");
        assert!(text.contains("and 2 more"), "{text}");
        assert!(text.ends_with("1 of 1 tables differ."), "{text}");
        let json = serde_json::to_value(Report::new(vec![differing])).unwrap();
        assert_eq!(json["version"], 1);
        assert_eq!(json["tables"][0]["differences"][0]["kind"], "different");
        assert!(json["tables"][0]["differences"][0].get("source_row").is_none());
    }

    #[test]
    fn what_a_database_holds_cannot_act_on_the_terminal() {
        assert_eq!(tuple(["a\nb"], &[Some(b"\x1b[2J".to_vec())]), "(a\\nb)=(\\u{1b}[2J)");
        assert_eq!(tuple(["a"], &[None]), "(a)=(NULL)");
    }
}
