//! What is wrong with an input, and where.

use std::fmt;
use std::io;
use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use thiserror::Error;

use super::unpack::Packing;

/// Why an input gives no digests. Nothing of it counts then, however much was read before.
#[derive(Debug, Error)]
#[error("{}{} cannot be taken as known good", .input.display(), Place(.members, *.at))]
pub struct ScanError {
    /// The package, folder or file.
    pub input: PathBuf,
    /// The file in it, and the file in that one: what was being read.
    pub members: Vec<String>,
    /// Bytes of the file that had been read: of the package, or of the file in a folder. 0: it was not begun.
    pub at: u64,
    /// What is wrong.
    #[source]
    pub fault: Box<Fault>,
}

struct Place<'a>(&'a [String], u64);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for member in self.0 {
            write!(f, ", {member}")?;
        }
        if self.1 > 0 {
            write!(f, " (byte {})", self.1)?;
        }
        Ok(())
    }
}

/// What is wrong with it.
#[derive(Debug, Error)]
pub enum Fault {
    /// The operating system said so.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is nothing that this module knows.
    #[error("it is no .deb or .rpm package, no initramfs, no folder and no file that a host could load")]
    Unknown,
    /// It stops before its end.
    #[error("it ends in the middle of {0}: fetch it again")]
    Truncated(&'static str),
    /// It breaks the rules of its format.
    #[error("{what} is malformed: {problem}")]
    Malformed {
        /// The part of the format.
        what: &'static str,
        /// The rule.
        problem: &'static str,
    },
    /// A compressed part is damaged.
    #[error("its {packing} part cannot be unpacked")]
    Unpack {
        /// How it is compressed.
        packing: Packing,
        /// What the decoder says.
        #[source]
        source: io::Error,
    },
    /// Compressed in a way that is not read.
    #[error("it is compressed by {0}, which is not read here: only gzip, xz, zstd and, in an initramfs, lz4 are")]
    Packing(&'static str),
    /// There is something behind its end.
    #[error("it goes on after the end of {0}: what it unpacks to is not certain")]
    Trailing(&'static str),
    /// A limit.
    #[error("{what} goes beyond the limit of {limit}")]
    TooMuch {
        /// What there is too much of.
        what: &'static str,
        /// How much is taken.
        limit: u64,
    },
    /// It is not what the package itself says.
    #[error("{what} has sha256:{found}, the package says sha256:{listed}: it is damaged, fetch it again")]
    Digest {
        /// What was hashed.
        what: &'static str,
        /// Its digest.
        found: Sha256Digest,
        /// The digest that stands in the package.
        listed: Sha256Digest,
    },
    /// A file of the package's list did not come.
    #[error("the package lists {0}, which is not in its payload")]
    Missing(String),
    /// A file came that the package's list does not have.
    #[error("it is not in the package's list of files")]
    Unlisted,
}

impl Fault {
    /// A broken rule.
    pub(super) const fn malformed(what: &'static str, problem: &'static str) -> Self {
        Self::Malformed { what, problem }
    }

    /// What an error while reading `part` means: too short is a fault of the input's own.
    pub(super) fn reading(part: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| match Self::from(error) {
            Self::Read(error) if error.kind() == io::ErrorKind::UnexpectedEof => Self::Truncated(part),
            fault => fault,
        }
    }
}

impl From<io::Error> for Fault {
    /// Faults travel through decoders and archive readers as errors of reading; here they come out as what they were.
    fn from(error: io::Error) -> Self {
        error.downcast::<Self>().unwrap_or_else(Self::Read)
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Read(error) => error,
            fault => Self::other(fault),
        }
    }
}
