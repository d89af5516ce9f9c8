//! The LUKS2 header token that says which key opens an image, and who has it.
//!
//! The token travels with the image, so whoever hands over the image wrote it: **untrusted input**. It may choose
//! among the verifiers that this host's own configuration lists, and never adds one; the CA that it names must be the
//! one that this host joined. Sending evidence to a verifier of an attacker's choice would at best leak the host's log.

use std::path::{Path, PathBuf};

use crate::digest::Sha256Digest;
use crate::uuid::Uuid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The token's type in the LUKS2 header.
pub const TYPE: &str = "assay";

/// The token's version, the only one there is.
pub const VERSION: u32 = 1;

/// Longest token, in bytes; the JSON area of a LUKS2 header is 12 KiB by default and holds more than this token.
pub const MAX_TOKEN: usize = 8192;

const MAX_VERIFIERS: usize = 8;
const MAX_URL: usize = 255;
const MAX_NAME: usize = 64;

/// Why an image's token is refused.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The header has no token of type `assay`.
    #[error("the image's LUKS2 header has no assay token: seal the image with `assay-verifier image seal`")]
    Missing,
    /// More than one token claims to be ours, so which key is meant is anyone's guess.
    #[error(
        "the image's LUKS2 header has {0} assay tokens, exactly one is wanted: remove the others with `cryptsetup token remove`"
    )]
    Several(usize),
    /// Longer than [`MAX_TOKEN`].
    #[error("the assay token is {0} bytes long, at most {MAX_TOKEN} are read")]
    TooLong(usize),
    /// Not JSON, a member is missing, unknown, or of another type.
    #[error("the assay token is malformed: seal the image again with `assay-verifier image seal`")]
    Malformed(#[source] serde_json::Error),
    /// A token, but of another type.
    #[error("the token is of type {0:?}, not \"assay\"")]
    WrongType(String),
    /// A version that this program does not know.
    #[error("the assay token has version {0}, this program knows version {VERSION}: update it")]
    WrongVersion(u32),
    /// A member that has the right type, but not a possible value.
    #[error("the assay token's {member} is not valid: {value:?}")]
    BadMember {
        /// The member's name.
        member: &'static str,
        /// Its value, cut to a printable length.
        value: String,
    },
    /// None of the verifiers named is one that this host is configured to ask.
    #[error(
        "the image names {}, which this host was never told to trust: it asks only {}; join that verifier first, or seal the image for this one",
        named.join(", "), configured.join(", ")
    )]
    ForeignVerifier {
        /// The verifiers in the token.
        named: Vec<String>,
        /// The verifiers that this host knows.
        configured: Vec<String>,
    },
    /// The verifier's address is known, but the image was sealed under another verifier's CA.
    #[error(
        "the image was sealed by a verifier whose CA key is sha256:{named}, this host joined sha256:{joined}: seal it again, or join that verifier"
    )]
    ForeignCa {
        /// The CA key's digest in the token.
        named: Sha256Digest,
        /// The one in this host's join file.
        joined: Sha256Digest,
    },
}

/// A well-formed token. Well-formed is not trusted: see [`LuksToken::allowed_verifiers`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LuksToken {
    #[serde(rename = "type")]
    kind: String,
    /// The key slots that the key opens, as LUKS2 wants them: decimal numbers as text.
    keyslots: Vec<String>,
    version: u32,
    verifiers: Vec<String>,
    verifier_spki_sha256: Sha256Digest,
    key_id: String,
    policy: String,
}

impl LuksToken {
    /// Makes the token for an image's key in the given key slot.
    ///
    /// # Errors
    /// [`TokenError::BadMember`] for a value that [`LuksToken::parse`] would refuse.
    pub fn new(
        keyslot: u32,
        verifiers: Vec<String>,
        ca_spki: Sha256Digest,
        key_id: String,
        policy: String,
    ) -> Result<Self, TokenError> {
        let token = Self {
            kind: TYPE.into(),
            keyslots: vec![keyslot.to_string()],
            version: VERSION,
            verifiers,
            verifier_spki_sha256: ca_spki,
            key_id,
            policy,
        };
        token.validate()?;
        Ok(token)
    }

    /// Reads one token's JSON, as `cryptsetup token export` gives it.
    ///
    /// # Errors
    /// One variant of [`TokenError`] for each reason.
    pub fn parse(json: &[u8]) -> Result<Self, TokenError> {
        if json.len() > MAX_TOKEN {
            return Err(TokenError::TooLong(json.len()));
        }
        let value: Value = serde_json::from_slice(json).map_err(TokenError::Malformed)?;
        Self::from_value(value)
    }

