//! A table that is not what it was when the migration began.

use walferry::apply::reconcile::{self, Stream};
use walferry::error::{Error, ErrorKind, Result};
use walferry::lsn::Lsn;
use walferry::source::catalog::Table;
use walferry::target::ledger::Redefinition;

use super::bed::{Bed, shared_server};

const SCHEMA: &str = "CREATE TABLE plain (id int PRIMARY KEY, a text, n int, mail text NOT NULL DEFAULT 'x');
    CREATE TABLE other (id int PRIMARY KEY)";
const ROWS: &str = "INSERT INTO plain SELECT g, 'a' || g, g, 'm' || g FROM generate_series(1, 300) g";

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_changed_table_stops_the_apply_before_anything_of_it_is_applied() {
    let changes = [
        ("ALTER TABLE plain ADD COLUMN extra int", "column extra was added"),
        ("ALTER TABLE plain DROP COLUMN n", "column n of"),
        ("ALTER TABLE plain DROP COLUMN mail", "column mail of"),
        ("ALTER TABLE plain RENAME COLUMN a TO b", "has b now"),
        ("ALTER TABLE plain ALTER COLUMN n TYPE bigint", "column n of \"public\".\"plain\" was of type integer"),
        ("ALTER TABLE plain ALTER COLUMN a TYPE varchar(9)", "column a of \"public\".\"plain\" was of type text"),
        ("ALTER TABLE plain RENAME TO plane", "is now \"public\".\"plane\""),
        ("ALTER TABLE plain REPLICA IDENTITY USING INDEX by_mail", "column id is no longer in it"),
        ("ALTER TABLE plain DROP CONSTRAINT plain_pkey, ADD PRIMARY KEY (id, mail)", "column mail has come into it"),
    ];
    for (change, said) in changes {
        let mut bed = Bed::new(SCHEMA, "INSERT INTO plain VALUES (1, 'a', 1)", 2).await;
        bed.on_source("CREATE UNIQUE INDEX by_mail ON plain (mail)").await;
        bed.on_source("UPDATE plain SET a = 'before'").await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal("before").await;
        // In the same unit as the change: good, and to be applied first.
        bed.on_source("UPDATE plain SET n = 7").await;
        bed.on_source("INSERT INTO other VALUES (-1)").await;
        let before = bed.capture().await;
        bed.on_source(change).await;
        let table = if change.ends_with("plane") { "plane" } else { "plain" };
        bed.on_source(&format!("BEGIN; INSERT INTO other VALUES (-2); UPDATE {table} SET id = 3; COMMIT")).await;
        bed.on_source("INSERT INTO other VALUES (1)").await;
        let until = bed.capture().await;
        let error = bed.apply(until).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SchemaChanged, "{change}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(said) && text.contains("that commits at"), "{change}: {text}");
        assert!(error.next_step().is_some());
        // All before it, and neither it nor what came after it.
        assert_eq!(bed.progress().await, vec![before; 2], "{change}");
        let rows: (i64, i32, i32) = {
            let query = "SELECT (SELECT sum(id) FROM other), id, n FROM plain";
            let row = bed.target.query_one(query, &[]).await.unwrap();
            (row.get(0), row.get(1), row.get(2))
        };
        assert_eq!(rows, (-1, 1, 7), "{change}");
    }
}

