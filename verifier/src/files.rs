//! Files that only their owner may read, from the moment they exist.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;

/// Creates a file of mode 0600 with this content, synced to disk; an existing file is an error and stays as it is.
pub fn create_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Writes a file of mode 0600 in place of one that is there: whole, or not at all.
pub fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let temporary = path.with_file_name(name);
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    create_private(&temporary, content)?;
    give_to_owner_of_parent(&File::open(&temporary)?, &temporary)?;
    std::fs::rename(&temporary, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Creates a directory of mode 0700 with its parents, or accepts an existing one as it is.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) => Err(e),
    }
}

/// Makes the names in a directory durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// An operator may write as root what the service, under a user of its own, must read: the file belongs to whom its
/// directory belongs to.
pub fn give_to_owner_of_parent(file: &File, path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let (dir, ours) = (std::fs::metadata(parent)?, file.metadata()?);
    if ours.uid() == dir.uid() {
        return Ok(());
    }
    fchown(file, Some(dir.uid()), Some(dir.gid()))
}
