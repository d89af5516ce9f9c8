//! LUKS images through libcryptsetup: what the header says, opening, closing. Those inside qcow2 are qemu's: see [`qcow2`].
//!
//! The header comes from whoever made the image, so more is asked of it than that libcryptsetup accepts it: the data and
//! every key slot must be encrypted with AES-XTS. A header that says "cipher_null" would open with any passphrase, and the
//! machine inside would write its secrets in the clear.
//!
//! libcryptsetup keeps state in globals: one thread makes all calls of it, see [`threads`].

use std::path::{Path, PathBuf};

use assay_evidence::digest::Sha256Digest;
use assay_evidence::token::LuksToken;
use assay_evidence::uuid::Uuid;
use libcryptsetup_rs::consts::flags::{CryptActivate, CryptDeactivate};
use libcryptsetup_rs::consts::vals::CryptStatusInfo;
use libcryptsetup_rs::{CryptDevice, CryptInit, LibcryptErr};
use zeroize::Zeroizing;

mod error;
mod loaded;
mod luks1;
mod mapping;
mod qcow2;
mod suspend;
mod threads;

pub use error::DiskError;
use loaded::{Loaded, find_token};
pub use mapping::is_open;
use mapping::open_mapping;
pub use threads::DiskThreads;

const CIPHER: &str = "aes-xts-plain64";
const MAX_NAME: usize = 64;
/// Of a volume key, in bytes: two keys of AES-256.
const MAX_KEY: usize = 64;
/// Of PBKDF2; cryptsetup's two seconds are some ten million on the fastest machines.
const MAX_ITERATIONS: u64 = 50_000_000;
/// Memory of Argon2; cryptsetup never takes more.
const MAX_KDF_KIB: u64 = 1024 * 1024;
/// Passes times memory of Argon2: cryptsetup's two seconds are 4 to 16 passes over 1 GiB.
const MAX_KDF_WORK_KIB: u64 = 32 * MAX_KDF_KIB;

/// What an image's header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The image.
    pub image: PathBuf,
    /// What the header lies in.
    pub container: Container,
    /// The LUKS UUID.
    pub uuid: [u8; 16],
    /// The one assay token; of LUKS1, that of the sidecar. Its content is a stranger's.
    pub token: LuksToken,
    /// The fingerprint, which the verifier holds against that of the header which it sealed.
    pub fingerprint: Sha256Digest,
}

/// What a LUKS header lies in, and who opens it therefore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// At the image's beginning: libcryptsetup.
    None,
    /// In a qcow2 image: qemu.
    Qcow2,
}

impl Header {
    /// Reads and checks an image's header. Opens nothing.
    ///
    /// # Errors
    /// [`DiskError::Open`], [`DiskError::NotLuks`], [`DiskError::Header`], [`DiskError::Cipher`], [`DiskError::Cost`],
    /// [`DiskError::Token`], [`DiskError::Fingerprint`]; of LUKS1 also [`DiskError::Luks1`], [`DiskError::Copy`], [`DiskError::Sidecar`];
    /// of qcow2 also [`DiskError::Qcow2`], [`DiskError::NotEncrypted`], [`DiskError::NotAlone`].
    pub fn read(image: &Path) -> Result<Self, DiskError> {
        match qcow2::read(image)? {
            Some(header) => Ok(header),
            None => Ok(Loaded::of(image)?.header),
        }
    }

    /// The mapping's name when none is asked for: `assay-` and the first eight digits of the UUID.
    #[must_use]
    pub fn default_name(&self) -> String {
        let [a, b, c, d, ..] = self.uuid;
        format!("assay-{}", hex::encode([a, b, c, d]))
    }
}

/// Refuses what is open already, by LUKS UUID, a name that is taken, and what there is no device for.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::AlreadyOpen`], [`DiskError::NameTaken`]; of qcow2 [`DiskError::NoDevice`].
pub fn check_free(header: &Header, name: &str) -> Result<(), DiskError> {
    check_name(name)?;
    if let Some(open) = open_mapping(Path::new("/sys/class/block"), &header.uuid) {
        return Err(DiskError::AlreadyOpen {
            image: header.image.clone(),
            name: open,
        });
    }
    match libcryptsetup_rs::status(None, name) {
        Ok(CryptStatusInfo::Active | CryptStatusInfo::Busy) => Err(DiskError::NameTaken { name: name.to_owned() }),
        _ if header.container == Container::Qcow2 => qcow2::check_free(),
        _ => Ok(()),
    }
}

