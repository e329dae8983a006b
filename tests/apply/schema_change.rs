//! A table that is not what it was when the migration began.

use walferry::error::ErrorKind;

use super::bed::Bed;

const SCHEMA: &str = "CREATE TABLE plain (id int PRIMARY KEY, a text, n int, mail text NOT NULL DEFAULT 'x');
    CREATE TABLE other (id int PRIMARY KEY)";

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
    ];
    for (change, said) in changes {
        let mut bed = Bed::new(SCHEMA, "INSERT INTO plain VALUES (1, 'a', 1)", 2).await;
        bed.on_source("CREATE UNIQUE INDEX by_mail ON plain (mail)").await;
        bed.on_source("UPDATE plain SET a = 'before'").await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal("before").await;
        let before = bed.progress().await;
        bed.on_source(change).await;
        let table = if change.ends_with("plane") { "plane" } else { "plain" };
        bed.on_source(&format!("UPDATE {table} SET id = 3")).await;
        bed.on_source("INSERT INTO other VALUES (1)").await;
        let until = bed.capture().await;
        let error = bed.apply(until).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SchemaChanged, "{change}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(said) && text.contains("that commits at"), "{change}: {text}");
        assert!(error.next_step().is_some());
        assert_eq!(bed.progress().await, before, "{change}");
        let rows: (i64, i32) = {
            let row = bed.target.query_one("SELECT (SELECT count(*) FROM other), id FROM plain", &[]).await.unwrap();
            (row.get(0), row.get(1))
        };
        assert_eq!(rows, (0, 1), "{change}: neither it nor what came after it");
    }
}
