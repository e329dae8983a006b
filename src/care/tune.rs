//! What an operator may change while a migration runs (`walferry tune`): how many jobs copy, how fast, and for which lag of the
//! source's standbys they rest.
//!
//! It is kept over restarts of the same directory, as a pause is. The later word counts: an option that is given at a start wins
//! over what was tuned before, and takes its place.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::pace::Pace;
use super::{MAX_STANDBY_LAG, Options};
use crate::crashsafe;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::format::{duration, size_rate};
use crate::observe::status::Level;
use crate::state_directory::StateDirectory;

/// Parts copied at once, unless it is said.
pub const COPY_JOBS: usize = 4;

/// A limit that was asked for, or that there shall be none (`off`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit<T> {
    /// None.
    Off,
    /// At most so much.
    Max(T),
}

impl<T> Limit<T> {
    /// The limit, where there is one.
    pub fn max(self) -> Option<T> {
        match self {
            Limit::Off => None,
            Limit::Max(max) => Some(max),
        }
    }
}

/// What is to be changed; the rest stays as it is. Also what is kept over a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Parts copied at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_jobs: Option<usize>,
    /// Bytes a second, over all jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_rate: Option<Limit<u64>>,
    /// How far a standby of the source may be behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_standby_lag: Option<Limit<Duration>>,
}

impl Change {
    /// With what another one has in the place of this one's.
    fn with(self, newer: Change) -> Change {
        Change {
            copy_jobs: newer.copy_jobs.or(self.copy_jobs),
            copy_rate: newer.copy_rate.or(self.copy_rate),
            max_standby_lag: newer.max_standby_lag.or(self.max_standby_lag),
        }
    }

    /// Without what another one has.
    fn without(self, other: Change) -> Change {
        Change {
            copy_jobs: self.copy_jobs.filter(|_| other.copy_jobs.is_none()),
            copy_rate: self.copy_rate.filter(|_| other.copy_rate.is_none()),
            max_standby_lag: self.max_standby_lag.filter(|_| other.max_standby_lag.is_none()),
        }
    }
}

/// How it is now.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuned {
    /// Parts copied at once.
    pub copy_jobs: usize,
    /// More than these do not fit below the most connections that there may be; `None` without such a limit.
    pub copy_jobs_max: Option<usize>,
    /// Bytes a second, over all jobs; `None` for as fast as it goes.
    pub copy_rate_bytes_per_second: Option<u64>,
    /// How far a standby of the source may be behind; `None` for as far as it likes.
    pub max_standby_lag_seconds: Option<f64>,
}

/// Steers it, and tells everybody. Clones are one.
#[derive(Clone)]
pub struct Tune {
    shared: Arc<Shared>,
}

struct Shared {
    directory: StateDirectory,
    board: StatusBoard,
    pace: Pace,
    copy_jobs: watch::Sender<usize>,
    max_standby_lag: watch::Sender<Option<Duration>>,
    copy_jobs_max: Option<usize>,
    /// What was tuned, as it is written down.
    kept: Mutex<Change>,
}

impl Tune {
    /// By the options of this start; then by what was tuned when the last process ended; then by default. Whatever it is, there are
    /// at most `copy_jobs_max` jobs.
    ///
    /// # Errors
    /// When what an option has taken the place of cannot be written down.
    pub fn restore(
        directory: &StateDirectory,
        board: &StatusBoard,
        options: &Options,
        copy_jobs_max: Option<usize>,
    ) -> Result<Tune> {
        let written = std::fs::read(directory.tuned()).ok().and_then(|json| serde_json::from_slice(&json).ok());
        let written: Change = written.unwrap_or_default();
        let given = Change {
            copy_jobs: options.copy_jobs,
            copy_rate: options.copy_rate,
            max_standby_lag: options.max_standby_lag,
        };
        let kept = written.without(given);
        let tune = Tune {
            shared: Arc::new(Shared {
                directory: directory.clone(),
                board: board.clone(),
                pace: Pace::new(),
                copy_jobs: watch::Sender::new(COPY_JOBS.min(copy_jobs_max.unwrap_or(usize::MAX))),
                max_standby_lag: watch::Sender::new(Some(MAX_STANDBY_LAG)),
                copy_jobs_max,
                kept: Mutex::new(kept),
            }),
        };
        if kept != written {
            tune.keep(&kept)?;
        }
        tune.act(kept.with(given));
        Ok(tune)
    }

    /// Changes it; durably.
    ///
    /// # Errors
    /// When it cannot be written down; nothing is changed then.
    pub fn change(&self, change: Change) -> Result<Tuned> {
        if change == Change::default() {
            return Ok(self.now());
        }
        {
            // To the end: of two changes at once, none may undo the other.
            let mut kept = self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let newer = kept.with(change);
            self.keep(&newer)?;
            *kept = newer;
            self.act(change);
        }
        let now = self.now();
        let rate =
            now.copy_rate_bytes_per_second.map_or("as fast as it goes".to_owned(), |rate| size_rate(rate as f64));
        let lag =
            now.max_standby_lag_seconds.map_or("of no matter".to_owned(), |lag| format!("up to {}", duration(lag)));
        let text = format!("tuned: {} copy jobs, {rate}, lag of the source's standbys {lag}", now.copy_jobs);
        self.shared.board.event(Level::Info, text);
        Ok(now)
    }

