//! `verify` against a real server: what is equal is called equal, and what is not is named exactly.

// The allowance in clippy.toml covers test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod verify_support;

use std::sync::Mutex;

use verify_support::Sides;
use walferry::error::{ErrorKind, Result};
use walferry::source::catalog;
use walferry::verify::report::{DifferenceKind, Report, TableReport};
use walferry::verify::sequences::{self, SequenceState};
use walferry::verify::{self, Options, Progress};

async fn try_verify(sides: &Sides, options: &Options, progress: &(dyn Fn(Progress) + Sync)) -> Result<Report> {
    let tables = catalog::tables(&sides.connect(&sides.source).await).await?;
    let open = async |database: &str| {
        let client = sides.connect(database).await;
        client.batch_execute("SET search_path = ''; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        Ok(client)
    };
    verify::compare(&tables, || open(&sides.source), || open(&sides.target), options, progress).await
}

async fn verify_with(sides: &Sides, options: &Options) -> Report {
    try_verify(sides, options, &|_| {}).await.unwrap()
}

async fn verify(sides: &Sides) -> Report {
    verify_with(sides, &Options::default()).await
}

fn table<'a>(report: &'a Report, name: &str) -> &'a TableReport {
    let name = format!("\"public\".\"{name}\"");
    report.tables.iter().find(|table| table.table == name).unwrap_or_else(|| panic!("{name} was not compared"))
}

/// `+key` only on the target, `-key` missing there, `~key:columns` different.
fn differences(report: &TableReport) -> Vec<String> {
    let one = |difference: &verify::Difference| match difference.kind {
        DifferenceKind::MissingOnTarget => format!("-{}", difference.key),
        DifferenceKind::ExtraOnTarget => format!("+{}", difference.key),
        DifferenceKind::Different => format!("~{}:{}", difference.key, difference.columns.join(",")),
    };
    assert_eq!(report.equal, report.differences.is_empty(), "{report:?}");
    report.differences.iter().map(one).collect()
}

