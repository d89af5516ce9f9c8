//! The shell around [`Machine`]: carries out its steps with the network and the TPM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use assay_evidence::binding::Binding;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::jwe::{self, JweError};
use assay_evidence::tpm::Name;
use assay_evidence::uuid::Uuid;
use assay_evidence::wire::{
    B64, ChallengeRequest, ChallengeResponse, Lease, ReleaseKey, ReleaseRequest, ReleaseResponse,
};
use hyper::StatusCode;
use rustls::ClientConfig;
use zeroize::Zeroizing;

use super::UnlockError;
use super::client::{self, ClientError, Connection};
use super::machine::{Machine, Outcome, Step};
use super::turns::{self, Turn, Turns};
use super::url::VerifierUrl;
use crate::bundle::{Source, SourceError};
use crate::http::chain;
use crate::join::{JoinError, Joined};
use crate::leases::boot_seconds;
use crate::tpm::{self, RELEASE_HOLD, Release, TpmError};

/// A challenge is answered at once, or the verifier is as good as unreachable.
const CHALLENGE_TIMEOUT: Duration = Duration::from_secs(10);
/// A verifier that was reached gets so long for each answer, however little time is left.
const LEAST: Duration = Duration::from_secs(3);
/// The verifier's codes for a challenge that expired, was used, or was lost with a restart or a reboot.
const CHALLENGE_LOST: [&str; 2] = ["challenge-expired", "no-challenge"];

/// Longest log that goes along in full, in bytes.
const WHOLE_LOG: u64 = 4 * 1024 * 1024;

/// Which key is asked for, and for what.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its id at the verifier.
    pub key_id: String,
    /// The disk that it is to open: both sides bind the evidence to it.
    pub disk: Uuid,
    /// Fingerprint of the disk's LUKS header as it is seen here; a VHD has none.
    pub header: Option<Sha256Digest>,
    /// What the journal calls it.
    pub what: String,
    /// The machine that it is for, for the verifier's audit log.
    pub vm: Option<String>,
}

/// One request for a key in progress.
pub struct Exchange {
    verifiers: Vec<(String, VerifierUrl)>,
    tls: Arc<ClientConfig>,
    tpm: tpm::Handle,
    source: Source,
    turns: Turns,
    wanted: Wanted,
    progress: Progress,
}

/// A key that a verifier released.
pub struct Granted {
    /// The key.
    pub key: Zeroizing<Vec<u8>>,
    /// For how long, and what to do then.
    pub lease: Option<Lease>,
    /// When it was asked for, in seconds since boot: the lease is counted from there.
    pub asked: u64,
}

/// What the steps so far have brought; a step takes what it needs, so nothing is used twice.
#[derive(Default)]
struct Progress {
    connection: Option<Connection>,
    challenge: Option<ChallengeResponse>,
    proof: Option<(Release, ReleaseRequest)>,
    wrapped: Option<(Release, ReleaseResponse)>,
    key: Option<Zeroizing<Vec<u8>>>,
    lease: Option<Lease>,
    asked: u64,
    /// The verifier that is asked, and how long it has for each answer.
    verifier: String,
    share: Duration,
}

impl Exchange {
    /// Prepares a request for a key, asking `verifiers` in turn.
    ///
    /// # Errors
    /// [`UnlockError::Tls`] when the host's TLS identity cannot be used.
    pub fn new(
        joined: &Joined,
        verifiers: Vec<String>,
        wanted: Wanted,
        parts: (tpm::Handle, Source, Turns),
    ) -> Result<Self, UnlockError> {
        let tls = client::tls_config(joined).map_err(UnlockError::Tls)?;
        let parsed = verifiers.into_iter().map(|url| match VerifierUrl::parse(&url) {
            Ok(parsed) => Ok((url, parsed)),
            Err(source) => Err(JoinError::VerifierUrl {
                path: "join.json".into(),
                source,
            }),
        });
        let verifiers = parsed.collect::<Result<_, _>>()?;
        let (tpm, source, turns) = parts;
        Ok(Self {
            verifiers,
            tls,
            tpm,
            source,
            turns,
            wanted,
            progress: Progress::default(),
        })
    }

