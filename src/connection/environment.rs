//! What fills a connection string's gaps: PG* variables, service files and password files, as in libpq.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::keywords::{self, KEYWORDS};
use super::parse::Parameters;
use crate::error::{Error, ErrorKind, Result};

/// Where Debian and its kin keep the service file of the whole system; elsewhere PGSYSCONFDIR says it.
const SYSTEM_CONFIGURATION: &str = "/etc/postgresql-common";

/// The parts of the process's surroundings that count.
#[derive(Clone, Debug, Default)]
pub(super) struct Environment {
    /// Variables whose names begin with PG.
    pub(super) variables: HashMap<String, String>,
    /// The home directory.
    pub(super) home: Option<PathBuf>,
    /// The name of the user that the process runs as.
    pub(super) user: Option<String>,
}

impl Environment {
    /// This process's own.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a variable that is not UTF-8.
    pub(super) fn of_process() -> Result<Environment> {
        let mut variables = HashMap::new();
        for (name, value) in std::env::vars_os() {
            let Some(name) = name.to_str().filter(|name| name.starts_with("PG")) else { continue };
            let value = value
                .into_string()
                .map_err(|_| Error::new(ErrorKind::Usage, format!("the environment variable {name} is not UTF-8")))?;
            variables.insert(name.to_owned(), value);
        }
        let account = account();
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| !home.as_os_str().is_empty());
        let home = home.or_else(|| account.as_ref().map(|(_, home)| home.clone()));
        let user = account.map(|(name, _)| name).or_else(|| std::env::var("USER").ok());
        Ok(Environment { variables, home, user })
    }

    /// A variable that is set and not empty.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A file in the home directory.
    pub(super) fn in_home(&self, path: &str) -> Option<PathBuf> {
        self.home.as_ref().map(|home| home.join(path))
    }

    /// Adds what a service file says, then what the variables say, to what the connection string did not name.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a service that is named and not found.
    pub(super) fn fill(&self, given: &mut HashMap<&'static str, String>) -> Result<()> {
        let service = given.get("service").cloned().or_else(|| self.variable("PGSERVICE").map(str::to_owned));
        if let Some(service) = service.filter(|service| !service.is_empty()) {
            for (name, value) in self.service(&service, given.get("servicefile").map(Path::new))? {
                given.entry(name).or_insert(value);
            }
        }
        for keyword in KEYWORDS {
            let value = keyword.variable.and_then(|variable| self.variable(variable));
            if let Some(value) = value.filter(|_| !given.contains_key(keyword.name)) {
                given.insert(keyword.name, value.to_owned());
            }
        }
        Ok(())
    }

    /// "The Connection Service File" in the manual: the user's file first, then the system's.
    fn service(&self, service: &str, file: Option<&Path>) -> Result<Parameters> {
        let own = file.or(self.variable("PGSERVICEFILE").map(Path::new));
        let user = own.map(Path::to_owned).or_else(|| self.in_home(".pg_service.conf"));
        let directory = self.variable("PGSYSCONFDIR").unwrap_or(SYSTEM_CONFIGURATION);
        let system = Path::new(directory).join("pg_service.conf");
        let mut looked_in = Vec::new();
        for path in user.into_iter().chain([system]) {
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    if let Some(found) = service_section(&text, service, &path)? {
                        return Ok(found);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && own != Some(path.as_path()) => continue,
                Err(error) => {
                    let message = format!("reading the service file {}: {error}", path.display());
                    return Err(Error::new(ErrorKind::Usage, message));
                }
            }
            looked_in.push(path.display().to_string());
        }
        let places = if looked_in.is_empty() { "no service file exists".to_owned() } else { looked_in.join(", ") };
        Err(Error::new(ErrorKind::Usage, format!("there is no service {service:?} ({places})"))
            .hint("add it to ~/.pg_service.conf, or name another file in PGSERVICEFILE"))
    }
}

/// The name and the home directory of the account that the process runs as.
fn account() -> Option<(String, PathBuf)> {
    let user_id = rustix::process::geteuid().as_raw().to_string();
    let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
    accounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.len() >= 6 && fields[2] == user_id).then(|| (fields[0].to_owned(), PathBuf::from(fields[5])))
    })
}

/// The parameters of one `[section]`; `None` where there is no such section.
pub(super) fn service_section(text: &str, service: &str, path: &Path) -> Result<Option<Parameters>> {
    let wrong = |line: usize, problem: &str| {
        Error::new(ErrorKind::Usage, format!("line {line} of the service file {} {problem}", path.display()))
    };
    let mut found: Option<Parameters> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(section) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            found = (section.strip_suffix(']') == Some(service)).then(Vec::new);
            continue;
        }
        let Some(parameters) = &mut found else { continue };
        let (name, value) = line.split_once('=').ok_or_else(|| wrong(number, "has no \"=\""))?;
        let keyword = keywords::find(name).ok_or_else(|| wrong(number, "names no connection parameter"))?;
        if keyword.name.starts_with("service") {
            return Err(wrong(number, "names a service inside a service"));
        }
        // The first one wins in a service file.
        if parameters.iter().all(|(known, _)| *known != keyword.name) {
            parameters.push((keyword.name, value.to_owned()));
        }
    }
    Ok(found)
}

/// Looks a password up in a password file ("The Password File" in the manual): the first line that fits wins.
///
/// A file that others can read is passed over with a warning, as libpq does; one that is not there has no passwords.
pub(super) fn password_from_file(path: &Path, fields: [&str; 4]) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() {
        tracing::warn!(path = %path.display(), "the password file is not a plain file and is passed over");
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "the password file is readable by others and is passed over: chmod 0600");
        return None;
    }
    password_in(&std::fs::read(path).ok()?, fields)
}

/// The password in the first line of a password file's content that fits.
pub(super) fn password_in(content: &[u8], fields: [&str; 4]) -> Option<String> {
    content.split(|&byte| byte == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.starts_with('#') {
            return None;
        }
        let mut rest = line;
        for wanted in fields {
            let (field, after) = password_file_field(rest);
            if field != wanted && !rest.starts_with("*:") {
                return None;
            }
            rest = after?;
        }
        Some(password_file_field(rest).0)
    })
}

/// A field up to the next colon that no backslash stands before, and what follows that colon.
fn password_file_field(text: &str) -> (String, Option<&str>) {
    let mut field = String::new();
    let mut letters = text.char_indices();
    while let Some((position, letter)) = letters.next() {
        match letter {
            ':' => return (field, Some(&text[position + 1..])),
            // A backslash at the very end stands for itself.
            '\\' => field.push(letters.next().map_or('\\', |(_, escaped)| escaped)),
            _ => field.push(letter),
        }
    }
    (field, None)
}

/// A field of a password file, escaped.
pub(super) fn password_file_escaped(field: &str) -> String {
    field.replace('\\', "\\\\").replace(':', "\\:")
}
