//! The TPM. This module alone imports tss-esapi, and one thread of it owns the connection.
//!
//! Everybody else has a [`Handle`]: it queues work for that thread and waits for the answer, with a deadline. So a slow quote
//! blocks no async task, and a TPM that hangs is an error with a name instead of a silent stop.

mod ak;
mod device;
mod ek;
mod error;
mod keys;
mod nv;
mod owner;
mod queue;
mod release;

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::quote::QUOTED_PCRS;
use zeroize::Zeroizing;

pub use self::ak::AkKind;
pub use self::ek::EkKind;
pub use self::error::TpmError;
use self::owner::Owner;
use self::queue::{Line, Queue};
use crate::log_view::{Advance, LogView, Snapshot};

/// Values of the PCRs in a quote and in a release key's policy: [`QUOTED_PCRS`] of the SHA-256 bank, in that order.
pub type QuotedValues = [[u8; 32]; QUOTED_PCRS.len()];

/// How long extends are held back for one release key, at most.
pub const RELEASE_HOLD: Duration = Duration::from_secs(10);

/// How long keys may take at start: an RSA primary key takes some discrete TPMs most of a minute.
const KEY_SETUP: Duration = Duration::from_secs(120);

/// Waiting callers give up this much later than the retries of a busy TPM, whose error says more.
/// tpm2-tss repeats a command by itself before it says that the TPM is busy, which on a loaded host takes its time.
const GRACE: Duration = Duration::from_secs(5);

/// How often the end of the TPM's thread is looked for.
const END_PAUSE: Duration = Duration::from_millis(2);

/// Where the TPM is and how to use it; `[tpm]` of the configuration.
#[derive(Clone, Debug)]
pub struct TpmConfig {
    /// `device:/dev/tpmrm0`, or any other TCTI that tss2 knows.
    pub tcti: String,
    /// The PCR that `measure` extends: 12, 13 or 14.
    pub pcr: u8,
    /// Persistent handle of the attestation key.
    pub ak_handle: u32,
    /// What it signs with.
    pub ak: AkKind,
    /// Which endorsement key identifies the TPM; none: the one that has a certificate, RSA where both or neither have.
    pub ek: Option<EkKind>,
    /// How long a command may take, waiting and retries included.
    pub timeout: Duration,
}

/// What the TPM is and which keys it answers with; all public.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Endorsement key, TPMT_PUBLIC.
    pub ek_public: Vec<u8>,
    /// Its kind.
    pub ek_kind: EkKind,
    /// Its certificate as the maker stored it (DER), if there is one, and behind it those that lead towards the maker's root, as far as
    /// the TPM has them.
    pub ek_certificate: Option<Vec<u8>>,
    /// Attestation key, TPMT_PUBLIC.
    pub ak_public: Vec<u8>,
    /// What it signs with.
    pub ak_kind: AkKind,
    /// Its kind before this connection, if that was another one: verifiers know the former key.
    pub ak_replaced: Option<AkKind>,
    /// TPM_PT_MANUFACTURER, four letters.
    pub manufacturer: String,
    /// TPM_PT_FIRMWARE_VERSION_1 and _2 in hexadecimal.
    pub firmware: String,
    /// Active PCR banks that the log has digests for.
    pub banks: Vec<Algorithm>,
}

/// A quote and what belongs to it.
#[derive(Clone, Debug)]
pub struct QuoteOut {
    /// TPMS_ATTEST.
    pub attest: Vec<u8>,
    /// TPMT_SIGNATURE over it.
    pub signature: Vec<u8>,
    /// The PCRs, as quoted.
    pub pcrs: QuotedValues,
    /// The log that the quoted PCR stands for; the same as the extraData's closure was given.
    pub log: Snapshot,
}

/// Proof that a release key lives in this TPM, in this PCR state.
#[derive(Clone, Debug)]
pub struct ReleaseEvidence {
    /// The quote.
    pub quote: QuoteOut,
    /// TPMS_ATTEST of TPM2_Certify for the release key, with the same extraData as the quote.
    pub certify_attest: Vec<u8>,
    /// TPMT_SIGNATURE over it.
    pub certify_signature: Vec<u8>,
}

