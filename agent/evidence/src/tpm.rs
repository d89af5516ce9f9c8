//! TPM 2.0 structures, read from the very bytes that the TPM made (TPM 2.0 Library, Part 2: Structures).
//!
//! Only what the evidence needs, in plain Rust: a verifier has no TPM and no TPM stack. All numbers are big-endian.

mod attest;
mod key;
mod pcr;
mod public;
mod signature;

pub use attest::{Attest, Attested, ClockInfo, PcrSelection};
pub use key::{AkError, AttestationKey, SignatureError, check_ak_attributes};
pub use pcr::{PcrDigestError, pcr_digest, policy_pcr_digest};
pub use public::{Attributes, EccPoint, Name, NameError, Parameters, Public, Scheme, Symmetric};
pub use signature::Signature;

use crate::digest::{Algorithm, DigestError};
use crate::reader::{ReadError, Reader};

/// Why bytes are not the TPM structure that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TpmError {
    /// Cut short, or followed by bytes that belong to nothing.
    #[error("a TPM structure does not add up")]
    Bytes(#[from] ReadError),
    /// A hash algorithm that is not known.
    #[error("a TPM structure names an unknown hash")]
    Hash(#[from] DigestError),
    /// A key type, scheme, cipher, curve or KDF that is not known.
    #[error("{what} 0x{id:04x} is not supported")]
    Unsupported {
        /// What the number stands for.
        what: &'static str,
        /// The number.
        id: u16,
    },
    /// A field's length is not one that the structure can have.
    #[error("{what} has {found} bytes, which cannot be")]
    Length {
        /// Name of the field.
        what: &'static str,
        /// Its length in bytes.
        found: usize,
    },
    /// An attestation without `TPM_GENERATED_VALUE`: not made by a TPM about itself (Part 2, section 6.2).
    #[error("the signed structure starts with 0x{0:08x}, not with the TPM's own mark: no TPM made it")]
    Magic(u32),
    /// A flag that is neither yes nor no.
    #[error("the clock's safe flag is {0}, it can only be 0 or 1")]
    Flag(u8),
    /// More PCR selections than any TPM has banks.
    #[error("{0} PCR selections, at most 16 are read")]
    Selections(u32),
}

/// `TPM_ALG_NULL`.
const ALG_NULL: u16 = 0x0010;

fn read_hash(reader: &mut Reader<'_>) -> Result<Algorithm, TpmError> {
    Ok(Algorithm::from_tpm_id(reader.u16()?)?)
}

#[cfg(test)]
mod tests;
