//! `walferry suggest-hypertables`: a file for `--hypertables`, from what the source's catalog and statistics know of its tables.
//!
//! | | by |
//! |---|---|
//! | whether | a time or bigint column in its key, or no unique key at all; few updates and deletes for its inserts |
//! | the time column | of the candidates, the one whose order is most that of the rows on the disk |
//! | the chunk interval | rows and bytes over the span of the column, so that a chunk with its indexes is a quarter of the memory |
//! | segment by | a column of the key with few distinct values for its rows |
//!
//! Each choice is said in a comment, and each table that is left alone stands there commented out, with the reason.

use std::fmt::Write;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::declaration::Span;
use crate::error::{Context, Result};
use crate::observe::format::size;
use crate::source::catalog::{self, Table};
use crate::source::scope::Scope;
use crate::sql;

/// More of a table's rows than this share are not changed afterwards, in one that becomes a hypertable.
const CHANGED_MAX: f64 = 0.2;
/// Fewer distinct values a segment has than a chunk has rows, divided by this: a compressed batch holds up to a thousand rows.
const ROWS_PER_SEGMENT_MIN: f64 = 100.0;
/// Smaller tables are left alone.
const ROWS_MIN: i64 = 10_000;
/// Below this the column's order is not that in which rows came.
const CORRELATION_MIN: f64 = 0.7;

/// Interval lengths that people choose, in seconds, and how they write them.
const INTERVALS: [(f64, &str); 14] = [
    (900.0, "15 minutes"),
    (1800.0, "30 minutes"),
    (3600.0, "1 hour"),
    (7200.0, "2 hours"),
    (14_400.0, "4 hours"),
    (28_800.0, "8 hours"),
    (43_200.0, "12 hours"),
    (86_400.0, "1 day"),
    (172_800.0, "2 days"),
    (345_600.0, "4 days"),
    (604_800.0, "7 days"),
    (1_209_600.0, "14 days"),
    (2_592_000.0, "30 days"),
    (7_776_000.0, "90 days"),
];

/// A column that could cut a table into chunks.
#[derive(Clone, Debug)]
struct Candidate {
    name: String,
    is_integer: bool,
    not_null: bool,
    in_every_key: bool,
    correlation: Option<f64>,
}

/// What is known of a table besides its catalog.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// With indexes and TOAST.
    bytes: i64,
    rows: i64,
    inserted: i64,
    changed: i64,
    has_keys: bool,
    /// Foreign keys, inheritance, rules: what stands against it, in words.
    against: Vec<&'static str>,
    candidates: Vec<Candidate>,
    /// Columns of a key with the number of their distinct values, the fewest first.
    segments: Vec<(String, f64)>,
}

/// The file, for a target whose chunk is to be a quarter of so many bytes.
///
/// # Errors
/// Whatever the server says.
pub async fn suggest(source: &Client, scope: &Scope, memory_bytes: u64) -> Result<String> {
    let selection = scope.select_strictly(source).await?;
    let mut tables = catalog::chosen(catalog::tables(source).await?, selection.as_ref());
    tables.sort_by(|a, b| (&a.schema, &a.name).cmp(&(&b.schema, &b.name)));
    let mut text = format!(
        "# What `walferry suggest-hypertables` proposes, by the source's statistics. Read it, change it, and give it to\n\
         # `walferry check --hypertables FILE` and `walferry migrate --hypertables FILE --no-reverse`.\n\
         # A chunk with its indexes is to be about a quarter of {} of memory.\n",
        size(memory_bytes)
    );
    let (mut proposed, mut left_alone) = (0, String::new());
    for table in &tables {
        let facts = facts(source, table).await?;
        match choose(&facts) {
            Ok(time) => {
                let range = range(source, table, time).await?;
                text.push('\n');
                text.push_str(&section(table, &facts, time, range, memory_bytes));
                proposed += 1;
            }
            Err(why) => {
                let name = table_name(table);
                let _ = writeln!(left_alone, "\n# {why}\n# [[hypertable]]\n# table = {}", toml(&name));
            }
        }
    }
    if proposed == 0 {
        text.push_str("\n# No table looks like a time series.\n");
    }
    if !left_alone.is_empty() {
        text.push_str("\n# Left alone:\n");
        text.push_str(&left_alone);
    }
    Ok(text)
}

