//! The cutover: given up without a trace, refused with a reason, and complete when it goes through.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, is_blocked, until, until_true};

async fn follows(servers: &Servers) -> (Migration, Application, Running) {
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 3_000).await;
    let application = Application::start(&migration.source_url, 3);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    (migration, application, running)
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

/// As if there had been no cutover.
async fn nothing_has_happened(migration: &Migration, running: &mut Running, application: &Application) {
    let source = migration.source().await;
    assert!(source.query("SELECT FROM pg_db_role_setting", &[]).await.unwrap().is_empty(), "the fence is lifted");
    let locks = "SELECT count(*) = 0 FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND locktype = 'relation'";
    until_true(&source, locks).await;
    let fence = migration.ledger("SELECT FROM walferry.migration WHERE fence IS NULL AND phase = 'following'").await;
    assert_eq!(fence.len(), 1);
    application.goes_on(20).await;
    migration.ready_but_for_the_source(running).await;
}

async fn shown(client: &Client, setting: &str) -> String {
    client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_that_is_given_up_leaves_no_fence_and_a_later_one_goes_through() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;

    // An application's transaction holds a lock for longer than the cutover may take; on no row that the others wait for.
    let long = migration.source().await;
    long.batch_execute(
        "SET application_name = 'the long one'; BEGIN; INSERT INTO app.heavy VALUES (100000, 0, 'long')",
    )
    .await
    .unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse", "--timeout", "5s"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["could not be locked", "the long one", "End the long transaction"]);
    nothing_has_happened(&migration, &mut running, &application).await;
    long.batch_execute("UPDATE app.heavy SET n = n + 1 WHERE id = 1; COMMIT").await.unwrap();
    drop(long);

    // The target is held up: that is seen before any writer has to wait for it.
    let holder = migration.target().await;
    holder.batch_execute("BEGIN; LOCK TABLE app.heavy IN SHARE MODE").await.unwrap();
    migration.source().await.batch_execute("UPDATE app.heavy SET n = n + 1 WHERE id = 1").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse", "--timeout", "6s", "--json"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["before the fence", "--timeout"]);
    assert_eq!(refused.stdout, "", "no outcome without a cutover");
    holder.batch_execute("ROLLBACK").await.unwrap();
    nothing_has_happened(&migration, &mut running, &application).await;

    // The database is closed already. Who reconnects behind the fence is not left with a session that cannot write.
    holder.batch_execute("BEGIN; ALTER SEQUENCE app.counter CACHE 1").await.unwrap();
    let cutover = migration.start("cutover", &["--yes", "--no-reverse", "--max-write-stall", "4s"]);
    is_blocked(&migration.target().await, "setval").await;
    let pooled = migration.source().await;
    assert_eq!(shown(&pooled, "default_transaction_read_only").await, "on");
    let refused = cutover.wait().await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["during settle", "follows again"]);
    until("the session from behind the fence is ended", || async { pooled.is_closed().then_some(()) }).await;
    assert_eq!(shown(&migration.source().await, "default_transaction_read_only").await, "off");
    holder.batch_execute("ROLLBACK").await.unwrap();
    nothing_has_happened(&migration, &mut running, &application).await;

    // The target refuses the decision itself: somebody has a lock on a table whose identity is to be restored.
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN ACCESS SHARE MODE").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["during switch", "lock timeout", "The fence is lifted"]);
    nothing_has_happened(&migration, &mut running, &application).await;
    holder.batch_execute("ROLLBACK").await.unwrap();

    migration.cut_over(running).await;
    application.stop().await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_stream_does_not_show_is_refused_by_name_until_it_is_waived() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let source = migration.source().await;

    // Committed after the switch, it would be lost.
    source.batch_execute("BEGIN; SELECT nextval('app.counter'); PREPARE TRANSACTION 'two phases'").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["1 prepared transactions", "ROLLBACK PREPARED", "pg_prepared_xacts"]);
    source.batch_execute("ROLLBACK PREPARED 'two phases'").await.unwrap();
    nothing_has_happened(&migration, &mut running, &application).await;

    let function = "CREATE FUNCTION app.added() RETURNS int LANGUAGE sql AS 'SELECT 1'";
    source.batch_execute(function).await.unwrap();
    source
        .batch_execute("CREATE TABLE app.late (id int PRIMARY KEY); CREATE INDEX note_body ON app.note (body)")
        .await
        .unwrap();
    source.batch_execute("CREATE TABLE app.late_too (id int PRIMARY KEY)").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["app.added", "app.late", "app.note_body", "--waive", "is new"]);
    nothing_has_happened(&migration, &mut running, &application).await;
    // One name at a time: to waive a table is not to waive those whose names begin alike.
    source.batch_execute("DROP TABLE app.late; DROP INDEX app.note_body").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    let named = |name: &str| {
        let (before, rest) = refused.stderr.split_once(name).unwrap_or_else(|| panic!("{name}: {}", refused.stderr));
        let kind = before.rsplit([';', ':']).next().unwrap().trim_start();
        format!("{kind}{name}{}", rest.split(" is new").next().unwrap())
    };
    let (added, late) = (named("app.added"), named("app.late_too"));
    println!("{added:?} {late:?}");
    let begins_alike = late.trim_end_matches("_too");
    let refused = migration
        .with_directory("cutover", &["--yes", "--no-reverse", "--waive", &added, "--waive", begins_alike])
        .await;
    refused.assert_refused(5, &["app.late_too"]);
    assert!(!refused.stderr.contains("app.added"), "waived: {}", refused.stderr);
    source.batch_execute("DROP TABLE app.late_too").await.unwrap();

    // The same on the target, as the hint says; then it goes through.
    migration.target().await.batch_execute(function).await.unwrap();
    application.goes_on(10).await;
    migration.ready_but_for_the_source(&mut running).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--no-reverse", "--waive", &added]).await;
    assert_eq!(cutover.code, Some(0), "{}", cutover.stderr);
    for step in ["check", "fence", "drain", "close", "settle", "switch", "release", "Switched at"] {
        assert!(cutover.stdout.contains(step), "{step} in:\n{}", cutover.stdout);
    }
    assert_eq!(running.wait().await.code, Some(0));
    application.stop().await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_switch_the_target_takes_the_writes_and_the_source_none() {
    let servers = Servers::start().await;
    let (migration, application, running) = follows(&servers).await;
    // A session that was there before, and one that waits for a lock when the switch comes.
    let early = migration.source().await;
    application.goes_on(30).await;
    migration.cut_over(running).await;
    let wrote = early.batch_execute("UPDATE app.heavy SET n = 0").await;
    assert!(wrote.is_err() && early.is_closed(), "sessions from before the switch are ended");
    let acknowledged = application.acknowledged();
    let source = migration.source().await;
    assert_eq!(shown(&source, "default_transaction_read_only").await, "on");
    for statement in ["UPDATE app.heavy SET n = 0", "SELECT nextval('app.counter')", "CREATE TABLE app.too_late ()"] {
        let refused = source.batch_execute(statement).await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "25006", "{statement}");
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(application.stop().await, acknowledged, "nothing is acknowledged on the source after the switch");
    migration.assert_equal().await;

    // The same application goes on at the target: no key comes twice, triggers and foreign keys are at work.
    let target = migration.target().await;
    let always: i64 = target
        .query_one("SELECT count(*) FROM information_schema.columns WHERE table_name = 'big' AND identity_generation = 'ALWAYS'", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(always, 1);
    let refused = target.batch_execute("INSERT INTO app.big (id, mood) VALUES (1, 'ok')").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "428C9", "GENERATED ALWAYS is back");
    let refused = target.batch_execute("INSERT INTO app.note (big_id) VALUES (-1)").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "23503", "foreign keys hold");
    let application = Application::start(&migration.target_url, 3);
    application.goes_on(100).await;
    application.stop().await;
    let touched = "SELECT touched > now() - interval '1 minute' FROM app.big WHERE id = 5";
    target.batch_execute("UPDATE app.big SET touched = '2000-01-01' WHERE id = 5").await.unwrap();
    assert!(target.query_one(touched, &[]).await.unwrap().get::<_, bool>(0), "triggers are at work");

    // The same commands again do no harm.
    let again = migration.migrate(&["--json"]).wait().await;
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert_eq!(again.json()["phase"], "cut_over");
    assert_eq!(migration.with_directory("status", &["--exit-code"]).await.code, Some(0));
    let again = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", again.stderr);
    assert_ne!(again.code, Some(0), "{}", again.stdout);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_asked_for_only_what_was_compared_is_cut_over() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let cutover = ["--yes", "--no-reverse", "--json", "--max-write-stall", "25s", "--require-verified", "1h"];
    migration
        .with_directory("cutover", &cutover)
        .await
        .assert_refused(5, &["have not been compared", "walferry verify"]);

    // No row that the application writes: it goes on, and would heal it.
    let planted = migration.target().await;
    planted.batch_execute("INSERT INTO app.heavy VALUES (200000, -1, 'planted')").await.unwrap();
    assert_eq!(migration.with_directory("verify", &[]).await.code, Some(4));
    migration.with_directory("cutover", &cutover).await.assert_refused(5, &["the two sides differ", "heavy"]);

    let repaired = migration.with_directory("repair", &[]).await;
    assert_eq!(repaired.code, Some(0), "{}", repaired.stderr);
    ready(&migration, &mut running).await;
    let equal = migration.with_directory("verify", &[]).await;
    assert_eq!(equal.code, Some(0), "{}{}", equal.stdout, equal.stderr);
    let done = migration.with_directory("cutover", &cutover).await;
    assert_eq!(done.code, Some(0), "{}\n{}", done.stderr, running.log());
    assert_eq!(done.json()["verified"], true);
    application.stop().await;
    assert_eq!(running.wait().await.code, Some(0));
    migration.assert_equal().await;
}

