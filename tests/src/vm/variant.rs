//! Ways to boot a test machine. A machine that was saved comes up as it was booted, so saved machines carry the
//! content of this file in their names.

use crate::HarnessError;
use crate::guest::Guest;

/// How a machine is booted before it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Variant {
    /// As the agent wants it: `bpf` among the security modules, no IMA policy.
    #[default]
    Default,
    /// Without `bpf` among the security modules: what the agent's tier 3 is for.
    NoBpfLsm,
    /// IMA measures with its built-in policy `tcb`: programs, executable mappings, modules, firmware, and whatever
    /// root reads. Not on 5.10, where Debian leaves IMA out.
    ImaTcb,
    /// IMA measures loads only: `tcb` without its FILE_CHECK rules, which log every file that root reads. Not on 5.10.
    ImaExec,
    /// systemd is process 1, and nothing of Assay is there but the harness's helper: for what packages install.
    Systemd,
}

/// The security modules of [`Variant::Default`] less `bpf`; a later `lsm=` replaces an earlier one.
const NO_BPF: &str = "lsm=landlock,lockdown,yama,integrity,apparmor";
/// Where the kernel takes a policy, a line a write. Debian's kernels take one once, when this file is closed it is gone:
/// they are built without IMA_WRITE_POLICY.
const IMA_POLICY: &str = "/sys/kernel/security/ima/policy";
/// The built-in `tcb` policy of security/integrity/ima/ima_policy.c, less its two FILE_CHECK rules; first come the file
/// systems that it never measures.
const IMA_EXEC: &str = "\
dont_measure fsmagic=0x9fa0
dont_measure fsmagic=0x62656572
dont_measure fsmagic=0x64626720
dont_measure fsmagic=0x1021994
dont_measure fsmagic=0x1cd1
dont_measure fsmagic=0x42494e4d
dont_measure fsmagic=0x73636673
dont_measure fsmagic=0xf97cff8c
dont_measure fsmagic=0x43415d53
dont_measure fsmagic=0x27e0eb
dont_measure fsmagic=0x63677270
dont_measure fsmagic=0x6e736673
dont_measure fsmagic=0xde5e81e4
measure func=MMAP_CHECK mask=MAY_EXEC
measure func=BPRM_CHECK mask=MAY_EXEC
measure func=MODULE_CHECK
measure func=FIRMWARE_CHECK
measure func=POLICY_CHECK
";

impl Variant {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Default,
        Self::NoBpfLsm,
        Self::ImaTcb,
        Self::ImaExec,
        Self::Systemd,
    ];

    /// Its name, as in files and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::NoBpfLsm => "no-bpf-lsm",
            Self::ImaTcb => "ima-tcb",
            Self::ImaExec => "ima-exec",
            Self::Systemd => "systemd",
        }
    }

    /// What it adds to the kernel's command line.
    pub fn cmdline(self) -> &'static str {
        match self {
            Self::Default | Self::ImaExec => "",
            Self::NoBpfLsm => NO_BPF,
            Self::ImaTcb => "ima_policy=tcb",
            Self::Systemd => "init=/usr/lib/systemd/systemd net.ifnames=0",
        }
    }

    /// What is done in the machine once it is up.
    pub(super) fn prepare(self, guest: &Guest) -> Result<(), HarnessError> {
        match self {
            Self::Default | Self::NoBpfLsm | Self::ImaTcb | Self::Systemd => Ok(()),
            Self::ImaExec => guest.put(IMA_POLICY, 0o600, IMA_EXEC.as_bytes()),
        }
    }
}
