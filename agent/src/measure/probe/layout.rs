//! Finds what the probes read in a BTF file.

use std::path::Path;

use assay_ebpf::ABSENT;
use assay_ebpf::probe_record::Layout;

use super::ProbeError;
use crate::measure::kernel::{BTF_LIMIT, Btf, BtfError, read_limited};

/// Reads the file and resolves every offset and id.
pub fn read(path: &Path) -> Result<Layout, ProbeError> {
    let missing = |source| ProbeError::BtfMissing {
        path: path.to_owned(),
        source,
    };
    let bytes = read_limited(path, BTF_LIMIT)
        .map_err(missing)?
        .ok_or_else(|| missing(std::io::ErrorKind::FileTooLarge.into()))?;
    Btf::parse(bytes)
        .and_then(|btf| resolve(&btf))
        .map_err(|source| ProbeError::Btf {
            path: path.to_owned(),
            source,
        })
}

fn resolve(btf: &Btf) -> Result<Layout, BtfError> {
    let member = |structure, path| btf.member(structure, path);
    // First name that exists.
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
    let reading = |name| btf.enumerator("kernel_read_file_id", name);
    let loading = |name| btf.enumerator("kernel_load_data_id", name);
    Ok(Layout {
        bprm_file: member("linux_binprm", "file")?,
        bprm_filename: member("linux_binprm", "filename")?,
        bprm_interp: member("linux_binprm", "interp")?,
        file_inode: member("file", "f_inode")?,
        file_mnt: either("file", &["f_path.mnt", "__f_path.mnt"])?,
        file_dentry: either("file", &["f_path.dentry", "__f_path.dentry"])?,
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
        inode_mapping: member("inode", "i_mapping")?,
        mapping_mapped: member("address_space", "i_mmap")?,
        file_mode: member("file", "f_mode")?,
        super_dev: member("super_block", "s_dev")?,
        super_magic: member("super_block", "s_magic")?,
        super_granularity: member("super_block", "s_time_gran")?,
        dentry_parent: member("dentry", "d_parent")?,
        dentry_name: either("dentry", &["d_name.name", "__d_name.name"])?,
        mount_mnt: member("mount", "mnt")?,
        mount_parent: member("mount", "mnt_parent")?,
        mount_mountpoint: member("mount", "mnt_mountpoint")?,
        vfsmount_root: member("vfsmount", "mnt_root")?,
        vma_file: member("vm_area_struct", "vm_file")?,
        vma_flags: member("vm_area_struct", "vm_flags")?,
        vma_anon: member("vm_area_struct", "anon_vma")?,
        task_mm: member("task_struct", "mm")?,
        memory_program: member("mm_struct", "exe_file")?,
        task_nsproxy: member("task_struct", "nsproxy")?,
        nsproxy_mount: member("nsproxy", "mnt_ns")?,
        mount_namespace_number: member("mnt_namespace", "ns.inum")?,
        reading_module: reading("READING_MODULE")?,
        reading_module_compressed: optional(reading("READING_MODULE_COMPRESSED"))?,
        reading_firmware: reading("READING_FIRMWARE")?,
        reading_firmware_prealloc: optional(reading("READING_FIRMWARE_PREALLOC_BUFFER"))?,
        reading_kexec_image: reading("READING_KEXEC_IMAGE")?,
        reading_kexec_initramfs: reading("READING_KEXEC_INITRAMFS")?,
        loading_module: loading("LOADING_MODULE")?,
        loading_firmware: loading("LOADING_FIRMWARE")?,
        loading_kexec_image: loading("LOADING_KEXEC_IMAGE")?,
        agent: std::process::id(),
    })
}

/// An enumerator that only some kernels have.
fn optional(found: Result<u32, BtfError>) -> Result<u32, BtfError> {
    match found {
        Err(BtfError::NoEnumerator { .. }) => Ok(ABSENT),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_all_of_it() {
        let path = Path::new("/sys/kernel/btf/vmlinux");
        if !path.exists() {
            eprintln!("skipped: this kernel has no {}", path.display());
            return;
        }
        let layout = read(path).unwrap();
        let absent = layout.words().iter().filter(|word| **word == ABSENT).count();
        assert!(absent <= 2, "{layout:?}");
        assert_ne!(layout.dentry_parent, layout.dentry_name);
        assert_ne!(layout.mount_mnt, layout.mount_parent);
    }

    #[test]
    fn another_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinux.btf");
        assert!(matches!(read(&path), Err(ProbeError::BtfMissing { .. })));
        std::fs::write(&path, "this is no BTF file").unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(
            error,
            ProbeError::Btf {
                source: BtfError::NotBtf,
                ..
            }
        ));
        assert!(error.to_string().contains("vmlinux.btf"), "{error}");
    }
}
