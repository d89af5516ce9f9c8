//! cpio archives as kernels and rpm read them: "newc" (Documentation/driver-api/early-userspace/buffer-format.rst), and
//! rpm's stripped form, whose members are numbers into the package's list of files (rpm, lib/cpio.h).

use std::collections::{HashMap, HashSet};
use std::io::{self, BufRead, Read};

use super::error::Fault;
use super::source::{read_buffered, read_count};

/// Longest name, its NUL included: the kernel's PATH_MAX.
const MAX_NAME: u32 = 4096;
const TRAILER: &[u8] = b"TRAILER!!!";
const WHAT: &str = "the cpio archive";
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

/// What an archive says of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Member {
    /// With everything.
    Full(Header),
    /// Only its number in the package's list of files.
    Stripped(u32),
}

/// The header of a "newc" member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) mode: u32,
    pub(super) links: u32,
    /// Inode and device: equal for names of one file.
    pub(super) inode: [u32; 3],
    pub(super) size: u32,
}

impl Header {
    pub(super) const fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    pub(super) const fn is_executable(&self) -> bool {
        self.mode & 0o111 != 0
    }
}

/// An archive being read. After its last member the reader below stands behind the trailer.
pub(super) struct Archive<R> {
    inner: R,
    /// Bytes read since its start: names and content are aligned by it.
    at: u64,
    /// Bytes of the current member's content that have not been read.
    left: u64,
    /// Sum over the content: what it shall be, and what it is so far.
    sums: Option<(u32, u32)>,
}

impl<R: BufRead> Archive<R> {
    pub(super) const fn new(inner: R) -> Self {
        Self {
            inner,
            at: 0,
            left: 0,
            sums: None,
        }
    }

    /// The next member; none at the trailer. What was not read of the last one's content is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Member>, Fault> {
        super::source::drain(&mut self.content()).map_err(Fault::reading("a file's content"))?;
        if let Some((listed, found)) = self.sums.take()
            && listed != found
        {
            return Err(Fault::malformed(WHAT, "a file's checksum is wrong"));
        }
        self.align()?;
        let magic = self.bytes(6)?;
        match magic.as_slice() {
            b"070701" => self.header(false),
            b"070702" => self.header(true),
            b"07070X" => {
                let [number] = self.fields()?;
                self.align()?;
                Ok(Some(Member::Stripped(number)))
            }
            _ => Err(Fault::malformed(WHAT, "a member does not begin with a known number")),
        }
    }

    /// How long the content of a stripped member is, which only the package knows.
    pub(super) const fn expect(&mut self, size: u64) {
        self.left = size;
    }

    /// The current member's content.
    pub(super) const fn content(&mut self) -> Content<'_, R> {
        Content(self)
    }

    fn header(&mut self, summed: bool) -> Result<Option<Member>, Fault> {
        // Owner, group and time say nothing about what runs; neither do the numbers of a device.
        let [inode, mode, _, _, links, _, size, major, minor, _, _, name_size, sum] = self.fields()?;
        if name_size == 0 || name_size > MAX_NAME {
            return Err(Fault::TooMuch {
                what: "a name's length",
                limit: u64::from(MAX_NAME),
            });
        }
        let mut name = self.bytes(u64::from(name_size))?;
        if name.pop() != Some(0) || name.contains(&0) {
            return Err(Fault::malformed(WHAT, "a name does not end with its only NUL"));
        }
        self.align()?;
        if name == TRAILER {
            return Ok(None);
        }
        self.left = u64::from(size);
        // The sum is over a file's content; a name without content may repeat that of the name which brings it.
        let has_sum = summed && size > 0 && mode & S_IFMT == S_IFREG;
        self.sums = has_sum.then_some((sum, 0));
        Ok(Some(Member::Full(Header {
            name,
            mode,
            links,
            inode: [inode, major, minor],
            size,
        })))
    }

    fn fields<const N: usize>(&mut self) -> Result<[u32; N], Fault> {
        let mut fields = [0; N];
        for field in &mut fields {
            let digits = self.bytes(8)?;
            // `from_str_radix` would take a sign as well.
            let text = std::str::from_utf8(&digits).ok().filter(|text| !text.starts_with('+'));
            let number = text.and_then(|text| u32::from_str_radix(text, 16).ok());
            *field = number.ok_or(Fault::malformed(WHAT, "a number is not of eight hexadecimal digits"))?;
        }
        Ok(fields)
    }

    fn align(&mut self) -> Result<(), Fault> {
        let padding = self.at.next_multiple_of(4).saturating_sub(self.at);
        self.bytes(padding).map(drop)
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>, Fault> {
        let bytes = read_count(&mut self.inner, WHAT, count)?;
        self.at = self.at.saturating_add(count);
        Ok(bytes)
    }
}

/// The content of one member.
pub(super) struct Content<'a, R>(&'a mut Archive<R>);

impl<R: BufRead> BufRead for Content<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let left = usize::try_from(self.0.left).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok(&[]);
        }
        let buffer = self.0.inner.fill_buf()?;
        if buffer.is_empty() {
            return Err(Fault::Truncated("a file's content").into());
        }
        Ok(buffer.get(..left).unwrap_or(buffer))
    }

    fn consume(&mut self, count: usize) {
        if let Some((_, found)) = &mut self.0.sums
            && let Ok(buffer) = self.0.inner.fill_buf()
        {
            let bytes = buffer.iter().take(count);
            *found = bytes.fold(*found, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        }
        self.0.inner.consume(count);
        self.0.at = self.0.at.saturating_add(count as u64);
        self.0.left = self.0.left.saturating_sub(count as u64);
    }
}

impl<R: BufRead> Read for Content<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

/// Names of one file: only one of them brings the content, mostly the last.
pub(super) struct Links {
    waiting: HashMap<[u32; 3], Vec<Vec<u8>>>,
    complete: HashSet<[u32; 3]>,
    /// Bytes that may still be kept.
    left: u64,
    limit: u64,
}

/// What a name takes besides its bytes, at most.
const OVERHEAD: u64 = 64;

impl Links {
    /// Keeps names up to so many bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            waiting: HashMap::new(),
            complete: HashSet::new(),
            left: limit,
            limit,
        }
    }

    /// All names of the file whose content comes with this member; none: its content comes later, or came already.
    pub(super) fn names(&mut self, header: &Header) -> Result<Option<Vec<Vec<u8>>>, Fault> {
        if header.links < 2 {
            return Ok(Some(vec![header.name.clone()]));
        }
        let cost = (header.name.len() as u64).saturating_add(OVERHEAD);
        self.left = self.left.checked_sub(cost).ok_or(Fault::TooMuch {
            what: "the length of all names of linked files, in bytes,",
            limit: self.limit,
        })?;
        let names = self.waiting.entry(header.inode).or_default();
        names.push(header.name.clone());
        if header.size == 0 {
            return Ok(None);
        }
        self.complete.insert(header.inode);
        Ok(self.waiting.remove(&header.inode))
    }

    /// The names of files that have several names and no content at all.
    pub(super) fn empty(self) -> impl Iterator<Item = Vec<Vec<u8>>> {
        let Self { waiting, complete, .. } = self;
        waiting
            .into_iter()
            .filter(move |(inode, _)| !complete.contains(inode))
            .map(|(_, names)| names)
    }
}
