//! A part of a database: what is chosen arrives with all it needs, and the rest is left alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;

use crate::support::{Migration, Servers, connect, is_blocked, until, until_true};
use crate::{assert_same_rows, number, relations};

const SCHEMA: &str = "
    CREATE SCHEMA app; CREATE SCHEMA parts; CREATE SCHEMA lib; CREATE SCHEMA audit; CREATE SCHEMA \"Other\";
    CREATE TYPE lib.mood AS ENUM ('calm', 'loud');
    CREATE SEQUENCE lib.numbers;
    CREATE FUNCTION lib.touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.touched := 1; RETURN NEW; END';
    CREATE FUNCTION lib.unused() RETURNS int LANGUAGE sql AS 'SELECT 1';
    CREATE TABLE audit.people (id int PRIMARY KEY, name text);
    CREATE TABLE audit.log (id bigserial PRIMARY KEY, line text);
    CREATE TABLE app.orders (id serial PRIMARY KEY, mood lib.mood DEFAULT 'calm', person int REFERENCES audit.people,
        number bigint DEFAULT nextval('lib.numbers'), touched int DEFAULT 0);
    CREATE TRIGGER touch BEFORE INSERT ON app.orders FOR EACH ROW EXECUTE FUNCTION lib.touch();
    CREATE TABLE app.lines (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id int REFERENCES app.orders, body text);
    CREATE INDEX lines_body ON app.lines (body);
    CREATE TABLE app.events (id int, kind int, PRIMARY KEY (id, kind)) PARTITION BY LIST (kind);
    CREATE TABLE app.events_1 PARTITION OF app.events FOR VALUES IN (1);
    CREATE TABLE parts.events_2 PARTITION OF app.events FOR VALUES IN (2);
    CREATE TABLE app.junk (id int PRIMARY KEY, body text);
    CREATE UNLOGGED TABLE app.cache (id int PRIMARY KEY); CREATE UNLOGGED TABLE audit.cache (id int PRIMARY KEY);
    CREATE POLICY everybody ON app.orders USING (true);
    CREATE TABLE \"Other\".\"Odd.Name\" (id int PRIMARY KEY);
    CREATE VIEW app.loud AS SELECT * FROM app.orders WHERE mood = 'loud';
    CREATE VIEW app.named AS SELECT o.id, p.name FROM app.orders o JOIN audit.people p ON p.id = o.person;
    CREATE VIEW app.named_again AS SELECT * FROM app.named;
    CREATE MATERIALIZED VIEW app.totals AS SELECT count(*) FROM app.lines;
    CREATE MATERIALIZED VIEW audit.lines AS SELECT count(*) FROM audit.log;
    CREATE FUNCTION app.twice(int) RETURNS int LANGUAGE sql AS 'SELECT 2 * $1';
    COMMENT ON TABLE app.orders IS 'what was ordered';
    INSERT INTO audit.people SELECT i, 'person ' || i FROM generate_series(1, 50) i;
    INSERT INTO app.orders (person) SELECT 1 + i % 50 FROM generate_series(1, 2000) i;
    INSERT INTO app.lines (order_id, body) SELECT 1 + i % 2000, 'line ' || i FROM generate_series(1, 3000) i;
    INSERT INTO app.events SELECT i, 1 + i % 2 FROM generate_series(1, 1000) i;
    INSERT INTO app.junk SELECT i, repeat('junk ', 10) FROM generate_series(1, 1000) i;
    INSERT INTO \"Other\".\"Odd.Name\" SELECT generate_series(1, 10);
    INSERT INTO audit.log (line) SELECT 'x' FROM generate_series(1, 100);
    INSERT INTO app.cache SELECT generate_series(1, 10); INSERT INTO audit.cache VALUES (1);
    SELECT lo_from_bytea(4711, 'stays');
    REFRESH MATERIALIZED VIEW app.totals; ANALYZE";

const FILTERS: [&str; 8] = [
    "--include-schema",
    "app",
    "--include-table",
    "\"Other\".\"Odd.Name\"",
    "--exclude-table",
    "app.j?nk*",
    "--exclude-schema",
    "audit",
];

const MOVED: [&str; 7] =
    ["app.orders", "app.lines", "app.events", "app.events_1", "parts.events_2", "app.cache", "\"Other\".\"Odd.Name\""];

