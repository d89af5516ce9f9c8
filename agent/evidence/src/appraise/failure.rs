//! One reason not to trust a host.

use core::fmt;

use serde::{Serialize, Serializer};

use crate::digest::Sha256Digest;
use crate::event::{LoadKind, flag_names};

/// Which check refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Code ran, or was running, that the policy does not approve.
    NotApproved,
    /// Code ran, or was running, that could not be hashed.
    NotHashed,
    /// Code is approved by its digest, but could change while it was hashed.
    Unstable,
    /// Code is approved by its digest, but what became executable had pages that were changed in memory.
    Modified,
    /// A kernel was handed over by `kexec_load`, whose content nobody can measure: no policy allows it.
    KexecLoad,
    /// A program made memory executable that has no file, and the policy does not allow it that.
    Anonymous,
    /// A program opened a watched device, and the policy does not allow it that.
    Device,
    /// A program opened a block device for writing, and the policy does not allow it that.
    BlockWrite,
    /// Measured code was opened for writing while it was in use, and the policy does not allow it that.
    CodeWrite,
    /// A program tried to get at the agent itself; it was refused, and the policy does not expect it.
    Attempt,
    /// The log says that its promise does not hold.
    Violation,
    /// The inventory of what ran before the agent is not complete.
    NotReady,
    /// The agent said that it stops, and nothing measures.
    AgentStopped,
    /// The agent is not an allowed one.
    Agent,
    /// The kernel programs are not allowed ones.
    KernelPrograms,
    /// The measuring tier is not allowed.
    Tier,
    /// The mode is not allowed.
    Mode,
    /// A PCR has none of its golden values.
    PcrValue,
    /// The runtime PCR was extended before the log began.
    RuntimeStart,
    /// The boot log is malformed.
    BootLog,
    /// The boot log does not lead to a quoted PCR.
    BootLogPcr,
    /// The policy, or the boot configuration that fits, has expired.
    Expired,
    /// The version of the agent is not allowed.
    AgentVersion,
    /// The agent does not keep the host away from itself, and must.
    NotProtected,
    /// The state of the kernel's lockdown is not allowed.
    Lockdown,
    /// The kernel's release is not allowed.
    Kernel,
    /// The policy refuses this kind of code, whatever its digest.
    KindRefused,
    /// The policy refuses code under these circumstances, whatever its digest.
    FlagRefused,
    /// The IMA log is malformed, missing, or does not lead to the quoted PCR.
    ImaLog,
    /// IMA measured a file that the policy does not approve.
    ImaNotApproved,
    /// IMA could not tell what was read.
    ImaViolation,
}

/// One reason, with all that is known about it. Its text is one line; what a stranger chose in it is escaped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    pub(super) rule: Rule,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pcr: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) record: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<LoadKind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) digest: Option<Sha256Digest>,
    /// For deeds: where the program that did it was started from, as far as the log tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) program: Option<String>,
    /// For deeds: name of the task that did it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) comm: Option<String>,
    /// Those of `flags::TOLD`.
    #[serde(serialize_with = "names", skip_serializing_if = "no_flags")]
    pub(super) flags: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) nearest: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) detail: String,
    pub(super) times: u64,
}

impl Failure {
    pub(super) const fn new(rule: Rule, detail: String) -> Self {
        Self {
            rule,
            pcr: None,
            record: None,
            kind: None,
            path: None,
            digest: None,
            program: None,
            comm: None,
            flags: 0,
            nearest: None,
            detail,
            times: 1,
        }
    }

    /// The check that refused.
    #[must_use]
    pub const fn rule(&self) -> Rule {
        self.rule
    }

    /// The PCR that proves it: that of the log whose record it is about, or the one whose value it is about.
    #[must_use]
    pub const fn pcr(&self) -> Option<u8> {
        self.pcr
    }

    /// The record of the runtime log, the first one for several equal failures.
    #[must_use]
    pub const fn record(&self) -> Option<u64> {
        self.record
    }

    /// The kind of code, where the failure is about code.
    #[must_use]
    pub const fn kind(&self) -> Option<LoadKind> {
        self.kind
    }

