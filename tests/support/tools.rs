//! Programs that only tests need.

use std::path::{Path, PathBuf};

/// A program on the path, or where the set-up has unpacked it. Without it there is no test, which is said loudly, and is a failure
/// where everything has to be there (`CI`).
pub fn program(name: &str) -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/prometheus/usr/bin").join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(name)).chain([unpacked]);
    let found = candidates.find(|file| file.is_file());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{name} was not found: `make test` installs it");
        eprintln!("!!! SKIPPED: {name} was not found; `make test` installs it");
    }
    found
}
