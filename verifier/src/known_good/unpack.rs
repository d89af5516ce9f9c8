//! Compressed streams, told by their first bytes.

use std::fmt;
use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::error::Fault;
use super::lz4::Lz4Reader;
use super::source::Peek;

/// Bytes that [`Packing::of`] wants to see.
pub(super) const MAGIC: usize = 6;
/// Largest dictionary of xz and window of zstd that is taken, in KiB: what `xz -9` and `zstd --ultra` use, and some more.
const WINDOW_KIB: u32 = 160 * 1024;

/// How something is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// gzip (RFC 1952).
    Gzip,
    /// xz.
    Xz,
    /// Zstandard (RFC 8878).
    Zstd,
    /// LZ4 in the legacy frames that the kernel unpacks.
    Lz4,
}

/// What is known by its first bytes, but not read: (magic, name).
const OTHERS: [(&[u8], &str); 4] = [
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (b"\x89LZO", "lzo"),
    (b"\x04\x22\x4d\x18", "lz4 in frames that no kernel unpacks"),
];

impl Packing {
    /// How bytes that begin so are compressed; none: they are not.
    ///
    /// # Errors
    /// [`Fault::Packing`]: in a way that is not read here.
    pub(super) fn of(head: &[u8]) -> Result<Option<Self>, Fault> {
        for packing in [Self::Gzip, Self::Xz, Self::Zstd, Self::Lz4] {
            if head.starts_with(packing.magic()) {
                return Ok(Some(packing));
            }
        }
        match OTHERS.iter().find(|(magic, _)| head.starts_with(magic)) {
            Some((_, name)) => Err(Fault::Packing(name)),
            None => Ok(None),
        }
    }

    const fn magic(self) -> &'static [u8] {
        match self {
            Self::Gzip => b"\x1f\x8b",
            Self::Xz => b"\xfd7zXZ\0",
            Self::Zstd => b"\x28\xb5\x2f\xfd",
            Self::Lz4 => b"\x02\x21\x4c\x18",
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        })
    }
}

/// One compressed stream. At its end the reader below stands behind its last byte; checksums have been compared.
pub(super) struct Stream<R: BufRead> {
    packing: Packing,
    decoder: Decoder<R>,
}

enum Decoder<R: BufRead> {
    Gzip(Box<GzDecoder<R>>),
    Xz(Box<XzReader<R>>),
    Zstd(Box<StreamingDecoder<R, FrameDecoder>>),
    Lz4(Box<Lz4Reader<R>>),
}

impl<R: BufRead> Stream<R> {
    pub(super) fn new(packing: Packing, inner: R) -> Result<Self, Fault> {
        let decoder = match packing {
            Packing::Gzip => Decoder::Gzip(Box::new(GzDecoder::new(inner))),
            Packing::Xz => Decoder::Xz(Box::new(XzReader::new_mem_limit(inner, false, WINDOW_KIB))),
            Packing::Zstd => {
                let limit = u64::from(WINDOW_KIB) * 1024;
                let decoder = StreamingDecoder::new_with_max_window_size(inner, limit);
                Decoder::Zstd(Box::new(decoder.map_err(|error| Fault::Unpack {
                    packing,
                    source: io::Error::other(error),
                })?))
            }
            Packing::Lz4 => Decoder::Lz4(Box::new(Lz4Reader::new(inner))),
        };
        Ok(Self { packing, decoder })
    }

    /// The reader below.
    fn into_inner(self) -> R {
        match self.decoder {
            Decoder::Gzip(decoder) => decoder.into_inner(),
            Decoder::Xz(decoder) => decoder.into_inner(),
            Decoder::Zstd(decoder) => decoder.into_inner(),
            Decoder::Lz4(decoder) => decoder.into_inner(),
        }
    }
}

impl<R: BufRead> Read for Stream<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.decoder {
            Decoder::Gzip(decoder) => decoder.read(out),
            Decoder::Xz(decoder) => decoder.read(out),
            Decoder::Zstd(decoder) => read_zstd(decoder, out),
            Decoder::Lz4(decoder) => decoder.read(out),
        };
        read.map_err(|error| match Fault::from(error) {
            Fault::Read(source) if source.kind() == io::ErrorKind::Interrupted => source,
            Fault::Read(source) => Fault::Unpack {
                packing: self.packing,
                source,
            }
            .into(),
            fault => fault.into(),
        })
    }
}

/// The decoder computes the checksum, and leaves it to others to compare it.
fn read_zstd<R: Read>(decoder: &mut StreamingDecoder<R, FrameDecoder>, out: &mut [u8]) -> io::Result<usize> {
    let count = decoder.read(out)?;
    if count == 0 && !out.is_empty() {
        let listed = decoder.decoder.get_checksum_from_data();
        if listed.is_some() && listed != decoder.decoder.get_calculated_checksum() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the content's checksum is wrong",
            ));
        }
    }
    Ok(count)
}

/// A whole file: plain, or compressed in one or several streams one after the other.
pub(super) enum Streams<R: BufRead> {
    Plain(Peek<R>),
    Packed(Stream<Peek<R>>),
    Ended,
}

impl<R: BufRead> Streams<R> {
    pub(super) fn new(inner: R) -> Result<Self, Fault> {
        let mut inner = Peek::new(inner);
        Ok(match Packing::of(inner.peek(MAGIC)?)? {
            Some(packing) => Self::Packed(Stream::new(packing, inner)?),
            None => Self::Plain(inner),
        })
    }
}

impl<R: BufRead> Read for Streams<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            let stream = match self {
                Self::Plain(inner) => return inner.read(out),
                Self::Packed(stream) => stream,
                Self::Ended => return Ok(0),
            };
            let count = stream.read(out)?;
            if count > 0 {
                return Ok(count);
            }
            let Self::Packed(stream) = std::mem::replace(self, Self::Ended) else {
                return Ok(0);
            };
            let mut inner = stream.into_inner();
            let head = inner.peek(MAGIC)?;
            if head.is_empty() {
                return Ok(0);
            }
            let packing = Packing::of(head)?.ok_or(Fault::Trailing("its compressed part"))?;
            *self = Self::Packed(Stream::new(packing, inner)?);
        }
    }
}
