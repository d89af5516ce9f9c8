//! An initramfs: cpio archives one after the other, each plain or compressed, with zeros between them
//! (init/initramfs.c). The first one often has the processor's microcode.

use std::io::{self, BufRead, BufReader};

use super::classify::is_cpio;
use super::collect::Collector;
use super::cpio::{Archive, Links, Member};
use super::error::Fault;
use super::source::{CHUNK, Peek, skip_zeros};
use super::unpack::{MAGIC, Packing, Stream};

const WHAT: &str = "the initramfs";

/// Takes everything in it.
pub(super) fn read(collector: &mut Collector<'_>, input: &mut dyn BufRead) -> Result<(), Fault> {
    let mut input = Peek::new(input);
    let mut parts = 0_u32;
    while !skip_zeros(&mut input)? {
        parts = parts.saturating_add(1);
        let head = input.peek(MAGIC)?;
        if is_cpio(head) {
            archive(collector, &mut input)?;
            continue;
        }
        let Some(packing) = Packing::of(head)? else {
            return Err(Fault::malformed(WHAT, "a part of it is neither cpio nor compressed"));
        };
        let unpacked = collector.budgeted(Stream::new(packing, &mut input)?);
        let mut unpacked = Peek::new(BufReader::with_capacity(CHUNK, unpacked));
        while !skip_zeros(&mut unpacked)? {
            if !is_cpio(unpacked.peek(MAGIC)?) {
                return Err(Fault::malformed(WHAT, "a compressed part of it holds more than cpio"));
            }
            archive(collector, &mut unpacked)?;
        }
    }
    if parts == 0 {
        return Err(Fault::malformed(WHAT, "it is empty"));
    }
    Ok(())
}

fn archive(collector: &mut Collector<'_>, input: &mut dyn BufRead) -> Result<(), Fault> {
    let mut archive = Archive::new(input);
    let mut links = Links::new(collector.limits.names);
    while let Some(member) = archive.next()? {
        let Member::Full(header) = member else {
            return Err(Fault::malformed(WHAT, "it has a member that only a package can have"));
        };
        collector.member()?;
        if !header.is_file() {
            continue;
        }
        if let Some(names) = links.names(&header)? {
            collector.file(&names, header.is_executable(), &mut archive.content())?;
        }
    }
    for names in links.empty() {
        collector.file(&names, false, &mut io::empty())?;
    }
    Ok(())
}
