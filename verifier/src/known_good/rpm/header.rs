//! The header structure of rpm packages (rpm, docs/manual/format_header.md): an index of tags over a store of values. It is
//! read here, since the crate for rpm packages brings some dozens of others, most of them to make packages.

use std::io::BufRead;

use assay_evidence::digest::Sha256Digest;

use super::super::error::Fault;
use super::super::source::read_count;

const WHAT: &str = "a header of the .rpm package";
const MAGIC: &[u8] = b"\x8e\xad\xe8\x01\0\0\0\0";
/// Most tags; rpm itself takes as many.
const MAX_TAGS: u32 = 0xffff;
/// Longest store, in bytes. Packages with 100,000 files have 20 MiB.
const MAX_STORE: u32 = 64 << 20;
/// Most values of one tag: files of a package.
const MAX_VALUES: usize = 1 << 20;
/// Bytes of an index entry.
const ENTRY: usize = 16;

/// A header, and its digest over all bytes of it.
pub(super) struct Header {
    index: Vec<Entry>,
    store: Vec<u8>,
    pub(super) digest: Sha256Digest,
}

struct Entry {
    tag: u32,
    kind: u32,
    offset: usize,
    count: usize,
}

impl Header {
    /// Reads a header; returns its length, too.
    pub(super) fn read(input: &mut dyn BufRead) -> Result<(Self, u64), Fault> {
        let intro = read_count(input, WHAT, 16)?;
        let Some(sizes) = intro.strip_prefix(MAGIC) else {
            return Err(Fault::malformed(WHAT, "it does not begin as headers do"));
        };
        let mut sizes = sizes.chunks_exact(4).map(number);
        let tags = sizes.next().unwrap_or_default();
        let length = sizes.next().unwrap_or_default();
        for (what, found, limit) in [
            ("the number of a header's tags", tags, MAX_TAGS),
            ("the length of a header, in bytes,", length, MAX_STORE),
        ] {
            if found > limit {
                return Err(Fault::TooMuch {
                    what,
                    limit: u64::from(limit),
                });
            }
        }
        let index = read_count(input, WHAT, u64::from(tags) * ENTRY as u64)?;
        let store = read_count(input, WHAT, u64::from(length))?;
        let digest = Sha256Digest::of_parts(&[&intro, &index, &store]);
        let length = (intro.len() + index.len() + store.len()) as u64;
        let index = index.chunks_exact(ENTRY).map(Entry::read).collect::<Result<_, _>>()?;
        Ok((Self { index, store, digest }, length))
    }

    fn entry(&self, tag: u32) -> Option<&Entry> {
        self.index.iter().find(|entry| entry.tag == tag)
    }

    /// Whether it has this tag.
    pub(super) fn has(&self, tag: u32) -> bool {
        self.entry(tag).is_some()
    }

    /// The texts of a tag, of which there may be one or many; none where it is not there.
    pub(super) fn texts(&self, tag: u32) -> Result<Vec<&[u8]>, Fault> {
        /// STRING, STRING_ARRAY, I18NSTRING.
        const KINDS: [u32; 3] = [6, 8, 9];
        let Some(entry) = self.entry(tag) else {
            return Ok(Vec::new());
        };
        let mut rest = self.store.get(entry.offset..).filter(|_| KINDS.contains(&entry.kind));
        let mut texts = Vec::new();
        for _ in 0..entry.count {
            let begin = rest.ok_or(BROKEN)?;
            let length = begin.iter().position(|byte| *byte == 0).ok_or(BROKEN)?;
            let (text, behind) = begin.split_at_checked(length).ok_or(BROKEN)?;
            texts.push(text);
            rest = behind.get(1..);
        }
        Ok(texts)
    }

    /// The first text of a tag.
    pub(super) fn text(&self, tag: u32) -> Result<Option<&[u8]>, Fault> {
        Ok(self.texts(tag)?.first().copied())
    }

    /// The numbers of a tag, of 16, 32 or 64 bits; none where it is not there.
    pub(super) fn numbers(&self, tag: u32) -> Result<Vec<u64>, Fault> {
        let Some(entry) = self.entry(tag) else {
            return Ok(Vec::new());
        };
        // INT16, INT32, INT64.
        let width = match entry.kind {
            3 => 2,
            4 => 4,
            5 => 8,
            _ => return Err(BROKEN),
        };
        let length = entry.count.checked_mul(width).ok_or(BROKEN)?;
        let end = entry.offset.checked_add(length).ok_or(BROKEN)?;
        let bytes = self.store.get(entry.offset..end).ok_or(BROKEN)?;
        let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        Ok(bytes.chunks_exact(width).map(number).collect())
    }
}

/// Kinds of which nothing is read here, and which have a value a byte.
const BIN: u32 = 7;
const CHAR: u32 = 1;
const INT8: u32 = 2;

const BROKEN: Fault = Fault::malformed(WHAT, "a tag has no value of its kind in it");

impl Entry {
    fn read(bytes: &[u8]) -> Result<Self, Fault> {
        let mut numbers = bytes.chunks_exact(4).map(number);
        let mut next = || numbers.next().unwrap_or_default();
        let (tag, kind) = (next(), next());
        let mut size = || usize::try_from(next()).map_err(|_| BROKEN);
        let (offset, count) = (size()?, size()?);
        // Of others each byte is a value.
        if count > MAX_VALUES && ![BIN, CHAR, INT8].contains(&kind) {
            return Err(Fault::TooMuch {
                what: "the number of values of a header's tag",
                limit: MAX_VALUES as u64,
            });
        }
        Ok(Self {
            tag,
            kind,
            offset,
            count,
        })
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}