/// An application that writes to tables that move and to those that do not, each with sessions of its own.
struct Application {
    stop: Arc<AtomicBool>,
    moved: (Arc<AtomicU64>, JoinHandle<Option<SqlState>>),
    rest: (Arc<AtomicU64>, JoinHandle<Option<SqlState>>),
}

impl Application {
    fn start(moved: &str, rest: &str) -> Application {
        let stop = Arc::new(AtomicBool::new(false));
        let of_moved = "INSERT INTO app.orders (person, mood) VALUES (1, 'loud'); \
             INSERT INTO app.lines (order_id, body) VALUES (currval('app.orders_id_seq'), 'live'); \
             UPDATE app.orders SET mood = 'calm' WHERE id = 1 + currval('app.orders_id_seq') % 2000; \
             DELETE FROM app.lines WHERE id = currval('app.lines_id_seq') % 1000; \
             INSERT INTO app.events VALUES (currval('app.orders_id_seq') + 10000, 1 + currval('app.orders_id_seq') % 2)";
        let of_rest = "UPDATE audit.people SET name = name || '.' WHERE id = 7; INSERT INTO audit.log (line) VALUES ('live'); \
             UPDATE app.junk SET body = 'live' WHERE id = 5";
        let moved = writer(moved, of_moved, Arc::clone(&stop));
        let rest = writer(rest, of_rest, Arc::clone(&stop));
        Application { stop, moved, rest }
    }

    async fn goes_on(&self) {
        for (count, _) in [&self.moved, &self.rest] {
            let goal = count.load(Ordering::Relaxed) + 20;
            until("the application goes on", || async { (count.load(Ordering::Relaxed) >= goal).then_some(()) }).await;
        }
    }

    /// With what each session ended, where it ended before it was stopped.
    async fn stop(self) -> (Option<SqlState>, Option<SqlState>) {
        self.stop.store(true, Ordering::Relaxed);
        (self.moved.1.await.unwrap(), self.rest.1.await.unwrap())
    }
}

/// One session that writes until it is stopped, or refused.
fn writer(url: &str, statements: &str, stop: Arc<AtomicBool>) -> (Arc<AtomicU64>, JoinHandle<Option<SqlState>>) {
    let count = Arc::new(AtomicU64::new(0));
    let (url, transaction, counted) = (url.to_owned(), format!("BEGIN; {statements}; COMMIT"), Arc::clone(&count));
    let writing = tokio::spawn(async move {
        let client = connect(&url).await;
        while !stop.load(Ordering::Relaxed) {
            if let Err(error) = client.batch_execute(&transaction).await {
                return Some(error.code().cloned().unwrap_or(SqlState::CONNECTION_EXCEPTION));
            }
            counted.fetch_add(1, Ordering::Relaxed);
        }
        None
    });
    (count, writing)
}

async fn filled(servers: &Servers, database: &str) -> Migration {
    let migration = servers.migration(database).await;
    migration.source().await.batch_execute(SCHEMA).await.unwrap();
    migration
}

