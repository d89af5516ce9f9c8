//! Finds what [`Layout`] lists in the running kernel's BTF.

use assay_ebpf::{ABSENT, Layout};

use super::btf::{Btf, BtfError};

/// Resolves every offset and id for the kernel that `btf` describes.
///
/// # Errors
/// The name of the first structure, member or enumerator that the kernel does not have. Only
/// `READING_MODULE_COMPRESSED` may be missing: kernels before 7 have no id of its own for a packed module.
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
    Ok(Layout {
        bprm_file: member("linux_binprm", "file")?,
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
        super_dev: member("super_block", "s_dev")?,
        super_magic: member("super_block", "s_magic")?,
        reading_module: btf.enumerator("kernel_read_file_id", "READING_MODULE")?,
        reading_module_compressed: match btf.enumerator("kernel_read_file_id", "READING_MODULE_COMPRESSED") {
            Err(BtfError::NoEnumerator { .. }) => ABSENT,
            other => other?,
        },
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
        assert!(required <= 1, "{layout:?}");
        assert_ne!(layout.inode_ino, layout.inode_size);
        assert_ne!(layout.reading_module, ABSENT);
    }
}
