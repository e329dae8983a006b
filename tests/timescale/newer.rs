//! To a newer major version of PostgreSQL with the extension in the source's version. Its programs, with the extension installed,
//! are in the directory that `WALFERRY_TIMESCALE_TARGET_BIN` names: nothing that builds or installs the extension belongs here.

use std::path::Path;

use walferry::demo::server::ServerPrograms;

use super::live::is_moved_live;
use crate::support::timescale::{TIMESCALE, timescale_available};
use crate::support::{Servers, programs};

const DIRECTORY: &str = "WALFERRY_TIMESCALE_TARGET_BIN";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_timescaledb_is_moved_live_to_a_newer_postgresql() {
    const SKIPPED: &str = "TimescaleDB to TimescaleDB of a newer PostgreSQL, live";
    if !timescale_available(SKIPPED) {
        return;
    }
    let Some(directory) = std::env::var(DIRECTORY).ok().filter(|directory| !directory.is_empty()) else {
        eprintln!(
            "\n==== SKIPPED, NOT TESTED: {SKIPPED}: {DIRECTORY} names no directory of server programs with the extension ====\n"
        );
        return;
    };
    let newer = ServerPrograms::in_directory(Path::new(&directory)).unwrap();
    assert!(newer.major() > programs().major(), "{DIRECTORY} is of PostgreSQL {}", newer.major());
    let servers = Servers::of((&programs(), &TIMESCALE), (&newer, &TIMESCALE)).await;
    // Its pg_dump is that of the target.
    is_moved_live(&servers, &[("WALFERRY_PG_BIN", &directory)]).await;
}
