//! The TPM layer against a real TPM: keys, quotes, credentials, release keys, and TPMs that misbehave.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect by panicking"
)]

mod common;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use assay_agent::log_view::LogView;
use assay_agent::tpm::{AkKind, EkKind, Handle, TpmConfig, TpmError};
use assay_evidence::binding::{Binding, Exporter, Nonce};
use assay_evidence::credential::make_credential;
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::replay::HeldLog;
use assay_evidence::tpm::{Attest, EccPoint, Name, Parameters, Public, Signature};
use assay_evidence::wire::{B64, ReleaseKey};
use assay_evidence::{jwe, release};
use assay_tests::Swtpm;
use assay_tests::proxy::{CC_QUOTE, TpmProxy};
use common::{AK_HANDLE, EXPORTER, NONCE, Queue, Running, ak, open, open_for, open_keys, open_with, settings};

const KINDS: [AkKind; 2] = [AkKind::EcdsaP256, AkKind::Rsa2048];

fn tpm2(tcti: &str, arguments: &[&str]) -> Output {
    let output = Command::new("tpm2")
        .args(arguments)
        .env("TPM2TOOLS_TCTI", tcti)
        .output()
        .expect("run tpm2");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn point(public: &[u8]) -> EccPoint {
    match Public::parse(public).unwrap().parameters() {
        Parameters::P256 { point, .. } => *point,
        other => panic!("{other:?}"),
    }
}

fn extend(tpm: &Handle, what: &[u8]) -> Result<(), TpmError> {
    let banks = &tpm.identity().banks;
    tpm.extend_blocking(banks.iter().map(|bank| (*bank, bank.hash(what))).collect(), None)
}

#[tokio::test]
async fn tpm_quotes_are_signed_by_the_attestation_key_over_the_bytes_given() {
    for kind in KINDS {
        let swtpm = Swtpm::start().unwrap();
        quotes_are_signed(&open_with(swtpm.tcti(), kind)).await;
    }
}

async fn quotes_are_signed(tpm: &Handle) {
    let quote = tpm.quote(|_| [7; 32]).await.unwrap();
    ak(tpm)
        .verify(&quote.attest, &Signature::parse(&quote.signature).unwrap())
        .unwrap();
    assert_eq!(Attest::parse(&quote.attest).unwrap().extra_data, [7; 32]);

    // The established tool's opinion on the same bytes.
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_string_lossy().into_owned()
    };
    let public = &tpm.identity().ak_public;
    let mut sized = u16::try_from(public.len()).unwrap().to_be_bytes().to_vec();
    sized.extend_from_slice(public);
    let (key, attest, signature) = (
        put("ak", &sized),
        put("attest", &quote.attest),
        put("sig", &quote.signature),
    );
    let check = |qualification: &str| {
        let arguments = [
            "-u",
            &key,
            "-m",
            &attest,
            "-s",
            &signature,
            "-g",
            "sha256",
            "-q",
            qualification,
        ];
        Command::new("tpm2_checkquote")
            .args(arguments)
            .output()
            .unwrap()
            .status
            .success()
    };
    assert!(check(&"07".repeat(32)));
    assert!(!check(&"08".repeat(32)));
}

/// A TPM takes a power cut after the use of a key that has this protection for a guess at its password, and after a few of them
/// answers nothing for minutes or hours (TPM 2.0 Part 1, section 19.8.6). The attestation key has no password to guess.
#[tokio::test]
async fn tpm_power_cuts_do_not_lock_the_attestation_key() {
    let mut swtpm = Swtpm::start().unwrap();
    for _ in 0..6 {
        let tpm = open(swtpm.tcti());
        tpm.quote(|_| [7; 32]).await.unwrap();
        drop(tpm);
        swtpm.power_cycle().unwrap();
    }
}

#[test]
fn tpm_extends_reach_every_active_bank() {
    let swtpm = Swtpm::start().unwrap();
    let tpm = open(swtpm.tcti());
    assert!(tpm.identity().banks.contains(&Algorithm::Sha256));
    let before = tpm.read_pcr_blocking().unwrap();
    extend(&tpm, b"event").unwrap();
    let after = tpm.read_pcr_blocking().unwrap();
    assert_eq!(before.len(), tpm.identity().banks.len());
    for ((bank, old), (_, new)) in before.iter().zip(&after) {
        assert_eq!(*new, bank.extend(old, &bank.hash(b"event")), "{bank}");
    }
}

