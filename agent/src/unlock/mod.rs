//! Disk keys: from a sealed image to `/dev/mapper/NAME`, and from a VHD's key hash to its key.
//!
//! The image's header, or the hash, says which key is wanted; [`machine`] decides what to do next, [`exchange`] does it: a challenge from
//! the verifier, evidence from the TPM, the wrapped key back, unwrapped by the TPM. Then libcryptsetup ([`luks`]) uses it, or the storage
//! manager that asked gets it, and it is forgotten. [`verdict`] asks whether all this would be refused at present.
//! Hooks and commands reach all this through the local socket ([`socket`], [`api`]).

pub mod api;
mod claims;
pub mod client;
pub mod exchange;
pub mod guard;
pub mod look;
pub mod luks;
pub mod machine;
pub mod socket;
pub mod turns;
pub mod url;
pub mod verdict;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use assay_evidence::terms::OnLoss;
use assay_evidence::token::TokenError;
use assay_evidence::uuid::Uuid;
use assay_evidence::vhd::KeyHash;
use zeroize::Zeroizing;

use self::claims::Claims;
use self::client::ClientError;
use self::exchange::{Exchange, Granted, Wanted};
use self::luks::{DiskError, DiskThreads, Header};
use self::machine::Refusal;
use self::turns::Turns;
use crate::bundle::{Source, SourceError};
use crate::join::{JoinError, Joined};
use crate::leases::{DiskState, Leases, OpenDisk};
use crate::tpm::{Handle, TpmError};

/// Why a disk was not opened, or a key or verdict not had.
#[derive(Debug, thiserror::Error)]
pub enum UnlockError {
    /// This host has no verifier to ask.
    #[error("this host has joined no verifier: run `assay-agent join FILE` with the verifier's join file")]
    NotJoined,
    /// What the join left cannot be used.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The image, its header or the mapping.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The image names a verifier that is not ours.
    #[error("{image}: its key is not asked for")]
    Foreign {
        /// The image.
        image: PathBuf,
        /// Why.
        #[source]
        source: TokenError,
    },
    /// The host's own TLS identity cannot be used.
    #[error(transparent)]
    Tls(ClientError),
    /// The TPM failed, and not for a moment.
    #[error("the TPM could not vouch for this host")]
    Tpm(#[source] TpmError),
    /// The runtime log cannot be sent.
    #[error(
        "the evidence could not be put together; if the log is too long, wait until the verifier has polled this host"
    )]
    Evidence(#[source] SourceError),
    /// The path is not absolute: the daemon's folder is not the caller's.
    #[error("{0} is not an absolute path")]
    RelativePath(PathBuf),
    /// What came out of the wrapped key cannot be a passphrase of ours.
    #[error("the verifier's answer does not hold a disk key")]
    NotAKey(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer holds another key than was asked for.
    #[error("the verifier's answer holds another key than {wanted}")]
    OtherKey {
        /// The key id of the image's token.
        wanted: String,
    },
    /// The answer is not the key that belongs to the hash.
    #[error("the verifier's answer is not the key with hash {wanted}: it is not given out")]
    OtherHash {
        /// The hash that was asked by.
        wanted: KeyHash,
    },
    /// Another request is about it.
    #[error(
        "{image}, or another disk as /dev/mapper/{name}, is being opened at this moment: wait for that, then look what is open"
    )]
    UnderWay {
        /// The image.
        image: PathBuf,
        /// The mapping's name.
        name: String,
    },
    /// Others asked for keys all the time.
    #[error("other disks' keys were asked for all the time, and {} s were over before this one's turn: try again", .0.as_secs())]
    Busy(Duration),
    /// The machine gave up.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Opens disks for this host.
#[derive(Clone)]
pub struct Unlocker {
    state_dir: PathBuf,
    default_timeout: Duration,
    tpm: Handle,
    source: Source,
    disks: DiskThreads,
    leases: Leases,
    turns: Turns,
    claims: Claims,
}

