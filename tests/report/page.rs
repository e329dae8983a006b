//! `walferry report` of a real migration: its numbers against SQL and `status`, and the page in a real browser.

use serde_json::{Value, json};

use crate::SMALL_QUEUE;
use crate::support::browser::Browser;
use crate::support::load::{self, Application};
use crate::support::{Servers, tools};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_report_tells_what_happened_and_its_page_is_good_to_read() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let source = migration.source().await;
    load::fill(&source, 300).await;
    // Names that would be markup.
    source
        .batch_execute(r#"CREATE TABLE "<img src=x onerror=document.title='owned'>" (id int PRIMARY KEY); CREATE TABLE "</style><script>" (id int PRIMARY KEY)"#)
        .await
        .unwrap();
    // A secret where one might slip through.
    migration.environment.push(("PGPASSWORD".into(), "hush-hush".into()));
    let application = Application::start(&migration.source_url, 1);

    // A first process that is killed: its time is its own.
    let mut first = migration.migrate(&SMALL_QUEUE);
    migration.wait_for_phase(&mut first, "following").await;
    // Events are written down every second; a kill takes what is newer.
    while !migration.with_directory("report", &["--json"]).await.stdout.contains("\"phase\": \"following\"") {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    first.kill().await;
    let early = migration.with_directory("report", &["--json"]).await;
    assert_eq!(early.code, Some(0), "{}", early.stderr);
    assert_eq!((early.json()["switches"].as_array().unwrap().len(), &early.json()["version"]), (0, &json!(1)));

    let mut running =
        migration.migrate(&["--queue-max-bytes", "128MiB", "--source-password-command", "echo hush-hush"]);
    let ready = migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    // One that is given up, one that goes through.
    let refused =
        migration.with_directory("cutover", &["--yes", "--on-fence", "false", "--max-write-stall", "25s"]).await;
    assert_eq!(refused.code, Some(5), "{}", refused.stderr);
    let cutover = migration.cut_over(running).await;
    application.stop().await;

    let made = migration.with_directory("report", &["--json"]).await;
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let report = made.json();
    let row = &migration
        .ledger("SELECT (SELECT count(*) FROM walferry.source_table), (SELECT sum(rows_copied)::int8 FROM walferry.source_table), \
                        (SELECT count(*) FROM walferry.schema_item), current_setting('server_version')")
        .await[0];
    let (tables, rows, objects): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(report["moved"]["tables"], tables);
    assert_eq!(report["moved"]["rows"], rows);
    assert_eq!(report["moved"]["tables"], ready["copy"]["tables_total"]);
    let sum: i64 = report["objects"].as_array().unwrap().iter().map(|kind| kind["count"].as_i64().unwrap()).sum();
    assert_eq!(sum, objects);
    for server in ["source", "target"] {
        assert_eq!(report[server]["version"], row.get::<_, &str>(3), "{server}");
    }
    assert_eq!(report["switches"][0]["outcome"], cutover, "downtime and steps as `cutover --json` had them");
    let verification = &report["verification"];
    assert_eq!((&verification["equal"], &verification["complete"]), (&json!(true), &json!(true)));
    assert_eq!(verification["tables"], verified.json()["tables"].as_array().unwrap().len());
    let phases: Vec<&str> =
        report["phases"].as_array().unwrap().iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    for phase in ["preparing", "copying", "following", "cutting over"] {
        assert!(phases.contains(&phase), "{phases:?}");
    }
    let incidents = report["incidents"].to_string();
    assert!(incidents.contains("--on-fence"), "the cutover that was given up: {incidents}");
    let commands: Vec<(&str, Option<u64>)> = report["commands"]
        .as_array()
        .unwrap()
        .iter()
        .map(|command| (command["command"].as_str().unwrap(), command["exit"].as_u64()))
        .collect();
    let expected =
        [("migrate", None), ("migrate", Some(0)), ("verify", Some(0)), ("cutover", Some(5)), ("cutover", Some(0))];
    assert_eq!(commands, expected);
    assert!(!report["points"].as_array().unwrap().is_empty());
    assert!(report["statements"].to_string().contains("CREATE_REPLICATION_SLOT"));
    assert_eq!(report["lacks"], json!([]));

    let file = migration.files().join("report.html");
    let written = migration.with_directory("report", &["--output", file.to_str().unwrap()]).await;
    assert_eq!((written.code, written.stdout.as_str()), (Some(0), ""), "{}", written.stderr);
    let page = std::fs::read_to_string(&file).unwrap();
    for text in [&page, &made.stdout] {
        assert!(!text.contains("hush-hush"), "a password is in the report");
    }
    assert!(!page.contains("<script") && !page.contains("<img") && !page.contains("http:") && !page.contains("https:"));

    // Where nobody answers, what the state directory has is told, and that it is not all.
    let nowhere = ["--target", "postgres://nobody@127.0.0.1:1/nowhere", "--json"];
    let alone = migration.with_directory("report", &nowhere).await.json();
    assert_eq!(alone["commands"], report["commands"]);
    assert_eq!(alone["moved"]["rows"], rows);
    assert!(alone["lacks"][0].as_str().unwrap().contains("could not be read"), "{}", alone["lacks"]);

    let (Some(driver), Some(_)) = (tools::program("chromedriver"), tools::program("chromium")) else { return };
    for (width, scheme) in [(1280, "light"), (390, "dark")] {
        let browser = Browser::start(&driver, &migration.files(), width, scheme).await;
        browser.open(&format!("file://{}", file.display()));
        browser.shows("its heading", "return document.querySelector('h1')?.textContent.startsWith('Migration ')").await;
        browser.assert_good_to_read(&format!("report, {scheme}"));
        browser.keep_screenshot(&format!("report-{scheme}"));
        assert!(browser.run("return document.title").as_str().unwrap().starts_with("Migration "));
        assert_eq!(browser.run("return performance.getEntriesByType('resource').length"), 0, "it loads nothing");
        assert_eq!(browser.run("return document.querySelectorAll('script, img, link, iframe').length"), 0);
        let text = browser.run("return document.body.innerText").as_str().unwrap().to_owned();
        for shown in ["<img src=x onerror=document.title='owned'>", "</style><script>", "exit 5", "Cutover", "equal"] {
            assert!(text.contains(shown), "{shown} is not in {text}");
        }
        let nameless =
            "return [...document.querySelectorAll('figure svg')].filter((e) => !e.getAttribute('aria-label')).length";
        assert_eq!(browser.run(nameless), 0);
        assert_eq!(browser.complaints(), Vec::<Value>::new());
    }
}
