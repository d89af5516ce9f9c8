//! What the database keeps, and what it refuses.

use assay_evidence::digest::Sha256Digest;
use assay_evidence::ear::Submod;
use assay_evidence::event::Mode;
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::policy::Policy;
use assay_evidence::replay::HeldLog;
use assay_verifier::store::{HostList, HostState, Measuring, NewHost, Quoted, Store, StoreError, Transition, Verdict};

fn open() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("state.db")).unwrap();
    (dir, store)
}

fn host(name: &str, byte: u8) -> NewHost {
    NewHost {
        name: name.to_owned(),
        address: "192.0.2.1:8443".to_owned(),
        ek_sha256: [byte; 32],
        ek_public: vec![1],
        ek_certificate: None,
        ak_public: vec![2],
        ak_name: vec![byte; 34],
        tls_spki_sha256: [byte; 32],
        pcr: RuntimePcr::DEFAULT,
        policy: "default".to_owned(),
    }
}

fn measuring() -> Measuring {
    Measuring {
        tier: 3,
        mode: Mode::Hold,
        protected: true,
        blind: "modules from memory".to_owned(),
    }
}

fn quoted(boot_id: &str, reset_count: u32, records: u64) -> Option<Quoted> {
    Some(Quoted {
        boot_id: boot_id.to_owned(),
        reset_count,
        records,
        measuring: measuring(),
    })
}

fn log(boot_id: &str, reset_count: u32, clock: u64, bytes: &[u8]) -> HeldLog {
    HeldLog {
        boot_id: boot_id.to_owned(),
        reset_count,
        restart_count: 0,
        clock,
        records: 1,
        bytes: bytes.to_vec(),
    }
}

#[test]
fn each_identity_is_enrolled_once() {
    let (_dir, store) = open();
    store.add_host(&host("a", 1)).unwrap();
    assert!(matches!(store.add_host(&host("a", 2)), Err(StoreError::HostExists(_))));
    for (what, other) in [
        (
            "endorsement key",
            NewHost {
                ek_sha256: [1; 32],
                ..host("b", 2)
            },
        ),
        (
            "attestation key",
            NewHost {
                ak_name: vec![1; 34],
                ..host("b", 2)
            },
        ),
        (
            "TLS key",
            NewHost {
                tls_spki_sha256: [1; 32],
                ..host("b", 2)
            },
        ),
    ] {
        let error = store.add_host(&other).unwrap_err();
        assert!(
            matches!(&error, StoreError::IdentityTaken { what: w, host } if *w == what && host == "a"),
            "{error}"
        );
    }
    assert_eq!(store.hosts().unwrap().len(), 1);
    for bad in ["", ".a", "a b", "a/b", &"a".repeat(65)] {
        assert!(
            matches!(store.add_host(&host(bad, 3)), Err(StoreError::BadName(_))),
            "{bad:?}"
        );
    }
}

#[test]
fn older_evidence_does_not_overrule_newer() {
    let (_dir, store) = open();
    store.add_host(&host("a", 1)).unwrap();
    let id = store.host("a").unwrap().id;
    let verdict = |state, quoted| Verdict {
        state,
        reasons: vec![],
        notes: vec![],
        tags: vec![],
        quoted,
        submod: Submod::no_policy(vec![]),
    };
    let change = store
        .record_verdict(id, &verdict(HostState::Untrusted, quoted("boot", 2, 10)))
        .unwrap();
    assert_eq!(
        change,
        Some(Transition {
            from: HostState::Unknown,
            to: HostState::Untrusted
        })
    );
    for late in [quoted("boot", 2, 9), quoted("before", 1, 99)] {
        assert_eq!(
            store.record_verdict(id, &verdict(HostState::Trusted, late)).unwrap(),
            None
        );
        assert_eq!(store.host("a").unwrap().state, HostState::Untrusted);
    }
    store
        .record_verdict(id, &verdict(HostState::Trusted, quoted("next", 3, 1)))
        .unwrap()
        .unwrap();
    assert_eq!(store.host("a").unwrap().boot_id.as_deref(), Some("next"));
    store
        .record_verdict(id, &verdict(HostState::Unreachable, None))
        .unwrap()
        .unwrap();
    assert_eq!(
        store.host("a").unwrap().records,
        1,
        "what was known of the last quote stays"
    );
    let read = store.host("a").unwrap();
    assert_eq!(read.measuring, Some(measuring()));
    assert_eq!(
        read.to_json()["measuring"],
        serde_json::json!({"tier": 3, "mode": "hold", "protected": true, "blind": "modules from memory"})
    );
    assert_eq!(
        store
            .record_verdict(id + 1, &verdict(HostState::Trusted, None))
            .unwrap(),
        None,
        "a removed host"
    );
}

