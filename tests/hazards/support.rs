//! Two servers, the program between them, and gates that hold it in a chosen place.

use std::fmt::Display;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use walferry::connection::ConnectionSpec;
use walferry::demo::server::{ServerPrograms, ThrowawayServer};

/// Longer than anything takes on a slow machine; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A source, a target and a place for state directories.
pub struct Pair {
    pub source: ThrowawayServer,
    pub target: ThrowawayServer,
    pub files: tempfile::TempDir,
}

impl Pair {
    pub async fn start() -> Pair {
        Pair::start_with(&[]).await
    }

    /// With settings of the source's own.
    pub async fn start_with(of_source: &[(&str, &str)]) -> Pair {
        let programs = ServerPrograms::find(None).unwrap();
        let common = [
            ("fsync", "off"),
            ("wal_level", "logical"),
            ("max_connections", "50"),
            ("shared_buffers", "32MB"),
            ("autovacuum", "off"),
        ];
        let settings: Vec<(&str, &str)> = common.iter().chain(of_source).copied().collect();
        let (source, target) = tokio::join!(
            ThrowawayServer::start(&programs, "source", &settings),
            ThrowawayServer::start(&programs, "target", &common),
        );
        Pair { source: source.unwrap(), target: target.unwrap(), files: tempfile::tempdir().unwrap() }
    }

    /// Runs statements on the source, in a session of their own.
    pub async fn on_source(&self, sql: &str) {
        self.source.connect("postgres").await.unwrap().batch_execute(sql).await.unwrap();
    }

    /// Runs statements on the target, in a session of their own.
    pub async fn on_target(&self, sql: &str) {
        self.target.connect("postgres").await.unwrap().batch_execute(sql).await.unwrap();
    }

    pub fn source_spec(&self) -> ConnectionSpec {
        ConnectionSpec::parse(&self.source.url()).unwrap()
    }

    /// The state directory of the migration.
    pub fn directory(&self) -> PathBuf {
        self.files.path().join("state")
    }

    /// `walferry migrate` with the pair's servers and state directory.
    pub fn migrate(&self) -> Command {
        self.migrate_from(&self.source.url())
    }

    pub fn migrate_from(&self, source: &str) -> Command {
        self.command("migrate", source)
    }

    /// `walferry resync` with the same.
    pub fn resync(&self) -> Command {
        self.command("resync", &self.source.url())
    }

    fn command(&self, verb: &str, source: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command.args([verb, "--http-addr", "off", "--source", source]);
        command.args(["--target", &self.target.url(), "--dir"]).arg(self.directory());
        command
    }

    pub fn run(&self, mut command: Command) -> Walferry {
        let log = self.files.path().join("walferry.log");
        let output = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        Walferry { process: command.spawn().unwrap(), log }
    }

    /// Starts a migration that waits, with its ledger made, for a transaction on the source: until that is committed, gates
    /// can be put into its way.
    pub async fn run_waiting(&self, command: Command) -> (Walferry, Client) {
        let transaction = self.source.connect("postgres").await.unwrap();
        transaction.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
        let walferry = self.run(command);
        self.waits_for(&transaction).await;
        (walferry, transaction)
    }

    /// Until the making of the slot waits for a session's transaction.
    pub async fn waits_for(&self, transaction: &Client) {
        let xid = value(transaction, "SELECT pg_current_xact_id()").await;
        let waits = format!(
            "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) \
             WHERE backend_type = 'walsender' AND NOT granted AND transactionid::text = '{xid}')"
        );
        until(&waits, &self.source).await;
    }

    /// Until the target follows.
    pub async fn following(&self) {
        until("SELECT phase = 'following' FROM walferry.migration", &self.target).await;
    }

    /// Until everything that is committed on the source now is committed on the target.
    pub async fn caught_up(&self) {
        let source = self.source.connect("postgres").await.unwrap();
        let position = value(&source, "SELECT pg_logical_emit_message(true, 'test', 'here')").await;
        let reached = format!("SELECT min(applied) >= '{position}' FROM walferry.apply_progress");
        until(&reached, &self.target).await;
    }

    /// Asserts that a query gives the same rows, as text, on both sides; answers with them.
    pub async fn same(&self, query: &str) -> Vec<String> {
        let (source, target) = self.both(query).await;
        assert_eq!(source, target, "{query}");
        source
    }

    pub async fn both(&self, query: &str) -> (Vec<String>, Vec<String>) {
        let (source, target) =
            (self.source.connect("postgres").await.unwrap(), self.target.connect("postgres").await.unwrap());
        (rows(&source, query).await, rows(&target, query).await)
    }