    /// Runs to the end: the key, authenticated as the one that was asked for, or the reason why not. The time that it may take is counted
    /// from `start`, when the key was asked for: it had to wait for its `turn` before.
    ///
    /// # Errors
    /// [`UnlockError::Refused`] when the machine gave up, others for what no retry can help.
    pub async fn run(mut self, turn: Turn, start: Instant, within: Duration) -> Result<Granted, UnlockError> {
        let mut turn = Some(turn);
        let names: Vec<String> = self.verifiers.iter().map(|(name, _)| name.clone()).collect();
        let (mut machine, mut step) = Machine::start(&names, within);
        loop {
            tracing::debug!(what = %self.wanted.what, ?step, after = ?start.elapsed(), "key request");
            let outcome = match step {
                Step::Connect(place) => self.connect(place, within.saturating_sub(start.elapsed())).await?,
                Step::Challenge => self.challenge().await?,
                Step::Prove => self.prove().await?,
                Step::Release => self.release().await?,
                Step::Unwrap => self.unwrap().await?,
                Step::Wait(pause) => {
                    // Others ask meanwhile: the verifiers that may have their keys are perhaps there. And nothing is left open for so long.
                    self.progress = Progress::default();
                    drop(turn.take());
                    tokio::time::sleep(pause).await;
                    // Whose time is over by then has its last try without a turn.
                    turn = self.turns.take(within.saturating_sub(start.elapsed())).await;
                    Outcome::Done
                }
                Step::Done => match self.progress.key.take() {
                    Some(key) => {
                        return Ok(Granted {
                            key,
                            lease: self.progress.lease,
                            asked: self.progress.asked,
                        });
                    }
                    None => out_of_order(),
                },
                Step::Refuse(refusal) => return Err(refusal.into()),
            };
            match &outcome {
                Outcome::Done => {}
                trouble => {
                    tracing::info!(what = %self.wanted.what, ?trouble, "key request: a step did not succeed")
                }
            }
            step = machine.next(outcome, start.elapsed());
        }
    }

    async fn connect(&mut self, place: usize, left: Duration) -> Result<Outcome, UnlockError> {
        let Some((name, url)) = self.verifiers.get(place) else {
            return Ok(out_of_order());
        };
        self.progress = Progress {
            verifier: name.clone(),
            share: turns::share(left, place, self.verifiers.len(), LEAST),
            ..Progress::default()
        };
        let limit = left.min(self.progress.share).max(turns::HANDSHAKE);
        match Connection::open(url, Arc::clone(&self.tls), limit).await {
            Ok(connection) => {
                self.turns.heard(name);
                self.progress.connection = Some(connection);
            }
            Err(error) => {
                self.turns.silent(name, Instant::now());
                return outcome_of(error);
            }
        }
        Ok(Outcome::Done)
    }

    async fn challenge(&mut self) -> Result<Outcome, UnlockError> {
        let request = ChallengeRequest {
            key_id: self.wanted.key_id.clone(),
            disk_uuid: self.wanted.disk,
            header_sha256: self.wanted.header,
        };
        let Some(connection) = &mut self.progress.connection else {
            return Ok(out_of_order());
        };
        let limit = CHALLENGE_TIMEOUT.min(self.progress.share);
        match connection.post("/v1/release/challenge", &request, limit).await {
            Ok(challenge) => self.progress.challenge = Some(challenge),
            Err(error) => return self.unanswered(error),
        }
        Ok(Outcome::Done)
    }

    /// From here until the key is unwrapped the TPM holds the agent's own extends back.
    async fn prove(&mut self) -> Result<Outcome, UnlockError> {
        let (Some(challenge), Some(connection)) = (self.progress.challenge.take(), &self.progress.connection) else {
            return Ok(out_of_order());
        };
        let release = match self.tpm.release_begin().await {
            Ok(release) => release,
            Err(error) => return state_or_failure(error),
        };
        let key_name = Name::parse(release.name()).map_err(|error| UnlockError::NotAKey(error.into()))?;
        let (nonce, exporter, disk) = (challenge.nonce, connection.exporter(), *self.wanted.disk.as_bytes());
        let key_id = self.wanted.key_id.clone();
        let attested = release
            .attest(move |log| {
                let binding = Binding::Release {
                    nonce: &nonce,
                    exporter: &exporter,
                    key_name: &key_name,
                    disk,
                    key_id: &key_id,
                };
                binding.digest(log.records, &log.head)
            })
            .await;
        let evidence = match attested {
            Ok(evidence) => evidence,
            Err(error) => return state_or_failure(error),
        };
        let release_key = ReleaseKey {
            public: B64(release.public().to_vec()),
            certify_attest: B64(evidence.certify_attest),
            certify_signature: B64(evidence.certify_signature),
        };
        let source = self.source.clone();
        // Keys are asked for seldom, and a host that was rebooted since it was last polled has another log than the one that
        // `log_from` counts in: the whole log fits both, as long as it is not long.
        let whole = evidence.quote.log.bytes <= WHOLE_LOG;
        let from = if whole { 0 } else { challenge.log_from };
        let bundle = blocking(move || source.bundle(evidence.quote, from, true)).await??;
        let request = ReleaseRequest {
            key_id: self.wanted.key_id.clone(),
            disk_uuid: self.wanted.disk,
            bundle,
            release_key,
            vm: self.wanted.vm.clone(),
        };
        self.progress.proof = Some((release, request));
        Ok(Outcome::Done)
    }

