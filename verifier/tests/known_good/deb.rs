//! `.deb` packages, made by dpkg-deb.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use assay_evidence::event::LoadKind;
use assay_verifier::known_good::InputKind;

use crate::tree::{self, entry, expected, put, run, scan, sha256sum};

/// Packs a folder.
pub fn build(tree: &Path, deb: &Path, compression: &str) {
    put(
        &tree.join("DEBIAN/control"),
        0o644,
        b"Package: demo\nVersion: 1\nArchitecture: all\nMaintainer: Demo <demo@example.org>\nDescription: demo\n",
    );
    let arguments = [
        format!("-Z{compression}"),
        "--root-owner-group".to_owned(),
        "-b".to_owned(),
        tree.display().to_string(),
        deb.display().to_string(),
    ];
    run(Path::new("/"), "dpkg-deb", &arguments);
}

/// A package of the whole small system.
pub fn demo(folder: &Path, compression: &str) -> PathBuf {
    let tree = folder.join("tree");
    tree::make(&tree);
    put(&tree.join("DEBIAN/postinst"), 0o755, b"#!/bin/sh\nset -e\n");
    let deb = folder.join("demo");
    build(&tree, &deb, compression);
    deb
}

#[test]
fn each_compression_gives_what_dpkg_unpacks() {
    for compression in ["none", "gzip", "xz", "zstd"] {
        let folder = tempfile::tempdir().unwrap();
        let deb = demo(folder.path(), compression);
        // Recognised by content: the file has no ending.
        let found = scan(&deb).unwrap();
        let unpacked = folder.path().join("unpacked");
        run(
            Path::new("/"),
            "dpkg-deb",
            &["-R".as_ref(), deb.as_os_str(), unpacked.as_os_str()],
        );
        let mut wanted = expected(&unpacked);
        // A link in a package has no content of its own.
        wanted.retain(|entry| !["/usr/bin/script", "/usr/bin/linked"].contains(&&*entry.path));
        let script = found
            .entries
            .iter()
            .find(|entry| entry.path.starts_with("/usr/bin/") && &*entry.path != "/usr/bin/program");
        let name = script.unwrap().path.trim_start_matches('/').to_owned();
        wanted.insert(entry(&name, LoadKind::Program, &sha256sum(&unpacked.join(&name))));
        wanted.insert(entry(
            "var/lib/dpkg/tmp.ci/postinst",
            LoadKind::Program,
            &sha256sum(&unpacked.join("DEBIAN/postinst")),
        ));
        assert_eq!(found.entries, wanted, "{compression}");
        assert_eq!(found.kind, InputKind::Deb);
    }
}

#[test]
fn what_is_not_in_order_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let deb = folder.join("demo");
    put(
        &folder.join("tree/usr/bin/false"),
        0o755,
        &fs::read("/usr/bin/false").unwrap(),
    );
    build(&folder.join("tree"), &deb, "xz");
    let whole = fs::read(&deb).unwrap();
    let broken = folder.join("broken");
    let refused = |bytes: &[u8]| {
        fs::write(&broken, bytes).unwrap();
        let error = scan(&broken).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("broken"), "{text}");
        format!("{text}: {:?}", error.fault)
    };
    // Cut anywhere, it is refused.
    for length in (0..whole.len() - 1).step_by(whole.len() / 200) {
        refused(&whole[..length]);
    }
    let text = refused(&whole[..whole.len() / 2]);
    assert!(text.contains("data.tar.xz") && text.contains("(byte "), "{text}");
    // A byte of the compressed part is another one.
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let text = refused(&flipped);
    assert!(text.contains("Unpack") && text.contains("data.tar.xz"), "{text}");
    // Another archive of the same form.
    run(folder, "ar", &["rc", "library.a", "broken"]);
    let text = refused(&fs::read(folder.join("library.a")).unwrap());
    assert!(text.contains("debian-binary"), "{text}");
    // Without its files.
    run(folder, "ar", &["x", "demo"]);
    run(folder, "ar", &["rc", "half", "debian-binary", "control.tar.xz"]);
    assert!(refused(&fs::read(folder.join("half")).unwrap()).contains("Truncated"));
    run(
        folder,
        "ar",
        &["rc", "turned", "debian-binary", "data.tar.xz", "control.tar.xz"],
    );
    assert!(refused(&fs::read(folder.join("turned")).unwrap()).contains("in this order"));
}

#[test]
fn members_that_dpkg_does_not_take_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let deb = demo(folder.path(), "xz");
    let folder = folder.path();
    run(folder, "ar", &["x", &deb.display().to_string()]);
    let tree = folder.join("tree").display().to_string();
    for (format, why) in [("pax", "dpkg does not take"), ("gnu", "")] {
        let form = format!("--format={format}");
        run(folder, "tar", &["-C", &tree, "-cf", "data.tar", &form, "./usr"]);
        let _ = fs::remove_file(folder.join("again"));
        run(
            folder,
            "ar",
            &["rc", "again", "debian-binary", "control.tar.xz", "data.tar"],
        );
        let scanned = scan(&folder.join("again"));
        if why.is_empty() {
            scanned.unwrap();
        } else {
            assert!(format!("{:?}", scanned.unwrap_err().fault).contains(why));
        }
    }
    // A sparse file is stored in pieces.
    let sparse = fs::File::create(folder.join("tree/usr/bin/sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    run(
        folder,
        "tar",
        &["-C", &tree, "-cSf", "data.tar", "--format=gnu", "./usr"],
    );
    let _ = fs::remove_file(folder.join("again"));
    run(
        folder,
        "ar",
        &["rc", "again", "debian-binary", "control.tar.xz", "data.tar"],
    );
    let error = scan(&folder.join("again")).unwrap_err();
    assert!(format!("{:?}", error.fault).contains("dpkg does not take"), "{error}");
}

#[test]
fn scripts_of_a_package_are_found_under_the_name_that_they_run_by() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    for name in ["preinst", "prerm", "postrm"] {
        put(
            &tree.join("DEBIAN").join(name),
            0o755,
            format!("#!/bin/sh\n# {name}\n").as_bytes(),
        );
    }
    put(&tree.join("DEBIAN/conffiles"), 0o644, b"");
    build(&tree, &folder.path().join("deb"), "xz");
    let found = scan(&folder.path().join("deb")).unwrap().entries;
    let paths: BTreeSet<&str> = found.iter().map(|entry| &*entry.path).collect();
    let wanted = ["preinst", "prerm", "postrm"].map(|name| format!("/var/lib/dpkg/tmp.ci/{name}"));
    assert_eq!(paths, wanted.iter().map(String::as_str).collect());
}
