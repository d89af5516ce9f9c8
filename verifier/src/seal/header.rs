//! The LUKS header: made by libcryptsetup in memory, then checked against what the data segment relies on.
//!
//! In memory, so that a crash leaves no image with a header and without its data, and the same header can stand in front of a new file
//! or be put before data that was moved to make room for it.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use assay_evidence::{
    digest::Sha256Digest,
    luks,
    token::{LuksToken, TokenError},
    uuid::Uuid,
};
use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsLuks1, CryptParamsLuks1Ref, CryptParamsLuks2, CryptParamsLuks2Ref,
    CryptPbkdfType, Either, LibcryptErr, TokenInput,
    consts::{
        flags::{CryptPbkdf, CryptVolumeKey},
        vals::{CryptKdf, EncryptionFormat, KeyslotsSize, MetadataSize},
    },
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use zeroize::Zeroizing;

use super::{SealError, Terms, random};
use crate::keystore::Passphrase;

/// Length of the header in bytes: the data segment begins here. 4 MiB instead of cryptsetup's usual 16 still hold 15
/// more key slots in LUKS2.
pub const HEADER_LEN: u64 = 4 * 1024 * 1024;
/// Sector length in bytes. cryptsetup would choose 4096 for a file, and a disk partitioned for 512 would not boot.
pub const SECTOR_LEN: u64 = 512;

/// Two copies of the metadata of 16 KiB each stand before the key slots.
const METADATA_LEN: u64 = 2 * 16 * 1024;
pub(super) const CIPHER: (&str, &str) = ("aes", "xts-plain64");
/// 512 bits: AES-256 for the data, another AES-256 for the tweak.
pub(super) const VOLUME_KEY_LEN: usize = 64;
/// The least that libcryptsetup takes. Stretching is for passphrases that can be guessed: these are 32 random bytes
/// in hex, and no number of iterations makes 2^256 tries any harder. The VM's start shouldn't wait for it.
const PBKDF_ITERATIONS: u32 = 1000;
/// The slot of the key that hosts get. The recovery key has the one behind it.
pub(super) const KEYSLOT: u32 = 0;
const RECOVERY_SLOT: u32 = 1;

/// The key that encrypts the data segment; wiped when dropped.
pub(super) struct VolumeKey(Zeroizing<[u8; VOLUME_KEY_LEN]>);

impl VolumeKey {
    /// Makes a random key. Its halves differ, as IEEE 1619 and FIPS want it, but for one case in 2^256.
    pub(super) fn generate() -> Result<Self, SealError> {
        let mut key = Zeroizing::new([0_u8; VOLUME_KEY_LEN]);
        random(key.as_mut())?;
        Ok(Self(key))
    }

    /// The key that a passphrase opens, and the number of its slot.
    pub(super) fn open(device: &mut CryptDevice, passphrase: &[u8]) -> Result<(u32, Self), LibcryptErr> {
        let mut key = Zeroizing::new([0_u8; VOLUME_KEY_LEN]);
        let (slot, _) = device.volume_key_handle().get(None, key.as_mut(), Some(passphrase))?;
        Ok((u32::try_from(slot).unwrap_or(0), Self(key)))
    }

    /// The data key and the tweak key.
    pub(super) fn halves(&self) -> (&[u8; 32], &[u8; 32]) {
        let (halves, _) = self.0.as_chunks::<32>();
        match halves {
            [data, tweak] => (data, tweak),
            _ => unreachable!("64 bytes are two chunks of 32"),
        }
    }
}

/// Which LUKS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    /// With its token inside.
    Luks2,
    /// As qemu reads it; there is no place for a token.
    Luks1,
}

/// A finished header.
pub(super) struct Header {
    /// The LUKS UUID, which key requests name.
    pub(super) uuid: Uuid,
    /// What its key is bound to.
    pub(super) fingerprint: Sha256Digest,
    /// [`HEADER_LEN`] bytes.
    pub(super) bytes: Vec<u8>,
}

/// The token that tells a host whom to ask for which key.
pub(super) fn token(terms: &Terms<'_>, key_id: Uuid) -> Result<LuksToken, SealError> {
    LuksToken::new(
        KEYSLOT,
        terms.verifiers.to_vec(),
        terms.verifier_spki_sha256,
        key_id.to_string(),
        terms.policy.to_owned(),
    )
    .map_err(SealError::Token)
}

