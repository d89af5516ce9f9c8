//! An installed root: a folder in which a system lies. Links are not followed, and what is no file of the system's own is
//! not entered.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::collect::Collector;
use super::error::Fault;
use super::source::{CHUNK, Metered};
use super::{Options, Progress};

/// Folders of a root that hold nothing installed.
const PASSING: [&str; 5] = ["proc", "sys", "dev", "run", "tmp"];
/// Folders in folders.
const MAX_DEPTH: usize = 128;
/// Progress is told whenever this many files more were looked at.
const STEP: u64 = 256;

/// Takes every file below `root`; returns the mount points of other file systems that it did not enter.
pub(super) fn read(
    collector: &mut Collector<'_>,
    root: &Path,
    options: &Options<'_>,
    at: &Rc<Cell<u64>>,
) -> Result<Vec<PathBuf>, Fault> {
    let device = fs::metadata(root).map_err(Fault::Read)?.dev();
    let mut skipped = Vec::new();
    // Folders that have not been listed yet, by their path below the root.
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        collector.place = vec![Path::new("/").join(&folder).display().to_string()];
        if folder.components().count() > MAX_DEPTH {
            return Err(Fault::TooMuch {
                what: "the depth of folders",
                limit: MAX_DEPTH as u64,
            });
        }
        let Some(list) = there(fs::read_dir(root.join(&folder)))? else {
            continue;
        };
        for entry in list {
            let Some(entry) = there(entry)? else { continue };
            let path = folder.join(entry.file_name());
            collector.place = vec![Path::new("/").join(&path).display().to_string()];
            collector.member()?;
            let Some(metadata) = there(entry.metadata())? else {
                continue;
            };
            if metadata.is_dir() {
                let is_passing = PASSING.iter().any(|name| path == Path::new(name));
                if is_passing {
                    continue;
                }
                if metadata.dev() != device && !options.cross_file_systems {
                    skipped.push(Path::new("/").join(&path));
                    continue;
                }
                folders.push(path);
            } else if metadata.is_file() {
                file(collector, root, &path, options, at)?;
            }
        }
    }
    collector.place.clear();
    Ok(skipped)
}

fn file(
    collector: &mut Collector<'_>,
    root: &Path,
    path: &Path,
    options: &Options<'_>,
    at: &Rc<Cell<u64>>,
) -> Result<(), Fault> {
    // It may be another one by now: links are refused, and nothing waits for a pipe's other end.
    let mut open = OpenOptions::new();
    open.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let Some(file) = there(open.open(root.join(path)))? else {
        return Ok(());
    };
    let metadata = file.metadata().map_err(Fault::Read)?;
    if !metadata.is_file() {
        return Ok(());
    }
    at.set(0);
    collector.refill();
    if collector.files.is_multiple_of(STEP) {
        (options.progress)(Progress {
            done: collector.files,
            total: None,
        });
    }
    collector.place.clear();
    let names = [path.as_os_str().as_bytes().to_vec()];
    let executable = metadata.mode() & 0o111 != 0;
    collector.file(&names, executable, &mut metered(file, at, None, options.progress))
}

/// A file, read through a buffer, with the position in it.
pub(super) fn metered<'a>(
    file: File,
    at: &Rc<Cell<u64>>,
    total: Option<u64>,
    progress: &'a dyn Fn(Progress),
) -> Metered<'a, BufReader<File>> {
    Metered {
        inner: BufReader::with_capacity(CHUNK, file),
        at: Rc::clone(at),
        told: 0,
        total,
        progress,
    }
}

/// What a running system has removed in the meantime is not there.
fn there<T>(result: io::Result<T>) -> Result<Option<T>, Fault> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::Read(error)),
    }
}
