//! Hypertables and their chunks as a server has them: which range of which dimension a chunk holds, and how.
//!
//! A chunk's slices are read with the extension's own `show_chunk`, because the catalog's tables behind it change between versions
//! (2.26 shares slices between chunks, 2.28 does not). A number in a slice is the extension's own: microseconds since 1970 where the dimension is a time
//! or a date, else the integer itself; the smallest and the largest number mean no bound.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::source;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sql;

/// Rows of a compressed chunk that are not compressed: `CHUNK_STATUS_COMPRESSED_PARTIAL` of the extension.
const PARTIAL: i32 = 8;
/// `CHUNK_STATUS_COMPRESSED`.
const COMPRESSED: i32 = 1;

/// What a column holds that rows are divided by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimeType {
    /// `timestamp with time zone`.
    TimestampTz,
    /// `timestamp without time zone`, taken as UTC.
    Timestamp,
    /// `date`.
    Date,
    /// `smallint`, `integer` or `bigint`, by that name.
    Integer(String),
}

impl TimeType {
    /// By the name that `format_type` gives; `None` for a type that rows are not divided by here.
    pub fn of(type_name: &str) -> Option<TimeType> {
        Some(match type_name {
            "timestamp with time zone" => TimeType::TimestampTz,
            "timestamp without time zone" => TimeType::Timestamp,
            "date" => TimeType::Date,
            "smallint" | "integer" | "bigint" => TimeType::Integer(type_name.to_owned()),
            _ => return None,
        })
    }

    /// A value as SQL, exact to the microsecond, in a session whose time zone is UTC. It is a constant when the statement is planned: only
    /// then are the chunks that it excludes not even opened.
    pub fn literal(&self, value: i64) -> String {
        match self {
            TimeType::TimestampTz => format!("'{}'::timestamptz", moment(value)),
            TimeType::Timestamp => format!("'{}'::timestamp", moment(value)),
            TimeType::Date => format!("'{}'::date", day(value.div_euclid(MICROSECONDS_PER_DAY), "")),
            TimeType::Integer(name) => format!("'{value}'::{name}"),
        }
    }

    /// An expression over a column as such a number, or null for an infinite one.
    pub fn number_of(&self, expression: &str) -> String {
        match self {
            TimeType::Integer(_) => format!("({expression})::int8"),
            _ => format!(
                "CASE WHEN pg_catalog.isfinite({expression}) \
                 THEN (EXTRACT(epoch FROM {expression}) * 1000000)::int8 END"
            ),
        }
    }
}

/// Microseconds since 1970 as PostgreSQL reads a moment in UTC.
fn moment(value: i64) -> String {
    let of_day = value.rem_euclid(MICROSECONDS_PER_DAY);
    let (seconds, microseconds) = (of_day / 1_000_000, of_day % 1_000_000);
    let time = format!(" {:02}:{:02}:{:02}.{microseconds:06}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    day(value.div_euclid(MICROSECONDS_PER_DAY), &time)
}

/// Days since 1970 in the proleptic Gregorian calendar, as PostgreSQL reads them, with the time of the day before the era.
fn day(days: i64, time: &str) -> String {
    // From 1 March of the year 0 on, in eras of 400 years (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (year, era) = if year > 0 { (year, "") } else { (1 - year, " BC") };
    format!("{year:04}-{month:02}-{:02}{time}{era}", of_year - (153 * shifted + 2) / 5 + 1)
}

/// In a day.
pub const MICROSECONDS_PER_DAY: i64 = 86_400_000_000;

/// A dimension of a hypertable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dimension {
    /// The column, unquoted.
    pub column: String,
    /// What ranges of the column are of; `None` where the dimension is a hash of it, or of a type that is not known here.
    pub time_type: Option<TimeType>,
    /// `format_type` of the column.
    pub type_name: String,
    /// The function whose result a slice speaks of, ready for SQL.
    pub function: Option<String>,
    /// Whether it divides by a hash.
    pub is_hash: bool,
}

