//! Known-good digests before they are seen on a host: from packages, installed roots and initramfs files.
//!
//! An input is known by its content. Everything in it that a host can load and that is measured becomes an entry of a policy:
//! programs, libraries, scripts, kernel modules (a compressed one with two digests: of the file, and of the image that the
//! kernel or `modprobe` unpacks), firmware, kernels, and initramfs files with all that is in them.
//!
//! Inputs may be damaged or made to harm. Everything is read in one pass through buffers and never held as a whole; sizes,
//! counts and depths have [`Limits`]; and one fault anywhere means that nothing of the input is taken. Whose input it is
//! must be known before: signatures of packages are not looked at.

mod classify;
mod collect;
mod cpio;
mod deb;
mod error;
mod initramfs;
mod lz4;
mod root;
mod rpm;
mod source;
mod unpack;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use assay_evidence::policy::{Approved, MAX_ENTRIES};

pub use error::{Fault, ScanError};
pub use unpack::Packing;

use collect::Collector;
use source::Peek;

/// What an input may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Longest package or single file, in bytes.
    pub input: u64,
    /// Bytes that a package or a single file may unpack to, everything in it included.
    pub unpacked: u64,
    /// Bytes that a compressed kernel module may unpack to. The kernel has its own limit of 2 GiB.
    pub module: u64,
    /// Files and folders in an input.
    pub members: u64,
    /// Bytes of names that are kept while an input is read: a package's list of files, files with several names.
    pub names: u64,
    /// Entries of an input; no policy has room for more.
    pub entries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            input: 16 << 30,
            unpacked: 64 << 30,
            module: 1 << 30,
            members: 20_000_000,
            names: 64 << 20,
            entries: MAX_ENTRIES,
        }
    }
}

/// How far a scan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the file that are done; of a folder, files.
    pub done: u64,
    /// Length of the file; a folder has none.
    pub total: Option<u64>,
}

/// How to scan.
pub struct Options<'a> {
    /// What an input may cost.
    pub limits: Limits,
    /// In a folder, enters other file systems as well: a `/boot` of its own. Without it they are left out.
    pub cross_file_systems: bool,
    /// Hears how far it is, now and then.
    pub progress: &'a dyn Fn(Progress),
}

/// What an input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    /// A Debian package.
    Deb,
    /// An RPM package.
    Rpm,
    /// A folder with an installed system.
    Root,
    /// A single file: an initramfs, a kernel, a module, a program.
    File,
}

impl InputKind {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deb => ".deb package",
            Self::Rpm => ".rpm package",
            Self::Root => "installed root",
            Self::File => "file",
        }
    }
}

/// What was found in an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What the input is.
    pub kind: InputKind,
    /// What a host can load, sorted by path.
    pub entries: BTreeSet<Approved>,
    /// Files that were looked at.
    pub files: u64,
    /// Mount points of other file systems that were not entered.
    pub skipped: Vec<PathBuf>,
}

/// Takes the known-good digests of one package, installed root or file.
///
/// # Errors
/// [`ScanError`], which names the file, the member and the place in it.
pub fn scan(input: &Path, options: &Options<'_>) -> Result<Found, ScanError> {
    let mut collector = Collector::new(&options.limits);
    let at = Rc::new(Cell::new(0));
    let scanned = fs::metadata(input).map_err(Fault::Read).and_then(|metadata| {
        if metadata.is_dir() {
            let skipped = root::read(&mut collector, input, options, &at)?;
            return Ok((InputKind::Root, skipped));
        }
        Ok((file(&mut collector, input, &metadata, options, &at)?, Vec::new()))
    });
    match scanned {
        Ok((kind, skipped)) => Ok(Found {
            kind,
            entries: collector.entries,
            files: collector.files,
            skipped,
        }),
        Err(fault) => Err(ScanError {
            input: input.to_owned(),
            members: collector.place,
            at: at.get(),
            fault: Box::new(fault),
        }),
    }
}

fn file(
    collector: &mut Collector<'_>,
    path: &Path,
    metadata: &Metadata,
    options: &Options<'_>,
    at: &Rc<Cell<u64>>,
) -> Result<InputKind, Fault> {
    if !metadata.is_file() {
        return Err(Fault::Unknown);
    }
    if metadata.len() > options.limits.input {
        return Err(Fault::TooMuch {
            what: "its length, in bytes,",
            limit: options.limits.input,
        });
    }
    let file = File::open(path).map_err(Fault::Read)?;
    let total = Some(metadata.len());
    let mut input = Peek::new(root::metered(file, at, total, options.progress));
    let head = input.peek(deb::MAGIC.len())?;
    if head == deb::MAGIC {
        deb::read(collector, &mut input)?;
        Ok(InputKind::Deb)
    } else if head.starts_with(rpm::MAGIC) {
        rpm::read(collector, &mut input)?;
        Ok(InputKind::Rpm)
    } else {
        let name = std::path::absolute(path).map_err(Fault::Read)?;
        let executable = metadata.mode() & 0o111 != 0;
        collector.lone(name.as_os_str().as_bytes(), executable, &mut input)?;
        Ok(InputKind::File)
    }
}

#[cfg(test)]
mod tests;
