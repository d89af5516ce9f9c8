//! A disk key on its way to the host: JWE (RFC 7516), flattened JSON, ECDH-ES+A256KW with A256GCM (RFC 7518).
//!
//! The verifier wraps to a P-256 key that lives in the host's TPM; the host unwraps with the TPM's `TPM2_ECDH_ZGen`,
//! which enters [`unwrap`] as a closure, so that this module needs no TPM and the private half is never a value here.
//! Both sides accept exactly this one combination of algorithms: what is not in the code can't be negotiated down to.

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use aes_kw::KwAes256;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use zeroize::Zeroizing;

use crate::digest::Sha256Digest;
use crate::tpm::EccPoint;
use crate::wire::MAX_KEY_ID;

/// Longest plaintext, in bytes, that is wrapped or unwrapped: a passphrase, not a file.
pub const MAX_PLAINTEXT: usize = 4096;

const ALG: &str = "ECDH-ES+A256KW";
const ENC: &str = "A256GCM";
/// Base64url of a header with the longest key id (JSON may escape a byte to six) fits.
const MAX_PROTECTED: usize = 2048;
const IV_LEN: usize = 12;
const TAG_LEN: usize = 16;
const CEK_LEN: usize = 32;
const WRAPPED_CEK_LEN: usize = CEK_LEN + 8;

