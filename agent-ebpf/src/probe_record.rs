//! What the probes of tier 3 tell, and the tables that the agent hands to them.
//!
//! The probes run on kernels as old as 4.19: no ring buffer, no read-only data, no hash. So a probe says which file is
//! about to be loaded and in which state it is; the agent opens it, asks a probe whether it is that very file in that
//! very state, hashes it, and makes a [`crate::Record`] of both.

use crate::read::{Fields, put};

/// Bytes of [`Record::names`] in which a name may begin; the last one may reach beyond.
pub const NAMES_BEGIN: usize = 1024;

/// Size of [`Record::names`] in bytes: so large that a mask proves to the verifier that everything stays inside.
pub const NAMES: usize = 2048;

/// Longest name in a path with its NUL, in bytes (`NAME_MAX` of the kernel).
pub const NAME: usize = 256;

/// Entries of the map of files in a known state.
pub const SEEN_ENTRIES: u32 = 16 << 10;

/// Circumstances that only the kernel sees, in [`Record::flags`].
pub mod flags {
    /// The path was walked up to the root of its mount namespace; else `names` is its lower end.
    pub const WHOLE: u32 = 1 << 0;
    /// Run as the interpreter of a script, or by binfmt_misc.
    pub const INTERPRETER: u32 = 1 << 1;
    /// Nothing but a buffer: `file` says nothing.
    pub const NO_FILE: u32 = 1 << 2;
    /// The mapping has pages of its own.
    pub const MODIFIED: u32 = 1 << 3;
    /// Every bit that has a meaning.
    pub const ALL: u32 = (1 << 4) - 1;
}

/// What the object holds in place of the kernel's version, until the agent knows it. No number of a kernel.
pub const VERSION: u32 = 0xa55a_0419;

/// Counters, index in the `COUNTERS` array of u64 that each CPU has.
pub mod counter {
    /// Records that found no room in the perf buffer.
    pub const LOST: u32 = 0;
    /// The CPU's next record's number.
    pub const SEQ: u32 = 1;
    /// Number of counters.
    pub const COUNT: u32 = 2;
}

/// Which file, and in which state. Numbers are in the machine's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// `i_version`. Moves only where somebody asks for it, and nobody does in tier 3: told, never compared.
    pub version: u64,
    /// Change time, seconds.
    pub ctime_sec: u64,
    /// File system magic.
    pub magic: u64,
    /// Change time, nanoseconds.
    pub ctime_nsec: u32,
    /// Inode generation.
    pub generation: u32,
    /// The kernel's `s_dev`.
    pub dev: u32,
    /// Link count.
    pub links: u32,
    /// Descriptors open for writing; negative = writers are kept out.
    pub writers: i32,
    /// `i_mode`; 0 = this was never filled in.
    pub mode: u32,
    /// Steps in which the file system counts time, in nanoseconds.
    pub granularity: u32,
    /// Always zero.
    pub pad: u32,
}

/// Size of a [`File`] in bytes.
pub const FILE_SIZE: usize = 72;
const _: () = assert!(core::mem::size_of::<File>() == FILE_SIZE);

/// What a probe sends; only the part of `names` that is in use.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// The file, unless [`flags::NO_FILE`]: what is loaded, or the program that opens a device or makes memory executable.
    pub file: File,
    /// CLOCK_MONOTONIC in nanoseconds.
    pub time_ns: u64,
    /// Number of this record among those of its CPU, from 0.
    pub seq: u64,
    /// cgroup v2 id of the task.
    pub cgroup: u64,
    /// Bytes in the buffer that the kernel read; number of the device that was opened; 0 without either.
    pub size: u64,
    /// One of [`crate::kind`].
    pub kind: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Process (thread group) id.
    pub pid: u32,
    /// Real user id.
    pub uid: u32,
    /// Name of the task, NUL-padded.
    pub comm: [u8; 16],
    /// Bytes of `names` in use.
    pub names_len: u32,
    /// Number of the task's mount namespace, as /proc/PID/ns/mnt shows it.
    pub mount_ns: u32,
    /// The path's names from the last to the first, each with its NUL.
    pub names: [u8; NAMES],
}

