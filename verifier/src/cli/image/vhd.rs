//! `image seal --format vhd`: the key of an encrypted VHD for a disk that is here, and how the pool makes it.
//!
//! No VHD is written here: the storage manager encrypts while it imports, and an image that it made is one that it opens.

use std::path::Path;

use super::ImageError;
use super::seal::SealArgs;
use crate::cli::CliError;
use crate::cli::key::vhd::{self, VdiType, VhdArgs};
use crate::config::{Config, StateDir};
use crate::seal::{InputFormat, disk_size};

/// The largest VHD that the storage manager makes; above it a disk becomes QCOW2 by itself.
const MAX_VHD: u64 = 2040 << 30;

pub(super) fn run(state: &StateDir, args: &SealArgs) -> Result<(), CliError> {
    if args.output.is_some() || args.recovery_file.is_some() {
        return Err(ImageError::VhdOutput.into());
    }
    Config::load(state)?;
    let format = match args.input_format {
        None | Some(InputFormat::Raw) => "raw",
        Some(InputFormat::Vhd) => "vhd",
        Some(InputFormat::Qcow2 | InputFormat::Vhdx) => return Err(ImageError::VhdInput(args.input.clone()).into()),
    };
    let size = disk_size(&args.input, args.input_format).map_err(ImageError::Seal)?;
    if size > MAX_VHD {
        return Err(ImageError::VhdSize {
            path: args.input.clone(),
            size,
            limit: MAX_VHD,
        }
        .into());
    }
    let name = args.input.file_name().unwrap_or(args.input.as_os_str());
    let key = VhdArgs {
        name: name.to_string_lossy().into_owned(),
        policy: args.policy.clone(),
        require_tag: args.require_tag.clone(),
        vdi_type: VdiType::Vhd,
    };
    let import = format!("filename={} format={format}", for_shell(&args.input));
    vhd::seal(state, &key, size, &import)
}

/// A path as one word for a shell, whatever is in it.
fn for_shell(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_');
    if text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}
