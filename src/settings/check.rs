//! `walferry config check`: everything that is wrong with a settings file, each with its line, and what each key is for.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind as ClapError;
use clap::{Arg, Command};
use serde::Serialize;

use super::file::{Entry, File, Value};
use super::{canonical, commands, commands_with, is_called, is_shared, options, settings_of, usage, values_of};
use crate::connection::ConnectionSpec;
use crate::error::{Error, Result};
use crate::observe::format::printable;

/// What a file says, and what is wrong with it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this layout.
    pub version: u32,
    /// The file.
    pub file: PathBuf,
    /// Whether no finding is an error.
    pub ok: bool,
    /// The keys that are known, in the order of the file.
    pub settings: Vec<Known>,
    /// What is to be said against it, in the order of the file.
    pub findings: Vec<Finding>,
}

/// A key of a file and whom it is for. Its value is not shown: it can be a secret.
#[derive(Debug, Serialize)]
pub struct Known {
    /// The table it stands in; null at the top.
    pub table: Option<String>,
    /// The option, without its dashes.
    pub key: String,
    /// Where it stands, from 1.
    pub line: usize,
    /// The commands that take it from here.
    pub commands: Vec<String>,
}

/// Something to be said against a file.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Where it stands, from 1.
    pub line: usize,
    /// What it is about, such as `[cutover] timeout`.
    pub key: String,
    /// What is wrong.
    pub text: String,
    /// What to do, where that is not plain.
    pub hint: Option<String>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// A command that reads the file refuses to run.
    Error,
    /// It works, and somebody should know.
    Warning,
}

impl Finding {
    fn error(line: usize, key: String, text: impl Into<String>) -> Finding {
        Finding { severity: Severity::Error, line, key, text: text.into(), hint: None }
    }

    fn with_hint(mut self, hint: impl Into<String>) -> Finding {
        self.hint = Some(hint.into());
        self
    }

    /// As the error of a command.
    pub(super) fn into_error(self, path: &Path) -> Error {
        let check = format!("`walferry config check {}` says all that is wrong with it.", path.display());
        let hint = self.hint.map_or(check.clone(), |hint| format!("{hint} {check}"));
        usage(format!("{}, line {}: {}: {}", path.display(), self.line, self.key, self.text)).hint(hint)
    }
}

/// Looks at a file with everything that the commands know.
///
/// # Errors
/// `Usage` when it cannot be read or is no TOML; everything else is a finding.
pub fn check(program: &Command, path: &Path) -> Result<Report> {
    Ok(report(program, &File::read(path)?))
}

pub(super) fn report(program: &Command, file: &File) -> Report {
    let mut findings = unknown(program, file, None);
    let mut settings = Vec::new();
    for entry in &file.entries {
        let Some(option) = option_of(program, entry) else { continue };
        let commands = for_whom(program, file, entry);
        if let Err(why) = values_of(option, &entry.value) {
            findings.push(Finding::error(entry.line, entry.name(), why));
        } else if commands.is_empty() {
            let text = "it has no effect: each command that has it finds it in its own table";
            findings.push(Finding { severity: Severity::Warning, ..Finding::error(entry.line, entry.name(), text) });
        }
        findings.extend(secret(file, entry, option));
        settings.push(Known { table: entry.table.clone(), key: canonical(&entry.key), line: entry.line, commands });
    }
    if findings.iter().all(|finding| finding.severity != Severity::Error) {
        findings.extend(commands(program).filter_map(|command| together(program, command, file)));
    }
    findings.sort_by_key(|finding| finding.line);
    let ok = findings.iter().all(|finding| finding.severity != Severity::Error);
    Report { version: 1, file: file.path.clone(), ok, settings, findings }
}

