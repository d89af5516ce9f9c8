//! A look at all control groups, from which the kernel programs learn who has their files open.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use procfs::ProcError;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsmount, fsopen};

use super::KernelError;
use super::guard::CGROUP_MOUNTS;

/// Groups that are looked at; more than a host has.
const MAX_GROUPS: usize = 65_536;

/// What a group is frozen and killed by, and what is moved into it by.
const FILES: [&str; 4] = ["cgroup.freeze", "cgroup.kill", "cgroup.procs", "cgroup.threads"];

/// The same in version 1. The freezer comes first: a group that somebody has just frozen is known to be before it is asked
/// who may move something into it.
const FILES_OF_VERSION_1: [&str; 3] = ["freezer.state", "tasks", "cgroup.procs"];

/// Opens these files of all control groups for writing, and closes them: the kernel programs learn of them that way, and record
/// those that somebody has open and could freeze the agent by. From then on they keep watch themselves.
///
/// # Errors
/// [`KernelError::OldFreezer`].
pub fn look_through() -> Result<(), KernelError> {
    for mount in CGROUP_MOUNTS {
        if statfs(mount).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            look_below(PathBuf::from(mount), &FILES);
        }
    }
    let freezer = old_freezer().map_err(|source| KernelError::OldFreezer { source })?;
    if let Some(mount) = freezer {
        let root = Path::new("/proc/self/fd").join(mount.as_raw_fd().to_string());
        look_below(root, &FILES_OF_VERSION_1);
    }
    Ok(())
}

fn look_below(root: PathBuf, files: &[&str]) {
    let mut folders = vec![root];
    let mut looked_at = 0;
    while let Some(folder) = folders.pop() {
        if looked_at == MAX_GROUPS {
            tracing::warn!(limit = MAX_GROUPS, "there are more control groups than are looked at");
            return;
        }
        looked_at += 1;
        for name in files {
            // The root has no freezer, and a group may go meanwhile.
            let _absent = OpenOptions::new().write(true).open(folder.join(name));
        }
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        let below = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders.extend(below.map(|entry| entry.path()));
    }
}

/// The hierarchy of version 1 that has the freezer, if one has: there is one at most. It lives on without a mount, or with one that only
/// another mount namespace or an open file knows; so it is mounted once more, at no place.
fn old_freezer() -> io::Result<Option<OwnedFd>> {
    let controllers = match procfs::cgroups() {
        Ok(controllers) => controllers.0,
        // A kernel without control groups.
        Err(ProcError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(io::Error::other(error)),
    };
    let freezer = controllers.iter().find(|controller| controller.name == "freezer");
    let Some(hierarchy) = freezer.map(|controller| controller.hierarchy).filter(|id| *id != 0) else {
        return Ok(None);
    };
    let context = fsopen("cgroup", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // What it has beside the freezer must be named, too.
    for controller in controllers
        .iter()
        .filter(|controller| controller.hierarchy == hierarchy)
    {
        fsconfig_set_flag(&context, controller.name.as_str())?;
    }
    fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(Some(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?))
}
