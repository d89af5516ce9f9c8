use serde_json::json;

use super::*;
use crate::digest::Sha256Digest;
use crate::event::{LoadKind, Violation};
use crate::testing::{BOOT, agent_start, load, measurement};

const BANKS: [Algorithm; 2] = [Algorithm::Sha1, Algorithm::Sha256];

fn record(number: u64) -> Record {
    Record::build(number, 13, &[load("/bin/true", number), Event::Ready], &BANKS).unwrap()
}

#[test]
fn decode_gives_back_what_was_encoded() {
    for number in [0, 1, u64::MAX] {
        let record = record(number);
        let bytes = record.encode();
        assert_eq!(read(&bytes), Ok((record.clone(), bytes.len())));
        assert_eq!(record.events().unwrap(), [load("/bin/true", number), Event::Ready]);
    }
    let log: Vec<u8> = (0..5).flat_map(|number| record(number).encode()).collect();
    assert_eq!(read_all(&log).unwrap(), (0..5).map(record).collect::<Vec<_>>());
}

#[test]
fn known_bytes_and_digest() {
    let record = Record::build(1, 13, &[Event::Ready], &[Algorithm::Sha256]).unwrap();
    let content = [0x5A, 0, 0, 0, 5, 3, 0, 0, 0, 0];
    let mut bytes = vec![
        0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 13, 3, 0, 0, 0, 37, 11, 0, 0, 0, 32,
    ];
    bytes.extend_from_slice(Sha256Digest::of(&content).as_bytes());
    bytes.extend_from_slice(&content);
    assert_eq!(record.encode(), bytes);
}

#[test]
fn cut_tail_is_short_everywhere() {
    let bytes = record(3).encode();
    for end in 0..bytes.len() {
        assert!(matches!(read(&bytes[..end]), Err(CelError::Short(_))), "{end} bytes");
        // A log may end between records only.
        assert_eq!(read_all(&bytes[..end]).is_ok(), end == 0, "{end} bytes");
    }
}

#[test]
fn no_changed_byte_panics_or_keeps_its_meaning() {
    let good = record(3);
    let bytes = good.encode();
    for at in 0..bytes.len() {
        for change in [1, 0x40, 0xFF] {
            let mut changed = bytes.clone();
            changed[at] ^= change;
            if let Ok((other, used)) = read(&changed) {
                assert_eq!(other.encode(), changed[..used], "byte {at}");
                let same = other.check_digests().is_ok() && other.events().is_ok();
                assert!(
                    !same || (other.number, other.pcr) != (good.number, good.pcr),
                    "byte {at}"
                );
            }
        }
    }
}

#[test]
fn digests_cover_the_content_and_its_type() {
    let mut record = record(0);
    assert_eq!(record.check_digests(), Ok(()));
    record.content[0] = 80;
    assert!(matches!(
        record.check_digests(),
        Err(CelError::Digest { bank: "sha1", .. })
    ));
}

#[test]
fn malformed_records_are_named() {
    let bytes = record(2).encode();
    let refused = |change: fn(&mut Vec<u8>)| {
        let mut changed = bytes.clone();
        change(&mut changed);
        read(&changed).unwrap_err()
    };
    assert_eq!(refused(|b| b[0] = 7), CelError::FieldType { found: 7, wanted: 0 });
    assert_eq!(refused(|b| b[13] = 2), CelError::FieldType { found: 2, wanted: 1 });
    assert!(matches!(
        refused(|b| b[4] = 7),
        CelError::Width {
            field: "recnum",
            found: 7,
            wanted: 8
        }
    ));
    assert!(matches!(
        refused(|b| b[17] = 2),
        CelError::Width {
            field: "pcr",
            found: 2,
            wanted: 1
        }
    ));
    assert!(matches!(refused(|b| b[24] = 0x12), CelError::Bank { record: 2, .. }));
    assert!(matches!(
        refused(|b| b[24] = 0x0B),
        CelError::Digest {
            record: 2,
            bank: "sha256",
            ..
        }
    ));
    // A length beyond any record is refused at once, it does not wait for 4 GiB.
    let huge = refused(|b| b[20] = 0xFF);
    assert!(matches!(huge, CelError::TooLarge { record: 2, .. }), "{huge:?}");
}

