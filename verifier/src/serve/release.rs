//! A key request: fresh evidence in, a key wrapped to the asking TPM out, or a refusal that says why.
//!
//! The policy that decides is the one that the key store names for the key, never the one in the image's token.

use std::sync::PoisonError;
use std::time::Instant;

use assay_evidence::appraise::Appraisal;
use assay_evidence::binding::{Binding, Exporter};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::ear::Submod;
use assay_evidence::release::{Secret, check_release_key, release as release_key};
use assay_evidence::replay::{HeldLog, ReplayedLog};
use assay_evidence::terms::{Terms, Unmet};
use assay_evidence::tpm::{AttestationKey, Public};
use assay_evidence::uuid::Uuid;
use assay_evidence::wire::{ChallengeRequest, ChallengeResponse, Lease, ReleaseRequest, ReleaseResponse};
use hyper::StatusCode;

use super::challenges::{Challenge, ChallengeError, LIFETIME, Purpose};
use super::http::Refusal;
use super::record::{Grounds, Record, shown};
use super::{Asking, Service};
use crate::judge::{appraise, attestation_key, fresh_nonce, missing_tags, no_policy, reason, reasons, verdict};
use crate::keystore::{KeyInfo, KeyKind, KeyStoreError, SourceError};
use crate::poll::write_down;
use crate::store::{Host, HostState, StoreError, Taking, Verdict};
use crate::time::unix_now;

/// Answers `POST /v1/release/challenge`.
pub(super) async fn challenge(
    asking: &Asking,
    host: &Host,
    request: ChallengeRequest,
) -> Result<ChallengeResponse, Refusal> {
    let record = Record::new(host, &request.key_id, request.disk_uuid, None);
    match open_challenge(asking, host, request).await {
        Ok(answer) => Ok(answer),
        Err(refusal) => Err(write_refusal(asking, record, refusal).await),
    }
}

async fn open_challenge(asking: &Asking, host: &Host, request: ChallengeRequest) -> Result<ChallengeResponse, Refusal> {
    let service = asking.service.clone();
    let id = parse_key_id(&request.key_id)?;
    let disk = *request.disk_uuid.as_bytes();
    let host_id = host.id;
    let key = on_pool(move || described_key(&service, id)).await?;
    check_disk(&key, disk)?;
    check_header(&key, request.header_sha256)?;
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
    let record = Record::new(&host, &request.key_id, request.disk_uuid, request.vm.as_deref());
    let challenge = match take_challenge(asking, &request) {
        Ok(challenge) => challenge,
        Err(refusal) => return Err(write_refusal(asking, record, refusal).await),
    };
    let (service, exporter) = (asking.service.clone(), asking.peer.exporter);
    let judging = move || {
        let judging = Judging {
            service: &service,
            host: &host,
            request: &request,
            challenge,
            exporter,
        };
        judging
            .judge(&record)
            .inspect_err(|refusal| record.refused(&service, refusal))
    };
    on_pool(judging).await
}

/// Writes a refusal down, and gives it back.
async fn write_refusal(asking: &Asking, record: Record, refusal: Refusal) -> Refusal {
    let (service, written) = (asking.service.clone(), refusal.clone());
    let writing = move || {
        record.refused(&service, &written);
        Ok(())
    };
    match on_pool(writing).await {
        Ok(()) => refusal,
        Err(failed) => failed,
    }
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

/// Everything that one judgement takes. Blocks: it reads the database and hashes a log.
struct Judging<'a> {
    service: &'a Service,
    host: &'a Host,
    request: &'a ReleaseRequest,
    challenge: Challenge,
    exporter: Exporter,
}

impl Judging<'_> {
    fn judge(&self, record: &Record) -> Result<ReleaseResponse, Refusal> {
        let key = described_key(self.service, parse_key_id(&self.request.key_id)?)?;
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
        let boot_id = log.boot_id().to_owned();
        self.service
            .store
            .keep_log(self.host.id, &log.into_held())
            .map_err(|e| Refusal::internal(&e))?;
        let host = self.still_enrolled()?;
        self.check_tags(&key, &host, &appraisal)?;
        self.check_terms(&key, &host)?;
        let secret = self.secret(&key)?;
        let jwe = release_key(&appraisal, &target, &self.request.key_id, &secret).map_err(|e| Refusal::internal(&e))?;
        self.take(&key)?;
        let lease = key.terms.are_watched().then_some(Lease {
            seconds: key.terms.lease_s,
            on_loss: key.terms.on_loss,
        });
        // Before it leaves: no record, no key.
        let grounds = Grounds {
            policy: key.policy,
            boot_id,
            quote_sha256: Sha256Digest::of(self.request.bundle.quote.attest.as_ref()),
            lease_s: key.terms.lease_s,
        };
        record.released(self.service, grounds)?;
        Ok(ReleaseResponse { jwe, lease })
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

    /// The secret, fetched for nobody before the host has been found good.
    fn secret(&self, key: &KeyInfo) -> Result<Secret, Refusal> {
        let stored = self
            .service
            .keys
            .get(key.key_id)
            .map_err(|e| not_given(key.key_id, e))?;
        if stored.info != *key {
            let message = format!("key {} was changed while the host asked for it: ask again", key.key_id);
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "key-changed", message));
        }
        Ok(Secret::new(stored.passphrase.expose().to_vec()))
    }

    /// What the key demands of hosts beside its policy.
    fn check_tags(&self, key: &KeyInfo, host: &Host, appraisal: &Appraisal) -> Result<(), Refusal> {
        match missing_tags(key, host, appraisal.tags()) {
            None => Ok(()),
            Some(message) => Err(Refusal::forbidden("missing-tags", message)),
        }
    }

    /// Whether this host may have it now.
    fn check_terms(&self, key: &KeyInfo, host: &Host) -> Result<(), Refusal> {
        key.terms
            .allow(&host.pinned.policy, unix_now())
            .map_err(|unmet| not_by_terms(key, &unmet))
    }

    /// Writes down who holds the key from now on, if that is to be watched; or refuses, when as many others hold it as may.
    fn take(&self, key: &KeyInfo) -> Result<(), Refusal> {
        let Terms {
            lease_s, hosts_at_once, ..
        } = key.terms;
        if !key.terms.are_watched() {
            return Ok(());
        }
        let now = crate::time::now();
        let taking = Taking {
            key_id: key.key_id,
            disk: self.request.disk_uuid,
            now,
            lease_s,
            hosts_at_once,
        };
        let taken = self.service.store.take_key(self.host.id, &taking);
        taken.map_err(|e| Refusal::internal(&e))?.map_err(|first| {
            let unmet = Unmet::TooManyHosts {
                limit: hosts_at_once.unwrap_or(0),
                wait_s: u64::try_from(first.saturating_sub(now)).unwrap_or(0),
            };
            not_by_terms(key, &unmet)
        })
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
                tags: Vec::new(),
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
    fn appraise(&self, log: &ReplayedLog, key: &KeyInfo) -> Result<Appraisal, Refusal> {
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
            Some(appraisal) if key.policy == self.host.pinned.policy => Some(appraisal),
            _ => appraise(log, store.policy(&key.policy).map_err(internal)?.as_ref()),
        };
        match by_key {
            Some(appraisal) if appraisal.is_trusted() => Ok(appraisal),
            Some(appraisal) => {
                let message = format!("host {} does not meet policy {}", self.host.pinned.name, key.policy);
                Err(Refusal::forbidden("untrusted", message).because(&reasons(&appraisal)))
            }
            None => {
                let message = format!(
                    "key {} is released by policy {}, which does not exist",
                    key.key_id, key.policy
                );
                Err(Refusal::forbidden("no-policy", message).because(&[no_policy(&key.policy)]))
            }
        }
    }
}

