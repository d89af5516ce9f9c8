//! Does this host have what tier 3 needs? Asked before anything is loaded, so that the answer is a sentence.

use std::path::Path;

use super::ProbeError;
use crate::measure::kernel::lockdown_state;

/// Checks the running host; `btf` is the BTF file that will be used.
///
/// # Errors
/// The first thing that is missing, each with its own variant of [`ProbeError`] and its remedy.
pub fn check(btf: &Path) -> Result<(), ProbeError> {
    check_in(Path::new("/"), btf)
}

/// The same for the files below `root`.
fn check_in(root: &Path, btf: &Path) -> Result<(), ProbeError> {
    let probes = root.join("sys/bus/event_source/devices/kprobe/type");
    if !probes.exists() {
        return Err(ProbeError::NoProbes { path: probes });
    }
    if lockdown_state(&root.join("sys/kernel/security"))? == "confidentiality" {
        return Err(ProbeError::Lockdown);
    }
    std::fs::metadata(btf)
        .map(drop)
        .map_err(|source| ProbeError::BtfMissing {
            path: btf.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_thing_has_its_own_error() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let btf = root.path().join("vmlinux.btf");
        let check = || check_in(root.path(), &btf);
        assert!(matches!(check(), Err(ProbeError::NoProbes { .. })));
        write("sys/bus/event_source/devices/kprobe/type", "6\n");
        let error = check().unwrap_err();
        assert!(matches!(error, ProbeError::BtfMissing { .. }));
        assert!(error.to_string().contains("agent.toml"), "{error}");
        write("vmlinux.btf", "");
        assert!(check().is_ok(), "a kernel without lockdown");
        write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n");
        assert!(check().is_ok());
        write("sys/kernel/security/lockdown", "none integrity [confidentiality]\n");
        assert!(matches!(check(), Err(ProbeError::Lockdown)));
    }
}