/// The commands that take a key from where it stands.
fn for_whom(program: &Command, file: &File, entry: &Entry) -> Vec<String> {
    let key = canonical(&entry.key);
    let in_own_table = |command: &str| {
        file.entries.iter().any(|other| other.table.as_deref() == Some(command) && canonical(&other.key) == key)
    };
    match &entry.table {
        Some(table) => vec![table.clone()],
        None => commands_with(program, &key)
            .into_iter()
            .filter(|command| !in_own_table(command))
            .map(str::to_owned)
            .collect(),
    }
}

/// The option that a key is, where it may stand there.
fn option_of<'a>(program: &'a Command, entry: &Entry) -> Option<&'a Arg> {
    let mut fitting =
        commands(program).filter(|command| entry.table.as_deref().is_none_or(|table| table == command.get_name()));
    fitting.find_map(|command| options(program, command).find(|option| is_called(option, &entry.key)))
}

/// Keys and tables that nobody knows, and keys that stand where they cannot; for one command, in what it reads.
pub(super) fn unknown(program: &Command, file: &File, only: Option<&str>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let names: Vec<&str> = commands(program).map(Command::get_name).collect();
    for (table, line) in &file.tables {
        if !names.contains(&table.as_str()) {
            let hint = nearest(table, &names)
                .map_or_else(|| format!("There are {}.", names.join(", ")), |near| format!("Is it [{near}]?"));
            findings.push(Finding::error(*line, format!("[{table}]"), "no command has this name").with_hint(hint));
        }
    }
    for (at, entry) in file.entries.iter().enumerate() {
        let read = only.is_none_or(|only| entry.table.as_deref().is_none_or(|table| table == only));
        let known_table = entry.table.as_deref().is_none_or(|table| names.contains(&table));
        if !read || !known_table {
            continue;
        }
        let twice = file.entries[..at]
            .iter()
            .find(|other| other.table == entry.table && canonical(&other.key) == canonical(&entry.key));
        if let Some(other) = twice {
            let text = format!("it stands in line {} already, as {}", other.line, other.key);
            findings.push(Finding::error(entry.line, entry.name(), text));
        } else if let Some(finding) = misplaced(program, entry) {
            findings.push(finding);
        }
    }
    findings
}

/// What is wrong with the place of a key.
fn misplaced(program: &Command, entry: &Entry) -> Option<Finding> {
    let with = commands_with(program, &entry.key);
    let tables = || with.iter().map(|name| format!("[{name}]")).collect::<Vec<_>>().join(", ");
    match &entry.table {
        Some(table) if with.contains(&table.as_str()) => None,
        None if is_shared(program, &entry.key) => None,
        Some(table) if !with.is_empty() => {
            let text = format!("`{table}` has no such option");
            Some(Finding::error(entry.line, entry.name(), text).with_hint(format!("It belongs into {}.", tables())))
        }
        None if !with.is_empty() => {
            let text =
                format!("at the top stands what several commands share; this is an option of {}", with.join(", "));
            Some(Finding::error(entry.line, entry.name(), text).with_hint(format!("It belongs into {}.", tables())))
        }
        table => {
            let fitting =
                commands(program).filter(|command| table.as_deref().is_none_or(|table| table == command.get_name()));
            let known: Vec<&str> =
                fitting.flat_map(|command| options(program, command).filter_map(Arg::get_long)).collect();
            let all = commands(program)
                .flat_map(|command| options(program, command).filter_map(Arg::get_long))
                .collect::<Vec<_>>();
            let near = nearest(&canonical(&entry.key), &known).or_else(|| nearest(&canonical(&entry.key), &all));
            let hint = near.map_or_else(
                || "`walferry config example` prints all keys.".to_owned(),
                |near| format!("Is it {near}?"),
            );
            Some(Finding::error(entry.line, entry.name(), "there is no such option").with_hint(hint))
        }
    }
}

