//! How writers are held: each fence keeps everybody out, and gives way without a trace.

use std::path::PathBuf;

use tokio_postgres::Client;

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, connect, is_blocked, until, until_true};

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

async fn follows(servers: &Servers, database: &str) -> (Migration, Application, Running) {
    let migration = servers.migration(database).await;
    load::fill(&migration.source().await, 1_000).await;
    let application = Application::start(&migration.source_url, 3);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    (migration, application, running)
}

/// A command of the operator's that waits until it is let go, and leaves a line in a file each time it runs.
pub struct HeldCommand {
    directory: PathBuf,
    name: String,
}

impl HeldCommand {
    pub fn new(migration: &Migration, name: &str) -> HeldCommand {
        let command = HeldCommand { directory: migration.files(), name: name.to_owned() };
        std::fs::write(command.file("held"), "").unwrap();
        command
    }

    fn file(&self, what: &str) -> PathBuf {
        self.directory.join(format!("{}.{what}", self.name))
    }

    /// What a shell is to run.
    pub fn text(&self) -> String {
        let (ran, held) = (self.file("ran"), self.file("held"));
        format!(
            "echo $WALFERRY_HOOK $WALFERRY_CUTOVER_ID >> '{}'; while [ -e '{}' ]; do kill -0 $PPID || exit 1; sleep 0.02; done",
            ran.display(),
            held.display()
        )
    }

    /// What it was called for so far.
    pub fn ran(&self) -> Vec<String> {
        let ran = std::fs::read_to_string(self.file("ran")).unwrap_or_default();
        ran.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    }

    pub async fn has_run(&self, times: usize) {
        until("the command is run", || async { (self.ran().len() >= times).then_some(()) }).await;
    }

    pub fn let_go(&self) {
        std::fs::remove_file(self.file("held")).unwrap();
    }
}

/// As if there had been no cutover.
async fn nothing_has_happened(migration: &Migration, running: &mut Running, application: &Application) {
    let beside = connect(&migration.source_url.replace("/shop", "/postgres")).await;
    let closed = "SELECT count(*) FROM pg_db_role_setting WHERE setrole = 0";
    assert_eq!(beside.query_one(closed, &[]).await.unwrap().get::<_, i64>(0), 0, "the fence is lifted");
    let refused = "SELECT count(*) FROM pg_database WHERE NOT datallowconn AND datname LIKE 'shop%'";
    assert_eq!(beside.query_one(refused, &[]).await.unwrap().get::<_, i64>(0), 0, "everybody can connect");
    let fence = migration.ledger("SELECT FROM walferry.migration WHERE fence IS NULL AND phase = 'following'").await;
    assert_eq!(fence.len(), 1);
    application.goes_on(20).await;
    ready(migration, running).await;
}

