//! The program: reads the command line, runs the command, says what went wrong, exits with the documented code.

use std::process::ExitCode;

use clap::Parser;
use walferry::cli::Cli;
use walferry::commands;

#[tokio::main]
async fn main() -> ExitCode {
    match commands::run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(next) = error.next_step() {
                eprintln!(" next: {next}");
            }
            ExitCode::from(error.kind().exit_code())
        }
    }
}
