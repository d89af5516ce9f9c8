//! A TPM's opinion on what this crate computes: a credential made in software opens in the TPM that it was made for, and
//! the TPM's own EK certificate is traced to its maker. Needs swtpm and tpm2-tools.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use assay_evidence::credential::{Credential, make_credential};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::ek::{ChainError, EkError, EkTrust, TrustedEk};
use assay_evidence::tpm::{Name, Public};
use assay_evidence::wire::{B64, Identity};
use assay_tests::Swtpm;

/// The TPM's NV index of the RSA-2048 EK certificate (TCG EK Credential Profile §2.2.1.4).
const EK_CERTIFICATE: &str = "0x01c00002";

/// Runs one of the tpm2-tools in the TPM's folder; on failure, what it printed.
fn try_tool(tpm: &Swtpm, tool: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(tool)
        .args(arguments)
        .env("TPM2TOOLS_TCTI", tpm.tcti())
        .current_dir(tpm.dir())
        .output()
        .unwrap_or_else(|error| panic!("cannot start {tool}: {error}"));
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn tool(tpm: &Swtpm, tool: &str, arguments: &[&str]) {
    try_tool(tpm, tool, arguments).unwrap_or_else(|error| panic!("{tool}: {error}"));
}

/// Frees the slots of loaded keys: no resource manager stands before this TPM.
fn flush(tpm: &Swtpm) {
    tool(tpm, "tpm2_flushcontext", &["-t"]);
}

fn file(tpm: &Swtpm, name: &str) -> Vec<u8> {
    std::fs::read(tpm.dir().join(name)).unwrap()
}

/// Without the TPM2B's size in front.
fn unsized_file(tpm: &Swtpm, name: &str) -> Vec<u8> {
    file(tpm, name).split_off(2)
}

fn identity(tpm: &Swtpm, certificate: Option<Vec<u8>>) -> Identity {
    Identity {
        version: 1,
        agent_version: "test".into(),
        boot_id: "6b1f0e2a-93c4-4d5e-8f70-0123456789ab".into(),
        ek_public: B64(unsized_file(tpm, "ek.pub")),
        ek_certificate: certificate.map(B64),
        ak_public: B64(unsized_file(tpm, "ak.pub")),
        tpm_manufacturer: "IBM".into(),
        tpm_firmware: "1".into(),
        approved: None,
    }
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
        .try_into()
        .unwrap()
}

/// Makes EK and AK in the TPM, and says what they are.
fn keys(tpm: &Swtpm, ek_type: &str) -> (TrustedEk, Name) {
    tool(tpm, "tpm2_createek", &["-G", ek_type, "-c", "ek.ctx", "-u", "ek.pub"]);
    let ak = [
        "-C", "ek.ctx", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-c", "ak.ctx", "-u", "ak.pub", "-n", "ak.name",
    ];
    flush(tpm);
    tool(tpm, "tpm2_createak", &ak);
    flush(tpm);
    let identity = identity(tpm, None);
    let trust = EkTrust::PinnedSha256(Sha256Digest::of(identity.ek_public.as_ref()));
    let name = Public::parse(identity.ak_public.as_ref()).unwrap().name();
    assert_eq!(name.as_bytes(), file(tpm, "ak.name"));
    (trust.check(&identity, now()).unwrap(), name)
}

/// Has the TPM open a credential, as the agent does.
fn activate(tpm: &Swtpm, credential: &Credential) -> Result<Vec<u8>, String> {
    // The tool's file: a magic number, a version, then both structures.
    let mut blob = vec![0xBA, 0xDC, 0xC0, 0xDE, 0, 0, 0, 1];
    blob.extend_from_slice(&credential.blob);
    blob.extend_from_slice(&credential.encrypted_secret);
    std::fs::write(tpm.dir().join("credential"), blob).unwrap();
    tool(tpm, "tpm2_startauthsession", &["--policy-session", "-S", "session"]);
    tool(tpm, "tpm2_policysecret", &["-S", "session", "-c", "e"]);
    let arguments = [
        "-c",
        "ak.ctx",
        "-C",
        "ek.ctx",
        "-i",
        "credential",
        "-o",
        "secret",
        "-P",
        "session:session",
    ];
    let opened = try_tool(tpm, "tpm2_activatecredential", &arguments);
    tool(tpm, "tpm2_flushcontext", &["session"]);
    flush(tpm);
    opened.map(|()| file(tpm, "secret"))
}

#[test]
fn the_tpm_opens_a_credential_for_its_own_keys() {
    for ek_type in ["rsa", "ecc"] {
        let tpm = Swtpm::start().unwrap();
        let (ek, ak) = keys(&tpm, ek_type);
        for secret in [[0x5A; 32].as_slice(), b"short"] {
            let credential = make_credential(ek.public(), &ak, secret).unwrap();
            assert_eq!(activate(&tpm, &credential).unwrap(), secret, "{ek_type}");
        }
    }
}

#[test]
fn the_tpm_refuses_a_credential_for_another_key_or_changed() {
    let tpm = Swtpm::start().unwrap();
    let (ek, ak) = keys(&tpm, "rsa");
    let other = Name::new(assay_evidence::digest::Algorithm::Sha256, b"another key");
    let for_another = activate(&tpm, &make_credential(ek.public(), &other, &[1; 32]).unwrap()).unwrap_err();
    assert!(for_another.contains("integrity check failed"), "{for_another}");
    let mut changed = make_credential(ek.public(), &ak, &[1; 32]).unwrap();
    *changed.blob.last_mut().unwrap() ^= 1;
    let refused = activate(&tpm, &changed).unwrap_err();
    assert!(refused.contains("integrity check failed"), "{refused}");
}

#[test]
fn the_tpms_certificate_leads_to_its_maker() {
    let tpm = Swtpm::start_with_ek_certificate().unwrap();
    keys(&tpm, "rsa");
    tool(&tpm, "tpm2_nvread", &["-C", "o", "-o", "ek.der", EK_CERTIFICATE]);
    let certificate = file(&tpm, "ek.der");
    let read = |path: &Path| EkTrust::read_ca_file(&std::fs::read(path).unwrap()).unwrap();
    let [root, issuer] = <[_; 2]>::try_from(tpm.ca_certificates()).unwrap();
    let (root, issuer) = (read(&root), read(&issuer));
    let check = |roots: &[Vec<u8>], certificate: &[u8], now: i64| {
        EkTrust::Roots(roots.to_vec()).check(&identity(&tpm, Some(certificate.to_vec())), now)
    };
    // Whatever of the maker's chain the operator configures, and whether the TPM carries the rest.
    assert!(check(&[root.clone(), issuer.clone()].concat(), &certificate, now()).is_ok());
    assert!(check(&issuer, &certificate, now()).is_ok());
    assert!(check(&root, &[certificate.clone(), issuer[0].clone()].concat(), now()).is_ok());
    assert!(matches!(
        check(&root, &certificate, now()),
        Err(EkError::Chain(ChainError::NoAnchor { .. }))
    ));
    let before_its_time = check(&issuer, &certificate, 0);
    assert!(matches!(
        before_its_time,
        Err(EkError::Chain(ChainError::Validity { .. }))
    ));
    // Each byte of the signature counts.
    let mut changed = certificate.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert!(matches!(
        check(&issuer, &changed, now()),
        Err(EkError::Chain(ChainError::Signature { .. }))
    ));

    let other = Swtpm::start_with_ek_certificate().unwrap();
    let [other_root, other_issuer] = <[_; 2]>::try_from(other.ca_certificates()).unwrap();
    let foreign = [read(&other_root), read(&other_issuer)].concat();
    assert!(check(&foreign, &certificate, now()).is_err());
    tool(&other, "tpm2_nvread", &["-C", "o", "-o", "ek.der", EK_CERTIFICATE]);
    let swapped = check(&foreign, &file(&other, "ek.der"), now());
    assert!(matches!(swapped, Err(EkError::KeyMismatch(_))));
}
