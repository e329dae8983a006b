//! Values: what a column says on one server it says on the other, whatever the servers' settings are.

use crate::support::Pair;

/// Every setting that changes how a value is written, as far from ours as it can be.
const HOSTILE: &str = "ALTER DATABASE postgres SET DateStyle = 'German'; ALTER ROLE postgres SET IntervalStyle = 'sql_standard'; \
     ALTER DATABASE postgres SET TimeZone = 'Asia/Kathmandu'; ALTER DATABASE postgres SET extra_float_digits = -15; \
     ALTER ROLE postgres SET bytea_output = 'escape'; ALTER DATABASE postgres SET xmloption = 'document'; \
     ALTER ROLE postgres SET search_path = 'evil, public'; ALTER DATABASE postgres SET lc_monetary = 'C.UTF-8'; \
     ALTER DATABASE postgres SET standard_conforming_strings = off; ALTER DATABASE postgres SET array_nulls = off; \
     ALTER DATABASE postgres SET row_security = on; ALTER DATABASE postgres SET default_transaction_isolation = 'serializable'; \
     ALTER DATABASE postgres SET client_encoding = 'LATIN1'";

const TABLES: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE DOMAIN relation AS regclass;
    CREATE TYPE pair AS (a int, b text);
    CREATE SEQUENCE referred;
    CREATE FUNCTION referred(int) RETURNS int LANGUAGE sql AS 'SELECT 1';
    CREATE TABLE names (id int PRIMARY KEY, class regclass, classes regclass[], domain relation, type regtype, proc regprocedure,
        oper regoperator, role regrole, namespace regnamespace, number oid, numbers oid[], cash money, paired pair);
    CREATE TABLE by_class (class regclass, v int); ALTER TABLE by_class REPLICA IDENTITY FULL;
    CREATE TABLE plain (id int PRIMARY KEY, at timestamptz, day date, span interval, ratio float8, small float4, data bytea,
        document xml, list text[], feeling mood, feelings mood[], exact numeric, stay tstzrange, doc jsonb, \"back\\slash\" text);
    CREATE TABLE safe (id int PRIMARY KEY, at timestamptz, span interval, ratio float8, data bytea, feeling mood, exact numeric);";

fn rows(from: i32) -> String {
    format!(
        "INSERT INTO names SELECT n, 'referred', '{{referred,names}}', 'referred', 'mood', 'referred(integer)', '+(integer,integer)',
             'postgres', 'public', 'referred'::regclass::oid, '{{1,2}}', '-1234567.89', '(1,\"a \\\\ b\")' FROM generate_series({from}, {from} + 2) n;
         INSERT INTO by_class VALUES ({}, {from});
         INSERT INTO plain SELECT n, '2024-03-04 05:06:07.123456+05:45', '2024-03-04', '-1 year 2 mons -3 days 04:05:06.5',
             0.1::float8 + 0.2::float8, 1.0::float4 / 3, '\\x005c27ff', XMLPARSE(CONTENT 'text <b>and</b> <i>more</i>'),
             ARRAY['a', NULL, 'NULL', E'\\\\', '\"'], 'happy', '{{sad,happy}}', 'NaN', '[2024-03-04 05:06:07+00,)', '{{\"a\": \"\\\\\"}}',
             E'\\\\N tab\\t line\\n \\u00e9' FROM generate_series({from}, {from} + 2) n;
         INSERT INTO safe SELECT id, at, span, ratio, data, feeling, exact FROM plain WHERE id >= {from};
         UPDATE plain SET ratio = ratio * 3, at = at + span WHERE id = {from} + 1;
         UPDATE safe SET ratio = ratio * 3, span = -span WHERE id = {from} + 1;
         UPDATE by_class SET v = v + 1; DELETE FROM names WHERE id = {from} + 2",
        if from == 1 { "'referred'::regclass" } else { "'names'::regclass" }
    )
}

/// Writes on the source as an application would that knows its settings.
async fn write(pair: &Pair, sql: &str) {
    let client = pair.source.connect("postgres").await.unwrap();
    // Before the statements are read: it decides how.
    let settings = "SET search_path = public; SET standard_conforming_strings = on; SET array_nulls = on; SET xmloption = content; \
                    SET client_encoding = 'UTF8'; SET DateStyle = ISO; SET IntervalStyle = postgres";
    client.batch_execute(settings).await.unwrap();
    client.batch_execute(sql).await.unwrap();
}

#[tokio::test]
async fn h13_values_arrive_as_they_were_whatever_the_settings_of_the_servers() {
    let pair = Pair::start().await;
    // The same name is another number there.
    pair.on_target(
        "DO $$ BEGIN FOR n IN 1..50 LOOP EXECUTE 'CREATE TEMPORARY TABLE t' || n || '(i int)'; END LOOP; END $$",
    )
    .await;
    pair.on_source(TABLES).await;
    pair.on_source("CREATE SCHEMA evil; CREATE TABLE evil.names (id int PRIMARY KEY); CREATE SEQUENCE evil.referred")
        .await;
    pair.on_source(&rows(1)).await;
    pair.on_source(HOSTILE).await;
    // The target's are hostile in other ways.
    pair.on_target(
        "ALTER DATABASE postgres SET DateStyle = 'SQL, MDY'; ALTER DATABASE postgres SET IntervalStyle = 'iso_8601'; \
                    ALTER ROLE postgres SET xmloption = 'document'; ALTER ROLE postgres SET search_path = 'elsewhere'",
    )
    .await;
    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    write(&pair, &rows(11)).await;
    pair.caught_up().await;

    let shown = "SET search_path = public; SET DateStyle = ISO; SET IntervalStyle = postgres; SET TimeZone = UTC; \
                 SET extra_float_digits = 3; SET bytea_output = hex; SET lc_monetary = 'C'; SET client_encoding = 'UTF8'; \
                 SET xmloption = content;";
    for (table, key, count) in [("names", "id", 4), ("by_class", "v", 2), ("plain", "id", 6), ("safe", "id", 6)] {
        let rows = pair
            .same(&format!(
                "{shown} SELECT t.*{} FROM {table} t ORDER BY {key}",
                match table {
                    // The number itself is a value like any other.
                    "names" => ", number",
                    _ => "",
                }
            ))
            .await;
        assert_eq!(rows.len(), count, "{table}");
    }
    let (source, target) = pair.both("SELECT 'public.referred'::regclass::oid").await;
    assert_ne!(source, target, "this test needs different numbers on the two servers");
}

#[tokio::test]
async fn h13_a_database_whose_types_are_all_safe_goes_in_binary_and_says_the_same() {
    let pair = Pair::start().await;
    let only_safe = "CREATE TYPE mood AS ENUM ('sad', 'happy'); \
         CREATE TABLE safe (id int PRIMARY KEY, at timestamptz, span interval, ratio float8, data bytea, feeling mood, exact numeric, \
         list text[], doc jsonb, stay tstzrange)";
    pair.on_source(only_safe).await;
    let row = |id: i32| {
        format!(
            "INSERT INTO safe VALUES ({id}, '2024-03-04 05:06:07.123456+05:45', '-1 year 2 mons -3 days 04:05:06.5', 'Infinity', \
             '\\x005c27ff', 'happy', 123456789.000000001000, ARRAY['a', NULL], '{{\"a\": 1.10}}', '[2024-03-04 05:06:07+00,)')"
        )
    };
    pair.on_source(&row(1)).await;
    // Enums have other numbers there.
    pair.on_target(
        "DO $$ BEGIN FOR n IN 1..50 LOOP EXECUTE 'CREATE TEMPORARY TABLE t' || n || '(i int)'; END LOOP; END $$",
    )
    .await;
    pair.on_source(HOSTILE).await;
    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    write(&pair, &format!("{}; UPDATE safe SET ratio = 0.1 WHERE id = 1", row(2))).await;
    pair.caught_up().await;
    let target = pair.target.connect("postgres").await.unwrap();
    assert_eq!(crate::support::value(&target, "SELECT binary_format FROM walferry.migration").await, "t");
    let shown = "SET search_path = public; SET DateStyle = ISO; SET IntervalStyle = postgres; SET TimeZone = UTC; \
                 SET extra_float_digits = 3; SET bytea_output = hex;";
    assert_eq!(pair.same(&format!("{shown} SELECT * FROM safe ORDER BY 1")).await.len(), 2);
}
