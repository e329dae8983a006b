//! Somebody who has read the README, and makes a mistake in each step: every message says what is wrong, and leads on.

use crate::about::{text, walferry};
use crate::support::process::Finished;
use crate::support::{self, Servers, until};

/// Refused with this exit code, with what is wrong and what to do next.
#[track_caller]
fn leads_on(finished: &Finished, code: i32, said: &[&str]) {
    finished.assert_refused(code, said);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mistake_in_each_step_is_answered_with_what_to_do() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    let shop = "CREATE TABLE orders (id int PRIMARY KEY, note text); INSERT INTO orders SELECT g, 'x' FROM generate_series(1, 500) g";
    source.batch_execute(shop).await.unwrap();

    // A port where nobody listens, another kind of URL, a target that is not empty.
    let right = migration.source_url.clone();
    migration.source_url = "postgres://postgres@127.0.0.1:1/shop".into();
    let wrong_port = migration.with_servers("check", &[]).await;
    leads_on(&wrong_port, 3, &["1 finding stands against", "run the same check again"]);
    assert!(
        wrong_port.stdout.contains("blocked by 1 finding: connection")
            && wrong_port.stdout.contains("fix: check that the server runs")
    );
    migration.source_url = "mysql://root@127.0.0.1/shop".into();
    leads_on(&migration.with_servers("check", &[]).await, 2, &["another kind", "postgres://user@host:5432/database"]);
    migration.source_url = right;
    target.batch_execute("CREATE TABLE orders (id int)").await.unwrap();
    let not_empty = migration.with_servers("check", &["--estimate-seconds", "0"]).await;
    leads_on(&not_empty, 3, &["run the same check again"]);
    assert!(not_empty.stdout.contains("blocked by 1 finding: target-not-empty"), "{}", not_empty.stdout);
    let not_begun = migration.migrate(&[]).wait().await;
    leads_on(&not_begun, 3, &["run the same command again. Nothing was changed"]);
    target.batch_execute("DROP TABLE orders").await.unwrap();
    let ready = migration.with_servers("check", &["--estimate-seconds", "0"]).await;
    assert!(
        ready.code == Some(0) && ready.stdout.contains("\nnext: `walferry migrate` with the same options, and --dir"),
        "{}",
        ready.stdout
    );

    // Too early: while it prepares.
    let dump = support::hold_pg_dump(&mut migration);
    let mut running = migration.migrate(&["--log-detail"]);
    dump.is_reached().await;
    leads_on(
        &migration.with_directory("cutover", &["--yes"]).await,
        5,
        &["it is preparing", "Ask again when `walferry status`"],
    );
    leads_on(
        &migration.with_directory("switchback", &["--yes"]).await,
        5,
        &["no cutover has been done", "`walferry cutover`"],
    );
    leads_on(&migration.with_directory("finish", &[]).await, 3, &["no way back to finish", "walferry cutover"]);
    leads_on(&migration.with_directory("verify", &[]).await, 3, &["only one that follows", "walferry status"]);
    dump.release();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;

    // A second one, in the same directory and in another.
    leads_on(&migration.migrate(&[]).wait().await, 3, &["another walferry is running in", "a directory of its own"]);
    let first = std::mem::replace(&mut migration.state, "other".into());
    leads_on(
        &migration.migrate(&[]).wait().await,
        3,
        &["holds the ledger of migration", "walferry resync", "walferry clean"],
    );
    leads_on(
        &migration.with_directory("cutover", &["--yes"]).await,
        1,
        &["no migration is running in", "walferry migrate"],
    );
    migration.state = first;

    // Cleaned up while it runs, in both ways.
    let path = migration.directory().to_str().unwrap().to_owned();
    leads_on(&migration.with_servers("clean", &["--dir", &path]).await, 3, &["still running", "Ctrl-C"]);
    leads_on(&migration.with_servers("clean", &[]).await, 3, &["still running", "is being read", "--dir"]);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE active";
    assert_eq!(source.query_one(slots, &[]).await.unwrap().get::<_, i64>(0), 1, "and nothing was removed");

    // What a command does not take, and what there is not.
    let cutover = walferry(&["cutover", "--dir", &path, "--source", &migration.source_url], &[]);
    let said = text(&cutover.stderr);
    assert!(
        cutover.status.code() == Some(2) && said.contains(" next: Leave it out") && !said.contains("pgbouncer"),
        "{said}"
    );
    leads_on(
        &migration.with_servers("repair", &["--dir", &path, "--tables", "public.nothing"]).await,
        2,
        &["public.nothing"],
    );
    leads_on(
        &migration.with_directory("switchback", &["--yes"]).await,
        5,
        &["nothing to switch back from", "`walferry cutover`"],
    );

    // The target refuses a row: the log has what the server said of it, because it was asked for, and nothing else has.
    target.batch_execute("ALTER TABLE orders ADD CHECK (note <> 'personal data')").await.unwrap();
    source.batch_execute("UPDATE orders SET note = 'personal data' WHERE id = 7").await.unwrap();
    let stopped = running.wait().await;
    leads_on(&stopped, 1, &["violates check constraint"]);
    let (log, error) = stopped.stderr.split_once("\nerror: ").unwrap();
    assert!(
        log.contains("values of rows can be in this log") && log.contains("DETAIL of") && log.contains("personal data"),
        "{log}"
    );
    assert!(!error.contains("personal data"), "{error}");
    for file in ["status.json", "record.jsonl"] {
        let kept = std::fs::read_to_string(migration.directory().join(file)).unwrap();
        assert!(!kept.contains("personal data"), "{file}: {kept}");
    }
    let quiet = migration.migrate(&[]).wait().await;
    leads_on(&quiet, 1, &["violates check constraint"]);
    assert!(!quiet.stderr.contains("DETAIL") && !quiet.stderr.contains("personal data"), "{}", quiet.stderr);
    leads_on(&migration.with_directory("status", &["--exit-code"]).await, 1, &["has failed or is not running"]);

    // It was ended by somebody, and is looked at then; what was killed is no reason not to clean up by the servers.
    target.batch_execute("ALTER TABLE orders DROP CONSTRAINT orders_note_check").await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    running.kill().await;
    let status = migration.with_directory("status", &[]).await;
    assert!(status.stdout.contains("next      `walferry migrate` with the same options"), "{}", status.stdout);
    leads_on(&migration.with_directory("pause", &[]).await, 1, &["no migration is running", "Go on with it"]);
    until("what was killed counts as gone", || async {
        (migration.with_servers("clean", &[]).await.code == Some(0)).then_some(())
    })
    .await;
}
