//! LZ4 as the kernel unpacks an initramfs (lib/decompress_unlz4.c): a magic number, then blocks that unpack to 8 MiB each,
//! the last one to less. No end mark, no checksum: what is in it has to say whether it is whole.

use std::io::{self, BufRead, Read};

use super::source::read_count;

/// A block unpacks to at most this (LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE).
const BLOCK: u32 = 8 << 20;
/// The longest form of a block that cannot be compressed (LZ4_COMPRESSBOUND).
const PACKED: u32 = BLOCK + BLOCK / 255 + 16;
const MAGIC: u32 = 0x184c_2102;

pub(super) struct Lz4Reader<R> {
    inner: R,
    block: Vec<u8>,
    given: usize,
    begun: bool,
}

impl<R: BufRead> Lz4Reader<R> {
    pub(super) const fn new(inner: R) -> Self {
        Self {
            inner,
            block: Vec::new(),
            given: 0,
            begun: false,
        }
    }

    pub(super) fn into_inner(self) -> R {
        self.inner
    }

    /// Unpacks the next block; false at the end.
    fn next(&mut self) -> io::Result<bool> {
        loop {
            if self.begun && self.inner.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let mut size = [0; 4];
            self.inner.read_exact(&mut size)?;
            match u32::from_le_bytes(size) {
                // Also where one archive follows the other.
                MAGIC => self.begun = true,
                // Padding.
                0 if self.begun => return Ok(false),
                size if self.begun && size <= PACKED => {
                    let packed = read_count(&mut self.inner, "an lz4 block", u64::from(size))?;
                    self.block.resize(BLOCK as usize, 0);
                    let length = lz4_flex::block::decompress_into(&packed, &mut self.block)
                        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                    self.block.truncate(length);
                    self.given = 0;
                    return Ok(true);
                }
                _ => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a block is longer than blocks can be",
                    ));
                }
            }
        }
    }
}

impl<R: BufRead> Read for Lz4Reader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let rest = self.block.get(self.given..).unwrap_or_default();
            let count = rest.len().min(out.len());
            if count > 0 || out.is_empty() {
                if let (Some(from), Some(to)) = (rest.get(..count), out.get_mut(..count)) {
                    to.copy_from_slice(from);
                }
                self.given = self.given.saturating_add(count);
                return Ok(count);
            }
            if !self.next()? {
                return Ok(0);
            }
        }
    }
}
