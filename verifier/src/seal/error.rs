//! Why an image is not sealed.

use std::{io, path::PathBuf};

use libcryptsetup_rs::LibcryptErr;

use crate::keystore::KeyStoreError;

/// A refusal to seal. Nothing half done stays behind any of them.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The input can't be opened or read.
    #[error("can't {operation} image {path}; check that it exists and that you may read it")]
    Input {
        /// What was tried.
        operation: &'static str,
        /// The input.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The input is a directory, a pipe or the like.
    #[error("{0} is neither a regular file nor a block device; give a raw disk image")]
    InputKind(PathBuf),
    /// The input is empty.
    #[error("{0} is empty; give a raw disk image")]
    InputEmpty(PathBuf),
    /// The input isn't made of whole sectors.
    #[error(
        "{path} has {len} bytes, which is not a multiple of 512; a disk has whole sectors: `truncate -s %512 {path}` pads it with zeros"
    )]
    InputSize {
        /// The input.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// The input is already encrypted.
    #[error("{0} is a LUKS image already; seal the raw image that it was made from")]
    InputLuks(PathBuf),
    /// The input is in a container format, which a host would attach as if it were the disk.
    #[error("{path} is a {format} image, not a raw one; convert it first: `qemu-img convert -O raw {path} RAW`")]
    InputFormat {
        /// The input.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// The input changed while it was read.
    #[error("{0} changed while it was read; stop whatever writes to it (a running VM?) and seal again")]
    InputChanged(PathBuf),
    /// There is something under the output's name.
    #[error("{0} exists already and is not overwritten; choose another name or remove it")]
    OutputExists(PathBuf),
    /// Another run writes this output, or one was interrupted.
    #[error(
        "{0} exists: either another `image seal` is writing it, or one was interrupted; if none is running, remove it"
    )]
    PartialExists(PathBuf),
    /// The output has no file name, or one that libcryptsetup can't take.
    #[error("{0} can't be used as output; give a file name in UTF-8")]
    OutputName(PathBuf),
    /// The output can't be written.
    #[error("can't {operation} {path}")]
    Output {
        /// What was tried.
        operation: &'static str,
        /// The output, or its partial file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file system of the output is full.
    #[error("no room for {path}: it needs {needed} bytes; free some space or choose another place")]
    DiskFull {
        /// The output's partial file.
        path: PathBuf,
        /// Its full length in bytes.
        needed: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The policy or a URL can't be put into a token.
    #[error("the image's token would not be valid")]
    Token(#[source] assay_evidence::token::TokenError),
    /// libcryptsetup failed.
    #[error("libcryptsetup can't {operation} in {path}")]
    Luks {
        /// What was tried.
        operation: &'static str,
        /// The output's partial file.
        path: PathBuf,
        /// The library's answer.
        #[source]
        source: LibcryptErr,
    },
    /// libcryptsetup made another layout than the one that the data is written in.
    #[error(
        "libcryptsetup made a header with {what} {found} where {wanted} was asked for; this version of the library can't be used"
    )]
    Layout {
        /// Which property.
        what: &'static str,
        /// What the header says.
        found: String,
        /// What it should say.
        wanted: String,
    },
    /// The system gave no random bytes.
    #[error("the system gives no random bytes; check that getrandom(2) works for this process")]
    Random,
    /// The key can't be made or kept.
    #[error("the image's key can't be kept, so the image was not made")]
    Key(#[source] KeyStoreError),
}
