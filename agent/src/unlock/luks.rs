//! LUKS2 images through libcryptsetup: what the header says, opening, closing.
//!
//! The header comes from whoever made the image, so more is asked of it than that libcryptsetup accepts it: the data and
//! every key slot must be encrypted with AES-XTS. A header that says "cipher_null" would open with any passphrase, and the
//! machine inside would write its secrets in the clear.
//!
//! libcryptsetup keeps state in globals: all calls are made by one thread, [`DiskThread`].

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use assay_evidence::token::{LuksToken, TokenError};
use libcryptsetup_rs::consts::flags::{CryptActivate, CryptDeactivate};
use libcryptsetup_rs::consts::vals::{CryptStatusInfo, EncryptionFormat};
use libcryptsetup_rs::{CryptDevice, CryptInit, LibcryptErr};
use serde_json::Value;
use zeroize::Zeroizing;

const CIPHER: &str = "aes-xts-plain64";
const MAX_NAME: usize = 64;
/// Of PBKDF2; cryptsetup's two seconds are some ten million on the fastest machines.
const MAX_ITERATIONS: u64 = 50_000_000;
/// Memory of Argon2; cryptsetup never takes more.
const MAX_KDF_KIB: u64 = 1024 * 1024;
/// Passes times memory of Argon2: cryptsetup's two seconds are 4 to 16 passes over 1 GiB.
const MAX_KDF_WORK_KIB: u64 = 32 * MAX_KDF_KIB;
/// Mappings of LUKS2 devices carry this in front of the LUKS UUID in their device-mapper UUID.
const DM_PREFIX: &str = "CRYPT-LUKS2-";

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
    /// The image has no LUKS2 header.
    #[error(
        "{image} is not a LUKS2 image: seal it with `assay-verifier image seal` (LUKS1 and qcow2 are not supported)"
    )]
    NotLuks {
        /// The image.
        image: PathBuf,
        /// What libcryptsetup said.
        #[source]
        source: LibcryptErr,
    },
    /// The header cannot be read out.
    #[error("the LUKS2 header of {image} cannot be read")]
    Header {
        /// The image.
        image: PathBuf,
        /// What libcryptsetup said.
        #[source]
        source: LibcryptErr,
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
    /// The released key does not open the image.
    #[error("the released key does not open {image}: its key slots were changed after it was sealed")]
    WrongKey {
        /// The image.
        image: PathBuf,
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
    /// The thread that makes all these calls is gone.
    #[error("the thread that opens disks has ended")]
    Stopped,
}

/// What an image's header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The image.
    pub image: PathBuf,
    /// The LUKS UUID.
    pub uuid: [u8; 16],
    /// The one assay token. Its content is a stranger's.
    pub token: LuksToken,
}

impl Header {
    /// Reads and checks an image's header. Opens nothing.
    ///
    /// # Errors
    /// [`DiskError::Open`], [`DiskError::NotLuks`], [`DiskError::Header`], [`DiskError::Cipher`], [`DiskError::Cost`],
    /// [`DiskError::Token`].
    pub fn read(image: &Path) -> Result<Self, DiskError> {
        Self::of(&mut load(image)?, image)
    }

    /// Checks the header that a device was loaded with, which is what it will be activated with.
    fn of(device: &mut CryptDevice, image: &Path) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Header {
            image: image.to_owned(),
            source,
        };
        let uuid = *device.status_handle().get_uuid().map_err(failed)?.as_bytes();
        let metadata = device.status_handle().dump_json().map_err(failed)?;
        check_ciphers(&metadata, image)?;
        check_costs(&metadata, image)?;
        let token = find_token(&metadata).map_err(|source| DiskError::Token {
            image: image.to_owned(),
            source,
        })?;
        Ok(Self {
            image: image.to_owned(),
            uuid,
            token,
        })
    }

    /// The mapping's name when none is asked for: `assay-` and the first eight digits of the UUID.
    #[must_use]
    pub fn default_name(&self) -> String {
        let [a, b, c, d, ..] = self.uuid;
        format!("assay-{}", hex::encode([a, b, c, d]))
    }
}

