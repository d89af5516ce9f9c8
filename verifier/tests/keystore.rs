//! The file key store: what it keeps, and every way in which it refuses what was touched.
#![expect(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
};

use assay_evidence::terms::{OnLoss, Terms};
use assay_evidence::vhd::KeyHash;
use assay_evidence::{digest::Sha256Digest, uuid::Uuid};
use assay_verifier::keystore::{
    self, FileKeyStore, KEY_DIR, KeyInfo, KeyKind, KeySource, KeyStoreError, MASTER_FILE, NO_DISK, PASSPHRASE_LEN,
    Passphrase,
};
use tempfile::TempDir;

fn state() -> (TempDir, FileKeyStore) {
    let dir = tempfile::tempdir().unwrap();
    keystore::create_master(dir.path()).unwrap();
    let store = FileKeyStore::open(dir.path()).unwrap();
    (dir, store)
}

fn uuid(number: u128) -> Uuid {
    Uuid::new(number.to_be_bytes())
}

fn info(number: u128) -> KeyInfo {
    KeyInfo {
        key_id: uuid(number),
        kind: KeyKind::Luks,
        disk_uuid: uuid(number << 64),
        policy: "default".into(),
        tags: BTreeSet::new(),
        image: "disk.luks".into(),
        size: 1 << 30,
        created: 1_795_465_020,
        header: None,
        replaces: None,
        terms: Terms::default(),
    }
}

fn file_of(dir: &TempDir, info: &KeyInfo) -> PathBuf {
    dir.path().join(KEY_DIR).join(format!("{}.json", info.key_id))
}

fn mode_of(path: PathBuf) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn keeps_and_gives_back() {
    let (dir, store) = state();
    let passphrase = Passphrase::generate().unwrap();
    assert_eq!(passphrase.expose().len(), PASSPHRASE_LEN);
    store.put(&info(1), &passphrase).unwrap();
    // Another process, later.
    let store = FileKeyStore::open(dir.path()).unwrap();
    let key = store.get(info(1).key_id).unwrap();
    assert_eq!(key.info, info(1));
    assert_eq!(key.passphrase.expose(), passphrase.expose());
}

#[test]
fn files_are_private_and_hold_no_clear_text() {
    let (dir, store) = state();
    let passphrase = Passphrase::generate().unwrap();
    store.put(&info(1), &passphrase).unwrap();
    assert_eq!(mode_of(dir.path().join(MASTER_FILE)), 0o600);
    assert_eq!(mode_of(dir.path().join(KEY_DIR)), 0o700);
    assert_eq!(mode_of(file_of(&dir, &info(1))), 0o600);
    let text = fs::read_to_string(file_of(&dir, &info(1))).unwrap();
    assert!(!text.contains(std::str::from_utf8(passphrase.expose()).unwrap()));
    assert_eq!(format!("{passphrase:?}"), "Passphrase(hidden)");
}

#[test]
fn a_key_stored_by_root_belongs_to_the_services_user() {
    use std::os::unix::fs::{MetadataExt, chown};
    let (dir, store) = state();
    if chown(dir.path().join(KEY_DIR), Some(12_345), Some(12_345)).is_err() {
        eprintln!("skipped: only root can give files away");
        return;
    }
    store.put(&info(1), &Passphrase::generate().unwrap()).unwrap();
    assert_eq!(fs::metadata(file_of(&dir, &info(1))).unwrap().uid(), 12_345);
}

#[test]
fn passphrases_differ() {
    let (first, second) = (Passphrase::generate().unwrap(), Passphrase::generate().unwrap());
    assert_ne!(first.expose(), second.expose());
}

#[test]
fn unknown_and_taken_ids() {
    let (_dir, store) = state();
    assert!(matches!(store.get(uuid(9)), Err(KeyStoreError::NotFound { .. })));
    assert!(matches!(store.remove(uuid(9)), Err(KeyStoreError::NotFound { .. })));
    let passphrase = Passphrase::generate().unwrap();
    store.put(&info(1), &passphrase).unwrap();
    let other = Passphrase::generate().unwrap();
    assert!(matches!(store.put(&info(1), &other), Err(KeyStoreError::Exists { .. })));
    assert_eq!(
        store.get(info(1).key_id).unwrap().passphrase.expose(),
        passphrase.expose()
    );
    store.remove(info(1).key_id).unwrap();
    assert!(matches!(store.get(info(1).key_id), Err(KeyStoreError::NotFound { .. })));
}

