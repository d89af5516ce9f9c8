use std::collections::BTreeMap;

use super::*;
use crate::testing::{counted, ima_digest as digest_field, ima_entry as entry};

fn none() -> BTreeMap<u32, Vec<u8>> {
    BTreeMap::new()
}

#[test]
fn every_template_is_read() {
    let plain = digest_field("sha256", &[7; 32]);
    let typed = [b"verity:".as_slice(), &plain].concat();
    let cases: [(&str, Vec<&[u8]>); 6] = [
        ("ima-ng", vec![&plain, b"/usr/bin/true\0"]),
        ("ima-ngv2", vec![&typed, b"/usr/bin/true\0"]),
        ("ima-sig", vec![&plain, b"/usr/bin/true\0", b"\x03\x02signature"]),
        ("ima-buf", vec![&plain, b"kexec-cmdline\0", b"quiet"]),
        ("ima-modsig", vec![&plain, b"/lib/x.ko\0", b"", &plain, b"pkcs7"]),
        ("n-ng|d-ng", vec![b"/usr/bin/true\0", &plain]),
    ];
    let mut bytes = Vec::new();
    for (template, fields) in &cases {
        bytes.extend(entry(Algorithm::Sha1, template, fields));
    }
    let log = parse(&bytes, Algorithm::Sha1).unwrap();
    assert_eq!(log.entries().len(), cases.len());
    for (read, (template, _)) in log.entries().iter().zip(&cases) {
        assert_eq!(
            (read.template(), read.pcr(), read.is_violation()),
            (*template, 10, false)
        );
        let file = read.file_digest().unwrap();
        assert_eq!((file.algorithm, file.digest), ("sha256", [7_u8; 32].as_slice()));
        assert_eq!(file.verity, *template == "ima-ngv2");
    }
    let [ng, _, sig, buf, modsig, _] = log.entries() else {
        panic!("six entries")
    };
    assert_eq!((ng.path(), ng.signature()), (b"/usr/bin/true".as_slice(), None));
    assert_eq!(sig.signature(), Some(b"\x03\x02signature".as_slice()));
    assert_eq!(
        (buf.path(), buf.buffer()),
        (b"kexec-cmdline".as_slice(), Some(b"quiet".as_slice()))
    );
    assert_eq!(modsig.signature(), Some(b"".as_slice()));
}

/// The oldest template has neither lengths nor a length of its data, and its name is hashed as 256 bytes.
#[test]
fn the_oldest_template_is_read() {
    let mut hashed = vec![5; 20];
    hashed.extend(b"/sbin/init");
    hashed.resize(20 + 256, 0);
    let digest = Algorithm::Sha1.hash(&hashed);
    let parts: [&[u8]; 5] = [
        &10_u32.to_le_bytes(),
        &digest,
        &counted(b"ima"),
        &[5; 20],
        &counted(b"/sbin/init"),
    ];
    let bytes = parts.concat();
    let log = parse(&bytes, Algorithm::Sha1).unwrap();
    let [read] = log.entries() else { panic!("one entry") };
    assert_eq!(
        (read.path(), read.file_digest().unwrap().digest),
        (b"/sbin/init".as_slice(), [5_u8; 20].as_slice())
    );
    let pcr = Algorithm::Sha1.extend(&[0; 20], &digest);
    assert_eq!(log.replay(Algorithm::Sha1, Extension::OwnDigest, &none())[&10], pcr);
}

#[test]
fn each_bank_is_extended_as_the_kernel_does() {
    let fields: [&[u8]; 2] = [&digest_field("sha256", &[7; 32]), b"/x\0"];
    let data: Vec<u8> = fields.iter().flat_map(|field| counted(field)).collect();
    let list = entry(Algorithm::Sha1, "ima-ng", &fields);
    let log = parse(&list, Algorithm::Sha1).unwrap();
    for bank in Algorithm::ALL {
        let own = bank.extend(&vec![0; bank.size()], &bank.hash(&data));
        assert_eq!(log.replay(bank, Extension::OwnDigest, &none())[&10], own);
        let mut padded = Algorithm::Sha1.hash(&data);
        padded.resize(bank.size(), 0);
        let padded = bank.extend(&vec![0; bank.size()], &padded);
        assert_eq!(log.replay(bank, Extension::PaddedSha1, &none())[&10], padded);
    }
    // A bank's own list leads to the same, and a list without its start goes on from what was there.
    let own = entry(Algorithm::Sha256, "ima-ng", &fields);
    let own = parse(&own, Algorithm::Sha256).unwrap();
    let once = log.replay(Algorithm::Sha256, Extension::OwnDigest, &none());
    assert_eq!(own.replay(Algorithm::Sha256, Extension::OwnDigest, &none()), once);
    let twice = [list.as_slice(), &list].concat();
    let twice = parse(&twice, Algorithm::Sha1).unwrap();
    assert_eq!(
        log.replay(Algorithm::Sha256, Extension::OwnDigest, &once),
        twice.replay(Algorithm::Sha256, Extension::OwnDigest, &none())
    );
}

