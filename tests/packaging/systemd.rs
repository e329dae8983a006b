//! The unit for systemd.

use std::process::Command;

use super::{file, read};

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let unit = read("packaging/systemd/walferry@.service");
    for hardened in
        ["DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "SystemCallFilter=@system-service"]
    {
        assert!(unit.lines().any(|line| line == hardened), "{hardened}");
    }
    let files = tempfile::tempdir().unwrap();
    let place = files.path().join("walferry@shop.service");
    // systemd looks for the program; the one of this test stands for the installed one.
    std::fs::write(&place, unit.replace("/usr/bin/walferry", env!("CARGO_BIN_EXE_walferry"))).unwrap();
    let output = match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&place).output() {
        Ok(output) => output,
        Err(error) => return eprintln!("!!! SKIPPED: the unit was not verified: systemd-analyze: {error}"),
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Of the units of this machine it may say what it likes.
    let of_ours: Vec<&str> = said.lines().filter(|line| line.contains("walferry")).collect();
    assert!(of_ours.is_empty(), "{said}");
    assert!(file("packaging/systemd/walferry@.service").is_file());
}
