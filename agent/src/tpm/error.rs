//! Everything that the TPM layer can refuse or fail with.

use std::time::Duration;

/// A TPM operation did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// The connection string is not one of the forms known.
    #[error("`{tcti}` is not a TPM connection; use `device:/dev/tpmrm0` or `swtpm:host=127.0.0.1,port=2321`")]
    BadTcti {
        /// The string from the configuration.
        tcti: String,
        /// What was wrong with it.
        #[source]
        source: tss_esapi::Error,
    },
    /// There is no TPM behind the connection string.
    #[error(
        "no TPM at `{tcti}`: enable the TPM 2.0 in the firmware's set-up (and the kernel's tpm_tis or tpm_crb driver), \
         check that /dev/tpmrm0 exists and that the agent runs as root, or name another TPM in agent.toml under [tpm] tcti"
    )]
    Absent {
        /// The string from the configuration.
        tcti: String,
        /// What the connection failed with.
        #[source]
        source: tss_esapi::Error,
    },
    /// The TPM kept answering that it is busy (TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING).
    #[error(
        "the TPM was still busy {after_s} s after `{operation}` was asked for; it may be in a long self test: try again, \
         or raise [tpm] timeout_s in agent.toml"
    )]
    Busy {
        /// The operation that had no turn.
        operation: &'static str,
        /// Seconds waited.
        after_s: u64,
        /// The last answer.
        #[source]
        source: tss_esapi::Error,
    },
    /// The TPM did not answer at all.
    #[error(
        "the TPM did not answer `{operation}` within {} s; if this repeats, the TPM or its driver hangs: look at the kernel's \
         messages (dmesg | grep -i tpm) and restart the host",
        .after.as_secs()
    )]
    Timeout {
        /// The operation that got no answer.
        operation: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// More commands wait for the TPM than the queue takes.
    #[error("the TPM's queue is full ({waiting} commands wait); try again later")]
    QueueFull {
        /// Commands that wait.
        waiting: usize,
    },
    /// The thread that owns the TPM is gone, or never started.
    #[error("the thread that owns the TPM has ended")]
    Stopped,
    /// The TPM refused a command.
    #[error("the TPM refused `{operation}`")]
    Refused {
        /// The command.
        operation: &'static str,
        /// Its answer.
        #[source]
        source: tss_esapi::Error,
    },
    /// The TPM gave an answer that the command cannot have.
    #[error("the TPM's answer to `{operation}` makes no sense: {what}")]
    Nonsense {
        /// The command.
        operation: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The TPM has no SHA-256 bank, without which nothing can be quoted.
    #[error("the TPM's SHA-256 PCR bank is not active: activate it in the firmware's set-up")]
    NoSha256Bank,
    /// The configured handle holds somebody else's key.
    #[error(
        "the persistent handle {handle:#010x} holds a key that is not Assay's attestation key: choose another handle with \
         [tpm] ak_handle in agent.toml"
    )]
    ForeignKey {
        /// The handle.
        handle: u32,
    },
    /// The configured handle is not a persistent one.
    #[error("{handle:#010x} is no persistent handle: [tpm] ak_handle must be between 0x81000000 and 0x817fffff")]
    BadHandle {
        /// The handle.
        handle: u32,
    },
    /// The PCR is not one that the agent may use.
    #[error(
        "PCR {pcr} cannot hold the runtime log: use 12, 13 (the default) or 14; the others belong to firmware, boot loader, IMA or are resettable"
    )]
    BadPcr {
        /// The PCR from the configuration.
        pcr: u8,
    },
    /// PCRs moved during each of the attempts.
    #[error(
        "PCRs changed during each of {attempts} attempts to `{operation}`: something extends a PCR without pause (IMA's PCR 10?)"
    )]
    PcrsMoving {
        /// What was tried.
        operation: &'static str,
        /// How often.
        attempts: u32,
    },
    /// A release key lived longer than it may.
    #[error("the release key was discarded after {} s, because measuring cannot be held any longer: ask again", .0.as_secs())]
    ReleaseExpired(Duration),
}

impl TpmError {
    /// Whether asking again later can help: the TPM works, it was only busy.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Busy { .. } | Self::QueueFull { .. } | Self::PcrsMoving { .. } | Self::ReleaseExpired(_)
        )
    }
}
