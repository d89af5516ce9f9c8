//! A new key for an image: at every moment one that is kept opens it.

use std::{fs, path::Path};

use assay_evidence::{digest::Sha256Digest, uuid::Uuid};
use assay_verifier::{
    keystore::{KeyInfo, KeySource, KeyStoreError, Listing, Passphrase, StoredKey},
    seal::{self, Format, RecoveryKey, Request, SealError, Sealed, Terms},
};

use crate::bench::{Bench, MIB, decrypted_by_cryptsetup, disk, opens, request, terms};

#[test]
fn both_keys_open_the_image_until_the_old_one_is_confirmed_away() {
    let plain = disk(MIB);
    let bench = Bench::new(&plain);
    let old = bench.seal().unwrap();
    let image = bench.path("disk.luks");
    let old_file = bench.key_file(old.key_id);
    assert!(matches!(
        seal::confirm(&image, &bench.keys),
        Err(SealError::NothingToConfirm(_))
    ));

    let new = seal::rotate(&image, &bench.keys, &terms()).unwrap();
    assert_eq!(new.replaces, Some(old.key_id));
    assert_eq!(
        (new.disk_uuid, new.header, &new.policy, new.size),
        (old.disk_uuid, old.header, &old.policy, old.size)
    );
    let new_file = bench.key_file(new.key_id);
    assert!(opens(&image, &old_file) && opens(&image, &new_file));
    let sealed = Sealed::read(&image).unwrap();
    assert_eq!(sealed.key_id().unwrap(), new.key_id);
    assert_eq!(sealed.token.as_ref().unwrap().keyslots(), ["1"]);
    assert!(matches!(
        seal::rotate(&image, &bench.keys, &terms()),
        Err(SealError::Unconfirmed { old: kept, .. }) if kept == old.key_id
    ));

    assert_eq!(seal::confirm(&image, &bench.keys).unwrap(), old.key_id);
    assert!(!opens(&image, &old_file) && opens(&image, &new_file));
    assert!(matches!(
        bench.keys.get(old.key_id),
        Err(KeyStoreError::NotFound { .. })
    ));
    assert!(matches!(
        seal::confirm(&image, &bench.keys),
        Err(SealError::NothingToConfirm(_))
    ));
    // And once more, into the slot that came free.
    let third = seal::rotate(&image, &bench.keys, &terms()).unwrap();
    seal::confirm(&image, &bench.keys).unwrap();
    assert_eq!(Sealed::read(&image).unwrap().slots, [0]);
    assert!(decrypted_by_cryptsetup(&image, &bench.key_file(third.key_id)).starts_with(&plain));
}

#[test]
fn luks1_names_its_new_key_in_the_sidecar() {
    let bench = Bench::new(&disk(MIB));
    let (input, output) = (bench.path("disk.raw"), bench.path("disk.luks"));
    let request = Request {
        format: Format::Luks1,
        ..request(&input, &output)
    };
    let old = seal::seal(&request, &bench.keys, &mut |_, _| {}).unwrap();
    let new = seal::rotate(&output, &bench.keys, &terms()).unwrap();
    assert_eq!(Sealed::read(&output).unwrap().key_id().unwrap(), new.key_id);
    let (old_file, new_file) = (bench.key_file(old.key_id), bench.key_file(new.key_id));
    seal::confirm(&output, &bench.keys).unwrap();
    assert!(!opens(&output, &old_file) && opens(&output, &new_file));
}

/// A key store that loses its power at some point.
struct Dying<'a> {
    keys: &'a dyn KeySource,
    before_put: bool,
}

impl KeySource for Dying<'_> {
    fn get(&self, key_id: Uuid) -> Result<StoredKey, KeyStoreError> {
        self.keys.get(key_id)
    }
    fn list(&self) -> Result<Listing, KeyStoreError> {
        self.keys.list()
    }
    fn put(&self, info: &KeyInfo, passphrase: &Passphrase) -> Result<(), KeyStoreError> {
        if !self.before_put {
            self.keys.put(info, passphrase)?;
        }
        Err(KeyStoreError::Random)
    }
    fn set_terms(&self, _: Uuid, _: &assay_evidence::terms::Terms) -> Result<(), KeyStoreError> {
        Err(KeyStoreError::Random)
    }
    fn remove(&self, _: Uuid) -> Result<(), KeyStoreError> {
        Err(KeyStoreError::Random)
    }
}

