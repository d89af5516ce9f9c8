//! The runtime log: TCG Canonical Event Log records in TLV form.
//!
//! A record is four TLVs: recnum (0), pcr (1), digests (3), content (TCG Canonical Event Log Format, section 5). Its digests cover the exact bytes of the content
//! TLV, type and length included, so that no one can read the same digest as another kind of content. One record is one
//! batch of events and one `TPM2_PCR_Extend`.

mod head;
mod json;

use core::fmt;

pub use head::Head;
pub use json::to_json;

use crate::digest::{Algorithm, DigestError};
use crate::event::{self, Event, EventError};
use crate::pcr::RuntimePcr;
use crate::reader::{ReadError, Reader};
use crate::tlv;

/// Content type of this project's records.
pub const CONTENT_ASSAY: u8 = 90;
/// Longest record, in bytes.
pub const MAX_RECORD: usize = 1024 * 1024;
/// Most events in a record.
pub const MAX_EVENTS: usize = 4096;

const RECNUM: u8 = 0;
const PCR: u8 = 1;
const DIGESTS: u8 = 3;
const CCMR: u8 = 108;
/// recnum, pcr and digests of all banks, with the content's header.
const OVERHEAD: usize = 256;

/// Why bytes are not a record, or events do not make one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CelError {
    /// The bytes end inside a record: wait for the rest, or cut the tail off.
    #[error("the log ends inside a record: {0}")]
    Short(ReadError),
    /// A field of a record does not add up.
    #[error("a field of record {record} does not add up")]
    Field {
        /// Number of the record, as far as read.
        record: u64,
        /// What is wrong.
        #[source]
        source: ReadError,
    },
    /// A field of another type than the format has at this place.
    #[error("a record has a field of type {found} where {wanted} was due; this is no canonical event log")]
    FieldType {
        /// The type that came.
        found: u8,
        /// The type that the format has.
        wanted: u8,
    },
    /// recnum or pcr has another width than 8 or 1 bytes.
    #[error("a record's {field} is {found} bytes long, the format has {wanted}")]
    Width {
        /// Name of the field.
        field: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The format's length in bytes.
        wanted: usize,
    },
    /// A record is longer than [`MAX_RECORD`].
    #[error("record {record} has {found} bytes, at most {MAX_RECORD} are allowed")]
    TooLarge {
        /// Number of the record.
        record: u64,
        /// Bytes that it has or declares.
        found: usize,
    },
    /// A digest of a bank that is not known.
    #[error("record {record} has a digest of an unknown bank")]
    Bank {
        /// Number of the record.
        record: u64,
        /// The bank.
        #[source]
        source: DigestError,
    },
    /// A digest of the wrong length, or a bank named twice, or none at all.
    #[error("record {record}: its {bank} digest {reason}")]
    Digest {
        /// Number of the record.
        record: u64,
        /// Bank, or `first` where there is none.
        bank: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
    /// Content of another project's type.
    #[error("record {record} has content of type {found}, not {CONTENT_ASSAY}; it was not written by this agent")]
    ContentType {
        /// Number of the record.
        record: u64,
        /// The type.
        found: u8,
    },
    /// An event in the content cannot be read.
    #[error("record {record} holds an event that cannot be read")]
    Event {
        /// Number of the record.
        record: u64,
        /// What is wrong with it.
        #[source]
        source: EventError,
    },
    /// None, or more than [`MAX_EVENTS`].
    #[error("record {record} holds {found} events; 1 to {MAX_EVENTS} are allowed")]
    EventCount {
        /// Number of the record.
        record: u64,
        /// How many.
        found: usize,
    },
    /// Records are numbered from 0 without a gap.
    #[error("record {found} comes where record {wanted} was due; a record is missing or repeated")]
    Number {
        /// The number that came.
        found: u64,
        /// The number that was due.
        wanted: u64,
    },
}

/// The kind of register that a record was extended into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// A PCR of a TPM.
    Pcr,
    /// A measurement register of a confidential VM: TLV type 108, which Google writes and the TCG has not numbered.
    /// Read so that such logs can be shown; never part of ours.
    Ccmr,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcr => "PCR",
            Self::Ccmr => "CCMR",
        })
    }
}

/// One record of a canonical event log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number, from 0.
    pub number: u64,
    /// The kind of register that it was extended into: [`Register::Pcr`] for ours.
    pub register: Register,
    /// Index of that register.
    pub pcr: u8,
    /// Digests of the content, one for each bank that was extended. Claimed, until [`Record::check_digests`].
    pub digests: Vec<(Algorithm, Vec<u8>)>,
    /// Type of the content: [`CONTENT_ASSAY`] for ours.
    pub content_type: u8,
    /// The content TLV, type and length included.
    pub content: Vec<u8>,
}

