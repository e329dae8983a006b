//! `clean` leaves nothing behind, wherever a migration was given up.

use crate::support::load::{self, Application};
use crate::support::{Migration, Servers, hold_pg_dump, is_blocked, until_true};

async fn ready(migration: &Migration, running: &mut crate::support::process::Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

/// Cleans up, and looks at both servers and the disk.
async fn assert_cleaned(migration: &Migration, phase: &str) {
    assert!(!migration.left_over().await.is_empty(), "{phase}: there is something to clean");
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{phase}: {}", clean.stderr);
    assert!(clean.stdout.contains("removed "), "{phase}: {}", clean.stdout);
    assert_eq!(migration.left_over().await, Vec::<String>::new(), "{phase}");
    // The application's way is free.
    migration.source().await.batch_execute("UPDATE app.heavy SET n = n + 1 WHERE id = 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_after_a_cutover() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 2_000).await;
    let application = Application::start(&migration.source_url, 2);
    application.goes_on(10).await;
    // A setting of the operator's own comes back as it was.
    let own = "ALTER DATABASE shop SET default_transaction_read_only = off; ALTER DATABASE shop SET work_mem = '5MB'";
    migration.source().await.batch_execute(own).await.unwrap();
    let settings = "SELECT unnest(setconfig) FROM pg_db_role_setting ORDER BY 1";
    let settings_of = |client: tokio_postgres::Client| async move {
        let rows = client.query(settings, &[]).await.unwrap();
        rows.into_iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    let before = settings_of(migration.source().await).await;

    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    // While it runs, nothing is taken from it.
    let refused = migration.with_directory("clean", &[]).await;
    refused.assert_refused(3, &["the migration is still running", "Stop it first"]);
    application.goes_on(20).await;
    ready(&migration, &mut running).await;

    migration.cut_over(running).await;
    application.stop().await;
    let closed = migration.source().await.batch_execute("UPDATE app.heavy SET n = 0").await;
    assert_eq!(closed.unwrap_err().code().unwrap().code(), "25006", "new sessions are read-only by default");
    let clean = migration.with_directory("clean", &["--json"]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    let removed = clean.json()["removed"].to_string();
    for what in ["slot ", "publication ", "ledger", "fence", "state directory"] {
        assert!(removed.contains(what), "{what} in {removed}");
    }
    assert_eq!(settings_of(migration.source().await).await, before);
    migration.source().await.batch_execute("ALTER DATABASE shop RESET ALL").await.unwrap();
    assert_eq!(migration.left_over().await, Vec::<String>::new());
    // There is nothing any more; that is said, and is no panic.
    let again = migration.with_directory("clean", &[]).await;
    again.assert_refused(1, &["there is no state directory", "--source"]);
    let again = migration.with_servers("clean", &[]).await;
    assert_eq!((again.code, again.stdout.as_str()), (Some(0), "Nothing was left.\n"), "{}", again.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_of_a_migration_that_was_abandoned_in_any_phase() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 10_000).await;
    let source = migration.source().await;

    // Preparing: the slot is being made, by a session that does not notice that nobody waits for it.
    source.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let running = migration.migrate(&[]);
    until_true(&migration.source().await, "SELECT active FROM pg_replication_slots").await;
    running.kill().await;
    assert_cleaned(&migration, "making the slot").await;
    source.batch_execute("COMMIT").await.unwrap();

    // Preparing: the slot is there.
    let dump = hold_pg_dump(&mut migration);
    let running = migration.migrate(&[]);
    dump.is_reached().await;
    running.kill().await;
    assert_cleaned(&migration, "dumping the schema").await;
    dump.release();

    // Restoring the schema.
    let holder = migration.target().await;
    holder.batch_execute("BEGIN; CREATE SCHEMA app").await.unwrap();
    let running = migration.migrate(&[]);
    is_blocked(&migration.target().await, "CREATE SCHEMA app").await;
    running.terminate().await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_cleaned(&migration, "restoring the schema").await;

    // Copying; and it is refused while it runs.
    let running = migration.migrate(&["--split-above", "512kB"]);
    until_true(&migration.target().await, "SELECT count(*) >= 1 FROM walferry.part WHERE copied").await;
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN SHARE MODE").await.unwrap();
    is_blocked(&migration.target().await, "COPY \"app\".\"big\"").await;
    migration.with_directory("clean", &[]).await.assert_refused(3, &["still running"]);
    running.kill().await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_cleaned(&migration, "copying").await;
    // What is on the target is the operator's to remove.
    assert!(migration.target().await.query("SELECT FROM app.big LIMIT 1", &[]).await.is_ok());
    start_over(&migration).await;

    // Following.
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    // A session that waits for a lock looks after its client only when it has it: it is ended too.
    holder.batch_execute("BEGIN; LOCK TABLE app.heavy").await.unwrap();
    source.batch_execute("UPDATE app.heavy SET n = n + 1").await.unwrap();
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name LIKE 'walferry/%' AND wait_event_type = 'Lock'";
    until_true(&migration.target().await, waits).await;
    running.kill().await;
    assert_cleaned(&migration, "following").await;
    let left = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'walferry/%'";
    assert_eq!(holder.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    holder.batch_execute("ROLLBACK").await.unwrap();
    start_over(&migration).await;

    // In the middle of a cutover, with the source closed.
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    holder.batch_execute("BEGIN; ALTER SEQUENCE app.counter CACHE 1").await.unwrap();
    let cutover = migration.start("cutover", &["--yes", "--no-reverse"]);
    is_blocked(&migration.target().await, "setval").await;
    running.kill().await;
    cutover.wait().await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_cleaned(&migration, "cutting over").await;
    start_over(&migration).await;

    // And without the state directory: the servers know enough.
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    running.kill().await;
    std::fs::remove_dir_all(migration.directory()).unwrap();
    let clean = migration.with_servers("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(migration.left_over().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_identities_are_put_back_also_where_the_ledger_is_lost() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    let tables = "CREATE TABLE bare (a int); CREATE TABLE nothing (a int); ALTER TABLE nothing REPLICA IDENTITY NOTHING; \
        CREATE TABLE own (a int); ALTER TABLE own REPLICA IDENTITY FULL; INSERT INTO bare VALUES (1)";
    source.batch_execute(tables).await.unwrap();
    let mut running = migration.migrate(&["--replica-identity-full"]);
    ready(&migration, &mut running).await;
    running.kill().await;
    let identities = async |client: &tokio_postgres::Client| {
        let query = "SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class \
            WHERE relname IN ('bare', 'nothing', 'own')";
        client.query_one(query, &[]).await.unwrap().get::<_, String>(0)
    };
    assert_eq!(identities(&source).await, "bare f, nothing f, own f");
    target.batch_execute("DROP SCHEMA walferry CASCADE").await.unwrap();
    std::fs::remove_dir_all(migration.directory()).unwrap();
    let clean = migration.with_servers("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert!(clean.stdout.contains("REPLICA IDENTITY FULL of public.nothing on the source"), "{}", clean.stdout);
    for server in [&source, &target] {
        assert_eq!(identities(server).await, "bare d, nothing n, own f");
    }
    assert_eq!(migration.left_over().await, Vec::<String>::new());
}

/// An empty target again, for the next migration.
async fn start_over(migration: &Migration) {
    migration.target().await.batch_execute("DROP SCHEMA app CASCADE").await.unwrap();
}