    async fn release(&mut self) -> Result<Outcome, UnlockError> {
        let Some((release, request)) = self.progress.proof.take() else {
            return Ok(out_of_order());
        };
        let Some(connection) = &mut self.progress.connection else {
            return Ok(out_of_order());
        };
        let asked = boot_seconds();
        // Later than the hold the release key is gone.
        let limit = RELEASE_HOLD.min(self.progress.share);
        let answer: Result<ReleaseResponse, _> = connection.post("/v1/release", &request, limit).await;
        match answer {
            Ok(response) => {
                self.progress.lease = response.lease;
                self.progress.asked = asked;
                self.progress.wrapped = Some((release, response));
            }
            Err(error) => return self.unanswered(error),
        }
        Ok(Outcome::Done)
    }

    /// One that takes connections and does not answer in time is asked last for a while, as one that is not reached.
    fn unanswered(&self, error: ClientError) -> Result<Outcome, UnlockError> {
        if matches!(error, ClientError::Timeout(_)) {
            self.turns.silent(&self.progress.verifier, Instant::now());
        }
        outcome_of(error)
    }

    async fn unwrap(&mut self) -> Result<Outcome, UnlockError> {
        let Some((release, response)) = self.progress.wrapped.take() else {
            return Ok(out_of_order());
        };
        let jwe = response.jwe;
        // The header is authenticated together with the key: after unwrapping, this id is what the verifier wrote.
        let answered = jwe.untrusted_key_id();
        // `release` goes into the closure and ends with it: extends go on before the disk is opened.
        let unwrapped =
            blocking(move || jwe::unwrap(&jwe, |point| release.ecdh_blocking(point.x, point.y).map(|z| *z))).await?;
        match unwrapped {
            Ok(key) if answered.as_deref() == Some(&*self.wanted.key_id) => self.progress.key = Some(key),
            Ok(_) => {
                return Err(UnlockError::OtherKey {
                    wanted: self.wanted.key_id.clone(),
                });
            }
            Err(JweError::Ecdh(error)) => return state_or_failure(error),
            Err(error) => return Err(UnlockError::NotAKey(error.into())),
        }
        Ok(Outcome::Done)
    }
}

/// Files and the TPM's blocking calls stay off the async thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, UnlockError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| UnlockError::NotAKey(error.into()))
}

/// The machine never asks for a step whose input is missing; if it did, starting over is right.
fn out_of_order() -> Outcome {
    Outcome::Unreachable("the steps were out of order".to_owned())
}

fn state_or_failure(error: TpmError) -> Result<Outcome, UnlockError> {
    if error.is_transient() {
        Ok(Outcome::StateChanged(chain(&error)))
    } else {
        Err(UnlockError::Tpm(error))
    }
}

/// By status, as HTTP's classes mean it; but a challenge that was lost on the way is no judgement on this host.
fn outcome_of(error: ClientError) -> Result<Outcome, UnlockError> {
    match error {
        ClientError::Status { code, .. } if CHALLENGE_LOST.contains(&code.as_str()) => Ok(Outcome::ChallengeLost),
        ClientError::Status {
            status,
            message,
            reasons,
            ..
        } => Ok(match status {
            StatusCode::NOT_FOUND => Outcome::KeyUnknown(message),
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Outcome::Unreachable(message),
            status if status.is_client_error() => Outcome::Refused { message, reasons },
            _ => Outcome::Unreachable(message),
        }),
        ClientError::Setup(_) | ClientError::Request(_) | ClientError::Encode(_) => Err(UnlockError::Tls(error)),
        unreachable => Ok(Outcome::Unreachable(chain(&unreachable))),
    }
}

impl From<SourceError> for UnlockError {
    fn from(error: SourceError) -> Self {
        Self::Evidence(error)
    }
}