/// Opens an image that is in no container as `/dev/mapper/NAME`. A file gets a loop device, which goes with the mapping.
///
/// # Errors
/// Those of [`check_free`] and [`Header::read`], [`DiskError::Changed`], [`DiskError::WrongKey`], [`DiskError::Activate`].
pub fn open(header: &Header, name: &str, passphrase: &[u8]) -> Result<(), DiskError> {
    check_free(header, name)?;
    let mut loaded = Loaded::of(&header.image)?;
    // Whoever has the storage can show one header for the check, and another that writes in the clear for the use.
    if loaded.header != *header {
        return Err(DiskError::Changed {
            image: header.image.clone(),
        });
    }
    // First the key slot alone: a wrong passphrase gets no loop device and no mapping, not even for a moment. What came out of it is used
    // as it is, for to open the slot again takes longer than all the rest of an unlock that is not the TPM's.
    let opened = volume_key(&mut loaded.device, passphrase).and_then(|key| {
        let mut handle = loaded.device.activate_handle();
        handle.activate_by_volume_key(Some(name), Some(&key), CryptActivate::empty())
    });
    match opened {
        Ok(()) => Ok(()),
        Err(LibcryptErr::IOError(error)) if error.raw_os_error() == Some(nix::libc::EPERM) => Err(wrong_key(header)),
        Err(LibcryptErr::IOError(error)) if error.raw_os_error() == Some(nix::libc::EEXIST) => {
            Err(DiskError::NameTaken { name: name.to_owned() })
        }
        Err(source) => Err(DiskError::Activate {
            image: header.image.clone(),
            name: name.to_owned(),
            source,
        }),
    }
}

/// What the passphrase's key slot holds, verified by the header's digest. The header was checked to hold no longer key than fits.
fn volume_key(device: &mut CryptDevice, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, LibcryptErr> {
    let mut key = Zeroizing::new(vec![0; MAX_KEY]);
    let (_, len) = device.volume_key_handle().get(None, &mut key, Some(passphrase))?;
    key.truncate(len);
    Ok(key)
}

fn wrong_key(header: &Header) -> DiskError {
    DiskError::WrongKey {
        image: header.image.clone(),
        key_id: header.token.key_id().to_owned(),
    }
}

/// Closes a mapping that was opened from a sealed image: one with a token in its header, or the one with this LUKS UUID that the agent
/// opened under this name.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::NotOpen`], [`DiskError::NotOurs`], [`DiskError::Busy`], [`DiskError::Deactivate`].
pub fn close(name: &str, opened: Option<Uuid>) -> Result<(), DiskError> {
    check_name(name)?;
    let mut device = match libcryptsetup_rs::status(None, name) {
        Ok(CryptStatusInfo::Active | CryptStatusInfo::Busy) => open_by_name(name, None)?,
        _ => return Err(DiskError::NotOpen { name: name.to_owned() }),
    };
    let json = device.status_handle().dump_json();
    let has_token = json.is_ok_and(|metadata| find_token(&metadata).is_ok());
    if !has_token && !opened.is_some_and(|uuid| is_open(uuid.as_bytes(), name)) {
        return Err(DiskError::NotOurs { name: name.to_owned() });
    }
    device
        .activate_handle()
        .deactivate(name, CryptDeactivate::empty())
        .map_err(|source| match source {
            LibcryptErr::IOError(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                DiskError::Busy { name: name.to_owned() }
            }
            source => DiskError::Deactivate {
                name: name.to_owned(),
                source,
            },
        })
}

/// Checks a mapping's name; device-mapper itself takes nearly anything.
///
/// # Errors
/// [`DiskError::BadName`].
pub fn check_name(name: &str) -> Result<(), DiskError> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(inner)
        && name != "control";
    if good {
        Ok(())
    } else {
        Err(DiskError::BadName {
            name: name.chars().take(80).collect(),
        })
    }
}

/// libcryptsetup's hold of an open mapping, with its own header or with this one.
fn open_by_name(name: &str, header: Option<&Path>) -> Result<CryptDevice, DiskError> {
    check_name(name)?;
    CryptInit::init_by_name_and_header(name, header).map_err(|_| DiskError::NotOpen { name: name.to_owned() })
}

#[cfg(test)]
#[path = "luks_tests.rs"]
mod tests;
