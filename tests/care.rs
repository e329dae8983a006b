//! Care for the source (H28): the copy keeps to its rate and its jobs, rests for standbys that lag, gives a slot up only when it was
//! told to, and never opens more connections than it may.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Client;
use walferry::demo::server::StopMode;

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, until, until_true};

/// About 16 MB, in parts of 256 KiB with `SPLIT`: a chunk or two each.
const LARGE: &str = "CREATE TABLE large (id int PRIMARY KEY, body text NOT NULL); \
    ALTER TABLE large ALTER body SET STORAGE PLAIN; \
    INSERT INTO large SELECT i, repeat(md5(i::text), 25) FROM generate_series(1, 20000) i; ANALYZE large";
const SPLIT: [&str; 2] = ["--split-above", "1MiB"];
/// So slow that the copy of `LARGE` takes half an hour.
const CRAWL: &str = "8KiB";

/// No more was copied since then than `CRAWL` allows: what came with the time (of a slow machine only more), what is kept of a
/// second, and a chunk on credit (128 KiB, and what one read of the socket brings beyond that).
#[track_caller]
fn assert_crawled(status: &Value, since: Instant) {
    let copied = status["copy"]["bytes_done"].as_u64().unwrap();
    let allowed = 8192 * (since.elapsed().as_secs() + 2) + (400 << 10);
    assert!(copied <= allowed, "{copied} bytes were copied, and {allowed} were allowed: {status:#}");
}