#[tokio::test]
async fn tpm_a_credential_opens_only_for_the_right_key() {
    for (ak, ek) in [
        (AkKind::EcdsaP256, EkKind::Rsa2048),
        (AkKind::Rsa2048, EkKind::EccP256),
        (AkKind::EcdsaP256, EkKind::EccP256),
    ] {
        let swtpm = Swtpm::start().unwrap();
        let tpm = open_keys(swtpm.tcti(), ak, Some(ek));
        assert_eq!(tpm.identity().ek_kind, ek);
        a_credential_opens(&tpm).await;
    }
}

async fn a_credential_opens(tpm: &Handle) {
    let ek = Public::parse(&tpm.identity().ek_public).unwrap();
    let secret = [0x5e; 32];
    let credential = make_credential(&ek, ak(tpm).name(), &secret).unwrap();
    let opened = tpm
        .activate(credential.blob.clone(), credential.encrypted_secret.clone())
        .await
        .unwrap();
    assert_eq!(**opened, secret);

    let another = make_credential(&ek, &Name::new(Algorithm::Sha256, b"another key"), &secret).unwrap();
    assert!(matches!(
        tpm.activate(another.blob, another.encrypted_secret).await,
        Err(TpmError::Refused { .. })
    ));
    let cut = credential.blob[..credential.blob.len() - 1].to_vec();
    assert!(matches!(
        tpm.activate(cut, credential.encrypted_secret).await,
        Err(TpmError::Nonsense { .. })
    ));
    // Nothing stays behind in the TPM: sessions and transient keys are few.
    for _ in 0..10 {
        let credential = make_credential(&ek, ak(tpm).name(), &secret).unwrap();
        tpm.activate(credential.blob, credential.encrypted_secret)
            .await
            .unwrap();
    }
}

#[test]
fn tpm_the_attestation_key_stays_and_a_strangers_key_is_not_used() {
    let swtpm = Swtpm::start().unwrap();
    let first = open(swtpm.tcti());
    let identity = first.identity().clone();
    drop(first);
    let second = open(swtpm.tcti());
    assert_eq!(second.identity().ak_public, identity.ak_public);
    assert_eq!(second.identity().ek_public, identity.ek_public);
    assert_eq!(
        (identity.manufacturer.as_str(), identity.ek_certificate.is_none()),
        ("IBM", true)
    );
    drop(second);

    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().join("key.ctx").to_string_lossy().into_owned();
    let handle = format!("{:#x}", AK_HANDLE + 1);
    tpm2(
        &swtpm.tcti(),
        &["createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", &context],
    );
    tpm2(
        &swtpm.tcti(),
        &["evictcontrol", "-Q", "-C", "o", "-c", &context, &handle],
    );
    // Without a resource manager the tools leave their objects in the TPM's few slots.
    tpm2(&swtpm.tcti(), &["flushcontext", "-t"]);
    let config = TpmConfig {
        ak_handle: AK_HANDLE + 1,
        ..common::config(swtpm.tcti(), Duration::from_secs(20))
    };
    let Err(error) = Handle::open(config, LogView::new("b".into())) else {
        panic!("a foreign key was taken")
    };
    assert!(
        matches!(error, TpmError::ForeignKey { .. }) && error.to_string().contains(&handle),
        "{error}"
    );
}

#[test]
fn tpm_an_attestation_key_of_another_kind_takes_the_place_of_the_former() {
    let swtpm = Swtpm::start().unwrap();
    let identity = |kind| open_with(swtpm.tcti(), kind).identity().clone();
    let [ecdsa, rsa] = KINDS.map(identity);
    assert_eq!((ecdsa.ak_replaced, rsa.ak_replaced), (None, Some(AkKind::EcdsaP256)));
    let parsed = |public: &[u8]| Public::parse(public).unwrap().parameters().clone();
    assert!(matches!(parsed(&ecdsa.ak_public), Parameters::P256 { .. }));
    assert!(matches!(parsed(&rsa.ak_public), Parameters::Rsa { bits: 2048, .. }));
    let again = identity(AkKind::Rsa2048);
    assert_eq!((again.ak_replaced, &again.ak_public), (None, &rsa.ak_public));
    // Back: the same key as at first, so that a host whose change was a mistake need not be enrolled anew.
    let back = identity(AkKind::EcdsaP256);
    assert_eq!(
        (back.ak_replaced, &back.ak_public),
        (Some(AkKind::Rsa2048), &ecdsa.ak_public)
    );
}

