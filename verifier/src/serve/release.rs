//! A key request: fresh evidence in, a key wrapped to the asking TPM out, or a refusal that says why.
//!
//! The policy that decides is the one that the key store names for the key, never the one in the image's token.

use std::sync::PoisonError;
use std::time::Instant;

use assay_evidence::appraise::Appraisal;
use assay_evidence::binding::{Binding, Exporter};
use assay_evidence::ear::Submod;
use assay_evidence::jwe::Jwe;
use assay_evidence::release::{Secret, check_release_key, release as release_key};
use assay_evidence::replay::{HeldLog, ReplayedLog};
use assay_evidence::tpm::{AttestationKey, Public};
use assay_evidence::uuid::Uuid;
use assay_evidence::wire::{ChallengeRequest, ChallengeResponse, ReleaseRequest, ReleaseResponse};
use hyper::StatusCode;

use super::challenges::{Challenge, ChallengeError, LIFETIME, Purpose};
use super::http::Refusal;
use super::{Asking, Service};
use crate::judge::{appraise, attestation_key, fresh_nonce, no_policy, reason, reasons, verdict};
use crate::keystore::{KeyStoreError, StoredKey};
use crate::poll::write_down;
use crate::store::{Host, HostState, StoreError, Verdict};

/// Answers `POST /v1/release/challenge`.
pub(super) async fn challenge(
    asking: &Asking,
    host: &Host,
    request: ChallengeRequest,
) -> Result<ChallengeResponse, Refusal> {
    let (key_id, disk) = (request.key_id.clone(), request.disk_uuid);
    let outcome = open_challenge(asking, host, request).await;
    if let Err(refusal) = &outcome {
        audit(&host.pinned.name, &key_id, disk, Some(refusal));
    }
    outcome
}

async fn open_challenge(asking: &Asking, host: &Host, request: ChallengeRequest) -> Result<ChallengeResponse, Refusal> {
    let service = asking.service.clone();
    let id = parse_key_id(&request.key_id)?;
    let disk = *request.disk_uuid.as_bytes();
    let host_id = host.id;
    let key = on_pool(move || stored_key(&service, id)).await?;
    check_disk(&key, disk)?;
    let (held, length) = asking
        .service
        .store
        .run(move |s| s.held_log_head(host_id))
        .await
        .map_err(|e| Refusal::internal(&e))?;
    // Whatever is asked for, the answer is held against all that was seen of the host.
    let log_from = if is_current(&asking.service, host) {
        held.records
    } else {
        0
    };
    let nonce = fresh_nonce().map_err(|e| Refusal::internal(&e))?;
    let answer = ChallengeResponse {
        nonce,
        log_from,
        expires_in_s: u32::try_from(LIFETIME.as_secs()).unwrap_or(u32::MAX),
    };
    let purpose = Purpose {
        connection: asking.number,
        key_id: request.key_id,
        disk,
    };
    let mut open = asking.service.challenges.lock().unwrap_or_else(PoisonError::into_inner);
    open.open(purpose, Challenge { nonce, held, length }, Instant::now())
        .map_err(|e| Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too-many-challenges", e.to_string()))?;
    Ok(answer)
}

/// Whether what is held of a host is about its present boot, as far as the last poll knows. The challenge goes out
/// before the host says which boot it is in; asked from 0, it is right in any.
fn is_current(service: &Service, host: &Host) -> bool {
    let fresh = i64::try_from(service.poll_interval.as_secs())
        .unwrap_or(i64::MAX)
        .saturating_mul(3)
        .max(3);
    let reached = matches!(
        host.state,
        HostState::Trusted | HostState::Untrusted | HostState::Unknown
    );
    reached
        && host
            .last_quote
            .is_some_and(|at| crate::time::now().saturating_sub(at) <= fresh)
}

/// Answers `POST /v1/release`.
pub(super) async fn release(asking: &Asking, host: Host, request: ReleaseRequest) -> Result<ReleaseResponse, Refusal> {
    let (name, key_id, disk) = (host.pinned.name.clone(), request.key_id.clone(), request.disk_uuid);
    let outcome = match take_challenge(asking, &request) {
        Ok(challenge) => {
            let (service, exporter) = (asking.service.clone(), asking.peer.exporter);
            let judging = move || {
                Judging {
                    service: &service,
                    host: &host,
                    request: &request,
                    challenge,
                    exporter,
                }
                .judge()
            };
            on_pool(judging).await
        }
        Err(refusal) => Err(refusal),
    };
    audit(&name, &key_id, disk, outcome.as_ref().err());
    outcome.map(|jwe| ReleaseResponse { jwe })
}

/// Whatever comes of this request, its nonce is used.
fn take_challenge(asking: &Asking, request: &ReleaseRequest) -> Result<Challenge, Refusal> {
    let disk = *request.disk_uuid.as_bytes();
    let purpose = Purpose {
        connection: asking.number,
        key_id: request.key_id.clone(),
        disk,
    };
    let mut open = asking.service.challenges.lock().unwrap_or_else(PoisonError::into_inner);
    open.take(&purpose, Instant::now()).map_err(|e| match e {
        ChallengeError::Expired => Refusal::forbidden("challenge-expired", e.to_string()),
        ChallengeError::None | ChallengeError::TooMany => Refusal::forbidden("no-challenge", e.to_string()),
    })
}

/// The journal's line on a key request: who, which key, which disk, what became of it.
fn audit(host: &str, key_id: &str, disk: Uuid, refusal: Option<&Refusal>) {
    let key_id = shown(key_id);
    match refusal {
        None => tracing::info!("release: host {host} key {key_id:?} disk {disk}: released"),
        Some(Refusal {
            code, message, reasons, ..
        }) => {
            let first = reasons.first().map(String::as_str).unwrap_or_default();
            tracing::info!("release: host {host} key {key_id:?} disk {disk}: refused, {code}: {message} {first}");
        }
    }
}

/// Everything that one judgement takes. Blocks: it reads the database and hashes a log.
struct Judging<'a> {
    service: &'a Service,
    host: &'a Host,
    request: &'a ReleaseRequest,
    challenge: Challenge,
    exporter: Exporter,
}

