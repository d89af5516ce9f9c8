//! What is written down of key requests: signed in the audit log, and for people in the journal.

use assay_evidence::audit::{Event, Request};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::tpm::Public;
use assay_evidence::uuid::Uuid;
use assay_evidence::wire::MAX_VM;
use hyper::StatusCode;

use super::Service;
use super::http::Refusal;
use crate::store::Host;

/// A request, and what became of it.
pub(super) struct Record {
    request: Request,
}

/// What a release rests on.
pub(super) struct Grounds {
    /// The policy that was met.
    pub policy: String,
    /// The host's boot.
    pub boot_id: String,
    /// SHA-256 of what was quoted.
    pub quote_sha256: Sha256Digest,
    /// The lease, in seconds.
    pub lease_s: Option<u64>,
}

impl Record {
    pub(super) fn new(host: &Host, key_id: &str, disk: Uuid, vm: Option<&str>) -> Self {
        let ak_name = Public::parse(&host.pinned.ak_public).map(|ak| ak.name().to_string());
        Self {
            request: Request {
                host: host.pinned.name.clone(),
                ak_name: ak_name.unwrap_or_default(),
                key_id: shown(key_id),
                disk,
                vm: vm.map(|vm| vm.chars().take(MAX_VM).collect()),
            },
        }
    }

    /// Writes down that the key leaves. If that fails, it does not.
    pub(super) fn released(&self, service: &Service, grounds: Grounds) -> Result<(), Refusal> {
        let event = Event::Released {
            request: self.request.clone(),
            policy: grounds.policy,
            boot_id: grounds.boot_id,
            quote_sha256: grounds.quote_sha256,
            lease_s: grounds.lease_s,
        };
        service.audit.append(event).map_err(|error| {
            tracing::error!("{}", crate::cli::chain(&error));
            Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "no-audit",
                "the verifier cannot write its audit log, and no key leaves without a record; its journal says why",
            )
        })?;
        let Request { host, key_id, disk, .. } = &self.request;
        tracing::info!("release: host {host} key {key_id:?} disk {disk}: released");
        Ok(())
    }

    /// Writes down a refusal, which stands even if that fails. Blocks.
    pub(super) fn refused(&self, service: &Service, refusal: &Refusal) {
        let Refusal {
            code, message, reasons, ..
        } = refusal;
        let Request { host, key_id, disk, .. } = &self.request;
        let first = reasons.first().map(String::as_str).unwrap_or_default();
        tracing::info!("release: host {host} key {key_id:?} disk {disk}: refused, {code}: {message} {first}");
        let event = Event::Refused {
            request: self.request.clone(),
            code: (*code).to_owned(),
            message: message.clone(),
            reasons: reasons.clone(),
            unrecorded: 0,
        };
        if let Err(error) = service.audit.append_refusal(event) {
            tracing::error!("{}", crate::cli::chain(&error));
        }
    }
}

/// A client's text, as much of it as a line takes.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}
