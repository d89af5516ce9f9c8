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
    #[error(
        "{path} looks like a {format} image; say --input-format qcow2, vhd or vhdx to seal the disk inside it, or --input-format raw if it is a raw disk that only looks so"
    )]
    InputFormat {
        /// The input.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// The disk isn't all in this file.
    #[error(
        "{path} needs another file, {other}; make one image of them first: `qemu-img convert -O qcow2 {path} WHOLE`"
    )]
    InputParts {
        /// The input.
        path: PathBuf,
        /// The file that it names, which whoever made it chose.
        other: String,
    },
    /// The input's name can't be given to qemu's programs.
    #[error("{0} has a name that is not UTF-8; rename it")]
    InputName(PathBuf),
    /// A program of qemu can't be started.
    #[error("{program} can't be used; install it (Debian: qemu-utils, Enterprise Linux: qemu-img)")]
    Program {
        /// The program.
        program: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A program of qemu failed.
    #[error("{program} fails on {path}: {said}")]
    Qemu {
        /// The program.
        program: &'static str,
        /// The image.
        path: PathBuf,
        /// What it said, on one line.
        said: String,
    },
    /// `qemu-img info` gave no JSON, or without what was asked for.
    #[error("qemu-img tells nothing usable about {path}")]
    QemuAnswer {
        /// The image.
        path: PathBuf,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
    /// No file in memory, where headers and secrets are prepared.
    #[error("no file can be made in memory; check memory and the limit of open files")]
    Memory(#[source] io::Error),
    /// The image is none of ours.
    #[error("{0} is not a sealed image; `assay-verifier image seal` makes one")]
    NotSealed(PathBuf),
    /// Nothing says which key opens the image.
    #[error("{path} does not say which key opens it ({reason}); give its recovery key, or the sidecar back its name")]
    NoToken {
        /// The image.
        path: PathBuf,
        /// What is wrong with its token.
        reason: String,
    },
    /// The header isn't the one that was sealed.
    #[error(
        "{path}: its header is not the one that key {key_id} was made for: somebody replaced or changed it; if it was you, use the recovery key"
    )]
    OtherHeader {
        /// The image.
        path: PathBuf,
        /// The key that it names.
        key_id: assay_evidence::uuid::Uuid,
    },
    /// The secret opens no key slot.
    #[error("the key opens no key slot of {0}; check that it is this image's, and complete")]
    WrongSecret(PathBuf),
    /// A layout that `image seal` doesn't make.
    #[error("{path}: its {what} is {found}, which is not read here; `cryptsetup open` does")]
    Unusual {
        /// The image.
        path: PathBuf,
        /// Which property.
        what: &'static str,
        /// What the header says.
        found: String,
    },
    /// The old key is still there.
    #[error(
        "{path} was given a new key before, and the old one, {old}, is still kept; `assay-verifier image rotate --confirm {path}` ends that rotation first"
    )]
    Unconfirmed {
        /// The image.
        path: PathBuf,
        /// The key that was replaced.
        old: assay_evidence::uuid::Uuid,
    },
    /// No rotation is waiting.
    #[error("the key of {0} replaces no other that is still kept; there is nothing to confirm")]
    NothingToConfirm(PathBuf),
    /// Every key slot is filled.
    #[error("{0} has no free key slot; remove one with `cryptsetup luksKillSlot`")]
    NoSlot(PathBuf),
    /// Only raw disks are sealed in place.
    #[error(
        "{path} looks like a {format} image, and only a raw disk is encrypted where it is; seal it into a copy with --input-format"
    )]
    InPlaceFormat {
        /// The image.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// A block device doesn't say where its disk ends.
    #[error(
        "{path} is a block device: extend it by {room} bytes for the header (`lvextend -L +4m`), and say --size with the bytes that it had before"
    )]
    InPlaceNoSize {
        /// The device.
        path: PathBuf,
        /// What the header needs, in bytes.
        room: u64,
    },
    /// The size that was given doesn't fit.
    #[error(
        "{path} has {len} bytes, which does not fit a disk of {size} bytes: a file is the disk, a block device has 4194304 bytes more for the header"
    )]
    InPlaceSize {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The disk's, as given.
        size: u64,
    },
    /// Somebody else uses the image.
    #[error("{0} is in use; stop the VM that runs from it, or unmount it")]
    InUse(PathBuf),
    /// The image isn't as the interrupted run left it.
    #[error(
        "{0} is not as the interrupted run left it; if a backup took its place, move that elsewhere and seal it under another name"
    )]
    InPlaceChanged(PathBuf),
    /// A journal can't be read or written.
    #[error("the journal {path} of an image that is being sealed in place is damaged")]
    Journal {
        /// The journal.
        path: PathBuf,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
    /// The image is in the middle of it.
    #[error(
        "{path} is partly encrypted and of no use until it is wholly so; run `assay-verifier image seal --in-place {path}` again"
    )]
    InPlace {
        /// The image.
        path: PathBuf,
        /// Why it stopped.
        #[source]
        source: Box<SealError>,
    },
    /// An image that is in the middle of it, to be copied.
    #[error(
        "{0} is being sealed in place, or was when that was interrupted; `assay-verifier image seal --in-place {0}` goes on with it"
    )]
    InPlaceBegun(PathBuf),
    /// A header that no fingerprint can be made of.
    #[error("the header has no fingerprint")]
    Fingerprint(#[source] assay_evidence::luks::FingerprintError),
    /// The input changed while it was read.
    #[error("{0} changed while it was read; stop whatever writes to it (a running VM?) and seal again")]
    InputChanged(PathBuf),
    /// There is something under the output's name.
    #[error("{0} exists already and is not overwritten; choose another name or remove it")]
    OutputExists(PathBuf),
    /// Another run writes this output.
    #[error("{0} exists and is in use: another run writes it; wait for that, or choose another name")]
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
