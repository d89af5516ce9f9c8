//! Signatures as a TPM gives them.

use super::public::padded;
use super::{Scheme, TpmError, read_hash};
use crate::digest::Algorithm;
use crate::reader::Reader;

const ALG_RSASSA: u16 = 0x0014;
const ALG_ECDSA: u16 = 0x0018;

/// `TPMT_SIGNATURE` (Part 2, section 11.3.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    /// `TPMS_SIGNATURE_RSASSA`.
    Rsassa {
        /// Hash of the message.
        hash: Algorithm,
        /// The signature, as long as the modulus.
        signature: Vec<u8>,
    },
    /// `TPMS_SIGNATURE_ECDSA` on P-256.
    Ecdsa {
        /// Hash of the message.
        hash: Algorithm,
        /// r, padded to 32 bytes.
        r: [u8; 32],
        /// s, padded to 32 bytes.
        s: [u8; 32],
    },
}

impl Signature {
    /// What it was made with.
    #[must_use]
    pub const fn scheme(&self) -> Scheme {
        match self {
            Self::Rsassa { hash, .. } => Scheme::Rsassa(*hash),
            Self::Ecdsa { hash, .. } => Scheme::Ecdsa(*hash),
        }
    }

    /// Reads a `TPMT_SIGNATURE`.
    ///
    /// # Errors
    /// [`TpmError::Unsupported`] for other schemes, any other [`TpmError`] when the bytes do not add up.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new("TPMT_SIGNATURE", bytes);
        let scheme = reader.u16()?;
        let signature = match scheme {
            ALG_RSASSA => Self::Rsassa {
                hash: read_hash(&mut reader)?,
                signature: reader.sized_u16()?.to_vec(),
            },
            ALG_ECDSA => Self::Ecdsa {
                hash: read_hash(&mut reader)?,
                r: padded("r of a signature", reader.sized_u16()?)?,
                s: padded("s of a signature", reader.sized_u16()?)?,
            },
            id => {
                return Err(TpmError::Unsupported {
                    what: "signature scheme",
                    id,
                });
            }
        };
        reader.finish()?;
        Ok(signature)
    }
}
