//! The state directory: the queue, who the migration is, a lock, the control socket, and the last status.
//!
//! It holds no truth about the target (I2) and no secret (I10); mode 0700.

use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::crashsafe;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::record;
use crate::source::scope::Scope;
use crate::timescale;

/// The version of `migration.json` (H18).
const FORMAT: u32 = 1;

/// The directory of a migration's first queue; those of slots that came later begin with it.
pub const FIRST_QUEUE: &str = "queue";

/// The directory of the queue that begins at a position, for a slot that came later or after a loss.
pub fn queue_name(begins: Lsn) -> String {
    format!("{FIRST_QUEUE}-{}", begins.to_string().replace('/', "-"))
}

/// Whether a name is one that we give to a queue. Others are somebody's copies, and stay.
fn is_queue(name: &str) -> bool {
    let position = name.strip_prefix(FIRST_QUEUE).and_then(|rest| rest.strip_prefix('-'));
    name == FIRST_QUEUE
        || position.is_some_and(|lsn| lsn.replacen('-', "/", 1).parse().is_ok_and(|lsn| queue_name(lsn) == name))
}

/// Who the migration is that this directory belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    format: u32,
    /// The migration's id: also in the ledger, and in the names of slot and publications.
    pub id: String,
    /// The source's connection string, without its password.
    pub source: String,
    /// The target's, likewise.
    pub target: String,
    /// What of the database is moved.
    #[serde(default)]
    pub scope: Scope,
    /// The standby of the source that the slot is on, likewise, where it is not on the source itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_from: Option<String>,
}

impl Identity {
    /// A migration between two databases.
    pub fn new(id: String, source: String, target: String, scope: Scope) -> Identity {
        Identity { format: FORMAT, id, source, target, scope, stream_from: None }
    }

    /// With its slot on a standby of the source.
    #[must_use]
    pub fn streaming_from(mut self, standby: Option<String>) -> Identity {
        self.stream_from = standby;
        self
    }
}

/// A state directory, for commands that look at it.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    path: PathBuf,
}

/// A state directory that belongs to this process alone, until it is dropped.
pub struct LockedDirectory {
    directory: StateDirectory,
    // Released with the file, also when the process dies.
    _lock: File,
}

impl StateDirectory {
    /// A path; nothing is touched.
    pub fn at(path: &Path) -> StateDirectory {
        StateDirectory { path: path.to_owned() }
    }

