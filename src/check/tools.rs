//! PostgreSQL's own `pg_dump` and `pg_restore`, which write and read the schema for us.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use super::report::{Finding, Severity, Side};
use crate::connection::SECRET_VARIABLES;
use crate::error::{Error, ErrorKind, Result};

/// `pg_dump` and `pg_restore` of one version, from one directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    /// Absolute path of `pg_dump`.
    pub pg_dump: PathBuf,
    /// Absolute path of `pg_restore`.
    pub pg_restore: PathBuf,
    /// Their major version, such as 15.
    pub major: u32,
}

/// The environment variable that names the directory of the tools to use, and no other.
const DIRECTORY_VARIABLE: &str = "WALFERRY_PG_BIN";

/// Where packages put each major version's programs beside each other: Debian, Red Hat, Homebrew.
const VERSIONED: [(&str, &str); 3] =
    [("/usr/lib/postgresql", ""), ("/usr", "pgsql-"), ("/opt/homebrew/opt", "postgresql@")];

/// Finds the newest `pg_dump` with its `pg_restore`.
///
/// `WALFERRY_PG_BIN` decides alone where it is set; otherwise the directories of `PATH` and those where packages put
/// PostgreSQL's programs are looked through.
///
/// # Errors
/// None found, or those in `WALFERRY_PG_BIN` do not run.
pub fn find_tools() -> Result<Tools> {
    newest(find_all()?).ok_or_else(not_found)
}

/// Finds the tools that fit both servers: the newest not newer than the target, since an older target does not know
/// every setting that a newer `pg_dump` writes into its output; failing that, the newest of all.
///
/// # Errors
/// As [`find_tools`].
pub fn find_tools_for(source_major: u32, target_major: u32) -> Result<Tools> {
    let all = find_all()?;
    let fitting = all.iter().filter(|tools| (source_major..=target_major).contains(&tools.major)).cloned().collect();
    newest(fitting).or_else(|| newest(all)).ok_or_else(not_found)
}

fn not_found() -> Error {
    Error::new(ErrorKind::Blocked, "no pg_dump with its pg_restore was found on this machine")
        .hint(format!("install PostgreSQL's client programs, or name their directory in {DIRECTORY_VARIABLE}"))
}

/// The newest; among equals the last, so that a package's own directory wins over a wrapper in `PATH`, which may
/// choose another version once it is given a host.
fn newest(found: Vec<Tools>) -> Option<Tools> {
    found.into_iter().max_by_key(|tools| tools.major)
}

fn find_all() -> Result<Vec<Tools>> {
    if let Some(directory) = std::env::var_os(DIRECTORY_VARIABLE) {
        let directory = PathBuf::from(directory);
        let found = tools_in(std::slice::from_ref(&directory));
        if found.is_empty() {
            let text = format!(
                "{DIRECTORY_VARIABLE} is {}, and no pg_dump and pg_restore of one version run there",
                directory.display()
            );
            return Err(Error::new(ErrorKind::Blocked, text)
                .hint(format!("set {DIRECTORY_VARIABLE} to the directory that holds both, or unset it")));
        }
        return Ok(found);
    }
    // Asked several times, and a wrapper in PATH takes its time to say its version.
    static INSTALLED: OnceLock<Vec<Tools>> = OnceLock::new();
    Ok(INSTALLED.get_or_init(|| tools_in(&directories())).clone())
}

/// Directories to look in, each once whatever links lead to it, those of packages last.
fn directories() -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    for (root, prefix) in VERSIONED {
        let Ok(entries) = std::fs::read_dir(root) else { continue };
        let names = entries.flatten().filter(|entry| {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(prefix)).unwrap_or_default();
            !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        });
        directories.extend(names.map(|entry| entry.path().join("bin")));
    }
    let mut seen = BTreeSet::new();
    directories.retain(|directory| {
        directory.is_absolute() && seen.insert(directory.canonicalize().unwrap_or_else(|_| directory.clone()))
    });
    directories
}

