//! `kill -9` at the worst moment of each phase of a TimescaleDB migration that has the source's jobs rest: after each, jobs and
//! restoring mode are right on both sides, and the same command goes on to a cutover and a comparison.
//!
//! A phase is held by locks, as in `tests/killed.rs`.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::live::{assert_equal, fill, nothing_runs_on_the_target_yet};
use crate::support::process::Running;
use crate::support::timescale::{servers, timescale_available};
use crate::support::{Migration, is_blocked, until_true};

const PAUSED: [&str; 5] =
    ["--replica-identity-full", "--no-reverse", "--pause-source-jobs", "--queue-max-bytes", "64MiB"];
const CUTOVER: [&str; 4] = ["--yes", "--no-reverse", "--max-write-stall", "100s"];

/// The jobs that run.
async fn running_jobs(client: &Client) -> BTreeSet<i32> {
    let rows = client.query("SELECT id FROM _timescaledb_catalog.bgw_job WHERE id >= 1000 AND scheduled", &[]).await;
    rows.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Those of the source rest, and it is known durably which of them ran; on the target nothing runs and nobody restores.
async fn jobs_rest(migration: &Migration, ran: &BTreeSet<i32>) {
    assert_eq!(running_jobs(&migration.source().await).await, BTreeSet::new(), "on the source");
    let noted = migration.ledger("SELECT id FROM walferry.timescaledb_paused_job").await;
    assert_eq!(noted.iter().map(|row| row.get(0)).collect::<BTreeSet<i32>>(), *ran, "in the ledger");
    let noted = std::fs::read_to_string(migration.directory().join("paused-jobs.json")).unwrap();
    assert_eq!(serde_json::from_str::<BTreeSet<i32>>(&noted).unwrap(), *ran, "in the state directory");
    let target = migration.target().await;
    let has_extension = "SELECT count(*) > 0 FROM pg_extension WHERE extname = 'timescaledb'";
    if target.query_one(has_extension, &[]).await.unwrap().get(0) {
        nothing_runs_on_the_target_yet(migration).await;
    }
    let set =
        target.query("SELECT FROM pg_db_role_setting WHERE array_to_string(setconfig, ' ') LIKE '%restoring%'", &[]);
    assert!(set.await.unwrap().is_empty(), "nobody is put into restoring mode");
}

async fn zones_of_jobs(source: &Client) -> String {
    let zones = "SELECT string_agg(id || ' ' || coalesce(to_jsonb(j)->>'timezone', '-'), ', ' ORDER BY id) \
                 FROM _timescaledb_catalog.bgw_job j WHERE id >= 1000";
    source.query_one(zones, &[]).await.unwrap().get(0)
}

async fn takes_writes(migration: &Migration) -> bool {
    migration.source().await.batch_execute("INSERT INTO plain (n) VALUES (1)").await.is_ok()
}

async fn follows(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready", |status| status["ready_to_cutover"] == true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_each_phase_jobs_and_restoring_mode_are_right_and_it_goes_on() {
    if !timescale_available("kill -9 in each phase of a TimescaleDB migration, --pause-source-jobs") {
        return;
    }
    let servers = servers(&[], &[]).await;
    let migration = servers.migration("killed").await;
    let ran = is_killed_in_each_phase(&migration, None).await;
    assert_equal(&migration).await;
    a_clean_without_a_ledger_has_the_jobs_run_again(&migration, &ran).await;
}

/// All of it but the comparison, from this version of the extension. Answers the jobs that ran on the source.
pub(super) async fn is_killed_in_each_phase(migration: &Migration, version: Option<&str>) -> BTreeSet<i32> {
    let source = migration.source().await;
    fill(&source, version).await;
    source.batch_execute("CREATE TABLE plain (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int)").await.unwrap();
    let ran = running_jobs(&source).await;
    assert!(ran.len() >= 4, "{ran:?}");
    let zones = zones_of_jobs(&source).await;
    assert!(zones.contains("Europe/Berlin"), "{zones}");
    let resting = "SELECT count(*) >= 1 AND NOT bool_or(scheduled) FROM _timescaledb_catalog.bgw_job WHERE id >= 1000";
    let held = migration.source().await;
    let holder = migration.target().await;

    // Preparing: the slot waits for a transaction. What is set on the source by then is in the ledger.
    held.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    for _ in 0..2 {
        let running = migration.migrate(&PAUSED);
        let slot = "SELECT count(*) = 1 FROM pg_replication_slots WHERE active AND confirmed_flush_lsn IS NULL";
        until_true(&source, slot).await;
        running.kill().await;
        jobs_rest(migration, &ran).await;
        let first = "SELECT bool_and(value IS NULL) FROM walferry.timescaledb_setting";
        assert!(migration.ledger(first).await[0].get::<_, bool>(0), "what was set before the first try");
    }
    held.batch_execute("COMMIT").await.unwrap();

    // The schema: its transaction waits for another that makes a table of the same name.
    holder.batch_execute("BEGIN; CREATE TABLE public.devices ()").await.unwrap();
    let running = migration.migrate(&PAUSED);
    is_blocked(&migration.target().await, "CREATE TABLE public.devices").await;
    // A chunk whose compressed rows are gone when it is its turn, and whose indexes are among the items of the schema.
    let decompress = "SELECT decompress_chunk(c) FROM show_chunks('metrics', newer_than => '2025-01-04 00:00Z'::timestamptz, \
                      older_than => '2025-01-05 00:00Z'::timestamptz) c";
    source.batch_execute(decompress).await.unwrap();
    running.kill().await;
    jobs_rest(migration, &ran).await;
    // What it left is ended by the next start; nothing of it has become visible.
    held.batch_execute("BEGIN; LOCK TABLE devices IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let running = migration.migrate(&PAUSED);
    let one_waits = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                     AND query LIKE '%CREATE TABLE public.devices%' AND pid <> pg_backend_pid()";
    until_true(&migration.target().await, one_waits).await;
    holder.batch_execute("ROLLBACK").await.unwrap();

    // The copy: all but one table, which somebody holds on the source.
    let left =
        "SELECT count(*) = 1 AND min(definition->>'name') = 'devices' FROM walferry.source_table WHERE NOT copied";
    until_true(&holder, left).await;
    running.kill().await;
    jobs_rest(migration, &ran).await;
    held.batch_execute("COMMIT").await.unwrap();

    // Going on without the option has the jobs run again, and with it rest again.
    let mut running = migration.migrate(&["--replica-identity-full", "--no-reverse", "--queue-max-bytes", "64MiB"]);
    follows(migration, &mut running).await;
    assert_eq!(running_jobs(&source).await, ran);
    assert_eq!(zones_of_jobs(&source).await, zones, "of jobs that rested and run again");
    running.kill().await;
    let mut running = migration.migrate(&PAUSED);
    until_true(&source, resting).await;

    // Following, with a chunk that its session did not publish: it is published, and what is older is waited out.
    follows(migration, &mut running).await;
    held.batch_execute("SET timescaledb.enable_chunk_auto_publication = off").await.unwrap();
    held.batch_execute("INSERT INTO metrics VALUES ('2025-02-01 00:00Z', 1, 'unpublished', 1)").await.unwrap();
    held.batch_execute("BEGIN; INSERT INTO metrics VALUES ('2025-02-01 02:00Z', 1, 'open', 1)").await.unwrap();
    let published = "SELECT count(*) > 0 FROM pg_publication_tables p JOIN timescaledb_information.chunks k \
         ON k.chunk_schema = p.schemaname AND k.chunk_name = p.tablename WHERE k.range_start >= '2025-02-01 00:00Z'";
    until_true(&source, published).await;
    running.kill().await;
    jobs_rest(migration, &ran).await;
    held.batch_execute("COMMIT").await.unwrap();
    let mut running = migration.migrate(&PAUSED);
    until_true(&holder, "SELECT count(*) = 2 FROM public.metrics WHERE time >= '2025-02-01 00:00Z'").await;
    follows(migration, &mut running).await;

    // The drain: it has the locks, and waits for the apply. What that waits for is written while it tries to lock, and held up.
    held.batch_execute("BEGIN; UPDATE devices SET name = 'held up' WHERE id = 1").await.unwrap();
    let cutover = migration.start("cutover", &CUTOVER);
    is_blocked(&source, "LOCK TABLE ONLY").await;
    holder.batch_execute("BEGIN; LOCK TABLE public.devices IN SHARE MODE").await.unwrap();
    held.batch_execute("COMMIT").await.unwrap();
    let locked =
        "SELECT count(*) > 0 FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND granted AND locktype = 'relation'";
    until_true(&source, locked).await;
    is_blocked(&migration.target().await, "devices").await;
    running.kill().await;
    cutover.wait().await;
    jobs_rest(migration, &ran).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    let mut running = migration.migrate(&PAUSED);
    follows(migration, &mut running).await;
    assert!(takes_writes(migration).await, "the fence is lifted");

    // The deciding commit waits for a reader, and never comes.
    holder.batch_execute("BEGIN; LOCK TABLE public.plain IN ACCESS SHARE MODE").await.unwrap();
    let mut cutover = migration.start("cutover", &CUTOVER);
    let blocked = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND strpos(query, 'cut_over') > 0 AND pid <> pg_backend_pid()";
    while !migration.ledger(blocked).await[0].get::<_, bool>(0) {
        assert!(cutover.is_alive(), "{}\n{}", cutover.log(), running.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    running.kill().await;
    cutover.wait().await;
    jobs_rest(migration, &ran).await;
    let mut running = migration.migrate(&PAUSED);
    follows(migration, &mut running).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert!(takes_writes(migration).await, "the fence is lifted");

    // It is decided, and what comes behind the decision is not done yet. The old primary's jobs go on resting, the new one's run, and
    // find nothing to refresh, so that both sides can be compared.
    let source = migration.source().await;
    source.batch_execute("CALL refresh_continuous_aggregate('hourly', NULL, NULL)").await.unwrap();
    drop(source);
    let refreshed = "SELECT count(*) = 2 FROM hourly WHERE bucket >= '2025-02-01 00:00Z'";
    until_true(&migration.target().await, refreshed).await;
    follows(migration, &mut running).await;
    let (reached, gate) = (migration.files().join("reached"), migration.files().join("gate"));
    std::fs::write(&gate, "").unwrap();
    let hook = format!("touch '{}'; while [ -e '{}' ]; do sleep 0.05; done", reached.display(), gate.display());
    let mut cutover = migration.start("cutover", &[&CUTOVER[..], &["--on-switch", &hook]].concat());
    while !reached.exists() {
        assert!(cutover.is_alive(), "{}", cutover.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    running.kill().await;
    cutover.wait().await;
    std::fs::remove_file(&gate).unwrap();
    assert_eq!(running_jobs(&migration.target().await).await, ran, "on the new primary");
    assert_eq!(running_jobs(&migration.source().await).await, BTreeSet::new(), "on the old primary");
    assert!(!takes_writes(migration).await, "no second primary");
    let ended = migration.migrate(&PAUSED).wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(running_jobs(&migration.source().await).await, BTreeSet::new(), "still");

    // With the rest of what was set for the migration, `clean` gives the jobs back.
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    assert_eq!(running_jobs(&migration.source().await).await, ran);
    let set = "SELECT NOT EXISTS (SELECT FROM pg_db_role_setting) AND NOT EXISTS (SELECT FROM pg_file_settings \
               WHERE name LIKE 'timescaledb.%' AND sourcefile LIKE '%auto.conf')";
    until_true(&migration.source().await, set).await;
    ran
}

/// The same two databases once more: the operator gives up, and has dropped what was on the target.
async fn a_clean_without_a_ledger_has_the_jobs_run_again(migration: &Migration, ran: &BTreeSet<i32>) {
    let target = migration.target().await;
    target
        .batch_execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP EXTENSION IF EXISTS timescaledb CASCADE")
        .await
        .unwrap();
    let running = migration.migrate(&PAUSED);
    let source = migration.source().await;
    until_true(&source, "SELECT NOT bool_or(scheduled) FROM _timescaledb_catalog.bgw_job WHERE id >= 1000").await;
    running.kill().await;
    target.batch_execute("DROP SCHEMA walferry CASCADE").await.unwrap();
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    assert_eq!(running_jobs(&source).await, *ran);
    assert!(cleaned.stdout.contains("runs again"), "{}", cleaned.stdout);
}