#[test]
fn every_field_of_a_key_file_is_authenticated() {
    let (dir, store) = state();
    store.put(&info(1), &Passphrase::generate().unwrap()).unwrap();
    let path = file_of(&dir, &info(1));
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let forged = [
        ("disk_uuid", serde_json::json!(uuid(77))),
        ("key_id", serde_json::json!(uuid(77))),
        ("policy", serde_json::json!("lax")),
        ("image", serde_json::json!("other.luks")),
        ("size", serde_json::json!(512)),
        ("created", serde_json::json!(0)),
        ("nonce", serde_json::json!("AAAAAAAAAAAAAAAA")),
        ("nonce", serde_json::json!("AAAA")),
        ("ciphertext", serde_json::json!("AAAA")),
        ("ciphertext", serde_json::json!("")),
    ];
    for (field, value) in forged {
        let mut file = good.clone();
        file[field] = value;
        fs::write(&path, file.to_string()).unwrap();
        let error = store.get(info(1).key_id).unwrap_err();
        assert!(matches!(error, KeyStoreError::Tampered { .. }), "{field}: {error}");
    }
    fs::write(&path, good.to_string()).unwrap();
    assert!(store.get(info(1).key_id).is_ok());
}

#[test]
fn strict_format() {
    let (dir, store) = state();
    store.put(&info(1), &Passphrase::generate().unwrap()).unwrap();
    let path = file_of(&dir, &info(1));
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let refusal = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        store.get(info(1).key_id).unwrap_err()
    };
    let mut unknown = good.clone();
    unknown["surprise"] = 1.into();
    assert!(matches!(
        refusal(unknown.to_string().as_bytes()),
        KeyStoreError::Malformed { .. }
    ));
    let mut newer = good.clone();
    newer["version"] = 99.into();
    assert!(matches!(
        refusal(newer.to_string().as_bytes()),
        KeyStoreError::Version { version: 99, .. }
    ));
    assert!(matches!(refusal(b""), KeyStoreError::Malformed { .. }));
    assert!(matches!(
        refusal(format!("{good}x").as_bytes()),
        KeyStoreError::Malformed { .. }
    ));
    assert!(matches!(
        refusal(&[b' '; 40_000]),
        KeyStoreError::TooLong { len: 40_000, .. }
    ));
}

#[test]
fn a_key_under_another_name_is_refused() {
    let (dir, store) = state();
    store.put(&info(1), &Passphrase::generate().unwrap()).unwrap();
    fs::rename(file_of(&dir, &info(1)), file_of(&dir, &info(2))).unwrap();
    assert!(matches!(store.get(info(2).key_id), Err(KeyStoreError::Renamed { .. })));
}

#[test]
fn one_damaged_file_hides_no_other_key() {
    let (dir, store) = state();
    for number in 1..=3 {
        store.put(&info(number), &Passphrase::generate().unwrap()).unwrap();
    }
    fs::write(file_of(&dir, &info(2)), "{}").unwrap();
    fs::write(dir.path().join(KEY_DIR).join("notes.txt"), "hello").unwrap();
    fs::write(dir.path().join(KEY_DIR).join("left-by-a-crash.partial"), "{").unwrap();
    let listing = store.list().unwrap();
    assert_eq!(listing.keys, [info(1), info(3)]);
    assert_eq!(listing.damaged.len(), 2);
    assert!(
        listing
            .damaged
            .iter()
            .any(|error| matches!(error, KeyStoreError::StrangeFile { .. }))
    );
    assert!(
        listing
            .damaged
            .iter()
            .any(|error| matches!(error, KeyStoreError::Malformed { .. }))
    );
}