/// A token as JSON, as headers hold it.
pub(super) fn token_json(token: &LuksToken) -> Result<serde_json::Value, SealError> {
    serde_json::to_value(token).map_err(|source| SealError::Token(TokenError::Malformed(source)))
}

/// Makes a header: formats, fills the key slots, imports the token (LUKS2), and reads it all back. `image` only names the image in errors.
pub(super) fn make(
    version: Version,
    image: &Path,
    volume_key: &VolumeKey,
    passphrase: &Passphrase,
    terms: &Terms<'_>,
    token: &LuksToken,
) -> Result<Header, SealError> {
    let memory = Memory::new().map_err(SealError::Memory)?;
    let failed = |operation| luks_failed(image, operation);
    let mut device = CryptInit::init(&memory.path).map_err(failed("start"))?;
    match version {
        Version::Luks2 => format_luks2(&mut device, volume_key),
        Version::Luks1 => format_luks1(&mut device, volume_key),
    }
    .map_err(failed("write a LUKS header"))?;
    let recovery = terms.recovery.map(|key| (RECOVERY_SLOT, key.expose().as_bytes()));
    for (slot, secret) in [(KEYSLOT, passphrase.expose())].into_iter().chain(recovery) {
        add_key(&mut device, slot, volume_key, secret).map_err(failed("fill a key slot"))?;
    }
    if version == Version::Luks2 {
        device
            .token_handle()
            .json_set(TokenInput::AddToken(&token_json(token)?))
            .map_err(failed("write the token"))?;
    }
    drop(device);
    let (uuid, fingerprint) = read_back(version, &memory.path, image, volume_key, passphrase)?;
    let bytes = memory.take().map_err(SealError::Memory)?;
    Ok(Header {
        uuid,
        fingerprint,
        bytes,
    })
}

/// Fills a key slot with another secret for the volume key.
pub(super) fn add_key(
    device: &mut CryptDevice,
    slot: u32,
    volume_key: &VolumeKey,
    secret: &[u8],
) -> Result<(), LibcryptErr> {
    device.settings_handle().set_pbkdf_type(&pbkdf())?;
    device.keyslot_handle().add_by_key(
        Some(slot),
        Some(Either::Left(volume_key.0.as_ref())),
        secret,
        CryptVolumeKey::empty(),
    )?;
    Ok(())
}

