//! What the tests of whole migrations share: two servers, a migration between two databases of them, the program as a child
//! process, an application that writes all the time, and a comparison by plain SQL that shares no code with walferry's own.

// Not every test program looks at pages.
#[allow(dead_code)]
pub mod browser;
pub mod compare;
// Not every test program asks.
#[allow(dead_code)]
pub mod http;
pub mod load;
pub mod process;
#[allow(dead_code)]
pub mod timescale;
#[allow(dead_code)]
pub mod tools;

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Client;
use walferry::demo::server::{ServerPrograms, ThrowawayServer};

use process::{Finished, Running};

/// How long anything may take before the test says what it waited for. It only ends tests that hang.
pub const PATIENCE: Duration = Duration::from_secs(120);

const SETTINGS: [(&str, &str); 6] = [
    ("fsync", "off"),
    ("wal_level", "logical"),
    ("max_prepared_transactions", "5"),
    ("max_connections", "60"),
    ("shared_buffers", "64MB"),
    // A checkpoint in the middle of a load costs more than the load.
    ("max_wal_size", "4GB"),
];

/// Two servers of a test's own: a slot waits for every transaction of its cluster, also for those of other tests.
pub struct Servers {
    pub source: ThrowawayServer,
    pub target: ThrowawayServer,
}

impl Servers {
    pub async fn start() -> Servers {
        Servers::with(&[], &[]).await
    }

    /// With settings of `postgresql.conf` that win over the usual ones.
    pub async fn with(source: &[(&str, &str)], target: &[(&str, &str)]) -> Servers {
        let programs = programs();
        Servers::of((&programs, source), (&programs, target)).await
    }

    /// Of two versions, each with settings of its own.
    pub async fn of(
        (source_programs, source): (&ServerPrograms, &[(&str, &str)]),
        (target_programs, target): (&ServerPrograms, &[(&str, &str)]),
    ) -> Servers {
        let (source, target) = ([&SETTINGS[..], source].concat(), [&SETTINGS[..], target].concat());
        let (source, target) = tokio::join!(
            ThrowawayServer::start(source_programs, "source", &source),
            ThrowawayServer::start(target_programs, "target", &target)
        );
        Servers { source: source.unwrap(), target: target.unwrap() }
    }

    /// A migration from the database of a name on the source to that on the target; both are made, and empty.
    pub async fn migration(&self, database: &str) -> Migration {
        for server in [&self.source, &self.target] {
            let administrator = server.connect("postgres").await.unwrap();
            let quoted = database.replace('"', "\"\"");
            administrator.batch_execute(&format!("CREATE DATABASE \"{quoted}\"")).await.unwrap();
        }
        Migration {
            source_url: self.source.url_for(database),
            target_url: self.target.url_for(database),
            files: tempfile::tempdir().unwrap(),
            state: "state".to_owned(),
            environment: Vec::new(),
        }
    }
}

pub fn programs() -> ServerPrograms {
    ServerPrograms::find(None).unwrap()
}

/// Two databases and a state directory; nothing runs yet.
pub struct Migration {
    pub source_url: String,
    pub target_url: String,
    /// The state directory is in here, and what the processes wrote to standard error.
    files: tempfile::TempDir,
    /// The state directory's name.
    pub state: String,
    /// Variables that the program gets besides its usual ones.
    pub environment: Vec<(String, String)>,
}

impl Migration {
    pub fn files(&self) -> PathBuf {
        self.files.path().to_owned()
    }

    pub fn directory(&self) -> PathBuf {
        self.files.path().join(&self.state)
    }

    fn dir(&self) -> String {
        self.directory().to_str().unwrap().to_owned()
    }

    pub async fn source(&self) -> Client {
        connect(&self.source_url).await
    }

    pub async fn target(&self) -> Client {
        connect(&self.target_url).await
    }

    /// `walferry migrate`, with these arguments besides those it must have.
    pub fn migrate(&self, arguments: &[&str]) -> Running {
        self.run("migrate", arguments)
    }

    /// `walferry resync`, likewise.
    pub fn resync(&self, arguments: &[&str]) -> Running {
        self.run("resync", arguments)
    }

    fn run(&self, command: &str, arguments: &[&str]) -> Running {
        let dir = self.dir();
        let mut all = vec![command, "--source", &self.source_url, "--target", &self.target_url, "--dir", &dir];
        if !arguments.contains(&"--http-addr") {
            all.extend(["--http-addr", "off"]);
        }
        // The default is more than a test machine's disk may have free.
        if !arguments.contains(&"--queue-max-bytes") {
            all.extend(["--queue-max-bytes", "4GiB"]);
        }
        all.extend(arguments);
        Running::start(&all, &self.files(), &self.environment)
    }

    /// `walferry <command> --dir …`.
    pub fn start(&self, command: &str, arguments: &[&str]) -> Running {
        let dir = self.dir();
        let all = [&[command, "--dir", &dir], arguments].concat();
        Running::start(&all, &self.files(), &self.environment)
    }

    /// `walferry <command> --dir …`, to its end.
    pub async fn with_directory(&self, command: &str, arguments: &[&str]) -> Finished {
        self.start(command, arguments).wait().await
    }

    /// `walferry <command> --source … --target …`, to its end.
    pub async fn with_servers(&self, command: &str, arguments: &[&str]) -> Finished {
        let all = [&[command, "--source", &self.source_url, "--target", &self.target_url], arguments].concat();
        Running::start(&all, &self.files(), &self.environment).wait().await
    }