impl Record {
    /// A record of these events, with digests for these banks.
    ///
    /// # Errors
    /// [`CelError::EventCount`], [`CelError::TooLarge`] (split the batch, see [`batch_len`]), [`CelError::Event`] when
    /// an event has no byte form, [`CelError::Digest`] when no bank is named.
    pub fn build(number: u64, pcr: u8, events: &[Event], banks: &[Algorithm]) -> Result<Self, CelError> {
        if events.is_empty() || events.len() > MAX_EVENTS {
            return Err(CelError::EventCount {
                record: number,
                found: events.len(),
            });
        }
        let mut value = Vec::new();
        for event in events {
            let bytes = event::encode(event).map_err(|source| CelError::Event { record: number, source })?;
            value.extend_from_slice(&bytes);
        }
        let mut content = Vec::with_capacity(value.len().saturating_add(tlv::HEADER));
        tlv::put(&mut content, CONTENT_ASSAY, &value);
        let banks: Vec<Algorithm> = Algorithm::ALL.into_iter().filter(|bank| banks.contains(bank)).collect();
        let hashes = Algorithm::hash_each(&banks, &content);
        let digests: Vec<(Algorithm, Vec<u8>)> = banks.into_iter().zip(hashes).collect();
        if digests.is_empty() {
            return Err(CelError::Digest {
                record: number,
                bank: "first",
                reason: "is missing",
            });
        }
        let record = Self {
            number,
            register: Register::Pcr,
            pcr,
            digests,
            content_type: CONTENT_ASSAY,
            content,
        };
        let found = record.encode().len();
        if found > MAX_RECORD {
            return Err(CelError::TooLarge { record: number, found });
        }
        Ok(record)
    }

    /// The record's bytes, as they stand in the log.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut digests = Vec::new();
        for (bank, digest) in &self.digests {
            tlv::put(&mut digests, bank.tlv_type(), digest);
        }
        let mut out = Vec::with_capacity(self.content.len().saturating_add(OVERHEAD));
        tlv::put(&mut out, RECNUM, &self.number.to_be_bytes());
        let register = match self.register {
            Register::Pcr => PCR,
            Register::Ccmr => CCMR,
        };
        tlv::put(&mut out, register, &[self.pcr]);
        tlv::put(&mut out, DIGESTS, &digests);
        out.extend_from_slice(&self.content);
        out
    }

    /// The events in the content.
    ///
    /// # Errors
    /// [`CelError::ContentType`] for other projects' records, [`CelError::Event`], [`CelError::EventCount`].
    pub fn events(&self) -> Result<Vec<Event>, CelError> {
        let mut events = Vec::new();
        self.each_event(|event| events.push(event))?;
        Ok(events)
    }

    /// As [`Record::events`], but each event goes to `take` as it is read: of a long log, that spares a copy of all.
    ///
    /// # Errors
    /// As [`Record::events`]; what came before the error has been taken by then.
    pub(crate) fn each_event(&self, mut take: impl FnMut(Event)) -> Result<(), CelError> {
        let record = self.number;
        if self.content_type != CONTENT_ASSAY {
            return Err(CelError::ContentType {
                record,
                found: self.content_type,
            });
        }
        let mut reader = Reader::new("content", &self.content);
        let (_, value) = tlv::get(&mut reader).map_err(|source| CelError::Field { record, source })?;
        reader.finish().map_err(|source| CelError::Field { record, source })?;
        let mut found = 0_usize;
        for event in event::each(value) {
            take(event.map_err(|source| CelError::Event { record, source })?);
            found = found.saturating_add(1);
        }
        if !(1..=MAX_EVENTS).contains(&found) {
            return Err(CelError::EventCount { record, found });
        }
        Ok(())
    }

    /// The claimed digest of one bank.
    #[must_use]
    pub fn digest(&self, bank: Algorithm) -> Option<&[u8]> {
        self.digests
            .iter()
            .find(|(known, _)| *known == bank)
            .map(|(_, digest)| digest.as_slice())
    }

    /// Whether it was extended into this PCR.
    #[must_use]
    pub fn is_in(&self, pcr: RuntimePcr) -> bool {
        self.register == Register::Pcr && self.pcr == pcr.index()
    }

    /// Recomputes every claimed digest from the content.
    ///
    /// # Errors
    /// [`CelError::Digest`] naming the first bank whose digest is not that of the content.
    pub fn check_digests(&self) -> Result<(), CelError> {
        let banks: Vec<Algorithm> = self.digests.iter().map(|(bank, _)| *bank).collect();
        let hashes = Algorithm::hash_each(&banks, &self.content);
        for ((bank, digest), hash) in self.digests.iter().zip(hashes) {
            if hash != *digest {
                let reason = "is not that of its content: the log was changed";
                return Err(CelError::Digest {
                    record: self.number,
                    bank: bank.name(),
                    reason,
                });
            }
        }
        Ok(())
    }
}

