//! `TPM2_MakeCredential` in software: a secret that only the TPM holding both this EK and this AK can read
//! (TPM 2.0 Part 1, section 24 "Credential Protection", and annexes B.10.4 and C.6.4 for the seed).
//!
//! The verifier sends such a secret at enrolment. Who returns it has shown that the attestation key is in the same TPM
//! as the endorsement key, without the verifier needing a TPM of its own.

use aes::Aes128;
use cfb_mode::cipher::KeyIvInit as _;
use ring::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey};
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use rsa::BoxedUint;
use rsa::rand_core::{TryCryptoRng, TryRng};
use rsa::sha2::Sha256;
use rsa::traits::RandomizedEncryptor as _;
use zeroize::Zeroizing;

use crate::digest::{Algorithm, Sha256Digest};
use crate::jwe::from_sec1;
use crate::tpm::{EccPoint, Name, Parameters, Public, Symmetric};

/// Longest secret, in bytes: the digest size of the EK's name algorithm, SHA-256.
pub const MAX_SECRET: usize = 32;

/// `TPM_ALG_CFB` (Part 2, section 6.3).
const ALG_CFB: u16 = 0x0043;

/// Why no credential could be made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The secret is empty or longer than [`MAX_SECRET`].
    #[error("a credential's secret has 1 to {MAX_SECRET} bytes, not {0}")]
    SecretSize(usize),
    /// The EK is not one that this program makes credentials for.
    #[error(
        "the endorsement key is not of a kind that credentials are made for (RSA-2048 or P-256 with AES-128-CFB and SHA-256): {0}"
    )]
    UnsupportedEk(&'static str),
    /// The EK's RSA modulus or exponent is no RSA key.
    #[error("the endorsement key's RSA numbers are not a key")]
    RsaKey(#[source] rsa::Error),
    /// RSA-OAEP failed.
    #[error("the credential's seed could not be encrypted to the endorsement key")]
    Oaep(#[source] rsa::Error),
    /// The EK's point is not on the curve P-256.
    #[error("the endorsement key is not a point on P-256")]
    EcPoint,
    /// The operating system gave no random numbers.
    #[error("the operating system gave no random numbers")]
    Random,
}

/// What `TPM2_ActivateCredential` takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// `TPM2B_ID_OBJECT`, size included.
    pub blob: Vec<u8>,
    /// `TPM2B_ENCRYPTED_SECRET`, size included.
    pub encrypted_secret: Vec<u8>,
}

/// Protects `secret` so that only the TPM with this EK can read it, and only for the object with this Name.
///
/// # Errors
/// [`CredentialError`]: the secret's size, or an EK that is not RSA-2048 or P-256 with AES-128-CFB and SHA-256.
pub fn make_credential(ek: &Public, ak_name: &Name, secret: &[u8]) -> Result<Credential, CredentialError> {
    if secret.is_empty() || secret.len() > MAX_SECRET {
        return Err(CredentialError::SecretSize(secret.len()));
    }
    let (seed, encrypted_secret) = seal_seed(ek)?;
    Ok(Credential {
        blob: id_object(&seed, ak_name.as_bytes(), secret),
        encrypted_secret: sized(&encrypted_secret),
    })
}

/// Symmetric half (Part 1, 24.4 and 24.5): encrypts the secret, then authenticates it together with the Name.
fn id_object(seed: &[u8; 32], name: &[u8], secret: &[u8]) -> Vec<u8> {
    let key = kdfa(seed, b"STORAGE\0", name, 128);
    let key: [u8; 16] = std::array::from_fn(|at| key.get(at).copied().unwrap_or_default());
    let mut identity = sized(secret);
    // A zero IV is safe: the key comes from a fresh seed and is used once.
    cfb_mode::Encryptor::<Aes128>::new(&key.into(), &[0; 16].into()).encrypt(&mut identity);
    let hmac_key = hmac::Key::new(hmac::HMAC_SHA256, kdfa(seed, b"INTEGRITY\0", b"", 256).as_slice());
    let mut context = hmac::Context::with_key(&hmac_key);
    context.update(&identity);
    context.update(name);
    let mut object = sized(context.sign().as_ref());
    object.extend_from_slice(&identity);
    sized(&object)
}

/// KDFa (Part 1, 11.4.10.2) with HMAC-SHA-256, for at most 256 bits: one round, of which the caller takes the first
/// `bits / 8` bytes. `label` ends with its NUL; contextV is always empty here.
fn kdfa(key: &[u8], label: &[u8], context_u: &[u8], bits: u32) -> Zeroizing<[u8; 32]> {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    context.update(&1u32.to_be_bytes());
    context.update(label);
    context.update(context_u);
    context.update(&bits.to_be_bytes());
    let tag = context.sign();
    Zeroizing::new(std::array::from_fn(|at| {
        tag.as_ref().get(at).copied().unwrap_or_default()
    }))
}

/// Makes the seed and encrypts it to the EK.
fn seal_seed(ek: &Public) -> Result<(Zeroizing<[u8; 32]>, Vec<u8>), CredentialError> {
    let unsupported = |what| Err(CredentialError::UnsupportedEk(what));
    if ek.name_alg() != Algorithm::Sha256 {
        return unsupported("its Name is not made with SHA-256");
    }
    let (Parameters::Rsa { symmetric, .. } | Parameters::P256 { symmetric, .. }) = ek.parameters();
    if *symmetric
        != Some(Symmetric {
            bits: 128,
            mode: ALG_CFB,
        })
    {
        return unsupported("its cipher is not AES-128-CFB");
    }
    match ek.parameters() {
        Parameters::Rsa {
            bits: 2048,
            exponent,
            modulus,
            ..
        } => seal_rsa(modulus, *exponent),
        Parameters::Rsa { .. } => unsupported("its modulus does not have 2048 bits"),
        Parameters::P256 { point, .. } => seal_p256(point),
    }
}

fn seal_rsa(modulus: &[u8], exponent: u32) -> Result<(Zeroizing<[u8; 32]>, Vec<u8>), CredentialError> {
    let modulus = BoxedUint::from_be_slice_vartime(modulus);
    let key = rsa::PublicKey::new(modulus, BoxedUint::from(exponent)).map_err(CredentialError::RsaKey)?;
    let mut seed = Zeroizing::new([0; 32]);
    SystemRandom::new()
        .fill(seed.as_mut_slice())
        .map_err(|_| CredentialError::Random)?;
    // Part 1, B.4: the label's NUL is part of what OAEP hashes.
    let key = rsa::oaep::EncryptingKey::<Sha256>::new_with_label(key, *b"IDENTITY\0");
    let sealed = key
        .encrypt_with_rng(&mut RingRng, seed.as_slice())
        .map_err(CredentialError::Oaep)?;
    Ok((seed, sealed))
}

fn seal_p256(ek: &EccPoint) -> Result<(Zeroizing<[u8; 32]>, Vec<u8>), CredentialError> {
    let ephemeral =
        EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).map_err(|_| CredentialError::Random)?;
    let public = ephemeral.compute_public_key().map_err(|_| CredentialError::Random)?;
    let public = from_sec1(public.as_ref()).ok_or(CredentialError::EcPoint)?;
    // KDFe (Part 1, 11.4.10.3): one round of SHA-256 over Z, the label and both x coordinates.
    let seed = agreement::agree_ephemeral(ephemeral, &UnparsedPublicKey::new(&ECDH_P256, ek.uncompressed()), |z| {
        Zeroizing::new(*Sha256Digest::of_parts(&[&1u32.to_be_bytes(), z, b"IDENTITY\0", &public.x, &ek.x]).as_bytes())
    })
    .map_err(|_| CredentialError::EcPoint)?;
    let mut point = sized(&public.x);
    point.extend_from_slice(&sized(&public.y));
    Ok((seed, point))
}

