//! What a TPM says about itself and signs.

use super::{TpmError, read_hash};
use crate::digest::Algorithm;
use crate::reader::Reader;

/// `TPM_GENERATED_VALUE` (Part 2, section 6.2): a restricted key signs nothing else that starts like this.
const GENERATED: u32 = 0xFF54_4347;
const ST_ATTEST_CERTIFY: u16 = 0x8017;
const ST_ATTEST_QUOTE: u16 = 0x8018;
/// `IMPLEMENTATION` limit of banks; real TPMs have up to five.
const MAX_SELECTIONS: u32 = 16;

/// `TPMS_ATTEST` (Part 2, section 10.12.12): a quote or a certification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attest {
    /// Qualified Name of the signing key.
    pub qualified_signer: Vec<u8>,
    /// What the caller asked to have signed along.
    pub extra_data: Vec<u8>,
    /// Clock and counters.
    pub clock: ClockInfo,
    /// Vendor's firmware version.
    pub firmware_version: u64,
    /// The statement.
    pub attested: Attested,
}

/// `TPMS_CLOCK_INFO` (Part 2, section 10.11.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockInfo {
    /// Milliseconds; never goes back between resets.
    pub clock: u64,
    /// Counts TPM resets (reboots).
    pub reset_count: u32,
    /// Counts restarts and resumes since the reset.
    pub restart_count: u32,
    /// Whether no higher clock was ever reported.
    pub safe: bool,
}

/// What is attested (Part 2, section 10.12.11).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attested {
    /// `TPMS_QUOTE_INFO`.
    Quote {
        /// Which PCRs, in the order of the digest.
        selections: Vec<PcrSelection>,
        /// Digest over their values.
        digest: Vec<u8>,
    },
    /// `TPMS_CERTIFY_INFO`.
    Certify {
        /// Name of the certified key.
        name: Vec<u8>,
        /// Its qualified Name.
        qualified_name: Vec<u8>,
    },
}

/// `TPMS_PCR_SELECTION` (Part 2, section 10.6.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcrSelection {
    /// The bank.
    pub bank: Algorithm,
    /// Selected PCRs, ascending.
    pub pcrs: Vec<u8>,
}

impl Attest {
    /// Reads a `TPMS_ATTEST`. Verify its signature first, over the same bytes.
    ///
    /// # Errors
    /// [`TpmError::Magic`] when no TPM made it, [`TpmError::Unsupported`] for statements other than quotes and
    /// certifications, any other [`TpmError`] when the bytes do not add up.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new("TPMS_ATTEST", bytes);
        let magic = reader.u32()?;
        if magic != GENERATED {
            return Err(TpmError::Magic(magic));
        }
        let kind = reader.u16()?;
        if kind != ST_ATTEST_QUOTE && kind != ST_ATTEST_CERTIFY {
            return Err(TpmError::Unsupported {
                what: "attestation type",
                id: kind,
            });
        }
        let qualified_signer = reader.sized_u16()?.to_vec();
        let extra_data = reader.sized_u16()?.to_vec();
        let clock = read_clock(&mut reader)?;
        let firmware_version = reader.u64()?;
        let attested = if kind == ST_ATTEST_QUOTE {
            Attested::Quote {
                selections: read_selections(&mut reader)?,
                digest: reader.sized_u16()?.to_vec(),
            }
        } else {
            Attested::Certify {
                name: reader.sized_u16()?.to_vec(),
                qualified_name: reader.sized_u16()?.to_vec(),
            }
        };
        reader.finish()?;
        Ok(Self {
            qualified_signer,
            extra_data,
            clock,
            firmware_version,
            attested,
        })
    }
}

fn read_clock(reader: &mut Reader<'_>) -> Result<ClockInfo, TpmError> {
    Ok(ClockInfo {
        clock: reader.u64()?,
        reset_count: reader.u32()?,
        restart_count: reader.u32()?,
        safe: match reader.u8()? {
            0 => false,
            1 => true,
            other => return Err(TpmError::Flag(other)),
        },
    })
}

/// `TPML_PCR_SELECTION` (Part 2, section 10.9.7).
fn read_selections(reader: &mut Reader<'_>) -> Result<Vec<PcrSelection>, TpmError> {
    let count = reader.u32()?;
    if count > MAX_SELECTIONS {
        return Err(TpmError::Selections(count));
    }
    let mut selections = Vec::new();
    for _ in 0..count {
        let bank = read_hash(reader)?;
        let width = usize::from(reader.u8()?);
        if width > 4 {
            return Err(TpmError::Length {
                what: "PCR selection",
                found: width,
            });
        }
        let bitmap = reader.take(width)?;
        let pcrs = (0_u8..).zip(
            bitmap
                .iter()
                .flat_map(|byte| (0..8).map(move |bit| byte & (1 << bit) != 0)),
        );
        selections.push(PcrSelection {
            bank,
            pcrs: pcrs.filter_map(|(pcr, set)| set.then_some(pcr)).collect(),
        });
    }
    Ok(selections)
}
