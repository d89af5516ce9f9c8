//! Structures of UEFI that boot logs carry: variables, key databases, load options, device paths. Numbers in them are
//! little-endian (UEFI specification §3.1.3, §10.3, §32.4.1; TCG PC Client PFP §10.2).

use serde::Serialize;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::text;
use crate::reader::Reader;
use crate::uuid::Uuid;

/// UEFI's own variables: SecureBoot, PK, KEK, BootOrder, Boot0001 (EFI_GLOBAL_VARIABLE).
pub(super) const GLOBAL: Uuid = Uuid::new([
    0x8b, 0xe4, 0xdf, 0x61, 0x93, 0xca, 0x11, 0xd2, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c,
]);
/// The image security databases: db, dbx, dbt, dbr (EFI_IMAGE_SECURITY_DATABASE_GUID).
pub(super) const SECURITY: Uuid = Uuid::new([
    0xd7, 0x19, 0xb2, 0xcb, 0x3d, 0x3a, 0x45, 0x96, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f,
]);
/// The shim boot loader's variables: MokList, SbatLevel (SHIM_LOCK_GUID).
pub(super) const SHIM: Uuid = Uuid::new([
    0x60, 0x5d, 0xab, 0x50, 0xe0, 0x46, 0x43, 0x00, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23,
]);
/// Kinds of entries of a key database (EFI_CERT_X509_GUID, EFI_CERT_SHA256_GUID).
const CERT_X509: Uuid = Uuid::new([
    0xa5, 0xc0, 0x59, 0xa1, 0x94, 0xe4, 0x4a, 0xa7, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72,
]);
const CERT_SHA256: Uuid = Uuid::new([
    0xc1, 0xc4, 0x16, 0x26, 0x50, 0x4c, 0x40, 0x92, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28,
]);

/// Most certificates of one database whose subjects are read. Real ones have up to about ten.
const MAX_SUBJECTS: usize = 32;
/// Longest subject that is kept, in characters.
const MAX_SUBJECT: usize = 256;

/// The GUID with these bytes: UEFI stores its first three fields little-endian.
pub(super) fn guid(bytes: [u8; 16]) -> Uuid {
    let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
    let [i, j, k, l, m, n, o, p] = rest;
    Uuid::new([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
}

/// A variable as the firmware measures it (UEFI_VARIABLE_DATA).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable<'a> {
    /// Whose name it is: two vendors may both have a variable of one name.
    pub vendor: Uuid,
    /// Its name.
    pub name: String,
    /// Its content; empty where the variable does not exist.
    pub value: &'a [u8],
}

/// shim before version 15.3 measures up to so many bytes behind a variable: it counts its structure with the padding.
const SLACK: usize = 8;

impl<'a> Variable<'a> {
    /// The variable that these bytes are, all of them but for shim's slack.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut input = Reader::new("variable", data);
        let vendor = guid(input.array().ok()?);
        let units = usize::try_from(input.u64_le().ok()?).ok()?;
        let size = usize::try_from(input.u64_le().ok()?).ok()?;
        let name = text::utf16(input.take(units.checked_mul(2)?).ok()?)?;
        let value = input.take(size).ok()?;
        (input.left() < SLACK).then_some(Self { vendor, name, value })
    }

    /// Whether it is the variable of this name in UEFI's own name space.
    pub(super) fn is_global(&self, name: &str) -> bool {
        self.vendor == GLOBAL && self.name == name
    }

    /// Whether it holds keys: PK, KEK, or one of the image security databases.
    pub(super) fn is_key_database(&self) -> bool {
        self.vendor == SECURITY || self.is_global("PK") || self.is_global("KEK")
    }

    /// The name with the vendor's GUID, unless it is one of those that the specifications and shim define.
    pub(super) fn full_name(&self) -> String {
        let name = text::plain(&self.name);
        match self.vendor {
            SHIM => format!("{name} of shim"),
            SECURITY | GLOBAL => name,
            vendor => format!("{name}-{vendor}"),
        }
    }
}

