//! An IMA log for people and their scripts.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

use super::{Extension, ImaEntry, ImaLog};
use crate::digest::Algorithm;

impl fmt::Display for ImaLog<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "IMA log: {} entries, {} template digests",
            self.entries.len(),
            self.bank
        )?;
        for (number, entry) in self.entries.iter().enumerate() {
            writeln!(
                f,
                "{number:5} pcr {:>2} {:8} {} {}",
                entry.pcr,
                entry.template,
                digest_text(entry),
                path_text(entry)
            )?;
        }
        for bank in Algorithm::ALL {
            for (pcr, value) in self.replay(bank, Extension::OwnDigest, &BTreeMap::new()) {
                writeln!(f, "replay {bank} pcr {pcr:>2} {}", hex::encode(value))?;
            }
        }
        Ok(())
    }
}

impl ImaLog<'_> {
    /// The log as one JSON object: entries, and the values that a replay from zero leads to in each bank.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let events: Vec<Value> = self
            .entries
            .iter()
            .enumerate()
            .map(|(number, entry)| {
                let file = entry.file_digest();
                json!({
                    "event": number, "pcr": entry.pcr, "template": entry.template,
                    "digest": hex::encode(entry.digest), "violation": entry.is_violation(),
                    "path": path_text(entry),
                    "file_digest": file.map(|file| hex::encode(file.digest)),
                    "algorithm": file.map(|file| file.algorithm),
                    "verity": file.is_some_and(|file| file.verity),
                    "signature_size": entry.signature().map(<[u8]>::len),
                    "buffer_size": entry.buffer().map(<[u8]>::len),
                })
            })
            .collect();
        let pcrs: serde_json::Map<String, Value> = Algorithm::ALL
            .into_iter()
            .map(|bank| {
                let values = self.replay(bank, Extension::OwnDigest, &BTreeMap::new());
                let values: serde_json::Map<String, Value> = values
                    .into_iter()
                    .map(|(pcr, value)| (pcr.to_string(), hex::encode(value).into()))
                    .collect();
                (bank.name().to_owned(), values.into())
            })
            .collect();
        json!({"bank": self.bank.name(), "events": events, "pcrs": pcrs})
    }
}

fn digest_text(entry: &ImaEntry<'_>) -> String {
    match entry.file_digest() {
        _ if entry.is_violation() => "violation".to_owned(),
        Some(file) => {
            let verity = if file.verity { "verity:" } else { "" };
            format!("{verity}{}:{}", file.algorithm, hex::encode(file.digest))
        }
        None => "-".to_owned(),
    }
}

/// A stranger's bytes: nothing but printable characters comes out.
fn path_text(entry: &ImaEntry<'_>) -> String {
    String::from_utf8_lossy(entry.path()).escape_debug().to_string()
}
