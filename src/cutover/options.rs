//! How a cutover is to be done: as it travels through the control socket, and as it stands in the ledger.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a cutover is to be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// How long it may take in all before it is given up.
    pub timeout_seconds: f64,
    /// How long writers may have to wait before it is given up.
    pub max_write_stall_seconds: f64,
    /// Objects whose change since the start does not matter, as the error names them (I11).
    pub waive: Vec<String>,
    /// How writers are held.
    #[serde(default)]
    pub fence: FenceMode,
    /// Nobody has said so: where only a part of the database moves, it is another.
    #[serde(default)]
    pub fence_by_default: bool,
    /// By how many values each sequence is ahead on the target.
    #[serde(default)]
    pub sequence_margin: u32,
    /// Commands of the operator's.
    #[serde(default)]
    pub hooks: Hooks,
    /// The pooler in front of the applications, where there is one to be told.
    #[serde(default)]
    pub pgbouncer: Option<PgBouncer>,
    /// Only where all rows were found equal so many seconds ago at most.
    #[serde(default)]
    pub require_verified_seconds: Option<f64>,
    /// What the applications read most is read into the target's memory first.
    #[serde(default)]
    pub prewarm: bool,
    /// Without a way back.
    #[serde(default)]
    pub no_reverse: bool,
    /// On the way back: a switchback.
    #[serde(default)]
    pub back: bool,
}

/// How writers are held while the target takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FenceMode {
    /// Tables are locked against writes: applications wait, and their sessions are ended when the target has everything
    #[default]
    Lock,
    /// The database becomes read-only by default and all other sessions are ended at once; who comes back can read, and gets
    /// errors when it writes
    ReadOnly,
    /// Nobody else can connect and all other sessions are ended at once; who comes back is refused until it is over
    Connections,
    /// Of a part of a database: its tables are locked against writes, applications wait, and from the switch on a trigger on each refuses
    /// writes; the rest of the database and its sessions go on
    Tables,
    /// You have stopped the writers; the cutover is given up when anything is still written
    None,
}

impl FenceMode {
    /// Whether tables are locked.
    pub(super) fn locks(self) -> bool {
        matches!(self, FenceMode::Lock | FenceMode::Tables)
    }

    /// As the command line and the ledger have it.
    pub fn name(self) -> &'static str {
        match self {
            FenceMode::Lock => "lock",
            FenceMode::ReadOnly => "read-only",
            FenceMode::Connections => "connections",
            FenceMode::Tables => "tables",
            FenceMode::None => "none",
        }
    }
}

/// Commands that a cutover runs by `sh -c`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hooks {
    /// When writers are held; when it fails the cutover is given up.
    #[serde(default)]
    pub on_fence: Option<String>,
    /// When the target is the primary, before anybody is let go.
    #[serde(default)]
    pub on_switch: Option<String>,
    /// When the fence was lifted again.
    #[serde(default)]
    pub on_abort: Option<String>,
    /// How long each of them may take.
    #[serde(default = "default_hook_timeout")]
    pub timeout_seconds: f64,
}

fn default_hook_timeout() -> f64 {
    10.0
}

impl Hooks {
    /// How long each of them may take.
    pub(super) fn timeout(&self) -> Duration {
        limit(self.timeout_seconds)
    }
}

/// A PgBouncer in front of the source.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct PgBouncer {
    /// Its admin console, as a connection string; it can hold a password.
    pub console: String,
    /// The database as PgBouncer calls it; otherwise as the source does.
    pub database: Option<String>,
    /// A file that its configuration includes, and in which the database's entry is pointed at the target.
    pub include: Option<PathBuf>,
}

impl fmt::Debug for PgBouncer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the console, for its password (I10).
        f.debug_struct("PgBouncer").field("database", &self.database).field("include", &self.include).finish()
    }
}

/// A limit that came as a number of seconds; one that is too long for a [`Duration`] is none.
pub(super) fn limit(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_of_an_older_walferry_means_what_it_meant() {
        let older = r#"{"timeout_seconds": 30.0, "max_write_stall_seconds": 5.0, "waive": []}"#;
        let options: Options = serde_json::from_str(older).unwrap();
        assert_eq!(options.fence, FenceMode::Lock);
        assert!(options.hooks.on_fence.is_none() && options.pgbouncer.is_none() && options.sequence_margin == 0);
    }

    #[test]
    fn a_mode_is_called_the_same_everywhere() {
        for mode in [FenceMode::Lock, FenceMode::ReadOnly, FenceMode::Connections, FenceMode::Tables, FenceMode::None] {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.name());
            let value = clap::ValueEnum::to_possible_value(&mode).unwrap();
            assert_eq!(value.get_name(), mode.name());
        }
    }

    #[test]
    fn i10_the_consoles_password_is_in_no_log() {
        let pooler = PgBouncer { console: "postgres://a:secret@b".into(), database: None, include: None };
        assert!(!format!("{pooler:?}").contains("secret"));
    }
}
