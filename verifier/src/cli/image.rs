//! `assay-verifier image`: sealed disk images.

use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use thiserror::Error;

use super::{CliError, print};
use crate::config::{Config, StateDir};
use crate::keystore::FileKeyStore;
use crate::pki::ca_spki_sha256;
use crate::seal::{self, Request, SealError};
use crate::store::Store;

/// `image …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum ImageCommand {
    /// Encrypt a raw disk image into a LUKS2 image, and keep its key
    Seal(SealArgs),
}

/// Options of `image seal`.
#[derive(Debug, clap::Args)]
pub(super) struct SealArgs {
    /// The raw disk image (or block device) to encrypt; left as it is
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The LUKS2 image to make; must not exist
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// The policy that a host must meet to get the key
    #[arg(long, value_name = "NAME", default_value = "default")]
    policy: String,
    /// Give the key only to hosts with this tag (`host tag`, or the policy's own tags); may be given several times
    #[arg(long, value_name = "TAG", value_parser = super::policy::part_name)]
    require_tag: Vec<String>,
}

/// Why no image was sealed.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Sealing itself.
    #[error(transparent)]
    Seal(#[from] SealError),
}

pub(super) fn run(state: &StateDir, command: ImageCommand) -> Result<(), CliError> {
    match command {
        ImageCommand::Seal(args) => seal_image(state, &args),
    }
}

fn seal_image(state: &StateDir, args: &SealArgs) -> Result<(), CliError> {
    let config = Config::load(state)?;
    let keys = FileKeyStore::open(state.path())?;
    let request = Request {
        input: &args.input,
        output: &args.output,
        policy: &args.policy,
        tags: &args.require_tag,
        verifiers: &[config.url.to_string()],
        verifier_spki_sha256: Sha256Digest::new(ca_spki_sha256(state)?),
        now: crate::time::now(),
    };
    // Looked up first, so that a broken database is known before the long work; told last, where it is read.
    let policy_missing = Store::open(&state.database())?.policy(&args.policy)?.is_none();
    let bar = progress_bar();
    let sealed = seal::seal(&request, &keys, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let info = sealed.map_err(ImageError::Seal)?;
    print(&format!(
        "Sealed {input} into {output}\nkey {key}\ndisk {disk}\nsize {size} bytes\npolicy {policy}\n",
        input = args.input.display(),
        output = args.output.display(),
        key = info.key_id,
        disk = info.disk_uuid,
        size = info.size,
        policy = info.policy,
    ))?;
    if policy_missing {
        print(&format!(
            "There is no policy {0} yet; until there is, no host gets this key: assay-verifier policy capture HOST --name {0}\n",
            info.policy
        ))?;
    }
    Ok(())
}

/// A bar on a terminal's standard error; nothing where it would only fill a log.
fn progress_bar() -> ProgressBar {
    // Drawn with the first block, which brings the length.
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
    let template = "encrypting {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
