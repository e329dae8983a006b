//! Many changed rows of a chunk at once: when that is worth more than a statement for each, and how.
//!
//! A statement that joins the hypertable with a staging table looks through every chunk, and decompresses of each whatever no constant in it
//! speaks against. So the changes of each chunk of the source are staged by themselves, and the statement has the least and the greatest
//! time among them as constants: other chunks are not even opened. They leave out nothing, since a row's time is part of what names it.
//!
//! Where the target has the chunk compressed, as it was copied, the rows go one by one all the same: each reaches the segments of its own
//! values only, and a set would have all of the range decompressed that lies between.

use crate::decode::{Datum, Tuple};
use crate::source::catalog::{Column, Table};
use crate::sql;
use crate::target::serial::parameter;

/// Before a statement of [`delete_equal_text`]: what names a row may be in no index, so that asking one for each row can be the worst way.
pub(crate) const PLAN_FREELY: &str = "SELECT pg_catalog.set_config('enable_hashjoin', 'on', true), \
     pg_catalog.set_config('enable_seqscan', 'on', true)";
/// Behind it: as the session had it.
pub(crate) const PLAN_BY_KEY: &str = "SELECT pg_catalog.set_config('enable_hashjoin', 'off', true), \
     pg_catalog.set_config('enable_seqscan', 'off', true)";

/// The column of the staging table that says how many equal rows go.
pub(crate) const TIMES: &str = "\"walferry times\"";

/// The least and the greatest time of some rows, as the stream has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeRange {
    least: Vec<u8>,
    greatest: Vec<u8>,
    binary: bool,
}

impl TimeRange {
    /// Of rows of a chunk that have at least the columns of what names them; `None` where they are better changed one by one.
    pub(crate) fn of<'a>(table: &Table, rows: impl Iterator<Item = Tuple<'a>>) -> Option<TimeRange> {
        let chunk = table.chunk.as_ref()?;
        if chunk.compressed.is_some() && !chunk.is_late {
            return None;
        }
        let (at, column) = time_of(table)?;
        let (mut least, mut greatest): (Option<(Place<'a>, Datum<'a>)>, _) = (None, None::<(Place<'a>, Datum<'a>)>);
        for row in rows {
            let time = row.columns().nth(at)?;
            let place = (Place::of(column, time)?, time);
            least = Some(least.map_or(place, |least| if place.0 < least.0 { place } else { least }));
            greatest = Some(greatest.map_or(place, |greatest| if place.0 > greatest.0 { place } else { greatest }));
        }
        let ((_, least), (_, greatest)) = (least?, greatest?);
        let binary = matches!(least, Datum::Binary(_));
        match (least, greatest) {
            (Datum::Binary(least), Datum::Binary(greatest)) | (Datum::Text(least), Datum::Text(greatest)) => {
                Some(TimeRange { least: least.to_vec(), greatest: greatest.to_vec(), binary })
            }
            _ => None,
        }
    }

    /// The parameters of [`condition`].
    pub(crate) fn values(&self) -> [Datum<'_>; 2] {
        [&self.least[..], &self.greatest[..]]
            .map(|bytes| if self.binary { Datum::Binary(bytes) } else { Datum::Text(bytes) })
    }
}

/// The column of the first dimension, by which chunks are found.
fn time_of(table: &Table) -> Option<(usize, &Column)> {
    let name = table.chunk.as_ref()?.dimensions.first()?;
    table.columns.iter().enumerate().find(|(_, column)| column.name == *name)
}

/// A time in the order of its type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place<'a> {
    Number(i64),
    Text(&'a [u8]),
}

