//! A policy that one verifier signed, for another: a compact JWS (RFC 7515), ES256, whose payload is the policy file.

use super::{MAX_JSON, Policy, PolicyError};
use crate::jws::{self, JwsError, Key, Signer};

/// The one header, as JSON.
const HEADER: &str = r#"{"alg":"ES256","typ":"assay-policy+jwt"}"#;
/// Longest text, in bytes: base64 of the longest policy, and room for the rest.
pub const MAX_SIGNED: usize = MAX_JSON / 3 * 4 + 1024;

/// Why a signed policy is refused, or none can be made.
#[derive(Debug, thiserror::Error)]
pub enum SignedPolicyError {
    /// Longer than [`MAX_SIGNED`].
    #[error("the signed policy is {0} bytes long, at most {MAX_SIGNED} are read")]
    TooLong(usize),
    /// Not three base64url parts with dots between them.
    #[error("it is no signed policy: three base64url parts with dots between them")]
    Form,
    /// Signed for another purpose.
    #[error("it has another header than {HEADER}: it was signed for another purpose")]
    Header,
    /// Signed by somebody else, or changed.
    #[error("it was not signed with this key, or was changed since")]
    Signature,
    /// Signed, and no policy.
    #[error("what was signed is no policy that can be used")]
    Policy(#[from] PolicyError),
    /// The signature could not be made.
    #[error("the policy could not be signed")]
    Sign,
}

impl Policy {
    /// Signs it: the compact form.
    ///
    /// # Errors
    /// [`SignedPolicyError::Sign`].
    pub fn sign(&self, signer: &Signer) -> Result<String, SignedPolicyError> {
        jws::sign(HEADER, self.to_json().as_bytes(), signer).ok_or(SignedPolicyError::Sign)
    }

    /// Reads a policy that this key signed; a line end behind it is not part of it.
    ///
    /// # Errors
    /// [`SignedPolicyError`]. Nothing in it is read before the signature is checked.
    pub fn from_signed(text: &[u8], key: &Key) -> Result<Self, SignedPolicyError> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        if text.len() > MAX_SIGNED {
            return Err(SignedPolicyError::TooLong(text.len()));
        }
        let payload = jws::verify(text, HEADER, key).map_err(|error| match error {
            JwsError::Form => SignedPolicyError::Form,
            JwsError::Header => SignedPolicyError::Header,
            JwsError::Signature => SignedPolicyError::Signature,
        })?;
        Ok(Self::from_json(&payload)?)
    }
}
