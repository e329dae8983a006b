//! The package for Debian, with the program of this test in place of a release build.

use std::process::Command;

use super::engine::text;
use super::file;

#[test]
fn the_debian_package_has_the_program_with_all_that_belongs_to_it() {
    let found = Command::new("cargo").args(["deb", "--version"]).output();
    if !found.is_ok_and(|output| output.status.success()) {
        eprintln!("!!! SKIPPED: the Debian package was not built: cargo install --locked cargo-deb");
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let package = files.path().join("walferry.deb");
    let mut command = Command::new(file("scripts/deb.sh"));
    command.arg("--fast").arg("--output").arg(&package).env("WALFERRY_PROGRAM", env!("CARGO_BIN_EXE_walferry"));
    text(command.env("CARGO_TARGET_DIR", files.path().join("target")).output().unwrap(), "scripts/deb.sh");

    let list = text(Command::new("dpkg-deb").arg("-c").arg(&package).output().unwrap(), "dpkg-deb -c");
    let contents: Vec<&str> = list.lines().filter_map(|line| line.split(" ./").nth(1)).collect();
    for path in [
        "usr/bin/walferry",
        "usr/lib/systemd/system/walferry@.service",
        "usr/share/man/man1/walferry.1.gz",
        "usr/share/man/man1/walferry-migrate.1.gz",
        "usr/share/bash-completion/completions/walferry",
        "usr/share/zsh/vendor-completions/_walferry",
        "usr/share/fish/vendor_completions.d/walferry.fish",
        "usr/share/walferry/dashboards/walferry.json",
        "usr/share/walferry/dashboards/alerts.yml",
        "usr/share/doc/walferry/README.md",
        "usr/share/doc/walferry/copyright",
    ] {
        assert!(contents.contains(&path), "{path} is not in\n{list}");
    }
    let needs =
        text(Command::new("dpkg-deb").args(["-f"]).arg(&package).arg("Depends").output().unwrap(), "dpkg-deb -f");
    assert!(needs.contains("libc6 (>=") && needs.contains("postgresql-client"), "{needs}");

    let unpacked = files.path().join("unpacked");
    text(Command::new("dpkg-deb").arg("-x").args([&package, &unpacked]).output().unwrap(), "dpkg-deb -x");
    let version = text(Command::new(unpacked.join("usr/bin/walferry")).arg("--version").output().unwrap(), "walferry");
    assert!(version.starts_with("walferry "), "{version}");
}
