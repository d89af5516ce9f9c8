//! The connection: one command at a time, busy answers retried, and typed answers turned back into the bytes they came as.

use std::str::FromStr as _;
use std::time::{Duration, Instant};

use assay_evidence::digest::Algorithm;
use assay_evidence::quote::QUOTED_PCRS;
use tss_esapi::Context;
use tss_esapi::constants::response_code::Tss2ResponseCodeKind;
use tss_esapi::constants::{CapabilityType, PropertyTag};
use tss_esapi::handles::{KeyHandle, ObjectHandle, PcrHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Attest, AttestInfo, CapabilityData, Data, Digest, DigestValues, PcrSelectionList, PcrSlot, Signature,
    SignatureScheme,
};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::traits::Marshall as _;

use super::{BankDigests, QuotedValues, TpmError, pcr_digest};

/// First and longest pause before a busy TPM is asked again.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How often a quote is repeated when PCRs move under it.
pub(super) const PCR_ATTEMPTS: u32 = 5;

/// TPM2_PCR_Read returns at most eight digests (TPML_DIGEST).
const PCRS_A_READ: usize = 8;

const QUOTE: &str = "TPM2_Quote";

/// An attestation and what it attests.
pub(super) struct Quoted {
    pub attest: Vec<u8>,
    pub signature: Vec<u8>,
    pub pcrs: QuotedValues,
}

/// The TPM behind one TCTI.
pub(super) struct Device {
    /// Nothing only while [`Device::reconnect`] is at work, or after it failed.
    context: Option<Context>,
    tcti: String,
    patience: Duration,
    banks: Vec<HashingAlgorithm>,
    /// The quoted PCRs in as many parts as it takes reads, each with its number of PCRs; and all of them.
    parts: Vec<(PcrSelectionList, usize)>,
    all: PcrSelectionList,
}

impl Device {
    /// Connects and asks which PCR banks are active.
    pub(super) fn open(tcti: &str, patience: Duration) -> Result<Self, TpmError> {
        let context = connect(tcti)?;
        let parts = QUOTED_PCRS.chunks(PCRS_A_READ);
        let parts = parts.map(|part| Ok((sha256_selection(part)?, part.len())));
        let parts = parts.collect::<Result<_, TpmError>>()?;
        let mut device = Self {
            context: Some(context),
            tcti: tcti.to_owned(),
            patience,
            banks: Vec::new(),
            parts,
            all: sha256_selection(&QUOTED_PCRS)?,
        };
        device.banks = device.active_banks()?;
        if !device.banks.contains(&HashingAlgorithm::Sha256) {
            return Err(TpmError::NoSha256Bank);
        }
        Ok(device)
    }

    /// Connects anew. After a driver's error tpm2-tss takes no more commands on a connection.
    ///
    /// Keys that were named through the old connection are unknown to the new one.
    pub(super) fn reconnect(&mut self) -> Result<(), TpmError> {
        // First the old one goes: some TPM devices take one connection at a time.
        drop(self.context.take());
        self.context = Some(connect(&self.tcti)?);
        Ok(())
    }

