//! Files that are whole or not there, and readable for nobody else.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Context, Result};

/// Makes a new, empty file with mode 0600.
///
/// # Errors
/// When it is there already, or the directory cannot be written to.
pub fn create_private(path: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .context(|| format!("creating {}", path.display()))
}

/// Makes a directory with mode 0700, and its parents; one that is there is left as it is.
///
/// # Errors
/// When it cannot be made.
pub fn create_private_directory(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .context(|| format!("creating the directory {}", path.display()))
}

/// Replaces a file as a whole, durably: after a crash it has the old content or the new one.
///
/// # Errors
/// When the directory cannot be written to or the disk is full; the old content is then still there.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let doing = || format!("writing {}", path.display());
    let fresh = path.with_extension("new");
    let _ = std::fs::remove_file(&fresh);
    let mut file = create_private(&fresh)?;
    file.write_all(content).context(doing)?;
    file.sync_all().context(doing)?;
    std::fs::rename(&fresh, path).context(doing)?;
    if let Some(directory) = path.parent() {
        File::open(directory).and_then(|directory| directory.sync_all()).context(doing)?;
    }
    Ok(())
}
