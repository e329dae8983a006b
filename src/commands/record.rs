//! Which commands go into the record, and where that is.

use std::sync::OnceLock;

use crate::cli::{self, Command};
use crate::databases::overview::Overview;
use crate::record::Recorder;
use crate::record::command::Begun;
use crate::state_directory::StateDirectory;

/// Where this process writes down what it does to the servers.
static RECORD: OnceLock<Recorder> = OnceLock::new();

/// Writes down that a command begins that changes something, where there is a state directory for it.
pub(super) fn begin(command: &Command) -> Option<Begun> {
    let (name, directory) = match command {
        Command::Migrate(options) if !options.schema_only => ("migrate", &options.migrate.directory.dir),
        Command::Resync(options) => ("resync", &options.directory.dir),
        Command::Cutover(options) if !options.switch.dry_run => ("cutover", &options.switch.directory.dir),
        Command::Switchback(options) if !options.dry_run => ("switchback", &options.directory.dir),
        Command::Finish(options) => ("finish", &options.directory.dir),
        Command::Pause(options) => ("pause", &options.directory.dir),
        Command::Resume(options) => ("resume", &options.directory.dir),
        Command::Tune(options) => ("tune", &options.directory.dir),
        Command::Verify(cli::Verify { dir: Some(dir), .. }) => ("verify", dir),
        Command::Repair(options) => ("repair", &options.directory.dir),
        Command::Clean(cli::Clean { dir: Some(dir), .. }) => ("clean", dir),
        _ => return None,
    };
    let begins = matches!(name, "migrate" | "resync");
    // The command itself says what is wrong with it.
    let is_ours = StateDirectory::at(directory).identity().is_ok_and(|identity| identity.is_some())
        || Overview::of(directory).is_ok_and(|overview| overview.is_some());
    if !is_ours && !begins {
        return None;
    }
    let recorder = RECORD.get_or_init(|| Recorder::at(directory));
    if is_ours {
        recorder.open();
    }
    Some(Begun::now(recorder, name))
}

/// Where this process writes down what it does to the servers, if anywhere.
pub(super) fn ours() -> Option<&'static Recorder> {
    RECORD.get()
}
