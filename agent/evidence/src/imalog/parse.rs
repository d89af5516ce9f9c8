//! From bytes to entries.

use super::template::{self, Field};
use super::{ImaEntry, ImaLog, ImaLogError, MAX_DATA, MAX_ENTRIES, MAX_LOG};
use crate::digest::Algorithm;

/// Longest name of a template, in bytes: a list of fields may stand in for one.
const MAX_NAME: usize = 256;
/// Longest path in the template `ima`, in bytes.
const MAX_OLD_NAME: usize = 255;
const PCR_COUNT: u32 = 24;

/// Reads a whole list whose template digests are of this bank: SHA-1 for the list without a bank in its name.
///
/// # Errors
/// [`ImaLogError`], naming entry and byte. An entry whose digest is not that of its fields is an error; a violation, which
/// has none, isn't.
pub fn parse(bytes: &[u8], bank: Algorithm) -> Result<ImaLog<'_>, ImaLogError> {
    if bytes.is_empty() {
        return Err(ImaLogError::Empty);
    }
    if bytes.len() > MAX_LOG {
        return Err(ImaLogError::TooLong(bytes.len()));
    }
    let mut input = Input {
        rest: bytes,
        at: 0,
        entry: 0,
    };
    let mut entries = Vec::new();
    while !input.rest.is_empty() {
        if entries.len() == MAX_ENTRIES {
            return Err(ImaLogError::TooManyEntries);
        }
        input.entry = entries.len();
        entries.push(input.measurement(bank)?);
    }
    Ok(ImaLog { bank, entries })
}

/// What is left to read, and where that is.
struct Input<'a> {
    rest: &'a [u8],
    at: usize,
    entry: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], ImaLogError> {
        let short = ImaLogError::Short {
            entry: self.entry,
            at: self.at,
            field,
        };
        let (head, rest) = self.rest.split_at_checked(count).ok_or(short)?;
        self.rest = rest;
        self.at = self.at.saturating_add(count);
        Ok(head)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, ImaLogError> {
        let (entry, at) = (self.entry, self.at);
        let bytes = self.take(4, field)?.try_into();
        bytes
            .map(u32::from_le_bytes)
            .map_err(|_| ImaLogError::Short { entry, at, field })
    }

    /// A length of at most `limit`, and that many bytes.
    fn counted(&mut self, field: &'static str, limit: usize) -> Result<&'a [u8], ImaLogError> {
        let at = self.at;
        let length = self.u32(field)?;
        match usize::try_from(length) {
            Ok(count) if count <= limit => self.take(count, field),
            _ => Err(ImaLogError::Length {
                entry: self.entry,
                at,
                field,
                length,
                limit,
            }),
        }
    }

    fn measurement(&mut self, bank: Algorithm) -> Result<ImaEntry<'a>, ImaLogError> {
        let (entry, at) = (self.entry, self.at);
        let pcr = self.u32("PCR")?;
        if pcr >= PCR_COUNT {
            return Err(ImaLogError::NoSuchPcr { entry, at, pcr });
        }
        let digest = self.take(bank.size(), "digest")?;
        let name = self.counted("template name", MAX_NAME)?;
        let unknown = || ImaLogError::Template {
            entry,
            at,
            name: String::from_utf8_lossy(name).escape_debug().to_string(),
        };
        let template = std::str::from_utf8(name).map_err(|_| unknown())?;
        let wanted = template::fields(template).ok_or_else(unknown)?;
        let fields = match template {
            "ima" => vec![
                (Field::OldDigest, self.take(Algorithm::Sha1.size(), "file digest")?),
                (Field::OldName, self.counted("path", MAX_OLD_NAME)?),
            ],
            _ => self.fields(&wanted)?,
        };
        let measured = ImaEntry {
            pcr,
            digest,
            template,
            fields,
        };
        if !measured.is_violation() && template::digest(bank, template, &measured.fields) != digest {
            return Err(ImaLogError::Digest { entry, at, bank });
        }
        Ok(measured)
    }

    /// The template data: all of it are the fields, each behind its length.
    fn fields(&mut self, wanted: &[Field]) -> Result<Vec<(Field, &'a [u8])>, ImaLogError> {
        let whole = self.counted("template data", MAX_DATA)?;
        let begin = self.at.saturating_sub(whole.len());
        let odd = |_| ImaLogError::Fields {
            entry: self.entry,
            at: begin,
        };
        let mut data = Input {
            rest: whole,
            at: begin,
            entry: self.entry,
        };
        let read = |field: &Field| Ok((*field, data.counted("field", MAX_DATA).map_err(odd)?));
        let fields = wanted.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if data.rest.is_empty() {
            Ok(fields)
        } else {
            Err(ImaLogError::Fields {
                entry: self.entry,
                at: begin,
            })
        }
    }
}
