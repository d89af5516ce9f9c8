//! Attestation keys: which keys may be one, and what they signed.

use ring::signature::{ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey};

use super::{Attributes, Name, Parameters, Public, Scheme, Signature, TpmError};
use crate::digest::Algorithm;

/// The only exponent that every TPM makes keys with.
const AK_EXPONENT: u32 = 65537;

/// Why a key cannot be an attestation key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AkError {
    /// Its public area cannot be read.
    #[error("the attestation key's public area cannot be read")]
    Public(#[from] TpmError),
    /// An attribute is missing. Without them, what the key signs proves nothing about a TPM.
    #[error("the attestation key has the attributes {found}; it must have {wanted}")]
    Missing {
        /// What it has.
        found: Attributes,
        /// What it must have.
        wanted: Attributes,
    },
    /// It also decrypts.
    #[error("the attestation key can decrypt; it must only sign")]
    Decrypts,
    /// Another scheme than ECDSA P-256 or RSASSA 2048, with SHA-256.
    #[error("the attestation key signs with {found:?}; it must be ECDSA P-256 or RSASSA 2048, with SHA-256")]
    Scheme {
        /// Its scheme.
        found: Option<Scheme>,
    },
    /// An RSA key of another length.
    #[error("the attestation key is RSA with {0} bits, 2048 are supported")]
    RsaBits(u16),
    /// An RSA key with another exponent than the one that TPMs use (Part 2, section 12.2.3.5).
    #[error("the attestation key is RSA with the public exponent {0}, it must be {AK_EXPONENT}")]
    RsaExponent(u32),
    /// Its Name is not made with SHA-256.
    #[error("the attestation key's Name algorithm is {0}, it must be sha256")]
    NameAlg(Algorithm),
}

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The signature is of another scheme or hash than the key.
    #[error(
        "it is signed with {found:?}, and the attestation key is {key}: if the host's [tpm] ak was changed, the host must be \
         enrolled anew (assay-verifier host remove, then host add)"
    )]
    Scheme {
        /// Scheme of the signature.
        found: Scheme,
        /// What the key is.
        key: &'static str,
    },
    /// The key did not sign these bytes.
    #[error("the attestation key did not sign this")]
    Invalid,
}

/// A restricted signing key of a TPM: what it signs as an attestation was made by that TPM. That the key really lives in
/// one is proved by credential activation, at enrolment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttestationKey {
    public: Public,
    name: Name,
    verifier: KeyBytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum KeyBytes {
    P256(Vec<u8>),
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
}

impl KeyBytes {
    const fn name(&self) -> &'static str {
        match self {
            Self::P256(_) => "ECDSA P-256 with SHA-256",
            Self::Rsa { .. } => "RSASSA 2048 with SHA-256",
        }
    }
}

impl AttestationKey {
    /// Reads a `TPMT_PUBLIC` and checks that it can be an attestation key.
    ///
    /// # Errors
    /// An [`AkError`] naming what is wrong with it.
    pub fn new(public: &[u8]) -> Result<Self, AkError> {
        let public = Public::parse(public)?;
        check_ak_attributes(&public)?;
        let verifier = match public.parameters() {
            Parameters::P256 {
                scheme: Some(Scheme::Ecdsa(Algorithm::Sha256)),
                point,
                ..
            } => KeyBytes::P256(point.uncompressed()),
            Parameters::Rsa {
                scheme: Some(Scheme::Rsassa(Algorithm::Sha256)),
                bits: 2048,
                exponent: exponent @ AK_EXPONENT,
                modulus,
                ..
            } => {
                // ring wants numbers without leading zeros; the modulus has none at its full length.
                let exponent = exponent
                    .to_be_bytes()
                    .into_iter()
                    .skip_while(|byte| *byte == 0)
                    .collect();
                KeyBytes::Rsa {
                    modulus: modulus.clone(),
                    exponent,
                }
            }
            Parameters::Rsa {
                scheme: Some(Scheme::Rsassa(Algorithm::Sha256)),
                bits,
                exponent,
                ..
            } => {
                return Err(match bits {
                    2048 => AkError::RsaExponent(*exponent),
                    bits => AkError::RsaBits(*bits),
                });
            }
            Parameters::Rsa { scheme, .. } | Parameters::P256 { scheme, .. } => {
                return Err(AkError::Scheme { found: *scheme });
            }
        };
        Ok(Self {
            name: public.name(),
            public,
            verifier,
        })
    }

    /// Its Name.
    #[must_use]
    pub const fn name(&self) -> &Name {
        &self.name
    }

    /// Its public area.
    #[must_use]
    pub const fn public(&self) -> &Public {
        &self.public
    }

    /// Checks that this key signed `message`: the bytes as they came, never a copy that was parsed and written again.
    ///
    /// # Errors
    /// [`SignatureError::Scheme`], or [`SignatureError::Invalid`].
    pub fn verify(&self, message: &[u8], signature: &Signature) -> Result<(), SignatureError> {
        let verdict = match (&self.verifier, signature) {
            (
                KeyBytes::P256(point),
                Signature::Ecdsa {
                    hash: Algorithm::Sha256,
                    r,
                    s,
                },
            ) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, &[*r, *s].concat()),
            (
                KeyBytes::Rsa { modulus, exponent },
                Signature::Rsassa {
                    hash: Algorithm::Sha256,
                    signature,
                },
            ) => RsaPublicKeyComponents {
                n: modulus,
                e: exponent,
            }
            .verify(&RSA_PKCS1_2048_8192_SHA256, message, signature),
            (key, signature) => {
                return Err(SignatureError::Scheme {
                    found: signature.scheme(),
                    key: key.name(),
                });
            }
        };
        verdict.map_err(|_| SignatureError::Invalid)
    }
}

/// Checks the attributes of an attestation key: made in this TPM, never leaves it, signs only what the TPM made.
///
/// # Errors
/// [`AkError::Missing`], [`AkError::Decrypts`], [`AkError::NameAlg`].
pub fn check_ak_attributes(public: &Public) -> Result<(), AkError> {
    let wanted = Attributes::FIXED_TPM
        .with(Attributes::FIXED_PARENT)
        .with(Attributes::SENSITIVE_DATA_ORIGIN)
        .with(Attributes::RESTRICTED)
        .with(Attributes::SIGN);
    let found = public.attributes();
    if !found.has(wanted) {
        return Err(AkError::Missing { found, wanted });
    }
    if found.has_any(Attributes::DECRYPT) {
        return Err(AkError::Decrypts);
    }
    if public.name_alg() != Algorithm::Sha256 {
        return Err(AkError::NameAlg(public.name_alg()));
    }
    Ok(())
}
