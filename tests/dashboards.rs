//! The dashboard and the alert rules, asked of a real Prometheus that scrapes a real migration.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

mod support;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::load::{self, Application};
use support::{Servers, http, tools, until};
use walferry::observe::metrics;

fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards")
}

fn dashboard() -> Value {
    serde_json::from_str(&std::fs::read_to_string(dashboards().join("walferry.json")).unwrap()).unwrap()
}

#[test]
fn the_rules_are_right_and_fire_when_they_should() {
    let Some(promtool) = tools::program("promtool") else { return };
    for arguments in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]] {
        let output = Command::new(&promtool).args(arguments).current_dir(dashboards()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    // Each rule is in the unit tests, with an instance for which it fires.
    let (rules, tests) = (file("alerts.yml"), file("alerts.test.yml"));
    let names: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 10);
    for name in names {
        assert!(tests.contains(&format!("alertname=\"{name}\"")), "{name} has no unit test");
    }
    assert_eq!(rules.matches("runbook:").count(), rules.matches("- alert:").count(), "each has a line for the runbook");
}

fn file(name: &str) -> String {
    std::fs::read_to_string(dashboards().join(name)).unwrap()
}

/// What Grafana's model of a dashboard asks for, as far as a file can break it.
#[test]
fn the_dashboard_is_one_that_grafana_can_load() {
    let dashboard = dashboard();
    assert!(
        dashboard["uid"].is_string()
            && dashboard["title"].is_string()
            && dashboard["schemaVersion"].as_u64() > Some(35)
    );
    let variables: BTreeSet<&str> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    assert_eq!(variables, BTreeSet::from(["datasource", "instance"]));
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "no id twice");
    let mut taken = BTreeSet::new();
    for panel in panels {
        let (title, kind) = (panel["title"].as_str().unwrap(), panel["type"].as_str().unwrap());
        assert!(["row", "stat", "gauge", "bargauge", "timeseries"].contains(&kind), "{title}: {kind}");
        let place = |name: &str| panel["gridPos"][name].as_u64().unwrap_or_else(|| panic!("{title} has no {name}"));
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(x < 24 && taken.insert((x, y)), "{title} overlaps another, or is too wide");
            }
        }
        if kind == "row" {
            continue;
        }
        assert!(panel["description"].as_str().is_some_and(|text| text.len() > 10), "{title} says what it shows");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap();
        assert!(["none", "s", "bytes", "Bps", "ops", "percentunit"].contains(&unit), "{title}: {unit}");
        let targets = panel["targets"].as_array().unwrap();
        let references: BTreeSet<&str> = targets.iter().map(|target| target["refId"].as_str().unwrap()).collect();
        assert!(!targets.is_empty() && references.len() == targets.len(), "{title}");
        assert!(targets.iter().all(|target| target["expr"].as_str().unwrap().contains("$instance")), "{title}");
    }
}

/// The queries of all panels, with what they belong to.
fn queries() -> Vec<(String, String)> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let of_panel = |panel: &Value| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
    };
    panels.flat_map(of_panel).collect()
}

/// The metrics that a query names, each with its labels as it has them.
fn selectors(query: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = query[from..].find("walferry_").map(|at| at + from) {
        let rest = &query[at..];
        let name = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let end = if rest[name..].starts_with('{') { name + rest[name..].find('}').unwrap() + 1 } else { name };
        found.push(&rest[..end]);
        from = at + end;
    }
    found
}

fn assert_known(query: &str) {
    assert!(!selectors(query).is_empty() || query.contains("up{"), "{query} asks for nothing of ours");
    for selector in selectors(query) {
        let name = selector.split('{').next().unwrap();
        let base = name.strip_suffix("_bucket").unwrap_or(name);
        assert!(metrics::ALL.iter().any(|metric| metric.name == base), "{query} names {name}, which there is not");
    }
}

