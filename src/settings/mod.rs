//! The settings file: what `--config walferry.toml` (or `WALFERRY_CONFIG`) gives to every command.
//!
//! ```text
//!  walferry.toml ──► file: keys, values, lines ──► known options of clap ──► arguments between the command and what was typed
//!                                                        ▲                                   │
//!                              `Cli::command()` ─────────┘                                   ▼
//!                                                                            clap, as if all had been typed
//! ```
//!
//! Each key is an option without its dashes, so the file knows what the command line knows and nothing else: ids, value parsers, conflicts
//! and variables of the environment are read from clap's own definitions. What the command line or the environment says already is left
//! out, hence the order: the command line wins over the environment, and that over the file.

mod check;
mod example;
mod file;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};

use crate::error::{Error, ErrorKind, Result};

pub use check::{Finding, Report, Severity, check};
pub use example::example;
use file::{Entry, File, Value};

/// Where the file is, when `--config` does not say so.
pub const VARIABLE: &str = "WALFERRY_CONFIG";

/// Commands that are about the program itself, and not about a migration.
const WITHOUT_SETTINGS: [&str; 4] = ["config", "completions", "man", "help"];

/// The whole command line: what was typed, with what a file says besides.
#[derive(Debug, Default)]
pub struct Arguments {
    /// For clap, the program's name first.
    pub all: Vec<OsString>,
    /// What is to be said about the file, a sentence each.
    pub warnings: Vec<String>,
    path: PathBuf,
    /// Long names with the line of the file where they stand.
    from_file: Vec<(String, usize)>,
}

impl Arguments {
    /// Where those options stand that a message of clap names and nobody has typed: a line each, for below that message.
    pub fn origins(&self, message: &str) -> String {
        let named = |text: &str, long: &str| {
            let option = format!("--{long}");
            text.match_indices(&option).any(|(at, _)| {
                let next = text[at + option.len()..].chars().next();
                next.is_none_or(|next| !next.is_ascii_alphanumeric() && next != '-')
            })
        };
        // The usage below names whatever was given; it only counts where what is above it names nothing of the file.
        let above = message.split("\n\nUsage:").next().unwrap_or_default();
        let message = if self.from_file.iter().any(|(long, _)| named(above, long)) { above } else { message };
        let of_file = self.from_file.iter().filter(|(long, _)| named(message, long));
        of_file.map(|(long, line)| format!("--{long} comes from {}, line {line}.\n", self.path.display())).collect()
    }
}

/// What was typed, and what the file that it or the environment names says besides.
///
/// # Errors
/// `Usage` when the file cannot be read, or holds what the command does not know or cannot take; file, line and key are named.
pub fn arguments(program: &Command, typed: Vec<OsString>) -> Result<Arguments> {
    arguments_with(program, typed, &|name| std::env::var_os(name))
}

fn arguments_with(
    program: &Command,
    mut typed: Vec<OsString>,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Arguments> {
    let Some((at, command)) = command_of(program, &typed) else {
        return Ok(Arguments { all: typed, ..Arguments::default() });
    };
    let mut names = say_flags_plainly(program, command, &mut typed);
    let set = |name: &str| environment(name).filter(|value| !value.is_empty());
    let wanted = config_of(&typed).or_else(|| set(VARIABLE));
    let explains = ["help", "version"].iter().any(|name| names.contains(*name));
    let Some(path) = wanted.filter(|_| !explains && !WITHOUT_SETTINGS.contains(&command.get_name())) else {
        return Ok(Arguments { all: typed, ..Arguments::default() });
    };
    let file = File::read(Path::new(&path))?;
    let by_environment = options(program, command)
        .filter(|option| option.get_env().is_some_and(|name| environment(&name.to_string_lossy()).is_some()));
    names.extend(by_environment.filter_map(|option| option.get_long().map(str::to_owned)));

    let mut from_file = Vec::new();
    let mut between = Vec::new();
    for setting in settings_of(program, command, &file)? {
        let long = setting.option.get_long().unwrap_or_default().to_owned();
        if names.contains(&long) {
            continue;
        }
        between.extend(setting.arguments()?);
        from_file.push((long, setting.entry.line));
    }
    typed.splice(at + 1..at + 1, between);
    Ok(Arguments { all: typed, warnings: check::warnings(program, command, &file), path: file.path, from_file })
}

/// An option with what a file says about it.
struct Setting<'a> {
    option: &'a Arg,
    entry: &'a Entry,
}

impl Setting<'_> {
    /// As they would be typed.
    fn arguments(&self) -> Result<Vec<OsString>> {
        let long = self.option.get_long().unwrap_or_default();
        let values = values_of(self.option, &self.entry.value).map_err(|why| self.entry.wrong(&why))?;
        if is_flag(self.option) {
            return Ok(values
                .into_iter()
                .filter(|value| value == "true")
                .map(|_| format!("--{long}").into())
                .collect());
        }
        Ok(values.into_iter().map(|value| format!("--{long}={value}").into()).collect())
    }
}

/// What a file says for a command: its own table wins over the top.
fn settings_of<'a>(program: &'a Command, command: &'a Command, file: &'a File) -> Result<Vec<Setting<'a>>> {
    if let Some(finding) = check::unknown(program, file, Some(command.get_name())).into_iter().next() {
        return Err(finding.into_error(&file.path));
    }
    let own = |entry: &&Entry| entry.table.as_deref() == Some(command.get_name());
    let top = |entry: &&Entry| entry.table.is_none();
    let mut settings: Vec<Setting<'a>> = Vec::new();
    for entry in file.entries.iter().filter(own).chain(file.entries.iter().filter(top)) {
        // At the top there is also what only other commands have.
        let Some(option) = options(program, command).find(|option| is_called(option, &entry.key)) else { continue };
        if settings.iter().all(|setting| setting.option.get_id() != option.get_id()) {
            settings.push(Setting { option, entry });
        }
    }
    Ok(settings)
}

