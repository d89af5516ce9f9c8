//! Evidence bundles.

use std::fmt::Write as _;
use std::path::Path;

use assay_evidence::bootlog::{self, BootLog};
use assay_evidence::bundle::Bundle;
use assay_evidence::cel;
use assay_evidence::digest::Algorithm;
use assay_evidence::imalog::{self, ImaLog, ImaLogError};
use assay_evidence::tpm::{Attest, Signature};
use serde_json::{Value, json};

use super::super::{CliError, print, print_json};
use super::cel::{Placed, Records};
use super::{InspectError, quote, text};

/// A bundle, taken apart. Nothing in it is verified.
struct Shown {
    bundle: Bundle,
    attest: Attest,
    scheme: &'static str,
    records: Vec<Placed>,
    boot_log: Option<BootLog>,
}

/// Shows a bundle, if every part of it can be read.
pub(super) fn run(path: &Path, bytes: &[u8], as_json: bool) -> Result<(), CliError> {
    let shown = Shown::read(path, bytes)?;
    if as_json {
        print_json(&shown.to_json())
    } else {
        print(&shown.to_text())
    }
}

impl Shown {
    fn read(path: &Path, bytes: &[u8]) -> Result<Self, InspectError> {
        let bundle = Bundle::from_json(bytes).map_err(|cause| InspectError::Bundle {
            path: path.to_owned(),
            cause,
        })?;
        let tpm = |part| {
            move |cause| InspectError::Tpm {
                path: path.to_owned(),
                part,
                cause,
            }
        };
        let attest = Attest::parse(&bundle.quote.attest.0).map_err(tpm("quote.attest"))?;
        let scheme = match Signature::parse(&bundle.quote.signature.0).map_err(tpm("quote.signature"))? {
            Signature::Rsassa { .. } => "RSASSA",
            Signature::Ecdsa { .. } => "ECDSA P-256",
        };
        let records = Records::new(path, &bundle.log.data.0, bundle.log.from).collect::<Result<Vec<_>, _>>()?;
        let found = bundle
            .log
            .from
            .saturating_add(u64::try_from(records.len()).unwrap_or(u64::MAX));
        if found != bundle.log.records {
            return Err(InspectError::Count {
                path: path.to_owned(),
                wanted: bundle.log.records,
                found,
            });
        }
        let boot_log = match &bundle.boot_log {
            None => None,
            Some(raw) => {
                let parsed = bootlog::parse(&raw.0);
                Some(parsed.map_err(|cause| InspectError::BootLog {
                    path: path.to_owned(),
                    cause,
                })?)
            }
        };
        Ok(Self {
            bundle,
            attest,
            scheme,
            records,
            boot_log,
        })
    }

    fn to_text(&self) -> String {
        let Self { bundle, attest, .. } = self;
        let mut text = format!(
            "bundle version {}, boot {}: shown, not verified\n{}",
            bundle.version,
            bundle.boot_id,
            quote::to_text(attest, Some(self.scheme)),
        );
        for (bank, values) in &bundle.pcrs {
            for (index, value) in values {
                add(
                    &mut text,
                    format_args!("pcr {}:{index:<2} {}\n", bank.name(), hex::encode(&value.0)),
                );
            }
        }
        let log = &bundle.log;
        add(
            &mut text,
            format_args!(
                "log: records {} to {}, {} bytes\n",
                log.from,
                log.records,
                log.data.0.len()
            ),
        );
        self.records
            .iter()
            .for_each(|placed| text.push_str(&text::record(placed)));
        if let Some(log) = &self.boot_log {
            add(&mut text, format_args!("{log}"));
        }
        match self.ima_log() {
            None => {}
            Some(Ok(log)) => add(&mut text, format_args!("{log}")),
            Some(Err(error)) => add(&mut text, format_args!("IMA log: {error}\n")),
        }
        text
    }

    fn to_json(&self) -> Value {
        let Self { bundle, attest, .. } = self;
        let mut quote = quote::to_json(attest);
        if let Some(members) = quote.as_object_mut() {
            members.insert("scheme".to_owned(), self.scheme.into());
        }
        json!({
            "verified": false,
            "version": bundle.version,
            "boot_id": bundle.boot_id,
            "quote": quote,
            "pcrs": bundle.pcrs,
            "log": {
                "from": bundle.log.from,
                "records": bundle.log.records,
                "data": self.records.iter().map(|placed| cel::to_json(&placed.record)).collect::<Vec<_>>(),
            },
            "boot_log": self.boot_log.as_ref().map(BootLog::to_json),
            "ima_log_bytes": bundle.ima_log.as_ref().map(|log| log.0.len()),
            "ima_log": match self.ima_log() {
                None => Value::Null,
                Some(Ok(log)) => log.to_json(),
                Some(Err(error)) => json!({"error": error.to_string()}),
            },
        })
    }

    /// The kernel's list as the agent reads it, with SHA-1 template digests. One that is damaged is no reason not to show
    /// the rest.
    fn ima_log(&self) -> Option<Result<ImaLog<'_>, ImaLogError>> {
        let log = self.bundle.ima_log.as_ref()?;
        Some(imalog::parse(&log.0, Algorithm::Sha1))
    }
}

fn add(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _infallible = text.write_fmt(what);
}
