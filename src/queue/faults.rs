//! A file system in memory that does to the queue what machines do: it dies at any call, loses what was not synced in
//! any combination, tears writes, fails an fsync and then pretends, runs full, and flips bits.

// For tests and for the fuzz target, which needs the disk and not the faults.
#![cfg_attr(not(test), allow(dead_code))]
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use super::file_system::{File, FileSystem};

/// A machine's disk with the cache before it.
#[derive(Clone)]
pub(super) struct FaultyFileSystem(Arc<Mutex<Disk>>);

struct Disk {
    /// What processes see, and what a crash cannot take away.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    inodes: Vec<Inode>,
    random: u64,
    /// Calls until the machine dies.
    calls_left: Option<u64>,
    dead: bool,
    /// Bytes that fit.
    capacity: Option<u64>,
    /// How many of the next fsyncs of files fail.
    failing_syncs: u32,
}

struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Up to here the two are the same.
    stable: usize,
    /// What a failed fsync left in the cache, clean, and never on the disk.
    lost: Option<Range<usize>>,
    modified: SystemTime,
}

struct Handle {
    disk: FaultyFileSystem,
    inode: usize,
}

impl FaultyFileSystem {
    pub fn new(seed: u64) -> FaultyFileSystem {
        FaultyFileSystem(Arc::new(Mutex::new(Disk {
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            inodes: Vec::new(),
            random: seed | 1,
            calls_left: None,
            dead: false,
            capacity: None,
            failing_syncs: 0,
        })))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// The machine dies at a later call; every call from then on fails.
    pub fn die_after(&self, calls: u64) {
        self.disk().calls_left = Some(calls);
    }

    pub fn die(&self) {
        self.disk().dead = true;
    }

    pub fn is_dead(&self) -> bool {
        self.disk().dead
    }

    pub fn fail_syncs(&self, count: u32) {
        self.disk().failing_syncs = count;
    }

    /// Leaves room for so many more bytes, or for all.
    pub fn limit(&self, more: Option<u64>) {
        let mut disk = self.disk();
        disk.capacity = more.map(|more| disk.used() + more);
    }

    pub fn is_limited(&self) -> bool {
        self.disk().capacity.is_some()
    }

    /// Somebody else's file is gone.
    pub fn widen(&self, bytes: u64) {
        let mut disk = self.disk();
        disk.capacity = disk.capacity.map(|capacity| capacity + bytes);
    }

    /// The process died and the machine did not: the cache is as it was.
    pub fn restart_process(&self) {
        let mut disk = self.disk();
        disk.heal();
    }

    /// The machine died: of what was not synced any part is gone.
    pub fn crash(&self) {
        let mut disk = self.disk();
        disk.heal();
        let all: BTreeSet<PathBuf> = disk.names.keys().chain(disk.durable_names.keys()).cloned().collect();
        let mut names = BTreeMap::new();
        for name in all {
            let either = if disk.below(2) == 0 { &disk.names } else { &disk.durable_names };
            if let Some(inode) = either.get(&name) {
                names.insert(name, *inode);
            }
        }
        for inode in names.values() {
            disk.crash_inode(*inode);
        }
        disk.names = names.clone();
        disk.durable_names = names;
    }

    pub fn names(&self) -> Vec<PathBuf> {
        self.disk().names.keys().cloned().collect()
    }

    pub fn content(&self, path: &Path) -> Vec<u8> {
        let disk = self.disk();
        disk.inodes[disk.names[path]].live.clone()
    }

    /// Puts other bytes into a file, on the disk as in the cache.
    pub fn set_content(&self, path: &Path, content: Vec<u8>) {
        let mut disk = self.disk();
        let inode = disk.names[path];
        let modified = SystemTime::now();
        disk.inodes[inode] =
            Inode { stable: content.len(), durable: content.clone(), live: content, lost: None, modified };
    }

    pub fn delete(&self, path: &Path) {
        let mut disk = self.disk();
        disk.names.remove(path);
        disk.durable_names.remove(path);
    }
}

impl Disk {
    fn heal(&mut self) {
        self.dead = false;
        self.calls_left = None;
        self.failing_syncs = 0;
        self.capacity = None;
    }

    fn used(&self) -> u64 {
        self.names.values().map(|inode| self.inodes[*inode].live.len() as u64).sum()
    }

    /// xorshift64: the same faults for the same seed.
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    /// Counts a call; fails where the machine is dead or dies at it.
    fn call(&mut self) -> io::Result<()> {
        if self.calls_left == Some(0) {
            self.dead = true;
        }
        self.calls_left = self.calls_left.map(|left| left.saturating_sub(1));
        if self.dead { Err(io::Error::other("the machine is dead")) } else { Ok(()) }
    }