impl Judging<'_> {
    fn judge(&self) -> Result<Jwe, Refusal> {
        let key = stored_key(self.service, parse_key_id(&self.request.key_id)?)?;
        check_disk(&key, *self.request.disk_uuid.as_bytes())?;
        let ak = attestation_key(self.host).map_err(|e| Refusal::internal(&e))?;
        let name = Public::parse(self.request.release_key.public.as_ref())
            .map_err(|e| refused("release-key", &e))?
            .name();
        let binding = Binding::Release {
            nonce: &self.challenge.nonce,
            exporter: &self.exporter,
            key_name: &name,
            disk: *self.request.disk_uuid.as_bytes(),
            key_id: &self.request.key_id,
        };
        let log = self.replay(&ak, &binding)?;
        let appraisal = self.appraise(&log, &key)?;
        let target = check_release_key(&log, &ak, &binding, &self.request.release_key)
            .map_err(|e| refused("release-key", &e))?;
        self.service
            .store
            .keep_log(self.host.id, &log.into_held())
            .map_err(|e| Refusal::internal(&e))?;
        self.check_tags(&key, &self.still_enrolled()?, &appraisal)?;
        let secret = Secret::new(key.passphrase.expose().to_vec());
        release_key(&appraisal, &target, &self.request.key_id, &secret).map_err(|e| Refusal::internal(&e))
    }

    /// Sending and judging evidence takes time, in which an operator may have removed the host.
    fn still_enrolled(&self) -> Result<Host, Refusal> {
        match self.service.store.host(&self.host.pinned.name) {
            Ok(now) if now.id == self.host.id => Ok(now),
            Ok(_) | Err(StoreError::NoSuchHost(_)) => Err(Refusal::forbidden(
                "host-removed",
                format!("host {} was removed while it asked", self.host.pinned.name),
            )),
            Err(e) => Err(Refusal::internal(&e)),
        }
    }

    /// What the key demands of hosts beside its policy.
    fn check_tags(&self, key: &StoredKey, host: &Host, appraisal: &Appraisal) -> Result<(), Refusal> {
        let has = |tag: &&String| host.tags.contains(*tag) || appraisal.tags().contains(*tag);
        let missing: Vec<_> = key
            .info
            .tags
            .iter()
            .filter(|tag| !has(tag))
            .map(String::as_str)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let message = format!(
            "key {} is for hosts that are tagged {}, which {} is not",
            key.info.key_id,
            missing.join(" and "),
            host.pinned.name
        );
        Err(Refusal::forbidden("missing-tags", message))
    }

    /// Evidence that answers our challenge, on this connection, for this release key, disk and key id.
    fn replay(&self, ak: &AttestationKey, binding: &Binding<'_>) -> Result<ReplayedLog, Refusal> {
        let quote = self
            .request
            .bundle
            .verify_taking(ak, binding, self.held()?)
            .map_err(|e| refused("evidence", &e))?;
        quote.replay(self.host.pinned.pcr).map_err(|e| {
            // The host signed it, freshly, for us: that its log does not lead there is the host's own fault.
            let reasons = vec![reason(&e)];
            let verdict = Verdict {
                state: HostState::Untrusted,
                submod: Submod::bad_evidence(reasons.clone()),
                reasons,
                notes: Vec::new(),
                quoted: None,
            };
            match write_down(&self.service.store, self.host, &verdict) {
                Ok(()) => refused("evidence", &e),
                Err(e) => Refusal::internal(&e),
            }
        })
    }

    /// What was held when the challenge went out.
    fn held(&self) -> Result<HeldLog, Refusal> {
        let then = self.challenge.held.clone();
        // Another boot's log comes whole: of what is held, the counters alone bear on it.
        if self.challenge.length == 0 || self.request.bundle.boot_id != then.boot_id {
            return Ok(then);
        }
        let now = self
            .service
            .store
            .held_log(self.host.id)
            .map_err(|e| Refusal::internal(&e))?;
        let bytes = now
            .bytes
            .get(..self.challenge.length)
            .filter(|_| now.boot_id == then.boot_id);
        let gone = || {
            Refusal::forbidden(
                "no-challenge",
                "the host rebooted since the challenge: ask for a new one",
            )
        };
        Ok(HeldLog {
            bytes: bytes.ok_or_else(gone)?.to_vec(),
            ..then
        })
    }

    /// By the key's policy for the key, and by the host's for its state.
    fn appraise(&self, log: &ReplayedLog, key: &StoredKey) -> Result<Appraisal, Refusal> {
        let store = &self.service.store;
        let internal = |e: StoreError| Refusal::internal(&e);
        let by_host = appraise(log, store.policy(&self.host.pinned.policy).map_err(internal)?.as_ref());
        write_down(
            store,
            self.host,
            &verdict(log, &self.host.pinned.policy, by_host.as_ref()),
        )
        .map_err(internal)?;
        let by_key = match by_host {
            Some(appraisal) if key.info.policy == self.host.pinned.policy => Some(appraisal),
            _ => appraise(log, store.policy(&key.info.policy).map_err(internal)?.as_ref()),
        };
        match by_key {
            Some(appraisal) if appraisal.is_trusted() => Ok(appraisal),
            Some(appraisal) => {
                let message = format!(
                    "host {} does not meet policy {}",
                    self.host.pinned.name, key.info.policy
                );
                Err(Refusal::forbidden("untrusted", message).because(&reasons(&appraisal)))
            }
            None => {
                let message = format!(
                    "key {} is released by policy {}, which does not exist",
                    key.info.key_id, key.info.policy
                );
                Err(Refusal::forbidden("no-policy", message).because(&[no_policy(&key.info.policy)]))
            }
        }
    }
}

