use std::sync::LazyLock;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::json;

use super::*;
use crate::digest::Sha256Digest;
use crate::event::{Event, LoadKind, Violation};
use crate::jws::JwsError;
use crate::policy::Policy;
use crate::testing::{BOOT, Host, NOW, load, measurement, replayed};

static SIGNER: LazyLock<Signer> = LazyLock::new(|| {
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    Signer::from_pkcs8(pkcs8.as_ref()).unwrap()
});

/// Judged by what a clean host shows, after these events.
fn judged(events: &[Event]) -> Submod {
    let mut host = Host::measuring();
    let policy = Policy::capture("default", "host", &replayed(&host)).unwrap();
    if !events.is_empty() {
        host.record(events);
    }
    Submod::appraised(&replayed(&host).appraise(&policy, NOW))
}

fn issue(nonce: Option<&Nonce>) -> Issue<'_> {
    Issue {
        host: "dom0-1",
        build: "assay-verifier 1.2.3",
        issued: 1000,
        expires: 1060,
        nonce,
    }
}

fn claims(submod: &Submod) -> Value {
    serde_json::to_value(submod.result(&issue(None))).unwrap()
}

#[test]
fn a_trusted_host_is_affirmed_in_all_that_is_known_of_it() {
    let found = claims(&judged(&[]));
    let mut submod = found["submods"]["dom0-1"].clone();
    let details = submod["assay_verdict"].take();
    assert_eq!(
        submod,
        json!({
            "ear_status": "affirming",
            "ear_trustworthiness_vector":
                {"instance-identity": 2, "configuration": 2, "executables": 2, "hardware": 2},
            "ear_appraisal_policy_ids": ["default"],
            "assay_verdict": null,
        })
    );
    assert_eq!(
        (&details["basis"], &details["host"]["boot_id"], &details["host"]["mode"]),
        (&json!("appraisal"), &json!(BOOT), &json!("observe"))
    );
    assert!(
        details.get("failures").is_none() && details["notes"].is_array(),
        "{details}"
    );
    let whole = json!({
        "eat_profile": "tag:ietf.org,2026:rats/ear#04",
        "iat": 1000,
        "exp": 1060,
        "ear_verifier_id": {"developer": "Assay", "build": "assay-verifier 1.2.3"},
        "ear_status": "affirming",
        "submods": found["submods"],
    });
    assert_eq!(found, whole);
}

#[test]
fn a_refusal_names_its_cause_in_both_languages() {
    let mut rogue = measurement(LoadKind::Program, "/root/\u{202e}rogue\n", Some(2));
    rogue.digest = Some(Sha256Digest::of(b"rogue"));
    let found = claims(&judged(&[Event::Load(rogue)]));
    assert_eq!(found["ear_status"], "contraindicated", "though the vector only warns");
    let submod = &found["submods"]["dom0-1"];
    assert_eq!(submod["ear_trustworthiness_vector"]["executables"], 33);
    assert_eq!(submod["ear_trustworthiness_vector"]["hardware"], 2);
    let [failure] = submod["assay_verdict"]["failures"].as_array().unwrap().as_slice() else {
        panic!("{submod:#}")
    };
    let named = ["rule", "record", "kind", "path", "digest"].map(|name| failure[name].clone());
    let wanted = [
        json!("not-approved"),
        json!(3),
        json!("program"),
        json!("/root/\u{202e}rogue\n"),
        json!(Sha256Digest::of(b"rogue")),
    ];
    assert_eq!(named, wanted);
    let text = failure["text"].as_str().unwrap();
    assert!(
        text.contains("rogue") && !text.contains('\n') && !text.contains('\u{202e}'),
        "{text}"
    );
}

#[test]
fn the_worst_of_several_counts() {
    let attempt = measurement(LoadKind::AttemptTpm, "/dev/tpm0", Some(3));
    let submod = judged(&[load("/root/rogue", 2), Event::Load(attempt)]);
    let found = claims(&submod);
    let vector = &found["submods"]["dom0-1"]["ear_trustworthiness_vector"];
    assert_eq!(vector["executables"], 96, "{found:#}");
    assert_eq!(submod.status(), Tier::Contraindicated);
    let lost = judged(&[Event::Violation(Violation::Lost { count: 3 })]);
    assert_eq!(
        claims(&lost)["submods"]["dom0-1"]["ear_trustworthiness_vector"]["executables"],
        33
    );
}

