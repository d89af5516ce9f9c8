//! What goes over HTTP between agent and verifier, as JSON. The table of endpoints is in `agent/docs/formats.md`.
//!
//! Binary is standard base64 with padding, digests and PCR values are lower-case hex, unknown fields are refused.

use core::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::binding::Nonce;
use crate::bundle::Bundle;
use crate::digest::lower_hex;
use crate::jwe::Jwe;
use crate::uuid::Uuid;

/// Largest request body that the agent reads, in bytes.
pub const MAX_AGENT_BODY: usize = 64 * 1024;
/// Longest key id, in bytes of UTF-8.
pub const MAX_KEY_ID: usize = 128;
/// Time for the header of a request, in seconds.
pub const HEADER_TIMEOUT_S: u64 = 10;
/// Most connections that a server holds open at once.
pub const MAX_CONNECTIONS: usize = 64;

/// Bytes, base64 in JSON.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct B64(pub Vec<u8>);

impl AsRef<[u8]> for B64 {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for B64 {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for B64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "B64({} bytes)", self.0.len())
    }
}

impl Serialize for B64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for B64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD
            .decode(text)
            .map_err(|_| de::Error::custom("not standard base64 with padding"))?;
        Ok(Self(bytes))
    }
}

/// Bytes, lower-case hex in JSON: PCR values.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Hex(pub Vec<u8>);

impl AsRef<[u8]> for Hex {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Hex {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        lower_hex(&text)
            .map(Self)
            .ok_or_else(|| de::Error::custom("not lower-case hex"))
    }
}

/// `GET /v1/identity` of the agent: who it says it is. Untrusted until the EK is checked and the AK activated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// 1.
    pub version: u32,
    /// Version of the agent.
    pub agent_version: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Endorsement key, `TPMT_PUBLIC`.
    pub ek_public: B64,
    /// Its certificate, DER, where the TPM has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_certificate: Option<B64>,
    /// Attestation key, `TPMT_PUBLIC`.
    pub ak_public: B64,
    /// `TPM_PT_MANUFACTURER` as text; a hint.
    pub tpm_manufacturer: String,
    /// Firmware version as text; a hint.
    pub tpm_firmware: String,
}

/// `POST /v1/activate` of the agent: proves that EK and AK live in one TPM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivateRequest {
    /// `TPM2B_ID_OBJECT`.
    pub credential_blob: B64,
    /// `TPM2B_ENCRYPTED_SECRET`.
    pub secret: B64,
}

/// Answer to [`ActivateRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivateResponse {
    /// What `TPM2_ActivateCredential` gave out.
    pub secret: B64,
}

/// `POST /v1/quote` of the agent. The answer is a [`Bundle`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuoteRequest {
    /// Fresh from the verifier, 32 bytes.
    pub nonce: Nonce,
    /// First record of the runtime log that the verifier does not hold yet.
    pub log_from: u64,
    /// Whether the firmware's log is wanted.
    #[serde(default)]
    pub boot_log: bool,
}

/// `GET /v1/log?from=N` of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogPage {
    /// Number of the first record in `data`.
    pub from: u64,
    /// Records in `data`; fewer than there are when a page is full.
    pub count: u64,
    /// The records, concatenated.
    pub data: B64,
}

/// `POST /v1/release/challenge` of the verifier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChallengeRequest {
    /// The key that is wanted; at most [`MAX_KEY_ID`] bytes.
    pub key_id: String,
    /// UUID of the LUKS header.
    pub disk_uuid: Uuid,
}

/// Answer to [`ChallengeRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChallengeResponse {
    /// For one use, on this connection.
    pub nonce: Nonce,
    /// First record of the runtime log that the verifier does not hold yet.
    pub log_from: u64,
    /// Life of the nonce in seconds.
    pub expires_in_s: u32,
}

/// `POST /v1/release` of the verifier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// As in the challenge.
    pub key_id: String,
    /// As in the challenge.
    pub disk_uuid: Uuid,
    /// Evidence, quoted over the challenge's nonce and `release_key`.
    pub bundle: Bundle,
    /// The key that the answer is wrapped to.
    pub release_key: ReleaseKey,
}

/// A key of the agent's TPM, certified by its AK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseKey {
    /// `TPMT_PUBLIC`.
    pub public: B64,
    /// `TPMS_ATTEST` of `TPM2_Certify`.
    pub certify_attest: B64,
    /// `TPMT_SIGNATURE` over it, by the AK.
    pub certify_signature: B64,
}

/// Answer to [`ReleaseRequest`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseResponse {
    /// The disk's passphrase, wrapped to the release key.
    pub jwe: Jwe,
}

/// Every answer with a status of 400 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
    /// Why a host is not trusted, one line each; only for a refused release.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

impl ErrorBody {
    /// An error without reasons.
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let error = ErrorDetail {
            code: code.to_owned(),
            message: message.into(),
        };
        Self {
            error,
            reasons: Vec::new(),
        }
    }
}

/// Part of an [`ErrorBody`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorDetail {
    /// For programs: kebab-case.
    pub code: String,
    /// For people.
    pub message: String,
}

/// What `assay-agent join` reads: where the verifier is, and how to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinFile {
    /// 1.
    pub version: u32,
    /// URLs of verifiers, `https://host:port`.
    pub verifiers: Vec<String>,
    /// The verifier's CA: signs its server certificate and its client certificate.
    pub ca_pem: String,
}
