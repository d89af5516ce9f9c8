//! The recovery key: in a slot of its own, good without any verifier, and with stock cryptsetup alone.

use std::fs;

use assay_evidence::digest::Sha256Digest;
use assay_verifier::{
    keystore::KeyInfo,
    seal::{self, Format, RecoveryKey, Request, SealError, Sealed, Terms},
};

use crate::bench::{Bench, MIB, cryptsetup, decrypted_by_cryptsetup, disk, opens, request, terms};

fn seal_with_recovery(bench: &Bench, format: Format) -> (KeyInfo, RecoveryKey) {
    let recovery = RecoveryKey::generate().unwrap();
    let (input, output) = (bench.path("disk.raw"), bench.path("disk.luks"));
    let request = Request {
        format,
        terms: Terms {
            recovery: Some(&recovery),
            ..terms()
        },
        ..request(&input, &output)
    };
    let info = seal::seal(&request, &bench.keys, &mut |_, _| {}).unwrap();
    fs::write(bench.path("recovery"), recovery.expose()).unwrap();
    (info, recovery)
}

#[test]
fn cryptsetup_alone_gives_the_disk_back() {
    let plain = disk(2 * MIB + 512);
    let bench = Bench::new(&plain);
    let (info, _) = seal_with_recovery(&bench, Format::Luks2);
    let (image, recovery) = (bench.path("disk.luks"), bench.path("recovery"));
    assert!(opens(&image, &recovery));
    assert!(opens(&image, &bench.key_file(info.key_id)));
    let by_slot = ["open", "--test-passphrase", "--key-slot", "1", "--key-file"];
    cryptsetup(&[&by_slot[..], &[recovery.to_str().unwrap()]].concat(), &image);

    // Other texts open nothing, and the slots are two.
    fs::write(bench.path("wrong"), "0".repeat(71)).unwrap();
    assert!(!opens(&image, &bench.path("wrong")));
    assert_eq!(Sealed::read(&image).unwrap().slots, [0, 1]);

    assert!(decrypted_by_cryptsetup(&image, &recovery).starts_with(&plain));
}

#[test]
fn unseal_takes_either_key_in_every_format() {
    let plain = disk(MIB + 512);
    for format in [Format::Luks2, Format::Luks1, Format::Qcow2Luks] {
        let bench = Bench::new(&plain);
        let (info, recovery) = seal_with_recovery(&bench, format);
        let image = Sealed::read(&bench.path("disk.luks")).unwrap();
        assert_eq!((image.format, image.disk_size), (format, plain.len() as u64));
        let stored = assay_verifier::keystore::KeySource::get(&bench.keys, info.key_id).unwrap();
        image.check_key(&stored.info).unwrap();
        for (name, secret) in [
            ("by-store", stored.passphrase.expose()),
            ("by-recovery", recovery.expose().as_bytes()),
        ] {
            let output = bench.path(name);
            let mut last = (0, 0);
            image
                .unseal(secret, &output, &mut |done, total| last = (done, total))
                .unwrap();
            assert_eq!(fs::read(&output).unwrap(), plain, "{format:?} {name}");
            assert_eq!(last, (plain.len() as u64, plain.len() as u64), "{format:?} {name}");
            let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&output).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o600, "the disk in the clear is nobody else's");
        }
        assert!(matches!(
            image.unseal(b"wrong", &bench.path("by-nothing"), &mut |_, _| {}),
            Err(SealError::WrongSecret(_) | SealError::Qemu { .. })
        ));
        assert!(!bench.path("by-nothing").exists() && !bench.path("by-nothing.partial").exists());
    }
}

#[test]
fn without_one_there_is_one_slot() {
    let bench = Bench::new(&disk(MIB));
    bench.seal().unwrap();
    assert_eq!(Sealed::read(&bench.path("disk.luks")).unwrap().slots, [0]);
}

#[test]
fn the_fingerprint_survives_what_the_owner_does_and_no_more() {
    let bench = Bench::new(&disk(MIB));
    let (info, _) = seal_with_recovery(&bench, Format::Luks2);
    let image = bench.path("disk.luks");
    let before = Sealed::read(&image).unwrap();
    assert_eq!(info.header, Some(before.fingerprint));

    // A third slot and another token, by cryptsetup.
    let key_file = bench.key_file(info.key_id);
    let key_file = key_file.to_str().unwrap();
    fs::write(bench.path("third"), "another way in").unwrap();
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let add = [
        "luksAddKey",
        "--batch-mode",
        "--new-keyfile",
        bench.path("third").to_str().unwrap(),
        "--key-file",
        key_file,
    ]
    .map(str::to_owned);
    let add: Vec<&str> = add.iter().map(String::as_str).chain(quick).collect();
    cryptsetup(&add, &image);
    let token = ["token", "add", "--key-description", "theirs"];
    cryptsetup(&token, &image);
    let after = Sealed::read(&image).unwrap();
    assert_eq!(after.slots, [0, 1, 2]);
    assert_eq!(after.fingerprint, before.fingerprint);
    after.check_key(&info).unwrap();

    // The header of another image, whose owner even gave it our UUID and token.
    let other = Bench::new(&disk(MIB));
    let (_, _) = seal_with_recovery(&other, Format::Luks2);
    let theirs = other.path("disk.luks");
    let uuid = info.disk_uuid.to_string();
    cryptsetup(&["luksUUID", "--batch-mode", "--uuid", &uuid], &theirs);
    cryptsetup(&["token", "remove", "--token-id", "0"], &theirs);
    let ours = cryptsetup(&["token", "export", "--token-id", "0"], &image).stdout;
    fs::write(other.path("token"), ours).unwrap();
    let file = other.path("token");
    cryptsetup(&["token", "import", "--json-file", file.to_str().unwrap()], &theirs);
    let replaced = Sealed::read(&theirs).unwrap();
    assert_eq!(replaced.uuid, info.disk_uuid);
    assert_eq!(replaced.key_id().unwrap(), info.key_id);
    assert!(matches!(
        replaced.check_key(&info),
        Err(SealError::OtherHeader { key_id, .. }) if key_id == info.key_id
    ));

    // A key from before there were fingerprints is bound to the UUID alone.
    let early = KeyInfo {
        header: None,
        ..info.clone()
    };
    replaced.check_key(&early).unwrap();
    let elsewhere = KeyInfo {
        header: Some(Sha256Digest::of(b"")),
        ..info
    };
    assert!(before.check_key(&elsewhere).is_err());
}
