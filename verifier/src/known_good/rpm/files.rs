//! The package's list of files, held against what comes.

use std::collections::HashMap;

use assay_evidence::digest::Sha256Digest;

use super::super::cpio::Header as Member;
use super::super::error::Fault;
use super::header::Header;
use super::{SHA256, sha256};

const WHAT: &str = "the .rpm package's list of files";

/// Tags (rpm, include/rpm/rpmtag.h).
mod tag {
    pub const SIZES: u32 = 1028;
    pub const MODES: u32 = 1030;
    pub const DIGESTS: u32 = 1035;
    pub const FLAGS: u32 = 1037;
    pub const INODES: u32 = 1096;
    pub const DIR_INDEXES: u32 = 1116;
    pub const BASE_NAMES: u32 = 1117;
    pub const DIR_NAMES: u32 = 1118;
    pub const LONG_SIZES: u32 = 5008;
    pub const DIGEST_ALGO: u32 = 5011;
}

/// The list.
pub(super) struct Files {
    files: Vec<File>,
    by_name: HashMap<Vec<u8>, usize>,
}

struct File {
    name: Vec<u8>,
    mode: u32,
    size: u64,
    inode: u32,
    /// The number of the last name that the same file has, and how many it has.
    last_link: usize,
    links: u32,
    digest: Option<Sha256Digest>,
    /// It is not in the payload.
    ghost: bool,
    came: bool,
}

impl Files {
    /// Reads the list, whose names may have so many bytes all in all: a folder's name stands in it once, and counts for each
    /// of its files.
    pub(super) fn read(header: &Header, limit: u64) -> Result<Self, Fault> {
        let names = header.texts(tag::BASE_NAMES)?;
        let folders = header.texts(tag::DIR_NAMES)?;
        let numbers = |tag: u32, missing: Option<u64>| {
            let numbers = header.numbers(tag)?;
            match missing {
                Some(default) if !header.has(tag) => Ok(vec![default; names.len()]),
                _ if numbers.len() == names.len() => Ok(numbers),
                _ => Err(UNEVEN),
            }
        };
        let of = numbers(tag::DIR_INDEXES, None)?;
        let modes = numbers(tag::MODES, None)?;
        let sizes = if header.has(tag::LONG_SIZES) {
            tag::LONG_SIZES
        } else {
            tag::SIZES
        };
        let sizes = numbers(sizes, None)?;
        let inodes = numbers(tag::INODES, Some(0))?;
        let flags = numbers(tag::FLAGS, Some(0))?;
        let digests = digests(header, names.len())?;

        let mut list = Self {
            files: Vec::new(),
            by_name: HashMap::new(),
        };
        let mut left = limit;
        let columns = names
            .into_iter()
            .zip(of)
            .zip(modes)
            .zip(sizes)
            .zip(inodes)
            .zip(flags)
            .zip(digests);
        for ((((((base, folder), mode), size), inode), flags), digest) in columns {
            let folder = usize::try_from(folder).ok().and_then(|folder| folders.get(folder));
            let folder = folder.copied().ok_or(UNEVEN)?;
            let length = (folder.len() as u64).saturating_add(base.len() as u64);
            left = left.checked_sub(length).ok_or(Fault::TooMuch {
                what: "the length of all names in the package, in bytes,",
                limit,
            })?;
            let name = [folder, base].concat();
            list.by_name.insert(bare(&name).to_vec(), list.files.len());
            list.files.push(File {
                name,
                mode: u32::try_from(mode).map_err(|_| UNEVEN)?,
                size,
                inode: u32::try_from(inode).map_err(|_| UNEVEN)?,
                last_link: 0,
                links: 1,
                digest,
                // RPMFILE_GHOST
                ghost: flags & 1 << 6 != 0,
                came: false,
            });
        }
        list.link();
        Ok(list)
    }

    /// Names of one file have one inode number.
    fn link(&mut self) {
        let mut last: HashMap<u32, (usize, u32)> = HashMap::new();
        for (number, file) in self.files.iter().enumerate().filter(|(_, file)| file.is_linkable()) {
            let (last, count) = last.entry(file.inode).or_default();
            *last = number;
            *count = count.saturating_add(1);
        }
        for (number, file) in self.files.iter_mut().enumerate() {
            let linked = last.get(&file.inode).filter(|_| file.is_linkable());
            (file.last_link, file.links) = linked.copied().unwrap_or((number, 1));
        }
    }

    /// What a stripped member is, and how long its content.
    pub(super) fn stripped(&self, number: u32) -> Result<(Member, u64), Fault> {
        let number = usize::try_from(number).map_err(|_| Fault::Unlisted)?;
        let file = self.files.get(number).ok_or(Fault::Unlisted)?;
        // Only the last name of a file brings its content; a link's content is its target.
        let size = match file.mode & 0o170_000 {
            0o100_000 if number == file.last_link => file.size,
            0o120_000 => file.size,
            _ => 0,
        };
        let member = Member {
            name: file.name.clone(),
            mode: file.mode,
            links: file.links,
            inode: [file.inode, 0, 0],
            // Only whether there is some is asked for.
            size: u32::try_from(size).unwrap_or(u32::MAX),
        };
        Ok((member, size))
    }

    /// Notes that a file has come, and returns its number.
    pub(super) fn came(&mut self, member: &Member) -> Result<usize, Fault> {
        let number = *self.by_name.get(bare(&member.name)).ok_or(Fault::Unlisted)?;
        let file = self.files.get_mut(number).ok_or(Fault::Unlisted)?;
        if file.came {
            return Err(Fault::malformed("the payload", "it has a file twice"));
        }
        file.came = true;
        Ok(number)
    }

    /// What the list says that the file hashes to.
    pub(super) fn digest(&self, number: usize) -> Option<Sha256Digest> {
        self.files.get(number)?.digest
    }

    /// Whether all files came.
    pub(super) fn all_came(&self) -> Result<(), Fault> {
        let missing = self
            .files
            .iter()
            .find(|file| !file.came && !file.ghost && file.mode & 0o170_000 == 0o100_000);
        match missing {
            Some(file) => Err(Fault::Missing(String::from_utf8_lossy(&file.name).into_owned())),
            None => Ok(()),
        }
    }
}

impl File {
    const fn is_linkable(&self) -> bool {
        self.inode != 0 && !self.ghost && self.mode & 0o170_000 == 0o100_000
    }
}

const UNEVEN: Fault = Fault::malformed(WHAT, "its columns do not fit together");

/// `./usr/bin/a` and `/usr/bin/a` are one name.
pub(super) fn bare(name: &[u8]) -> &[u8] {
    let name = name.strip_prefix(b".").unwrap_or(name);
    name.strip_prefix(b"/").unwrap_or(name)
}

/// The files' digests where they are SHA-256; of older packages they are MD5, which nobody can compare with.
fn digests(header: &Header, count: usize) -> Result<Vec<Option<Sha256Digest>>, Fault> {
    let algorithm = header.numbers(tag::DIGEST_ALGO)?.first().copied();
    let texts = header.texts(tag::DIGESTS)?;
    if algorithm != Some(SHA256) || texts.is_empty() {
        return Ok(vec![None; count]);
    }
    if texts.len() != count {
        return Err(UNEVEN);
    }
    // What is no regular file has an empty one.
    let digest = |text: &[u8]| (!text.is_empty()).then(|| sha256(text)).transpose();
    texts.into_iter().map(digest).collect()
}
