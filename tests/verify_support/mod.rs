//! A throwaway PostgreSQL server, shared by the tests that run at the same time and gone after the last of them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tokio_postgres::{Client, NoTls};

pub struct Server {
    directory: tempfile::TempDir,
    port: u16,
    databases: AtomicUsize,
}

static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());

/// Two empty databases, called source and target in their order.
pub struct Sides {
    server: Arc<Server>,
    pub source: String,
    pub target: String,
}

impl Sides {
    pub async fn new() -> Sides {
        Sides::with(["", ""]).await
    }

    /// With more options for CREATE DATABASE on each side.
    pub async fn with(options: [&str; 2]) -> Sides {
        let server = Server::shared();
        let number = server.databases.fetch_add(1, Ordering::Relaxed);
        let names = ["source", "target"].map(|side| format!("{side}_{number}"));
        let admin = server.connect("postgres").await;
        for (name, options) in names.iter().zip(options) {
            admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE template0 {options}")).await.unwrap();
        }
        let [source, target] = names;
        Sides { server, source, target }
    }

    pub async fn connect(&self, database: &str) -> Client {
        self.server.connect(database).await
    }

    /// Runs one script on both sides.
    pub async fn both(&self, script: &str) {
        self.on_source(script).await;
        self.on_target(script).await;
    }

    pub async fn on_source(&self, script: &str) {
        self.connect(&self.source).await.batch_execute(script).await.unwrap();
    }

    pub async fn on_target(&self, script: &str) {
        self.connect(&self.target).await.batch_execute(script).await.unwrap();
    }
}

impl Server {
    fn shared() -> Arc<Server> {
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new(Server::start());
        *shared = Arc::downgrade(&server);
        server
    }

    fn start() -> Server {
        let directory = tempfile::tempdir().unwrap();
        // The server refuses to run as root, and its own user must get in.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let data = directory.path().join("data");
        let data = data.to_str().unwrap();
        run(
            Command::new("initdb"),
            &["-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"],
        );
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = format!("-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200");
        let log = format!("{data}/log");
        run(Command::new("pg_ctl"), &["-D", data, "-w", "-l", &log, "-o", &options, "start"]);
        Server { directory, port, databases: AtomicUsize::new(0) }
    }

    async fn connect(&self, database: &str) -> Client {
        let options = "-c TimeZone=UTC -c DateStyle=ISO -c IntervalStyle=postgres -c extra_float_digits=3 \
                       -c bytea_output=hex -c search_path=public";
        let (client, connection) = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(self.port)
            .user("postgres")
            .dbname(database)
            .options(options)
            .connect(NoTls)
            .await
            .unwrap();
        tokio::spawn(connection);
        client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let data = self.directory.path().join("data");
        run(Command::new("pg_ctl"), &["-D", data.to_str().unwrap(), "-m", "immediate", "-w", "stop"]);
    }
}

/// Runs a program of the PostgreSQL installation, as the user `postgres` where we are root.
fn run(command: Command, arguments: &[&str]) {
    let program = binaries().join(command.get_program());
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let mut command = if root {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    // Its output goes nowhere: a server that inherits a pipe would hold it open for as long as it lives.
    let status = command
        .args(arguments)
        .current_dir("/")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn binaries() -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.flatten().map(|version| version.path().join("bin")).collect())
        .unwrap_or_default();
    found.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let found = found.into_iter().find(|directory: &PathBuf| Path::exists(&directory.join("initdb")));
    found.expect("initdb is neither under /usr/lib/postgresql nor on the PATH")
}
