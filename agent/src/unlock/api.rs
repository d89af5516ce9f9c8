//! What goes over the local socket, as JSON: between the daemon and the commands and boot hooks of the same host.

use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::terms::OnLoss;
use assay_evidence::uuid::Uuid;
use assay_evidence::vhd::KeyHash;
use assay_evidence::wire::OwnVerdict;
use serde::{Deserialize, Serialize};

use crate::leases::{DiskState, OpenDisk};

/// Error code: a verifier refused to release the key.
pub const KEY_REFUSED: &str = "key-refused";
/// Error code: no verifier answered before the deadline.
pub const VERIFIER_UNREACHABLE: &str = "verifier-unreachable";

/// Error code: there is no open disk of this name.
pub const NOT_OPEN: &str = "not-open";
/// Error code: an open disk is in use.
pub const DISK_BUSY: &str = "disk-busy";

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
    /// Which endorsement key that is: `rsa-2048` or `ecc-p256`; empty from agents of before there was a choice.
    #[serde(default)]
    pub ek: String,
    /// What the attestation key signs with: `ecdsa-p256` or `rsa-2048`; empty from agents of before there was a choice.
    #[serde(default)]
    pub ak: String,
    /// The TPM's maker.
    pub tpm_manufacturer: String,
    /// The TPM's firmware version.
    pub tpm_firmware: String,
    /// How long the TPM has worked for the agent since it started, in microseconds.
    #[serde(default)]
    pub tpm_worked_us: u64,
    /// Present once the host has joined a verifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<JoinedStatus>,
    /// The disks that are open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskStatus>,
}

/// An open disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskStatus {
    /// Name of the mapping.
    pub name: String,
    /// The image that it was opened from.
    pub image: PathBuf,
    /// The key.
    pub key_id: String,
    /// The LUKS UUID.
    pub disk_uuid: Uuid,
    /// How it stands.
    pub state: DiskState,
    /// Seconds that are left of its lease; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_left_s: Option<u64>,
    /// What happens when the lease ends, or the verifier calls the host untrusted.
    pub on_loss: OnLoss,
    /// Why its key may not be held any more; absent while it may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

impl DiskStatus {
    /// How a disk stands at so many seconds since boot.
    #[must_use]
    pub fn of(disk: OpenDisk, now: u64) -> Self {
        Self {
            lost: disk.is_lost(now).then(|| disk.why()),
            lease_left_s: disk.until.map(|until| until.saturating_sub(now)),
            name: disk.name,
            image: disk.image,
            key_id: disk.key_id,
            disk_uuid: disk.disk,
            state: disk.state,
            on_loss: disk.on_loss,
        }
    }
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
    /// Absolute path of a file or block device with a LUKS2 header, or a LUKS1 one and its sidecar.
    pub image: PathBuf,
    /// Name of the mapping; made from the LUKS UUID when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How long to keep trying to reach a verifier, in seconds; from the configuration when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    /// The machine that the disk is for, for the verifier's audit log: at most [`MAX_VM`](assay_evidence::wire::MAX_VM) characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}

/// Answer to [`UnlockRequest`]: the disk is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnlockResponse {
    /// `/dev/mapper/NAME`.
    pub device: PathBuf,
}

/// `POST /v1/vhd-key`. The answer is the raw key, 32 or 64 bytes of `application/octet-stream`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhdKeyRequest {
    /// What the VDI's `sm-config:key_hash` says.
    pub key_hash: KeyHash,
    /// UUID of the VDI that is to be opened.
    pub vdi_uuid: Uuid,
    /// As in [`UnlockRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// `POST /v1/verdict`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerdictRequest {
    /// As in [`UnlockRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// Answer to [`VerdictRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerdictResponse {
    /// The verifier that answered.
    pub verifier: String,
    /// What it said.
    pub verdict: OwnVerdict,
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
