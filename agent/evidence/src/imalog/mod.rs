//! The kernel's own log: what IMA measured, and extended into PCR 10.
//!
//! Linux shows it as `/sys/kernel/security/ima/binary_runtime_measurements`, since 6.10 also once for each bank
//! (`binary_runtime_measurements_sha256`, …), where the template digest is of that bank. Numbers are in the byte order of the
//! host, or little-endian with `ima_canonical_fmt`; all that run XenServer, XCP-ng and KVM here are little-endian. The
//! format is that of `ima_measurements_show` (security/integrity/ima/ima_fs.c).
//!
//! As with a boot log, only a replay that ends in a quoted PCR makes it evidence. Unlike a boot log all of an entry is
//! covered: the template digest is the hash of the very fields, which [`parse`] checks.

mod parse;
mod show;
mod template;
#[cfg(test)]
mod tests;

pub use parse::parse;

use std::collections::BTreeMap;

use crate::digest::Algorithm;
use template::Field;

/// Longest log, in bytes.
pub const MAX_LOG: usize = crate::bundle::MAX_IMA_LOG;

/// Most entries in a log. The shortest that the kernel writes has more than 60 bytes.
pub const MAX_ENTRIES: usize = MAX_LOG / 60;

/// Longest template data of one entry, in bytes: `ima-buf` holds keys, policies and command lines.
pub const MAX_DATA: usize = 1024 * 1024;

/// Why bytes are no IMA log. Entries count from 0; `at` is a byte's number in the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImaLogError {
    /// No bytes at all.
    #[error("the IMA log is empty")]
    Empty,
    /// Longer than [`MAX_LOG`].
    #[error("the IMA log is {0} bytes long, at most {MAX_LOG} are read")]
    TooLong(usize),
    /// More than [`MAX_ENTRIES`].
    #[error("the IMA log has more than {MAX_ENTRIES} entries")]
    TooManyEntries,
    /// The log ends inside an entry.
    #[error("the IMA log ends inside entry {entry} at byte {at}, in its {field}")]
    Short {
        /// The entry.
        entry: usize,
        /// Where the field begins.
        at: usize,
        /// What was being read.
        field: &'static str,
    },
    /// A PCR that no TPM has.
    #[error(
        "entry {entry} of the IMA log at byte {at} names PCR {pcr}: this is no IMA log of this byte order, or it is damaged"
    )]
    NoSuchPcr {
        /// The entry.
        entry: usize,
        /// Where it begins.
        at: usize,
        /// The number found.
        pcr: u32,
    },
    /// A length that no kernel writes.
    #[error("entry {entry} of the IMA log at byte {at} has a {field} of {length} bytes, at most {limit} are read")]
    Length {
        /// The entry.
        entry: usize,
        /// Where the length is.
        at: usize,
        /// Whose it is.
        field: &'static str,
        /// The length found.
        length: u32,
        /// The limit.
        limit: usize,
    },
    /// A template that this program does not know.
    #[error("entry {entry} of the IMA log at byte {at} has the template {name:?}, which is not known")]
    Template {
        /// The entry.
        entry: usize,
        /// Where it begins.
        at: usize,
        /// The name, with what can't be printed replaced.
        name: String,
    },
    /// The fields are not those of the template.
    #[error("entry {entry} of the IMA log at byte {at} has fields that do not make up its data")]
    Fields {
        /// The entry.
        entry: usize,
        /// Where its data begins.
        at: usize,
    },
    /// The digest is not that of the fields.
    #[error(
        "entry {entry} of the IMA log at byte {at} has another {bank} digest than its fields: it was changed, or it is from another bank's list"
    )]
    Digest {
        /// The entry.
        entry: usize,
        /// Where it begins.
        at: usize,
        /// The list's bank.
        bank: Algorithm,
    },
}

/// With what a kernel extends banks of which the list has no digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// With the template data's digest of that very bank (Linux 5.8 and later).
    OwnDigest,
    /// With the SHA-1 digest, and zeros up to the bank's size (before 5.8).
    PaddedSha1,
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImaEntry<'a> {
    pcr: u32,
    digest: &'a [u8],
    template: &'a str,
    fields: Vec<(Field, &'a [u8])>,
}

/// A file's digest as IMA names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileDigest<'a> {
    /// `sha1`, `sha256`, …: the kernel's name of the algorithm.
    pub algorithm: &'a str,
    /// Its digest. All zero with a violation.
    pub digest: &'a [u8],
    /// The digest is fs-verity's of the file, not of its content.
    pub verity: bool,
}

