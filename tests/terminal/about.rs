//! Settings files, completions and manual pages, as the program has them.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::tools;

/// The program with arguments, and with no variables of whoever runs the tests.
pub fn walferry(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WALFERRY_")) {
        command.env_remove(name);
    }
    command.args(arguments).envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_command_takes_what_the_file_says_and_says_which_line_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("walferry.toml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, format!("dir = '{}/nothing'\n[status]\nexit-code = true\n", directory.path().display()))
        .unwrap();
    for (arguments, variables) in
        [(&["status", "--config", path][..], &[][..]), (&["status"], &[("WALFERRY_CONFIG", path)])]
    {
        let output = walferry(arguments, variables);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("/nothing"), "{said}");
    }
    std::fs::write(&file, "dir = '/tmp'\n[cutover]\ntimeout = 'soon'\n").unwrap();
    let output = walferry(&["cutover", "--config", path], &[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("line 3: [cutover] timeout: expected a duration") && said.contains(" next: "), "{said}");
    let checked = walferry(&["config", "check", path], &[]);
    assert_eq!(checked.status.code(), Some(2));
    assert!(text(&checked.stdout).contains("line 3"), "{}", text(&checked.stdout));
}

#[test]
fn a_password_of_the_file_reaches_no_output() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("walferry.toml");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "source = 'postgres://a:geheim@127.0.0.1:1/a'\ntarget = 'postgres://a:geheim@127.0.0.1:1/b'\n",
    )
    .unwrap();
    for arguments in [
        &["check", "--config", path][..],
        &["check", "--config", path, "--nonsense"],
        &["migrate", "--config", path],
        &["config", "check", path],
        &["config", "check", path, "--json"],
    ] {
        let output = walferry(arguments, &[]);
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(!said.contains("geheim"), "{arguments:?}: {said}");
        assert!(!said.contains("shows in the process list"), "it does not: {said}");
    }
    // The file can be read by everybody, as a file usually can.
    let checked = walferry(&["check", "--config", path], &[]);
    assert!(text(&checked.stderr).contains("others can read the password in this file"), "{}", text(&checked.stderr));
}

#[test]
fn wrong_input_leads_on() {
    let files = tempfile::tempdir().unwrap();
    let nowhere = files.path().join("nowhere");
    let path = nowhere.to_str().unwrap();
    for (arguments, code, said) in [
        (&["status"][..], 2, "WALFERRY_DIR"),
        (&["status", "--dir", path], 1, "is --dir right?"),
        (&["cutover", "--dir", path, "--yes"], 1, "is --dir right?"),
        (&["finish", "--dir", path], 1, "is --dir right?"),
        (&["clean", "--dir", path], 1, "walferry clean --source"),
        (&["verify", "--dir", path], 1, "Give the --dir of the migration"),
        (&["check"], 2, "WALFERRY_SOURCE"),
    ] {
        let output = walferry(arguments, &[]);
        let text = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(" next: ") && text.contains(said), "{arguments:?}: {text}");
        assert!(!nowhere.exists(), "{arguments:?} has made the directory that it looked for");
    }
}

#[test]
fn a_locale_without_utf8_gets_ascii() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("nowhere");
    let arguments = ["status", "--dir", path.to_str().unwrap()];
    assert!(text(&walferry(&arguments, &[("LC_ALL", "C.UTF-8")]).stderr).contains('…'));
    assert!(walferry(&arguments, &[("LC_ALL", "C")]).stderr.is_ascii());
}

#[test]
fn the_printed_example_is_a_settings_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("walferry.toml");
    std::fs::write(&file, walferry(&["config", "example"], &[]).stdout).unwrap();
    let checked = walferry(&["config", "check", file.to_str().unwrap(), "--json"], &[]);
    assert!(checked.status.success());
    let report: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!((&report["version"], &report["ok"]), (&1.into(), &true.into()), "{report}");
}

/// What bash offers for the last of these words.
fn completed(script: &str, words: &[&str]) -> Vec<String> {
    let quoted = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let asked = format!(
        "{script}\nCOMP_WORDS=({quoted})\nCOMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n\
         function=$(complete -p walferry | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n\
         \"$function\" walferry \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    );
    let mut bash = Command::new("bash")
        .args(["--noprofile", "--norc", "-s"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    bash.stdin.take().unwrap().write_all(asked.as_bytes()).unwrap();
    text(&bash.wait_with_output().unwrap().stdout).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_values() {
    let script = text(&walferry(&["completions", "bash"], &[]).stdout);
    let commands = completed(&script, &["walferry", "cut"]);
    assert!(commands.contains(&"cutover".to_owned()) && !commands.contains(&"check".to_owned()), "{commands:?}");
    let options = completed(&script, &["walferry", "migrate", "--no"]);
    assert!(options.contains(&"--no-reverse".to_owned()) && !options.contains(&"--json".to_owned()), "{options:?}");
    let values = completed(&script, &["walferry", "migrate", "--on-conflict", "s"]);
    assert_eq!(values, ["stop", "source"]);
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let script = walferry(&["completions", shell], &[]);
        assert!(script.status.success() && text(&script.stdout).contains("switchback"), "{shell}");
    }
}

#[test]
fn every_command_has_a_manual_page_that_roff_has_nothing_against() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("man1");
    assert!(walferry(&["man", "--out", out.to_str().unwrap()], &[]).status.success());
    for name in ["walferry", "walferry-migrate", "walferry-cutover", "walferry-status"] {
        let page = std::fs::read(out.join(format!("{name}.1"))).unwrap();
        assert!(page.is_ascii(), "{name}");
        assert!(text(&page).contains(".TH"), "{name}");
    }
    assert_eq!(walferry(&["man", "cutover"], &[]).stdout, std::fs::read(out.join("walferry-cutover.1")).unwrap());
    let unknown = walferry(&["man", "nonsense"], &[]);
    assert_eq!(unknown.status.code(), Some(2));
    let Some(groff) = tools::program("groff") else { return };
    for page in std::fs::read_dir(&out).unwrap() {
        let page = page.unwrap().path();
        let shown = shown_by(&groff, "utf8", &page);
        assert!(text(&shown.stderr).is_empty(), "{}: {}", page.display(), text(&shown.stderr));
        let shown = text(&shown.stdout);
        assert!(shown.contains("OPTIONS") && shown.contains("walferry"), "{}", page.display());
    }
    let cutover = text(&shown_by(&groff, "ascii", &out.join("walferry-cutover.1")).stdout);
    let example = "walferry cutover --dir ./shop --dry-run\n";
    assert!(cutover.contains(example), "an example keeps its line: {cutover}");
}

fn shown_by(groff: &Path, device: &str, page: &Path) -> Output {
    // Without overstrikes and colours, and with every warning.
    Command::new(groff).args(["-man", "-ww", "-T", device, "-P-cbou"]).arg(page).output().unwrap()
}
