//! A running `walferry migrate`, and what the kernel says of its process.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use walferry::control::{Answer, Conversation, Request};
use walferry::error::{Context, Error, ErrorKind, Result};
use walferry::observe::status::{Phase, Status};
use walferry::pause::What;
use walferry::state_directory::StateDirectory;

use crate::setting::Setting;

/// How long anything may take before the benchmark gives up.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// Ticks in a second of the times in /proc, on every architecture that PostgreSQL is built for.
pub const USER_HZ: f64 = 100.0;

/// The child process of one migration; started again, it goes on.
pub struct Engine {
    program: PathBuf,
    source: String,
    target: String,
    directory: StateDirectory,
    log: PathBuf,
    child: Option<Child>,
    /// Of the processes that have ended.
    peak_bytes: u64,
    way_back: bool,
    profile: Option<PathBuf>,
}

/// A window in which the process is watched.
pub struct Window {
    cpu_seconds: f64,
    begun: Instant,
    recorder: Option<(Child, PathBuf)>,
}

/// What happened in a window.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    pub elapsed: Duration,
    /// User and system time of the process.
    pub cpu_seconds: f64,
}

impl Engine {
    /// A migration from one database to another; nothing runs yet.
    pub fn new(setting: &Setting, name: &str, source: String, target: String) -> Result<Engine> {
        let path = setting.directory(name)?;
        Ok(Engine {
            program: setting.walferry.clone(),
            source,
            target,
            log: path.with_extension("log"),
            directory: StateDirectory::at(&path),
            child: None,
            peak_bytes: 0,
            way_back: false,
            profile: setting.options.profile.then(|| setting.options.out.join(format!("profile-{name}"))),
        })
    }

    /// With a way back, which the peers have not: it is in none of the comparisons.
    pub fn with_way_back(self) -> Engine {
        Engine { way_back: true, ..self }
    }

