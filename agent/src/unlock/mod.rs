//! Disk keys: from a sealed image to `/dev/mapper/NAME`.
//!
//! The image's header says which key it wants; [`machine`] decides what to do next, [`exchange`] does it: a challenge from the
//! verifier, evidence from the TPM, the wrapped key back, unwrapped by the TPM, used by libcryptsetup ([`luks`]), forgotten.
//! Hooks and commands reach all this through the local socket ([`socket`], [`api`]).

pub mod api;
pub mod client;
pub mod exchange;
pub mod luks;
pub mod machine;
pub mod socket;
pub mod url;

use std::path::PathBuf;
use std::time::Duration;

use assay_evidence::token::TokenError;

use self::client::ClientError;
use self::exchange::Exchange;
use self::luks::{DiskError, DiskThread};
use self::machine::Refusal;
use crate::bundle::{Source, SourceError};
use crate::join::{JoinError, Joined};
use crate::tpm::{Handle, TpmError};

/// Why a disk was not opened.
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
    disks: DiskThread,
}

impl Unlocker {
    /// Prepares to open disks; the join state is read anew for each of them. Starts the disk thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn new(state_dir: PathBuf, default_timeout: Duration, tpm: Handle, source: Source) -> std::io::Result<Self> {
        Ok(Self {
            state_dir,
            default_timeout,
            tpm,
            source,
            disks: DiskThread::start()?,
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
        let name = request.name.unwrap_or_else(|| header.default_name());
        self.disks.check_free(header.clone(), name.clone()).await?;
        let within = request.timeout_s.map_or(self.default_timeout, Duration::from_secs);
        let device = PathBuf::from("/dev/mapper").join(&name);
        let parts = (self.tpm.clone(), self.source.clone(), self.disks.clone());
        let exchange = Exchange::new(&joined, verifiers, header, name, parts)?;
        exchange.run(within).await?;
        tracing::info!(device = %device.display(), "disk opened");
        Ok(device)
    }

    /// Closes a disk that was opened from a sealed image.
    ///
    /// # Errors
    /// [`UnlockError::Disk`].
    pub async fn lock(&self, name: String) -> Result<(), UnlockError> {
        self.disks.close(name.clone()).await?;
        tracing::info!(%name, "disk closed");
        Ok(())
    }
}
