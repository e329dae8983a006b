//! What the directory of several migrations holds besides their state directories: which they are, and a lock.
//!
//! `databases.json` is written by the process that runs them; the commands only read it. Which rows are where is in the ledgers (I2).

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::crashsafe;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::state_directory::{LockedDirectory, StateDirectory};

/// The version of `databases.json` (H18).
const FORMAT: u32 = 1;

const FILE: &str = "databases.json";

/// Several migrations, each of a database of one server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overview {
    format: u32,
    /// The connection string to the source's server that the first start was given, without its password.
    pub source: String,
    /// The target's, likewise.
    pub target: String,
    /// Patterns of the databases that are moved; empty for all.
    pub include: Vec<String>,
    /// Patterns of those that are not.
    pub exclude: Vec<String>,
    /// The databases that are moved, by name.
    pub members: Vec<Member>,
    /// Databases that the patterns name and that have come since the last start: nothing of them is moved.
    #[serde(default)]
    pub unmoved: Vec<String>,
}

/// One of the databases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name, on both servers.
    pub database: String,
    /// The name of its state directory, below the directory of all.
    pub directory: String,
    /// We are about to create it on the target, or have: its settings and privileges may not be complete.
    #[serde(default)]
    pub creating: bool,
}

impl Member {
    /// A database.
    pub fn new(database: &str) -> Member {
        Member { database: database.to_owned(), directory: file_name(database), creating: false }
    }
}

impl Overview {
    /// Of a first start.
    pub fn new(source: String, target: String, include: Vec<String>, exclude: Vec<String>) -> Overview {
        Overview { format: FORMAT, source, target, include, exclude, members: Vec::new(), unmoved: Vec::new() }
    }

    /// What a directory holds; `None` where it is not of several migrations.
    ///
    /// # Errors
    /// `Blocked` when a newer walferry wrote it (H18); `Other` when it cannot be read.
    pub fn of(directory: &Path) -> Result<Option<Overview>> {
        let path = directory.join(FILE);
        let content = match std::fs::read(&path) {
            Ok(content) => content,
            // What is no directory is said by whoever wants one there.
            Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(error).context(|| format!("reading {}", path.display())),
        };
        let overview: Overview = serde_json::from_slice(&content).map_err(|error| {
            Error::new(ErrorKind::Other, format!("{} is not what walferry wrote: {error}", path.display()))
        })?;
        if overview.format > FORMAT {
            let text = format!("{} was written by a newer walferry (format {})", path.display(), overview.format);
            return Err(Error::new(ErrorKind::Blocked, text).hint("Go on with that version."));
        }
        Ok(Some(overview))
    }

    /// Writes it down, durably.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let content =
            serde_json::to_vec_pretty(self).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        crashsafe::replace(&directory.join(FILE), &content)
    }

    /// Takes up the databases that it does not have yet.
    pub fn add(&mut self, databases: impl IntoIterator<Item = String>) {
        for database in databases {
            if self.members.iter().all(|member| member.database != database) {
                self.members.push(Member::new(&database));
            }
        }
        self.members.sort_by(|one, other| one.database.cmp(&other.database));
    }
}

/// Where the migration of a member has its state.
pub fn state_of(directory: &Path, member: &Member) -> StateDirectory {
    StateDirectory::at(&path_of(directory, member))
}

/// The same as a path.
pub fn path_of(directory: &Path, member: &Member) -> PathBuf {
    directory.join(&member.directory)
}

/// Locks the directory of all for this process.
///
/// # Errors
/// `Blocked` when another process has it, or it is that of one migration; as [`StateDirectory::lock`] otherwise.
pub fn lock(directory: &Path) -> Result<LockedDirectory> {
    let locked = StateDirectory::at(directory).lock()?;
    if locked.directory().identity()?.is_some() {
        let text = format!("{} is the state directory of one database's migration", directory.display());
        return Err(Error::new(ErrorKind::Blocked, text).hint("Give another --dir for --all-databases."));
    }
    Ok(locked)
}

/// Refuses what is for one migration on the directory of several.
///
/// # Errors
/// `Usage` with the directories of the members.
pub fn refuse(directory: &Path, command: &str) -> Result<()> {
    let Some(overview) = Overview::of(directory)? else { return Ok(()) };
    let one = overview.members.first().map_or_else(|| directory.to_owned(), |member| path_of(directory, member));
    let text = format!("{} holds the migrations of {} databases", directory.display(), overview.members.len());
    Err(Error::new(ErrorKind::Usage, text)
        .hint(format!("Name the directory of one of them: walferry {command} --dir {} …", one.display())))
}

/// Removes what is left of the directory when its members are gone.
///
/// # Errors
/// When the disk refuses.
pub fn remove(directory: &Path) -> Result<()> {
    for file in [FILE, "databases.new", "lock", "record.jsonl"] {
        match std::fs::remove_file(directory.join(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(|| format!("removing {file} from {}", directory.display()));
            }
            _ => {}
        }
    }
    // Not empty: somebody else's files are in it.
    let _ = std::fs::remove_dir(directory);
    Ok(())
}

/// The name of a database as that of a directory: letters, digits, `_` and `-` as they are, any other byte as `%2F`. Two databases never
/// share one, on a file system that tells capitals apart, and none of our own files is called so: those have a dot, but for the lock.
fn file_name(database: &str) -> String {
    let mut name = String::new();
    for (at, byte) in database.bytes().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' && at > 0;
        if plain && !(at == 0 && database == "lock") {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_of_any_name_has_a_directory_of_its_own() {
        let names = ["shop", "Shop", "a/b", "..", ".", "lock", "-rf", "a%2Fb", "ü", "a\nb", "databases.json", "queue"];
        let directories: Vec<String> = names.iter().map(|name| file_name(name)).collect();
        for directory in &directories {
            assert!(
                directory.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-%".contains(&byte)),
                "{directory}"
            );
            assert!(!directory.starts_with('-') && directory != "lock");
            assert_eq!(directories.iter().filter(|other| *other == directory).count(), 1, "{directory}");
        }
        assert_eq!(file_name("a/b"), "a%2Fb");
        // The longest name that PostgreSQL allows.
        assert!(file_name(&"/".repeat(63)).len() < 255);
    }

    #[test]
    fn what_is_written_is_read_and_a_newer_form_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let mut overview = Overview::new("host=a".into(), "host=b".into(), vec![], vec!["x*".into()]);
        assert_eq!(Overview::of(parent.path()).unwrap(), None);
        overview.add(["b".to_owned(), "a".to_owned()]);
        overview.add(["a".to_owned()]);
        overview.write(parent.path()).unwrap();
        let read = Overview::of(parent.path()).unwrap().unwrap();
        assert_eq!(read, overview);
        assert_eq!(read.members.iter().map(|member| member.database.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        overview.format += 1;
        overview.write(parent.path()).unwrap();
        assert_eq!(Overview::of(parent.path()).unwrap_err().kind(), ErrorKind::Blocked);
    }
}
