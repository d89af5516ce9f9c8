use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};

use super::*;
use crate::uuid::Uuid;

fn signer() -> Signer {
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    Signer::from_pkcs8(pkcs8.as_ref()).unwrap()
}

fn request(host: &str) -> Request {
    Request {
        host: host.to_owned(),
        ak_name: "000b00".to_owned(),
        key_id: Uuid::new([7; 16]).to_string(),
        disk: Uuid::new([8; 16]),
        vm: None,
    }
}

fn refused(host: &str) -> Event {
    Event::Refused {
        request: request(host),
        code: "untrusted".to_owned(),
        message: "host does not meet the policy".to_owned(),
        reasons: vec!["/root/rogue".to_owned()],
        unrecorded: 0,
    }
}

/// A log of so many records, line by line, and the head after each.
fn log(signer: &Signer, count: usize) -> (Vec<String>, Vec<Head>) {
    let mut head = Head::EMPTY;
    let (mut lines, mut heads) = (Vec::new(), Vec::new());
    for number in 0..count {
        let (line, next) = Record::sign(&head, 1_800_000_000, refused(&format!("h{number}")), signer).unwrap();
        lines.push(line);
        heads.push(next);
        head = next;
    }
    (lines, heads)
}

fn check(lines: &[String], rest: &str, signer: &Signer, remembered: Option<Sha256Digest>) -> Result<Head, AuditError> {
    let mut checker = Checker::new(signer.public(), remembered);
    for line in lines {
        checker.line(line.as_bytes())?;
    }
    checker.end(rest.as_bytes())
}

#[test]
fn a_log_as_written_leads_to_its_head() {
    let signer = signer();
    let (lines, heads) = log(&signer, 4);
    assert_eq!(check(&lines, "", &signer, None), Ok(heads[3]));
    assert_eq!(check(&[], "", &signer, None), Ok(Head::EMPTY));
    for remembered in heads.iter().map(|head| head.hash).chain([Head::EMPTY.hash]) {
        assert_eq!(check(&lines, "", &signer, Some(remembered)), Ok(heads[3]));
    }
    let record = Record::read(lines[2].as_bytes(), signer.public(), 3).unwrap();
    assert_eq!(
        (record.seq, record.prev, record.event),
        (3, heads[1].hash, refused("h2"))
    );
}

#[test]
fn the_first_record_that_is_wrong_is_named() {
    let signer = signer();
    let (lines, _) = log(&signer, 4);
    let with = |edit: fn(&mut Vec<String>)| {
        let mut lines = lines.clone();
        edit(&mut lines);
        check(&lines, "", &signer, None).unwrap_err()
    };
    let missing = |expected, found| AuditError::Missing { expected, found };
    assert_eq!(with(|lines| drop(lines.remove(1))), missing(2, 3));
    assert_eq!(with(|lines| drop(lines.remove(0))), missing(1, 2));
    assert_eq!(with(|lines| lines.swap(1, 2)), missing(2, 3));
    let again = AuditError::Moved { expected: 4, found: 3 };
    assert_eq!(with(|lines| lines.insert(3, lines[2].clone())), again);
    let changed = |lines: &mut Vec<String>| lines[1] = lines[1].replacen('.', ".e30", 1);
    assert_eq!(with(changed), AuditError::Signature(2));
    assert_eq!(with(|lines| lines[3] = "{}".to_owned()), AuditError::Form(4));
    assert_eq!(
        with(|lines| lines[0] = "e30.e30.AAAA".to_owned()),
        AuditError::Header(1)
    );
    assert_eq!(
        with(|lines| lines[2] = "x".repeat(MAX_LINE + 1)),
        AuditError::TooLong(3)
    );
}

