//! What the migration needs of the machine that walferry runs on.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::Access;
use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, size};
use crate::error::{Context, Result};

/// Lag in seconds is the difference of the source's clock and ours; more than this, in seconds, is worth a warning.
const CLOCK_DIFFERENCE_MAX: f64 = 2.0;

/// Rule of thumb for the queue: it takes all changes made while the tables are copied. Room for a tenth of what is
/// copied serves a database of which a tenth is rewritten meanwhile; less than that is worth a warning.
const QUEUE_SHARE_OF_SOURCE: i64 = 10;

/// Whether the state directory can be used or made, and whether its disk has room for the queue.
///
/// `source_bytes` is the size of what is copied, where known. Nothing is created.
pub(crate) fn state_directory(
    directory: &Path,
    queue_max_bytes: Option<u64>,
    source_bytes: Option<i64>,
) -> Vec<Finding> {
    let object = directory.display().to_string();
    let finding = |severity, code, message: String| Finding::new(severity, Side::Local, code, object.clone(), message);
    let existing = nearest_existing(directory);
    if !existing.is_dir() {
        let message = format!("{} is not a directory, so the state directory cannot be there.", existing.display());
        return vec![finding(Severity::Blocker, "state-directory", message)];
    }
    if let Err(error) = rustix::fs::access(&existing, Access::WRITE_OK | Access::EXEC_OK) {
        let message = format!(
            "{} cannot be written ({}). The queue is kept there, and nothing is confirmed to the source before it is on disk.",
            existing.display(),
            std::io::Error::from(error)
        );
        let fix = format!("install -d -m 0700 -o \"$USER\" {}", shell_quoted(directory));
        return vec![finding(Severity::Blocker, "state-directory", message).fix(fix)];
    }
    let disk = match rustix::fs::statvfs(&existing) {
        Ok(disk) => disk,
        Err(error) => {
            let message = format!("The free space of its disk cannot be read ({}).", std::io::Error::from(error));
            return vec![finding(Severity::Warning, "queue-disk", message)];
        }
    };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    room(free, queue_max_bytes, source_bytes)
        .map(|(severity, message)| finding(severity, "queue-disk", message))
        .into_iter()
        .collect()
}

/// What there is to say about `free` bytes for the queue.
fn room(free: u64, queue_max_bytes: Option<u64>, source_bytes: Option<i64>) -> Option<(Severity, String)> {
    let shown = size(i64::try_from(free).unwrap_or(i64::MAX));
    if let Some(quota) = queue_max_bytes
        && free < quota
    {
        let quota = size(i64::try_from(quota).unwrap_or(i64::MAX));
        let message = format!(
            "Its disk has {shown} free, and the queue may grow to {quota}: the disk would be full before the queue \
             stops taking changes. Free some space, choose another disk, or lower --queue-max-bytes."
        );
        return Some((Severity::Blocker, message));
    }
    let wanted = source_bytes.unwrap_or(0) / QUEUE_SHARE_OF_SOURCE;
    if i64::try_from(free).unwrap_or(i64::MAX) < wanted {
        let message = format!(
            "Its disk has {shown} free. The queue holds what the source writes while it is copied; as a rule of thumb \
             leave room for a tenth of what is copied, here {}. A full queue stops reading, and the source then keeps the WAL.",
            size(wanted)
        );
        return Some((Severity::Warning, message));
    }
    None
}

/// Whether our clock and a server's agree well enough for a lag in seconds to mean something.
///
/// # Errors
/// Whatever the server says.
pub(crate) async fn clock(client: &Client, side: Side) -> Result<Option<Finding>> {
    let seconds = || SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64()).unwrap_or(0.0);
    let before = seconds();
    let row = client
        .query_typed_one("SELECT extract(epoch FROM pg_catalog.clock_timestamp())::float8", &[])
        .await
        .context(|| "reading the server's clock".into())?;
    let after = seconds();
    // The server read its clock somewhere between the two.
    let server: f64 = row.get(0);
    let difference = if server < before { server - before } else { (server - after).max(0.0) };
    Ok((difference.abs() > CLOCK_DIFFERENCE_MAX).then(|| {
        let message = format!(
            "The server's clock is {:.1} s {} this machine's; the lag in seconds will be wrong by that much. No data depends on it.",
            difference.abs(),
            if difference > 0.0 { "ahead of" } else { "behind" },
        );
        Finding::new(Severity::Warning, side, "clock", "clock_timestamp()", message)
    }))
}

fn nearest_existing(directory: &Path) -> PathBuf {
    let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_path_buf());
    let found = absolute.ancestors().find(|ancestor| ancestor.exists()).map(Path::to_path_buf);
    found.unwrap_or_else(|| PathBuf::from("/"))
}

fn shell_quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_to_be_made_is_looked_for_and_not_made() {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let wanted = parent.path().join("a/b");
        assert_eq!(state_directory(&wanted, None, None), []);
        assert!(!parent.path().join("a").exists());
    }

    #[test]
    fn a_file_in_the_way_blocks() {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let file = parent.path().join("file");
        std::fs::write(&file, "").expect("a file");
        let found = state_directory(&file.join("state"), None, None);
        assert_eq!((found[0].severity, found[0].code), (Severity::Blocker, "state-directory"));
    }

    #[test]
    fn a_quota_larger_than_the_disk_blocks_and_a_small_disk_warns() {
        assert_eq!(room(1 << 30, Some(2 << 30), None).map(|found| found.0), Some(Severity::Blocker));
        assert_eq!(room(1 << 30, Some(1 << 30), Some(1 << 40)).map(|found| found.0), Some(Severity::Warning));
        assert_eq!(room(1 << 30, Some(1 << 30), Some(10 << 30)), None);
        assert_eq!(room(1 << 30, None, None), None);
    }
}