fn not_by_terms(key: &KeyInfo, unmet: &Unmet) -> Refusal {
    Refusal::forbidden(unmet.code(), format!("key {}: {unmet}", key.key_id))
}

fn refused(code: &'static str, error: &dyn std::error::Error) -> Refusal {
    Refusal::forbidden(code, "the evidence is refused").because(&[reason(error)])
}

fn parse_key_id(text: &str) -> Result<Uuid, Refusal> {
    // The type knows one spelling for each id: the nonce and the quote are bound to the text.
    text.parse().map_err(|_| unknown_key(text))
}

fn described_key(service: &Service, id: Uuid) -> Result<KeyInfo, Refusal> {
    service.keys.describe(id).map_err(|e| not_given(id, e))
}

/// Why there is no key, as the host is told: whether to come again, or to ask another verifier.
fn not_given(id: Uuid, error: KeyStoreError) -> Refusal {
    let (later, never) = (StatusCode::SERVICE_UNAVAILABLE, StatusCode::NOT_FOUND);
    let (status, code, what) = match &error {
        KeyStoreError::NotFound { .. } => return unknown_key(&id.to_string()),
        KeyStoreError::OtherHalf { .. } => (never, "key-source-refused", "has another key's half"),
        KeyStoreError::Source(source) => match source {
            SourceError::Sealed { .. } => (later, "key-source-sealed", "is sealed"),
            source if source.is_transient() => (later, "key-source-unreachable", "cannot be asked now"),
            SourceError::Login { .. } | SourceError::SecretId { .. } => {
                (never, "key-source-login", "refuses this verifier")
            }
            SourceError::Denied { .. } => (never, "key-source-denied", "does not let this verifier have it"),
            SourceError::Missing { .. } => (never, "key-source-missing", "does not have it any more"),
            _ => (never, "key-source-refused", "refuses to give it"),
        },
        other => return Refusal::internal(other),
    };
    tracing::error!("{}", crate::cli::chain(&error));
    Refusal::new(
        status,
        code,
        format!("the key source that has a half of key {id} {what}; the verifier's journal says more"),
    )
}

fn unknown_key(id: &str) -> Refusal {
    let shown = shown(id);
    Refusal::new(
        StatusCode::NOT_FOUND,
        "unknown-key",
        format!("this verifier has no key {shown:?}: was the image sealed by another one?"),
    )
}

fn check_disk(key: &KeyInfo, disk: [u8; 16]) -> Result<(), Refusal> {
    match key.kind {
        KeyKind::Luks if key.disk_uuid.as_bytes() == &disk => return Ok(()),
        // Snapshots and clones have UUIDs of their own; the host asks by what stands in each of them, the key's hash.
        KeyKind::Vhd(_) => return Ok(()),
        KeyKind::Luks => {}
    }
    let message = format!("key {} opens another disk than {}", key.key_id, Uuid::new(disk));
    Err(Refusal::forbidden("wrong-disk", message))
}

/// Another header under the same UUID would have the host read the disk in another way, with the right key.
fn check_header(key: &KeyInfo, seen: Option<Sha256Digest>) -> Result<(), Refusal> {
    if key.header.is_none() || key.header == seen {
        return Ok(());
    }
    let message = match seen {
        Some(_) => format!(
            "the header of disk {} is not the one that was sealed: somebody replaced or changed it; if it was the owner, \
             `assay-verifier image rotate IMAGE` makes a key for the image as it is now",
            key.disk_uuid
        ),
        None => {
            "this key is bound to the image's header, and the host does not say which header it sees: update its agent"
                .to_owned()
        }
    };
    Err(Refusal::forbidden("other-header", message))
}

/// Runs blocking work on the thread pool.
async fn on_pool<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Refusal::internal(&e))?
}
