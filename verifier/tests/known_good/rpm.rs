//! `.rpm` packages, made by rpmbuild.

use std::fs;
use std::path::{Path, PathBuf};

use assay_evidence::event::LoadKind;
use assay_verifier::known_good::{Fault, InputKind, ScanError};

use crate::tree::{self, entry, expected, run, scan};

/// What rpm calls its compressions, with a level.
const COMPRESSIONS: [&str; 4] = ["w0.ufdio", "w9.gzdio", "w6.xzdio", "w19.zstdio"];

/// Builds a package of a tree's files, and of a script.
pub fn build(folder: &Path, payload: &str, files: &str, post: &str) -> PathBuf {
    let tree = folder.join("tree");
    let spec = format!(
        "Name: demo\nVersion: 1\nRelease: 1\nSummary: demo\nLicense: MIT\nBuildArch: noarch\nAutoReqProv: no\n\
         %global __os_install_post %{{nil}}\n%global _build_id_links none\n%global _binaries_in_noarch_packages_terminate_build 0\n\
         %description\ndemo\n\
         %install\nmkdir -p %{{buildroot}}\nif [ -d {tree} ]; then cp -a {tree}/. %{{buildroot}}/; fi\n\
         %post\n{post}\n%files\n{files}\n",
        tree = tree.display(),
    );
    fs::write(folder.join("demo.spec"), spec).unwrap();
    let top = format!("_topdir {}/{payload}", folder.display());
    let payload_macro = format!("_binary_payload {payload}");
    run(
        folder,
        "rpmbuild",
        &["-bb", "-D", &top, "-D", &payload_macro, "demo.spec"],
    );
    folder.join(payload).join("RPMS/noarch/demo-1-1.noarch.rpm")
}

fn demo(folder: &Path, payload: &str) -> PathBuf {
    if !folder.join("tree").exists() {
        tree::make(&folder.join("tree"));
        tree::put(&folder.join("tree/usr/share/demo/ghost.py"), 0o644, b"");
    }
    build(
        folder,
        payload,
        "/usr/bin/*\n/usr/lib/*\n/boot/*\n/usr/share/a-folder-with-quite-a-long-name\n/usr/share/demo/plugin.*\n\
         /usr/share/demo/no-ending\n/usr/share/demo/README\n/usr/share/demo/outside.py\n%ghost /usr/share/demo/ghost.py",
        "exit 0",
    )
}

#[test]
fn each_compression_gives_what_rpm_unpacks() {
    let folder = tempfile::tempdir().unwrap();
    for payload in COMPRESSIONS {
        let rpm = demo(folder.path(), payload);
        let found = scan(&rpm).unwrap();
        let unpacked = folder.path().join(format!("{payload}-unpacked"));
        fs::create_dir(&unpacked).unwrap();
        let line = format!("rpm2cpio {} | cpio --quiet -idm --no-absolute-filenames", rpm.display());
        run(&unpacked, "sh", &["-c", &line]);
        let mut wanted = expected(&unpacked);
        let script = String::from_utf8(tree::piped("sha256sum", &[], b"exit 0")).unwrap();
        wanted.insert(entry("var/tmp/rpm-tmp", LoadKind::Argument, &script));
        assert_eq!(found.entries, wanted, "{payload}");
        assert_eq!(found.kind, InputKind::Rpm);
    }
}

#[test]
fn the_script_is_what_rpm_writes_for_the_shell() {
    let folder = tempfile::tempdir().unwrap();
    let sum = folder.path().join("sum");
    let post = format!("# lines of a script\nsha256sum \"$0\" > {}\n\n", sum.display());
    let rpm = build(folder.path(), "w6.xzdio", "", &post);
    // For real, into a database of its own; there are no files.
    let database = folder.path().join("database").display().to_string();
    let rpm_path = rpm.display().to_string();
    run(
        folder.path(),
        "rpm",
        &["-i", "--nodeps", "--dbpath", &database, &rpm_path],
    );
    let ran = fs::read_to_string(&sum).unwrap();
    let found = scan(&rpm).unwrap().entries;
    assert_eq!(found, [entry("var/tmp/rpm-tmp", LoadKind::Argument, &ran)].into());
    let path = ran.split_whitespace().nth(1).unwrap();
    assert!(path.starts_with("/var/tmp/rpm-tmp"), "{path}");
}

#[test]
fn compressions_of_old_packages_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (payload, name) in [("w9.bzdio", "bzip2"), ("w6.lzdio", "lzma")] {
        let error = scan(&demo(folder.path(), payload)).unwrap_err();
        assert!(
            matches!(*error.fault, Fault::Packing(found) if found == name),
            "{:?}",
            error.fault
        );
    }
}

#[test]
fn no_byte_of_a_package_can_change_what_it_gives() {
    let folder = tempfile::tempdir().unwrap();
    tree::put(
        &folder.path().join("tree/usr/bin/script"),
        0o755,
        b"#!/bin/sh\nexit 0\n",
    );
    for payload in ["w0.ufdio", "w19.zstdio"] {
        let rpm = build(folder.path(), payload, "/usr/bin/*", "exit 0");
        let good = scan(&rpm).unwrap();
        assert_eq!(good.entries.len(), 2);
        let whole = fs::read(&rpm).unwrap();
        let broken = folder.path().join("broken");
        // From the header on, everything is covered by a digest; before it, nothing is believed.
        let header = whole.windows(4).rposition(|part| part == b"\x8e\xad\xe8\x01").unwrap();
        for place in (0..whole.len()).step_by(3) {
            let mut bytes = whole.clone();
            bytes[place] ^= 0x21;
            fs::write(&broken, bytes).unwrap();
            match scan(&broken) {
                Ok(found) if place < header => assert_eq!(found.entries, good.entries, "{payload}: byte {place}"),
                Ok(_) => panic!("{payload}: byte {place} was not missed"),
                Err(_) => {}
            }
        }
        for length in (0..whole.len()).step_by(17) {
            fs::write(&broken, &whole[..length]).unwrap();
            assert!(scan(&broken).is_err(), "{payload}: cut at {length}");
        }
    }
}

#[test]
fn a_file_that_is_not_what_the_header_says_is_named() {
    let folder = tempfile::tempdir().unwrap();
    tree::put(
        &folder.path().join("tree/usr/bin/script"),
        0o755,
        b"#!/bin/sh\nexit 0\n",
    );
    let rpm = build(folder.path(), "w0.ufdio", "/usr/bin/*", "true");
    let mut bytes = fs::read(&rpm).unwrap();
    let place = bytes.windows(7).rposition(|part| part == b"exit 0\n").unwrap();
    bytes[place + 5] = b'1';
    let broken = folder.path().join("broken");
    fs::write(&broken, &bytes).unwrap();
    let ScanError { members, at, fault, .. } = scan(&broken).unwrap_err();
    assert!(matches!(*fault, Fault::Digest { what: "the file", .. }), "{fault:?}");
    assert_eq!(members, ["/usr/bin/script"]);
    assert!(at > 0);
    // Its name is another one, and it is not in the list.
    bytes[place + 5] = b'0';
    let place = bytes.windows(16).rposition(|part| part == b"./usr/bin/script").unwrap();
    bytes[place + 10] = b'S';
    fs::write(&broken, &bytes).unwrap();
    assert!(matches!(*scan(&broken).unwrap_err().fault, Fault::Unlisted));
}
