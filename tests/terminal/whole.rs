//! One migration from its beginning to its end: its JSON, its view, and what it says to do next.

use ratatui::Terminal as Picture;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use serde_json::Value;
use walferry::observe::status::Status;
use walferry::observe::watch::{Look, Shown, draw};

use crate::schema::assert_valid;
use crate::screen::{Cell, Terminal};
use crate::support::load::{self, Application};
use crate::support::process::Finished;
use crate::support::{self, Servers, until};

fn drawn(shown: &Shown, width: u16, height: u16) -> Buffer {
    let mut picture = Picture::new(TestBackend::new(width, height)).unwrap();
    picture.draw(|frame| draw(frame, shown, Look { colour: true, unicode: true })).unwrap();
    picture.backend().buffer().clone()
}

/// The view of a status in each size says all of this.
#[track_caller]
fn assert_shows(shown: &Shown, said: &[&str]) {
    for (width, height) in [(120, 40), (80, 24), (60, 30)] {
        let text: String = drawn(shown, width, height).content.iter().map(ratatui::buffer::Cell::symbol).collect();
        for said in said {
            assert!(text.contains(said), "no {said:?} at {width}x{height}: {text}");
        }
    }
}

fn valid_status(json: &Value) -> Status {
    assert_valid("status", json);
    serde_json::from_value(json.clone()).unwrap()
}

#[track_caller]
fn valid(schema: &str, finished: &Finished, code: i32) -> Value {
    assert_eq!(finished.code, Some(code), "{schema}: {}", finished.stderr);
    let json = finished.json();
    assert_valid(schema, &json);
    json
}

