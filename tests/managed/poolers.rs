//! A pooler between walferry and a server is refused by name, however much it lets through.

use std::process::Stdio;

use tokio::process::{Child, Command};
use walferry::demo::server::ThrowawayServer;

use crate::support::{Migration, PATIENCE, Servers};

/// A PgBouncer in front of a server; ended when it is dropped.
struct PgBouncer {
    _process: Child,
    _directory: tempfile::TempDir,
    port: u16,
}

impl PgBouncer {
    async fn start(server: &ThrowawayServer, settings: &str) -> PgBouncer {
        for _ in 0..5 {
            let directory = tempfile::tempdir().unwrap();
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            std::fs::set_permissions(directory.path(), open).unwrap();
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let (users, file) = (directory.path().join("users.txt"), directory.path().join("pgbouncer.ini"));
            std::fs::write(&users, "\"postgres\" \"\"\n").unwrap();
            let configuration = format!(
                "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
                 auth_type = trust\nauth_file = {}\nlogfile = {}\n{settings}\n",
                server.port(),
                users.display(),
                directory.path().join("pgbouncer.log").display(),
            );
            std::fs::write(&file, configuration).unwrap();
            let mut program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].into_iter();
            let program = program.find(|path| std::path::Path::new(path).exists()).expect("PgBouncer is installed");
            let mut command = Command::new(program);
            if rustix::process::geteuid().is_root() {
                // It refuses to run as root, and becomes what is started, so that ending that ends it.
                command = Command::new("setpriv");
                command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", program]);
            }
            let command = command.arg(&file).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
            let mut process = command.spawn().unwrap();
            let deadline = std::time::Instant::now() + PATIENCE;
            while process.try_wait().unwrap().is_none() && std::time::Instant::now() < deadline {
                if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                    return PgBouncer { _process: process, _directory: directory, port };
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
        panic!("PgBouncer does not start");
    }

    fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/shop", self.port)
    }
}

async fn is_refused(migration: &Migration, side: &str) {
    let check = migration.with_servers("check", &["--estimate-seconds", "0", "--json"]).await;
    assert_eq!(check.code, Some(3), "{}", check.stdout);
    let found = check.json()["findings"].as_array().unwrap().iter().any(|finding| {
        finding["side"] == side && finding["severity"] == "blocker" && finding["message"].to_string().contains("pooler")
    });
    assert!(found, "{side}: {}", check.stdout);
    let migrate = migration.migrate(&[]).wait().await;
    assert_eq!(migrate.code, Some(3), "{}", migrate.stderr);
    assert!(migrate.stderr.contains("pooler"), "{}", migrate.stderr);
}

#[tokio::test]
async fn h36_a_pooler_is_refused_by_name_in_every_mode_and_on_both_sides() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let direct = (migration.source_url.clone(), migration.target_url.clone());
    migration.source().await.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    for server in [&servers.source, &servers.target] {
        // Even what a pooler has dropped looks as if it had arrived.
        let as_pinned =
            "ALTER ROLE postgres SET IntervalStyle = 'postgres'; ALTER ROLE postgres SET extra_float_digits = 3";
        server.connect("postgres").await.unwrap().batch_execute(as_pinned).await.unwrap();
    }
    let lenient = "ignore_startup_parameters = options,extra_float_digits";
    for settings in [
        "pool_mode = session".to_owned(),
        format!("pool_mode = session\n{lenient}"),
        format!("pool_mode = transaction\n{lenient}"),
    ] {
        let before_source = PgBouncer::start(&servers.source, &settings).await;
        (migration.source_url, migration.target_url) = (before_source.url(), direct.1.clone());
        is_refused(&migration, "source").await;
        let before_target = PgBouncer::start(&servers.target, &settings).await;
        (migration.source_url, migration.target_url) = (direct.0.clone(), before_target.url());
        is_refused(&migration, "target").await;
    }
}
