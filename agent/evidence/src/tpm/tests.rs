#[path = "vectors.rs"]
mod vectors;

use std::collections::BTreeMap;

use super::*;
use crate::bundle::Pcrs;
use crate::testing::{AK_ATTRIBUTES, SoftKey};
use crate::wire::Hex;

fn bytes(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}

/// PCR values at the time the vectors were made.
fn pcrs() -> Pcrs {
    let mut sha256: BTreeMap<u8, Hex> = (0..16).map(|index| (index, Hex(vec![0; 32]))).collect();
    sha256.insert(13, Hex(Algorithm::Sha256.extend(&[0; 32], &[1; 32])));
    let sha1 = [(13, Hex(Algorithm::Sha1.extend(&[0; 20], &[1; 20])))].into();
    Pcrs::from([(Algorithm::Sha1, sha1), (Algorithm::Sha256, sha256)])
}

/// Bundle's steps over one vector: signature, structure, digest.
fn check_quote(ak: &str, quote: &str, signature: &str) -> Attest {
    let ak = AttestationKey::new(&bytes(ak)).unwrap();
    let signature = Signature::parse(&bytes(signature)).unwrap();
    assert_eq!(ak.verify(&bytes(quote), &signature), Ok(()));
    let mut changed = bytes(quote);
    changed[60] ^= 1;
    assert_eq!(ak.verify(&changed, &signature), Err(SignatureError::Invalid));

    let attest = Attest::parse(&bytes(quote)).unwrap();
    let Attested::Quote { selections, digest } = &attest.attested else {
        panic!("not a quote")
    };
    assert_eq!(&pcr_digest(Algorithm::Sha256, selections, &pcrs()).unwrap(), digest);
    assert_eq!(attest.extra_data, [0xab; 32]);
    assert_eq!(
        (attest.clock.reset_count, attest.clock.restart_count, attest.clock.safe),
        (1, 0, true)
    );
    attest
}

#[test]
fn quotes_of_a_tpm_check_out() {
    let ecc = check_quote(vectors::ECC_AK, vectors::ECC_QUOTE, vectors::ECC_SIGNATURE);
    let Attested::Quote { selections, .. } = ecc.attested else {
        panic!("not a quote")
    };
    assert_eq!(
        selections,
        [PcrSelection {
            bank: Algorithm::Sha256,
            pcrs: (0..16).collect()
        }]
    );
    check_quote(vectors::RSA_AK, vectors::RSA_QUOTE, vectors::RSA_SIGNATURE);
    let two = check_quote(
        vectors::RSA_AK,
        vectors::RSA_QUOTE_TWO_BANKS,
        vectors::RSA_SIGNATURE_TWO_BANKS,
    );
    let Attested::Quote { selections, .. } = two.attested else {
        panic!("not a quote")
    };
    let expected = [
        PcrSelection {
            bank: Algorithm::Sha1,
            pcrs: vec![13],
        },
        PcrSelection {
            bank: Algorithm::Sha256,
            pcrs: vec![0, 13],
        },
    ];
    assert_eq!(selections, expected);
}

#[test]
fn signature_of_the_other_scheme_is_refused() {
    let ecc = AttestationKey::new(&bytes(vectors::ECC_AK)).unwrap();
    let rsa = Signature::parse(&bytes(vectors::RSA_SIGNATURE)).unwrap();
    let refused = ecc.verify(b"", &rsa).unwrap_err();
    let found = Scheme::Rsassa(Algorithm::Sha256);
    assert!(
        matches!(refused, SignatureError::Scheme { found: f, .. } if f == found),
        "{refused}"
    );
    assert!(refused.to_string().contains("enrolled anew"), "{refused}");
}

