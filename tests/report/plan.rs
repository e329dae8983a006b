//! `check --plan` and the record against what the servers themselves logged.

use serde_json::Value;

use crate::SMALL_QUEUE;
use crate::judge::{assert_complete, assert_planned, plan, record, recorded, servers};
use crate::logged::LogDirectory;
use crate::support::load::{self, Application};
use crate::support::until_true;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_statement_there_and_back_is_in_the_plan_and_in_the_record() {
    let (source_log, target_log) = (LogDirectory::new(), LogDirectory::new());
    let servers = servers(&source_log, &target_log, &[]).await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    load::fill(&source, 200).await;
    source
        .batch_execute(
            "CREATE TABLE app.always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int); INSERT INTO app.always (n) VALUES (1); \
             CREATE FUNCTION app.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
             CREATE TRIGGER g BEFORE INSERT ON app.always FOR EACH ROW EXECUTE FUNCTION app.f(); \
             ALTER TABLE app.always ENABLE ALWAYS TRIGGER g; \
             CREATE UNLOGGED TABLE app.cache (id int PRIMARY KEY); INSERT INTO app.cache VALUES (1); \
             CREATE MATERIALIZED VIEW app.view AS SELECT count(*) FROM app.always; \
             SELECT lo_from_bytea(0, 'large')",
        )
        .await
        .unwrap();
    let mut application = Application::start(&migration.source_url, 1);

    // Killed in the middle of the preparation: what was done by then is in the record.
    let running = migration.migrate(&SMALL_QUEUE);
    until_true(&source, "SELECT count(*) = 2 FROM pg_publication").await;
    running.kill().await;
    let before = record(&migration.directory());
    assert!(recorded(&before, "source").iter().any(|text| text.starts_with("CREATE PUBLICATION")), "{before:#?}");

    let mut running = migration.migrate(&SMALL_QUEUE);
    migration
        .wait_for_status(&mut running, "ready with a way back", |status| {
            status["ready_to_cutover"] == true && status["way_back"] == "ready"
        })
        .await;
    assert_eq!(migration.with_directory("pause", &["apply"]).await.code, Some(0));
    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    application.stop().await;
    application = Application::start(&migration.target_url, 1);
    application.goes_on(20).await;
    migration.wait_for_status(&mut running, "ready to go back", |status| status["ready_to_cutover"] == true).await;
    // Everything so far is in the ledger too, soon.
    until_true(
        &migration.target().await,
        "SELECT EXISTS (SELECT FROM walferry.record WHERE entry->>'what' = 'outcome') \
            AND EXISTS (SELECT FROM walferry.record WHERE entry->>'kind' = 'slot' AND entry->>'server' = 'source')",
    )
    .await;
    let back = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    application.stop().await;
    assert_eq!(running.wait().await.code, Some(0));
    let record = record(&migration.directory());
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);

    let plan = plan(&migration, &[]).await;
    let on_source = assert_planned(&source_log, "source", &plan, &[]);
    let on_target = assert_planned(&target_log, "target", &plan, &[]);
    for (changes, texts) in [
        (
            &on_source,
            &[
                "CREATE_REPLICATION_SLOT",
                "LOCK TABLE",
                "ALTER DATABASE",
                "pg_terminate_backend",
                "CREATE SCHEMA walferry",
            ][..],
        ),
        (&on_target, &["CREATE SCHEMA walferry", "pg_create_logical", "setval", "REFRESH", "lo_create", "ENABLE"][..]),
    ] {
        for text in texts {
            assert!(changes.iter().any(|change| change.contains(text)), "{text} was never run: {changes:#?}");
        }
    }
    // What only `clean` did went with the directory.
    let but_clean = |changes: Vec<String>| -> Vec<String> {
        changes.into_iter().filter(|change| !change.starts_with("DROP")).collect()
    };
    assert_complete(&record, &but_clean(on_source), "source");
    assert_complete(&record, &but_clean(on_target), "target");

    // Who asked for what, and how it ended.
    let commands: Vec<&Value> = record.iter().filter(|line| line["what"] == "command").collect();
    let names: Vec<&str> = commands.iter().map(|line| line["command"].as_str().unwrap()).collect();
    assert_eq!(names, ["migrate", "migrate", "pause", "resume", "cutover", "switchback"]);
    for command in &commands[1..] {
        assert!(!command["user"].as_str().unwrap().is_empty());
        let outcome = record.iter().find(|line| line["of"] == command["id"]);
        assert_eq!(outcome.unwrap()["exit"], 0, "{command}");
    }
    let switched: Vec<&Value> = record.iter().filter(|line| line["what"] == "switched").collect();
    assert_eq!(
        (switched.len(), &switched[0]["back"], &switched[1]["back"]),
        (2, &Value::Bool(false), &Value::Bool(true))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_statement_with_replicated_ddl_and_of_a_part_is_in_the_plan_and_in_the_record() {
    let (source_log, target_log) = (LogDirectory::new(), LogDirectory::new());
    let servers = servers(&source_log, &target_log, &[]).await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source
        .batch_execute(
            "CREATE ROLE keeper LOGIN PASSWORD 'hush-hush'; CREATE TABLE keyless (n int); INSERT INTO keyless VALUES (1), (2); \
             CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO keeper",
        )
        .await
        .unwrap();
    let options = ["--replicate-ddl", "--replica-identity-full", "--roles", "--no-reverse"];
    let mut running = migration.migrate(&[&SMALL_QUEUE[..], &options].concat());
    migration.wait_for_phase(&mut running, "following").await;
    let ddl =
        ["CREATE TABLE fresh (id int PRIMARY KEY, word text DEFAULT 'hush-hush')", "ALTER TABLE t ADD COLUMN more int"];
    for statement in ddl {
        source.batch_execute(statement).await.unwrap();
    }
    source.batch_execute("INSERT INTO fresh VALUES (1); UPDATE keyless SET n = 3 WHERE n = 2").await.unwrap();
    until_true(&migration.target().await, "SELECT EXISTS (SELECT FROM fresh)").await;
    migration.cut_over(running).await;
    let record_of_whole = record(&migration.directory());
    assert_eq!(migration.with_directory("clean", &[]).await.code, Some(0));

    let part = servers.migration("part").await;
    load::fill(&part.source().await, 50).await;
    part.source().await.batch_execute("CREATE TABLE public.stays (id int PRIMARY KEY)").await.unwrap();
    let mut running = part.migrate(&["--queue-max-bytes", "128MiB", "--include-schema", "app", "--no-reverse"]);
    part.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    part.cut_over(running).await;
    let record_of_part = record(&part.directory());
    assert_eq!(part.with_directory("clean", &[]).await.code, Some(0));

    let mut planned = plan(&migration, &options).await;
    planned.extend(plan(&part, &["--include-schema", "app", "--no-reverse"]).await);
    let on_source = assert_planned(&source_log, "source", &planned, &ddl);
    let on_target = assert_planned(&target_log, "target", &planned, &ddl);
    for text in ["CREATE EVENT TRIGGER", "REPLICA IDENTITY FULL", "REPLICA IDENTITY DEFAULT", "$guard$"] {
        assert!(on_source.iter().any(|change| change.contains(text)), "{text} was never run: {on_source:#?}");
    }
    assert!(
        on_target.iter().any(|change| change.contains("CREATE ROLE"))
            && on_target.iter().any(|change| change.starts_with(ddl[0]))
    );
    for record in [&record_of_whole, &record_of_part] {
        assert_complete(record, &[], "source");
    }
    let text = record_of_whole.iter().map(ToString::to_string).collect::<String>();
    assert!(text.contains("CREATE TABLE fresh") && text.contains("CREATE ROLE"), "{text}");
    assert!(!text.contains("hush-hush"), "constants of others' statements are not kept: {text}");
}