#[test]
fn permissions_of_others_are_refused() {
    let (dir, store) = state();
    store.put(&info(1), &Passphrase::generate().unwrap()).unwrap();
    let path = file_of(&dir, &info(1));
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let error = store.get(info(1).key_id).unwrap_err();
    assert!(matches!(error, KeyStoreError::Permissions { mode: 0o640, .. }));
    assert!(error.to_string().contains("chmod"), "no remedy in: {error}");

    let master = dir.path().join(MASTER_FILE);
    fs::set_permissions(&master, Permissions::from_mode(0o604)).unwrap();
    assert!(matches!(
        FileKeyStore::open(dir.path()),
        Err(KeyStoreError::Permissions { mode: 0o604, .. })
    ));
    fs::set_permissions(&master, Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(dir.path().join(KEY_DIR), Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(
        FileKeyStore::open(dir.path()),
        Err(KeyStoreError::Permissions { .. })
    ));
}

#[test]
fn master_key_missing_short_long_or_another() {
    let (dir, store) = state();
    store.put(&info(1), &Passphrase::generate().unwrap()).unwrap();
    let master = dir.path().join(MASTER_FILE);
    let error = keystore::create_master(dir.path()).unwrap_err();
    assert!(matches!(error, KeyStoreError::MasterExists { .. }));
    fs::write(&master, [7; 31]).unwrap();
    assert!(matches!(
        FileKeyStore::open(dir.path()),
        Err(KeyStoreError::MasterSize { len: 31, .. })
    ));
    fs::write(&master, [7; 100_000]).unwrap();
    assert!(matches!(
        FileKeyStore::open(dir.path()),
        Err(KeyStoreError::MasterSize { len: 100_000, .. })
    ));
    fs::write(&master, [7; 32]).unwrap();
    let other = FileKeyStore::open(dir.path()).unwrap();
    assert!(matches!(other.get(info(1).key_id), Err(KeyStoreError::Tampered { .. })));
    fs::remove_file(&master).unwrap();
    assert!(matches!(
        FileKeyStore::open(dir.path()),
        Err(KeyStoreError::MasterMissing { .. })
    ));
}

#[test]
fn tags_are_kept_and_authenticated() {
    let (dir, store) = state();
    let tagged = KeyInfo {
        tags: ["pci".to_owned(), "rack-7".to_owned()].into(),
        ..info(1)
    };
    for info in [&tagged, &info(2)] {
        store.put(info, &Passphrase::generate().unwrap()).unwrap();
        assert_eq!(&store.get(info.key_id).unwrap().info, info);
    }
    // One taken away, all taken away with the version that has none, one put where there were none.
    for (file, from, to) in [
        (&tagged, "    \"pci\",\n", ""),
        (&tagged, "\"version\": 2", "\"version\": 1"),
        (&info(2), "\"policy\"", "\"tags\": [\"pci\"], \"policy\""),
    ] {
        let path = file_of(&dir, file);
        let good = fs::read_to_string(&path).unwrap();
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        assert!(
            matches!(store.get(file.key_id), Err(KeyStoreError::Tampered { .. })),
            "{from}"
        );
        fs::write(&path, good).unwrap();
    }
    let odd = KeyInfo {
        tags: ["a b".to_owned()].into(),
        ..info(3)
    };
    let error = store.put(&odd, &Passphrase::generate().unwrap()).unwrap_err();
    assert!(matches!(error, KeyStoreError::Tags { .. }), "{error}");
}

#[test]
fn the_key_of_a_vhd_is_kept_with_its_hash() {
    let (dir, store) = state();
    for (length, tags) in [(32, &[][..]), (64, &["pci".to_owned()])] {
        let (key, hash) = Passphrase::generate_vhd(length).unwrap();
        let info = KeyInfo {
            key_id: hash.key_id(),
            kind: KeyKind::Vhd(hash),
            disk_uuid: NO_DISK,
            tags: tags.iter().cloned().collect(),
            ..info(1)
        };
        store.put(&info, &key).unwrap();
        let stored = store.get(hash.key_id()).unwrap();
        assert_eq!((&stored.info, stored.passphrase.expose()), (&info, key.expose()));

        let path = file_of(&dir, &info);
        let good = fs::read_to_string(&path).unwrap();
        let other = KeyHash::of(&[1; 64]).unwrap().to_string();
        let line = format!("  \"vhd_key_hash\": \"{hash}\",\n");
        for (from, to) in [
            (hash.to_string().as_str(), other.as_str()),
            (&line, ""),
            ("\"version\": 3", "\"version\": 2"),
            ("\"version\": 3", "\"version\": 1"),
        ] {
            assert!(good.contains(from), "{good}");
            fs::write(&path, good.replacen(from, to, 1)).unwrap();
            let found = store.get(info.key_id);
            assert!(
                matches!(found, Err(KeyStoreError::Tampered { .. })),
                "{from}: {found:?}"
            );
        }
        fs::write(&path, good).unwrap();
    }
    let error = Passphrase::generate_vhd(48).unwrap_err();
    assert!(matches!(error, KeyStoreError::VhdKey { len: 48 }), "{error}");
    // The passphrase of a LUKS disk does not become the key of a VHD by an edit.
    store.put(&info(2), &Passphrase::generate().unwrap()).unwrap();
    let path = file_of(&dir, &info(2));
    let good = fs::read_to_string(&path).unwrap();
    let hash = KeyHash::of(&[1; 64]).unwrap();
    let edited = good.replacen(
        "\"version\": 1",
        &format!("\"version\": 3, \"vhd_key_hash\": \"{hash}\""),
        1,
    );
    assert_ne!(edited, good);
    fs::write(&path, edited).unwrap();
    assert!(matches!(store.get(info(2).key_id), Err(KeyStoreError::Tampered { .. })));
    // It may have terms, but nothing that somebody would have to watch: the agent gives the key away.
    let key = store
        .list()
        .unwrap()
        .keys
        .into_iter()
        .find(|key| key.kind != KeyKind::Luks);
    let id = key.unwrap().key_id;
    let mut terms = Terms {
        groups: ["dom0".to_owned()].into(),
        ..Terms::default()
    };
    store.set_terms(id, &terms).unwrap();
    assert_eq!(store.get(id).unwrap().info.terms, terms);
    terms.on_loss = OnLoss::Wipe;
    let error = store.set_terms(id, &terms).unwrap_err();
    assert!(matches!(error, KeyStoreError::VhdLease { .. }), "{error}");
}

#[test]
fn terms_are_kept_and_authenticated() {
    let (dir, store) = state();
    let passphrase = Passphrase::generate().unwrap();
    store.put(&info(1), &passphrase).unwrap();
    let terms = Terms {
        groups: ["dom0".to_owned()].into(),
        hours: vec!["mon-fri 08:00-18:00".parse().unwrap()],
        lease_s: Some(600),
        on_loss: OnLoss::Wipe,
        ..Terms::default()
    };
    store.set_terms(info(1).key_id, &terms).unwrap();
    let key = store.get(info(1).key_id).unwrap();
    assert_eq!((key.info.terms, key.passphrase.expose()), (terms, passphrase.expose()));
    let path = file_of(&dir, &info(1));
    assert_eq!(mode_of(path.clone()), 0o600);
    // Nobody loosens them with an editor.
    let good = fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("dom0", "dom1"),
        ("\"lease_s\": 600", "\"lease_s\": 601"),
        (",\n    \"on_loss\": \"wipe\"", ""),
        ("\"version\": 4", "\"version\": 1"),
    ] {
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = store.get(info(1).key_id).unwrap_err();
        assert!(matches!(error, KeyStoreError::Tampered { .. }), "{from}: {error}");
    }
    fs::write(&path, good).unwrap();
    let odd = Terms {
        hosts_at_once: Some(2),
        ..Terms::default()
    };
    let error = store.set_terms(info(1).key_id, &odd).unwrap_err();
    assert!(matches!(error, KeyStoreError::Terms { .. }), "{error}");
    store.set_terms(info(1).key_id, &Terms::default()).unwrap();
    assert_eq!(store.get(info(1).key_id).unwrap().info, info(1));
    let error = store.set_terms(uuid(9), &Terms::default()).unwrap_err();
    assert!(matches!(error, KeyStoreError::NotFound { .. }), "{error}");
    assert_eq!(store.list().unwrap().damaged.len(), 0);
}

