//! What every kind of input ends in: a file's names, permissions and content go in, entries come out.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::rc::Rc;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{LoadKind, MAX_PATH, cut};
use assay_evidence::policy::Approved;

use super::Limits;
use super::classify::{Class, HEAD, classify};
use super::error::Fault;
use super::initramfs;
use super::source::{Budgeted, CHUNK, Hashing, Peek};
use super::unpack::{Packing, Stream};

/// Longest path in an archive, in bytes: the kernel's PATH_MAX.
const MAX_NAME: usize = 4096;

/// The entries found so far in one input, and what may still be spent on it.
pub(super) struct Collector<'a> {
    pub(super) limits: &'a Limits,
    pub(super) entries: BTreeSet<Approved>,
    /// Files that were looked at.
    pub(super) files: u64,
    /// What is being read; outermost first.
    pub(super) place: Vec<String>,
    /// Bytes that may still be unpacked.
    left: Rc<Cell<u64>>,
    members: u64,
    in_initramfs: bool,
}

impl<'a> Collector<'a> {
    pub(super) fn new(limits: &'a Limits) -> Self {
        Self {
            limits,
            entries: BTreeSet::new(),
            files: 0,
            place: Vec::new(),
            left: Rc::new(Cell::new(limits.unpacked)),
            members: 0,
            in_initramfs: false,
        }
    }

    /// Counts one more member of an archive or folder.
    pub(super) fn member(&mut self) -> Result<(), Fault> {
        self.members = self.members.saturating_add(1);
        if self.members > self.limits.members {
            return Err(Fault::TooMuch {
                what: "the number of files in it",
                limit: self.limits.members,
            });
        }
        Ok(())
    }

    /// Another file of a folder: what its neighbours unpacked to is not held against it.
    pub(super) fn refill(&self) {
        self.left.set(self.limits.unpacked);
    }

    /// Lets what is unpacked draw from the input's allowance.
    pub(super) fn budgeted<R: Read>(&self, inner: R) -> Budgeted<R> {
        Budgeted {
            inner,
            left: Rc::clone(&self.left),
            what: "what it unpacks to, in bytes,",
            limit: self.limits.unpacked,
        }
    }

    /// Takes a file, by all of its names. What does not count is not read to its end.
    pub(super) fn file(&mut self, names: &[Vec<u8>], executable: bool, content: &mut dyn BufRead) -> Result<(), Fault> {
        let names = names.iter().map(|name| plain_path(name));
        let names = names.collect::<Result<Vec<String>, Fault>>()?;
        self.place
            .push(names.first().map(|name| format!("/{name}")).unwrap_or_default());
        self.files = self.files.saturating_add(1);
        let mut content = Peek::new(content);
        let head = content.peek(HEAD)?;
        let mut classes = Vec::new();
        for name in names {
            if let Some(class) = classify(&name, executable, head)? {
                classes.push((name, class));
            }
        }
        self.counted(classes, content)?;
        self.place.pop();
        Ok(())
    }

    /// Takes a file that was named by itself, and that its place can't tell anything of.
    pub(super) fn lone(&mut self, name: &[u8], executable: bool, content: &mut dyn BufRead) -> Result<(), Fault> {
        let name = plain_path(name)?;
        self.files = self.files.saturating_add(1);
        let mut content = Peek::new(content);
        let head = content.peek(HEAD)?;
        let class = match classify(&name, executable, head)? {
            // Only its content can tell whether a compressed file is an initramfs.
            None if super::classify::is_cpio(head) || Packing::of(head)?.is_some() => Some(Class::Initramfs),
            class => class,
        };
        self.counted(vec![(name, class.ok_or(Fault::Unknown)?)], content)
    }

    fn counted(&mut self, classes: Vec<(String, Class)>, content: Peek<&mut dyn BufRead>) -> Result<(), Fault> {
        if classes.is_empty() {
            return Ok(());
        }
        let mut hashed = Hashing::new(content);
        let mut image = None;
        let mut opened = false;
        for (_, class) in &classes {
            match class {
                Class::PackedModule(packing) if image.is_none() => image = Some(self.module(*packing, &mut hashed)?),
                Class::Initramfs if !self.in_initramfs && !opened => {
                    self.in_initramfs = true;
                    opened = true;
                    initramfs::read(self, &mut BufReader::with_capacity(CHUNK, &mut hashed))?;
                    self.in_initramfs = false;
                }
                _ => {}
            }
        }
        let digest = hashed.finish()?;
        for (name, class) in classes {
            match class {
                Class::Plain(kind) => self.add(kind, &name, digest)?,
                Class::Initramfs => self.add(LoadKind::KexecInitramfs, &name, digest)?,
                Class::PackedModule(_) => {
                    self.add(LoadKind::ModuleCompressed, &name, digest)?;
                    if let Some(image) = image {
                        self.add(LoadKind::ModuleFile, &name, image)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The digest of the image in a compressed module: what the kernel or `modprobe` makes of it.
    fn module(&self, packing: Packing, packed: &mut impl Read) -> Result<Sha256Digest, Fault> {
        let mut packed = BufReader::with_capacity(CHUNK, packed);
        let image = Budgeted {
            inner: self.budgeted(Stream::new(packing, &mut packed)?),
            left: Rc::new(Cell::new(self.limits.module)),
            what: "what the module unpacks to, in bytes,",
            limit: self.limits.module,
        };
        let digest = Hashing::new(image).finish()?;
        // The kernel's and kmod's decoders differ in what they make of more.
        if !packed.fill_buf()?.is_empty() {
            return Err(Fault::Trailing("the compressed module"));
        }
        Ok(digest)
    }

    /// Adds an entry. The path is for people, and cut as the log cuts it.
    pub(super) fn add(&mut self, kind: LoadKind, path: &str, sha256: Sha256Digest) -> Result<(), Fault> {
        if self.entries.len() >= self.limits.entries {
            return Err(Fault::TooMuch {
                what: "the number of digests",
                limit: self.limits.entries as u64,
            });
        }
        self.entries.insert(Approved {
            path: cut(&format!("/{path}"), MAX_PATH).into(),
            kind: Some(kind),
            sha256,
        });
        Ok(())
    }
}

/// `./usr/bin/a` and `/usr/bin/a` as `usr/bin/a`. Bytes that are no text are replaced, as the log does.
fn plain_path(name: &[u8]) -> Result<String, Fault> {
    if name.len() > MAX_NAME {
        return Err(Fault::TooMuch {
            what: "the length of a path",
            limit: MAX_NAME as u64,
        });
    }
    let name = String::from_utf8_lossy(name);
    let mut parts = name
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .peekable();
    if parts.peek().is_none() {
        return Err(Fault::malformed("a path", "it names nothing"));
    }
    let parts: Vec<&str> = parts.collect();
    if parts.contains(&"..") {
        return Err(Fault::malformed("a path", "it leads upwards"));
    }
    Ok(parts.join("/"))
}
