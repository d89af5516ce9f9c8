//! `.deb` (deb(5)): an ar archive of `debian-binary`, `control.tar` and `data.tar`, the two compressed or not.

use std::io::{BufRead, BufReader, Read};

use tar::{Archive, EntryType};

use super::collect::Collector;
use super::error::Fault;
use super::source::{CHUNK, drain, read_all, read_count};
use super::unpack::Streams;

/// An ar archive begins so.
pub(super) const MAGIC: &[u8] = b"!<arch>\n";
const WHAT: &str = "the .deb package";
/// Length of a member's header in an ar archive.
const HEADER: u64 = 60;
/// Longest name in GNU's form for long ones.
const MAX_NAME: u64 = 4096;
/// Members of the outer archive; dpkg makes three.
const MAX_MEMBERS: u32 = 16;
/// dpkg runs these from there while it installs the package; later they are called PACKAGE.postinst and so on.
const SCRIPTS: [&str; 5] = ["preinst", "postinst", "prerm", "postrm", "config"];
const SCRIPT_FOLDER: &str = "var/lib/dpkg/tmp.ci";

/// Takes the files that the package installs, and the scripts that are run when it is.
pub(super) fn read(collector: &mut Collector<'_>, input: &mut dyn BufRead) -> Result<(), Fault> {
    if read_count(input, WHAT, MAGIC.len() as u64)? != MAGIC {
        return Err(Fault::Unknown);
    }
    let version = member(input)?.ok_or(Fault::Truncated(WHAT))?;
    if version.name != "debian-binary" {
        return Err(Fault::malformed(WHAT, "its first member is not debian-binary"));
    }
    let text = read_all(&mut (&mut *input).take(version.size), "debian-binary", HEADER)?;
    if !text.starts_with(b"2.") {
        return Err(Fault::malformed(WHAT, "its version is not 2"));
    }
    pad(input, version.size)?;

    let mut part = Part::Control;
    for _ in 0..MAX_MEMBERS {
        let Some(member) = member(input)? else {
            return Err(Fault::Truncated(WHAT));
        };
        let mut content = Exactly {
            inner: (&mut *input).take(member.size),
        };
        // deb(5): members whose names begin so are skipped.
        if !member.name.starts_with('_') {
            if !part.is_named(&member.name) {
                return Err(Fault::malformed(
                    WHAT,
                    "its members are not control.tar and data.tar, in this order",
                ));
            }
            collector.place.push(member.name);
            tarball(collector, &mut content, part)?;
            collector.place.pop();
            part = match part {
                Part::Control => Part::Data,
                // dpkg takes no notice of what follows.
                Part::Data => return drain(&mut content).map_err(Fault::reading(WHAT)),
            };
        }
        drain(&mut content).map_err(Fault::reading(WHAT))?;
        pad(input, member.size)?;
    }
    Err(Fault::malformed(WHAT, "it has no data.tar"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Control,
    Data,
}

impl Part {
    fn is_named(self, name: &str) -> bool {
        let stem = match self {
            Self::Control => "control.tar",
            Self::Data => "data.tar",
        };
        name.strip_prefix(stem)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

/// Files of a tar archive. dpkg reads old, "ustar" and GNU forms, the latter with long names, and nothing else; neither
/// does this.
fn tarball(collector: &mut Collector<'_>, input: &mut dyn BufRead, part: Part) -> Result<(), Fault> {
    let unpacked = collector.budgeted(Streams::new(input)?);
    let mut archive = Archive::new(unpacked);
    let mut long: Option<Vec<u8>> = None;
    let broken = Fault::reading("the tar archive");
    for entry in archive.entries().map_err(&broken)?.raw(true) {
        let mut entry = entry.map_err(&broken)?;
        collector.member()?;
        let kind = entry.header().entry_type();
        match kind {
            EntryType::GNULongName => {
                let mut name = read_all(&mut entry, "a long name", MAX_NAME)?;
                if name.last() == Some(&0) {
                    name.pop();
                }
                long = Some(name);
                continue;
            }
            EntryType::Regular | EntryType::Continuous => {
                let name = long.take().unwrap_or_else(|| entry.path_bytes().into_owned());
                let mode = entry.header().mode().map_err(&broken)?;
                let mut content = BufReader::with_capacity(CHUNK, entry);
                match part {
                    Part::Data => collector.file(&[name], mode & 0o111 != 0, &mut content)?,
                    Part::Control => script(collector, &name, &mut content)?,
                }
            }
            // Of these a host loads nothing: a link's file comes by itself.
            EntryType::Directory
            | EntryType::Symlink
            | EntryType::Link
            | EntryType::GNULongLink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Fifo => {}
            _ => {
                return Err(Fault::malformed(
                    "the tar archive",
                    "it has a member that dpkg does not take",
                ));
            }
        }
        if kind != EntryType::GNULongLink {
            long = None;
        }
    }
    // Only the end has the checksum.
    drain(&mut archive.into_inner()).map_err(&broken)
}

fn script(collector: &mut Collector<'_>, name: &[u8], content: &mut dyn BufRead) -> Result<(), Fault> {
    let name = String::from_utf8_lossy(name);
    let name = name.trim_start_matches("./");
    if !SCRIPTS.contains(&name) {
        return Ok(());
    }
    collector.file(&[format!("{SCRIPT_FOLDER}/{name}").into_bytes()], true, content)
}

struct Member {
    name: String,
    size: u64,
}

/// The next member's header; none at the end.
fn member(input: &mut dyn BufRead) -> Result<Option<Member>, Fault> {
    if input.fill_buf().map_err(Fault::Read)?.is_empty() {
        return Ok(None);
    }
    let header = read_count(input, WHAT, HEADER)?;
    let text = std::str::from_utf8(&header).map_err(|_| Fault::malformed(WHAT, "a member's header is no text"))?;
    let field = |range: std::ops::Range<usize>| text.get(range).unwrap_or_default().trim_end();
    if !text.ends_with("`\n") {
        return Err(Fault::malformed(WHAT, "a member's header does not end as it must"));
    }
    let size = field(48..58);
    if !size.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::malformed(WHAT, "a member's size is no number"));
    }
    Ok(Some(Member {
        name: field(0..16).trim_end_matches('/').to_owned(),
        size: size
            .parse()
            .map_err(|_| Fault::malformed(WHAT, "a member's size is no number"))?,
    }))
}

/// Members begin at even places.
fn pad(input: &mut dyn BufRead, size: u64) -> Result<(), Fault> {
    // The last byte of the file may be missing.
    if !size.is_multiple_of(2) && !input.fill_buf().map_err(Fault::Read)?.is_empty() {
        input.consume(1);
    }
    Ok(())
}

/// A member's content, whose end must not come early.
struct Exactly<R> {
    inner: std::io::Take<R>,
}

impl<R: BufRead> BufRead for Exactly<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        let missing = self.inner.limit() > 0;
        let buffer = self.inner.fill_buf()?;
        if buffer.is_empty() && missing {
            return Err(Fault::Truncated(WHAT).into());
        }
        Ok(buffer)
    }

    fn consume(&mut self, count: usize) {
        self.inner.consume(count);
    }
}

impl<R: BufRead> Read for Exactly<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        super::source::read_buffered(self, out)
    }
}
