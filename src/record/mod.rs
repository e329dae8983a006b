//! What operators asked for and what was done to the servers for it, with time and user: for the report, and for whoever asks later.
//!
//! ```text
//!   a session of ours ──► connection/stream.rs ──► wire.rs: each message, before it is sent ──► plan.rs: which kind is it?
//!                                                                                                   │ (rows and reads are none)
//!   a command ──► begun(), ended() ────────────────────────────────────────────────────────┐        ▼
//!   the status board ──► past.rs: events ──────────────────────────────────────────────────┴► record.jsonl ──► walferry.record
//!                                  points of the plots ──► history.jsonl                       (state directory)   (the ledger's copy)
//! ```
//!
//! **Written ahead**: a statement's line is in the file before its last byte is sent, so nothing that changed a server is missing,
//! whoever dies; it may name what was then refused. Lines that nothing else would know of are on disk (fsync) before; those of the
//! fence, which the ledger has in its own row already (`cutover/record.rs`), and of the schema's items are in the kernel's hands.
//!
//! **Bounded**: of each kind a process names the first `NAMED_MAX`; what comes after is counted, and that there is more of it
//! is said before it is sent. A file past `FILE_BYTES_MAX` loses its middle when the next process begins.
//!
//! The ledger's copy ([`ledger`]) needs no new format of the ledger: it is made when missing, and older versions ignore it.

pub mod command;
pub mod ledger;
pub mod past;
pub mod plan;
pub(crate) mod wire;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::cutover;
use crate::error::{Context, Result};
use crate::observe::status::Event;
use crate::observe::wall_clock;
use plan::Kind;

/// The file's name in the state directory.
pub const FILE: &str = "record.jsonl";
/// How many statements of a kind a process names.
const NAMED_MAX: u64 = 100;
/// How many events a process keeps.
const EVENTS_MAX: u64 = 2000;
/// A file of more bytes is shortened.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// How much of a statement is kept, in bytes.
const STATEMENT_BYTES_MAX: usize = 600;

/// The servers of a migration, whichever way it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Server {
    /// The one that is moved away from.
    Source,
    /// The one that is moved to.
    Target,
}

/// A line of the record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// No other line has it; a count that grows keeps it.
    pub id: String,
    /// When: RFC 3339, UTC, by the clock of the machine that walferry ran on.
    pub at: String,
    /// What it says.
    #[serde(flatten)]
    pub what: What,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum What {
    /// An operator has begun a command.
    Command {
        /// `cutover`.
        command: String,
        /// The rest of the command line, without secrets.
        arguments: Vec<String>,
        /// The operating system's user, and whom `sudo` names.
        user: String,
        /// The machine.
        host: String,
        /// The process.
        pid: u32,
    },
    /// A command has ended.
    Outcome {
        /// The command's line.
        of: String,
        /// The exit code.
        exit: u8,
        /// Why, where it failed.
        error: Option<String>,
    },
    /// A statement that changes a server is about to be sent.
    Statement {
        /// Where to.
        server: Server,
        /// [`Kind::name`].
        kind: String,
        /// Its text, without what may be a secret; cut where it is long.
        statement: String,
    },
    /// More statements of a kind than are named.
    More {
        /// Where to.
        server: Server,
        /// [`Kind::name`].
        kind: String,
        /// How many besides those that are named; at least, where a process was killed.
        count: u64,
    },
    /// Something happened.
    Event {
        /// What.
        event: Event,
    },
    /// A cutover or switchback went through.
    Switched {
        /// Which way: whether it was back to the old primary.
        back: bool,
        /// Its steps.
        outcome: cutover::Outcome,
    },
    /// A version, or whatever else is to be known when the servers are gone.
    Fact {
        /// Its name.
        name: String,
        /// What it is.
        value: String,
    },
    /// What a file that had grown too large has lost.
    Shortened {
        /// How many lines.
        lines: u64,
    },
}

/// Where it is written down. Clones are one.
#[derive(Clone)]
pub struct Recorder {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    /// Begins the ids of this process.
    process: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    file: Option<File>,
    /// Whether the state directory is known to be a migration's.
    open: bool,
    /// Lines that wait for that.
    waiting: Vec<u8>,
    entries: u64,
    /// How many statements of each kind there were, and how many of those were unnamed when that was written down.
    counts: HashMap<(Server, &'static str), (u64, u64)>,
    events: u64,
    /// The servers' versions, as far as they are written down.
    versions: HashMap<Server, String>,
    failed: bool,
}

/// A server's statements go to a record.
#[derive(Clone)]
pub struct Recorded {
    recorder: Recorder,
    server: Server,
}

impl Recorder {
    /// Into a state directory, which need not be there yet: nothing is written before [`Recorder::open`].
    pub fn at(directory: &Path) -> Recorder {
        let process = format!("{:x}-{:x}", wall_clock::now_milliseconds(), std::process::id());
        Recorder { shared: Arc::new(Shared { path: directory.join(FILE), process, state: Mutex::default() }) }
    }

