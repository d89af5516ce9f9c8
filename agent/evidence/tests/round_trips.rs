//! What is written reads back as it was, whatever it is; and what is read of changed bytes is no other thing that looks the same.
#![expect(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use assay_evidence::approved::{ListDraft, UntrustedList};
use assay_evidence::bundle::{Bundle, LogPart, Pcrs, QuotePart, VERSION};
use assay_evidence::cel::{self, Record};
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::event::{
    self, AgentStart, Event, LoadKind, MAX_COMM, MAX_PATH, MAX_TEXT, Measurement, Mode, Notice, Violation, cut, flags,
};
use assay_evidence::policy::{Answer, Approved, Expiry, Policy};
use assay_evidence::token::LuksToken;
use assay_evidence::uuid::Uuid;
use assay_evidence::wire::{B64, Hex};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

fn text(limit: usize) -> impl Strategy<Value = String> {
    // Any characters, control characters and those of four bytes among them.
    vec(any::<char>(), 0..40).prop_map(move |chars| cut(&String::from_iter(chars), limit).to_owned())
}

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9._-]{1,64}"
}

fn digest() -> impl Strategy<Value = Sha256Digest> {
    any::<[u8; 32]>().prop_map(Sha256Digest::new)
}

fn kind() -> impl Strategy<Value = LoadKind> {
    select(LoadKind::ALL.to_vec())
}

fn mode() -> impl Strategy<Value = Mode> {
    select(vec![Mode::Observe, Mode::Hold, Mode::Enforce])
}

fn measurement() -> impl Strategy<Value = Measurement> {
    let what = (kind(), any::<u32>(), option::of(digest()), any::<u64>());
    let names = (text(MAX_PATH), text(MAX_COMM), option::of(any::<u64>()));
    let who = (any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>());
    let file = (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>());
    (what, names, who, file).prop_map(|(what, names, who, file)| Measurement {
        kind: what.0,
        flags: what.1 & flags::ALL,
        digest: what.2,
        size: what.3,
        path: names.0.into(),
        comm: names.1.into(),
        seq: names.2,
        time_ns: who.0,
        pid: who.1,
        uid: who.2,
        dev: who.3,
        ino: file.0,
        generation: file.1,
        change: file.2,
        fs_magic: file.3,
        cgroup: file.4,
    })
}

fn agent_start() -> impl Strategy<Value = AgentStart> {
    let texts = (text(64), text(64), text(200), text(64), text(16), text(MAX_TEXT));
    let digests = (digest(), digest(), any::<[u8; 16]>(), any::<[u8; 32]>());
    let how = (1..=3_u8, mode(), option::of(any::<u64>()), any::<bool>());
    (texts, digests, how).prop_map(|(texts, digests, how)| AgentStart {
        agent_version: texts.0,
        agent_digest: digests.0,
        bpf_digest: digests.1,
        boot_id: Uuid::new(digests.2).to_string(),
        kernel_release: texts.1,
        cmdline: texts.2,
        lsm: texts.3,
        lockdown: texts.4,
        tier: how.0,
        mode: how.1,
        pcr_start: vec![(Algorithm::Sha256, digests.3.to_vec())],
        predecessor: how.2,
        blind: texts.5,
        protected: how.3,
    })
}