#[test]
fn header_and_predecessor_are_kept_and_authenticated() {
    let (dir, store) = state();
    let bound = KeyInfo {
        header: Some(Sha256Digest::of(b"header")),
        replaces: Some(uuid(9)),
        tags: ["pci".to_owned()].into(),
        ..info(1)
    };
    let plain = KeyInfo {
        header: bound.header,
        ..info(2)
    };
    for info in [&bound, &plain] {
        store.put(info, &Passphrase::generate().unwrap()).unwrap();
        assert_eq!(&store.get(info.key_id).unwrap().info, info);
    }
    let digest = Sha256Digest::of(b"header").to_string();
    let taken = format!("  \"header_sha256\": \"{digest}\",\n");
    let other = Sha256Digest::of(b"other").to_string();
    // Another header; none; none, with the version that has none; another predecessor; one where there was none.
    for (file, edits) in [
        (&bound, vec![(digest.as_str(), other.as_str())]),
        (&bound, vec![(taken.as_str(), "")]),
        (&plain, vec![(taken.as_str(), ""), ("\"version\": 3", "\"version\": 1")]),
        (&bound, vec![("\"replaces\": \"0", "\"replaces\": \"1")]),
        (
            &plain,
            vec![(
                "\"nonce\"",
                "\"replaces\": \"00000000-0000-0000-0000-000000000009\", \"nonce\"",
            )],
        ),
    ] {
        let path = file_of(&dir, file);
        let good = fs::read_to_string(&path).unwrap();
        let mut bad = good.clone();
        for (from, to) in &edits {
            assert!(bad.contains(from), "{from} in {bad}");
            bad = bad.replacen(from, to, 1);
        }
        fs::write(&path, bad).unwrap();
        assert!(
            matches!(store.get(file.key_id), Err(KeyStoreError::Tampered { .. })),
            "{edits:?}"
        );
        fs::write(&path, good).unwrap();
    }
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let (_dir, store) = state();
    let long = KeyInfo {
        policy: "p".repeat(2000),
        ..info(1)
    };
    let error = store.put(&long, &Passphrase::generate().unwrap()).unwrap_err();
    assert!(matches!(
        error,
        KeyStoreError::FieldTooLong {
            field: "policy name",
            len: 2000,
            ..
        }
    ));
    assert!(store.list().unwrap().keys.is_empty());
}