impl Dimension {
    /// The condition that a slice makes on the alias `t`; `None` where it has no bound.
    fn condition(&self, (from, to): (i64, i64)) -> Option<String> {
        let column = format!("t.{}", sql::identifier(&self.column));
        let expression = match &self.function {
            // A row without a value is where the hash 0 is.
            Some(function) if self.is_hash => format!("coalesce({function}({column}), 0)"),
            Some(function) => format!("{function}({column})"),
            None => column,
        };
        let value = |number: i64| match &self.time_type {
            Some(time_type) => time_type.literal(number),
            None => format!("'{number}'::int8"),
        };
        let from = (from != i64::MIN).then(|| format!("{expression} >= {}", value(from)));
        let to = (to != i64::MAX).then(|| format!("{expression} < {}", value(to)));
        let bounds: Vec<String> = from.into_iter().chain(to).collect();
        (!bounds.is_empty()).then(|| bounds.join(" AND "))
    }
}

/// A hypertable; not the inner ones that hold compressed rows or a continuous aggregate's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hypertable {
    /// The extension's number of it.
    pub id: i32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// Its dimensions; the first divides by time.
    pub dimensions: Vec<Dimension>,
    /// Whether its chunks can be compressed.
    pub has_compression: bool,
    /// Whether the extension keeps ranges of further columns per chunk, which it computes when it compresses.
    pub skips_chunks: bool,
}

/// A chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// By the dimension's column: from a number up to, not including, another.
    pub slices: BTreeMap<String, (i64, i64)>,
    /// The extension's bits: compressed, unordered, frozen, partly compressed.
    pub status: i32,
    /// The table that holds its compressed rows, and the settings that they were compressed with.
    pub compressed: Option<Compressed>,
    /// Its size with TOAST and what is compressed, without indexes.
    pub bytes: i64,
    /// Whether it lies in object storage.
    pub is_tiered: bool,
}

/// Where a chunk's compressed rows are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// Segment by, order by and indexes of the batches, as the extension has them.
    pub settings: String,
}

impl Chunk {
    /// `"schema"."name"`.
    pub fn qualified(&self) -> String {
        sql::qualified(&self.schema, &self.name)
    }

    /// The range of the first dimension.
    pub fn range(&self, hypertable: &Hypertable) -> (i64, i64) {
        let first = hypertable.dimensions.first().and_then(|dimension| self.slices.get(&dimension.column));
        first.copied().unwrap_or((i64::MIN, i64::MAX))
    }

    /// The conditions on the alias `t` that the further dimensions make: with the range of the first they are exactly this chunk's rows.
    pub fn further_conditions(&self, hypertable: &Hypertable) -> Vec<String> {
        let further = hypertable.dimensions.iter().skip(1);
        further.filter_map(|dimension| dimension.condition(*self.slices.get(&dimension.column)?)).collect()
    }

    /// The condition on the alias `t` that exactly this chunk's rows fulfil.
    pub fn condition(&self, hypertable: &Hypertable) -> String {
        let all = hypertable.dimensions.iter();
        let conditions: Vec<String> =
            all.filter_map(|dimension| dimension.condition(*self.slices.get(&dimension.column)?)).collect();
        if conditions.is_empty() { "true".into() } else { conditions.join(" AND ") }
    }

    /// As `create_chunk` takes it.
    pub fn slices_json(&self) -> String {
        let slices: BTreeMap<&String, [i64; 2]> =
            self.slices.iter().map(|(column, &(from, to))| (column, [from, to])).collect();
        // A map of strings and numbers always has a JSON form.
        serde_json::to_string(&slices).unwrap_or_default()
    }

    /// Whether compressed batches can be taken as they are: all rows are compressed, but for those that came later; no batch overlaps
    /// another, and nobody has frozen it.
    pub fn has_plain_batches(&self) -> bool {
        self.compressed.is_some() && self.status & !PARTIAL == COMPRESSED
    }
}

/// The version of the extension in a database, and the schema of its functions; `None` where it is not there.
///
/// # Errors
/// Whatever the server says.
pub async fn extension(client: &Client) -> Result<Option<(String, String)>> {
    Ok(source::extension(client).await?.map(|extension| (extension.version, extension.schema)))
}

/// Every hypertable of a database that has the extension.
///
/// # Errors
/// Whatever the server says.
pub async fn hypertables(client: &Client) -> Result<Vec<Hypertable>> {
    read(client, None).await
}

