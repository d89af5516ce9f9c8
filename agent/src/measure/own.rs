//! What the agent needs to start again: its program and the libraries that it has mapped, by the names under which a
//! successor will find them.
//!
//! While no agent runs, nothing new is let through. So an update of the agent, or of a library that it needs, is measured
//! ahead by the agent that still runs: each time such a file changes, and once more when it is told to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use procfs::process::{MMPermissions, MMapPath, Process};

use super::kernel::{OWN_LIBRARY, OWN_PROGRAM};

/// A file as it was measured: device, inode, change time.
type Seen = (u64, u64, i64, i64);

/// A library that is mapped later than at the start is found after this long.
const MAPPED: Duration = Duration::from_secs(60);

/// The files, and the state in which each was last measured.
#[derive(Debug, Default)]
pub struct OwnFiles {
    program: PathBuf,
    others: Vec<PathBuf>,
    /// All of them, and when they were looked for.
    paths: BTreeSet<PathBuf>,
    looked: Option<Instant>,
    seen: BTreeMap<PathBuf, Seen>,
    /// Those that could not be measured in the state in which they were seen.
    failed: BTreeMap<PathBuf, Seen>,
}

impl OwnFiles {
    /// Of this process; `others` are files that it reads, and that are part of it.
    #[must_use]
    pub fn new(others: &[PathBuf]) -> Self {
        Self {
            program: std::fs::read_link("/proc/self/exe").map_or_else(|_| PathBuf::new(), |path| without_mark(&path)),
            others: others.to_vec(),
            paths: BTreeSet::new(),
            looked: None,
            seen: BTreeMap::new(),
            failed: BTreeMap::new(),
        }
    }

    /// This one could not be measured: the next call names it once more. Returns whether that is news: it had not failed
    /// yet in this state.
    pub fn again(&mut self, path: &Path) -> bool {
        match self.seen.remove(path) {
            Some(state) => self.failed.insert(path.to_owned(), state) != Some(state),
            None => false,
        }
    }

    /// Those that are new or have changed since the last call, open, with the kind they are loaded as.
    pub fn changed(&mut self) -> Vec<(PathBuf, File, u32)> {
        if self.looked.is_none_or(|at| at.elapsed() >= MAPPED) {
            (self.paths, self.looked) = (self.paths(), Some(Instant::now()));
        }
        let mut found = Vec::new();
        for path in &self.paths {
            // Most have not changed, and an open is asked about: only by the name then.
            if std::fs::metadata(path).is_ok_and(|metadata| self.seen.get(path) == Some(&state(&metadata))) {
                continue;
            }
            let Ok(file) = File::open(path) else { continue };
            let Ok(metadata) = file.metadata() else { continue };
            let state = state(&metadata);
            if !metadata.is_file() || self.seen.insert(path.clone(), state) == Some(state) {
                continue;
            }
            let kind = if *path == self.program {
                OWN_PROGRAM
            } else {
                OWN_LIBRARY
            };
            found.push((path.clone(), file, kind));
        }
        found
    }

    fn paths(&self) -> BTreeSet<PathBuf> {
        let maps = Process::myself().and_then(|process| process.maps());
        let mapped = maps.into_iter().flatten().filter_map(|map| match map.pathname {
            MMapPath::Path(path) if map.perms.contains(MMPermissions::EXECUTE) => Some(without_mark(&path)),
            _ => None,
        });
        let fixed = self.others.iter().cloned().chain([self.program.clone()]);
        mapped.chain(fixed).filter(|path| path.is_absolute()).collect()
    }
}

/// What tells a file and its state from others.
fn state(metadata: &std::fs::Metadata) -> Seen {
    (
        metadata.st_dev(),
        metadata.st_ino(),
        metadata.st_ctime(),
        metadata.st_ctime_nsec(),
    )
}

/// The name under which the file was found: the kernel marks one that has been replaced since.
fn without_mark(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_its_libraries_and_what_was_named_are_found_once() {
        let other = tempfile::NamedTempFile::new().unwrap();
        let mut own = OwnFiles::new(&[other.path().to_owned()]);
        let me = std::env::current_exe().unwrap();
        let found = own.changed();
        let kind = |path: &Path| found.iter().find(|(found, ..)| found == path).map(|(.., kind)| *kind);
        assert_eq!(kind(&me), Some(OWN_PROGRAM));
        assert_eq!(kind(other.path()), Some(OWN_LIBRARY));
        assert!(found.iter().any(|(path, ..)| path.to_string_lossy().contains("libc")));
        assert!(own.changed().is_empty());
        std::fs::write(other.path(), "changed").unwrap();
        assert_eq!(own.changed().len(), 1);
    }

    #[test]
    fn what_could_not_be_measured_is_named_until_it_can_and_complained_of_once() {
        let other = tempfile::NamedTempFile::new().unwrap();
        let mut own = OwnFiles::new(&[other.path().to_owned()]);
        own.changed();
        assert!(own.again(other.path()));
        assert_eq!(own.changed().len(), 1);
        assert!(!own.again(other.path()));
        assert_eq!(own.changed().len(), 1);
        assert!(own.changed().is_empty());
    }

    #[test]
    fn a_replaced_file_is_looked_for_under_its_name() {
        assert_eq!(without_mark(Path::new("/usr/bin/a (deleted)")), Path::new("/usr/bin/a"));
        assert_eq!(without_mark(Path::new("/usr/bin/a")), Path::new("/usr/bin/a"));
    }
}