    /// Makes the directory if needed, sees to it that it is for this user alone, and locks it.
    ///
    /// # Errors
    /// `Blocked` when another process has it, it belongs to another user, or it is a symbolic link; `Other` when it cannot be
    /// made or written to.
    pub fn lock(&self) -> Result<LockedDirectory> {
        // Without a slash at its end, which would follow a link.
        let plain: PathBuf = self.path.components().collect();
        refuse_a_link(&plain)?;
        crashsafe::create_private_directory(&plain).map_err(|error| {
            error.hint("Choose a directory that this user may write to with --dir (or WALFERRY_DIR), on a disk with room for the queue.")
        })?;
        make_private(&plain)?;
        let path = self.path.join("lock");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context(|| format!("opening {}", path.display()))
            .map_err(|error| error.hint("The state directory must be writable for the user who runs walferry."))?;
        match file.try_lock() {
            Ok(()) => Ok(LockedDirectory { directory: self.clone(), _lock: file }),
            Err(TryLockError::WouldBlock) => {
                Err(Error::new(ErrorKind::Blocked, format!("another walferry is running in {}", self.path.display()))
                    .hint(format!(
                        "`walferry status --dir {}` shows how it is; a second migration needs a directory of its own.",
                        self.path.display()
                    )))
            }
            Err(TryLockError::Error(error)) => Err(error).context(|| format!("locking {}", path.display())),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a queue is, by the name that the ledger has for it.
    pub fn queue(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// How many bytes queues can take on this disk: what is free, and what they have. `None` where the disk does not say.
    pub fn room_for_queues(&self) -> Option<u64> {
        let absolute = std::path::absolute(&self.path).ok()?;
        let disk = absolute.ancestors().find_map(|ancestor| rustix::fs::statvfs(ancestor).ok())?;
        let bytes = |directory: PathBuf| -> u64 {
            let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
            files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
        };
        let queues = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        let queues = queues.filter(|entry| entry.file_name().to_str().is_some_and(is_queue));
        let taken: u64 = queues.map(|queue| bytes(queue.path())).sum();
        Some(disk.f_bavail.saturating_mul(disk.f_frsize).saturating_add(taken))
    }

    /// Where the control socket is.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Where the last status is, for when no process answers.
    pub fn status(&self) -> PathBuf {
        self.path.join("status.json")
    }

    /// What the operator holds.
    pub fn paused(&self) -> PathBuf {
        self.path.join("paused.json")
    }

    /// What the operator has tuned.
    pub fn tuned(&self) -> PathBuf {
        self.path.join("tuned.json")
    }

    /// That the slot was given up, if it was.
    pub fn given_up(&self) -> PathBuf {
        self.path.join("given-up.json")
    }

    /// Who the migration is; `None` in an empty directory.
    ///
    /// # Errors
    /// `Blocked` when a newer walferry wrote it (H18); `Other` when it cannot be read.
    pub fn identity(&self) -> Result<Option<Identity>> {
        let path = self.identity_file();
        let content = match std::fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(|| format!("reading {}", path.display())),
        };
        let identity: Identity = serde_json::from_slice(&content).map_err(|error| {
            Error::new(ErrorKind::Other, format!("{} is not what walferry wrote: {error}", path.display()))
        })?;
        if identity.format > FORMAT {
            let text = format!("{} was written by a newer walferry (format {})", path.display(), identity.format);
            return Err(Error::new(ErrorKind::Blocked, text).hint("Go on with that version."));
        }
        Ok(Some(identity))
    }

    fn identity_file(&self) -> PathBuf {
        self.path.join("migration.json")
    }
}

/// A link could be turned to another place while the migration runs.
fn refuse_a_link(path: &Path) -> Result<()> {
    if !path.is_symlink() {
        return Ok(());
    }
    let to = std::fs::canonicalize(path).map_or_else(|_| "nothing".to_owned(), |path| path.display().to_string());
    Err(Error::new(ErrorKind::Blocked, format!("the state directory {} is a symbolic link", path.display()))
        .hint(format!("Give the directory itself with --dir: it points to {to}.")))
}

/// Refuses a directory of another user. Takes what others may do with ours away, where nobody can be using it for anything
/// else: it is empty, or a migration's already.
fn make_private(path: &Path) -> Result<()> {
    let doing = || format!("opening the state directory {}", path.display());
    // One and the same directory is looked at and changed, whatever its name stands for meanwhile.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from).context(doing)?;
    let found = rustix::fs::fstat(&directory).map_err(std::io::Error::from).context(doing)?;
    if found.st_uid != rustix::process::geteuid().as_raw() {
        return Err(Error::new(
            ErrorKind::Blocked,
            format!("the state directory {} belongs to another user (uid {})", path.display(), found.st_uid),
        )
        .hint("Run walferry as that user, or choose a directory of your own with --dir."));
    }
    let mode = found.st_mode & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let names = std::fs::read_dir(path).context(doing)?.map(|entry| entry.map(|entry| entry.file_name()));
    let names = names.collect::<std::io::Result<Vec<_>>>().context(doing)?;
    // The root of a file system of its own has that one.
    let is_free = names.iter().all(|name| name == "lost+found") || names.iter().any(|name| name == "migration.json");
    if !is_free {
        return Err(Error::new(
            ErrorKind::Blocked,
            format!(
                "the state directory {} is open to others (mode {mode:04o}), and has files that are not walferry's",
                path.display()
            ),
        )
        .hint("Choose a directory with --dir that is not there yet, or is empty."));
    }
    rustix::fs::fchmod(&directory, Mode::RWXU).map_err(std::io::Error::from).context(doing)?;
    tracing::warn!("the state directory {} was open to others (mode {mode:04o}); it is 0700 now", path.display());
    Ok(())
}

impl LockedDirectory {
    /// The directory, for what does not need the lock.
    pub fn directory(&self) -> &StateDirectory {
        &self.directory
    }

    /// Writes down who the migration is, durably.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn identify(&self, identity: &Identity) -> Result<()> {
        let content =
            serde_json::to_vec_pretty(identity).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        crashsafe::replace(&self.directory.identity_file(), &content)
    }

    /// Throws away every queue but one: nothing of them can be applied any more.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn discard_queues(&self, but: Option<&str>) -> Result<()> {
        let path = self.directory.path();
        let reading = || format!("looking for queues in {}", path.display());
        for entry in std::fs::read_dir(path).context(reading)? {
            let entry = entry.context(reading)?;
            let name = entry.file_name();
            let is_queue = name.to_str().is_some_and(|name| is_queue(name) && Some(name) != but);
            if is_queue && entry.file_type().context(reading)?.is_dir() {
                std::fs::remove_dir_all(entry.path()).context(|| format!("removing {}", entry.path().display()))?;
            }
        }
        Ok(())
    }

    /// Removes the directory and everything that walferry put into it. Files of others stay, and with them the directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(self) -> Result<()> {
        self.discard_queues(None)?;
        let path = self.directory.path().to_owned();
        for file in [
            "control.sock",
            "status.json",
            "status.new",
            "paused.json",
            "paused.new",
            "tuned.json",
            "tuned.new",
            "given-up.json",
            "given-up.new",
            timescale::pause::FILE,
            "paused-jobs.new",
            "migration.json",
            "migration.new",
            "schema.dump",
            record::FILE,
            "record.new",
            record::past::FILE,
            "history.new",
            "lock",
        ] {
            match std::fs::remove_file(path.join(file)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).context(|| format!("removing {} from {}", file, path.display()));
                }
                _ => {}
            }
        }
        // Not empty: somebody else's files are in it.
        let _ = std::fs::remove_dir(&path);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_queues_of_ours_are_thrown_away_and_no_copy_of_one() {
        let parent = tempfile::tempdir().unwrap();
        let locked = StateDirectory::at(&parent.path().join("state")).lock().unwrap();
        let path = locked.directory().path().to_owned();
        let ours = queue_name(Lsn(0x16_03B3_74D8));
        let theirs = ["queue.bak", "queue-backup", "queue-1-2-copy", "queue-16-03B374D8", "queues"];
        for name in theirs.iter().copied().chain(["queue", ours.as_str(), "queue-0-1"]) {
            std::fs::create_dir(path.join(name)).unwrap();
        }
        locked.discard_queues(Some(&ours)).unwrap();
        assert!(path.join(&ours).exists() && !path.join("queue").exists() && !path.join("queue-0-1").exists());
        assert!(theirs.iter().all(|name| path.join(name).exists()));
    }
}
