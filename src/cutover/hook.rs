//! The operator's commands: what they get to know, how long they may take.
//!
//! A command gets the names of both servers in its environment, and the passwords in a file in memory that only this user can
//! open and that is gone with the command (I10). It is a process group of its own, killed when it takes too long.

use std::os::fd::{AsFd, AsRawFd};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::connection::{ConnectionSpec, Disclosed, ProcessGroup, memory_file, without_secrets};
use crate::error::{Context, Error, ErrorKind, Result};

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Fence,
    Switch,
    Abort,
}

impl Hook {
    /// As `WALFERRY_HOOK` has it.
    fn name(self) -> &'static str {
        match self {
            Hook::Fence => "on-fence",
            Hook::Switch => "on-switch",
            Hook::Abort => "on-abort",
        }
    }
}

/// What the commands of one cutover get to know of the servers.
pub(super) struct Surroundings {
    source: Disclosed,
    target: Disclosed,
}

impl Surroundings {
    /// Asked for before applications wait: a password can come from a command that takes its time. One that cannot be had is left out.
    pub(super) async fn gather(source: &ConnectionSpec, target: &ConnectionSpec) -> Surroundings {
        let (source, target) = tokio::join!(source.disclosed(), target.disclosed());
        Surroundings { source, target }
    }

    fn variables(&self) -> Vec<(String, String)> {
        let mut variables = Vec::new();
        for (side, server) in [("SOURCE", &self.source), ("TARGET", &self.target)] {
            for (name, value) in
                [("HOST", &server.host), ("PORT", &server.port), ("DATABASE", &server.database), ("USER", &server.user)]
            {
                variables.push((format!("WALFERRY_{side}_{name}"), value.clone()));
            }
        }
        variables
    }

    /// Assignments that a shell can read: `. "$WALFERRY_CONNECTION_FILE"`.
    fn secrets(&self) -> String {
        let mut text = String::new();
        for (side, server) in [("SOURCE", &self.source), ("TARGET", &self.target)] {
            text.push_str(&format!("WALFERRY_{side}_URL={}\n", shell_quoted(&server.url)));
            if let Some(password) = &server.password {
                text.push_str(&format!("WALFERRY_{side}_PASSWORD={}\n", shell_quoted(password)));
            }
        }
        text
    }
}

/// One word for a POSIX shell, whatever is in it.
fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Runs a command. What it prints goes to our standard error, and nowhere else.
///
/// # Errors
/// When it cannot be run, ends with another code than 0, or takes longer than `time_max`.
pub(super) async fn run(
    hook: Hook,
    command: &str,
    time_max: Duration,
    cutover: &str,
    around: &Surroundings,
) -> Result<()> {
    let failed = |problem: String| Error::new(ErrorKind::Other, format!("the command of --{} {problem}", hook.name()));
    let file = memory_file(&around.secrets()).context(|| "making a file in memory for a command".into())?;
    let to_our_log = || -> Result<Stdio> { Ok(Stdio::from(std::io::stderr().as_fd().try_clone_to_owned()?)) };
    let mut process = Command::new("sh");
    process.arg("-c").arg(command).stdin(Stdio::null()).stdout(to_our_log()?).stderr(Stdio::inherit());
    without_secrets(&mut process)
        .envs(around.variables())
        .env("WALFERRY_HOOK", hook.name())
        .env("WALFERRY_CUTOVER_ID", cutover)
        .env("WALFERRY_CONNECTION_FILE", format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
        .process_group(0);
    let mut child = process.spawn().map_err(|error| failed(format!("cannot be run: {error}")))?;
    // Killed as a whole when the time is up, and when we are told to stop.
    let group = ProcessGroup::of(&child);
    let ended = tokio::time::timeout(time_max, child.wait()).await;
    let status = ended
        .map_err(|_| failed(format!("did not end within {} s and was killed", time_max.as_secs_f64())))?
        .map_err(|error| failed(format!("cannot be waited for: {error}")))?;
    // It has ended by itself: what it left running is its own affair.
    group.let_be();
    if status.success() { Ok(()) } else { Err(failed(format!("ended with {status}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around() -> Surroundings {
        let server = |name: &str, password: &str| Disclosed {
            host: name.into(),
            port: "5432".into(),
            database: "shop".into(),
            user: "admin".into(),
            password: Some(password.into()),
            url: format!("postgresql://admin:x@{name}/shop"),
        };
        Surroundings { source: server("old", "it's $HOME"), target: server("new", "b\\`") }
    }

    async fn run_here(command: &str, time_max: Duration) -> Result<()> {
        run(Hook::Switch, command, time_max, "7-7", &around()).await
    }

    #[tokio::test]
    async fn a_command_gets_names_in_its_environment_and_passwords_in_a_file_that_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let (seen, read) = (directory.path().join("seen"), directory.path().join("read"));
        let command = format!(
            "env > '{}'; . \"$WALFERRY_CONNECTION_FILE\"; stat -Lc %a \"$WALFERRY_CONNECTION_FILE\" > '{1}'; \
             printf '%s\\n' \"$WALFERRY_SOURCE_PASSWORD\" \"$WALFERRY_TARGET_PASSWORD\" \"$WALFERRY_TARGET_URL\" >> '{1}'",
            seen.display(),
            read.display()
        );
        run_here(&command, Duration::from_secs(60)).await.unwrap();
        let seen = std::fs::read_to_string(seen).unwrap();
        for expected in [
            "WALFERRY_HOOK=on-switch",
            "WALFERRY_CUTOVER_ID=7-7",
            "WALFERRY_SOURCE_HOST=old",
            "WALFERRY_TARGET_HOST=new",
            "WALFERRY_TARGET_PORT=5432",
            "WALFERRY_SOURCE_DATABASE=shop",
            "WALFERRY_SOURCE_USER=admin",
        ] {
            assert!(seen.lines().any(|line| line == expected), "{expected} in {seen}");
        }
        assert!(!seen.contains("it's") && !seen.contains("b\\`"), "no password in the environment: {seen}");
        let read = std::fs::read_to_string(read).unwrap();
        assert_eq!(read, "600\nit's $HOME\nb\\`\npostgresql://admin:x@new/shop\n");
        let file = seen.lines().find_map(|line| line.strip_prefix("WALFERRY_CONNECTION_FILE=")).unwrap();
        assert!(!std::path::Path::new(file).exists() || !std::fs::read_to_string(file).unwrap().contains("PASSWORD"));
    }

    #[tokio::test]
    async fn what_fails_says_how_and_what_hangs_is_killed_with_its_children() {
        let error = run_here("echo secret >&2; exit 3", Duration::from_secs(60)).await.unwrap_err();
        assert!(error.to_string().contains("exit status: 3") && error.to_string().contains("--on-switch"), "{error}");
        assert!(!error.to_string().contains("secret"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let command = format!("sh -c 'echo $$ > \"{}\"; sleep 1000' & wait", file.path().display());
        let error = run_here(&command, Duration::from_millis(700)).await.unwrap_err();
        assert!(error.to_string().contains("was killed"), "{error}");
        let pid = std::fs::read_to_string(file.path()).unwrap();
        let Ok(pid) = pid.trim().parse::<u32>() else { return };
        for _ in 0..1000 {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            if stat.is_err() || stat.is_ok_and(|stat| stat.contains(") Z ")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("its child {pid} is still there");
    }
}
