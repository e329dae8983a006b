//! The status page in a real browser.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

mod support;

use serde_json::Value;
use support::browser::Browser;
use support::load::{self, Application};
use support::{Servers, http, tools, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_a_migration_from_its_beginning_to_its_end() {
    let (Some(driver), Some(_)) = (tools::program("chromedriver"), tools::program("chromium")) else { return };
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 500).await;
    // A name that would be markup.
    let hostile = r#"CREATE TABLE "<img src=x onerror=document.title='owned'>" (id int PRIMARY KEY)"#;
    migration.source().await.batch_execute(hostile).await.unwrap();
    let application = Application::start(&migration.source_url, 1);
    let dump = support::hold_pg_dump(&mut migration);
    let mut running = migration.migrate(&["--http-addr", "127.0.0.1:0"]);
    dump.is_reached().await;
    let url = format!("http://127.0.0.1:{}/", http::port(&running));
    let browser = Browser::start(&driver, &migration.files(), 1280, "light").await;
    browser.open(&url);
    let phase =
        |name: &str| format!("return document.querySelector('#phases [aria-current]')?.textContent === '{name}'");
    browser.shows("that it prepares", &phase("preparing")).await;
    dump.release();

    browser.shows("that it follows", &phase("following")).await;
    browser.shows("that it can be cut over", "return document.getElementById('ready').textContent === 'ready'").await;
    browser.shows("the tables", "return document.querySelectorAll('#tables tr').length > 5").await;
    browser.shows("the pace", "return /^[1-9][0-9,]*\\/s$/.test(document.getElementById('applied').textContent)").await;
    let tables = browser.text("tables");
    assert!(tables.contains("app.big") && tables.contains("<img src=x onerror=document.title='owned'>"), "{tables}");
    assert_eq!(browser.run("return document.title"), "following · walferry");
    assert_eq!(browser.run("return document.querySelectorAll('.plots canvas').length"), 4);
    assert!(browser.text("events").contains("phase: following"));
    browser.assert_good_to_read("wide, light");
    browser.keep_screenshot("page");
    assert_eq!(browser.complaints(), Vec::<Value>::new());

    // On a phone in the dark; with the history of before it was opened.
    let phone = Browser::start(&driver, &migration.files(), 390, "dark").await;
    phone.open(&url);
    phone.shows("that it follows", &phase("following")).await;
    phone.assert_good_to_read("narrow, dark");
    phone.keep_screenshot("page-phone");
    assert_eq!(phone.complaints(), Vec::<Value>::new());
    drop(phone);

    // A failure is shown with what to do next.
    migration
        .source()
        .await
        .batch_execute("ALTER TABLE app.heavy ADD COLUMN more int; UPDATE app.heavy SET more = 1")
        .await
        .unwrap();
    application.stop().await;
    until("it has ended", || {
        let ended = !running.is_alive();
        async move { ended.then_some(()) }
    })
    .await;
    browser.shows("that nobody answers", "return document.getElementById('connection').className === 'bad'").await;
    browser.assert_good_to_read("ended");
}