    /// A directory with PostgreSQL's tools in which `pg_dump` runs a piece of shell before it does its work.
    pub fn tools(&self, before_dump: &str) -> PathBuf {
        let (programs, directory) = (ServerPrograms::find(None).unwrap(), self.files.path().join("tools"));
        std::fs::create_dir(&directory).unwrap();
        std::os::unix::fs::symlink(programs.bin("pg_restore"), directory.join("pg_restore")).unwrap();
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *--schema-only*) {before_dump} ;; esac\nexec {} \"$@\"\n",
            programs.bin("pg_dump").display()
        );
        std::fs::write(directory.join("pg_dump"), script).unwrap();
        std::fs::set_permissions(directory.join("pg_dump"), std::fs::Permissions::from_mode(0o755)).unwrap();
        directory
    }

    /// What `walferry cutover` without a way back answers: its exit code and everything it said.
    pub async fn cutover(&self) -> (i32, String) {
        self.cutover_with(&["--no-reverse"]).await
    }

    /// The same with other options.
    pub async fn cutover_with(&self, options: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command.args(["cutover", "--yes"]).args(options).arg("--dir").arg(self.directory());
        let output = tokio::process::Command::from(command).stdin(Stdio::null()).output().await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
    }
}

/// The program at work; dropping it kills it.
pub struct Walferry {
    process: Child,
    log: PathBuf,
}

impl Walferry {
    /// As a machine that loses its power: nothing is put in order.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Waits for its end; the exit code, and everything that it and those before it said.
    pub async fn exit(mut self) -> (i32, String) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status.code().unwrap(), self.said());
            }
            assert!(tokio::time::Instant::now() < deadline, "walferry does not end; it said:\n{}", self.said());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Walferry {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
        if std::thread::panicking() {
            eprintln!("walferry said:\n{}", self.said());
        }
    }
}

/// Holds every transaction of the target that changes a table of the ledger in a certain way.
pub struct Gate {
    session: Client,
    number: i32,
}

impl Gate {
    /// A closed gate: `event` is such as `UPDATE`, `when` a condition over NEW.
    pub async fn close(pair: &Pair, number: i32, event: &str, table: &str, when: &str) -> Gate {
        let session = pair.target.connect("postgres").await.unwrap();
        session
            .batch_execute(&format!(
                "SELECT pg_advisory_lock({number}); \
                 CREATE SCHEMA IF NOT EXISTS hold; \
                 CREATE TABLE IF NOT EXISTS hold.closed (number integer); \
                 INSERT INTO hold.closed VALUES ({number}); \
                 CREATE OR REPLACE FUNCTION hold.pass() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                   IF EXISTS (SELECT FROM hold.closed WHERE number = TG_ARGV[0]::int) THEN \
                     PERFORM pg_catalog.pg_advisory_xact_lock_shared(TG_ARGV[0]::int); \
                   END IF; \
                   RETURN NEW; END $$; \
                 CREATE TRIGGER gate_{number} BEFORE {event} ON walferry.{table} FOR EACH ROW WHEN ({when}) \
                   EXECUTE FUNCTION hold.pass('{number}'); \
                 ALTER TABLE walferry.{table} ENABLE ALWAYS TRIGGER gate_{number}"
            ))
            .await
            .unwrap();
        Gate { session, number }
    }

    /// Until somebody waits at it.
    pub async fn reached(&self, pair: &Pair) {
        until(&self.waits(), &pair.target).await;
    }

    /// Whether somebody waits at it now.
    pub async fn is_reached(&self, pair: &Pair) -> bool {
        value(&pair.target.connect("postgres").await.unwrap(), &self.waits()).await == "t"
    }

    fn waits(&self) -> String {
        format!(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = {} AND NOT granted)",
            self.number
        )
    }

    /// Whoever comes from now on passes; whoever waits goes on waiting.
    pub async fn let_others_pass(&self) {
        let open = format!("DELETE FROM hold.closed WHERE number = {}", self.number);
        self.session.batch_execute(&open).await.unwrap();
    }

    pub async fn open(self) {
        self.let_others_pass().await;
        self.session.batch_execute(&format!("SELECT pg_advisory_unlock({})", self.number)).await.unwrap();
    }
}

/// Until a query answers `true`; what it asks about may not be there yet.
pub async fn until(query: &str, server: &ThrowawayServer) {
    let client = server.connect("postgres").await.unwrap();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let is_true = async || match client.simple_query(query).await {
        Ok(messages) => messages.iter().any(|m| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("t"))),
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => false,
        Err(error) => panic!("{query}: {error:?}"),
    };
    while !is_true().await {
        assert!(tokio::time::Instant::now() < deadline, "this does not come true: {query}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The one value of a query, as text; empty for NULL or no row.
pub async fn value(client: &Client, query: &str) -> String {
    rows(client, query).await.into_iter().next().unwrap_or_default()
}

/// The rows of a query as text, columns joined by `|`.
pub async fn rows(client: &Client, query: &str) -> Vec<String> {
    let messages = client.simple_query(query).await.unwrap_or_else(|error| panic!("{query}: {error:?}"));
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|at| row.get(at).unwrap_or("NULL")).collect::<Vec<_>>().join("|"))
        }
        _ => None,
    };
    messages.iter().filter_map(row).collect()
}

/// `path`, quoted for a shell.
pub fn quoted(path: &Path) -> impl Display {
    format!("'{}'", path.display())
}
