use std::os::unix::fs::PermissionsExt as _;
use std::sync::mpsc;

use assay_evidence::approved::{ListDraft, ListSigner};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::wire::{B64, JoinFile};

use super::*;
use crate::join::{self, Membership};

const NOW: u64 = 1_800_000_000;

fn signer() -> ListSigner {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    ListSigner::from_pkcs8(&key.serialize_der()).unwrap()
}

fn ca() -> String {
    let mut parameters = rcgen::CertificateParams::new(vec![]).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    parameters
        .self_signed(&rcgen::KeyPair::generate().unwrap())
        .unwrap()
        .pem()
}

/// A host that has joined, and the key of its verifier.
struct Host {
    dir: tempfile::TempDir,
    ca: String,
    signer: ListSigner,
}

impl Host {
    fn joined() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
            ca: ca(),
            signer: signer(),
        };
        host.join(Some(&host.signer));
        host
    }

    fn join(&self, signer: Option<&ListSigner>) {
        let file = JoinFile {
            version: 1,
            verifiers: vec!["https://v:1".into()],
            ca_pem: self.ca.clone(),
            list_key: signer.map(|signer| B64(signer.public().spki())),
        };
        let path = self.dir.path().join("given.json");
        std::fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
        join::join(&self.state(), &path, &Membership::read(&path).unwrap(), false).unwrap();
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn file(&self) -> PathBuf {
        self.state().join(FILE)
    }

    fn store(&self) -> ApprovedStore {
        ApprovedStore::open(&self.state())
    }

    fn draft(&self, serial: u64) -> ListDraft {
        ListDraft {
            policy: "default".into(),
            host: Some(Joined::load(&self.state()).unwrap().unwrap().spki()),
            serial,
            issued: NOW,
            expires: None,
            digests: vec![Sha256Digest::of(b"a"), Sha256Digest::of(&serial.to_be_bytes())],
        }
    }

    fn list(&self, serial: u64) -> Vec<u8> {
        self.draft(serial).sign(&self.signer).unwrap().into_bytes()
    }
}

#[test]
fn a_list_is_stored_told_and_there_after_a_restart() {
    let host = Host::joined();
    let store = host.store();
    assert!(store.load().unwrap().is_none() && store.head().is_none());
    let (told, tells) = mpsc::channel();
    store.on_change(move |list| told.send(list.serial()).unwrap());
    for serial in [3, 4] {
        let list = host.list(serial);
        let head = store.accept(&list, NOW).unwrap();
        assert_eq!((head.serial, head.entries), (serial, 2));
        assert_eq!(head.sha256, Sha256Digest::of(&list));
        assert_eq!(tells.try_recv(), Ok(serial));
        assert_eq!(std::fs::read(host.file()).unwrap(), list);
    }
    assert_eq!(
        std::fs::metadata(host.file()).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let again = host.store();
    assert_eq!(again.head(), store.head());
    let loaded = again.load().unwrap().unwrap();
    assert_eq!((loaded.serial(), loaded.digests().len()), (4, 2));
    let status = again.status().unwrap();
    assert_eq!(status.key_sha256, host.signer.public().spki_sha256());
    assert_eq!(status.list, store.head());
}

#[test]
fn what_is_refused_leaves_the_held_list_alone() {
    let host = Host::joined();
    let store = host.store();
    let held = host.list(7);
    store.accept(&held, NOW).unwrap();
    let (told, tells) = mpsc::channel();
    store.on_change(move |list| told.send(list.serial()).unwrap());

    let refused = |list: &[u8]| store.accept(list, NOW).unwrap_err();
    assert!(matches!(
        refused(&host.list(6)),
        ApprovedError::List(ListError::Rollback { held: 7, found: 6 })
    ));
    let mut other = host.draft(7);
    other.digests.push(Sha256Digest::of(b"more"));
    let other = other.sign(&host.signer).unwrap();
    assert!(matches!(
        refused(other.as_bytes()),
        ApprovedError::List(ListError::SameSerial(7))
    ));
    let forged = host.draft(8).sign(&signer()).unwrap();
    assert!(matches!(
        refused(forged.as_bytes()),
        ApprovedError::List(ListError::Signature)
    ));
    let mut changed = host.list(8);
    changed[100] ^= 1;
    assert!(matches!(refused(&changed), ApprovedError::List(_)));
    let mut foreign = host.draft(8);
    foreign.host = Some(Sha256Digest::ZERO);
    let foreign = foreign.sign(&host.signer).unwrap();
    assert!(matches!(
        refused(foreign.as_bytes()),
        ApprovedError::List(ListError::OtherHost { .. })
    ));
    let mut late = host.draft(8);
    late.expires = Some(NOW);
    let late = late.sign(&host.signer).unwrap();
    assert!(matches!(
        store.accept(late.as_bytes(), NOW + 1),
        Err(ApprovedError::List(ListError::Expired { .. }))
    ));
    assert!(matches!(
        refused(&vec![b'a'; MAX_LIST + 1]),
        ApprovedError::List(ListError::TooLong(_))
    ));

    assert_eq!(std::fs::read(host.file()).unwrap(), held);
    // The same again is no change: nothing is written and nobody told.
    let again = host.draft(7).sign(&host.signer).unwrap();
    assert_eq!(
        store.accept(again.as_bytes(), NOW).unwrap().sha256,
        Sha256Digest::of(&held)
    );
    assert_eq!(std::fs::read(host.file()).unwrap(), held);
    assert!(tells.try_recv().is_err(), "a refused list was told");
    assert_eq!(host.store().load().unwrap().unwrap().serial(), 7);
}

#[test]
fn a_host_without_a_key_for_lists_says_how_to_get_one() {
    let host = Host::joined();
    let list = host.list(1);
    let lonely = tempfile::tempdir().unwrap();
    let store = ApprovedStore::open(lonely.path());
    assert!(matches!(store.accept(&list, NOW), Err(ApprovedError::NotJoined)));
    assert!(store.status().is_none());

    host.join(None);
    let store = host.store();
    let error = store.accept(&list, NOW).unwrap_err();
    assert!(matches!(error, ApprovedError::NoKey));
    assert!(error.to_string().contains("join FILE` again"), "{error}");
    assert!(store.status().is_none() && !host.file().exists());
    // Joining again is enough, without a restart.
    host.join(Some(&host.signer));
    assert!(store.status().is_some());
    store.accept(&list, NOW).unwrap();
}

#[test]
fn a_held_list_that_is_no_good_any_more_gives_way_to_a_good_one() {
    let host = Host::joined();
    host.store().accept(&host.list(9), NOW).unwrap();
    // The verifier has a new key, and counts anew.
    let next = Host {
        signer: signer(),
        ..host
    };
    next.join(Some(&next.signer));
    let store = next.store();
    assert!(store.head().is_none());
    assert!(matches!(store.load(), Err(ApprovedError::List(ListError::Signature))));
    assert_eq!(store.accept(&next.list(1), NOW).unwrap().serial, 1);
    assert_eq!(next.store().head().unwrap().serial, 1);

    std::fs::write(next.file(), b"damaged").unwrap();
    let store = next.store();
    assert!(store.head().is_none() && store.load().is_err());
    assert_eq!(store.accept(&next.list(2), NOW).unwrap().serial, 2);
}