/// How many of the leading events fit one record: at least 1 unless there are none.
#[must_use]
pub fn batch_len(events: &[Event]) -> usize {
    let mut size = OVERHEAD;
    let mut count = 0_usize;
    for event in events.iter().take(MAX_EVENTS) {
        let Ok(bytes) = event::encode(event) else {
            break;
        };
        size = size.saturating_add(bytes.len());
        if size > MAX_RECORD {
            break;
        }
        count = count.saturating_add(1);
    }
    count.max(usize::from(!events.is_empty()))
}

/// Reads the record at the start of `bytes` and says how many bytes it has.
///
/// # Errors
/// [`CelError::Short`] when the bytes end inside the record; any other [`CelError`] when they are no record.
pub fn read(bytes: &[u8]) -> Result<(Record, usize), CelError> {
    let mut reader = Reader::new("record", bytes);
    let recnum = field(&mut reader, RECNUM, 0)?;
    let number = u64::from_be_bytes(width("recnum", recnum)?);
    let mut ahead = reader;
    let (register, kind) = match ahead.u8() {
        Ok(CCMR) => (Register::Ccmr, CCMR),
        _ => (Register::Pcr, PCR),
    };
    let pcr = field(&mut reader, kind, number)?;
    let [pcr] = width("pcr", pcr)?;
    let digests = read_digests(number, field(&mut reader, DIGESTS, number)?)?;
    check_declared(&reader, number)?;
    let (content_type, value) = tlv::get(&mut reader).map_err(CelError::Short)?;
    if reader.at() > MAX_RECORD {
        return Err(CelError::TooLarge {
            record: number,
            found: reader.at(),
        });
    }
    let mut content = Vec::with_capacity(value.len().saturating_add(tlv::HEADER));
    tlv::put(&mut content, content_type, value);
    Ok((
        Record {
            number,
            register,
            pcr,
            digests,
            content_type,
            content,
        },
        reader.at(),
    ))
}

/// Reads records up to the end of `bytes`. Their numbers and digests are as claimed.
///
/// # Errors
/// As [`read`]; a cut last record is [`CelError::Short`].
pub fn read_all(bytes: &[u8]) -> Result<Vec<Record>, CelError> {
    let mut rest = bytes;
    let mut records = Vec::new();
    while !rest.is_empty() {
        let (record, used) = read(rest)?;
        records.push(record);
        rest = rest.get(used..).unwrap_or_default();
    }
    Ok(records)
}

fn field<'a>(reader: &mut Reader<'a>, wanted: u8, record: u64) -> Result<&'a [u8], CelError> {
    let mut ahead = *reader;
    let found = ahead.u8().map_err(CelError::Short)?;
    if found != wanted {
        return Err(CelError::FieldType { found, wanted });
    }
    check_declared(reader, record)?;
    let (_, value) = tlv::get(reader).map_err(CelError::Short)?;
    Ok(value)
}

/// A length beyond any record is refused at once: it is no reason to wait for more bytes.
fn check_declared(reader: &Reader<'_>, record: u64) -> Result<(), CelError> {
    let mut ahead = *reader;
    ahead.u8().map_err(CelError::Short)?;
    let found = usize::try_from(ahead.u32().map_err(CelError::Short)?).unwrap_or(usize::MAX);
    if found > MAX_RECORD {
        return Err(CelError::TooLarge { record, found });
    }
    Ok(())
}

fn width<const N: usize>(field: &'static str, value: &[u8]) -> Result<[u8; N], CelError> {
    value.try_into().map_err(|_| CelError::Width {
        field,
        found: value.len(),
        wanted: N,
    })
}

fn read_digests(record: u64, bytes: &[u8]) -> Result<Vec<(Algorithm, Vec<u8>)>, CelError> {
    let mut reader = Reader::new("digests", bytes);
    let mut digests: Vec<(Algorithm, Vec<u8>)> = Vec::new();
    while !reader.is_empty() {
        let (id, value) = tlv::get(&mut reader).map_err(|source| CelError::Field { record, source })?;
        let bank = Algorithm::from_tpm_id(u16::from(id)).map_err(|source| CelError::Bank { record, source })?;
        if value.len() != bank.size() {
            return Err(CelError::Digest {
                record,
                bank: bank.name(),
                reason: "has the wrong length",
            });
        }
        if digests.iter().any(|(known, _)| *known == bank) {
            return Err(CelError::Digest {
                record,
                bank: bank.name(),
                reason: "is there twice",
            });
        }
        digests.push((bank, value.to_vec()));
    }
    if digests.is_empty() {
        return Err(CelError::Digest {
            record,
            bank: "first",
            reason: "is missing",
        });
    }
    Ok(digests)
}

#[cfg(test)]
mod tests;
