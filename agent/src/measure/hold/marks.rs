//! What fanotify watches: every mounted file system for programs, and some folders for whatever is opened in them.

use std::collections::HashSet;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{Fanotify, MarkFlags, MaskFlags};
use procfs::process::Process;

use super::{HoldError, HoldSettings, keep, spawn};

/// File systems of the kernel's own, on which no program lies.
const PSEUDO: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
    "xenfs",
];

/// Folders that are marked at most; a host has a few thousand.
const MAX_FOLDERS: usize = 100_000;
/// Refused files whose folders wait to be looked at.
const MAX_REFUSED: usize = 256;

/// The thread that keeps the marks up to date.
pub struct Marks {
    refused: mpsc::SyncSender<PathBuf>,
    wake: PipeWriter,
}

impl Marks {
    /// Marks what is there, and goes on in a thread of its own.
    pub(super) fn start(
        group: Arc<Fanotify>,
        settings: &HoldSettings,
        failure: Arc<Mutex<Option<HoldError>>>,
    ) -> Result<Self, HoldError> {
        let (woken, wake) = std::io::pipe().map_err(HoldError::Thread)?;
        let (refused, refusals) = mpsc::sync_channel(MAX_REFUSED);
        let mut marker = Marker {
            group,
            roots: roots(&settings.folders),
            mounts: HashSet::new(),
            folders: 0,
            refusals,
            woken,
        };
        marker.mark_mounts()?;
        for root in marker.roots.clone() {
            marker.mark_folders(root);
        }
        tracing::info!(
            file_systems = marker.mounts.len(),
            folders = marker.folders,
            "programs wait until they are extended"
        );
        spawn("hold-marks".to_owned(), move || keep(&failure, marker.run()))?;
        Ok(Self { refused, wake })
    }

    pub(super) fn refused(&self, path: &str) {
        // When there are too many at once, the next refusal tells again.
        if self.refused.try_send(PathBuf::from(path)).is_ok() {
            drop((&self.wake).write(&[0]));
        }
    }
}

/// The folders as they are, each once: /lib is most often a link to /usr/lib.
fn roots(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = folders.iter().filter_map(|folder| folder.canonicalize().ok()).collect();
    found.sort();
    // Sorted, a folder comes before those in it.
    found.dedup_by(|inner, outer| inner.starts_with(outer.as_path()));
    found
}

struct Marker {
    group: Arc<Fanotify>,
    roots: Vec<PathBuf>,
    /// Devices of the file systems that are marked.
    mounts: HashSet<String>,
    folders: usize,
    refusals: mpsc::Receiver<PathBuf>,
    woken: PipeReader,
}

impl Marker {
    fn run(mut self) -> Result<(), HoldError> {
        let table = File::open("/proc/self/mountinfo").map_err(HoldError::Thread)?;
        loop {
            let (changed, asked) = {
                let mut fds = [
                    // The kernel reports a change of the table as an error and urgent data (proc(5)).
                    PollFd::new(table.as_fd(), PollFlags::POLLPRI | PollFlags::POLLERR),
                    PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
                ];
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(error) => return Err(HoldError::Thread(error.into())),
                }
                let [table, woken] = &fds;
                (table.any().unwrap_or(false), woken.any().unwrap_or(false))
            };
            if changed {
                self.mark_mounts()?;
            }
            if asked {
                self.woken.read(&mut [0; 64]).map_err(HoldError::Thread)?;
                while let Ok(path) = self.refusals.try_recv() {
                    self.mark_parent(&path);
                }
            }
        }
    }

    /// Marks file systems that are not marked yet, and forgets those that are gone: their number may come back.
    fn mark_mounts(&mut self) -> Result<(), HoldError> {
        let mounts = Process::myself()
            .and_then(|process| process.mountinfo())
            .map_err(HoldError::Mounts)?;
        let mut there = HashSet::new();
        for mount in mounts {
            if PSEUDO.contains(&mount.fs_type.as_str()) || !there.insert(mount.majmin.clone()) {
                continue;
            }
            if self.mounts.contains(&mount.majmin) {
                continue;
            }
            let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
            let marked = self.group.mark(
                flags,
                MaskFlags::FAN_OPEN_EXEC_PERM,
                std::io::stdin().as_fd(),
                Some(&mount.mount_point),
            );
            if let Err(error) = marked {
                let path = mount.mount_point.display();
                tracing::warn!(%path, %error, "programs on this file system cannot wait: new ones are refused at first");
                there.remove(&mount.majmin);
            }
        }
        self.mounts = there;
        Ok(())
    }

    /// Marks a folder and those below it.
    fn mark_folders(&mut self, root: PathBuf) {
        let mut open = vec![root];
        while let Some(folder) = open.pop() {
            self.mark_folder(&folder);
            let Ok(entries) = std::fs::read_dir(&folder) else {
                continue;
            };
            let below = entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            open.extend(below.map(|entry| entry.path()));
            if self.folders >= MAX_FOLDERS {
                tracing::warn!(
                    limit = MAX_FOLDERS,
                    "too many folders: files in the others are refused at first"
                );
                return;
            }
        }
    }

    fn mark_folder(&mut self, folder: &Path) {
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_ONLYDIR;
        let mask = MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD;
        match self.group.mark(flags, mask, std::io::stdin().as_fd(), Some(folder)) {
            Ok(()) => self.folders += 1,
            Err(error) => tracing::debug!(folder = %folder.display(), %error, "a folder cannot be marked"),
        }
    }

    /// A file that was refused lies in a folder that was made since the start.
    fn mark_parent(&mut self, path: &Path) {
        let Some(folder) = path.parent() else { return };
        if self.roots.iter().any(|root| folder.starts_with(root)) && self.folders < MAX_FOLDERS {
            self.mark_folder(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_marked_once_however_they_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(base.join("usr/lib/inner")).unwrap();
        std::os::unix::fs::symlink("usr/lib", base.join("lib")).unwrap();
        let named = ["lib", "usr/lib/inner", "usr/lib", "absent"].map(|name| base.join(name));
        assert_eq!(roots(&named), [base.join("usr/lib")]);
    }
}
