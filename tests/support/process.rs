//! The program as a child process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};

use super::PATIENCE;

/// What a run of the program left.
#[derive(Debug)]
pub struct Finished {
    /// `None` when a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in standard output:\n{}\n{}", self.stdout, self.stderr))
    }

    /// The error that a person sees, with what to do next.
    #[track_caller]
    pub fn assert_refused(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.code, Some(code), "exit code; stderr:\n{}", self.stderr);
        for text in texts.iter().chain(&["error: ", " next: "]) {
            assert!(self.stderr.contains(text), "no {text:?} in standard error:\n{}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

impl Finished {
    /// An error whose next steps stand on standard output already.
    #[track_caller]
    pub fn assert_refused_without_hint(&self, code: i32) {
        assert_eq!(self.code, Some(code), "exit code; stderr:\n{}", self.stderr);
        assert!(self.stderr.contains("error: ") && !self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// A running walferry; killed when it is dropped.
pub struct Running {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    pub fn start(arguments: &[&str], files: &Path, environment: &[(String, String)]) -> Running {
        Running::start_program(Path::new(env!("CARGO_BIN_EXE_walferry")), arguments, files, environment)
    }

    /// Another program that becomes walferry.
    pub fn start_program(
        program: &Path,
        arguments: &[&str],
        files: &Path,
        environment: &[(String, String)],
    ) -> Running {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let (stdout, stderr) = (files.join(format!("{number}.out")), files.join(format!("{number}.err")));
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if (name.starts_with("PG") || name.starts_with("WALFERRY_")) && name != "WALFERRY_PG_BIN" {
                command.env_remove(&*name);
            }
        }
        let child = command
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Running { child, stdout, stderr }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it wrote to standard error so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// What it wrote to standard output so far.
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// Ends with the process, and with the most memory that it has had, in bytes (`VmHWM`).
    pub fn watch_memory(&self) -> tokio::task::JoinHandle<u64> {
        let path = format!("/proc/{}/status", self.id());
        tokio::spawn(async move {
            let mut peak_kib = 0;
            // A process that has ended has no such line any more, even while nobody has waited for it.
            while let Some(kib) = std::fs::read_to_string(&path).ok().as_deref().and_then(memory_peak_kib) {
                peak_kib = kib;
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            peak_kib * 1024
        })
    }

    /// Waits for its end.
    pub async fn wait(mut self) -> Finished {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        let status = ended.unwrap_or_else(|_| panic!("walferry does not end:\n{}", self.log())).unwrap();
        Finished { code: status.code(), stdout: self.output(), stderr: self.log() }
    }

    /// `kill -9`.
    pub async fn kill(mut self) -> Finished {
        assert!(self.is_alive(), "walferry had ended before it was to be killed:\n{}", self.log());
        self.signal(Signal::KILL);
        self.wait().await
    }

    /// `kill -9`, unless it has ended by itself; returns when it is gone.
    pub async fn kill_if_alive(mut self) {
        let _ = self.child.start_kill();
        drop(self.child.wait().await);
    }

    /// SIGTERM.
    pub async fn terminate(self) -> Finished {
        self.signal(Signal::TERM);
        self.wait().await
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it runs");
        kill_process(pid, signal).unwrap();
    }
}

fn memory_peak_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}
