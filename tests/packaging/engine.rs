//! A Docker engine of a test's own. It and all that it starts live in namespaces of processes, mounts and network that end with one
//! process; the network is a loopback interface and nothing else. What it keeps is in memory, and ends with them too.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::file;

/// How long any one step may take before it is ended and the test fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// In the namespaces, before the engine: the loopback interface, and places for what engines leave outside of their directories.
const START: &str = r#"
set -e
ip link set lo up
for place in /run /opt; do mount -t tmpfs none $place; done
mkdir -p "$0/etc-new" "$0/etc-work" "$0/data"
mount -t tmpfs -o size=6g none "$0/data"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$0/etc-new,workdir=$0/etc-work" /etc
exec dockerd --data-root "$0/data" --exec-root "$0/run" --pidfile "$0/engine.pid" --host "unix://$0/socket" \
    --cgroup-parent "$1" --bridge none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false
"#;

/// A running engine; it ends, with all of its containers, when this is dropped or the test's process dies.
pub struct Engine {
    process: Child,
    /// Of its containers in the kernel's control groups.
    group: String,
    path: std::ffi::OsString,
    directory: TempDir,
}

impl Engine {
    /// `Err` with the reason where none can run.
    pub fn start() -> Result<Engine, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("an engine needs root".to_owned());
        }
        let unpacked = file("target/tools/docker/usr");
        let usual = std::env::var_os("PATH").unwrap_or_default();
        let places = [unpacked.join("sbin"), unpacked.join("bin"), "/usr/sbin".into(), "/sbin".into()];
        let path = std::env::join_paths(places.into_iter().chain(std::env::split_paths(&usual))).unwrap();
        for program in ["dockerd", "docker", "containerd", "runc", "docker-compose", "unshare", "setpriv", "ip"] {
            if !std::env::split_paths(&path).any(|directory| directory.join(program).is_file()) {
                return Err(format!("{program} was not found: `make test` brings it on Debian"));
            }
        }
        let directory = tempfile::Builder::new().prefix("walferry-engine-").tempdir().unwrap();
        let group = format!("walferry-test-{}", std::process::id());
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let mut command = Command::new("setpriv");
        // The process in the middle dies with the thread that started it, and takes its child with it.
        command.args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        command.args(["sh", "-c", START]).arg(directory.path()).arg(&group).env("PATH", &path);
        let process = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        let process = process.map_err(|error| format!("starting it: {error}"))?;
        let mut engine = Engine { process, group, path, directory };
        let deadline = Instant::now() + PATIENCE;
        while !engine.try_docker(&["version"]).status.success() {
            if engine.process.try_wait().unwrap().is_some() || Instant::now() > deadline {
                return Err(format!("it does not come up:\n{}", engine.log()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(engine)
    }

    /// What it wrote; the end of it.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        log[log.len().saturating_sub(4000)..].to_owned()
    }

    /// A place for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A program that finds this engine, and no other.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        // Ended when it takes too long; its own process group is ended with it.
        let mut command = Command::new("timeout");
        command.args(["--kill-after", "5", &PATIENCE.as_secs().to_string()]).arg(program);
        command.env("PATH", &self.path).env("HOME", self.directory.path()).current_dir(file("."));
        command.env("DOCKER_HOST", format!("unix://{}/socket", self.directory.path().display()));
        command.env("DOCKER_BUILDKIT", "1").env("COMPOSE_DOCKER_CLI_BUILD", "1");
        command.stdin(Stdio::null());
        command
    }

    fn try_docker(&self, arguments: &[&str]) -> Output {
        self.command("docker").args(arguments).output().unwrap()
    }

    /// The standard output of `docker`; panics unless it succeeds.
    pub fn docker(&self, arguments: &[&str]) -> String {
        text(self.try_docker(arguments), &format!("docker {}", arguments.join(" ")))
    }

    /// An image of these bytes, a file system as tar.
    pub fn import(&self, tar: &[u8], name: &str) -> Result<(), String> {
        let mut child = self.command("docker").args(["import", "-", name]).stdin(Stdio::piped()).spawn().unwrap();
        let sent = child.stdin.take().unwrap().write_all(tar);
        let status = child.wait().unwrap();
        match status.success() {
            true => sent.map_err(|error| format!("docker import: {error}")),
            false => Err(format!("docker import: {status}\n{}", self.log())),
        }
    }

    /// Whether a container runs here at all.
    pub fn can_run(&self, image: &str) -> Result<(), String> {
        let output = self.try_docker(&["run", "--rm", "--network", "host", image, "true"]);
        output.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The others die right after it: then what they had is free.
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let left = groups(&self.group).iter().filter(|directory| !remove(directory)).count();
            if left == 0 && std::fs::remove_dir_all(self.directory.path()).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("!!! NOT REMOVED: {} or the control groups of {}", self.directory.path().display(), self.group);
    }
}

/// The control groups of this name, in each hierarchy that there is: they are made below the one that the test is in.
fn groups(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut to_look_at = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = to_look_at.pop() {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        for path in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
        {
            if path.ends_with(name) { found.push(path) } else { to_look_at.push(path) }
        }
    }
    found
}

/// A control group with those below it; `false` while a process is in one of them.
fn remove(group: &Path) -> bool {
    let below = std::fs::read_dir(group).into_iter().flatten().flatten().map(|entry| entry.path());
    below.filter(|path| path.is_dir()).all(|path| remove(&path)) && std::fs::remove_dir(group).is_ok()
}

/// Standard output; panics, with all that was said, unless it succeeded.
pub fn text(output: Output, what: &str) -> String {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}
