//! The endorsement key: which one it is, where it comes from, and what of its certificate is shown.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect by panicking"
)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use assay_agent::tpm::{AkKind, EkKind, Handle};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::ek::{ChainError, EkError, EkTrust, TrustedEk};
use assay_evidence::tpm::{Parameters, Public};
use assay_evidence::wire::{B64, Identity};
use assay_tests::Swtpm;
use assay_tests::proxy::TpmProxy;
use common::{open, open_keys};

const EKS: [EkKind; 2] = [EkKind::Rsa2048, EkKind::EccP256];
/// `TPM2_CC_CreatePrimary`.
const CC_CREATE_PRIMARY: u32 = 0x131;

fn open_ek(swtpm: &Swtpm, ek: EkKind) -> Handle {
    open_keys(swtpm.tcti(), AkKind::EcdsaP256, Some(ek))
}

/// Runs one of the tpm2-tools in the TPM's folder.
fn tpm2(swtpm: &Swtpm, arguments: &[&str]) {
    let output = Command::new("tpm2")
        .args(arguments)
        .env("TPM2TOOLS_TCTI", swtpm.tcti())
        .current_dir(swtpm.dir())
        .output()
        .expect("run tpm2");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    // No resource manager stands before this TPM.
    if arguments[0] != "flushcontext" {
        tpm2(swtpm, &["flushcontext", "-t"]);
    }
}

/// The TPMT_PUBLIC of the endorsement key that tpm2-tools make, with these options.
fn made_by_tools(swtpm: &Swtpm, kind: EkKind, options: &[&str]) -> Vec<u8> {
    let algorithm = match kind {
        EkKind::Rsa2048 => "rsa",
        EkKind::EccP256 => "ecc",
    };
    let mut arguments = vec!["createek", "-G", algorithm, "-u", "ek.pub"];
    arguments.extend(options);
    tpm2(swtpm, &arguments);
    std::fs::read(swtpm.dir().join("ek.pub")).unwrap().split_off(2)
}

/// The TPMT_PUBLIC of the primary key that tpm2-tools make from a template with this nonce. (`tpm2_createek -t` of version 5.4 takes other
/// bytes from its memory for the nonce.)
fn made_from(swtpm: &Swtpm, kind: EkKind, template: &[u8], nonce: &[u8]) -> Vec<u8> {
    let put = |name: &str, bytes: &[u8]| std::fs::write(swtpm.dir().join(name), bytes).unwrap();
    // A TPMT_PUBLIC begins with type, name algorithm, attributes and the policy, and ends with the unique field.
    put("policy", &template[10..42]);
    let with_nonce = |field: &[u8]| [nonce, &field[nonce.len()..]].concat();
    let algorithm = match kind {
        EkKind::Rsa2048 => {
            // The tool's file: the size as the processor writes it, and the field.
            put(
                "unique",
                &[&[0, 1], &with_nonce(&template[template.len() - 256..])[..]].concat(),
            );
            "rsa2048:aes128cfb"
        }
        EkKind::EccP256 => {
            // Both coordinates with their sizes, each in 130 bytes.
            let (x, y) = template[template.len() - 66..].split_at(32);
            let field = |coordinate: &[u8]| [&[32, 0], coordinate, &[0; 96]].concat();
            put("unique", &[field(&with_nonce(x)), field(&y[2..])].concat());
            "ecc256:aes128cfb"
        }
    };
    let attributes = "fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|noda|restricted|decrypt";
    let what = [
        "createprimary",
        "-Q",
        "-C",
        "e",
        "-g",
        "sha256",
        "-G",
        algorithm,
        "-a",
        attributes,
    ];
    let from = ["-L", "policy", "-u", "unique", "-c", "made.ctx"];
    tpm2(swtpm, &[&what[..], &from].concat());
    tpm2(swtpm, &["readpublic", "-Q", "-c", "made.ctx", "-o", "made.pub"]);
    std::fs::read(swtpm.dir().join("made.pub")).unwrap().split_off(2)
}

