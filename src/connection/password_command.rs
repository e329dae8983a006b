//! The command that prints a password: for tokens that live for minutes only.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use super::child::without_secrets;
use crate::error::{Error, ErrorKind, Result};

/// A command that asks a token service takes seconds; one that waits for a person has none to answer it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// The longest tokens have some kilobytes; whatever prints more is not what was meant.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// What `sh` exits with when the command may not be executed, or is not there.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Runs a shell command, and answers what it prints, without the line break at its end.
///
/// What it prints on standard error goes to ours: it may be what the operator has to do. What it prints on standard output
/// goes nowhere else. It gets neither our passwords nor our standard input, and is a process group of its own, which is
/// killed when it takes too long or prints too much.
///
/// # Errors
/// As [`super::ConnectionSpec::with_password_command`] says.
pub(super) async fn run(command: &str, time_max: Duration) -> Result<String> {
    let mut process = Command::new("sh");
    process.arg("-c").arg(command).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    without_secrets(&mut process).process_group(0);
    let mut child = process.spawn().map_err(|error| wrong(format!("cannot be run: {error}")))?;
    let group = ProcessGroup::of(&child);
    let ended = tokio::time::timeout(time_max, async {
        let mut output = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            // One byte more than is allowed shows that there is more.
            stdout.take(OUTPUT_BYTES_MAX as u64 + 1).read_to_end(&mut output).await?;
        }
        let status = if output.len() > OUTPUT_BYTES_MAX { ExitStatus::default() } else { child.wait().await? };
        Ok::<_, std::io::Error>((output, status))
    });
    let (output, status) = ended
        .await
        .map_err(|_| failed(format!("did not end within {} s and was killed", time_max.as_secs_f32())))?
        .map_err(|error| failed(format!("cannot be waited for: {error}")))?;
    if output.len() > OUTPUT_BYTES_MAX {
        return Err(wrong(format!("printed more than {OUTPUT_BYTES_MAX} bytes and was killed")));
    }
    // It has ended by itself: what it has left running is its own affair.
    group.let_be();
    match status.code() {
        Some(0) => {}
        Some(NOT_EXECUTABLE | NOT_FOUND) => return Err(wrong(format!("cannot be run: it ended with {status}"))),
        _ => return Err(failed(format!("ended with {status}"))),
    }
    let password = String::from_utf8(output).map_err(|_| wrong("printed what is not UTF-8".to_owned()))?;
    let password = password.strip_suffix('\n').unwrap_or(&password);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() || password.contains('\0') {
        return Err(wrong("printed nothing that can be a password".to_owned()));
    }
    Ok(password.to_owned())
}

/// A process group, killed when this is dropped; the leader is not waited for before, so that the number is still its own.
pub(crate) struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    /// That of a child which was started as the leader of its own.
    pub(crate) fn of(leader: &Child) -> ProcessGroup {
        ProcessGroup(leader.id().and_then(|id| Pid::from_raw(id.cast_signed())))
    }

    /// What it left running is not killed.
    pub(crate) fn let_be(mut self) {
        self.0 = None;
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Gone already, as a rule.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// What may pass: a token service that does not answer.
fn failed(problem: String) -> Error {
    Error::new(ErrorKind::Transient, problem).hint(HINT)
}

/// What does not.
fn wrong(problem: String) -> Error {
    Error::new(ErrorKind::Usage, problem).hint(HINT)
}

const HINT: &str = "run it by hand: it has to print the password on its standard output and exit with 0";

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(command: &str) -> Error {
        run(command, Duration::from_millis(500)).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_password_is_what_is_printed_without_the_line_break_at_its_end() {
        for (printed, password) in [
            ("a b\n", "a b"),
            ("a", "a"),
            ("a\r\n", "a"),
            ("a\n\n", "a\n"),
            (" a \n", " a "),
            ("%s\\\"'`$é\n", "%s\\\"'`$é"),
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), printed).unwrap();
            let command = format!("cat '{}'", file.path().display());
            assert_eq!(run(&command, TIMEOUT).await.unwrap(), password, "{printed:?}");
        }
    }

    #[tokio::test]
    async fn what_fails_is_tried_again_and_what_cannot_work_is_not() {
        for (command, kind, text) in [
            ("echo secret; exit 3", ErrorKind::Transient, "exit status: 3"),
            ("kill -9 $$", ErrorKind::Transient, "signal: 9"),
            ("no-such-program-anywhere 2>/dev/null", ErrorKind::Usage, "cannot be run"),
            ("true", ErrorKind::Usage, "nothing that can be a password"),
            ("echo", ErrorKind::Usage, "nothing that can be a password"),
            ("printf 'a\\000b'", ErrorKind::Usage, "nothing that can be a password"),
            ("printf '\\377'", ErrorKind::Usage, "not UTF-8"),
        ] {
            let error = refused(command).await;
            assert_eq!(error.kind(), kind, "{command}: {error}");
            assert!(error.to_string().contains(text) && error.next_step().is_some(), "{command}: {error}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }

    #[tokio::test]
    async fn what_hangs_or_never_stops_printing_is_killed_with_its_children() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let child = |pid: &str| std::path::Path::new("/proc").join(pid).exists();
        for (command, text) in
            [("sleep 1000", "did not end"), ("yes", "printed more than"), ("exec 1>&-; sleep 1000", "did not end")]
        {
            // In a child of the shell, which leaves its number behind before anything else: it may be killed at once after that.
            let command = format!("sh -c 'echo $$ > \"{}\"; {command}' & wait", file.path().display());
            let error = refused(&command).await;
            assert!(error.to_string().contains(text), "{error}");
            let pid = std::fs::read_to_string(file.path()).unwrap();
            // On a busy machine it may have been killed before it began.
            let Ok(pid) = pid.trim().parse::<u32>() else { continue };
            // Its parent is dead: whoever inherits it takes a moment.
            let is_gone = || !child(&pid.to_string()) || is_zombie(&pid.to_string());
            for _ in 0..1000 {
                if is_gone() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert!(is_gone(), "the child {pid} of {command} is still there");
        }
    }

    fn is_zombie(pid: &str) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    }
}