#[test]
fn names_are_the_tpms() {
    for (public, name) in [
        (vectors::ECC_AK, vectors::ECC_NAME),
        (vectors::RSA_AK, vectors::RSA_NAME),
        (vectors::RELEASE_KEY, vectors::RELEASE_NAME),
        (vectors::EK, vectors::EK_NAME),
    ] {
        let public = Public::parse(&bytes(public)).unwrap();
        assert_eq!(public.name().to_string(), name);
        assert_eq!(name.parse(), Ok(public.name()));
        assert_eq!(public.name().digest().len(), 32);
    }
    assert_eq!("000b00".parse::<Name>(), Err(NameError));
    assert_eq!(Name::parse(&[0x80, 0, 0, 0]), Err(NameError), "a handle is no Name");
}

#[test]
fn certification_names_the_key() {
    let ak = AttestationKey::new(&bytes(vectors::ECC_AK)).unwrap();
    let signature = Signature::parse(&bytes(vectors::CERTIFY_SIGNATURE)).unwrap();
    assert_eq!(ak.verify(&bytes(vectors::CERTIFY), &signature), Ok(()));
    let attest = Attest::parse(&bytes(vectors::CERTIFY)).unwrap();
    let Attested::Certify { name, .. } = attest.attested else {
        panic!("not a certification")
    };
    assert_eq!(hex::encode(name), vectors::RELEASE_NAME);
    assert_eq!(attest.extra_data, [0x00, 0xff, 0x55, 0xaa]);
}

#[test]
fn policy_digest_is_the_tpms() {
    let values = pcrs().remove(&Algorithm::Sha256).unwrap();
    let chosen = values
        .into_iter()
        .filter(|(index, _)| [0, 2, 4, 7, 9, 13, 14, 15].contains(index))
        .collect();
    let digest = policy_pcr_digest(&chosen);
    assert_eq!(digest.to_string(), vectors::POLICY);
    let key = Public::parse(&bytes(vectors::RELEASE_KEY)).unwrap();
    assert_eq!(key.auth_policy(), digest.as_ref());
}

#[test]
fn public_areas_are_read_in_full() {
    let ek = Public::parse(&bytes(vectors::EK)).unwrap();
    assert_eq!(
        ek.attributes().to_string(),
        "fixedTPM|fixedParent|sensitiveDataOrigin|adminWithPolicy|restricted|decrypt"
    );
    let Parameters::Rsa {
        symmetric,
        scheme,
        bits,
        exponent,
        modulus,
    } = ek.parameters()
    else {
        panic!("not RSA")
    };
    assert_eq!(*symmetric, Some(Symmetric { bits: 128, mode: 0x43 }));
    assert_eq!((*scheme, *bits, *exponent, modulus.len()), (None, 2048, 65537, 256));

    let key = Public::parse(&bytes(vectors::RELEASE_KEY)).unwrap();
    let wanted = Attributes::FIXED_TPM
        .with(Attributes::FIXED_PARENT)
        .with(Attributes::SENSITIVE_DATA_ORIGIN)
        .with(Attributes::DECRYPT)
        .with(Attributes::NO_DA);
    assert_eq!(key.attributes(), wanted);
    assert!(matches!(
        key.parameters(),
        Parameters::P256 {
            symmetric: None,
            scheme: None,
            ..
        }
    ));
    assert_eq!(key.as_bytes(), bytes(vectors::RELEASE_KEY));
}

