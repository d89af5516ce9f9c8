//! Does this host have what tiers 1 and 2 need? Asked before anything is loaded, so that the answer is a sentence and not
//! an errno.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::KernelError;

/// What was found out on the way, for the log's first record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preflight {
    /// The active security modules, as the kernel lists them.
    pub lsm: String,
    /// Kernel lockdown: `none`, `integrity`, or empty where the kernel has no lockdown.
    pub lockdown: String,
    /// IMA is there, whose hash the programs of tier 1 call.
    pub ima: bool,
}

impl Preflight {
    /// Checks the running host, `bpf_dir` being where the pins will go.
    ///
    /// # Errors
    /// The first thing that is missing, each with its own variant of [`KernelError`] and its remedy.
    pub fn check(bpf_dir: &Path) -> Result<Self, KernelError> {
        let found = Self::check_in(Path::new("/"))?;
        check_bpf_fs(bpf_dir)?;
        Ok(found)
    }

    /// Tier 1 needs IMA.
    ///
    /// # Errors
    /// [`KernelError::ImaMissing`].
    pub fn tier_1(self) -> Result<Self, KernelError> {
        if self.ima {
            Ok(self)
        } else {
            let path = "/sys/kernel/security/ima".into();
            Err(KernelError::ImaMissing { path })
        }
    }

    /// The same for the files below `root`, without the BPF file system.
    fn check_in(root: &Path) -> Result<Self, KernelError> {
        let security = root.join("sys/kernel/security");
        let list = security.join("lsm");
        let lsm = match fs::read_to_string(&list) {
            Ok(text) => text.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(KernelError::SecurityFsMissing { path: list });
            }
            Err(error) => return Err(KernelError::file("read", &list)(error)),
        };
        if !lsm.split(',').any(|name| name == "bpf") {
            return Err(KernelError::BpfLsmMissing { lsm });
        }
        let btf = root.join("sys/kernel/btf/vmlinux");
        if let Err(source) = fs::metadata(&btf) {
            return Err(KernelError::BtfMissing { path: btf, source });
        }
        let ima = security.join("ima");
        let ima = ima.exists();
        if ima {
            check_ima_hash(root)?;
        }
        let lockdown = lockdown_state(&security)?;
        if lockdown == "confidentiality" {
            return Err(KernelError::Lockdown);
        }
        Ok(Self { lsm, lockdown, ima })
    }
}

/// The default is built in, and SHA-256 in every distribution that was looked at; what the kernel answers is checked
/// again for each record.
fn check_ima_hash(root: &Path) -> Result<(), KernelError> {
    let path = root.join("proc/cmdline");
    let command_line = fs::read_to_string(&path).map_err(KernelError::file("read", &path))?;
    let named = command_line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("ima_hash="))
        .next_back();
    match named {
        None | Some("sha256") => Ok(()),
        Some(other) => Err(KernelError::ImaHash {
            algorithm: other.to_owned(),
        }),
    }
}

/// The word in brackets: `none [integrity] confidentiality`.
pub fn lockdown_state(security: &Path) -> Result<String, KernelError> {
    let path = security.join("lockdown");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let state = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
            Ok(state.map_or("", |(word, _)| word).to_owned())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(KernelError::file("read", &path)(error)),
    }
}

/// The folder itself need not exist yet, but what it will be made in must be a BPF file system.
fn check_bpf_fs(bpf_dir: &Path) -> Result<(), KernelError> {
    let existing = bpf_dir.ancestors().find(|path| path.exists()).unwrap_or(bpf_dir);
    let found = statfs(existing).map_err(|error| KernelError::file("look at", existing)(error.into()))?;
    if found.filesystem_type() == BPF_FS_MAGIC {
        Ok(())
    } else {
        Err(KernelError::BpfFsMissing {
            path: bpf_dir.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder that looks like a host with everything; `change` then takes something away.
    fn host(change: impl FnOnce(&Path)) -> Result<Preflight, KernelError> {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path: PathBuf = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("sys/kernel/security/lsm", "lockdown,capability,ima,bpf");
        write("sys/kernel/security/ima/runtime_measurements_count", "1\n");
        write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n");
        write("sys/kernel/btf/vmlinux", "");
        write("proc/cmdline", "quiet ima_hash=sha1 ima_hash=sha256\n");
        change(root.path());
        Preflight::check_in(root.path())
    }

    #[test]
    fn a_host_with_everything_passes() {
        let found = host(|_| ()).unwrap();
        assert_eq!(found.lsm, "lockdown,capability,ima,bpf");
        assert_eq!(found.lockdown, "integrity");
    }

    #[test]
    fn each_missing_thing_has_its_own_error() {
        let error = host(|root| fs::remove_file(root.join("sys/kernel/security/lsm")).unwrap());
        assert!(matches!(error, Err(KernelError::SecurityFsMissing { .. })));
        let error = host(|root| fs::write(root.join("sys/kernel/security/lsm"), "yama,bpfx\n").unwrap());
        let text = error.unwrap_err().to_string();
        assert!(text.contains("(lsm=yama,bpfx,bpf)"), "{text}");
        let error = host(|root| fs::remove_file(root.join("sys/kernel/btf/vmlinux")).unwrap());
        assert!(matches!(error, Err(KernelError::BtfMissing { .. })));
        let error = host(|root| fs::remove_dir_all(root.join("sys/kernel/security/ima")).unwrap()).unwrap();
        assert!(!error.ima);
        assert!(matches!(error.tier_1(), Err(KernelError::ImaMissing { .. })));
        let error = host(|root| fs::write(root.join("proc/cmdline"), "ima_hash=sha512").unwrap());
        assert!(matches!(error, Err(KernelError::ImaHash { .. })));
        let text = "none integrity [confidentiality]\n";
        let error = host(|root| fs::write(root.join("sys/kernel/security/lockdown"), text).unwrap());
        assert!(matches!(error, Err(KernelError::Lockdown)));
    }

    #[test]
    fn a_kernel_without_lockdown_passes() {
        let found = host(|root| fs::remove_file(root.join("sys/kernel/security/lockdown")).unwrap());
        assert_eq!(found.unwrap().lockdown, "");
    }

    #[test]
    fn pins_must_be_on_a_bpf_file_system() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_bpf_fs(&folder.path().join("not/yet/made"));
        assert!(matches!(error, Err(KernelError::BpfFsMissing { .. })));
    }
}