/// One digest a bank, for TPM2_PCR_Extend.
pub type BankDigests = Vec<(Algorithm, Vec<u8>)>;

type Work = Box<dyn FnOnce(&mut Owner) + Send>;

/// Access to the TPM; cheap to clone. The thread ends when the last handle is gone.
#[derive(Clone)]
pub struct Handle(Arc<Inner>);

struct Inner {
    queue: Arc<Queue<Work>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    identity: Identity,
    timeout: Duration,
    log: LogView,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl Handle {
    /// Connects, finds or makes endorsement and attestation key, and starts the thread that owns the TPM.
    /// Blocks until this is done.
    ///
    /// `log` is what quotes stand for: moved forward by [`Handle::extend_blocking`], read by [`Handle::quote`].
    ///
    /// # Errors
    /// Every variant of [`TpmError`] that names the configuration or the TPM's state.
    pub fn open(config: TpmConfig, log: LogView) -> Result<Self, TpmError> {
        let timeout = config.timeout;
        let queue = Arc::new(Queue::new());
        let (queue2, log2) = (Arc::clone(&queue), log.clone());
        let (stages, stage) = mpsc::sync_channel(2);
        let thread = std::thread::Builder::new()
            .name("tpm".into())
            .spawn(move || owner::run(&config, log2, &queue2, &stages))
            .map_err(|_| TpmError::Stopped)?;
        let mut limit = timeout + GRACE;
        let mut operation = "TPM2_GetCapability";
        loop {
            match stage.recv_timeout(limit) {
                Ok(owner::Stage::Connected) => (limit, operation) = (KEY_SETUP.max(timeout), "TPM2_CreatePrimary"),
                Ok(owner::Stage::Ready(identity)) => {
                    let identity = *identity;
                    return Ok(Self(Arc::new(Inner {
                        queue,
                        thread: Mutex::new(Some(thread)),
                        identity,
                        timeout,
                        log,
                    })));
                }
                Ok(owner::Stage::Failed(error)) => return Err(error),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(TpmError::Timeout {
                        operation,
                        after: limit,
                    });
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(TpmError::Stopped),
            }
        }
    }

    /// Takes no more work and waits until the thread has given the TPM back, but no longer than `limit`.
    ///
    /// For the end of the process: libraries in C clean up after themselves then, and no thread should be in the middle of
    /// them. One that waits for a TPM which hangs is left where it is.
    pub fn end(&self, limit: Duration) {
        self.0.queue.close();
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        let give_up = Instant::now() + limit;
        while !thread.is_finished() && Instant::now() < give_up {
            std::thread::sleep(END_PAUSE);
        }
        if thread.is_finished() {
            // It has nothing to say; a panic ends the process by itself.
            drop(thread.join());
        }
    }

    /// What the TPM is and which keys it answers with. Asked of the TPM once, at the start.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// The log that quotes of this handle stand for.
    #[must_use]
    pub fn log(&self) -> &LogView {
        &self.0.log
    }

    /// Extends the log's PCR in all active banks, then moves the log view forward, as one step.
    ///
    /// An extend that the TPM or its driver answers with an error is asked for again, at most twice, if the PCR shows that it
    /// did not happen; if the PCR shows that it did, the error is none.
    ///
    /// Only `measure` calls this. It waits for a release key's hold to end, if there is one.
    ///
    /// # Errors
    /// Any; when it is [`TpmError::Timeout`] the PCR may or may not have been extended.
    pub fn extend_blocking(&self, digests: BankDigests, advance: Option<Advance>) -> Result<(), TpmError> {
        let limit = self.extend_limit();
        self.ask_blocking(Line::Extend, "TPM2_PCR_Extend", limit, move |owner| {
            owner.extend(&digests, advance).map(drop)
        })
    }

    /// As [`Handle::extend_blocking`], but returns at once; `done` is called on the TPM thread with the result: how long
    /// the TPM took, waiting for a turn not included.
    ///
    /// # Errors
    /// [`TpmError::Stopped`] when it cannot even be queued; `done` is not called then.
    pub fn extend(
        &self,
        digests: BankDigests,
        advance: Option<Advance>,
        done: impl FnOnce(Result<Duration, TpmError>) + Send + 'static,
    ) -> Result<(), TpmError> {
        self.0.queue.push(
            Line::Extend,
            Box::new(move |owner| done(owner.extend(&digests, advance))),
        )
    }

    /// How long an extend may take: the command itself, and a release key's hold before it.
    #[must_use]
    pub fn extend_limit(&self) -> Duration {
        self.0.timeout + RELEASE_HOLD + GRACE
    }

    /// The log PCR's value in every active bank that the log has digests for.
    ///
    /// # Errors
    /// Any.
    pub fn read_pcr_blocking(&self) -> Result<BankDigests, TpmError> {
        let limit = self.0.timeout + GRACE;
        self.ask_blocking(Line::Command, "TPM2_PCR_Read", limit, Owner::read_log_pcr)
    }

    /// Recovers the secret of a credential that was made for this TPM's endorsement key and attestation key.
    ///
    /// `credential_blob` is a TPM2B_ID_OBJECT, `encrypted_secret` a TPM2B_ENCRYPTED_SECRET.
    ///
    /// # Errors
    /// [`TpmError::Refused`] when the credential is for another TPM or key.
    pub async fn activate(
        &self,
        credential_blob: Vec<u8>,
        encrypted_secret: Vec<u8>,
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        // May have to make the endorsement key anew.
        let limit = KEY_SETUP.max(self.0.timeout);
        self.ask(Line::Command, "TPM2_ActivateCredential", limit, move |owner| {
            owner.activate(&credential_blob, &encrypted_secret)
        })
        .await
    }

    /// Quotes [`QUOTED_PCRS`] of the SHA-256 bank. `extra_data` makes the qualifying data from the log as it is at that moment.
    ///
    /// # Errors
    /// [`TpmError::PcrsMoving`] when PCRs changed during every attempt, or any other.
    pub async fn quote(
        &self,
        extra_data: impl FnOnce(&Snapshot) -> [u8; 32] + Send + 'static,
    ) -> Result<QuoteOut, TpmError> {
        let limit = self.0.timeout + GRACE;
        self.ask(Line::Command, "TPM2_Quote", limit, move |owner| owner.quote(extra_data))
            .await
    }

    /// Makes a release key: P-256, in the NULL hierarchy, usable only while the quoted PCRs stay as they are.
    ///
    /// From now on extends are held back, until the [`Release`] is dropped or [`RELEASE_HOLD`] has passed.
    /// There is one release key at a time: a second caller waits for the first.
    ///
    /// # Errors
    /// Any.
    pub async fn release_begin(&self) -> Result<Release, TpmError> {
        let limit = self.0.timeout + RELEASE_HOLD + GRACE;
        let handle = self.clone();
        // The guard is made on the TPM thread, so that a caller that gave up leaves no hold behind.
        self.ask(Line::Begin, "TPM2_CreatePrimary", limit, move |owner| {
            let key = owner.release_begin()?;
            Ok(Release {
                handle,
                id: key.id,
                public: key.public,
                name: key.name,
            })
        })
        .await
    }

    /// Sends the TPM one cheap command: whether it still answers.
    ///
    /// # Errors
    /// Any.
    pub async fn ping(&self) -> Result<(), TpmError> {
        let limit = self.0.timeout + GRACE;
        self.ask(Line::Command, "TPM2_GetCapability", limit, Owner::ping).await
    }

    /// How long the TPM has worked since it was opened, each command from its start to its answer.
    #[must_use]
    pub fn worked(&self) -> Duration {
        self.0.queue.worked()
    }

    /// Fails when the thread has been working on one command for longer than any may take.
    ///
    /// # Errors
    /// [`TpmError::Timeout`].
    pub fn check(&self) -> Result<(), TpmError> {
        let limit = KEY_SETUP.max(self.0.timeout) + GRACE;
        match self.0.queue.busy_since() {
            Some(since) if since.elapsed() > limit => Err(TpmError::Timeout {
                operation: "a command",
                after: limit,
            }),
            _ => Ok(()),
        }
    }

    async fn ask<T: Send + 'static>(
        &self,
        line: Line,
        operation: &'static str,
        limit: Duration,
        work: impl FnOnce(&mut Owner) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let give_up = Instant::now() + limit;
        let work: Work = Box::new(move |owner| {
            // Nobody waits any more: don't spend the TPM's time, and don't leave a release key behind.
            if !reply.is_closed() && Instant::now() < give_up {
                // A receiver that went away in between drops the answer, and with it a release key's guard.
                drop(reply.send(work(owner)));
            }
        });
        self.0.queue.push(line, work)?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(TpmError::Timeout {
                operation,
                after: limit,
            }),
        }
    }

    fn ask_blocking<T: Send + 'static>(
        &self,
        line: Line,
        operation: &'static str,
        limit: Duration,
        work: impl FnOnce(&mut Owner) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        let (reply, answer) = mpsc::sync_channel(1);
        let work: Work = Box::new(move |owner| {
            // An answer that comes too late: the caller has failed already.
            drop(reply.send(work(owner)));
        });
        self.0.queue.push(line, work)?;
        match answer.recv_timeout(limit) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(TpmError::Timeout {
                operation,
                after: limit,
            }),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(TpmError::Stopped),
        }
    }
}

