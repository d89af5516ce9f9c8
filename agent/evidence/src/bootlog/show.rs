//! A boot log for people and their scripts.

use super::{BootEvent, BootLog, Format, banks_text, event_name};
use crate::digest::Algorithm;
use serde_json::{Value, json};
use std::fmt;

/// How much of an event's data is shown as text, in characters, and as hexadecimal, in bytes.
const TEXT: usize = 96;
const HEX: usize = 32;

impl fmt::Display for BootLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = match self.format {
            Format::Tpm12 => "TPM 1.2",
            Format::CryptoAgile => "crypto-agile",
        };
        writeln!(
            f,
            "{form} boot log: {} events, banks {}, start-up locality {}",
            self.events.len(),
            banks_text(&self.banks),
            self.locality
        )?;
        for (number, event) in self.events.iter().enumerate() {
            write!(
                f,
                "{number:4} pcr {:>2} {:34}",
                pcr_text(event),
                event_name(event.event_type)
            )?;
            if let Some((bank, digest)) = best(event) {
                write!(f, " {}:{}", bank, hex::encode(digest))?;
            }
            writeln!(f, " {}", summary(&event.data))?;
        }
        for &bank in &self.banks {
            match self.replay(bank) {
                Err(error) => writeln!(f, "replay {}: {error}", bank)?,
                Ok(pcrs) => {
                    for pcr in self.extended_pcrs() {
                        let value = pcrs.get(&pcr).map(hex::encode).unwrap_or_default();
                        writeln!(f, "replay {} pcr {pcr:>2} {value}", bank)?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl BootLog {
    /// The log as one JSON object: form, banks, events with type names, digests and a summary of their data, and the
    /// replayed PCR values a bank (those PCRs that some event extends).
    #[must_use]
    pub fn to_json(&self) -> Value {
        let events: Vec<Value> = self
            .events
            .iter()
            .enumerate()
            .map(|(number, event)| {
                let digests: serde_json::Map<String, Value> = event
                    .digests
                    .iter()
                    .map(|(bank, digest)| (bank.name().to_owned(), hex::encode(digest).into()))
                    .collect();
                json!({
                    "event": number, "at": event.at, "pcr": event.pcr, "type": event_name(event.event_type),
                    "extended": event.is_extended(), "digests": digests, "size": event.data.len(),
                    "summary": summary(&event.data),
                })
            })
            .collect();
        let replay: serde_json::Map<String, Value> = self
            .banks
            .iter()
            .filter_map(|&bank| {
                let pcrs = self.replay(bank).ok()?;
                let values: serde_json::Map<String, Value> = self
                    .extended_pcrs()
                    .into_iter()
                    .filter_map(|pcr| Some((pcr.to_string(), hex::encode(pcrs.get(&pcr)?).into())))
                    .collect();
                Some((bank.name().to_owned(), values.into()))
            })
            .collect();
        json!({
            "format": match self.format { Format::Tpm12 => "tpm-1.2", Format::CryptoAgile => "crypto-agile" },
            "banks": self.banks.iter().map(|bank| bank.name()).collect::<Vec<_>>(),
            "startup_locality": self.locality,
            "events": events,
            "pcrs": replay,
        })
    }
}

/// The PCR, or "-" where an event that is not extended names none.
fn pcr_text(event: &BootEvent) -> String {
    if event.pcr < 24 {
        event.pcr.to_string()
    } else {
        "-".into()
    }
}

/// SHA-256 where there is one, for a line has room for one digest.
fn best(event: &BootEvent) -> Option<&(Algorithm, Vec<u8>)> {
    let wanted = |(bank, _): &&(Algorithm, Vec<u8>)| *bank == Algorithm::Sha256;
    if event.is_extended() {
        event.digests.iter().find(wanted).or(event.digests.first())
    } else {
        None
    }
}

/// An event's data in short: text if it is text, a UEFI variable's name if it is laid out as one, else hexadecimal.
/// It is a stranger's data, so nothing but printable characters comes out.
fn summary(data: &[u8]) -> String {
    if data.is_empty() {
        return String::new();
    }
    if let Some(text) = ascii(data).or_else(|| variable(data)).or_else(|| utf16(data)) {
        let cut: String = text.chars().take(TEXT).collect();
        return if cut.len() < text.len() {
            format!("\"{cut}…\"")
        } else {
            format!("\"{cut}\"")
        };
    }
    let shown = hex::encode(data.get(..HEX.min(data.len())).unwrap_or_default());
    if data.len() > HEX {
        format!("{shown}… ({} bytes)", data.len())
    } else {
        shown
    }
}

/// Printable ASCII, with at most closing NULs.
fn ascii(data: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(data).ok()?.trim_end_matches('\0');
    (text.len() >= 2 && text.chars().all(|c| c == ' ' || c.is_ascii_graphic())).then(|| text.to_owned())
}

/// UEFI_VARIABLE_DATA: a GUID, two lengths (u64, in UTF-16 units and in bytes), the name in UTF-16.
fn variable(data: &[u8]) -> Option<String> {
    let (units, rest) = data.get(16..)?.split_at_checked(8)?;
    let units = usize::try_from(u64::from_le_bytes(units.try_into().ok()?)).ok()?;
    let (size, rest) = rest.split_at_checked(8)?;
    let size = usize::try_from(u64::from_le_bytes(size.try_into().ok()?)).ok()?;
    let name = rest.get(..units.checked_mul(2)?)?;
    (rest.len() >= name.len().checked_add(size)?).then_some(())?;
    Some(format!("variable {}, {size} bytes", utf16(name)?))
}

fn utf16(data: &[u8]) -> Option<String> {
    if !data.len().is_multiple_of(2) {
        return None;
    }
    let units = data.chunks_exact(2).map(|pair| match pair {
        [low, high] => u16::from_le_bytes([*low, *high]),
        _ => 0,
    });
    let text: String = char::decode_utf16(units).collect::<Result<_, _>>().ok()?;
    let text = text.trim_end_matches('\0');
    (!text.is_empty() && text.chars().all(|c| c == ' ' || c.is_ascii_graphic())).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn data_in_short() {
        assert_eq!(summary(b""), "");
        assert_eq!(
            summary(b"Exit Boot Services Invocation"),
            "\"Exit Boot Services Invocation\""
        );
        assert_eq!(summary(b"grub_cmd: linux\0"), "\"grub_cmd: linux\"");
        assert_eq!(summary(&[0, 0, 0, 0]), "00000000");
        assert_eq!(summary(b"\x1b[2Jevil"), "1b5b324a6576696c");
        assert_eq!(summary(b"G\0C\0E\0"), "\"GCE\"");
        let mut variable = vec![0xAA; 16];
        variable.extend(10u64.to_le_bytes());
        variable.extend(1u64.to_le_bytes());
        variable.extend("SecureBoot".encode_utf16().flat_map(u16::to_le_bytes));
        variable.push(1);
        assert_eq!(summary(&variable), "\"variable SecureBoot, 1 bytes\"");
        assert!(summary(&[7; 100]).ends_with("… (100 bytes)"));
        assert!(summary(&[b'x'; 200]).ends_with("…\""));
    }
}