/// Bytes of a record before its names.
pub const HEADER_SIZE: usize = FILE_SIZE + 72;
const _: () = assert!(core::mem::size_of::<Record>() == HEADER_SIZE + NAMES);

/// Whose state is known. Not the state itself: that is the value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Inode number.
    pub ino: u64,
    /// `s_dev`.
    pub dev: u32,
    /// Always zero.
    pub pad: u32,
}

/// The state in which a file's content was last measured and recorded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Size in bytes.
    pub size: u64,
    /// Change time, seconds.
    pub ctime_sec: u64,
    /// Change time, nanoseconds.
    pub ctime_nsec: u32,
    /// Inode generation.
    pub generation: u32,
}

/// Size of a [`State`] in bytes.
pub const STATE_SIZE: usize = 24;
const _: () = assert!(core::mem::size_of::<State>() == STATE_SIZE && core::mem::size_of::<Key>() == 16);

impl File {
    /// Whose state it is.
    #[must_use]
    #[inline(always)]
    pub const fn key(&self) -> Key {
        Key {
            ino: self.ino,
            dev: self.dev,
            pad: 0,
        }
    }

    /// The state.
    #[must_use]
    #[inline(always)]
    pub const fn state(&self) -> State {
        State {
            size: self.size,
            ctime_sec: self.ctime_sec,
            ctime_nsec: self.ctime_nsec,
            generation: self.generation,
        }
    }
}

impl Key {
    /// As it lies in the map.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 16] {
        let mut out = [0; 16];
        let mut rest = out.as_mut_slice();
        put(&mut rest, &self.ino.to_ne_bytes());
        put(&mut rest, &self.dev.to_ne_bytes());
        out
    }
}

impl State {
    /// As it lies in the map.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; STATE_SIZE] {
        let mut out = [0; STATE_SIZE];
        let mut rest = out.as_mut_slice();
        put(&mut rest, &self.size.to_ne_bytes());
        put(&mut rest, &self.ctime_sec.to_ne_bytes());
        put(&mut rest, &self.ctime_nsec.to_ne_bytes());
        put(&mut rest, &self.generation.to_ne_bytes());
        out
    }
}

impl Record {
    /// Reads a record as it came from the perf buffer, which pads it to a multiple of 8. `None` = not a record that
    /// our probes write.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let mut record = Self {
            file: File::take(&mut fields)?,
            time_ns: u64::from_ne_bytes(fields.take()?),
            seq: u64::from_ne_bytes(fields.take()?),
            cgroup: u64::from_ne_bytes(fields.take()?),
            size: u64::from_ne_bytes(fields.take()?),
            kind: u32::from_ne_bytes(fields.take()?),
            flags: u32::from_ne_bytes(fields.take()?),
            pid: u32::from_ne_bytes(fields.take()?),
            uid: u32::from_ne_bytes(fields.take()?),
            comm: fields.take()?,
            names_len: u32::from_ne_bytes(fields.take()?),
            mount_ns: u32::from_ne_bytes(fields.take()?),
            names: [0; NAMES],
        };
        let used = usize::try_from(record.names_len).ok()?;
        record.names.get_mut(..used)?.copy_from_slice(fields.0.get(..used)?);
        let padding = fields.0.len().checked_sub(used)?;
        let sound = crate::kind::is_known(record.kind)
            && record.flags & !flags::ALL == 0
            && padding < 8
            && (record.flags & flags::NO_FILE != 0 || record.file.mode != 0)
            && record.names.get(..used)?.last().is_none_or(|last| *last == 0);
        sound.then_some(record)
    }

    /// The path's names, from the last to the first.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        let used = usize::try_from(self.names_len)
            .ok()
            .and_then(|used| self.names.get(..used.checked_sub(1)?))
            .unwrap_or(&[]);
        used.split(|byte| *byte == 0).filter(|name| !name.is_empty())
    }
}

