//! One agent a host: two would each extend what the other's log does not have.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::MeasureError;

/// Takes the lock in this folder, which is made if it is missing. Held until the file is dropped.
///
/// # Errors
/// [`MeasureError::Locked`], [`MeasureError::File`].
pub(super) fn lock(run_dir: &Path) -> Result<File, MeasureError> {
    std::fs::create_dir_all(run_dir).map_err(MeasureError::file("create", run_dir))?;
    let path = run_dir.join("lock");
    let opened = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        // Whoever may open it may hold the lock, and so keep the agent from starting.
        .mode(0o600)
        .open(&path);
    let file = opened.map_err(MeasureError::file("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(MeasureError::Locked { path }),
        Err(std::fs::TryLockError::Error(source)) => Err(MeasureError::File {
            operation: "lock",
            path,
            source,
        }),
    }
}
