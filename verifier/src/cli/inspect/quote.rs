//! What a TPM signed: a `TPMS_ATTEST` (TPM 2.0 Part 2, section 10.12.12).

use std::path::Path;

use assay_evidence::tpm::{Attest, Attested};
use serde_json::{Map, Value, json};

use super::super::{CliError, print, print_json};
use super::InspectError;

/// Shows the statement in a file, as `tpm2_quote --message` writes it. Nothing is verified: its signature is elsewhere.
pub(super) fn run(path: &Path, bytes: &[u8], as_json: bool) -> Result<(), CliError> {
    let attest = Attest::parse(bytes).map_err(|cause| InspectError::Tpm {
        path: path.to_owned(),
        part: "TPMS_ATTEST",
        cause,
    })?;
    if as_json {
        print_json(&to_json(&attest))
    } else {
        print(&to_text(&attest, None))
    }
}

/// A few lines for people.
pub(super) fn to_text(attest: &Attest, scheme: Option<&str>) -> String {
    let clock = attest.clock;
    let scheme = scheme.map(|scheme| format!(" ({scheme})")).unwrap_or_default();
    format!(
        "quote {}{scheme} signer {}\n  extra data {}\n  clock {} ms, reset count {}, restart count {}, firmware {:016x}\n",
        statement(&attest.attested),
        hex::encode(&attest.qualified_signer),
        hex::encode(&attest.extra_data),
        clock.clock,
        clock.reset_count,
        clock.restart_count,
        attest.firmware_version,
    )
}

/// The same for scripts.
pub(super) fn to_json(attest: &Attest) -> Value {
    let clock = attest.clock;
    json!({
        "qualified_signer": hex::encode(&attest.qualified_signer),
        "extra_data": hex::encode(&attest.extra_data),
        "clock_ms": clock.clock,
        "reset_count": clock.reset_count,
        "restart_count": clock.restart_count,
        "clock_safe": clock.safe,
        "firmware_version": format!("{:016x}", attest.firmware_version),
        "attested": attested_json(&attest.attested),
    })
}

fn statement(attested: &Attested) -> String {
    match attested {
        Attested::Certify { name, .. } => format!("of key {}, not of PCRs", hex::encode(name)),
        Attested::Quote { selections, digest } => {
            let chosen: Vec<String> = selections
                .iter()
                .map(|selection| {
                    let pcrs: Vec<String> = selection.pcrs.iter().map(u8::to_string).collect();
                    format!("{}:{}", selection.bank.name(), pcrs.join(","))
                })
                .collect();
            format!("of {} digest {}", chosen.join("+"), hex::encode(digest))
        }
    }
}

fn attested_json(attested: &Attested) -> Value {
    match attested {
        Attested::Certify { name, qualified_name } => {
            json!({"certify": {"name": hex::encode(name), "qualified_name": hex::encode(qualified_name)}})
        }
        Attested::Quote { selections, digest } => {
            let selected: Map<String, Value> = selections
                .iter()
                .map(|selection| (selection.bank.name().to_owned(), json!(selection.pcrs)))
                .collect();
            json!({"quote": {"pcrs": selected, "digest": hex::encode(digest)}})
        }
    }
}