    /// `walferry status --json`; `None` when there is nothing to show yet.
    pub async fn status(&self) -> Option<Value> {
        let status = self.with_directory("status", &["--json"]).await;
        (status.code == Some(0)).then(|| status.json())
    }

    /// Waits until the running migration shows this phase.
    pub async fn wait_for_phase(&self, running: &mut Running, phase: &str) -> Value {
        self.wait_for_status(running, phase, |status| status["phase"] == phase).await
    }

    /// Waits until the status of the running migration is as wished.
    pub async fn wait_for_status(&self, running: &mut Running, what: &str, wished: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.status().await {
                if status["process_alive"] == true && wished(&status) {
                    return status;
                }
                last = status;
            }
            assert!(running.is_alive(), "walferry ended before {what}:\n{}", running.log());
            assert!(Instant::now() < deadline, "no {what}; {last:#}\n{}", running.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until nothing stands against a cutover but what has changed on the source. That is looked for now and then, and stands in
    /// the status until it is dealt with.
    pub async fn ready_but_for_the_source(&self, running: &mut Running) {
        let is_ready = |status: &Value| {
            let blockers = status["blockers"].as_array().unwrap();
            status["phase"] == "following"
                && blockers.iter().all(|blocker| blocker.as_str().unwrap().starts_with("on the source, "))
        };
        self.wait_for_status(running, "ready but for the source", is_ready).await;
    }

    /// Cuts over as soon as that may begin, and waits for the end of `migrate`.
    pub async fn cut_over(&self, mut running: Running) -> Value {
        self.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
        let cutover =
            self.with_directory("cutover", &["--yes", "--no-reverse", "--json", "--max-write-stall", "25s"]).await;
        assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
        let ended = running.wait().await;
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        cutover.json()
    }

    /// What the ledger says; panics when there is none.
    pub async fn ledger(&self, query: &str) -> Vec<tokio_postgres::Row> {
        self.target().await.query(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}"))
    }

    /// What a migration left on both servers and on the disk; empty when it was cleaned up.
    pub async fn left_over(&self) -> Vec<String> {
        let mut left = compare::left_over(&self.source().await, "source").await;
        left.extend(compare::left_over(&self.target().await, "target").await);
        if self.directory().exists() {
            left.push(format!("directory {}", self.dir()));
        }
        left
    }

    /// Every row, every sequence and every definition is the same on both sides.
    pub async fn assert_equal(&self) {
        let (source, target) = (self.source().await, self.target().await);
        let (rows_of_source, rows_of_target) = tokio::join!(compare::rows(&source), compare::rows(&target));
        assert!(!rows_of_source.is_empty());
        assert_eq!(rows_of_source, rows_of_target, "rows of source and target (count, hash)");
        assert_eq!(compare::sequences(&source).await, compare::sequences(&target).await, "sequences");
        assert_eq!(compare::definitions(&source).await, compare::definitions(&target).await, "definitions");
    }
}

pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
        .await
        .unwrap_or_else(|error| panic!("connecting to {url}: {error:?}"));
    tokio::spawn(async move { drop(connection.await) });
    client
}

/// Looks again until there is an answer.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = look().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// Looks again until a query's one row and column is true. An error, such as a missing table, counts as not yet.
pub async fn until_true(client: &Client, query: &str) {
    until(query, || async {
        let row = client.query_opt(query, &[]).await.ok().flatten()?;
        row.get::<_, Option<bool>>(0).unwrap_or(false).then_some(())
    })
    .await;
}

/// Waits until a session of this server waits for a lock with a statement that has this text in it.
pub async fn is_blocked(client: &Client, statement: &str) {
    let query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND strpos(query, $1) > 0";
    until(&format!("a session is blocked in {statement}"), || async {
        let blocked = client.query(query, &[&statement]).await.unwrap();
        (!blocked.is_empty()).then_some(())
    })
    .await;
}

/// A `pg_dump` that waits before it dumps.
pub struct HeldDump {
    directory: PathBuf,
}

/// Gives a migration a `pg_dump` that waits, from now on.
pub fn hold_pg_dump(migration: &mut Migration) -> HeldDump {
    let directory = migration.files().join("bin");
    std::fs::create_dir(&directory).unwrap();
    std::os::unix::fs::symlink(programs().bin("pg_restore"), directory.join("pg_restore")).unwrap();
    // An orphan ends: whoever started it is gone.
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *--snapshot*)\n  touch '{0}/reached'\n  while [ -e '{0}/held' ]; do\n    \
         kill -0 $PPID || exit 1\n    sleep 0.05\n  done ;;\nesac\nexec '{1}' \"$@\"\n",
        directory.display(),
        programs().bin("pg_dump").display()
    );
    let program = directory.join("pg_dump");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(directory.join("held"), "").unwrap();
    migration.environment.push(("WALFERRY_PG_BIN".to_owned(), directory.to_str().unwrap().to_owned()));
    HeldDump { directory }
}

impl HeldDump {
    pub async fn is_reached(&self) {
        let reached = self.directory.join("reached");
        until("pg_dump is started", || async { reached.exists().then_some(()) }).await;
    }

    pub fn release(&self) {
        std::fs::remove_file(self.directory.join("held")).unwrap();
    }
}