    fn crash_inode(&mut self, inode: usize) {
        let (stable, length) = (self.inodes[inode].stable, self.inodes[inode].live.len());
        let kept = stable + self.below((length - stable + 1) as u64) as usize;
        let hole_from = stable + self.below((kept - stable + 1) as u64) as usize;
        let hole_to = hole_from + self.below((kept - hole_from + 1) as u64) as usize;
        let (with_hole, with_old_tail) = (self.below(3) == 0, self.below(2) == 0);
        let inode = &mut self.inodes[inode];
        let mut content = inode.live[..kept].to_vec();
        if let Some(lost) = inode.lost.take() {
            let end = lost.end.min(kept);
            content[lost.start.min(end)..end].fill(0);
        }
        if with_hole {
            // Pages go to the disk in any order.
            content[hole_from..hole_to].fill(0);
        }
        if with_old_tail && kept < inode.durable.len() {
            // The cut was lost, and with it that what lies behind is old.
            content.extend_from_slice(&inode.durable[kept..]);
        }
        inode.stable = content.len();
        inode.durable = content.clone();
        inode.live = content;
    }
}

impl FileSystem for FaultyFileSystem {
    fn prepare(&self, _directory: &Path) -> io::Result<()> {
        self.disk().call()
    }

    fn list(&self, _directory: &Path) -> io::Result<Vec<String>> {
        let mut disk = self.disk();
        disk.call()?;
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        Ok(disk.names.keys().map(name).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut disk = self.disk();
        disk.call()?;
        if disk.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let again = disk.durable_names.contains_key(path);
        assert!(!again, "a name is used again before its removal is durable: {}", path.display());
        let inode = disk.inodes.len();
        let modified = SystemTime::now();
        disk.inodes.push(Inode { live: Vec::new(), durable: Vec::new(), stable: 0, lost: None, modified });
        disk.names.insert(path.to_owned(), inode);
        Ok(Arc::new(Handle { disk: self.clone(), inode }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut disk = self.disk();
        disk.call()?;
        let inode = *disk.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Handle { disk: self.clone(), inode }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.call()?;
        disk.names.remove(path).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_directory(&self, _directory: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.call()?;
        disk.durable_names = disk.names.clone();
        Ok(())
    }
}

impl File for Handle {
    fn len(&self) -> io::Result<u64> {
        let mut disk = self.disk.disk();
        disk.call()?;
        Ok(disk.inodes[self.inode].live.len() as u64)
    }

    fn modified(&self) -> io::Result<SystemTime> {
        Ok(self.disk.disk().inodes[self.inode].modified)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut disk = self.disk.disk();
        disk.call()?;
        let from = offset as usize;
        let live = &disk.inodes[self.inode].live;
        let bytes = live.get(from..from + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut disk = self.disk.disk();
        let was_dead = disk.dead;
        let (result, written) = match disk.call() {
            Err(error) if was_dead => return Err(error),
            Err(error) => (Err(error), disk.below(bytes.len() as u64 + 1) as usize),
            Ok(()) => {
                let room = disk.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(disk.used()));
                if room < bytes.len() as u64 {
                    (Err(io::ErrorKind::StorageFull.into()), room as usize)
                } else {
                    (Ok(()), bytes.len())
                }
            }
        };
        let inode = &mut disk.inodes[self.inode];
        let from = offset as usize;
        assert!(from <= inode.live.len(), "a write leaves a hole");
        assert!(from + written >= inode.live.len(), "a write into the middle");
        inode.live.truncate(from);
        inode.live.extend_from_slice(&bytes[..written]);
        inode.stable = inode.stable.min(from);
        inode.modified = SystemTime::now();
        result
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        let mut disk = self.disk.disk();
        disk.call()?;
        let inode = &mut disk.inodes[self.inode];
        let length = length as usize;
        inode.live.truncate(length);
        inode.stable = inode.stable.min(inode.live.len());
        inode.lost = inode.lost.take().filter(|lost| lost.start < length);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.disk.disk();
        disk.call()?;
        let fails = disk.failing_syncs > 0;
        let inode = &mut disk.inodes[self.inode];
        if fails {
            // What was dirty is called clean from now on, and the disk never got it.
            let from = inode.lost.as_ref().map_or(inode.stable, |lost| lost.start.min(inode.stable));
            inode.lost = Some(from..inode.live.len());
            disk.failing_syncs -= 1;
            return Err(io::Error::other("the fsync failed"));
        }
        inode.durable = inode.live.clone();
        if let Some(lost) = &inode.lost {
            let end = lost.end.min(inode.durable.len());
            inode.durable[lost.start.min(end)..end].fill(0);
        }
        inode.stable = inode.live.len();
        Ok(())
    }

    fn evict(&self) -> io::Result<()> {
        let mut disk = self.disk.disk();
        disk.call()?;
        let inode = &mut disk.inodes[self.inode];
        if let Some(lost) = inode.lost.take() {
            let end = lost.end.min(inode.live.len());
            inode.live[lost.start.min(end)..end].fill(0);
        }
        Ok(())
    }
}
