//! Servers of other versions, as scripts/servers.sh gets them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use walferry::demo::server::ServerPrograms;

/// The programs of a pair of servers, and the directory of `pg_dump` and `pg_restore` for them. `None` where they are not to be had,
/// which is said loudly; with `CI=true` it is a failure.
pub fn pair(source: u32, target: u32) -> Option<(ServerPrograms, ServerPrograms, PathBuf)> {
    let wanted = [source.to_string(), target.to_string(), "tools".to_owned()];
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/servers.sh");
    let output = Command::new(script).args(&wanted).stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    if !output.status.success() {
        let text = format!("scripts/servers.sh {} failed", wanted.join(" "));
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{text}");
        eprintln!(
            "\n*** SKIPPED: the migration from PostgreSQL {source} to {target} is not tested, because {text} ***\n"
        );
        return None;
    }
    let directory = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end());
    let programs = |major: u32| {
        let found = ServerPrograms::in_directory(&directory.join(major.to_string()).join("bin")).unwrap();
        assert_eq!(found.major(), major);
        found
    };
    Some((programs(source), programs(target), directory.join("tools/bin")))
}
