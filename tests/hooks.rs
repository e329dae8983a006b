//! Commands of the operator's around a cutover: run when they should be, at least once, and never in the way of what is decided.

use crate::fence::HeldCommand;
use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, until_true};

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

async fn is_closed(migration: &Migration) -> bool {
    let setting = migration.source().await.query_one("SHOW default_transaction_read_only", &[]).await.unwrap();
    setting.get::<_, &str>(0) == "on"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_are_run_in_their_places_also_by_whoever_comes_after_a_crash() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 1_000).await;
    let application = Application::start(&migration.source_url, 2);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let (abort, switch) = (HeldCommand::new(&migration, "abort"), HeldCommand::new(&migration, "switch"));
    abort.let_go();
    let (on_abort, on_switch) = (abort.text(), switch.text());
    let usual = ["--yes", "--no-reverse", "--timeout", "60s", "--max-write-stall", "60s", "--hook-timeout", "60s"];

    // It fails, and so does the cutover.
    let refused = migration
        .with_directory(
            "cutover",
            &[&usual[..], &["--on-fence", "exit 3", "--on-abort", &on_abort, "--on-switch", &on_switch]].concat(),
        )
        .await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["during on-fence", "--on-fence", "exit status: 3", "The fence is lifted"]);
    assert_eq!((abort.ran(), switch.ran()), (vec!["on-abort".to_owned()], vec![]));
    assert!(!is_closed(&migration).await);
    let status = migration.status().await.unwrap();
    assert_eq!(status["cutover"]["last_given_up"]["step"], "on-fence", "{status:#}");

    // It takes too long, and a precondition that does not hold runs nothing.
    let refused = migration
        .with_directory(
            "cutover",
            &["--yes", "--no-reverse", "--hook-timeout", "300ms", "--on-fence", "sleep 1000", "--on-abort", "exit 4"],
        )
        .await;
    println!("{}", refused.stderr);
    refused.assert_refused(5, &["was killed", "--on-abort ended with exit status: 4"]);

    // Killed with writers held: whoever comes says where it was, and runs the command for it.
    let fence = HeldCommand::new(&migration, "fence");
    let cutover = migration.start(
        "cutover",
        &[&usual[..], &["--on-fence", &fence.text(), "--on-abort", &on_abort, "--on-switch", &on_switch]].concat(),
    );
    fence.has_run(1).await;
    // The step is noted beside the command that it is of.
    until_true(&migration.target().await, "SELECT fence->>'step' = 'on-fence' FROM walferry.migration").await;
    running.kill().await;
    cutover.wait().await;
    assert_eq!(abort.ran().len(), 1);
    let mut running = migration.migrate(&[]);
    abort.has_run(2).await;
    ready(&migration, &mut running).await;
    application.goes_on(20).await;
    assert!(running.log().contains("cut off during on-fence"), "{}", running.log());
    assert_eq!(switch.ran(), Vec::<String>::new());

    // Killed when it is decided and nobody knows yet: that is done at the next start.
    let cutover =
        migration.start("cutover", &[&usual[..], &["--on-switch", &on_switch, "--on-abort", &on_abort]].concat());
    switch.has_run(1).await;
    running.kill().await;
    cutover.wait().await;
    let decided = migration.ledger("SELECT phase, cutover ? 'pending' FROM walferry.migration").await;
    assert_eq!((decided[0].get::<_, &str>(0), decided[0].get::<_, bool>(1)), ("cut_over", true));
    switch.let_go();
    let ended = migration.migrate(&[]).wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(switch.ran(), ["on-switch", "on-switch"], "at least once");
    let again = migration.migrate(&[]).wait().await;
    assert_eq!((again.code, switch.ran().len()), (Some(0), 2), "and not for ever");
    assert_eq!(abort.ran().len(), 2);
    assert!(is_closed(&migration).await);
    application.stop().await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_fails_after_the_decision_takes_nothing_back() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 500).await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let cutover = migration
        .with_directory(
            "cutover",
            &["--yes", "--no-reverse", "--json", "--sequence-margin", "100", "--on-switch", "echo to the log; exit 7"],
        )
        .await;
    assert_eq!(cutover.code, Some(0), "{}", cutover.stderr);
    let outcome = cutover.json();
    let warnings = outcome["warnings"].to_string();
    assert!(warnings.contains("exit status: 7") && warnings.contains("by hand"), "{warnings}");
    let steps: Vec<&str> =
        outcome["steps"].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap()).collect();
    assert_eq!(steps.join(" "), "check fence drain close settle switch on-switch release");
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("to the log"), "{}", ended.stderr);
    assert!(is_closed(&migration).await);
    let last = "SELECT last_value FROM app.note_id_seq";
    let on_source: i64 = migration.source().await.query_one(last, &[]).await.unwrap().get(0);
    let on_target: i64 = migration.target().await.query_one(last, &[]).await.unwrap().get(0);
    assert_eq!(on_target, on_source + 100);
}
