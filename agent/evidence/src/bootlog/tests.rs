use super::*;

mod proven;

/// A small log writer: the header and events of the crypto-agile form.
fn header(algorithms: &[(u16, u16)], vendor: &[u8]) -> Vec<u8> {
    let mut data = b"Spec ID Event03\0".to_vec();
    data.extend([0, 0, 0, 0, 0, 2, 0, 2]);
    data.extend(u32::try_from(algorithms.len()).unwrap().to_le_bytes());
    for (id, size) in algorithms {
        data.extend(id.to_le_bytes());
        data.extend(size.to_le_bytes());
    }
    data.push(u8::try_from(vendor.len()).unwrap());
    data.extend(vendor);
    tpm12(0, EV_NO_ACTION, &[0; 20], &data)
}

fn tpm12(pcr: u32, event_type: u32, digest: &[u8], data: &[u8]) -> Vec<u8> {
    let mut out = [pcr.to_le_bytes(), event_type.to_le_bytes()].concat();
    out.extend(digest);
    out.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    out.extend(data);
    out
}

fn agile(pcr: u32, event_type: u32, digests: &[(u16, &[u8])], data: &[u8]) -> Vec<u8> {
    let mut out = [pcr.to_le_bytes(), event_type.to_le_bytes()].concat();
    out.extend(u32::try_from(digests.len()).unwrap().to_le_bytes());
    for (id, digest) in digests {
        out.extend(id.to_le_bytes());
        out.extend(*digest);
    }
    out.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    out.extend(data);
    out
}

const SHA256: &[(u16, u16)] = &[(0x0B, 32)];

fn locality(level: u8) -> Vec<u8> {
    let mut data = b"StartupLocality\0".to_vec();
    data.push(level);
    agile(0, EV_NO_ACTION, &[(0x0B, &[0; 32])], &data)
}

#[test]
fn an_event_of_an_unknown_bank_is_stepped_over() {
    // SM3 (0x12) beside SHA-256.
    let log = [
        header(&[(0x12, 32), (0x0B, 32)], b"vendor"),
        agile(4, 4, &[(0x12, &[7; 32]), (0x0B, &[1; 32])], b"\0\0\0\0"),
    ]
    .concat();
    let log = parse(&log).unwrap();
    assert_eq!(log.banks(), [Algorithm::Sha256]);
    let expected = Algorithm::Sha256.hash(&[[0u8; 32], [1; 32]].concat());
    assert_eq!(log.replay(Algorithm::Sha256).unwrap()[&4], expected);
    assert_eq!(
        log.replay(Algorithm::Sha1),
        Err(BootLogError::NoBank(Algorithm::Sha1, vec![Algorithm::Sha256]))
    );
}

#[test]
fn pcrs_begin_as_the_platform_profile_says() {
    let log = [header(SHA256, b""), locality(3)].concat();
    let pcrs = parse(&log).unwrap().replay(Algorithm::Sha256).unwrap();
    assert_eq!(pcrs[&0], [vec![0; 31], vec![3]].concat());
    assert_eq!(pcrs[&7], [0; 32]);
    assert_eq!(pcrs[&16], [0; 32]);
    assert_eq!(pcrs[&17], [0xFF; 32]);
    assert_eq!(pcrs[&23], [0; 32]);
    assert_eq!(pcrs.len(), 24);
}

#[test]
fn the_locality_is_settled_once_and_first() {
    let twice = [header(SHA256, b""), locality(3), locality(0)].concat();
    assert_eq!(parse(&twice), Err(BootLogError::Locality { event: 2 }));
    let late = [header(SHA256, b""), agile(0, 8, &[(0x0B, &[1; 32])], b"x"), locality(3)].concat();
    assert_eq!(parse(&late), Err(BootLogError::Locality { event: 2 }));
}

#[test]
fn malformed_logs_have_their_own_errors() {
    assert_eq!(parse(b""), Err(BootLogError::Empty));
    assert_eq!(parse(&vec![0; MAX_LOG + 1]), Err(BootLogError::TooLong(MAX_LOG + 1)));
    assert_eq!(
        parse(&tpm12(24, 4, &[0; 20], b"")),
        Err(BootLogError::NoSuchPcr {
            event: 0,
            at: 0,
            pcr: 24
        })
    );
    let empty_event = tpm12(0, 4, &[0; 20], b"");
    assert_eq!(
        parse(&empty_event.repeat(MAX_EVENTS + 1)),
        Err(BootLogError::TooManyEvents)
    );
    assert!(parse(&empty_event.repeat(MAX_EVENTS)).is_ok());

    let mut long = tpm12(0, 4, &[0; 20], b"");
    let size = u32::try_from(MAX_EVENT_DATA).unwrap() + 1;
    long[28..].copy_from_slice(&size.to_le_bytes());
    assert_eq!(parse(&long), Err(BootLogError::EventTooLong { event: 0, at: 0, size }));

    let short = &tpm12(0, 4, &[0; 20], b"data");
    assert_eq!(
        parse(&short[..short.len() - 1]),
        Err(BootLogError::Short {
            event: 0,
            at: 0,
            field: "data"
        })
    );

    for (log, field) in [
        (header(&[], b""), "number of algorithms"),
        (header(&[(0x0B, 32); 17], b""), "number of algorithms"),
        (header(&[(0x0B, 20)], b""), "digest size"),
        (header(&[(0x99, 0)], b""), "digest size"),
        (header(&[(0x99, 65)], b""), "digest size"),
        (header(&[(0x0B, 32), (0x0B, 32)], b""), "repeated algorithm"),
    ] {
        assert_eq!(parse(&log), Err(BootLogError::Header(field)));
    }
    let mut trailing = header(SHA256, b"");
    trailing[28] += 1;
    trailing.push(0);
    assert_eq!(parse(&trailing), Err(BootLogError::Header("length")));

    let with = |event: Vec<u8>| parse(&[header(SHA256, b""), event].concat());
    assert_eq!(
        with(agile(0, 4, &[(0x04, &[0; 20])], b"")),
        Err(BootLogError::UnlistedAlgorithm {
            event: 1,
            at: header(SHA256, b"").len(),
            algorithm: 4
        })
    );
    assert_eq!(
        with(agile(0, 4, &[(0x0B, &[0; 32]), (0x0B, &[0; 32])], b"")),
        Err(BootLogError::RepeatedAlgorithm {
            event: 1,
            at: header(SHA256, b"").len(),
            algorithm: 0x0B
        })
    );
    let none = with(agile(0, 4, &[], b"")).unwrap();
    assert_eq!(
        none.replay(Algorithm::Sha256),
        Err(BootLogError::NoDigest {
            event: 1,
            bank: Algorithm::Sha256
        })
    );
}

#[test]
fn event_types_have_names() {
    assert_eq!(event_name(4), "EV_SEPARATOR");
    assert_eq!(event_name(0x8000_00E0), "EV_EFI_VARIABLE_AUTHORITY");
    assert_eq!(event_name(0x1234), "0x00001234");
}
