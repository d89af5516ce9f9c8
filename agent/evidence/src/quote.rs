//! Is this evidence an answer to our question, by that TPM, over these PCR values and this log?
//!
//! The order of the checks matters: the signature first, over the bytes as they came; only then are they parsed. Then
//! what they claim to be, what they were asked for, which PCRs they cover (compared both ways), and the values last.

mod unchanged;

pub use self::unchanged::Judged;
use crate::binding::Binding;
use crate::bundle::{Bundle, BundleError, MAX_LOG, Pcrs};
use crate::cel::{self, CelError, Head, Record};
use crate::digest::{Algorithm, Sha256Digest};
use crate::event::Event;
use crate::tpm::{
    self, Attest, AttestationKey, Attested, ClockInfo, PcrDigestError, PcrSelection, Signature, SignatureError,
    TpmError,
};
use crate::wire::B64;

/// The bank that is quoted.
pub const QUOTED_BANK: Algorithm = Algorithm::Sha256;
/// PCRs that every quote covers, and that a release key's policy names: those of a boot, the runtime log's, and the two of a
/// dynamic launch (17 and 18).
pub const QUOTED_PCRS: [u8; 18] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18];
/// Whether every quote covers this PCR.
#[must_use]
pub fn is_quoted(index: u8) -> bool {
    QUOTED_PCRS.contains(&index)
}

/// Longest runtime log of one boot that is judged, in bytes: what is held plus what came.
pub const MAX_WHOLE_LOG: usize = 4 * MAX_LOG;

/// Why evidence is not an answer to the question.
#[derive(Debug, thiserror::Error)]
pub enum QuoteError {
    /// The bundle breaks a limit of its format.
    #[error("the bundle cannot be used")]
    Bundle(#[from] BundleError),
    /// The signature is not in TPM form.
    #[error("the quote's signature cannot be read")]
    SignatureForm(#[source] TpmError),
    /// The enrolled AK did not sign it.
    #[error("the quote is not signed by the host's enrolled attestation key")]
    Signature(#[source] SignatureError),
    /// Signed, but not an attestation.
    #[error("the signed statement cannot be read")]
    Attest(#[source] TpmError),
    /// Signed, but another kind of attestation.
    #[error("the signed statement is a certification, not a quote")]
    NotAQuote,
    /// The log's part does not go on where the verifier's copy ends.
    #[error(
        "the log starts at record {from}; the verifier holds {held} records of this boot: ask with log_from={held}"
    )]
    LogFrom {
        /// First record that came.
        from: u64,
        /// Records held.
        held: u64,
    },
    /// The log has fewer records than the verifier saw in this boot.
    #[error("the log shrank: {found} records, the verifier already saw {held} in this boot")]
    LogShrank {
        /// Records that the verifier holds.
        held: u64,
        /// Records that the bundle claims.
        found: u64,
    },
    /// Records that the verifier holds came again, and differ.
    #[error("the log was rewritten: its first {held} records are not those that the verifier saw in this boot")]
    LogRewritten {
        /// Records that the verifier holds.
        held: u64,
    },
    /// Held and new part together are too long to be judged.
    #[error("the runtime log of this boot has {found} bytes, at most {MAX_WHOLE_LOG} are judged: reboot the host")]
    LogTooLong {
        /// Bytes in all.
        found: usize,
    },
    /// The log's bytes are no records in order.
    #[error("the runtime log cannot be read")]
    Log(#[from] CelError),
    /// Fewer records than the bundle says.
    #[error("the log holds {found} records, the bundle says {claimed}: records are missing")]
    LogShorter {
        /// Records that the bundle claims.
        claimed: u64,
        /// Records that are there.
        found: u64,
    },
    /// More records than the bundle says, so more than the quote covers.
    #[error("the log holds {found} records, the quote covers {claimed}: records were added after the quote")]
    LogLonger {
        /// Records that the bundle claims.
        claimed: u64,
        /// Records that are there.
        found: u64,
    },
    /// The quote answers another question.
    #[error("the quote answers another question: nonce, TLS connection, release key, disk or key id differ; ask anew")]
    Binding,
    /// The quote is over another log.
    #[error("the log is not the one that was quoted: {records} records with head {head} do not lead to its PCRs")]
    LogNotQuoted {
        /// Records in the log that came.
        records: u64,
        /// Its head.
        head: Sha256Digest,
    },
    /// A PCR that every quote must cover is missing from it.
    #[error("the quote does not cover PCR {index} of bank {bank}; the agent must quote {bank}:0-15,17,18")]
    PcrNotQuoted {
        /// The bank.
        bank: Algorithm,
        /// The PCR.
        index: u8,
    },
    /// The quote covers a PCR whose value is not given.
    #[error("PCR {index} of bank {bank} is quoted, but its value is not given")]
    QuotedButNotGiven {
        /// The bank.
        bank: Algorithm,
        /// The PCR.
        index: u8,
    },
    /// A value is given that the quote does not cover.
    #[error("a value of PCR {index} of bank {bank} is given, but it is not quoted")]
    GivenButNotQuoted {
        /// The bank.
        bank: Algorithm,
        /// The PCR.
        index: u8,
    },
    /// The given values are not the quoted ones.
    #[error("the PCR values given are not those that were quoted: their digest is {given}, the quote's is {quoted}")]
    PcrDigest {
        /// Digest of the values given, hex.
        given: String,
        /// Digest in the quote, hex.
        quoted: String,
    },
    /// A counter of the TPM went back.
    #[error("the quote is stale: the TPM's {counter} is {found}, the verifier already saw {held}")]
    StaleQuote {
        /// `reset count`, `restart count` or `clock`.
        counter: &'static str,
        /// The value seen before.
        held: u64,
        /// The value that came.
        found: u64,
    },
    /// Another boot id without a TPM reset.
    #[error(
        "the host says it rebooted (boot id {found}), but its TPM was not reset since boot {held}: \
         a kernel started by kexec is not attested, reboot through the firmware"
    )]
    BootWithoutReset {
        /// Boot id that the verifier holds.
        held: String,
        /// Boot id that came.
        found: String,
    },
    /// The TPM was reset under a running system.
    #[error(
        "the TPM was reset during boot {boot_id} (reset count {held}, now {found}): its PCRs no longer tell what the \
         host runs, reboot it"
    )]
    ResetWithoutReboot {
        /// The boot.
        boot_id: String,
        /// Reset count seen before.
        held: u32,
        /// Reset count that came.
        found: u32,
    },
}