#[test]
fn a_log_only_grows_within_a_boot() {
    let (_dir, store) = open();
    store.add_host(&host("a", 1)).unwrap();
    let id = store.host("a").unwrap().id;
    assert!(store.held_log(id).unwrap().is_none());
    store.keep_log(id, &log("boot", 2, 1, b"one")).unwrap();
    store.keep_log(id, &log("boot", 2, 2, b"onetwo")).unwrap();
    assert_eq!(store.held_log(id).unwrap(), log("boot", 2, 2, b"onetwo"));
    store.keep_log(id, &log("boot", 2, 3, b"one")).unwrap();
    store.keep_log(id, &log("boot", 2, 1, b"onetwo")).unwrap();
    store.keep_log(id, &log("before", 1, 9, b"older and longer")).unwrap();
    assert_eq!(store.held_log(id).unwrap(), log("boot", 2, 2, b"onetwo"));
    store.keep_log(id, &log("boot", 2, 4, b"onetwo")).unwrap();
    assert_eq!(store.held_log_head(id).unwrap(), (log("boot", 2, 4, b""), 6));
    store.keep_log(id, &log("next", 3, 1, b"new")).unwrap();
    assert_eq!(store.held_log(id).unwrap(), log("next", 3, 1, b"new"));
    store.remove_host("a").unwrap();
    store.keep_log(id, &log("next", 3, 2, b"newer")).unwrap();
    assert!(store.held_log(id).unwrap().is_none(), "a removed host keeps nothing");
}

#[test]
fn many_small_pieces_are_put_together() {
    let (_dir, store) = open();
    store.add_host(&host("a", 1)).unwrap();
    let id = store.host("a").unwrap().id;
    let mut bytes = Vec::new();
    for n in 0..1200_u64 {
        bytes.extend_from_slice(&n.to_be_bytes());
        store.keep_log(id, &log("boot", 1, n, &bytes)).unwrap();
    }
    assert_eq!(store.held_log(id).unwrap().bytes, bytes);
}

#[test]
fn two_processes_share_it_and_a_newer_schema_is_refused() {
    let (dir, store) = open();
    let path = dir.path().join("state.db");
    let other = Store::open(&path).unwrap();
    store.add_host(&host("a", 1)).unwrap();
    assert_eq!(other.host("a").unwrap().pinned.address, "192.0.2.1:8443");
    let raw = rusqlite::Connection::open(&path).unwrap();
    assert_eq!(
        raw.query_row("PRAGMA journal_mode", [], |r| r.get::<_, String>(0))
            .unwrap(),
        "wal"
    );
    raw.execute("UPDATE schema_version SET version = 99", []).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::TooNew { found: 99, .. })));
}

#[test]
fn hosts_of_before_the_pcr_was_pinned_have_the_default() {
    let (dir, store) = open();
    let twelve = RuntimePcr::new(12).unwrap();
    let new = NewHost {
        pcr: twelve,
        ..host("a", 1)
    };
    store.add_host(&new).unwrap();
    let read = store.host("a").unwrap();
    assert_eq!((read.pinned.pcr, &read.to_json()["pcr"]), (twelve, &12.into()));
    drop(store);
    let path = dir.path().join("state.db");
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE hosts SET pcr = 11", []).unwrap_err();
    raw.execute_batch(
        "ALTER TABLE hosts DROP COLUMN pcr; ALTER TABLE hosts DROP COLUMN measuring; ALTER TABLE hosts DROP COLUMN tags;
             DROP TABLE host_lists; DROP TABLE list_serial; DROP TABLE standings; DROP TABLE holdings;
             UPDATE schema_version SET version = 1",
    )
    .unwrap();
    drop(raw);
    let store = Store::open(&path).unwrap();
    let read = store.host("a").unwrap();
    assert_eq!((read.pinned.pcr, read.measuring), (RuntimePcr::DEFAULT, None));
}

