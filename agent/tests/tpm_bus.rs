//! Somebody listens on the TPM's bus: what may not be heard there.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect by panicking"
)]

mod common;

use std::process::Command;
use std::time::Duration;

use assay_agent::tpm::{AkKind, EkKind};
use assay_evidence::credential::make_credential;
use assay_evidence::jwe;
use assay_evidence::tpm::{Parameters, Public};
use assay_tests::Swtpm;
use assay_tests::proxy::TpmProxy;
use common::{ak, open_keys, open_with};
use ring::rand::{SecureRandom as _, SystemRandom};

/// The listener hears what is said in clear: a random number that a stock tool has the TPM make.
#[test]
fn tpm_bus_in_clear_is_heard() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    proxy.listen();
    let output = Command::new("tpm2")
        .args(["getrandom", "--hex", "32"])
        .env("TPM2TOOLS_TCTI", proxy.tcti())
        .output()
        .expect("run tpm2 (tpm2-tools)");
    let random = hex::decode(String::from_utf8(output.stdout).unwrap().trim()).unwrap();
    assert_eq!(random.len(), 32);
    assert!(proxy.heard(&random));
    assert!(!proxy.heard(&[0x5E; 32]));
}

#[tokio::test]
async fn tpm_bus_does_not_hear_the_secret_of_a_credential() {
    for (kind, ek_kind) in [(AkKind::EcdsaP256, EkKind::Rsa2048), (AkKind::Rsa2048, EkKind::EccP256)] {
        let swtpm = Swtpm::start().unwrap();
        let proxy = TpmProxy::start(&swtpm).unwrap();
        let tpm = open_keys(proxy.tcti(), kind, Some(ek_kind));
        proxy.listen();
        let ek = Public::parse(&tpm.identity().ek_public).unwrap();
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).unwrap();
        let credential = make_credential(&ek, ak(&tpm).name(), &secret).unwrap();
        let opened = tpm.activate(credential.blob, credential.encrypted_secret.clone()).await;
        assert_eq!(**opened.unwrap(), secret);
        // This command was listened to: of its parameters the first alone is encrypted.
        assert!(proxy.heard(&credential.encrypted_secret), "{kind} {ek_kind}");
        assert!(!proxy.heard(&secret) && !proxy.heard(&secret[..8]), "{kind} {ek_kind}");
    }
}

#[tokio::test]
async fn tpm_bus_does_not_hear_what_opens_a_disk_key() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let tpm = open_with(proxy.tcti(), AkKind::EcdsaP256);
    proxy.listen();
    let key = tpm.release_begin().await.unwrap();
    let public = Public::parse(key.public()).unwrap();
    let Parameters::P256 { point, .. } = public.parameters() else {
        panic!("{public:?}")
    };
    let wrapped = jwe::wrap(point, "a key", b"the passphrase of a disk").unwrap();
    let (shared, key) = tokio::task::spawn_blocking(move || {
        let mut shared = Vec::new();
        let plain = jwe::unwrap(&wrapped, |epk| {
            let z = key.ecdh_blocking(epk.x, epk.y).map(|z| *z)?;
            shared = z.to_vec();
            Ok::<_, assay_agent::tpm::TpmError>(z)
        });
        assert_eq!(&**plain.unwrap(), b"the passphrase of a disk");
        (shared, key)
    })
    .await
    .unwrap();
    // The key's public half crosses when it is made: this was listened to.
    assert!(proxy.heard(&point.x));
    assert_eq!(shared.len(), 32);
    assert!(!proxy.heard(&shared) && !proxy.heard(&shared[..8]));
    assert!(!proxy.heard(b"the passphrase"));
    drop(key);
    tpm.end(Duration::from_secs(20));
}