/// A Prometheus of our own; killed when it is dropped.
struct Prometheus {
    child: Child,
    port: u16,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    fn start(program: &Path, directory: &Path, scraped: u16) -> Prometheus {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rules = dashboards().join("alerts.yml");
        let configuration = format!(
            "global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}\n\
             rule_files: ['{}']\n\
             scrape_configs: [{{job_name: walferry, static_configs: [{{targets: ['127.0.0.1:{scraped}']}}]}}]\n",
            rules.display()
        );
        let file = directory.join("prometheus.yml");
        std::fs::write(&file, configuration).unwrap();
        let child = Command::new(program)
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("tsdb").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.join("prometheus.log")).unwrap())
            .spawn()
            .unwrap();
        Prometheus { child, port }
    }

    fn is_up(&self) -> bool {
        std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok()
    }

    fn get(&self, path: &str) -> Value {
        let answer: Value = serde_json::from_str(&http::get(self.port, path)).unwrap();
        assert_eq!(answer["status"], "success", "{path}: {answer}");
        answer["data"].clone()
    }

    /// The series that a query finds now.
    fn query(&self, query: &str) -> Vec<Value> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        self.get(&format!("/api/v1/query?query={encoded}"))["result"].as_array().unwrap().clone()
    }

    async fn has(&self, what: &str, query: &str) {
        until(&format!("{what} has data: {query}"), || async {
            let found = !self.query(query).is_empty();
            tokio::time::sleep(std::time::Duration::from_millis(if found { 0 } else { 100 })).await;
            found.then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_query_of_the_dashboard_and_of_the_rules_has_data() {
    for (panel, query) in queries() {
        assert_known(&query);
        assert!(query.contains("instance=~\"$instance\""), "{panel}: {query}");
    }
    let Some(program) = tools::program("prometheus") else { return };
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 500).await;
    let item = "CREATE TABLE item (id int PRIMARY KEY, n int); INSERT INTO item VALUES (1, 0)";
    migration.source().await.batch_execute(item).await.unwrap();
    let application = Application::start(&migration.source_url, 1);
    let options = ["--http-addr", "127.0.0.1:0", "--on-conflict", "source", "--source-wal-max", "1TiB"];
    let mut running = migration.migrate(&options);
    migration.wait_for_phase(&mut running, "following").await;
    // A conflict, and a comparison, so that there is something to show of both.
    migration.target().await.batch_execute("DELETE FROM item").await.unwrap();
    migration.source().await.batch_execute("UPDATE item SET n = 1").await.unwrap();
    let verified = migration.with_directory("verify", &["--tables", "app.big"]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);

    let prometheus = Prometheus::start(&program, &migration.files(), http::port(&running));
    until("Prometheus listens", || async { prometheus.is_up().then_some(()) }).await;
    until("Prometheus is ready", || async {
        let answer = http::ask(prometheus.port, "GET /-/ready HTTP/1.0\r\nHost: localhost\r\n\r\n");
        answer.contains(" 200 ").then_some(())
    })
    .await;
    prometheus.has("the scrape", "up{job=\"walferry\"} == 1").await;
    for (panel, query) in queries() {
        let query = query.replace("$instance", ".*").replace("$__rate_interval", "10s");
        prometheus.has(&panel, &query).await;
    }

    // The rules are asked for as Prometheus has read them. What they compare is there, whether they fire or not.
    let evaluated = || {
        let groups = prometheus.get("/api/v1/rules")["groups"].as_array().unwrap().clone();
        let rules: Vec<Value> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect();
        rules.iter().all(|rule| rule["health"] == "ok").then_some(rules)
    };
    let rules = until("all rules were evaluated", || async { evaluated() }).await;
    assert!(rules.len() > 10);
    for rule in rules {
        let (name, query) = (rule["name"].as_str().unwrap(), rule["query"].as_str().unwrap());
        assert_known(query);
        for selector in selectors(query) {
            prometheus.has(name, selector).await;
        }
    }
    // Every metric is shown somewhere, or is there to be asked for by name.
    for metric in metrics::ALL {
        let suffix = if metric.kind == metrics::Kind::Histogram { "_count" } else { "" };
        prometheus.has("a scrape", &format!("{}{suffix}", metric.name)).await;
    }
    application.stop().await;
    migration.cut_over(running).await;
}
