//! Compact JWS (RFC 7515) with ES256 and nothing else, for approved lists and for verdicts.
//!
//! Both sides know exactly one header, so that it is compared and not parsed: an algorithm that is not in the code can't be
//! negotiated, and what was signed for one purpose is nothing for another. The signature is checked over the text that came,
//! before anything in it is read.

mod key;

pub use key::{Key, KeyError, Signer};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Bytes of an ES256 signature (RFC 7518 section 3.4).
const SIGNATURE: usize = 64;

/// Why a text is not a JWS of this key and header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JwsError {
    /// Not three base64url parts with dots between them.
    Form,
    /// Another header.
    Header,
    /// Signed by somebody else, or changed.
    Signature,
}

/// The compact form; none when the system gives no random numbers.
pub(crate) fn sign(header: &str, payload: &[u8], signer: &Signer) -> Option<String> {
    let mut text = URL_SAFE_NO_PAD.encode(header);
    text.push('.');
    URL_SAFE_NO_PAD.encode_string(payload, &mut text);
    let signature = signer.sign(text.as_bytes())?;
    text.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut text);
    Some(text)
}

/// The payload of a text that has this header and that this key signed.
pub(crate) fn verify(text: &[u8], header: &str, key: &Key) -> Result<Vec<u8>, JwsError> {
    let mut parts = text.split(|byte| *byte == b'.');
    let (Some(found), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(JwsError::Form);
    };
    let signed = found.len().saturating_add(1).saturating_add(payload.len());
    let signed = text.get(..signed).ok_or(JwsError::Form)?;
    if found != URL_SAFE_NO_PAD.encode(header).as_bytes() {
        return Err(JwsError::Header);
    }
    let signature = decode(signature)?;
    if signature.len() != SIGNATURE || !key.verifies(signed, &signature) {
        return Err(JwsError::Signature);
    }
    decode(payload)
}

/// Base64url without padding, in its one spelling.
fn decode(part: &[u8]) -> Result<Vec<u8>, JwsError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| JwsError::Form)
}