    /// Runs one command, again while the TPM says that it is busy.
    pub(super) fn run<T>(
        &mut self,
        operation: &'static str,
        mut command: impl FnMut(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, TpmError> {
        let started = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let context = self.context.as_mut().ok_or(TpmError::Stopped)?;
            match command(context) {
                Ok(answer) => return Ok(answer),
                Err(source) if !is_busy(source) => return Err(TpmError::Refused { operation, source }),
                Err(source) if started.elapsed() + pause > self.patience => {
                    return Err(TpmError::Busy {
                        operation,
                        after_s: started.elapsed().as_secs(),
                        source,
                    });
                }
                Err(_) => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// As [`Device::run`], authorised with the empty password: every key and hierarchy here has it.
    pub(super) fn run_authorised<T>(
        &mut self,
        operation: &'static str,
        mut command: impl FnMut(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, TpmError> {
        let password = (Some(AuthSession::Password), None, None);
        self.run(operation, |context| {
            context.execute_with_sessions(password, &mut command)
        })
    }

    /// The active banks that the log has digests for.
    pub(super) fn log_banks(&self) -> Vec<Algorithm> {
        self.banks.iter().filter_map(|bank| log_algorithm(*bank)).collect()
    }

    /// Extends `pcr` in every active bank with the log's digest for it.
    ///
    /// A bank that the log has no digest for gets the SHA-256 digest, cut or zero-padded to its size (as IMA does), so that no
    /// active bank can be extended freely by somebody else and then shown as if it were this log's.
    pub(super) fn extend(&mut self, pcr: u8, digests: &BankDigests) -> Result<(), TpmError> {
        const OPERATION: &str = "TPM2_PCR_Extend";
        let nonsense = |what| TpmError::Nonsense {
            operation: OPERATION,
            what,
        };
        let sha256 = digest_of(digests, Algorithm::Sha256).ok_or_else(|| nonsense("no SHA-256 digest to extend"))?;
        let mut values = DigestValues::new();
        for bank in &self.banks {
            let value = match log_algorithm(*bank).and_then(|algorithm| digest_of(digests, algorithm)) {
                Some(digest) => digest.to_vec(),
                None => {
                    let mut padded = sha256.to_vec();
                    padded.resize(bank_size(*bank), 0);
                    padded
                }
            };
            values.set(
                *bank,
                Digest::try_from(value).map_err(|_| nonsense("a digest is too long"))?,
            );
        }
        let handle = pcr_handle(pcr)?;
        self.run_authorised(OPERATION, |context| context.pcr_extend(handle, values.clone()))
    }

    /// One PCR in every active bank that the log has digests for.
    pub(super) fn read_pcr(&mut self, pcr: u8) -> Result<BankDigests, TpmError> {
        const OPERATION: &str = "TPM2_PCR_Read";
        let slot = slot(pcr)?;
        let mut values = Vec::new();
        for bank in self.banks.clone() {
            let Some(algorithm) = log_algorithm(bank) else { continue };
            let selection = selection(bank, &[slot])?;
            let (_, _, digests) = self.run(OPERATION, |context| context.pcr_read(selection.clone()))?;
            let value = digests.value().first().map(|digest| digest.value().to_vec());
            let value = value.filter(|value| value.len() == bank_size(bank));
            values.push((
                algorithm,
                value.ok_or(TpmError::Nonsense {
                    operation: OPERATION,
                    what: "a digest is missing or has the wrong size",
                })?,
            ));
        }
        Ok(values)
    }

    /// The values of [`QUOTED_PCRS`].
    pub(super) fn read_quoted_pcrs(&mut self) -> Result<QuotedValues, TpmError> {
        const OPERATION: &str = "TPM2_PCR_Read";
        let nonsense = |what| TpmError::Nonsense {
            operation: OPERATION,
            what,
        };
        let mut values = Vec::with_capacity(QUOTED_PCRS.len());
        for (selection, wanted) in self.parts.clone() {
            let (_, _, digests) = self.run(OPERATION, |context| context.pcr_read(selection.clone()))?;
            if digests.value().len() != wanted {
                return Err(nonsense("not all PCRs asked for came back"));
            }
            for digest in digests.value() {
                values.push(
                    <[u8; 32]>::try_from(digest.value()).map_err(|_| nonsense("a SHA-256 PCR is not 32 bytes long"))?,
                );
            }
        }
        values
            .try_into()
            .map_err(|_| nonsense("not as many PCRs as were asked for"))
    }

    /// [`QUOTED_PCRS`], as TPM2_Quote and TPM2_PolicyPCR want them.
    pub(super) fn quoted_selection(&self) -> PcrSelectionList {
        self.all.clone()
    }

    /// Quotes [`QUOTED_PCRS`] with `key`; the values belong to the quote.
    pub(super) fn quote(&mut self, key: KeyHandle, extra_data: [u8; 32]) -> Result<Quoted, TpmError> {
        for _ in 0..PCR_ATTEMPTS {
            let pcrs = self.read_quoted_pcrs()?;
            if let Some(quoted) = self.quote_of(&pcrs, key, extra_data)? {
                return Ok(quoted);
            }
        }
        Err(TpmError::PcrsMoving {
            operation: QUOTE,
            attempts: PCR_ATTEMPTS,
        })
    }

    /// The same where the values were read before; nothing when they are others by now.
    pub(super) fn quote_of(
        &mut self,
        pcrs: &QuotedValues,
        key: KeyHandle,
        extra_data: [u8; 32],
    ) -> Result<Option<Quoted>, TpmError> {
        let data = qualifying(extra_data, QUOTE)?;
        let selection = self.all.clone();
        let (attest, signature) = self.run_authorised(QUOTE, |context| {
            context.quote(key, data.clone(), SignatureScheme::Null, selection.clone())
        })?;
        let AttestInfo::Quote { info } = attest.attested() else {
            return Err(TpmError::Nonsense {
                operation: QUOTE,
                what: "it is no quote",
            });
        };
        if info.pcr_digest().value() != pcr_digest(pcrs) {
            return Ok(None);
        }
        let (attest, signature) = marshal(QUOTE, &attest, &signature)?;
        Ok(Some(Quoted {
            attest,
            signature,
            pcrs: *pcrs,
        }))
    }

    /// Certifies `object` with `key`: TPMS_ATTEST and TPMT_SIGNATURE.
    pub(super) fn certify(
        &mut self,
        object: KeyHandle,
        key: KeyHandle,
        extra_data: [u8; 32],
    ) -> Result<(Vec<u8>, Vec<u8>), TpmError> {
        const OPERATION: &str = "TPM2_Certify";
        let data = qualifying(extra_data, OPERATION)?;
        let passwords = (Some(AuthSession::Password), Some(AuthSession::Password), None);
        let (attest, signature) = self.run(OPERATION, |context| {
            context.execute_with_sessions(passwords, |context| {
                context.certify(ObjectHandle::from(object), key, data.clone(), SignatureScheme::Null)
            })
        })?;
        marshal(OPERATION, &attest, &signature)
    }

    /// Whether there is something at `handle` (a persistent object or an NV index).
    pub(super) fn has_handle(&mut self, handle: u32) -> Result<bool, TpmError> {
        const OPERATION: &str = "TPM2_GetCapability(handles)";
        let (capability, _) = self.run(OPERATION, |context| {
            context.get_capability(CapabilityType::Handles, handle, 1)
        })?;
        let CapabilityData::Handles(handles) = capability else {
            return Err(TpmError::Nonsense {
                operation: OPERATION,
                what: "another capability came back",
            });
        };
        Ok(handles
            .into_inner()
            .first()
            .is_some_and(|found| u32::from(*found) == handle))
    }

    /// A fixed property, 0 where the TPM has none.
    pub(super) fn property(&mut self, tag: PropertyTag) -> Result<u32, TpmError> {
        let value = self.run("TPM2_GetCapability(properties)", |context| {
            context.get_tpm_property(tag)
        })?;
        Ok(value.unwrap_or(0))
    }

    /// Sends a command that the TPM answers from memory.
    pub(super) fn ping(&mut self) -> Result<(), TpmError> {
        self.run("TPM2_GetCapability", |context| {
            context.get_capability(CapabilityType::TpmProperties, PropertyTag::Manufacturer.into(), 1)
        })?;
        Ok(())
    }

    /// Frees a transient object or session. Failure is logged: the TPM is the poorer for a slot, nothing else is lost.
    pub(super) fn flush(&mut self, object: ObjectHandle) {
        if let Err(error) = self.run("TPM2_FlushContext", |context| context.flush_context(object)) {
            tracing::warn!(%error, "an object stays in the TPM");
        }
    }

    fn active_banks(&mut self) -> Result<Vec<HashingAlgorithm>, TpmError> {
        const OPERATION: &str = "TPM2_GetCapability(PCR banks)";
        let (capability, _) = self.run(OPERATION, |context| {
            context.get_capability(CapabilityType::AssignedPcr, 0, 1)
        })?;
        let CapabilityData::AssignedPcr(assigned) = capability else {
            return Err(TpmError::Nonsense {
                operation: OPERATION,
                what: "another capability came back",
            });
        };
        let active = assigned.get_selections().iter().filter(|bank| !bank.is_empty());
        Ok(active
            .map(tss_esapi::structures::PcrSelection::hashing_algorithm)
            .collect())
    }
}

fn connect(tcti: &str) -> Result<Context, TpmError> {
    let name = TctiNameConf::from_str(tcti).map_err(|source| TpmError::BadTcti {
        tcti: tcti.to_owned(),
        source,
    })?;
    Context::new(name).map_err(|source| TpmError::Absent {
        tcti: tcti.to_owned(),
        source,
    })
}

fn marshal(operation: &'static str, attest: &Attest, signature: &Signature) -> Result<(Vec<u8>, Vec<u8>), TpmError> {
    let refused = |source| TpmError::Refused { operation, source };
    Ok((
        attest.marshall().map_err(refused)?,
        signature.marshall().map_err(refused)?,
    ))
}

fn qualifying(extra_data: [u8; 32], operation: &'static str) -> Result<Data, TpmError> {
    Data::try_from(extra_data.to_vec()).map_err(|source| TpmError::Refused { operation, source })
}

fn is_busy(error: tss_esapi::Error) -> bool {
    let tss_esapi::Error::Tss2Error(code) = error else {
        return false;
    };
    matches!(
        code.kind(),
        Some(Tss2ResponseCodeKind::Retry | Tss2ResponseCodeKind::Yielded | Tss2ResponseCodeKind::Testing)
    )
}

fn digest_of(digests: &BankDigests, wanted: Algorithm) -> Option<&[u8]> {
    digests
        .iter()
        .find(|(algorithm, _)| *algorithm == wanted)
        .map(|(_, digest)| digest.as_slice())
}

fn log_algorithm(bank: HashingAlgorithm) -> Option<Algorithm> {
    match bank {
        HashingAlgorithm::Sha1 => Some(Algorithm::Sha1),
        HashingAlgorithm::Sha256 => Some(Algorithm::Sha256),
        HashingAlgorithm::Sha384 => Some(Algorithm::Sha384),
        _ => None,
    }
}

fn bank_size(bank: HashingAlgorithm) -> usize {
    match bank {
        HashingAlgorithm::Sha1 => 20,
        HashingAlgorithm::Sha256 | HashingAlgorithm::Sm3_256 | HashingAlgorithm::Sha3_256 => 32,
        HashingAlgorithm::Sha384 | HashingAlgorithm::Sha3_384 => 48,
        HashingAlgorithm::Sha512 | HashingAlgorithm::Sha3_512 => 64,
        HashingAlgorithm::Null => 0,
    }
}

fn sha256_selection(pcrs: &[u8]) -> Result<PcrSelectionList, TpmError> {
    let slots = pcrs.iter().map(|pcr| slot(*pcr)).collect::<Result<Vec<_>, _>>()?;
    selection(HashingAlgorithm::Sha256, &slots)
}

fn selection(bank: HashingAlgorithm, slots: &[PcrSlot]) -> Result<PcrSelectionList, TpmError> {
    let built = PcrSelectionList::builder().with_selection(bank, slots).build();
    built.map_err(|source| TpmError::Refused {
        operation: "PCR selection",
        source,
    })
}

fn slot(pcr: u8) -> Result<PcrSlot, TpmError> {
    let bit = 1u32.checked_shl(u32::from(pcr)).unwrap_or(0);
    PcrSlot::try_from(bit).map_err(|_| TpmError::BadPcr { pcr })
}

/// The PCRs that a runtime log may live in; the reasons are in [`TpmError::BadPcr`].
pub(super) fn pcr_handle(pcr: u8) -> Result<PcrHandle, TpmError> {
    match pcr {
        12 => Ok(PcrHandle::Pcr12),
        13 => Ok(PcrHandle::Pcr13),
        14 => Ok(PcrHandle::Pcr14),
        _ => Err(TpmError::BadPcr { pcr }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_three_pcrs_may_hold_the_log() {
        let allowed: Vec<u8> = (0..=u8::MAX).filter(|pcr| pcr_handle(*pcr).is_ok()).collect();
        assert_eq!(allowed, [12, 13, 14]);
    }

    #[test]
    fn busy_answers_are_told_from_refusals() {
        // TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING; and TPM_RC_FAILURE, TPM_RC_PCR_CHANGED.
        let code = |rc: u32| tss_esapi::Error::Tss2Error(tss_code(rc));
        assert!([0x922, 0x908, 0x90a].into_iter().all(|rc| is_busy(code(rc))));
        assert!(![0x101, 0x128].into_iter().any(|rc| is_busy(code(rc))));
    }

    fn tss_code(rc: u32) -> tss_esapi::constants::response_code::Tss2ResponseCode {
        use tss_esapi::constants::response_code::{FormatZeroResponseCode, Tss2ResponseCode};
        Tss2ResponseCode::FormatZero(FormatZeroResponseCode(rc))
    }
}
