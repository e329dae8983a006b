//! A real PgBouncer between pgbench and the databases: its clients see one slow query, and no error.

use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::fence::HeldCommand;
use crate::support::process::Running;
use crate::support::{Migration, PATIENCE, Servers, programs, until, until_true};

/// A PgBouncer of the test's own, in transaction mode; ended when it is dropped.
struct PgBouncer {
    process: Child,
    port: u16,
    include: PathBuf,
    directory: tempfile::TempDir,
}

impl PgBouncer {
    /// Its database `pooled` is that of the migration's source.
    async fn start(migration: &Migration) -> PgBouncer {
        let directory = tempfile::tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let include = directory.path().join("pooled.ini");
        let source: tokio_postgres::Config = migration.source_url.parse().unwrap();
        let entry = format!("host=127.0.0.1 port={} dbname={}", source.get_ports()[0], source.get_dbname().unwrap());
        std::fs::write(&include, format!("[databases]\npooled = {entry} pool_size=5\nother = {entry}\n")).unwrap();
        let users = directory.path().join("users.txt");
        std::fs::write(&users, "\"postgres\" \"\"\n").unwrap();
        for _ in 0..5 {
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let configuration = directory.path().join("pgbouncer.ini");
            std::fs::write(
                &configuration,
                format!(
                    "%include {}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {}\n\
                     admin_users = postgres\npool_mode = transaction\nlogfile = {}\nquery_wait_timeout = 60\nserver_login_retry = 1\n",
                    include.display(),
                    users.display(),
                    directory.path().join("pgbouncer.log").display()
                ),
            )
            .unwrap();
            // It refuses to run as root. It becomes what is started, so that ending that ends it.
            let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"]
                .into_iter()
                .find(|path| std::path::Path::new(path).exists());
            let program = program.expect("PgBouncer is installed (scripts/setup.sh)");
            let mut command = Command::new(program);
            if rustix::process::geteuid().is_root() {
                command = Command::new("setpriv");
                command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", program]);
            }
            let mut process = command
                .arg(&configuration)
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            let deadline = std::time::Instant::now() + PATIENCE;
            let answers = loop {
                if process.try_wait().unwrap().is_some() || std::time::Instant::now() > deadline {
                    break false;
                }
                if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                    break true;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            };
            if answers {
                return PgBouncer { process, port, include, directory };
            }
        }
        panic!("PgBouncer does not start: {:?}", std::fs::read_to_string(directory.path().join("pgbouncer.log")));
    }

