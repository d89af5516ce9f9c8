//! `.rpm` (rpm, docs/manual/format_v4.md): a lead that says nothing any more, a signature header, the header, and the
//! payload, a compressed cpio archive. What the header lists is compared with what the payload holds, both ways.
//!
//! The digests keep damage away, not an attacker: whether the package is the distributor's, `rpm -K` says.

mod files;
mod header;

use std::io::{self, BufRead, BufReader};

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::LoadKind;

use self::files::Files;
use self::header::Header;
use super::collect::Collector;
use super::cpio::{Archive, Links, Member};
use super::error::Fault;
use super::source::{CHUNK, Hashing, drain, read_count};
use super::unpack::Streams;

/// The lead begins so.
pub(super) const MAGIC: &[u8] = b"\xed\xab\xee\xdb";
const WHAT: &str = "the .rpm package";
/// Length of the lead.
const LEAD: u64 = 96;
/// SHA-256 in rpm's numbers for hashes, which are OpenPGP's (RFC 4880, section 9.4).
pub(super) const SHA256: u64 = 8;

/// Tags (rpm, include/rpm/rpmtag.h).
mod tag {
    pub const SIGNATURE_SHA256: u32 = 273;
    pub const PAYLOAD_FORMAT: u32 = 1124;
    pub const PAYLOAD_DIGEST: u32 = 5092;
    pub const PAYLOAD_DIGEST_ALGO: u32 = 5093;
    /// What rpm runs before and after it installs and removes, and for triggers.
    pub const SCRIPTS: [u32; 12] = [1023, 1024, 1025, 1026, 1079, 1151, 1152, 5104, 5105, 1065, 5066, 5076];
}

/// rpm writes a script into a file of such a name, and names it to the shell (lib/rpmscript.cc).
const SCRIPT: &str = "var/tmp/rpm-tmp";

/// Takes the files that the package installs, and the scripts that are run when it is.
pub(super) fn read(collector: &mut Collector<'_>, input: &mut dyn BufRead) -> Result<(), Fault> {
    let lead = read_count(input, WHAT, LEAD)?;
    if !lead.starts_with(MAGIC) {
        return Err(Fault::Unknown);
    }
    let (signature, length) = Header::read(input)?;
    // The header begins at a multiple of eight.
    read_count(input, WHAT, length.next_multiple_of(8).saturating_sub(length))?;
    let (header, _) = Header::read(input)?;
    if let Some(listed) = signature.text(tag::SIGNATURE_SHA256)? {
        same("the header", header.digest, sha256(listed)?)?;
    }
    if header
        .text(tag::PAYLOAD_FORMAT)?
        .is_some_and(|format| format != b"cpio")
    {
        return Err(Fault::malformed(
            WHAT,
            "its payload is no cpio archive: deltas are not read",
        ));
    }
    scripts(collector, &header)?;
    let mut files = Files::read(&header, collector.limits.names)?;

    let mut hashed = Hashing::new(input);
    payload(collector, &mut BufReader::with_capacity(CHUNK, &mut hashed), &mut files)?;
    files.all_came()?;
    let digest = hashed.finish().map_err(Fault::reading(WHAT))?;
    let algorithm = header.numbers(tag::PAYLOAD_DIGEST_ALGO)?.first().copied();
    match header.text(tag::PAYLOAD_DIGEST)? {
        Some(listed) if algorithm == Some(SHA256) => same("the payload", digest, sha256(listed)?),
        _ => Ok(()),
    }
}

fn payload(collector: &mut Collector<'_>, input: &mut dyn BufRead, files: &mut Files) -> Result<(), Fault> {
    let unpacked = collector.budgeted(Streams::new(input)?);
    let mut unpacked = BufReader::with_capacity(CHUNK, unpacked);
    let mut archive = Archive::new(&mut unpacked as &mut dyn BufRead);
    let mut links = Links::new(collector.limits.names);
    while let Some(member) = archive.next()? {
        collector.member()?;
        let header = match member {
            Member::Full(header) => header,
            Member::Stripped(number) => {
                let (header, size) = files.stripped(number)?;
                archive.expect(size);
                header
            }
        };
        let number = files.came(&header)?;
        if !header.is_file() {
            continue;
        }
        if let Some(names) = links.names(&header)? {
            let mut content = Hashing::new(archive.content());
            let mut content_reader = BufReader::with_capacity(CHUNK, &mut content);
            collector.file(&names, header.is_executable(), &mut content_reader)?;
            compare(collector, files, number, &header.name, content.finish()?)?;
        }
    }
    for names in links.empty() {
        collector.file(&names, false, &mut io::empty())?;
    }
    drain(&mut unpacked).map_err(Fault::reading(WHAT))
}

fn compare(
    collector: &mut Collector<'_>,
    files: &Files,
    number: usize,
    name: &[u8],
    found: Sha256Digest,
) -> Result<(), Fault> {
    let Some(listed) = files.digest(number) else {
        return Ok(());
    };
    same("the file", found, listed).inspect_err(|_| {
        let name = String::from_utf8_lossy(files::bare(name));
        collector.place.push(format!("/{name}"));
    })
}

fn scripts(collector: &mut Collector<'_>, header: &Header) -> Result<(), Fault> {
    for tag in tag::SCRIPTS {
        for script in header.texts(tag)? {
            collector.add(LoadKind::Argument, SCRIPT, Sha256Digest::of(script))?;
        }
    }
    Ok(())
}

fn same(what: &'static str, found: Sha256Digest, listed: Sha256Digest) -> Result<(), Fault> {
    if found == listed {
        Ok(())
    } else {
        Err(Fault::Digest { what, found, listed })
    }
}

/// A digest as headers have it, in hexadecimal digits.
fn sha256(text: &[u8]) -> Result<Sha256Digest, Fault> {
    let digest = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    digest.ok_or(Fault::malformed(WHAT, "a digest in it is no SHA-256"))
}
