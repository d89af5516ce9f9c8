//! What the runtime log says: the events of one host, from the agent's start to its stop.
//!
//! The byte form (nested TLVs, see [`codec`]) is canonical: fields come in one order, each at most once, unknown kinds
//! and fields are refused. So every event has one encoding, and a digest over it says one thing.

pub mod codec;
mod fields;
pub mod flags;

use core::fmt;

use serde::Serialize;
use smol_str::SmolStr;

use crate::digest::{Algorithm, Sha256Digest};

pub(crate) use codec::each;
pub use codec::{EventError, decode, decode_all, encode};
pub use flags::{flag_bit, flag_names};

/// Longest path in an event, in bytes of UTF-8.
pub const MAX_PATH: usize = 512;
/// Longest task name in an event, in bytes of UTF-8. The kernel's has 15; a lossy conversion can triple them.
pub const MAX_COMM: usize = 64;
/// Longest kernel command line, in bytes of UTF-8.
pub const MAX_CMDLINE: usize = 8192;
/// Longest of all other texts, in bytes of UTF-8.
pub const MAX_TEXT: usize = 1024;

/// One thing that happened, as the log records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The agent started to measure; always the first event of a log, and again after each restart of the agent.
    /// Boxed: it is rare and large, and would make every load of a long log take as much memory.
    AgentStart(Box<AgentStart>),
    /// Code that already ran when the agent started.
    Inventory(Measurement),
    /// The inventory is complete: from here on, every load is measured as it happens.
    Ready,
    /// Code that was about to run.
    Load(Measurement),
    /// Something that the promise of the log does not cover, said out loud.
    Violation(Violation),
    /// The agent stopped in an orderly way.
    AgentStop,
    /// Something about measuring itself that breaks no promise, and that a verifier wants to know.
    Notice(Notice),
}

impl From<AgentStart> for Event {
    fn from(start: AgentStart) -> Self {
        Self::AgentStart(Box::new(start))
    }
}

impl Event {
    /// Name of the kind: `agent-start`, `inventory`, `ready`, `load`, `violation`, `agent-stop` or `notice`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AgentStart(_) => "agent-start",
            Self::Inventory(_) => "inventory",
            Self::Ready => "ready",
            Self::Load(_) => "load",
            Self::Violation(_) => "violation",
            Self::AgentStop => "agent-stop",
            Self::Notice(_) => "notice",
        }
    }

    /// The code that it is about, if it is about code.
    #[must_use]
    pub const fn code(&self) -> Option<&Measurement> {
        match self {
            Self::Inventory(code) | Self::Load(code) => Some(code),
            _ => None,
        }
    }
}

/// Who measures, and on what system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AgentStart {
    /// Version of the agent.
    pub agent_version: String,
    /// Digest of the agent's own executable.
    pub agent_digest: Sha256Digest,
    /// Digest of the object with the kernel programs.
    pub bpf_digest: Sha256Digest,
    /// `/proc/sys/kernel/random/boot_id`, text form of a UUID.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel_release: String,
    /// `/proc/cmdline`.
    pub cmdline: String,
    /// `/sys/kernel/security/lsm`: active security modules, in order.
    pub lsm: String,
    /// Lockdown state: `none`, `integrity` or `confidentiality`; empty where the kernel has none.
    pub lockdown: String,
    /// Measuring tier, 1 to 3 (1 is the full promise).
    pub tier: u8,
    /// What happens to a load before it is extended.
    pub mode: Mode,
    /// Value of the runtime PCR before the first record of this log, per extended bank.
    #[serde(serialize_with = "codec::digests_as_json")]
    pub pcr_start: Vec<(Algorithm, Vec<u8>)>,
    /// After a restart: the last sequence number of the kernel programs that an earlier agent logged.
    pub predecessor: Option<u64>,
    /// What this tier, on this kernel, cannot see: one sentence for people; empty when it sees all that is promised.
    pub blind: String,
    /// Whether the agent keeps the rest of the host, root included, away from itself.
    pub protected: bool,
}

/// What happens to a load before it is extended into the PCR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It runs; the record follows as fast as the TPM goes.
    Observe,
    /// It waits until it is extended.
    Hold,
    /// Only approved digests run at all.
    Enforce,
}

impl Mode {
    /// Code in the log.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Observe => 1,
            Self::Hold => 2,
            Self::Enforce => 3,
        }
    }

    /// The mode with this code.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Observe),
            2 => Some(Self::Hold),
            3 => Some(Self::Enforce),
            _ => None,
        }
    }

    /// `observe`, `hold` or `enforce`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Hold => "hold",
            Self::Enforce => "enforce",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One piece of code: what it hashes to, and the circumstances. Only kind, digest and flags are evidence; path and
