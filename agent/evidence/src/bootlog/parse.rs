//! From bytes to events. Everything in a boot log is little-endian.

use super::{BootEvent, BootLog, BootLogError, EV_NO_ACTION, Format, MAX_EVENT_DATA, MAX_EVENTS, MAX_LOG};
use crate::digest::Algorithm;

/// Signature of the crypto-agile header (PC Client PFP, TCG_EfiSpecIdEvent).
const SPEC_ID_03: &[u8; 16] = b"Spec ID Event03\0";
/// Signature of the event that tells the start-up locality.
const STARTUP_LOCALITY: &[u8; 16] = b"StartupLocality\0";
/// Most banks in a header. TPMs have two or three.
const MAX_BANKS: u32 = 16;
/// Largest digest that any TPM algorithm has, in bytes.
const MAX_DIGEST: u16 = 64;
const SHA1_SIZE: usize = 20;
const PCR_COUNT: u32 = 24;

/// Reads a whole log: all bytes belong to events, or it is refused.
///
/// # Errors
/// [`BootLogError`], naming the event.
pub fn parse(bytes: &[u8]) -> Result<BootLog, BootLogError> {
    if bytes.is_empty() {
        return Err(BootLogError::Empty);
    }
    if bytes.len() > MAX_LOG {
        return Err(BootLogError::TooLong(bytes.len()));
    }
    let mut input = Input {
        rest: bytes,
        event: 0,
        begin: 0,
    };
    let first = input.tpm12_event()?;
    let header = match first.data.strip_prefix(SPEC_ID_03) {
        Some(rest) if first.event_type == EV_NO_ACTION => Some(spec_id(rest)?),
        _ => None,
    };
    let mut events = vec![first];
    while !input.rest.is_empty() {
        if events.len() == MAX_EVENTS {
            return Err(BootLogError::TooManyEvents);
        }
        input.event = events.len();
        input.begin = bytes.len().saturating_sub(input.rest.len());
        events.push(match &header {
            Some(sizes) => input.agile_event(sizes)?,
            None => input.tpm12_event()?,
        });
    }
    let locality = startup_locality(&events)?;
    Ok(match header {
        Some(sizes) => BootLog {
            format: Format::CryptoAgile,
            banks: sizes.iter().filter_map(|&(id, _)| known(id)).collect(),
            locality,
            events,
        },
        None => BootLog {
            format: Format::Tpm12,
            banks: vec![Algorithm::Sha1],
            locality,
            events,
        },
    })
}

/// The algorithms of the header with their digest sizes, in its order; those unknown to this program included, since
/// their digests must be stepped over.
fn spec_id(rest: &[u8]) -> Result<Vec<(u16, u16)>, BootLogError> {
    let mut input = Input {
        rest,
        event: 0,
        begin: 0,
    };
    // platformClass, specVersionMinor, specVersionMajor, specErrata: the signature already settles the layout.
    input.u32("platform class")?;
    input.take(3, "version")?;
    // uintnSize: 1 for 32-bit, 2 for 64-bit firmware.
    if !matches!(input.u8("integer size")?, 1 | 2) {
        return Err(BootLogError::Header("integer size"));
    }
    let count = input.u32("number of algorithms")?;
    if count == 0 || count > MAX_BANKS {
        return Err(BootLogError::Header("number of algorithms"));
    }
    let mut sizes: Vec<(u16, u16)> = Vec::new();
    for _ in 0..count {
        let (id, size) = (input.u16("algorithm")?, input.u16("digest size")?);
        let right = match known(id) {
            Some(algorithm) => usize::from(size) == algorithm.size(),
            None => (1..=MAX_DIGEST).contains(&size),
        };
        if !right {
            return Err(BootLogError::Header("digest size"));
        }
        if sizes.iter().any(|&(other, _)| other == id) {
            return Err(BootLogError::Header("repeated algorithm"));
        }
        sizes.push((id, size));
    }
    let vendor = input.u8("vendor information")?;
    input.take(usize::from(vendor), "vendor information")?;
    if input.rest.is_empty() {
        Ok(sizes)
    } else {
        Err(BootLogError::Header("length"))
    }
}