async fn is_refused(client: &Client, statement: &str) {
    let error = client.batch_execute(statement).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "25006", "{statement}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h29_h30_every_fence_switches_and_loses_nothing() {
    let servers = Servers::start().await;
    for mode in ["read-only", "connections", "none"] {
        let (migration, application, running) = follows(&servers, &format!("shop_{mode}")).await;
        let mut application = Some(application);
        if mode == "none" {
            application.take().unwrap().stop().await;
        }
        let cutover = migration
            .with_directory(
                "cutover",
                &["--yes", "--no-reverse", "--json", "--fence", mode, "--max-write-stall", "25s"],
            )
            .await;
        assert_eq!(cutover.code, Some(0), "{mode}: {}\n{}", cutover.stderr, running.log());
        let outcome = cutover.json();
        assert_eq!(outcome["fence"], mode);
        let steps: Vec<&str> =
            outcome["steps"].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap()).collect();
        assert_eq!(steps.join(" "), "check fence drain close settle switch release");
        assert_eq!(outcome["warnings"].as_array().unwrap().len(), 0, "{outcome}");
        assert_eq!(running.wait().await.code, Some(0));
        // Everybody can look at the old database, and nobody writes to it.
        is_refused(&migration.source().await, "UPDATE app.heavy SET n = 0").await;
        if let Some(application) = application {
            application.stop().await;
        }
        migration.assert_equal().await;
        let pending = migration.ledger("SELECT cutover ? 'pending' FROM walferry.migration").await;
        assert!(!pending[0].get::<_, bool>(0), "nothing is left to do");
        let cleaned = migration.with_directory("clean", &[]).await;
        assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
        migration.source().await.batch_execute("UPDATE app.heavy SET n = 0").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h30_who_writes_behind_a_fence_stops_the_cutover() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers, "shop").await;

    // Nobody has stopped the writers: what they write after the first marker is seen by the second.
    let (holder, command) = (migration.target().await, HeldCommand::new(&migration, "fence"));
    let cutover = migration.start(
        "cutover",
        &[
            "--yes",
            "--no-reverse",
            "--fence",
            "none",
            "--timeout",
            "60s",
            "--max-write-stall",
            "60s",
            "--hook-timeout",
            "60s",
            "--on-fence",
            &command.text(),
        ],
    );
    command.has_run(1).await;
    holder.batch_execute("BEGIN; LOCK TABLE app.heavy IN SHARE MODE").await.unwrap();
    migration.source().await.batch_execute("UPDATE app.heavy SET n = n + 1 WHERE id = 1").await.unwrap();
    command.let_go();
    until_true(&migration.target().await, "SELECT fence->>'step' = 'drain' FROM walferry.migration").await;
    application.goes_on(30).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    let refused = cutover.wait().await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["during settle", "changes came through the fence", "--fence lock"]);
    nothing_has_happened(&migration, &mut running, &application).await;

    // A session that came back and asked for a read-write transaction by itself, and has not committed.
    let command = HeldCommand::new(&migration, "again");
    let cutover = migration.start(
        "cutover",
        &[
            "--yes",
            "--no-reverse",
            "--fence",
            "read-only",
            "--timeout",
            "60s",
            "--max-write-stall",
            "60s",
            "--hook-timeout",
            "60s",
            "--on-fence",
            &command.text(),
        ],
    );
    command.has_run(1).await;
    let defiant = migration.source().await;
    is_refused(&defiant, "UPDATE app.heavy SET n = n + 1 WHERE id = 1").await;
    defiant.batch_execute("BEGIN READ WRITE; UPDATE app.heavy SET n = n + 1 WHERE id = 1").await.unwrap();
    command.let_go();
    let refused = cutover.wait().await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["during switch", "writes behind the fence"]);
    nothing_has_happened(&migration, &mut running, &application).await;

    // Exempt from the database's being read-only, and a worker that is nobody's session.
    let source = migration.source().await;
    source
        .batch_execute(
            "CREATE ROLE exempt LOGIN; ALTER ROLE exempt SET default_transaction_read_only = off; \
             CREATE SUBSCRIPTION inbound CONNECTION 'host=/nowhere' PUBLICATION p WITH (connect = false, slot_name = 'x'); \
             ALTER SUBSCRIPTION inbound ENABLE",
        )
        .await
        .unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(
        5,
        &[
            "role exempt",
            "ALTER ROLE \"exempt\" RESET",
            "subscription inbound",
            "ALTER SUBSCRIPTION \"inbound\" DISABLE",
        ],
    );
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse", "--waive", "role exempt"]).await;
    refused.assert_refused(5, &["subscription inbound"]);
    assert!(!refused.stderr.contains("role exempt"), "waived: {}", refused.stderr);
    source
        .batch_execute("ALTER SUBSCRIPTION inbound DISABLE; ALTER SUBSCRIPTION inbound SET (slot_name = NONE); DROP SUBSCRIPTION inbound")
        .await
        .unwrap();
    let waived = migration
        .with_directory("cutover", &["--yes", "--no-reverse", "--waive", "role exempt", "--max-write-stall", "25s"])
        .await;
    assert_eq!(waived.code, Some(0), "{}", waived.stderr);
    assert_eq!(running.wait().await.code, Some(0));
    application.stop().await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h30_behind_a_fence_that_refuses_connections_a_killed_migration_gets_in_again() {
    let servers = Servers::start().await;
    let (migration, application, running) = follows(&servers, "shop").await;
    let beside = connect(&migration.source_url.replace("/shop", "/postgres")).await;
    let arguments = |command: &HeldCommand, hook: &str| -> Vec<String> {
        let text = command.text();
        [
            "--yes",
            "--no-reverse",
            "--fence",
            "connections",
            "--timeout",
            "60s",
            "--max-write-stall",
            "60s",
            "--hook-timeout",
            "60s",
            hook,
            &text,
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let start =
        |arguments: Vec<String>| migration.start("cutover", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let is_closed = "SELECT NOT datallowconn FROM pg_database WHERE datname = 'shop'";

    let command = HeldCommand::new(&migration, "fence");
    let cutover = start(arguments(&command, "--on-fence"));
    command.has_run(1).await;
    until_true(&beside, is_closed).await;
    let refused = tokio_postgres::connect(&migration.source_url, tokio_postgres::NoTls).await;
    let refused = refused.err().expect("nobody gets in");
    assert!(refused.as_db_error().unwrap().message().contains("not currently accepting connections"), "{refused:?}");
    running.kill().await;
    cutover.wait().await;
    let mut running = migration.migrate(&[]);
    nothing_has_happened_soon(&migration, &mut running, &application).await;
    let status = migration.status().await.unwrap();
    assert_eq!(status["cutover"]["last_given_up"]["step"], "on-fence", "{status:#}");
    let log = running.log();
    assert!(log.contains("cut off during on-fence"), "{log}");

    // The same, and it is given up for good: `clean` gets in too.
    let command = HeldCommand::new(&migration, "again");
    let cutover = start(arguments(&command, "--on-fence"));
    command.has_run(1).await;
    until_true(&beside, is_closed).await;
    running.kill().await;
    cutover.wait().await;
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    application.goes_on(20).await;
    application.stop().await;
    assert_eq!(migration.left_over().await, Vec::<String>::new());
}

async fn nothing_has_happened_soon(migration: &Migration, running: &mut Running, application: &Application) {
    ready(migration, running).await;
    nothing_has_happened(migration, running, application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h32_an_autovacuum_makes_way_for_the_lock() {
    let servers = Servers::with(&[("autovacuum_naptime", "1s")], &[]).await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    load::fill(&source, 3_000).await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    // As slow as it gets: a page takes longer than a cutover may.
    source
        .batch_execute(
            "ALTER TABLE app.big SET (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, \
                 autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0); \
             UPDATE app.big SET amount = amount + 1",
        )
        .await
        .unwrap();
    until_true(
        &source,
        "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE backend_type = 'autovacuum worker' \
           AND relation = 'app.big'::regclass AND mode = 'ShareUpdateExclusiveLock')",
    )
    .await;
    let cutover = migration
        .with_directory("cutover", &["--yes", "--no-reverse", "--timeout", "20s", "--waive", "table app.big"])
        .await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    assert_eq!(running.wait().await.code, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h29_sessions_that_our_role_cannot_see_stop_the_cutover() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let administrator = migration.source().await;
    load::fill(&administrator, 500).await;
    administrator
        .batch_execute(
            "CREATE ROLE mover LOGIN REPLICATION; CREATE ROLE other LOGIN; ALTER DATABASE shop OWNER TO mover; \
             GRANT USAGE ON SCHEMA app TO other; GRANT SELECT, UPDATE ON app.heavy TO other; \
             ALTER SCHEMA app OWNER TO mover; \
             DO $$ DECLARE r record; BEGIN FOR r IN SELECT oid::regclass AS name FROM pg_class \
                 WHERE relnamespace = 'app'::regnamespace AND relkind IN ('r', 'p', 'v', 'm') OR oid = 'app.counter'::regclass LOOP \
                 EXECUTE format('ALTER TABLE %s OWNER TO mover', r.name); END LOOP; END $$; \
             ALTER FUNCTION app.touch() OWNER TO mover; ALTER TYPE app.mood OWNER TO mover; \
             GRANT pg_read_all_stats, pg_signal_backend TO mover",
        )
        .await
        .unwrap();
    drop(administrator);
    migration.target().await.batch_execute("CREATE ROLE mover; CREATE ROLE other").await.unwrap();
    let superuser = migration.source_url.clone();
    migration.source_url = superuser.replace("postgres@", "mover@");
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    // The grants are gone when it matters; a session of somebody else's waits to write.
    let beside = connect(&superuser.replace("/shop", "/postgres")).await;
    beside.batch_execute("REVOKE pg_read_all_stats, pg_signal_backend FROM mover").await.unwrap();
    let other = connect(&superuser.replace("postgres@", "other@")).await;
    other.batch_execute("SELECT 1").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["sessions of other", "GRANT pg_read_all_stats, pg_signal_backend TO \"mover\""]);
    beside.batch_execute("GRANT pg_read_all_stats TO mover").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["sessions of other", "may not end them"]);
    beside.batch_execute("GRANT pg_signal_backend TO mover").await.unwrap();
    let done = migration.with_directory("cutover", &["--yes", "--no-reverse", "--max-write-stall", "25s"]).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(other.batch_execute("UPDATE app.heavy SET n = 7").await.is_err(), "it was ended");
    assert_eq!(running.wait().await.code, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_shows_everything_at_once_and_touches_nothing() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers, "shop").await;
    // The way back is made ready beside, and that does touch the source.
    migration.wait_for_status(&mut running, "a way back", |status| status["way_back"] == "ready").await;
    let before = touched(&migration).await;
    let dry = migration.with_directory("cutover", &["--dry-run", "--json"]).await;
    assert_eq!(dry.code, Some(0), "{}\n{}", dry.stdout, dry.stderr);
    let json = dry.json();
    assert_eq!((json["version"].as_u64(), json["ready"].as_bool()), (Some(1), Some(true)), "{json:#}");
    assert_eq!(json["tables_to_lock"], 7);
    assert!(json["sequences"].as_u64().unwrap() >= 4, "{json:#}");
    assert!(
        json["estimate"]["marker_ms"].as_f64().unwrap() > 0.0
            && json["estimate"]["downtime_ms"].as_f64().unwrap() > 0.0
    );
    assert!(json["estimated_from"].as_str().unwrap().contains("marker"));
    let names: Vec<&str> =
        json["preconditions"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    for expected in [
        "phase",
        "lag",
        "target",
        "catalog",
        "prepared transactions",
        "rights",
        "role settings",
        "constraints",
        "marker",
    ] {
        assert!(names.contains(&expected), "{expected} in {names:?}");
    }
    application.goes_on(10).await;

    // Several things at once, each with what to do.
    let source = migration.source().await;
    source
        .batch_execute(
            "CREATE ROLE exempt LOGIN; ALTER ROLE exempt SET default_transaction_read_only = off; CREATE TABLE app.late (id int)",
        )
        .await
        .unwrap();
    let prepared = "BEGIN; SELECT nextval('app.counter'); PREPARE TRANSACTION 'two phases'";
    source.batch_execute(prepared).await.unwrap();
    let dry = migration.with_directory("cutover", &["--dry-run"]).await;
    println!("{}", dry.stdout);
    dry.assert_refused_without_hint(5);
    for text in [
        "NOT READY",
        "app.late",
        "--waive",
        "1 prepared transactions",
        "ROLLBACK PREPARED",
        "role exempt",
        "Writers would wait about",
    ] {
        assert!(dry.stdout.contains(text), "{text} in:\n{}", dry.stdout);
    }
    source.batch_execute("ROLLBACK PREPARED 'two phases'").await.unwrap();
    source.batch_execute("DROP TABLE app.late; DROP ROLE exempt").await.unwrap();
    migration.with_directory("pause", &["apply"]).await;
    let dry = migration.with_directory("cutover", &["--dry-run", "--json", "--max-write-stall", "1s"]).await;
    assert_eq!((dry.code, dry.json()["ready"].as_bool()), (Some(5), Some(false)), "{}", dry.stdout);
    assert!(dry.json()["estimate"].is_null());
    migration.with_directory("resume", &[]).await;
    let after = touched(&migration).await;
    let differs: Vec<&String> = before
        .0
        .iter()
        .filter(|one| !after.0.contains(one))
        .chain(after.0.iter().filter(|one| !before.0.contains(one)))
        .collect();
    assert_eq!(differs, Vec::<&String>::new(), "nothing was touched on the source");
    assert_eq!(after.1, before.1, "nothing was touched in the ledger");
    let measured = migration
        .wait_for_status(&mut running, "an expected downtime", |status| {
            status["cutover"]["expected_downtime_ms"].as_f64().is_some()
        })
        .await;
    assert!(measured["cutover"]["marker_ms"].as_f64().unwrap() > 0.0, "{measured:#}");
    migration.cut_over(running).await;
    application.stop().await;
    migration.assert_equal().await;
}

async fn touched(migration: &Migration) -> (Vec<String>, String) {
    let ledger = migration.ledger("SELECT (to_jsonb(m))::text FROM walferry.migration m").await;
    (crate::support::compare::touched(&migration.source().await).await, ledger[0].get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_cuts_over_by_itself_when_it_may() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 1_000).await;
    let application = Application::start(&migration.source_url, 2);
    let long = migration.source().await;
    // Nothing happens before the time, whatever else is ready.
    let mut running = migration.migrate(&["--cutover", "auto", "--no-reverse", "--not-before", "2099-01-01T00:00:00Z"]);
    ready(&migration, &mut running).await;
    assert!(!running.log().contains("a cutover begins"));
    running.terminate().await;
    // The first try is in vain, a later one is not.
    long.batch_execute("BEGIN; INSERT INTO app.heavy VALUES (100000, 0, 'long')").await.unwrap();
    let mut running = migration.migrate(&[
        "--cutover",
        "auto",
        "--no-reverse",
        "--max-lag",
        "60s",
        "--not-before",
        "2020-01-01T00:00:00Z",
        "--not-after",
        "2099-01-01T00:00:00+01:00",
        "--timeout",
        "3s",
        "--retry-pause",
        "1s",
        "--sequence-margin",
        "7",
    ]);
    is_blocked(&migration.source().await, "LOCK TABLE ONLY").await;
    migration
        .wait_for_status(&mut running, "a try that was given up", |status| {
            !status["cutover"]["last_given_up"].is_null()
        })
        .await;
    long.batch_execute("COMMIT").await.unwrap();
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("begins by itself") && ended.stderr.contains("cut over at"), "{}", ended.stderr);
    application.stop().await;
    let (source, target) = (migration.source().await, migration.target().await);
    let counter = "SELECT last_value FROM app.counter";
    let [on_source, on_target] = [&source, &target].map(|client| client.query_one(counter, &[]));
    let (on_source, on_target) = tokio::try_join!(on_source, on_target).unwrap();
    assert_eq!(on_source.get::<_, i64>(0) + 7, on_target.get::<_, i64>(0), "--sequence-margin");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h29_h31_no_lock_that_dies_or_goes_lets_a_writer_in_and_no_sequence_gives_a_value_twice() {
    let servers = Servers::start().await;
    let (migration, application, mut running) = follows(&servers, "shop").await;
    let usual = ["--yes", "--no-reverse", "--timeout", "60s", "--max-write-stall", "60s", "--hook-timeout", "60s"];

    // The session with the locks dies while they are needed. Nobody writes, so nothing shows it but the question whether it lives.
    application.stop().await;
    let command = HeldCommand::new(&migration, "fence");
    let cutover = migration.start("cutover", &[&usual[..], &["--on-fence", &command.text()]].concat());
    command.has_run(1).await;
    let locks = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND granted \
                 AND relation = 'app.big'::regclass";
    assert_eq!(migration.source().await.query(locks, &[]).await.unwrap().len(), 1);
    command.let_go();
    let refused = cutover.wait().await;
    println!("{}", refused.stderr);
    assert_eq!(refused.code, Some(5));
    assert!(refused.stderr.contains("asking for the source's locks"), "{}", refused.stderr);
    let application = Application::start(&migration.source_url, 3);
    nothing_has_happened(&migration, &mut running, &application).await;

    // Tables are locked, and sequences are not: what is handed out meanwhile is handed out for good.
    let (fence, switch) = (HeldCommand::new(&migration, "fence too"), HeldCommand::new(&migration, "switch"));
    let hooks = ["--on-fence", &fence.text(), "--on-switch", &switch.text()];
    let cutover = migration.start("cutover", &[&usual[..], &hooks].concat());
    fence.has_run(1).await;
    let caller = migration.source().await;
    let calling = tokio::spawn(async move {
        let mut newest = 0;
        while let Ok(row) = caller.query_one("SELECT nextval('app.counter')", &[]).await {
            newest = row.get::<_, i64>(0);
        }
        newest
    });
    let counter = "SELECT last_value FROM app.counter";
    let before: i64 = migration.source().await.query_one(counter, &[]).await.unwrap().get(0);
    let more = format!("SELECT last_value > {before} + 50 FROM app.counter");
    until_true(&migration.source().await, &more).await;
    fence.let_go();
    switch.has_run(1).await;

    // It is decided, and the locks are still there. Who defies the default waits for them, and would write when they go.
    let defiant = migration.source().await;
    defiant.batch_execute("BEGIN READ WRITE").await.unwrap();
    let writes =
        tokio::spawn(async move { defiant.batch_execute("UPDATE app.heavy SET n = -1 WHERE id = 1; COMMIT").await });
    is_blocked(&migration.source().await, "SET n = -1").await;
    switch.let_go();
    let done = cutover.wait().await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(writes.await.unwrap().is_err(), "it would have written to the old primary");
    let newest = calling.await.unwrap();
    let on_target: i64 = migration.target().await.query_one(counter, &[]).await.unwrap().get(0);
    assert!(newest > before && on_target >= newest, "{newest} was handed out, and the target goes on from {on_target}");
    assert_eq!(running.wait().await.code, Some(0));
    application.stop().await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h34_a_dead_synchronous_standby_does_not_hold_up_a_fence_and_its_end() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 500).await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let source = connect(&migration.source_url.replace("/shop", "/postgres")).await;
    // Every commit waits for ever, unless it says that it does not.
    source.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await.unwrap();
    source.batch_execute("SET synchronous_commit = local; SELECT pg_reload_conf()").await.unwrap();
    until_true(&source, "SELECT current_setting('synchronous_standby_names') = 'nobody'").await;
    let usual = ["--yes", "--no-reverse", "--timeout", "30s", "--max-write-stall", "20s", "--fence"];
    let refused =
        migration.with_directory("cutover", &[&usual[..], &["connections", "--on-fence", "exit 1"]].concat()).await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["during on-fence", "The fence is lifted"]);
    let done = migration.with_directory("cutover", &[&usual[..], &["connections"]].concat()).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(running.wait().await.code, Some(0));
}
