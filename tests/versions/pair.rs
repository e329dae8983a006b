//! The pairs of versions, each a live migration there and back.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::servers;
use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, compare, connect, until_true};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_10_to_18() {
    there_and_back(10, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_12_to_17() {
    there_and_back(12, 17).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_13_to_15() {
    there_and_back(13, 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_14_to_16() {
    there_and_back(14, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_15_to_15() {
    there_and_back(15, 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_15_to_18() {
    there_and_back(15, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_16_to_18() {
    there_and_back(16, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_17_to_18() {
    there_and_back(17, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_18_to_18() {
    there_and_back(18, 18).await;
}

/// Two servers of these versions with the application's schema and rows on the source; `None` where they are not to be had.
pub async fn filled(source: u32, target: u32) -> Option<(Servers, Migration)> {
    let (source_programs, target_programs, tools) = servers::pair(source, target)?;
    let servers = Servers::of((&source_programs, &[]), (&target_programs, &[])).await;
    let mut migration = servers.migration("shop").await;
    migration.environment.push(("WALFERRY_PG_BIN".to_owned(), tools.to_str().unwrap().to_owned()));
    let client = migration.source().await;
    load::fill_schema(&client, &application(source), 500).await;
    client.batch_execute(KINDS).await.unwrap();
    if source >= 11 {
        client.batch_execute(FIRES).await.unwrap();
    }
    Some((servers, migration))
}

/// Values whose text is another from version to version, and others that have to pass as they are.
const KINDS: &str = "
    CREATE TABLE app.kinds (id bigint PRIMARY KEY, f4 real, f8 double precision, f8s double precision[], at point,
                            j jsonb, u uuid, i interval, b bytea, n numeric, t timestamptz);
    INSERT INTO app.kinds SELECT i, i / 3.0, 1.0 / i, ARRAY[i / 7.0, NULL, 'NaN'], point(i / 3.0, 0.1 * i),
        jsonb_build_object('i', i / 3.0), md5(i::text)::uuid, i * interval '1 mon 2 days 03:04:05.6', decode(md5(i::text), 'hex'),
        i / 3.0, timestamptz '2020-01-01 00:00:00.1+00' + i * interval '1.000001 s' FROM generate_series(1, 200) i;
    INSERT INTO app.kinds (id, f4, f8, n) VALUES (-1, 'Infinity', '-0', 'NaN'), (-2, '1e-37', '-Infinity', 0), (-3, 'NaN', 'NaN', NULL)";

/// A trigger of a partitioned table that fires for replicas too; what it is for the partitions, 11 to 14 call internal.
const FIRES: &str = "
    CREATE TABLE app.fired (id bigserial PRIMARY KEY, event int);
    CREATE FUNCTION app.fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO app.fired (event) VALUES (NEW.id); RETURN NULL; END $$;
    CREATE TRIGGER fires AFTER INSERT ON app.event FOR EACH ROW EXECUTE PROCEDURE app.fire();
    ALTER TABLE app.event ENABLE ALWAYS TRIGGER fires";

/// The partitions for which it does.
async fn firing(client: &Client) -> Vec<String> {
    let query = "SELECT tgrelid::regclass::text FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid \
         WHERE tgname = 'fires' AND tgenabled = 'A' AND relkind = 'r' ORDER BY 1";
    client.query(query, &[]).await.unwrap().into_iter().map(|row| row.get(0)).collect()
}

/// The application's schema as a version understands it.
fn application(version: u32) -> String {
    let mut schema = load::SCHEMA.replace("EXECUTE FUNCTION", "EXECUTE PROCEDURE");
    if version < 12 {
        schema = schema.replace("    doubled numeric GENERATED ALWAYS AS (amount * 2) STORED,\n", "");
    }
    if version < 11 {
        schema = schema
            .replace("    kind text,\n    PRIMARY KEY (id, at)\n", "    kind text\n")
            .replace("app.event DEFAULT;", "app.event FOR VALUES FROM ('2025-01-01') TO (MAXVALUE);")
            .replace(
                "CREATE INDEX event_kind ON app.event (kind);",
                "ALTER TABLE app.event_2024 ADD PRIMARY KEY (id, at); ALTER TABLE app.event_later ADD PRIMARY KEY (id, at);",
            );
    }
    schema
}

async fn there_and_back(source: u32, target: u32) {
    let Some((_servers, migration)) = filled(source, target).await else { return };
    let application = Application::start(&migration.source_url, 2);
    // To a server that sends no messages each of them looks like a marker of ours.
    let empty = (source < 14).then(|| tokio::spawn(empty_transactions(migration.source_url.clone())));
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    application.goes_on(30).await;
    let old = migration.source().await;
    old.batch_execute(
        "UPDATE app.kinds SET f8 = f8 / 3, f4 = f4 / 3 WHERE id % 3 = 0; DELETE FROM app.kinds WHERE id = 7",
    )
    .await
    .unwrap();
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(0), "{}\n{}", verified.stdout, verified.stderr);
    assert_eq!(verified.json()["online"], true);

    let cutover = migration.with_directory("cutover", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    assert_eq!(cutover.json()["reverse"], "armed");
    application.stop().await;
    if let Some(empty) = empty {
        empty.await.unwrap();
    }
    migration.wait_for_status(&mut running, "the way back", |status| status["direction"] == "back").await;
    let fires: &[&str] = if source >= 11 { &["app.event_2024", "app.event_later"] } else { &[] };
    assert_eq!(firing(&migration.target().await).await, fires);
    assert_same(&migration).await;

    let application = Application::start(&migration.target_url, 2);
    application.goes_on(60).await;
    let new = migration.target().await;
    new.batch_execute("UPDATE app.kinds SET f8 = f8 * 7 WHERE id % 5 = 0; INSERT INTO app.kinds (id, f8) VALUES (1000, 0.1::float8 + 0.2::float8)")
        .await
        .unwrap();
    ready(&migration, &mut running).await;
    let switchback = migration.with_directory("switchback", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(switchback.code, Some(0), "{}\n{}", switchback.stderr, running.log());
    application.stop().await;
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(firing(&migration.source().await).await, fires);
    assert_same(&migration).await;

    let application = Application::start(&migration.source_url, 1);
    application.goes_on(5).await;
    application.stop().await;
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(migration.left_over().await, Vec::<String>::new());
}

/// Transactions that change no row of a table, until the cutover ends the session.
async fn empty_transactions(url: String) {
    let client = connect(&url).await;
    while client.batch_execute("CREATE TEMP TABLE nothing (); DROP TABLE nothing").await.is_ok() {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

pub async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

/// The same rows, sequences and objects on both sides. What a definition reads like differs from version to version, and so does
/// the text of a float, so those are compared as their bits.
pub async fn assert_same(migration: &Migration) {
    let (source, target) = (migration.source().await, migration.target().await);
    let (rows_of_source, rows_of_target) = tokio::join!(rows(&source), rows(&target));
    assert!(rows_of_source.len() > 8);
    assert_eq!(rows_of_source, rows_of_target, "rows of source and target (count, hash)");
    assert_eq!(floats(&source).await, floats(&target).await, "bits of floats");
    assert_eq!(compare::sequences(&source).await, compare::sequences(&target).await, "sequences");
    assert_eq!(objects(&source).await, objects(&target).await, "objects");
    until_true(&target, "SELECT count(*) > 0 FROM app.kinds").await;
}

async fn rows(client: &Client) -> BTreeMap<String, (i64, Option<String>)> {
    compare::rows_with(client, 0).await
}

async fn floats(client: &Client) -> Vec<String> {
    let query = "SELECT concat_ws('/', id, float4send(f4), float8send(f8), array_send(f8s), point_send(at)) FROM app.kinds ORDER BY id";
    client.batch_execute("SET search_path = pg_catalog").await.unwrap();
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn objects(client: &Client) -> Vec<String> {
    let query = "WITH ours AS (SELECT c.oid, c.relname, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                       WHERE n.nspname = 'app') \
         SELECT format('relation %I %s', relname, relkind) FROM ours \
         UNION ALL SELECT format('column %I %I %s %s', relname, attname, format_type(atttypid, atttypmod), attnotnull) \
             FROM ours JOIN pg_attribute a ON a.attrelid = ours.oid AND attnum > 0 AND NOT attisdropped \
         UNION ALL SELECT format('constraint %I %I %s %s', relname, conname, contype, convalidated) \
             FROM ours JOIN pg_constraint k ON k.conrelid = ours.oid WHERE contype <> 'n' \
         UNION ALL SELECT format('index %I %s %s', relname, indisvalid, indisreplident) FROM ours JOIN pg_index i ON i.indexrelid = ours.oid \
         UNION ALL SELECT format('trigger %I %I %s', relname, tgname, CASE WHEN tgname <> 'fires' THEN tgenabled END) \
             FROM ours JOIN pg_trigger t ON t.tgrelid = ours.oid AND (NOT tgisinternal OR tgname = 'fires') \
         UNION ALL SELECT format('function %I %s', proname, prosrc) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'app' \
         ORDER BY 1";
    client.query(query, &[]).await.unwrap().into_iter().map(|row| row.get(0)).collect()
}