/// A TPM2B: a big-endian u16 size, then the bytes. What is sized here has a few hundred bytes at most.
fn sized(bytes: &[u8]) -> Vec<u8> {
    let mut out = u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes().to_vec();
    out.extend_from_slice(bytes);
    out
}

/// The operating system's random numbers, as the RSA crate wants them.
struct RingRng;

/// The operating system gave no random numbers.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gave no random numbers")]
struct NoRandom;

impl TryRng for RingRng {
    type Error = NoRandom;

    fn try_next_u32(&mut self) -> Result<u32, NoRandom> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, NoRandom> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), NoRandom> {
        SystemRandom::new().fill(bytes).map_err(|_| NoRandom)
    }
}

impl TryCryptoRng for RingRng {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sized as put;

    /// `TPMT_PUBLIC` of a P-256 EK with AES of this length, in this mode.
    fn ek(point: &EccPoint, bits: u16, mode: u16) -> Public {
        let mut area = vec![0x00, 0x23, 0x00, 0x0B, 0x00, 0x03, 0x00, 0xB2, 0, 0, 0, 0x06];
        area.extend_from_slice(&bits.to_be_bytes());
        area.extend_from_slice(&mode.to_be_bytes());
        area.extend_from_slice(&[0, 0x10, 0, 3, 0, 0x10]);
        put(&mut area, &point.x);
        put(&mut area, &point.y);
        Public::parse(&area).unwrap()
    }

