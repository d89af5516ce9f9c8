//! Files as a key store needs them: private, whole or absent, and on the disk before the call returns.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::KeyStoreError;
use crate::files::give_to_owner_of_parent;

/// Fills the buffer with random bytes from the system.
pub(super) fn fill_random(buffer: &mut [u8]) -> Result<(), KeyStoreError> {
    SystemRandom::new().fill(buffer).map_err(|_| KeyStoreError::Random)
}

/// Turns a failed operation into an error that names it.
pub(super) fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> KeyStoreError + 'a {
    move |source| KeyStoreError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// Makes a directory that only its owner can enter; fine when it is there already and private.
pub(super) fn private_dir(path: &Path) -> Result<(), KeyStoreError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed("create directory", path)(error));
        }
        _ => {}
    }
    check_private(path, &fs::metadata(path).map_err(failed("look at", path))?)
}

/// Reads a private file of at most `limit` bytes.
///
/// The checks look at the open file, not at its name, so that nothing can change between check and use.
pub(super) fn read_private(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
    let file = File::open(path).map_err(failed("open", path))?;
    let metadata = file.metadata().map_err(failed("look at", path))?;
    check_private(path, &metadata)?;
    if metadata.len() > limit {
        return Err(KeyStoreError::TooLong {
            path: path.to_owned(),
            len: metadata.len(),
            limit,
        });
    }
    // Room for all of it at once: a vector that grows leaves unwiped copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(limit).unwrap_or(0)));
    file.take(limit).read_to_end(&mut bytes).map_err(failed("read", path))?;
    Ok(bytes)
}

/// Writes a new private file: complete and durable under its name, or not there at all. Never overwrites.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] as [`KeyStoreError::Io`] when the name is taken.
pub(super) fn write_new_private(path: &Path, bytes: &[u8]) -> Result<(), KeyStoreError> {
    let partial = path.with_extension("partial");
    // A partial file is what a crash left of a key that nobody was ever told of.
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &partial)(error)),
        _ => {}
    }
    let written = write_and_sync(&partial, bytes)
        // A link refuses to replace; a rename would not.
        .and_then(|()| fs::hard_link(&partial, path).map_err(failed("create", path)));
    let removed = fs::remove_file(&partial).map_err(failed("remove", &partial));
    written.and(removed)?;
    sync_parent(path)
}

/// Makes a change of names in the file's directory durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), KeyStoreError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync directory", parent))
}

fn write_and_sync(path: &Path, bytes: &[u8]) -> Result<(), KeyStoreError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create", path))?;
    give_to_owner_of_parent(&file, path).map_err(failed("change the owner of", path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(failed("write", path))
}

fn check_private(path: &Path, metadata: &fs::Metadata) -> Result<(), KeyStoreError> {
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyStoreError::Permissions {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(())
}
