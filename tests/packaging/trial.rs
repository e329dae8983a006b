//! The trial with Docker Compose, run to its end: docker-compose.yml and the Dockerfile with images that are made here, as the README says it.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::engine::{Engine, text};
use super::{file, read};

const IMAGE: &str = "walferry-trial-debian";
/// How long a state may be waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// The composed services.
struct Trial {
    engine: Engine,
}

impl Trial {
    /// `docker-compose` with the files and these arguments.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.engine.command("docker-compose");
        command.args(["--project-name", "trial", "--project-directory"]).arg(file("."));
        command.arg("-f").arg(self.engine.directory().join("docker-compose.yml"));
        command.arg("-f").arg(file("tests/packaging/compose/override.yml")).args(arguments);
        command
            .env("TRIAL_CONTEXT", self.engine.directory().join("context"))
            .env("TRIAL_DOCKERFILE", file("Dockerfile"));
        command
    }

    fn compose(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        if !output.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&self.command(&["logs", "--tail", "50"]).output().unwrap().stdout));
        }
        text(output, &arguments.join(" "))
    }

    /// The container of a service.
    fn container(&self, service: &str) -> String {
        let of_service = format!("label=com.docker.compose.service={service}");
        self.engine.docker(&["ps", "--all", "--quiet", "--filter", &of_service]).trim().to_owned()
    }

    /// What a program prints in the container of a service. Not by docker-compose, which takes most of a second to begin.
    fn run_in(&self, service: &str, program: &[&str]) -> String {
        self.engine.docker(&[&["exec", &self.container(service)], program].concat())
    }

    /// A query's answer, as the superuser.
    fn query(&self, server: &str, query: &str) -> String {
        let answer = self.run_in(server, &["psql", "-h", "/tmp", "-U", "postgres", "-d", "shop", "-Atqc", query]);
        answer.trim().to_owned()
    }

    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            if Instant::now() > deadline {
                let logs = self.command(&["logs", "--tail", "100"]).output().unwrap();
                panic!("waited in vain until {what}\n{}", String::from_utf8_lossy(&logs.stdout));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Until the application has written here once more.
    fn is_written_to(&self, server: &str) {
        let written = || self.query(server, "SELECT coalesce(max(id), 0) FROM pgbench_history").parse::<u64>().unwrap();
        let before = written();
        self.until(&format!("{server} is written to"), || written() > before);
    }

    fn rows(&self, server: &str) -> String {
        let tables = ["accounts", "branches", "history", "tellers"];
        let of_table =
            |table| format!("SELECT '{table}', count(*), sum(hashtextextended(t::text, 0)) FROM pgbench_{table} AS t");
        self.query(server, &tables.map(of_table).join(" UNION ALL "))
    }
}

/// The images: one of this machine's packages, and with it as base the Dockerfile's.
fn image() -> Result<Vec<u8>, String> {
    let mut command = Command::new(file("tests/packaging/compose/image.sh"));
    for program in ["prometheus", "promtool"] {
        command.arg(super::support::tools::program(program).ok_or_else(|| format!("{program} is missing"))?);
    }
    let output = command.output().map_err(|error| format!("image.sh: {error}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!("an image of this machine's packages: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn engine_with_image() -> Result<Engine, String> {
    let engine = Engine::start()?;
    engine.import(&image()?, IMAGE)?;
    engine.can_run(IMAGE)?;
    Ok(engine)
}

/// The command that the README gives for the cutover of the trial, without what reaches the container.
fn cutover_of_the_readme() -> String {
    let readme = read("README.md");
    let command =
        readme.lines().find_map(|line| line.trim().strip_prefix("docker compose exec walferry walferry cutover"));
    format!("walferry cutover {}", command.expect("the README has the cutover of the trial"))
}

#[test]
fn the_trial_of_the_readme_goes_through_to_its_cutover_in_containers() {
    let engine = match engine_with_image() {
        Ok(engine) => engine,
        Err(reason) => {
            eprintln!("!!! SKIPPED: the trial was not run, only its files were checked: {reason}");
            return;
        }
    };
    let trial = Trial { engine };
    let directory = trial.engine.directory();
    // Host networking has no ports to be published; that they are on loopback is checked in the file.
    let without_ports: Vec<String> = read("docker-compose.yml")
        .lines()
        .filter(|line| !line.trim().starts_with("ports:"))
        .map(str::to_owned)
        .collect();
    std::fs::write(directory.join("docker-compose.yml"), without_ports.join("\n")).unwrap();
    std::fs::create_dir(directory.join("context")).unwrap();
    let program = directory.join("context/walferry");
    // A debug build is large; what is sent to the engine need not be.
    let output = Command::new("strip").arg("-o").arg(&program).arg(env!("CARGO_BIN_EXE_walferry")).output().unwrap();
    text(output, "strip");
    trial.compose(&["build", "walferry"]);
    trial.compose(&["up", "--detach", "--no-build", "source", "target", "load", "walferry", "prometheus"]);

    // It follows while the application writes, as a user without rights, and says that it is well.
    trial.until("walferry is ready for the cutover", || {
        let container = trial.container("walferry");
        let output =
            trial.engine.command("docker").args(["exec", &container, "walferry", "status", "--json"]).output().unwrap();
        let status = serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default();
        status["ready_to_cutover"] == true
    });
    trial.is_written_to("source");
    assert_eq!(trial.run_in("walferry", &["id", "-u"]).trim(), "10001");
    assert!(trial.run_in("walferry", &["pg_dump", "--version"]).starts_with("pg_dump (PostgreSQL)"));
    let health = ["inspect", "--format", "{{.State.Health.Status}}", &trial.container("walferry")];
    trial.until("the health check of the image has run", || trial.engine.docker(&health).trim() == "healthy");
    let query = "walferry_phase{job=\"walferry\",phase=\"following\"} == 1";
    let scraped = ["promtool", "query", "instant", "http://prometheus:9090", query];
    trial.until("Prometheus has scraped walferry", || trial.run_in("prometheus", &scraped).contains("walferry_phase"));
    // Nobody is told the password of another: the environment of no container has any.
    for service in ["source", "target", "load", "walferry", "prometheus"] {
        let environment = trial.engine.docker(&["inspect", "--format", "{{.Config.Env}}", &trial.container(service)]);
        let named = environment.split(' ').filter(|variable| variable.contains("PASSWORD="));
        assert_eq!(named.count(), 0, "{service}: {environment}");
    }

    // The command of the README, which only lacks a terminal to be asked on.
    let command = format!("{} --yes --json", cutover_of_the_readme());
    let outcome: Value =
        serde_json::from_str(&trial.compose(&["exec", "-T", "walferry", "sh", "-c", &command])).unwrap();
    assert!(outcome["downtime_ms"].as_f64().unwrap() > 0.0, "{outcome}");
    assert_eq!(outcome["reverse"], "armed", "{outcome}");
    assert_eq!(trial.query("source", "SHOW default_transaction_read_only"), "on");
    // The application has gone over by itself, and what it writes there comes back to the old server.
    trial.is_written_to("target");
    trial.compose(&["stop", "--timeout", "1", "load"]);
    trial.until("both servers have the same rows", || trial.rows("source") == trial.rows("target"));
    let rows = trial.rows("target");
    assert!(rows.contains("accounts|1000000|") && !rows.contains("history|0|"), "{rows}");
    let status: Value = serde_json::from_str(&trial.run_in("walferry", &["walferry", "status", "--json"])).unwrap();
    assert_eq!(status["phase"], "cut_over");
}
