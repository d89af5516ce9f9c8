//! Agreement with other projects' ground truth: logs and quotes that this project did not make.
//!
//! The files are not part of the repository; where they are absent, each test says that it was skipped.

use std::collections::BTreeMap;
use std::path::PathBuf;

use assay_evidence::bundle::Pcrs;
use assay_evidence::cel::{self, CelError, Head, Register};
use assay_evidence::digest::Algorithm;
use assay_evidence::tpm::{
    AkError, Attest, AttestationKey, Attested, Parameters, Public, Scheme, Signature, TpmError, pcr_digest,
};
use assay_evidence::wire::Hex;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, RsaPublicKeyComponents};
use serde_json::Value;

/// The text of a vector file; none, said out loud, when it is absent.
fn vector(name: &str) -> Option<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/vectors")
        .join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(error) => {
            println!("skipped: {}: {error}", path.display());
            None
        }
    }
}

fn unbase64(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().expect("a string")).expect("base64")
}

#[test]
fn go_tpm_tools_canonical_event_log() {
    let Some(text) = vector("cel/go-tpm-tools-cel.b64") else {
        return;
    };
    let bytes = STANDARD
        .decode(text.split_whitespace().collect::<String>())
        .expect("base64");
    let records = cel::read_all(&bytes).expect("a canonical event log");
    assert!(records.len() > 5, "{} records", records.len());

    let mut again = Vec::new();
    for (number, record) in (0_u64..).zip(&records) {
        assert_eq!(record.number, number);
        assert_eq!(record.register, Register::Ccmr, "of a confidential VM");
        assert_eq!(record.content_type, 80, "Google's content type");
        // They too hash the content's whole TLV.
        assert_eq!(record.check_digests(), Ok(()), "record {number}");
        assert_eq!(
            record.events(),
            Err(CelError::ContentType {
                record: number,
                found: 80
            })
        );
        assert_eq!(cel::to_json(record)["content_type"], 80);
        again.extend(record.encode());
    }
    assert_eq!(again, bytes, "encode gives back what was read");

    // Their log has SHA-384 digests alone: enough to read, not to be one of ours.
    let refused = Head::new().push(&records[0]);
    assert!(
        matches!(refused, Err(CelError::Digest { bank: "sha256", .. })),
        "{refused:?}"
    );
    for end in 0..bytes.len() {
        // A cut is found, unless it falls between two records.
        let cut = cel::read_all(&bytes[..end]);
        assert!(matches!(cut, Err(CelError::Short(_)) | Ok(_)), "{end}: {cut:?}");
    }
}

#[test]
fn go_attestation_quote_of_a_cloud_vm() {
    let Some(text) = vector("quotes/go-attestation-windows-gcp.json") else {
        return;
    };
    let vector: Value = serde_json::from_str(&text).expect("JSON");
    let dump = &vector["Static"];
    let dump = if dump.get("AK").is_some() { dump } else { &vector };

    let public = Public::parse(&unbase64(&dump["AK"]["Public"])).expect("a public area");
    let Parameters::Rsa {
        scheme,
        exponent,
        modulus,
        ..
    } = public.parameters()
    else {
        panic!("not RSA")
    };
    let quote = unbase64(&dump["Quote"]["Quote"]);
    let signature = Signature::parse(&unbase64(&dump["Quote"]["Signature"])).expect("a signature");

    // That machine's AK signs with SHA-1: read, but never accepted as an attestation key.
    assert_eq!(*scheme, Some(Scheme::Rsassa(Algorithm::Sha1)));
    let refused = AttestationKey::new(public.as_bytes());
    assert_eq!(
        refused,
        Err(AkError::Scheme {
            found: Some(Scheme::Rsassa(Algorithm::Sha1))
        })
    );

    let Signature::Rsassa {
        hash: Algorithm::Sha1,
        signature,
    } = signature
    else {
        panic!("{signature:?}")
    };
    let key = RsaPublicKeyComponents {
        n: modulus.as_slice(),
        e: &exponent.to_be_bytes()[1..],
    };
    key.verify(&RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY, &quote, &signature)
        .expect("their signature");

    let attest = Attest::parse(&quote).expect("an attestation");
    assert!(attest.extra_data.is_empty(), "taken without a nonce");
    let Attested::Quote { selections, digest } = &attest.attested else {
        panic!("not a quote")
    };
    assert_eq!(selections.len(), 1);
    assert_eq!((selections[0].bank, selections[0].pcrs.len()), (Algorithm::Sha1, 24));
    assert_eq!(
        &pcr_digest(Algorithm::Sha1, selections, &pcrs(&dump["Log"]["PCRs"])).expect("all PCRs"),
        digest
    );
}

#[test]
fn go_attestation_creation_statement_is_another_kind() {
    let Some(text) = vector("quotes/go-attestation-windows-gcp.json") else {
        return;
    };
    let vector: Value = serde_json::from_str(&text).expect("JSON");
    let dump = if vector["Static"].get("AK").is_some() {
        &vector["Static"]
    } else {
        &vector
    };
    let refused = Attest::parse(&unbase64(&dump["AK"]["CreateAttestation"]));
    assert_eq!(
        refused,
        Err(TpmError::Unsupported {
            what: "attestation type",
            id: 0x801A
        })
    );
}

/// Go's `crypto.Hash`: 3 is SHA-1, 5 is SHA-256.
fn pcrs(values: &Value) -> Pcrs {
    let mut pcrs: Pcrs = BTreeMap::new();
    for value in values.as_array().expect("a list") {
        let known = [(3, Algorithm::Sha1), (5, Algorithm::Sha256)];
        let (_, bank) = known
            .into_iter()
            .find(|(number, _)| value["DigestAlg"] == *number)
            .expect("a known algorithm");
        let index = u8::try_from(value["Index"].as_u64().expect("a number")).expect("a PCR");
        pcrs.entry(bank)
            .or_default()
            .insert(index, Hex(unbase64(&value["Digest"])));
    }
    pcrs
}
