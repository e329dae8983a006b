//! What `build.rs` makes of a clone, of an archive and of a directory without either. It is compiled by itself: the program of a test run has
//! no commit, so that a commit does not compile all tests again.

use std::path::{Path, PathBuf};
use std::process::Command;

const ARCHIVED: &str = "0123456789abcdef0123456789abcdef01234567";

/// `build.rs` as a program.
fn compile(directory: &Path) -> PathBuf {
    let program = directory.join("build-script");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let arguments = ["--edition", "2024", "-o"];
    let output = Command::new(rustc).args(arguments).args([&program, &super::file("build.rs")]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// What it says the version is, for the source in this directory.
fn version(script: &Path, source: &Path, profile: &str, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(script);
    command.env_remove("WALFERRY_COMMIT").env("CARGO_PKG_VERSION", "1.2.3").env("PROFILE", profile);
    let output = command.env("CARGO_MANIFEST_DIR", source).envs(environment.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    said.lines().find_map(|line| line.strip_prefix("cargo::rustc-env=WALFERRY_VERSION=")).unwrap().to_owned()
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "-c", "commit.gpgsign=false"];
    let output = Command::new("git").args(identity).args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn the_version_names_the_commit_of_a_clone_or_an_archive_and_is_there_without_git() {
    let files = tempfile::tempdir().unwrap();
    let script = compile(files.path());
    let clone = files.path().join("clone");
    std::fs::create_dir(&clone).unwrap();
    git(&clone, &["init", "-q", "."]);
    for name in [".commit", ".gitattributes"] {
        std::fs::copy(super::file(name), clone.join(name)).unwrap();
    }
    git(&clone, &["add", "."]);
    git(&clone, &["commit", "-q", "-m", "First"]);
    let commit = git(&clone, &["rev-parse", "HEAD"]);
    let named = format!("1.2.3 ({})", &commit[..12]);
    assert_eq!(version(&script, &clone, "release", &[]), named);
    assert_eq!(version(&script, &clone, "debug", &[]), "1.2.3");
    assert_eq!(version(&script, &clone, "debug", &[("WALFERRY_COMMIT", ARCHIVED)]), "1.2.3 (0123456789ab)");

    // As `git archive` makes it, unpacked inside of another repository, whose commit is none of ours.
    git(&clone, &["archive", "--prefix", "archive/", "-o", "../archive.tar", "HEAD"]);
    let output = Command::new("tar").args(["-xf", "../archive.tar"]).current_dir(&clone).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let archive = clone.join("archive");
    assert_eq!(version(&script, &archive, "release", &[]), named);
    std::fs::remove_file(archive.join(".commit")).unwrap();
    assert_eq!(version(&script, &archive, "release", &[]), "1.2.3");
    assert_eq!(version(&script, &archive, "release", &[("PATH", "/nowhere")]), "1.2.3");
}

#[test]
fn the_program_says_its_version() {
    let output = Command::new(env!("CARGO_BIN_EXE_walferry")).arg("--version").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with(concat!("walferry ", env!("CARGO_PKG_VERSION"))), "{said}");
}
