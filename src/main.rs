//! The program: reads the command line, runs the command, says what went wrong, exits with the documented code.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use walferry::cli::{self, Cli};
use walferry::error::{Error, ErrorKind};
use walferry::observe::locale;
use walferry::observe::logging::wants_colour;
use walferry::settings::Arguments;
use walferry::{commands, settings};

/// What a thread that runs tasks has for its calls. The states of a migration lie in each other, and a build without optimisation keeps
/// several copies of each on its way there: the usual 2 MiB were too few for it. Only what is used takes memory.
const STACK_BYTES: usize = 16 << 20;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(STACK_BYTES).build();
    match runtime {
        Ok(runtime) => runtime.block_on(run()),
        Err(error) => failed(&Error::new(ErrorKind::Other, format!("the threads of this process: {error}"))),
    }
}

async fn run() -> ExitCode {
    let arguments = match settings::arguments(&Cli::command(), cli::by_pieces(std::env::args_os().collect())) {
        Ok(arguments) => arguments,
        Err(error) => return failed(&error),
    };
    let mut cli = Cli::try_parse_from(&arguments.all).unwrap_or_else(|error| wrong_usage(&error, &arguments));
    cli.warnings = arguments.warnings;
    // As a task, not in this thread: otherwise a worker hears of each message of a server, and has to wake this thread for it.
    let command = tokio::spawn(commands::run(cli));
    let outcome =
        command.await.unwrap_or_else(|error| Err(Error::new(ErrorKind::Other, format!("this is a bug: {error}"))));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Says what went wrong and what to do next.
fn failed(error: &Error) -> ExitCode {
    eprintln!("error: {}", for_terminal(&error.to_string()));
    if let Some(next) = error.next_step() {
        eprintln!(" next: {}", for_terminal(next));
    }
    ExitCode::from(error.kind().exit_code())
}

/// What clap says of a wrong command line, without the passwords that may stand in it: it repeats what it does not understand.
fn wrong_usage(error: &clap::Error, arguments: &Arguments) -> ! {
    if !error.use_stderr() {
        // The help, and the version.
        error.exit();
    }
    let styled = error.render();
    let mut text =
        if std::io::stderr().is_terminal() && wants_colour() { styled.ansi().to_string() } else { styled.to_string() };
    for argument in &arguments.all {
        let argument = argument.to_string_lossy();
        let value = argument.split_once('=').map_or("", |(_, value)| value);
        for part in [&argument, value] {
            if part.contains("://") || part.contains("password") && part.contains('=') {
                text = text.replace(part, "(a connection string)");
            }
        }
    }
    let servers = error.get(clap::error::ContextKind::InvalidArg).map(ToString::to_string);
    if let (clap::error::ErrorKind::UnknownArgument, Some("--source" | "--target")) = (error.kind(), servers.as_deref())
    {
        // What is like it by its letters means something else.
        text.truncate(text.find("\n\n").map_or(text.len(), |end| end + 1));
        text.push_str(" next: Leave it out: the migration that runs in --dir knows both servers.\n");
    }
    eprint!("{text}{}", arguments.origins(&styled.to_string()));
    if error.kind() == clap::error::ErrorKind::MissingRequiredArgument && text.contains("--dir") {
        eprintln!(" next: Give --dir, or set WALFERRY_DIR; a settings file can hold it too (walferry config example).");
    }
    std::process::exit(i32::from(ErrorKind::Usage.exit_code()))
}

/// A name in an error may hold escape sequences; line breaks are ours too.
fn for_terminal(text: &str) -> String {
    let lines = text.split('\n').map(walferry::observe::format::printable).collect::<Vec<_>>().join("\n");
    locale::shown(&lines).into_owned()
}