/// What a verifier keeps of a host's boot, so that each poll brings only what is new and nothing can go back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldLog {
    /// Boot id; empty when nothing is held.
    pub boot_id: String,
    /// The TPM's reset count.
    pub reset_count: u32,
    /// The TPM's restart count.
    pub restart_count: u32,
    /// The TPM's clock in milliseconds.
    pub clock: u64,
    /// Records in `bytes`.
    pub records: u64,
    /// The log from its first record on.
    pub bytes: Vec<u8>,
}

impl HeldLog {
    /// Nothing is held: the host was never seen.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            boot_id: String::new(),
            reset_count: 0,
            restart_count: 0,
            clock: 0,
            records: 0,
            bytes: Vec::new(),
        }
    }

    /// True when nothing is held.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.boot_id.is_empty()
    }
}

/// Evidence whose quote is good: signed by the AK, over our question, these PCR values and this log's head. What the log
/// says is still only claimed; see [`VerifiedQuote::replay`](crate::replay).
#[derive(Debug)]
pub struct VerifiedQuote {
    pub(crate) boot_id: String,
    pub(crate) extra_data: [u8; 32],
    pub(crate) head: Head,
    pub(crate) clock: ClockInfo,
    pub(crate) firmware_version: u64,
    pub(crate) pcrs: Pcrs,
    pub(crate) records: Vec<Record>,
    pub(crate) log: Vec<u8>,
    pub(crate) boot_log: Option<B64>,
    pub(crate) ima_log: Option<B64>,
}

impl Bundle {
    /// Checks that `ak` quoted these PCR values and this log for the question of `binding`, and that nothing went back
    /// since `held` was kept.
    ///
    /// # Errors
    /// A [`QuoteError`] naming the first check that failed.
    pub fn verify(
        &self,
        ak: &AttestationKey,
        binding: &Binding<'_>,
        held: &HeldLog,
    ) -> Result<VerifiedQuote, QuoteError> {
        self.verify_taking(ak, binding, held.clone())
    }