/// Refuses what is open already, by LUKS UUID, and a name that is taken.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::AlreadyOpen`], [`DiskError::NameTaken`].
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
        _ => Ok(()),
    }
}

/// Opens an image as `/dev/mapper/NAME`. A file gets a loop device, which goes with the mapping.
///
/// # Errors
/// Those of [`check_free`] and [`Header::read`], [`DiskError::Changed`], [`DiskError::WrongKey`], [`DiskError::Activate`].
pub fn open(header: &Header, name: &str, passphrase: &[u8]) -> Result<(), DiskError> {
    check_free(header, name)?;
    let mut device = load(&header.image)?;
    // Whoever has the storage can show one header for the check, and another that writes in the clear for the use.
    if Header::of(&mut device, &header.image)? != *header {
        return Err(DiskError::Changed {
            image: header.image.clone(),
        });
    }
    match device
        .activate_handle()
        .activate_by_passphrase(Some(name), None, passphrase, CryptActivate::empty())
    {
        Ok(_) => Ok(()),
        Err(LibcryptErr::IOError(error)) if error.raw_os_error() == Some(nix::libc::EPERM) => {
            Err(DiskError::WrongKey {
                image: header.image.clone(),
            })
        }
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

/// Closes a mapping that was opened from a sealed image.
///
/// # Errors
/// [`DiskError::BadName`], [`DiskError::NotOpen`], [`DiskError::NotOurs`], [`DiskError::Busy`], [`DiskError::Deactivate`].
pub fn close(name: &str) -> Result<(), DiskError> {
    check_name(name)?;
    let not_open = || DiskError::NotOpen { name: name.to_owned() };
    let mut device = match libcryptsetup_rs::status(None, name) {
        Ok(CryptStatusInfo::Active | CryptStatusInfo::Busy) => {
            CryptInit::init_by_name_and_header(name, None).map_err(|_| not_open())?
        }
        _ => return Err(not_open()),
    };
    let ours = device
        .status_handle()
        .dump_json()
        .is_ok_and(|metadata| find_token(&metadata).is_ok());
    if !ours {
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

type Job = Box<dyn FnOnce() + Send>;

/// The one thread that calls libcryptsetup. It ends with the last handle.
#[derive(Debug, Clone)]
pub struct DiskThread(mpsc::Sender<Job>);

impl DiskThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn start() -> std::io::Result<Self> {
        let (jobs, work) = mpsc::channel::<Job>();
        std::thread::Builder::new().name("disk".into()).spawn(move || {
            while let Ok(job) = work.recv() {
                job();
            }
        })?;
        Ok(Self(jobs))
    }

    /// Reads a header: see [`Header::read`].
    ///
    /// # Errors
    /// As there.
    pub async fn read(&self, image: PathBuf) -> Result<Header, DiskError> {
        self.call(move || Header::read(&image)).await
    }

    /// Whether the disk can be opened under this name: see [`check_free`].
    ///
    /// # Errors
    /// As there.
    pub async fn check_free(&self, header: Header, name: String) -> Result<(), DiskError> {
        self.call(move || check_free(&header, &name)).await
    }

    /// Opens a disk: see [`open`].
    ///
    /// # Errors
    /// As there.
    pub async fn open(&self, header: Header, name: String, key: Zeroizing<Vec<u8>>) -> Result<(), DiskError> {
        self.call(move || open(&header, &name, &key)).await
    }

    /// Closes a disk: see [`close`].
    ///
    /// # Errors
    /// As there.
    pub async fn close(&self, name: String) -> Result<(), DiskError> {
        self.call(move || close(&name)).await
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let job: Job = Box::new(move || drop(reply.send(work())));
        self.0.send(job).map_err(|_| DiskError::Stopped)?;
        answer.await.map_err(|_| DiskError::Stopped)?
    }
}

fn load(image: &Path) -> Result<CryptDevice, DiskError> {
    // libcryptsetup answers "not a block device" to a file that is missing; ask the system first.
    let open = |source| DiskError::Open {
        image: image.to_owned(),
        source,
    };
    let kind = std::fs::metadata(image).map_err(open)?.file_type();
    if kind.is_dir() {
        return Err(open(std::io::ErrorKind::IsADirectory.into()));
    }
    // Opening a pipe would wait for its other end, and with it every other disk.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(open(std::io::Error::other("it is neither a file nor a block device")));
    }
    std::fs::File::open(image).map_err(open)?;
    let not_luks = |source| DiskError::NotLuks {
        image: image.to_owned(),
        source,
    };
    let mut device = CryptInit::init(image).map_err(not_luks)?;
    device
        .context_handle()
        .load::<()>(Some(EncryptionFormat::Luks2), None)
        .map_err(not_luks)?;
    Ok(device)
}

/// Data and key slots, all of them: the slot that opens is whichever accepts the passphrase.
fn check_ciphers(metadata: &Value, image: &Path) -> Result<(), DiskError> {
    let entries = |what: &str| metadata.get(what).and_then(Value::as_object).into_iter().flatten();
    let segments = entries("segments").map(|(id, segment)| (format!("data segment {id}"), segment));
    let slots =
        entries("keyslots").map(|(id, slot)| (format!("key slot {id}"), slot.get("area").unwrap_or(&Value::Null)));
    let parts: Vec<_> = segments.chain(slots).collect();
    for (part, value) in parts {
        let cipher = value.get("encryption").and_then(Value::as_str).unwrap_or("nothing");
        if cipher != CIPHER {
            let cipher = cipher.chars().take(80).collect();
            return Err(DiskError::Cipher {
                image: image.to_owned(),
                part,
                cipher,
            });
        }
    }
    Ok(())
}

/// The key derivations of all key slots and digests: a passphrase may be tried on each, on the one thread that opens disks.
fn check_costs(metadata: &Value, image: &Path) -> Result<(), DiskError> {
    let entries = |what: &str| metadata.get(what).and_then(Value::as_object).into_iter().flatten();
    let slots =
        entries("keyslots").map(|(id, slot)| (format!("key slot {id}"), slot.get("kdf").unwrap_or(&Value::Null)));
    let digests = entries("digests").map(|(id, digest)| (format!("digest {id}"), digest));
    for (part, kdf) in slots.chain(digests) {
        let number = |member: &str| kdf.get(member).and_then(Value::as_u64).unwrap_or(0);
        let (iterations, passes, memory) = (number("iterations"), number("time"), number("memory"));
        if iterations > MAX_ITERATIONS || memory > MAX_KDF_KIB || passes.saturating_mul(memory) > MAX_KDF_WORK_KIB {
            return Err(DiskError::Cost {
                image: image.to_owned(),
                part,
                wanted: format!("{iterations} iterations, {passes} passes over {memory} KiB"),
            });
        }
    }
    Ok(())
}

fn find_token(metadata: &Value) -> Result<LuksToken, TokenError> {
    let tokens: Vec<Value> = metadata
        .get("tokens")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(_, token)| token.clone())
        .collect();
    LuksToken::find(&tokens)
}

/// The mapping under which a LUKS UUID is open, from `/sys/class/block/dm-*/dm/{uuid,name}`.
fn open_mapping(block: &Path, uuid: &[u8; 16]) -> Option<String> {
    let wanted = format!("{DM_PREFIX}{}-", hex::encode(uuid));
    std::fs::read_dir(block).ok()?.flatten().find_map(|entry| {
        let dm = entry.path().join("dm");
        let id = std::fs::read_to_string(dm.join("uuid")).ok()?;
        let name = std::fs::read_to_string(dm.join("name")).ok()?;
        id.starts_with(&wanted).then(|| name.trim_end().to_owned())
    })
}

#[cfg(test)]
#[path = "luks_tests.rs"]
mod tests;
