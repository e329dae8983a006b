//! How much WAL our slot makes the source keep, and when that is too much (`--source-wal-max`).
//!
//! A slot keeps WAL while nobody reads from it, while the queue is full, and from the beginning of the oldest transaction that is
//! still open on the source. The last two pass by themselves; a source whose disk is full does not. So it is only by explicit
//! choice that the slot is given up for it, and `GivenUp` tells every later start so until a `resync` has made a new one.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::crashsafe;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::format::size;
use crate::source::slot;
use crate::state_directory::StateDirectory;
use crate::target::ledger::Migration;

/// What happens when our slot makes the source keep more WAL than `--source-wal-max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnSourceWalMax {
    /// It is said, and again each time that it is a quarter more
    #[default]
    Warn,
    /// The slot is dropped to save the source, and the migration ends; `walferry resync` goes on from there
    GiveUp,
}

/// What to do about what the slot keeps.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing new.
    Nothing,
    /// To be said: it is too much, or a good deal more than it was.
    TooMuch,
    /// To be said: it is no longer too much.
    FineAgain,
}

/// How long a slot that keeps too much when we come has to become less: what was not read while no process ran is read first of
/// all, and the source forgets it with its next checkpoint or so.
const CATCH_UP_MAX: Duration = Duration::from_secs(60);

/// Remembers what was seen and said.
#[derive(Debug)]
pub(crate) struct Watch {
    begun: Instant,
    /// It has not been too much all the time.
    was_fine: bool,
    /// How much it was when that was said last; zero while it is not too much.
    said_bytes: u64,
}

impl Watch {
    /// Begins to watch a slot.
    pub(crate) fn new(now: Instant) -> Watch {
        Watch { begun: now, was_fine: false, said_bytes: 0 }
    }

    /// Whether the slot is to be given up, where that was said, for what it keeps now, in bytes.
    pub(crate) fn gives_up(&mut self, retained: u64, max: u64, now: Instant) -> bool {
        self.was_fine |= retained <= max;
        retained > max && (self.was_fine || now.duration_since(self.begun) >= CATCH_UP_MAX)
    }

    /// Judges what the slot keeps now, in bytes.
    pub(crate) fn judge(&mut self, retained: u64, max: u64) -> Verdict {
        if retained <= max {
            let was_too_much = std::mem::take(&mut self.said_bytes) > 0;
            return if was_too_much { Verdict::FineAgain } else { Verdict::Nothing };
        }
        if self.said_bytes > 0 && retained < self.said_bytes.saturating_add(self.said_bytes / 4) {
            return Verdict::Nothing;
        }
        self.said_bytes = retained;
        Verdict::TooMuch
    }
}

/// That the slot was given up, and which: written down before it is dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GivenUp {
    /// The slot's name.
    pub(crate) slot: String,
    /// The queue that belongs to it, as the ledger names it: a slot that was made later under the same name has another.
    pub(crate) queue: String,
    /// How much WAL it kept.
    pub(crate) retained_bytes: u64,
    /// How much it might have kept.
    pub(crate) max_bytes: u64,
}

