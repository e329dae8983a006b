//! The commands of the documentation, run as they stand: each document's blocks in its order, against servers of its own databases.
//!
//! | fence | what becomes of the block |
//! |---|---|
//! | ` ```sh ` | run to its end, which has to be a success |
//! | ` ```sh background ` | begun, and waited for at the document's end: what runs in another terminal |
//! | ` ```sh not-run: why ` | counted: what needs the reader's own machine |

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

mod support;

use std::path::Path;
use std::process::Stdio;

use clap::CommandFactory;
use walferry::observe::metrics::{self, Kind};

use support::{Servers, load, programs};

/// What stands in the documents for the reader's servers.
const SOURCE: &str = "postgres://admin@old-server/shop";
const TARGET: &str = "postgres://admin@new-server/shop";

#[derive(Debug, PartialEq)]
enum How {
    Run,
    Background,
    NotRun,
}

/// The shell blocks of a document.
fn blocks(document: &str) -> Vec<(How, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(How, String)> = None;
    for line in document.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(info)) => {
                let how = match info {
                    "sh" => Some(How::Run),
                    "sh background" => Some(How::Background),
                    _ if info.starts_with("sh not-run: ") => Some(How::NotRun),
                    _ if info.starts_with("sh") || info.starts_with("bash") => {
                        panic!("what is to become of ```{info}?")
                    }
                    _ => None,
                };
                // Text in another language is passed over with what is in it.
                open = Some((
                    how.unwrap_or(How::NotRun),
                    if info.starts_with("sh") { String::new() } else { "\0".into() },
                ));
            }
            (Some(_), Some(_)) => blocks.extend(open.take().filter(|(_, text)| !text.starts_with('\0'))),
            (Some((_, text)), None) => text.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    assert_eq!(open, None, "a block does not end");
    blocks
}

/// Runs a document; answers how many blocks were run and how many were not.
async fn run(servers: &Servers, name: &str) -> (usize, usize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let document = std::fs::read_to_string(&path).unwrap();
    let blocks = blocks(&document);
    let database = format!("docs {name}");
    let migration = servers.migration(&database).await;
    load::fill(&migration.source().await, 100).await;
    let files = migration.files();
    let settings = files.join("settings.toml");
    std::fs::write(&settings, "http-addr = \"off\"\nqueue-max-bytes = \"128MiB\"\nmax-write-stall = \"25s\"\n")
        .unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_walferry")).parent().unwrap();
    let path = format!("{}:{}:{}", ours.display(), programs().bin("").display(), std::env::var("PATH").unwrap());
    let shell = |text: &str, log: &str| {
        let text = text.replace(SOURCE, &migration.source_url).replace(TARGET, &migration.target_url);
        let output = std::fs::File::create(files.join(log)).unwrap();
        let mut command = tokio::process::Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", &text])
            .current_dir(&files)
            .env("PATH", &path)
            .env("HOME", &files)
            .env("WALFERRY_CONFIG", &settings)
            .env("WALFERRY_SOURCE", &migration.source_url)
            .env("WALFERRY_TARGET", &migration.target_url)
            .env("WALFERRY_DIR", migration.directory())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .kill_on_drop(true);
        command.spawn().unwrap()
    };
    let said = |log: &str| std::fs::read_to_string(files.join(log)).unwrap_or_default();
    let (mut background, mut ran, mut not_run) = (Vec::new(), 0, 0);
    for (number, (how, text)) in blocks.iter().enumerate() {
        let log = format!("block-{number}.log");
        match how {
            How::NotRun => not_run += 1,
            How::Background => {
                background.push((shell(text, &log), log));
                ran += 1;
            }
            How::Run => {
                let mut child = shell(text, &log);
                let ended = tokio::time::timeout(support::PATIENCE, child.wait()).await;
                let others: String = background.iter().map(|(_, log)| said(log)).collect();
                let ended =
                    ended.unwrap_or_else(|_| panic!("{name}: it does not end:\n{text}\n{}\n{others}", said(&log)));
                assert!(ended.unwrap().success(), "{name}:\n{text}\nsaid:\n{}\nbeside:\n{others}", said(&log));
                ran += 1;
            }
        }
    }
    for (mut child, log) in background {
        let ended = tokio::time::timeout(support::PATIENCE, child.wait()).await;
        assert!(ended.is_ok_and(|ended| ended.unwrap().success()), "{name}, in the background:\n{}", said(&log));
    }
    (ran, not_run)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_of_the_documents_can_be_typed_as_it_stands() {
    let servers = Servers::start().await;
    // Which there are, and how many blocks of each are run and not run: a new block is to be thought about.
    for (name, ran, not_run) in [("docs/guide.md", 8, 1), ("docs/cutover.md", 8, 2), ("docs/operations.md", 8, 0)] {
        assert_eq!(run(&servers, name).await, (ran, not_run), "{name}: blocks that are run, and not run");
    }
}

#[test]
fn every_document_is_run_or_has_nothing_to_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names: Vec<String> = vec!["README.md".into(), "CONTRIBUTING.md".into()];
    for entry in std::fs::read_dir(root.join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            names.push(format!("docs/{name}"));
        }
    }
    for name in names {
        let document = std::fs::read_to_string(root.join(&name)).unwrap();
        let run_elsewhere =
            ["docs/guide.md", "docs/cutover.md", "docs/operations.md", "docs/backfill.md"].contains(&name.as_str());
        let runs = blocks(&document).iter().filter(|(how, _)| *how != How::NotRun).count();
        assert!(run_elsewhere || runs == 0, "{name} has {runs} blocks that nobody runs");
        // What it leads to is there.
        for link in document.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            if file.starts_with("http") {
                continue;
            }
            let of = root.join(&name).parent().unwrap().join(file);
            let of = if file.is_empty() { root.join(&name) } else { of };
            assert!(of.exists(), "{name} leads to {link}, which is not there");
            if !anchor.is_empty() && of.is_file() {
                let text = std::fs::read_to_string(&of).unwrap();
                assert!(
                    anchors(&text).contains(&anchor.to_owned()),
                    "{name} leads to {link}, which has no such heading"
                );
            }
        }
    }
}

