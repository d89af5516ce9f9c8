//! Byte form of events: one TLV an event, nested TLVs for its fields.
//!
//! Canonical: fields in ascending order of their type, each once, optional ones absent rather than empty. Numbers are
//! big-endian and of fixed width. The table is in `agent/docs/formats.md`.

use serde::Serializer;
use serde::ser::SerializeMap;

use super::fields::{FieldReader, Fields};
use super::{
    AgentStart, Event, LoadKind, MAX_CMDLINE, MAX_COMM, MAX_PATH, MAX_TEXT, Measurement, Mode, Notice, Violation, flags,
};
use crate::digest::{Algorithm, DigestError, Sha256Digest};
use crate::reader::{ReadError, Reader};
use crate::tlv;
use crate::uuid::Uuid;

/// Why bytes are not an event, or an event has no byte form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// Cut short, or followed by bytes that belong to nothing.
    #[error("the event's bytes do not add up")]
    Bytes(#[from] ReadError),
    /// An event kind that this version does not know. Skipping it could skip a load.
    #[error("event kind {0} is not known; a newer agent wrote it: update the verifier")]
    UnknownKind(u8),
    /// A field that this version does not know.
    #[error("{event} has field {found} where field {wanted} was due; a newer agent wrote it: update the verifier")]
    Field {
        /// Name of the event.
        event: &'static str,
        /// The type of the field that came; 0 at the end.
        found: u8,
        /// The type of the next field that the format has.
        wanted: u8,
    },
    /// A field's value has another length than its type.
    #[error("{event} field {field} is {found} bytes long, its type has {wanted}")]
    Width {
        /// Name of the event.
        event: &'static str,
        /// Type of the field.
        field: u8,
        /// Its length in bytes.
        found: usize,
        /// The length that the format has.
        wanted: usize,
    },
    /// A text is longer than its limit.
    #[error("{event} field {field} has {found} bytes of text, at most {limit} are allowed")]
    TextTooLong {
        /// Name of the event.
        event: &'static str,
        /// Type of the field.
        field: u8,
        /// Its length in bytes.
        found: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A text is not UTF-8.
    #[error("{event} field {field} is not UTF-8 text")]
    NotText {
        /// Name of the event.
        event: &'static str,
        /// Type of the field.
        field: u8,
    },
    /// A load kind, mode, violation or tier with an unknown code.
    #[error("{what} has the unknown code {code}; a newer agent wrote it: update the verifier")]
    Code {
        /// What the code stands for.
        what: &'static str,
        /// The code.
        code: u8,
    },
    /// A measurement has flags without a meaning.
    #[error("a measurement has unknown flags 0x{0:x}; a newer agent wrote it: update the verifier")]
    Flags(u32),
    /// The boot id is not a UUID.
    #[error("agent-start has a boot id that is not a UUID")]
    BootId,
    /// A PCR's starting value of an unknown bank, or of the wrong length, or named twice.
    #[error("agent-start has a PCR start value of bank 0x{bank:02x} that is {reason}")]
    PcrStart {
        /// Low byte of the TPM algorithm id.
        bank: u8,
        /// What is wrong.
        reason: &'static str,
    },
    /// A starting value of a bank that this version does not know.
    #[error("agent-start names an unknown bank")]
    Bank(#[from] DigestError),
}

mod kind {
    pub(super) const AGENT_START: u8 = 1;
    pub(super) const INVENTORY: u8 = 2;
    pub(super) const READY: u8 = 3;
    pub(super) const LOAD: u8 = 4;
    pub(super) const VIOLATION: u8 = 5;
    pub(super) const AGENT_STOP: u8 = 6;
    pub(super) const NOTICE: u8 = 7;
}

mod violation {
    pub(super) const LOST: u8 = 1;
    pub(super) const LOG_MISMATCH: u8 = 2;
    pub(super) const NOT_HASHED: u8 = 3;
    pub(super) const SEQUENCE_GAP: u8 = 4;
    pub(super) const HOOKS_MISSING: u8 = 5;
    pub(super) const LOG_FULL: u8 = 6;
    pub(super) const TPM_FAILED: u8 = 7;
}

mod notice {
    pub(super) const TPM_SLOW: u8 = 1;
    pub(super) const LIST_IN_FORCE: u8 = 2;
}

/// The event's TLV.
///
/// # Errors
/// [`EventError::TextTooLong`], [`EventError::BootId`], [`EventError::PcrStart`], [`EventError::Flags`]: what [`decode`] would refuse is not
/// written.
pub fn encode(event: &Event) -> Result<Vec<u8>, EventError> {
    let mut fields = Fields::new(event.name());
    let kind = match event {
        Event::AgentStart(start) => {
            put_agent_start(&mut fields, start)?;
            kind::AGENT_START
        }
        Event::Inventory(measurement) => {
            put_measurement(&mut fields, measurement)?;
            kind::INVENTORY
        }
        Event::Ready => kind::READY,
        Event::Load(measurement) => {
            put_measurement(&mut fields, measurement)?;
            kind::LOAD
        }
        Event::Violation(violation) => {
            put_violation(&mut fields, violation)?;
            kind::VIOLATION
        }
        Event::AgentStop => kind::AGENT_STOP,
        Event::Notice(notice) => {
            put_notice(&mut fields, notice);
            kind::NOTICE
        }
    };
    let mut out = Vec::new();
    tlv::put(&mut out, kind, &fields.into_bytes());
    Ok(out)
}

/// Reads exactly one event.
///
/// # Errors
/// An [`EventError`] for anything but the canonical form of a known event.
pub fn decode(bytes: &[u8]) -> Result<Event, EventError> {
    let mut reader = Reader::new("event", bytes);
    let event = decode_next(&mut reader)?;
    reader.finish()?;
    Ok(event)
}

/// Reads events up to the end of `bytes`.
///
/// # Errors
/// As [`decode`].
pub fn decode_all(bytes: &[u8]) -> Result<Vec<Event>, EventError> {
    each(bytes).collect()
}

/// The events up to the end of `bytes`, one at a time; nothing comes after the first error.
pub(crate) fn each(bytes: &[u8]) -> impl Iterator<Item = Result<Event, EventError>> {
    let mut left = Some(Reader::new("events", bytes));
    core::iter::from_fn(move || {
        let reader = left.as_mut().filter(|reader| !reader.is_empty())?;
        let event = decode_next(reader);
        if event.is_err() {
            left = None;
        }
        Some(event)
    })
}

fn decode_next(reader: &mut Reader<'_>) -> Result<Event, EventError> {
    let (kind, value) = tlv::get(reader)?;
    match kind {
        kind::AGENT_START => get_agent_start(value).map(Event::from),
        kind::INVENTORY => get_measurement("inventory", value).map(Event::Inventory),
        kind::READY => Reader::new("ready", value)
            .finish()
            .map(|()| Event::Ready)
            .map_err(Into::into),
        kind::LOAD => get_measurement("load", value).map(Event::Load),
        kind::VIOLATION => get_violation(value).map(Event::Violation),
        kind::AGENT_STOP => Reader::new("agent-stop", value)
            .finish()
            .map(|()| Event::AgentStop)
            .map_err(Into::into),
        kind::NOTICE => get_notice(value).map(Event::Notice),
        other => Err(EventError::UnknownKind(other)),
    }
}

fn put_agent_start(fields: &mut Fields, start: &AgentStart) -> Result<(), EventError> {
    start.boot_id.parse::<Uuid>().map_err(|_| EventError::BootId)?;
    if !(1..=3).contains(&start.tier) {
        return Err(EventError::Code {
            what: "tier",
            code: start.tier,
        });
    }
    fields.text(1, &start.agent_version, MAX_TEXT)?;
    fields.bytes(2, start.agent_digest.as_ref());
    fields.bytes(3, start.bpf_digest.as_ref());
    fields.text(4, &start.boot_id, MAX_TEXT)?;
    fields.text(5, &start.kernel_release, MAX_TEXT)?;
    fields.text(6, &start.cmdline, MAX_CMDLINE)?;
    fields.text(7, &start.lsm, MAX_TEXT)?;
    fields.text(8, &start.lockdown, MAX_TEXT)?;
    fields.bytes(9, &[start.tier]);
    fields.bytes(10, &[start.mode.code()]);
    fields.bytes(11, &put_pcr_start(&start.pcr_start)?);
    if let Some(predecessor) = start.predecessor {
        fields.bytes(12, &predecessor.to_be_bytes());
    }
    fields.text(13, &start.blind, MAX_TEXT)?;
    fields.bytes(14, &[u8::from(start.protected)]);
    Ok(())
}

fn get_agent_start(value: &[u8]) -> Result<AgentStart, EventError> {
    let mut fields = FieldReader::new("agent-start", value);
    let start = AgentStart {
        agent_version: fields.text(1, MAX_TEXT)?,
        agent_digest: fields.digest(2)?,
        bpf_digest: fields.digest(3)?,
        boot_id: fields.text(4, MAX_TEXT)?,
        kernel_release: fields.text(5, MAX_TEXT)?,
        cmdline: fields.text(6, MAX_CMDLINE)?,
        lsm: fields.text(7, MAX_TEXT)?,
        lockdown: fields.text(8, MAX_TEXT)?,
        tier: fields.code(9, "tier", |code| (1..=3).contains(&code).then_some(code))?,
        mode: fields.code(10, "mode", Mode::from_code)?,
        pcr_start: get_pcr_start(fields.field(11)?)?,
        predecessor: fields.optional_u64(12)?,
        blind: fields.text(13, MAX_TEXT)?,
        protected: fields.code(14, "protection", |code| (code <= 1).then_some(code == 1))?,
    };
    fields.finish()?;
    start.boot_id.parse::<Uuid>().map_err(|_| EventError::BootId)?;
    Ok(start)
}

/// Nested TLVs, type = low byte of the bank's algorithm id, ascending.
fn put_pcr_start(values: &[(Algorithm, Vec<u8>)]) -> Result<Vec<u8>, EventError> {
    let mut out = Vec::new();
    let mut last = 0;
    for (bank, value) in values {
        check_pcr_start(*bank, value, &mut last)?;
        tlv::put(&mut out, bank.tlv_type(), value);
    }
    Ok(out)
}

fn get_pcr_start(bytes: &[u8]) -> Result<Vec<(Algorithm, Vec<u8>)>, EventError> {
    let mut reader = Reader::new("PCR start values", bytes);
    let mut values = Vec::new();
    let mut last = 0;
    while !reader.is_empty() {
        let (bank, value) = tlv::get(&mut reader)?;
        let bank = Algorithm::from_tpm_id(u16::from(bank))?;
        check_pcr_start(bank, value, &mut last)?;
        values.push((bank, value.to_vec()));
    }
    Ok(values)
}

fn check_pcr_start(bank: Algorithm, value: &[u8], last: &mut u8) -> Result<(), EventError> {
    let id = bank.tlv_type();
    if id <= *last {
        return Err(EventError::PcrStart {
            bank: id,
            reason: "named twice or out of order",
        });
    }
    if value.len() != bank.size() {
        return Err(EventError::PcrStart {
            bank: id,
            reason: "not as long as the bank's digests",
        });
    }
    *last = id;
    Ok(())
}

/// Bytes of field 8: size, dev, ino, generation, change, fs_magic.
const FILE_WIDTH: usize = 8 + 4 + 8 + 4 + 8 + 8;
/// Bytes of field 9: pid, uid, cgroup.
const TASK_WIDTH: usize = 4 + 4 + 8;

fn put_measurement(fields: &mut Fields, measurement: &Measurement) -> Result<(), EventError> {
    check_flags(measurement.flags)?;
    fields.bytes(1, &[measurement.kind.code()]);
    fields.bytes(2, &measurement.flags.to_be_bytes());
    if let Some(digest) = &measurement.digest {
        fields.bytes(3, digest.as_ref());
    }
    fields.text(4, &measurement.path, MAX_PATH)?;
    fields.text(5, &measurement.comm, MAX_COMM)?;
    if let Some(seq) = measurement.seq {
        fields.bytes(6, &seq.to_be_bytes());
    }
    fields.bytes(7, &measurement.time_ns.to_be_bytes());
    let mut file = Vec::with_capacity(FILE_WIDTH);
    file.extend_from_slice(&measurement.size.to_be_bytes());
    file.extend_from_slice(&measurement.dev.to_be_bytes());
    file.extend_from_slice(&measurement.ino.to_be_bytes());
    file.extend_from_slice(&measurement.generation.to_be_bytes());
    file.extend_from_slice(&measurement.change.to_be_bytes());
    file.extend_from_slice(&measurement.fs_magic.to_be_bytes());
    fields.bytes(8, &file);
    let mut task = Vec::with_capacity(TASK_WIDTH);
    task.extend_from_slice(&measurement.pid.to_be_bytes());
    task.extend_from_slice(&measurement.uid.to_be_bytes());
    task.extend_from_slice(&measurement.cgroup.to_be_bytes());
    fields.bytes(9, &task);
    Ok(())
}

fn get_measurement(event: &'static str, value: &[u8]) -> Result<Measurement, EventError> {
    let mut fields = FieldReader::new(event, value);
    let kind = fields.code(1, "load kind", LoadKind::from_code)?;
    let flags = u32::from_be_bytes(fields.array(2)?);
    check_flags(flags)?;
    let digest = fields.optional_array(3)?.map(Sha256Digest::new);
    let path = fields.text(4, MAX_PATH)?;
    let comm = fields.text(5, MAX_COMM)?;
    let seq = fields.optional_u64(6)?;
    let time_ns = u64::from_be_bytes(fields.array(7)?);
    let file: [u8; FILE_WIDTH] = fields.array(8)?;
    let mut file = Reader::new("file of a measurement", &file);
    let task: [u8; TASK_WIDTH] = fields.array(9)?;
    let mut task = Reader::new("task of a measurement", &task);
    fields.finish()?;
    Ok(Measurement {
        kind,
        flags,
        digest,
        path,
        comm,
        seq,
        time_ns,
        size: file.u64()?,
        dev: file.u32()?,
        ino: file.u64()?,
        generation: file.u32()?,
        change: file.u64()?,
        fs_magic: file.u64()?,
        pid: task.u32()?,
        uid: task.u32()?,
        cgroup: task.u64()?,
    })
}

/// A flag that this version does not know could be a reason not to trust the code.
fn check_flags(found: u32) -> Result<(), EventError> {
    match found & !flags::ALL {
        0 => Ok(()),
        unknown => Err(EventError::Flags(unknown)),
    }
}

fn put_violation(fields: &mut Fields, violation: &Violation) -> Result<(), EventError> {
    match violation {
        Violation::Lost { count } => {
            fields.bytes(1, &[violation::LOST]);
            fields.bytes(2, &count.to_be_bytes());
        }
        Violation::LogMismatch { detail } => {
            fields.bytes(1, &[violation::LOG_MISMATCH]);
            fields.text(2, detail, MAX_TEXT)?;
        }
        Violation::NotHashed { path, detail } => {
            fields.bytes(1, &[violation::NOT_HASHED]);
            fields.text(2, path, MAX_PATH)?;
            fields.text(3, detail, MAX_TEXT)?;
        }
        Violation::SequenceGap { expected, found } => {
            fields.bytes(1, &[violation::SEQUENCE_GAP]);
            fields.bytes(2, &expected.to_be_bytes());
            fields.bytes(3, &found.to_be_bytes());
        }
        Violation::HooksMissing { detail } => {
            fields.bytes(1, &[violation::HOOKS_MISSING]);
            fields.text(2, detail, MAX_TEXT)?;
        }
        Violation::LogFull { max_bytes } => {
            fields.bytes(1, &[violation::LOG_FULL]);
            fields.bytes(2, &max_bytes.to_be_bytes());
        }
        Violation::TpmFailed { detail } => {
            fields.bytes(1, &[violation::TPM_FAILED]);
            fields.text(2, detail, MAX_TEXT)?;
        }
    }
    Ok(())
}

fn get_violation(value: &[u8]) -> Result<Violation, EventError> {
    let mut fields = FieldReader::new("violation", value);
    let [code] = fields.array(1)?;
    let violation = match code {
        violation::LOST => Violation::Lost {
            count: u64::from_be_bytes(fields.array(2)?),
        },
        violation::LOG_MISMATCH => Violation::LogMismatch {
            detail: fields.text(2, MAX_TEXT)?,
        },
        violation::NOT_HASHED => Violation::NotHashed {
            path: fields.text(2, MAX_PATH)?,
            detail: fields.text(3, MAX_TEXT)?,
        },
        violation::SEQUENCE_GAP => Violation::SequenceGap {
            expected: u64::from_be_bytes(fields.array(2)?),
            found: u64::from_be_bytes(fields.array(3)?),
        },
        violation::HOOKS_MISSING => Violation::HooksMissing {
            detail: fields.text(2, MAX_TEXT)?,
        },
        violation::LOG_FULL => Violation::LogFull {
            max_bytes: u64::from_be_bytes(fields.array(2)?),
        },
        violation::TPM_FAILED => Violation::TpmFailed {
            detail: fields.text(2, MAX_TEXT)?,
        },
        code => {
            return Err(EventError::Code {
                what: "violation",
                code,
            });
        }
    };
    fields.finish()?;
    Ok(violation)
}

fn put_notice(fields: &mut Fields, notice: &Notice) {
    match notice {
        Notice::TpmSlow { millis } => {
            fields.bytes(1, &[notice::TPM_SLOW]);
            fields.bytes(2, &millis.to_be_bytes());
        }
        Notice::ListInForce {
            serial,
            digest,
            entries,
        } => {
            fields.bytes(1, &[notice::LIST_IN_FORCE]);
            fields.bytes(2, &serial.to_be_bytes());
            fields.bytes(3, digest.as_ref());
            fields.bytes(4, &entries.to_be_bytes());
        }
    }
}

fn get_notice(value: &[u8]) -> Result<Notice, EventError> {
    let mut fields = FieldReader::new("notice", value);
    let [code] = fields.array(1)?;
    let notice = match code {
        notice::TPM_SLOW => Notice::TpmSlow {
            millis: u64::from_be_bytes(fields.array(2)?),
        },
        notice::LIST_IN_FORCE => Notice::ListInForce {
            serial: u64::from_be_bytes(fields.array(2)?),
            digest: fields.digest(3)?,
            entries: u64::from_be_bytes(fields.array(4)?),
        },
        code => return Err(EventError::Code { what: "notice", code }),
    };
    fields.finish()?;
    Ok(notice)
}

/// `{"sha256": "hex", …}`, as CEL-JSON readers expect digests.
pub(super) fn digests_as_json<S: Serializer>(
    values: &[(Algorithm, Vec<u8>)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(values.len()))?;
    for (bank, value) in values {
        map.serialize_entry(bank.name(), &hex::encode(value))?;
    }
    map.end()
}