impl<'a> Place<'a> {
    /// `None` for a type or a value whose order is not known here.
    fn of(column: &Column, time: Datum<'a>) -> Option<Place<'a>> {
        // smallint, integer, bigint; date, timestamp, timestamptz, whose binary forms are numbers.
        let (is_integer, is_time) =
            (matches!(column.type_oid, 20 | 21 | 23), matches!(column.type_oid, 1082 | 1114 | 1184));
        match time {
            Datum::Binary(bytes) if is_integer || is_time => Some(Place::Number(match bytes.len() {
                2 => i64::from(i16::from_be_bytes(bytes.try_into().ok()?)),
                4 => i64::from(i32::from_be_bytes(bytes.try_into().ok()?)),
                _ => i64::from_be_bytes(bytes.try_into().ok()?),
            })),
            Datum::Text(text) if is_integer => std::str::from_utf8(text).ok()?.parse().ok().map(Place::Number),
            // As ISO writes it, of one zone, years of four digits are in order as they are written; not those before the era.
            Datum::Text(text) if is_time => {
                let has_four = text.get(4) == Some(&b'-') && text[..4].iter().all(u8::is_ascii_digit);
                (has_four && !text.ends_with(b"BC")).then_some(Place::Text(text))
            }
            _ => None,
        }
    }
}

/// Behind the condition of a join over `t`, the hypertable: the chunks to look at, by the parameters 1 and 2. Nothing for other tables.
pub(crate) fn condition(table: &Table) -> String {
    let Some((_, column)) = time_of(table) else { return String::new() };
    let name = sql::identifier(&column.name);
    let schema = sql::identifier(column.equality_schema.as_deref().unwrap_or("pg_catalog"));
    let bound =
        |operator: &str, number| format!(" AND t.{name} OPERATOR({schema}.{operator}) {}", parameter(number, column));
    format!("{}{}", bound(">=", 1), bound("<=", 2))
}

/// The statement that removes of the rows with exactly the values of a staged one as many as it says; all staged rows are NULL in the
/// columns at these positions, and nowhere else. Its count is that of the staged rows of which there were as many.
///
/// The rows of compressed chunks have no `ctid` to name one of several equal ones by: so all go, and those that are too many come back.
pub(crate) fn delete_equal_text(table: &Table, nulls: &[u16], staging: &str) -> String {
    let same = |(at, column): (u16, &Column)| {
        let name = sql::identifier(&column.name);
        match &column.equality_schema {
            _ if nulls.contains(&at) => format!("t.{name} IS NULL"),
            // Equal in no other bytes: an index may be asked.
            Some(schema) if column.byte_equal => format!("t.{name} OPERATOR({}.=) s.{name}", sql::identifier(schema)),
            _ => format!("t.{name}::text COLLATE \"C\" = s.{name}::text COLLATE \"C\""),
        }
    };
    let same: Vec<String> = (0u16..).zip(&table.columns).map(same).collect();
    let (name, into, columns) = (table.applied_to(), table.inserted_into(), table.column_list());
    let of_table: Vec<String> =
        table.columns.iter().map(|column| format!("t.{}", sql::identifier(&column.name))).collect();
    format!(
        "WITH gone AS (DELETE FROM {name} t USING {staging} s WHERE {}{} \
         RETURNING s.ctid AS \"walferry row\", s.{TIMES} AS {TIMES}, {}), \
         numbered AS (SELECT *, pg_catalog.row_number() OVER (PARTITION BY \"walferry row\") AS \"walferry number\" FROM gone), \
         back AS (INSERT INTO {into} ({columns}) SELECT {columns} FROM numbered WHERE \"walferry number\" > {TIMES}) \
         SELECT FROM numbered WHERE \"walferry number\" = {TIMES}",
        same.join(" AND "),
        condition(table),
        of_table.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::KeptTuple;
    use crate::timescale::ChunkOf;

    fn table(type_oid: u32, type_name: &str) -> Table {
        let column = |name: &str, type_oid: u32, type_name: &str, byte_equal: bool| Column {
            name: name.into(),
            number: 1,
            type_oid,
            type_name: type_name.into(),
            type_modifier: -1,
            not_null: name == "at",
            identity_always: false,
            binary_safe: true,
            byte_equal,
            equality_schema: Some("pg_catalog".into()),
        };
        let columns = vec![column("at", type_oid, type_name, true), column("v", 701, "double precision", false)];
        let chunk = ChunkOf {
            relid: 7,
            schema: "public".into(),
            name: "m".into(),
            hypertable: 1,
            chunk: 1,
            dimensions: vec!["at".into()],
            ranges: Vec::new(),
            on_target: None,
            compressed: None,
            status: 0,
            is_late: false,
            is_gone: false,
            stands_in: None,
        };
        Table { columns, chunk: Some(chunk), ..Table::plain("s", "c") }
    }

    fn rows(kind: u8, values: &[&[u8]]) -> Vec<KeptTuple> {
        let row = |value: &&[u8]| {
            let mut bytes = vec![kind];
            bytes.extend((value.len() as u32).to_be_bytes());
            bytes.extend(*value);
            bytes.push(b'n');
            KeptTuple::new(2, bytes.into())
        };
        values.iter().map(row).collect()
    }

    fn range(table: &Table, kind: u8, values: &[&[u8]]) -> Option<TimeRange> {
        TimeRange::of(table, rows(kind, values).iter().map(KeptTuple::tuple))
    }

    #[test]
    fn the_range_of_times_is_in_the_order_of_their_type_or_there_is_none() {
        let times = table(1184, "timestamp with time zone");
        let some =
            range(&times, b't', &[b"2025-01-01 00:00:00.5+00", b"0999-12-31 00:00:00+00", b"2025-01-01 00:00:00+00"])
                .unwrap();
        assert_eq!(some.values(), [Datum::Text(b"0999-12-31 00:00:00+00"), Datum::Text(b"2025-01-01 00:00:00.5+00")]);
        for unknown in [&b"infinity"[..], b"-infinity", b"0044-03-15 12:00:00+00 BC", b"12025-01-01 00:00:00+00"] {
            assert_eq!(range(&times, b't', &[b"2025-01-01 00:00:00+00", unknown]), None);
        }
        let (minus, plus) = ((-5i64).to_be_bytes(), 3i64.to_be_bytes());
        let some = range(&times, b'b', &[&plus, &minus, &plus]).unwrap();
        assert_eq!(some.values(), [Datum::Binary(&minus), Datum::Binary(&plus)]);
        let numbers = table(23, "integer");
        let some = range(&numbers, b't', &[b"9", b"-10", b"10"]).unwrap();
        assert_eq!(some.values(), [Datum::Text(b"-10"), Datum::Text(b"10")], "as numbers, not as letters");
        assert_eq!(range(&table(2950, "uuid"), b't', &[b"1"]), None);
        let mut compressed = numbers;
        let chunk = compressed.chunk.as_mut().unwrap();
        chunk.compressed =
            Some(crate::timescale::source::CompressedChunk { id: 2, relid: 9, schema: "s".into(), name: "z".into() });
        assert_eq!(range(&compressed, b't', &[b"1"]), None, "of a compressed one, a statement reaches its own segment");
    }

    #[test]
    fn equal_rows_are_found_by_index_where_equality_is_that_of_bytes() {
        let table = table(1184, "timestamp with time zone");
        assert_eq!(
            delete_equal_text(&table, &[], "pg_temp.s"),
            "WITH gone AS (DELETE FROM \"public\".\"m\" t USING pg_temp.s s WHERE t.\"at\" OPERATOR(\"pg_catalog\".=) s.\"at\" \
             AND t.\"v\"::text COLLATE \"C\" = s.\"v\"::text COLLATE \"C\" \
             AND t.\"at\" OPERATOR(\"pg_catalog\".>=) CAST($1 AS timestamp with time zone) \
             AND t.\"at\" OPERATOR(\"pg_catalog\".<=) CAST($2 AS timestamp with time zone) \
             RETURNING s.ctid AS \"walferry row\", s.\"walferry times\" AS \"walferry times\", t.\"at\", t.\"v\"), \
             numbered AS (SELECT *, pg_catalog.row_number() OVER (PARTITION BY \"walferry row\") AS \"walferry number\" FROM gone), \
             back AS (INSERT INTO \"public\".\"m\" (\"at\", \"v\") SELECT \"at\", \"v\" FROM numbered WHERE \"walferry number\" > \"walferry times\") \
             SELECT FROM numbered WHERE \"walferry number\" = \"walferry times\""
        );
        assert!(delete_equal_text(&table, &[1], "pg_temp.s").contains("AND t.\"v\" IS NULL AND"));
    }
}
