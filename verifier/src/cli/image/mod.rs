//! `assay-verifier image`: sealed disk images.

use std::path::{Path, PathBuf};

use assay_evidence::digest::Sha256Digest;
use assay_evidence::uuid::Uuid;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use thiserror::Error;

use super::{CliError, print};
use crate::config::{Config, StateDir};
use crate::keystore;
use crate::pki::ca_spki_sha256;
use crate::seal::{SealError, Terms};

mod inspect;
mod seal;
mod transfer;
mod unseal;
mod vhd;

/// `image …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum ImageCommand {
    /// Encrypt a disk image, and keep its key
    Seal(seal::SealArgs),
    /// Show what a sealed image says about itself, and whether the key store knows it
    Inspect {
        /// The sealed image
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the properties of a sealed image for an image store, as OpenStack's image encryption names them
    Properties {
        /// The sealed image
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Upload a sealed image to a plain HTTP store, or to OpenStack Glance
    Push(transfer::PushArgs),
    /// Download a sealed image; what broke off is gone on with
    Pull(transfer::PullArgs),
    /// Decrypt a sealed image into a raw one, with its key from the key store or with its recovery key
    Unseal(unseal::UnsealArgs),
    /// Give a sealed image a new key; the old one opens it as well until you confirm
    Rotate {
        /// The sealed image; hosts may have it open
        #[arg(value_name = "IMAGE")]
        image: PathBuf,
        /// End the rotation: wipe the old key's slot, and forget the old key
        #[arg(long)]
        confirm: bool,
    },
}

/// Why nothing was done to an image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Sealing, and all else that is done to images.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Image stores.
    #[error(transparent)]
    Store(#[from] crate::image_store::ImageStoreError),
    /// The token for an image store can't be read.
    #[error("can't read the token from {}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Half of an image is encrypted with the key, and it alone ends that.
    #[error(
        "an image that is being sealed in place needs key {0}: run the same `image seal --in-place` again to its end first, or give that \
         image up with --force"
    )]
    KeyNeeded(Uuid),
    /// Nothing says where the sealed image shall be.
    #[error("give the image to make: `image seal IN OUT`, or `image seal --in-place IN`")]
    NoOutput,
    /// The storage manager makes the disk.
    #[error(
        "an encrypted VHD is made by the pool's storage manager, not here: give no OUT, and no recovery key, for --format vhd"
    )]
    VhdOutput,
    /// Nothing on the pool imports it.
    #[error("{} is neither raw nor a VHD, which is all that `xe vdi-import` reads: convert it with `qemu-img convert -O raw` first", .0.display())]
    VhdInput(PathBuf),
    /// The storage manager would make it QCOW2, and store it in clear.
    #[error("{} has {size} bytes, more than a VHD holds ({limit}); the storage manager makes such a disk QCOW2, which it does not encrypt: nothing was kept", path.display())]
    VhdSize {
        /// The disk.
        path: PathBuf,
        /// Its length.
        size: u64,
        /// The largest.
        limit: u64,
    },
    /// The recovery key can't be written.
    #[error("can't write the recovery key to {}; choose a file that does not exist", path.display())]
    RecoveryFile {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The recovery key can't be read.
    #[error("can't read the recovery key from {}", path.display())]
    RecoveryRead {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file can't be a recovery key.
    #[error("{} has more than {limit} bytes, which no recovery key has; give the file that `image seal --recovery-file` made", path.display())]
    RecoveryLong {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
}

pub(super) fn run(state: &StateDir, command: ImageCommand) -> Result<(), CliError> {
    match command {
        ImageCommand::Seal(args) => seal::run(state, &args),
        ImageCommand::Inspect { image, json } => inspect::run(state, &image, json),
        ImageCommand::Properties { image, json } => inspect::properties(&image, json),
        ImageCommand::Push(args) => transfer::push(&args),
        ImageCommand::Pull(args) => transfer::pull(&args),
        ImageCommand::Unseal(args) => unseal::run(state, &args),
        ImageCommand::Rotate { image, confirm: false } => rotate(state, &image),
        ImageCommand::Rotate { image, confirm: true } => confirm(state, &image),
    }
}

fn rotate(state: &StateDir, image: &Path) -> Result<(), CliError> {
    let config = Config::load(state)?;
    let keys = keystore::open(state.path(), config.key_source.as_ref())?;
    let terms = Terms {
        policy: "",
        tags: &[],
        verifiers: &[config.url.to_string()],
        verifier_spki_sha256: Sha256Digest::new(ca_spki_sha256(state)?),
        recovery: None,
        now: crate::time::now(),
    };
    let new = crate::seal::rotate(image, &keys, &terms).map_err(ImageError::Seal)?;
    print(&format!(
        "{image} names a new key\nkey {key}\nWhen every copy of it that is in use has the new header: assay-verifier image rotate --confirm {image}\n",
        image = image.display(),
        key = new.key_id,
    ))
}

fn confirm(state: &StateDir, image: &Path) -> Result<(), CliError> {
    let config = Config::load(state)?;
    let keys = keystore::open(state.path(), config.key_source.as_ref())?;
    let old = crate::seal::confirm(image, &keys).map_err(ImageError::Seal)?;
    print(&format!(
        "Key {old} is forgotten; it opens {} no more\n",
        image.display()
    ))
}

/// A bar on a terminal's standard error; nothing where it would only fill a log.
struct Progress(ProgressBar);

impl Progress {
    fn new(doing: &'static str) -> Self {
        // Drawn with the first block, which brings the length.
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(doing);
        Self(bar)
    }

    fn hear(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
