//! Throwaway PostgreSQL servers: real ones, made in a moment and gone without a trace.
//!
//! ```text
//!  ServerPrograms::find ──► initdb ──► data/postgresql.conf ──► postgres, our child ──► ready ──► drop: SIGQUIT, rm -r
//!      (bin directory)      (trust, C, UTF8)   (settings)       (127.0.0.1, free port)
//! ```
//!
//! The demo and the integration tests use them alike. Nothing of an installed cluster is touched: a server lives in a
//! directory of its own, listens on the loopback interface only, and is ended by its own process id. PostgreSQL
//! refuses to run as root, so for root its programs run as the system's user `postgres` (else `nobody`).
//!
//! A process that dies by SIGKILL cannot clean up. Its servers end by themselves within a minute once their
//! directory `walferry-*` in the temporary directory is removed (the server looks after its lock file).

mod place;

use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::{Client, NoTls};

pub(crate) use place::{ServerUser, TemporaryDirectory};

use crate::error::{Context, Error, ErrorKind, Result};

/// The oldest server that the migration supports as a target, and so the oldest that is worth trying out.
const MAJOR_MIN: u32 = 15;
/// How long a server may take to get ready, which includes crash recovery after [`StopMode::Immediate`].
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server may take to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Another process can take a free port before the server does; then another port is tried.
const PORT_ATTEMPTS: u32 = 5;

/// The directory of one PostgreSQL installation's programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerPrograms {
    directory: PathBuf,
    major: u32,
}

impl ServerPrograms {
    /// Finds server programs: of exactly the asked major version, or else the newest from 15 on.
    ///
    /// Looks into `$WALFERRY_PG_BIN` alone when that is set, and otherwise along `PATH` and in the places where the
    /// packages of Debian (`/usr/lib/postgresql/*/bin`) and of the PGDG for Red Hat (`/usr/pgsql-*/bin`) put them.
    ///
    /// # Errors
    /// [`ErrorKind::Blocked`] when there are none, with what to install.
    pub fn find(major: Option<u32>) -> Result<ServerPrograms> {
        let chosen = std::env::var_os("WALFERRY_PG_BIN").filter(|value| !value.is_empty());
        let directories = match &chosen {
            Some(directory) => vec![PathBuf::from(directory)],
            None => usual_directories(),
        };
        let found: Vec<ServerPrograms> = directories.iter().filter_map(|place| ServerPrograms::at(place)).collect();
        choose(found, major).ok_or_else(|| {
            let wanted = major.map_or_else(|| format!("{MAJOR_MIN} or newer"), |major| major.to_string());
            let place = match &chosen {
                Some(directory) => format!("in WALFERRY_PG_BIN ({})", directory.to_string_lossy()),
                None => "on PATH, in /usr/lib/postgresql or in /usr/pgsql-*".to_owned(),
            };
            let message = format!("the programs of a PostgreSQL {wanted} server (initdb, postgres) were not found {place}");
            Error::new(ErrorKind::Blocked, message)
                .hint("run scripts/setup.sh, install the package postgresql, or set WALFERRY_PG_BIN to the directory of initdb")
        })
    }

    /// Server programs of any version from a directory of their own, whatever else is installed.
    ///
    /// # Errors
    /// [`ErrorKind::Blocked`] when `initdb` and `postgres` do not run there.
    pub fn in_directory(directory: &Path) -> Result<ServerPrograms> {
        ServerPrograms::at(directory).ok_or_else(|| {
            let message = format!("initdb and postgres of one PostgreSQL do not run in {}", directory.display());
            Error::new(ErrorKind::Blocked, message).hint("run scripts/servers.sh, or name another directory")
        })
    }

    /// The path of one program, whether or not it is there: `pg_dump` may come in a package of its own.
    pub fn bin(&self, program: &str) -> PathBuf {
        self.directory.join(program)
    }

    /// The major version, such as 15.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The installation whose `postgres` stands in a directory, through symbolic links such as `/usr/local/bin` has.
    fn at(directory: &Path) -> Option<ServerPrograms> {
        let postgres = fs::canonicalize(directory.join("postgres")).ok()?;
        let directory = postgres.parent()?.to_owned();
        if !directory.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(&postgres).arg("--version").stderr(Stdio::null()).output().ok()?;
        let major = parse_major(&String::from_utf8_lossy(&output.stdout))?;
        Some(ServerPrograms { directory, major })
    }
}