/// The target's `shared_buffers` in bytes.
///
/// # Errors
/// Whatever the server says.
pub async fn shared_buffers(target: &Client) -> Result<u64> {
    let bytes: i64 = target
        .query_typed_one("SELECT pg_catalog.pg_size_bytes(pg_catalog.current_setting('shared_buffers'))", &[])
        .await
        .context(|| "reading shared_buffers of the target".into())?
        .get(0);
    Ok(bytes.max(0).cast_unsigned())
}

async fn facts(source: &Client, table: &Table) -> Result<Facts> {
    let doing = || format!("reading the statistics of {}", table.qualified());
    let row = source
        .query_typed_one(
            "SELECT pg_catalog.pg_total_relation_size(c.oid), greatest(c.reltuples, 0)::int8, coalesce(s.n_tup_ins, 0), \
                    coalesce(s.n_tup_upd + s.n_tup_del, 0), c.relispartition OR EXISTS (SELECT FROM pg_catalog.pg_inherits i \
                      WHERE c.oid IN (i.inhrelid, i.inhparent)), \
                    EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid), \
                    EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.contype = 'f' AND k.confrelid = c.oid), \
                    EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)), \
                    EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND coalesce(t.tgoldtable, t.tgnewtable) IS NOT NULL), \
                    EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND NOT i.indimmediate), c.relrowsecurity \
             FROM pg_catalog.pg_class c LEFT JOIN pg_catalog.pg_stat_user_tables s ON s.relid = c.oid WHERE c.oid = $1",
            &[(&table.relid, Type::OID)],
        )
        .await
        .context(doing)?;
    let against = [
        (4, "it is a partition, inherits or is inherited from"),
        (5, "it has rules"),
        (6, "other tables refer to it by foreign keys"),
        (8, "it has triggers with transition tables"),
        (9, "it has a deferrable key"),
        (10, "it has row level security, which cannot be together with compression"),
    ];
    let mut against: Vec<&str> = against.iter().filter(|(at, _)| row.get(*at)).map(|(_, why)| *why).collect();
    if table.unlogged {
        against.push("it is unlogged");
    }
    let columns = source
        .query_typed(
            "SELECT a.attname::text, a.atttypid, a.attnotnull, s.correlation::float8, s.n_distinct::float8, \
                    NOT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = a.attrelid AND (i.indisunique OR i.indisexclusion) \
                                AND NOT a.attnum = ANY (i.indkey::int2[])), \
                    EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = a.attrelid AND a.attnum = ANY (i.indkey::int2[])) \
             FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_stats s \
               ON s.schemaname = $2 AND s.tablename = $3 AND s.attname = a.attname AND NOT s.inherited \
             WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped \
               AND coalesce(pg_catalog.to_jsonb(a)->>'attgenerated', '') = '' ORDER BY a.attnum",
            &[(&table.relid, Type::OID), (&table.schema, Type::TEXT), (&table.name, Type::TEXT)],
        )
        .await
        .context(doing)?;
    let rows: i64 = row.get(1);
    let mut facts = Facts {
        bytes: row.get(0),
        rows,
        inserted: row.get(2),
        changed: row.get(3),
        has_keys: row.get(7),
        against,
        ..Facts::default()
    };
    for column in &columns {
        let (name, type_oid): (String, u32) = (column.get(0), column.get(1));
        let is_integer = type_oid == 20;
        if is_integer || [1184, 1114, 1082].contains(&type_oid) {
            facts.candidates.push(Candidate {
                name,
                is_integer,
                not_null: column.get(2),
                in_every_key: column.get(5),
                correlation: column.get(3),
            });
        } else if column.get::<_, bool>(6)
            && let Some(distinct) = column.get::<_, Option<f64>>(4)
        {
            // Negative is a share of the rows ("pg_stats" in the manual).
            let distinct = if distinct < 0.0 { -distinct * rows as f64 } else { distinct };
            facts.segments.push((name, distinct.max(1.0)));
        }
    }
    facts.segments.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(facts)
}