/// What clap says of all that a command finds in a file together: options that exclude each other, or need another one.
fn together(program: &Command, command: &Command, file: &File) -> Option<Finding> {
    let settings = settings_of(program, command, file).ok().filter(|settings| !settings.is_empty())?;
    let mut arguments = vec![program.get_name().into(), command.get_name().into()];
    for setting in &settings {
        arguments.extend(setting.arguments().ok()?);
    }
    // What has to be given comes from the command line; here any text does.
    for needed in options(program, command).filter(|option| option.is_required_set()) {
        if settings.iter().all(|setting| setting.option.get_id() != needed.get_id()) {
            arguments.push(format!("--{}=.", needed.get_long().unwrap_or_default()).into());
        }
    }
    let error = program.clone().try_get_matches_from(arguments).err()?;
    if !matches!(error.kind(), ClapError::ArgumentConflict | ClapError::MissingRequiredArgument) {
        return None;
    }
    let text = error.to_string();
    let said = text
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .trim_start_matches("error: ")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let named =
        settings.iter().find(|setting| said.contains(&format!("--{}", setting.option.get_long().unwrap_or_default())));
    let entry = named.or(settings.first())?.entry;
    Some(Finding::error(
        entry.line,
        entry.name(),
        format!("`{}` cannot run with these settings: {said}", command.get_name()),
    ))
}

/// What is to be said of the passwords that a command finds in a file.
pub(super) fn warnings(program: &Command, command: &Command, file: &File) -> Vec<String> {
    let settings = settings_of(program, command, file).unwrap_or_default();
    let findings = settings.iter().filter_map(|setting| secret(file, setting.entry, setting.option));
    findings
        .map(|finding| format!("{}, line {}: {}: {}", file.path.display(), finding.line, finding.key, finding.text))
        .collect()
}

/// A password in a file that others can read.
fn secret(file: &File, entry: &Entry, option: &Arg) -> Option<Finding> {
    let Value::Text(text) = &entry.value else { return None };
    let holds_one =
        option.is_hide_env_values_set() && ConnectionSpec::parse(text).is_ok_and(|spec| spec.has_inline_password());
    (holds_one && file.readable_by_others).then(|| {
        let path = file.path.display();
        let text = format!("others can read the password in this file: chmod 600 {path}, or leave it to ~/.pgpass or a password command");
        Finding { severity: Severity::Warning, ..Finding::error(entry.line, entry.name(), text) }
    })
}

/// The known name that is the least different, where it is near enough to be meant.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let best = known.iter().map(|known| (distance(name, known), *known)).min()?;
    (best.0 <= 1 + name.chars().count() / 4).then_some(best.1)
}

/// How many letters have to be put in, taken out or replaced (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (at, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (place, against) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *against);
            diagonal = row[place + 1];
            row[place + 1] = replaced.min(diagonal + 1).min(row[place] + 1);
        }
    }
    row[other.len()]
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for known in &self.settings {
            let table = known.table.as_ref().map_or(String::new(), |table| format!("[{table}] "));
            let commands = if known.commands.is_empty() { "nobody".to_owned() } else { known.commands.join(", ") };
            writeln!(f, "  line {:<4} {:<34} for {commands}", known.line, format!("{table}{}", known.key))?;
        }
        for finding in &self.findings {
            let severity = if finding.severity == Severity::Error { "ERROR" } else { "warning" };
            writeln!(
                f,
                "  line {:<4} {severity}: {}: {}",
                finding.line,
                printable(&finding.key),
                printable(&finding.text)
            )?;
            if let Some(hint) = &finding.hint {
                writeln!(f, "            next: {}", printable(hint))?;
            }
        }
        let count = |severity| self.findings.iter().filter(|finding| finding.severity == severity).count();
        let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
        let path = self.file.display();
        match (errors, warnings) {
            (0, 0) => write!(f, "{path} can be used."),
            (0, warnings) => write!(f, "{path} can be used; {warnings} to look after."),
            (errors, _) => write!(f, "{path} cannot be used: {errors} to mend."),
        }
    }
}
