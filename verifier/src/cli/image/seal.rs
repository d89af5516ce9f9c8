//! `image seal`.

use std::path::{Path, PathBuf};

use assay_evidence::digest::Sha256Digest;

use super::{ImageError, Progress, vhd};
use crate::cli::{CliError, policy::part_name, print};
use crate::config::{Config, StateDir};
use crate::files::create_private;
use crate::keystore::{self, FileKeyStore, KeyInfo};
use crate::pki::ca_spki_sha256;
use crate::seal::{
    self, Format, InPlace, InPlaceRequest, InputFormat, RecoveryKey, Request, SealError, Terms, sidecar_path,
};
use crate::store::Store;

/// Options of `image seal`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct SealArgs {
    /// The disk image (or block device) to encrypt; left as it is, but for --in-place
    #[arg(value_name = "IN")]
    pub(super) input: PathBuf,
    /// The encrypted image to make; must not exist. None with --in-place, and with --format vhd
    #[arg(value_name = "OUT", conflicts_with = "in_place")]
    pub(super) output: Option<PathBuf>,
    /// Encrypt IN, a raw disk, where it is: a file grows by 4 MiB. An interrupted run is gone on with by the same command; until it
    /// has ended, nothing but that may use IN
    #[arg(long, conflicts_with_all = ["input_format", "format"])]
    in_place: bool,
    /// With --in-place on a block device: the size of the disk in bytes; the device has 4194304 more
    #[arg(long, value_name = "BYTES", requires = "in_place")]
    size: Option<u64>,
    /// What IN is: raw unless you say something else. Never guessed, since a guest can make its raw disk look like anything
    #[arg(long, value_name = "FORMAT", value_parser = input_format)]
    pub(super) input_format: Option<InputFormat>,
    /// What OUT shall be: luks2 (hosts open it with dm-crypt), or luks1 or qcow2-luks, which qemu knows as well, with OUT.assay.json beside it. With vhd
    /// there is no OUT: the key is kept, and the commands are printed that make the encrypted VHD on a XenServer or XCP-ng pool
    #[arg(long, value_name = "FORMAT", default_value = "luks2", value_parser = output_format)]
    format: Output,
    /// The policy that a host must meet to get the key
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(super) policy: String,
    /// Give the key only to hosts with this tag (`host tag`, or the policy's own tags); may be given several times
    #[arg(long, value_name = "TAG", value_parser = part_name)]
    pub(super) require_tag: Vec<String>,
    /// Write the recovery key to this new file (mode 0600) instead of printing it; `cryptsetup --key-file` takes it as it is
    #[arg(long, value_name = "FILE", conflicts_with = "no_recovery")]
    pub(super) recovery_file: Option<PathBuf>,
    /// Make no recovery key: without this verifier's key store the image is lost
    #[arg(long)]
    no_recovery: bool,
}

/// clap's value parser of `--input-format`.
fn input_format(text: &str) -> Result<InputFormat, String> {
    match text {
        "raw" => Ok(InputFormat::Raw),
        "qcow2" => Ok(InputFormat::Qcow2),
        "vhd" | "vpc" => Ok(InputFormat::Vhd),
        "vhdx" => Ok(InputFormat::Vhdx),
        _ => Err("one of raw, qcow2, vhd, vhdx".to_owned()),
    }
}

/// Who makes what.
#[derive(Debug, Clone, Copy)]
enum Output {
    /// An image, made here.
    Image(Format),
    /// An encrypted VHD, made by the storage manager of a pool.
    Vhd,
}

/// clap's value parser of `--format`.
fn output_format(text: &str) -> Result<Output, String> {
    match text {
        "luks2" => Ok(Output::Image(Format::Luks2)),
        "luks1" => Ok(Output::Image(Format::Luks1)),
        "qcow2-luks" => Ok(Output::Image(Format::Qcow2Luks)),
        "vhd" => Ok(Output::Vhd),
        _ => Err("one of luks2, luks1, qcow2-luks, vhd".to_owned()),
    }
}

pub(super) fn run(state: &StateDir, args: &SealArgs) -> Result<(), CliError> {
    let format = match args.format {
        Output::Vhd => return vhd::run(state, args),
        Output::Image(format) => format,
    };
    let config = Config::load(state)?;
    let keys = keystore::open(state.path(), config.key_source.as_ref())?;
    // Looked up first, so that a broken database is known before the long work; told last, where it is read.
    let policy_missing = Store::open(&state.database())?.policy(&args.policy)?.is_none();
    let begun = InPlace::find(&args.input, &state.sealing()).map_err(ImageError::Seal)?;
    let verifiers = [config.url.to_string()];
    let site = Site {
        state,
        keys: &keys,
        verifiers: &verifiers,
        ca: Sha256Digest::new(ca_spki_sha256(state)?),
    };
    match (&args.output, begun) {
        (Some(_), Some(_)) => return Err(ImageError::Seal(SealError::InPlaceBegun(args.input.clone())).into()),
        (Some(output), None) => site.copy(args, output, format)?,
        (None, _) if !args.in_place => return Err(ImageError::NoOutput.into()),
        // Its recovery key was told when it was begun.
        (None, Some(begun)) => site.in_place(args, begun)?,
        (None, None) => {
            let begun = site.begin(args)?;
            site.in_place(args, begun)?;
        }
    }
    if policy_missing {
        print(&format!(
            "There is no policy {0} yet; until there is, no host gets this key: assay-verifier policy capture HOST --name {0}\n",
            args.policy
        ))?;
    }
    Ok(())
}