/// How a server is told to stop (chapter "Shutting Down the Server" of the manual).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ends all sessions, waits for walsenders to send what is written, writes a checkpoint.
    Fast,
    /// Ends at once, as in a crash; the next start recovers from the WAL.
    Immediate,
}

/// One running PostgreSQL server of our own; dropping it ends it and removes all its files.
#[derive(Debug)]
pub struct ThrowawayServer {
    programs: ServerPrograms,
    name: String,
    port: u16,
    data_directory: PathBuf,
    process: Option<Child>,
    /// The postmaster's process id, still that of the last one while the server is stopped.
    pid: i32,
    user: ServerUser,
    // The last field: the files go after the process that uses them.
    directory: TemporaryDirectory,
}

impl ThrowawayServer {
    /// Makes a cluster and starts it: superuser `postgres` without a password, UTF-8, locale C, loopback only.
    ///
    /// `settings` are lines of `postgresql.conf` (`("wal_level", "logical")`) and win over ours. `fsync` is on unless
    /// they say otherwise. `name` becomes part of the directory and the cluster's name.
    ///
    /// # Errors
    /// [`ErrorKind::Blocked`] when there is no user to run it as; otherwise what initdb or the server's log said last.
    pub async fn start(programs: &ServerPrograms, name: &str, settings: &[(&str, &str)]) -> Result<ThrowawayServer> {
        let user = ServerUser::for_this_process()?;
        let directory = TemporaryDirectory::create(name, user)?;
        let data_directory = directory.path.join("data");
        initialize(programs, &directory.path, &data_directory, user)
            .await
            .context(|| format!("making the throwaway server {name:?}"))?;
        let mut server = ThrowawayServer {
            programs: programs.clone(),
            name: name.to_owned(),
            port: 0,
            data_directory,
            process: None,
            pid: 0,
            user,
            directory,
        };
        for attempt in 1.. {
            server.port = free_port()?;
            server.configure(settings)?;
            match server.launch().await {
                Ok(()) => break,
                Err(_) if attempt < PORT_ATTEMPTS && server.port_was_taken() => fs::write(server.log(), "")?,
                Err(error) => return Err(error),
            }
        }
        Ok(server)
    }

    /// Makes a physical standby of this server, which streams from it and answers queries.
    ///
    /// `settings` are those of the standby, as for [`ThrowawayServer::start`]; its `max_connections` and the like must not be less
    /// than this server's.
    ///
    /// # Errors
    /// What `pg_basebackup` or the standby's log said last.
    pub async fn start_standby(&self, name: &str, settings: &[(&str, &str)]) -> Result<ThrowawayServer> {
        self.start_standby_by(&self.programs.bin("pg_basebackup"), name, settings).await
    }

    /// The same with a `pg_basebackup` from elsewhere, of this server's version or a newer one.
    ///
    /// # Errors
    /// As [`ThrowawayServer::start_standby`].
    pub async fn start_standby_by(
        &self,
        pg_basebackup: &Path,
        name: &str,
        settings: &[(&str, &str)],
    ) -> Result<ThrowawayServer> {
        let directory = TemporaryDirectory::create(name, self.user)?;
        let data_directory = directory.path.join("data");
        let port = self.port.to_string();
        let mut command = Command::new(pg_basebackup);
        command.args([
            "-h",
            "127.0.0.1",
            "-p",
            &port,
            "-U",
            "postgres",
            "-X",
            "stream",
            "-c",
            "fast",
            "-R",
            "-N",
            "-D",
        ]);
        command.arg(&data_directory);
        run_to_its_end(command, "pg_basebackup", &directory.path, self.user)
            .await
            .context(|| format!("making the standby {name:?}"))?;
        let mut standby = ThrowawayServer {
            programs: self.programs.clone(),
            name: name.to_owned(),
            port: free_port()?,
            data_directory,
            process: None,
            pid: 0,
            user: self.user,
            directory,
        };
        // A newer pg_basebackup writes options that this server's own client does not know.
        let written = standby.data_directory.join("postgresql.auto.conf");
        let kept = fs::read_to_string(&written).context(|| format!("reading {}", written.display()))?;
        let kept: String =
            kept.lines().filter(|line| !line.starts_with("primary_conninfo")).map(|line| format!("{line}\n")).collect();
        fs::write(&written, kept).context(|| format!("writing {}", written.display()))?;
        let primary = format!("host=127.0.0.1 port={port} user=postgres");
        standby.configure(&[&[("primary_conninfo", primary.as_str())], settings].concat())?;
        standby.launch().await?;
        Ok(standby)
    }

