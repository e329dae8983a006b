//! The SQL that makes a hypertable of an empty table, and wakes its policies when the target takes over.
//!
//! The order is that of the dependencies: the hypertable, its further dimensions, what is now, compression, policies. Policies are
//! made asleep in the same transaction, so that no job of the target ever runs before the cutover.

use super::declaration::{Dimension, Hypertable, Span, begins_with_name};
use crate::sql;

/// The statements that make a hypertable of an empty table. `extension` is the schema of the extension's functions; `time_index`
/// has TimescaleDB make its index by time, where the schema brings none.
pub fn statements(hypertable: &Hypertable, extension: &str, time_index: bool) -> Vec<String> {
    let (function, table) = (|name: &str| sql::qualified(extension, name), regclass(hypertable));
    let range = |column: &str, interval: &Span| {
        format!("{}({}, {})", function("by_range"), sql::literal(column), value(interval))
    };
    let mut statements = vec![format!(
        "SELECT {}({table}, {}, create_default_indexes => {time_index})",
        function("create_hypertable"),
        range(&hypertable.time, &hypertable.chunk_interval)
    )];
    for dimension in &hypertable.dimensions {
        let builder = match dimension {
            Dimension::Hash { column, partitions } => {
                format!("{}({}, {partitions})", function("by_hash"), sql::literal(column))
            }
            Dimension::Range { column, interval } => range(column, interval),
        };
        statements.push(format!("SELECT {}({table}, {builder})", function("add_dimension")));
    }
    if let Some((schema, name)) = &hypertable.integer_now {
        let now = sql::literal(&sql::qualified(schema, name));
        statements.push(format!("SELECT {}({table}, {now}::regproc)", function("set_integer_now_func")));
    }
    if let Some(compression) = &hypertable.compression {
        let order: Vec<String> = compression.order_by.iter().map(ToString::to_string).collect();
        let segments = sql::identifiers(compression.segment_by.iter().map(String::as_str));
        let order = match order.is_empty() {
            true => String::new(),
            false => format!(", timescaledb.compress_orderby = {}", sql::literal(&order.join(", "))),
        };
        statements.push(format!(
            "ALTER TABLE {} SET (timescaledb.compress, timescaledb.compress_segmentby = {}{order})",
            hypertable.qualified(),
            sql::literal(&segments)
        ));
    }
    statements.extend(policies(hypertable, extension));
    statements
}

/// The policies, asleep.
fn policies(hypertable: &Hypertable, extension: &str) -> Vec<String> {
    let mut wanted = Vec::new();
    if let Some(compression) = &hypertable.compression
        && let Some(after) = &compression.after
    {
        wanted.push(("add_compression_policy", "compress_after", after, &compression.schedule));
    }
    if let Some(retention) = &hypertable.retention {
        wanted.push(("add_retention_policy", "drop_after", &retention.after, &retention.schedule));
    }
    let asleep = |(policy, argument, after, schedule): (&str, &str, &Span, &Option<String>)| {
        let schedule = schedule
            .as_ref()
            .map_or(String::new(), |schedule| format!(", schedule_interval => {}::interval", sql::literal(schedule)));
        format!(
            "SELECT {}({}({}, {argument} => {}{schedule}), scheduled => false)",
            sql::qualified(extension, "alter_job"),
            sql::qualified(extension, policy),
            regclass(hypertable),
            value(after)
        )
    };
    wanted.into_iter().map(asleep).collect()
}

/// The statement that wakes the policies of a hypertable, for the transaction that decides the cutover; `None` where it has none.
pub fn wake(hypertable: &Hypertable, extension: &str) -> Option<String> {
    hypertable.has_policies().then(|| {
        format!(
            "SELECT {}(j.job_id, scheduled => true, next_start => now()) FROM timescaledb_information.jobs j \
             WHERE j.hypertable_schema = {} AND j.hypertable_name = {} \
               AND j.proc_name IN ('policy_compression', 'policy_retention')",
            sql::qualified(extension, "alter_job"),
            sql::literal(&hypertable.schema),
            sql::literal(&hypertable.name)
        )
    })
}

