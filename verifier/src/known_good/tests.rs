//! What no packing program makes: archives written byte by byte, and bytes that mean nothing.

use std::io::BufReader;

use proptest::prelude::*;

use super::cpio::{Archive, Member};
use super::*;

fn len32(length: usize) -> u32 {
    u32::try_from(length).unwrap()
}

/// A "newc" member.
fn member(name: &str, mode: u32, links: u32, inode: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = b"070701".to_vec();
    let name_size = name.len() + 1;
    for field in [
        inode,
        mode,
        0,
        0,
        links,
        0,
        len32(content.len()),
        0,
        0,
        0,
        0,
        len32(name_size),
        0,
    ] {
        bytes.extend(format!("{field:08X}").bytes());
    }
    bytes.extend(name.bytes().chain([0]));
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

const FILE: u32 = 0o100_755;
const SCRIPT: &[u8] = b"#!/bin/sh\n";

fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), member("TRAILER!!!", 0, 1, 0, b"")].concat()
}

/// What an initramfs gives: kinds and paths, or the fault.
fn scanned(bytes: &[u8], limits: &Limits) -> Result<Vec<String>, Fault> {
    let mut collector = Collector::new(limits);
    initramfs::read(&mut collector, &mut &bytes[..])?;
    Ok(collector.entries.into_iter().map(|entry| entry.path.into()).collect())
}

fn fault(members: &[Vec<u8>]) -> String {
    format!("{:?}", scanned(&archive(members), &Limits::default()).unwrap_err())
}

#[test]
fn names_of_one_file_share_its_content_wherever_that_comes() {
    let first = [member("a", FILE, 2, 7, SCRIPT), member("b", FILE, 2, 7, b"")];
    assert_eq!(scanned(&archive(&first), &Limits::default()).unwrap(), ["/a"]);
    let last = [member("a", FILE, 2, 7, b""), member("b", FILE, 2, 7, SCRIPT)];
    assert_eq!(scanned(&archive(&last), &Limits::default()).unwrap(), ["/a", "/b"]);
    // None of them has any: they are empty, and one may be a script by its name.
    let empty = [member("a.py", FILE, 2, 7, b""), member("b", FILE, 2, 7, b"")];
    assert_eq!(scanned(&archive(&empty), &Limits::default()).unwrap(), ["/a.py"]);
}

#[test]
fn names_that_lead_elsewhere_or_never_end_are_refused() {
    for (name, why) in [
        ("../a", "leads upwards"),
        ("a/../../b", "leads upwards"),
        ("./.", "names nothing"),
        ("a\0b", "only NUL"),
        (&"a/".repeat(3000), "a name's length"),
    ] {
        let found = fault(&[member(name, FILE, 1, 1, SCRIPT)]);
        assert!(found.contains(why), "{name:?}: {found}");
    }
    // As long as a log can have it, and a byte longer: then it is cut as the log cuts it.
    let long = "a".repeat(511);
    let paths = scanned(&archive(&[member(&long, FILE, 1, 1, SCRIPT)]), &Limits::default()).unwrap();
    assert_eq!(paths, [format!("/{long}")]);
    let paths = scanned(
        &archive(&[member(&format!("{long}b"), FILE, 1, 1, SCRIPT)]),
        &Limits::default(),
    )
    .unwrap();
    assert_eq!(paths, [format!("/{long}")]);
}

#[test]
fn numbers_that_are_none_are_refused() {
    for digits in ["0000000g", "+0000001", "-0000001", "0x000001"] {
        let mut bytes = archive(&[member("a", FILE, 1, 1, SCRIPT)]);
        bytes.splice(6..14, digits.bytes());
        assert!(matches!(
            scanned(&bytes, &Limits::default()),
            Err(Fault::Malformed { .. })
        ));
    }
}

#[test]
fn a_member_that_claims_more_than_there_is_costs_nothing() {
    let mut bytes = member("a", FILE, 1, 1, SCRIPT);
    bytes.splice(54..62, "FFFFFFFF".bytes());
    assert!(matches!(scanned(&bytes, &Limits::default()), Err(Fault::Truncated(_))));
}