/// The hypertable with an id, also one that holds the rows of a continuous aggregate.
///
/// # Errors
/// Whatever the server says.
pub async fn hypertable_with_id(client: &Client, id: i32) -> Result<Option<Hypertable>> {
    Ok(read(client, Some(id)).await?.pop())
}

async fn read(client: &Client, id: Option<i32>) -> Result<Vec<Hypertable>> {
    let doing = || "reading the hypertables".to_owned();
    let rows = client
        .query_typed(
            "SELECT h.id, h.schema_name::text, h.table_name::text, h.compressed_hypertable_id IS NOT NULL, \
                    EXISTS (SELECT FROM _timescaledb_catalog.chunk_column_stats s WHERE s.hypertable_id = h.id) \
             FROM _timescaledb_catalog.hypertable h \
             WHERE h.compression_state <> 2 AND CASE WHEN $1::int4 IS NOT NULL THEN h.id = $1 \
               ELSE NOT EXISTS (SELECT FROM _timescaledb_catalog.continuous_agg a WHERE a.mat_hypertable_id = h.id) END ORDER BY 2, 3",
            &[(&id, Type::INT4)],
        )
        .await
        .context(doing)?;
    let mut dimensions: HashMap<i32, Vec<Dimension>> = HashMap::new();
    let of_all = client
        .query_typed(
            "SELECT hypertable_id, column_name::text, pg_catalog.format_type(column_type, NULL), num_slices IS NOT NULL, \
                    partitioning_func_schema::text, partitioning_func::text \
             FROM _timescaledb_catalog.dimension ORDER BY hypertable_id, id",
            &[],
        )
        .await
        .context(doing)?;
    for row in of_all {
        let (type_name, is_hash): (String, bool) = (row.get(2), row.get(3));
        let function = row.get::<_, Option<&str>>(4).zip(row.get::<_, Option<&str>>(5));
        let time_type = if is_hash || function.is_some() { None } else { TimeType::of(&type_name) };
        dimensions.entry(row.get(0)).or_default().push(Dimension {
            column: row.get(1),
            time_type,
            type_name,
            function: function.map(|(schema, name)| sql::qualified(schema, name)),
            is_hash,
        });
    }
    let hypertable = |row: &tokio_postgres::Row| Hypertable {
        id: row.get(0),
        schema: row.get(1),
        name: row.get(2),
        dimensions: dimensions.remove(&row.get(0)).unwrap_or_default(),
        has_compression: row.get(3),
        skips_chunks: row.get(4),
    };
    Ok(rows.iter().map(hypertable).collect())
}

/// The hypertable of a name, if it is one.
///
/// # Errors
/// Whatever the server says.
pub async fn hypertable(client: &Client, schema: &str, name: &str) -> Result<Option<Hypertable>> {
    if extension(client).await?.is_none() {
        return Ok(None);
    }
    Ok(hypertables(client).await?.into_iter().find(|one| (one.schema.as_str(), one.name.as_str()) == (schema, name)))
}

