//! What `image seal` makes of a raw disk, and what it refuses.

use std::{fs, process::Command};

use assay_evidence::{token::LuksToken, uuid::Uuid};
use assay_verifier::{
    keystore::{KeyInfo, KeySource, KeyStoreError, Listing, Passphrase, StoredKey},
    seal::{self, HEADER_LEN, Request, SealError, Terms},
};

use crate::bench::{Bench, MIB, ca, cryptsetup, decrypted_by_cryptsetup, disk, request, terms};

#[test]
fn cryptsetup_decrypts_to_the_disk_that_was_sealed() {
    // Not a multiple of the block length, so that the last block is a short one.
    let mut disk = disk(3 * MIB + 512 * 7);
    disk[MIB..2 * MIB].fill(0);
    let bench = Bench::new(&disk);
    let info = bench.seal().unwrap();
    assert_eq!(info.size, disk.len() as u64);

    let image = bench.path("disk.luks");
    let key_file = bench.key_file(info.key_id);
    // cryptsetup decrypts in place and leaves the room of the header behind the disk.
    let plain = decrypted_by_cryptsetup(&image, &key_file);
    assert!(plain.starts_with(&disk), "the decrypted image is not the disk");
}

#[test]
fn luks_dump_shows_the_layout_that_was_asked_for() {
    let bench = Bench::new(&disk(MIB));
    let info = bench.seal().unwrap();
    let image = bench.path("disk.luks");
    assert_eq!(fs::metadata(&image).unwrap().len(), HEADER_LEN + MIB as u64);

    let output = cryptsetup(&["luksDump", "--dump-json-metadata"], &image);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["segments"].as_object().unwrap().len(), 1);
    assert_eq!(json["segments"]["0"]["sector_size"], 512);
    assert_eq!(json["segments"]["0"]["offset"], HEADER_LEN.to_string());
    assert_eq!(json["segments"]["0"]["encryption"], "aes-xts-plain64");
    assert_eq!(json["keyslots"].as_object().unwrap().len(), 1);
    assert_eq!(json["keyslots"]["0"]["key_size"], 64);
    assert_eq!(json["keyslots"]["0"]["kdf"]["type"], "pbkdf2");
    assert_eq!(json["keyslots"]["0"]["kdf"]["iterations"], 1000);

    let tokens: Vec<_> = json["tokens"].as_object().unwrap().values().cloned().collect();
    let token = LuksToken::find(&tokens).unwrap();
    assert_eq!(token.key_id(), info.key_id.to_string());
    assert_eq!(token.policy(), "default");
    assert_eq!(token.keyslots(), ["0"]);
    assert!(
        token
            .allowed_verifiers(&["https://verifier.example:8440".to_owned()], &ca())
            .is_ok()
    );

    let uuid = cryptsetup(&["luksUUID"], &image).stdout;
    assert_eq!(String::from_utf8(uuid).unwrap().trim(), info.disk_uuid.to_string());
}

#[test]
fn the_owner_can_add_a_passphrase() {
    let bench = Bench::new(&disk(MIB));
    let info = bench.seal().unwrap();
    let key_file = bench.key_file(info.key_id);
    let recovery = bench.path("recovery");
    fs::write(&recovery, "correct horse battery staple").unwrap();
    let image = bench.path("disk.luks");
    let add = Command::new("cryptsetup")
        .args([
            "luksAddKey",
            "--batch-mode",
            "--pbkdf",
            "pbkdf2",
            "--pbkdf-force-iterations",
            "1000",
            "--key-file",
        ])
        .args([&key_file, &image, &recovery])
        .output()
        .unwrap();
    assert!(add.status.success(), "{}", String::from_utf8_lossy(&add.stderr));
    let recovery = recovery.to_str().unwrap();
    cryptsetup(
        &["open", "--test-passphrase", "--key-slot", "1", "--key-file", recovery],
        &image,
    );
}

