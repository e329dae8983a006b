//! What a table becomes as a hypertable: the time column, its chunks, further dimensions, compression, policies.
//!
//! ```text
//!   FILE.toml ──► raw (as it is written, with its lines) ──► Hypertable (proven in itself) ──► `create`: its SQL
//!                                                                ▲
//!   the information views of another TimescaleDB ────────────────┘
//! ```
//!
//! A file is wrong in one of three ways, and each is said with the table, the key and the line: it is not TOML, a key is not known
//! or has the wrong type, or a value says nothing that there is. Whether the source has such a table and such columns is for
//! `check` to say.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::error::{Error, ErrorKind, Result};
use crate::sql;

/// A table that is a hypertable on the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hypertable {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// The column of the first dimension: a time or an integer.
    pub time: String,
    /// How much of it is in one chunk.
    pub chunk_interval: Span,
    /// Further dimensions.
    #[serde(default)]
    pub dimensions: Vec<Dimension>,
    /// The function that says what is now, where time is an integer: schema and name, unquoted.
    #[serde(default)]
    pub integer_now: Option<(String, String)>,
    /// How its chunks are compressed.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// When its chunks are dropped.
    #[serde(default)]
    pub retention: Option<Retention>,
}

/// A length of time: an interval of PostgreSQL, or a number where the time column is an integer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Span {
    /// In the unit of an integer column.
    Integer(i64),
    /// As PostgreSQL reads an `interval`.
    Interval(String),
}

/// A dimension besides the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dimension {
    /// So many partitions by the hash of a column.
    Hash {
        /// Unquoted.
        column: String,
        /// How many.
        partitions: i16,
    },
    /// Ranges of a column.
    Range {
        /// Unquoted.
        column: String,
        /// Of each.
        interval: Span,
    },
}

impl Dimension {
    /// The column, unquoted.
    pub fn column(&self) -> &str {
        match self {
            Dimension::Hash { column, .. } | Dimension::Range { column, .. } => column,
        }
    }
}

/// How chunks are compressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    /// Columns whose values are the same in a compressed segment.
    pub segment_by: Vec<String>,
    /// The order of the rows in it.
    pub order_by: Vec<OrderBy>,
    /// A chunk that ends longer ago than this is compressed: during the migration by walferry, from the cutover on by a policy.
    /// `None`: only who asks for it compresses.
    pub after: Option<Span>,
    /// How often the policy looks; TimescaleDB's own default where it is `None`.
    #[serde(default)]
    pub schedule: Option<String>,
}

/// A column in an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderBy {
    /// Unquoted.
    pub column: String,
    /// The largest first.
    pub descending: bool,
    /// Where NULLs are; `None` for where PostgreSQL has them in that order.
    pub nulls_first: Option<bool>,
}

impl OrderBy {
    /// Reads `column [ASC|DESC] [NULLS FIRST|NULLS LAST]`.
    pub(super) fn parse(text: &str) -> std::result::Result<OrderBy, String> {
        let expected = || format!("`{text}` is not `column [ASC|DESC] [NULLS FIRST|NULLS LAST]`");
        let (column, rest) = identifier(text.trim()).ok_or_else(expected)?;
        let words: Vec<String> = rest.split_whitespace().map(str::to_ascii_lowercase).collect();
        let mut words = words.iter().map(String::as_str).peekable();
        let descending = match words.peek() {
            Some(&"asc") => words.next().is_none(),
            Some(&"desc") => words.next().is_some(),
            _ => false,
        };
        let nulls_first = match (words.next(), words.next(), words.next()) {
            (None, None, None) => None,
            (Some("nulls"), Some("first"), None) => Some(true),
            (Some("nulls"), Some("last"), None) => Some(false),
            _ => return Err(expected()),
        };
        Ok(OrderBy { column, descending, nulls_first })
    }
}

impl fmt::Display for OrderBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&sql::identifier(&self.column))?;
        f.write_str(if self.descending { " DESC" } else { " ASC" })?;
        match self.nulls_first {
            None => Ok(()),
            Some(true) => f.write_str(" NULLS FIRST"),
            Some(false) => f.write_str(" NULLS LAST"),
        }
    }
}

/// When chunks are dropped, from the cutover on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    /// A chunk that ends longer ago than this.
    pub after: Span,
    /// How often the policy looks; TimescaleDB's own default where it is `None`.
    #[serde(default)]
    pub schedule: Option<String>,
}

