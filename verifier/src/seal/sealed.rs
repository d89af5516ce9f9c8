//! Images that are sealed already: what they say about themselves, and the way back to the disk in the clear.

use std::path::{Path, PathBuf};

use assay_evidence::{
    digest::Sha256Digest,
    luks,
    luks1::Luks1,
    token::{LuksToken, TokenError},
    uuid::Uuid,
};
use libcryptsetup_rs::{CryptDevice, CryptInit, LibcryptErr, consts::vals::EncryptionFormat};
use serde_json::Value;

use super::{
    Format, HEADER_LEN, InputFormat, SECTOR_LEN, SealError,
    header::{CIPHER, VOLUME_KEY_LEN, VolumeKey, luks_failed},
    input::{Contents, Source},
    luks1,
    output::Partial,
    qemu, segment, sidecar,
};
use crate::keystore::KeyInfo;

/// A sealed image, as its header tells. All of this is what whoever wrote the image last says.
#[derive(Debug)]
pub struct Sealed {
    /// The image.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// UUID of the LUKS header.
    pub uuid: Uuid,
    /// Such as `aes-xts-plain64`; of the first data segment.
    pub cipher: String,
    /// Sector length of the encryption, in bytes.
    pub sector_size: u64,
    /// Where the data begins, in bytes; of no meaning in qcow2.
    pub data_offset: u64,
    /// Size of the disk inside, in bytes.
    pub disk_size: u64,
    /// Numbers of the key slots that are filled.
    pub slots: Vec<u32>,
    /// The token of its header, or of the sidecar.
    pub token: Result<LuksToken, TokenError>,
    /// Fingerprint of the header.
    pub fingerprint: Sha256Digest,
}

impl Sealed {
    /// Reads what an image says about itself.
    ///
    /// # Errors
    /// [`SealError::NotSealed`] when it is none, [`SealError::Input`] and [`SealError::Luks`] when it can't be read.
    pub fn read(path: &Path) -> Result<Self, SealError> {
        let source = Source::open_file(path)?;
        let luks1 = |format, header: Luks1, disk_size| {
            Ok(Self {
                path: path.to_owned(),
                format,
                uuid: header.uuid,
                cipher: header.cipher,
                sector_size: SECTOR_LEN,
                data_offset: header.data_offset,
                disk_size,
                slots: header.slots.iter().map(|slot| slot.number).collect(),
                token: sidecar::read(path)?.ok_or(TokenError::Missing),
                fingerprint: header.fingerprint,
            })
        };
        match source.contents()? {
            Contents::Luks2 => Self::read_luks2(path, source.len()),
            Contents::Luks1 => {
                let header = luks1::read(source.file(), path, 0)?;
                let size = source.len().saturating_sub(header.data_offset);
                luks1(Format::Luks1, header, size)
            }
            Contents::Container("qcow2") => match luks1::read_in_qcow2(source.file(), path)? {
                Some(inside) => luks1(Format::Qcow2Luks, inside.luks, inside.disk_size),
                None => Err(SealError::NotSealed(path.to_owned())),
            },
            Contents::Container(_) | Contents::Unknown => Err(SealError::NotSealed(path.to_owned())),
        }
    }

    fn read_luks2(path: &Path, len: u64) -> Result<Self, SealError> {
        let failed = |operation| luks_failed(path, operation);
        let mut device = load(path, EncryptionFormat::Luks2).map_err(failed("read the header"))?;
        let mut status = device.status_handle();
        let uuid = Uuid::new(*status.get_uuid().map_err(failed("read the UUID"))?.as_bytes());
        let json = status.dump_json().map_err(failed("read the metadata"))?;
        let segment = |member: &str| json.pointer(&format!("/segments/0/{member}"));
        let number = |member: &str| {
            let text = segment(member).and_then(Value::as_str);
            text.and_then(|text| text.parse::<u64>().ok())
        };
        let members = |name: &str| json.get(name).and_then(Value::as_object).into_iter().flatten();
        let data_offset = number("offset").unwrap_or(0);
        let tokens: Vec<Value> = members("tokens").map(|(_, token)| token.clone()).collect();
        let mut slots: Vec<u32> = members("keyslots").filter_map(|(slot, _)| slot.parse().ok()).collect();
        slots.sort_unstable();
        Ok(Self {
            path: path.to_owned(),
            format: Format::Luks2,
            uuid,
            cipher: segment("encryption")
                .and_then(Value::as_str)
                .unwrap_or("nothing")
                .to_owned(),
            sector_size: segment("sector_size").and_then(Value::as_u64).unwrap_or(0),
            data_offset,
            disk_size: number("size").unwrap_or(len.saturating_sub(data_offset)),
            slots,
            token: LuksToken::find(&tokens),
            fingerprint: luks::luks2(uuid, &json).map_err(SealError::Fingerprint)?,
        })
    }

