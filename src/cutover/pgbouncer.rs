//! PgBouncer in front of the applications: their transactions wait in it while the database behind it changes.
//!
//! ```text
//!   PAUSE ──► fence, drain, …, decision ──► its entry points at the target, RELOAD ──► RESUME
//!     └────────── given up, or cut off: RESUME on the old settings ──────────┘
//! ```

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::options::PgBouncer;
use crate::connection::{ConnectionSpec, Console};
use crate::crashsafe;
use crate::error::{Context, Error, ErrorKind, Result};

/// The variable that holds the console's connection string where no option does; after a crash it can also bring the password.
const CONSOLE_VARIABLE: &str = "WALFERRY_PGBOUNCER";

/// A PgBouncer, as the ledger has it: without a password.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Known {
    console: String,
    database: String,
    include: Option<PathBuf>,
    /// Only while this process lives: with the password.
    #[serde(skip)]
    with_password: Option<SpecOfThisProcess>,
}

#[derive(Clone, Debug)]
struct SpecOfThisProcess(ConnectionSpec);

impl PartialEq for SpecOfThisProcess {
    fn eq(&self, _: &SpecOfThisProcess) -> bool {
        true
    }
}

impl Known {
    /// Looks whether the console can be reached, knows the database, and whether the include file has its entry. Changes nothing.
    pub(super) async fn look(options: &PgBouncer, source: &ConnectionSpec) -> Result<Known> {
        let spec = ConnectionSpec::parse(&options.console).map_err(|error| error.context("--pgbouncer"))?;
        let known = Known {
            console: spec.without_password(),
            database: options.database.clone().unwrap_or_else(|| source.database().to_owned()),
            include: options.include.clone(),
            with_password: Some(SpecOfThisProcess(spec.clone())),
        };
        let console = Console::open(&spec).await.map_err(|error| error.context("PgBouncer's admin console"))?;
        match known.is_paused(&console).await? {
            Some(false) => {}
            Some(true) => {
                return Err(Error::new(
                    ErrorKind::Blocked,
                    format!("PgBouncer has paused its database {} already", known.database),
                )
                .hint(format!("In its admin console: {};", known.resume())));
            }
            None => {
                return Err(Error::new(ErrorKind::Blocked, format!("PgBouncer has no database {}", known.database))
                    .hint("Name it as SHOW DATABASES in its admin console does: --pgbouncer-database NAME"));
            }
        }
        if let Some(path) = &known.include {
            let text = std::fs::read_to_string(path).context(|| format!("reading {}", path.display()))?;
            pointed_at(&text, &known.database, &("host", "1", "database"))
                .ok_or_else(|| no_entry(path, &known.database))?;
        }
        Ok(known)
    }

    pub(super) fn has_include(&self) -> bool {
        self.include.is_some()
    }

    /// The console's command that lets the clients go on.
    pub(super) fn resume(&self) -> String {
        format!("RESUME {}", quoted(&self.database))
    }

    /// Lets the transactions under way end, and holds all others.
    pub(super) async fn pause(&self) -> Result<()> {
        self.open().await?.command(&format!("PAUSE {}", quoted(&self.database))).await
    }

    /// Lets the clients go on where they were.
    pub(super) async fn give_back(&self) -> Result<()> {
        let console = self.open().await?;
        if self.is_paused(&console).await? == Some(true) {
            console.command(&self.resume()).await?;
        }
        Ok(())
    }

    /// Lets the clients go on at the target. May be done again.
    pub(super) async fn switch(&self, target: &ConnectionSpec) -> Result<()> {
        let console = self.open().await?;
        if let Some(path) = &self.include {
            let target = target.disclosed().await;
            // PgBouncer takes one port and, from 1.17 on, several hosts.
            let port = target.port.split(',').next().unwrap_or_default().to_owned();
            let text = std::fs::read_to_string(path).context(|| format!("reading {}", path.display()))?;
            let text = pointed_at(&text, &self.database, &(&target.host, &port, &target.database))
                .ok_or_else(|| no_entry(path, &self.database))?;
            replace(path, &text)?;
            console.command("RELOAD").await?;
        }
        if self.is_paused(&console).await? == Some(true) {
            console.command(&self.resume()).await?;
        }
        Ok(())
    }

    /// A new session each time: one in which a PAUSE waits takes no other command.
    async fn open(&self) -> Result<Console> {
        let known = match &self.with_password {
            Some(SpecOfThisProcess(spec)) => spec.clone(),
            None => self.after_a_restart()?,
        };
        Console::open(&known).await.map_err(|error| error.context("PgBouncer's admin console"))
    }

    /// The ledger has no password: it comes from where passwords come from, or from the variable.
    fn after_a_restart(&self) -> Result<ConnectionSpec> {
        let given = std::env::var(CONSOLE_VARIABLE).ok().and_then(|text| ConnectionSpec::parse(&text).ok());
        match given.filter(|spec| spec.without_password() == self.console) {
            Some(spec) => Ok(spec),
            None => ConnectionSpec::parse(&self.console),
        }
    }

    /// Whether the database is paused; `None` when PgBouncer does not know it.
    async fn is_paused(&self, console: &Console) -> Result<Option<bool>> {
        let databases = console.show("SHOW DATABASES", ["name", "paused"]).await?;
        let ours = databases.into_iter().find(|[name, _]| name.as_deref() == Some(&self.database));
        Ok(ours.map(|[_, paused]| paused.as_deref() == Some("1")))
    }
}

/// As the admin console reads a name.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn no_entry(path: &Path, database: &str) -> Error {
    Error::new(ErrorKind::Blocked, format!("{} has no entry for the database {database}", path.display())).hint(format!(
        "The file has to hold, and PgBouncer's configuration to %include it:\n[databases]\n{database} = host=… port=… dbname=…"
    ))
}

