//! Public areas of keys and their Names.

use core::fmt;
use core::str::FromStr;

use super::{ALG_NULL, TpmError, read_hash};
use crate::digest::{Algorithm, lower_hex};
use crate::reader::Reader;

const ALG_RSA: u16 = 0x0001;
const ALG_AES: u16 = 0x0006;
const ALG_RSASSA: u16 = 0x0014;
const ALG_RSAES: u16 = 0x0015;
const ALG_RSAPSS: u16 = 0x0016;
const ALG_OAEP: u16 = 0x0017;
const ALG_ECDSA: u16 = 0x0018;
const ALG_ECDH: u16 = 0x0019;
const ALG_ECC: u16 = 0x0023;
const ECC_NIST_P256: u16 = 0x0003;
/// Exponent that a public area's 0 stands for (Part 2, section 12.2.3.5).
const DEFAULT_EXPONENT: u32 = 65537;
const MAX_MODULUS: usize = 512;

/// A public area, `TPMT_PUBLIC` (Part 2, section 12.2.4), of an RSA or P-256 key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    bytes: Vec<u8>,
    name_alg: Algorithm,
    attributes: Attributes,
    auth_policy: Vec<u8>,
    parameters: Parameters,
}

impl Public {
    /// Reads a `TPMT_PUBLIC`.
    ///
    /// # Errors
    /// A [`TpmError`] for anything but an RSA or P-256 public area with a known Name algorithm.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new("TPMT_PUBLIC", bytes);
        let kind = reader.u16()?;
        let name_alg = read_hash(&mut reader)?;
        let attributes = Attributes(reader.u32()?);
        let auth_policy = reader.sized_u16()?.to_vec();
        let parameters = match kind {
            ALG_RSA => read_rsa(&mut reader)?,
            ALG_ECC => read_ecc(&mut reader)?,
            id => {
                return Err(TpmError::Unsupported { what: "key type", id });
            }
        };
        reader.finish()?;
        Ok(Self {
            bytes: bytes.to_vec(),
            name_alg,
            attributes,
            auth_policy,
            parameters,
        })
    }

    /// The bytes that were parsed.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Algorithm of the Name.
    #[must_use]
    pub const fn name_alg(&self) -> Algorithm {
        self.name_alg
    }

    /// The Name: algorithm id and digest of the public area (TPM 2.0 Part 1, section 16).
    #[must_use]
    pub fn name(&self) -> Name {
        Name::new(self.name_alg, &self.bytes)
    }

    /// `objectAttributes`.
    #[must_use]
    pub const fn attributes(&self) -> Attributes {
        self.attributes
    }

    /// `authPolicy`: empty, or a digest.
    #[must_use]
    pub fn auth_policy(&self) -> &[u8] {
        &self.auth_policy
    }

    /// Parameters and public key.
    #[must_use]
    pub const fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}

/// Parameters and unique field of a [`Public`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parameters {
    /// `TPMS_RSA_PARMS` and `TPM2B_PUBLIC_KEY_RSA`.
    Rsa {
        /// Cipher of a storage key.
        symmetric: Option<Symmetric>,
        /// Scheme that the key is limited to.
        scheme: Option<Scheme>,
        /// Length of the modulus in bits.
        bits: u16,
        /// Public exponent; the structure's 0 is 65537.
        exponent: u32,
        /// The modulus, big-endian.
        modulus: Vec<u8>,
    },
    /// `TPMS_ECC_PARMS` and `TPMS_ECC_POINT` on NIST P-256.
    P256 {
        /// Cipher of a storage key.
        symmetric: Option<Symmetric>,
        /// Scheme that the key is limited to.
        scheme: Option<Scheme>,
        /// The public point.
        point: EccPoint,
    },
}

/// Cipher of a storage key: AES, in the given mode (`TPMT_SYM_DEF_OBJECT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symmetric {
    /// Key length in bits.
    pub bits: u16,
    /// `TPM_ALG_ID` of the mode; CFB is 0x0043.
    pub mode: u16,
}

