//! What goes over the local socket, as JSON: between the daemon and the commands and boot hooks of the same host.

use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use serde::{Deserialize, Serialize};

/// Error code: a verifier refused to release the key.
pub const KEY_REFUSED: &str = "key-refused";
/// Error code: no verifier answered before the deadline.
pub const VERIFIER_UNREACHABLE: &str = "verifier-unreachable";

/// `GET /v1/status`: what the daemon is and does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Measuring tier: 1 is the full promise.
    pub tier: u8,
    /// What that tier cannot see on this host; empty when it sees all that is promised.
    #[serde(default)]
    pub blind: String,
    /// Measuring mode: `observe`.
    pub mode: String,
    /// The PCR that is extended.
    pub pcr: u8,
    /// Records in the runtime log and in the PCR.
    pub records: u64,
    /// Length of the runtime log in bytes.
    pub log_bytes: u64,
    /// Head of the runtime log.
    pub log_head: Sha256Digest,
    /// Kernel records that were lost since the daemon started; each loss is in the log as a violation.
    pub lost: u64,
    /// Loads that were refused because the queue had no room for their record (hold, enforce); none of them ran.
    #[serde(default)]
    pub no_room: u64,
    /// The log has reached its limit: nothing is recorded any more.
    #[serde(default)]
    pub log_full: bool,
    /// SHA-256 of the endorsement key's TPMT_PUBLIC: what `host add --ek-sha256` wants.
    pub ek_sha256: Sha256Digest,
    /// What the attestation key signs with: `ecdsa-p256` or `rsa-2048`; empty from agents of before there was a choice.
    #[serde(default)]
    pub ak: String,
    /// The TPM's maker.
    pub tpm_manufacturer: String,
    /// The TPM's firmware version.
    pub tpm_firmware: String,
    /// Present once the host has joined a verifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<JoinedStatus>,
}

/// Whom the host has joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinedStatus {
    /// Where quotes are served.
    pub listen: String,
    /// SHA-256 of the agent's TLS key (SPKI): what verifiers pin.
    pub tls_spki_sha256: Sha256Digest,
    /// The verifiers that are asked for keys.
    pub verifiers: Vec<String>,
    /// SHA-256 of the verifiers' CA key (SPKI).
    pub ca_spki_sha256: Sha256Digest,
}

/// `POST /v1/unlock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnlockRequest {
    /// Absolute path of a file or block device with a LUKS2 header.
    pub image: PathBuf,
    /// Name of the mapping; made from the LUKS UUID when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How long to keep trying to reach a verifier, in seconds; from the configuration when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// Answer to [`UnlockRequest`]: the disk is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnlockResponse {
    /// `/dev/mapper/NAME`.
    pub device: PathBuf,
}

/// `POST /v1/lock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockRequest {
    /// Name of the mapping.
    pub name: String,
}

/// Answer to [`LockRequest`]: the disk is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockResponse {
    /// Name of the mapping that is gone.
    pub name: String,
}