/// A statement of `pg_dump`, as it works on a hypertable: TimescaleDB refuses `ONLY`, which `pg_dump` writes everywhere.
pub fn without_only(statement: &str) -> String {
    let line = |line: &str| match line.strip_prefix("ALTER TABLE ONLY ") {
        Some(rest) => format!("ALTER TABLE {rest}"),
        None => line.to_owned(),
    };
    statement.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// Whether a statement of `pg_dump` says `ONLY` of a hypertable.
pub fn alters_only(statement: &str, hypertable: &Hypertable) -> bool {
    let altered = |line: &str| begins_with_name(line.strip_prefix("ALTER TABLE ONLY ")?);
    statement
        .lines()
        .filter_map(altered)
        .any(|(schema, name)| (schema, name) == (hypertable.schema.clone(), hypertable.name.clone()))
}

fn regclass(hypertable: &Hypertable) -> String {
    format!("{}::regclass", sql::literal(&hypertable.qualified()))
}

/// A length of time as an argument.
fn value(span: &Span) -> String {
    match span {
        Span::Integer(number) => format!("{number}::bigint"),
        Span::Interval(text) => format!("{}::interval", sql::literal(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::declaration::parse;
    use super::*;

    #[test]
    fn every_name_is_quoted_and_policies_sleep() {
        let declared = parse(
            "[[hypertable]]\ntable = '\"S\".\"it''s\"'\ntime = '\"T\"'\nchunk_interval = '1 day'\n\
             [[hypertable.dimension]]\ncolumn = 'd'\npartitions = 2\n[hypertable.compression]\nsegment_by = ['\"D\"']\nafter = '7 days'\n\
             [hypertable.retention]\nafter = '9 days'\nschedule = '1 hour'\n"
                .replace("it''s", "it's")
                .replace("'\"S\".\"it's\"'", "\"\\\"S\\\".\\\"it's\\\"\"")
                .as_str(),
        )
        .unwrap();
        let statements = statements(&declared[0], "ts", false);
        assert_eq!(
            statements,
            [
                "SELECT \"ts\".\"create_hypertable\"('\"S\".\"it''s\"'::regclass, \"ts\".\"by_range\"('T', '1 day'::interval), create_default_indexes => false)",
                "SELECT \"ts\".\"add_dimension\"('\"S\".\"it''s\"'::regclass, \"ts\".\"by_hash\"('d', 2))",
                "ALTER TABLE \"S\".\"it's\" SET (timescaledb.compress, timescaledb.compress_segmentby = '\"D\"', timescaledb.compress_orderby = '\"T\" DESC')",
                "SELECT \"ts\".\"alter_job\"(\"ts\".\"add_compression_policy\"('\"S\".\"it''s\"'::regclass, compress_after => '7 days'::interval), scheduled => false)",
                "SELECT \"ts\".\"alter_job\"(\"ts\".\"add_retention_policy\"('\"S\".\"it''s\"'::regclass, drop_after => '9 days'::interval, schedule_interval => '1 hour'::interval), scheduled => false)",
            ]
        );
        assert!(wake(&declared[0], "ts").unwrap().contains("hypertable_name = 'it''s'"));
        let bare = parse("[[hypertable]]\ntable = 'a.b'\ntime = 't'\nchunk_interval = 5\n").unwrap();
        assert_eq!(wake(&bare[0], "ts"), None, "nothing to wake");
    }

    #[test]
    fn only_is_left_out_where_a_statement_begins() {
        let dumped = "ALTER TABLE ONLY public.t\n    ADD CONSTRAINT c CHECK ((a <> 'ALTER TABLE ONLY '::text));\n\nALTER TABLE ONLY public.t REPLICA IDENTITY USING INDEX i;";
        let expected = "ALTER TABLE public.t\n    ADD CONSTRAINT c CHECK ((a <> 'ALTER TABLE ONLY '::text));\n\nALTER TABLE public.t REPLICA IDENTITY USING INDEX i;";
        assert_eq!(without_only(dumped), expected);
        let declared = parse("[[hypertable]]\ntable = 'public.t'\ntime = 't'\nchunk_interval = 5\n").unwrap().remove(0);
        assert!(alters_only(dumped, &declared));
        assert!(!alters_only("ALTER TABLE ONLY public.tt\n    ADD", &declared));
    }
}