    /// The path as the kernel told it, unescaped.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The digest of the code, or the quoted value of the PCR.
    #[must_use]
    pub const fn digest(&self) -> Option<Sha256Digest> {
        self.digest
    }

    /// For deeds: where the program that did it was started from, as far as the log tells; unescaped.
    #[must_use]
    pub fn program(&self) -> Option<&str> {
        self.program.as_deref()
    }

    /// For deeds: the name of the task that did it, a hint, unescaped.
    #[must_use]
    pub fn comm(&self) -> Option<&str> {
        self.comm.as_deref()
    }

    /// Circumstances of the code, in words: `memfd`, `tmpfs`, `refused`, …
    #[must_use]
    pub fn flags(&self) -> Vec<&'static str> {
        flag_names(self.flags)
    }

    /// The nearest known-good value, in words.
    #[must_use]
    pub fn nearest(&self) -> Option<&str> {
        self.nearest.as_deref()
    }

    /// How often it happened.
    #[must_use]
    pub const fn times(&self) -> u64 {
        self.times
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = Shown("sha256:", self.digest);
        let pcr = Shown("PCR ", self.pcr);
        let record = self.place();
        let detail = self.detail.escape_debug();
        match self.rule {
            Rule::NotApproved => write!(f, "{} {digest} ({record}) is not approved", self.code())?,
            Rule::NotHashed => write!(f, "{} ({record}) could not be hashed", self.code())?,
            Rule::Unstable => {
                write!(
                    f,
                    "{} {digest} ({record}) was open for writing while it was measured",
                    self.code()
                )?;
            }
            Rule::Modified => write!(f, "{} {digest} ({record}) was changed in memory", self.code())?,
            Rule::KexecLoad => write!(f, "{} ({record}) cannot be measured, and is never allowed", self.code())?,
            Rule::Anonymous => {
                write!(
                    f,
                    "{} {digest} ({record}) made memory executable that has no file",
                    self.doer()
                )?;
            }
            Rule::Device => write!(f, "{} {digest} ({record}) opened the device {}", self.doer(), self.at())?,
            Rule::BlockWrite => {
                write!(
                    f,
                    "{} {digest} ({record}) opened the block device {} for writing",
                    self.doer(),
                    self.at()
                )?;
            }
            Rule::CodeWrite => write!(
                f,
                "{} {digest} ({record}) was opened for writing while in use",
                self.code()
            )?,
            Rule::Attempt => {
                let what = self.kind.map_or("get at the agent", attempted);
                write!(
                    f,
                    "{} {digest} ({record}) tried to {what}, and was refused",
                    self.doer()
                )?;
            }
            Rule::Violation => write!(f, "{} ({record})", self.detail)?,
            Rule::NotReady => {
                f.write_str("the agent has not finished its inventory of what runs (no ready in the log)")?
            }
            Rule::AgentStopped => write!(f, "the agent stopped measuring ({record})")?,
            Rule::Agent => write!(f, "agent {detail} {digest} ({record}) is not approved")?,
            Rule::KernelPrograms => write!(f, "kernel programs {digest} ({record}) are not approved")?,
            Rule::Tier => write!(f, "measuring tier {detail} ({record}) is not allowed")?,
            Rule::Mode => write!(f, "mode {detail} ({record}) is not allowed")?,
            Rule::PcrValue => {
                write!(f, "{pcr} is {digest}, which is not approved")?;
                // Made printable where it was made.
                if !self.detail.is_empty() {
                    write!(f, "; {}", self.detail)?;
                }
            }
            Rule::RuntimeStart => {
                write!(
                    f,
                    "{pcr} was {digest} before the log began: earlier records are missing, or another program extends it"
                )?;
            }
            Rule::BootLog => f.write_str(&self.detail)?,
            Rule::BootLogPcr => write!(f, "the boot log does not lead to {pcr}, which is {digest}")?,
            Rule::Expired => write!(f, "{detail}, has expired")?,
            Rule::AgentVersion => write!(f, "agent version {detail} ({record}) is not allowed")?,
            Rule::NotProtected => write!(
                f,
                "the agent ({record}) does not keep root away from itself, which the policy demands"
            )?,
            Rule::Lockdown if self.detail.is_empty() => {
                write!(f, "the kernel has no lockdown ({record}), which the policy demands")?;
            }
            Rule::Lockdown => write!(f, "kernel lockdown {detail} ({record}) is not allowed")?,
            Rule::Kernel => write!(f, "kernel {detail} ({record}) is not allowed")?,
            Rule::KindRefused => write!(
                f,
                "{} {digest} ({record}) is of a kind that the policy refuses",
                self.code()
            )?,
            Rule::FlagRefused => write!(
                f,
                "{} {digest} ({record}) was loaded in a way that the policy refuses",
                self.code()
            )?,
            Rule::ImaLog => f.write_str(&self.detail)?,
            Rule::ImaNotApproved => write!(f, "file {} {digest} ({detail}) is not approved", self.at())?,
            Rule::ImaViolation => write!(f, "IMA could not tell what was read from {} ({detail})", self.at())?,
        }
        if let Some(nearest) = &self.nearest {
            write!(f, "; {nearest}")?;
        }
        if self.times > 1 {
            write!(f, "; {} times", self.times)?;
        }
        Ok(())
    }
}