/// Why a key could not be wrapped or unwrapped. `E` is what the ECDH closure fails with.
#[derive(Debug, thiserror::Error)]
pub enum JweError<E: std::error::Error + 'static = Infallible> {
    /// The plaintext to wrap is empty or longer than [`MAX_PLAINTEXT`].
    #[error("a key of {0} bytes can't be wrapped: 1 to {MAX_PLAINTEXT} are allowed")]
    PlaintextSize(usize),
    /// The key id is empty or longer than [`MAX_KEY_ID`].
    #[error("a key id of {0} bytes can't be wrapped: 1 to {MAX_KEY_ID} are allowed")]
    KeyIdSize(usize),
    /// The operating system gave no random numbers.
    #[error("the operating system gave no random numbers")]
    Random,
    /// The recipient's point is not on the curve P-256.
    #[error("the recipient's public key is not a point on P-256")]
    RecipientPoint,
    /// A member of the JWE is not base64url without padding, or longer than it can be.
    #[error("the JWE's member {0:?} is not base64url of a possible length")]
    Member(&'static str),
    /// The protected header is not the JSON object that this profile has.
    #[error("the JWE's protected header is malformed")]
    Header(#[source] serde_json::Error),
    /// Another algorithm than this profile's.
    #[error("the JWE's {member} is {found:?}, only {wanted:?} is accepted")]
    Algorithm {
        /// The header's member.
        member: &'static str,
        /// Its value.
        found: String,
        /// The one value that is accepted.
        wanted: &'static str,
    },
    /// The ECDH operation failed.
    #[error("the key agreement for the wrapped key failed")]
    Ecdh(#[source] E),
    /// The wrapped content key does not open: another recipient, or tampered with.
    #[error("the wrapped content key does not open: it was made for another key, or was changed")]
    KeyUnwrap,
    /// The ciphertext does not authenticate.
    #[error("the JWE's ciphertext does not authenticate: it was changed")]
    Ciphertext,
}

/// The sender's ephemeral key, or the recipient's: a point on P-256.
pub type EpkPoint = EccPoint;

/// A wrapped key in the flattened JSON serialization (RFC 7516 §7.2.2). Its content is not trusted before [`unwrap`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwe {
    /// The header, base64url; also the additional authenticated data.
    pub protected: String,
    /// The content key under AES key wrap (RFC 3394), base64url.
    pub encrypted_key: String,
    /// The 96-bit initialisation vector, base64url.
    pub iv: String,
    /// The encrypted key, base64url.
    pub ciphertext: String,
    /// The 128-bit authentication tag, base64url.
    pub tag: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    enc: String,
    epk: Jwk,
    kid: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Jwk {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

/// Wraps `plaintext` to the recipient's P-256 key, with a fresh ephemeral key; `key_id` becomes the header's `kid`.
///
/// # Errors
/// [`JweError`]: sizes, no random numbers, or a recipient that is not on the curve.
pub fn wrap(recipient: &EpkPoint, key_id: &str, plaintext: &[u8]) -> Result<Jwe, JweError> {
    if plaintext.is_empty() || plaintext.len() > MAX_PLAINTEXT {
        return Err(JweError::PlaintextSize(plaintext.len()));
    }
    if key_id.is_empty() || key_id.len() > MAX_KEY_ID {
        return Err(JweError::KeyIdSize(key_id.len()));
    }
    let rng = SystemRandom::new();
    let ephemeral = EphemeralPrivateKey::generate(&ECDH_P256, &rng).map_err(|_| JweError::Random)?;
    let epk = ephemeral.compute_public_key().map_err(|_| JweError::Random)?;
    let epk = from_sec1(epk.as_ref()).ok_or(JweError::Random)?;
    let kek = agreement::agree_ephemeral(
        ephemeral,
        &UnparsedPublicKey::new(&ECDH_P256, recipient.uncompressed()),
        |z| concat_kdf_256(z, ALG, b"", b"", 256),
    )
    .map_err(|_| JweError::RecipientPoint)?;

    let mut cek = Zeroizing::new([0u8; CEK_LEN]);
    let mut iv = [0u8; IV_LEN];
    rng.fill(cek.as_mut_slice()).map_err(|_| JweError::Random)?;
    rng.fill(&mut iv).map_err(|_| JweError::Random)?;
    let mut wrapped = [0u8; WRAPPED_CEK_LEN];
    KwAes256::new((&*kek).into())
        .wrap_key(cek.as_slice(), &mut wrapped)
        .map_err(|_| JweError::KeyUnwrap)?;

    let protected = URL_SAFE_NO_PAD.encode(header(&epk, key_id)?);
    // The buffer turns from plaintext to ciphertext in place, so nothing of the key is left behind in it.
    let mut buffer = plaintext.to_vec();
    let tag = Aes256Gcm::new((&*cek).into())
        .encrypt_inout_detached(&Nonce::from(iv), protected.as_bytes(), buffer.as_mut_slice().into())
        .map_err(|_| JweError::PlaintextSize(plaintext.len()))?;
    Ok(Jwe {
        protected,
        encrypted_key: URL_SAFE_NO_PAD.encode(wrapped),
        iv: URL_SAFE_NO_PAD.encode(iv),
        ciphertext: URL_SAFE_NO_PAD.encode(buffer),
        tag: URL_SAFE_NO_PAD.encode(tag),
    })
}

/// Opens a JWE. `ecdh` gets the sender's ephemeral point and returns Z: the x coordinate of the shared point, 32 bytes,
/// left-padded (what `TPM2_ECDH_ZGen` gives). It must itself refuse a point that is not on the curve; the TPM does.
///
/// # Errors
/// [`JweError`]: malformed, other algorithms, the closure's own failure, or tampering.
pub fn unwrap<E: std::error::Error + 'static>(
    jwe: &Jwe,
    ecdh: impl FnOnce(&EpkPoint) -> Result<[u8; 32], E>,
) -> Result<Zeroizing<Vec<u8>>, JweError<E>> {
    let header = jwe.header()?;
    for (member, found, wanted) in [
        ("alg", &header.alg, ALG),
        ("enc", &header.enc, ENC),
        ("epk.kty", &header.epk.kty, "EC"),
        ("epk.crv", &header.epk.crv, "P-256"),
    ] {
        if found != wanted {
            return Err(JweError::Algorithm {
                member,
                found: found.clone(),
                wanted,
            });
        }
    }
    let epk = EpkPoint {
        x: fixed("epk.x", &header.epk.x)?,
        y: fixed("epk.y", &header.epk.y)?,
    };
    let wrapped: [u8; WRAPPED_CEK_LEN] = fixed("encrypted_key", &jwe.encrypted_key)?;
    let iv: [u8; IV_LEN] = fixed("iv", &jwe.iv)?;
    let tag: [u8; TAG_LEN] = fixed("tag", &jwe.tag)?;
    let mut buffer = Zeroizing::new(decode("ciphertext", &jwe.ciphertext, MAX_PLAINTEXT)?);

    // Everything that can be refused without the TPM has been; only now is it asked.
    let z = Zeroizing::new(ecdh(&epk).map_err(JweError::Ecdh)?);
    let kek = concat_kdf_256(z.as_slice(), ALG, b"", b"", 256);
    let mut cek = Zeroizing::new([0u8; CEK_LEN]);
    KwAes256::new((&*kek).into())
        .unwrap_key(&wrapped, cek.as_mut_slice())
        .map_err(|_| JweError::KeyUnwrap)?;
    Aes256Gcm::new((&*cek).into())
        .decrypt_inout_detached(
            &Nonce::from(iv),
            jwe.protected.as_bytes(),
            buffer.as_mut_slice().into(),
            &Tag::from(tag),
        )
        .map_err(|_| JweError::Ciphertext)?;
    Ok(buffer)
}

impl Jwe {
    /// The key id that the header claims. Authentic only once [`unwrap`] succeeded.
    #[must_use]
    pub fn untrusted_key_id(&self) -> Option<String> {
        self.header::<Infallible>().ok().map(|header| header.kid)
    }

    fn header<E: std::error::Error>(&self) -> Result<Header, JweError<E>> {
        serde_json::from_slice(&decode("protected", &self.protected, MAX_PROTECTED)?).map_err(JweError::Header)
    }
}

/// Reads a point's uncompressed form (SEC 1 §2.3.3); `None` for anything else.
pub(crate) fn from_sec1(bytes: &[u8]) -> Option<EccPoint> {
    let (&tag, point) = bytes.split_first()?;
    let (x, y) = point.split_at_checked(32)?;
    (tag == 4).then_some(EccPoint {
        x: x.try_into().ok()?,
        y: y.try_into().ok()?,
    })
}

fn header(epk: &EpkPoint, key_id: &str) -> Result<Vec<u8>, JweError> {
    serde_json::to_vec(&Header {
        alg: ALG.into(),
        enc: ENC.into(),
        epk: Jwk {
            crv: "P-256".into(),
            kty: "EC".into(),
            x: URL_SAFE_NO_PAD.encode(epk.x),
            y: URL_SAFE_NO_PAD.encode(epk.y),
        },
        kid: key_id.into(),
    })
    .map_err(JweError::Header)
}

/// The Concat KDF of RFC 7518 §4.6.2 (NIST SP 800-56A §5.8.1) for keys of at most 256 bits, so one round of SHA-256.
/// The caller takes the first `bits / 8` bytes.
fn concat_kdf_256(z: &[u8], alg: &str, apu: &[u8], apv: &[u8], bits: u32) -> Zeroizing<[u8; 32]> {
    // The parts are constants of this module, a few bytes each: the saturation is never reached.
    let length = |part: &[u8]| u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes();
    let alg = alg.as_bytes();
    let digest = Sha256Digest::of_parts(&[
        &1u32.to_be_bytes(),
        z,
        &length(alg),
        alg,
        &length(apu),
        apu,
        &length(apv),
        apv,
        &bits.to_be_bytes(),
    ]);
    Zeroizing::new(*digest.as_bytes())
}

fn decode<E: std::error::Error>(name: &'static str, text: &str, max: usize) -> Result<Vec<u8>, JweError<E>> {
    // Four characters carry three bytes: bounds the work before it is done.
    if text.len() > max.div_ceil(3) * 4 {
        return Err(JweError::Member(name));
    }
    URL_SAFE_NO_PAD.decode(text).map_err(|_| JweError::Member(name))
}

fn fixed<const N: usize, E: std::error::Error>(name: &'static str, text: &str) -> Result<[u8; N], JweError<E>> {
    decode(name, text, N)?.try_into().map_err(|_| JweError::Member(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("agreement failed")]
    struct NoAgreement;

    /// A recipient in software: what the TPM does on a host.
    struct Recipient(EphemeralPrivateKey, EpkPoint);

    fn recipient() -> Recipient {
        let key = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).unwrap();
        let point = from_sec1(key.compute_public_key().unwrap().as_ref()).unwrap();
        Recipient(key, point)
    }

    fn open(jwe: &Jwe, key: EphemeralPrivateKey) -> Result<Zeroizing<Vec<u8>>, JweError<NoAgreement>> {
        unwrap(jwe, |epk| {
            agreement::agree_ephemeral(key, &UnparsedPublicKey::new(&ECDH_P256, epk.uncompressed()), |z| {
                z.try_into().unwrap()
            })
            .map_err(|_| NoAgreement)
        })
    }

    /// RFC 7518 appendix C.
    #[test]
    fn concat_kdf_matches_the_rfc() {
        let z = [
            158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156, 251, 49, 110, 163, 218, 128,
            106, 72, 246, 218, 167, 121, 140, 254, 144, 196,
        ];
        let key = concat_kdf_256(&z, "A128GCM", b"Alice", b"Bob", 128);
        assert_eq!(URL_SAFE_NO_PAD.encode(&key[..16]), "VqqN6vgjbSBcIijNcacQGg");
    }

    #[test]
    fn round_trip() {
        let Recipient(key, point) = recipient();
        let jwe = wrap(&point, "0d4c1f6e", b"passphrase").unwrap();
        assert_eq!(jwe.untrusted_key_id().as_deref(), Some("0d4c1f6e"));
        let text = serde_json::to_string(&jwe).unwrap();
        let back: Jwe = serde_json::from_str(&text).unwrap();
        assert_eq!(open(&back, key).unwrap().as_slice(), b"passphrase");
    }

    #[test]
    fn another_recipient_cannot_open() {
        let jwe = wrap(&recipient().1, "k", b"passphrase").unwrap();
        assert!(matches!(open(&jwe, recipient().0), Err(JweError::KeyUnwrap)));
    }

    #[test]
    fn each_member_is_authenticated() {
        // Changes the first character, so the decoded bytes change whatever the length.
        fn flip(text: &str) -> String {
            let first = if text.starts_with('A') { 'B' } else { 'A' };
            std::iter::once(first).chain(text.chars().skip(1)).collect()
        }
        for member in ["encrypted_key", "iv", "ciphertext", "tag", "kid"] {
            let Recipient(key, point) = recipient();
            let mut jwe = wrap(&point, "key-1", b"passphrase").unwrap();
            match member {
                "encrypted_key" => jwe.encrypted_key = flip(&jwe.encrypted_key),
                "iv" => jwe.iv = flip(&jwe.iv),
                "ciphertext" => jwe.ciphertext = flip(&jwe.ciphertext),
                "tag" => jwe.tag = flip(&jwe.tag),
                _ => {
                    let header = String::from_utf8(URL_SAFE_NO_PAD.decode(&jwe.protected).unwrap()).unwrap();
                    jwe.protected = URL_SAFE_NO_PAD.encode(header.replace("key-1", "key-2"));
                }
            }
            let refused = open(&jwe, key);
            if member == "encrypted_key" {
                assert!(matches!(refused, Err(JweError::KeyUnwrap)), "{member}");
            } else {
                assert!(matches!(refused, Err(JweError::Ciphertext)), "{member}");
            }
        }
    }

    #[test]
    fn malformed_members_are_refused_before_the_key_is_used() {
        let good = wrap(&recipient().1, "k", b"passphrase").unwrap();
        let header = |from: &str, to: &str| {
            let text = String::from_utf8(URL_SAFE_NO_PAD.decode(&good.protected).unwrap()).unwrap();
            assert!(text.contains(from));
            Jwe {
                protected: URL_SAFE_NO_PAD.encode(text.replace(from, to)),
                ..good.clone()
            }
        };
        let refuse = |jwe: &Jwe| {
            unwrap(jwe, |_| -> Result<[u8; 32], NoAgreement> {
                panic!("the key must not be used")
            })
            .unwrap_err()
        };
        assert!(matches!(
            refuse(&header(ALG, "ECDH-ES")),
            JweError::Algorithm { member: "alg", .. }
        ));
        assert!(matches!(
            refuse(&header(ENC, "A128GCM")),
            JweError::Algorithm { member: "enc", .. }
        ));
        assert!(matches!(
            refuse(&header("P-256", "P-384")),
            JweError::Algorithm { member: "epk.crv", .. }
        ));
        assert!(matches!(
            refuse(&header("\"EC\"", "\"OKP\"")),
            JweError::Algorithm { member: "epk.kty", .. }
        ));
        assert!(matches!(
            refuse(&header("{\"alg\"", "{\"zip\":\"DEF\",\"alg\"")),
            JweError::Header(_)
        ));
        let huge = "A".repeat(100_000);
        assert!(matches!(
            refuse(&Jwe {
                protected: huge.clone(),
                ..good.clone()
            }),
            JweError::Member("protected")
        ));
        assert!(matches!(
            refuse(&Jwe {
                ciphertext: huge,
                ..good.clone()
            }),
            JweError::Member("ciphertext")
        ));
        assert!(matches!(
            refuse(&Jwe {
                iv: "AA".into(),
                ..good.clone()
            }),
            JweError::Member("iv")
        ));
        assert!(matches!(
            refuse(&Jwe {
                tag: "AA".into(),
                ..good.clone()
            }),
            JweError::Member("tag")
        ));
        assert!(matches!(
            refuse(&Jwe {
                encrypted_key: "=".into(),
                ..good.clone()
            }),
            JweError::Member("encrypted_key")
        ));
    }

    #[test]
    fn what_cannot_be_wrapped_is_refused() {
        let point = recipient().1;
        assert!(matches!(wrap(&point, "k", b""), Err(JweError::PlaintextSize(0))));
        assert!(matches!(
            wrap(&point, "k", &[0; MAX_PLAINTEXT + 1]),
            Err(JweError::PlaintextSize(_))
        ));
        assert!(matches!(wrap(&point, "", b"x"), Err(JweError::KeyIdSize(0))));
        let off_curve = EpkPoint { x: [1; 32], y: [2; 32] };
        assert!(matches!(wrap(&off_curve, "k", b"x"), Err(JweError::RecipientPoint)));
    }
}