    /// As [`Bundle::verify`], without a copy of what is held: a long log is in memory once less.
    ///
    /// # Errors
    /// As there.
    pub fn verify_taking(
        &self,
        ak: &AttestationKey,
        binding: &Binding<'_>,
        mut held: HeldLog,
    ) -> Result<VerifiedQuote, QuoteError> {
        self.check()?;
        let attest = self.signed_attest(ak)?;
        let Attested::Quote { selections, digest } = &attest.attested else {
            return Err(QuoteError::NotAQuote);
        };
        let log = self.whole_log(&mut held)?;
        let (records, head) = read_log(&log, self.log.records)?;
        let extra_data = binding.digest(self.log.records, &head.value());
        if attest.extra_data != extra_data {
            return Err(self.other_question(&records, &head));
        }
        compare_pcr_sets(selections, &self.pcrs)?;
        self.check_pcr_digest(selections, digest)?;
        check_progress(&self.boot_id, &attest.clock, &held)?;
        Ok(VerifiedQuote {
            boot_id: self.boot_id.clone(),
            extra_data,
            head,
            clock: attest.clock,
            firmware_version: attest.firmware_version,
            pcrs: self.pcrs.clone(),
            records,
            log,
            boot_log: self.boot_log.clone(),
            ima_log: self.ima_log.clone(),
        })
    }

    fn signed_attest(&self, ak: &AttestationKey) -> Result<Attest, QuoteError> {
        let signature = Signature::parse(self.quote.signature.as_ref()).map_err(QuoteError::SignatureForm)?;
        ak.verify(self.quote.attest.as_ref(), &signature)
            .map_err(QuoteError::Signature)?;
        Attest::parse(self.quote.attest.as_ref()).map_err(QuoteError::Attest)
    }

    /// The log from record 0 on: what is held, and what came. Takes the bytes that are held.
    fn whole_log(&self, held: &mut HeldLog) -> Result<Vec<u8>, QuoteError> {
        let same_boot = held.boot_id == self.boot_id;
        let held_records = if same_boot { held.records } else { 0 };
        if self.log.records < held_records {
            return Err(QuoteError::LogShrank {
                held: held_records,
                found: self.log.records,
            });
        }
        let data = self.log.data.as_ref();
        if self.log.from == 0 {
            if same_boot && !data.starts_with(&held.bytes) {
                return Err(QuoteError::LogRewritten { held: held_records });
            }
            return Ok(data.to_vec());
        }
        if self.log.from != held_records {
            return Err(QuoteError::LogFrom {
                from: self.log.from,
                held: held_records,
            });
        }
        let found = held.bytes.len().saturating_add(data.len());
        if found > MAX_WHOLE_LOG {
            return Err(QuoteError::LogTooLong { found });
        }
        let mut log = std::mem::take(&mut held.bytes);
        log.extend_from_slice(data);
        Ok(log)
    }

    /// Tells a changed log from a wrong question. PCR values and the log's PCR are not checked yet at this point, so that
    /// the answer only chooses the words of the refusal.
    fn other_question(&self, records: &[Record], head: &Head) -> QuoteError {
        let index = records.first().map(|record| record.pcr);
        let bank = self.pcrs.get(&QUOTED_BANK);
        let value = bank.zip(index).and_then(|(bank, index)| bank.get(&index));
        let reached = claimed_start(records).map(|start| claimed_end(start, records));
        if value.map(AsRef::as_ref) == reached.as_deref() {
            return QuoteError::Binding;
        }
        QuoteError::LogNotQuoted {
            records: head.records(),
            head: head.value(),
        }
    }

    fn check_pcr_digest(&self, selections: &[PcrSelection], quoted: &[u8]) -> Result<(), QuoteError> {
        let given = tpm::pcr_digest(Algorithm::Sha256, selections, &self.pcrs)
            .map_err(|PcrDigestError { bank, index }| QuoteError::QuotedButNotGiven { bank, index })?;
        if given != quoted {
            return Err(QuoteError::PcrDigest {
                given: hex::encode(given),
                quoted: hex::encode(quoted),
            });
        }
        Ok(())
    }
}

impl VerifiedQuote {
    /// What is kept of this quote, with these bytes of its log.
    pub(crate) fn held(&self, bytes: Vec<u8>) -> HeldLog {
        HeldLog {
            boot_id: self.boot_id.clone(),
            reset_count: self.clock.reset_count,
            restart_count: self.clock.restart_count,
            clock: self.clock.clock,
            records: self.head.records(),
            bytes,
        }
    }