#[test]
fn an_interrupted_rotation_is_finished_by_the_next() {
    let bench = Bench::new(&disk(MIB));
    let old = bench.seal().unwrap();
    let image = bench.path("disk.luks");
    let before = Sealed::read(&image).unwrap();
    for before_put in [true, false] {
        let keys = Dying {
            keys: &bench.keys,
            before_put,
        };
        assert!(seal::rotate(&image, &keys, &terms()).is_err());
        assert_eq!(Sealed::read(&image).unwrap().key_id().unwrap(), old.key_id);
        assert!(opens(&image, &bench.key_file(old.key_id)));
    }
    // The key that the second attempt kept is taken, not a third one made, and demands what the old one does by now.
    let demanded = assay_evidence::terms::Terms {
        groups: ["dom0".to_owned()].into(),
        ..Default::default()
    };
    bench.keys.set_terms(old.key_id, &demanded).unwrap();
    let new = seal::rotate(&image, &bench.keys, &terms()).unwrap();
    assert_eq!(bench.keys.get(new.key_id).unwrap().info.terms, demanded);
    assert_eq!(bench.keys.list().unwrap().keys.len(), 2);
    // The header got its slot, and then the power went: the token is the old one again.
    let after = fs::read(&image).unwrap();
    let mut with_slot = Sealed::read(&image).unwrap();
    assert_eq!(with_slot.slots, [0, 1]);
    crate::bench::cryptsetup(&["token", "remove", "--token-id", "0"], &image);
    let token = before.token.unwrap().to_json().unwrap();
    fs::write(bench.path("token"), token).unwrap();
    let file = bench.path("token");
    crate::bench::cryptsetup(&["token", "import", "--json-file", file.to_str().unwrap()], &image);
    assert_eq!(seal::rotate(&image, &bench.keys, &terms()).unwrap().key_id, new.key_id);
    with_slot = Sealed::read(&image).unwrap();
    assert_eq!(with_slot.slots, [0, 1], "no slot is filled twice");
    assert_eq!(after.len(), fs::read(&image).unwrap().len());

    // Confirming: the slot is gone, and then the power; the next run takes the key.
    let dying = Dying {
        keys: &bench.keys,
        before_put: false,
    };
    assert!(seal::confirm(&image, &dying).is_err());
    assert_eq!(seal::confirm(&image, &bench.keys).unwrap(), old.key_id);
    assert_eq!(Sealed::read(&image).unwrap().slots, [1]);
    assert_eq!(bench.keys.list().unwrap().keys.len(), 1);
}

#[test]
fn another_image_under_the_same_key_id_is_refused() {
    let bench = Bench::new(&disk(MIB));
    let old = bench.seal().unwrap();
    let uuid = Uuid::new([9; 16]).to_string();
    let image = bench.path("disk.luks");
    crate::bench::cryptsetup(&["luksUUID", "--batch-mode", "--uuid", &uuid], &image);
    for refused in [
        seal::rotate(&image, &bench.keys, &terms()).map(|new| new.key_id),
        seal::confirm(&image, &bench.keys),
    ] {
        assert!(matches!(refused, Err(SealError::OtherHeader { key_id, .. }) if key_id == old.key_id));
    }
    assert_ne!(
        Sealed::read(&image).unwrap().fingerprint,
        old.header.unwrap_or(Sha256Digest::ZERO)
    );
}

/// What a passphrase opens of a qcow2 image.
fn disk_of(bench: &Bench, image: &Path, passphrase: &Passphrase) -> Option<Vec<u8>> {
    let out = bench.path("disk.out");
    let sealed = Sealed::read(image).unwrap();
    let unsealed = sealed.unseal(passphrase.expose(), &out, &mut |_, _| {});
    let disk = unsealed.is_ok().then(|| fs::read(&out).unwrap());
    drop(fs::remove_file(&out));
    disk
}

#[test]
fn qcow2_is_rotated_by_qemu_and_an_interrupted_rotation_is_finished() {
    let plain = disk(MIB);
    let bench = Bench::new(&plain);
    let (input, output) = (bench.path("disk.raw"), bench.path("disk,1.qcow2"));
    let recovery = RecoveryKey::generate().unwrap();
    let request = Request {
        format: Format::Qcow2Luks,
        terms: Terms {
            recovery: Some(&recovery),
            ..terms()
        },
        ..request(&input, &output)
    };
    let mut heard = Vec::new();
    let old = seal::seal(&request, &bench.keys, &mut |done, total| heard.push((done, total))).unwrap();
    assert!(
        heard.is_sorted() && heard.last() == Some(&(MIB as u64, MIB as u64)),
        "{heard:?}"
    );
    let old_key = bench.keys.get(old.key_id).unwrap().passphrase;
    let opens = |key: &Passphrase| disk_of(&bench, &output, key).is_some_and(|disk| disk == plain);
    assert!(matches!(
        seal::confirm(&output, &bench.keys),
        Err(SealError::NothingToConfirm(_))
    ));

    // The key is kept, and then the power goes; and again, when the image has the slot, and the sidecar still the old key.
    let dying = Dying {
        keys: &bench.keys,
        before_put: false,
    };
    assert!(seal::rotate(&output, &dying, &terms()).is_err());
    assert!(opens(&old_key));
    let sidecar = seal::sidecar_path(&output);
    let before = fs::read(&sidecar).unwrap();
    let new = seal::rotate(&output, &bench.keys, &terms()).unwrap();
    fs::write(&sidecar, before).unwrap();
    assert_eq!(seal::rotate(&output, &bench.keys, &terms()).unwrap().key_id, new.key_id);
    assert_eq!(bench.keys.list().unwrap().keys.len(), 2);

    let sealed = Sealed::read(&output).unwrap();
    assert_eq!(
        (sealed.key_id().unwrap(), &sealed.slots[..]),
        (new.key_id, &[0, 1, 2][..])
    );
    assert_eq!(sealed.token.unwrap().keyslots(), ["2"]);
    assert_eq!(
        Some(sealed.fingerprint),
        new.header,
        "hosts still see the header that was sealed"
    );
    let new_key = bench.keys.get(new.key_id).unwrap().passphrase;
    assert!(opens(&old_key) && opens(&new_key));

    // Confirming: the slot is gone, and then the power; the next run takes the key.
    assert!(seal::confirm(&output, &dying).is_err());
    assert_eq!(seal::confirm(&output, &bench.keys).unwrap(), old.key_id);
    assert_eq!(Sealed::read(&output).unwrap().slots, [1, 2]);
    assert!(!opens(&old_key) && opens(&new_key));
}