impl Hypertable {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }

    /// The columns that every unique index must hold.
    pub fn partitioned_by(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.time.as_str()).chain(self.dimensions.iter().map(Dimension::column))
    }

    /// Every column that is named, with the key that names it.
    pub fn columns(&self) -> Vec<(&str, &'static str)> {
        let mut columns = vec![(self.time.as_str(), "time")];
        columns.extend(self.dimensions.iter().map(|dimension| (dimension.column(), "dimension.column")));
        if let Some(compression) = &self.compression {
            columns.extend(compression.segment_by.iter().map(|column| (column.as_str(), "compression.segment_by")));
            columns.extend(compression.order_by.iter().map(|order| (order.column.as_str(), "compression.order_by")));
        }
        columns
    }

    /// Every length of time along the time column, with the key that names it.
    pub fn spans(&self) -> Vec<(&Span, &'static str)> {
        let compressed = self.compression.as_ref().and_then(|compression| compression.after.as_ref());
        let mut spans = vec![(&self.chunk_interval, "chunk_interval")];
        spans.extend(compressed.map(|after| (after, "compression.after")));
        spans.extend(self.retention.as_ref().map(|retention| (&retention.after, "retention.after")));
        spans
    }

    /// Whether something is to be done by the clock once the target has taken over.
    pub fn has_policies(&self) -> bool {
        self.compression.as_ref().is_some_and(|compression| compression.after.is_some()) || self.retention.is_some()
    }
}

/// Reads a file of declarations.
///
/// # Errors
/// `Usage` when it cannot be read or is not what is expected, with the table, the key, the line and what to do.
pub fn read(path: &Path) -> Result<Vec<Hypertable>> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::new(ErrorKind::Usage, error.to_string())
            .hint("Name a file that can be read; `walferry suggest-hypertables --source …` writes one.")
    })?;
    parse(&text)
}

/// Reads declarations.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str) -> Result<Vec<Hypertable>> {
    let file: File = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, &span));
        let message = error.message().replace('\n', " ");
        let table = error.span().and_then(|span| table_above(text, span.start));
        let of = table.map_or(String::new(), |table| format!(" of table {table}"));
        Error::new(ErrorKind::Usage, format!("line {line}{of}: {message}")).hint(KEYS)
    })?;
    let mut seen = BTreeSet::new();
    let mut hypertables = Vec::with_capacity(file.hypertable.len());
    for raw in file.hypertable {
        let span = raw.table.span();
        let hypertable = raw.prove().map_err(|wrong| wrong.in_file(text))?;
        if !seen.insert(hypertable.qualified()) {
            let wrong = Wrong {
                table: hypertable.qualified(),
                key: "table",
                span,
                what: "it is declared twice".to_owned(),
                hint: "Keep one of its [[hypertable]] sections.",
            };
            return Err(wrong.in_file(text));
        }
        hypertables.push(hypertable);
    }
    if hypertables.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "it declares no hypertable").hint(KEYS));
    }
    Ok(hypertables)
}

const KEYS: &str = "Each table has a section [[hypertable]] with `table`, `time` and `chunk_interval`; it may have `integer_now`, sections \
     [[hypertable.dimension]] (`column`, and `partitions` or `interval`), [hypertable.compression] (`segment_by`, `order_by`, `after`, \
     `schedule`) and [hypertable.retention] (`after`, `schedule`). README.md has an example.";

/// Something wrong in a file.
struct Wrong {
    table: String,
    key: &'static str,
    span: Range<usize>,
    what: String,
    hint: &'static str,
}

impl Wrong {
    fn in_file(self, text: &str) -> Error {
        let line = line_of(text, &self.span);
        let message = format!("line {line}, table {}, key `{}`: {}", self.table, self.key, self.what);
        Error::new(ErrorKind::Usage, message).hint(self.hint)
    }
}

/// Counted from 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    text.bytes().take(span.start).filter(|&byte| byte == b'\n').count() + 1
}