/// Whether a colour is switched on anywhere (30 to 38, 90 to 97 and 40 to 48 of SGR).
fn is_coloured(written: &str) -> bool {
    written.split("\x1b[").skip(1).any(|sequence| {
        let Some(end) = sequence.find(|letter: char| letter.is_ascii_alphabetic()) else { return false };
        let (parameters, command) = sequence.split_at(end);
        let is_colour = |code: &str| matches!(code.parse(), Ok(30..=38 | 40..=48 | 90..=97));
        command.starts_with('m') && parameters.split(';').next().is_some_and(is_colour)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_says_what_its_schemas_say_and_its_view_shows_it_in_every_phase() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 20_000).await;
    migration
        .source()
        .await
        .batch_execute("CREATE TABLE quiet AS SELECT 1 AS id, 'x' AS text; ALTER TABLE quiet ADD PRIMARY KEY (id)")
        .await
        .unwrap();
    let directory = migration.directory();
    let path = directory.to_str().unwrap().to_owned();
    let mut shown = Shown::new("/var/lib/walferry/shop");

    let check = migration.with_servers("check", &["--json", "--estimate-seconds", "1"]).await;
    valid("check", &check, 0);

    // Before the copy.
    let dump = support::hold_pg_dump(&mut migration);
    let slow = ["--queue-max-bytes", "256MiB", "--copy-rate", "300KiB", "--copy-jobs", "3", "--split-above", "20MiB"];
    let mut running = migration.migrate(&slow);
    dump.is_reached().await;
    let status = migration.wait_for_phase(&mut running, "preparing").await;
    shown.take(valid_status(&status));
    assert_shows(&shown, &["preparing", "not yet"]);
    valid("pause", &migration.with_directory("pause", &["copy", "--json"]).await, 0);
    dump.release();

    // A copy that the operator holds, and then slows.
    let status = migration.wait_for_status(&mut running, "that it copies", |status| status["phase"] == "copying").await;
    assert_eq!(status["copy"]["paused"], true);
    valid("pause", &migration.with_directory("resume", &["--json"]).await, 0);
    let status = migration
        .wait_for_status(&mut running, "some rows", |status| {
            let done = status["copy"]["bytes_done"].as_u64().unwrap();
            done > 500_000 && status["copy"]["bytes_per_second"].as_f64().unwrap() > 0.0
        })
        .await;
    shown.take(valid_status(&status));
    assert_shows(&shown, &["copying", "app.big", "tables", "╭ Copy"]);
    valid("tune", &migration.with_directory("tune", &["--copy-rate", "off", "--json"]).await, 0);

    // It follows an application that writes.
    let application = Application::start(&migration.source_url, 2);
    let status = migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let status = valid_status(&status);
    assert!(status.verification.is_none());
    shown.take(status);
    assert_shows(&shown, &["following", "Ready to cut over", "walferry cutover", "ready"]);
    valid("cutover-dry-run", &migration.with_directory("cutover", &["--dry-run", "--json"]).await, 0);
    until("what comes next is said", || {
        let said = running.log().contains("next: walferry verify --dir");
        async move { said.then_some(()) }
    })
    .await;

    // A difference, and its repair.
    migration
        .target()
        .await
        .batch_execute("SET session_replication_role = replica; UPDATE quiet SET text = 'y'")
        .await
        .unwrap();
    let compared =
        valid("verify", &migration.with_servers("verify", &["--dir", &path, "--json", "--show-values"]).await, 4);
    assert_eq!(compared["online"], true);
    let status =
        migration.wait_for_status(&mut running, "the comparison", |status| !status["verification"].is_null()).await;
    shown.take(valid_status(&status));
    assert_shows(&shown, &["DIFFERENT"]);
    let repaired = migration.with_servers("repair", &["--dir", &path, "--json"]).await;
    assert_eq!(valid("repair", &repaired, 0)["rows_copied"], 1);
    valid("verify", &migration.with_servers("verify", &["--dir", &path, "--json"]).await, 0);

    // Watched on a real terminal, while it goes away and comes back.
    let program = env!("CARGO_BIN_EXE_walferry");
    let watch = format!("{program} status --watch --dir {path}");
    let mut terminal = Terminal::start(&watch, &[("LC_ALL", "C.UTF-8")], &migration.files());
    let shows = |terminal: &Terminal, what: &'static str| {
        let shown = terminal.shown();
        async move { shown.contains(what).then_some(()) }
    };
    until("the terminal shows that it is ready", || shows(&terminal, "Ready to cut over")).await;
    let ended = running.terminate().await;
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    until("the terminal shows that nothing runs", || shows(&terminal, "No migration is running")).await;
    assert!(ended.stderr.contains("Run the same command again"), "{}", ended.stderr);
    let mut running = migration.migrate(&["--queue-max-bytes", "256MiB"]);
    until("the terminal shows that it follows again", || shows(&terminal, "Ready to cut over")).await;
    // Somebody pulls at the window.
    terminal.resize(72, 20);
    until("it is drawn for the new size", || async {
        let screen = terminal.screen();
        let (header, footer) = (&screen.lines[0], &screen.lines[19]);
        let ends = |line: &Vec<Cell>, with: &str| {
            line.iter().map(|cell| cell.symbol).collect::<String>().trim_end().ends_with(with)
        };
        (ends(header, "UTC") && footer[1].symbol == 'q' && terminal.shown().contains("Ready to cut over")).then_some(())
    })
    .await;
    terminal.press("q");
    until("the view has ended", || {
        let written = terminal.written();
        async move { written.contains("ended with 0").then_some(()) }
    })
    .await;
    let written = terminal.written();
    let (entered, left) = (written.find("\x1b[?1049h").unwrap(), written.rfind("\x1b[?1049l").unwrap());
    assert!(entered < left && written[left..].contains("\x1b[?25h"), "the terminal is as it was");
    assert!(written[left..].contains("following: lag "), "and says how it was: {}", &written[left..]);
    drop(terminal);

    // Without colours and without UTF-8; ended by Ctrl-C.
    let mut plain = Terminal::start(&watch, &[("LC_ALL", "C"), ("NO_COLOR", "1")], &migration.files());
    until("the plain terminal shows that it is ready", || shows(&plain, "Ready to cut over")).await;
    let drawn_until_now = plain.written();
    let picture = &drawn_until_now[drawn_until_now.find("\x1b[?1049h").unwrap()..];
    assert!(picture.is_ascii() && !is_coloured(picture), "{picture:?}");
    assert!(is_coloured(&written), "elsewhere there are colours");
    // What was before somebody looked is in the plots from the first picture on: they have more than one second.
    let shown_now = plain.shown();
    assert!(shown_now.contains(" most ") && !shown_now.contains(" in 1.0 s "), "{shown_now}");
    plain.press("\x03");
    until("the plain view has ended", || {
        let written = plain.written();
        async move { written.contains("ended with 0").then_some(()) }
    })
    .await;
    drop(plain);

    // Without a terminal there are lines.
    let lines = migration.start("status", &["--watch"]);
    until("lines come", || async { (lines.output().matches("phase     following").count() > 1).then_some(()) }).await;
    assert!(!lines.output().contains('\x1b'));
    lines.kill().await;

    // Switched, with a way back, and the end of that.
    migration
        .wait_for_status(&mut running, "a way back", |status| {
            status["way_back"] == "ready" && status["ready_to_cutover"] == true
        })
        .await;
    application.stop().await;
    let cutover = migration.with_directory("cutover", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(valid("cutover", &cutover, 0)["reverse"], "armed");
    let status = migration
        .wait_for_status(&mut running, "that it is cut over", |status| {
            status["ready_to_cutover"] == true && status["direction"] == "back"
        })
        .await;
    shown.take(valid_status(&status));
    assert_shows(&shown, &["cut over", "The target is the primary", "walferry switchback", "walferry finish"]);
    until("what comes next is said", || {
        let said = running.log().contains("walferry switchback --dir");
        async move { said.then_some(()) }
    })
    .await;
    valid("finish", &migration.with_directory("finish", &["--json"]).await, 0);
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let status = migration.with_directory("status", &["--json"]).await.json();
    shown.take(valid_status(&status));
    assert_shows(&shown, &["cut over", "done"]);

    // One that fails before it begins.
    let clean = migration.with_servers("clean", &["--dir", &path, "--json"]).await;
    valid("clean", &clean, 0);
    migration.state = "failed".into();
    let mut failed = Shown::new("./failed");
    let blocked = migration.migrate(&["--queue-max-bytes", "256MiB"]).wait().await;
    assert_eq!(blocked.code, Some(3), "{}", blocked.stderr);
    let status = migration.with_directory("status", &["--json"]).await;
    if status.code == Some(0) {
        let status = valid_status(&status.json());
        assert!(status.error.is_some());
        failed.take(status);
        assert_shows(&failed, &["failed", "It has stopped", "next: "]);
    }
    servers.target.connect("postgres").await.unwrap().batch_execute("CREATE DATABASE empty").await.unwrap();
    migration.target_url = servers.target.url_for("empty");
    let schema_only = migration.migrate(&["--schema-only", "--json", "--queue-max-bytes", "256MiB"]).wait().await;
    valid("migrate-schema-only", &schema_only, 0);
}

#[test]
fn a_checked_settings_file_is_as_its_schema_says() {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("walferry.toml");
    std::fs::write(&file, "dir = '/tmp'\ncopy-job = 4\n[cutover]\ntimeout = true\n").unwrap();
    let output = crate::about::walferry(&["config", "check", file.to_str().unwrap(), "--json"], &[]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_valid("config-check", &report);
    assert_eq!(report["findings"].as_array().unwrap().len(), 2, "{report}");
}
