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
    /// `linux_binprm.filename`
    bprm_filename,
    /// `linux_binprm.interp`
    bprm_interp,
    /// `linux_binprm.buf`: the file's first bytes
    bprm_buf,
    /// `file.f_inode`
    file_inode,
    /// `file.f_mode`
    file_mode,
    /// `file.f_flags`
    file_flags,
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
    /// `inode.i_rdev`
    inode_rdev,
    /// `inode.i_link`: where a link leads, if that lies in memory
    inode_link,
    /// `inode.i_private`: of a control group's folder, its `kernfs_node`
    inode_private,
    /// `inode.i_mapping`
    inode_mapping,
    /// `address_space.i_mmap`: its root's node is the member that comes first
    mapping_mapped,
    /// `path.dentry`
    path_dentry,
    /// `dentry.d_parent`
    dentry_parent,
    /// `dentry.d_inode`
    dentry_inode,
    /// `dentry.d_name.name`
    dentry_name,
    /// `vfsmount.mnt_sb`
    mount_super,
    /// `super_block.s_flags`
    super_flags,
    /// `super_block.s_dev`
    super_dev,
    /// `super_block.s_magic`
    super_magic,
    /// `task_struct.tgid`
    task_tgid,
    /// `task_struct.group_leader`
    task_leader,
    /// `task_struct.start_boottime`
    task_start,
    /// `task_struct.jobctl`
    task_jobctl,
    /// `task_struct.ptrace`: not 0 while somebody traces it
    task_ptrace,
    /// `cgroup.kn`
    cgroup_node,
    /// `cgroup.level`: how many groups are above it
    cgroup_level,
    /// `cgroup.ancestors`: the groups above it and itself; absent before Linux 6.1
    cgroup_ancestors,
    /// `cgroup.root`
    cgroup_root,
    /// `cgroup_root.hierarchy_id`: 0 is version 2
    root_hierarchy,
    /// `cgroup.self.flags`
    cgroup_flags,
    /// `cgroup.freezer.freeze`: whether this group is to be frozen
    cgroup_freeze,
    /// `cgroup.subsys`: version 1's controllers of this group, by id
    cgroup_subsys,
    /// `freezer_cgrp_id` of `enum cgroup_subsys_id`; absent if the kernel has no version 1 freezer
    freezer_id,
    /// `freezer.state` of version 1; absent with the one before
    freezer_state,
    /// `kernfs_node.id`
    node_id,
    /// `kernfs_node.priv`: of a control group's folder, the group
    node_priv,
    /// `task_struct.mm`
    task_mm,
    /// `mm_struct.exe_file`
    mm_exe_file,
    /// `mm_struct.arg_start`
    mm_arg_start,
    /// `mm_struct.arg_end`
    mm_arg_end,
    /// `vm_area_struct.vm_file`
    vma_file,
    /// `vm_area_struct.anon_vma`
    vma_anon,
    /// `vm_area_struct.vm_flags`
    vma_flags,
    /// `bpf_map.id`
    map_id,
    /// `bpf_prog.aux`
    prog_aux,
    /// `bpf_prog.type`
    prog_type,
    /// `bpf_prog.expected_attach_type`
    prog_attach_type,
    /// `bpf_prog.len`: instructions
    prog_len,
    /// `bpf_prog.tag`
    prog_tag,
    /// `bpf_prog.insnsi`
    prog_instructions,
    /// `bpf_prog_aux.id`
    aux_id,
    /// `bpf_prog_aux.name`
    aux_name,
    /// `READING_FIRMWARE` of `enum kernel_read_file_id`
    reading_firmware,
    /// `READING_KEXEC_IMAGE` of the same
    reading_kexec_image,
    /// `READING_KEXEC_INITRAMFS` of the same
    reading_kexec_initramfs,
    /// `LOADING_KEXEC_IMAGE` of `enum kernel_load_data_id`
    loading_kexec_image,
    /// `READING_MODULE` of `enum kernel_read_file_id`
    reading_module,
    /// `READING_MODULE_COMPRESSED` of the same; newer kernels only.
    reading_module_compressed,
    /// `LOADING_MODULE` of `enum kernel_load_data_id`
    loading_module,
}

const _: () = assert!(core::mem::size_of::<Layout>() == Layout::WORDS * 4);
