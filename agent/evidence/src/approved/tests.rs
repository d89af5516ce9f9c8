use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};

use super::*;

static SIGNER: LazyLock<ListSigner> = LazyLock::new(signer);
const HOST: Sha256Digest = Sha256Digest::new([0x77; 32]);
const NOW: u64 = 1_800_000_000;

fn signer() -> ListSigner {
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    ListSigner::from_pkcs8(pkcs8.as_ref()).unwrap()
}

fn digest(text: &str) -> Sha256Digest {
    Sha256Digest::of(text.as_bytes())
}

fn draft(serial: u64) -> ListDraft {
    ListDraft {
        policy: "default".into(),
        host: Some(HOST),
        serial,
        issued: NOW,
        expires: None,
        digests: vec![digest("b"), digest("a"), digest("b")],
    }
}

fn verify(text: &str) -> Result<ApprovedList, ListError> {
    UntrustedList::new(text.as_bytes())?.verify(SIGNER.public(), &HOST)
}

fn list(draft: ListDraft) -> ApprovedList {
    verify(&draft.sign(&SIGNER).unwrap()).unwrap()
}

/// A payload of any form, well signed.
fn forged(payload: &str) -> String {
    signed(HEADER, payload.as_bytes())
}

fn signed(header: &str, payload: &[u8]) -> String {
    let text = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
    let signature = SIGNER.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn payload(text: &str) -> String {
    let part = text.split('.').nth(1).unwrap();
    String::from_utf8(URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

#[test]
fn what_was_signed_comes_back_sorted_and_once() {
    let text = draft(7).sign(&SIGNER).unwrap();
    let read = verify(&text).unwrap();
    let mut wanted = [digest("a"), digest("b")];
    wanted.sort_unstable();
    assert_eq!(read.digests(), wanted);
    assert_eq!((read.serial(), read.policy(), read.issued()), (7, "default", NOW));
    assert_eq!(
        read.head(),
        ListHead {
            serial: 7,
            sha256: digest(&text),
            entries: 2
        }
    );
    // As an editor saves it, it is the same list.
    assert_eq!(verify(&format!("{text}\n")).unwrap(), read);
    // For one host, or for all.
    let everybody = ListDraft { host: None, ..draft(8) };
    assert_eq!(list(everybody).serial(), 8);
}

#[test]
fn every_prefix_and_every_changed_byte_is_refused() {
    let text = draft(7).sign(&SIGNER).unwrap();
    for end in 0..text.len() {
        assert!(verify(&text[..end]).is_err(), "{end} bytes");
    }
    for at in 0..text.len() {
        for change in [1, 0x20, 0xFF] {
            let mut changed = text.clone().into_bytes();
            changed[at] ^= change;
            let refused = UntrustedList::new(&changed).unwrap().verify(SIGNER.public(), &HOST);
            assert!(refused.is_err(), "byte {at} changed by {change}");
        }
    }
    for longer in [
        format!("{text}."),
        format!("{text}A"),
        format!("{text}\n\n"),
        format!(".{text}"),
    ] {
        assert!(verify(&longer).is_err(), "{longer}");
    }
}

#[test]
fn another_key_another_host_and_another_content_are_named() {
    let text = draft(7).sign(&signer()).unwrap();
    assert!(matches!(verify(&text), Err(ListError::Signature)));
    let other = ListDraft {
        host: Some(digest("another")),
        ..draft(7)
    };
    let refused = verify(&other.sign(&SIGNER).unwrap()).unwrap_err();
    assert!(
        matches!(refused, ListError::OtherHost { found, own } if found == digest("another") && own == HOST),
        "{refused}"
    );
    let good = draft(7).sign(&SIGNER).unwrap();
    let content = payload(&good).replace("\"serial\":7", "\"serial\":8");
    let [header, _, signature] = good.split('.').collect::<Vec<_>>()[..] else {
        panic!("{good}")
    };
    let changed = format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(content));
    assert!(matches!(verify(&changed), Err(ListError::Signature)));
}

#[test]
fn there_is_one_header() {
    let content = payload(&draft(7).sign(&SIGNER).unwrap());
    for header in [
        r#"{"alg":"none","typ":"assay-approved+jwt"}"#,
        r#"{"alg":"ES256","typ":"JWT"}"#,
        r#"{"typ":"assay-approved+jwt","alg":"ES256"}"#,
        r#"{"alg":"ES256","typ":"assay-approved+jwt","crit":["x"]}"#,
        "",
    ] {
        assert!(
            matches!(verify(&signed(header, content.as_bytes())), Err(ListError::Header)),
            "{header}"
        );
    }
    for form in ["", ".", "..", "a.b", "a.b.c.d", "\n"] {
        assert!(
            matches!(verify(form), Err(ListError::Form | ListError::Header)),
            "{form:?}"
        );
    }
}

#[test]
fn each_fault_of_the_content_has_its_own_error() {
    let good = payload(&draft(7).sign(&SIGNER).unwrap());
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} is not in {good}");
        verify(&forged(&good.replacen(from, to, 1))).unwrap_err()
    };
    assert!(matches!(with("\"version\":1", "\"version\":2"), ListError::Version(2)));
    assert!(matches!(
        with("\"version\":1", "\"version\":1,\"more\":1"),
        ListError::Json(_)
    ));
    assert!(matches!(
        with("\"serial\":7", "\"serial\":7,\"serial\":8"),
        ListError::Json(_)
    ));
    assert!(matches!(with("\"serial\":7", "\"serial\":-7"), ListError::Json(_)));
    assert!(matches!(with("\"default\"", "\"a/b\""), ListError::Policy));
    assert!(matches!(
        with("\"serial\":7", "\"serial\":7,\"expires\":5"),
        ListError::Dates {
            issued: NOW,
            expires: 5
        }
    ));
    let digests = |bytes: &[u8]| {
        let content =
            serde_json::json!({"version": 1, "policy": "p", "serial": 1, "issued": 1, "digests": B64(bytes.into())});
        verify(&forged(&content.to_string())).unwrap_err()
    };
    assert!(matches!(digests(&[1; 33]), ListError::Cut(33)));
    assert!(matches!(digests(&[]), ListError::Empty));
    assert!(matches!(digests(&[1; 64]), ListError::Order(1)));
    let falling = [[1; 32], [3; 32], [2; 32]].concat();
    assert!(matches!(digests(&falling), ListError::Order(2)));
    let too_many: Vec<u8> = (0..=MAX_DIGESTS).flat_map(numbered).collect();
    assert!(matches!(digests(&too_many), ListError::TooMany(_)));
}