/// A signing or encryption scheme that a key is limited to (`TPMT_RSA_SCHEME`, `TPMT_ECC_SCHEME`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// RSASSA-PKCS1-v1_5 signatures.
    Rsassa(Algorithm),
    /// RSASSA-PSS signatures.
    Rsapss(Algorithm),
    /// RSAES-PKCS1-v1_5 encryption.
    Rsaes,
    /// RSAES-OAEP encryption.
    Oaep(Algorithm),
    /// ECDSA signatures.
    Ecdsa(Algorithm),
    /// ECDH key exchange.
    Ecdh(Algorithm),
}

/// A point on P-256, coordinates big-endian and padded to 32 bytes. Whether it lies on the curve is checked by whoever
/// computes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EccPoint {
    /// X coordinate.
    pub x: [u8; 32],
    /// Y coordinate.
    pub y: [u8; 32],
}

impl EccPoint {
    /// Uncompressed form: 0x04, x, y (SEC 1, section 2.3.3).
    #[must_use]
    pub fn uncompressed(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(65);
        bytes.push(4);
        bytes.extend_from_slice(&self.x);
        bytes.extend_from_slice(&self.y);
        bytes
    }
}

/// `TPMA_OBJECT` (Part 2, section 8.3).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Attributes(pub u32);

impl Attributes {
    /// The key cannot leave this TPM.
    pub const FIXED_TPM: Self = Self(1 << 1);
    /// The key cannot move to another parent.
    pub const FIXED_PARENT: Self = Self(1 << 4);
    /// The TPM itself made the private part.
    pub const SENSITIVE_DATA_ORIGIN: Self = Self(1 << 5);
    /// Its password allows use.
    pub const USER_WITH_AUTH: Self = Self(1 << 6);
    /// Administration needs the policy.
    pub const ADMIN_WITH_POLICY: Self = Self(1 << 7);
    /// Not subject to the dictionary attack lock-out.
    pub const NO_DA: Self = Self(1 << 10);
    /// Limited to structures that the TPM made (signing), or to storage (decryption).
    pub const RESTRICTED: Self = Self(1 << 16);
    /// Decrypts.
    pub const DECRYPT: Self = Self(1 << 17);
    /// Signs.
    pub const SIGN: Self = Self(1 << 18);

    const NAMES: [(Self, &'static str); 9] = [
        (Self::FIXED_TPM, "fixedTPM"),
        (Self::FIXED_PARENT, "fixedParent"),
        (Self::SENSITIVE_DATA_ORIGIN, "sensitiveDataOrigin"),
        (Self::USER_WITH_AUTH, "userWithAuth"),
        (Self::ADMIN_WITH_POLICY, "adminWithPolicy"),
        (Self::NO_DA, "noDA"),
        (Self::RESTRICTED, "restricted"),
        (Self::DECRYPT, "decrypt"),
        (Self::SIGN, "sign"),
    ];

    /// Both together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `wanted` are set.
    #[must_use]
    pub const fn has(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }

    /// Whether any of `unwanted` is set.
    #[must_use]
    pub const fn has_any(self, unwanted: Self) -> bool {
        self.0 & unwanted.0 != 0
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Self::NAMES
            .iter()
            .filter(|(bit, _)| self.has(*bit))
            .map(|(_, name)| *name)
            .collect();
        write!(f, "{}", names.join("|"))
    }
}

impl fmt::Debug for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Attributes(0x{:08x} {self})", self.0)
    }
}

/// A text or bytes that are no Name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a TPM Name: it must be a hash algorithm's id and a digest of that algorithm")]
pub struct NameError;

/// Name of a key: `TPM_ALG_ID` and digest of its public area. Text form: lower-case hex.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name(Vec<u8>);

impl Name {
    /// The Name of the key with this public area.
    #[must_use]
    pub fn new(algorithm: Algorithm, public_area: &[u8]) -> Self {
        let mut bytes = algorithm.tpm_id().to_be_bytes().to_vec();
        bytes.extend_from_slice(&algorithm.hash(public_area));
        Self(bytes)
    }