fn violation() -> impl Strategy<Value = Violation> {
    prop_oneof![
        any::<u64>().prop_map(|count| Violation::Lost { count }),
        text(MAX_TEXT).prop_map(|detail| Violation::LogMismatch { detail }),
        (text(MAX_PATH), text(MAX_TEXT)).prop_map(|(path, detail)| Violation::NotHashed { path, detail }),
        any::<(u64, u64)>().prop_map(|(expected, found)| Violation::SequenceGap { expected, found }),
        text(MAX_TEXT).prop_map(|detail| Violation::HooksMissing { detail }),
        any::<u64>().prop_map(|max_bytes| Violation::LogFull { max_bytes }),
        text(MAX_TEXT).prop_map(|detail| Violation::TpmFailed { detail }),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    let notice = prop_oneof![
        any::<u64>().prop_map(|millis| Notice::TpmSlow { millis }),
        (any::<u64>(), digest(), any::<u64>()).prop_map(|(serial, digest, entries)| Notice::ListInForce {
            serial,
            digest,
            entries
        }),
    ];
    prop_oneof![
        agent_start().prop_map(Event::from),
        measurement().prop_map(Event::Inventory),
        measurement().prop_map(Event::Load),
        violation().prop_map(Event::Violation),
        notice.prop_map(Event::Notice),
        Just(Event::Ready),
        Just(Event::AgentStop),
    ]
}

fn approved() -> impl Strategy<Value = Approved> {
    let kind = option::of(kind().prop_filter("has a digest", |kind| *kind != LoadKind::KexecLoad));
    (text(MAX_PATH), kind, digest()).prop_map(|(path, kind, sha256)| Approved {
        path: path.into(),
        kind,
        sha256,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn events_and_records(events in vec(any_event(), 1..6), number in any::<u64>(), pcr in 12..=14_u8) {
        for event in &events {
            prop_assert_eq!(&event::decode(&event::encode(event).unwrap()).unwrap(), event);
        }
        let record = Record::build(number, pcr, &events, &[Algorithm::Sha1, Algorithm::Sha256]).unwrap();
        prop_assert_eq!(record.events().unwrap(), events);
        prop_assert_eq!(record.check_digests(), Ok(()));
        let bytes = record.encode();
        prop_assert_eq!(cel::read(&bytes).unwrap(), (record, bytes.len()));
    }

    #[test]
    fn a_changed_record_is_another_or_none(event in any_event(), place in any::<prop::sample::Index>(), bit in 0..8) {
        let record = Record::build(0, 13, &[event], &[Algorithm::Sha256]).unwrap();
        let mut bytes = record.encode();
        let at = place.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        if let Ok((other, _)) = cel::read(&bytes) {
            let same = other.check_digests().is_ok() && other.digest(Algorithm::Sha256) == record.digest(Algorithm::Sha256);
            // Its number and PCR are not hashed: a verifier knows what they must be.
            prop_assert!(!same || other.number != record.number || !same_place(&other, &record));
        }
    }

    #[test]
    fn bundles(
        boot in any::<[u8; 16]>(),
        parts in vec(vec(any::<u8>(), 0..200), 3),
        logs in option::of(vec(any::<u8>(), 1..200)),
        counts in any::<(u64, u64)>(),
        pcrs in btree_map(0..24_u8, any::<[u8; 32]>(), 0..24),
    ) {
        let bundle = Bundle {
            version: VERSION,
            boot_id: Uuid::new(boot).to_string(),
            quote: QuotePart { attest: B64(parts[0].clone()), signature: B64(parts[1].clone()) },
            pcrs: Pcrs::from([(Algorithm::Sha256, pcrs.into_iter().map(|(pcr, value)| (pcr, Hex(value.to_vec()))).collect())]),
            log: LogPart { from: counts.0, records: counts.1, data: B64(parts[2].clone()) },
            boot_log: logs.clone().map(B64),
            ima_log: logs.map(B64),
        };
        prop_assert_eq!(Bundle::from_json(&bundle.to_json().unwrap()).unwrap(), bundle);
    }

    #[test]
    fn policies(
        name in name(),
        sets in btree_map(name(), vec(approved(), 0..20), 0..4),
        modes in btree_set(mode(), 0..3),
        firmware in option::of(select(vec![Answer::Approved, Answer::Any, Answer::Refuse])),
        expires in option::of(0..=Expiry::MAX),
    ) {
        let mut policy = Policy::new(&name).unwrap();
        for (set, code) in sets {
            policy.allow_all(&set, code).unwrap();
            policy.expire(Some(&set), expires.and_then(Expiry::new)).unwrap();
        }
        policy.rules_mut().modes = modes;
        policy.rules_mut().kinds.extend(firmware.map(|answer| (LoadKind::Firmware, answer)));
        let text = policy.to_json();
        let back = Policy::from_json(text.as_bytes()).unwrap();
        prop_assert_eq!(&back, &policy);
        prop_assert_eq!(back.to_json(), text);
        prop_assert!(policy.differences(&back).is_empty());
    }

    #[test]
    fn tokens(
        slot in 0..32_u32,
        hosts in vec("[a-z0-9.-]{1,60}", 1..8),
        key in any::<[u8; 16]>(),
        policy in name(),
        spki in digest(),
    ) {
        let urls = hosts.iter().map(|host| format!("https://{host}:8440")).collect();
        let key_id = Uuid::new(key).to_string();
        // Not every host name is one.
        if let Ok(token) = LuksToken::new(slot, urls, spki, key_id.clone(), policy.clone()) {
            let back = LuksToken::parse(token.to_json().unwrap().as_bytes()).unwrap();
            prop_assert_eq!((back.key_id(), back.policy()), (key_id.as_str(), policy.as_str()));
            prop_assert_eq!(back.to_json().unwrap(), token.to_json().unwrap());
        }
    }

    #[test]
    fn digests_ids_and_times(bytes in any::<[u8; 32]>(), id in any::<[u8; 16]>(), unix in 0..=Expiry::MAX) {
        let digest = Sha256Digest::new(bytes);
        prop_assert_eq!(digest.to_string().parse::<Sha256Digest>().unwrap(), digest);
        let uuid = Uuid::new(id);
        prop_assert_eq!(uuid.to_string().parse::<Uuid>().unwrap(), uuid);
        let expiry = Expiry::new(unix).unwrap();
        prop_assert_eq!(expiry.to_string().parse::<Expiry>().unwrap(), expiry);
    }
}

fn same_place(one: &Record, other: &Record) -> bool {
    (one.register, one.pcr) == (other.register, other.pcr)
}

proptest! {
    // A signature each.
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn approved_lists(
        policy in name(),
        serial in any::<u64>(),
        digests in btree_set(digest(), 1..50),
        place in any::<prop::sample::Index>(),
        bit in 0..7,
    ) {
        let signer = signer();
        let host = Sha256Digest::of(b"host");
        let draft = ListDraft {
            policy: policy.clone(),
            host: Some(host),
            serial,
            issued: 1,
            expires: None,
            digests: digests.iter().copied().collect(),
        };
        let text = draft.sign(&signer).unwrap();
        let list = UntrustedList::new(text.as_bytes()).unwrap().verify(signer.public(), &host).unwrap();
        prop_assert_eq!((list.policy(), list.serial()), (policy.as_str(), serial));
        prop_assert!(list.digests().iter().eq(&digests));
        let mut changed = text.clone().into_bytes();
        let at = place.index(changed.len());
        changed[at] ^= 1_u8 << bit;
        prop_assert!(UntrustedList::new(&changed).unwrap().verify(signer.public(), &host).is_err());
    }
}

fn signer() -> assay_evidence::approved::ListSigner {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    assay_evidence::approved::ListSigner::from_pkcs8(&key.serialize_der()).unwrap()
}
