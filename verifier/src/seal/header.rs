//! The LUKS2 header: made by libcryptsetup on a plain file, then checked against what the data segment relies on.

use std::path::Path;

use assay_evidence::{
    token::{LuksToken, TokenError},
    uuid::Uuid,
};
use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsLuks2, CryptParamsLuks2Ref, CryptPbkdfType, Either, LibcryptErr, TokenInput,
    consts::{
        flags::{CryptPbkdf, CryptVolumeKey},
        vals::{CryptKdf, EncryptionFormat, KeyslotsSize, MetadataSize},
    },
};
use zeroize::Zeroizing;

use super::{Request, SealError, random};
use crate::keystore::Passphrase;

/// Length of the header in bytes: the data segment begins here. 4 MiB instead of cryptsetup's usual 16 still hold 15
/// more key slots, for the owner's recovery passphrase among others.
pub const HEADER_LEN: u64 = 4 * 1024 * 1024;
/// Sector length in bytes. cryptsetup would choose 4096 for a file, and a disk partitioned for 512 would not boot.
pub const SECTOR_LEN: u64 = 512;

/// Two copies of the metadata of 16 KiB each stand before the key slots.
const METADATA_LEN: u64 = 2 * 16 * 1024;
const CIPHER: (&str, &str) = ("aes", "xts-plain64");
/// 512 bits: AES-256 for the data, another AES-256 for the tweak.
const VOLUME_KEY_LEN: usize = 64;
/// The least that libcryptsetup takes. Stretching is for passphrases that can be guessed: this one is 32 random bytes
/// in hex, and no number of iterations makes 2^256 tries any harder. The VM's start shouldn't wait for it.
const PBKDF_ITERATIONS: u32 = 1000;
/// The one key slot that is filled.
const KEYSLOT: u32 = 0;

/// The key that encrypts the data segment; wiped when dropped.
pub(super) struct VolumeKey(Zeroizing<[u8; VOLUME_KEY_LEN]>);

impl VolumeKey {
    /// Makes a random key. Its halves differ, as IEEE 1619 and FIPS want it, but for one case in 2^256.
    pub(super) fn generate() -> Result<Self, SealError> {
        let mut key = Zeroizing::new([0_u8; VOLUME_KEY_LEN]);
        random(key.as_mut())?;
        Ok(Self(key))
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

/// What later steps need of the header.
pub(super) struct Header {
    /// The LUKS UUID, which key requests name.
    pub(super) uuid: Uuid,
}

/// The token that tells a host whom to ask for which key.
pub(super) fn token(request: &Request<'_>, key_id: Uuid) -> Result<serde_json::Value, SealError> {
    let token = LuksToken::new(
        KEYSLOT,
        request.verifiers.to_vec(),
        request.verifier_spki_sha256,
        key_id.to_string(),
        request.policy.to_owned(),
    )
    .map_err(SealError::Token)?;
    serde_json::to_value(&token).map_err(|source| SealError::Token(TokenError::Malformed(source)))
}

/// Formats the file at `path`, fills one key slot, imports the token, and reads it all back.
pub(super) fn write(
    path: &Path,
    volume_key: &VolumeKey,
    passphrase: &Passphrase,
    token: &serde_json::Value,
) -> Result<Header, SealError> {
    let failed = |operation| {
        move |source| SealError::Luks {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let mut device = CryptInit::init(path).map_err(failed("start"))?;
    format(&mut device, volume_key).map_err(failed("write a LUKS2 header"))?;
    device
        .keyslot_handle()
        .add_by_key(
            Some(KEYSLOT),
            Some(Either::Left(volume_key.0.as_ref())),
            passphrase.expose(),
            CryptVolumeKey::empty(),
        )
        .map_err(failed("fill the key slot"))?;
    device
        .token_handle()
        .json_set(TokenInput::AddToken(token))
        .map_err(failed("write the token"))?;
    drop(device);
    read_back(path, volume_key, passphrase)
}

fn format(device: &mut CryptDevice, volume_key: &VolumeKey) -> Result<(), LibcryptErr> {
    let pbkdf = || CryptPbkdfType {
        type_: CryptKdf::Pbkdf2,
        hash: Some("sha256".to_owned()),
        time_ms: 0,
        iterations: PBKDF_ITERATIONS,
        max_memory_kb: 0,
        parallel_threads: 0,
        // Without this flag the library would measure the machine and choose for itself.
        flags: CryptPbkdf::NO_BENCHMARK,
    };
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
    // For the key slot, which is filled after formatting.
    settings.set_pbkdf_type(&pbkdf())?;
    let mut params: CryptParamsLuks2Ref<'_> = (&params).try_into()?;
    device.context_handle().format(
        EncryptionFormat::Luks2,
        CIPHER,
        None,
        Either::Left(volume_key.0.as_ref()),
        Some(&mut params),
    )
}

/// Opens the finished header as a host would, and refuses any layout but the one that the data is written in.
fn read_back(path: &Path, volume_key: &VolumeKey, passphrase: &Passphrase) -> Result<Header, SealError> {
    let failed = |operation| {
        move |source| SealError::Luks {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let mut device = CryptInit::init(path).map_err(failed("start"))?;
    device
        .context_handle()
        .load::<()>(Some(EncryptionFormat::Luks2), None)
        .map_err(failed("read the header back"))?;
    let mut status = device.status_handle();
    let json = status.dump_json().map_err(failed("read the metadata back"))?;
    let uuid = Uuid::new(*status.get_uuid().map_err(failed("read the UUID back"))?.as_bytes());
    let segment = json.pointer("/segments/0").cloned().unwrap_or_default();
    for (what, pointer, wanted) in [
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
        let found = segment.pointer(pointer).cloned().unwrap_or_default();
        if found != wanted {
            return Err(SealError::Layout {
                what,
                found: found.to_string(),
                wanted: wanted.to_string(),
            });
        }
    }
    let mut opened = Zeroizing::new([0_u8; VOLUME_KEY_LEN]);
    device
        .volume_key_handle()
        .get(Some(KEYSLOT), opened.as_mut(), Some(passphrase.expose()))
        .map_err(failed("open the key slot again"))?;
    if *opened != *volume_key.0 {
        return Err(SealError::Layout {
            what: "volume key",
            found: "another one".to_owned(),
            wanted: "the one given".to_owned(),
        });
    }
    Ok(Header { uuid })
}
