//! Schemas that have another name on the target.

use crate::support::{Servers, connect};
use crate::{number, relations};

const SCHEMA: &str = "
    CREATE SCHEMA app; CREATE SCHEMA other;
    ALTER DEFAULT PRIVILEGES IN SCHEMA app GRANT SELECT ON TABLES TO PUBLIC;
    CREATE TYPE app.mood AS ENUM ('calm', 'loud');
    CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.touched := 1; RETURN NEW; END';
    CREATE TABLE app.orders (id serial PRIMARY KEY, mood app.mood DEFAULT 'calm', touched int);
    CREATE TRIGGER touch BEFORE INSERT ON app.orders FOR EACH ROW EXECUTE FUNCTION app.touch();
    CREATE FUNCTION other.total() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM app.orders';
    CREATE TABLE other.lines (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id int REFERENCES app.orders);
    CREATE VIEW other.loud AS SELECT * FROM app.orders WHERE mood = 'loud';
    INSERT INTO app.orders (mood) SELECT 'loud' FROM generate_series(1, 100);
    INSERT INTO other.lines (order_id) SELECT generate_series(1, 100);";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_has_its_other_name_from_the_cutover_on_and_all_that_refers_to_it_follows() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source.batch_execute(SCHEMA).await.unwrap();
    let map = ["--map-schema", "app=shop", "--map-schema", "other=rest"];
    migration.migrate(&map).wait().await.assert_refused(2, &["--no-reverse"]);
    let refused = migration.with_servers("check", &["--map-schema", "app=other", "--estimate-seconds", "0"]).await;
    assert_eq!(refused.code, Some(3), "{}", refused.stdout);
    assert!(refused.stdout.contains("map-schema"), "{}", refused.stdout);
    let check = migration.with_servers("check", &[&map[..], &["--json", "--estimate-seconds", "0"]].concat()).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    let report = check.json();
    let texts: Vec<_> =
        report["findings"].as_array().unwrap().iter().filter(|found| found["code"] == "map-schema-text").collect();
    assert_eq!(texts.len(), 1, "{report:#}");
    assert_eq!(texts[0]["object"], "function other.total()", "the one whose body has the old name in it");

    let mut running = migration.migrate(&[&map[..], &["--no-reverse"]].concat());
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    source
        .batch_execute(
            "INSERT INTO app.orders (mood) VALUES ('calm'); UPDATE app.orders SET mood = 'calm' WHERE id < 9",
        )
        .await
        .unwrap();
    migration.cut_over(running).await;

    let (source, target) = (migration.source().await, connect(&migration.target_url).await);
    let expected = ["shop.orders", "shop.orders_id_seq", "rest.lines", "rest.lines_id_seq", "rest.loud"];
    assert_eq!(relations(&target).await, expected.iter().map(ToString::to_string).collect());
    // In both, a table's text is the same under either name.
    let same = async |here: &str, there: &str| {
        let query = |table: &str| format!("SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM {table} t");
        let of_source: String = source.query_one(&query(here), &[]).await.unwrap().get(0);
        let of_target: String = target.query_one(&query(there), &[]).await.unwrap().get(0);
        assert_eq!(of_source, of_target, "{here} and {there}");
    };
    same("app.orders", "shop.orders").await;
    same("other.lines", "rest.lines").await;
    same("other.loud", "rest.loud").await;
    assert_eq!(number(&target, "INSERT INTO shop.orders (mood) VALUES ('loud') RETURNING id::int8").await, 102);
    assert_eq!(
        number(&target, "SELECT touched::int8 FROM shop.orders WHERE id = 102").await,
        1,
        "the trigger's function"
    );
    target.batch_execute("CREATE TABLE shop.later (id int); CREATE TABLE rest.later (id int)").await.unwrap();
    for (table, is_granted) in [("shop.later", 1), ("rest.later", 0), ("shop.orders", 1)] {
        let granted = format!(
            "SELECT count(*) FROM pg_class c, aclexplode(relacl) a WHERE c.oid = '{table}'::regclass AND grantee = 0"
        );
        assert_eq!(number(&target, &granted).await, is_granted, "default privileges of the schema, on {table}");
    }
    assert!(target.batch_execute("INSERT INTO rest.lines (order_id) VALUES (-1)").await.is_err(), "the foreign key");
    assert!(target.batch_execute("INSERT INTO rest.lines (id) VALUES (-1)").await.is_err(), "GENERATED ALWAYS again");

    let alone = servers.migration("alone").await;
    alone.source().await.batch_execute(SCHEMA).await.unwrap();
    let done = alone.migrate(&[&map[..], &["--schema-only"]].concat()).wait().await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(relations(&alone.target().await).await, expected.iter().map(ToString::to_string).collect());
}