#[test]
fn a_record_of_another_log_does_not_fit_in() {
    let signer = signer();
    let (mut lines, _) = log(&signer, 4);
    // Same key, same number, another past.
    let (other, _) = log(&signer, 4);
    lines[2] = other[2].clone();
    assert_eq!(check(&lines, "", &signer, None), Err(AuditError::Chain { seq: 3 }));
    let (line, _) = Record::sign(
        &Head {
            seq: 0,
            hash: Sha256Digest::new([1; 32]),
        },
        1,
        refused("h"),
        &signer,
    )
    .unwrap();
    assert_eq!(check(&[line], "", &signer, None), Err(AuditError::Chain { seq: 1 }));
    let stranger = self::signer();
    assert_eq!(check(&lines, "", &stranger, None), Err(AuditError::Signature(1)));
}

#[test]
fn what_was_cut_shows_to_who_remembers() {
    let signer = signer();
    let (lines, heads) = log(&signer, 4);
    assert_eq!(check(&lines[..2], "", &signer, None), Ok(heads[1]));
    let cut = AuditError::Cut {
        hash: heads[3].hash,
        last: 2,
    };
    assert_eq!(check(&lines[..2], "", &signer, Some(heads[3].hash)), Err(cut));
    // Older files were put away.
    let mut part = Checker::of_part(signer.public());
    assert_eq!(part.line(lines[2].as_bytes()).unwrap().seq, 3);
    assert_eq!(
        part.line(lines[2].as_bytes()),
        Err(AuditError::Moved { expected: 4, found: 3 })
    );
    assert_eq!(check(&lines[2..], "", &signer, Some(heads[1].hash)), Ok(heads[3]));
    assert!(matches!(
        check(&lines[2..], "", &signer, Some(heads[0].hash)),
        Err(AuditError::Cut { .. })
    ));
}

#[test]
fn a_torn_line_is_said() {
    let signer = signer();
    let (lines, _) = log(&signer, 3);
    let said = AuditError::Torn { seq: 3, bytes: 100 };
    assert_eq!(check(&lines[..2], &lines[2][..100], &signer, None), Err(said));
    let said = AuditError::Torn { seq: 1, bytes: 1 };
    assert_eq!(check(&[], "e", &signer, None), Err(said));
}

#[test]
fn a_record_is_strict_and_what_strangers_write_is_cut() {
    let signer = signer();
    let sign = |payload: &str| jws::sign(HEADER, payload.as_bytes(), &signer).unwrap();
    let zeros = Head::EMPTY.hash;
    let of = |version: u32, event: &str| {
        sign(&format!(
            r#"{{"version":{version},"seq":1,"prev":"{zeros}","time":1,"event":{event}}}"#
        ))
    };
    let id = Uuid::new([7; 16]);
    let terms = format!(r#"{{"type":"terms","key_id":"{id}","terms":"none"}}"#);
    assert!(check(&[of(1, &terms)], "", &signer, None).is_ok());
    let odd = terms.replace("\"terms\":\"none\"", "\"terms\":\"none\",\"colour\":1");
    for line in [of(2, &terms), of(1, &odd), of(1, r#"{"type":"new"}"#)] {
        let error = check(&[line], "", &signer, None).unwrap_err();
        assert!(matches!(error, AuditError::Content { seq: 1, .. }), "{error}");
    }
    let long = "ä".repeat(100_000);
    let event = Event::Refused {
        request: Request {
            key_id: long.clone(),
            vm: Some(long.clone()),
            ..request("h")
        },
        code: "untrusted".to_owned(),
        message: long.clone(),
        reasons: vec![long; 1000],
        unrecorded: 3,
    };
    let (line, _) = Record::sign(&Head::EMPTY, 1, event, &signer).unwrap();
    let record = Record::read(line.as_bytes(), signer.public(), 1).unwrap();
    let Event::Refused { reasons, message, .. } = record.event else {
        panic!("{record:?}")
    };
    assert_eq!((reasons.len(), message.chars().count()), (MAX_REASONS, MAX_TEXT + 1));
    assert_eq!(reasons.last().unwrap(), "and 981 more");
}
