use super::*;
use crate::testing::{BOOT, agent_start, measurement};

fn samples() -> Vec<Event> {
    let mut restarted = agent_start(BOOT);
    restarted.predecessor = Some(u64::MAX);
    restarted.pcr_start.clear();
    restarted.lockdown.clear();
    let mut unhashed = measurement(LoadKind::ModuleBuffer, "", None);
    unhashed.digest = None;
    unhashed.flags = 4;
    let mut events = vec![
        Event::from(agent_start(BOOT)),
        Event::from(restarted),
        Event::Inventory(unhashed),
        Event::Ready,
        Event::Violation(Violation::Lost { count: 3 }),
        Event::Violation(Violation::LogMismatch {
            detail: "PCR is one extend ahead".into(),
        }),
        Event::Violation(Violation::NotHashed {
            path: "/a\n\u{1b}[2J".into(),
            detail: "gone".into(),
        }),
        Event::Violation(Violation::SequenceGap { expected: 4, found: 6 }),
        Event::Violation(Violation::HooksMissing { detail: String::new() }),
        Event::Violation(Violation::LogFull { max_bytes: 1 << 20 }),
        Event::Violation(Violation::TpmFailed { detail: "hung".into() }),
        Event::Notice(Notice::TpmSlow { millis: 1500 }),
        Event::Notice(Notice::ListInForce {
            serial: 3,
            digest: Sha256Digest::ZERO,
            entries: 2,
        }),
        Event::AgentStop,
    ];
    for (seq, kind) in (0_u64..).zip(LoadKind::ALL) {
        events.push(Event::Load(measurement(kind, "/usr/bin/föö", Some(seq))));
    }
    events
}

#[test]
fn decode_gives_back_what_was_encoded() {
    for event in samples() {
        let bytes = encode(&event).unwrap();
        assert_eq!(decode(&bytes), Ok(event));
    }
    let all: Vec<u8> = samples().iter().flat_map(|event| encode(event).unwrap()).collect();
    assert_eq!(decode_all(&all), Ok(samples()));
}

#[test]
fn encoding_is_canonical() {
    // Whatever decodes, in whatever way a byte was changed, encodes to the very bytes that were decoded.
    for event in samples() {
        let bytes = encode(&event).unwrap();
        for at in 0..bytes.len() {
            for change in [1, 0x80, 0xFF] {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                if let Ok(other) = decode(&changed) {
                    assert_eq!(encode(&other).unwrap(), changed, "byte {at} of {event:?}");
                }
            }
        }
    }
}

#[test]
fn every_prefix_is_refused() {
    for event in samples() {
        let bytes = encode(&event).unwrap();
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "{end} bytes of {event:?}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(matches!(decode(&longer), Err(EventError::Bytes(_))));
    }
}

#[test]
fn known_bytes() {
    assert_eq!(encode(&Event::Ready).unwrap(), [3, 0, 0, 0, 0]);
    let lost = [5, 0, 0, 0, 19, 1, 0, 0, 0, 1, 1, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 7];
    assert_eq!(encode(&Event::Violation(Violation::Lost { count: 7 })).unwrap(), lost);
}

#[test]
fn unknown_is_refused() {
    assert_eq!(decode(&[9, 0, 0, 0, 0]), Err(EventError::UnknownKind(9)));
    let unknown = Event::Violation(Violation::Lost { count: 7 });
    let mut bytes = encode(&unknown).unwrap();
    bytes[10] = 77;
    assert_eq!(
        decode(&bytes),
        Err(EventError::Code {
            what: "violation",
            code: 77
        })
    );
    let mut bytes = encode(&unknown).unwrap();
    bytes[11] = 8;
    let wrong = EventError::Field {
        event: "violation",
        found: 8,
        wanted: 2,
    };
    assert_eq!(decode(&bytes), Err(wrong));
    let missing = EventError::Field {
        event: "load",
        found: 0,
        wanted: 1,
    };
    assert_eq!(decode(&[4, 0, 0, 0, 0]), Err(missing));
    let mut bytes = encode(&Event::Load(measurement(LoadKind::Program, "/x", None))).unwrap();
    bytes[10] = 200;
    assert_eq!(
        decode(&bytes),
        Err(EventError::Code {
            what: "load kind",
            code: 200
        })
    );
}

