//! One agent a host: two would each extend what the other's log does not have.

use std::fs::{File, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::MeasureError;

/// A lock on a file or a folder, given back on drop. Closing it would not do: a child that was forked just then has the
/// descriptor until it runs its program, and keeps the lock so long.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    /// Takes it, if nobody else has it.
    ///
    /// # Errors
    /// That of `flock(2)`.
    pub(super) fn take(file: File) -> Result<Self, TryLockError> {
        file.try_lock().map(|()| Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "a lock stays until the agent ends");
        }
    }
}

/// Takes the lock in this folder, which is made if it is missing.
///
/// # Errors
/// [`MeasureError::Locked`], [`MeasureError::File`].
pub(super) fn lock(run_dir: &Path) -> Result<Lock, MeasureError> {
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
    Lock::take(file).map_err(|error| match error {
        TryLockError::WouldBlock => MeasureError::Locked { path },
        TryLockError::Error(source) => MeasureError::File {
            operation: "lock",
            path,
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests say what they expect by panicking")]

    use super::*;

    #[test]
    fn a_lock_is_given_back_though_a_child_still_has_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("lock")).unwrap();
        let child = file.try_clone().unwrap();
        let held = Lock::take(file).unwrap();
        let other = || Lock::take(File::open(dir.path().join("lock")).unwrap());
        assert!(matches!(other(), Err(TryLockError::WouldBlock)));
        drop(held);
        other().unwrap();
        drop(child);
    }
}
