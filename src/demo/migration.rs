//! The migration as a stranger runs it: the real binary, its real commands, its documented JSON.
//!
//! Nothing here looks inside walferry. What it prints goes to files, so that a failure can show its last words.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::server::tail;
use crate::error::{Context, Error, ErrorKind, Result};

/// How long one of the short commands may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a command's end is looked for.
const POLL: Duration = Duration::from_millis(20);
/// The exit code of a cutover that was given up (`ErrorKind::Aborted`).
const ABORTED: i32 = 5;

/// What `walferry status --json` says, as far as the demo wants to know. What is absent counts as zero.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Status {
    /// `preparing`, `copying`, `indexing`, `catching_up`, `following`, …
    pub phase: String,
    /// Whether a cutover could begin now.
    pub ready_to_cutover: bool,
    /// What is in the way of a cutover; texts or objects.
    #[serde(deserialize_with = "null_as_default")]
    pub blockers: Vec<Value>,
    /// How far the target is behind.
    #[serde(deserialize_with = "null_as_default")]
    pub lag: Lag,
    /// How far the copy is.
    #[serde(deserialize_with = "null_as_default")]
    pub copy: CopyProgress,
    /// Why the migration has failed, if it has; a text or an object.
    pub error: Value,
}

/// How far the target is behind the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Lag {
    /// In bytes of the source's WAL, when known.
    pub bytes: Option<f64>,
    /// In seconds, when known.
    pub seconds: Option<f64>,
}

/// How far the copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct CopyProgress {
    /// Tables copied to the end.
    #[serde(deserialize_with = "null_as_default")]
    pub tables_done: u64,
    /// All tables.
    #[serde(deserialize_with = "null_as_default")]
    pub tables_total: u64,
    /// Rows copied.
    #[serde(deserialize_with = "null_as_default")]
    pub rows_done: u64,
    /// Bytes copied.
    #[serde(deserialize_with = "null_as_default")]
    pub bytes_done: u64,
}

/// What `walferry cutover --json` says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Cutover {
    /// From the fence to the release.
    pub downtime_ms: f64,
    /// The source's position at the switch.
    pub cutover_lsn: Value,
    /// Each step with its time.
    #[serde(deserialize_with = "null_as_default")]
    pub steps: Vec<Step>,
    /// How many sequences were set; a number or a list.
    pub sequences_synced: Value,
    /// What was verified under the fence.
    pub verified: Value,
    /// The way back, if one was armed.
    pub reverse: Value,
}

/// One step of a cutover.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// Its milliseconds.
    pub ms: f64,
}

impl Cutover {
    /// Whether a way back is armed, so that `finish` must end it.
    pub fn reverse_is_armed(&self) -> bool {
        match &self.reverse {
            Value::Null => false,
            Value::Bool(armed) => *armed,
            Value::String(state) => state == "armed" || state == "running",
            Value::Object(fields) => fields.get("armed").and_then(Value::as_bool).unwrap_or(!fields.is_empty()),
            _ => true,
        }
    }
}

/// A running `walferry migrate`; dropping it kills it.
#[derive(Debug)]
pub struct Migration {
    program: PathBuf,
    /// The state directory.
    state: PathBuf,
    /// Where the outputs of all commands are kept.
    outputs: PathBuf,
    child: Child,
}