impl Unlocker {
    /// Prepares to open disks; the join state is read anew for each of them. Starts the threads that open disks.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn new(
        state_dir: PathBuf,
        default_timeout: Duration,
        tpm: Handle,
        source: Source,
        leases: Leases,
    ) -> std::io::Result<Self> {
        leases.opening_is_over();
        forget_closed(&leases);
        Ok(Self {
            state_dir,
            default_timeout,
            tpm,
            source,
            disks: DiskThreads::start(leases.run_dir())?,
            leases,
            turns: Turns::default(),
            claims: Claims::default(),
        })
    }

    /// Opens a sealed image and returns its device.
    ///
    /// # Errors
    /// Any [`UnlockError`]; nothing is left half open.
    pub async fn unlock(&self, request: api::UnlockRequest) -> Result<PathBuf, UnlockError> {
        if !request.image.is_absolute() {
            return Err(UnlockError::RelativePath(request.image));
        }
        // What needs neither network nor TPM is refused first.
        let header = self.disks.read(request.image.clone()).await?;
        let joined = Joined::load(&self.state_dir)?.ok_or(UnlockError::NotJoined)?;
        let membership = &joined.membership;
        let verifiers = header
            .token
            .allowed_verifiers(membership.verifiers(), &membership.ca_spki())
            .map_err(|source| UnlockError::Foreign {
                image: request.image,
                source,
            })?;
        // A disk that waits without its key gets it back under the name that it has.
        let waits = self.leases.wiped(&Uuid::new(header.uuid));
        let name = match &waits {
            Some(name) => name.clone(),
            None => request.name.unwrap_or_else(|| header.default_name()),
        };
        let claim = self.claims.take(&header.uuid, &name);
        let _claim = claim.ok_or_else(|| UnlockError::UnderWay {
            image: header.image.clone(),
            name: name.clone(),
        })?;
        if waits.is_none() {
            self.disks.check_free(header.clone(), name.clone()).await?;
        }
        let within = self.within(request.timeout_s);
        let device = PathBuf::from("/dev/mapper").join(&name);
        let wanted = Wanted {
            key_id: header.token.key_id().to_owned(),
            disk: Uuid::new(header.uuid),
            header: Some(header.fingerprint),
            what: header.image.display().to_string(),
            vm: request.vm,
        };
        let granted = self.exchange(&joined, verifiers, wanted, within).await?;
        self.activate(header, name, waits.is_some(), granted).await?;
        tracing::info!(device = %device.display(), "disk opened");
        Ok(device)
    }

    /// Opens a disk, or gives one that waits its key back, and writes down that it is open.
    async fn activate(&self, header: Header, name: String, waits: bool, granted: Granted) -> Result<(), DiskError> {
        let entry = OpenDisk {
            name: name.clone(),
            image: header.image.clone(),
            disk: Uuid::new(header.uuid),
            key_id: header.token.key_id().to_owned(),
            state: DiskState::Opening,
            until: None,
            on_loss: OnLoss::default(),
            lost: Vec::new(),
            told: false,
        };
        // Before it is open: an agent that ends in between knows it when it starts again.
        self.leases.opening(entry, granted.lease.as_ref(), granted.asked);
        let opened = if waits {
            self.disks.resume_with(header, name.clone(), granted.key).await
        } else {
            self.disks.open(header, name.clone(), granted.key).await
        };
        match (&opened, waits) {
            (Ok(()), _) => self.leases.is_now(&name, DiskState::Open),
            (Err(_), true) => self.leases.is_now(&name, DiskState::Wiped),
            (Err(_), false) => self.leases.closed(&name),
        }
        opened
    }

    /// The key of an encrypted VHD, for the storage manager that is about to open it. Any of this host's verifiers may have it.
    ///
    /// # Errors
    /// Any [`UnlockError`] but those of disks and tokens.
    pub async fn vhd_key(&self, request: api::VhdKeyRequest) -> Result<Zeroizing<Vec<u8>>, UnlockError> {
        let hash = request.key_hash;
        let joined = Joined::load(&self.state_dir)?.ok_or(UnlockError::NotJoined)?;
        let wanted = Wanted {
            key_id: hash.key_id().to_string(),
            disk: request.vdi_uuid,
            header: None,
            what: format!("VDI {}", request.vdi_uuid),
            vm: None,
        };
        let verifiers = joined.membership.verifiers().to_vec();
        let within = self.within(request.timeout_s);
        // The storage manager has it from then on: there is nothing that a lease could take back, and the key store knows that.
        let Granted { key, .. } = self.exchange(&joined, verifiers, wanted, within).await?;
        // The id has but a part of the hash, and a key that the storage manager would take for another one writes garbage.
        if KeyHash::of(&key) != Ok(hash) {
            return Err(UnlockError::OtherHash { wanted: hash });
        }
        tracing::info!(vdi = %request.vdi_uuid, key_hash = %hash, "VHD key given to the storage manager");
        Ok(key)
    }

    /// How this host stands with its verifier.
    ///
    /// # Errors
    /// [`UnlockError::NotJoined`], [`UnlockError::Join`], [`UnlockError::Tls`], [`UnlockError::Refused`].
    pub async fn verdict(&self, request: api::VerdictRequest) -> Result<api::VerdictResponse, UnlockError> {
        let joined = Joined::load(&self.state_dir)?.ok_or(UnlockError::NotJoined)?;
        verdict::ask(&joined, self.within(request.timeout_s)).await
    }

    /// Asks for a key, in its turn.
    async fn exchange(
        &self,
        joined: &Joined,
        verifiers: Vec<String>,
        wanted: Wanted,
        within: Duration,
    ) -> Result<Granted, UnlockError> {
        let start = Instant::now();
        let turn = self.turns.take(within).await.ok_or(UnlockError::Busy(within))?;
        let verifiers = self.turns.order(verifiers, Instant::now());
        let parts = (self.tpm.clone(), self.source.clone(), self.turns.clone());
        let exchange = Exchange::new(joined, verifiers, wanted, parts)?;
        exchange.run(turn, start, within).await
    }

    fn within(&self, timeout_s: Option<u64>) -> Duration {
        timeout_s.map_or(self.default_timeout, Duration::from_secs)
    }

    /// Closes a disk that was opened from a sealed image.
    ///
    /// # Errors
    /// [`UnlockError::Disk`].
    pub async fn lock(&self, name: String) -> Result<(), UnlockError> {
        self.disks.close(name.clone(), self.leases.disk(&name)).await?;
        self.leases.closed(&name);
        tracing::info!(%name, "disk closed");
        Ok(())
    }

    /// Does with open disks what is due when their keys are lost, for as long as the daemon runs.
    pub async fn guard(self) -> std::convert::Infallible {
        guard::guard(self.leases, self.disks).await
    }
}

/// Forgets disks that somebody closed without the agent.
fn forget_closed(leases: &Leases) {
    leases.retain(|disk| luks::is_open(disk.disk.as_bytes(), &disk.name));
}
