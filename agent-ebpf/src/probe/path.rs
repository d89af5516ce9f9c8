//! A file's path, by its directory entries and mounts: the helper that tells it is newer than these kernels.

use assay_ebpf::probe_record::{Layout, NAME, NAMES, NAMES_BEGIN, Record, flags};
use aya_ebpf::helpers::generated::bpf_probe_read_str;

use crate::kernel::{bounded, read};

const _: () = assert!(NAMES_BEGIN == 1024 && NAME == 256 && NAMES == 2048);

/// Where on the way up the walk is.
struct Walk {
    /// `struct dentry`
    dentry: u64,
    /// `struct mount`
    mount: u64,
    /// Bytes of names so far.
    used: u64,
}

/// Whether the walk is over, and how.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    On,
    /// The root was reached.
    Whole,
    /// A name could not be read, or there are too many.
    Cut,
}

/// Writes the names of the path of `file` (a `struct file`) to the record, and says whether they are all.
///
/// # Safety
/// `record` is writable.
#[inline(always)]
pub unsafe fn names(layout: &Layout, file: u64, record: *mut Record) {
    let mnt: u64 = read(file, layout.file_mnt);
    let mut walk = Walk {
        dentry: read(file, layout.file_dentry),
        mount: mnt.wrapping_sub(layout.mount_mnt as u64),
        used: 0,
    };
    // A loop would be a jump backwards: 32 steps, written out. A step is a name, or a mount point.
    macro_rules! steps {
        (@ $_:tt) => {
            // SAFETY: as for this function.
            match unsafe { walk.step(layout, record) } {
                Step::On => {}
                end => {
                    unsafe { walk.finish(record, end) };
                    return;
                }
            }
        };
        ($($times:tt)*) => { $( steps!(@ $times); )* };
    }
    steps!(. . . . . . . . . . . . . . . .);
    steps!(. . . . . . . . . . . . . . . .);
    // SAFETY: as for this function.
    unsafe { walk.finish(record, Step::Cut) };
}

impl Walk {
    /// One step up.
    #[inline(always)]
    unsafe fn step(&mut self, layout: &Layout, record: *mut Record) -> Step {
        let root: u64 = read(self.mount, layout.mount_mnt + layout.vfsmount_root);
        if self.dentry == root {
            let parent: u64 = read(self.mount, layout.mount_parent);
            if parent == self.mount || parent == 0 {
                return Step::Whole;
            }
            self.dentry = read(self.mount, layout.mount_mountpoint);
            self.mount = parent;
            return Step::On;
        }
        let parent: u64 = read(self.dentry, layout.dentry_parent);
        let name: u64 = read(self.dentry, layout.dentry_name);
        let at = bounded::<1023>(self.used);
        // SAFETY: a name begins below NAMES_BEGIN and has at most NAME bytes: it ends inside `names`.
        let length = unsafe {
            let out = (&raw mut (*record).names).cast::<u8>().add(at as usize);
            bpf_probe_read_str(out.cast(), NAME as u32, name as *const _)
        };
        if length <= 1 {
            return Step::Cut;
        }
        // The mask changes nothing but what the verifier knows: with the same bounds after every name it need not look at
        // each number of names and mount points on its own, which would be more than 4.19 looks at.
        self.used = bounded::<2047>(self.used + length as u64);
        if self.used >= NAMES_BEGIN as u64 {
            return Step::Cut;
        }
        // A file without a place in any tree (a memfd) is its own parent.
        if parent == self.dentry {
            return Step::Whole;
        }
        self.dentry = parent;
        Step::On
    }

    #[inline(always)]
    unsafe fn finish(&self, record: *mut Record, end: Step) {
        unsafe {
            (*record).names_len = self.used as u32;
            if end == Step::Whole {
                (*record).flags |= flags::WHOLE;
            }
        }
    }
}