/// task name are what the kernel said, a hint for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Measurement {
    /// What was loaded.
    pub kind: LoadKind,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Digest of the code; none when it could not be hashed, which no policy allows.
    pub digest: Option<Sha256Digest>,
    /// Bytes hashed.
    pub size: u64,
    /// Path, not-UTF-8 bytes replaced; at most [`MAX_PATH`] bytes.
    pub path: SmolStr,
    /// Name of the task; at most [`MAX_COMM`] bytes.
    pub comm: SmolStr,
    /// Sequence number of the kernel's record, with its CPU above bit 40; none for the inventory.
    pub seq: Option<u64>,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub time_ns: u64,
    /// Process id.
    pub pid: u32,
    /// Real user id.
    pub uid: u32,
    /// The kernel's `s_dev` (major << 20 | minor); 0 without a file.
    pub dev: u32,
    /// Inode number; 0 without a file.
    pub ino: u64,
    /// Inode generation; 0 without a file.
    pub generation: u32,
    /// The inode's change cookie; 0 without a file.
    pub change: u64,
    /// Magic number of the file system; 0 without a file.
    pub fs_magic: u64,
    /// cgroup v2 id of the task.
    pub cgroup: u64,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $code:literal $name:literal,)+) => {
        /// What was loaded, or done. The codes are part of the log format and equal the kernel programs' `kind`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, serde::Deserialize)]
        pub enum LoadKind {
            $($(#[$doc])* #[serde(rename = $name)] $kind,)+
        }

        impl LoadKind {
            /// All kinds.
            pub const ALL: [Self; [$($code),+].len()] = [$(Self::$kind),+];

            /// Code in the log.
            #[must_use]
            pub const fn code(self) -> u8 {
                match self {
                    $(Self::$kind => $code,)+
                }
            }

            /// Name for people and policies: `program`, `mapping`, `module-file`, …
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)+
                }
            }
        }
    };
}

kinds! {
    /// A program, or a `#!` script.
    Program = 1 "program",
    /// A file mapped executable: a library, the ELF interpreter.
    Mapping = 2 "mapping",
    /// A kernel module from a file, hashed over the buffer that the kernel loads.
    ModuleFile = 3 "module-file",
    /// A kernel module from memory, hashed over the buffer that the kernel loads.
    ModuleBuffer = 4 "module-buffer",
    /// The compressed file of a module that the kernel unpacked; the image follows on its own.
    ModuleCompressed = 5 "module-compressed",
    /// Firmware for a device, hashed over the buffer that the driver gets.
    Firmware = 6 "firmware",
    /// The kernel that a `kexec_file_load` loads.
    KexecImage = 7 "kexec-image",
    /// The initramfs that goes with it.
    KexecInitramfs = 8 "kexec-initramfs",
    /// `kexec_load`, which no hook sees the content of: never has a digest.
    KexecLoad = 9 "kexec-load",
    /// A BPF program: digest over type, attach type and instructions.
    BpfProgram = 10 "bpf-program",
    /// A mapping of a file, made executable by `mprotect`; the digest is the file's.
    Protect = 11 "protect",
    /// Memory without a file, made executable; the digest is that of the program that did it.
    Anonymous = 12 "anonymous",
    /// A file that an interpreter was named on its command line.
    Argument = 13 "argument",
    /// A watched device was opened; the digest is that of the program that did it.
    Device = 14 "device",
    /// A block device that is mounted was opened for writing; the digest is that of the program that did it.
    BlockWrite = 15 "block-write",
    /// A measured and mapped file was opened for writing; the digest is the one that it had.
    CodeWrite = 16 "code-write",
    /// A signal that would have ended or stopped the agent; like all attempts refused, and with the digest of the program that tried.
    AttemptSignal = 32 "attempt-signal",
    /// A debugger on the agent, or a look into its memory.
    AttemptTrace = 33 "attempt-trace",
    /// The TPM's device was opened by another program.
    AttemptTpm = 34 "attempt-tpm",
    /// Another program asked for one of the agent's maps or programs.
    AttemptBpf = 35 "attempt-bpf",
    /// A pin was to be removed or covered, or its file system unmounted.
    AttemptPin = 36 "attempt-pin",
    /// The agent's control group was to be frozen or killed.
    AttemptFreeze = 37 "attempt-freeze",
    /// The agent's limits or scheduling were to be changed.
    AttemptLimit = 38 "attempt-limit",
    /// Inventory only: a module that was loaded before the agent started, hashed from its file.
    LoadedModule = 64 "loaded-module",
}

impl LoadKind {
    /// The kind with this code in the log.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// The kind of a kernel record (`assay_ebpf::kind`); none for codes that no kernel program writes.
    #[must_use]
    pub fn from_kernel(kind: u32) -> Option<Self> {
        let found = Self::from_code(u8::try_from(kind).ok()?)?;
        (found != Self::LoadedModule).then_some(found)
    }

    /// True for everything that becomes part of the kernel.
    #[must_use]
    pub const fn is_module(self) -> bool {
        matches!(
            self,
            Self::ModuleFile | Self::ModuleBuffer | Self::ModuleCompressed | Self::LoadedModule
        )
    }