/// The table whose section a place in the file is in: what its line `table = …` says.
fn table_above(text: &str, at: usize) -> Option<&str> {
    let named = |line: &'_ str| line.trim().strip_prefix("table")?.trim_start().strip_prefix('=').map(str::len);
    let section = text.get(..at)?.rfind("[[hypertable]]").map_or(0, |start| start);
    let after = text.get(section..)?;
    let line = after.lines().skip(1).take_while(|line| line.trim() != "[[hypertable]]").find(|l| named(l).is_some())?;
    line.split_once('=').map(|(_, value)| value.trim())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    hypertable: Vec<RawHypertable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHypertable {
    table: Spanned<String>,
    time: Spanned<String>,
    chunk_interval: Spanned<RawSpan>,
    integer_now: Option<Spanned<String>>,
    #[serde(default)]
    dimension: Vec<RawDimension>,
    compression: Option<RawCompression>,
    retention: Option<RawRetention>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected an interval such as \"1 day\", or a number where time is an integer")]
enum RawSpan {
    Integer(i64),
    Interval(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDimension {
    column: Spanned<String>,
    partitions: Option<Spanned<i64>>,
    interval: Option<Spanned<RawSpan>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCompression {
    #[serde(default)]
    segment_by: Vec<Spanned<String>>,
    order_by: Option<Vec<Spanned<String>>>,
    after: Option<Spanned<RawSpan>>,
    schedule: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRetention {
    after: Spanned<RawSpan>,
    schedule: Option<Spanned<String>>,
}

impl RawHypertable {
    fn prove(self) -> std::result::Result<Hypertable, Wrong> {
        let (table, span) = (self.table.get_ref().clone(), self.table.span());
        let wrong = move |key, span, what: String, hint| Wrong { table: table.clone(), key, span, what, hint };
        let Some((schema, name)) = qualified(self.table.get_ref()) else {
            let hint = "Write it as \"schema.table\"; names that are not all lower case stand in double quotes.";
            return Err(wrong("table", span, format!("`{}` is no schema and table", self.table.get_ref()), hint));
        };
        let column = |key, text: &Spanned<String>| match identifier(text.get_ref().trim()) {
            Some((column, "")) => Ok(column),
            _ => {
                let hint = "Name one column; a name that is not all lower case stands in double quotes.";
                Err(wrong(key, text.span(), format!("`{}` is no column", text.get_ref()), hint))
            }
        };
        let length = |key, text: Spanned<RawSpan>| {
            let span = text.span();
            let hint =
                "Give a length of time such as \"7 days\", or a whole number greater than 0 where time is an integer.";
            match text.into_inner() {
                RawSpan::Integer(number) if number > 0 => Ok(Span::Integer(number)),
                RawSpan::Interval(text) if text.bytes().any(|byte| byte.is_ascii_digit()) => Ok(Span::Interval(text)),
                RawSpan::Integer(number) => Err(wrong(key, span, format!("{number} is no length of time"), hint)),
                RawSpan::Interval(text) => Err(wrong(key, span, format!("`{text}` is no length of time"), hint)),
            }
        };
        let time = column("time", &self.time)?;
        let mut dimensions = Vec::with_capacity(self.dimension.len());
        for raw in self.dimension {
            let of = column("dimension.column", &raw.column)?;
            let hint = "Give `partitions` for partitions by hash, or `interval` for ranges.";
            dimensions.push(match (raw.partitions, raw.interval) {
                (Some(partitions), None) => match i16::try_from(*partitions.get_ref()) {
                    Ok(number @ 1..) => Dimension::Hash { column: of, partitions: number },
                    _ => {
                        let what = format!("{} is not from 1 to 32767", partitions.get_ref());
                        return Err(wrong("dimension.partitions", partitions.span(), what, hint));
                    }
                },
                (None, Some(interval)) => {
                    Dimension::Range { column: of, interval: length("dimension.interval", interval)? }
                }
                (partitions, _) => {
                    let what = if partitions.is_some() { "it has both" } else { "it has neither" };
                    let what = format!("{what} of `partitions` and `interval`");
                    return Err(wrong("dimension", raw.column.span(), what, hint));
                }
            });
        }
        let mut partitioned = BTreeSet::from([time.clone()]);
        if let Some(again) = dimensions.iter().find(|dimension| !partitioned.insert(dimension.column().to_owned())) {
            let what = format!("column `{}` is a dimension already", again.column());
            return Err(wrong("dimension.column", span, what, "Give each column one dimension."));
        }
        let compression = match self.compression {
            None => None,
            Some(raw) => {
                let segment_by = raw.segment_by.iter().map(|text| column("compression.segment_by", text));
                let order = |text: &Spanned<String>| {
                    OrderBy::parse(text.get_ref()).map_err(|what| {
                        let hint = "Give a list such as [\"time DESC\"]; a name that is not all lower case stands in double quotes.";
                        wrong("compression.order_by", text.span(), what, hint)
                    })
                };
                let by_time = || OrderBy { column: time.clone(), descending: true, nulls_first: None };
                let compression = Compression {
                    segment_by: segment_by.collect::<std::result::Result<_, _>>()?,
                    order_by: match &raw.order_by {
                        Some(list) => list.iter().map(order).collect::<std::result::Result<_, _>>()?,
                        None => vec![by_time()],
                    },
                    after: raw.after.map(|after| length("compression.after", after)).transpose()?,
                    schedule: raw.schedule.map(Spanned::into_inner),
                };
                if compression.segment_by.contains(&time) {
                    let what = format!("the time column `{time}` cannot be in `segment_by`");
                    let hint =
                        "A segment holds the rows of one value: order by time, and segment by what the rows are of.";
                    return Err(wrong("compression.segment_by", span, what, hint));
                }
                if let Some(both) =
                    compression.order_by.iter().find(|order| compression.segment_by.contains(&order.column))
                {
                    let what = format!("column `{}` is in `segment_by` and in `order_by`", both.column);
                    return Err(wrong("compression", span, what, "Leave it out of one of them."));
                }
                Some(compression)
            }
        };
        let retention = match self.retention {
            None => None,
            Some(raw) => Some(Retention {
                after: length("retention.after", raw.after)?,
                schedule: raw.schedule.map(Spanned::into_inner),
            }),
        };
        let integer_now = match &self.integer_now {
            None => None,
            Some(text) => Some(qualified(text.get_ref()).ok_or_else(|| {
                let hint = "Name a function without arguments that answers a value of the time column's type: \"schema.function\".";
                wrong("integer_now", text.span(), format!("`{}` is no schema and function", text.get_ref()), hint)
            })?),
        };
        let interval_span = self.chunk_interval.span();
        let chunk_interval = length("chunk_interval", self.chunk_interval)?;
        let hypertable =
            Hypertable { schema, name, time, chunk_interval, dimensions, integer_now, compression, retention };
        let is_integer = |span: &Span| matches!(span, Span::Integer(_));
        let integer = is_integer(&hypertable.chunk_interval);
        if let Some((_, key)) = hypertable.spans().into_iter().find(|(span, _)| is_integer(span) != integer) {
            let what = "it is a number and `chunk_interval` is an interval, or the other way round".to_owned();
            return Err(wrong(
                key,
                interval_span,
                what,
                "Give numbers where time is an integer, and intervals elsewhere.",
            ));
        }
        if integer && hypertable.has_policies() && hypertable.integer_now.is_none() {
            let what = "time is an integer, and nothing says what is now".to_owned();
            let hint = "Name a function with `integer_now`, by which a policy knows how old a chunk is; or leave `after` and \
                        [hypertable.retention] away.";
            return Err(wrong("integer_now", interval_span, what, hint));
        }
        Ok(hypertable)
    }
}

/// An identifier at the beginning of a text, folded as PostgreSQL does where it is not quoted; and the rest.
fn identifier(text: &str) -> Option<(String, &str)> {
    if let Some(quoted) = text.strip_prefix('"') {
        let mut name = String::new();
        let mut letters = quoted.char_indices().peekable();
        while let Some((at, letter)) = letters.next() {
            if letter != '"' {
                name.push(letter);
            } else if letters.next_if(|(_, next)| *next == '"').is_some() {
                name.push('"');
            } else {
                return (!name.is_empty()).then(|| (name, &quoted[at + 1..]));
            }
        }
        return None;
    }
    let is_part = |letter: char| letter.is_alphanumeric() || matches!(letter, '_' | '$');
    let end = text.find(|letter| !is_part(letter)).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    (!name.is_empty()).then(|| (name.to_lowercase(), rest))
}

/// The `schema.name` that a text begins with.
pub(super) fn begins_with_name(text: &str) -> Option<(String, String)> {
    let (schema, rest) = identifier(text)?;
    let (name, _) = identifier(rest.strip_prefix('.')?)?;
    Some((schema, name))
}

/// `schema.name`, and nothing behind it.
pub(super) fn qualified(text: &str) -> Option<(String, String)> {
    let (schema, rest) = identifier(text.trim())?;
    match identifier(rest.strip_prefix('.')?)? {
        (name, "") => Some((schema, name)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
[[hypertable]]
table = "public.conditions"
time = "time"
chunk_interval = "1 day"

[[hypertable.dimension]]
column = "device"
partitions = 4

[hypertable.compression]
segment_by = ["device"]
order_by = ["time DESC", "\"Seq\" nulls last"]
after = "7 days"

[hypertable.retention]
after = "1 year"

[[hypertable]]
table = '"App".events'
time = "at"
chunk_interval = 86400
integer_now = "public.unix_now"
"#;

    #[test]
    fn a_file_says_all_that_a_hypertable_is() {
        let declared = parse(WHOLE).unwrap();
        assert_eq!(declared.len(), 2);
        assert_eq!(declared[0].qualified(), "\"public\".\"conditions\"");
        assert_eq!(declared[0].dimensions, [Dimension::Hash { column: "device".into(), partitions: 4 }]);
        let compression = declared[0].compression.clone().unwrap();
        let order: Vec<String> = compression.order_by.iter().map(ToString::to_string).collect();
        assert_eq!(order, ["\"time\" DESC", "\"Seq\" ASC NULLS LAST"]);
        assert_eq!(compression.after, Some(Span::Interval("7 days".into())));
        assert_eq!(declared[0].partitioned_by().collect::<Vec<_>>(), ["time", "device"]);
        assert_eq!(declared[1].qualified(), "\"App\".\"events\"");
        assert_eq!(declared[1].integer_now, Some(("public".into(), "unix_now".into())));
        let kept: Vec<Hypertable> = serde_json::from_str(&serde_json::to_string(&declared).unwrap()).unwrap();
        assert_eq!(kept, declared, "as the ledger keeps it");
    }

    #[test]
    fn what_is_wrong_is_said_with_table_key_and_line() {
        let cases = [
            ("time = \"time\"", "tim = \"time\"", "line 4 of table \"public.conditions\": unknown field `tim`"),
            ("time = \"time\"\n", "\n", "missing field `time`"),
            ("\"1 day\"", "true", "line 5 of table \"public.conditions\": expected an interval"),
            ("\"1 day\"", "-5", "line 5, table public.conditions, key `chunk_interval`: -5 is no length of time"),
            ("\"1 day\"", "\"soon\"", "key `chunk_interval`: `soon` is no length of time"),
            ("\"public.conditions\"", "\"conditions\"", "line 3, table conditions, key `table`"),
            ("= 4", "= 0", "line 9, table public.conditions, key `dimension.partitions`: 0 is not from 1"),
            ("partitions = 4", "partitions = 4\ninterval = 3", "key `dimension`: it has both"),
            ("\"time DESC\"", "\"time DOWN\"", "line 13, table public.conditions, key `compression.order_by`"),
            ("\"time DESC\"", "\"device\"", "column `device` is in `segment_by` and in `order_by`"),
            ("[\"device\"]", "[\"time\"]", "the time column `time` cannot be in `segment_by`"),
            ("\"1 year\"", "31536000", "key `retention.after`: it is a number and"),
            ("column = \"device\"", "column = \"time\"", "column `time` is a dimension already"),
            ("'\"App\".events'", "\"public.conditions\"", "line 20, table \"public\".\"conditions\", key `table`"),
            ("integer_now = \"public.unix_now\"", "integer_now = \"now()\"", "key `integer_now`: `now()` is no schema"),
            (
                "integer_now = \"public.unix_now\"",
                "[hypertable.retention]\nafter = 5",
                "line 22, table \"App\".events, key `integer_now`: time is an integer, and nothing says",
            ),
        ];
        for (from, to, said) in cases {
            let error = parse(&WHOLE.replacen(from, to, 1)).unwrap_err();
            assert!(error.to_string().contains(said), "{from} → {to}: {error}");
            assert!(error.kind() == ErrorKind::Usage && error.next_step().is_some(), "{error:?}");
        }
        assert!(parse("").unwrap_err().to_string().contains("declares no hypertable"));
        assert!(parse("[[hypertable]").unwrap_err().to_string().contains("line 1"));
    }
}