    /// The state directory is a migration's, and may be written to.
    pub fn open(&self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.open = true;
        if !state.waiting.is_empty()
            && let Err(error) = self.append_line(&mut state, &[], true)
        {
            tracing::warn!(%error, "the record of what walferry does is not complete");
        }
    }

    /// For a server's sessions.
    pub fn of(&self, server: Server) -> Recorded {
        Recorded { recorder: self.clone(), server }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Writes a line down; answers its id.
    pub fn write(&self, what: What, durable: bool) -> String {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_locked(&mut state, what, durable)
    }

    /// Keeps an event.
    pub fn event(&self, event: &Event) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.events += 1;
        if state.events <= EVENTS_MAX {
            self.write_locked(&mut state, What::Event { event: event.clone() }, false);
        }
    }

    /// Writes down how many there were of the kinds that are not named any more.
    pub fn write_counts(&self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let grown: Vec<_> = state
            .counts
            .iter()
            .map(|(key, (all, written))| (*key, all.saturating_sub(NAMED_MAX), *written))
            .filter(|(_, more, written)| more > written)
            .collect();
        for (key, more, _) in grown {
            self.write_more(&mut state, key, more);
        }
    }

    fn write_more(&self, state: &mut State, key: (Server, &'static str), count: u64) {
        if let Some((_, written)) = state.counts.get_mut(&key) {
            *written = count;
        }
        let id = format!("{}-more-{:?}-{}", self.shared.process, key.0, key.1);
        self.append(state, id, What::More { server: key.0, kind: key.1.to_owned(), count }, false);
    }

    fn write_locked(&self, state: &mut State, what: What, durable: bool) -> String {
        state.entries += 1;
        let id = format!("{}-{}", self.shared.process, state.entries);
        self.append(state, id.clone(), what, durable);
        id
    }

    fn append(&self, state: &mut State, id: String, what: What, durable: bool) {
        let entry = Entry { id, at: wall_clock::now_rfc3339(), what };
        let Ok(mut line) = serde_json::to_vec(&entry) else { return };
        line.push(b'\n');
        if let Err(error) = self.append_line(state, &line, durable)
            && !std::mem::replace(&mut state.failed, true)
        {
            // A migration, and the lifting of a fence above all, is worth more than its record.
            tracing::warn!(%error, "the record of what walferry does is not complete");
        }
    }

    fn append_line(&self, state: &mut State, line: &[u8], durable: bool) -> Result<()> {
        let doing = || format!("writing {}", self.shared.path.display());
        if !state.open {
            // Nothing is done to a server before there is a state directory of ours.
            state.waiting.extend_from_slice(line);
            return Ok(());
        }
        if state.file.is_none() {
            let mut options = OpenOptions::new();
            let options =
                options.append(true).create(true).mode(0o600).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
            state.file = Some(options.open(&self.shared.path).context(doing)?);
        }
        let mut all = std::mem::take(&mut state.waiting);
        all.extend_from_slice(line);
        let Some(file) = &mut state.file else { return Ok(()) };
        // In one call, because other processes append too.
        file.write_all(&all).context(doing)?;
        if durable { file.sync_data().context(doing) } else { Ok(()) }
    }
}

impl Recorded {
    /// Where it goes.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// The server says which version it is, at each login.
    pub(crate) fn server_version(&self, version: &str) {
        let mut state = self.recorder.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.versions.get(&self.server).is_some_and(|known| known == version) {
            return;
        }
        state.versions.insert(self.server, version.to_owned());
        let name = match self.server {
            Server::Source => "source_version",
            Server::Target => "target_version",
        };
        self.recorder.write_locked(&mut state, What::Fact { name: name.to_owned(), value: version.to_owned() }, false);
    }

    /// A statement of a kind is about to be sent.
    fn statement(&self, kind: &'static Kind, text: impl FnOnce() -> String) {
        let mut state = self.recorder.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (self.server, kind.name);
        let (all, _) = state.counts.entry(key).or_default();
        *all += 1;
        let all = *all;
        if all <= NAMED_MAX {
            let what = What::Statement { server: self.server, kind: kind.name.to_owned(), statement: text() };
            self.recorder.write_locked(&mut state, what, kind.durable);
        } else if (all - NAMED_MAX).is_power_of_two() {
            self.recorder.write_more(&mut state, key, all - NAMED_MAX);
        }
    }
}

/// Reads a record; a line that a crash has cut is left out.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn read(directory: &Path) -> Result<Vec<Entry>> {
    let path = directory.join(FILE);
    let content = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        content => content.context(|| format!("reading {}", path.display()))?,
    };
    Ok(parse(&content))
}

