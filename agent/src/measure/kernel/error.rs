//! Everything that can keep the kernel side from starting or from being read, one variant for each.

use std::io;
use std::path::PathBuf;

use super::btf::BtfError;

/// The kernel side cannot be started or read. The texts say which tier lacks what, and how to turn it on.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The LSM list cannot be read, since securityfs is not mounted.
    #[error(
        "tier 1 cannot be told: {path} does not exist; mount securityfs with `mount -t securityfs securityfs /sys/kernel/security`"
    )]
    SecurityFsMissing {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// The kernel runs without the BPF LSM.
    #[error(
        "tiers 1 and 2 need the BPF LSM, which this kernel does not run (it lists \"{lsm}\"): add `bpf` to lsm= on the kernel \
         command line (lsm={lsm},bpf) and reboot; a kernel built without CONFIG_BPF_LSM is measured in tier 3 ([measure] tier = \"auto\" or 3)"
    )]
    BpfLsmMissing {
        /// The list that the kernel gives.
        lsm: String,
    },
    /// The kernel does not describe its structures.
    #[error(
        "tier 1 needs the kernel's type information, and {path} cannot be read: run a kernel built with CONFIG_DEBUG_INFO_BTF"
    )]
    BtfMissing {
        /// The file that was looked for.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// The kernel was built without IMA, whose hash function tier 1 calls.
    #[error(
        "tier 1 needs IMA in the kernel (CONFIG_IMA; no IMA policy is needed), and {path} does not exist: run a kernel that has it, or let \
         the agent choose tier 2, which does without ([measure] tier = \"auto\" in agent.toml)"
    )]
    ImaMissing {
        /// The folder that was looked for.
        path: PathBuf,
    },
    /// IMA is told to use a hash other than SHA-256.
    #[error(
        "tier 1 needs SHA-256 from IMA, and the kernel command line says ima_hash={algorithm}: take that word away, or make it ima_hash=sha256"
    )]
    ImaHash {
        /// The algorithm that the command line names.
        algorithm: String,
    },
    /// Kernel lockdown keeps BPF programs from reading kernel memory.
    #[error(
        "tier 1 cannot hash kernel modules under lockdown=confidentiality, which keeps BPF programs from reading the kernel's buffers: \
         use lockdown=integrity"
    )]
    Lockdown,
    /// The place for the pins is not on a BPF file system.
    #[error(
        "{path} is not on a BPF file system, so the kernel programs could not outlive the agent: mount one with `mount -t bpf bpf \
         /sys/fs/bpf`, or set bpf_dir to a folder in one"
    )]
    BpfFsMissing {
        /// The folder of the configuration.
        path: PathBuf,
    },
    /// Another agent reads the queue.
    #[error("another assay-agent uses {path}: stop it first (systemctl stop assay-agent)")]
    InUse {
        /// The folder of the pins.
        path: PathBuf,
    },
    /// A file or folder could not be used.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The object with the kernel programs is larger than any that we build.
    #[error("{path} has more than {limit} bytes: not the kernel programs of this package, install it again")]
    ObjectTooLarge {
        /// The object.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The kernel lacks a structure, member or enumerator.
    #[error("tier 1 does not know this kernel's structures")]
    Btf(#[from] BtfError),
    /// The running kernel's BTF was refused by the loader's own reader.
    #[error("the kernel's type information could not be read")]
    KernelBtf(#[source] Box<aya::BtfError>),
    /// The object could not be read, or its maps could not be made.
    #[error(
        "the kernel programs in {path} could not be loaded; they may be of another version: install the package again"
    )]
    Object {
        /// The object.
        path: PathBuf,
        /// What the loader says.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// The freezer of cgroup version 1 is in use, and could not be looked at.
    #[error(
        "the freezer of cgroup version 1 is in use (/proc/cgroups), and who has it open cannot be looked at: remove its groups and unmount it, \
         or do without protection ([measure] protect = false, in mode observe)"
    )]
    OldFreezer {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The object has no such program.
    #[error("{path} has no kernel program `{program}`: it is of another version, install the package again")]
    NoProgram {
        /// The object.
        path: PathBuf,
        /// The program's name.
        program: &'static str,
    },
    /// The kernel forbids loading.
    #[error(
        "the kernel does not permit loading LSM programs (EPERM): run the agent as root with CAP_SYS_ADMIN or CAP_BPF and CAP_PERFMON; \
         as root, the cause is a kernel or hypervisor that forbids them"
    )]
    NotPermitted {
        /// The program that was refused.
        program: &'static str,
    },
    /// The kernel's verifier refused a program.
    #[error("the kernel refused the program `{program}`; the end of its verifier's report:\n{report}")]
    Refused {
        /// The program.
        program: &'static str,
        /// Last lines of the verifier's report.
        report: String,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
    /// A program could not be loaded or attached.
    #[error("the kernel program `{program}` could not be {step}")]
    Program {
        /// The program.
        program: &'static str,
        /// "loaded", "attached", "detached from the loader" or "looked at".
        step: &'static str,
        /// What the loader says.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A link could not be pinned or opened.
    #[error("the attachment {path} could not be {step}")]
    Link {
        /// Path of the pin.
        path: PathBuf,
        /// "pinned" or "opened".
        step: &'static str,
        /// What the loader says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A pinned map could not be opened or read.
    #[error("the kernel map {name} could not be used")]
    Map {
        /// Name of the map.
        name: &'static str,
        /// What the loader says.
        #[source]
        source: Box<aya::maps::MapError>,
    },
    /// Pins that this version cannot take over.
    #[error(
        "{path} belongs to another version of the agent, and what its programs have queued would be lost: reboot the host to start afresh"
    )]
    ForeignPins {
        /// The pin.
        path: PathBuf,
    },
    /// Something lies in the queue that our programs do not write.
    #[error(
        "the kernel's queue holds {length} bytes that are no record of this version: somebody else wrote there; reboot the host"
    )]
    ForeignRecord {
        /// Length of the entry.
        length: usize,
    },
}

impl KernelError {
    /// For `map_err` on file operations.
    pub(in crate::measure) fn file(operation: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            operation,
            path,
            source,
        }
    }

    /// Sorts a loader's answer: no permission, refused by the verifier, or anything else.
    pub(in crate::measure) fn load(program: &'static str, error: aya::programs::ProgramError) -> Self {
        use aya::programs::ProgramError;
        match error {
            ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(nix::libc::EPERM) => {
                Self::NotPermitted { program }
            }
            ProgramError::LoadError { io_error, verifier_log } => Self::Refused {
                program,
                report: last_lines(&verifier_log.to_string()),
                source: io_error,
            },
            other => Self::Program {
                program,
                step: "loaded",
                source: Box::new(other),
            },
        }
    }
}

/// The end of a verifier's report: the reason is there, and the whole can have megabytes.
fn last_lines(report: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = report.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(LINES)..).unwrap_or(&[]).join("\n")
}