#[test]
fn a_host_without_appraisal_is_never_affirmed() {
    let reasons = vec!["why".to_owned()];
    for (submod, status, identity, basis) in [
        (Submod::no_policy(reasons.clone()), "none", 2, "no-policy"),
        (Submod::no_evidence(reasons.clone()), "none", 0, "no-evidence"),
        (
            Submod::bad_evidence(reasons.clone()),
            "contraindicated",
            99,
            "bad-evidence",
        ),
    ] {
        let found = claims(&submod);
        let told = &found["submods"]["dom0-1"];
        assert_eq!(found["ear_status"], status);
        assert_eq!(told["ear_status"], status);
        assert_eq!(told["ear_trustworthiness_vector"]["instance-identity"], identity);
        assert_eq!(told["assay_verdict"], json!({"basis": basis, "reasons": ["why"]}));
        assert!(
            told.get("ear_appraisal_policy_ids").is_none(),
            "a list must not be empty"
        );
    }
    let many = Submod::no_evidence(vec![String::new(); MAX_FAILURES + 1]);
    assert_eq!(many.assay_verdict.reasons.len(), MAX_FAILURES);
}

#[test]
fn failures_beyond_the_limit_are_counted_and_still_weigh() {
    let more = 5;
    let count = MAX_FAILURES + more;
    let mut events: Vec<_> = (0..count)
        .map(|number| {
            let mut program = measurement(LoadKind::Program, &format!("/{number}"), Some(2 + number as u64));
            program.digest = Some(Sha256Digest::of(&number.to_be_bytes()));
            Event::Load(program)
        })
        .collect();
    events.push(Event::Load(measurement(
        LoadKind::AttemptTpm,
        "/dev/tpm0",
        Some(2 + count as u64),
    )));
    let submod = judged(&events);
    assert_eq!(submod.assay_verdict.failures.len(), MAX_FAILURES);
    assert_eq!(submod.assay_verdict.failures_left_out, more + 1);
    let found = claims(&submod);
    assert_eq!(
        found["submods"]["dom0-1"]["ear_trustworthiness_vector"]["executables"],
        96
    );
}

#[test]
fn what_is_kept_comes_back_as_it_was() {
    for submod in [
        judged(&[]),
        judged(&[load("/root/rogue", 2)]),
        Submod::no_policy(vec!["why".into()]),
        Submod::bad_evidence(Vec::new()),
    ] {
        let kept = serde_json::to_string(&submod).unwrap();
        assert_eq!(serde_json::from_str::<Submod>(&kept).unwrap(), submod);
    }
}

#[test]
fn a_signed_result_is_its_keys_and_no_byte_of_it_can_be_changed() {
    let nonce = Nonce::parse("AAECAwQFBgc").unwrap();
    let text = judged(&[]).result(&issue(Some(&nonce))).sign(&SIGNER).unwrap();
    let header = header(SIGNER.public());
    let payload = jws::verify(text.as_bytes(), &header, SIGNER.public()).unwrap();
    let found: Value = serde_json::from_slice(&payload).unwrap();
    assert_eq!(found["eat_nonce"], "AAECAwQFBgc");
    for at in 0..text.len() {
        let mut changed = text.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        assert!(jws::verify(&changed, &header, SIGNER.public()).is_err(), "byte {at}");
        assert!(
            jws::verify(&text.as_bytes()[..at], &header, SIGNER.public()).is_err(),
            "{at} bytes"
        );
    }
    // What the key signed for another purpose is no result, and the other way round.
    let other = jws::sign(r#"{"alg":"ES256","typ":"assay-approved+jwt"}"#, &payload, &SIGNER).unwrap();
    assert_eq!(
        jws::verify(other.as_bytes(), &header, SIGNER.public()),
        Err(JwsError::Header)
    );
}

#[test]
fn nonces_have_8_to_64_bytes() {
    let text = |bytes: usize| URL_SAFE_NO_PAD.encode(vec![0xFB; bytes]);
    for bytes in [8, 9, 32, 64] {
        assert!(Nonce::parse(&text(bytes)).is_ok(), "{bytes}");
    }
    for bytes in [0, 1, 7, 65, 100, 1 << 20] {
        assert_eq!(Nonce::parse(&text(bytes)), Err(NonceError::Length(bytes)), "{bytes}");
    }
    // Padding, the other alphabet, escapes, and a second spelling of the same bytes.
    for wrong in [
        "AAECAwQFBgc=",
        "+/ECAwQFBgc",
        "AAECAwQFBg%3D",
        "AAECAwQFBgd",
        "AAECAwQF Bgc",
    ] {
        assert_eq!(Nonce::parse(wrong), Err(NonceError::Encoding), "{wrong}");
    }
}

#[test]
fn the_keys_thumbprint_is_that_of_the_standard() {
    // The point of RFC 7517 appendix A.1; the thumbprint by an independent program.
    let x = "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4";
    let y = "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM";
    let point = [x, y].map(|part| URL_SAFE_NO_PAD.decode(part).unwrap()).concat();
    let spki = hex::decode("3059301306072a8648ce3d020106082a8648ce3d03010703420004").unwrap();
    let key = Key::from_spki(&[spki, point].concat()).unwrap();
    assert_eq!(
        key.jwk(),
        format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#)
    );
    assert_eq!(key.thumbprint(), "cn-I_WNMClehiVp51i_0VpOENW1upEerA8sEam5hn-s");
}