    /// Finds the one assay token among all tokens of a header. Tokens of other programs are left alone.
    ///
    /// # Errors
    /// [`TokenError::Missing`], [`TokenError::Several`], and those of [`LuksToken::parse`].
    pub fn find(tokens: &[Value]) -> Result<Self, TokenError> {
        let ours: Vec<&Value> = tokens
            .iter()
            .filter(|token| token.get("type").and_then(Value::as_str) == Some(TYPE))
            .collect();
        match ours.as_slice() {
            [] => Err(TokenError::Missing),
            [token] => Self::from_value((*token).clone()),
            several => Err(TokenError::Several(several.len())),
        }
    }

    /// Those of this host's configured verifiers that the token names, in the token's order, and never another.
    /// `joined_ca` is the SHA-256 of the SubjectPublicKeyInfo (DER) of the CA in the join file.
    ///
    /// # Errors
    /// [`TokenError::ForeignVerifier`] when none is configured, [`TokenError::ForeignCa`] when the CA is another.
    pub fn allowed_verifiers(
        &self,
        configured: &[String],
        joined_ca: &Sha256Digest,
    ) -> Result<Vec<String>, TokenError> {
        let allowed: Vec<String> = self
            .verifiers
            .iter()
            .filter_map(|named| configured.iter().find(|known| same_url(known, named)))
            .cloned()
            .collect();
        if allowed.is_empty() {
            return Err(TokenError::ForeignVerifier {
                named: self.verifiers.clone(),
                configured: configured.to_vec(),
            });
        }
        if self.verifier_spki_sha256 != *joined_ca {
            return Err(TokenError::ForeignCa {
                named: self.verifier_spki_sha256,
                joined: *joined_ca,
            });
        }
        Ok(allowed)
    }

    /// The key's id at the verifier, a UUID.
    #[must_use]
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// URLs of the verifiers that have the key, as the image says.
    #[must_use]
    pub fn verifiers(&self) -> &[String] {
        &self.verifiers
    }

    /// SHA-256 of the SubjectPublicKeyInfo (DER) of those verifiers' CA, as the image says.
    #[must_use]
    pub const fn verifier_spki(&self) -> &Sha256Digest {
        &self.verifier_spki_sha256
    }

    /// Name of the policy that the verifier applies to hosts asking for the key; information only, the verifier's own
    /// record counts.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// The key slots that the key opens.
    #[must_use]
    pub fn keyslots(&self) -> &[String] {
        &self.keyslots
    }

    /// The token as JSON, for the header.
    ///
    /// # Errors
    /// [`TokenError::Malformed`]: not for a token made by this module.
    pub fn to_json(&self) -> Result<String, TokenError> {
        serde_json::to_string(self).map_err(TokenError::Malformed)
    }

    fn from_value(value: Value) -> Result<Self, TokenError> {
        // The type first: a foreign token is no malformed one of ours.
        if let Some(kind) = value.get("type").and_then(Value::as_str)
            && kind != TYPE
        {
            return Err(TokenError::WrongType(cut(kind)));
        }
        // Likewise a later version, whose members this program does not know.
        if let Some(version) = value.get("version").and_then(Value::as_u64)
            && version != u64::from(VERSION)
        {
            return Err(TokenError::WrongVersion(u32::try_from(version).unwrap_or(u32::MAX)));
        }
        let token: Self = serde_json::from_value(value).map_err(TokenError::Malformed)?;
        token.validate()?;
        Ok(token)
    }

    fn validate(&self) -> Result<(), TokenError> {
        let bad = |member, value: &str| {
            Err(TokenError::BadMember {
                member,
                value: cut(value),
            })
        };
        // LUKS2 has at most 32 key slots.
        let slot = |text: &String| text.parse::<u8>().is_ok_and(|number| number < 32);
        if self.keyslots.is_empty() || self.keyslots.len() > 32 || !self.keyslots.iter().all(slot) {
            return bad("keyslots", &self.keyslots.join(","));
        }
        if self.verifiers.is_empty() || self.verifiers.len() > MAX_VERIFIERS {
            return bad("verifiers", &self.verifiers.join(","));
        }
        if let Some(url) = self.verifiers.iter().find(|url| !is_url(url)) {
            return bad("verifiers", url);
        }
        if self.key_id.parse::<Uuid>().is_err() {
            return bad("key_id", &self.key_id);
        }
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.policy.is_empty() || self.policy.len() > MAX_NAME || !self.policy.chars().all(name) {
            return bad("policy", &self.policy);
        }
        Ok(())
    }
}

/// Where the token of an image is whose format has no place for one (LUKS1, qcow2): `IMAGE.assay.json`, the very object that a
/// LUKS2 header would hold.
#[must_use]
pub fn sidecar_path(image: &Path) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(".assay.json");
    image.with_file_name(name)
}

/// Whether two addresses mean the same verifier: scheme and host don't mind the case, a closing slash means nothing.
fn same_url(a: &str, b: &str) -> bool {
    a.trim_end_matches('/').eq_ignore_ascii_case(b.trim_end_matches('/'))
}