impl Migration {
    /// Starts `walferry migrate`. `directory` must exist; the state directory and all outputs go below it.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start(program: &Path, source_url: &str, target_url: &str, directory: &Path) -> Result<Migration> {
        let state = directory.join("state");
        let mut command = prepare(program, directory, "migrate")?;
        // Any free port, since another migration may have the usual one.
        command.args(["migrate", "--source", source_url, "--target", target_url, "--http-addr", "127.0.0.1:0"]);
        let child = command.arg("--dir").arg(&state).spawn().context(|| format!("running {}", program.display()))?;
        Ok(Migration { program: program.to_owned(), state, outputs: directory.to_owned(), child })
    }

    /// Where the migration stands, or nothing as long as it cannot say.
    ///
    /// # Errors
    /// When `migrate` has ended or says that it has failed, with its last words.
    pub async fn status(&mut self) -> Result<Option<Status>> {
        if let Some(status) = self.child.try_wait()? {
            return Err(self.failure(format!("walferry migrate ended with {status} before the cutover")));
        }
        let (exit, text) = self.command(&["status"], &["--json"]).await?;
        let Ok(status) = serde_json::from_str::<Status>(&text) else {
            // The state directory is not there in the first moment. From then on it must be JSON.
            return if exit.success() {
                Err(self.failure(format!("walferry status --json printed something else: {}", text.trim())))
            } else {
                Ok(None)
            };
        };
        if status.phase == "failed" {
            return Err(self.failure(format!("the migration has failed: {}", plain(&status.error))));
        }
        Ok(Some(status))
    }

    /// Runs `walferry cutover`, up to three times when it is given up. Returns it with the number of attempts.
    ///
    /// # Errors
    /// When it fails, with its last words.
    pub async fn cutover(&mut self) -> Result<(Cutover, u32)> {
        const ATTEMPTS: u32 = 3;
        for attempt in 1.. {
            let (exit, text) = self.command(&["cutover"], &["--yes", "--json"]).await?;
            if exit.success() {
                let cutover = serde_json::from_str(&text).map_err(|error| {
                    self.failure(format!("walferry cutover --json printed something else ({error}): {}", text.trim()))
                })?;
                return Ok((cutover, attempt));
            }
            if exit.code() != Some(ABORTED) || attempt == ATTEMPTS {
                let message = format!("walferry cutover ended with {exit} at attempt {attempt}: {}", text.trim());
                return Err(self.failure(format!("{message}\n{}", tail(&self.outputs.join("cutover.stderr"), 20))));
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        // The loop ends by one of its returns; this is for the compiler.
        Err(self.failure("walferry cutover was not tried".to_owned()))
    }

    /// Ends the way back if there is one, waits for the end of `migrate`, and runs `walferry clean`.
    ///
    /// # Errors
    /// When one of them fails, with its last words.
    pub async fn finish_and_clean(&mut self, reverse_is_armed: bool) -> Result<()> {
        if reverse_is_armed {
            self.must("finish", &[]).await?;
        }
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        let exit = loop {
            match self.child.try_wait()? {
                Some(exit) => break exit,
                None if Instant::now() > deadline => {
                    return Err(self.failure("walferry migrate did not end after the cutover".to_owned()));
                }
                None => tokio::time::sleep(POLL).await,
            }
        };
        if !exit.success() {
            return Err(self.failure(format!("walferry migrate ended with {exit} after the cutover")));
        }
        self.must("clean", &[]).await
    }

    async fn must(&mut self, command: &str, options: &[&str]) -> Result<()> {
        let (exit, text) = self.command(&[command], options).await?;
        if exit.success() {
            return Ok(());
        }
        let last_words = tail(&self.outputs.join(format!("{command}.stderr")), 20);
        Err(self.failure(format!("walferry {command} ended with {exit}: {}\n{last_words}", text.trim())))
    }

    /// Runs a short command on the state directory; its exit status, and its standard output.
    async fn command(&self, command: &[&str], options: &[&str]) -> Result<(ExitStatus, String)> {
        let name = command.join(" ");
        let doing = || format!("running walferry {name}");
        let mut process = prepare(&self.program, &self.outputs, &name).context(doing)?;
        process.args(command).arg("--dir").arg(&self.state).args(options).stdout(Stdio::piped());
        let mut process = tokio::process::Command::from(process);
        // Not `output()`, which would take standard error away from its file.
        let child = process.kill_on_drop(true).spawn().context(doing)?;
        let output = tokio::time::timeout(COMMAND_TIMEOUT, child.wait_with_output());
        let late = |_| Error::new(ErrorKind::Other, format!("walferry {name} did not end within {COMMAND_TIMEOUT:?}"));
        let output = output.await.map_err(late)?.context(doing)?;
        Ok((output.status, String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    /// An error with what `migrate` said last.
    pub fn failure(&self, what: String) -> Error {
        let last_words = tail(&self.outputs.join("migrate.stderr"), 20);
        Error::new(ErrorKind::Other, format!("{what}\n--- walferry migrate said last:\n{last_words}"))
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // It gets a moment to end its own children before it is killed.
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(3);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What is not known yet may be absent, or null.
fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(value: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// A text as it is, anything else as JSON.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The program with its outputs in files, out of reach of the terminal's Ctrl-C and of the caller's own settings.
fn prepare(program: &Path, outputs: &Path, name: &str) -> Result<Command> {
    let file = |kind: &str| {
        let path = outputs.join(format!("{name}.{kind}"));
        File::create(&path).context(|| format!("making {}", path.display()))
    };
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(file("stdout")?).stderr(file("stderr")?).process_group(0);
    let own = ["WALFERRY_SOURCE", "WALFERRY_TARGET", "WALFERRY_DIR", crate::settings::VARIABLE];
    for variable in own.into_iter().chain(["PGOPTIONS", "PGSERVICE", "PGSSLMODE"]) {
        command.env_remove(variable);
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program that answers like walferry, written as the body of a shell script; `$1` is the command.
    fn impostor(directory: &Path, body: &str) -> Migration {
        let program = directory.join("walferry");
        fs::write(&program, format!("#!/bin/sh\ncd \"$(dirname \"$0\")\"\n{body}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Migration::start(&program, "postgres://source", "postgres://target", directory).unwrap()
    }

    #[tokio::test]
    async fn the_commands_and_their_json_are_the_documented_ones() {
        let directory = tempfile::tempdir().unwrap();
        let mut migration = impostor(
            directory.path(),
            r#"echo "$@" >> calls
               case $1 in
               migrate) while [ ! -e finished ]; do sleep 0.02; done ;;
               status) echo '{"version":1,"phase":"copying","ready_to_cutover":false,"blockers":["the copy runs"],
                              "lag":{"bytes":12,"seconds":null},"copy":{"rows_done":5,"tables_total":3,"bytes_total":null,"bytes_done":null},"error":null}' ;;
               cutover) [ -e tried ] && echo '{"downtime_ms":41.5,"steps":[{"name":"fence","ms":7}],"reverse":{"armed":true}}' && exit
                        touch tried; exit 5 ;;
               finish) touch finished ;;
               esac"#,
        );
        let status = migration.status().await.unwrap().unwrap();
        assert_eq!((status.phase.as_str(), status.ready_to_cutover, status.copy.rows_done), ("copying", false, 5));
        assert_eq!((status.lag.bytes, status.lag.seconds), (Some(12.0), None));
        let (cutover, attempts) = migration.cutover().await.unwrap();
        assert_eq!((cutover.downtime_ms, attempts), (41.5, 2));
        assert_eq!(cutover.steps, [Step { name: "fence".to_owned(), ms: 7.0 }]);
        assert!(cutover.reverse_is_armed());
        migration.finish_and_clean(true).await.unwrap();

        let state = directory.path().join("state");
        let calls = fs::read_to_string(directory.path().join("calls")).unwrap();
        let expected = format!(
            "migrate --source postgres://source --target postgres://target --http-addr 127.0.0.1:0 --dir {state}\n\
             status --dir {state} --json\ncutover --dir {state} --yes --json\ncutover --dir {state} --yes --json\n\
             finish --dir {state}\nclean --dir {state}\n",
            state = state.display()
        );
        // `migrate` runs beside all others; only their order is known.
        let (beside, in_order): (Vec<&str>, Vec<&str>) = calls.lines().partition(|call| call.starts_with("migrate"));
        assert_eq!([beside, in_order].concat().join("\n") + "\n", expected);
    }

    #[tokio::test]
    async fn a_migration_that_ends_early_is_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let mut migration = impostor(directory.path(), "echo 'error: wal_level is replica' >&2; exit 3");
        migration.child.wait().unwrap();
        let error = migration.status().await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("wal_level is replica"), "{error}");
    }

    #[tokio::test]
    async fn a_cutover_that_keeps_failing_is_an_error_with_its_last_words() {
        let directory = tempfile::tempdir().unwrap();
        let mut migration =
            impostor(directory.path(), "[ $1 = migrate ] && exec sleep 60; echo 'somebody writes on' >&2; exit 1");
        let error = migration.cutover().await.unwrap_err().to_string();
        assert!(error.contains("exit status: 1 at attempt 1") && error.contains("somebody writes on"), "{error}");
        let pid = Pid::from_raw(migration.child.id().cast_signed()).unwrap();
        drop(migration);
        assert!(rustix::process::test_kill_process(pid).is_err(), "migrate does not outlive its owner");
    }

    #[test]
    fn a_way_back_is_recognised_in_every_shape() {
        for (reverse, armed) in [
            ("null", false),
            ("false", false),
            ("true", true),
            ("\"armed\"", true),
            ("\"none\"", false),
            (r#"{"armed":false}"#, false),
            (r#"{"slot":"walferry_reverse"}"#, true),
        ] {
            let cutover: Cutover = serde_json::from_str(&format!("{{\"reverse\":{reverse}}}")).unwrap();
            assert_eq!(cutover.reverse_is_armed(), armed, "{reverse}");
        }
    }
}
