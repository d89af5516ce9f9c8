//! A checked reader for binary formats.
//!
//! All parsers of this crate go through it, so that none indexes into bytes or narrows a length by a cast. What is
//! missing and what is left over are errors that say where.

/// Why bytes could not be read as the structure they should hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The input ends inside a field.
    #[error("{what} is cut short: {wanted} bytes wanted at byte {at}, {left} left")]
    Short {
        /// The structure that was being read.
        what: &'static str,
        /// Offset in bytes from the start of that structure.
        at: usize,
        /// Bytes that the field needs.
        wanted: usize,
        /// Bytes that were there.
        left: usize,
    },
    /// The structure ended before the input did.
    #[error("{what} is followed by {count} bytes that belong to nothing")]
    Trailing {
        /// The structure that was being read.
        what: &'static str,
        /// Bytes left over.
        count: usize,
    },
}

/// Reads fields from the front of a byte slice. Cheap to copy: a copy is a look-ahead.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `bytes`; `what` names the structure in errors.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self {
            what,
            rest: bytes,
            at: 0,
        }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left; the reader then stays where it was.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], ReadError> {
        let Some((head, rest)) = self.rest.split_at_checked(count) else {
            return Err(ReadError::Short {
                what: self.what,
                at: self.at,
                wanted: count,
                left: self.rest.len(),
            });
        };
        self.rest = rest;
        self.at = self.at.saturating_add(count);
        Ok(head)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let short = ReadError::Short {
            what: self.what,
            at: self.at,
            wanted: N,
            left: self.rest.len(),
        };
        self.take(N)?.try_into().map_err(|_| short)
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`ReadError::Short`] at the end.
    pub fn u8(&mut self) -> Result<u8, ReadError> {
        self.array::<1>().map(u8::from_be_bytes)
    }

    /// The next two bytes, big-endian.
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn u16(&mut self) -> Result<u16, ReadError> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes, big-endian.
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn u32(&mut self) -> Result<u32, ReadError> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes, big-endian.
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn u64(&mut self) -> Result<u64, ReadError> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next two bytes, little-endian (firmware logs).
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn u16_le(&mut self) -> Result<u16, ReadError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes, little-endian (firmware logs).
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn u32_le(&mut self) -> Result<u32, ReadError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes, little-endian (firmware logs).
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn u64_le(&mut self) -> Result<u64, ReadError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A big-endian u16 length and that many bytes: a `TPM2B`.
    ///
    /// # Errors
    /// [`ReadError::Short`] when fewer are left.
    pub fn sized_u16(&mut self) -> Result<&'a [u8], ReadError> {
        let count = usize::from(self.u16()?);
        self.take(count)
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// True when every byte was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Bytes read so far.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// Ends the structure.
    ///
    /// # Errors
    /// [`ReadError::Trailing`] when bytes are left.
    pub fn finish(self) -> Result<(), ReadError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(ReadError::Trailing {
            what: self.what,
            count: self.rest.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_input_names_place_and_leaves_the_reader() {
        let mut reader = Reader::new("thing", &[1, 2, 3]);
        assert_eq!(reader.u16().unwrap(), 0x0102);
        let short = ReadError::Short {
            what: "thing",
            at: 2,
            wanted: 4,
            left: 1,
        };
        assert_eq!(reader.u32(), Err(short));
        assert_eq!(reader.left(), 1);
        assert_eq!(
            reader.finish(),
            Err(ReadError::Trailing {
                what: "thing",
                count: 1
            })
        );
    }

    #[test]
    fn both_byte_orders() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(Reader::new("n", &bytes).u64().unwrap(), 0x0102_0304_0506_0708);
        assert_eq!(Reader::new("n", &bytes).u64_le().unwrap(), 0x0807_0605_0403_0201);
        assert_eq!(Reader::new("n", &bytes).u16_le().unwrap(), 0x0201);
        assert_eq!(Reader::new("n", &bytes).u32_le().unwrap(), 0x0403_0201);
    }

    #[test]
    fn sized_field() {
        let mut reader = Reader::new("n", &[0, 2, 9, 8]);
        assert_eq!(reader.sized_u16().unwrap(), &[9, 8]);
        assert!(reader.is_empty());
        assert!(Reader::new("n", &[0, 3, 9, 8]).sized_u16().is_err());
    }
}