impl File {
    /// Reads an answer of a probe. `None` = it has not answered.
    #[must_use]
    pub fn read(bytes: &[u8; FILE_SIZE]) -> Option<Self> {
        Self::take(&mut Fields(bytes)).filter(|file| file.mode != 0)
    }

    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self {
            ino: u64::from_ne_bytes(fields.take()?),
            size: u64::from_ne_bytes(fields.take()?),
            version: u64::from_ne_bytes(fields.take()?),
            ctime_sec: u64::from_ne_bytes(fields.take()?),
            magic: u64::from_ne_bytes(fields.take()?),
            ctime_nsec: u32::from_ne_bytes(fields.take()?),
            generation: u32::from_ne_bytes(fields.take()?),
            dev: u32::from_ne_bytes(fields.take()?),
            links: u32::from_ne_bytes(fields.take()?),
            writers: i32::from_ne_bytes(fields.take()?),
            mode: u32::from_ne_bytes(fields.take()?),
            granularity: u32::from_ne_bytes(fields.take()?),
            pad: u32::from_ne_bytes(fields.take()?),
        })
    }
}

macro_rules! layout {
    ($($(#[$doc:meta])* $field:ident,)+) => {
        /// Byte offsets of structure members and values of enumerators in the kernel that a BTF file describes.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Layout {
            $($(#[$doc])* pub $field: u32,)+
        }

        impl Layout {
            /// Number of fields.
            pub const WORDS: usize = [$(stringify!($field)),+].len();

            /// The fields in the order in which they lie in memory.
            #[must_use]
            pub const fn words(&self) -> [u32; Self::WORDS] {
                [$(self.$field),+]
            }
        }
    };
}

layout! {
    /// `linux_binprm.file`
    bprm_file,
    /// `linux_binprm.filename`
    bprm_filename,
    /// `linux_binprm.interp`
    bprm_interp,
    /// `file.f_inode`
    file_inode,
    /// `file.f_path.mnt`
    file_mnt,
    /// `file.f_path.dentry`
    file_dentry,
    /// `inode.i_ino`
    inode_ino,
    /// `inode.i_sb`
    inode_sb,
    /// `inode.i_size`
    inode_size,
    /// `inode.i_mode`
    inode_mode,
    /// `inode.i_nlink`
    inode_nlink,
    /// `inode.i_version`
    inode_version,
    /// `inode.i_generation`
    inode_generation,
    /// `inode.i_writecount`
    inode_writecount,
    /// Seconds of the inode's change time.
    inode_ctime_sec,
    /// Nanoseconds of the inode's change time.
    inode_ctime_nsec,
    /// `inode.i_rdev`
    inode_rdev,
    /// `inode.i_mapping`
    inode_mapping,
    /// `address_space.i_mmap`: not zero while the file is mapped.
    mapping_mapped,
    /// `file.f_mode`
    file_mode,
    /// `super_block.s_dev`
    super_dev,
    /// `super_block.s_magic`
    super_magic,
    /// `super_block.s_time_gran`
    super_granularity,
    /// `dentry.d_parent`
    dentry_parent,
    /// `dentry.d_name.name`
    dentry_name,
    /// `mount.mnt`, the part of it that other structures point to.
    mount_mnt,
    /// `mount.mnt_parent`
    mount_parent,
    /// `mount.mnt_mountpoint`
    mount_mountpoint,
    /// `vfsmount.mnt_root`
    vfsmount_root,
    /// `vm_area_struct.vm_file`
    vma_file,
    /// `vm_area_struct.vm_flags`
    vma_flags,
    /// `vm_area_struct.anon_vma`
    vma_anon,
    /// `task_struct.mm`
    task_mm,
    /// `mm_struct.exe_file`
    memory_program,
    /// `task_struct.nsproxy`
    task_nsproxy,
    /// `nsproxy.mnt_ns`
    nsproxy_mount,
    /// `mnt_namespace.ns.inum`
    mount_namespace_number,
    /// `READING_MODULE` of `enum kernel_read_file_id`
    reading_module,
    /// `READING_MODULE_COMPRESSED` of the same; newer kernels only.
    reading_module_compressed,
    /// `READING_FIRMWARE`
    reading_firmware,
    /// `READING_FIRMWARE_PREALLOC_BUFFER`; older kernels only.
    reading_firmware_prealloc,
    /// `READING_KEXEC_IMAGE`
    reading_kexec_image,
    /// `READING_KEXEC_INITRAMFS`
    reading_kexec_initramfs,
    /// `LOADING_MODULE` of `enum kernel_load_data_id`
    loading_module,
    /// `LOADING_FIRMWARE` of the same.
    loading_firmware,
    /// `LOADING_KEXEC_IMAGE` of the same.
    loading_kexec_image,
    /// The agent's process id: no offset, but told in the same way.
    agent,
}

const _: () = assert!(core::mem::size_of::<Layout>() == Layout::WORDS * 4);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind;

    /// A record as the perf buffer delivers it: `names`, and padding to a multiple of 8 that is four off.
    fn bytes(names: &[u8]) -> std::vec::Vec<u8> {
        let mut out = std::vec::Vec::new();
        for word in [4_u64, 10, 6, 1_700_000_000, 0xef53] {
            out.extend(word.to_ne_bytes());
        }
        for word in [5_u32, 7, 8, 1, 0, 0o100_755, 1, 0] {
            out.extend(word.to_ne_bytes());
        }
        for word in [11_u64, 12, 13, 0] {
            out.extend(word.to_ne_bytes());
        }
        for word in [kind::PROGRAM, flags::WHOLE, 14, 15] {
            out.extend(word.to_ne_bytes());
        }
        out.extend(b"bash\0\0\0\0\0\0\0\0\0\0\0\0");
        out.extend(u32::try_from(names.len()).unwrap().to_ne_bytes());
        out.extend(16_u32.to_ne_bytes());
        out.extend(names);
        while (out.len() + 4) % 8 != 0 {
            out.push(0xaa);
        }
        out
    }

    #[test]
    fn a_record_is_read_with_its_path_from_the_end() {
        let record = Record::read(&bytes(b"true\0bin\0usr\0")).unwrap();
        assert_eq!(
            (record.file.ino, record.file.mode, record.file.granularity),
            (4, 0o100_755, 1)
        );
        assert_eq!((record.time_ns, record.seq, record.cgroup), (11, 12, 13));
        assert_eq!((record.pid, record.uid, record.mount_ns), (14, 15, 16));
        assert!(record.names().eq([b"true".as_slice(), b"bin", b"usr"]));
        assert_eq!(Record::read(&bytes(b"")).unwrap().names().count(), 0);
    }

    #[test]
    fn what_no_probe_writes_is_refused() {
        let whole = bytes(b"true\0");
        for cut in 0..HEADER_SIZE + 5 {
            assert!(Record::read(&whole[..cut]).is_none(), "cut at {cut}");
        }
        assert!(
            Record::read(&[whole.clone(), std::vec![0; 8]].concat()).is_none(),
            "too long"
        );
        let changed = |at: usize, value: u8| {
            let mut bytes = whole.clone();
            bytes[at] = value;
            Record::read(&bytes).is_none()
        };
        let header = FILE_SIZE;
        assert!(!changed(header, 99), "a time is any number");
        assert!(changed(header + 32, 99), "kind");
        assert!(changed(header + 36, 0xff), "flags");
        assert!(changed(header + 64, 200), "length of the names");
        assert!(changed(HEADER_SIZE + 4, b'x'), "a name without an end");
        let mut no_mode = bytes(b"x\0");
        no_mode[60..64].fill(0);
        assert!(Record::read(&no_mode).is_none());
    }

    #[test]
    fn an_answer_counts_only_when_it_was_given() {
        assert_eq!(File::read(&[0; FILE_SIZE]), None);
        let answer: [u8; FILE_SIZE] = bytes(b"")[..FILE_SIZE].try_into().unwrap();
        let file = File::read(&answer).unwrap();
        assert_eq!(file.key().to_bytes()[..8], 4_u64.to_ne_bytes());
        assert_eq!(file.key().to_bytes()[8..12], 8_u32.to_ne_bytes());
        let state = file.state().to_bytes();
        assert_eq!(state[..8], 10_u64.to_ne_bytes());
        assert_eq!(state[8..16], 1_700_000_000_u64.to_ne_bytes());
        assert_eq!(state[16..20], 5_u32.to_ne_bytes());
        assert_eq!(state[20..], 7_u32.to_ne_bytes());
    }
}
