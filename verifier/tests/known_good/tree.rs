//! A small system to pack, with one file of each sort, and what other programs say of it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use assay_evidence::event::LoadKind;
use assay_evidence::policy::Approved;
use assay_verifier::known_good::{self, Found, Limits, Options, ScanError};

/// A path that no header of a tar archive has room for.
pub const LONG: &str = "usr/share/a-folder-with-quite-a-long-name/and-another-one-in-it-with-a-long-name/and-one-more/then-a-script-that-is-long.py";

/// Files that count, with what they count as. The modules' compressed files have a second entry.
pub const COUNTED: [(&str, LoadKind); 13] = [
    ("usr/bin/program", LoadKind::Program),
    ("usr/bin/script", LoadKind::Program),
    ("usr/bin/linked", LoadKind::Program),
    ("usr/lib/libdemo.so.1", LoadKind::Mapping),
    ("usr/share/demo/plugin.py", LoadKind::Argument),
    ("usr/share/demo/no-ending", LoadKind::Argument),
    (LONG, LoadKind::Argument),
    ("usr/lib/modules/6.1/plain.ko", LoadKind::ModuleFile),
    ("usr/lib/modules/6.1/by-gzip.ko.gz", LoadKind::ModuleCompressed),
    ("usr/lib/modules/6.1/by-xz.ko.xz", LoadKind::ModuleCompressed),
    ("usr/lib/modules/6.1/by-zstd.ko.zst", LoadKind::ModuleCompressed),
    ("usr/lib/firmware/demo/nic.bin.xz", LoadKind::Firmware),
    ("boot/vmlinuz-6.1", LoadKind::KexecImage),
];

/// The programs that unpack each compressed module.
const UNPACK: [(&str, &str); 3] = [
    ("usr/lib/modules/6.1/by-gzip.ko.gz", "gzip"),
    ("usr/lib/modules/6.1/by-xz.ko.xz", "xz"),
    ("usr/lib/modules/6.1/by-zstd.ko.zst", "zstd"),
];

/// Makes the system.
pub fn make(root: &Path) {
    let library = mapped_library();
    for (path, mode, content) in [
        ("usr/bin/program", 0o755, fs::read("/usr/bin/true").unwrap()),
        ("usr/bin/script", 0o755, b"#!/bin/sh\nexit 0\n".to_vec()),
        ("usr/lib/libdemo.so.1", 0o644, fs::read(library).unwrap()),
        ("usr/share/demo/plugin.py", 0o644, b"print('plugin')\n".to_vec()),
        ("usr/share/demo/plugin.pyc", 0o644, b"\xa7\x0d\x0d\x0a\0\0".to_vec()),
        (
            "usr/share/demo/no-ending",
            0o644,
            b"#!/usr/bin/perl\nprint 1;\n".to_vec(),
        ),
        ("usr/share/demo/README", 0o644, b"nothing to run\n".to_vec()),
        (LONG, 0o644, b"print('long')\n".to_vec()),
        (
            "usr/lib/modules/6.1/plain.ko",
            0o644,
            fs::read("/usr/bin/true").unwrap(),
        ),
        ("usr/lib/modules/6.1/modules.dep", 0o644, b"plain.ko:\n".to_vec()),
        ("usr/lib/firmware/demo/nic.bin.xz", 0o644, packed("xz", b"firmware")),
        ("boot/vmlinuz-6.1", 0o644, kernel()),
    ] {
        put(&root.join(path), mode, &content);
    }
    let module = fs::read("/usr/bin/false").unwrap();
    for (path, program) in UNPACK {
        put(&root.join(path), 0o644, &packed(program, &module));
    }
    fs::hard_link(root.join("usr/bin/script"), root.join("usr/bin/linked")).unwrap();
    symlink("script", root.join("usr/bin/soft")).unwrap();
    symlink("/etc/passwd", root.join("usr/share/demo/outside.py")).unwrap();
}

/// Writes a file, and the folders above it.
pub fn put(path: &Path, mode: u32, content: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// What begins as the header of a kernel does.
fn kernel() -> Vec<u8> {
    let mut kernel = vec![0x4d; 0x1fe];
    kernel.extend(b"\x55\xaa\xeb\x6aHdrS and so on");
    kernel
}

/// The smallest library of this very process.
fn mapped_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps.lines().filter_map(|line| line.split_whitespace().last());
    let libraries = paths.filter(|path| path.contains(".so")).map(PathBuf::from);
    let smallest = libraries.min_by_key(|path| fs::metadata(path).unwrap().len());
    smallest.expect("this test stands on a C library")
}

/// Compressed by a program.
pub fn packed(program: &str, content: &[u8]) -> Vec<u8> {
    piped(program, &["-c"], content)
}

/// What a program makes of its standard input.
pub fn piped(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, input).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let output = Command::new(program)
        .args(arguments)
        .stdin(file)
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask setup` installs it"));
    assert!(output.status.success(), "{program}");
    output.stdout
}

/// Runs a program that must work.
pub fn run<S: AsRef<OsStr>>(folder: &Path, program: &str, arguments: &[S]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask setup` installs it"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The entries for what counts in an unpacked system, by sha256sum and the compressors.
pub fn expected(root: &Path) -> BTreeSet<Approved> {
    let mut entries = BTreeSet::new();
    for (path, kind) in COUNTED {
        entries.insert(entry(path, kind, &sha256sum(&root.join(path))));
    }
    for (path, program) in UNPACK {
        let image = piped(program, &["-dc"], &fs::read(root.join(path)).unwrap());
        let digest = piped("sha256sum", &[], &image);
        entries.insert(entry(path, LoadKind::ModuleFile, &String::from_utf8(digest).unwrap()));
    }
    entries
}

/// An entry, with the digest as sha256sum prints it.
pub fn entry(path: &str, kind: LoadKind, sum: &str) -> Approved {
    Approved {
        path: format!("/{path}").into(),
        kind: Some(kind),
        sha256: sum.split_whitespace().next().unwrap().parse().unwrap(),
    }
}

/// What sha256sum says of a file.
pub fn sha256sum(path: &Path) -> String {
    run(Path::new("/"), "sha256sum", &[path])
}

/// Scans with ordinary limits.
pub fn scan(input: &Path) -> Result<Found, ScanError> {
    scan_within(input, Limits::default())
}

/// Scans with these limits.
pub fn scan_within(input: &Path, limits: Limits) -> Result<Found, ScanError> {
    known_good::scan(
        input,
        &Options {
            limits,
            cross_file_systems: false,
            progress: &|_| {},
        },
    )
}