#[test]
fn an_initramfs_of_many_files_ends_at_the_limit() {
    let limits = Limits {
        members: 10,
        ..Limits::default()
    };
    let many: Vec<_> = (0..11).map(|number| member("a", FILE, 1, number, SCRIPT)).collect();
    assert!(scanned(&archive(&many[..10]), &limits).is_ok());
    assert!(matches!(
        scanned(&archive(&many), &limits),
        Err(Fault::TooMuch { limit: 10, .. })
    ));
}

#[test]
fn names_are_kept_up_to_a_limit() {
    let limits = Limits {
        names: 1000,
        ..Limits::default()
    };
    // What has one name is not kept.
    let plain: Vec<_> = (0..50)
        .map(|number| member("usr/bin/a", FILE, 1, number, SCRIPT))
        .collect();
    assert!(scanned(&archive(&plain), &limits).is_ok());
    for content in [b"", SCRIPT] {
        let linked: Vec<_> = (0..50)
            .map(|number| member("usr/bin/a", FILE, 2, number, content))
            .collect();
        assert!(matches!(
            scanned(&archive(&linked), &limits),
            Err(Fault::TooMuch { limit: 1000, .. })
        ));
    }
    // A folder's name of 900 bytes, for two files.
    let store = [&b"a\0b\0"[..], &[b'd'; 900], &[0; 32]].concat();
    let tags = [
        (1117, 8, 0, 2),
        (1118, 8, 4, 1),
        (1116, 4, 908, 2),
        (1030, 3, 908, 2),
        (1028, 4, 908, 2),
    ];
    let bytes = [rpm::MAGIC, &[0; 92], &rpm_header(&[], &[]), &rpm_header(&tags, &store)].concat();
    let read = |limits| rpm::read(&mut Collector::new(limits), &mut &bytes[..]).unwrap_err();
    assert!(matches!(read(&limits), Fault::TooMuch { limit: 1000, .. }));
    assert!(!matches!(read(&Limits::default()), Fault::TooMuch { .. }));
}

#[test]
fn members_of_a_package_without_a_header_are_numbers() {
    let mut bytes = b"07070X00000002\0\0SCRIPT\0\0".to_vec();
    bytes.extend(member("TRAILER!!!", 0, 1, 0, b""));
    let mut archive = Archive::new(&bytes[..]);
    assert_eq!(archive.next().unwrap(), Some(Member::Stripped(2)));
    archive.expect(6);
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut archive.content(), &mut content).unwrap();
    assert_eq!(content, b"SCRIPT");
    assert_eq!(archive.next().unwrap(), None);
    // A kernel knows no such member.
    let stripped = [b"070701".as_slice(), &bytes].concat();
    assert!(scanned(&stripped, &Limits::default()).is_err());
}

#[test]
fn lz4_blocks_may_be_longer_than_what_they_hold() {
    // What cannot be compressed grows; such a block has the full 8 MiB in it.
    let mut content = vec![0_u8; 8 << 20];
    let mut state = 1_u64;
    for byte in &mut content {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
    let mut packed = vec![0; 9 << 20];
    let mut bytes = 0x184c_2102_u32.to_le_bytes().to_vec();
    for part in [&content[..], b"the end"] {
        let length = lz4_flex::block::compress_into(part, &mut packed).unwrap();
        assert!(length >= part.len());
        bytes.extend(len32(length).to_le_bytes());
        bytes.extend(&packed[..length]);
    }
    let mut reader = lz4::Lz4Reader::new(&bytes[..]);
    let mut found = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut found).unwrap();
    assert!(found == [&content[..], b"the end"].concat());
}