#[test]
fn flags_without_a_meaning_are_refused_both_ways() {
    let mut odd = measurement(LoadKind::Program, "/x", None);
    odd.flags = flags::ALL;
    let mut bytes = encode(&Event::Load(odd.clone())).unwrap();
    let at = bytes
        .windows(4)
        .position(|four| four == flags::ALL.to_be_bytes())
        .unwrap();
    bytes[at + 2] |= 0x80;
    assert_eq!(decode(&bytes), Err(EventError::Flags(1 << 15)));
    odd.flags |= 1 << 31;
    assert_eq!(encode(&Event::Load(odd)), Err(EventError::Flags(1 << 31)));
}

#[test]
fn repeated_field_is_refused() {
    let value = [
        1, 0, 0, 0, 1, 1, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 7, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 7,
    ];
    let mut bytes = vec![5, 0, 0, 0, u8::try_from(value.len()).unwrap()];
    bytes.extend_from_slice(&value);
    assert!(matches!(decode(&bytes), Err(EventError::Bytes(_))));
}

#[test]
fn texts_are_limited_both_ways() {
    let long = measurement(LoadKind::Program, &"a".repeat(MAX_PATH + 1), None);
    let refused = EventError::TextTooLong {
        event: "load",
        field: 4,
        found: MAX_PATH + 1,
        limit: MAX_PATH,
    };
    assert_eq!(encode(&Event::Load(long)), Err(refused));

    let mut bytes = encode(&Event::Load(measurement(LoadKind::Program, "/x", None))).unwrap();
    let at = bytes.windows(2).position(|pair| pair == b"/x").unwrap();
    bytes[at] = 0xFF;
    assert_eq!(
        decode(&bytes),
        Err(EventError::NotText {
            event: "load",
            field: 4
        })
    );
}

#[test]
fn starts_that_make_no_sense_are_not_written() {
    let mut start = agent_start("not a uuid");
    assert_eq!(encode(&Event::from(start.clone())), Err(EventError::BootId));
    start.boot_id = BOOT.into();
    start.tier = 4;
    assert_eq!(
        encode(&Event::from(start.clone())),
        Err(EventError::Code { what: "tier", code: 4 })
    );
    start.tier = 2;
    start.pcr_start = vec![(Algorithm::Sha256, vec![0; 20])];
    assert!(matches!(
        encode(&Event::from(start.clone())),
        Err(EventError::PcrStart { bank: 0x0B, .. })
    ));
    start.pcr_start = vec![(Algorithm::Sha256, vec![0; 32]), (Algorithm::Sha1, vec![0; 20])];
    assert!(matches!(
        encode(&Event::from(start)),
        Err(EventError::PcrStart { bank: 0x04, .. })
    ));
}

#[test]
fn codes_and_names_go_both_ways() {
    for kind in LoadKind::ALL {
        assert_eq!(LoadKind::from_code(kind.code()), Some(kind));
        assert_eq!(kind.name().parse(), Ok(kind));
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
    }
    for mode in [Mode::Observe, Mode::Hold, Mode::Enforce] {
        assert_eq!(Mode::from_code(mode.code()), Some(mode));
        assert_eq!(serde_json::to_value(mode).unwrap(), mode.name());
    }
    assert_eq!(LoadKind::from_kernel(1), Some(LoadKind::Program));
    assert_eq!(LoadKind::from_kernel(5), Some(LoadKind::ModuleCompressed));
    assert_eq!(LoadKind::from_kernel(64), None, "the kernel programs have no inventory");
    assert_eq!(LoadKind::from_kernel(257), None);
    for code in 0..300 {
        let known = assay_ebpf::kind::is_known(code);
        assert_eq!(LoadKind::from_kernel(code).is_some(), known, "{code}");
    }
    assert!("modul".parse::<LoadKind>().is_err());
}

#[test]
fn text_for_people_has_no_control_characters() {
    let nasty = Violation::NotHashed {
        path: "/a\n\u{1b}[2J".into(),
        detail: "gone".into(),
    };
    assert_eq!(nasty.to_string(), "/a\\n\\u{1b}[2J could not be hashed: gone");
}

#[test]
fn cut_keeps_characters_whole() {
    assert_eq!(cut("föö", 2), "f");
    assert_eq!(cut("föö", 3), "fö");
    assert_eq!(cut("föö", 99), "föö");
}