#[tokio::test]
async fn tpm_a_release_key_opens_in_its_state_and_holds_extends_back() {
    for kind in KINDS {
        let swtpm = Swtpm::start().unwrap();
        a_release_key_opens(open_with(swtpm.tcti(), kind)).await;
    }
}

async fn a_release_key_opens(tpm: Handle) {
    let (dir, queue) = (tempfile::tempdir().unwrap(), Queue::default());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    let key = tpm.release_begin().await.unwrap();
    let name = Public::parse(key.public()).unwrap().name();
    assert_eq!(name.as_bytes(), key.name());

    let (disk, key_id) = ([3; 16], "3c9d9f5e-0000-4000-8000-00000000000a");
    let digest = {
        let name = name.clone();
        move |records, head: &Sha256Digest| {
            let (nonce, exporter) = (Nonce::new(NONCE), Exporter::new(EXPORTER));
            let binding = Binding::Release {
                nonce: &nonce,
                exporter: &exporter,
                key_name: &name,
                disk,
                key_id,
            };
            binding.digest(records, head)
        }
    };
    let evidence = key.attest(move |log| digest(log.records, &log.head)).await.unwrap();
    let (nonce, exporter) = (Nonce::new(NONCE), Exporter::new(EXPORTER));
    let binding = Binding::Release {
        nonce: &nonce,
        exporter: &exporter,
        key_name: &name,
        disk,
        key_id,
    };
    let source = assay_agent::bundle::Source::new(tpm.log().clone(), "swtpm:");
    let bundle = source.bundle(evidence.quote, 0, false).unwrap();
    let log = bundle
        .verify(&ak(&tpm), &binding, &HeldLog::none())
        .unwrap()
        .replay(RuntimePcr::DEFAULT)
        .unwrap();
    let claim = ReleaseKey {
        public: B64(key.public().to_vec()),
        certify_attest: B64(evidence.certify_attest),
        certify_signature: B64(evidence.certify_signature),
    };
    release::check_release_key(&log, &ak(&tpm), &binding, &claim).unwrap();

    let records = tpm.log().snapshot().records;
    queue.push(0..3);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        tpm.log().snapshot().records,
        records,
        "extends wait while the key lives"
    );

    let point = point(key.public());
    let wrapped = jwe::wrap(&point, key_id, b"passphrase").unwrap();
    let key = tokio::task::spawn_blocking(move || {
        let plain = jwe::unwrap(&wrapped, |epk| key.ecdh_blocking(epk.x, epk.y).map(|z| *z)).unwrap();
        assert_eq!(&**plain, b"passphrase");
        key
    })
    .await
    .unwrap();
    drop(key);
    running.settle(&queue);
    assert!(tpm.log().snapshot().records > records, "and go on after it");
    running.stop().unwrap();
}

#[tokio::test]
async fn tpm_a_release_key_that_nobody_uses_expires() {
    let swtpm = Swtpm::start().unwrap();
    let tpm = open(swtpm.tcti());
    let key = tpm.release_begin().await.unwrap();
    let started = Instant::now();
    let (other, third) = (tpm.clone(), tpm.clone());
    let waiting = tokio::task::spawn_blocking(move || extend(&other, b"later"));
    let second = tokio::spawn(async move { third.release_begin().await.map(drop) });
    waiting.await.unwrap().expect("the extend goes on after the deadline");
    assert!(started.elapsed() >= Duration::from_secs(9), "and waited for it");
    let point = point(key.public());
    let used = tokio::task::spawn_blocking(move || key.ecdh_blocking(point.x, point.y))
        .await
        .unwrap();
    assert!(matches!(used, Err(TpmError::ReleaseExpired(_))));
    second.await.unwrap().expect("the second caller gets its turn");
}

