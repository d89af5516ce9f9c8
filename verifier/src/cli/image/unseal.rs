//! `image unseal`.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{ImageError, Progress};
use crate::cli::{CliError, print};
use crate::config::{Config, StateDir};
use crate::keystore::{self, KeySource as _};
use crate::seal::Sealed;

/// Longest secret that is read; cryptsetup itself takes 512 bytes from a terminal.
const MAX_SECRET: u64 = 512;

/// Options of `image unseal`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct UnsealArgs {
    /// The sealed image; left as it is
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The raw disk image to make, in the clear (mode 0600); must not exist
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Read the recovery key from this file ("-": standard input) instead of asking the key store; no verifier is needed then
    #[arg(long, value_name = "FILE")]
    recovery_file: Option<PathBuf>,
}

pub(super) fn run(state: &StateDir, args: &UnsealArgs) -> Result<(), CliError> {
    let image = Sealed::read(&args.image).map_err(ImageError::Seal)?;
    let secret = match &args.recovery_file {
        Some(path) => recovery(path)?,
        None => {
            let config = Config::load(state)?;
            let keys = keystore::open(state.path(), config.key_source.as_ref())?;
            let key = keys.get(image.key_id().map_err(ImageError::Seal)?)?;
            image.check_key(&key.info).map_err(ImageError::Seal)?;
            Zeroizing::new(key.passphrase.expose().to_vec())
        }
    };
    let progress = Progress::new("decrypting");
    let unsealed = image.unseal(&secret, &args.output, &mut |done, total| progress.hear(done, total));
    drop(progress);
    let size = unsealed.map_err(ImageError::Seal)?;
    print(&format!(
        "Unsealed {} into {}\nsize {size} bytes\n",
        args.image.display(),
        args.output.display()
    ))
}

/// The key without the line end that an editor or `echo` puts behind it.
fn recovery(path: &Path) -> Result<Zeroizing<Vec<u8>>, ImageError> {
    let failed = |source| ImageError::RecoveryRead {
        path: path.to_owned(),
        source,
    };
    // Room for all of it at once: a vector that grows leaves unwiped copies behind.
    let mut secret = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX_SECRET).unwrap_or(0) + 1));
    if path == Path::new("-") {
        io::stdin().lock().take(MAX_SECRET + 1).read_to_end(&mut secret)
    } else {
        File::open(path).and_then(|file| file.take(MAX_SECRET + 1).read_to_end(&mut secret))
    }
    .map_err(failed)?;
    if secret.len() as u64 > MAX_SECRET {
        return Err(ImageError::RecoveryLong {
            path: path.to_owned(),
            limit: MAX_SECRET,
        });
    }
    while secret.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        secret.pop();
    }
    Ok(secret)
}
