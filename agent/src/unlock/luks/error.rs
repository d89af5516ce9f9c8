//! Why a disk is not opened or closed.

use std::path::PathBuf;

use assay_evidence::luks::FingerprintError;
use assay_evidence::luks1::Luks1Error;
use assay_evidence::qcow2::Qcow2Error;
use assay_evidence::token::TokenError;
use libcryptsetup_rs::LibcryptErr;
use procfs::ProcError;

use super::{CIPHER, MAX_NAME};

/// Why a disk is not opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file or device, or it cannot be read.
    #[error("cannot open the image {image}")]
    Open {
        /// The image.
        image: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The image has no LUKS header.
    #[error(
        "{image} is not a LUKS2 image, nor LUKS1, nor qcow2 with LUKS inside: seal it with `assay-verifier image seal`"
    )]
    NotLuks {
        /// The image.
        image: PathBuf,
        /// What libcryptsetup said.
        #[source]
        source: LibcryptErr,
    },
    /// The header cannot be read out.
    #[error("the LUKS header of {image} cannot be read")]
    Header {
        /// The image.
        image: PathBuf,
        /// What libcryptsetup said.
        #[source]
        source: LibcryptErr,
    },
    /// The header begins as LUKS1, and goes on as nothing.
    #[error("the LUKS1 header of {image} is damaged")]
    Luks1 {
        /// The image.
        image: PathBuf,
        /// Why.
        #[source]
        source: Luks1Error,
    },
    /// The image begins as qcow2, and goes on as nothing.
    #[error("the qcow2 header of {image} is damaged")]
    Qcow2 {
        /// The image.
        image: PathBuf,
        /// Why.
        #[source]
        source: Qcow2Error,
    },
    /// A qcow2 image in the clear.
    #[error(
        "{image} is a qcow2 image without LUKS inside: seal it with `assay-verifier image seal --input-format qcow2`"
    )]
    NotEncrypted {
        /// The image.
        image: PathBuf,
    },
    /// A qcow2 image that has parts of its disk in another file.
    #[error(
        "{image} names another file, below it or for its data, and no key is used for that: put all into one file with `qemu-img convert`, then seal it"
    )]
    NotAlone {
        /// The image.
        image: PathBuf,
    },
    /// No copy of the header can be made or looked at.
    #[error("the LUKS1 header of {image} cannot be copied into memory")]
    Copy {
        /// The image.
        image: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file beside the image that has its token is missing, or cannot be read.
    #[error(
        "{image}: its key cannot be asked for without {sidecar}, which an image in LUKS1 or qcow2 has beside it: copy it from where the image was sealed"
    )]
    Sidecar {
        /// The image.
        image: PathBuf,
        /// The file.
        sidecar: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Something in the image is not encrypted as it must be.
    #[error(
        "{image}: its {part} is encrypted with {cipher:?}, only {CIPHER} is opened: the image is damaged or a trap"
    )]
    Cipher {
        /// The image.
        image: PathBuf,
        /// Data segment or key slot.
        part: String,
        /// What the header says.
        cipher: String,
    },
    /// Trying a passphrase would take too long, or too much memory.
    #[error("{image}: its {part} wants {wanted}, more than any honest image: it is damaged or a trap")]
    Cost {
        /// The image.
        image: PathBuf,
        /// Key slot or digest.
        part: String,
        /// What the header says.
        wanted: String,
    },
    /// The header lacks what a fingerprint is made of.
    #[error("{image}: its header has no fingerprint")]
    Fingerprint {
        /// The image.
        image: PathBuf,
        /// Why.
        #[source]
        source: FingerprintError,
    },
    /// The header is another one than when the key was asked for.
    #[error("{image}: its header changed while the key was on its way: somebody else writes to the image")]
    Changed {
        /// The image.
        image: PathBuf,
    },
    /// The token is missing, malformed or foreign.
    #[error("{image}: its key cannot be asked for")]
    Token {
        /// The image.
        image: PathBuf,
        /// Why.
        #[source]
        source: TokenError,
    },
    /// The disk is open, under this or another name.
    #[error("{image} is already open as /dev/mapper/{name}: close it first with `assay-agent lock {name}`")]
    AlreadyOpen {
        /// The image.
        image: PathBuf,
        /// The mapping.
        name: String,
    },
    /// Another disk has this name.
    #[error("/dev/mapper/{name} exists already and is another disk: choose another --name")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Not a name for a mapping.
    #[error(
        "{name:?} is not a name for an open disk: use up to {MAX_NAME} letters, digits, '-', '_' and '.', beginning with a letter or digit"
    )]
    BadName {
        /// The name, cut to a printable length.
        name: String,
    },
    /// libcryptsetup would not open it.
    #[error(
        "{image} could not be opened as /dev/mapper/{name}; is the kernel module dm_crypt available (modprobe dm_crypt)?"
    )]
    Activate {
        /// The image.
        image: PathBuf,
        /// The mapping.
        name: String,
        /// What libcryptsetup said.
        #[source]
        source: LibcryptErr,
    },
    /// No network block device is free.
    #[error(
        "none of the kernel's network block devices is free, of {of}: qcow2 images need one each: `modprobe nbd nbds_max=64 max_part=0`, and for the next boot see the section on qcow2 in hooks.md"
    )]
    NoDevice {
        /// How many there are.
        of: usize,
    },
    /// What the kernel says of a network block device cannot be used.
    #[error("the kernel does not tell the size of {device}")]
    Device {
        /// The device.
        device: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// qemu takes no such name.
    #[error("{image}: qemu takes no name that is not UTF-8: rename the image")]
    NameNotText {
        /// The image.
        image: PathBuf,
    },
    /// A program that qcow2 images need cannot be run.
    #[error("{program} cannot be run: is it installed, and may it run on this host?")]
    Program {
        /// The program.
        program: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Such a program failed.
    #[error("{program} failed with {about}: {said}")]
    Said {
        /// The program.
        program: &'static str,
        /// What it was to work on.
        about: PathBuf,
        /// Its own words.
        said: String,
    },
    /// The process that has an image's key cannot be ended.
    #[error(
        "qemu-nbd, which has the key of the disk on {device}, does not end, killed or not: see `ps` for it, and what its storage waits for"
    )]
    StillThere {
        /// The network block device.
        device: PathBuf,
    },
    /// Whether the process that has an image's key has ended cannot be told.
    #[error(
        "the processes of this host cannot be looked at, so that the qemu-nbd which has a disk's key cannot be found"
    )]
    Processes {
        /// What the system said.
        #[source]
        source: ProcError,
    },
    /// The released key does not open the image.
    #[error(
        "key {key_id}, as the verifier has it, does not open {image}, whose header is the one that was sealed: either the verifier's key store or the image's key slots were changed; put back a backup of that, or read the disk with its recovery key (`assay-verifier image unseal`)"
    )]
    WrongKey {
        /// The image.
        image: PathBuf,
        /// The key.
        key_id: String,
    },
    /// There is no such mapping.
    #[error("no open disk is called {name:?}; `ls /dev/mapper` shows the names")]
    NotOpen {
        /// The name.
        name: String,
    },
    /// The mapping is none of ours.
    #[error("/dev/mapper/{name} was not opened from a sealed image: close it with the program that opened it")]
    NotOurs {
        /// The name.
        name: String,
    },
    /// The mapping is in use.
    #[error("/dev/mapper/{name} is in use: stop the machine that uses it, or unmount it, then try again")]
    Busy {
        /// The name.
        name: String,
    },
    /// libcryptsetup would not close it.
    #[error("/dev/mapper/{name} could not be closed")]
    Deactivate {
        /// The name.
        name: String,
        /// What libcryptsetup said.
        #[source]
        source: LibcryptErr,
    },
    /// It can't be made to wait, or to go on.
    #[error("/dev/mapper/{name} could not be suspended or resumed")]
    Suspend {
        /// The name.
        name: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The thread that makes all these calls is gone.
    #[error("the thread that opens disks has ended")]
    Stopped,
}