    /// Runs `walferry check`, whatever it finds.
    pub async fn check_servers(&self) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.args(["check", "--json", "--source", &self.source, "--target", &self.target]);
        let output = command.stdin(Stdio::null()).output().await?;
        if output.status.code().is_some_and(|code| code == 0 || code == 3) {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(ErrorKind::Other, format!("walferry check ended with {}: {said}", output.status)))
    }

    /// Starts the process.
    pub fn start(&mut self) -> Result<()> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(&self.program)
            .args(["migrate", "--http-addr", "off", "--source", &self.source, "--target", &self.target, "--dir"])
            .arg(self.directory.path())
            .args((!self.way_back).then_some("--no-reverse"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context(|| format!("starting {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until it follows.
    pub async fn following(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before it listens there is no answer. Not asked too often: both share the cores.
            if self.status().await.is_ok_and(|status| status.phase == Phase::Following) {
                return Ok(());
            }
            self.check(deadline)?;
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Fails when the process has ended, or when it is too late.
    pub fn check(&mut self, deadline: Instant) -> Result<()> {
        let ended = match &mut self.child {
            Some(child) => child.try_wait()?,
            None => None,
        };
        if ended.is_none() && Instant::now() < deadline {
            return Ok(());
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(15)..].join("\n");
        let what =
            ended.map_or("walferry is not done in time".into(), |status| format!("walferry ended with {status}"));
        Err(Error::new(ErrorKind::Other, format!("{what}; its log ends with:\n{last}")))
    }

    async fn ask(&self, request: &Request) -> Result<Answer> {
        Conversation::begin(&self.directory, request).await?.next().await
    }

    /// How it is.
    pub async fn status(&self) -> Result<Status> {
        match self.ask(&Request::Status).await? {
            Answer::Status(status) => Ok(*status),
            _ => Err(Error::new(ErrorKind::Other, "walferry answered something else")),
        }
    }

    /// Holds the apply, or lets it go on, as `walferry pause apply` and `walferry resume` do.
    pub async fn pause(&self, rest: bool) -> Result<()> {
        self.ask(&Request::Pause { what: What::Apply, rest }).await.map(drop)
    }

    /// The slot that it reads from.
    pub fn slot(&self) -> Result<String> {
        let identity = self.directory.identity()?;
        let identity = identity.ok_or_else(|| Error::new(ErrorKind::Other, "the migration has no identity yet"))?;
        Ok(format!("walferry_{}", identity.id))
    }

    /// Begins to watch the process, which must run.
    pub async fn watch(&mut self) -> Result<Window> {
        let pid = self.pid()?;
        let recorder = match &self.profile {
            None => None,
            Some(path) => {
                let data = self.log.with_extension("perf");
                let _ = std::fs::remove_file(&data);
                let child = Command::new("perf")
                    .args(["record", "-q", "-F", "999", "-p", &pid.to_string(), "-o"])
                    .arg(&data)
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .kill_on_drop(true)
                    .spawn()
                    .context(|| "starting perf".into())?;
                // It has to attach first.
                tokio::time::sleep(Duration::from_millis(300)).await;
                Some((child, path.clone()))
            }
        };
        Ok(Window { cpu_seconds: cpu_seconds(pid)?, begun: Instant::now(), recorder })
    }

    /// Ends watching.
    pub async fn spent(&mut self, window: Window) -> Result<Spent> {
        let elapsed = window.begun.elapsed();
        let cpu_seconds = cpu_seconds(self.pid()?)? - window.cpu_seconds;
        if let Some((mut child, path)) = window.recorder {
            if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
                kill_process(pid, Signal::INT).map_err(std::io::Error::from)?;
            }
            child.wait().await?;
            self.report(&path).await?;
        }
        Ok(Spent { elapsed, cpu_seconds })
    }

    /// Writes the hottest functions of a recording down; a later window of the same case writes over an earlier one.
    async fn report(&self, path: &Path) -> Result<()> {
        let output = Command::new("perf")
            .args(["report", "--stdio", "--no-children", "--percent-limit", "0.5", "-i"])
            .arg(self.log.with_extension("perf"))
            .stderr(Stdio::null())
            .output()
            .await?;
        let lines = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = lines.lines().filter(|line| !line.trim().is_empty()).collect();
        std::fs::write(path.with_extension("txt"), lines.join("\n")).map_err(Error::from)
    }

    fn pid(&self) -> Result<u32> {
        let id = self.child.as_ref().and_then(Child::id);
        id.ok_or_else(|| Error::new(ErrorKind::Other, "walferry does not run"))
    }

    /// The most memory that any process of this migration had, in bytes.
    pub fn peak_bytes(&mut self) -> u64 {
        if let Ok(pid) = self.pid() {
            self.peak_bytes = self.peak_bytes.max(peak_bytes(pid).unwrap_or_default());
        }
        self.peak_bytes
    }

    /// Runs a command of walferry on the state directory, which comes last; answers the JSON that it prints.
    pub async fn command(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut command = Command::new(&self.program);
        let output = command.args(arguments).arg(self.directory.path()).stdin(Stdio::null()).output().await?;
        let said = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&said).map_err(|_| {
            let said = String::from_utf8_lossy(&output.stderr);
            Error::new(
                ErrorKind::Other,
                format!("walferry {} ended with {}: {said}", arguments.join(" "), output.status),
            )
        })
    }

    /// Stops the process as an operator does, with SIGTERM.
    pub async fn stop(&mut self) -> Result<()> {
        self.peak_bytes();
        let Some(mut child) = self.child.take() else { return Ok(()) };
        if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            kill_process(pid, Signal::TERM).map_err(std::io::Error::from)?;
        }
        child.wait().await?;
        Ok(())
    }

    /// Stops it, and removes all it left on the servers and on the disk.
    pub async fn clean(&mut self) -> Result<()> {
        self.stop().await?;
        let output = Command::new(&self.program)
            .args(["clean", "--source", &self.source, "--target", &self.target, "--dir"])
            .arg(self.directory.path())
            .stdin(Stdio::null())
            .output()
            .await?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(ErrorKind::Other, format!("walferry clean ended with {}: {said}", output.status)))
    }
}

/// User and system time of a process (proc(5), fields 14 and 15 of stat), in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).context(|| "reading walferry's times".into())?;
    // The name in parentheses can hold anything; the third field stands behind it.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    Ok((ticks(11) + ticks(12)) / USER_HZ)
}

fn peak_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kilobytes = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))?;
    Some(kilobytes.parse::<u64>().ok()? << 10)
}