/// The chunks of a hypertable, or one of them by its schema and name.
///
/// # Errors
/// Whatever the server says.
pub async fn chunks(client: &Client, hypertable: &Hypertable, one: Option<(&str, &str)>) -> Result<Vec<Chunk>> {
    let doing = || format!("reading the chunks of {}", sql::qualified(&hypertable.schema, &hypertable.name));
    let (schema, name) = one.unzip();
    let rows = client
        .query_typed(
            // The slices of one chunk after the other; OFFSET 0 keeps the planner from asking for those that are not wanted. A column that
            // older versions have marks a chunk of which only the catalog knows.
            "WITH wanted AS (SELECT c.*, pg_catalog.format('%I.%I', c.schema_name, c.table_name)::regclass AS relation \
                             FROM _timescaledb_catalog.chunk c \
                             WHERE c.hypertable_id = $1 AND ($2::text IS NULL OR (c.schema_name, c.table_name) = ($2, $3)) \
                               AND NOT coalesce((pg_catalog.to_jsonb(c)->>'dropped')::bool, false) OFFSET 0) \
             SELECT c.schema_name::text, c.table_name::text, s.slices::text, c.status, c.osm_chunk, \
                    pg_catalog.pg_table_size(c.relation) + coalesce(pg_catalog.pg_table_size(i.relation), 0), \
                    i.schema_name::text, i.table_name::text, coalesce(i.settings, '') \
             FROM wanted c CROSS JOIN LATERAL _timescaledb_functions.show_chunk(c.relation) s \
             LEFT JOIN LATERAL (SELECT i.schema_name, i.table_name, \
                                       pg_catalog.format('%I.%I', i.schema_name, i.table_name)::regclass AS relation, \
                                       (SELECT (pg_catalog.to_jsonb(k) - 'relid' - 'compress_relid')::text \
                                        FROM _timescaledb_catalog.compression_settings k WHERE k.relid = c.relation) AS settings \
                                FROM _timescaledb_catalog.chunk i WHERE i.id = c.compressed_chunk_id) i ON true",
            &[(&hypertable.id, Type::INT4), (&schema, Type::TEXT), (&name, Type::TEXT)],
        )
        .await
        .context(doing)?;
    let mut chunks = rows.iter().map(chunk).collect::<Result<Vec<Chunk>>>().context(doing)?;
    chunks.sort_by_cached_key(|chunk| (chunk.range(hypertable), chunk.name.clone()));
    Ok(chunks)
}

fn chunk(row: &tokio_postgres::Row) -> Result<Chunk> {
    let slices: BTreeMap<String, [i64; 2]> = serde_json::from_str(row.get(2))
        .map_err(|error| Error::new(ErrorKind::Other, format!("a chunk's slices cannot be read: {error}")))?;
    let compressed = row.get::<_, Option<String>>(6).zip(row.get::<_, Option<String>>(7));
    Ok(Chunk {
        schema: row.get(0),
        name: row.get(1),
        slices: slices.into_iter().map(|(column, [from, to])| (column, (from, to))).collect(),
        status: row.get(3),
        compressed: compressed.map(|(schema, name)| Compressed { schema, name, settings: row.get(8) }),
        bytes: row.get(5),
        is_tiered: row.get(4),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash() -> Dimension {
        Dimension {
            column: "d".into(),
            time_type: None,
            type_name: "text".into(),
            function: Some("f.h".into()),
            is_hash: true,
        }
    }

    #[test]
    fn a_time_is_written_exactly_before_and_after_1970() {
        let after = TimeType::TimestampTz.literal(1_767_225_600_000_001);
        assert_eq!(after, "'2026-01-01 00:00:00.000001'::timestamptz");
        let before = TimeType::Timestamp.literal(-1);
        assert_eq!(before, "'1969-12-31 23:59:59.999999'::timestamp");
        assert_eq!(TimeType::Date.literal(-1), "'1969-12-31'::date");
        assert_eq!(TimeType::Date.literal(951_782_400_000_000), "'2000-02-29'::date");
        assert_eq!(TimeType::Timestamp.literal(-62_167_219_200_000_000), "'0001-01-01 00:00:00.000000 BC'::timestamp");
        assert_eq!(TimeType::Integer("bigint".into()).literal(-7), "'-7'::bigint");
    }

    #[test]
    fn a_slice_without_a_bound_makes_no_condition_and_null_has_the_hash_0() {
        assert_eq!(hash().condition((i64::MIN, i64::MAX)), None);
        assert_eq!(hash().condition((i64::MIN, 7)).unwrap(), "coalesce(f.h(t.\"d\"), 0) < '7'::int8");
    }

    #[test]
    fn only_a_chunk_whose_batches_are_in_order_is_taken_as_it_is() {
        let compressed = Compressed { schema: "s".into(), name: "c".into(), settings: String::new() };
        let mut chunk = Chunk {
            schema: "s".into(),
            name: "n".into(),
            slices: BTreeMap::from([("t".into(), (0, 10))]),
            status: 1,
            compressed: Some(compressed),
            bytes: 0,
            is_tiered: false,
        };
        assert_eq!(chunk.slices_json(), r#"{"t":[0,10]}"#);
        for (status, plain) in [(1, true), (9, true), (3, false), (11, false), (5, false), (0, false)] {
            chunk.status = status;
            assert_eq!(chunk.has_plain_batches(), plain, "{status}");
        }
    }
}
