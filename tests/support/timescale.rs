//! Servers with TimescaleDB, where this machine has the extension.

use walferry::demo::server::ServerPrograms;

use super::{Servers, programs};

/// What a server needs to have TimescaleDB.
pub const TIMESCALE: [(&str, &str); 5] = [
    ("shared_preload_libraries", "timescaledb"),
    ("timescaledb.telemetry_level", "off"),
    ("max_worker_processes", "32"),
    ("timescaledb.max_background_workers", "16"),
    ("max_locks_per_transaction", "256"),
];

/// Whether the PostgreSQL that the tests use has TimescaleDB. Where not, says loudly what is skipped: nothing that builds or
/// installs the extension belongs to this repository.
pub fn timescale_available(skipped: &str) -> bool {
    let there = extension_control(&programs()).is_some_and(|control| control.exists());
    if !there {
        eprintln!(
            "\n==== SKIPPED, NOT TESTED: {skipped}: the extension timescaledb is not installed for this PostgreSQL ====\n"
        );
    }
    there
}

/// Whether a version of the extension can be created, besides the newest.
#[allow(dead_code)]
pub fn timescale_has_version(version: &str, skipped: &str) -> bool {
    let script = extension_control(&programs())
        .and_then(|control| Some(control.parent()?.join(format!("timescaledb--{version}.sql"))));
    let there = script.is_some_and(|script| script.exists());
    if !there {
        eprintln!("\n==== SKIPPED, NOT TESTED: {skipped}: the extension timescaledb {version} is not installed ====\n");
    }
    there
}

fn extension_control(programs: &ServerPrograms) -> Option<std::path::PathBuf> {
    // Of the very installation, and not of another that comes first on the path.
    let output = std::process::Command::new(programs.bin("pg_config")).arg("--sharedir").output();
    let shared = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        // Debian's packages have pg_config only with the development files.
        _ => format!("/usr/share/postgresql/{}", programs.major()),
    };
    Some(std::path::Path::new(&shared).join("extension/timescaledb.control"))
}

/// Two servers with TimescaleDB, and these settings besides.
#[allow(dead_code)]
pub async fn servers(source: &[(&str, &str)], target: &[(&str, &str)]) -> Servers {
    Servers::with(&[&TIMESCALE[..], source].concat(), &[&TIMESCALE[..], target].concat()).await
}