/// What the target has to have, and nothing else.
async fn assert_only_the_part(migration: &Migration) {
    let target = migration.target().await;
    let mut expected: Vec<&str> = MOVED.to_vec();
    expected.extend(["app.orders_id_seq", "app.lines_id_seq", "lib.numbers", "app.loud", "app.totals"]);
    assert_eq!(relations(&target).await, expected.iter().map(ToString::to_string).collect());
    let functions = "SELECT string_agg(format('%s.%s', n.nspname, proname), ' ' ORDER BY 1) FROM pg_proc p \
         JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname IN ('app', 'lib', 'audit')";
    let functions: String = target.query_one(functions, &[]).await.unwrap().get(0);
    assert_eq!(functions, "app.twice lib.touch", "what is in a chosen schema, and what a chosen table needs");
    let kinds = "SELECT string_agg(format('%s %s', contype, conname), ' ' ORDER BY conname) FROM pg_constraint \
         WHERE conrelid IN ('app.orders'::regclass, 'app.lines'::regclass)";
    let constraints: String = target.query_one(kinds, &[]).await.unwrap().get(0);
    assert_eq!(constraints, "f lines_order_id_fkey p lines_pkey p orders_pkey", "no foreign key to what is left out");
    assert_eq!(number(&target, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'app.events'::regclass").await, 2);
    assert_eq!(number(&target, "SELECT count(*) FROM pg_indexes WHERE indexname = 'lines_body'").await, 1);
    let comment = "SELECT count(*) FROM pg_description WHERE description = 'what was ordered'";
    assert_eq!(number(&target, comment).await, 1);
    assert_eq!(number(&target, "SELECT count(*) FROM pg_policy").await, 1);
    assert_eq!(number(&target, "SELECT count(*) FROM pg_largeobject_metadata").await, 0, "they belong to no table");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_database_moves_under_load_there_and_back_and_the_rest_never_notices() {
    let servers = Servers::start().await;
    let migration = filled(&servers, "shop").await;

    let check = migration.with_servers("check", &[&FILTERS[..], &["--json", "--estimate-seconds", "0"]].concat()).await;
    assert_eq!(check.code, Some(0), "{}\n{}", check.stdout, check.stderr);
    let left: Vec<_> = check.json()["findings"].as_array().unwrap().to_vec();
    assert!(left.iter().any(|finding| finding["code"] == "large-objects-left-out"), "{left:?}");
    let left = left.iter().find(|finding| finding["code"] == "scope-left-out").expect("it is said what is left out");
    for name in [
        "view app.named ",
        "view app.named_again ",
        "foreign key orders_person_fkey of table app.orders (needs audit.people)",
    ] {
        assert!(left["object"].as_str().unwrap().contains(name), "{name} in {left}");
    }

    let application = Application::start(&migration.source_url, &migration.source_url);
    let mut running = migration.migrate(&FILTERS);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    application.goes_on().await;
    assert_only_the_part(&migration).await;
    let source = migration.source().await;
    let published =
        "SELECT count(DISTINCT tablename) FROM pg_publication_tables WHERE schemaname = 'audit' OR tablename = 'junk'";
    assert_eq!(number(&source, published).await, 0, "the stream has only what is wanted");
    assert_eq!(number(&source, "SELECT count(DISTINCT tablename) FROM pg_publication_tables").await, 5);

    // A moved table that changes on both sides goes on, whatever else is new beside the part.
    let (extra, target) = ("ALTER TABLE app.orders ADD COLUMN extra int", migration.target().await);
    target.batch_execute(extra).await.unwrap();
    source
        .batch_execute(&format!(
            "CREATE TABLE audit.beside (id int); {extra}; INSERT INTO app.orders (extra) VALUES (7)"
        ))
        .await
        .unwrap();
    until_true(&target, "SELECT count(*) = 1 FROM app.orders WHERE extra = 7").await;

    // DDL on what is left out concerns nobody; on what is moved, the cutover refuses.
    source
        .batch_execute(
            "ALTER TABLE audit.people ADD COLUMN more int; CREATE TABLE audit.new (id int); \
             CREATE POLICY of_audit ON audit.people USING (true); CREATE CAST (lib.mood AS int) WITH INOUT; \
             COMMENT ON TABLE audit.people IS 'audit'; INSERT INTO app.cache VALUES (11)",
        )
        .await
        .unwrap();
    source.batch_execute("CREATE TABLE app.new (id int); CREATE POLICY more ON app.orders USING (true)").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes"]).await;
    refused.assert_refused(5, &["table app.new is new", "policy more on table app.orders is new"]);
    assert!(!refused.stderr.contains("audit"), "{}", refused.stderr);
    source.batch_execute("DROP TABLE app.new; DROP POLICY more ON app.orders").await.unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;

    let verify = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verify.code, Some(0), "{}\n{}", verify.stdout, verify.stderr);

    let cutover = migration.with_directory("cutover", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    assert_eq!((cutover.json()["fence"].as_str(), cutover.json()["reverse"].as_str()), (Some("tables"), Some("armed")));
    // The one who wrote to what has moved is refused; the other one's session goes on.
    until("the writer of the moved tables is refused", || async { application.moved.1.is_finished().then_some(()) })
        .await;
    let goal = application.rest.0.load(Ordering::Relaxed) + 20;
    until("the rest goes on", || async { (application.rest.0.load(Ordering::Relaxed) >= goal).then_some(()) }).await;
    let (moved, rest) = application.stop().await;
    assert_eq!((moved, rest), (Some(SqlState::READ_ONLY_SQL_TRANSACTION), None));
    let setting: String = source.query_one("SHOW default_transaction_read_only", &[]).await.unwrap().get(0);
    assert_eq!(setting, "off");
    for write in [
        "INSERT INTO app.events VALUES (-1, 1)",
        "UPDATE app.events SET id = -id WHERE kind = 2",
        "TRUNCATE app.events",
        "DELETE FROM app.lines",
        "COPY app.junk TO '/dev/null'; INSERT INTO parts.events_2 VALUES (-2, 2)",
    ] {
        let error = source.batch_execute(write).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{write}: {error:?}");
    }
    let target = migration.target().await;
    assert_same_rows(&source, &target, &MOVED).await;
    // Who is refused may have called for another number before.
    for (sequence, used) in [
        ("app.orders_id_seq", "SELECT max(id)::int8 FROM app.orders"),
        ("app.lines_id_seq", "SELECT max(id)::int8 FROM app.lines"),
        ("lib.numbers", "SELECT max(number) FROM app.orders"),
    ] {
        let last = format!("SELECT last_value FROM {sequence}");
        let (there, here) = (number(&target, &last).await, number(&source, &last).await);
        assert!(there >= number(&target, used).await && there <= here, "{sequence}: {there}, {here} on the source");
    }

    let large_objects = "SELECT count(*) FROM pg_largeobject_metadata";
    assert_eq!((number(&source, large_objects).await, number(&target, large_objects).await), (1, 0));

    // Back again, with what was written meanwhile.
    let application = Application::start(&migration.target_url, &migration.source_url);
    application.goes_on_only_rest().await;
    target
        .batch_execute("INSERT INTO app.orders (mood) VALUES ('loud'); INSERT INTO app.events VALUES (-7, 1); INSERT INTO app.cache VALUES (12)")
        .await
        .unwrap();
    migration
        .wait_for_status(&mut running, "ready for the way back", |status| status["ready_to_cutover"] == true)
        .await;
    let back = migration.with_directory("switchback", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    application.stop().await;
    assert_same_rows(&source, &target, &MOVED).await;
    assert_eq!(number(&source, large_objects).await, 1, "what stayed is nobody's to remove");
    source
        .batch_execute("INSERT INTO app.events VALUES (-8, 1); UPDATE app.events SET id = -9 WHERE id = -8")
        .await
        .unwrap();
    let error = target.batch_execute("INSERT INTO app.events VALUES (-8, 1)").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));

    // Who holds one of the tables while the guard goes, and then comes to the others, is no part of a deadlock.
    let guarded =
        "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE '%walferry%' GROUP BY 1 ORDER BY min(oid)";
    let guarded: Vec<String> = source.query(guarded, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(guarded.len() > 2, "{guarded:?}");
    // The first that was made: a single statement would drop it last, with the locks of all others in its hands.
    source.batch_execute(&format!("BEGIN; LOCK TABLE {} IN ACCESS SHARE MODE", guarded[0])).await.unwrap();
    let clean = migration.start("clean", &[]);
    is_blocked(&migration.source().await, "walferry").await;
    for other in &guarded {
        source.batch_execute(&format!("SELECT count(*) FROM {other}")).await.unwrap();
    }
    source.batch_execute("COMMIT").await.unwrap();
    let clean = clean.wait().await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(migration.left_over().await, Vec::<String>::new());
    for client in [&source, &target] {
        assert_eq!(number(client, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%walferry%'").await, 0);
        client.batch_execute("INSERT INTO app.events VALUES (-10, 1)").await.unwrap();
    }
}

impl Application {
    /// What is written to the target needs no person.
    async fn goes_on_only_rest(&self) {
        let goal = self.rest.0.load(Ordering::Relaxed) + 20;
        until("the rest goes on", || async { (self.rest.0.load(Ordering::Relaxed) >= goal).then_some(()) }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_of_a_part_that_is_cut_off_or_given_up_leaves_its_tables_open() {
    let servers = Servers::start().await;
    let migration = filled(&servers, "shop").await;
    let mut running = migration.migrate(&FILTERS);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let (source, target) = (migration.source().await, migration.target().await);

    // Held at the decision, when the guard is up already.
    let holder = migration.target().await;
    holder.batch_execute("BEGIN; LOCK TABLE app.lines IN ACCESS SHARE MODE").await.unwrap();
    // The identity of app.lines is given back in the deciding transaction, which waits for two seconds and gives up.
    let given_up = migration.with_directory("cutover", &["--yes", "--no-reverse", "--max-write-stall", "25s"]).await;
    assert_eq!(given_up.code, Some(5), "{}", given_up.stderr);
    assert!(given_up.stderr.contains("during switch"), "{}", given_up.stderr);
    source
        .batch_execute("INSERT INTO app.orders (mood) VALUES ('loud'); INSERT INTO app.lines (body) VALUES ('y')")
        .await
        .unwrap();

    // Killed there.
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let cutover = migration.start("cutover", &["--yes", "--no-reverse", "--max-write-stall", "25s"]);
    until_true(&source, "SELECT prosrc LIKE '%refuses%' FROM pg_proc WHERE oid = to_regprocedure('walferry.moved()')")
        .await;
    running.kill().await;
    drop(cutover);
    let error = source.batch_execute("INSERT INTO app.orders (mood) VALUES ('loud')").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "the guard outlives the process");
    // What the dead process has begun there would be the decision, were it let through.
    until_true(&target, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'walferry/%')")
        .await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    // Without its filters again: what was recorded holds.
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    source
        .batch_execute("INSERT INTO app.orders (mood) VALUES ('loud'); INSERT INTO app.lines (body) VALUES ('x')")
        .await
        .unwrap();

    migration.cut_over(running).await;
    assert_same_rows(&source, &target, &["app.orders", "app.lines"]).await;
    // Of three attempts: one guard on each table, none on the target, and none at all behind `clean`.
    let guards = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE '!walferry%' AND tgrelid = 'app.orders'::regclass";
    assert_eq!((number(&source, guards).await, number(&target, guards).await), (2, 0));
    let error = source.batch_execute("INSERT INTO app.orders (mood) VALUES ('loud')").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "raised again after it was opened");
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(migration.left_over().await, Vec::<String>::new());
    assert_eq!(number(&source, guards).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_that_name_nothing_contradict_a_table_or_change_later_are_refused() {
    let servers = Servers::start().await;
    let migration = filled(&servers, "shop").await;
    for (filter, named) in [
        (["--include-table", "app.nothing"], "app.nothing"),
        (["--exclude-table", "Other.odd*"], "Other.odd*"),
        // Not in the search path, as with pg_dump.
        (["--include-table", "orders"], "orders"),
        (["--exclude-schema", "other"], "other"),
        (["--include-table", "a.b.c.d"], "too many dotted names"),
    ] {
        let refused = migration.with_servers("check", &filter).await;
        refused.assert_refused(2, &[named]);
    }
    for part in [&["--include-table", "app.events"][..], &["--data-only"], &["--map-schema", "app=shop"]] {
        let refused = migration.with_servers("check", &[part, &["--replicate-ddl"]].concat()).await;
        assert!(refused.code == Some(2) && refused.stderr.contains("cannot be used with"), "{}", refused.stderr);
    }
    let refused = migration.migrate(&["--schema-only", "--replicate-ddl"]).wait().await;
    assert!(refused.code == Some(2) && refused.stderr.contains("cannot be used with"), "{}", refused.stderr);
    migration.source().await.batch_execute("CREATE TABLE app.heir () INHERITS (audit.people)").await.unwrap();
    let refused = migration.with_servers("check", &["--include-schema", "app", "--estimate-seconds", "0"]).await;
    assert_eq!(refused.code, Some(3), "{}", refused.stdout);
    assert!(refused.stdout.contains("table app.heir (needs audit.people)"), "{}", refused.stdout);

    let mut running = migration.migrate(&["--include-table", "app.events"]);
    migration.wait_for_phase(&mut running, "following").await;
    running.kill().await;
    let refused = migration.migrate(&["--include-table", "app.*"]).wait().await;
    refused.assert_refused(3, &["--include-table 'app.events'", "--include-table 'app.*'"]);
    let tables = relations(&migration.target().await).await;
    assert_eq!(tables, ["app.events", "app.events_1", "parts.events_2"].iter().map(ToString::to_string).collect());
}
