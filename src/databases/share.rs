//! What several migrations may take together, divided among them: one option is for all of them.

use crate::care::connections::{Caps, Jobs};
use crate::care::tune::{COPY_JOBS, Limit};
use crate::error::{Error, ErrorKind, Result};
use crate::migrate::Config;
use crate::queue;
use crate::state_directory::StateDirectory;

/// The share of one of so many migrations.
///
/// # Errors
/// `Usage` when so many do not fit below the most connections that there may be.
pub fn of_one(config: &Config, migrations: usize, directory: &StateDirectory) -> Result<Config> {
    let mut one = config.clone();
    one.directory = directory.path().to_owned();
    let jobs = jobs(config, migrations);
    // What was tuned before stays, as it does for a migration by itself.
    let tuned = config.care.copy_jobs.is_none() && directory.tuned().exists();
    one.care.copy_jobs = (!tuned).then_some(jobs.copy);
    (one.index.jobs, one.apply_workers) = (jobs.index, jobs.apply);
    one.care.caps = caps(config, migrations)?;
    one.care.copy_rate = config.care.copy_rate.map(|rate| match rate {
        Limit::Max(bytes) => Limit::Max((bytes / migrations as u64).max(1)),
        Limit::Off => Limit::Off,
    });
    one.index.memory_bytes = config.index.memory_bytes.map(|bytes| bytes / migrations as u64);
    one.queue.max_bytes = (config.queue.max_bytes / migrations as u64).max(queue::Options::MAX_BYTES_LEAST);
    // All are served at one address.
    one.http_address = None;
    Ok(one)
}

/// What each does at once: its share, and one at least.
pub fn jobs(config: &Config, migrations: usize) -> Jobs {
    let share = |all: usize| (all / migrations.max(1)).max(1);
    Jobs {
        copy: share(config.care.copy_jobs.unwrap_or(COPY_JOBS)),
        index: share(config.index.jobs),
        apply: share(config.apply_workers),
    }
}

/// The connections that each may open.
///
/// # Errors
/// As [`of_one`].
pub fn caps(config: &Config, migrations: usize) -> Result<Caps> {
    let least = Jobs { copy: 1, index: 1, apply: 1 };
    let all = config.care.caps;
    for (side, cap, needed) in
        [("source", all.source, least.source_connections()), ("target", all.target, least.target_connections())]
    {
        if let Some(cap) = cap.filter(|cap| *cap < needed * migrations) {
            let text = format!(
                "--max-{side}-connections {cap} is too few: {migrations} databases need {} at least, {needed} each",
                needed * migrations
            );
            return Err(Error::new(ErrorKind::Usage, text).hint(
                "Give more, or move fewer databases at a time: --include-database, each part with a --dir of its own.",
            ));
        }
    }
    let share = |cap: Option<usize>| cap.map(|cap| cap / migrations.max(1));
    Ok(Caps { source: share(all.source), target: share(all.target) })
}
