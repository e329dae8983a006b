//! The judge: both servers are asked for everything, and the answers are compared as text.

use std::collections::BTreeMap;

use tokio_postgres::{Client, SimpleQueryMessage};

type Result<T> = std::result::Result<T, tokio_postgres::Error>;

/// Every difference between two databases, in words. Empty when there is none.
///
/// A source that crashed while it was left has sequences that skip up to 32 values, as crash recovery does; the target's are
/// then not `exact`.
pub async fn differences(source: &Client, target: &Client, exact_sequences: bool) -> Result<Vec<String>> {
    for client in [source, target] {
        client.batch_execute("SET extra_float_digits = 3; SET search_path = pg_catalog; SET TimeZone = 'UTC'").await?;
    }
    let mut found = Vec::new();
    for (what, query) in DEFINITIONS {
        let (left, right) = (column(source, query).await?, column(target, query).await?);
        report(what, &left, &right, &mut found);
    }
    if !found.is_empty() {
        return Ok(found);
    }
    for table in column(source, TABLES).await? {
        // The text of a row hides nothing but which of two equal rows it is.
        let sum =
            format!("SELECT count(*) || ' ' || coalesce(sum(hashtextextended(t::text, 7)), 0) FROM ONLY {table} t");
        if column(source, &sum).await? == column(target, &sum).await? {
            continue;
        }
        let rows =
            format!("SELECT left(t::text, 600) || md5(t::text) FROM ONLY {table} t ORDER BY t::text COLLATE \"C\"");
        let (left, right) = (column(source, &rows).await?, column(target, &rows).await?);
        found.push(format!("{table} has {} rows on the source and {} on the target", left.len(), right.len()));
        report(&format!("rows of {table}"), &left, &right, &mut found);
    }
    for sequence in column(source, if exact_sequences { SEQUENCES } else { "SELECT 1 WHERE false" }).await? {
        let state = format!("SELECT last_value || ' ' || is_called FROM {sequence}");
        report(
            &format!("the sequence {sequence}"),
            &column(source, &state).await?,
            &column(target, &state).await?,
            &mut found,
        );
    }
    Ok(found)
}

/// How many differing rows of a table are shown.
const SHOWN: usize = 12;

fn report(what: &str, left: &[String], right: &[String], found: &mut Vec<String>) {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    for row in left {
        *counts.entry(row).or_default() += 1;
    }
    for row in right {
        *counts.entry(row).or_default() -= 1;
    }
    let different: Vec<_> = counts.into_iter().filter(|(_, count)| *count != 0).collect();
    for (row, count) in different.iter().take(SHOWN) {
        let side = if *count > 0 { "missing on the target" } else { "too many on the target" };
        found.push(format!("{what}: {} × {side}: {}", count.abs(), row.chars().take(300).collect::<String>()));
    }
    if different.len() > SHOWN {
        found.push(format!("{what}: and {} more", different.len() - SHOWN));
    }
}

const TABLES: &str = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') ORDER BY 1";
const SEQUENCES: &str = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') ORDER BY 1";
const DEFINITIONS: &[(&str, &str)] = &[
    ("tables", TABLES),
    ("sequences", SEQUENCES),
    (
        "columns",
        "SELECT format('%s %s %s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull, attidentity) \
         FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace \
         WHERE attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p') AND relpersistence <> 't' AND nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') ORDER BY 1",
    ),
    (
        "constraints",
        "SELECT format('%s %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(k.oid), convalidated) FROM pg_constraint k \
         JOIN pg_namespace n ON n.oid = connamespace WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'walferry') ORDER BY 1",
    ),
    (
        "indexes",
        "SELECT indexdef FROM pg_indexes WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'walferry') ORDER BY 1",
    ),
    (
        "triggers",
        "SELECT format('%s %s %s', tgrelid::regclass, tgenabled, pg_get_triggerdef(t.oid)) FROM pg_trigger t WHERE NOT tgisinternal ORDER BY 1",
    ),
];

async fn column(client: &Client, query: &str) -> Result<Vec<String>> {
    let messages = client.simple_query(query).await?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
            _ => None,
        })
        .collect())
}