fn parse(content: &[u8]) -> Vec<Entry> {
    content.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// One entry for each id, the newest of it; in the order of time.
pub fn merged(all: impl IntoIterator<Item = Entry>) -> Vec<Entry> {
    let mut by_id: HashMap<String, Entry> = HashMap::new();
    for entry in all {
        match by_id.get(&entry.id) {
            Some(known) if known.at > entry.at => {}
            _ => drop(by_id.insert(entry.id.clone(), entry)),
        }
    }
    let mut entries: Vec<Entry> = by_id.into_values().collect();
    let number = |id: &str| id.rsplit('-').next().and_then(|last| last.parse::<u64>().ok());
    entries.sort_by(|a, b| (&a.at, number(&a.id)).cmp(&(&b.at, number(&b.id))));
    entries
}

/// Takes the middle out of a file that has grown too large. Only for whoever holds the state directory's lock.
///
/// # Errors
/// When the disk refuses; the file is as it was.
pub fn shorten(directory: &Path) -> Result<()> {
    shorten_to(directory, FILE_BYTES_MAX)
}

fn shorten_to(directory: &Path, bytes_max: u64) -> Result<()> {
    let path = directory.join(FILE);
    if std::fs::metadata(&path).map_or(0, |metadata| metadata.len()) <= bytes_max {
        return Ok(());
    }
    let content = std::fs::read(&path).context(|| format!("reading {}", path.display()))?;
    let mut entries = merged(parse(&content));
    // Commands, and how the cutovers went, are few and stay; of the rest the beginning and the end.
    let is_dear = |entry: &Entry| {
        matches!(entry.what, What::Command { .. } | What::Outcome { .. } | What::Switched { .. } | What::Fact { .. })
    };
    let (count, mut kept, mut lost) = (entries.len(), Vec::new(), 0);
    for (at, entry) in entries.drain(..).enumerate() {
        match is_dear(&entry) || at < count / 8 || at > count / 8 * 6 {
            true => kept.push(entry),
            false => lost += 1,
        }
    }
    let id = format!("shortened-{:x}", wall_clock::now_milliseconds());
    kept.push(Entry { id, at: wall_clock::now_rfc3339(), what: What::Shortened { lines: lost } });
    let mut written = Vec::new();
    for entry in &kept {
        if let Ok(line) = serde_json::to_vec(entry) {
            written.extend_from_slice(&line);
            written.push(b'\n');
        }
    }
    crate::crashsafe::replace(&path, &written)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statements(entries: &[Entry]) -> usize {
        entries.iter().filter(|entry| matches!(entry.what, What::Statement { .. })).count()
    }

    #[test]
    fn of_a_kind_the_first_are_named_and_the_rest_is_counted_before_it_is_sent() {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Recorder::at(directory.path());
        recorder.open();
        let source = recorder.of(Server::Source);
        for number in 0..NAMED_MAX + 5 {
            source.statement(&plan::SCHEMA, || format!("CREATE TABLE t{number}"));
            // At each moment there is at least a word of it.
            let entries = merged(read(directory.path()).unwrap());
            let more = entries.iter().any(|entry| matches!(entry.what, What::More { .. }));
            assert_eq!((statements(&entries) as u64, more), ((number + 1).min(NAMED_MAX), number >= NAMED_MAX));
        }
        recorder.write_counts();
        let entries = merged(read(directory.path()).unwrap());
        let more = entries.iter().find_map(|entry| match &entry.what {
            What::More { count, .. } => Some(*count),
            _ => None,
        });
        assert_eq!((statements(&entries) as u64, more), (NAMED_MAX, Some(5)));
    }

    #[test]
    fn what_comes_before_the_directory_is_written_with_what_comes_after_it() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let recorder = Recorder::at(&directory);
        let fact = |name: &str| What::Fact { name: name.into(), value: String::new() };
        recorder.write(fact("before"), true);
        assert!(read(&directory).unwrap().is_empty());
        std::fs::create_dir(&directory).unwrap();
        recorder.write(fact("between"), true);
        assert!(read(&directory).unwrap().is_empty(), "it may be somebody else's");
        recorder.open();
        recorder.write(fact("after"), true);
        let entries = read(&directory).unwrap();
        assert_eq!(
            entries.iter().map(|entry| entry.what.clone()).collect::<Vec<_>>(),
            [fact("before"), fact("between"), fact("after")]
        );
    }

    #[test]
    fn a_cut_line_is_left_out_and_a_file_that_grew_keeps_its_commands() {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Recorder::at(directory.path());
        recorder.open();
        for number in 0..400 {
            recorder.write(What::Fact { name: number.to_string(), value: String::new() }, false);
            let event =
                Event { time: String::new(), level: crate::observe::status::Level::Info, text: "x".repeat(100) };
            recorder.event(&event);
        }
        let file = directory.path().join(FILE);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.extend_from_slice(b"{\"id\": \"cut");
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(read(directory.path()).unwrap().len(), 800);
        shorten_to(directory.path(), 1000).unwrap();
        let entries = read(directory.path()).unwrap();
        let facts = entries.iter().filter(|entry| matches!(entry.what, What::Fact { .. })).count();
        assert_eq!(facts, 400);
        assert!(
            entries.len() < 700 && matches!(entries.last().unwrap().what, What::Shortened { lines } if lines > 100)
        );
    }
}