    /// The `extraData` of the quote; a release key's certification carries the same.
    #[must_use]
    pub const fn extra_data(&self) -> &[u8; 32] {
        &self.extra_data
    }

    /// Clock and counters of the TPM at the quote.
    #[must_use]
    pub const fn clock_info(&self) -> &ClockInfo {
        &self.clock
    }

    /// The quoted PCR values.
    #[must_use]
    pub const fn pcrs(&self) -> &Pcrs {
        &self.pcrs
    }
}

/// Reads the records, numbered from 0 without a gap and as many as claimed.
fn read_log(log: &[u8], claimed: u64) -> Result<(Vec<Record>, Head), QuoteError> {
    let records = cel::read_all(log)?;
    let mut head = Head::new();
    for record in &records {
        head.push(record)?;
    }
    let found = head.records();
    match found.cmp(&claimed) {
        core::cmp::Ordering::Less => Err(QuoteError::LogShorter { claimed, found }),
        core::cmp::Ordering::Greater => Err(QuoteError::LogLonger { claimed, found }),
        core::cmp::Ordering::Equal => Ok((records, head)),
    }
}

/// The runtime PCR's starting value, as the first record says.
fn claimed_start(records: &[Record]) -> Option<Vec<u8>> {
    let events = records.first()?.events().ok()?;
    let Event::AgentStart(start) = events.first()? else {
        return None;
    };
    start
        .pcr_start
        .iter()
        .find(|(bank, _)| *bank == QUOTED_BANK)
        .map(|(_, value)| value.clone())
}

/// The runtime PCR after all records, by their claimed digests.
fn claimed_end(start: Vec<u8>, records: &[Record]) -> Vec<u8> {
    let digests = records.iter().filter_map(|record| record.digest(QUOTED_BANK));
    digests.fold(start, |pcr, digest| QUOTED_BANK.extend(&pcr, digest))
}

/// Quoted and given PCRs must be the same set, and hold all that every quote covers.
fn compare_pcr_sets(selections: &[PcrSelection], given: &Pcrs) -> Result<(), QuoteError> {
    let quoted = |bank: Algorithm, index: u8| {
        selections
            .iter()
            .any(|part| part.bank == bank && part.pcrs.contains(&index))
    };
    if let Some(index) = QUOTED_PCRS.into_iter().find(|index| !quoted(QUOTED_BANK, *index)) {
        return Err(QuoteError::PcrNotQuoted {
            bank: QUOTED_BANK,
            index,
        });
    }
    for selection in selections {
        let values = given.get(&selection.bank);
        for index in &selection.pcrs {
            if !values.is_some_and(|values| values.contains_key(index)) {
                return Err(QuoteError::QuotedButNotGiven {
                    bank: selection.bank,
                    index: *index,
                });
            }
        }
    }
    for (bank, values) in given {
        if let Some(index) = values.keys().find(|index| !quoted(*bank, **index)) {
            return Err(QuoteError::GivenButNotQuoted {
                bank: *bank,
                index: *index,
            });
        }
    }
    Ok(())
}

/// Counters never go back, and a TPM reset and a reboot come together (TPM 2.0 Part 1, section 36).
fn check_progress(boot_id: &str, clock: &ClockInfo, held: &HeldLog) -> Result<(), QuoteError> {
    if held.is_none() {
        return Ok(());
    }
    let stale = |counter, held, found| QuoteError::StaleQuote { counter, held, found };
    let same_boot = boot_id == held.boot_id;
    if clock.reset_count < held.reset_count {
        return Err(stale(
            "reset count",
            u64::from(held.reset_count),
            u64::from(clock.reset_count),
        ));
    }
    if clock.reset_count > held.reset_count {
        if same_boot {
            let (held, found) = (held.reset_count, clock.reset_count);
            return Err(QuoteError::ResetWithoutReboot {
                boot_id: boot_id.to_owned(),
                held,
                found,
            });
        }
        // After an unorderly shutdown the clock may go back a little: only within one boot does it count.
        return Ok(());
    }
    if !same_boot {
        return Err(QuoteError::BootWithoutReset {
            held: held.boot_id.clone(),
            found: boot_id.to_owned(),
        });
    }
    if clock.restart_count < held.restart_count {
        return Err(stale(
            "restart count",
            u64::from(held.restart_count),
            u64::from(clock.restart_count),
        ));
    }
    if clock.clock < held.clock {
        return Err(stale("clock", held.clock, clock.clock));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
