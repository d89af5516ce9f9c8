//! The fields of one event, as nested TLVs.

use super::EventError;
use crate::digest::Sha256Digest;
use crate::reader::Reader;
use crate::tlv;

/// Writes fields; the caller keeps to ascending order.
pub(super) struct Fields {
    event: &'static str,
    out: Vec<u8>,
}

impl Fields {
    pub(super) fn new(event: &'static str) -> Self {
        Self { event, out: Vec::new() }
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.out
    }

    pub(super) fn bytes(&mut self, field: u8, value: &[u8]) {
        tlv::put(&mut self.out, field, value);
    }

    pub(super) fn text(&mut self, field: u8, value: &str, limit: usize) -> Result<(), EventError> {
        check_text(self.event, field, value.len(), limit)?;
        self.bytes(field, value.as_bytes());
        Ok(())
    }
}

fn check_text(event: &'static str, field: u8, found: usize, limit: usize) -> Result<(), EventError> {
    if found > limit {
        return Err(EventError::TextTooLong {
            event,
            field,
            found,
            limit,
        });
    }
    Ok(())
}

/// Reads fields in the one order that the format has.
pub(super) struct FieldReader<'a> {
    event: &'static str,
    reader: Reader<'a>,
}

impl<'a> FieldReader<'a> {
    pub(super) fn new(event: &'static str, value: &'a [u8]) -> Self {
        Self {
            event,
            reader: Reader::new(event, value),
        }
    }

    pub(super) fn field(&mut self, wanted: u8) -> Result<&'a [u8], EventError> {
        if self.reader.is_empty() {
            return Err(EventError::Field {
                event: self.event,
                found: 0,
                wanted,
            });
        }
        let (found, value) = tlv::get(&mut self.reader)?;
        if found != wanted {
            return Err(EventError::Field {
                event: self.event,
                found,
                wanted,
            });
        }
        Ok(value)
    }

    fn optional(&mut self, wanted: u8) -> Result<Option<&'a [u8]>, EventError> {
        let mut ahead = self.reader;
        if ahead.is_empty() || ahead.u8()? != wanted {
            return Ok(None);
        }
        self.field(wanted).map(Some)
    }

    fn width<const N: usize>(&self, field: u8, value: &[u8]) -> Result<[u8; N], EventError> {
        value.try_into().map_err(|_| EventError::Width {
            event: self.event,
            field,
            found: value.len(),
            wanted: N,
        })
    }

    pub(super) fn array<const N: usize>(&mut self, field: u8) -> Result<[u8; N], EventError> {
        let value = self.field(field)?;
        self.width(field, value)
    }

    pub(super) fn optional_array<const N: usize>(&mut self, field: u8) -> Result<Option<[u8; N]>, EventError> {
        let value = self.optional(field)?;
        value.map(|value| self.width(field, value)).transpose()
    }

    pub(super) fn optional_u64(&mut self, field: u8) -> Result<Option<u64>, EventError> {
        Ok(self.optional_array(field)?.map(u64::from_be_bytes))
    }

    pub(super) fn digest(&mut self, field: u8) -> Result<Sha256Digest, EventError> {
        self.array(field).map(Sha256Digest::new)
    }

    pub(super) fn code<T>(
        &mut self,
        field: u8,
        what: &'static str,
        known: impl Fn(u8) -> Option<T>,
    ) -> Result<T, EventError> {
        let [code] = self.array(field)?;
        known(code).ok_or(EventError::Code { what, code })
    }

    pub(super) fn text<T: From<&'a str>>(&mut self, field: u8, limit: usize) -> Result<T, EventError> {
        let value = self.field(field)?;
        check_text(self.event, field, value.len(), limit)?;
        let text = core::str::from_utf8(value).map_err(|_| EventError::NotText {
            event: self.event,
            field,
        })?;
        Ok(text.into())
    }

    pub(super) fn finish(self) -> Result<(), EventError> {
        self.reader.finish().map_err(EventError::Bytes)
    }
}