fn is_url(url: &str) -> bool {
    let rest = url.strip_prefix("https://").unwrap_or_default().trim_end_matches('/');
    url.len() <= MAX_URL
        && !rest.is_empty()
        && rest
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']' | '_'))
}

/// What of a stranger's text goes into an error message.
fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CA: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn good() -> Value {
        json!({"type": "assay", "keyslots": ["0"], "version": 1, "verifiers": ["https://verifier.example:8444"],
               "verifier_spki_sha256": CA, "key_id": "6f9619ff-8b86-d011-b42d-00cf4fc964ff", "policy": "default"})
    }

    fn parse(value: &Value) -> Result<LuksToken, TokenError> {
        LuksToken::parse(value.to_string().as_bytes())
    }

    #[test]
    fn round_trip() {
        let token = parse(&good()).unwrap();
        assert_eq!(LuksToken::parse(token.to_json().unwrap().as_bytes()).unwrap(), token);
        let made = LuksToken::new(
            0,
            vec!["https://verifier.example:8444".into()],
            CA.parse().unwrap(),
            "6f9619ff-8b86-d011-b42d-00cf4fc964ff".into(),
            "default".into(),
        )
        .unwrap();
        assert_eq!(made, token);
        assert_eq!(
            (made.key_id(), made.policy()),
            ("6f9619ff-8b86-d011-b42d-00cf4fc964ff", "default")
        );
        assert_eq!(made.keyslots(), ["0"]);
    }

    #[test]
    fn finds_the_one_token_among_others() {
        let other = json!({"type": "systemd-tpm2", "keyslots": ["1"]});
        assert!(LuksToken::find(&[other.clone(), good()]).is_ok());
        assert!(matches!(
            LuksToken::find(std::slice::from_ref(&other)),
            Err(TokenError::Missing)
        ));
        assert!(matches!(LuksToken::find(&[]), Err(TokenError::Missing)));
        assert!(matches!(
            LuksToken::find(&[good(), other, good()]),
            Err(TokenError::Several(2))
        ));
    }

    #[test]
    fn each_fault_has_its_own_error() {
        assert!(matches!(LuksToken::parse(b"{"), Err(TokenError::Malformed(_))));
        assert!(matches!(
            LuksToken::parse(&vec![b' '; MAX_TOKEN + 1]),
            Err(TokenError::TooLong(_))
        ));
        let with = |member: &str, value: Value| {
            let mut token = good();
            token[member] = value;
            parse(&token).unwrap_err()
        };
        assert!(matches!(with("type", json!("clevis")), TokenError::WrongType(_)));
        assert!(matches!(with("type", json!(7)), TokenError::Malformed(_)));
        assert!(matches!(with("version", json!(2)), TokenError::WrongVersion(2)));
        assert!(matches!(with("surprise", json!(1)), TokenError::Malformed(_)));
        assert!(matches!(
            with("verifier_spki_sha256", json!("abcd")),
            TokenError::Malformed(_)
        ));
        for (member, value) in [
            ("keyslots", json!([])),
            ("keyslots", json!(["32"])),
            ("keyslots", json!(["-1"])),
            ("verifiers", json!([])),
            ("verifiers", json!(["http://verifier.example"])),
            ("verifiers", json!(["https://"])),
            ("verifiers", json!(["https://a b"])),
            ("verifiers", json!(["https://user@verifier.example/path"])),
            ("key_id", json!("../../etc/passwd")),
            ("policy", json!("")),
            ("policy", json!("a/b")),
        ] {
            assert!(
                matches!(with(member, value.clone()), TokenError::BadMember { member: m, .. } if m == member),
                "{member} {value}"
            );
        }
        for member in [
            "keyslots",
            "version",
            "verifiers",
            "verifier_spki_sha256",
            "key_id",
            "policy",
            "type",
        ] {
            let mut token = good();
            token.as_object_mut().unwrap().remove(member);
            assert!(matches!(parse(&token), Err(TokenError::Malformed(_))), "{member}");
        }
    }

    #[test]
    fn only_configured_verifiers_are_asked() {
        let token = parse(&good()).unwrap();
        let ca: Sha256Digest = CA.parse().unwrap();
        let known = [
            "https://other.example:1".to_owned(),
            "https://Verifier.example:8444/".to_owned(),
        ];
        assert_eq!(
            token.allowed_verifiers(&known, &ca).unwrap(),
            ["https://Verifier.example:8444/"]
        );
        let foreign = token.allowed_verifiers(&known[..1], &ca).unwrap_err();
        assert!(matches!(foreign, TokenError::ForeignVerifier { .. }));
        assert!(foreign.to_string().contains("https://verifier.example:8444"));
        let other_ca: Sha256Digest = "bb".repeat(32).parse().unwrap();
        assert!(matches!(
            token.allowed_verifiers(&known, &other_ca),
            Err(TokenError::ForeignCa { .. })
        ));
    }
}