/// Reads bytes as every format: what comes of it may be anything but a panic.
fn read_as_anything(bytes: &[u8]) {
    let limits = Limits {
        unpacked: 1 << 20,
        module: 1 << 20,
        ..Limits::default()
    };
    let as_format = |read: &dyn Fn(&mut Collector<'_>, &mut dyn std::io::BufRead) -> Result<(), Fault>,
                     magic: &[u8]| {
        let bytes = [magic, bytes].concat();
        let mut collector = Collector::new(&limits);
        let _any = read(&mut collector, &mut BufReader::with_capacity(7, &bytes[..]));
    };
    as_format(&|collector, input| deb::read(collector, input), b"");
    as_format(&|collector, input| deb::read(collector, input), deb::MAGIC);
    as_format(&|collector, input| rpm::read(collector, input), b"");
    let lead = [rpm::MAGIC, &[0; 92]].concat();
    as_format(&|collector, input| rpm::read(collector, input), &lead);
    let header = [&lead[..], b"\x8e\xad\xe8\x01\0\0\0\0"].concat();
    as_format(&|collector, input| rpm::read(collector, input), &header);
    for magic in [
        &b""[..],
        b"070701",
        b"070702",
        b"07070X",
        b"\x1f\x8b\x08",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
        b"\x02\x21\x4c\x18",
    ] {
        as_format(&|collector, input| initramfs::read(collector, input), magic);
        as_format(&|collector, input| collector.lone(b"a.ko.xz", false, input), magic);
    }
}

/// A package header of these tags, each with its kind, place and count, over a store.
fn rpm_header(tags: &[(u32, u32, u32, u32)], store: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x8e\xad\xe8\x01\0\0\0\0".to_vec();
    bytes.extend(len32(tags.len()).to_be_bytes());
    bytes.extend(len32(store.len()).to_be_bytes());
    for (tag, kind, place, count) in tags {
        bytes.extend(
            [tag, kind, place, count]
                .into_iter()
                .flat_map(|number| number.to_be_bytes()),
        );
    }
    bytes.extend(store);
    bytes
}

proptest! {
    #[test]
    fn bytes_without_a_meaning_are_refused_and_nothing_more(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        read_as_anything(&bytes);
    }

    #[test]
    fn an_archive_with_changed_bytes_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = archive(&[
            member("usr/bin/a", FILE, 1, 1, SCRIPT),
            member("usr/bin/b", FILE, 2, 2, b""),
            member("usr/bin/c", FILE, 2, 2, b"\x7fELF\x02\x01"),
            member("usr/lib/modules/a.ko.xz", 0o100_644, 1, 3, b"\xfd7zXZ\0"),
        ]);
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        read_as_anything(&bytes);
    }

    #[test]
    fn headers_of_packages_with_any_tags_never_panic(
        tags in prop::collection::vec(
            (
                prop::sample::select(vec![1022_u32, 1023, 1028, 1030, 1035, 1037, 1096, 1116, 1117, 1118, 5008, 5011, 5092, 5093]),
                0_u32..10,
                prop_oneof![0_u32..70, any::<u32>()],
                prop_oneof![0_u32..5, any::<u32>()],
            ),
            0..14,
        ),
        store in prop::collection::vec(prop_oneof![Just(0_u8), Just(b'a'), Just(1), any::<u8>()], 0..80),
    ) {
        let mut bytes = [rpm::MAGIC, &[0; 92]].concat();
        bytes.extend(rpm_header(&[], &[]));
        bytes.extend(rpm_header(&tags, &store));
        bytes.extend(archive(&[member("./aa", FILE, 1, 1, SCRIPT)]));
        let limits = Limits::default();
        let _any = rpm::read(&mut Collector::new(&limits), &mut &bytes[..]);
    }

    #[test]
    fn what_is_looked_at_ahead_is_not_lost(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        steps in prop::collection::vec((0_usize..40, 0_usize..40), 0..20),
    ) {
        let mut reader = Peek::new(BufReader::with_capacity(5, &bytes[..]));
        let mut taken = Vec::new();
        for (ahead, count) in steps {
            let rest = bytes.get(taken.len()..).unwrap_or_default();
            prop_assert_eq!(reader.peek(ahead).unwrap(), rest.get(..ahead).unwrap_or(rest));
            let mut out = vec![0; count];
            let read = std::io::Read::read(&mut reader, &mut out).unwrap();
            taken.extend_from_slice(&out[..read]);
        }
        std::io::Read::read_to_end(&mut reader, &mut taken).unwrap();
        prop_assert_eq!(&taken, &bytes);
    }
}