/// The include file with the entry of a database pointed at another place (host, port, database); everything else in it stays.
/// `None` when it has no such entry.
fn pointed_at(text: &str, database: &str, place: &(&str, &str, &str)) -> Option<String> {
    let mut found = false;
    let mut in_databases = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.starts_with('[') {
            in_databases = trimmed.eq_ignore_ascii_case("[databases]");
        }
        let entry = trimmed.split_once('=').map(|(name, entry)| (name.trim(), entry.trim()));
        match entry {
            Some((name, entry))
                if in_databases && !trimmed.starts_with([';', '#']) && is_named(name, database) && !found =>
            {
                found = true;
                let (host, port, other) = place;
                let mut settings = vec![("host", *host), ("port", *port), ("dbname", *other)]
                    .into_iter()
                    .map(|(key, value)| format!("{key}={}", value_quoted(value)))
                    .collect::<Vec<_>>();
                settings.extend(
                    pairs(entry)?
                        .into_iter()
                        .filter(|(key, _)| !["host", "port", "dbname"].contains(&key.as_str()))
                        .map(|(key, value)| format!("{key}={}", value_quoted(&value))),
                );
                lines.push(format!("{name} = {}", settings.join(" ")));
            }
            _ => lines.push(line.to_owned()),
        }
    }
    found.then(|| lines.join("\n") + "\n")
}

/// A name can be quoted.
fn is_named(written: &str, database: &str) -> bool {
    match written.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(inner) => inner.replace("\"\"", "\"") == database,
        None => written == database,
    }
}

fn value_quoted(value: &str) -> String {
    let plain = !value.is_empty() && !value.contains(|character: char| character.is_whitespace() || character == '\'');
    if plain { value.to_owned() } else { format!("'{}'", value.replace('\'', "''")) }
}

/// `key=value` pairs, a value with spaces in quotes, a quote in it doubled.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=')?;
        let after = after.trim_start();
        let mut value = String::new();
        rest = if let Some(mut quoted) = after.strip_prefix('\'') {
            loop {
                let (before, behind) = quoted.split_once('\'')?;
                value.push_str(before);
                match behind.strip_prefix('\'') {
                    Some(more) => {
                        value.push('\'');
                        quoted = more;
                    }
                    None => break behind,
                }
            }
        } else {
            let end = after.find(char::is_whitespace).unwrap_or(after.len());
            value.push_str(&after[..end]);
            &after[end..]
        }
        .trim_start();
        pairs.push((key.trim().to_owned(), value));
    }
    Some(pairs)
}

/// Replaces a file as a whole, with the owner and the mode that it has: PgBouncer is another user, and has to be able to read it.
fn replace(path: &Path, text: &str) -> Result<()> {
    let doing = || format!("writing {}", path.display());
    let was = std::fs::metadata(path).context(doing)?;
    let fresh = path.with_extension("walferry-new");
    let _ = std::fs::remove_file(&fresh);
    let mut file = crashsafe::create_private(&fresh)?;
    file.write_all(text.as_bytes()).context(doing)?;
    file.set_permissions(std::fs::Permissions::from_mode(was.mode() & 0o777)).context(doing)?;
    if std::os::unix::fs::fchown(&file, Some(was.uid()), Some(was.gid())).is_err() {
        // Only root gives files away. It is ours now, with the mode it had.
        tracing::debug!("the owner of {} could not be kept", path.display());
    }
    file.sync_all().context(doing)?;
    std::fs::rename(&fresh, path).context(doing)?;
    if let Some(directory) = path.parent() {
        std::fs::File::open(directory).and_then(|directory| directory.sync_all()).context(doing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "; the shop\n[databases]\nother = host=a port=1\nshop = host=old port=5432 dbname=shop pool_size=7 \
                        connect_query='SELECT ''a b'''\n[pgbouncer]\nshop = host=x\n";

    #[test]
    fn an_entry_is_pointed_elsewhere_and_everything_else_stays() {
        let text = pointed_at(FILE, "shop", &("10.0.0.2", "6543", "the shop")).unwrap();
        assert_eq!(
            text,
            "; the shop\n[databases]\nother = host=a port=1\n\
             shop = host=10.0.0.2 port=6543 dbname='the shop' pool_size=7 connect_query='SELECT ''a b'''\n[pgbouncer]\nshop = host=x\n"
        );
        // Again, as after a crash, it comes to the same.
        assert_eq!(pointed_at(&text, "shop", &("10.0.0.2", "6543", "the shop")).unwrap(), text);
        assert_eq!(pointed_at(FILE, "sho", &("a", "1", "b")), None);
        assert_eq!(pointed_at("[databases]\n;shop = host=old\n", "shop", &("a", "1", "b")), None);
        let quoted = pointed_at("[databases]\n\"sh\"\"op\" = host=a", "sh\"op", &("b", "1", "c")).unwrap();
        assert_eq!(quoted, "[databases]\n\"sh\"\"op\" = host=b port=1 dbname=c\n");
    }

    #[test]
    fn a_rewritten_file_keeps_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shop.ini");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        replace(&path, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn i10_the_ledger_gets_no_password_of_the_console() {
        let spec = ConnectionSpec::parse("postgres://admin:hush-hush@bouncer:6432").unwrap();
        let known = Known {
            console: spec.without_password(),
            database: "shop".into(),
            include: None,
            with_password: Some(SpecOfThisProcess(spec)),
        };
        assert!(!serde_json::to_string(&known).unwrap().contains("hush"), "{known:?}");
        assert!(!format!("{known:?}").contains("hush"));
    }
}
