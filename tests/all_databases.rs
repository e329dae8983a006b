//! `--all-databases`: several databases of one server, one migration each under one status.

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, compare, connect, http};

/// Sorts before the others, and is a path, a quote, a connection string and a label at once.
const HOSTILE: &str = "../a\"b' dbname=x\\%2F\n{}";

async fn on(servers: &Servers, database: &str) -> (Client, Client) {
    (connect(&servers.source.url_for(database)).await, connect(&servers.target.url_for(database)).await)
}

fn of<'a>(status: &'a Value, database: &str) -> &'a Value {
    let all = status["databases"].as_array().unwrap();
    all.iter().find(|one| one["database"] == database).unwrap_or_else(|| panic!("no {database:?} in {status:#}"))
}

async fn has_database(client: &Client, name: &str) -> bool {
    client.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&name]).await.unwrap().is_some()
}

/// What is said of a database beside its rows.
async fn properties(client: &Client, database: &str) -> Vec<String> {
    let rows = client
        .query(
            "SELECT concat_ws('|', pg_encoding_to_char(encoding), datcollate, datctype, datconnlimit, pg_get_userbyid(datdba), \
                 shobj_description(oid, 'pg_database'), \
                 (SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM (SELECT pg_get_userbyid(grantee), privilege_type, is_grantable \
                      FROM aclexplode(datacl) WHERE grantee <> datdba) a), \
                 (SELECT string_agg(setrole::regrole || ' ' || setconfig::text, ' ' ORDER BY setrole::regrole::text) \
                      FROM pg_db_role_setting WHERE setdatabase = d.oid AND setconfig::text NOT LIKE '%read_only%')) \
             FROM pg_database d WHERE datname = $1",
            &[&database],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

fn start(migration: &Migration, more: &[&str]) -> Running {
    let usual = [
        "--all-databases",
        "--roles",
        "--exclude-database",
        "postgres",
        "--http-addr",
        "127.0.0.1:0",
        "--queue-max-bytes",
        "256MiB",
    ];
    migration.migrate(&[&usual[..], more].concat())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_databases_of_a_server_move_under_one_status_whatever_dies() {
    let servers = Servers::start().await;
    // It is there on both servers; the others only on the source.
    let migration = servers.migration("shop").await;
    let source = connect(&servers.source.url_for("postgres")).await;
    let target = connect(&servers.target.url_for("postgres")).await;
    let quoted = format!("\"{}\"", HOSTILE.replace('"', "\"\""));
    for statement in [
        "CREATE ROLE teller LOGIN PASSWORD 'x'".to_owned(),
        "CREATE ROLE landlord".to_owned(),
        format!(
            "CREATE DATABASE {quoted} OWNER landlord TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' CONNECTION LIMIT 44"
        ),
        "CREATE DATABASE third".to_owned(),
        "CREATE DATABASE closed ALLOW_CONNECTIONS false".to_owned(),
        format!("ALTER DATABASE {quoted} SET search_path = app, \"$user\", public"),
        format!("ALTER DATABASE {quoted} SET application_name = 'it''s \\ here'"),
        format!("ALTER ROLE teller IN DATABASE {quoted} SET work_mem = '7MB'"),
        format!("COMMENT ON DATABASE {quoted} IS 'what it''s for'"),
        format!("GRANT CREATE ON DATABASE {quoted} TO teller WITH GRANT OPTION"),
        format!("REVOKE TEMPORARY ON DATABASE {quoted} FROM PUBLIC"),
    ] {
        source.batch_execute(&statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    let databases = [HOSTILE, "shop", "third"];
    let mut applications = Vec::new();
    for database in databases {
        let url = servers.source.url_for(database);
        load::fill(&connect(&url).await, 200).await;
        applications.push(Application::start(&url, 1));
    }

    let which = ["--all-databases", "--exclude-database", "postgres"];
    let check = migration
        .with_servers("check", &[&which[..], &["--roles", "--json", "--estimate-seconds", "0"]].concat())
        .await;
    assert_eq!(check.code, Some(0), "{}\n{}", check.stdout, check.stderr);
    let names: Vec<Value> =
        check.json()["databases"].as_array().unwrap().iter().map(|one| one["database"].clone()).collect();
    assert_eq!(names, databases, "neither a template, nor what nobody can connect to, nor what is excluded");
    assert!(!has_database(&target, "third").await, "a check creates nothing");

    let mut running = start(&migration, &[]);
    let copying = |status: &Value| {
        status["databases"].as_array().unwrap().iter().any(|one| one["status"]["phase"] != "preparing")
    };
    migration.wait_for_status(&mut running, "one that copies", copying).await;
    running.kill().await;
    let status = migration.status().await.unwrap();
    assert_eq!(status["process_alive"], false, "{status:#}");
    assert!(
        status["databases"].as_array().unwrap().iter().all(|one| one["status"]["process_alive"] == false),
        "all ended with it"
    );

    // One that comes meanwhile is taken up by the next start.
    source.batch_execute("CREATE DATABASE late").await.unwrap();
    connect(&servers.source.url_for("late")).await.batch_execute("CREATE TABLE t AS SELECT 1 AS i").await.unwrap();
    let mut running = start(&migration, &[]);
    let ready = |status: &Value| status["ready_to_cutover"] == true;
    let status = migration.wait_for_status(&mut running, "all ready", ready).await;
    assert_eq!(status["databases"].as_array().unwrap().len(), 4, "{status:#}");
    assert_eq!(of(&status, "late")["status"]["phase"], "following");
    for property in ["third", HOSTILE] {
        assert_eq!(properties(&source, property).await, properties(&target, property).await);
    }
    let log = running.log();
    assert!(
        log.contains("database=\"third\" ") && log.contains("database=\"../a\\\"b' dbname=x"),
        "lines say whose they are:\n{log}"
    );

    let metrics = http::get(http::port(&running), "/metrics");
    for label in ["database=\"shop\"", "database=\"../a\\\"b' dbname=x\\\\%2F\\n{}\""] {
        assert!(metrics.contains(&format!("walferry_phase{{{label},phase=\"following\"}} 1\n")), "{metrics}");
    }
    assert_eq!(metrics.matches("# TYPE walferry_lag_bytes gauge").count(), 1);

    let paused = migration.with_directory("pause", &["--json"]).await;
    assert_eq!(paused.code, Some(0), "{}", paused.stderr);
    assert!(paused.json()["databases"].as_array().unwrap().iter().all(|one| one["result"]["apply"] == true));
    let status = migration.status().await.unwrap();
    assert!(of(&status, "third")["status"]["apply"]["paused"] == true && status["ready_to_cutover"] == false);
    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));
    for application in &applications {
        application.goes_on(10).await;
    }
    let page = migration.with_directory("status", &[]).await.stdout;
    assert_eq!(page.lines().filter(|line| line.contains("following")).count(), 4, "{page}");
    let verify = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(
        (verify.code, &verify.json()["equal"]),
        (Some(0), &Value::Bool(true)),
        "{}\n{}",
        verify.stdout,
        verify.stderr
    );
    let tune = migration.with_directory("tune", &["--copy-jobs", "2"]).await;
    tune.assert_refused(2, &["holds the migrations of 4 databases", "walferry tune --dir"]);

    // The third of four fails: those before stay switched, those behind were not tried.
    migration.wait_for_status(&mut running, "all ready", ready).await;
    let fails = "test \"$WALFERRY_SOURCE_DATABASE\" != shop";
    let cutover = migration
        .with_directory("cutover", &["--yes", "--json", "--max-write-stall", "25s", "--on-fence", fails])
        .await;
    cutover.assert_refused(
        5,
        &["\"shop\" did not switch", "Not tried, and as they were: \"third\"", "The same command goes on"],
    );
    assert_eq!(cutover.json()["failed"]["database"], "shop", "{}", cutover.stdout);
    let status = migration.status().await.unwrap();
    assert_eq!(of(&status, HOSTILE)["status"]["phase"], "cut_over");
    assert_eq!(of(&status, "late")["status"]["phase"], "cut_over");
    assert_eq!(status["phase"], "following", "{status:#}");
    applications[1].goes_on(10).await;
    applications[2].goes_on(10).await;

    migration.wait_for_status(&mut running, "the others ready", ready).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stdout, cutover.stderr);
    assert!(cutover.stdout.contains("All 4 databases have switched."), "{}", cutover.stdout);
    for application in applications {
        application.stop().await;
    }
    for database in ["late"].into_iter().chain(databases) {
        let (source, target) = on(&servers, database).await;
        assert_eq!(compare::rows(&source).await, compare::rows(&target).await, "rows of {database:?}");
        assert_eq!(compare::sequences(&source).await, compare::sequences(&target).await, "sequences of {database:?}");
        assert!(
            source.batch_execute("CREATE TABLE public.x ()").await.is_err(),
            "{database:?} on the source is closed"
        );
    }
    let finish = migration.with_directory("finish", &[]).await;
    assert_eq!(finish.code, Some(0), "{}", finish.stderr);
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}\n{}", clean.stdout, clean.stderr);
    assert!(!migration.directory().exists());
    for database in ["late"].into_iter().chain(databases) {
        let (source, target) = on(&servers, database).await;
        // What the way back had changed on the old primary is given back.
        assert_eq!(
            compare::definitions(&source).await,
            compare::definitions(&target).await,
            "definitions of {database:?}"
        );
        let mut left = compare::left_over(&source, "source").await;
        left.extend(compare::left_over(&target, "target").await);
        // Those of its own it keeps.
        left.retain(|one| !one.starts_with("setting") || one.contains("read_only"));
        assert_eq!(left, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn none_begins_when_one_is_refused_unless_it_may_stay_behind() {
    let servers = Servers::start().await;
    let migration = servers.migration("full").await;
    let (source, target) = on(&servers, "full").await;
    source.batch_execute("CREATE DATABASE good").await.unwrap();
    let good = connect(&servers.source.url_for("good")).await;
    good.batch_execute("CREATE TABLE t (i int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)")
        .await
        .unwrap();
    target.batch_execute("CREATE TABLE of_somebody (i int)").await.unwrap();

    let refused = start(&migration, &[]).wait().await;
    refused.assert_refused(
        3,
        &["the check refuses 1 of 2 databases: \"full\"", "target-not-empty", "--skip-blocked-databases"],
    );
    assert!(!has_database(&target, "good").await, "nothing was created");
    let slots = source.query("SELECT FROM pg_replication_slots", &[]).await.unwrap();
    assert!(slots.is_empty(), "nothing has begun");
    let few = start(&migration, &["--max-source-connections", "15"]).wait().await;
    few.assert_refused(2, &["2 databases need 16 at least"]);
    let nothing = start(&migration, &["--include-database", "nothing"]).wait().await;
    nothing.assert_refused(2, &["no database of the source's server is named by nothing"]);

    let mut running = start(&migration, &["--skip-blocked-databases"]);
    migration
        .wait_for_status(&mut running, "the other follows", |status| {
            of(status, "good")["status"]["ready_to_cutover"] == true
        })
        .await;
    assert_eq!(migration.status().await.unwrap()["ready_to_cutover"], false);
    let cutover = migration.with_directory("cutover", &["--yes"]).await;
    cutover.assert_refused(5, &["the database \"full\" is not moved", "--waive 'database full'"]);
    let stall = ["--yes", "--max-write-stall", "25s"];
    let cutover = migration.with_directory("cutover", &[&stall[..], &["--waive", "database full"]].concat()).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stdout, cutover.stderr);
    connect(&servers.target.url_for("good")).await.batch_execute("INSERT INTO t VALUES (101)").await.unwrap();
    // The way back may still have to catch up with that row.
    migration
        .wait_for_status(&mut running, "the way back is ready", |status| {
            of(status, "good")["status"]["ready_to_cutover"] == true
        })
        .await;
    let back = migration.with_directory("switchback", &stall).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stdout, back.stderr);
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let good = connect(&servers.source.url_for("good")).await;
    assert_eq!(good.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 101);
    good.batch_execute("INSERT INTO t VALUES (102)").await.unwrap();
}