    /// The connection string of the database `postgres`.
    pub fn url(&self) -> String {
        self.url_for("postgres")
    }

    /// The connection string of any database of this server, as the superuser.
    pub fn url_for(&self, database: &str) -> String {
        let mut path = String::with_capacity(database.len());
        for byte in database.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                path.push(char::from(byte));
            } else {
                path.push_str(&format!("%{byte:02X}"));
            }
        }
        format!("postgres://postgres@127.0.0.1:{}/{path}", self.port)
    }

    /// A session of our own on a database, as the superuser.
    ///
    /// # Errors
    /// What the server or the network said.
    pub async fn connect(&self, database: &str) -> Result<Client> {
        let doing = || format!("connecting to the database {database:?} of the throwaway server {:?}", self.name);
        let (client, connection) = tokio_postgres::connect(&self.url_for(database), NoTls).await.context(doing)?;
        // The connection's error is also that of whatever waits for it, so it is reported there.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    /// The port on 127.0.0.1; the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The cluster's data directory.
    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    /// The directory of everything of this server: data, socket, log.
    pub fn directory(&self) -> &Path {
        &self.directory.path
    }

    /// The file with what the server logs.
    pub fn log(&self) -> PathBuf {
        self.directory.path.join("server.log")
    }

    /// The process id of the postmaster; that of the last one while the server is stopped.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Stops the server and waits for its end. Does nothing when it is stopped.
    ///
    /// # Errors
    /// When it had to be killed because it did not end within 30 seconds.
    pub async fn stop(&mut self, mode: StopMode) -> Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let signal = match mode {
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        };
        send(process, signal);
        let deadline = Instant::now() + STOP_TIMEOUT;
        while process.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.end_now();
                let message = format!("the throwaway server {:?} did not stop within {STOP_TIMEOUT:?}", self.name);
                return Err(Error::new(ErrorKind::Other, message));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.process = None;
        Ok(())
    }

    /// Stops the server in an orderly way if it runs, and starts it on the same port with the same data.
    ///
    /// # Errors
    /// What the server's log said last.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop(StopMode::Fast).await?;
        self.launch().await
    }

    /// Writes `postgresql.conf` anew, so that another port can be tried.
    fn configure(&self, settings: &[(&str, &str)]) -> Result<()> {
        let port = self.port.to_string();
        let socket_directory = self.directory.path.to_string_lossy();
        let ours = [
            ("listen_addresses", "127.0.0.1"),
            ("port", port.as_str()),
            ("unix_socket_directories", socket_directory.as_ref()),
            ("cluster_name", self.name.as_str()),
            ("log_line_prefix", "%m [%p] %a "),
            ("timezone", "UTC"),
        ];
        let path = self.data_directory.join("postgresql.conf");
        let mut text = String::from("# A throwaway server. Later lines win.\n");
        for (setting, value) in ours.iter().chain(settings) {
            // The quoting of "Parameter Interaction via the Configuration File"; escapes as in C.
            text.push_str(&format!("{setting} = '{}'\n", value.replace('\\', "\\\\").replace('\'', "''")));
        }
        fs::write(&path, text).context(|| format!("writing {}", path.display()))
    }

    /// Starts the server as our child and waits until it takes sessions.
    async fn launch(&mut self) -> Result<()> {
        let name = self.name.clone();
        let doing = || format!("starting the throwaway server {name:?}");
        let log = OpenOptions::new().create(true).append(true).open(self.log()).context(doing)?;
        let mut command = Command::new(self.programs.bin("postgres"));
        command.arg("-D").arg(&self.data_directory);
        self.user.prepare(&mut command, &self.directory.path);
        command.stdout(log.try_clone().context(doing)?).stderr(log);
        let process = command.spawn().context(doing)?;
        self.pid = process.id().cast_signed();
        self.process = Some(process);
        match self.wait_until_ready().await.context(doing) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.end_now();
                Err(error)
            }
        }
    }

    async fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(status) =
                self.process.as_mut().and_then(|process| process.try_wait().transpose()).transpose()?
            {
                return Err(self.failure(&format!("it ended with {status}")));
            }
            // Another server could answer on the port, so our own lock file says when ours is ready; a session proves it.
            if self.lock_file_says_ready() && self.connect("postgres").await.is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("it was not ready within {START_TIMEOUT:?}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether `postmaster.pid` names our process in line 1 and `ready` in line 8, or for a standby that takes sessions
    /// `standby` (pidfile.h of PostgreSQL).
    fn lock_file_says_ready(&self) -> bool {
        let Ok(text) = fs::read_to_string(self.data_directory.join("postmaster.pid")) else { return false };
        let mut lines = text.lines();
        lines.next().is_some_and(|pid| pid == self.pid.to_string())
            && lines.nth(6).is_some_and(|status| matches!(status.trim(), "ready" | "standby"))
    }

    fn port_was_taken(&self) -> bool {
        fs::read_to_string(self.log()).is_ok_and(|log| log.contains("Address already in use"))
    }

    fn failure(&self, what: &str) -> Error {
        Error::new(ErrorKind::Other, format!("{what}; its log ends with:\n{}", tail(&self.log(), 15)))
    }

    /// Ends the server now, by its own process id, and leaves no zombie.
    fn end_now(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        send(&process, Signal::QUIT);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(process.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                // Its children see the postmaster's death and end, too.
                send(&process, Signal::KILL);
                drop(process.wait());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for ThrowawayServer {
    fn drop(&mut self) {
        self.end_now();
    }
}

/// The last lines of a file, as far as it can be read.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

async fn initialize(programs: &ServerPrograms, directory: &Path, data: &Path, user: ServerUser) -> Result<()> {
    let mut command = Command::new(programs.bin("initdb"));
    command.arg("-D").arg(data).args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]);
    run_to_its_end(command, "initdb", directory, user).await
}

/// Runs one of PostgreSQL's programs that makes a data directory; what it says goes to a file beside that.
async fn run_to_its_end(mut command: Command, name: &str, directory: &Path, user: ServerUser) -> Result<()> {
    let log = directory.join(format!("{name}.log"));
    let file = File::create(&log).context(|| format!("making {}", log.display()))?;
    user.prepare(&mut command, directory);
    command.stdout(file.try_clone()?).stderr(file);
    let mut command = tokio::process::Command::from(command);
    let status: ExitStatus = command.kill_on_drop(true).status().await.context(|| format!("running {name}"))?;
    if !status.success() {
        let message = format!("{name} ended with {status}; it said last:\n{}", tail(&log, 15));
        return Err(Error::new(ErrorKind::Other, message));
    }
    Ok(())
}

fn send(process: &Child, signal: Signal) {
    // A failure says that the process is gone, which is what we want to know anyway from waiting for it.
    if let Some(pid) = Pid::from_raw(process.id().cast_signed()) {
        let _ = kill_process(pid, signal);
    }
}

fn free_port() -> Result<u16> {
    let doing = || "looking for a free port on 127.0.0.1".to_owned();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context(doing)?;
    Ok(listener.local_addr().context(doing)?.port())
}

fn usual_directories() -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    let children = |parent: &str| -> Vec<PathBuf> {
        fs::read_dir(parent).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
    };
    directories.extend(children("/usr/lib/postgresql").into_iter().map(|version| version.join("bin")));
    let red_hat = children("/usr").into_iter();
    let red_hat =
        red_hat.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgsql-")));
    directories.extend(red_hat.map(|version| version.join("bin")));
    directories
}