/// What is run on the source, and what the operator is told to run on the target.
const MENDED: [(&str, &str); 16] = [
    ("ALTER TABLE plain ADD COLUMN extra int", r#"ALTER TABLE "public"."plain" ADD COLUMN "extra" integer"#),
    ("ALTER TABLE plain ADD COLUMN extra int NOT NULL DEFAULT 5", r#"ADD COLUMN "extra" integer DEFAULT 5 NOT NULL"#),
    ("ALTER TABLE plain ADD COLUMN extra text DEFAULT 'it''s'", r#"ADD COLUMN "extra" text DEFAULT 'it''s'::text"#),
    ("ALTER TABLE plain ADD COLUMN extra timestamptz DEFAULT now()", r#"ALTER COLUMN "extra" SET DEFAULT now()"#),
    (
        "ALTER TABLE plain ADD COLUMN extra int DEFAULT 5; ALTER TABLE plain ALTER extra SET DEFAULT 7",
        r#"ADD COLUMN "extra" integer DEFAULT CAST('5' AS integer); ALTER TABLE "public"."plain" ALTER COLUMN "extra" SET DEFAULT 7"#,
    ),
    (
        "ALTER TABLE plain ADD COLUMN extra int DEFAULT 5; ALTER TABLE plain ALTER extra DROP DEFAULT",
        r#"ALTER COLUMN "extra" DROP DEFAULT"#,
    ),
    (
        "ALTER TABLE plain ADD COLUMN extra int[] DEFAULT '{1,2}'",
        r#"ADD COLUMN "extra" integer[] DEFAULT '{1,2}'::integer[]"#,
    ),
    ("ALTER TABLE plain DROP COLUMN n", r#"DROP COLUMN "n""#),
    ("ALTER TABLE plain DROP COLUMN mail", r#"DROP COLUMN "mail""#),
    ("ALTER TABLE plain RENAME COLUMN a TO \"B b\"", r#"RENAME COLUMN "a" TO "B b""#),
    ("ALTER TABLE plain RENAME COLUMN id TO key", r#"RENAME COLUMN "id" TO "key""#),
    ("ALTER TABLE plain ALTER COLUMN n TYPE bigint", r#"ALTER COLUMN "n" TYPE bigint"#),
    ("ALTER TABLE plain ALTER COLUMN id TYPE bigint", r#"ALTER COLUMN "id" TYPE bigint"#),
    ("ALTER TABLE plain ALTER COLUMN a TYPE varchar(9)", r#"ALTER COLUMN "a" TYPE character varying(9)"#),
    ("ALTER TABLE plain RENAME TO plane", r#"ALTER TABLE "public"."plain" RENAME TO "plane""#),
    (
        "ALTER TABLE plain DROP CONSTRAINT plain_pkey, ADD PRIMARY KEY (mail)",
        r#"CREATE UNIQUE INDEX ON "public"."plain" ("mail")"#,
    ),
];

/// The statements that an error tells the operator to run.
fn statements(error: &Error) -> String {
    assert_eq!(error.kind(), ErrorKind::SchemaChanged, "{error:?}");
    let hint = error.next_step().unwrap();
    let (_, rest) = hint.split_once("Run this on the target: ").unwrap_or_else(|| panic!("{error:?}"));
    rest.split_once("; Then run").unwrap().0.to_owned()
}

/// Applies, is told what mends the target, does it, and applies again.
async fn mend(bed: &mut Bed, until: Lsn, when: &str) -> String {
    let before = bed.progress().await;
    let error = bed.apply_adopting(until).await.unwrap_err();
    println!("{when}: {error:?}");
    let statements = statements(&error);
    assert_eq!(before[0].max(bed.progress().await[0]), bed.progress().await[0]);
    bed.on_target(&statements).await;
    bed.apply_adopting(until).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
    statements
}

/// Changes of all kinds, of which some find out what a row has; every column is named only where it must be.
async fn write(bed: &Bed, number: i32) {
    let key: String = {
        let query = "SELECT attname::text FROM pg_attribute WHERE attrelid = (SELECT oid FROM pg_class WHERE relname IN ('plain', 'plane') AND relkind = 'r') AND attnum = 1";
        bed.source.query_one(query, &[]).await.unwrap().get(0)
    };
    let table: String = {
        let query = "SELECT relname::text FROM pg_class WHERE relname IN ('plain', 'plane') AND relkind = 'r'";
        bed.source.query_one(query, &[]).await.unwrap().get(0)
    };
    let many = 500 * number;
    for statement in [
        format!("INSERT INTO {table} ({key}) VALUES ({many})"),
        format!("UPDATE {table} SET {key} = {key} + 10000 WHERE {key} % 7 = {number} AND {key} < 5000"),
        format!("DELETE FROM {table} WHERE {key} % 11 = {number}"),
        format!("INSERT INTO {table} ({key}) SELECT g FROM generate_series({many} + 1, {many} + 200) g"),
        format!("INSERT INTO other VALUES ({number})"),
    ] {
        // Of a table without a usable default for what must be unique or not null there is less to write.
        if bed.source.batch_execute(&statement).await.is_err() {
            bed.source.batch_execute("ROLLBACK").await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_once_the_target_is_mended_as_told_the_apply_goes_on() {
    for (number, (change, told)) in MENDED.into_iter().enumerate() {
        let binary = number % 2 == 1;
        let mut bed = Bed::with(shared_server().await, SCHEMA, ROWS, 2, binary).await;
        if change.contains("(mail)") {
            bed.on_source("ALTER TABLE plain ALTER mail SET DEFAULT md5(random()::text)").await;
        }
        write(&bed, 1).await;
        bed.on_source(change).await;
        write(&bed, 2).await;
        let until = bed.capture().await;
        let statements = mend(&mut bed, until, change).await;
        assert!(statements.contains(told), "{change}: {statements}");
        bed.assert_equal(change).await;
        // A process that starts now reads the new definition from the ledger.
        write(&bed, 3).await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal(&format!("{change}, later")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_rows_from_before_a_change_in_the_same_transaction_fit_the_mended_target() {
    for (number, (change, _)) in MENDED.into_iter().enumerate() {
        if change.contains("PRIMARY KEY") || change.contains("now()") {
            continue;
        }
        let mut bed = Bed::with(shared_server().await, SCHEMA, ROWS, 2, number % 2 == 0).await;
        let (table, key) = (
            if change.ends_with("plane") { "plane" } else { "plain" },
            if change.ends_with("key") { "key" } else { "id" },
        );
        bed.on_source(&format!(
            "BEGIN; INSERT INTO plain VALUES (1000, 'old', 1, 'old'); UPDATE plain SET a = 'x', n = n + 1 WHERE id < 50; \
             UPDATE plain SET id = id + 5000 WHERE id < 5; DELETE FROM plain WHERE id = 60; {change}; \
             INSERT INTO {table} ({key}) VALUES (1001); DELETE FROM {table} WHERE {key} = 70; COMMIT"
        ))
        .await;
        bed.on_source(&format!("DELETE FROM {table} WHERE {key} = 80")).await;
        let until = bed.capture().await;
        mend(&mut bed, until, change).await;
        bed.assert_equal(change).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_target_that_was_changed_before_the_source_does_not_stop_the_apply() {
    let changes = ["ADD COLUMN extra int DEFAULT 5", "ALTER COLUMN n TYPE bigint", "ALTER COLUMN id TYPE bigint"];
    for change in changes {
        let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
        bed.on_target(&format!("ALTER TABLE plain {change}")).await;
        write(&bed, 1).await;
        bed.capture_and_apply().await.unwrap();
        bed.on_source(&format!("ALTER TABLE plain {change}")).await;
        write(&bed, 2).await;
        let until = bed.capture().await;
        bed.apply_adopting(until).await.unwrap();
        bed.assert_equal(change).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_several_changes_one_after_the_other_and_in_one_transaction_are_each_dealt_with() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source("ALTER TABLE plain ADD COLUMN extra int DEFAULT 5").await;
    bed.on_source("UPDATE plain SET extra = 6 WHERE id < 10").await;
    bed.on_source("ALTER TABLE plain DROP COLUMN n, ALTER extra TYPE bigint").await;
    bed.on_source("UPDATE plain SET extra = 7 WHERE id < 5").await;
    let until = bed.capture().await;
    // The source's catalog is ahead of what the stream announces first.
    let error = bed.apply_adopting(until).await.unwrap_err();
    assert!(error.next_step().unwrap().contains("--recopy 'public.plain'`"), "its missing value is gone: {error:?}");

    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source("ALTER TABLE plain ADD COLUMN extra int DEFAULT 5").await;
    bed.on_source("UPDATE plain SET extra = 6 WHERE id < 10").await;
    bed.on_source(
        "BEGIN; ALTER TABLE other ADD COLUMN x int; INSERT INTO other VALUES (5, 5); ALTER TABLE plain DROP COLUMN n; \
         DELETE FROM plain WHERE id = 9; INSERT INTO other VALUES (6, 6); COMMIT",
    )
    .await;
    let until = bed.capture().await;
    let mut told = Vec::new();
    while let Err(error) = bed.apply_adopting(until).await {
        told.push(statements(&error));
        bed.on_target(&told[told.len() - 1]).await;
    }
    assert_eq!(told.len(), 3, "{told:?}");
    bed.assert_equal("three changes").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_what_no_statement_can_mend_is_said_plainly() {
    let changes = [
        ("ALTER TABLE plain ADD COLUMN extra float DEFAULT random()", "a value of its own"),
        ("ALTER TABLE plain ADD COLUMN extra serial", "a value of its own"),
        ("ALTER TABLE plain DROP COLUMN n, ADD COLUMN n int", "another column was named \"n\" before"),
        (
            "ALTER TABLE plain RENAME a TO c; ALTER TABLE plain RENAME mail TO a; ALTER TABLE plain RENAME c TO mail",
            "another column was named \"mail\" before",
        ),
    ];
    for (change, said) in changes {
        let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
        bed.on_source(change).await;
        bed.on_source("DELETE FROM plain WHERE id = 9").await;
        let until = bed.capture().await;
        let error = bed.apply_adopting(until).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SchemaChanged, "{change}: {error:?}");
        let hint = error.next_step().unwrap();
        assert!(hint.contains(said) && hint.contains("walferry migrate --recopy 'public.plain'`"), "{change}: {hint}");
        assert!(!hint.contains("Run this on the target"), "{change}: {hint}");
        let kept: i64 = bed.target.query_one("SELECT count(*) FROM plain WHERE id = 9", &[]).await.unwrap().get(0);
        assert_eq!(kept, 1, "{change}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_mended_target_that_differs_in_what_old_rows_have_is_not_taken() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source("ALTER TABLE plain ADD COLUMN extra int DEFAULT 5").await;
    bed.on_source("DELETE FROM plain WHERE id = 9").await;
    let until = bed.capture().await;
    // The rows that are there stay NULL.
    bed.on_target("ALTER TABLE plain ADD COLUMN extra int; ALTER TABLE plain ALTER extra SET DEFAULT 5").await;
    let statements = mend(&mut bed, until, "a default that came too late").await;
    assert!(statements.contains("DROP COLUMN \"extra\"; ALTER TABLE \"public\".\"plain\" ADD COLUMN"), "{statements}");
    bed.assert_equal("after the column was made anew").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_partition_is_mended_at_its_root_once_for_all() {
    let schema = "CREATE TABLE parts (id int, r text, n int, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
        CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a'); CREATE TABLE parts_b PARTITION OF parts FOR VALUES IN ('b')";
    let mut bed = Bed::new(schema, "INSERT INTO parts VALUES (1, 'a', 1), (2, 'b', 2)", 2).await;
    bed.on_source("ALTER TABLE parts ADD COLUMN extra int DEFAULT 3, ALTER n TYPE bigint").await;
    bed.on_source("INSERT INTO parts VALUES (3, 'a', 1, 1)").await;
    let until = bed.capture().await;
    let error = bed.apply_adopting(until).await.unwrap_err();
    assert!(error.next_step().unwrap().contains("--recopy"), "the rewrite took the missing value: {error:?}");

    let mut bed = Bed::new(schema, "INSERT INTO parts VALUES (1, 'a', 1), (2, 'b', 2)", 2).await;
    bed.on_source("ALTER TABLE parts ADD COLUMN extra int DEFAULT 3").await;
    bed.on_source("INSERT INTO parts VALUES (3, 'a', 1, 1)").await;
    bed.on_source("UPDATE parts SET extra = 4 WHERE r = 'b'").await;
    let until = bed.capture().await;
    let statements = mend(&mut bed, until, "a partition").await;
    assert_eq!(statements, r#"ALTER TABLE "public"."parts" ADD COLUMN "extra" integer DEFAULT 3"#);
    bed.assert_equal("both partitions").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_rows_that_were_rewritten_beside_a_new_column_or_name_are_not_taken_for_what_the_target_has() {
    let changes = [
        "ALTER TABLE plain ADD COLUMN extra uuid DEFAULT gen_random_uuid(); ALTER TABLE plain ALTER extra DROP DEFAULT",
        "ALTER TABLE plain ADD COLUMN extra int DEFAULT 5; ALTER TABLE plain ALTER extra DROP DEFAULT; CLUSTER plain USING plain_pkey",
        "ALTER TABLE plain ALTER n TYPE int USING n + 1; ALTER TABLE plain RENAME n TO w",
        "ALTER TABLE plain ALTER n TYPE int USING n + 1; ALTER TABLE plain RENAME TO plane",
        // An earlier change that is adopted must not hide the rewrite from the one after it.
        "ALTER TABLE plain DROP COLUMN mail; DELETE FROM plain WHERE id = 8; ALTER TABLE plain ADD COLUMN extra uuid DEFAULT \
         gen_random_uuid(); ALTER TABLE plain ALTER extra DROP DEFAULT",
    ];
    for change in changes {
        let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
        for statement in change.split("; ") {
            bed.on_source(statement).await;
        }
        let table = if change.ends_with("plane") { "plane" } else { "plain" };
        bed.on_source(&format!("DELETE FROM {table} WHERE id = 9")).await;
        let until = bed.capture().await;
        let mut told = 0;
        let error = loop {
            let error = bed.apply_adopting(until).await.expect_err(change);
            if !error.next_step().unwrap().contains("Run this on the target: ") || told == 2 {
                break error;
            }
            told += 1;
            bed.on_target(&statements(&error)).await;
        };
        let hint = error.next_step().unwrap();
        assert!(hint.contains("written all rows") && hint.contains("--recopy"), "{change}: {error:?}");
        assert_eq!(told, usize::from(change.contains("COLUMN mail")), "{change}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_file_that_another_change_explains_is_no_reason_to_compare_the_next_one() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    for change in
        ["ALTER TABLE plain ALTER mail TYPE varchar(50)", "TRUNCATE other", "ALTER TABLE plain ADD COLUMN extra int"]
    {
        bed.on_source(change).await;
        bed.on_source("DELETE FROM plain WHERE id = (SELECT max(id) FROM plain)").await;
        let until = bed.capture().await;
        if change.starts_with("TRUNCATE") {
            bed.apply(until).await.unwrap();
        } else {
            mend(&mut bed, until, change).await;
        }
        bed.assert_equal(change).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_rows_that_were_rewritten_with_an_adopted_change_are_not_forgotten_by_the_next_until_they_are_compared() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source("ALTER TABLE plain DROP COLUMN mail, ALTER n TYPE int USING n + 1").await;
    bed.on_source("DELETE FROM plain WHERE id = 8").await;
    let until = bed.capture().await;
    mend(&mut bed, until, "a dropped column; the other one stays in the way of the cutover").await;
    bed.on_source("ALTER TABLE plain RENAME n TO w; DELETE FROM plain WHERE id = 9").await;
    let until = bed.capture().await;
    let error = bed.apply_adopting(until).await.unwrap_err();
    assert!(error.next_step().unwrap().contains("written all rows"), "{error:?}");

    bed.on_target("ALTER TABLE plain RENAME n TO w").await;
    let redefined = redefine(&bed, "plain").await.unwrap();
    let query = "SELECT relfilenode FROM pg_class WHERE oid = $1";
    let file: u32 = bed.source.query_one(query, &[&redefined[0].table.relid]).await.unwrap().get(0);
    assert_eq!(redefined[0].table.relfilenode, Some(file));
}

/// What a table is when it is compared with the source again.
async fn redefine(bed: &Bed, name: &str) -> Result<Vec<Redefinition>> {
    let (source, target) = (bed.pinned_source().await, bed.pinned_target().await);
    let tables: Vec<&Table> =
        bed.layout.tables.iter().map(|entry| &entry.table).filter(|table| table.name == name).collect();
    reconcile::redefine(&source, &target, &tables, Stream::GoesOn { binary: bed.binary }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_other_columns_on_the_target_is_not_compared_again() {
    let columns = [
        "extra int",
        "extra int NOT NULL DEFAULT 5",
        "extra int NOT NULL",
        "extra int GENERATED ALWAYS AS (id + 1) STORED",
        "extra int GENERATED ALWAYS AS IDENTITY",
    ];
    let bed = Bed::new(SCHEMA, "INSERT INTO other VALUES (1)", 2).await;
    redefine(&bed, "plain").await.unwrap();
    for column in columns {
        bed.on_target(&format!("ALTER TABLE plain ADD COLUMN {column}")).await;
        let error = redefine(&bed, "plain").await.expect_err(column);
        let hint = error.next_step().unwrap();
        assert!(
            hint.contains("the target has a column \"extra\" that the source does not have"),
            "{column}: {error:?}"
        );
        bed.on_target("ALTER TABLE plain DROP COLUMN extra").await;
    }
    bed.on_source("ALTER TABLE plain ADD COLUMN extra int GENERATED ALWAYS AS (id + 1) STORED").await;
    let error = redefine(&bed, "plain").await.unwrap_err();
    assert!(error.next_step().unwrap().contains("generated on the source, and not on the target"), "{error:?}");
    bed.on_target("ALTER TABLE plain ADD COLUMN extra int GENERATED ALWAYS AS (id + 1) STORED").await;
    redefine(&bed, "plain").await.unwrap();
    // What the table had before is dropped as told.
    bed.on_source("ALTER TABLE plain DROP COLUMN n").await;
    bed.on_target(&statements(&redefine(&bed, "plain").await.unwrap_err())).await;
    redefine(&bed, "plain").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_two_changes_of_a_table_in_one_transaction_that_no_target_fits_both_of_end_in_a_comparison() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source(
        "BEGIN; ALTER TABLE plain ADD COLUMN extra int; DELETE FROM plain WHERE id = 8; ALTER TABLE plain DROP COLUMN n; \
         DELETE FROM plain WHERE id = 9; COMMIT",
    )
    .await;
    let until = bed.capture().await;
    for told in [r#"ADD COLUMN "extra" integer"#, r#"DROP COLUMN "n""#] {
        let statements = statements(&bed.apply_adopting(until).await.unwrap_err());
        assert!(statements.contains(told), "{statements}");
        bed.on_target(&statements).await;
    }
    let error = bed.apply_adopting(until).await.unwrap_err();
    let hint = error.next_step().unwrap();
    assert!(
        hint.contains("the target has no column \"n\". Copy it again: `walferry migrate --recopy 'public.plain'`"),
        "{hint}"
    );
    redefine(&bed, "plain").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_divergence_is_not_hidden_by_another_tables_change_in_the_same_transaction() {
    let mut bed = Bed::new(SCHEMA, &format!("{ROWS}; INSERT INTO other VALUES (1), (2)"), 2).await;
    bed.on_target("DELETE FROM other WHERE id = 2").await;
    bed.on_source(
        "BEGIN; DELETE FROM other WHERE id = 2; ALTER TABLE plain ADD COLUMN extra int; DELETE FROM plain WHERE id = 9; COMMIT",
    )
    .await;
    let until = bed.capture().await;
    let error = bed.apply_adopting(until).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Divergence, "{error:?}");
    assert!(error.to_string().contains("\"other\""), "{error:?}");
    bed.on_target("INSERT INTO other VALUES (2)").await;
    mend(&mut bed, until, "the table that changed, when the other one is right").await;
    bed.assert_equal("after both").await;
}