/// An error of libcryptsetup, with what was tried and on which image.
pub(super) fn luks_failed<'a>(path: &'a Path, operation: &'static str) -> impl FnOnce(LibcryptErr) -> SealError + 'a {
    move |source| SealError::Luks {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// A file in memory that libcryptsetup can open by a path, for as long as it lives.
pub(super) struct Memory {
    file: File,
    pub(super) path: PathBuf,
}

impl Memory {
    fn new() -> io::Result<Self> {
        let file = File::from(memfd_create(c"luks-header", MFdFlags::MFD_CLOEXEC)?);
        // One sector of data, since libcryptsetup wants the segment to have some.
        file.set_len(HEADER_LEN + SECTOR_LEN)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(Self { file, path })
    }

    /// With a header of at most [`HEADER_LEN`] bytes at its beginning, and zeros behind it.
    pub(super) fn holding(header: &[u8]) -> io::Result<Self> {
        let mut this = Self::new()?;
        this.file.write_all(header)?;
        Ok(this)
    }

    fn take(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(HEADER_LEN).unwrap_or(0)];
        self.file.rewind()?;
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn pbkdf() -> CryptPbkdfType {
    CryptPbkdfType {
        type_: CryptKdf::Pbkdf2,
        hash: Some("sha256".to_owned()),
        time_ms: 0,
        iterations: PBKDF_ITERATIONS,
        max_memory_kb: 0,
        parallel_threads: 0,
        // Without this flag the library would measure the machine and choose for itself.
        flags: CryptPbkdf::NO_BENCHMARK,
    }
}

fn format_luks2(device: &mut CryptDevice, volume_key: &VolumeKey) -> Result<(), LibcryptErr> {
    let params = CryptParamsLuks2 {
        pbkdf: Some(pbkdf()),
        integrity: None,
        integrity_params: None,
        data_alignment: usize::try_from(HEADER_LEN / SECTOR_LEN).unwrap_or(0),
        data_device: None,
        sector_size: u32::try_from(SECTOR_LEN).unwrap_or(0),
        label: None,
        subsystem: None,
    };
    let keyslots = KeyslotsSize::try_from(HEADER_LEN - METADATA_LEN)?;
    let mut settings = device.settings_handle();
    settings.set_metadata_size(MetadataSize::Kb16, keyslots)?;
    let mut params: CryptParamsLuks2Ref<'_> = (&params).try_into()?;
    device.context_handle().format(
        EncryptionFormat::Luks2,
        CIPHER,
        None,
        Either::Left(volume_key.0.as_ref()),
        Some(&mut params),
    )
}

fn format_luks1(device: &mut CryptDevice, volume_key: &VolumeKey) -> Result<(), LibcryptErr> {
    let params = CryptParamsLuks1 {
        hash: "sha256".to_owned(),
        data_alignment: usize::try_from(HEADER_LEN / SECTOR_LEN).unwrap_or(0),
        data_device: None,
    };
    // The digest of the volume key is stretched, too.
    device.settings_handle().set_pbkdf_type(&pbkdf())?;
    let mut params: CryptParamsLuks1Ref<'_> = (&params).try_into()?;
    device.context_handle().format(
        EncryptionFormat::Luks1,
        CIPHER,
        None,
        Either::Left(volume_key.0.as_ref()),
        Some(&mut params),
    )
}

/// Opens the finished header as a host would, and refuses any layout but the one that the data is written in.
fn read_back(
    version: Version,
    path: &Path,
    image: &Path,
    volume_key: &VolumeKey,
    passphrase: &Passphrase,
) -> Result<(Uuid, Sha256Digest), SealError> {
    let failed = |operation| luks_failed(image, operation);
    let mut device = CryptInit::init(path).map_err(failed("start"))?;
    let kind = match version {
        Version::Luks2 => EncryptionFormat::Luks2,
        Version::Luks1 => EncryptionFormat::Luks1,
    };
    device
        .context_handle()
        .load::<()>(Some(kind), None)
        .map_err(failed("read the header back"))?;
    let mut status = device.status_handle();
    let uuid = Uuid::new(*status.get_uuid().map_err(failed("read the UUID back"))?.as_bytes());
    let fingerprint = match version {
        Version::Luks2 => {
            let json = status.dump_json().map_err(failed("read the metadata back"))?;
            check_segment(&json)?;
            luks::luks2(uuid, &json).map_err(SealError::Fingerprint)?
        }
        Version::Luks1 => {
            let offset = status.get_data_offset().saturating_mul(SECTOR_LEN);
            wanted("data offset", offset, HEADER_LEN)?;
            let cipher = (status.get_cipher(), status.get_cipher_mode());
            let cipher = format!("{}-{}", cipher.0.unwrap_or_default(), cipher.1.unwrap_or_default());
            wanted("cipher", cipher, format!("{}-{}", CIPHER.0, CIPHER.1))?;
            let mut start = [0; luks::LUKS1_FIXED_LEN];
            File::open(path)
                .and_then(|mut file| file.read_exact(&mut start))
                .map_err(SealError::Memory)?;
            luks::luks1(&start).map_err(SealError::Fingerprint)?
        }
    };
    let (slot, opened) =
        VolumeKey::open(&mut device, passphrase.expose()).map_err(failed("open the key slot again"))?;
    wanted("key slot", slot, KEYSLOT)?;
    if *opened.0 != *volume_key.0 {
        return Err(SealError::Layout {
            what: "volume key",
            found: "another one".to_owned(),
            wanted: "the one given".to_owned(),
        });
    }
    Ok((uuid, fingerprint))
}

fn check_segment(json: &serde_json::Value) -> Result<(), SealError> {
    let segment = json.pointer("/segments/0").cloned().unwrap_or_default();
    for (what, pointer, value) in [
        ("segment type", "/type", serde_json::json!("crypt")),
        ("data offset", "/offset", serde_json::json!(HEADER_LEN.to_string())),
        ("segment size", "/size", serde_json::json!("dynamic")),
        ("iv_tweak", "/iv_tweak", serde_json::json!("0")),
        (
            "cipher",
            "/encryption",
            serde_json::json!(format!("{}-{}", CIPHER.0, CIPHER.1)),
        ),
        ("sector size", "/sector_size", serde_json::json!(SECTOR_LEN)),
    ] {
        wanted(what, segment.pointer(pointer).cloned().unwrap_or_default(), value)?;
    }
    Ok(())
}

fn wanted<T: PartialEq + ToString>(what: &'static str, found: T, wanted: T) -> Result<(), SealError> {
    if found == wanted {
        return Ok(());
    }
    Err(SealError::Layout {
        what,
        found: found.to_string(),
        wanted: wanted.to_string(),
    })
}
