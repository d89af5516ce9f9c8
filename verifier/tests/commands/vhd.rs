//! `key make-vhd` and `key import-vhd`: keys of encrypted VHDs.

use std::fs;

use assay_evidence::vhd::KeyHash;
use assay_verifier::keystore::{FileKeyStore, KeyKind, KeySource};
use serde_json::Value;

use crate::program::Site;

/// What blktap's `vhd-util key -C` says of the bytes 0 to 63, and of the first 32 of them.
const KNOWN: [(usize, &str); 2] = [
    (64, "dc7a48014fc1fac8b52af39bc7ea5cafafabf8bb81fb8f880fdf3b4a4566795c"),
    (32, "bb2275c49f28ad52cae6d55e34a974a58c7a3ba26f976e8ecbbe7a536918dc73"),
];

fn hash_in(text: &str) -> KeyHash {
    let line = text.lines().find_map(|line| line.strip_prefix("key_hash "));
    line.unwrap_or_else(|| panic!("no hash in {text}")).parse().unwrap()
}

fn keys(site: &Site) -> Vec<Value> {
    let listed: Value = serde_json::from_str(&site.run(&["key", "list", "--json"]).good()).unwrap();
    listed.get("keys").and_then(Value::as_array).unwrap().clone()
}

#[test]
fn a_key_is_kept_under_its_hash_and_never_printed() {
    let site = Site::init();
    for (bytes, length) in [("64", 64), ("32", 32)] {
        let ran = site.run(&[
            "key",
            "make-vhd",
            "mail server",
            "--bytes",
            bytes,
            "--require-tag",
            "pci",
        ]);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        let hash = hash_in(&ran.out);
        for command in [
            format!("sm-config:image-format=vhd sm-config:key_hash={hash}"),
            "xe vdi-import".into(),
        ] {
            assert!(ran.out.contains(&command), "{command:?} is not in {}", ran.out);
        }
        assert!(ran.err.contains("There is no policy default yet"), "{}", ran.err);
        let stored = FileKeyStore::open(&site.state()).unwrap().get(hash.key_id()).unwrap();
        assert_eq!(stored.info.kind, KeyKind::Vhd(hash));
        assert!(stored.info.tags.contains("pci"));
        let key = stored.passphrase.expose();
        assert_eq!((key.len(), KeyHash::of(key)), (length, Ok(hash)));
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!ran.out.contains(&hex) && !ran.err.contains(&hex));
    }
    let text = site.run(&["key", "list"]).good();
    assert!(
        text.contains("every VHD with its hash") && text.contains("mail server"),
        "{text}"
    );
    assert!(keys(&site).iter().all(|key| {
        let of = |name: &str| key.get(name).unwrap();
        of("kind") == "vhd" && of("disk_uuid").is_null() && of("key_hash").is_string()
    }));
}

#[test]
fn an_imported_key_has_the_storage_managers_hash_and_is_taken_once() {
    let site = Site::init();
    let file = site.path("key");
    for (length, known) in KNOWN {
        fs::write(&file, (0..64).collect::<Vec<u8>>().get(..length).unwrap()).unwrap();
        let import = || site.run(&["key", "import-vhd", "disk", file.to_str().unwrap()]);
        let ran = import();
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        assert_eq!(hash_in(&ran.out).to_string(), known);
        for command in [
            format!("sm-config:key_hash={known}").as_str(),
            "vhd-util copy -n plain.vhd -N",
        ] {
            assert!(ran.out.contains(command), "{command:?} is not in {}", ran.out);
        }
        import().refused(&["exists already"]);
    }
    assert_eq!(keys(&site).len(), 2);
}

#[test]
fn what_would_not_be_encrypted_or_is_no_key_is_refused() {
    let site = Site::init();
    site.run(&["key", "make-vhd", "disk", "--vdi-type", "qcow2"])
        .refused(&["QCOW2", "in clear", "image-format=vhd"]);
    let file = site.path("key");
    let import = || site.run(&["key", "import-vhd", "disk", file.to_str().unwrap()]);
    import().refused(&["cannot read the key", "key"]);
    for (content, named) in [
        (vec![0xff, 1, 2], "this one has 3"),
        (Vec::new(), "this one has 0"),
        ([&[0xff; 64][..], &[1]].concat(), "this one has 65"),
        (
            b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef".to_vec(),
            "holds text",
        ),
        (vec![0; 64], "over and over"),
    ] {
        fs::write(&file, content).unwrap();
        import().refused(&[named]);
    }
    let wrong = site.run(&["key", "make-vhd", "disk", "--bytes", "48"]);
    assert_eq!(wrong.code, Some(2), "{}", wrong.err);
    assert!(keys(&site).is_empty());
}

#[test]
fn a_disk_is_sealed_as_a_vhd_by_the_two_commands_that_are_printed() {
    let site = Site::init();
    let disk = site.path("mail's disk.raw");
    fs::File::create(&disk).unwrap().set_len(3 << 20).unwrap();
    let disk = disk.to_str().unwrap();
    let ran = site.run(&["image", "seal", "--format", "vhd", "--require-tag", "pci", disk]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let hash = hash_in(&ran.out);
    let quoted = disk.replace('\'', "'\\''");
    for command in [
        format!("virtual-size=3145728 sm-config:image-format=vhd sm-config:key_hash={hash}\n"),
        format!("xe vdi-import uuid=VDI filename='{quoted}' format=raw\n"),
        "back up the key store".to_owned(),
    ] {
        assert!(ran.out.contains(&command), "{command:?} is not in {}", ran.out);
    }
    let stored = FileKeyStore::open(&site.state()).unwrap().get(hash.key_id()).unwrap();
    assert_eq!((stored.info.kind, stored.info.size), (KeyKind::Vhd(hash), 3 << 20));
    assert!(stored.info.tags.contains("pci") && stored.info.image == "mail's disk.raw");
    assert_eq!(fs::metadata(disk).unwrap().len(), 3 << 20, "the disk is as it was");
}

#[test]
fn what_cannot_become_an_encrypted_vhd_is_refused_and_no_key_is_kept() {
    let site = Site::init();
    let [huge, disk] = ["huge.raw", "disk.raw"].map(|name| site.path(name));
    fs::File::create(&huge).unwrap().set_len((2040 << 30) + 512).unwrap();
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let [huge, disk] = [huge.to_str().unwrap(), disk.to_str().unwrap()];
    let vhd = |more: &[&str]| site.run(&[&["image", "seal", "--format", "vhd"], more].concat());
    vhd(&[huge]).refused(&["huge.raw", "QCOW2", "does not encrypt"]);
    vhd(&[disk, "--input-format", "qcow2"]).refused(&["disk.raw", "qemu-img convert"]);
    vhd(&[disk, disk]).refused(&["no OUT"]);
    vhd(&[disk, "--recovery-file", "r"]).refused(&["recovery"]);
    site.run(&["image", "seal", disk]).refused(&["image seal IN OUT"]);
    assert_eq!(keys(&site), Vec::<Value>::new());
}