/// As GitHub makes them of headings.
fn anchors(document: &str) -> Vec<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let text = line.trim_start_matches('#').trim().to_lowercase();
            let kept = text.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
            kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
        })
        .collect()
}

#[test]
fn every_alert_has_a_place_in_the_runbook() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules = std::fs::read_to_string(root.join("dashboards/alerts.yml")).unwrap();
    let runbook = anchors(&std::fs::read_to_string(root.join("docs/operations.md")).unwrap());
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 10);
    for rule in alerts {
        let name = rule.lines().next().unwrap();
        let first = rule.lines().find_map(|line| line.trim().strip_prefix("runbook: ")).unwrap();
        let (_, anchor) = first
            .trim_matches('"')
            .rsplit_once("docs/operations.md#")
            .unwrap_or_else(|| panic!("{name} leads nowhere: {first}"));
        assert_eq!(anchor, name.to_lowercase(), "{name} leads to another's place");
        assert!(runbook.contains(&anchor.to_owned()), "docs/operations.md has nothing of {name}: {runbook:?}");
    }
}

/// A cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ").replace('<', "\\<")
}

/// `docs/options.md`, as the program has it.
fn options() -> String {
    let mut page = String::from(
        "# Options\n\nEvery option of every command, as `walferry help COMMAND` has them; each is a key of the [settings file](reference.md#settings-in-a-file), too.\n\
         This page is made of the program: `WRITE=1 cargo test --test docs reference`.\n",
    );
    let mut program = walferry::cli::Cli::command();
    program.build();
    let global =
        program.get_arguments().filter(|argument| argument.is_global_set()).map(|argument| argument.get_id().clone());
    let global: Vec<_> = global.collect();
    let mut table = |heading: &str, about: &str, command: &clap::Command, with_global: bool| {
        page.push_str(&format!("\n## {heading}\n\n{about}\n\n| option | default | what it does |\n|---|---|---|\n"));
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let id = argument.get_id();
            if id == "help" || id == "version" || global.contains(id) != with_global {
                continue;
            }
            let values = argument.get_value_names().filter(|_| argument.get_action().takes_values());
            let value = values.map_or(String::new(), |names| names.join(" "));
            let name = match argument.get_long() {
                Some(long) if value.is_empty() => format!("--{long}"),
                Some(long) => format!("--{long} {value}"),
                None => value,
            };
            let among: Vec<_> =
                argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
            let among = match argument.get_action().takes_values() && !among.is_empty() {
                true => format!(": {}", among.join(", ")),
                false => String::new(),
            };
            let default: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            let default = if argument.get_action().takes_values() { default.join(" ") } else { String::new() };
            let variable = argument.get_env().map_or(String::new(), |name| format!(" (`{}`)", name.to_string_lossy()));
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            page.push_str(&format!("| `{name}` | {} | {}{}{variable} |\n", cell(&default), cell(&help), cell(&among)));
        }
    };
    table("Of every command", "", &program, true);
    for command in program.get_subcommands() {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let options =
            command.get_arguments().any(|argument| argument.get_id() != "help" && argument.get_id() != "version");
        if options && command.get_name() != "help" {
            table(command.get_name(), &about, command, false);
        }
    }
    page.replace("\n\n\n", "\n\n")
}

/// `docs/metrics.md`, likewise.
fn metrics_page() -> String {
    let mut page = String::from(
        "# Metrics\n\nWhat `/metrics` has, for Prometheus. [What to watch, and the alerts](operations.md#watch-it).\n\
         This page is made of the program: `WRITE=1 cargo test --test docs reference`.\n\n| metric | kind | what it says |\n|---|---|---|\n",
    );
    for metric in metrics::ALL {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        page.push_str(&format!("| `{}` | {kind} | {} |\n", metric.name, cell(metric.description)));
    }
    page
}

#[test]
fn the_reference_has_every_option_and_every_metric() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    for (name, page) in [("options.md", options()), ("metrics.md", metrics_page())] {
        let file = docs.join(name);
        if std::env::var_os("WRITE").is_some() {
            std::fs::write(&file, &page).unwrap();
        }
        let written = std::fs::read_to_string(&file).unwrap();
        // By name: the words may be newer than the page, what is there may not.
        for row in page.lines().filter(|line| line.starts_with("| `") || line.starts_with("## ")) {
            let key = row.split(" | ").next().unwrap();
            assert!(
                written.lines().any(|line| line.starts_with(key)),
                "docs/{name} lacks {key}: WRITE=1 cargo test --test docs reference"
            );
        }
        for row in written.lines().filter(|line| line.starts_with("| `")) {
            let key = row.split(" | ").next().unwrap();
            assert!(page.contains(key), "docs/{name} has {key}, which there is not any more");
        }
    }
}