    /// True for an attempt on the agent itself, which was refused.
    #[must_use]
    pub const fn is_attempt(self) -> bool {
        matches!(
            self,
            Self::AttemptSignal
                | Self::AttemptTrace
                | Self::AttemptTpm
                | Self::AttemptBpf
                | Self::AttemptPin
                | Self::AttemptFreeze
                | Self::AttemptLimit
        )
    }

    /// True when the digest is not that of what was loaded, but of the program that did something. That a program is
    /// approved does not approve this: a policy must name kind and digest together.
    #[must_use]
    pub const fn is_deed(self) -> bool {
        matches!(
            self,
            Self::Anonymous | Self::Device | Self::BlockWrite | Self::CodeWrite
        ) || self.is_attempt()
    }
}

impl fmt::Display for LoadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::str::FromStr for LoadKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// A text that names no [`LoadKind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kind {0:?} is not known; there are {all}", all = LoadKind::ALL.map(LoadKind::name).join(", "))]
pub struct UnknownKind(pub String);

/// What a verifier wants to know of the measuring itself. Breaks no promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "notice", rename_all = "kebab-case")]
pub enum Notice {
    /// An extend took longer than a second; in hold and enforce everything new waited for it.
    TpmSlow {
        /// How long, in milliseconds.
        millis: u64,
    },
    /// The list of what may run in enforce mode was replaced.
    ListInForce {
        /// The list's serial number.
        serial: u64,
        /// SHA-256 of the signed list as it came.
        digest: Sha256Digest,
        /// How many digests it approves.
        entries: u64,
    },
}

impl Notice {
    /// Name of the kind: `tpm-slow` or `list-in-force`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::TpmSlow { .. } => "tpm-slow",
            Self::ListInForce { .. } => "list-in-force",
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TpmSlow { millis } => write!(f, "the TPM took {millis} ms for an extend"),
            Self::ListInForce {
                serial,
                digest,
                entries,
            } => write!(
                f,
                "approved list {serial} with {entries} digests is in force (sha256:{digest})"
            ),
        }
    }
}

/// A hole in the promise. No policy allows one silently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "violation", rename_all = "kebab-case")]
pub enum Violation {
    /// The kernel programs had measurements that they could not deliver.
    Lost {
        /// How many since the last such event.
        count: u64,
    },
    /// After a restart, log and PCR did not fit together.
    LogMismatch {
        /// What was found.
        detail: String,
    },
    /// Something ran, or was running at the inventory, that could not be hashed by the agent.
    NotHashed {
        /// What it was, as far as known.
        path: String,
        /// Why.
        detail: String,
    },
    /// The kernel's records skip sequence numbers, which have the CPU above bit 40.
    SequenceGap {
        /// The number that should have come.
        expected: u64,
        /// The number that came instead, or that is the CPU's next.
        found: u64,
    },
    /// A kernel program was missing, detached or replaced.
    HooksMissing {
        /// Which, and since when.
        detail: String,
    },
    /// The log has reached its limit: what was loaded after this record is not in it.
    LogFull {
        /// The limit in bytes.
        max_bytes: u64,
    },
    /// The TPM failed an extend, and measuring stood still until the agent was started again.
    TpmFailed {
        /// What the TPM answered.
        detail: String,
    },
}

impl Violation {
    /// The names of all kinds.
    pub const NAMES: [&'static str; 7] = [
        "lost",
        "log-mismatch",
        "not-hashed",
        "sequence-gap",
        "hooks-missing",
        "log-full",
        "tpm-failed",
    ];

    /// Name of the kind: `lost`, `log-mismatch`, `not-hashed`, `sequence-gap`, `hooks-missing`, `log-full` or `tpm-failed`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "lost",
            Self::LogMismatch { .. } => "log-mismatch",
            Self::NotHashed { .. } => "not-hashed",
            Self::SequenceGap { .. } => "sequence-gap",
            Self::HooksMissing { .. } => "hooks-missing",
            Self::LogFull { .. } => "log-full",
            Self::TpmFailed { .. } => "tpm-failed",
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { count } => write!(f, "{count} measurements were lost in the kernel"),
            Self::LogMismatch { detail } => write!(f, "log and PCR did not fit together: {}", detail.escape_debug()),
            Self::NotHashed { path, detail } => {
                write!(
                    f,
                    "{} could not be hashed: {}",
                    path.escape_debug(),
                    detail.escape_debug()
                )
            }
            Self::SequenceGap { expected, found } => {
                // As `assay_ebpf::seq` puts them together.
                let (cpu, position) = (expected >> 40, |number: u64| number & ((1 << 40) - 1));
                let (expected, found) = (position(*expected), position(*found));
                write!(f, "the kernel's records of CPU {cpu} jump from {expected} to {found}")
            }
            Self::HooksMissing { detail } => {
                write!(f, "kernel programs were missing: {}", detail.escape_debug())
            }
            Self::LogFull { max_bytes } => write!(f, "the log reached its limit of {max_bytes} bytes and ends here"),
            Self::TpmFailed { detail } => write!(f, "the TPM failed: {}", detail.escape_debug()),
        }
    }
}

/// Cuts `text` to at most `limit` bytes, at a character's border.
#[must_use]
pub fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests;
