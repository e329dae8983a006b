//! Commands about the program itself: its settings file, its completions, its manual. They ask no server and no migration.

use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{print, print_exactly, print_json};
use crate::cli::{self, Cli};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::settings;

/// `walferry config`.
pub(super) fn config(options: cli::ConfigOptions) -> Result<()> {
    let (file, json) = match options.what {
        cli::ConfigCommand::Example => return print_exactly(&settings::example(&Cli::command())),
        cli::ConfigCommand::Check { file, json } => (file, json),
    };
    let report = settings::check(&Cli::command(), &file)?;
    if json {
        print_json(&report)?
    } else {
        print(&format!("{report}\n"))?
    }
    if report.ok {
        return Ok(());
    }
    let hint = "Mend what is named above, and check again.";
    Err(Error::new(ErrorKind::Usage, "the settings file cannot be used").hint(hint))
}

/// `walferry completions`.
pub(super) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "walferry", &mut script);
    print_exactly(&String::from_utf8_lossy(&script))
}

/// `walferry man`: one page on standard output, or all of them as files.
pub(super) fn man(options: &cli::ManOptions) -> Result<()> {
    let mut program = Cli::command();
    program.build();
    let Some(directory) = &options.out else {
        let page = match &options.command {
            None => page(&program, "walferry")?,
            Some(name) => {
                let command = program.find_subcommand(name).ok_or_else(|| {
                    Error::new(ErrorKind::Usage, format!("there is no command `{name}`"))
                        .hint("`walferry help` names them all.")
                })?;
                page(command, &format!("walferry-{name}"))?
            }
        };
        return print_exactly(&page);
    };
    std::fs::create_dir_all(directory).context(|| format!("making {}", directory.display()))?;
    write_page(directory, &program, "walferry")?;
    for command in program.get_subcommands().filter(|command| command.get_name() != "help") {
        write_page(directory, command, &format!("walferry-{}", command.get_name()))?;
    }
    Ok(())
}

fn write_page(directory: &Path, command: &Command, name: &str) -> Result<()> {
    let path = directory.join(format!("{name}.1"));
    std::fs::write(&path, page(command, name)?).context(|| format!("writing {}", path.display()))
}

/// A page for `man`. What stands below the options, examples above all, keeps its lines.
fn page(command: &Command, name: &str) -> Result<String> {
    let below = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .manual("walferry")
        .source(Cli::command().render_version().trim());
    let mut page = Vec::new();
    let rendered = (|| {
        man.render_title(&mut page)?;
        man.render_name_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
        if command.has_subcommands() {
            man.render_subcommands_section(&mut page)?;
        }
        std::io::Result::Ok(())
    })();
    rendered.context(|| format!("writing the manual page of {name}"))?;
    let mut page = String::from_utf8_lossy(&page).into_owned();
    page.push_str(".SH EXAMPLES AND MORE\n.nf\n");
    for line in below.lines() {
        page.push_str(&format!("\\&{}\n", line.replace('\\', "\\e").replace('-', "\\-")));
    }
    page.push_str(".fi\n");
    // Not every roff reads UTF-8.
    let ascii = |letter: char| {
        if letter.is_ascii() { letter.to_string() } else { format!("\\[u{:04X}]", u32::from(letter)) }
    };
    Ok(page.chars().map(ascii).collect())
}