/// At most one event may tell the locality, and before PCR 0 is extended; a log without one began at locality 0.
fn startup_locality(events: &[BootEvent]) -> Result<u8, BootLogError> {
    let mut settled = None;
    let mut extended = false;
    for (number, event) in events.iter().enumerate() {
        if event.is_extended() {
            extended |= event.pcr == 0;
            continue;
        }
        if let Some(&[locality]) = event.data.strip_prefix(STARTUP_LOCALITY) {
            if settled.is_some() || extended {
                return Err(BootLogError::Locality { event: number });
            }
            settled = Some(locality);
        }
    }
    Ok(settled.unwrap_or(0))
}

/// The bank that this program replays, if it is one.
fn known(id: u16) -> Option<Algorithm> {
    Algorithm::from_tpm_id(id).ok()
}

/// What is left to read, which event is being read and at which byte it begins, for error messages.
struct Input<'a> {
    rest: &'a [u8],
    event: usize,
    begin: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], BootLogError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(BootLogError::Short {
            event: self.event,
            at: self.begin,
            field,
        })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], BootLogError> {
        self.take(N, field)?.try_into().map_err(|_| BootLogError::Short {
            event: self.event,
            at: self.begin,
            field,
        })
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, BootLogError> {
        self.array(field).map(u8::from_le_bytes)
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, BootLogError> {
        self.array(field).map(u16::from_le_bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, BootLogError> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// PCR and type, common to both forms.
    fn head(&mut self) -> Result<(u32, u32), BootLogError> {
        let (pcr, event_type) = (self.u32("PCR")?, self.u32("type")?);
        if pcr >= PCR_COUNT && event_type != EV_NO_ACTION {
            return Err(BootLogError::NoSuchPcr {
                event: self.event,
                at: self.begin,
                pcr,
            });
        }
        Ok((pcr, event_type))
    }

    fn data(&mut self) -> Result<Vec<u8>, BootLogError> {
        let size = self.u32("size")?;
        match usize::try_from(size) {
            Ok(length) if length <= MAX_EVENT_DATA => Ok(self.take(length, "data")?.to_vec()),
            _ => Err(BootLogError::EventTooLong {
                event: self.event,
                at: self.begin,
                size,
            }),
        }
    }

    /// TCG_PCClientPCREvent; also the form of a crypto-agile log's first event.
    fn tpm12_event(&mut self) -> Result<BootEvent, BootLogError> {
        let (pcr, event_type) = self.head()?;
        let digest = self.take(SHA1_SIZE, "digest")?.to_vec();
        Ok(BootEvent {
            at: self.begin,
            pcr,
            event_type,
            digests: vec![(Algorithm::Sha1, digest)],
            data: self.data()?,
        })
    }

    /// TCG_PCR_EVENT2.
    fn agile_event(&mut self, sizes: &[(u16, u16)]) -> Result<BootEvent, BootLogError> {
        let (pcr, event_type) = self.head()?;
        let count = self.u32("digest count")?;
        let mut seen: Vec<u16> = Vec::new();
        let mut digests = Vec::new();
        // A repeated or unlisted algorithm ends the loop, so `count` can't make it long.
        for _ in 0..count {
            let algorithm = self.u16("digest algorithm")?;
            let Some(&(_, size)) = sizes.iter().find(|&&(id, _)| id == algorithm) else {
                return Err(BootLogError::UnlistedAlgorithm {
                    event: self.event,
                    at: self.begin,
                    algorithm,
                });
            };
            if seen.contains(&algorithm) {
                return Err(BootLogError::RepeatedAlgorithm {
                    event: self.event,
                    at: self.begin,
                    algorithm,
                });
            }
            seen.push(algorithm);
            let digest = self.take(usize::from(size), "digest")?;
            if let Some(known) = known(algorithm) {
                digests.push((known, digest.to_vec()));
            }
        }
        Ok(BootEvent {
            at: self.begin,
            pcr,
            event_type,
            digests,
            data: self.data()?,
        })
    }
}