#[test]
fn other_keys_are_no_attestation_keys() {
    assert!(matches!(
        AttestationKey::new(&bytes(vectors::EK)),
        Err(AkError::Missing { .. })
    ));
    assert!(matches!(
        AttestationKey::new(&bytes(vectors::RELEASE_KEY)),
        Err(AkError::Missing { .. })
    ));
    assert!(matches!(AttestationKey::new(b""), Err(AkError::Public(_))));
    let key = SoftKey::new();
    // fixedTPM, fixedParent, sensitiveDataOrigin, restricted, sign: none may be missing.
    for bit in [1, 4, 5, 16, 18] {
        let refused = AttestationKey::new(&key.public(AK_ATTRIBUTES & !(1 << bit)));
        assert!(matches!(refused, Err(AkError::Missing { .. })), "bit {bit}");
    }
    let decrypts = AttestationKey::new(&key.public(AK_ATTRIBUTES | 1 << 17));
    assert_eq!(decrypts, Err(AkError::Decrypts));

    let change = |at: usize, value: u8| {
        let mut public = key.public(AK_ATTRIBUTES);
        public[at] = value;
        AttestationKey::new(&public)
    };
    assert_eq!(change(3, 0x0C), Err(AkError::NameAlg(Algorithm::Sha384)));
    let sha384 = Err(AkError::Scheme {
        found: Some(Scheme::Ecdsa(Algorithm::Sha384)),
    });
    assert_eq!(change(15, 0x0C), sha384);
    let curve = Err(AkError::Public(TpmError::Unsupported { what: "curve", id: 4 }));
    assert_eq!(change(17, 4), curve);

    let mut rsa = bytes(vectors::RSA_AK);
    rsa[13] = 0x16;
    let pss = Err(AkError::Scheme {
        found: Some(Scheme::Rsapss(Algorithm::Sha256)),
    });
    assert_eq!(AttestationKey::new(&rsa), pss);
}

#[test]
fn other_rsa_keys_are_no_attestation_keys() {
    let good = bytes(vectors::RSA_AK);
    assert!(AttestationKey::new(&good).is_ok());
    let change = |at: usize, new: &[u8]| {
        let mut public = good.clone();
        public[at..at + new.len()].copy_from_slice(new);
        AttestationKey::new(&public)
    };
    let attributes = u32::from_be_bytes(good[4..8].try_into().unwrap());
    // fixedTPM, fixedParent, sensitiveDataOrigin, restricted, sign: none may be missing.
    for bit in [1, 4, 5, 16, 18] {
        let refused = change(4, &(attributes & !(1 << bit)).to_be_bytes());
        assert!(matches!(refused, Err(AkError::Missing { .. })), "bit {bit}");
    }
    let decrypts = change(4, &(attributes | 1 << 17).to_be_bytes());
    assert_eq!(decrypts, Err(AkError::Decrypts));
    assert_eq!(change(3, &[0x0C]), Err(AkError::NameAlg(Algorithm::Sha384)));
    for (hash, found) in [(0x04, Algorithm::Sha1), (0x0C, Algorithm::Sha384)] {
        let found = Some(Scheme::Rsassa(found));
        assert_eq!(change(15, &[hash]), Err(AkError::Scheme { found }));
    }
    // A key without a scheme signs with any; one byte pair less then.
    let mut free = good.clone();
    free.splice(12..16, [0x00, 0x10]);
    assert_eq!(AttestationKey::new(&free), Err(AkError::Scheme { found: None }));
    assert_eq!(change(18, &[0, 0, 0, 3]), Err(AkError::RsaExponent(3)));
    assert!(change(18, &[0, 1, 0, 1]).is_ok(), "the default, spelled out");
    for (bits, size) in [(1024_u16, 128_u16), (3072, 384)] {
        let mut other = good[..16].to_vec();
        other.extend_from_slice(&bits.to_be_bytes());
        other.extend_from_slice(&[0; 4]);
        other.extend_from_slice(&size.to_be_bytes());
        other.resize(other.len() + usize::from(size), 0xC1);
        assert_eq!(AttestationKey::new(&other), Err(AkError::RsaBits(bits)));
    }
    // Another length than the structure says.
    let torn = change(16, &[0x0C, 0x00]);
    assert!(
        matches!(torn, Err(AkError::Public(TpmError::Length { .. }))),
        "{torn:?}"
    );
}