/// A release key in the TPM. Dropping it flushes the key and lets extends go on.
pub struct Release {
    handle: Handle,
    id: u64,
    public: Vec<u8>,
    name: Vec<u8>,
}

impl Release {
    /// The key's TPMT_PUBLIC.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// The key's Name: nameAlg and digest of the public area.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// Certifies the key and quotes the PCRs that it is bound to, both over the same extraData.
    ///
    /// # Errors
    /// [`TpmError::PcrsMoving`] when a PCR changed since the key was made (IMA's): drop this and begin again.
    pub async fn attest(
        &self,
        extra_data: impl FnOnce(&Snapshot) -> [u8; 32] + Send + 'static,
    ) -> Result<ReleaseEvidence, TpmError> {
        let (id, limit) = (self.id, self.handle.0.timeout + GRACE);
        self.handle
            .ask(Line::Command, "TPM2_Certify", limit, move |owner| {
                owner.release_attest(id, extra_data)
            })
            .await
    }

    /// The shared x coordinate of the key and the point (`x`, `y`) of P-256, 32 bytes each. Blocks.
    ///
    /// The answer crosses the bus encrypted, in a session salted to this very key.
    ///
    /// # Errors
    /// [`TpmError::PcrsMoving`] when a PCR changed since the key was made, [`TpmError::ReleaseExpired`] when it took too long.
    pub fn ecdh_blocking(&self, x: [u8; 32], y: [u8; 32]) -> Result<Zeroizing<[u8; 32]>, TpmError> {
        let (id, limit) = (self.id, self.handle.0.timeout + GRACE);
        self.handle
            .ask_blocking(Line::Command, "TPM2_ECDH_ZGen", limit, move |owner| {
                owner.release_ecdh(id, x, y)
            })
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        let id = self.id;
        // If it cannot be queued the hold's deadline ends it.
        drop(
            self.handle
                .0
                .queue
                .push(Line::Command, Box::new(move |owner| owner.release_end(id))),
        );
    }
}

/// The Name of an object with nameAlg SHA-256 (TPM 2.0 Part 1, "Names").
fn sha256_name(public: &[u8]) -> Vec<u8> {
    let mut name = vec![0x00, 0x0b];
    name.extend_from_slice(Sha256Digest::of(public).as_bytes());
    name
}

/// Digest of digests as TPM2_Quote and TPM2_PolicyPCR make it: SHA-256 over the concatenated values.
fn pcr_digest(pcrs: &QuotedValues) -> [u8; 32] {
    *Sha256Digest::of(pcrs.as_flattened()).as_bytes()
}
