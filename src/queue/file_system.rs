//! The little that the queue needs of a file system, so that tests can put one in its place that crashes, tears writes,
//! fails an fsync, runs full and flips bits.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// A directory of segments.
pub(super) trait FileSystem: Send + Sync + 'static {
    /// Makes the directory if it is not there, durably, for this user alone: the queue holds rows.
    fn prepare(&self, directory: &Path) -> io::Result<()>;
    /// The names in a directory, in any order.
    fn list(&self, directory: &Path) -> io::Result<Vec<String>>;
    /// Makes a new file, for this user alone; fails where one is already.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// Opens an existing file to read and write.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// Removes a name; those who have the file open still read it.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes created and removed names durable.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
}

/// A segment's file. Written by one thread, read by others at the same time.
// No `is_empty`: an empty segment is nothing that the queue asks for.
#[allow(clippy::len_without_is_empty)]
pub(super) trait File: Send + Sync {
    /// Bytes that the file has now.
    fn len(&self) -> io::Result<u64>;
    /// When it was last written, for `--queue-keep` across restarts.
    fn modified(&self) -> io::Result<SystemTime>;
    /// Fills the buffer from an offset; `UnexpectedEof` where the file ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all bytes at an offset. After an error any first part of them may be there.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts the file.
    fn truncate(&self, length: u64) -> io::Result<()>;
    /// Makes the file's bytes and its length durable. After an error nothing written since the last success may be
    /// trusted, whatever a second call says: the kernel may have given up the pages and called them clean (H17).
    fn sync_data(&self) -> io::Result<()>;
    /// Asks that the next read comes from the disk, not from a cache that may hold what a failed write never brought
    /// there. As far as the system can: no error is no promise.
    fn evict(&self) -> io::Result<()>;
}

/// The operating system's.
pub(super) struct RealFileSystem;

impl FileSystem for RealFileSystem {
    fn prepare(&self, directory: &Path) -> io::Result<()> {
        if directory.is_dir() {
            return Ok(());
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        match directory.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.sync_directory(parent),
            _ => self.sync_directory(Path::new(".")),
        }
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            // A name that is not UTF-8 is not one of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Arc::new(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(fs::OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }
}

impl File for fs::File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn modified(&self) -> io::Result<SystemTime> {
        self.metadata()?.modified()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        fs::File::sync_data(self)
    }

    fn evict(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(self, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }
}

/// Whether a write failed for want of room, and can succeed once there is some.
pub(super) fn is_no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