/// Checks what the agent shows as a verifier does that trusts these certificates.
fn check(tpm: &Handle, trusted: &[&Path]) -> Result<TrustedEk, EkError> {
    let anchors = trusted
        .iter()
        .flat_map(|path| EkTrust::read_ca_file(&std::fs::read(path).unwrap()).unwrap());
    let shown = tpm.identity();
    let identity = Identity {
        version: 1,
        agent_version: "test".into(),
        boot_id: common::BOOT.into(),
        ek_public: B64(shown.ek_public.clone()),
        ek_certificate: shown.ek_certificate.clone().map(B64),
        ak_public: B64(shown.ak_public.clone()),
        tpm_manufacturer: shown.manufacturer.clone(),
        tpm_firmware: shown.firmware.clone(),
        approved: None,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    EkTrust::Roots(anchors.collect()).check(&identity, now.try_into().unwrap())
}

#[test]
fn tpm_the_endorsement_key_with_a_certificate_is_shown_and_rsa_first() {
    let without = Swtpm::start().unwrap();
    let tpm = open(without.tcti());
    assert_eq!(
        (tpm.identity().ek_kind, &tpm.identity().ek_certificate),
        (EkKind::Rsa2048, &None)
    );

    let rsa = Swtpm::start_with_ek_certificate().unwrap();
    let ecc = Swtpm::start_with_ecc_ek_certificate().unwrap();
    for (swtpm, kind) in [(&rsa, EkKind::Rsa2048), (&ecc, EkKind::EccP256)] {
        let tpm = open(swtpm.tcti());
        assert_eq!(tpm.identity().ek_kind, kind);
        let trusted = check(&tpm, &[&swtpm.ca_certificates()[1]]).unwrap();
        let is_rsa = matches!(trusted.public().parameters(), Parameters::Rsa { .. });
        assert_eq!(is_rsa, kind == EkKind::Rsa2048);
    }
    // With both, RSA is shown; the operator's word goes before that.
    let certificate = open(ecc.tcti()).identity().ek_certificate.clone().unwrap();
    rsa.store(0x01c0_000a, &certificate).unwrap();
    assert_eq!(open(rsa.tcti()).identity().ek_kind, EkKind::Rsa2048);
    let other = open_ek(&rsa, EkKind::EccP256);
    assert_eq!(other.identity().ek_kind, EkKind::EccP256);
    // It was certified for another TPM.
    assert!(matches!(
        check(&other, &[&ecc.ca_certificates()[1]]),
        Err(EkError::KeyMismatch(_))
    ));
    // The kind without certificate is one without certificate, whatever the other has.
    let other = open_ek(&ecc, EkKind::Rsa2048);
    assert!(other.identity().ek_certificate.is_none());
    assert!(matches!(check(&other, &[]), Err(EkError::NoAnchors)));
}

#[test]
fn tpm_endorsement_keys_are_those_that_others_make() {
    for kind in EKS {
        let swtpm = Swtpm::start().unwrap();
        let ours = open_ek(&swtpm, kind).identity().ek_public.clone();
        assert_eq!(ours, made_by_tools(&swtpm, kind, &["-c", "ek.ctx"]), "{kind}");
        let public = Public::parse(&ours).unwrap();
        assert_eq!(public.attributes().0, 0x0003_00b2, "{kind}");
    }
}

#[test]
fn tpm_a_persistent_endorsement_key_is_used_if_it_is_the_right_one() {
    for (kind, handle) in [(EkKind::Rsa2048, "0x81010001"), (EkKind::EccP256, "0x81010002")] {
        let swtpm = Swtpm::start().unwrap();
        let right = made_by_tools(&swtpm, kind, &["-c", handle]);
        drop(open_ek(&swtpm, kind));
        let proxy = TpmProxy::start(&swtpm).unwrap();
        let tpm = open_keys(proxy.tcti(), AkKind::EcdsaP256, Some(kind));
        assert_eq!(tpm.identity().ek_public, right, "{kind}");
        assert_eq!(proxy.count(CC_CREATE_PRIMARY), 0, "{kind}: both keys are there already");
        drop((tpm, proxy));

        // Somebody's storage key is not it: the endorsement key is made, and the handle left alone.
        tpm2(&swtpm, &["evictcontrol", "-Q", "-C", "o", "-c", handle]);
        tpm2(
            &swtpm,
            &["createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "key.ctx"],
        );
        tpm2(&swtpm, &["evictcontrol", "-Q", "-C", "o", "-c", "key.ctx", handle]);
        assert_eq!(open_ek(&swtpm, kind).identity().ek_public, right, "{kind}");
        tpm2(&swtpm, &["readpublic", "-Q", "-c", handle]);
    }
}

#[test]
fn tpm_a_makers_own_template_and_nonce_are_followed() {
    // Where the certificate is; the nonce and the template are the next two.
    for (kind, certificate) in [(EkKind::Rsa2048, 0x01c0_0002), (EkKind::EccP256, 0x01c0_000a)] {
        let swtpm = Swtpm::start().unwrap();
        let standard = open_ek(&swtpm, kind).identity().ek_public.clone();
        // The key's own public area as its template: another unique field. And without dictionary attack protection.
        let mut template = standard.clone();
        template[6] |= 0x04;
        swtpm.store(certificate + 2, &template).unwrap();
        let with_template = open_ek(&swtpm, kind).identity().ek_public.clone();
        assert_ne!(with_template, standard, "{kind}");
        assert_eq!(
            Public::parse(&with_template).unwrap().attributes().0,
            0x0003_04b2,
            "{kind}"
        );

        swtpm.store(certificate + 1, b"a nonce of the maker").unwrap();
        let with_both = open_ek(&swtpm, kind).identity().ek_public.clone();
        assert_ne!(with_both, with_template, "{kind}");
        assert_eq!(
            with_both,
            made_from(&swtpm, kind, &template, b"a nonce of the maker"),
            "{kind}"
        );
    }
}

#[test]
fn tpm_a_template_that_is_none_changes_nothing() {
    for (kind, certificate) in [(EkKind::Rsa2048, 0x01c0_0002), (EkKind::EccP256, 0x01c0_000a)] {
        let swtpm = Swtpm::start().unwrap();
        let standard = open_ek(&swtpm, kind).identity().ek_public.clone();
        // Of the other kind, and too long a nonce: neither can be for this key.
        let other = EKS.into_iter().find(|other| *other != kind).unwrap();
        let template = open_ek(&swtpm, other).identity().ek_public.clone();
        swtpm.store(certificate + 2, &template).unwrap();
        swtpm.store(certificate + 1, &[1; 257]).unwrap();
        assert_eq!(open_ek(&swtpm, kind).identity().ek_public, standard, "{kind}");
    }
}

#[test]
fn tpm_certificates_between_the_keys_and_the_makers_root_come_along() {
    let swtpm = Swtpm::start_with_ecc_ek_certificate().unwrap();
    let [root, issuer] = <[_; 2]>::try_from(swtpm.ca_certificates()).unwrap();
    let refused = check(&open(swtpm.tcti()), &[&root]);
    assert!(matches!(refused, Err(EkError::Chain(ChainError::NoAnchor { .. }))));

    // The maker stores the issuer's on the chip as well, behind one that belongs to something else, in two parts.
    let other = Swtpm::start_with_ecc_ek_certificate().unwrap();
    let der = |path: &Path| EkTrust::read_ca_file(&std::fs::read(path).unwrap()).unwrap().remove(0);
    let stored = [der(&other.ca_certificates()[0]), der(&issuer)].concat();
    let (first, second) = stored.split_at(1000);
    swtpm.store(0x01c0_0100, first).unwrap();
    swtpm.store(0x01c0_0101, second).unwrap();
    let tpm = open(swtpm.tcti());
    let trusted = check(&tpm, &[&root]).unwrap();
    assert_eq!(trusted.sha256(), Sha256Digest::of(&tpm.identity().ek_public));
    let sent = tpm.identity().ek_certificate.clone().unwrap();
    assert!(sent.ends_with(&der(&issuer)));
}
