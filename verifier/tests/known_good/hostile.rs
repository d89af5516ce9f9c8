//! Inputs that unpack to far more than they are, or to something that is not certain.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use assay_verifier::known_good::{Fault, Limits, ScanError};

use crate::deb;
use crate::tree::{packed, piped, put, scan, scan_within};

const MIB: u64 = 1 << 20;

fn module(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("a.ko.xz");
    fs::write(&path, bytes).unwrap();
    path
}

fn limit(error: ScanError) -> u64 {
    match *error.fault {
        Fault::TooMuch { limit, .. } => limit,
        fault => panic!("{fault:?}"),
    }
}

#[test]
fn bombs_are_cut_off_at_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let zeros = vec![0; 8 << 20];
    let small = Limits {
        module: MIB,
        unpacked: 4 * MIB,
        ..Limits::default()
    };
    for program in ["xz", "gzip", "zstd"] {
        let bomb = packed(program, &zeros);
        assert!(bomb.len() < 64 << 10);
        let path = module(folder.path(), &bomb);
        assert_eq!(limit(scan_within(&path, small.clone()).unwrap_err()), MIB, "{program}");
        scan(&path).unwrap();
        // Each module of it is small, all together are not.
        let tree = folder.path().join(program);
        let part = packed(program, &zeros[..1 << 20]);
        for number in 0..5 {
            put(&tree.join(format!("usr/lib/modules/{number}.ko.xz")), 0o644, &part);
        }
        let package = folder.path().join("package");
        deb::build(&tree, &package, "none");
        assert_eq!(
            limit(scan_within(&package, small.clone()).unwrap_err()),
            4 * MIB,
            "{program}"
        );
        // In a folder each stands for itself.
        scan_within(&tree, small.clone()).unwrap();
    }
    let one = Limits {
        input: 100,
        ..Limits::default()
    };
    assert_eq!(
        limit(scan_within(&folder.path().join("a.ko.xz"), one).unwrap_err()),
        100
    );
}

#[test]
fn a_compressed_module_is_one_stream_and_nothing_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    for program in ["xz", "gzip", "zstd"] {
        let good = packed(program, b"\x7fELF module");
        scan(&module(folder.path(), &good)).unwrap();
        for more in [&b"\0"[..], b"junk", &good] {
            let error = scan(&module(folder.path(), &[&good[..], more].concat())).unwrap_err();
            assert!(
                matches!(*error.fault, Fault::Trailing(_)),
                "{program}: {:?}",
                error.fault
            );
        }
        for length in 7..good.len() {
            assert!(
                scan(&module(folder.path(), &good[..length])).is_err(),
                "{program}: {length}"
            );
        }
        // The last bytes of a zstd frame are its checksum, which these have.
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        assert!(scan(&module(folder.path(), &flipped)).is_err(), "{program}");
    }
    // More memory than a kernel would spend.
    let greedy = piped("xz", &["-c", "--lzma2=dict=1GiB"], b"\x7fELF module");
    let error = scan(&module(folder.path(), &greedy)).unwrap_err();
    assert!(matches!(*error.fault, Fault::Unpack { .. }), "{:?}", error.fault);
}

#[test]
fn a_large_file_in_a_package_is_not_held_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    put(&tree.join("usr/bin/large"), 0o755, b"");
    let file = fs::File::options()
        .write(true)
        .open(tree.join("usr/bin/large"))
        .unwrap();
    file.set_len(512 * MIB).unwrap();
    let package = folder.path().join("package");
    deb::build(&tree, &package, "none");
    let output = Command::new("prlimit")
        .args(["--as=134217728", env!("CARGO_BIN_EXE_assay-verifier"), "policy", "scan"])
        .arg(&package)
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{err}");
    // sha256sum of 512 MiB of zeros.
    let digest = piped("sh", &["-c", "head -c 536870912 /dev/zero | sha256sum"], b"");
    let digest = String::from_utf8(digest).unwrap();
    let digest = digest.split_whitespace().next().unwrap();
    assert!(out.contains(digest) && out.contains("/usr/bin/large"), "{out}");
}