/// The first of the newest major version, or of the asked one.
fn choose(found: Vec<ServerPrograms>, major: Option<u32>) -> Option<ServerPrograms> {
    let fits = |programs: &ServerPrograms| major.map_or(programs.major >= MAJOR_MIN, |major| programs.major == major);
    found.into_iter().rev().filter(fits).max_by_key(|programs| programs.major)
}

/// The major version in `postgres (PostgreSQL) 15.18 (Debian …)`, `… 17beta1`, `… 18devel`.
fn parse_major(version: &str) -> Option<u32> {
    let number = version.split("(PostgreSQL) ").nth(1)?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::place::base_directory;
    use super::*;
    use crate::sql;

    #[test]
    fn the_newest_programs_that_fit_are_chosen() {
        let at = |directory: &str, major| ServerPrograms { directory: PathBuf::from(directory), major };
        let found = || vec![at("/path", 16), at("/a", 14), at("/b", 16), at("/c", 15)];
        assert_eq!(choose(found(), None), Some(at("/path", 16)), "PATH stands first");
        assert_eq!(choose(found(), Some(15)), Some(at("/c", 15)));
        assert_eq!(choose(found(), Some(14)), Some(at("/a", 14)), "what is asked for by number is meant");
        assert_eq!(choose(found(), Some(17)), None);
        assert_eq!(choose(vec![at("/a", 14)], None), None);
    }

    #[test]
    fn a_major_version_is_read_from_every_kind_of_release() {
        assert_eq!(parse_major("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 17beta1"), Some(17));
        assert_eq!(parse_major("bash, version 5"), None);
    }

    #[tokio::test]
    async fn a_server_keeps_its_data_over_restarts_and_crashes_and_leaves_nothing() {
        let programs = ServerPrograms::find(None).unwrap();
        let settings = [("wal_level", "logical"), ("search_path", "it's, public")];
        let mut server = ThrowawayServer::start(&programs, "it's one", &settings).await.unwrap();
        let client = server.connect("postgres").await.unwrap();
        let show =
            async |setting: &str| client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get::<_, String>(0);
        assert_eq!(show("wal_level").await, "logical");
        assert_eq!(show("search_path").await, "it's, public");
        assert_eq!(show("fsync").await, "on");
        assert_eq!(show("server_encoding").await, "UTF8");
        assert_eq!(show("listen_addresses").await, "127.0.0.1");
        let version: i32 = show("server_version_num").await.parse().unwrap();
        assert_eq!(version / 10_000, i32::try_from(programs.major()).unwrap());
        client.batch_execute("CREATE TABLE public.kept AS SELECT 1 AS number").await.unwrap();

        let port = server.port();
        for mode in [StopMode::Immediate, StopMode::Fast] {
            let pid = server.pid();
            server.stop(mode).await.unwrap();
            assert!(server.connect("postgres").await.is_err(), "{mode:?} stops it");
            server.restart().await.unwrap();
            assert_ne!(server.pid(), pid);
            assert_eq!(server.port(), port);
            let client = server.connect("postgres").await.unwrap();
            let rows = client.query_one("SELECT count(*) FROM public.kept", &[]).await.unwrap();
            assert_eq!(rows.get::<_, i64>(0), 1, "what was committed survives {mode:?}");
        }

        let (directory, pid) = (server.directory().to_owned(), Pid::from_raw(server.pid()).unwrap());
        assert!(directory.join("data").is_dir() && server.log().is_file());
        assert_eq!(server.data_directory(), directory.join("data"));
        drop(server);
        assert!(!directory.exists(), "the files are gone");
        assert!(rustix::process::test_kill_process(pid).is_err(), "the process is gone");
    }

    #[tokio::test]
    async fn a_database_with_a_hostile_name_has_a_connection_string() {
        let programs = ServerPrograms::find(None).unwrap();
        let server = ThrowawayServer::start(&programs, "names", &[("fsync", "off")]).await.unwrap();
        let name = "Größe / 50% ?a=b#\"";
        let client = server.connect("postgres").await.unwrap();
        client.batch_execute(&format!("CREATE DATABASE {}", sql::identifier(name))).await.unwrap();
        let client = server.connect(name).await.unwrap();
        let current = client.query_one("SELECT current_database()::text", &[]).await.unwrap();
        assert_eq!(current.get::<_, String>(0), name);
    }

    #[tokio::test]
    async fn a_server_that_cannot_start_says_why_and_leaves_nothing() {
        let programs = ServerPrograms::find(None).unwrap();
        let error = ThrowawayServer::start(&programs, "broken", &[("wal_level", "sideways")]).await.unwrap_err();
        assert!(error.to_string().contains("sideways"), "the server's own words: {error}");
        let left = base_directory(ServerUser::for_this_process().unwrap());
        let ours = format!("walferry-broken-{}-", std::process::id());
        let left = fs::read_dir(left)
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours));
        assert_eq!(left.count(), 0);
    }
}