/// The tools in each directory, when both are there, run, and are of one version. All are asked at once: a wrapper takes its time.
fn tools_in(directories: &[PathBuf]) -> Vec<Tools> {
    let asked: Vec<_> = directories
        .iter()
        .map(|directory| (directory.join("pg_dump"), directory.join("pg_restore")))
        .map(|(pg_dump, pg_restore)| (ask_version(&pg_dump), ask_version(&pg_restore), pg_dump, pg_restore))
        .collect();
    let tools = |(of_dump, of_restore, pg_dump, pg_restore)| {
        let (major, other) = (major_of(of_dump), major_of(of_restore));
        (major == other).then_some(Tools { pg_dump, pg_restore, major: major? })
    };
    asked.into_iter().filter_map(tools).collect()
}

fn ask_version(program: &Path) -> Option<Child> {
    if !program.is_file() {
        return None;
    }
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    // Whatever program stands there gets no password.
    for variable in SECRET_VARIABLES {
        command.env_remove(variable);
    }
    command.spawn().ok()
}

fn major_of(asked: Option<Child>) -> Option<u32> {
    let output = asked?.wait_with_output().ok()?;
    output.status.success().then(|| parse_major(&String::from_utf8_lossy(&output.stdout))).flatten()
}

/// `pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` is 15, and so is `15beta2`.
fn parse_major(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL)")?.1.trim_start();
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// What is wrong with the tools for this pair of servers, by major versions.
pub(crate) fn findings(found: &Result<Tools>, source_major: u32, target_major: u32) -> Vec<Finding> {
    let finding = |severity, object: String, message| Finding::new(severity, Side::Local, "pg-dump", object, message);
    match found {
        Err(error) => vec![
            finding(
                Severity::Blocker,
                "pg_dump, pg_restore".into(),
                format!("{error}. The schema is moved by PostgreSQL's own tools."),
            )
            .fix(match std::env::var_os(DIRECTORY_VARIABLE).filter(|value| !value.is_empty()) {
                Some(_) => format!("unset {DIRECTORY_VARIABLE}  -- or set it to the directory of pg_dump and pg_restore"),
                None => format!("apt-get install postgresql-client-{target_major}"),
            }),
        ],
        Ok(tools) if tools.major < source_major => vec![
            finding(
                Severity::Blocker,
                tools.pg_dump.display().to_string(),
                format!(
                    "It is of version {}, and the source of {source_major}; pg_dump refuses a server newer than itself.",
                    tools.major
                ),
            )
            .fix(format!("apt-get install postgresql-client-{target_major}")),
        ],
        Ok(tools) if tools.major > target_major => vec![
            finding(
                Severity::Warning,
                tools.pg_dump.display().to_string(),
                format!(
                    "It is of version {}, newer than the target's {target_major}: what it writes may hold settings or \
                     syntax that the target does not know, and the restore would then stop.",
                    tools.major
                ),
            )
            .fix(format!("apt-get install postgresql-client-{target_major}")),
        ],
        Ok(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(directory: &str, major: u32) -> Tools {
        let directory = Path::new(directory);
        Tools { pg_dump: directory.join("pg_dump"), pg_restore: directory.join("pg_restore"), major }
    }

    #[test]
    fn the_major_version_is_read_from_what_the_program_prints() {
        assert_eq!(parse_major("pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("pg_dump (PostgreSQL) 18beta2"), Some(18));
        assert_eq!(parse_major("pg_dump 15"), None);
    }

    #[test]
    fn the_newest_wins_and_a_packages_own_directory_over_a_wrapper() {
        let found = vec![tools("/usr/bin", 16), tools("/old", 14), tools("/usr/lib/postgresql/16/bin", 16)];
        assert_eq!(newest(found), Some(tools("/usr/lib/postgresql/16/bin", 16)));
        assert_eq!(newest(Vec::new()), None);
    }

    #[test]
    fn tools_older_than_the_source_block_and_newer_than_the_target_warn() {
        let severities = |major, source, target| -> Vec<Severity> {
            findings(&Ok(tools("/bin", major)), source, target).iter().map(|finding| finding.severity).collect()
        };
        assert_eq!(severities(15, 15, 15), []);
        assert_eq!(severities(15, 16, 16), [Severity::Blocker]);
        assert_eq!(severities(17, 15, 15), [Severity::Warning]);
        let missing = findings(&Err(not_found()), 15, 15);
        assert_eq!(missing[0].severity, Severity::Blocker);
    }

    #[test]
    fn a_directory_without_both_programs_is_passed_over() {
        assert_eq!(tools_in(&["/nonexistent".into()]), []);
    }
}
