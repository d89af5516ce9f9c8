//! Where the running kernel keeps what the programs read.
//!
//! Rust has no CO-RE relocations for BPF yet, so the agent resolves these numbers from the running kernel's BTF and
//! puts them into the object's read-only data before it loads it. The verifier then sees constants, which is what
//! lets it follow `pointer + offset` as a typed pointer.

/// In a field of [`Layout`]: this kernel has no such member or enumerator.
pub const ABSENT: u32 = u32::MAX;

macro_rules! layout {
    ($($(#[$doc:meta])* $field:ident,)+) => {
        /// Byte offsets of structure members and values of enumerators in the running kernel.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Layout {
            $($(#[$doc])* pub $field: u32,)+
        }

        impl Layout {
            /// Number of fields.
            pub const WORDS: usize = [$(stringify!($field)),+].len();
            /// What the object holds until the loader fills it in.
            pub const UNSET: Self = Self { $($field: ABSENT,)+ };

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
    /// `file.f_inode`
    file_inode,
    /// `file.f_path`
    file_path,
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
    /// `super_block.s_dev`
    super_dev,
    /// `super_block.s_magic`
    super_magic,
    /// `READING_MODULE` of `enum kernel_read_file_id`
    reading_module,
    /// `READING_MODULE_COMPRESSED` of the same; newer kernels only.
    reading_module_compressed,
    /// `LOADING_MODULE` of `enum kernel_load_data_id`
    loading_module,
}

const _: () = assert!(core::mem::size_of::<Layout>() == Layout::WORDS * 4);
