//! Readers that count, limit, look ahead and hash what goes through them. None holds more than a buffer.

use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::rc::Rc;

use assay_evidence::digest::Sha256Digest;
use ring::digest::{Context, SHA256};

use super::{Progress, error::Fault};

/// Bytes read at a time.
pub(super) const CHUNK: usize = 64 * 1024;
/// Progress is told whenever this many bytes more are done.
const STEP: u64 = 1 << 20;

/// A file, with the position in it.
pub(super) struct Metered<'a, R> {
    pub(super) inner: R,
    pub(super) at: Rc<Cell<u64>>,
    pub(super) told: u64,
    /// Length of the whole, for `progress`; none: it is one file of many.
    pub(super) total: Option<u64>,
    pub(super) progress: &'a dyn Fn(Progress),
}

impl<R: BufRead> BufRead for Metered<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.inner.consume(count);
        let at = self.at.get().saturating_add(count as u64);
        self.at.set(at);
        if at.saturating_sub(self.told) >= STEP && self.total.is_some() {
            self.told = at;
            (self.progress)(Progress {
                done: at,
                total: self.total,
            });
        }
    }
}

impl<R: BufRead> Read for Metered<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

/// Can look at bytes that it has not handed out yet.
pub(super) struct Peek<R> {
    inner: R,
    held: Vec<u8>,
    given: usize,
}

impl<R: BufRead> Peek<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            held: Vec::new(),
            given: 0,
        }
    }

    /// The next `count` bytes, or as many as there are.
    pub(super) fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        self.held.drain(..self.given);
        self.given = 0;
        if let Some(missing) = count.checked_sub(self.held.len()) {
            (&mut self.inner).take(missing as u64).read_to_end(&mut self.held)?;
        }
        Ok(self.held.get(..count).unwrap_or(&self.held))
    }
}

impl<R: BufRead> BufRead for Peek<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self.held.get(self.given..) {
            Some(held) if !held.is_empty() => Ok(held),
            _ => self.inner.fill_buf(),
        }
    }

    fn consume(&mut self, count: usize) {
        let of_held = count.min(self.held.len().saturating_sub(self.given));
        self.given = self.given.saturating_add(of_held);
        self.inner.consume(count.saturating_sub(of_held));
    }
}

impl<R: BufRead> Read for Peek<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        read_buffered(self, out)
    }
}

/// Draws what it hands out from an allowance that several readers may share.
pub(super) struct Budgeted<R> {
    pub(super) inner: R,
    pub(super) left: Rc<Cell<u64>>,
    pub(super) what: &'static str,
    pub(super) limit: u64,
}

impl<R: Read> Read for Budgeted<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        let Some(left) = self.left.get().checked_sub(count as u64) else {
            return Err(Fault::TooMuch {
                what: self.what,
                limit: self.limit,
            }
            .into());
        };
        self.left.set(left);
        Ok(count)
    }
}

/// Hashes what goes through.
pub(super) struct Hashing<R> {
    inner: R,
    context: Context,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            context: Context::new(&SHA256),
        }
    }

    /// Reads the rest, and gives the digest of all of it.
    pub(super) fn finish(mut self) -> io::Result<Sha256Digest> {
        drain(&mut self)?;
        Sha256Digest::try_from(self.context.finish().as_ref()).map_err(io::Error::other)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.context.update(out.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Reads to the end.
pub(super) fn drain(reader: &mut impl Read) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match reader.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Skips zeros up to the first other byte or the end; true at the end.
pub(super) fn skip_zeros(reader: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(true);
        }
        let zeros = buffer.iter().take_while(|byte| **byte == 0).count();
        let all = zeros == buffer.len();
        reader.consume(zeros);
        if !all {
            return Ok(false);
        }
    }
}

/// `read` by way of the reader's own buffer.
pub(super) fn read_buffered(reader: &mut impl BufRead, out: &mut [u8]) -> io::Result<usize> {
    let buffer = reader.fill_buf()?;
    let count = buffer.len().min(out.len());
    if let (Some(from), Some(to)) = (buffer.get(..count), out.get_mut(..count)) {
        to.copy_from_slice(from);
    }
    reader.consume(count);
    Ok(count)
}

/// Reads at most `limit` bytes to the end, and not one more.
pub(super) fn read_all(reader: &mut (impl Read + ?Sized), what: &'static str, limit: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    reader
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(Fault::reading(what))?;
    if bytes.len() as u64 > limit {
        return Err(Fault::TooMuch { what, limit });
    }
    Ok(bytes)
}

/// Reads exactly `count` bytes. Memory grows with what comes, not with what was announced.
pub(super) fn read_count(reader: &mut (impl Read + ?Sized), what: &'static str, count: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    reader
        .take(count)
        .read_to_end(&mut bytes)
        .map_err(Fault::reading(what))?;
    if bytes.len() as u64 != count {
        return Err(Fault::Truncated(what));
    }
    Ok(bytes)
}