#[test]
fn serial_numbers_of_lists_only_go_up() {
    let (dir, store) = open();
    let first = store.next_list_serial().unwrap();
    assert!(
        first > 1_700_000_000,
        "it begins with the time, so that a restored database is no way back"
    );
    let other = Store::open(&dir.path().join("state.db")).unwrap();
    let mut last = first;
    for store in [&store, &other, &store] {
        let next = store.next_list_serial().unwrap();
        assert!(next > last);
        last = next;
    }
}

#[test]
fn the_list_of_a_host_goes_with_it() {
    let (_dir, store) = open();
    store.add_host(&host("a", 1)).unwrap();
    let id = store.host("a").unwrap().id;
    assert_eq!(
        (store.host_list(id).unwrap(), store.host("a").unwrap().list),
        (None, None)
    );
    assert!(store.set_list_problem(id, Some("no key")).unwrap());
    assert!(!store.set_list_problem(id, Some("no key")).unwrap(), "no news");
    let none_yet = store.host("a").unwrap().list.unwrap();
    assert_eq!((none_yet.serial, none_yet.problem.as_deref()), (0, Some("no key")));
    let mut list = HostList {
        serial: 7,
        sha256: Sha256Digest::of(b"text"),
        content: Sha256Digest::of(b"content"),
        problem: Some("not yet".to_owned()),
    };
    store.put_host_list(id, &list).unwrap();
    assert_eq!(store.host("a").unwrap().list, Some(list.clone()));
    assert!(store.set_list_problem(id, None).unwrap());
    list.problem = None;
    assert_eq!(store.host_list(id).unwrap(), Some(list.clone()));
    assert_eq!(store.host("a").unwrap().to_json()["approved_list"]["held"], true);
    store.remove_host("a").unwrap();
    store.put_host_list(id, &list).unwrap();
    assert!(!store.set_list_problem(id, Some("late")).unwrap());
    assert_eq!(store.host_list(id).unwrap(), None, "a removed host keeps nothing");
}

#[test]
fn every_change_of_a_policy_is_another_version_of_it() {
    let (_dir, store) = open();
    assert_eq!(store.policy_version("default").unwrap(), None);
    let policy = Policy::new("default").unwrap();
    assert!(store.put_policy("default", &policy, false).unwrap());
    let mut versions = vec![store.policy_version("default").unwrap()];
    // Faster than a clock of seconds can tell.
    for round in 0..3_u8 {
        store
            .edit_policy("default", |policy| {
                policy.allow(Sha256Digest::of(&[round]), None, None).map(drop)
            })
            .unwrap();
        versions.push(store.policy_version("default").unwrap());
        assert!(store.put_policy("default", &policy, true).unwrap());
        versions.push(store.policy_version("default").unwrap());
    }
    assert!(versions.is_sorted_by(|before, after| before < after), "{versions:?}");
}

#[test]
fn a_later_quote_of_the_log_that_is_held_is_noted_and_no_other() {
    let (_dir, store) = open();
    store.add_host(&host("a", 1)).unwrap();
    let id = store.host("a").unwrap().id;
    store.keep_log(id, &log("boot", 2, 2, b"onetwo")).unwrap();
    let clock = || store.held_log(id).unwrap().clock;
    let held = store.held_log(id).unwrap();
    let later = |change: fn(&mut HeldLog)| {
        let mut later = held.clone();
        later.clock += 100;
        change(&mut later);
        store.keep_clock(id, &later).unwrap();
    };
    later(|held| held.boot_id = "other".to_owned());
    later(|held| held.reset_count += 1);
    later(|held| held.records += 1);
    assert_eq!(clock(), held.clock);
    later(|_| ());
    assert_eq!(clock(), held.clock + 100);
    store.keep_clock(id, &held).unwrap();
    assert_eq!(
        (clock(), store.held_log(id).unwrap().bytes),
        (held.clock + 100, held.bytes.clone())
    );
}
