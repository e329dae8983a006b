//! What an operator asked for: command, arguments without secrets, the operating system's user, time, and how it ended.

use std::path::Path;

use super::{Recorder, What};
use crate::connection::ConnectionSpec;
use crate::error::Error;

/// Options whose value is a connection string.
const CONNECTIONS: [&str; 3] = ["--source", "--target", "--pgbouncer"];
/// Options whose value is a command that may have a secret in it.
const COMMANDS: [&str; 2] = ["--source-password-command", "--target-password-command"];

/// A command that has begun.
pub struct Begun {
    recorder: Recorder,
    id: String,
}

impl Begun {
    /// Writes down that a command begins, with the arguments of this process.
    pub fn now(recorder: &Recorder, command: &str) -> Begun {
        let arguments: Vec<String> =
            std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
        let mut arguments = without_secrets(&arguments);
        if arguments.first().is_some_and(|first| first == command) {
            arguments.remove(0);
        }
        let what = What::Command {
            command: command.to_owned(),
            arguments,
            user: user(),
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            pid: std::process::id(),
        };
        Begun { recorder: recorder.clone(), id: recorder.write(what, true) }
    }

    /// Writes down how it ended.
    pub fn ended(self, error: Option<&Error>) {
        // `clean` has removed it, and a file is not to be made anew.
        if !self.recorder.path().parent().is_some_and(Path::is_dir) || !self.recorder.path().exists() {
            return;
        }
        self.recorder.write_counts();
        let exit = error.map_or(0, |error| error.kind().exit_code());
        self.recorder.write(What::Outcome { of: self.id, exit, error: error.map(ToString::to_string) }, true);
    }
}

/// The operating system's name for whoever runs this, and for whom `sudo` runs it.
fn user() -> String {
    let id = rustix::process::getuid().as_raw();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    });
    let name = name.unwrap_or_else(|| format!("uid {id}"));
    match std::env::var("SUDO_USER") {
        Ok(real) if id == 0 && real != name => format!("{name} (sudo by {real})"),
        _ => name,
    }
}

fn without_secrets(arguments: &[String]) -> Vec<String> {
    let mut shown = Vec::new();
    let mut before: Option<&str> = None;
    for argument in arguments {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (Some(name), value),
            _ => (before, argument.as_str()),
        };
        let hidden = match name {
            Some(name) if CONNECTIONS.contains(&name) => Some(place(value)),
            Some(name) if COMMANDS.contains(&name) => Some("(a command)".to_owned()),
            // A slip of the fingers puts one where none belongs.
            _ if value.contains("://") || value.to_lowercase().contains("password") && value.contains('=') => {
                Some(place(value))
            }
            _ => None,
        };
        shown.push(match hidden {
            Some(hidden) if argument.starts_with("--") => format!("{}={hidden}", name.unwrap_or_default()),
            Some(hidden) => hidden,
            None => argument.clone(),
        });
        before = Some(argument.as_str());
    }
    shown
}

/// Where a connection string leads, and nothing else of it.
fn place(text: &str) -> String {
    ConnectionSpec::parse(text).map_or_else(|_| "(a connection string)".to_owned(), |spec| spec.describe())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i10_no_secret_is_in_the_arguments() {
        let arguments = [
            "migrate",
            "--source",
            "postgres://app:hunter2@old:5433/shop",
            "--target=host=new user=app password=hunter2 dbname=shop",
            "--source-password-command",
            "echo hunter2",
            "--target-password-command=echo hunter2",
            "--dir",
            "/var/lib/x",
            "--sauce=postgres://app:hunter2@old/shop",
            "host=new password=hunter2",
            "--copy-jobs=3",
        ]
        .map(str::to_owned);
        let shown = without_secrets(&arguments);
        assert!(!shown.iter().any(|argument| argument.contains("hunter2")), "{shown:?}");
        assert!(shown[2].contains("old:5433") && shown[3].contains("new"), "{shown:?}");
        assert_eq!(&shown[7..9], ["--dir", "/var/lib/x"]);
        assert_eq!(shown[11], "--copy-jobs=3");
    }
}
