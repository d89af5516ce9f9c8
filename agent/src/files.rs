//! Files of the state folder: only root reads them, and each is whole or not there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Writes `dir/name` with mode 0600, in place of one that is there; synced to disk when this returns.
///
/// # Errors
/// What the system says; the former file is then still there.
pub fn replace_private(dir: &Path, name: &str, data: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!(".{name}.new"));
    // Left over from a write that was interrupted; O_EXCL below then refuses whatever somebody else puts there.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(data)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    File::open(dir)?.sync_all()
}
