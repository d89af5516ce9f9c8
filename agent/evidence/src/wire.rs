//! What goes over HTTP between agent and verifier, as JSON. The table of endpoints is in `agent/docs/formats.md`.
//!
//! Binary is standard base64 with padding, digests and PCR values are lower-case hex, unknown fields are refused.

use core::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::binding::Nonce;
use crate::bundle::Bundle;
use crate::digest::{Sha256Digest, lower_hex};
use crate::jwe::Jwe;
use crate::terms::OnLoss;
use crate::uuid::Uuid;

/// Largest request body that the agent reads, in bytes.
pub const MAX_AGENT_BODY: usize = 64 * 1024;
/// Longest key id, in bytes of UTF-8.
pub const MAX_KEY_ID: usize = 128;
/// Longest name of a machine that a disk is for, in characters.
pub const MAX_VM: usize = 128;
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
    /// What the agent holds of approved lists; absent when its join file has no key for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved: Option<ListStatus>,
}

/// How an agent stands with approved lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListStatus {
    /// SHA-256 of the key (SPKI) that lists must be signed with.
    pub key_sha256: Sha256Digest,
    /// The list that is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<ListHead>,
}

/// Which approved list it is. Answer to `PUT /v1/approved` of the agent, whose body is the list itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListHead {
    /// Its serial number.
    pub serial: u64,
    /// SHA-256 of the signed list as it came.
    pub sha256: Sha256Digest,
    /// How many digests it approves.
    pub entries: u64,
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
    /// Fingerprint of the LUKS header as the host sees it ([`luks`](crate::luks)); a key that was sealed with one is released for no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_sha256: Option<Sha256Digest>,
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
    /// What the disk is for, as the host's caller says: for the audit log alone. At most [`MAX_VM`] characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
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
    /// For how long, and what to do then; absent for a key that asks for neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
}

/// For how long a host may hold a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// In seconds from now on, unless it is renewed; absent where it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// What to do when it ends, or the verifier calls the host untrusted.
    pub on_loss: OnLoss,
}

/// `POST /v1/leases` of the agent: what the verifier says of the keys that the host holds, with each poll.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseNews {
    /// Each key by itself; of others nothing is said.
    pub keys: Vec<KeyNews>,
}

/// What becomes of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyNews {
    /// The key.
    pub key_id: String,
    /// The disk.
    pub disk_uuid: Uuid,
    /// The lease from now on; absent where the host may not hold the key any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// What to do, if it may not; absent where the verifier does not know the key any more: what it said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_loss: Option<OnLoss>,
    /// Why it may not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
}

/// Answer to [`LeaseNews`]: all that the host holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseAnswer {
    /// Each open disk.
    pub held: Vec<HeldKey>,
}

/// A disk that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldKey {
    /// The key.
    pub key_id: String,
    /// The disk.
    pub disk_uuid: Uuid,
}

/// Answer to `GET /v1/verdict` of the verifier: how the asking host stood at the last look. About other hosts it learns nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnVerdict {
    /// The name that the verifier has for the host.
    pub host: String,
    /// Whether the last evidence appraised clean.
    pub trusted: bool,
    /// `trusted`, `untrusted`, `unreachable` or `unknown`.
    pub state: String,
    /// Why the host is not trusted, one line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// How long ago the verifier looked, in seconds by its own clock.
    pub age_s: u64,
}

/// `POST /v1/look` of the verifier: the asking host has something to show, and should be looked at before the next poll.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LookRequest {}

/// Answer to [`LookRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LookAnswer {
    /// The look begins within so many milliseconds, or right after the one that is under way.
    pub within_ms: u64,
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
    /// The key that signs approved lists, SubjectPublicKeyInfo (DER). Join files of before it existed have none; their
    /// hosts take no lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list_key: Option<B64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quote_request_is_strict() {
        let nonce = STANDARD.encode([7; 32]);
        let good = format!(r#"{{"nonce":"{nonce}","log_from":3}}"#);
        let request: QuoteRequest = serde_json::from_str(&good).unwrap();
        assert_eq!(
            request,
            QuoteRequest {
                nonce: Nonce::new([7; 32]),
                log_from: 3,
                boot_log: false
            }
        );

        let refused = |text: String| serde_json::from_str::<QuoteRequest>(&text).unwrap_err().to_string();
        let short = STANDARD.encode([7; 31]);
        assert!(refused(format!(r#"{{"nonce":"{short}","log_from":3}}"#)).contains("nonce has 31 bytes"));
        let unknown = refused(format!(r#"{{"nonce":"{nonce}","log_from":3,"log_form":1}}"#));
        assert!(unknown.contains("unknown field `log_form`"), "{unknown}");
        assert!(refused(format!(r#"{{"nonce":"{nonce}"}}"#)).contains("missing field `log_from`"));
        // A malformed number is never read as "from the start".
        assert!(refused(format!(r#"{{"nonce":"{nonce}","log_from":""}}"#)).contains("u64"));
        assert!(refused(r#"{"log_from":3}"#.into()).contains("missing field `nonce`"));
    }

    #[test]
    fn error_body_with_and_without_reasons() {
        let mut body = ErrorBody::new("key-unknown", "there is no key k");
        let text = serde_json::to_string(&body).unwrap();
        assert_eq!(
            text,
            r#"{"error":{"code":"key-unknown","message":"there is no key k"}}"#
        );
        assert_eq!(serde_json::from_str::<ErrorBody>(&text).unwrap(), body);
        body.reasons.push("program /root/rogue is not approved".into());
        let text = serde_json::to_string(&body).unwrap();
        assert!(
            text.ends_with(r#""reasons":["program /root/rogue is not approved"]}"#),
            "{text}"
        );
    }

    #[test]
    fn identity_without_certificate() {
        let text = r#"{"version":1,"agent_version":"0.1.0","boot_id":"b","ek_public":"AQI=","ak_public":"","tpm_manufacturer":"IBM","tpm_firmware":"1"}"#;
        let identity: Identity = serde_json::from_str(text).unwrap();
        assert_eq!(identity.ek_public.0, [1, 2]);
        assert_eq!(identity.ek_certificate, None);
        assert_eq!(serde_json::to_string(&identity).unwrap(), text);
    }

    #[test]
    fn bytes_have_one_spelling() {
        for bad in ["AQI", "AQJ=", "AQI=\n", "AQI-"] {
            assert!(serde_json::from_value::<B64>(bad.into()).is_err(), "{bad}");
        }
        assert!(serde_json::from_value::<Hex>("0A".into()).is_err());
        assert_eq!(serde_json::from_value::<Hex>("0a".into()).unwrap().0, [10]);
        assert_eq!(format!("{:?}", B64(vec![1, 2])), "B64(2 bytes)");
    }
}