/// A digest that sorts by its number.
fn numbered(number: usize) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    bytes
}

#[test]
fn what_no_host_takes_is_not_signed() {
    let refused = |draft: ListDraft| draft.sign(&SIGNER).unwrap_err();
    let with = |digests| ListDraft { digests, ..draft(1) };
    assert!(matches!(refused(with(Vec::new())), ListError::Empty));
    let many = (0..=MAX_DIGESTS)
        .map(|number| Sha256Digest::new(numbered(number)))
        .collect();
    assert!(matches!(refused(with(many)), ListError::TooMany(_)));
    assert!(matches!(
        refused(ListDraft {
            policy: String::new(),
            ..draft(1)
        }),
        ListError::Policy
    ));
    assert!(matches!(
        refused(ListDraft {
            expires: Some(NOW - 1),
            ..draft(1)
        }),
        ListError::Dates { .. }
    ));
}

#[test]
fn the_longest_list_fits_and_a_longer_one_is_not_read() {
    let longest = ListDraft {
        policy: "p".repeat(policy::MAX_NAME),
        serial: u64::MAX,
        issued: u64::MAX,
        expires: Some(u64::MAX),
        digests: (0..MAX_DIGESTS)
            .map(|number| Sha256Digest::new(numbered(number)))
            .collect(),
        ..draft(1)
    };
    let text = longest.sign(&SIGNER).unwrap();
    assert!(text.len() < MAX_LIST, "{}", text.len());
    assert_eq!(verify(&text).unwrap().digests().len(), MAX_DIGESTS);
    let too_long = vec![b'.'; MAX_LIST + 1];
    assert!(matches!(UntrustedList::new(&too_long), Err(ListError::TooLong(_))));
}

#[test]
fn lists_only_go_up() {
    let (held, next) = (list(draft(7)), list(draft(8)));
    assert!(held.replaces(None, NOW).unwrap());
    assert!(next.replaces(Some(&held), NOW).unwrap());
    assert!(matches!(
        held.replaces(Some(&next), NOW),
        Err(ListError::Rollback { held: 8, found: 7 })
    ));
    // The same content signed again is another text, and no other list.
    let again = list(draft(7));
    assert_ne!(again.sha256(), held.sha256());
    assert!(!again.replaces(Some(&held), NOW).unwrap());
    let mut other = draft(7);
    other.digests.push(digest("c"));
    assert!(matches!(
        list(other).replaces(Some(&held), NOW),
        Err(ListError::SameSerial(7))
    ));
}

#[test]
fn an_expired_list_is_not_taken_over() {
    let short = list(ListDraft {
        expires: Some(NOW + 10),
        ..draft(7)
    });
    assert!(short.replaces(None, NOW + 10).unwrap());
    assert!(matches!(
        short.replaces(None, NOW + 11),
        Err(ListError::Expired { expires, now }) if expires == NOW + 10 && now == NOW + 11
    ));
    // Who holds it, holds it.
    assert!(!short.replaces(Some(&short), NOW + 11).unwrap());
}

#[test]
fn keys_have_one_form() {
    let spki = SIGNER.public().spki();
    assert_eq!(ListKey::from_spki(&spki).unwrap(), *SIGNER.public());
    assert_eq!(SIGNER.public().spki_sha256(), Sha256Digest::of(&spki));
    for end in 0..spki.len() {
        assert_eq!(ListKey::from_spki(&spki[..end]), Err(ListKeyError::Public), "{end}");
    }
    let longer = [spki.as_slice(), &[0]].concat();
    assert_eq!(ListKey::from_spki(&longer), Err(ListKeyError::Public));
    let mut compressed = spki;
    compressed[26] = 2;
    assert_eq!(ListKey::from_spki(&compressed), Err(ListKeyError::Public));
    assert_eq!(ListSigner::from_pkcs8(b"key").err(), Some(ListKeyError::Private));
}

/// RFC 7515 appendix A.3: the key's and the signature's form are everybody's.
#[test]
fn the_rfcs_signature_verifies() {
    let part = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let spki = [
        hex::decode("3059301306072a8648ce3d020106082a8648ce3d03010703420004").unwrap(),
        part("f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"),
        part("x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"),
    ]
    .concat();
    let message = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290\
                   Ijp0cnVlfQ";
    let signature = part("DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q");
    let key = ListKey::from_spki(&spki).unwrap();
    assert!(key.verifies(message.as_bytes(), &signature));
    assert!(!key.verifies(b"another", &signature));
}
