//! Initramfs files, made by cpio and the compressors as distributions make them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use assay_evidence::event::LoadKind;
use assay_evidence::policy::Approved;
use assay_verifier::known_good::{Fault, InputKind};

use crate::tree::{self, entry, expected, piped, put, run, scan, sha256sum};

/// A cpio archive of a folder.
fn cpio(folder: &Path, form: &str) -> Vec<u8> {
    let archive = folder.parent().unwrap().join("archive.cpio");
    let line = format!(
        "find . | LC_ALL=C sort | cpio --quiet -o -H {form} > {}",
        archive.display()
    );
    run(folder, "sh", &["-c", &line]);
    fs::read(archive).unwrap()
}

/// The entries of what is in the system, and of a file as a whole.
fn wanted(root: &Path, image: &Path, path: &str) -> BTreeSet<Approved> {
    let mut wanted = expected(root);
    wanted.insert(entry(path, LoadKind::KexecInitramfs, &sha256sum(image)));
    wanted
}

#[test]
fn each_form_and_compression_gives_all_that_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    tree::make(&root);
    let image = folder.path().join("image");
    let path = image.display().to_string();
    for form in ["newc", "crc"] {
        let plain = cpio(&root, form);
        for (program, arguments) in [
            ("cat", &[][..]),
            ("gzip", &["-9"]),
            ("xz", &["--check=crc32", "--lzma2=dict=1MiB"]),
            ("zstd", &["-19", "-q"]),
            ("lz4", &["-l", "-9"]),
        ] {
            fs::write(&image, piped(program, arguments, &plain)).unwrap();
            let found = scan(&image).unwrap();
            assert_eq!(found.kind, InputKind::File);
            assert_eq!(found.entries, wanted(&root, &image, &path[1..]), "{form}, {program}");
        }
    }
}

#[test]
fn microcode_before_the_rest_is_firmware() {
    let folder = tempfile::tempdir().unwrap();
    let (early, root) = (folder.path().join("early"), folder.path().join("root"));
    put(
        &early.join("kernel/x86/microcode/GenuineIntel.bin"),
        0o644,
        b"microcode",
    );
    tree::make(&root);
    // As a kernel reads them: plain, zeros up to some boundary, compressed, and once more.
    let mut bytes = cpio(&early, "newc");
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes.extend(piped("zstd", &["-q"], &cpio(&root, "newc")));
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    put(&folder.path().join("more/usr/bin/more"), 0o755, b"#!/bin/sh\n");
    bytes.extend(piped("gzip", &[], &cpio(&folder.path().join("more"), "newc")));
    let system = folder.path().join("system");
    put(&system.join("boot/initrd.img-6.1"), 0o600, &bytes);

    let mut wanted = wanted(&root, &system.join("boot/initrd.img-6.1"), "boot/initrd.img-6.1");
    for (from, path, kind) in [
        (&early, "kernel/x86/microcode/GenuineIntel.bin", LoadKind::Firmware),
        (&folder.path().join("more"), "usr/bin/more", LoadKind::Program),
    ] {
        wanted.insert(entry(path, kind, &sha256sum(&from.join(path))));
    }
    let found = scan(&system).unwrap();
    assert_eq!(found.kind, InputKind::Root);
    assert_eq!(found.entries, wanted);
}

#[test]
fn an_initramfs_in_an_initramfs_is_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    tree::make(&inner);
    let outer = folder.path().join("outer");
    put(&outer.join("boot/initrd.img"), 0o644, &cpio(&inner, "newc"));
    let image = folder.path().join("image");
    fs::write(&image, cpio(&outer, "newc")).unwrap();
    let found = scan(&image).unwrap().entries;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|entry| entry.kind == Some(LoadKind::KexecInitramfs)));
}

#[test]
fn what_is_broken_is_refused_whole() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    put(&root.join("init"), 0o755, &fs::read("/usr/bin/false").unwrap());
    put(&root.join("usr/bin/script.py"), 0o755, b"print('long')\n");
    let good = cpio(&root, "crc");
    let image = folder.path().join("image");
    let refused = |bytes: &[u8]| {
        fs::write(&image, bytes).unwrap();
        let error = scan(&image).unwrap_err();
        format!("{error}: {:?}", error.fault)
    };
    for length in (6..good.len() - 512).step_by(good.len() / 60) {
        refused(&good[..length]);
    }
    let lz4 = piped("lz4", &["-l"], &good);
    for length in (8..lz4.len() - 1).step_by(lz4.len() / 20) {
        refused(&lz4[..length]);
    }
    let mut flipped = good.clone();
    let place = flipped.windows(5).position(|part| part == b"long'").unwrap();
    flipped[place] ^= 1;
    assert!(refused(&flipped).contains("checksum is wrong"));
    assert!(refused(&[&good[..], b"junk"].concat()).contains("neither cpio nor compressed"));
    assert!(refused(&piped("gzip", &[], b"no archive at all")).contains("more than cpio"));
    assert!(refused(&[0; 4096]).contains("Unknown"));
    let frames = refused(&piped("lz4", &[], &good));
    assert!(frames.contains("frames that no kernel unpacks"), "{frames}");
    assert!(matches!(
        *scan(Path::new("/etc/passwd")).unwrap_err().fault,
        Fault::Unknown
    ));
    fs::write(&image, &good).unwrap();
    assert_eq!(scan(&image).unwrap().entries.len(), 3);
}