    fn console_url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/pgbouncer", self.port)
    }

    async fn console(&self) -> Client {
        crate::support::connect(&self.console_url()).await
    }

    /// Whether its clients wait, and the port of the server behind.
    async fn state(&self) -> (bool, String) {
        let messages = self.console().await.simple_query("SHOW DATABASES").await.unwrap();
        let state = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) if row.get("name") == Some("pooled") => {
                Some((row.get("paused") == Some("1"), row.get("port").unwrap().to_owned()))
            }
            _ => None,
        });
        state.unwrap()
    }

    /// pgbench for so many seconds through it, with TPC-B.
    fn bench(&self, seconds: u32) -> tokio::task::JoinHandle<(bool, String)> {
        let mut command = Command::new(programs().bin("pgbench"));
        let (seconds, port) = (seconds.to_string(), self.port.to_string());
        command.args([
            "-n",
            "-c",
            "4",
            "-j",
            "2",
            "--rate",
            "200",
            "-P",
            "1",
            "-T",
            &seconds,
            "-h",
            "127.0.0.1",
            "-p",
            &port,
        ]);
        command.args(["-U", "postgres", "pooled"]).stdin(Stdio::null()).kill_on_drop(true);
        tokio::spawn(async move {
            let output = command.output().await.unwrap();
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("pgbouncer.log")).unwrap_or_default()
    }
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

async fn transactions(client: &Client) -> i64 {
    client.query_one("SELECT count(*) FROM pgbench_history", &[]).await.unwrap().get(0)
}

/// TPC-B's own check: all four tables tell of the same sum.
async fn balances_are_right(client: &Client) {
    let query = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers)::bigint, \
                 (SELECT sum(bbalance) FROM pgbench_branches)::bigint, (SELECT sum(delta) FROM pgbench_history)::bigint";
    let row = client.query_one(query, &[]).await.unwrap();
    let sums: Vec<i64> = (0..4).map(|at| row.get::<_, Option<i64>>(at).unwrap_or_default()).collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

async fn fill(migration: &Migration) {
    let mut command = Command::new(programs().bin("pgbench"));
    let output = command.args(["-i", "-q", "-s", "1", &migration.source_url]).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_pgbouncer_see_no_error_across_a_cutover() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    fill(&migration).await;
    let pooler = PgBouncer::start(&migration).await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let (source, target) = (migration.source().await, migration.target().await);
    let bench = pooler.bench(25);
    until_true(&source, "SELECT count(*) > 200 FROM pgbench_history").await;
    let (console, include) = (pooler.console_url(), pooler.include.to_str().unwrap().to_owned());
    let by_pooler =
        ["--yes", "--pgbouncer", &console, "--pgbouncer-database", "pooled", "--pgbouncer-include", &include];

    // What does not fit is said before anything is touched.
    for (wrong, text) in [
        (["--pgbouncer-database", "nobody"], "has no database nobody"),
        (["--pgbouncer-include", "/dev/null"], "has no entry for the database pooled"),
    ] {
        let mut arguments = by_pooler.to_vec();
        let at = arguments.iter().position(|argument| *argument == wrong[0]).unwrap();
        arguments[at + 1] = wrong[1];
        let refused = migration.with_directory("cutover", &arguments).await;
        refused.assert_refused(5, &[text]);
    }
    migration.with_directory("cutover", &["--yes", "--pgbouncer", &console]).await.assert_refused(2, &["--on-switch"]);

    // Given up: its clients go on where they were.
    let given_up = [&by_pooler[..], &["--on-fence", "exit 1"]].concat();
    let refused = migration.with_directory("cutover", &given_up).await;
    refused.assert_refused(5, &["during on-fence", "The fence is lifted"]);
    let port_of_source = servers.source.port().to_string();
    assert_eq!(pooler.state().await, (false, port_of_source.clone()));

    // Killed while they wait: the next start lets them go on where they were.
    let command = HeldCommand::new(&migration, "fence");
    let held = ["--on-fence", &command.text(), "--hook-timeout", "60s", "--max-write-stall", "60s", "--timeout", "60s"];
    let cutover = migration.start("cutover", &[&by_pooler[..], &held].concat());
    command.has_run(1).await;
    assert_eq!(pooler.state().await, (true, port_of_source.clone()));
    running.kill().await;
    cutover.wait().await;
    assert!(pooler.state().await.0, "nobody has let them go yet");
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    assert_eq!(pooler.state().await, (false, port_of_source));
    let before = transactions(&source).await;
    until("the clients go on", || async { (transactions(&source).await > before).then_some(()) }).await;
    drop(source);

    let cutover =
        migration.with_directory("cutover", &[&by_pooler[..], &["--json", "--max-write-stall", "25s"]].concat()).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}\n{}", cutover.stderr, running.log(), pooler.log());
    let outcome = cutover.json();
    println!("{outcome:#}");
    assert_eq!(outcome["warnings"].as_array().unwrap().len(), 0, "{outcome:#}");
    assert_eq!(pooler.state().await, (false, servers.target.port().to_string()));
    let entry = std::fs::read_to_string(&pooler.include).unwrap();
    assert!(entry.contains("pool_size=5") && entry.contains("\nother = "), "the rest of the file stays: {entry}");
    let at_switch = transactions(&target).await;
    until("the clients write to the target", || async { (transactions(&target).await > at_switch + 20).then_some(()) })
        .await;

    // And back, in the same way.
    migration
        .wait_for_status(&mut running, "a switchback is ready", |status| {
            status["direction"] == "back" && status["ready_to_cutover"] == true
        })
        .await;
    let switchback = [&by_pooler[..], &["--json", "--max-write-stall", "25s"]].concat();
    let switchback = migration.with_directory("switchback", &switchback).await;
    assert_eq!(switchback.code, Some(0), "{}\n{}\n{}", switchback.stderr, running.log(), pooler.log());
    println!("{:#}", switchback.json());
    assert_eq!(running.wait().await.code, Some(0));
    assert_eq!(pooler.state().await, (false, servers.source.port().to_string()));
    let source = migration.source().await;
    let at_switch = transactions(&source).await;
    until("the clients write to the source", || async { (transactions(&source).await > at_switch + 20).then_some(()) })
        .await;

    let (succeeded, said) = bench.await.unwrap();
    println!("{said}");
    assert!(succeeded && said.contains("number of failed transactions: 0 "), "{said}\n{}", pooler.log());
    // What pgbench was told is committed is there: on one server up to the last switch, on the other all of it.
    let processed =
        said.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: ")).unwrap();
    let processed: i64 = processed.split(['/', ' ']).next().unwrap().parse().unwrap();
    assert_eq!(transactions(&source).await, processed);
    balances_are_right(&source).await;
    balances_are_right(&migration.target().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_killed_after_the_decision_points_pgbouncer_at_the_target_when_it_starts_again() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    fill(&migration).await;
    let pooler = PgBouncer::start(&migration).await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let (console, include) = (pooler.console_url(), pooler.include.to_str().unwrap().to_owned());
    let command = HeldCommand::new(&migration, "switch");
    let cutover = migration.start(
        "cutover",
        &[
            "--yes",
            "--no-reverse",
            "--pgbouncer",
            &console,
            "--pgbouncer-database",
            "pooled",
            "--pgbouncer-include",
            &include,
            "--hook-timeout",
            "60s",
            "--on-switch",
            &command.text(),
        ],
    );
    command.has_run(1).await;
    assert!(pooler.state().await.0, "its clients wait");
    running.kill().await;
    cutover.wait().await;
    command.let_go();
    let ended = migration.migrate(&[]).wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(pooler.state().await, (false, servers.target.port().to_string()));
    let (succeeded, said) = pooler.bench(1).await.unwrap();
    assert!(succeeded, "{said}");
    assert!(pooler.process.id().is_some());
    balances_are_right(&migration.target().await).await;
}
