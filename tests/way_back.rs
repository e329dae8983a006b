//! The way back: after the cutover the old primary is kept current, and a switchback makes it the primary again.

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, is_blocked, until, until_true};

/// Follows, with an application that writes to the source.
async fn follows(servers: &Servers) -> (Migration, Application, Running) {
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 2_000).await;
    let application = Application::start(&migration.source_url, 3);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    (migration, application, running)
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

/// Cuts over with a way back, and moves the application to the new primary.
async fn cut_over_with_way_back(migration: &Migration, running: &mut Running, application: Application) -> Application {
    application.goes_on(30).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    assert_eq!(cutover.json()["reverse"], "armed");
    application.stop().await;
    let status = migration.wait_for_status(running, "the way back", |status| status["direction"] == "back").await;
    assert_eq!(status["phase"], "cut_over");
    let application = Application::start(&migration.target_url, 3);
    application.goes_on(60).await;
    application
}

/// Switches back; the old primary has all that was written since the cutover.
async fn switch_back(migration: &Migration, mut running: Running, application: Application) {
    ready(migration, &mut running).await;
    let switchback = migration.with_directory("switchback", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(switchback.code, Some(0), "{}\n{}", switchback.stderr, running.log());
    assert_eq!(switchback.json()["reverse"], "none");
    application.stop().await;
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(migration.status().await.unwrap()["phase"], "reversed");
    migration.assert_equal().await;
}

async fn shown(url: &str, setting: &str) -> String {
    crate::support::connect(url).await.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchback_leads_back_with_all_that_was_written_since_and_clean_leaves_nothing() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let always = "SELECT count(*) FROM pg_attribute WHERE attidentity = 'a' AND attrelid > 16383";
    let identities: i64 = migration.source().await.query_one(always, &[]).await.unwrap().get(0);
    assert!(identities > 0, "the application has a column that is GENERATED ALWAYS AS IDENTITY");
    let application = cut_over_with_way_back(&migration, &mut running, application).await;

    assert_eq!(shown(&migration.source_url, "default_transaction_read_only").await, "on");
    // The slot of the way there would keep the old primary's WAL.
    until_true(&migration.source().await, "SELECT count(*) = 0 FROM pg_replication_slots").await;
    let follows_back = |status: &serde_json::Value| status["direction"] == "back" && status["ready_to_cutover"] == true;
    migration.wait_for_status(&mut running, "the way back", follows_back).await;
    let again = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    again.assert_refused(5, &["has been cut over already", "walferry switchback"]);
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(3), "{}", clean.stderr);

    switch_back(&migration, running, application).await;
    assert_eq!(
        shown(&migration.source_url, "default_transaction_read_only").await,
        "off",
        "the old primary takes writes"
    );
    assert_eq!(shown(&migration.target_url, "default_transaction_read_only").await, "on", "and the other one none");
    assert_eq!(migration.source().await.query_one(always, &[]).await.unwrap().get::<_, i64>(0), identities);

    // The application goes on there, also with what its sequences give out.
    let application = Application::start(&migration.source_url, 3);
    application.goes_on(30).await;
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(migration.left_over().await, Vec::<String>::new());
    application.goes_on(10).await;
    application.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_way_back_goes_on_after_a_kill_at_any_time() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    for _ in 0..3 {
        running.kill().await;
        application.goes_on(40).await;
        running = migration.migrate(&[]);
        migration.wait_for_status(&mut running, "the way back", |status| status["direction"] == "back").await;
    }

    // Killed in the middle of a switchback: before the new primary is closed to writers, while the sequences are set, and while it
    // decides.
    let holder = migration.source().await;
    holder.batch_execute("SET default_transaction_read_only = off").await.unwrap();
    let points = [
        ("SELECT FROM walferry.migration FOR SHARE", "walferry.migration"),
        ("ALTER SEQUENCE app.counter CACHE 1", "setval"),
        ("LOCK TABLE app.big IN ACCESS SHARE MODE", "cut_over"),
    ];
    for (hold, blocked) in points {
        ready(&migration, &mut running).await;
        holder.batch_execute(&format!("BEGIN; {hold}")).await.unwrap();
        let switchback = migration.start("switchback", &["--yes", "--timeout", "60s", "--max-write-stall", "60s"]);
        is_blocked(&migration.source().await, blocked).await;
        running.kill().await;
        switchback.wait().await;
        if blocked == "walferry.migration" {
            holder.batch_execute("ROLLBACK").await.unwrap();
        }
        // It ends the session that could still decide.
        running = migration.migrate(&[]);
        // A session that began behind the fence is ended when it is lifted.
        until("the new primary takes writes again", || async {
            let client = crate::support::connect(&migration.target_url).await;
            let row = client.query_one("SHOW default_transaction_read_only", &[]).await.ok()?;
            (row.get::<_, &str>(0) == "off").then_some(())
        })
        .await;
        application.goes_on(30).await;
        holder.batch_execute("ROLLBACK").await.unwrap();
    }
    switch_back(&migration, running, application).await;
    let ended = migration.migrate(&[]).wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("has been switched back already"), "{}", ended.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchback_that_was_killed_while_the_new_primary_refuses_connections_lets_everybody_in_again() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    let holder = migration.source().await;
    holder.batch_execute("SET default_transaction_read_only = off").await.unwrap();
    holder.batch_execute("BEGIN; ALTER SEQUENCE app.counter CACHE 1").await.unwrap();
    ready(&migration, &mut running).await;
    let options = ["--yes", "--fence", "connections", "--timeout", "60s", "--max-write-stall", "60s"];
    let switchback = migration.start("switchback", &options);
    is_blocked(&migration.source().await, "setval").await;
    assert!(tokio_postgres::connect(&migration.target_url, tokio_postgres::NoTls).await.is_err(), "nobody gets in");
    running.kill().await;
    switchback.wait().await;
    let mut running = migration.migrate(&[]);
    application.goes_on(30).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    ready(&migration, &mut running).await;
    switch_back(&migration, running, application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn finish_ends_the_way_back_with_or_without_a_process_and_with_the_old_primary_gone() {
    let mut servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let early = migration.with_directory("finish", &[]).await;
    early.assert_refused(3, &["there is no way back to finish"]);
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    let finished = migration.with_directory("finish", &["--json"]).await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let target = migration.target().await;
    until_true(&target, "SELECT count(*) = 0 FROM pg_replication_slots").await;
    until_true(&target, "SELECT count(*) = 0 FROM pg_publication").await;
    application.goes_on(10).await;
    application.stop().await;
    let late = migration.with_directory("switchback", &["--yes"]).await;
    late.assert_refused(5, &["there is no way back: `walferry finish` has ended it"]);
    let late = migration.with_directory("cutover", &["--yes"]).await;
    late.assert_refused(5, &["has been cut over already"]);
    let ended = migration.migrate(&[]).wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(migration.left_over().await, Vec::<String>::new());

    let migration = servers.migration("second").await;
    load::fill(&migration.source().await, 100).await;
    let application = Application::start(&migration.source_url, 1);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    application.stop().await;
    running.kill().await;
    servers.source.stop(walferry::demo::server::StopMode::Immediate).await.unwrap();
    // By a process that has only just begun, too.
    let running = migration.migrate(&[]);
    until("it answers", || async {
        migration.status().await.filter(|status| status["direction"] == "back" && status["process_alive"] == true)
    })
    .await;
    let finished = migration.with_directory("finish", &[]).await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(running.wait().await.code, Some(0));
    until_true(&migration.target().await, "SELECT count(*) = 0 FROM pg_replication_slots").await;
    let again = migration.with_directory("finish", &[]).await;
    assert_eq!(again.code, Some(0), "nothing is left to do: {}", again.stderr);
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert!(clean.stderr.contains("the old server cannot be reached"), "{}", clean.stderr);
    until_true(&migration.target().await, "SELECT to_regnamespace('walferry') IS NULL").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn finish_undoes_a_switchback_that_was_cut_off_and_refuses_one_that_was_decided() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    ready(&migration, &mut running).await;
    let holder = migration.source().await;
    holder.batch_execute("SET default_transaction_read_only = off").await.unwrap();
    holder.batch_execute("BEGIN; ALTER SEQUENCE app.counter CACHE 1").await.unwrap();
    let switchback = migration.start("switchback", &["--yes", "--timeout", "60s", "--max-write-stall", "60s"]);
    is_blocked(&migration.source().await, "setval").await;
    running.kill().await;
    switchback.wait().await;
    assert_eq!(shown(&migration.target_url, "default_transaction_read_only").await, "on");
    holder.batch_execute("ROLLBACK").await.unwrap();
    let finished = migration.with_directory("finish", &[]).await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let late = migration.with_directory("switchback", &["--yes"]).await;
    late.assert_refused(5, &["there is no way back: `walferry finish` has ended it"]);
    application.goes_on(30).await;
    application.stop().await;
    assert_eq!(
        shown(&migration.target_url, "default_transaction_read_only").await,
        "off",
        "the new primary takes writes"
    );

    let migration = servers.migration("second").await;
    load::fill(&migration.source().await, 100).await;
    let application = Application::start(&migration.source_url, 1);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    switch_back(&migration, running, application).await;
    let finished = migration.with_directory("finish", &[]).await;
    finished.assert_refused(3, &["it has been switched back"]);
    let again = migration.with_directory("switchback", &["--yes"]).await;
    again.assert_refused(5, &["has been switched back already"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_was_resynced_or_cut_over_for_good_leaves_no_work_and_no_slot_behind() {
    let servers = Servers::start().await;
    let (migration, application, running) = follows(&servers).await;
    running.terminate().await;
    let mut running = migration.resync(&[]);
    ready(&migration, &mut running).await;
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    ready(&migration, &mut running).await;
    let log = running.log();
    let (_, back) = log.split_once("the way back is open").unwrap();
    assert!(!back.contains("comparing") && !back.contains("phase: copying"), "nothing is compared anew: {back}");
    switch_back(&migration, running, application).await;

    let migration = servers.migration("second").await;
    load::fill(&migration.source().await, 100).await;
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "a way back", |status| status["way_back"] == "ready").await;
    migration.cut_over(running).await;
    until_true(&migration.target().await, "SELECT count(*) = 0 FROM pg_replication_slots WHERE database = 'second'")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_nobody_waits_for_any_more_is_not_carried_out() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    migration.wait_for_status(&mut running, "a way back", |status| status["way_back"] == "ready").await;
    // The first holds the writers for a while; the second is refused, and not kept for later.
    let slow = ["--yes", "--max-write-stall", "25s", "--on-fence", "sleep 2; exit 1"];
    let first = migration.start("cutover", &slow);
    migration.wait_for_phase(&mut running, "cutting_over").await;
    migration.with_directory("cutover", &["--yes"]).await.assert_refused(5, &["another cutover is running"]);
    first.wait().await.assert_refused(5, &["during on-fence"]);
    ready(&migration, &mut running).await;
    application.goes_on(20).await;
    application.stop().await;
    assert_eq!(migration.status().await.unwrap()["phase"], "following");
    running.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h33_nothing_moves_the_slot_past_the_release() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers).await;
    migration.wait_for_status(&mut running, "a way back", |status| status["way_back"] == "ready").await;
    // For so long that the next move of the slot is due, and waits for the end of the cutover.
    let slow = ["--yes", "--json", "--max-write-stall", "25s", "--on-fence", "sleep 3"];
    let cutover = migration.with_directory("cutover", &slow).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    application.stop().await;
    let application = Application::start(&migration.target_url, 3);
    application.goes_on(30).await;
    migration.wait_for_status(&mut running, "the way back", |status| status["direction"] == "back").await;
    switch_back(&migration, running, application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_means_for_a_way_back_the_cutover_refuses_unless_told() {
    let servers = Servers::with(&[], &[("wal_level", "replica")]).await;
    let (migration, application, mut running) = follows(&servers).await;
    let refused = migration.with_directory("cutover", &["--yes"]).await;
    refused.assert_refused(
        5,
        &["there would be no way back", "wal_level is replica", "ALTER SYSTEM SET wal_level", "--no-reverse"],
    );
    application.goes_on(10).await;
    ready(&migration, &mut running).await;
    let done = migration.cut_over(running).await;
    assert_eq!(done["reverse"], "none");
    application.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h33_the_slot_of_the_way_back_is_made_while_following_and_no_cutover_waits_for_strangers_behind_its_fence() {
    let servers = Servers::start().await;
    // In another database, whose transactions a new slot waits for all the same.
    let stranger = servers.target.connect("postgres").await.unwrap();
    stranger.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let (migration, application, mut running) = follows(&servers).await;
    let refused = migration.with_directory("cutover", &["--yes", "--timeout", "3s"]).await;
    refused.assert_refused(
        5,
        &["making the way back ready, before the fence", "open on the target's cluster", "--no-reverse"],
    );
    assert!(
        migration.ledger("SELECT FROM walferry.migration WHERE fence IS NULL").await.len() == 1,
        "nothing was touched"
    );

    stranger.batch_execute("COMMIT").await.unwrap();
    until_true(
        &migration.target().await,
        "SELECT count(*) = 1 FROM pg_replication_slots WHERE confirmed_flush_lsn IS NOT NULL",
    )
    .await;
    // It is there now, and moves on: WAL is not kept for the whole time of following.
    let since: String = servers
        .target
        .connect("postgres")
        .await
        .unwrap()
        .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
        .await
        .unwrap()
        .get(0);
    until_true(&migration.target().await, &format!("SELECT confirmed_flush_lsn > '{since}' FROM pg_replication_slots"))
        .await;
    stranger.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let application = cut_over_with_way_back(&migration, &mut running, application).await;
    stranger.batch_execute("COMMIT").await.unwrap();
    switch_back(&migration, running, application).await;
}
