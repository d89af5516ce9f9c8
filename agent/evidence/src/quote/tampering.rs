//! One change of a good bundle each, and the refusal that it must meet.

use super::*;

/// A test's wrong value of a bundle, and the one refusal that it must meet.
pub(super) type Case = (&'static str, fn(&mut Bundle), fn(&Refusal) -> bool);

/// Byte offset of record `number` in the log's data.
fn offset(data: &[u8], number: u64) -> usize {
    let mut at = 0;
    for _ in 0..number {
        at += cel::read(&data[at..]).unwrap().1;
    }
    at
}

pub(super) fn flip(data: &mut [u8], at: usize) {
    data[at] ^= 1;
}

// Offsets inside a record: recnum is 5 + 8 bytes, pcr 5 + 1, digests 5 + (5 + 20) + (5 + 32).
const RECNUM_AT: usize = 12;
const PCR_AT: usize = 18;
const SHA1_AT: usize = 29;
const SHA256_AT: usize = 54;
const CONTENT_AT: usize = 86;

pub(super) const CASES: &[Case] = &[
    (
        "version",
        |b| b.version = 2,
        |r| matches!(r, Refusal::Quote(QuoteError::Bundle(BundleError::Version(2)))),
    ),
    (
        "boot id of another boot",
        |b| b.boot_id = OTHER_BOOT.into(),
        |r| matches!(r, Refusal::Replay(ReplayError::LogFromAnotherBoot { record: 0, .. })),
    ),
    (
        "boot id that is none",
        |b| b.boot_id = "x".into(),
        |r| matches!(r, Refusal::Quote(QuoteError::Bundle(BundleError::BootId))),
    ),
    (
        "signature",
        |b| flip(&mut b.quote.signature.0, 20),
        |r| matches!(r, Refusal::Quote(QuoteError::Signature(SignatureError::Invalid))),
    ),
    (
        "signature's scheme",
        |b| flip(&mut b.quote.signature.0, 1),
        |r| matches!(r, Refusal::Quote(QuoteError::SignatureForm(_))),
    ),
    (
        "signature's hash",
        |b| b.quote.signature.0[3] = 0x0C,
        |r| matches!(r, Refusal::Quote(QuoteError::Signature(SignatureError::Scheme { .. }))),
    ),
    (
        "value of PCR 0",
        |b| {
            flip(
                &mut b.pcrs.get_mut(&Algorithm::Sha256).unwrap().get_mut(&0).unwrap().0,
                0,
            )
        },
        |r| matches!(r, Refusal::Quote(QuoteError::PcrDigest { .. })),
    ),
    (
        "value of PCR 13",
        |b| {
            flip(
                &mut b.pcrs.get_mut(&Algorithm::Sha256).unwrap().get_mut(&13).unwrap().0,
                31,
            )
        },
        |r| matches!(r, Refusal::Quote(QuoteError::PcrDigest { .. })),
    ),
    (
        "PCR missing",
        |b| drop(b.pcrs.get_mut(&Algorithm::Sha256).unwrap().remove(&7)),
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::QuotedButNotGiven {
                    bank: Algorithm::Sha256,
                    index: 7
                })
            )
        },
    ),
    (
        "bank missing",
        |b| b.pcrs.clear(),
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::QuotedButNotGiven {
                    bank: Algorithm::Sha256,
                    index: 0
                })
            )
        },
    ),
    (
        "PCR too many",
        |b| drop(b.pcrs.get_mut(&Algorithm::Sha256).unwrap().insert(16, Hex(vec![0; 32]))),
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::GivenButNotQuoted {
                    bank: Algorithm::Sha256,
                    index: 16
                })
            )
        },
    ),
    (
        "bank too many",
        |b| drop(b.pcrs.insert(Algorithm::Sha1, [(3, Hex(vec![0; 20]))].into())),
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::GivenButNotQuoted {
                    bank: Algorithm::Sha1,
                    index: 3
                })
            )
        },
    ),
    (
        "PCR value too short",
        |b| drop(b.pcrs.get_mut(&Algorithm::Sha256).unwrap().insert(3, Hex(vec![0; 20]))),
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::Bundle(BundleError::PcrValue { index: 3, .. }))
            )
        },
    ),
    (
        "log's start",
        |b| b.log.from = 1,
        |r| matches!(r, Refusal::Quote(QuoteError::LogFrom { from: 1, held: 0 })),
    ),
    (
        "log's count up",
        |b| b.log.records += 1,
        |r| matches!(r, Refusal::Quote(QuoteError::LogShorter { claimed: 4, found: 3 })),
    ),
    (
        "log's count down: records after the quote",
        |b| b.log.records -= 1,
        |r| matches!(r, Refusal::Quote(QuoteError::LogLonger { claimed: 2, found: 3 })),
    ),
    (
        "shortened log",
        |b| {
            let end = offset(&b.log.data.0, 2);
            b.log.data.0.truncate(end);
            b.log.records = 2;
        },
        |r| matches!(r, Refusal::Quote(QuoteError::LogNotQuoted { records: 2, .. })),
    ),
    (
        "log without its first record",
        |b| {
            let start = offset(&b.log.data.0, 1);
            b.log.data.0.drain(..start);
        },
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::Log(CelError::Number { found: 1, wanted: 0 }))
            )
        },
    ),
    (
        "cut log",
        |b| b.log.data.0.truncate(b.log.data.0.len() - 1),
        |r| matches!(r, Refusal::Quote(QuoteError::Log(CelError::Short(_)))),
    ),
    (
        "record's number",
        |b| flip(&mut b.log.data.0, RECNUM_AT),
        |r| {
            matches!(
                r,
                Refusal::Quote(QuoteError::Log(CelError::Number { found: 1, wanted: 0 }))
            )
        },
    ),
    (
        "record's PCR",
        |b| flip(&mut b.log.data.0, PCR_AT),
        |r| {
            matches!(
                r,
                Refusal::Replay(ReplayError::PcrIndex {
                    record: 0,
                    found: 12,
                    ..
                })
            )
        },
    ),
    (
        "record's SHA-1 digest",
        |b| flip(&mut b.log.data.0, SHA1_AT),
        |r| {
            matches!(
                r,
                Refusal::Replay(ReplayError::Record(CelError::Digest {
                    record: 0,
                    bank: "sha1",
                    ..
                }))
            )
        },
    ),
    (
        "record's SHA-256 digest",
        |b| flip(&mut b.log.data.0, SHA256_AT),
        |r| matches!(r, Refusal::Quote(QuoteError::LogNotQuoted { records: 3, .. })),
    ),
    (
        "record's content type",
        |b| flip(&mut b.log.data.0, CONTENT_AT),
        |r| {
            matches!(
                r,
                Refusal::Replay(ReplayError::Record(CelError::Digest {
                    record: 0,
                    bank: "sha1",
                    ..
                }))
            )
        },
    ),
    (
        "last byte of the content",
        |b| {
            let last = b.log.data.0.len() - 1;
            flip(&mut b.log.data.0, last);
        },
        |r| {
            matches!(
                r,
                Refusal::Replay(ReplayError::Record(CelError::Digest { record: 2, .. }))
            )
        },
    ),
];
