//! Digests over PCR values: what a quote signs, and what a PCR policy demands.

use std::collections::BTreeMap;

use super::PcrSelection;
use crate::bundle::Pcrs;
use crate::digest::{Algorithm, Sha256Digest};
use crate::wire::Hex;

/// `TPM_CC_PolicyPCR` (Part 2, section 6.5.2).
const CC_POLICY_PCR: u32 = 0x0000_017F;
/// `sizeofSelect` of the PC Client profile: 24 PCRs.
const SELECT_WIDTH: usize = 3;

/// A selected PCR without a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("PCR {index} of bank {bank} is selected, and its value is not given")]
pub struct PcrDigestError {
    /// The bank.
    pub bank: Algorithm,
    /// The PCR.
    pub index: u8,
}

/// Digest over the selected values, in the selection's order (TPM 2.0 Part 1, section 17.5). `hash` is that of the
/// signing scheme.
///
/// # Errors
/// [`PcrDigestError`] when a selected value is missing.
pub fn pcr_digest(hash: Algorithm, selections: &[PcrSelection], values: &Pcrs) -> Result<Vec<u8>, PcrDigestError> {
    let mut bytes = Vec::new();
    for selection in selections {
        let bank = values.get(&selection.bank);
        for index in &selection.pcrs {
            let missing = PcrDigestError {
                bank: selection.bank,
                index: *index,
            };
            let value = bank.and_then(|bank| bank.get(index)).ok_or(missing)?;
            bytes.extend_from_slice(value.as_ref());
        }
    }
    Ok(hash.hash(&bytes))
}

/// `authPolicy` of a key that is bound to these values of the SHA-256 bank by one `TPM2_PolicyPCR`
/// (TPM 2.0 Part 3, section 23.7). Indexes of 24 and above are left out: PC Client TPMs have none.
#[must_use]
pub fn policy_pcr_digest(values: &BTreeMap<u8, Hex>) -> Sha256Digest {
    let mut select = [0_u8; SELECT_WIDTH];
    let mut bytes = Vec::new();
    for (index, value) in values {
        if let Some(byte) = select.get_mut(usize::from(index / 8)) {
            *byte |= 1 << (index % 8);
            bytes.extend_from_slice(value.as_ref());
        }
    }
    let mut selection = 1_u32.to_be_bytes().to_vec();
    selection.extend_from_slice(&Algorithm::Sha256.tpm_id().to_be_bytes());
    selection.push(3);
    selection.extend_from_slice(&select);
    let values = Sha256Digest::of(&bytes);
    Sha256Digest::of_parts(&[
        Sha256Digest::ZERO.as_ref(),
        &CC_POLICY_PCR.to_be_bytes(),
        &selection,
        values.as_ref(),
    ])
}