#[tokio::test]
async fn tpm_a_release_key_is_dead_when_a_pcr_moved() {
    let swtpm = Swtpm::start().unwrap();
    let tpm = open(swtpm.tcti());
    // PCR 16 is outside the policy and does not count; PCR 10 moves behind the agent's back, as IMA's does.
    for (pcr, alive) in [(16, true), (10, false)] {
        let key = tpm.release_begin().await.unwrap();
        tpm2(
            &swtpm.tcti(),
            &["pcrextend", &format!("{pcr}:sha256={}", "ab".repeat(32))],
        );
        assert_eq!(key.attest(|_| [1; 32]).await.is_ok(), alive);
        let point = point(key.public());
        let used = tokio::task::spawn_blocking(move || key.ecdh_blocking(point.x, point.y))
            .await
            .unwrap();
        match (alive, used) {
            (true, Ok(z)) => assert_eq!(z.len(), 32),
            (false, Err(TpmError::PcrsMoving { .. })) => {}
            (_, used) => panic!("PCR {pcr}: {used:?}"),
        }
    }
}

#[tokio::test]
async fn tpm_busy_answers_are_retried_until_the_deadline() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let tpm = open_for(proxy.tcti(), Duration::from_secs(2)).unwrap();
    proxy.only(Some(CC_QUOTE));
    proxy.retry_next(12);
    tpm.quote(|_| [0; 32]).await.expect("answered in the end");
    proxy.retry_next(u32::MAX);
    let error = tpm.quote(|_| [0; 32]).await.unwrap_err();
    assert!(
        matches!(error, TpmError::Busy { .. }) && error.is_transient(),
        "{error}"
    );
    assert!(
        error.to_string().contains("TPM2_Quote") && error.to_string().contains("timeout_s"),
        "{error}"
    );
    proxy.retry_next(0);
    tpm.quote(|_| [0; 32]).await.expect("and all is well again");
}

#[tokio::test]
async fn tpm_that_stops_answering_is_a_timeout_with_a_name() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let tpm = open_for(proxy.tcti(), Duration::from_secs(1)).unwrap();
    proxy.hang();
    let error = tpm.quote(|_| [0; 32]).await.unwrap_err();
    assert!(
        matches!(
            error,
            TpmError::Timeout {
                operation: "TPM2_Quote",
                ..
            }
        ),
        "{error}"
    );
    assert!(matches!(tpm.ping().await, Err(TpmError::Timeout { .. })));
    proxy.resume();
    tpm.ping().await.expect("it answers again");
}

#[tokio::test]
async fn tpm_is_given_back_at_the_end_unless_it_hangs() {
    let swtpm = Swtpm::start().unwrap();
    let tpm = open(swtpm.tcti());
    let other = tpm.clone();
    tpm.end(Duration::from_secs(60));
    assert!(matches!(other.ping().await, Err(TpmError::Stopped)));
    // This TPM takes one connection at a time.
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let tpm = open_for(proxy.tcti(), Duration::from_secs(20)).unwrap();
    proxy.hang();
    let hanging = tokio::spawn({
        let tpm = tpm.clone();
        async move { tpm.quote(|_| [0; 32]).await.map(drop) }
    });
    // Asked before the end, whether the command has begun by then or not.
    tokio::task::yield_now().await;
    tpm.end(Duration::from_millis(50));
    proxy.resume();
    hanging.await.unwrap().expect("what was asked for before is answered");
}

#[test]
fn tpm_bad_configuration_is_named() {
    let error = |tcti: &str, pcr: u8, ak_handle: u32| {
        let config = TpmConfig {
            tcti: tcti.into(),
            pcr,
            ak_handle,
            ak: AkKind::EcdsaP256,
            ek: None,
            timeout: Duration::from_secs(1),
        };
        let Err(error) = Handle::open(config, LogView::new("b".into())) else {
            panic!("{tcti} opened")
        };
        error
    };
    let absent = error("device:/dev/no-such-tpm", 13, AK_HANDLE);
    assert!(matches!(absent, TpmError::Absent { .. }), "{absent}");
    assert!(
        absent.to_string().contains("/dev/no-such-tpm") && absent.to_string().contains("agent.toml"),
        "{absent}"
    );
    assert!(matches!(
        error("carrier-pigeon", 13, AK_HANDLE),
        TpmError::BadTcti { .. }
    ));
    assert!(matches!(
        error("swtpm:host=127.0.0.1,port=1", 13, AK_HANDLE),
        TpmError::Absent { .. }
    ));
    assert!(matches!(
        error("device:/dev/no-such-tpm", 16, AK_HANDLE),
        TpmError::BadPcr { pcr: 16 }
    ));
}