#[test]
fn a_violation_is_extended_with_ones() {
    let fields: [&[u8]; 2] = [&digest_field("sha1", &[0; 20]), b"/x\0"];
    let mut bytes = entry(Algorithm::Sha1, "ima-ng", &fields);
    bytes[4..24].fill(0);
    let log = parse(&bytes, Algorithm::Sha1).unwrap();
    assert!(log.entries()[0].is_violation());
    for bank in Algorithm::ALL {
        let ones = bank.extend(&vec![0; bank.size()], &vec![0xff; bank.size()]);
        assert_eq!(log.replay(bank, Extension::OwnDigest, &none())[&10], ones);
    }
}

#[test]
fn what_is_no_log_is_refused_with_entry_and_byte() {
    let good = entry(Algorithm::Sha1, "ima-ng", &[&digest_field("sha1", &[1; 20]), b"/x\0"]);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.repeat(2);
        change(&mut bytes);
        parse(&bytes, Algorithm::Sha1).map(drop).unwrap_err()
    };
    let second = good.len();
    assert_eq!(parse(&[], Algorithm::Sha1), Err(ImaLogError::Empty));
    let huge = vec![0; MAX_LOG + 1];
    assert_eq!(parse(&huge, Algorithm::Sha1), Err(ImaLogError::TooLong(MAX_LOG + 1)));
    let (entry, at) = (1, second);
    let pcr = u32::from_le_bytes([24, 0, 0, 0]);
    assert_eq!(
        with(&|bytes| bytes[second] = 24),
        ImaLogError::NoSuchPcr { entry, at, pcr }
    );
    assert!(matches!(
        with(&|bytes| bytes[second + 24] = 0xff),
        ImaLogError::Short {
            entry: 1,
            field: "template name",
            ..
        }
    ));
    assert!(matches!(
        with(&|bytes| bytes[second + 26] = 1),
        ImaLogError::Length {
            entry: 1,
            field: "template name",
            limit: 256,
            ..
        }
    ));
    assert!(matches!(
        with(&|bytes| bytes[second + 28] = b'\x1b'),
        ImaLogError::Template { entry: 1, name, .. } if name == "\\u{1b}ma-ng"
    ));
    let bank = Algorithm::Sha1;
    assert_eq!(
        with(&|bytes| *bytes.last_mut().unwrap() = 1),
        ImaLogError::Digest { entry, at, bank }
    );
    // The data's length is right, and a field's is not.
    let data = second + 4 + 20 + 4 + 6 + 4;
    assert_eq!(with(&|bytes| bytes[data] += 1), ImaLogError::Fields { entry, at: data });
    for end in second + 1..2 * second {
        let bytes = good.repeat(2);
        assert!(matches!(
            parse(&bytes[..end], Algorithm::Sha1),
            Err(ImaLogError::Short { entry: 1, .. })
        ));
    }
    // Of another bank, of another byte order.
    assert!(parse(&good, Algorithm::Sha256).is_err());
    let mut swapped = good.clone();
    swapped[..4].reverse();
    assert!(matches!(
        parse(&swapped, Algorithm::Sha1),
        Err(ImaLogError::NoSuchPcr { entry: 0, at: 0, .. })
    ));
}

#[test]
fn a_log_is_shown_without_what_a_terminal_would_obey() {
    let bytes = entry(
        Algorithm::Sha1,
        "ima-ng",
        &[&digest_field("sha1", &[1; 20]), b"/\x1b[2J\xff\0"],
    );
    let log = parse(&bytes, Algorithm::Sha1).unwrap();
    let text = log.to_string();
    assert!(text.contains("\\u{1b}[2J"), "{text}");
    assert!(text.contains("replay sha256 pcr 10 "), "{text}");
    let json = log.to_json();
    assert_eq!(json["events"][0]["algorithm"], "sha1");
    assert_eq!(json["pcrs"]["sha384"]["10"].as_str().map(str::len), Some(96));
}