/// The column by which a table is cut into chunks, or why it is left alone.
fn choose(facts: &Facts) -> std::result::Result<&Candidate, String> {
    if let Some(why) = facts.against.first() {
        return Err(format!("{why}."));
    }
    if facts.rows < ROWS_MIN {
        return Err(format!("about {} rows: too few to be worth chunks, or never analysed.", facts.rows));
    }
    let share = facts.changed as f64 / facts.inserted.max(facts.rows) as f64;
    if share > CHANGED_MAX {
        return Err(format!("{:.0} updates and deletes for every 100 rows: its rows change.", share * 100.0));
    }
    if facts.candidates.is_empty() {
        return Err("it has no column of a time or a bigint.".to_owned());
    }
    let fitting = facts.candidates.iter().filter(|column| column.in_every_key);
    let best = |a: &&Candidate, b: &&Candidate| {
        let order = |column: &Candidate| column.correlation.unwrap_or(0.0).abs();
        // A time says more than a number.
        b.is_integer.cmp(&a.is_integer).then(order(a).total_cmp(&order(b)))
    };
    let Some(time) = fitting.max_by(best) else {
        return Err(
            "no column of a time or a bigint is in each of its unique keys, as a hypertable needs it.".to_owned()
        );
    };
    if !time.not_null {
        return Err(format!("its column {} may be NULL, and the time of a hypertable may not.", time.name));
    }
    match time.correlation {
        Some(order) if order.abs() < CORRELATION_MIN => {
            Err(format!("its rows did not come in the order of {} (correlation {order:.2}).", time.name))
        }
        None => Err(format!("nothing is known of its column {}: ANALYZE it, then ask again.", time.name)),
        Some(_) => Ok(time),
    }
}

/// How far the time column reaches: in seconds, or in its own unit; by its index where it leads one.
async fn range(source: &Client, table: &Table, time: &Candidate) -> Result<f64> {
    let name = sql::identifier(&time.name);
    let length = match time.is_integer {
        true => format!("(max({name}) - min({name}))::float8"),
        false => format!("extract(epoch FROM max({name})::timestamp - min({name})::timestamp)::float8"),
    };
    let finite = if time.is_integer { "true".to_owned() } else { format!("isfinite({name})") };
    let row = source
        .query_typed_one(&format!("SELECT {length} FROM ONLY {} WHERE {finite}", table.qualified()), &[])
        .await
        .context(|| format!("reading how far {} of {} reaches", time.name, table.qualified()))?;
    Ok(row.get::<_, Option<f64>>(0).unwrap_or(0.0))
}

/// The interval whose chunk comes closest to so many bytes without being larger; and how many chunks of it there are.
fn interval(facts: &Facts, is_integer: bool, range: f64, chunk_bytes: f64) -> (Span, f64) {
    let range = range.max(1.0);
    let fitting = range * chunk_bytes / facts.bytes.max(1) as f64;
    if is_integer {
        // One digit and zeros: numbers that people can read.
        let power = 10f64.powf(fitting.max(1.0).log10().floor());
        let length = ((fitting / power).floor().max(1.0) * power).clamp(1.0, 1e18);
        return (Span::Integer(length as i64), range / length);
    }
    let (seconds, text) = INTERVALS.iter().rev().find(|(seconds, _)| *seconds <= fitting).unwrap_or(&INTERVALS[0]);
    (Span::Interval((*text).to_owned()), range / seconds)
}

fn section(table: &Table, facts: &Facts, time: &Candidate, range: f64, memory_bytes: u64) -> String {
    let (interval, chunks) = interval(facts, time.is_integer, range, memory_bytes as f64 / 4.0);
    let chunk = (facts.bytes as f64 / chunks.max(1.0)) as u64;
    let rows = facts.rows as f64 / chunks.max(1.0);
    let mut text = String::new();
    let keys = if facts.has_keys { "is in each of its keys" } else { "there is no unique key" };
    let order = time.correlation.unwrap_or_default();
    let _ = writeln!(
        text,
        "[[hypertable]]\ntable = {}\n# {keys}; correlation {order:.2}; {} updates and deletes for {} rows\ntime = {}",
        toml(&table_name(table)),
        facts.changed,
        facts.rows,
        toml(&column(&time.name))
    );
    let written = |span: &Span| match span {
        Span::Integer(number) => number.to_string(),
        Span::Interval(text) => toml(text),
    };
    let _ = writeln!(
        text,
        "# {} with indexes: about {:.0} chunks of {} and {rows:.0} rows\nchunk_interval = {}",
        size(facts.bytes.max(0).cast_unsigned()),
        chunks.ceil().max(1.0),
        size(chunk),
        written(&interval)
    );
    let segment = facts.segments.iter().rev().find(|(_, distinct)| rows / distinct >= ROWS_PER_SEGMENT_MIN);
    text.push_str("\n[hypertable.compression]\n");
    let _ = match segment {
        Some((name, distinct)) => writeln!(
            text,
            "# an indexed column with about {distinct:.0} values: {:.0} rows of each in a chunk\nsegment_by = [{}]",
            rows / distinct,
            toml(&column(name))
        ),
        None => writeln!(text, "# no indexed column has values that enough rows of a chunk share\nsegment_by = []"),
    };
    let _ = writeln!(text, "order_by = [{}]", toml(&format!("{} DESC", column(&time.name))));
    match &interval {
        Span::Integer(_) => text.push_str(
            "# `after` and [hypertable.retention] need a function that says what is now in this unit: integer_now = \"schema.function\"\n",
        ),
        Span::Interval(length) => {
            let _ = writeln!(text, "# chunks that are no longer written to: changes of older rows are slower\nafter = {}", toml(&older(length)));
            text.push_str("# Rows that are no longer needed can be dropped from the cutover on:\n# [hypertable.retention]\n# after = \"1 year\"\n");
        }
    }
    text
}