#[test]
fn digests_are_there_once() {
    let mut twice = record(0);
    twice.digests.push(twice.digests[0].clone());
    assert!(matches!(
        read(&twice.encode()),
        Err(CelError::Digest {
            bank: "sha1",
            reason: "is there twice",
            ..
        })
    ));
    let mut none = record(0);
    none.digests.clear();
    assert!(matches!(
        read(&none.encode()),
        Err(CelError::Digest { bank: "first", .. })
    ));
    assert!(matches!(
        Record::build(0, 13, &[Event::Ready], &[]),
        Err(CelError::Digest { .. })
    ));
}

#[test]
fn batches_are_limited() {
    assert_eq!(
        Record::build(0, 13, &[], &BANKS),
        Err(CelError::EventCount { record: 0, found: 0 })
    );
    let many = vec![Event::Ready; MAX_EVENTS + 1];
    assert_eq!(
        Record::build(0, 13, &many, &BANKS),
        Err(CelError::EventCount {
            record: 0,
            found: MAX_EVENTS + 1
        })
    );
    assert_eq!(batch_len(&many), MAX_EVENTS);
    assert_eq!(batch_len(&[]), 0);

    let wide = vec![Event::Load(measurement(LoadKind::Mapping, &"x".repeat(500), Some(1))); MAX_EVENTS];
    assert!(matches!(
        Record::build(0, 13, &wide, &BANKS),
        Err(CelError::TooLarge { .. })
    ));
    let fits = batch_len(&wide);
    assert!(fits < MAX_EVENTS);
    let banks = Algorithm::ALL;
    let record = Record::build(0, 13, &wide[..fits], &banks).unwrap();
    assert!(record.encode().len() <= MAX_RECORD);
    assert_eq!(read(&record.encode()).unwrap().0, record);
}

#[test]
fn too_many_events_are_refused_on_reading() {
    let value = [3, 0, 0, 0, 0].repeat(MAX_EVENTS + 1);
    let mut content = Vec::new();
    tlv::put(&mut content, CONTENT_ASSAY, &value);
    let digests = vec![(Algorithm::Sha256, Algorithm::Sha256.hash(&content))];
    let record = Record {
        number: 0,
        register: Register::Pcr,
        pcr: 13,
        digests,
        content_type: CONTENT_ASSAY,
        content,
    };
    assert_eq!(
        record.events(),
        Err(CelError::EventCount {
            record: 0,
            found: MAX_EVENTS + 1
        })
    );
}

#[test]
fn head_is_what_a_pcr_shows_that_began_at_zero() {
    let mut head = Head::new();
    assert_eq!((head.records(), head.value()), (0, Sha256Digest::ZERO));
    let mut pcr = vec![0; 32];
    for number in 0..3 {
        let record = record(number);
        head.push(&record).unwrap();
        pcr = Algorithm::Sha256.extend(&pcr, record.digest(Algorithm::Sha256).unwrap());
    }
    assert_eq!(head.value().as_ref(), pcr);
    assert_eq!(head.records(), 3);
    assert_eq!(head.push(&record(4)), Err(CelError::Number { found: 4, wanted: 3 }));
    let no_sha256 = Record::build(3, 13, &[Event::Ready], &[Algorithm::Sha1]).unwrap();
    assert!(matches!(
        head.push(&no_sha256),
        Err(CelError::Digest { bank: "sha256", .. })
    ));
}

#[test]
fn json_form() {
    let start = Record::build(0, 13, &[agent_start(BOOT).into()], &BANKS).unwrap();
    let json = to_json(&start);
    assert_eq!(json["recnum"], 0);
    assert_eq!(json["pcr"], 13);
    assert_eq!(json["digests"][1]["hashAlg"], "sha256");
    assert_eq!(json["content_type"], "assay");
    let event = &json["content"]["events"][0];
    assert_eq!(event["event"], "agent-start");
    assert_eq!(event["boot_id"], BOOT);
    assert_eq!(event["pcr_start"]["sha1"], "00".repeat(20));
    let json = to_json(&record(1));
    assert_eq!(json["content"]["events"][0]["kind"], "program");
    assert_eq!(json["content"]["events"][0]["path"], "/bin/true");
    assert_eq!(json["content"]["events"][1]["event"], "ready");
    let lost = Record::build(0, 13, &[Event::Violation(Violation::Lost { count: 2 })], &BANKS);
    let event = &to_json(&lost.unwrap())["content"]["events"][0];
    assert_eq!(
        (&event["event"], &event["violation"], &event["count"]),
        (&json!("violation"), &json!("lost"), &json!(2))
    );
}