fn refused(code: &'static str, error: &dyn std::error::Error) -> Refusal {
    Refusal::forbidden(code, "the evidence is refused").because(&[reason(error)])
}

fn parse_key_id(text: &str) -> Result<Uuid, Refusal> {
    // The type knows one spelling for each id: the nonce and the quote are bound to the text.
    text.parse().map_err(|_| unknown_key(text))
}

fn stored_key(service: &Service, id: Uuid) -> Result<StoredKey, Refusal> {
    service.keys.get(id).map_err(|e| match e {
        KeyStoreError::NotFound { .. } => unknown_key(&id.to_string()),
        other => Refusal::internal(&other),
    })
}

/// A client's text, as much of it as a line takes.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

fn unknown_key(id: &str) -> Refusal {
    let shown = shown(id);
    Refusal::new(
        StatusCode::NOT_FOUND,
        "unknown-key",
        format!("this verifier has no key {shown:?}: was the image sealed by another one?"),
    )
}

fn check_disk(key: &StoredKey, disk: [u8; 16]) -> Result<(), Refusal> {
    if key.info.disk_uuid.as_bytes() == &disk {
        return Ok(());
    }
    let message = format!("key {} opens another disk than {}", key.info.key_id, Uuid::new(disk));
    Err(Refusal::forbidden("wrong-disk", message))
}

/// Runs blocking work on the thread pool.
async fn on_pool<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Refusal::internal(&e))?
}
