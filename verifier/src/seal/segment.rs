//! The data segment: aes-xts-plain64 as dm-crypt writes it.

use aes::{Aes256, cipher::KeyInit};
use xts_mode::{Xts128, get_tweak_default};
use zeroize::Zeroizing;

use super::{HEADER_LEN, SECTOR_LEN, SealError, header::VolumeKey, input::Source, output::Partial};

/// Read, encrypted and written at a time.
const BLOCK_LEN: usize = 1024 * 1024;

/// Encrypts the whole source into the partial file behind the header.
///
/// The tweak of a sector is its number from the start of the segment, 64 bits little-endian and zeros above ("plain64"
/// with the header's iv_tweak 0). Zeros are encrypted like all else: a hole would tell which parts of the disk are
/// in use, and would decrypt to noise.
pub(super) fn encrypt(
    source: &mut Source,
    partial: &Partial,
    key: &VolumeKey,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SealError> {
    let (data_key, tweak_key) = key.halves();
    let xts = Xts128::new(Aes256::new(data_key.into()), Aes256::new(tweak_key.into()));
    let mut buffer = Zeroizing::new(vec![0_u8; BLOCK_LEN]);
    let (mut done, total) = (0_u64, source.len());
    while done < total {
        let left = usize::try_from(total - done).unwrap_or(usize::MAX);
        let block = buffer.get_mut(..left.min(BLOCK_LEN)).unwrap_or_default();
        source.read_block(block)?;
        xts.encrypt_area(block, SECTOR_USIZE, u128::from(done / SECTOR_LEN), get_tweak_default);
        partial.write_at(block, HEADER_LEN + done)?;
        done += block.len() as u64;
        progress(done, total);
    }
    source.check_unchanged()
}

#[expect(clippy::cast_possible_truncation, reason = "512 fits every usize")]
const SECTOR_USIZE: usize = SECTOR_LEN as usize;