impl GivenUp {
    /// What was written down of the slot that a migration has now, if anything was.
    ///
    /// # Errors
    /// When there is something that cannot be read.
    pub(crate) fn of(directory: &StateDirectory, migration: &Migration) -> Result<Option<GivenUp>> {
        let path = directory.given_up();
        let json = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            json => json.context(|| format!("reading {}", path.display()))?,
        };
        let given_up: GivenUp = serde_json::from_slice(&json)
            .map_err(|error| Error::new(ErrorKind::Other, format!("{}: {error}", path.display())))?;
        // A `resync` has made another since, and may have died before it could forget this.
        let is_of_now = (&given_up.slot, &given_up.queue) == (&migration.slot, &migration.queue);
        Ok(Some(given_up).filter(|_| is_of_now))
    }

    /// Writes it down, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, directory: &StateDirectory) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        crashsafe::replace(&directory.given_up(), &json)
    }

    /// Forgets it.
    pub(crate) fn forget(directory: &StateDirectory) {
        // One that stays names another queue, and says nothing of the slot that is there now.
        let _ = std::fs::remove_file(directory.given_up());
    }

    /// What the migration ends with, now and whenever it is started again.
    pub(crate) fn error(&self) -> Error {
        let text = format!(
            "the slot {} was given up to save the source: it kept {} of WAL, and --source-wal-max was {}",
            self.slot,
            size(self.retained_bytes),
            size(self.max_bytes)
        );
        Error::new(ErrorKind::Blocked, text).hint(format!("When the source has room again: {}", slot::RESYNC))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::ledger::Phase;

    #[test]
    fn too_much_is_said_once_and_again_when_it_is_a_quarter_more() {
        let mut watch = Watch::new(Instant::now());
        let said: Vec<u64> = [50, 100, 101, 110, 125, 126, 127, 150, 158, 159, 300]
            .into_iter()
            .filter(|&bytes| watch.judge(bytes, 100) == Verdict::TooMuch)
            .collect();
        assert_eq!(said, [101, 126, 158, 300]);
        assert_eq!(watch.judge(100, 100), Verdict::FineAgain);
        assert_eq!(watch.judge(100, 100), Verdict::Nothing);
        assert_eq!(watch.judge(101, 100), Verdict::TooMuch);
    }

    #[test]
    fn h28_a_slot_is_given_up_as_soon_as_it_keeps_too_much_but_may_catch_up_at_the_start() {
        let begun = Instant::now();
        let mut watch = Watch::new(begun);
        let after = |seconds| begun + Duration::from_secs(seconds);
        assert!(!watch.gives_up(500, 100, after(0)), "it is being read");
        assert!(!watch.gives_up(400, 100, after(59)));
        assert!(watch.gives_up(400, 100, after(60)));
        let mut watch = Watch::new(begun);
        assert!(!watch.gives_up(500, 100, after(0)));
        assert!(!watch.gives_up(100, 100, after(5)));
        assert!(watch.gives_up(101, 100, after(6)));
    }

    #[test]
    fn a_slot_that_was_given_up_is_remembered_until_there_is_another() {
        let path = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(path.path());
        let mut migration = migration();
        assert_eq!(GivenUp::of(&directory, &migration).unwrap(), None);
        let given_up = GivenUp {
            slot: migration.slot.clone(),
            queue: migration.queue.clone(),
            retained_bytes: 3 << 30,
            max_bytes: 1 << 30,
        };
        given_up.write(&directory).unwrap();
        assert_eq!(GivenUp::of(&directory, &migration).unwrap(), Some(given_up.clone()));
        let error = given_up.error();
        assert_eq!(error.kind(), ErrorKind::Blocked);
        assert!(error.next_step().unwrap().contains("walferry resync"));
        migration.queue = "queue-0-123".into();
        assert_eq!(GivenUp::of(&directory, &migration).unwrap(), None, "a resync has made another slot");
        migration.queue = given_up.queue;
        GivenUp::forget(&directory);
        assert_eq!(GivenUp::of(&directory, &migration).unwrap(), None);
    }

    fn migration() -> Migration {
        Migration {
            id: "1".into(),
            source_system: "1".into(),
            source_timeline: 1,
            source_database: "shop".into(),
            slot: "walferry_1".into(),
            publication: "walferry_1".into(),
            insert_only_publication: "walferry_1_inserts".into(),
            binary: false,
            apply_workers: 1,
            phase: Phase::Copying,
            consistent_point: None,
            pre_data_restored: false,
            post_data_restored: false,
            snapshot_floor: 0,
            queue: "queue".into(),
            way_back: None,
            apply_role: Default::default(),
            scope: Default::default(),
        }
    }
}
