//! An installed root: a folder.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use assay_verifier::known_good::{Fault, InputKind, Limits};

use crate::tree::{self, expected, put, run, scan, scan_within};

#[test]
fn a_root_gives_what_lies_in_it_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    tree::make(&root);
    // Nothing of this is installed, or lies in it.
    put(&folder.path().join("outside/program"), 0o755, b"#!/bin/sh\n");
    symlink("../outside", root.join("out")).unwrap();
    symlink("../outside/program", root.join("usr/bin/out")).unwrap();
    for passing in ["proc", "sys", "dev", "run", "tmp"] {
        put(&root.join(passing).join("program"), 0o755, b"#!/bin/sh\n");
    }
    run(&root, "mkfifo", &["usr/bin/pipe"]);
    let found = scan(&root).unwrap();
    assert_eq!(found.entries, expected(&root));
    assert_eq!((found.kind, found.skipped), (InputKind::Root, vec![]));
    // Only at the top are they what they are.
    put(&root.join("usr/tmp/program"), 0o755, b"#!/bin/sh\n");
    assert_eq!(scan(&root).unwrap().entries.len(), expected(&root).len() + 1);
    // A link to the root itself is meant.
    symlink("root", folder.path().join("link")).unwrap();
    assert_eq!(
        scan(&folder.path().join("link")).unwrap().entries.len(),
        found.entries.len() + 1
    );
}

#[test]
fn other_file_systems_are_entered_when_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    put(&folder.path().join("usr/bin/script"), 0o755, b"#!/bin/sh\n");
    fs::create_dir(folder.path().join("boot")).unwrap();
    let scan = |options: &str| {
        let line = format!(
            "mount -t tmpfs none {0}/boot && cp {0}/usr/bin/script {0}/boot/script && {1} policy scan {options} {0}",
            folder.path().display(),
            env!("CARGO_BIN_EXE_assay-verifier"),
        );
        let output = Command::new("unshare")
            .args(["-rm", "sh", "-c", &line])
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert!(output.status.success(), "{}", text(output.stderr));
        (text(output.stdout), text(output.stderr))
    };
    let (found, told) = scan("");
    assert!(
        !found.contains("/boot/script") && told.contains("/boot: not entered"),
        "{found}{told}"
    );
    let (found, told) = scan("--cross-file-systems");
    assert!(
        found.contains("/boot/script") && !told.contains("not entered"),
        "{found}{told}"
    );
}

#[test]
fn limits_hold_and_a_fault_is_named_with_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    tree::make(&root);
    let within = |limits| *scan_within(&root, limits).unwrap_err().fault;
    let few = Limits {
        members: 10,
        ..Limits::default()
    };
    assert!(matches!(within(few), Fault::TooMuch { limit: 10, .. }));
    let few = Limits {
        entries: 3,
        ..Limits::default()
    };
    assert!(matches!(within(few), Fault::TooMuch { limit: 3, .. }));
    put(
        &root.join("usr/lib/modules/6.1/broken.ko.xz"),
        0o644,
        b"\xfd7zXZ\0 and nothing more",
    );
    let error = scan(&root).unwrap_err();
    assert_eq!(error.members, ["/usr/lib/modules/6.1/broken.ko.xz"]);
    assert!(matches!(*error.fault, Fault::Unpack { .. }), "{:?}", error.fault);
    // Folders in folders without end.
    let deep = folder.path().join("deep");
    fs::create_dir_all(deep.join(["d"; 200].join("/"))).unwrap();
    assert!(matches!(
        *scan(&deep).unwrap_err().fault,
        Fault::TooMuch { limit: 128, .. }
    ));
}