    /// How it is now.
    pub fn now(&self) -> Tuned {
        Tuned {
            copy_jobs: *self.shared.copy_jobs.borrow(),
            copy_jobs_max: self.shared.copy_jobs_max,
            copy_rate_bytes_per_second: self.shared.pace.rate(),
            max_standby_lag_seconds: self.shared.max_standby_lag.borrow().map(|lag| lag.as_secs_f64()),
        }
    }

    /// Where the copy waits for its turn.
    pub fn pace(&self) -> &Pace {
        &self.shared.pace
    }

    /// How many jobs are to copy, and to hear of another number.
    pub fn copy_jobs(&self) -> watch::Receiver<usize> {
        self.shared.copy_jobs.subscribe()
    }

    /// How far a standby may be behind, and to hear of another limit.
    pub fn max_standby_lag(&self) -> watch::Receiver<Option<Duration>> {
        self.shared.max_standby_lag.subscribe()
    }

    fn keep(&self, kept: &Change) -> Result<()> {
        let json = serde_json::to_vec(kept).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        crashsafe::replace(&self.shared.directory.tuned(), &json)
    }

    fn act(&self, change: Change) {
        if let Some(jobs) = change.copy_jobs {
            self.shared.copy_jobs.send_replace(jobs.min(self.shared.copy_jobs_max.unwrap_or(usize::MAX)).max(1));
        }
        if let Some(rate) = change.copy_rate {
            self.shared.pace.set_rate(rate.max());
        }
        if let Some(lag) = change.max_standby_lag {
            self.shared.max_standby_lag.send_replace(lag.max());
        }
        self.shared.board.set_copy_limits(*self.shared.copy_jobs.borrow(), self.shared.pace.rate());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restored(directory: &StateDirectory, options: &Options) -> Tuned {
        Tune::restore(directory, &StatusBoard::new(), options, None).unwrap().now()
    }

    #[test]
    fn what_was_tuned_stays_so_over_a_restart_until_an_option_says_otherwise() {
        let path = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(path.path());
        let board = StatusBoard::new();
        let none = Options::default();
        let tune = Tune::restore(&directory, &board, &none, None).unwrap();
        assert_eq!(
            tune.now(),
            Tuned {
                copy_jobs: COPY_JOBS,
                copy_jobs_max: None,
                copy_rate_bytes_per_second: None,
                max_standby_lag_seconds: Some(30.0)
            }
        );
        tune.change(Change { copy_jobs: Some(7), copy_rate: Some(Limit::Max(1000)), ..Change::default() }).unwrap();
        let tuned = tune.change(Change { max_standby_lag: Some(Limit::Off), ..Change::default() }).unwrap();
        assert_eq!((tuned.copy_jobs, tuned.copy_rate_bytes_per_second), (7, Some(1000)), "what is not named stays");
        let copy = board.snapshot().copy;
        assert_eq!((copy.jobs_max, copy.rate_max_bytes_per_second), (7, Some(1000)));

        assert_eq!(restored(&directory, &none), tuned);
        let given = Options { copy_rate: Some(Limit::Off), ..none };
        let won = Tuned { copy_rate_bytes_per_second: None, ..tuned };
        assert_eq!(restored(&directory, &given), won, "the option wins over what was tuned, and nothing else changes");
        assert_eq!(restored(&directory, &none), won, "what it won over is forgotten");
        assert_eq!(restored(&directory, &Options { copy_jobs: Some(2), ..none }).copy_jobs, 2);
        assert_eq!(restored(&directory, &none).copy_jobs, COPY_JOBS);
    }

    #[test]
    fn no_more_jobs_than_the_connections_allow() {
        let path = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(path.path());
        let tune = Tune::restore(&directory, &StatusBoard::new(), &Options::default(), Some(3)).unwrap();
        assert_eq!(tune.now().copy_jobs, 3);
        let tuned = tune.change(Change { copy_jobs: Some(100), ..Change::default() }).unwrap();
        assert_eq!((tuned.copy_jobs, tuned.copy_jobs_max), (3, Some(3)));
        assert_eq!(*tune.copy_jobs().borrow(), 3);
    }

    #[test]
    fn what_cannot_be_written_down_is_not_done() {
        let path = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(&path.path().join("gone"));
        let tune = Tune::restore(&directory, &StatusBoard::new(), &Options::default(), None).unwrap();
        tune.change(Change { copy_jobs: Some(9), ..Change::default() }).unwrap_err();
        assert_eq!(tune.now().copy_jobs, COPY_JOBS);
    }
}