    /// Reads a Name's bytes.
    ///
    /// # Errors
    /// [`NameError`] for handles, unknown algorithms and wrong lengths.
    pub fn parse(bytes: &[u8]) -> Result<Self, NameError> {
        let mut reader = Reader::new("Name", bytes);
        let algorithm = read_hash(&mut reader).map_err(|_| NameError)?;
        if reader.left() != algorithm.size() {
            return Err(NameError);
        }
        Ok(Self(bytes.to_vec()))
    }

    /// Algorithm id and digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The digest alone.
    #[must_use]
    pub fn digest(&self) -> &[u8] {
        self.0.get(2..).unwrap_or_default()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(&lower_hex(text).ok_or(NameError)?)
    }
}

/// `TPMT_SYM_DEF_OBJECT` (Part 2, section 11.1.7).
fn read_symmetric(reader: &mut Reader<'_>) -> Result<Option<Symmetric>, TpmError> {
    match reader.u16()? {
        ALG_NULL => Ok(None),
        ALG_AES => Ok(Some(Symmetric {
            bits: reader.u16()?,
            mode: reader.u16()?,
        })),
        id => Err(TpmError::Unsupported { what: "cipher", id }),
    }
}

/// `TPMT_RSA_SCHEME` or `TPMT_ECC_SCHEME` (Part 2, sections 11.2.4.2 and 11.2.5.6).
fn read_scheme(reader: &mut Reader<'_>) -> Result<Option<Scheme>, TpmError> {
    Ok(Some(match reader.u16()? {
        ALG_NULL => return Ok(None),
        ALG_RSASSA => Scheme::Rsassa(read_hash(reader)?),
        ALG_RSAPSS => Scheme::Rsapss(read_hash(reader)?),
        ALG_RSAES => Scheme::Rsaes,
        ALG_OAEP => Scheme::Oaep(read_hash(reader)?),
        ALG_ECDSA => Scheme::Ecdsa(read_hash(reader)?),
        ALG_ECDH => Scheme::Ecdh(read_hash(reader)?),
        id => return Err(TpmError::Unsupported { what: "scheme", id }),
    }))
}

/// `TPMS_RSA_PARMS` (Part 2, section 12.2.3.5) and the modulus.
fn read_rsa(reader: &mut Reader<'_>) -> Result<Parameters, TpmError> {
    let symmetric = read_symmetric(reader)?;
    let scheme = read_scheme(reader)?;
    let bits = reader.u16()?;
    let exponent = match reader.u32()? {
        0 => DEFAULT_EXPONENT,
        given => given,
    };
    let modulus = reader.sized_u16()?.to_vec();
    if modulus.len() > MAX_MODULUS || modulus.len() != usize::from(bits).div_ceil(8) {
        return Err(TpmError::Length {
            what: "RSA modulus",
            found: modulus.len(),
        });
    }
    Ok(Parameters::Rsa {
        symmetric,
        scheme,
        bits,
        exponent,
        modulus,
    })
}

/// `TPMS_ECC_PARMS` (Part 2, section 12.2.3.6) and the point.
fn read_ecc(reader: &mut Reader<'_>) -> Result<Parameters, TpmError> {
    let symmetric = read_symmetric(reader)?;
    let scheme = read_scheme(reader)?;
    match reader.u16()? {
        ECC_NIST_P256 => {}
        id => return Err(TpmError::Unsupported { what: "curve", id }),
    }
    match reader.u16()? {
        ALG_NULL => {}
        id => {
            return Err(TpmError::Unsupported {
                what: "KDF of a curve key",
                id,
            });
        }
    }
    let x = padded("X coordinate", reader.sized_u16()?)?;
    let y = padded("Y coordinate", reader.sized_u16()?)?;
    Ok(Parameters::P256 {
        symmetric,
        scheme,
        point: EccPoint { x, y },
    })
}

/// Pads a big-endian number of P-256 to 32 bytes: some TPMs leave leading zeros out.
pub(super) fn padded(what: &'static str, bytes: &[u8]) -> Result<[u8; 32], TpmError> {
    let missing = 32_usize.checked_sub(bytes.len()).ok_or(TpmError::Length {
        what,
        found: bytes.len(),
    })?;
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().skip(missing).zip(bytes) {
        *to = *from;
    }
    Ok(out)
}