#[test]
fn two_seals_of_one_disk_share_nothing() {
    let bench = Bench::new(&disk(MIB));
    let first = bench.seal().unwrap();
    let second = bench.seal_into("again.luks", &bench.keys).unwrap();
    assert_ne!(first.key_id, second.key_id);
    assert_ne!(first.disk_uuid, second.disk_uuid);
    let data = |name| {
        fs::read(bench.path(name))
            .unwrap()
            .split_off(usize::try_from(HEADER_LEN).unwrap())
    };
    assert_ne!(data("disk.luks"), data("again.luks"));
    assert_eq!(bench.keys.list().unwrap().keys.len(), 2);
}

#[test]
fn progress_ends_at_the_whole_disk() {
    let bench = Bench::new(&disk(2 * MIB + 512));
    let mut heard = Vec::new();
    let (input, output) = (bench.path("disk.raw"), bench.path("disk.luks"));
    let request = request(&input, &output);
    seal::seal(&request, &bench.keys, &mut |done, total| heard.push((done, total))).unwrap();
    let (mib, total) = (MIB as u64, 2 * MIB as u64 + 512);
    assert_eq!(heard, [(mib, total), (2 * mib, total), (total, total)]);
}

#[test]
fn odd_size_is_refused() {
    let bench = Bench::new(&disk(MIB + 1));
    let error = bench.seal().unwrap_err();
    assert!(matches!(error, SealError::InputSize { len, .. } if len == MIB as u64 + 1));
    assert!(error.to_string().contains("truncate"), "no remedy in: {error}");
    bench.assert_nothing_left();
}

#[test]
fn empty_and_missing_inputs_and_directories_are_refused() {
    let bench = Bench::new(&[]);
    assert!(matches!(bench.seal(), Err(SealError::InputEmpty(_))));
    fs::remove_file(bench.path("disk.raw")).unwrap();
    assert!(matches!(bench.seal(), Err(SealError::Input { operation: "open", .. })));
    fs::create_dir(bench.path("disk.raw")).unwrap();
    assert!(matches!(bench.seal(), Err(SealError::InputKind(_))));
    bench.assert_nothing_left();
}

#[test]
fn luks_and_container_formats_are_refused() {
    let mut luks = disk(MIB);
    luks[..6].copy_from_slice(b"LUKS\xba\xbe");
    let bench = Bench::new(&luks);
    assert!(matches!(bench.seal(), Err(SealError::InputLuks(_))));
    for (magic, name) in [
        (b"QFI\xfb".as_slice(), "qcow2"),
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
    ] {
        let mut image = disk(MIB);
        image[..magic.len()].copy_from_slice(magic);
        fs::write(bench.path("disk.raw"), image).unwrap();
        assert!(matches!(bench.seal(), Err(SealError::InputFormat { format, .. }) if format == name));
    }
    bench.assert_nothing_left();
}

#[test]
fn a_sealed_image_is_not_sealed_again() {
    let bench = Bench::new(&disk(MIB));
    bench.seal().unwrap();
    fs::rename(bench.path("disk.luks"), bench.path("disk.raw")).unwrap();
    assert!(matches!(bench.seal(), Err(SealError::InputLuks(_))));
}

#[test]
fn nothing_is_overwritten() {
    let bench = Bench::new(&disk(MIB));
    fs::write(bench.path("disk.luks"), "precious").unwrap();
    assert!(matches!(bench.seal(), Err(SealError::OutputExists(_))));
    assert_eq!(fs::read(bench.path("disk.luks")).unwrap(), b"precious");

    // A dangling link is a name that somebody took, too.
    fs::remove_file(bench.path("disk.luks")).unwrap();
    std::os::unix::fs::symlink("nowhere", bench.path("disk.luks")).unwrap();
    assert!(matches!(bench.seal(), Err(SealError::OutputExists(_))));
    fs::remove_file(bench.path("disk.luks")).unwrap();

    // Another run writes: it holds a lock.
    let partial = bench.path("disk.luks.partial");
    fs::write(&partial, "another run").unwrap();
    let running = fs::File::open(&partial).unwrap();
    running.lock().unwrap();
    assert!(matches!(bench.seal(), Err(SealError::PartialExists(_))));
    assert_eq!(fs::read(&partial).unwrap(), b"another run");
    assert!(bench.keys.list().unwrap().keys.is_empty());
    // One that ended in the middle doesn't.
    drop(running);
    bench.seal().unwrap();
    assert!(!partial.exists());
}

