//! The evidence of one host at one moment, as the agent sends it. Nothing in it is believed before
//! [`Bundle::verify`](crate::quote).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Algorithm;
use crate::uuid::Uuid;
use crate::wire::{B64, Hex};

/// The version of the format that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Longest bundle, in bytes of JSON.
pub const MAX_BUNDLE: usize = 24 * 1024 * 1024;
/// Longest runtime log in one bundle, in bytes.
pub const MAX_LOG: usize = 16 * 1024 * 1024;
/// Longest firmware log, in bytes.
pub const MAX_BOOT_LOG: usize = 1024 * 1024;
/// Longest IMA log, in bytes.
pub const MAX_IMA_LOG: usize = 4 * 1024 * 1024;
/// Longest `TPMS_ATTEST` or `TPMT_SIGNATURE`, in bytes.
pub const MAX_TPM_PART: usize = 4096;

/// Values of PCRs: bank, index, value.
pub type Pcrs = BTreeMap<Algorithm, BTreeMap<u8, Hex>>;

/// Why a text is not a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Longer than [`MAX_BUNDLE`].
    #[error("the bundle has {found} bytes, at most {MAX_BUNDLE} are read")]
    TooLarge {
        /// Its length in bytes.
        found: usize,
    },
    /// Not the JSON of a bundle.
    #[error("the bundle is not JSON of the expected form")]
    Json(#[source] serde_json::Error),
    /// Another version of the format.
    #[error("the bundle has version {0}, this program reads version {VERSION}: update the older of the two")]
    Version(u32),
    /// The boot id is not a UUID.
    #[error("the bundle's boot_id is not a UUID")]
    BootId,
    /// A part is longer than its limit.
    #[error("the bundle's {part} has {found} bytes, at most {limit} are allowed")]
    Part {
        /// Name of the part.
        part: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A PCR index beyond 23.
    #[error("the bundle names PCR {index}; PCRs go from 0 to 23")]
    PcrIndex {
        /// The index.
        index: u8,
    },
    /// A PCR value of the wrong length.
    #[error("the bundle's value of PCR {index} in bank {bank} has {found} bytes, this bank has {wanted}")]
    PcrValue {
        /// The bank.
        bank: Algorithm,
        /// The PCR.
        index: u8,
        /// Bytes of the value.
        found: usize,
        /// Bytes of the bank's digests.
        wanted: usize,
    },
}

/// Evidence of one host: a quote, the PCR values that it covers, and the logs that explain them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// [`VERSION`].
    pub version: u32,
    /// The kernel's boot id; must be that of the runtime log.
    pub boot_id: String,
    /// The signed statement.
    pub quote: QuotePart,
    /// The PCR values that the quote's digest covers.
    pub pcrs: Pcrs,
    /// The runtime log, from some record on.
    pub log: LogPart,
    /// The firmware's log, raw, when asked for and where the host has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_log: Option<B64>,
    /// The kernel's IMA log, raw, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ima_log: Option<B64>,
}

/// A quote as the TPM gave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotePart {
    /// `TPMS_ATTEST`, the very bytes that were signed.
    pub attest: B64,
    /// `TPMT_SIGNATURE`.
    pub signature: B64,
}

/// A part of the runtime log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogPart {
    /// Number of the first record in `data`.
    pub from: u64,
    /// Records in the whole log at the moment of the quote, those before `from` included.
    pub records: u64,
    /// Records `from` to `records`, concatenated.
    pub data: B64,
}

impl Bundle {
    /// Reads a bundle and checks its limits.
    ///
    /// # Errors
    /// A [`BundleError`] that names the part.
    pub fn from_json(json: &[u8]) -> Result<Self, BundleError> {
        if json.len() > MAX_BUNDLE {
            return Err(BundleError::TooLarge { found: json.len() });
        }
        let bundle: Self = serde_json::from_slice(json).map_err(BundleError::Json)?;
        bundle.check()?;
        Ok(bundle)
    }

    /// The bundle as JSON.
    ///
    /// # Errors
    /// [`BundleError::Json`]: memory ran out; the structure itself always has a JSON form.
    pub fn to_json(&self) -> Result<Vec<u8>, BundleError> {
        serde_json::to_vec(self).map_err(BundleError::Json)
    }

    /// Checks version, boot id, sizes and PCR values. [`Bundle::from_json`] and verification do it; a bundle that
    /// arrived inside another message is checked by the latter.
    ///
    /// # Errors
    /// A [`BundleError`] that names the part.
    pub fn check(&self) -> Result<(), BundleError> {
        if self.version != VERSION {
            return Err(BundleError::Version(self.version));
        }
        self.boot_id.parse::<Uuid>().map_err(|_| BundleError::BootId)?;
        let empty = B64::default();
        let parts = [
            ("quote.attest", &self.quote.attest, MAX_TPM_PART),
            ("quote.signature", &self.quote.signature, MAX_TPM_PART),
            ("log.data", &self.log.data, MAX_LOG),
            ("boot_log", self.boot_log.as_ref().unwrap_or(&empty), MAX_BOOT_LOG),
            ("ima_log", self.ima_log.as_ref().unwrap_or(&empty), MAX_IMA_LOG),
        ];
        for (part, bytes, limit) in parts {
            let found = bytes.0.len();
            if found > limit {
                return Err(BundleError::Part { part, found, limit });
            }
        }
        for (bank, values) in &self.pcrs {
            for (index, value) in values {
                check_pcr(*bank, *index, value)?;
            }
        }
        Ok(())
    }
}

fn check_pcr(bank: Algorithm, index: u8, value: &Hex) -> Result<(), BundleError> {
    if index > 23 {
        return Err(BundleError::PcrIndex { index });
    }
    let (found, wanted) = (value.0.len(), bank.size());
    if found != wanted {
        return Err(BundleError::PcrValue {
            bank,
            index,
            found,
            wanted,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
