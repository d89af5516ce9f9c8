//! The thread that owns the TPM, and what it can do.

use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::device::{self, Device};
use super::keys::{self, Keys};
use super::queue::{Next, Queue};
use super::release::{ReleaseKey, ReleasePublic};
use super::{BankDigests, Identity, QuoteOut, RELEASE_HOLD, ReleaseEvidence, TpmConfig, TpmError, Work};
use crate::http::chain;
use crate::log_view::{Advance, LogView, Snapshot};

/// How often an extend is asked for again when it is certain that the failed one did nothing,
const EXTEND_ATTEMPTS: u32 = 3;

/// and how long the TPM and its driver are left alone before.
const EXTEND_PAUSE: Duration = Duration::from_millis(100);

/// What the thread says while it starts.
pub(super) enum Stage {
    /// The TPM answers; keys are next, and may take long.
    Connected,
    /// All is there.
    Ready(Box<Identity>),
    /// It is no use.
    Failed(TpmError),
}

/// The TPM, its keys and the log that they vouch for.
pub(super) struct Owner {
    device: Device,
    keys: Keys,
    pcr: u8,
    ak_handle: u32,
    /// The log's PCR as it must be, once it was read: nobody else extends it.
    shown: Option<BankDigests>,
    log: LogView,
    release: Option<Held>,
    releases: u64,
}

/// A release key, and until when extends wait for it.
struct Held {
    id: u64,
    key: ReleaseKey,
    until: Instant,
}

/// The thread's main function.
pub(super) fn run(config: &TpmConfig, log: LogView, queue: &Queue<Work>, stages: &SyncSender<Stage>) {
    let mut owner = match Owner::open(config, log, stages) {
        Ok(owner) => owner,
        Err(error) => {
            queue.close();
            drop(stages.send(Stage::Failed(error)));
            return;
        }
    };
    drop(stages.send(Stage::Ready(Box::new(owner.keys.identity.clone()))));
    loop {
        match queue.next(owner.release.as_ref().map(|held| held.until)) {
            Next::Work(work) => work(&mut owner),
            Next::HoldExpired => {
                tracing::warn!("a release key was not used in time: discarded, measuring goes on");
                owner.drop_release();
            }
            Next::Closed => {
                owner.drop_release();
                return;
            }
        }
    }
}

/// What a PCR that shows `before` shows after this extend; nothing when a bank is missing.
fn extended(before: &BankDigests, digests: &BankDigests) -> Option<BankDigests> {
    let digest = |wanted| {
        digests
            .iter()
            .find(|(bank, _)| *bank == wanted)
            .map(|(_, digest)| digest)
    };
    before
        .iter()
        .map(|(bank, value)| Some((*bank, bank.extend(value, digest(*bank)?))))
        .collect()
}

impl Owner {
    fn open(config: &TpmConfig, log: LogView, stages: &SyncSender<Stage>) -> Result<Self, TpmError> {
        device::pcr_handle(config.pcr)?;
        let mut device = Device::open(&config.tcti, config.timeout)?;
        drop(stages.send(Stage::Connected));
        let keys = keys::set_up(&mut device, config)?;
        Ok(Self {
            device,
            keys,
            pcr: config.pcr,
            ak_handle: config.ak_handle,
            shown: None,
            log,
            release: None,
            releases: 0,
        })
    }

    /// Returns how long the TPM took.
    pub(super) fn extend(&mut self, digests: &BankDigests, advance: Option<Advance>) -> Result<Duration, TpmError> {
        let began = Instant::now();
        let after = self.shown.as_ref().and_then(|before| extended(before, digests));
        let mut attempt = 1;
        while let Err(error) = self.device.extend(self.pcr, digests) {
            let happened = match (&error, &after) {
                (TpmError::Refused { .. }, Some(after)) if attempt < EXTEND_ATTEMPTS => self.has_happened(after),
                _ => None,
            };
            match happened {
                Some(true) => {
                    tracing::warn!(error = %chain(&error), "an extend came back as failed and has happened");
                    break;
                }
                Some(false) => {
                    tracing::warn!(error = %chain(&error), attempt, "an extend has failed and not happened: tried again");
                    attempt += 1;
                }
                None => return Err(error),
            }
        }
        self.shown = after;
        if let Some(advance) = advance {
            self.log.advance(advance);
        }
        Ok(began.elapsed())
    }