impl Failure {
    /// What code, and where: "kernel module /tmp/dummy.ko".
    fn code(&self) -> String {
        let kind = match self.kind {
            Some(LoadKind::Mapping) => "mapped file",
            Some(LoadKind::Firmware) => "firmware",
            Some(LoadKind::KexecImage | LoadKind::KexecLoad) => "kexec kernel",
            Some(LoadKind::KexecInitramfs) => "kexec initramfs",
            Some(LoadKind::BpfProgram) => "BPF program",
            Some(LoadKind::Protect) => "file made executable",
            Some(LoadKind::Argument) => "file given to an interpreter",
            Some(LoadKind::CodeWrite) => "measured file",
            Some(kind) if kind.is_module() => "kernel module",
            _ => "program",
        };
        format!("{kind} {}", self.at())
    }

    /// Whether the digest is that of a program which did something, and the path, if there is one, of what it did that to.
    pub(super) fn is_by_program(&self) -> bool {
        self.kind
            .is_some_and(|kind| kind.is_deed() && kind != LoadKind::CodeWrite)
    }

    /// Who did a deed: "program /usr/bin/luajit".
    fn doer(&self) -> String {
        match &self.program {
            Some(path) => format!("program {}", path.escape_debug()),
            None => "program".to_owned(),
        }
    }

    /// The path, escaped.
    fn at(&self) -> String {
        match self.path.as_deref() {
            None | Some("") => "without a path".to_owned(),
            Some(path) => path.escape_debug().to_string(),
        }
    }

    /// Where in the log, and under what circumstances.
    fn place(&self) -> String {
        let mut text = Shown("record ", self.record).to_string();
        if let Some(comm) = &self.comm {
            text.push_str(", task ");
            text.extend(comm.escape_debug());
        }
        let mut separator = "; ";
        for name in flag_names(self.flags) {
            text.push_str(separator);
            text.push_str(name);
            separator = ", ";
        }
        text
    }
}

/// What an attempt was about: "tried to …".
const fn attempted(kind: LoadKind) -> &'static str {
    match kind {
        LoadKind::AttemptSignal => "end or stop the agent by a signal",
        LoadKind::AttemptTrace => "debug the agent or read its memory",
        LoadKind::AttemptTpm => "open the TPM",
        LoadKind::AttemptBpf => "get at the agent's kernel programs or maps",
        LoadKind::AttemptPin => "remove or cover what the agent pinned",
        LoadKind::AttemptFreeze => "freeze, kill or change the agent's control group",
        LoadKind::AttemptLimit => "change the agent's limits or scheduling",
        _ => "get at the agent",
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
const fn no_flags(flags: &u32) -> bool {
    *flags == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn names<S: Serializer>(flags: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    flag_names(*flags).serialize(serializer)
}

/// A value with what stands in front of it, or a word that there is none.
struct Shown<T>(&'static str, Option<T>);

impl<T: fmt::Display> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.1 {
            Some(value) => write!(f, "{}{value}", self.0),
            None => write!(f, "{}unknown", self.0),
        }
    }
}