    /// The token, which names the image's key.
    ///
    /// # Errors
    /// [`SealError::NoToken`].
    pub fn key_id(&self) -> Result<Uuid, SealError> {
        let no_token = |reason| SealError::NoToken {
            path: self.path.clone(),
            reason,
        };
        match &self.token {
            Ok(token) => token
                .key_id()
                .parse()
                .map_err(|_| no_token("its key id is no UUID".to_owned())),
            Err(error) => Err(no_token(error.to_string())),
        }
    }

    /// Refuses a header that isn't the one which the key belongs to.
    ///
    /// # Errors
    /// [`SealError::OtherHeader`].
    pub fn check_key(&self, key: &KeyInfo) -> Result<(), SealError> {
        let same = key.disk_uuid == self.uuid && key.header.is_none_or(|header| header == self.fingerprint);
        if same {
            return Ok(());
        }
        Err(SealError::OtherHeader {
            path: self.path.clone(),
            key_id: key.key_id,
        })
    }

    /// Decrypts the image into a new raw file of mode 0600, by the passphrase of any of its key slots. `progress` hears the bytes done and the
    /// bytes in all.
    ///
    /// # Errors
    /// [`SealError::WrongSecret`] when it opens no slot, [`SealError::Unusual`] for a layout that is not read here, and those of sealing.
    pub fn unseal(&self, secret: &[u8], output: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, SealError> {
        match self.format {
            Format::Luks1 | Format::Luks2 => self.unseal_luks(secret, output, progress),
            Format::Qcow2Luks => self.unseal_qcow2(secret, output, progress),
        }
    }

    fn unseal_luks(&self, secret: &[u8], output: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, SealError> {
        let (_, _, key) = self.open(secret)?;
        let mut source = Source::open_file(&self.path)?;
        let partial = Partial::create(output, self.disk_size, 0o600)?;
        segment::decrypt(&mut source, self.data_offset, self.disk_size, &partial, &key, progress)?;
        partial.sync()?;
        partial.publish()?;
        Ok(self.disk_size)
    }

    fn unseal_qcow2(&self, secret: &[u8], output: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, SealError> {
        let secret = qemu::SecretFile::new(secret)?;
        qemu::check_alone(&self.path, InputFormat::Qcow2)?;
        let mut source = Source::open_encrypted(&self.path, &secret)?;
        let size = source.len();
        let partial = Partial::create(output, size, 0o600)?;
        segment::copy(&mut source, &partial, progress)?;
        partial.sync()?;
        partial.publish()?;
        Ok(size)
    }

    /// Opens the header with a secret: the device, the slot that took it, and the volume key.
    pub(super) fn open(&self, secret: &[u8]) -> Result<(CryptDevice, u32, VolumeKey), SealError> {
        let kind = match self.format {
            Format::Luks1 => EncryptionFormat::Luks1,
            Format::Luks2 | Format::Qcow2Luks => EncryptionFormat::Luks2,
        };
        self.open_at(&self.path, kind, secret)
    }

    /// The same, with the header found here.
    pub(super) fn open_at(
        &self,
        header: &Path,
        kind: EncryptionFormat,
        secret: &[u8],
    ) -> Result<(CryptDevice, u32, VolumeKey), SealError> {
        self.check_layout()?;
        let mut device = load(header, kind).map_err(luks_failed(&self.path, "read the header"))?;
        match usize::try_from(device.status_handle().get_volume_key_size()) {
            Ok(VOLUME_KEY_LEN) => {}
            other => return Err(self.unusual("volume key length", format!("{other:?}"))),
        }
        match VolumeKey::open(&mut device, secret) {
            Ok((slot, key)) => Ok((device, slot, key)),
            Err(LibcryptErr::IOError(error)) if error.raw_os_error() == Some(libc::EPERM) => {
                Err(SealError::WrongSecret(self.path.clone()))
            }
            Err(source) => Err(luks_failed(&self.path, "open a key slot")(source)),
        }
    }

    /// What is decrypted here: a single segment in 512-byte sectors, as it was sealed. Everything else is left to cryptsetup.
    fn check_layout(&self) -> Result<(), SealError> {
        let cipher = format!("{}-{}", CIPHER.0, CIPHER.1);
        if self.cipher != cipher {
            return Err(self.unusual("cipher", self.cipher.clone()));
        }
        if self.sector_size != SECTOR_LEN {
            return Err(self.unusual("sector size", self.sector_size.to_string()));
        }
        if self.data_offset < HEADER_LEN.min(SECTOR_LEN) || !self.disk_size.is_multiple_of(SECTOR_LEN) {
            return Err(self.unusual(
                "data segment",
                format!("{} bytes at {}", self.disk_size, self.data_offset),
            ));
        }
        Ok(())
    }

    pub(super) fn unusual(&self, what: &'static str, found: String) -> SealError {
        SealError::Unusual {
            path: self.path.clone(),
            what,
            found: found.chars().take(80).collect(),
        }
    }
}

fn load(path: &Path, kind: EncryptionFormat) -> Result<CryptDevice, LibcryptErr> {
    let mut device = CryptInit::init(path)?;
    device.context_handle().load::<()>(Some(kind), None)?;
    Ok(device)
}