#[tokio::test]
async fn values_that_print_differently_are_different() {
    // A type, and two values that another comparison could take for the same.
    let cases = [
        ("text", "NULL", "''"),
        ("text", "NULL", "'NULL'"),
        ("text", "'a'", "'a '"),
        ("text", r"'a\b'", r"'a\\b'"),
        ("float8", "'NaN'", "0"),
        ("float8", "'-0'", "0"),
        ("float4", "'-0'", "0"),
        ("float8", "0.1::float8 + 0.2", "0.3"),
        ("numeric", "1.0", "1.00"),
        ("numeric", "'NaN'", "'Infinity'"),
        ("timestamptz", "'2024-01-01 00:00:00+00'", "'2024-01-01 00:00:00.000001+00'"),
        ("timestamptz", "'2024-01-01 00:00:00+00'", "'2024-01-01 00:00:00+01'"),
        ("interval", "'1 mon'", "'30 days'"),
        ("citext", "'A'", "'a'"),
        ("json", r#"'{"a":1}'"#, r#"'{"a": 1}'"#),
        ("jsonb", r#"'{"a":1}'"#, r#"'{"a":1.0}'"#),
        ("jsonb", "NULL", "'null'"),
        ("bytea", r"'\x00'", r"'\x0000'"),
        ("bytea", "NULL", "''"),
        ("text[]", "'{}'", "'{NULL}'"),
        ("text[]", "'{NULL}'", "'{\"NULL\"}'"),
        ("inet", "'10.0.0.1'", "'10.0.0.1/31'"),
        ("bool", "true", "false"),
        ("pair", "NULL", "ROW(NULL, NULL)"),
        ("pair", "ROW(1, NULL)", "ROW(1, '')"),
        ("bit varying", "B'0'", "B'00'"),
        ("xml", "'<a/>'", "'<a />'"),
    ];
    let sides = Sides::new().await;
    sides.both("CREATE EXTENSION citext; CREATE TYPE pair AS (a int, b text)").await;
    let (mut on_source, mut on_target) = (String::new(), String::new());
    for (at, (definition, source, target)) in cases.iter().enumerate() {
        let script = |odd: &str| {
            format!(
                "CREATE TABLE t{at} (id int PRIMARY KEY, v {definition}); \
                 INSERT INTO t{at} VALUES (1, {source}), (2, {odd}), (3, NULL), (4, {target});"
            )
        };
        on_source.push_str(&script(source));
        on_target.push_str(&script(target));
    }
    sides.on_source(&on_source).await;
    sides.on_target(&on_target).await;
    let report = verify(&sides).await;
    for (at, case) in cases.iter().enumerate() {
        assert_eq!(differences(table(&report, &format!("t{at}"))), ["~(id)=(2):v"], "{case:?}");
    }
}

#[tokio::test]
async fn trailing_blanks_count_in_every_type_of_text() {
    let sides = Sides::new().await;
    // char(3) and char(4) hold 'a' with different padding.
    sides
        .on_source("CREATE TABLE t (id int PRIMARY KEY, c char(3), v varchar); INSERT INTO t VALUES (1, 'a', 'b')")
        .await;
    sides
        .on_target("CREATE TABLE t (id int PRIMARY KEY, c char(4), v varchar); INSERT INTO t VALUES (1, 'a', 'b ')")
        .await;
    assert_eq!(differences(table(&verify(&sides).await, "t")), ["~(id)=(1):c,v"]);
}

#[tokio::test]
async fn a_value_cannot_reach_into_its_neighbour() {
    let sides = Sides::new().await;
    sides.both("CREATE TABLE t (id int PRIMARY KEY, a text, b text)").await;
    sides
        .on_source("INSERT INTO t VALUES (1, 'ab', 'c'), (2, 'x'',''y', 'z'), (3, NULL, ''), (4, 'a'',NULL', NULL)")
        .await;
    sides
        .on_target("INSERT INTO t VALUES (1, 'a', 'bc'), (2, 'x', 'y'',''z'), (3, '', NULL), (4, 'a', ''',NULL')")
        .await;
    let keys = ["~(id)=(1):a,b", "~(id)=(2):a,b", "~(id)=(3):a,b", "~(id)=(4):a,b"];
    assert_eq!(differences(table(&verify(&sides).await, "t")), keys);
}

#[tokio::test]
async fn missing_extra_and_altered_rows_are_named_and_equal_tables_are_equal() {
    let sides = Sides::new().await;
    sides
        .both(
            "CREATE TABLE t (id bigint PRIMARY KEY, a text, b int); INSERT INTO t SELECT n, n, n FROM generate_series(1, 3000) n; \
             CREATE TABLE same (id bigint PRIMARY KEY, a text); INSERT INTO same SELECT n, n FROM generate_series(1, 3000) n; \
             CREATE TABLE empty (id int PRIMARY KEY); CREATE TABLE \"no columns\" ()",
        )
        .await;
    let report = verify(&sides).await;
    assert!(report.equal, "{report}");
    assert_eq!((table(&report, "t").rows_source, table(&report, "t").rows_target), (3000, 3000));

    sides.on_target("DELETE FROM t WHERE id = 17; INSERT INTO t VALUES (-5, '', 0); UPDATE t SET b = 0, a = 'x' WHERE id = 2999").await;
    // The order on disk means nothing.
    sides.on_target("UPDATE same SET a = a WHERE id % 2 = 0").await;
    sides.on_target("INSERT INTO \"no columns\" DEFAULT VALUES").await;
    let report = verify(&sides).await;
    assert_eq!(differences(table(&report, "t")), ["-(id)=(17)", "+(id)=(-5)", "~(id)=(2999):a,b"]);
    assert!(table(&report, "same").equal && table(&report, "empty").equal);
    let no_columns = table(&report, "no columns");
    assert_eq!((no_columns.equal, no_columns.rows_source, no_columns.rows_target), (false, 0, 1));
    assert!(!report.equal);
    assert!(report.tables.iter().all(|table| table.differences.iter().all(|d| d.source_row.is_none())));
}

#[tokio::test]
async fn values_are_shown_only_on_request() {
    let sides = Sides::new().await;
    sides.both("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE n (v text)").await;
    sides.on_source("INSERT INTO t VALUES (1, 'secret'), (2, NULL); INSERT INTO n VALUES ('once')").await;
    sides.on_target("INSERT INTO t VALUES (1, 'public')").await;
    let text = serde_json::to_string(&verify(&sides).await).unwrap();
    assert!(!text.contains("secret") && !text.contains("once"), "{text}");

    let report = verify_with(&sides, &Options { show_values: true, ..Options::default() }).await;
    let [missing, different] = table(&report, "t").differences.as_slice() else { panic!("{report}") };
    assert_eq!((missing.source_row.as_deref(), missing.target_row.as_deref()), (Some("(id, v)=(2, NULL)"), None));
    assert_eq!(different.source_row.as_deref(), Some("(id, v)=(1, secret)"));
    assert_eq!(different.target_row.as_deref(), Some("(id, v)=(1, public)"));
    assert_eq!(table(&report, "n").differences[0].source_row.as_deref(), Some("(v)=(once)"));
}

#[tokio::test]
async fn keys_of_every_kind_are_named() {
    let sides = Sides::new().await;
    let uuid = "00000000-0000-0000-0000-00000000000";
    sides
        .both(
            "CREATE EXTENSION citext; \
             CREATE TABLE composite (a int, b text, v int, PRIMARY KEY (b, a)); \
             CREATE TABLE by_uuid (id uuid PRIMARY KEY, v int); \
             CREATE TABLE by_citext (id citext PRIMARY KEY, v int); \
             CREATE TABLE by_number (id numeric PRIMARY KEY, v int)",
        )
        .await;
    let rows = |v: i32, citext: &str, number: &str| {
        format!(
            "INSERT INTO composite VALUES (1, 'x, y', 0), (1, 'z', {v}); \
             INSERT INTO by_uuid VALUES ('{uuid}1', 0), ('{uuid}2', {v}); \
             INSERT INTO by_citext VALUES ('{citext}', 0), ('b', {v}); INSERT INTO by_number VALUES ({number}, 0)"
        )
    };
    sides.on_source(&rows(1, "A", "1.0")).await;
    sides.on_target(&rows(2, "a", "1.00")).await;
    let report = verify(&sides).await;
    assert_eq!(differences(table(&report, "composite")), ["~(b, a)=(z, 1):v"]);
    assert_eq!(differences(table(&report, "by_uuid")), [format!("~(id)=({uuid}2):v")]);
    assert_eq!(differences(table(&report, "by_citext")), ["-(id)=(A)", "+(id)=(a)", "~(id)=(b):v"]);
    assert_eq!(differences(table(&report, "by_number")), ["-(id)=(1.0)", "+(id)=(1.00)"]);
}

#[tokio::test]
async fn text_keys_under_different_collations_meet() {
    let sides = Sides::with(["LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C' ENCODING 'UTF8'", ""]).await;
    sides
        .both(
            "CREATE TABLE t (id text PRIMARY KEY, v int); \
             INSERT INTO t SELECT chr(65 + n % 26) || chr(122 - n % 26) || n, n FROM generate_series(1, 20000) n; \
             INSERT INTO t SELECT lower(id) || 'ä', v FROM t; ANALYZE t",
        )
        .await;
    let options = Options { range_rows: 1000, ..Options::default() };
    let report = verify_with(&sides, &options).await;
    assert!(report.equal, "{report}");
    assert!(table(&report, "t").ranges > 10, "{report}");
    sides.on_target("UPDATE t SET v = -1 WHERE id = 'By1'").await;
    assert_eq!(differences(table(&verify_with(&sides, &options).await, "t")), ["~(id)=(By1):v"]);
}

#[tokio::test]
async fn a_nondeterministic_collation_does_not_hide_a_difference() {
    let sides = Sides::new().await;
    sides
        .both(
            "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false); \
             CREATE TABLE t (id text COLLATE blind PRIMARY KEY, v text COLLATE blind, w text COLLATE \"C\")",
        )
        .await;
    sides.on_source("INSERT INTO t VALUES ('k', 'A', 'w'), ('x', 'y', 'z')").await;
    sides.on_target("INSERT INTO t VALUES ('k', 'a', 'w'), ('X', 'y', 'z')").await;
    assert_eq!(differences(table(&verify(&sides).await, "t")), ["-(id)=(x)", "+(id)=(X)", "~(id)=(k):v"]);
}

#[tokio::test]
async fn two_encodings_are_compared_by_their_characters() {
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let sides = Sides::with([&format!("ENCODING '{encoding}' LOCALE 'C'"), ""]).await;
        let rows = "INSERT INTO t VALUES ('ä', 'ö'), ('b', 'ü'), ('c', '')";
        sides.both(&format!("CREATE TABLE t (id text PRIMARY KEY, v text); {rows}")).await;
        let report = verify(&sides).await;
        assert!(report.equal, "{encoding}: {report}");
        sides.on_target("UPDATE t SET v = 'o' WHERE id = 'ä'").await;
        assert_eq!(differences(table(&verify(&sides).await, "t")), ["~(id)=(ä):v"], "{encoding}");
    }
}

#[tokio::test]
async fn rows_without_key_are_compared_with_how_often_they_occur() {
    let sides = Sides::new().await;
    sides.both("CREATE TABLE t (a int, b text); INSERT INTO t SELECT n % 3, 'x' FROM generate_series(1, 9000) n").await;
    assert!(verify(&sides).await.equal);
    // As many rows as before, and pairs that an exclusive or of their hashes would not see.
    let fewer = "DELETE FROM t WHERE ctid IN (SELECT ctid FROM t WHERE a = 1 LIMIT 2)";
    sides.on_target(&format!("{fewer}; INSERT INTO t VALUES (7, NULL), (7, NULL)")).await;
    let report = verify(&sides).await;
    let table = table(&report, "t");
    assert_eq!((table.rows_source, table.rows_target), (9000, 9000));
    let [missing, extra] = table.differences.as_slice() else { panic!("{report}") };
    assert!(missing.key.ends_with("3000 on the source, 2998 on the target"), "{}", missing.key);
    assert!(extra.key.ends_with("0 on the source, 2 on the target"), "{}", extra.key);
    assert_eq!((table.differences_total, table.differences_complete), (4, true));
}

#[tokio::test]
async fn a_key_that_is_there_twice_on_the_target_is_named() {
    let sides = Sides::new().await;
    sides.on_source("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 2)").await;
    sides.on_target("CREATE TABLE t (id int, v int); INSERT INTO t VALUES (1, 1), (1, 1), (2, 2), (NULL, 3)").await;
    assert_eq!(differences(table(&verify(&sides).await, "t")), ["+(id)=(1)", "+(id)=(NULL)"]);
}

#[tokio::test]
async fn hostile_names_are_compared_like_others() {
    let sides = Sides::new().await;
    sides
        .both(
            r#"CREATE SCHEMA "My ""Schema'"; CREATE TABLE "My ""Schema'"."t'; DROP TABLE x; --%s"
               ("select" int PRIMARY KEY, "a""b%s" text, "t" text, "Üñí\c" int);
               INSERT INTO "My ""Schema'"."t'; DROP TABLE x; --%s" VALUES (1, 'a', 'b', 2)"#,
        )
        .await;
    assert!(verify(&sides).await.equal);
    sides.on_target(r#"UPDATE "My ""Schema'"."t'; DROP TABLE x; --%s" SET "a""b%s" = 'c'"#).await;
    assert_eq!(differences(&verify(&sides).await.tables[0]), ["~(select)=(1):a\"b%s"]);
}

#[tokio::test]
async fn generated_columns_and_many_columns_are_compared() {
    let sides = Sides::new().await;
    let wide: Vec<String> = (0..400).map(|n| format!("c{n} int DEFAULT {n}")).collect();
    sides
        .both(&format!("CREATE TABLE wide (id int PRIMARY KEY, {}); INSERT INTO wide VALUES (1), (2)", wide.join(", ")))
        .await;
    sides.on_source("CREATE TABLE g (id int PRIMARY KEY, v int GENERATED ALWAYS AS (id * 2) STORED); INSERT INTO g VALUES (0), (1)").await;
    sides.on_target("CREATE TABLE g (id int PRIMARY KEY, v int GENERATED ALWAYS AS (id * 3) STORED); INSERT INTO g VALUES (0), (1)").await;
    sides.on_target("UPDATE wide SET c399 = 0 WHERE id = 2").await;
    let report = verify(&sides).await;
    assert_eq!(differences(table(&report, "g")), ["~(id)=(1):v"]);
    assert_eq!(differences(table(&report, "wide")), ["~(id)=(2):c399"]);
}

#[tokio::test]
async fn a_missing_table_or_column_is_a_difference_and_not_an_error() {
    let sides = Sides::new().await;
    sides.on_source("CREATE TABLE gone (id int PRIMARY KEY); INSERT INTO gone VALUES (1); CREATE TABLE t (id int PRIMARY KEY, a int)").await;
    sides.on_target("CREATE TABLE t (b int, id int PRIMARY KEY)").await;
    let report = verify(&sides).await;
    let gone = table(&report, "gone");
    assert_eq!((gone.equal, gone.missing_on_target, gone.rows_source), (false, true, 1));
    let t = table(&report, "t");
    assert!(!t.equal);
    assert_eq!(
        (&t.columns_missing_on_target[..], &t.columns_extra_on_target[..]),
        (&["a".into()][..], &["b".into()][..])
    );
    assert!(report.to_string().contains("the target has no such table"), "{report}");
}

#[tokio::test]
async fn only_the_named_tables_are_compared() {
    let sides = Sides::new().await;
    sides.both("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)").await;
    sides.on_target("INSERT INTO b VALUES (1)").await;
    let only = |name: &str| Options { tables: Some(vec![name.into()]), ..Options::default() };
    assert!(verify_with(&sides, &only("public.a")).await.equal);
    assert!(!verify_with(&sides, &only("public.b")).await.equal);
    let error = try_verify(&sides, &only("public.c"), &|_| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[tokio::test]
async fn one_altered_row_of_many_is_found_by_reading_few_of_them() {
    let sides = Sides::new().await;
    sides
        .both(
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT n * 7, md5(n::text) FROM generate_series(1, 200000) n; \
             CREATE TABLE k (v text); INSERT INTO k SELECT md5(n::text) FROM generate_series(1, 50000) n; ANALYZE",
        )
        .await;
    sides.on_target("UPDATE t SET v = 'x' WHERE id = 7 * 123456; UPDATE k SET v = 'x' WHERE v = md5('4711')").await;
    for range_rows in [1_000_000, 20_000] {
        let seen = Mutex::new(Vec::new());
        let progress = |progress: Progress| seen.lock().unwrap().push(progress);
        let options = Options { range_rows, show_values: true, ..Options::default() };
        let report = try_verify(&sides, &options, &progress).await.unwrap();
        let t = table(&report, "t");
        assert_eq!(differences(t), ["~(id)=(864192):v"], "{range_rows}");
        assert!((2..=8_000).contains(&t.rows_fetched), "{}", t.rows_fetched);
        let k = table(&report, "k");
        let rows = [&k.differences[0].source_row, &k.differences[1].target_row].map(|row| row.clone().unwrap());
        assert_eq!(rows, ["(v)=(b52340b4de4566b804c9880aa0b4af5f)", "(v)=(x)"]);
        let seen: Vec<Progress> =
            seen.into_inner().unwrap().into_iter().filter(|p| p.table == "\"public\".\"t\"").collect();
        assert_eq!(seen.iter().map(|p| p.rows).sum::<i64>(), 200_000);
        assert_eq!(seen.len(), table(&report, "t").ranges);
        assert_eq!(seen.len() > 1, range_rows == 20_000);
    }
}

#[tokio::test]
async fn a_table_that_differs_everywhere_is_reported_after_a_few_keys() {
    let sides = Sides::new().await;
    sides.both("CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    sides.on_source("INSERT INTO t SELECT n, 0 FROM generate_series(1, 30000) n; ANALYZE").await;
    sides.on_target("INSERT INTO t SELECT n, 1 FROM generate_series(1, 30000) n").await;
    let report = verify_with(&sides, &Options { max_keys: 3, ..Options::default() }).await;
    let t = table(&report, "t");
    assert_eq!((t.differences.len(), t.differences_complete), (3, false));
    assert!(t.differences_total >= 3 && t.differences_total <= 4000, "{}", t.differences_total);
    // All of them can be asked for, and then all are counted.
    let report = verify_with(&sides, &Options { max_keys: 100_000, ..Options::default() }).await;
    let t = table(&report, "t");
    assert_eq!((t.differences.len(), t.differences_total, t.differences_complete), (30_000, 30_000, true));
}

#[tokio::test]
async fn no_row_of_the_target_lies_outside_the_ranges() {
    let sides = Sides::new().await;
    let rows = "INSERT INTO t SELECT generate_series(1, 10000); ANALYZE";
    sides.on_source(&format!("CREATE TABLE t (id int PRIMARY KEY); {rows}")).await;
    // Its key is damaged: it can be NULL.
    sides.on_target(&format!("CREATE TABLE t (id int); CREATE INDEX ON t (id); {rows}")).await;
    sides.on_target("INSERT INTO t VALUES (-2147483648), (2147483647), (NULL)").await;
    let report = verify_with(&sides, &Options { range_rows: 1000, ..Options::default() }).await;
    let t = table(&report, "t");
    assert_eq!(differences(t), ["+(id)=(-2147483648)", "+(id)=(2147483647)", "+(id)=(NULL)"]);
    assert!(t.ranges > 5);
    assert_eq!(t.rows_target, 10_003);
    // Ranges of keys, so only what differs was looked at again.
    assert!(t.rows_fetched < 5_000, "{}", t.rows_fetched);
}

#[tokio::test]
async fn a_sequence_that_is_behind_is_named_and_one_ahead_is_fine() {
    let sides = Sides::new().await;
    sides.both("CREATE SEQUENCE a; CREATE SEQUENCE b; CREATE SEQUENCE \"c'd\" INCREMENT -1; CREATE SEQUENCE e").await;
    sides.on_source("SELECT setval('a', 10); SELECT setval('b', 10); SELECT setval('\"c''d\"', -10)").await;
    sides
        .on_target(
            "SELECT setval('a', 11, false); SELECT setval('b', 9); SELECT setval('\"c''d\"', -43); DROP SEQUENCE e",
        )
        .await;
    let (source, target) = (sides.connect(&sides.source).await, sides.connect(&sides.target).await);
    let report = sequences::compare(&source, &target).await.unwrap();
    let states: Vec<SequenceState> = report.sequences.iter().map(|sequence| sequence.state).collect();
    use SequenceState::{Ahead, Behind, Equal, MissingOnTarget};
    assert_eq!(states, [Equal, Behind, Ahead, MissingOnTarget]);
    assert!(!report.equal);
    assert!(report.to_string().contains("sequence \"public\".\"b\" is behind"), "{report}");
}

#[tokio::test]
async fn a_comparison_can_run_as_a_task_of_its_own() {
    let sides = Sides::new().await;
    sides.both("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let tables = catalog::tables(&sides.connect(&sides.source).await).await.unwrap();
    let sides = std::sync::Arc::new(sides);
    let task = tokio::spawn(async move {
        let source = || {
            let sides = sides.clone();
            async move { Ok(sides.connect(&sides.source).await) }
        };
        let target = || {
            let sides = sides.clone();
            async move { Ok(sides.connect(&sides.target).await) }
        };
        verify::compare(&tables, source, target, &Options::default(), &|_| {}).await
    });
    assert!(task.await.unwrap().unwrap().equal);
}
