//! Key slots of a sealed image: which of them a secret opens, one more, one less. Those of qcow2 are written by
//! qemu-img, which refuses an image that a VM runs from.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use assay_evidence::luks1::SLOTS as LUKS1_SLOTS;
use libcryptsetup_rs::consts::vals::{EncryptionFormat, KeyslotInfo};

use super::{
    Format, HEADER_LEN, SealError, Sealed,
    header::{Memory, add_key, luks_failed},
    luks1, qcow2,
};

/// Of LUKS2, which has most.
const MAX_SLOTS: u32 = 32;

impl Sealed {
    /// The key slot that a secret opens.
    ///
    /// # Errors
    /// [`SealError::WrongSecret`] when it opens none, and those of reading the header.
    pub(super) fn slot_of(&self, secret: &[u8]) -> Result<u32, SealError> {
        let (_, slot, _) = match self.format {
            Format::Luks1 | Format::Luks2 => self.open(secret)?,
            Format::Qcow2Luks => {
                let copy = self.copied_header()?;
                self.open_at(&copy.path, EncryptionFormat::Luks1, secret)?
            }
        };
        Ok(slot)
    }

    /// Fills a free key slot with another secret, durably, and gives its number. The first secret opens the image already.
    ///
    /// # Errors
    /// [`SealError::NoSlot`] when there is none, and those of writing the header.
    pub(super) fn fill_slot(&self, secret: &[u8], new: &[u8]) -> Result<u32, SealError> {
        let no_slot = || SealError::NoSlot(self.path.clone());
        let slot = match self.format {
            Format::Luks1 | Format::Luks2 => {
                let (mut device, _, volume_key) = self.open(secret)?;
                let mut slots = device.keyslot_handle();
                let free = (0..MAX_SLOTS).find(|slot| matches!(slots.status(*slot), Ok(KeyslotInfo::Inactive)));
                let slot = free.ok_or_else(no_slot)?;
                add_key(&mut device, slot, &volume_key, new).map_err(luks_failed(&self.path, "fill a key slot"))?;
                slot
            }
            Format::Qcow2Luks => {
                let free = (0..LUKS1_SLOTS).find(|slot| !self.slots.contains(slot));
                let slot = free.ok_or_else(no_slot)?;
                qcow2::fill_slot(&self.path, slot, secret, new)?;
                slot
            }
        };
        self.sync()?;
        Ok(slot)
    }

    /// Wipes a key slot, durably. The secret opens another one.
    ///
    /// # Errors
    /// Those of writing the header.
    pub(super) fn wipe_slot(&self, slot: u32, secret: &[u8]) -> Result<(), SealError> {
        match self.format {
            Format::Luks1 | Format::Luks2 => {
                let (mut device, _, _) = self.open(secret)?;
                let wiped = device.keyslot_handle().destroy(slot);
                wiped.map_err(luks_failed(&self.path, "wipe the old key slot"))?;
            }
            Format::Qcow2Luks => qcow2::wipe_slot(&self.path, slot, secret)?,
        }
        self.sync()
    }

    /// What was written to the image is on the disk.
    pub(super) fn sync(&self) -> Result<(), SealError> {
        File::open(&self.path)
            .and_then(|file| file.sync_all())
            .map_err(|source| SealError::Output {
                operation: "sync",
                path: self.path.clone(),
                source,
            })
    }

    /// The LUKS header inside a qcow2 image, where libcryptsetup finds it: it looks for one at the beginning of a file.
    fn copied_header(&self) -> Result<Memory, SealError> {
        let failed = |source| SealError::Input {
            operation: "read",
            path: self.path.clone(),
            source,
        };
        let file = File::open(&self.path).map_err(failed)?;
        let inside = luks1::read_in_qcow2(&file, &self.path)?;
        let inside = inside.ok_or_else(|| SealError::NotSealed(self.path.clone()))?;
        // qemu-img's has 2 MiB.
        if inside.luks.data_offset > HEADER_LEN {
            return Err(self.unusual("header length", inside.luks.data_offset.to_string()));
        }
        let read = |mut file: File| -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(inside.offset))?;
            file.take(inside.luks.data_offset).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read(file).map_err(failed)?;
        Memory::holding(&bytes).map_err(SealError::Memory)
    }
}