    /// Whether a failed extend has reached the PCR, which then shows `after`. `None` = nobody can tell.
    fn has_happened(&mut self, after: &BankDigests) -> Option<bool> {
        std::thread::sleep(EXTEND_PAUSE);
        let found = match self.device.read_pcr(self.pcr) {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "the connection to the TPM is made anew");
                let again = self.reconnect().and_then(|()| self.device.read_pcr(self.pcr));
                again
                    .inspect_err(
                        |error| tracing::warn!(error = %chain(error), "the PCR cannot be read after a failed extend"),
                    )
                    .ok()?
            }
        };
        match found == *after {
            true => Some(true),
            false => (self.shown.as_ref() == Some(&found)).then_some(false),
        }
    }

    fn reconnect(&mut self) -> Result<(), TpmError> {
        // A release key ends with the connection that made it.
        self.release = None;
        self.device.reconnect()?;
        keys::find_again(&mut self.device, &mut self.keys, self.ak_handle)
    }

    pub(super) fn read_log_pcr(&mut self) -> Result<BankDigests, TpmError> {
        let found = self.device.read_pcr(self.pcr)?;
        self.shown = Some(found.clone());
        Ok(found)
    }

    /// A command that the kernel's driver gave up on leaves a connection that takes no other: that is no reason to end.
    pub(super) fn ping(&mut self) -> Result<(), TpmError> {
        match self.device.ping() {
            Err(error @ TpmError::Refused { .. }) => {
                tracing::warn!(error = %chain(&error), "the TPM did not take a command: the connection to it is made anew");
                self.reconnect()?;
                self.device.ping()
            }
            answered => answered,
        }
    }

    pub(super) fn activate(
        &mut self,
        credential_blob: &[u8],
        encrypted_secret: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        keys::activate(&mut self.device, &self.keys, credential_blob, encrypted_secret)
    }

    pub(super) fn quote(&mut self, extra_data: impl FnOnce(&Snapshot) -> [u8; 32]) -> Result<QuoteOut, TpmError> {
        let log = self.log.snapshot();
        let quoted = self.device.quote(self.keys.ak, extra_data(&log))?;
        Ok(QuoteOut {
            attest: quoted.attest,
            signature: quoted.signature,
            pcrs: quoted.pcrs,
            log,
        })
    }

    pub(super) fn release_begin(&mut self) -> Result<ReleasePublic, TpmError> {
        self.drop_release();
        let (key, public) = ReleaseKey::create(&mut self.device)?;
        self.releases += 1;
        let id = self.releases;
        self.release = Some(Held {
            id,
            key,
            until: Instant::now() + RELEASE_HOLD,
        });
        Ok(ReleasePublic {
            id,
            name: super::sha256_name(&public),
            public,
        })
    }

    pub(super) fn release_attest(
        &mut self,
        id: u64,
        extra_data: impl FnOnce(&Snapshot) -> [u8; 32],
    ) -> Result<ReleaseEvidence, TpmError> {
        let log = self.log.snapshot();
        let extra_data = extra_data(&log);
        let ak = self.keys.ak;
        let (device, key) = self.held(id)?;
        let (certify_attest, certify_signature) = device.certify(key.handle(), ak, extra_data)?;
        // Those that the key is bound to, or this is in vain. With a key in it each command costs the kernel's resource manager
        // three more, so what is known is not read again.
        let quoted = device.quote_of(key.pcrs(), ak, extra_data)?;
        let quoted = quoted.ok_or(TpmError::PcrsMoving {
            operation: "TPM2_Quote",
            attempts: 1,
        })?;
        let quote = QuoteOut {
            attest: quoted.attest,
            signature: quoted.signature,
            pcrs: quoted.pcrs,
            log,
        };
        Ok(ReleaseEvidence {
            quote,
            certify_attest,
            certify_signature,
        })
    }

    pub(super) fn release_ecdh(&mut self, id: u64, x: [u8; 32], y: [u8; 32]) -> Result<Zeroizing<[u8; 32]>, TpmError> {
        let (device, key) = self.held(id)?;
        key.ecdh(device, x, y)
    }

    pub(super) fn release_end(&mut self, id: u64) {
        if self.release.as_ref().is_some_and(|held| held.id == id) {
            self.drop_release();
        }
    }

    fn held(&mut self, id: u64) -> Result<(&mut Device, &ReleaseKey), TpmError> {
        match &self.release {
            Some(held) if held.id == id => Ok((&mut self.device, &held.key)),
            _ => Err(TpmError::ReleaseExpired(RELEASE_HOLD)),
        }
    }

    fn drop_release(&mut self) {
        if let Some(held) = self.release.take() {
            held.key.flush(&mut self.device);
        }
    }
}