/// All commands that take settings.
fn commands(program: &Command) -> impl Iterator<Item = &Command> {
    program.get_subcommands().filter(|command| !WITHOUT_SETTINGS.contains(&command.get_name()))
}

/// What can be set for a command: its own options and those of the program.
fn options<'a>(program: &'a Command, command: &'a Command) -> impl Iterator<Item = &'a Arg> {
    command
        .get_arguments()
        .chain(program.get_arguments())
        .filter(|option| option.get_long().is_some_and(|long| !["config", "help", "version"].contains(&long)))
}

/// The commands that have an option of this key.
fn commands_with<'a>(program: &'a Command, key: &str) -> Vec<&'a str> {
    let has = |command: &&Command| options(program, command).any(|option| is_called(option, key));
    commands(program).filter(has).map(Command::get_name).collect()
}

/// Whether a key may stand at the top: several commands have it, and it is not the name of a command's table.
fn is_shared(program: &Command, key: &str) -> bool {
    commands_with(program, key).len() > 1 && commands(program).all(|command| command.get_name() != canonical(key))
}

/// Keys may have underscores, as the names of options in JSON and in code have.
fn is_called(option: &Arg, key: &str) -> bool {
    option.get_long().is_some_and(|long| long == canonical(key))
}

fn canonical(key: &str) -> String {
    key.replace('_', "-")
}

fn is_flag(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::SetTrue)
}

fn is_list(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Append)
}

/// The values of an option that a file gives, each of which the option's own parser takes.
fn values_of(option: &Arg, value: &Value) -> Result<Vec<String>, String> {
    let one = |value: &Value| match value {
        Value::Text(text) => Ok(text.clone()),
        other if is_list(option) => Err(format!("expected a list of texts such as [\"…\"], not {}", other.kind())),
        other => Err(format!("expected a text or a number, not {}", other.kind())),
    };
    let values = match value {
        Value::Flag(flag) if is_flag(option) => return Ok(vec![flag.to_string()]),
        other if is_flag(option) => return Err(format!("expected true or false, not {}", other.kind())),
        Value::List(values) if is_list(option) => values.iter().map(one).collect::<Result<Vec<_>, _>>()?,
        value => vec![one(value)?],
    };
    for value in &values {
        parse(option, value)?;
    }
    Ok(values)
}

/// Has an option's own parser look at a value; what it says against it is without the value where that may be a secret.
fn parse(option: &Arg, value: &str) -> Result<(), String> {
    // Alone, without what else the option asks for.
    let alone = Arg::new("value").long("value").action(ArgAction::Set).value_parser(option.get_value_parser().clone());
    let parsed =
        Command::new("value").no_binary_name(true).arg(alone).try_get_matches_from([format!("--value={value}")]);
    let Err(error) = parsed else { return is_connection(option, value) };
    if let Some(why) = std::error::Error::source(&error) {
        return Err(why.to_string());
    }
    let possible: Vec<String> = option.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if possible.is_empty() {
        Err("it cannot be understood".to_owned())
    } else {
        Err(format!("expected one of {}", possible.join(", ")))
    }
}

/// What may hold a password is a connection string; clap takes any text for one.
fn is_connection(option: &Arg, value: &str) -> Result<(), String> {
    if !option.is_hide_env_values_set() {
        return Ok(());
    }
    crate::connection::ConnectionSpec::parse(value).map(|_| ()).map_err(|error| error.to_string())
}

/// The command that was typed, and where it stands.
fn command_of<'a>(program: &'a Command, typed: &[OsString]) -> Option<(usize, &'a Command)> {
    let mut at = 1;
    while let Some(word) = typed.get(at) {
        let word = word.to_str()?;
        let Some(option) = word.strip_prefix("--") else {
            return program.get_subcommands().find(|command| command.get_name() == word).map(|command| (at, command));
        };
        let takes_a_value = program.get_arguments().any(|known| known.get_long() == Some(option) && !is_flag(known));
        at += if takes_a_value { 2 } else { 1 };
    }
    None
}

/// The long names that were typed. `--flag=false` on the command line takes back what a file says, though clap knows flags only without a
/// value: it is taken out of what was typed, and `--flag=true` becomes `--flag`.
fn say_flags_plainly(program: &Command, command: &Command, typed: &mut Vec<OsString>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut over = false;
    typed.retain_mut(|word| {
        let text = word.to_string_lossy().into_owned();
        over |= text == "--";
        match text.as_str() {
            "-h" => _ = names.insert("help".to_owned()),
            "-V" => _ = names.insert("version".to_owned()),
            _ => {}
        }
        let Some(option) = text.strip_prefix("--").filter(|_| !over) else { return true };
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        names.insert(name.to_owned());
        let flag = options(program, command).any(|known| known.get_long() == Some(name) && is_flag(known));
        match value {
            Some("false") if flag => false,
            Some("true") if flag => {
                *word = format!("--{name}").into();
                true
            }
            _ => true,
        }
    });
    names
}

/// The file that `--config` names.
fn config_of(typed: &[OsString]) -> Option<OsString> {
    let mut words = typed.iter().take_while(|word| *word != "--");
    while let Some(word) = words.next() {
        if word == "--config" {
            return words.next().cloned();
        }
        if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--config=")) {
            return Some(OsStr::new(path).to_owned());
        }
    }
    None
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

#[cfg(test)]
mod tests;
