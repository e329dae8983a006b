//! Servers that make one wait: what is waited for is said, and everything goes on by itself once it is over.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Client;
use walferry::demo::server::StopMode;

use crate::support::process::Running;
use crate::support::{Migration, Servers, connect, hold_pg_dump, is_blocked, programs, until, until_true};

const TABLES: &str = "CREATE TABLE item (id int PRIMARY KEY, v text); INSERT INTO item SELECT i, 'old' FROM generate_series(1, 1000) i; \
     CREATE TABLE other (id int PRIMARY KEY, v text); INSERT INTO other SELECT i, 'old' FROM generate_series(1, 1000) i";

async fn says(running: &mut Running, text: &str) {
    until(&format!("walferry says {text:?}"), || {
        assert!(running.is_alive(), "walferry ended before it said {text:?}:\n{}", running.log());
        let said = running.log().contains(text).then_some(());
        async move { said }
    })
    .await;
}

async fn ready(migration: &Migration, running: &mut Running) -> Value {
    migration.wait_for_status(running, "ready", |status| status["ready_to_cutover"] == true).await
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_and_prepared_transactions_are_named_and_a_pg_dump_is_let_be() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    run(&source, TABLES).await;
    // In another database, and prepared by a session that is gone: both hold the slot up all the same.
    let (report, prepared) = (servers.source.connect("postgres").await.unwrap(), migration.source().await);
    run(&report, "SET application_name = 'nightly report'; BEGIN; SELECT pg_current_xact_id()").await;
    run(&prepared, "BEGIN; INSERT INTO item VALUES (-1, 'prepared before'); PREPARE TRANSACTION 'it''s \"two\"'").await;
    drop(prepared);
    // A dump of the source holds ACCESS SHARE on everything, and its snapshot, from before the start to the end.
    let dump = migration.source().await;
    run(&dump, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; LOCK TABLE item, other IN ACCESS SHARE MODE; SELECT FROM item").await;

    let mut running = migration.migrate(&[]);
    let pid: i32 = report.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    says(&mut running, "the slot waits for the end of: ").await;
    says(&mut running, &format!("pid {pid} (postgres, nightly report, database postgres)")).await;
    says(&mut running, "prepared transaction 'it''s \"two\"' (postgres, database shop)").await;
    let status = migration.status().await.unwrap();
    assert_eq!(status["phase"], "preparing");
    assert!(status["events"].to_string().contains("nightly report"), "{status:#}");
    run(&report, "COMMIT").await;
    says(&mut running, "the slot waits for the end of: prepared transaction 'it''s").await;
    run(&source, "COMMIT PREPARED 'it''s \"two\"'").await;
    migration.wait_for_phase(&mut running, "following").await;

    // A whole one beside it, and another that is on its way.
    let output = Command::new(programs().bin("pg_dump")).arg(&migration.source_url).output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("prepared before"));
    let rows: i64 = dump.query_one("SELECT count(*) FROM item", &[]).await.unwrap().get(0);
    assert_eq!(rows, 1000, "its snapshot lives");
    run(&dump, "COMMIT").await;

    // While following: prepared, it is nowhere; committed, it comes; rolled back, it never does.
    run(&source, "BEGIN; INSERT INTO item VALUES (-2, 'later'); PREPARE TRANSACTION 'later'").await;
    run(&source, "BEGIN; INSERT INTO item VALUES (-3, 'never'); PREPARE TRANSACTION 'never'").await;
    ready(&migration, &mut running).await;
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    assert_ne!(refused.code, Some(0));
    assert!(refused.stderr.contains("2 prepared transactions are open"), "{}", refused.stderr);
    run(&source, "COMMIT PREPARED 'later'").await;
    run(&source, "ROLLBACK PREPARED 'never'").await;
    until_true(&migration.target().await, "SELECT EXISTS (SELECT FROM item WHERE id = -2)").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
    let rows: i64 = migration.target().await.query_one("SELECT count(*) FROM item", &[]).await.unwrap().get(0);
    assert_eq!(rows, 1002);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_source_keeps_no_wal_for_us_and_is_cut_over() {
    let servers = Servers::start().await;
    let migration = servers.migration("quiet").await;
    run(&migration.source().await, TABLES).await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let busy = servers.source.connect("postgres").await.unwrap();
    run(&busy, "CREATE TABLE busy (id int, v text)").await;
    for _ in 0..2 {
        run(&busy, "INSERT INTO busy SELECT i, repeat('x', 1000) FROM generate_series(1, 20000) i; CHECKPOINT").await;
        let written: String = busy.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0);
        // Nothing of ours is in all that; the slot lets go of it nevertheless.
        until_true(&busy, &format!("SELECT confirmed_flush_lsn >= '{written}' FROM pg_replication_slots")).await;
        // What the server keeps follows when it next writes down what runs.
        run(&busy, "CHECKPOINT").await;
        until_true(&busy, &format!("SELECT restart_lsn > '{written}'::pg_lsn - 16777216 FROM pg_replication_slots"))
            .await;
    }
    // From here on nobody writes anywhere.
    let status = ready(&migration, &mut running).await;
    assert_eq!(status["lag"]["bytes"].as_u64().map(|bytes| bytes < 1 << 20), Some(true), "{status:#}");
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

/// A trigger that fails as a full disk does, also for the sessions that write as a replica.
async fn fill_up(target: &Client, table: &str) {
    run(
        target,
        &format!(
            "CREATE FUNCTION public.full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$; \
             CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE OR DELETE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION public.full_disk(); \
             ALTER TABLE {table} ENABLE ALWAYS TRIGGER full_disk"
        ),
    )
    .await;
}

const MAKE_ROOM: &str = "DROP FUNCTION public.full_disk() CASCADE";

/// It says that it tries again, and shows it, and stays in its phase.
async fn waits(migration: &Migration, running: &mut Running, phase: &str, text: &str) {
    let shown = |status: &Value| {
        let events = status["events"].to_string();
        status["phase"] == phase && events.contains("trying again") && events.contains(text)
    };
    let status = migration.wait_for_status(running, "it waits", shown).await;
    assert_eq!(status["error"], Value::Null, "{status:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_full_or_read_only_is_waited_for() {
    let mut servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let source = migration.source().await;
    run(&source, TABLES).await;
    let dump = hold_pg_dump(&mut migration);
    let mut running = migration.migrate(&[]);
    dump.is_reached().await;
    let paused = migration.with_directory("pause", &["copy"]).await;
    assert_eq!(paused.code, Some(0), "{}", paused.stderr);
    dump.release();

    // Full while it copies.
    let target = migration.target().await;
    until_true(&target, "SELECT to_regclass('public.item') IS NOT NULL AND phase = 'copying' FROM walferry.migration")
        .await;
    fill_up(&target, "item").await;
    migration.with_directory("resume", &["copy"]).await;
    waits(&migration, &mut running, "copying", "No space left on device").await;
    run(&target, MAKE_ROOM).await;
    migration.wait_for_phase(&mut running, "following").await;

    // Full while it follows; changes of other tables wait too, and then come in their order.
    fill_up(&target, "item").await;
    run(
        &source,
        "UPDATE item SET v = 'new' WHERE id <= 500; UPDATE other SET v = 'new'; DELETE FROM item WHERE id = 1",
    )
    .await;
    waits(&migration, &mut running, "following", "No space left on device").await;
    run(&target, MAKE_ROOM).await;
    until_true(&target, "SELECT count(*) = 499 FROM item WHERE v = 'new'").await;

    // A default of the database is not for us; an application that is kept away by it does not keep the data away.
    let postgres = servers.target.connect("postgres").await.unwrap();
    run(&postgres, "ALTER DATABASE shop SET default_transaction_read_only = on").await;
    let end =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shop' AND pid <> pg_backend_pid()";
    run(&postgres, end).await;
    run(&source, "UPDATE item SET v = 'by default' WHERE id = 2").await;
    let target = migration.target().await;
    until_true(&target, "SELECT v = 'by default' FROM item WHERE id = 2").await;
    run(&postgres, "ALTER DATABASE shop RESET default_transaction_read_only").await;

    // A standby writes nothing, whatever is asked: until it is promoted.
    drop((target, postgres));
    servers.target.stop(StopMode::Fast).await.unwrap();
    std::fs::write(servers.target.data_directory().join("standby.signal"), "").unwrap();
    servers.target.restart().await.unwrap();
    run(&source, "UPDATE item SET v = 'while it was a standby' WHERE id > 900").await;
    waits(&migration, &mut running, "following", "read-only").await;
    let target = migration.target().await;
    target.query("SELECT pg_promote()", &[]).await.unwrap();
    until_true(&target, "SELECT count(*) = 100 FROM item WHERE v = 'while it was a standby'").await;
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

/// A file system of so many bytes; gone when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this process may not make one.
    fn mount(path: &Path) -> Option<SmallDisk> {
        std::fs::create_dir(path).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m,mode=0777", "none"]).arg(path).status();
        mounted.is_ok_and(|status| status.success()).then(|| SmallDisk(path.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Whatever still has a file open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_whose_disk_is_really_full_is_waited_for() {
    let servers = Servers::start().await;
    let disk = SmallDisk::mount(&servers.target.directory().join("small"));
    let Some(disk) = disk else {
        eprintln!("NOT TESTED: this process may not mount a small file system; the test with a trigger stands for it");
        return;
    };
    let place = disk.0.join("space");
    std::fs::create_dir(&place).unwrap();
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(servers.target.data_directory()).unwrap());
    std::os::unix::fs::chown(&place, Some(owner), None).unwrap();
    let postgres = servers.target.connect("postgres").await.unwrap();
    run(&postgres, &format!("CREATE TABLESPACE small LOCATION '{}'", place.display())).await;
    run(&postgres, "CREATE DATABASE moved TABLESPACE small").await;
    run(&servers.source.connect("postgres").await.unwrap(), "CREATE DATABASE moved").await;
    let mut migration = servers.migration("shop").await;
    migration.source_url = servers.source.url_for("moved");
    migration.target_url = servers.target.url_for("moved");
    let source = migration.source().await;
    run(&source, TABLES).await;
    // What stands in the way, and 19 MB of rows that find no room beside it.
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![7; 28 << 20]).unwrap();
    run(&source, "ALTER TABLE other ALTER COLUMN v SET STORAGE EXTERNAL").await;
    run(&source, "INSERT INTO other SELECT i, string_agg(md5(i || ':' || j), '') FROM generate_series(2000, 2499) i, generate_series(1, 1200) j GROUP BY i")
        .await;
    let mut running = migration.migrate(&[]);
    waits(&migration, &mut running, "copying", "No space left on device").await;
    std::fs::remove_file(&ballast).unwrap();
    let outcome = migration.wait_for_phase(&mut running, "following").await;
    assert_eq!(outcome["error"], Value::Null);
    // The same while it follows.
    let free = free_bytes(&disk.0);
    std::fs::write(&ballast, vec![7; usize::try_from(free.saturating_sub(256 << 10)).unwrap()]).unwrap();
    run(&source, "INSERT INTO item SELECT i, repeat(md5(i::text), 60) FROM generate_series(10001, 13000) i").await;
    says(&mut running, "trying again").await;
    waits(&migration, &mut running, "following", "No space left on device").await;
    std::fs::remove_file(&ballast).unwrap();
    let beside = connect(&migration.target_url).await;
    until_true(&beside, "SELECT count(*) = 4000 FROM item").await;
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

fn free_bytes(path: &Path) -> u64 {
    let disk = rustix::fs::statvfs(path).unwrap();
    disk.f_bavail * disk.f_frsize
}

/// What the documentation of SIGTERM promises.
const WITHIN: Duration = Duration::from_secs(5);

async fn terminate(running: Running, phase: &str) {
    let sent = Instant::now();
    let ended = running.terminate().await;
    assert!(sent.elapsed() < WITHIN, "{phase}: it took {:?}", sent.elapsed());
    ended.assert_refused(130, &["Run the same command again"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_it_within_seconds_also_while_a_child_hangs_or_an_index_or_the_apply_waits() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let source = migration.source().await;
    run(&source, TABLES).await;

    // Its own child hangs, and goes with it.
    let pid = migration.files().join("pid");
    let command = format!("echo $$ > '{}'; sleep 1000", pid.display());
    let running = migration.migrate(&["--target-password-command", &command]);
    let hanging =
        until("the command hangs", || async { std::fs::read_to_string(&pid).ok().filter(|text| text.ends_with('\n')) })
            .await;
    terminate(running, "a password command hangs").await;
    is_gone(hanging.trim()).await;
    let dump = hold_pg_dump(&mut migration);
    let running = migration.migrate(&[]);
    dump.is_reached().await;
    terminate(running, "pg_dump hangs").await;

    // An index waits for a lock.
    let mut running = migration.migrate(&[]);
    dump.is_reached().await;
    migration.with_directory("pause", &["copy"]).await;
    dump.release();
    let (target, holder) = (migration.target().await, migration.target().await);
    let copying = "SELECT to_regclass('public.other') IS NOT NULL AND phase = 'copying' FROM walferry.migration";
    until_true(&target, copying).await;
    run(&holder, "BEGIN; LOCK TABLE other IN ROW EXCLUSIVE MODE").await;
    migration.with_directory("resume", &["copy"]).await;
    is_blocked(&target, "other_pkey").await;
    migration.wait_for_phase(&mut running, "indexing").await;
    terminate(running, "indexing").await;

    // The apply waits for a row.
    run(&source, "UPDATE item SET v = 'new'").await;
    let running = migration.migrate(&[]);
    is_blocked(&target, "other_pkey").await;
    until_true(&target, "SELECT EXISTS (SELECT FROM pg_constraint WHERE conname = 'item_pkey')").await;
    let second = migration.target().await;
    run(&second, "BEGIN; LOCK TABLE item IN SHARE MODE").await;
    run(&holder, "ROLLBACK").await;
    is_blocked(&target, "item").await;
    terminate(running, "the apply waits").await;
    run(&second, "ROLLBACK").await;

    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

async fn is_gone(pid: &str) {
    until(&format!("the process {pid} is gone"), || async {
        // Dead, and perhaps not yet waited for by whoever inherited it.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    })
    .await;
}