    fn software_ek() -> (EphemeralPrivateKey, EccPoint) {
        let key = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).unwrap();
        let point = from_sec1(key.compute_public_key().unwrap().as_ref()).unwrap();
        (key, point)
    }

    /// What the TPM does, in software; the whole against a TPM is in `tests/tpm.rs`.
    #[test]
    fn opens_with_the_right_key_and_name() {
        let (private, point) = software_ek();
        let name = Name::new(Algorithm::Sha256, b"attestation key");
        let credential = make_credential(&ek(&point, 128, ALG_CFB), &name, &[7; 32]).unwrap();

        let sealed = &credential.encrypted_secret;
        assert_eq!((sealed.len(), &sealed[..4]), (2 + 2 * 34, [0, 68, 0, 32].as_slice()));
        let ephemeral = [[4].as_slice(), &sealed[4..36], &sealed[38..]].concat();
        let seed = agreement::agree_ephemeral(private, &UnparsedPublicKey::new(&ECDH_P256, &ephemeral), |z| {
            Sha256Digest::of_parts(&[&[0, 0, 0, 1], z, b"IDENTITY\0", &sealed[4..36], &point.x])
        })
        .unwrap();
        assert_eq!(credential.blob, id_object(seed.as_bytes(), name.as_bytes(), &[7; 32]));
        let other = Name::new(Algorithm::Sha256, b"another key");
        assert_ne!(credential.blob, id_object(seed.as_bytes(), other.as_bytes(), &[7; 32]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (_, point) = software_ek();
        let name = Name::new(Algorithm::Sha256, b"attestation key");
        let make = |ek: &Public, secret: &[u8]| make_credential(ek, &name, secret).unwrap_err();
        let good = ek(&point, 128, ALG_CFB);
        assert!(matches!(make(&good, &[]), CredentialError::SecretSize(0)));
        assert!(matches!(make(&good, &[0; 33]), CredentialError::SecretSize(33)));
        assert!(matches!(
            make(&ek(&point, 256, ALG_CFB), &[0]),
            CredentialError::UnsupportedEk(_)
        ));
        assert!(matches!(
            make(&ek(&point, 128, 0x42), &[0]),
            CredentialError::UnsupportedEk(_)
        ));
        let off_curve = EccPoint { x: [1; 32], y: [1; 32] };
        assert!(matches!(
            make(&ek(&off_curve, 128, ALG_CFB), &[0]),
            CredentialError::EcPoint
        ));
    }
}