async fn tune(migration: &Migration, arguments: &[&str]) -> Value {
    let tuned = migration.with_directory("tune", &[arguments, &["--json"]].concat()).await;
    assert_eq!(tuned.code, Some(0), "{}", tuned.stderr);
    tuned.json()
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

/// Waits until so many jobs copy, by the status and by the server.
async fn copying_jobs(migration: &Migration, running: &mut Running, source: &Client, jobs: u32) {
    let what = format!("{jobs} copy jobs");
    migration
        .wait_for_status(running, &what, |status| {
            status["phase"] == "copying" && status["copy"]["jobs"] == jobs && status["copy"]["bytes_done"] != 0
        })
        .await;
    let at_work = format!(
        "SELECT count(*) = {jobs} FROM pg_stat_activity WHERE application_name LIKE 'walferry/%' \
         AND backend_type = 'client backend' AND query ~ '^(BEGIN ISOLATION|LOCK TABLE ONLY|COPY|ROLLBACK)'"
    );
    until_true(source, &at_work).await;
}

fn assert_copying(status: &Value) {
    assert_eq!(status["phase"], "copying", "{status:#}");
    assert_eq!(status["copy"]["tables_done"], 0, "{status:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h28_rate_and_jobs_of_a_running_copy_are_tuned_and_stay_so_over_a_restart() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source.batch_execute(LARGE).await.unwrap();
    migration.with_directory("tune", &["--copy-jobs", "2"]).await.assert_refused(1, &["no migration is running"]);

    let begun = Instant::now();
    let mut running = migration.migrate(&[&SPLIT[..], &["--copy-rate", CRAWL, "--copy-jobs", "1"]].concat());
    copying_jobs(&migration, &mut running, &source, 1).await;
    let tuned = tune(&migration, &["--copy-jobs", "4"]).await;
    assert_eq!((&tuned["copy_jobs"], &tuned["copy_rate_bytes_per_second"]), (&4.into(), &8192.into()));
    copying_jobs(&migration, &mut running, &source, 4).await;
    let status = migration.status().await.unwrap();
    assert_copying(&status);
    assert_eq!(status["copy"]["jobs_max"], 4);
    assert_eq!(status["copy"]["rate_max_bytes_per_second"], 8192);
    assert_crawled(&status, begun);

    // Too many jobs end after their part; the parts have to end for that.
    tune(&migration, &["--copy-jobs", "2", "--copy-rate", "512KiB"]).await;
    copying_jobs(&migration, &mut running, &source, 2).await;
    tune(&migration, &["--copy-rate", CRAWL]).await;
    assert_copying(&migration.status().await.unwrap());
    let shown = migration.with_directory("status", &[]).await.stdout;
    let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(shown.contains("of at most 8.0 KiB/s by 2 jobs"), "{shown}");
    running.kill().await;

    let begun = Instant::now();
    let mut running = migration.migrate(&SPLIT);
    copying_jobs(&migration, &mut running, &source, 2).await;
    let tuned = tune(&migration, &[]).await;
    assert_eq!(
        (&tuned["copy_jobs"], &tuned["copy_rate_bytes_per_second"]),
        (&2.into(), &8192.into()),
        "as it was tuned"
    );
    let status = migration.status().await.unwrap();
    assert_copying(&status);
    assert_crawled(&status, begun);
    running.kill().await;

    // An option of this start wins; and what it does not name stays as it was tuned.
    let mut running = migration.migrate(&[&SPLIT[..], &["--copy-rate", "7KiB"]].concat());
    let status = migration.wait_for_status(&mut running, "copy", |status| status["copy"]["jobs"] != 0).await;
    assert_eq!(status["copy"]["rate_max_bytes_per_second"], 7 << 10);
    assert_eq!(status["copy"]["jobs_max"], 2);
    assert_copying(&status);
    // The rest of it would take half an hour.
    let tuned = migration.with_directory("tune", &["--copy-rate", "off"]).await;
    assert_eq!(tuned.stdout, "copy jobs 2, copy rate off, standby lag 30.0 s\n", "{}", tuned.stderr);
    ready(&migration, &mut running).await;
    running.terminate().await;

    // What a comparison exchanges keeps to the rate too; here it is everything.
    migration.target().await.batch_execute("UPDATE large SET body = 'x'").await.unwrap();
    let begun = Instant::now();
    let mut running = migration.migrate(&["--recopy", "public.large", "--copy-rate", CRAWL]);
    let some = |status: &Value| status["phase"] == "copying" && status["copy"]["bytes_done"] != 0;
    migration.wait_for_status(&mut running, "exchange", some).await;
    tune(&migration, &["--copy-jobs", "3"]).await;
    let status = migration.status().await.unwrap();
    assert_copying(&status);
    assert_crawled(&status, begun);
    tune(&migration, &["--copy-rate", "off"]).await;
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h28_the_copy_rests_while_a_standby_of_the_source_lags() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source.batch_execute(LARGE).await.unwrap();
    let settings = [
        ("fsync", "off"),
        ("max_connections", "60"),
        ("max_prepared_transactions", "5"),
        ("wal_receiver_status_interval", "1"),
    ];
    let standby = servers.source.start_standby("reserve", &settings).await.unwrap();
    let replay = standby.connect("postgres").await.unwrap();
    until_true(&source, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'").await;

    let arguments = ["--copy-rate", CRAWL, "--max-standby-lag", "2s", "--http-addr", "off"];
    let mut running = migration.migrate(&[&SPLIT[..], &arguments].concat());
    migration.wait_for_status(&mut running, "copying", |status| status["copy"]["jobs"] != 0).await;
    replay.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
    until_true(&replay, "SELECT pg_get_wal_replay_pause_state() = 'paused'").await;
    let application = Application::start(&migration.source_url, 1);
    source.batch_execute("CREATE TABLE other (id int)").await.unwrap();
    let waits = |status: &Value| status["copy"]["waits_for"].as_str().is_some_and(|whom| whom.contains("reserve"));
    migration.wait_for_status(&mut running, "rest", waits).await;
    replay.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
    let status = migration
        .wait_for_status(&mut running, "end of the rest", |status| status["copy"]["waits_for"].is_null())
        .await;
    let count = |status: &Value, words: &str| {
        let events = status["events"].as_array().unwrap();
        events.iter().filter(|event| event["text"].as_str().unwrap().contains(words)).count()
    };
    let (begins, ends) = ("more than --max-standby-lag 2.0 s: the copy waits", "of waiting for the source's standbys");
    assert_eq!((count(&status, begins), count(&status, ends)), (1, 1), "{status:#}");

    // Again, and from now on only the standby is in the way.
    replay.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
    migration.wait_for_status(&mut running, "rest", waits).await;
    tune(&migration, &["--copy-rate", "off"]).await;
    for _ in 0..10 {
        let status = migration.status().await.unwrap();
        assert_copying(&status);
        assert!(waits(&status) && status["attention"][0].as_str().unwrap().contains("standby reserve"), "{status:#}");
        assert_eq!((count(&status, begins), count(&status, ends)), (2, 1), "{status:#}");
    }
    let shown = migration.with_directory("status", &[]).await.stdout;
    let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(shown.contains("the copy waits for the source's standby reserve"), "{shown}");
    tune(&migration, &["--max-standby-lag", "off"]).await;
    migration.ready_but_for_the_source(&mut running).await;
    application.stop().await;
    running.terminate().await;
}

/// Makes the slot keep WAL: a transaction that stays open, and files of WAL after it.
async fn let_the_slot_keep(migration: &Migration, files: u32) -> Client {
    let open = migration.source().await;
    open.batch_execute("BEGIN; INSERT INTO large SELECT min(id) - 1, '' FROM large").await.unwrap();
    let source = migration.source().await;
    for _ in 0..files {
        source
            .batch_execute("SELECT pg_logical_emit_message(false, 'test', 'x'); SELECT pg_switch_wal()")
            .await
            .unwrap();
    }
    open
}

/// Waits until the slot has moved on, which it does when the server says which transactions run, as at a checkpoint.
async fn fine_again(migration: &Migration, running: &mut Running, source: &Client) {
    until("the slot keeps less", || async {
        source.batch_execute("CHECKPOINT; SELECT pg_logical_emit_message(true, 'test', '')").await.unwrap();
        let kept =
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), min(restart_lsn)) < 16 << 20 FROM pg_replication_slots";
        source.query_one(kept, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    let fine = |status: &Value| {
        status["attention"] == serde_json::json!([]) && status["source"]["retained_wal_bytes"].as_u64() < Some(16 << 20)
    };
    migration.wait_for_status(running, "less WAL", fine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h28_a_slot_that_keeps_too_much_wal_is_named_and_given_up_only_when_that_was_said() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source.batch_execute(LARGE).await.unwrap();
    let mut running = migration.migrate(&["--source-wal-max", "32MiB"]);
    ready(&migration, &mut running).await;
    assert_eq!(migration.status().await.unwrap()["attention"], serde_json::json!([]));
    let open = let_the_slot_keep(&migration, 5).await;
    let too_much = |status: &Value| status["attention"].to_string().contains("--source-wal-max 32.0 MiB");
    let status = migration.wait_for_status(&mut running, "too much WAL", too_much).await;
    assert!(status["events"].to_string().contains("its disk can fill up"), "{status:#}");
    assert_eq!(status["ready_to_cutover"], true, "that is no reason to stay: {status:#}");
    open.batch_execute("COMMIT").await.unwrap();
    fine_again(&migration, &mut running, &source).await;
    running.terminate().await;
    let slots = "SELECT count(*) FROM pg_replication_slots";
    assert_eq!(source.query_one(slots, &[]).await.unwrap().get::<_, i64>(0), 1, "it was only to be said");

    let give_up = ["--source-wal-max", "32MiB", "--on-source-wal-max", "give-up"];
    let mut running = migration.migrate(&give_up);
    ready(&migration, &mut running).await;
    fine_again(&migration, &mut running, &source).await;
    let open = let_the_slot_keep(&migration, 5).await;
    let given_up = ["was given up to save the source", "walferry resync"];
    running.wait().await.assert_refused(3, &given_up);
    assert_eq!(source.query_one(slots, &[]).await.unwrap().get::<_, i64>(0), 0, "the slot holds back the WAL");
    open.batch_execute("COMMIT").await.unwrap();
    source.batch_execute("DELETE FROM large WHERE id % 1000 = 0; INSERT INTO large VALUES (-100, '')").await.unwrap();
    // Later starts say the same, with whatever options.
    migration.migrate(&[]).wait().await.assert_refused(3, &given_up);
    migration.migrate(&["--recopy", "public.large"]).wait().await.assert_refused(3, &given_up);

    let mut resync = migration.resync(&[]);
    ready(&migration, &mut resync).await;
    resync.terminate().await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

/// The most sessions of walferry's that a server has had, looked at all the time.
struct Sampler {
    most: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Sampler {
    fn start(client: Client) -> Sampler {
        let (most, stop) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, stopped) = (Arc::clone(&most), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'walferry%'";
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(row) = client.query_one(sessions, &[]).await {
                    seen.fetch_max(row.get(0), Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        });
        Sampler { most, stop, task }
    }

    async fn most(self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.most.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h28_a_migration_never_opens_more_connections_than_it_may() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 5_000).await;
    migration.source().await.batch_execute(LARGE).await.unwrap();
    for (option, least) in [("--max-source-connections", "8 at least"), ("--max-target-connections", "10 at least")] {
        migration.migrate(&[option, "7"]).wait().await.assert_refused(2, &[option, least]);
    }

    // From another database: the cutover ends all other sessions of this one.
    let on_source = Sampler::start(servers.source.connect("postgres").await.unwrap());
    let on_target = Sampler::start(servers.target.connect("postgres").await.unwrap());
    let application = Application::start(&migration.source_url, 2);
    let caps = ["--max-source-connections", "8", "--max-target-connections", "11"];
    let wished = ["--copy-jobs", "6", "--index-jobs", "6", "--apply-workers", "6", "--copy-rate", "2MiB"];
    let mut running = migration.migrate(&[&SPLIT[..], &caps, &wished].concat());
    migration.wait_for_status(&mut running, "copy", |status| status["copy"]["jobs"] == 2).await;
    let tuned = tune(&migration, &["--copy-jobs", "5", "--copy-rate", "off"]).await;
    assert_eq!((&tuned["copy_jobs"], &tuned["copy_jobs_max"]), (&2.into(), &2.into()), "no more fit");
    ready(&migration, &mut running).await;
    let workers = migration.ledger("SELECT apply_workers FROM walferry.migration").await;
    assert_eq!(workers[0].get::<_, i32>(0), 2);
    let status = migration.status().await.unwrap();
    for (side, max) in [("source", 8), ("target", 11)] {
        let numbers = &status["connections"][side];
        let (now, peak) = (numbers["now"].as_u64().unwrap(), numbers["peak"].as_u64().unwrap());
        assert!(now >= 3 && now <= peak && peak <= max, "{numbers}");
        assert_eq!(numbers["max"], max);
    }

    // With fewer connections it cannot go on, since its apply workers are there to stay.
    running.terminate().await;
    let refused = migration.migrate(&["--max-target-connections", "10"]).wait().await;
    refused.assert_refused(3, &["began with 2 apply workers, and needs 11"]);

    // On the way back the source is what the target is now, and that is known before.
    let mut running = migration.migrate(&caps);
    ready(&migration, &mut running).await;
    let refused = migration.with_directory("cutover", &["--yes"]).await;
    refused.assert_refused(5, &["there would be no way back", "--max-source-connections 11 or more"]);
    running.terminate().await;
    let on_source_before = on_source.most().await;
    assert!(on_source_before <= 8, "{on_source_before} sessions on the source");

    let on_source = Sampler::start(servers.source.connect("postgres").await.unwrap());
    let mut running = migration.migrate(&["--max-source-connections", "11", "--max-target-connections", "11"]);
    ready(&migration, &mut running).await;
    application.goes_on(20).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    application.stop().await;
    migration.wait_for_status(&mut running, "the way back", |status| status["direction"] == "back").await;
    ready(&migration, &mut running).await;
    let switchback = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(switchback.code, Some(0), "{}\n{}", switchback.stderr, running.log());
    let ended = running.wait().await;
    assert!(!ended.stderr.contains("more connections to a server are needed"), "{}", ended.stderr);
    let (source, target) = (on_source.most().await, on_target.most().await);
    println!("at most {source} and {target} sessions");
    assert!(source <= 11 && target <= 11, "{source} sessions on the source, {target} on the target");
    assert!(source >= 6 && target >= 6, "{source} and {target} were all that was seen");
    migration.assert_equal().await;

    let verify = migration.with_directory("verify", &["--max-source-connections", "1"]).await;
    verify.assert_refused(2, &["needs 2 connections"]);
    let verify = migration.with_directory("verify", &["--max-source-connections", "2"]).await;
    assert_eq!(verify.code, Some(0), "{}", verify.stderr);
}

/// The server's own rule is to wait until a walsender has sent all WAL, for as long as the other side says that it is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_shuts_down_does_not_wait_for_a_queue_that_is_full() {
    let mut servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source.batch_execute("CREATE TABLE large (id int PRIMARY KEY, body text NOT NULL)").await.unwrap();
    let mut running = migration.migrate(&["--queue-max-bytes", "2MiB"]);
    ready(&migration, &mut running).await;

    let holder = migration.target().await;
    holder.batch_execute("BEGIN; LOCK TABLE large").await.unwrap();
    // More than the queue and the sockets on the way hold, in transactions as small as a queue of this size wants them.
    for part in 0..14 {
        let rows = format!(
            "INSERT INTO large SELECT i + {part} * 2000, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 30 + i % 2)) \
             FROM generate_series(1, 2000) i"
        );
        source.batch_execute(&rows).await.unwrap();
    }
    migration.wait_for_status(&mut running, "a full queue", |status| status["queue"]["full"] == true).await;
    drop(source);
    servers.source.stop(StopMode::Fast).await.unwrap();
    servers.source.restart().await.unwrap();
    holder.batch_execute("ROLLBACK").await.unwrap();
    // Ready before all of that has come it may show itself, for a moment, and not be.
    until_true(&holder, "SELECT count(*) = 28000 FROM large").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
