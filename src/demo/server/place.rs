//! Where a server's files lie, and whom its programs run as.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::error::{Context, Error, ErrorKind, Result};

/// A Unix socket's path holds 107 bytes at most; the rest is left for `/.s.PGSQL.65535.lock`.
const DIRECTORY_BYTES_MAX: usize = 80;

/// A directory that goes with its value.
#[derive(Debug)]
pub(crate) struct TemporaryDirectory {
    pub(crate) path: PathBuf,
}

impl TemporaryDirectory {
    /// Makes `walferry-<name>-<pid>-<number>` with mode 0700 for a user, where that user can get at it.
    pub(crate) fn create(name: &str, user: ServerUser) -> Result<TemporaryDirectory> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let base = base_directory(user);
        let plain: String = name.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = base.join(format!("walferry-{plain}-{}-{number}", std::process::id()));
            let doing = || format!("making the directory {}", path.display());
            // An existing one is never taken over: it could be somebody else's, or a dead process's with our id.
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error).context(doing),
            }
            let directory = TemporaryDirectory { path: path.clone() };
            if let ServerUser::Other { uid, gid } = user {
                chown(&path, Some(uid), Some(gid)).context(doing)?;
            }
            return Ok(directory);
        }
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure; a server's last process may still be closing a file, so try twice.
        if fs::remove_dir_all(&self.path).is_err() {
            std::thread::sleep(Duration::from_millis(100));
            drop(fs::remove_dir_all(&self.path));
        }
    }
}

/// Whom the server's programs run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerUser {
    /// Whoever we are.
    Ourselves,
    /// Somebody else, because we are root.
    Other {
        /// The user's number.
        uid: u32,
        /// The number of the user's group.
        gid: u32,
    },
}

impl ServerUser {
    pub(super) fn for_this_process() -> Result<ServerUser> {
        if !rustix::process::geteuid().is_root() {
            return Ok(ServerUser::Ourselves);
        }
        for name in ["postgres", "nobody"] {
            if let (Some(uid), Some(gid)) = (id_of(name, "-u"), id_of(name, "-g")) {
                return Ok(ServerUser::Other { uid, gid });
            }
        }
        Err(Error::new(ErrorKind::Blocked, "PostgreSQL refuses to run as root, and there is no user \"postgres\"")
            .hint("run this as another user, or add the user postgres"))
    }

    /// Makes a command run as this user, at a place it can enter, out of reach of the terminal's Ctrl-C: whoever owns
    /// the server decides when it ends.
    pub(super) fn prepare(self, command: &mut Command, directory: &Path) {
        command.current_dir(directory).stdin(Stdio::null()).process_group(0);
        command.env("LC_ALL", "C").env("TZ", "UTC").env_remove("PGDATA").env_remove("PGPORT");
        if let ServerUser::Other { uid, gid } = self {
            // As root, the standard library also drops the supplementary groups.
            command.uid(uid).gid(gid);
        }
    }
}

/// `id -u name`: asks whatever directory service the system has.
fn id_of(name: &str, option: &str) -> Option<u32> {
    let output = Command::new("id").args([option, name]).stderr(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

/// The temporary directory, unless the server's user cannot enter it or its path is too long for a socket.
pub(super) fn base_directory(user: ServerUser) -> PathBuf {
    let base = std::env::temp_dir();
    let enterable = |path: &Path| fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o001 != 0);
    let reachable = user == ServerUser::Ourselves || base.ancestors().all(enterable);
    // "/walferry-" + 16 + "-" + pid + "-" + number stays under 45 bytes.
    if reachable && base.as_os_str().len() + 45 <= DIRECTORY_BYTES_MAX { base } else { PathBuf::from("/tmp") }
}
