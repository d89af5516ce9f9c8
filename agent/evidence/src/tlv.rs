//! Type-length-value of the TCG Canonical Event Log: type u8, length u32 big-endian, value
//! (TCG Canonical Event Log Format 1.0, section 5.1).

use crate::reader::{ReadError, Reader};

/// Bytes of type and length before a value.
pub(crate) const HEADER: usize = 5;

/// The next type and value.
pub(crate) fn get<'a>(reader: &mut Reader<'a>) -> Result<(u8, &'a [u8]), ReadError> {
    let kind = reader.u8()?;
    let declared = reader.u32()?;
    // On a 32-bit machine the largest slice is shorter than u32::MAX; the take fails either way.
    let count = usize::try_from(declared).unwrap_or(usize::MAX);
    Ok((kind, reader.take(count)?))
}

/// Appends one TLV. Values of this crate are bounded far below 4 GiB before they come here; a longer one would be
/// written with a length that no reader accepts.
pub(crate) fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    let declared = u32::try_from(value.len()).unwrap_or(u32::MAX);
    out.push(kind);
    out.extend_from_slice(&declared.to_be_bytes());
    out.extend_from_slice(value);
}
