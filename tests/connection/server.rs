//! A throwaway PostgreSQL server with TLS and password authentication, for these tests only.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use walferry::connection::ConnectionSpec;

/// The superuser's password: every character that some syntax could stumble over.
pub const PASSWORD: &str = r#"p@s:s/w?o#r%d [x]'"\ é$(id)"#;

/// Users `scram`, `md5user` and `postgres` have [`PASSWORD`]; the socket trusts everybody.
const HBA: &str = "\
local all all trust
hostssl all tlsonly 127.0.0.1/32 scram-sha-256
hostnossl all plainonly 127.0.0.1/32 scram-sha-256
hostssl all certified 127.0.0.1/32 cert
host all md5user 127.0.0.1/32 md5
host all cleartext 127.0.0.1/32 password
host all tlsonly,plainonly,certified,nobody all reject
host all all 127.0.0.1/32 scram-sha-256
";

/// A running server; dropping it stops it.
pub struct Server {
    pub port: u16,
    pub directory: tempfile::TempDir,
    process: Child,
}

fn as_postgres(program: &Path) -> Command {
    // PostgreSQL refuses to run as root.
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("runuser");
    command.args(["-u", "postgres", "--"]).arg(program);
    command
}

fn programs() -> PathBuf {
    let output = Command::new("pg_config").arg("--bindir").output();
    let stated = output.ok().filter(|output| output.status.success());
    let stated = stated.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let mut installed: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .chain(stated)
        .filter(|path| path.join("initdb").exists() && path.join("postgres").exists())
        .collect();
    installed.sort();
    installed.pop().expect("PostgreSQL's server programs are installed")
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn openssl(directory: &Path, arguments: &str) {
    run(Command::new("openssl").current_dir(directory).args(arguments.split_whitespace()));
}

/// An authority, another one that signs nothing, a server certificate for 127.0.0.1 and localhost, one for a client.
fn make_certificates(directory: &Path) {
    let new = "req -x509 -newkey rsa:2048 -nodes -days 2";
    openssl(directory, &format!("{new} -keyout ca.key -out ca.crt -subj /CN=authority"));
    openssl(directory, &format!("{new} -keyout other.key -out other.crt -subj /CN=stranger"));
    for (name, common_name, extension) in [
        ("server", "server", "subjectAltName=DNS:localhost,DNS:db.example,IP:127.0.0.1"),
        ("named", "localhost", "basicConstraints=CA:FALSE"),
        ("client", "certified", "basicConstraints=CA:FALSE"),
    ] {
        fs::write(directory.join("extension"), extension).unwrap();
        let request =
            format!("req -new -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={common_name}");
        openssl(directory, &request);
        openssl(
            directory,
            &format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out {name}.crt \
                 -extfile extension"
            ),
        );
    }
    for key in ["server.key", "client.key", "named.key", "other.key"] {
        fs::set_permissions(directory.join(key), fs::Permissions::from_mode(0o600)).unwrap();
    }
}

impl Server {
    /// Starts a server with one of the certificates `server`, `named` (no alternative names) and `other` (self-signed).
    pub async fn start(certificate: &str) -> Server {
        let directory = tempfile::Builder::new().prefix("walferry-connection-").tempdir_in("/tmp").unwrap();
        let path = directory.path().to_owned();
        make_certificates(&path);
        fs::write(path.join("password"), PASSWORD).unwrap();
        fs::write(path.join("hba.conf"), HBA).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        if rustix::process::geteuid().is_root() {
            run(Command::new("chown").arg("-R").arg("postgres").arg(&path));
        }
        let bin = programs();
        let initdb = "--auth=scram-sha-256 --username=postgres --encoding=UTF8 --locale=C --no-sync --no-instructions";
        run(as_postgres(&bin.join("initdb"))
            .args(initdb.split_whitespace())
            .arg("--pwfile")
            .arg(path.join("password"))
            .arg("--pgdata")
            .arg(path.join("data")));
        // Not on the command line, which ALTER SYSTEM cannot change.
        fs::write(path.join("data/postgresql.auto.conf"), "ssl = on\n").unwrap();
        // Free until a moment ago; nobody else asks for this one.
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let at = path.display();
        let log = fs::File::create(path.join("log")).unwrap();
        let process = as_postgres(&bin.join("postgres"))
            .arg("-D")
            .arg(path.join("data"))
            .args(["-c", &format!("port={port}"), "-c", "listen_addresses=127.0.0.1"])
            .args(["-c", &format!("unix_socket_directories={at}"), "-c", &format!("hba_file={at}/hba.conf")])
            .args(["-c", &format!("ssl_ca_file={at}/ca.crt")])
            .args(["-c", &format!("ssl_cert_file={at}/{certificate}.crt")])
            .args(["-c", &format!("ssl_key_file={at}/{certificate}.key")])
            .args(["-c", "wal_level=logical", "-c", "fsync=off"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Server { port, directory, process };
        let spec = server.socket();
        for attempt in 0.. {
            match spec.connect("starting").await {
                Ok(client) => {
                    client.batch_execute(&users()).await.unwrap();
                    break;
                }
                Err(error) if attempt == 300 => {
                    let log = fs::read_to_string(server.path("log")).unwrap();
                    panic!("the server does not start: {error:?}\n{log}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        server
    }

    /// A file of this server.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// The superuser over the Unix socket.
    pub fn socket(&self) -> ConnectionSpec {
        ConnectionSpec::parse(&format!("host={} port={} user=postgres dbname=postgres", self.path(""), self.port))
            .unwrap()
    }

    /// `key=value` pairs for the loopback address.
    pub fn string(&self, more: &str) -> String {
        format!("host=127.0.0.1 port={} dbname=postgres {more}", self.port)
    }

    /// The same, parsed, with the password.
    pub fn tcp(&self, more: &str) -> ConnectionSpec {
        ConnectionSpec::parse(&self.string(&format!("password={} {more}", quoted(PASSWORD)))).unwrap()
    }
}

/// A value in the `key=value` form.
pub fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn users() -> String {
    let password = walferry::sql::literal(PASSWORD);
    let mut sql = String::new();
    for user in ["scram", "tlsonly", "plainonly", "cleartext", "certified", "nobody"] {
        sql.push_str(&format!("CREATE ROLE {user} LOGIN REPLICATION PASSWORD {password};"));
    }
    sql + &format!("SET password_encryption = 'md5'; CREATE ROLE md5user LOGIN REPLICATION PASSWORD {password};")
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fast shutdown, to the postmaster's own pid: `runuser` is between it and us.
        if let Ok(file) = fs::read_to_string(self.path("data/postmaster.pid"))
            && let Some(pid) =
                file.lines().next().and_then(|line| line.parse().ok()).and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.process.wait();
    }
}