/// What a key database holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Keys {
    /// Subjects of its certificates, in its order; of at most 32.
    pub certificates: Vec<String>,
    /// How many certificates are not listed for that limit.
    pub more: usize,
    /// How many digests of single programs it has (SHA-256).
    pub digests: usize,
    /// How many entries of other kinds.
    pub others: usize,
}

impl Keys {
    /// The entries of a database: EFI_SIGNATURE_LISTs, one after the other, all of the bytes.
    pub(super) fn parse(data: &[u8]) -> Option<Self> {
        let mut input = Reader::new("key database", data);
        let mut keys = Self::default();
        while !input.is_empty() {
            let kind = guid(input.array().ok()?);
            let list = usize::try_from(input.u32_le().ok()?).ok()?;
            let header = usize::try_from(input.u32_le().ok()?).ok()?;
            let entry = usize::try_from(input.u32_le().ok()?).ok()?;
            // The size counts the 28 bytes that were just read.
            let entries = input.take(list.checked_sub(28)?).ok()?.get(header..)?;
            // Each entry begins with its owner's GUID.
            if entry < 16 || !entries.len().is_multiple_of(entry) {
                return None;
            }
            for one in entries.chunks_exact(entry) {
                keys.add(kind, one.get(16..)?);
            }
        }
        Some(keys)
    }

    /// One entry (EFI_SIGNATURE_DATA), as the firmware measures the one that let a program start.
    pub(super) fn parse_one(data: &[u8]) -> Option<Self> {
        let (_owner, entry) = data.split_at_checked(16)?;
        let mut keys = Self::default();
        // shim logs a certificate without an owner before it.
        match subject(entry).or_else(|| subject(data)) {
            Some(subject) => keys.certificates.push(subject),
            None if entry.len() == 32 => keys.digests = 1,
            None => return None,
        }
        Some(keys)
    }

    fn add(&mut self, kind: Uuid, entry: &[u8]) {
        match kind {
            CERT_SHA256 => self.digests = self.digests.saturating_add(1),
            CERT_X509 if self.certificates.len() == MAX_SUBJECTS => self.more = self.more.saturating_add(1),
            CERT_X509 => self
                .certificates
                .push(subject(entry).unwrap_or_else(|| "unreadable".into())),
            _ => self.others = self.others.saturating_add(1),
        }
    }
}

/// A certificate's subject.
fn subject(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject().to_string();
    Some(subject.chars().take(MAX_SUBJECT).collect())
}

/// What a boot entry (EFI_LOAD_OPTION) is called and starts: its description, and its file where it names one.
pub(super) fn load_option(data: &[u8]) -> Option<(String, Option<String>)> {
    let mut input = Reader::new("load option", data);
    input.u32_le().ok()?;
    let length = usize::from(input.u16_le().ok()?);
    let rest = input.take(input.left()).ok()?;
    let end = rest.chunks_exact(2).position(|unit| unit == [0, 0])?.checked_mul(2)?;
    let description = text::utf16(rest.get(..end)?)?;
    let path = rest.get(end.checked_add(2)?..)?.get(..length)?;
    Some((description, file_of(path)))
}

/// The file or firmware volume file of an image load event (UEFI_IMAGE_LOAD_EVENT), where it names one.
pub(super) fn image_file(data: &[u8]) -> Option<String> {
    let mut input = Reader::new("image load event", data);
    // Address, length and link address: of no interest to anyone after the boot.
    input.take(24).ok()?;
    let length = usize::try_from(input.u64_le().ok()?).ok()?;
    file_of(input.take(length).ok()?)
}

/// The file that a device path ends in: Media nodes of subtype 4 (file path) or 6 (file in a firmware volume).
fn file_of(path: &[u8]) -> Option<String> {
    let mut input = Reader::new("device path", path);
    let mut file: Option<String> = None;
    while let (Ok(kind), Ok(subtype), Ok(length)) = (input.u8(), input.u8(), input.u16_le()) {
        let body = input.take(usize::from(length).checked_sub(4)?).ok()?;
        match (kind, subtype) {
            // A path may be split over several nodes.
            (4, 4) => file = Some(file.unwrap_or_default() + &text::utf16(body)?),
            (4, 6) => file = Some(format!("firmware file {}", guid(body.try_into().ok()?))),
            _ => {}
        }
    }
    file
}
