//! A quote of a cloud machine's hardware, made for another verifier.

use assay_evidence::bundle::Pcrs;
use assay_evidence::digest::Algorithm;
use assay_evidence::tpm::{AkError, Attest, AttestationKey, Attested, Public, Signature, pcr_digest};
use assay_evidence::wire::Hex;

use crate::{base64, read_json, text};

const FILE: &str = "quotes/go-attestation-windows-gcp.json";

#[test]
fn vectors_a_foreign_quote_covers_the_pcr_values_beside_it() {
    let vector = read_json(FILE);
    let attest = Attest::parse(&base64(text(&vector, "/Quote/Quote").to_owned().as_str())).expect("a quote");
    let Attested::Quote { selections, digest } = attest.attested else {
        panic!("not a quote")
    };
    assert_eq!(selections.len(), 1);
    assert_eq!(selections[0].bank, Algorithm::Sha1);
    assert_eq!(selections[0].pcrs, (0..24).collect::<Vec<u8>>());

    let mut values = Pcrs::new();
    for pcr in vector
        .pointer("/Log/PCRs")
        .and_then(|list| list.as_array())
        .expect("a list")
    {
        let index = pcr["Index"]
            .as_u64()
            .and_then(|index| u8::try_from(index).ok())
            .expect("an index");
        let value = Hex(base64(text(pcr, "/Digest")));
        values.entry(Algorithm::Sha1).or_default().insert(index, value);
    }
    // Its key signs with SHA-1, and so digests the PCRs with SHA-1.
    assert_eq!(
        pcr_digest(Algorithm::Sha1, &selections, &values).expect("all values"),
        digest
    );
    values.entry(Algorithm::Sha1).or_default().insert(7, Hex(vec![0; 20]));
    assert_ne!(
        pcr_digest(Algorithm::Sha1, &selections, &values).expect("all values"),
        digest
    );
}

#[test]
fn vectors_a_key_that_signs_with_sha1_is_refused() {
    let vector = read_json(FILE);
    let public = base64(text(&vector, "/AK/Public"));
    assert_eq!(Public::parse(&public).expect("a public area").as_bytes(), public);
    let refused = AttestationKey::new(&public);
    assert!(matches!(refused, Err(AkError::Scheme { .. })), "{refused:?}");
    let signature = Signature::parse(&base64(text(&vector, "/Quote/Signature"))).expect("a signature");
    assert!(matches!(signature, Signature::Rsassa { hash: Algorithm::Sha1, signature } if signature.len() == 256));
}
