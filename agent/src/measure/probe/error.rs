//! Everything that can keep the probes of tier 3 from starting or from being read.

use std::io;
use std::path::PathBuf;

use crate::measure::kernel::{BtfError, KernelError};

/// The probes cannot be started or read.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Kernel lockdown keeps probes from reading the kernel's memory.
    #[error("tier 3 cannot read the kernel's structures under lockdown=confidentiality: use lockdown=integrity")]
    Lockdown,
    /// A kernel without probes.
    #[error(
        "tier 3 needs probes on kernel functions, and {path} does not exist: run a kernel of 4.19 or newer that is built with \
         CONFIG_KPROBE_EVENTS"
    )]
    NoProbes {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// No description of the kernel's structures.
    #[error(
        "tier 3 needs the kernel's type information, and {path} cannot be read: name a BTF file for this very kernel with btf = \"/path\" \
         under [measure] in agent.toml (`pahole --btf_encode_detached FILE vmlinux` makes one)"
    )]
    BtfMissing {
        /// The file that was looked for.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// The BTF file lacks something.
    #[error("tier 3 does not find what it needs in {path}: is it the BTF file of this kernel?")]
    Btf {
        /// The BTF file.
        path: PathBuf,
        /// What is missing.
        #[source]
        source: BtfError,
    },
    /// What the probes say of a known file is wrong.
    #[error(
        "the probes say that {what} of the agent's own program is {found}, and it is {expected}: {path} is not the BTF file of this very kernel"
    )]
    Misfit {
        /// The BTF file.
        path: PathBuf,
        /// Which fact.
        what: &'static str,
        /// What a probe says.
        found: String,
        /// What is true.
        expected: String,
    },
    /// The probes do not answer.
    #[error(
        "the probes are silent, so nothing is measured: are they switched off? (`echo 1 > /sys/kernel/debug/kprobes/enabled` switches them \
         on; an agent in a PID namespace of its own hears nothing either)"
    )]
    Silent,
    /// A function that the kernel lacks.
    #[error(
        "the kernel has no function {function} to put a probe on: tier 3 needs Linux 4.19 or newer, built with CONFIG_SECURITY"
    )]
    NoFunction {
        /// Its name.
        function: &'static str,
    },
    /// The kernel forbids loading.
    #[error("the kernel does not permit loading probes (EPERM): run the agent as root, with CAP_SYS_ADMIN")]
    NotPermitted,
    /// The object has no place for the kernel's version.
    #[error("{path} does not hold the probes of this version: install the package again")]
    NoVersion {
        /// The object.
        path: PathBuf,
    },
    /// Programs or maps.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A CPU's buffer could not be made.
    #[error("the buffer of CPU {cpu} for the probes' records cannot be made")]
    Buffer {
        /// The CPU's number.
        cpu: u32,
        /// What the loader says.
        #[source]
        source: Box<aya::maps::perf::PerfBufferError>,
    },
    /// The CPUs cannot be listed.
    #[error("cannot read {path}")]
    Cpus {
        /// The file.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something lies in a buffer that our probes do not write.
    #[error(
        "the buffer of CPU {cpu} holds {length} bytes that are no record of this version: install the package again"
    )]
    Foreign {
        /// The CPU's number.
        cpu: u32,
        /// Length of the entry.
        length: usize,
    },
    /// The agent's own program cannot be looked at, or run.
    #[error("cannot {operation} the agent's own program, to see whether the probes tell the truth")]
    Own {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file has been in the works for too long.
    #[error(
        "{what} a file takes longer than {seconds} s, and everything loaded since waits behind it: does a network file system, a disk or \
         a suspended device hang? (dmesg, /proc/mounts)"
    )]
    Stalled {
        /// "opening" or "hashing".
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// A thread, or its wake-up, could not be made.
    #[error("the threads that complete the probes' records cannot be set up")]
    Thread(#[source] io::Error),
    /// Waiting for the probes failed.
    #[error("waiting for the probes' records failed")]
    Wait(#[source] io::Error),
}