impl<'a> ImaEntry<'a> {
    /// The PCR that it was extended into: 10, unless the kernel or its policy says otherwise.
    #[must_use]
    pub const fn pcr(&self) -> u32 {
        self.pcr
    }

    /// The template's name: `ima-ng`, …
    #[must_use]
    pub const fn template(&self) -> &'a str {
        self.template
    }

    /// The digest of the list's bank that stands in the log; zero for a violation.
    #[must_use]
    pub const fn digest(&self) -> &'a [u8] {
        self.digest
    }

    /// IMA could not tell what was read: a writer had it open, or opened it. The PCR was extended with ones.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        self.digest.iter().all(|byte| *byte == 0)
    }

    /// The file's path as the kernel saw it, or the name of what was measured (`boot_aggregate`, `kexec-cmdline`, …).
    #[must_use]
    pub fn path(&self) -> &'a [u8] {
        let name = self.field(Field::Name).or_else(|| self.field(Field::OldName));
        let name = name.unwrap_or_default();
        name.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// The digest of what was measured.
    #[must_use]
    pub fn file_digest(&self) -> Option<FileDigest<'a>> {
        template::file_digest(&self.fields)
    }

    /// The measured bytes themselves (`ima-buf`).
    #[must_use]
    pub fn buffer(&self) -> Option<&'a [u8]> {
        self.field(Field::Buffer)
    }

    /// The file's signature (`ima-sig`): its `security.ima`. Empty where it has none.
    #[must_use]
    pub fn signature(&self) -> Option<&'a [u8]> {
        self.field(Field::Signature)
    }

    fn field(&self, wanted: Field) -> Option<&'a [u8]> {
        self.fields
            .iter()
            .find(|(field, _)| *field == wanted)
            .map(|(_, data)| *data)
    }

    /// What a bank's PCR was extended with.
    fn extended_with(&self, bank: Algorithm, list: Algorithm, extension: Extension) -> Vec<u8> {
        if self.is_violation() {
            return vec![0xff; bank.size()];
        }
        if bank == list {
            return self.digest.to_vec();
        }
        match extension {
            Extension::OwnDigest => template::digest(bank, self.template, &self.fields),
            Extension::PaddedSha1 => {
                let mut digest = template::digest(Algorithm::Sha1, self.template, &self.fields);
                digest.resize(bank.size(), 0);
                digest
            }
        }
    }
}

/// A log whose entries are what their digests say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImaLog<'a> {
    bank: Algorithm,
    entries: Vec<ImaEntry<'a>>,
}

impl<'a> ImaLog<'a> {
    /// The entries, in the order in which they were extended.
    #[must_use]
    pub fn entries(&self) -> &[ImaEntry<'a>] {
        &self.entries
    }

    /// Whose list it is.
    #[must_use]
    pub const fn bank(&self) -> Algorithm {
        self.bank
    }

    /// What each PCR that the log touches shows in this bank after all of it, from zero, or from `start` where the start of
    /// the list was cut off: what the PCR showed there is then for somebody else to know.
    #[must_use]
    pub fn replay(
        &self,
        bank: Algorithm,
        extension: Extension,
        start: &BTreeMap<u32, Vec<u8>>,
    ) -> BTreeMap<u32, Vec<u8>> {
        let mut pcrs = BTreeMap::new();
        for entry in &self.entries {
            let zero = || start.get(&entry.pcr).cloned().unwrap_or_else(|| vec![0; bank.size()]);
            let value: &mut Vec<u8> = pcrs.entry(entry.pcr).or_insert_with(zero);
            *value = bank.extend(value, &entry.extended_with(bank, self.bank, extension));
        }
        pcrs
    }

    /// How many of its entries, from the first on, lead a PCR from zero to this value: all, or fewer where the kernel has
    /// measured on since the value was read. `None`: none do.
    #[must_use]
    pub fn leads_to(&self, pcr: u32, bank: Algorithm, extension: Extension, wanted: &[u8]) -> Option<usize> {
        let mut value = vec![0; bank.size()];
        let mut leads = (value == wanted).then_some(0);
        for (number, entry) in self.entries.iter().enumerate().filter(|(_, entry)| entry.pcr == pcr) {
            value = bank.extend(&value, &entry.extended_with(bank, self.bank, extension));
            if value == wanted {
                leads = Some(number.saturating_add(1));
            }
        }
        leads
    }
}
