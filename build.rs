//! The version that `walferry --version` prints, with the commit where there is one.
//!
//! `WALFERRY_COMMIT` says it where it is set (the Dockerfile does, whose context has no history). In an archive of the source the file
//! `.commit` does, in which `git archive` writes it (`export-subst` in `.gitattributes`), and in a clone git. Without any of them it is the
//! version alone. Debug builds have no commit of git's: with it, every commit would have cargo compile the program and all tests again.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=.commit");
    println!("cargo::rerun-if-env-changed=WALFERRY_COMMIT");
    let version = env("CARGO_PKG_VERSION");
    let version = match commit() {
        Some(commit) => format!("{version} ({commit})"),
        None => version,
    };
    println!("cargo::rustc-env=WALFERRY_VERSION={version}");
}

fn commit() -> Option<String> {
    let given = std::env::var("WALFERRY_COMMIT").ok().filter(|given| !given.is_empty());
    given.as_deref().and_then(digits).or_else(from_archive).or_else(from_git)
}

fn from_archive() -> Option<String> {
    let file = std::fs::read_to_string(Path::new(&env("CARGO_MANIFEST_DIR")).join(".commit")).ok()?;
    digits(file.trim())
}

fn from_git() -> Option<String> {
    if env("PROFILE") == "debug" {
        return None;
    }
    // Not the commit of another repository that an archive happens to be unpacked in.
    let root = Path::new(&git(&["rev-parse", "--show-toplevel"])?).canonicalize().ok()?;
    if root != Path::new(&env("CARGO_MANIFEST_DIR")).canonicalize().ok()? {
        return None;
    }
    // What changes when another commit is checked out, or one is made. A path that is not there would mean to build each time.
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name])?;
        if Path::new(&env("CARGO_MANIFEST_DIR")).join(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    digits(&git(&["rev-parse", "HEAD"])?)
}

/// The first twelve of what consists of hexadecimal digits. In a file that no `git archive` has written is a place-holder instead.
fn digits(commit: &str) -> Option<String> {
    let is_one = commit.len() >= 12 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_one.then(|| commit[..12].to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).current_dir(env("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}
