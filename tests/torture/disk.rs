//! The queue's disk, made to fail: `faulty_disk.c`, built here and preloaded into walferry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the disk does; see `faulty_disk.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    Slow,
    Full,
    Short,
    Write,
    Sync,
}

impl DiskFault {
    pub const ALL: [DiskFault; 5] =
        [DiskFault::Slow, DiskFault::Full, DiskFault::Short, DiskFault::Write, DiskFault::Sync];

    pub fn name(self) -> &'static str {
        match self {
            DiskFault::Slow => "slow disk",
            DiskFault::Full => "full disk",
            DiskFault::Short => "short writes",
            DiskFault::Write => "failing writes",
            DiskFault::Sync => "failing fsync",
        }
    }

    /// The word in the control file.
    fn word(self) -> &'static str {
        match self {
            DiskFault::Slow => "slow",
            DiskFault::Full => "full",
            DiskFault::Short => "short",
            DiskFault::Write => "write",
            DiskFault::Sync => "sync",
        }
    }

    /// Whether walferry may end because of it, when it meets it while it opens the queue.
    pub fn refuses(self) -> bool {
        !matches!(self, DiskFault::Slow | DiskFault::Short)
    }
}

/// The disk of one queue.
pub struct FaultyDisk {
    control: PathBuf,
    environment: Vec<(String, String)>,
}

impl FaultyDisk {
    /// For the queue in a directory; `files` is a directory for what this needs itself. `None`, and a loud word, where there
    /// is no C compiler or the program cannot be preloaded into.
    pub fn build(files: &Path, queue: &Path) -> Option<FaultyDisk> {
        let (library, control) = (files.join("faulty_disk.so"), files.join("faulty_disk"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/torture/faulty_disk.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-U_FORTIFY_SOURCE", "-o"])
            .args([library.as_os_str(), source.as_ref()])
            .args(["-ldl", "-lpthread"])
            .output();
        match built {
            Ok(output) if output.status.success() => {}
            Ok(output) => return skip(&String::from_utf8_lossy(&output.stderr)),
            Err(error) => return skip(&format!("no C compiler: {error}")),
        }
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let environment = vec![
            ("LD_PRELOAD".to_owned(), text(&library)),
            ("FAULTY_DISK_CONTROL".to_owned(), text(&control)),
            ("FAULTY_DISK_DIRECTORY".to_owned(), text(queue)),
        ];
        let mut program = Command::new(env!("CARGO_BIN_EXE_walferry"));
        program.arg("--version").envs(environment.iter().cloned()).stdout(Stdio::null());
        let ran = program.status();
        let disk = FaultyDisk { control, environment };
        if !ran.is_ok_and(|status| status.success()) || !disk.beside("loaded").exists() {
            return skip("walferry does not take LD_PRELOAD");
        }
        Some(disk)
    }

    /// What walferry's environment needs besides its own.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// From now on the disk does this, or is as it should be.
    pub fn set(&self, fault: Option<DiskFault>) {
        let fresh = self.beside("new");
        fs::write(&fresh, fault.map_or("none", DiskFault::word)).unwrap();
        fs::rename(fresh, &self.control).unwrap();
    }

    /// How many calls it has spoilt.
    pub fn hits(&self) -> u64 {
        fs::metadata(self.beside("hits")).map_or(0, |file| file.len())
    }

    fn beside(&self, what: &str) -> PathBuf {
        PathBuf::from(format!("{}.{what}", self.control.display()))
    }
}

fn skip(why: &str) -> Option<FaultyDisk> {
    eprintln!("SKIPPED: THE FAULTS OF THE QUEUE'S DISK ARE NOT TESTED HERE: {}", why.trim());
    None
}