#[test]
fn an_rsa_signature_counts_in_full_and_for_its_message_alone() {
    let key = AttestationKey::new(&bytes(vectors::RSA_AK)).unwrap();
    let quote = bytes(vectors::RSA_QUOTE);
    let good = bytes(vectors::RSA_SIGNATURE);
    let verify = |message: &[u8], signature: &[u8]| key.verify(message, &Signature::parse(signature).unwrap());
    assert_eq!(verify(&quote, &good), Ok(()));
    assert_eq!(
        verify(&bytes(vectors::RSA_QUOTE_TWO_BANKS), &good),
        Err(SignatureError::Invalid)
    );
    for at in 6..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 1;
        assert_eq!(verify(&quote, &changed), Err(SignatureError::Invalid), "byte {at}");
    }
    // Shorter, longer, empty.
    for (size, rest) in [(255_u16, &good[7..]), (0, &[][..]), (257, &[&[0], &good[6..]].concat())] {
        let changed = [&good[..4], &size.to_be_bytes(), rest].concat();
        assert_eq!(verify(&quote, &changed), Err(SignatureError::Invalid), "{size} bytes");
    }
    let mut sha1 = good;
    sha1[3] = 0x04;
    let refused = verify(&quote, &sha1);
    assert!(matches!(refused, Err(SignatureError::Scheme { .. })), "{refused:?}");
}

#[test]
fn every_prefix_is_refused_and_no_byte_panics() {
    let check = |text: &str, parses: &dyn Fn(&[u8]) -> bool| {
        let good = bytes(text);
        assert!(parses(&good));
        for end in 0..good.len() {
            assert!(!parses(&good[..end]), "{end} bytes of {text}");
        }
        for at in 0..good.len() {
            let mut changed = good.clone();
            changed[at] ^= 0xFF;
            parses(&changed);
        }
        assert!(!parses(&[good, vec![0]].concat()), "a byte too many");
    };
    for public in [vectors::ECC_AK, vectors::RSA_AK, vectors::EK, vectors::RELEASE_KEY] {
        check(public, &|bytes| Public::parse(bytes).is_ok());
    }
    for attest in [vectors::ECC_QUOTE, vectors::RSA_QUOTE_TWO_BANKS, vectors::CERTIFY] {
        check(attest, &|bytes| Attest::parse(bytes).is_ok());
    }
    for signature in [vectors::ECC_SIGNATURE, vectors::RSA_SIGNATURE] {
        check(signature, &|bytes| Signature::parse(bytes).is_ok());
    }
}

#[test]
fn short_coordinates_are_padded_and_long_ones_refused() {
    // Some TPMs leave leading zeros out.
    let signature = [0, 0x18, 0, 0x0B, 0, 1, 7, 0, 2, 8, 9];
    let Signature::Ecdsa { r, s, .. } = Signature::parse(&signature).unwrap() else {
        panic!("not ECDSA")
    };
    assert_eq!((r[30], r[31], s[30], s[31]), (0, 7, 8, 9));
    let mut long = vec![0, 0x18, 0, 0x0B, 0, 33];
    long.extend_from_slice(&[0; 33]);
    let refused = TpmError::Length {
        what: "r of a signature",
        found: 33,
    };
    assert_eq!(Signature::parse(&long), Err(refused));
}

#[test]
fn selected_pcr_without_value_is_named() {
    let selections = [PcrSelection {
        bank: Algorithm::Sha256,
        pcrs: vec![0, 23],
    }];
    let missing = PcrDigestError {
        bank: Algorithm::Sha256,
        index: 23,
    };
    assert_eq!(pcr_digest(Algorithm::Sha256, &selections, &pcrs()), Err(missing));
    let selections = [PcrSelection {
        bank: Algorithm::Sha384,
        pcrs: vec![1],
    }];
    let missing = PcrDigestError {
        bank: Algorithm::Sha384,
        index: 1,
    };
    assert_eq!(pcr_digest(Algorithm::Sha256, &selections, &pcrs()), Err(missing));
}
