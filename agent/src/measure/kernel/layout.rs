//! Finds what [`Layout`] lists in the running kernel's BTF.

use assay_ebpf::{ABSENT, Layout};

use super::btf::{Btf, BtfError};

/// Resolves every offset and id for the kernel that `btf` describes.
///
/// # Errors
/// The name of the first structure, member or enumerator that the kernel does not have. Only
/// `READING_MODULE_COMPRESSED` may be missing: kernels before 7 have no id of its own for a packed module; and
/// `cgroup.ancestors`, before 6.1; and the freezer of cgroup version 1, which a kernel may be built without.
pub fn resolve(btf: &Btf) -> Result<Layout, BtfError> {
    let member = |structure, path| btf.member(structure, path);
    // The change time has been renamed twice (6.6, 6.11), the path once (7.0): first name that exists.
    let either = |structure: &str, paths: &[&str]| {
        let mut last = BtfError::NoStruct {
            name: structure.to_owned(),
        };
        for path in paths {
            match btf.member(structure, path) {
                Ok(offset) => return Ok(offset),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    let optional = |enumeration, name| match btf.enumerator(enumeration, name) {
        Err(BtfError::NoEnumerator { .. }) => Ok(ABSENT),
        other => other,
    };
    let freezer_id = optional("cgroup_subsys_id", "freezer_cgrp_id")?;
    Ok(Layout {
        bprm_file: member("linux_binprm", "file")?,
        bprm_filename: member("linux_binprm", "filename")?,
        bprm_interp: member("linux_binprm", "interp")?,
        bprm_buf: member("linux_binprm", "buf")?,
        file_mode: member("file", "f_mode")?,
        file_flags: member("file", "f_flags")?,
        file_inode: member("file", "f_inode")?,
        file_path: either("file", &["f_path", "__f_path"])?,
        inode_ino: member("inode", "i_ino")?,
        inode_sb: member("inode", "i_sb")?,
        inode_size: member("inode", "i_size")?,
        inode_mode: member("inode", "i_mode")?,
        inode_nlink: member("inode", "i_nlink")?,
        inode_version: member("inode", "i_version")?,
        inode_generation: member("inode", "i_generation")?,
        inode_writecount: member("inode", "i_writecount")?,
        inode_ctime_sec: either("inode", &["i_ctime_sec", "__i_ctime.tv_sec", "i_ctime.tv_sec"])?,
        inode_ctime_nsec: either("inode", &["i_ctime_nsec", "__i_ctime.tv_nsec", "i_ctime.tv_nsec"])?,
        inode_rdev: member("inode", "i_rdev")?,
        inode_link: member("inode", "i_link")?,
        inode_private: member("inode", "i_private")?,
        inode_mapping: member("inode", "i_mapping")?,
        mapping_mapped: member("address_space", "i_mmap")?,
        path_dentry: member("path", "dentry")?,
        dentry_parent: member("dentry", "d_parent")?,
        dentry_inode: member("dentry", "d_inode")?,
        dentry_name: member("dentry", "d_name.name")?,
        mount_super: member("vfsmount", "mnt_sb")?,
        super_flags: member("super_block", "s_flags")?,
        super_dev: member("super_block", "s_dev")?,
        super_magic: member("super_block", "s_magic")?,
        task_tgid: member("task_struct", "tgid")?,
        task_leader: member("task_struct", "group_leader")?,
        task_start: either("task_struct", &["start_boottime", "real_start_time"])?,
        task_jobctl: member("task_struct", "jobctl")?,
        task_ptrace: member("task_struct", "ptrace")?,
        cgroup_node: member("cgroup", "kn")?,
        cgroup_level: member("cgroup", "level")?,
        cgroup_ancestors: member("cgroup", "ancestors").unwrap_or(ABSENT),
        cgroup_root: member("cgroup", "root")?,
        root_hierarchy: member("cgroup_root", "hierarchy_id")?,
        cgroup_flags: member("cgroup", "self.flags")?,
        cgroup_freeze: member("cgroup", "freezer.freeze")?,
        cgroup_subsys: member("cgroup", "subsys")?,
        freezer_id,
        freezer_state: if freezer_id == ABSENT {
            ABSENT
        } else {
            member("freezer", "state")?
        },
        node_id: member("kernfs_node", "id")?,
        node_priv: member("kernfs_node", "priv")?,
        task_mm: member("task_struct", "mm")?,
        mm_exe_file: member("mm_struct", "exe_file")?,
        mm_arg_start: member("mm_struct", "arg_start")?,
        mm_arg_end: member("mm_struct", "arg_end")?,
        vma_file: member("vm_area_struct", "vm_file")?,
        vma_anon: member("vm_area_struct", "anon_vma")?,
        vma_flags: member("vm_area_struct", "vm_flags")?,
        map_id: member("bpf_map", "id")?,
        prog_aux: member("bpf_prog", "aux")?,
        prog_type: member("bpf_prog", "type")?,
        prog_attach_type: member("bpf_prog", "expected_attach_type")?,
        prog_len: member("bpf_prog", "len")?,
        prog_tag: member("bpf_prog", "tag")?,
        prog_instructions: member("bpf_prog", "insnsi")?,
        aux_id: member("bpf_prog_aux", "id")?,
        aux_name: member("bpf_prog_aux", "name")?,
        reading_firmware: btf.enumerator("kernel_read_file_id", "READING_FIRMWARE")?,
        reading_kexec_image: btf.enumerator("kernel_read_file_id", "READING_KEXEC_IMAGE")?,
        reading_kexec_initramfs: btf.enumerator("kernel_read_file_id", "READING_KEXEC_INITRAMFS")?,
        loading_kexec_image: btf.enumerator("kernel_load_data_id", "LOADING_KEXEC_IMAGE")?,
        reading_module: btf.enumerator("kernel_read_file_id", "READING_MODULE")?,
        reading_module_compressed: optional("kernel_read_file_id", "READING_MODULE_COMPRESSED")?,
        loading_module: btf.enumerator("kernel_load_data_id", "LOADING_MODULE")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_all_of_it() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            eprintln!("skipped: this kernel has no /sys/kernel/btf/vmlinux");
            return;
        };
        let layout = resolve(&Btf::parse(bytes).unwrap()).unwrap();
        let required = layout.words().iter().filter(|word| **word == ABSENT).count();
        assert!(required <= 4, "{layout:?}");
        assert_ne!(layout.inode_ino, layout.inode_size);
        assert_ne!(layout.reading_module, ABSENT);
    }
}