/// What of the verifier sealing needs.
struct Site<'a> {
    state: &'a StateDir,
    keys: &'a FileKeyStore,
    verifiers: &'a [String],
    ca: Sha256Digest,
}

impl Site<'_> {
    fn terms<'a>(&'a self, args: &'a SealArgs, recovery: &'a Recovery<'_>) -> Terms<'a> {
        Terms {
            policy: &args.policy,
            tags: &args.require_tag,
            verifiers: self.verifiers,
            verifier_spki_sha256: self.ca,
            recovery: recovery.key.as_ref(),
            now: crate::time::now(),
        }
    }

    fn copy(&self, args: &SealArgs, output: &Path, format: Format) -> Result<(), CliError> {
        let recovery = Recovery::prepare(args)?;
        let request = Request {
            input: &args.input,
            input_format: args.input_format,
            output,
            format,
            terms: self.terms(args, &recovery),
        };
        let progress = Progress::new("encrypting");
        let sealed = seal::seal(&request, self.keys, &mut |done, total| progress.hear(done, total));
        drop(progress);
        let info = sealed.map_err(|error| recovery.discarded(error))?;
        told(args, output, format, &info)?;
        recovery.tell()
    }

    /// The recovery key is told before the first byte changes: after a crash nobody could tell it any more.
    fn begin(&self, args: &SealArgs) -> Result<InPlace, CliError> {
        let recovery = Recovery::prepare(args)?;
        let request = InPlaceRequest {
            image: &args.input,
            disk_size: args.size,
            terms: self.terms(args, &recovery),
        };
        let begun = InPlace::begin(&request, &self.state.sealing(), self.keys);
        let begun = begun.map_err(|error| recovery.discarded(error))?;
        recovery.tell()?;
        Ok(begun)
    }

    fn in_place(&self, args: &SealArgs, begun: InPlace) -> Result<(), CliError> {
        let progress = Progress::new("encrypting");
        let sealed = begun.run(self.keys, &mut |done, total| progress.hear(done, total));
        drop(progress);
        let info = sealed.map_err(ImageError::Seal)?;
        told(args, &args.input, Format::Luks2, &info)
    }
}

fn told(args: &SealArgs, output: &Path, format: Format, info: &KeyInfo) -> Result<(), CliError> {
    let beside = match format {
        Format::Luks2 => String::new(),
        Format::Luks1 | Format::Qcow2Luks => {
            format!("sidecar {}\n", sidecar_path(output).display())
        }
    };
    print(&format!(
        "Sealed {input} into {output}\nkey {key}\ndisk {disk}\nsize {size} bytes\npolicy {policy}\n{beside}",
        input = args.input.display(),
        output = output.display(),
        key = info.key_id,
        disk = info.disk_uuid,
        size = info.size,
        policy = info.policy,
    ))
}

/// The recovery key on its way to its owner.
struct Recovery<'a> {
    key: Option<RecoveryKey>,
    file: Option<&'a Path>,
}

impl<'a> Recovery<'a> {
    /// Makes the key, and writes it to its file before there is any image that only it could open.
    fn prepare(args: &'a SealArgs) -> Result<Self, CliError> {
        let key = if args.no_recovery {
            None
        } else {
            Some(RecoveryKey::generate().map_err(ImageError::Seal)?)
        };
        let file = args.recovery_file.as_deref();
        if let (Some(key), Some(path)) = (&key, file) {
            create_private(path, key.expose().as_bytes()).map_err(|source| ImageError::RecoveryFile {
                path: path.to_owned(),
                source,
            })?;
        }
        Ok(Self { key, file })
    }

    /// There is no image that it could open.
    fn discarded(&self, error: SealError) -> ImageError {
        if let Some(path) = self.file {
            drop(std::fs::remove_file(path));
        }
        ImageError::Seal(error)
    }

    fn tell(&self) -> Result<(), CliError> {
        match (&self.key, self.file) {
            (None, _) => print("There is no recovery key: back up the key store, nothing else opens this image\n"),
            (Some(_), Some(path)) => print(&format!(
                "recovery key in {}; keep it where no host gets at it\n",
                path.display()
            )),
            (Some(key), None) => print(&format!(
                "recovery {}\nThis recovery key is shown once and kept nowhere: write it down. It opens the image without any verifier.\n",
                key.expose()
            )),
        }
    }
}