#[test]
fn an_output_in_no_directory_is_refused() {
    let bench = Bench::new(&disk(MIB));
    let error = bench.seal_into("missing/disk.luks", &bench.keys).unwrap_err();
    assert!(matches!(
        error,
        SealError::Output {
            operation: "create",
            ..
        }
    ));
    assert!(matches!(
        bench.seal_into("..", &bench.keys),
        Err(SealError::OutputName(_))
    ));
}

#[test]
fn a_policy_that_no_token_can_carry_is_refused() {
    let bench = Bench::new(&disk(MIB));
    let (input, output) = (bench.path("disk.raw"), bench.path("disk.luks"));
    let request = Request {
        terms: Terms {
            policy: "../default",
            ..terms()
        },
        ..request(&input, &output)
    };
    assert!(matches!(
        seal::seal(&request, &bench.keys, &mut |_, _| {}),
        Err(SealError::Token(_))
    ));
    bench.assert_nothing_left();
}

#[test]
fn an_image_written_to_while_it_is_read_is_refused() {
    let bench = Bench::new(&disk(2 * MIB));
    let input = bench.path("disk.raw");
    for new_len in [MIB as u64, 3 * MIB as u64] {
        fs::write(&input, disk(2 * MIB)).unwrap();
        let output = bench.path("disk.luks");
        let request = request(&input, &output);
        let mut change = |_, _| {
            fs::File::options()
                .write(true)
                .open(&input)
                .unwrap()
                .set_len(new_len)
                .unwrap()
        };
        assert!(matches!(
            seal::seal(&request, &bench.keys, &mut change),
            Err(SealError::InputChanged(_))
        ));
        bench.assert_nothing_left();
    }
}

/// A key store that can't keep anything.
struct Broken;

impl KeySource for Broken {
    fn get(&self, key_id: Uuid) -> Result<StoredKey, KeyStoreError> {
        Err(KeyStoreError::NotFound { key_id })
    }
    fn list(&self) -> Result<Listing, KeyStoreError> {
        Ok(Listing::default())
    }
    fn put(&self, _: &KeyInfo, _: &Passphrase) -> Result<(), KeyStoreError> {
        Err(KeyStoreError::Random)
    }
    fn set_terms(&self, key_id: Uuid, _: &assay_evidence::terms::Terms) -> Result<(), KeyStoreError> {
        Err(KeyStoreError::NotFound { key_id })
    }

    fn remove(&self, key_id: Uuid) -> Result<(), KeyStoreError> {
        Err(KeyStoreError::NotFound { key_id })
    }
}

#[test]
fn no_image_without_its_key() {
    let bench = Bench::new(&disk(MIB));
    let error = bench.seal_into("disk.luks", &Broken).unwrap_err();
    assert!(matches!(error, SealError::Key(KeyStoreError::Random)));
    bench.assert_nothing_left();
}

#[test]
fn a_name_taken_at_the_last_moment_is_respected_and_the_key_goes() {
    let bench = Bench::new(&disk(MIB));
    let output = bench.path("disk.luks");
    let input = bench.path("disk.raw");
    let request = request(&input, &output);
    let mut intrude = |_, _| fs::write(&output, "theirs").unwrap();
    assert!(matches!(
        seal::seal(&request, &bench.keys, &mut intrude),
        Err(SealError::OutputExists(_))
    ));
    assert_eq!(fs::read(&output).unwrap(), b"theirs");
    assert!(bench.keys.list().unwrap().keys.is_empty(), "a key without an image");
}