/// Some chunks long, and a week at least.
fn older(interval: &str) -> String {
    let days =
        INTERVALS.iter().find(|(_, text)| *text == interval).map_or(7.0, |(seconds, _)| seconds * 2.0 / 86_400.0);
    format!("{:.0} days", days.max(7.0).ceil())
}

/// As the file names it.
fn table_name(table: &Table) -> String {
    format!("{}.{}", column(&table.schema), column(&table.name))
}

/// A name in double quotes where it needs them.
fn column(name: &str) -> String {
    let is_plain = name.starts_with(|letter: char| letter.is_ascii_lowercase() || letter == '_')
        && name.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_');
    if is_plain { name.to_owned() } else { sql::identifier(name) }
}

/// A string of TOML.
fn toml(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, correlation: f64) -> Candidate {
        let correlation = Some(correlation);
        Candidate { name: name.into(), is_integer: false, not_null: true, in_every_key: true, correlation }
    }

    fn facts() -> Facts {
        Facts {
            bytes: 10 << 30,
            rows: 100_000_000,
            inserted: 100_000_000,
            has_keys: true,
            candidates: vec![candidate("at", 0.99)],
            segments: vec![("region".into(), 5.0), ("device".into(), 1000.0), ("reading".into(), 1e8)],
            ..Facts::default()
        }
    }

    #[test]
    fn a_chunk_is_the_longest_that_fits_in_a_quarter_of_the_memory() {
        let hundred_days = 100.0 * 86_400.0;
        let (span, chunks) = interval(&facts(), false, hundred_days, f64::from(1 << 30));
        assert_eq!((span, chunks), (Span::Interval("7 days".into()), 100.0 / 7.0));
        let (span, _) = interval(&facts(), true, 123_456_789.0, f64::from(1 << 30));
        assert_eq!(span, Span::Integer(10_000_000));
        assert_eq!(interval(&facts(), false, 60.0, 1.0).0, Span::Interval("15 minutes".into()));
    }

    #[test]
    fn a_table_is_left_alone_for_a_reason() {
        assert_eq!(choose(&facts()).unwrap().name, "at");
        let but = |change: &dyn Fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            choose(&facts).unwrap_err()
        };
        assert!(but(&|f| f.rows = 9).contains("too few"));
        assert!(but(&|f| f.changed = 30_000_000).contains("30 updates and deletes for every 100 rows"));
        assert!(but(&|f| f.candidates[0].in_every_key = false).contains("in each of its unique keys"));
        assert!(but(&|f| f.candidates[0].not_null = false).contains("may be NULL"));
        assert!(but(&|f| f.candidates[0].correlation = Some(0.1)).contains("correlation 0.10"));
        assert!(but(&|f| f.candidates.clear()).contains("no column of a time"));
        assert!(but(&|f| f.against.push("it has rules")).contains("it has rules"));
    }

    #[test]
    fn what_is_suggested_is_a_file_that_is_understood() {
        let text = section(&Table::plain("public", "It's \"x\""), &facts(), &candidate("At", 0.99), 1e7, 4 << 30);
        let declared = super::super::declaration::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!((declared[0].name.as_str(), declared[0].time.as_str()), ("It's \"x\"", "At"));
        let compression = declared[0].compression.as_ref().unwrap();
        assert_eq!(compression.segment_by, ["device"], "the most values with enough rows of each");
        assert_eq!(compression.order_by[0].to_string(), "\"At\" DESC");
    }
}
