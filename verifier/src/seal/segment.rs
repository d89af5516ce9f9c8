//! The data segment: aes-xts-plain64 as dm-crypt reads and writes it.

use aes::{
    Aes256, Block,
    cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit},
};
use zeroize::Zeroizing;

use super::{HEADER_LEN, SECTOR_LEN, SealError, header::VolumeKey, input::Source, output::Partial};

/// Read, encrypted and written at a time.
const BLOCK_LEN: usize = 1024 * 1024;

const SECTOR: usize = 512;
const AES_BLOCK: usize = 16;

/// XTS (IEEE 1619) over whole sectors of 512 bytes. The cipher is the `aes` crate's; the mode is written out here since the crate for
/// it goes block by block, and eight at a time are five times as fast.
pub(super) struct Xts {
    data: Aes256,
    tweak: Aes256,
}

impl Xts {
    pub(super) fn new(key: &VolumeKey) -> Self {
        let (data, tweak) = key.halves();
        Self {
            data: Aes256::new(data.into()),
            tweak: Aes256::new(tweak.into()),
        }
    }

    /// Encrypts sectors, of which the first has this number from the start of the segment.
    pub(super) fn encrypt(&self, sectors: &mut [u8], first: u64) {
        self.apply(sectors, first, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts sectors.
    pub(super) fn decrypt(&self, sectors: &mut [u8], first: u64) {
        self.apply(sectors, first, |blocks| self.data.decrypt_blocks(blocks));
    }

    /// The tweak of a sector is its number, 64 bits little-endian and zeros above ("plain64" with the header's iv_tweak 0), encrypted; that of
    /// each block in it is the one before, multiplied by x in GF(2^128).
    fn apply(&self, sectors: &mut [u8], first: u64, cipher: impl Fn(&mut [Block])) {
        let (sectors, rest) = sectors.as_chunks_mut::<SECTOR>();
        debug_assert!(rest.is_empty(), "whole sectors only");
        let mut tweaks = [0_u128; SECTOR / AES_BLOCK];
        for (sector, number) in sectors.iter_mut().zip(u128::from(first)..) {
            let mut start = Block::from(number.to_le_bytes());
            self.tweak.encrypt_block(&mut start);
            let mut value = u128::from_le_bytes(start.into());
            for tweak in &mut tweaks {
                *tweak = value;
                value = (value << 1) ^ (0x87 * (value >> 127));
            }
            let (blocks, _) = sector.as_chunks_mut::<AES_BLOCK>();
            mask(blocks, &tweaks);
            cipher(Block::cast_slice_from_core_mut(blocks));
            mask(blocks, &tweaks);
        }
    }
}

fn mask(blocks: &mut [[u8; AES_BLOCK]], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

/// Encrypts the whole source into the partial file behind the header.
///
/// Zeros are encrypted like all else: a hole would tell which parts of the disk are in use, and would decrypt to noise.
pub(super) fn encrypt(
    source: &mut Source,
    partial: &Partial,
    key: &VolumeKey,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SealError> {
    let xts = Xts::new(key);
    let places = Places {
        from: 0,
        to: HEADER_LEN,
        len: source.len(),
    };
    transform(
        source,
        partial,
        places,
        &|block, first| xts.encrypt(block, first),
        progress,
    )
}

/// Decrypts a data segment of `len` bytes that begins at `offset` of the source into the partial file.
pub(super) fn decrypt(
    source: &mut Source,
    offset: u64,
    len: u64,
    partial: &Partial,
    key: &VolumeKey,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SealError> {
    let xts = Xts::new(key);
    let places = Places {
        from: offset,
        to: 0,
        len,
    };
    transform(
        source,
        partial,
        places,
        &|block, first| xts.decrypt(block, first),
        progress,
    )
}

/// Copies the source as it is.
pub(super) fn copy(
    source: &mut Source,
    partial: &Partial,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SealError> {
    let places = Places {
        from: 0,
        to: 0,
        len: source.len(),
    };
    transform(source, partial, places, &|_, _| (), progress)
}

/// Where the segment begins in source and output, and its length, in bytes.
struct Places {
    from: u64,
    to: u64,
    len: u64,
}

/// Reads a segment of the source, block by block, and writes what becomes of each; the change is told the number of the block's first sector.
fn transform(
    source: &mut Source,
    partial: &Partial,
    places: Places,
    change: &dyn Fn(&mut [u8], u64),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SealError> {
    let mut buffer = Zeroizing::new(vec![0_u8; BLOCK_LEN]);
    let (mut done, total) = (0_u64, places.len);
    while done < total {
        let left = usize::try_from(total - done).unwrap_or(usize::MAX);
        let block = buffer.get_mut(..left.min(BLOCK_LEN)).unwrap_or_default();
        source.read_at(block, places.from + done)?;
        change(block, done / SECTOR_LEN);
        partial.write_at(block, places.to + done)?;
        done += block.len() as u64;
        progress(done, total);
    }
    source.check_unchanged()
}
