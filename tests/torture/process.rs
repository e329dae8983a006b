//! walferry itself, as an operator or a service manager runs it.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};

/// The process of `walferry migrate`, started again with the same command whenever it was ended.
pub struct Walferry {
    pub arguments: Vec<String>,
    pub directory: PathBuf,
    log: PathBuf,
    /// Where in the log the present process began.
    log_begins: usize,
    child: Option<Child>,
    /// What is run: `migrate`, or `resync` once.
    pub verb: &'static str,
    /// Arguments of that one time.
    pub more: Vec<String>,
    /// Variables that it gets besides its usual ones.
    pub environment: Vec<(String, String)>,
    pub kills: u64,
    pub stops: u64,
    pub starts: u64,
    /// It ended by itself, though nobody asked.
    pub unasked: Vec<String>,
    /// The queue's disk refuses, or did in the life of this process: opening the queue may fail then.
    pub disk_refuses: bool,
    /// How often that has ended it.
    pub refused: u64,
    /// It said that it is done.
    pub done: bool,
}

impl Walferry {
    pub fn new(arguments: Vec<String>, directory: PathBuf, log: PathBuf) -> Walferry {
        Walferry {
            arguments,
            directory,
            log,
            log_begins: 0,
            child: None,
            verb: "migrate",
            more: Vec::new(),
            environment: Vec::new(),
            kills: 0,
            stops: 0,
            starts: 0,
            unasked: Vec::new(),
            disk_refuses: false,
            refused: 0,
            done: false,
        }
    }

    pub fn start(&mut self) -> std::io::Result<()> {
        if self.done {
            return Ok(());
        }
        let log: File = OpenOptions::new().create(true).append(true).open(&self.log)?;
        self.log_begins = usize::try_from(log.metadata()?.len()).unwrap_or_default();
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command
            .arg(self.verb)
            .args(&self.arguments[1..])
            .args(&self.more)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        self.child = Some(command.spawn()?);
        self.starts += 1;
        Ok(())
    }

    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that has ended by itself is not killed any more.
            self.kills += u64::from(matches!(child.try_wait(), Ok(None)));
            let _ = child.start_kill();
            let status = child.wait().await;
            self.note_end(status.ok());
        }
    }

    /// SIGTERM. It has to end in time and to say that it was interrupted.
    pub async fn stop(&mut self) -> Result<(), String> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let Some(pid) = child.id() else { return Ok(()) };
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a child's id is not zero");
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let Ok(status) = tokio::time::timeout(Duration::from_secs(10), child.wait()).await else {
            return Err("10 s after SIGTERM walferry was still there".into());
        };
        self.stops += 1;
        match status.map(|status| (status.code(), status)) {
            Ok((Some(130), _)) => Ok(()),
            // The signal came before its handler was there.
            Ok((None, _)) => Ok(()),
            Ok((_, status)) => {
                self.note_end(Some(status));
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn note_end(&mut self, status: Option<ExitStatus>) {
        match status.and_then(|status| status.code()) {
            Some(0) => self.done = true,
            // Before anything has begun, whoever asks wants to hear at once that a server cannot be reached.
            Some(1 | 3) if !self.directory.join("migration.json").exists() => {}
            // The preparation had been cut off, and the next one begins with the check: prepared transactions block it.
            Some(3) if tail(&self.log, 3).contains("against the migration") => {}
            Some(1) if self.disk_refuses && tail(&self.log, 3).contains("look at the disk that holds the state") => {
                self.refused += 1;
            }
            Some(code) => {
                self.unasked.push(format!("exit code {code} at start {}: {}", self.starts, tail(&self.log, 3).trim()));
            }
            None => {}
        }
    }

    /// Waits for an end that has to come. Answers the exit code and what it said in this life; `None` when it does not come.
    pub async fn wait_for_end(&mut self, time: Duration) -> Option<(Option<i32>, String)> {
        let mut child = self.child.take()?;
        let status = tokio::time::timeout(time, child.wait()).await.ok()?.ok()?;
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        Some((status.code(), log.get(self.log_begins..).unwrap_or_default().to_owned()))
    }

    /// Looks whether it still runs; one that ended by itself is started again. Answers whether it ran.
    pub fn look(&mut self) -> bool {
        let Some(child) = &mut self.child else { return false };
        match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                self.child = None;
                self.note_end(Some(status));
                false
            }
            Err(_) => false,
        }
    }

    /// Runs another command of walferry on the directory. Answers its exit code and what it said.
    pub async fn command(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command.args(arguments).arg("--dir").arg(&self.directory).stdin(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(Duration::from_secs(90), command.output()).await {
            Ok(Ok(output)) => {
                let text = [output.stdout, output.stderr].concat();
                (output.status.code(), String::from_utf8_lossy(&text).into_owned())
            }
            Ok(Err(error)) => (None, error.to_string()),
            Err(_) => (None, format!("`walferry {}` did not end within 90 s", arguments.join(" "))),
        }
    }

    /// The phase, and whether the way back is open.
    pub async fn phase(&self) -> (String, bool) {
        let (_, text) = self.command(&["status", "--json"]).await;
        let Ok(status) = serde_json::from_str::<serde_json::Value>(text.trim()) else {
            return ("unknown".into(), false);
        };
        (status["phase"].as_str().unwrap_or("unknown").to_owned(), status["direction"] == "back")
    }

    pub fn tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }

    /// How often a text is in the log.
    pub fn logged(&self, text: &str) -> usize {
        std::fs::read_to_string(&self.log).map_or(0, |log| log.matches(text).count())
    }
}

pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