/// What the operator has taken away on the target as it went on the source is not to be given back there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identity_or_a_trigger_that_went_on_both_sides_stands_in_nobodys_way() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let tables = "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY); CREATE TABLE kept (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
        CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER gone AFTER INSERT ON kept FOR EACH ROW EXECUTE FUNCTION f(); ALTER TABLE kept ENABLE ALWAYS TRIGGER gone";
    let source = migration.source().await;
    source.batch_execute(tables).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    let change = "ALTER TABLE t ALTER id DROP IDENTITY; DROP TRIGGER gone ON kept";
    source.batch_execute(change).await.unwrap();
    migration.target().await.batch_execute(change).await.unwrap();
    migration.ready_but_for_the_source(&mut running).await;
    let mut options = vec!["--yes", "--no-reverse"];
    for waived in ["column id of table public.t", "trigger gone on table public.kept", "sequence public.t_id_seq"] {
        options.extend(["--waive", waived]);
    }
    let cutover = migration.with_directory("cutover", &options).await;
    assert_eq!(cutover.code, Some(0), "{}", cutover.stderr);
    assert_eq!(running.wait().await.code, Some(0));
    let identities = "SELECT string_agg(attrelid::regclass || ' ' || attidentity::text, ', ' ORDER BY 1) FROM pg_attribute \
                      WHERE attname = 'id' AND attrelid IN ('public.t'::regclass, 'public.kept'::regclass)";
    let row = migration.target().await.query_one(identities, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0).replace("public.", ""), "kept a, t ");
}
