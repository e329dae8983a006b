use std::ffi::OsString;

use clap::{CommandFactory, Parser};

use super::check::report;
use super::*;
use crate::cli::{self, Cli};

const BOTH: &str = "source = 'postgres://a@old/shop'\ntarget = 'postgres://a@new/shop'\ndir = '/state'\n";

/// A file with a text, gone with the directory.
fn file(text: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("walferry.toml");
    std::fs::write(&path, text).unwrap();
    (directory, path.to_str().unwrap().to_owned())
}

fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

/// What a command line comes to with a file, and with these variables.
fn with(text: &str, typed: &str, variables: &[(&str, &str)]) -> Result<Arguments> {
    let (_directory, path) = file(text);
    let mut typed = words(&format!("walferry {typed}"));
    typed.push("--config".into());
    typed.push(path.into());
    let environment =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
    arguments_with(&Cli::command(), typed, &environment)
}

fn parsed(text: &str, typed: &str) -> Cli {
    Cli::try_parse_from(with(text, typed, &[]).unwrap().all).unwrap()
}

fn migrate(cli: Cli) -> cli::MigrateAgain {
    match cli.command {
        cli::Command::Migrate(options) => options,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_stands_in_for_what_was_not_typed() {
    let text = format!(
        "{BOTH}log_format = 'json'\n[migrate]\ncopy-jobs = 7\nqueue_keep = '2h'\nroles = true\nno-reverse = false\ninclude-table = ['a.*', 'b.*']\n"
    );
    let cli = parsed(&text, "migrate --queue-keep 3h");
    assert_eq!(cli.log_format, crate::observe::logging::LogFormat::Json);
    let options = migrate(cli).migrate;
    assert_eq!(options.servers.source.as_deref(), Some("postgres://a@old/shop"));
    assert_eq!(options.directory.dir.to_str(), Some("/state"));
    assert_eq!((options.parallelism.copy_jobs, options.queue_keep.as_secs()), (Some(7), 3 * 3600));
    assert!(options.roles.roles && !options.no_reverse);
    assert_eq!(options.filters.include_table, ["a.*", "b.*"]);
}

#[test]
fn the_command_line_wins_over_the_environment_and_that_over_the_file() {
    let dir =
        |arguments: Arguments| arguments.all.iter().filter(|word| word.to_string_lossy().starts_with("--dir")).count();
    assert_eq!(dir(with(BOTH, "status", &[]).unwrap()), 1);
    assert_eq!(
        dir(with(BOTH, "status", &[("WALFERRY_DIR", "/other")]).unwrap()),
        0,
        "clap reads the variable by itself"
    );
    let both = with(BOTH, "status --dir=/typed", &[("WALFERRY_DIR", "/other")]).unwrap();
    let Cli { command: cli::Command::Status(options), .. } = Cli::try_parse_from(both.all).unwrap() else { panic!() };
    assert_eq!(options.directory.dir.to_str(), Some("/typed"));
}

#[test]
fn the_variable_names_the_file_where_the_command_line_does_not() {
    let (_directory, path) = file(BOTH);
    let variable = |name: &str| (name == VARIABLE).then(|| OsString::from(&path));
    let arguments = arguments_with(&Cli::command(), words("walferry status"), &variable).unwrap();
    assert!(arguments.all.contains(&OsString::from("--dir=/state")), "{arguments:?}");
    // What explains the program must not fail for want of a good file.
    for typed in [
        "walferry status --help",
        "walferry migrate -h",
        "walferry config example",
        "walferry --version",
        "walferry help migrate",
    ] {
        let nowhere = |name: &str| (name == VARIABLE).then(|| OsString::from("/nowhere/walferry.toml"));
        assert_eq!(arguments_with(&Cli::command(), words(typed), &nowhere).unwrap().all, words(typed));
    }
}

#[test]
fn a_table_wins_over_the_top_and_a_list_that_was_typed_replaces_that_of_the_file() {
    let text = format!("{BOTH}copy-jobs = 2\nexclude-table = ['a']\n[migrate]\ncopy-jobs = 3\n");
    let options = migrate(parsed(&text, "migrate --exclude-table b")).migrate;
    assert_eq!(
        (options.parallelism.copy_jobs, options.filters.exclude_table.as_slice()),
        (Some(3), &["b".to_owned()][..])
    );
    let Cli { command: cli::Command::Check(options), .. } = parsed(&text, "check") else { panic!() };
    assert_eq!(
        (options.parallelism.copy_jobs, options.filters.exclude_table.as_slice()),
        (Some(2), &["a".to_owned()][..])
    );
}

#[test]
fn a_flag_of_the_file_can_be_taken_back_on_the_command_line() {
    let text = format!("{BOTH}[migrate]\nno-reverse = true\n");
    assert!(migrate(parsed(&text, "migrate")).migrate.no_reverse);
    assert!(!migrate(parsed(&text, "migrate --no-reverse=false")).migrate.no_reverse);
    assert!(migrate(parsed(BOTH, "migrate --no-reverse=true")).migrate.no_reverse);
}

#[test]
fn what_needs_or_excludes_another_option_does_so_from_the_file_too_and_the_line_is_named() {
    let text = format!("{BOTH}[migrate]\ndata-only = true\n");
    let arguments = with(&text, "migrate --schema-only", &[]).unwrap();
    let error = Cli::try_parse_from(&arguments.all).unwrap_err().to_string();
    assert!(error.contains("--schema-only") && error.contains("--data-only"), "{error}");
    let origins = arguments.origins(&error);
    assert!(
        origins.contains("--data-only comes from ") && origins.contains("line 5") && !origins.contains("--dir"),
        "{origins}"
    );

    let report =
        report(&Cli::command(), &File::of(Path::new("f"), "[migrate]\non-source-wal-max = 'drop-slot'\n").unwrap());
    assert!(report.findings.iter().any(|finding| finding.line == 2), "{report:?}");
    assert!(!report.ok);
}

#[test]
fn a_value_that_the_option_does_not_take_is_named_with_file_line_and_key() {
    for (line, said) in [
        ("copy-rate = 'fast'", "expected a size such as 512MiB"),
        ("timeout = '1 year'", "expected a duration such as"),
        ("copy-jobs = 0", "from 1 to 1000"),
        ("copy-jobs = true", "expected a text or a number, not true or false"),
        ("roles = 'yes'", "expected true or false, not a text or a number"),
        ("on-conflict = 'me'", "expected one of stop, source, target"),
        ("include-table = [['a']]", "expected a list of texts"),
        ("queue-keep = ['1h']", "expected a text or a number, not a list"),
        ("copy-job = 4", "Is it copy-jobs?"),
        ("copy_jobs = 4\ncopy-jobs = 5", "it stands in line 5 already"),
    ] {
        let error = with(&format!("{BOTH}[migrate]\n{line}\n"), "migrate", &[]).unwrap_err();
        let text = format!("{error} {}", error.next_step().unwrap_or_default());
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(
            text.contains(said) && text.contains("walferry.toml, line ") && text.contains("[migrate] "),
            "{line}: {text}"
        );
    }
    let error = with("source = 'postgres://a:geheim@old:port/shop'\n", "check", &[]).unwrap_err();
    assert!(error.to_string().contains("line 1: source") && !error.to_string().contains("geheim"), "{error}");
    let error = with("dir = '/state'\n\nthis is not = TOML\n", "status", &[]).unwrap_err();
    assert!(error.to_string().contains("line 3: this is no TOML"), "{error}");
}

#[test]
fn a_key_in_the_wrong_place_is_told_where_it_belongs() {
    let report = |text: &str| {
        let report = report(&Cli::command(), &File::of(Path::new("f"), text).unwrap());
        report
            .findings
            .into_iter()
            .map(|it| (it.line, format!("{} {}", it.text, it.hint.unwrap_or_default())))
            .collect::<Vec<_>>()
    };
    for (text, line, said) in [
        ("split-above = '1GiB'\n[migrat]\n", 2, "Is it [migrate]?"),
        ("seconds = 5\n", 1, "It belongs into [demo]"),
        ("[status]\ntimeout = '5s'\n", 2, "`status` has no such option"),
        ("[check]\nsplit_abov = 1\n", 2, "Is it split-above?"),
        ("[check]\nentirely-else = 1\n", 2, "config example"),
        ("config = 'other.toml'\n", 1, "no such option"),
    ] {
        let findings = report(text);
        assert!(findings.iter().any(|(at, what)| *at == line && what.contains(said)), "{text}: {findings:?}");
    }
    assert_eq!(report(BOTH), []);
    // A command is not kept from running by the table of another one.
    assert!(with(&format!("{BOTH}[demo]\nrow = 1\n"), "status", &[]).is_ok());
}

#[test]
fn it_is_known_whom_each_key_is_for() {
    let report =
        report(&Cli::command(), &File::of(Path::new("f"), "timeout = '20s'\n[cutover]\ntimeout = '10s'\n").unwrap());
    let commands: Vec<_> = report.settings.iter().map(|known| known.commands.join(" ")).collect();
    assert!(commands[0].contains("migrate") && commands[0].contains("switchback"), "{commands:?}");
    assert!(!commands[0].contains("cutover"), "its own table wins: {commands:?}");
    assert_eq!(commands[1], "cutover");
}

#[test]
fn a_password_in_a_file_that_others_can_read_is_warned_of_and_not_shown() {
    let text = "source = 'postgres://a:geheim@old/shop'\n";
    let mut read = File::of(Path::new("f"), text).unwrap();
    read.readable_by_others = true;
    let found = report(&Cli::command(), &read);
    assert!(found.ok && found.findings[0].text.contains("chmod 600"), "{found:?}");
    let shown = format!("{found} {}", serde_json::to_string(&found).unwrap());
    assert!(!shown.contains("geheim"), "{shown}");
    read.readable_by_others = false;
    assert!(report(&Cli::command(), &read).findings.is_empty());
    let command = Cli::command();
    let verify = command.find_subcommand("verify").unwrap();
    read.readable_by_others = true;
    assert_eq!(check::warnings(&command, verify, &read).len(), 1);
}

#[test]
fn the_example_names_every_option_once_and_each_of_its_values_is_one() {
    let program = Cli::command();
    let text = example(&program);
    assert!(File::of(Path::new("f"), &text).unwrap().entries.is_empty(), "it changes nothing as it is");
    let all: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with(' ') => format!("{setting}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let file = File::of(Path::new("f"), &all).unwrap();
    let found = report(&program, &file);
    // That some exclude each other is no fault of the values, and neither that a file is not there.
    let is_no_fault =
        |text: &str| text.contains("cannot be used with") || text.contains("Name a file that can be read");
    let wrong: Vec<_> = found.findings.iter().filter(|finding| !is_no_fault(&finding.text)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    for command in commands(&program) {
        for option in options(&program, command) {
            let long = option.get_long().unwrap();
            let found = file
                .entries
                .iter()
                .filter(|entry| entry.key == long)
                .filter(|entry| entry.table.as_deref().is_none_or(|table| table == command.get_name()));
            assert_eq!(found.count(), 1, "--{long} of {}", command.get_name());
        }
    }
}
