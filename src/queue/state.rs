//! What the appender, the writer's thread, the readers and `trim` share, behind one lock that is never held over a
//! call to the disk.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::{Notify, watch};

use super::file_system::FileSystem;
use super::segment::{Place, Segment, disk_error, remove_segment};
use super::{Options, Progress};
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;

pub(super) struct Shared {
    pub directory: PathBuf,
    pub file_system: Arc<dyn FileSystem>,
    pub options: Options,
    pub progress: watch::Sender<Progress>,
    /// Wakes the appender's task: there may be room, or the writer has failed. One task waits at most, and a wake-up
    /// that comes before it waits is kept.
    pub room: Notify,
    /// Wakes readers: there is more to read, or what they read was taken back.
    pub more: Condvar,
    /// Wakes a writer that waits for room on the disk: something was removed, or it shall give up.
    pub writer: Condvar,
    state: Mutex<State>,
    /// Held by whoever removes segments at the front, so that they go one after the other.
    trimming: Mutex<()>,
}

/// Guarded by the lock.
pub(super) struct State {
    /// Front: the oldest. Back: the one being written. Never empty, without holes.
    pub segments: VecDeque<Segment>,
    /// See [`super::Queue::start`].
    pub start: Lsn,
    pub written_end: Lsn,
    /// The place behind the boundary `written_end`: readers go up to here.
    pub written: Place,
    pub durable_end: Lsn,
    /// The place behind the boundary `durable_end`: what a failure can be rolled back to.
    pub durable: Place,
    /// The highest position given to `trim`.
    pub applied: Lsn,
    /// Bytes of all segments.
    pub bytes: u64,
    /// Bytes handed to the writer's thread that it has not dealt with.
    pub in_flight_bytes: u64,
    /// The disk has refused a write for want of room and has not taken one since.
    pub disk_full: bool,
    /// Why the writer drops everything until a rewind.
    pub failure: Option<(ErrorKind, String)>,
    /// A rewind is under way: a writer that waits for room gives up waiting.
    pub rewinding: bool,
    /// The appender is gone: as above.
    pub closing: bool,
    /// How often a failure has taken back what readers could see, and to where the last time.
    pub generation: u64,
    pub taken_back_to: Place,
}

impl Shared {
    pub fn new(
        directory: PathBuf,
        file_system: Arc<dyn FileSystem>,
        options: Options,
        segments: VecDeque<Segment>,
        start: Lsn,
        end: Lsn,
        end_place: Place,
    ) -> Arc<Shared> {
        let state = State {
            bytes: segments.iter().map(|segment| segment.bytes).sum(),
            segments,
            start,
            written_end: end,
            written: end_place,
            durable_end: end,
            durable: end_place,
            applied: start,
            in_flight_bytes: 0,
            disk_full: false,
            failure: None,
            rewinding: false,
            closing: false,
            generation: 0,
            taken_back_to: end_place,
        };
        let progress = watch::Sender::new(state.progress(&options));
        Arc::new(Shared {
            directory,
            file_system,
            options,
            progress,
            room: Notify::new(),
            more: Condvar::new(),
            writer: Condvar::new(),
            state: Mutex::new(state),
            trimming: Mutex::new(()),
        })
    }

    /// The lock. What it guards is whole after every statement that changes it, so a panic elsewhere does no harm.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody what has changed. Called with the lock held, so that progress is seen in order.
    pub fn publish(&self, state: &State) {
        let progress = state.progress(&self.options);
        self.progress.send_if_modified(|old| {
            let changed = *old != progress;
            *old = progress;
            changed
        });
        self.more.notify_all();
        self.writer.notify_all();
        self.room.notify_one();
    }

    /// Removes the segments at the front that nobody needs, see [`super::Queue::trim`]; `applied` may be older than
    /// what was said before.
    pub fn trim(&self, applied: Lsn) -> Result<()> {
        let _one_at_a_time = self.trimming.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut state = self.lock();
            if applied > state.applied {
                state.applied = applied;
                self.publish(&state);
            }
        }
        loop {
            let sequence = {
                let mut state = self.lock();
                let Some((sequence, release)) = state.expendable(&self.options) else { return Ok(()) };
                // The start moves before the file goes: no reader may begin in what is being removed.
                state.start = state.start.max(release);
                sequence
            };
            remove_segment(&*self.file_system, &self.directory, sequence)
                .map_err(|error| disk_error(error, format!("removing the queue's applied segment {sequence}")))?;
            let mut state = self.lock();
            // Only this function takes from the front, one call at a time: it is the segment chosen above.
            if let Some(segment) = state.segments.pop_front() {
                state.bytes -= segment.bytes;
            }
            self.publish(&state);
        }
    }
}

impl State {
    pub fn progress(&self, options: &Options) -> Progress {
        Progress {
            start: self.start,
            written_end: self.written_end,
            durable_end: self.durable_end,
            bytes_on_disk: self.bytes,
            full: self.is_full(options),
        }
    }

    /// Whether the quota is used up, or the disk is.
    pub fn is_full(&self, options: &Options) -> bool {
        self.disk_full || self.bytes >= options.max_bytes
    }

    /// Whether the queue holds nothing that a reader and a trim could make room from: all that is complete is applied.
    pub fn all_is_applied(&self) -> bool {
        self.applied >= self.written_end
    }

    /// The segment at the front, with its release, if it may go: it is applied and durable, the places to which a
    /// failure rolls back lie behind it, and it is old enough or the room is needed.
    fn expendable(&self, options: &Options) -> Option<(u64, Lsn)> {
        let front = self.segments.front()?;
        let release = front.release?;
        if front.sequence >= self.durable.sequence || release > self.applied.min(self.durable_end) {
            return None;
        }
        // A clock that was set back makes a segment young: it stays longer.
        let age = SystemTime::now().duration_since(front.last_write).unwrap_or_default();
        if age < options.keep {
            if !self.is_full(options) {
                return None;
            }
            tracing::warn!(
                segment = front.sequence,
                up_to = %release,
                "the queue is full: an applied segment goes before its --queue-keep has passed"
            );
        }
        Some((front.sequence, release))
    }

    /// Whether a segment holds nothing past the queue's start, so that it may be on its way out.
    pub fn is_done_with(&self, segment: &Segment) -> bool {
        segment.release.is_some_and(|release| release <= self.start)
    }

    /// What is known of a segment; `None` where it is gone.
    pub fn segment(&self, sequence: u64) -> Option<&Segment> {
        let first = self.segments.front()?.sequence;
        self.segments.get(usize::try_from(sequence.checked_sub(first)?).ok()?)
    }

    /// The failure as an error, if the writer has failed.
    pub fn failed(&self) -> Option<Error> {
        let (kind, text) = self.failure.as_ref()?;
        Some(
            Error::new(*kind, text.clone())
                .hint("nothing acknowledged is lost; look at the disk that holds the state directory"),
        )
    }
}
