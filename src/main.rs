//! The program: reads the command line, runs the command, says what went wrong, exits with the documented code.

use std::process::ExitCode;

use clap::Parser;
use walferry::cli::Cli;
use walferry::commands;
use walferry::error::{Error, ErrorKind};

#[tokio::main]
async fn main() -> ExitCode {
    // As a task, not in this thread: otherwise a worker hears of each message of a server, and has to wake this thread for it.
    let command = tokio::spawn(commands::run(Cli::parse()));
    let outcome =
        command.await.unwrap_or_else(|error| Err(Error::new(ErrorKind::Other, format!("this is a bug: {error}"))));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", for_terminal(&error.to_string()));
            if let Some(next) = error.next_step() {
                eprintln!(" next: {}", for_terminal(next));
            }
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// A name in an error may hold escape sequences; line breaks are ours too.
fn for_terminal(text: &str) -> String {
    text.split('\n').map(walferry::observe::format::printable).collect::<Vec<_>>().join("\n")
}
