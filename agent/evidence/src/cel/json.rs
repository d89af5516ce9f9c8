//! Records for people and other programs: CEL-JSON.

use serde_json::{Value, json};

use super::{Record, Register};

/// The record as CEL-JSON: `recnum`, `pcr`, `digests`, `content_type`, `content`. Content of other projects, or that
/// cannot be read, is given in hex.
#[must_use]
pub fn to_json(record: &Record) -> Value {
    let digests: Vec<Value> = record
        .digests
        .iter()
        .map(|(bank, digest)| json!({ "hashAlg": bank.name(), "digest": hex::encode(digest) }))
        .collect();
    let (content_type, content) = match record.events() {
        Ok(events) => (json!("assay"), json!({ "events": events })),
        Err(_) => (json!(record.content_type), json!(hex::encode(&record.content))),
    };
    let register = match record.register {
        Register::Pcr => "pcr",
        Register::Ccmr => "ccmr",
    };
    json!({
        "recnum": record.number,
        register: record.pcr,
        "digests": digests,
        "content_type": content_type,
        "content": content,
    })
}
