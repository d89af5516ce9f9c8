//! Inputs to begin with, and the keys that they are made with: each run must know those of the run before.

use assay_evidence::approved::{ListDraft, ListSigner};
use assay_evidence::bootlog;
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::event;
use assay_evidence::jwe;
use assay_evidence::luks1;
use assay_evidence::policy::Policy;
use assay_evidence::qcow2;
use assay_evidence::testing::{AK_ATTRIBUTES, BINDING, Host, NONCE, SoftKey};
use assay_evidence::token::LuksToken;
use assay_evidence::tpm::{Parameters, Public};
use assay_evidence::wire::{self, B64, ErrorBody, Identity, JoinFile, LogPage};
use serde::Serialize;

/// A moment at which the certificates are valid, in seconds since 1970.
pub const NOW: i64 = 1_900_000_000;

/// fixedTPM, fixedParent, sensitiveDataOrigin, restricted, decrypt.
const EK_ATTRIBUTES: u32 = 0x0003_0032;

/// Key, quote and signature of libtpms: there is no software key of this kind here.
pub const RSA_AK: &[u8] = include_bytes!("../data/rsa-ak.bin");
const RSA_QUOTE: &[u8] = include_bytes!("../data/rsa-quote.bin");
const RSA_SIGNATURE: &[u8] = include_bytes!("../data/rsa-signature.bin");

/// A name of a target, and what it takes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 12] = [
    ("approved", crate::approved),
    ("boot_log", crate::boot_log),
    ("bundle", crate::bundle),
    ("cel", crate::cel),
    ("certificate", crate::certificate),
    ("chain", crate::chain),
    ("disk", crate::disk),
    ("event", crate::event),
    ("ima_log", crate::ima_log),
    ("policy", crate::policy),
    ("tpm", crate::tpm),
    ("wire", crate::wire),
];

/// What a target is given first.
#[must_use]
pub fn samples(target: &str) -> Vec<Vec<u8>> {
    let host = Host::measuring();
    let bundle = host.bundle(&BINDING, 0);
    match target {
        "approved" => vec![list().into_bytes(), list_key()],
        "boot_log" => vec![boot_log()],
        "bundle" => vec![bundle.to_json().expect("a bundle has a JSON form")],
        "cel" => vec![host.log_bytes(0), host.log_bytes(2)],
        "certificate" => vec![ca(), EK.to_vec()],
        "chain" => vec![crate::chain::input(&host)],
        "disk" => vec![token().into_bytes(), json(&jwe()), luks1_header(), qcow2_header()],
        "event" => events(&host),
        "ima_log" => vec![ima_log(), ima_fields()],
        "policy" => vec![policy(&host).to_json().into_bytes()],
        "tpm" => vec![
            ak_public(),
            host.quote_fields(&BINDING).encode(),
            host.key.sign(b"something"),
            RSA_AK.to_vec(),
            RSA_QUOTE.to_vec(),
            RSA_SIGNATURE.to_vec(),
        ],
        "wire" => messages(bundle),
        _ => Vec::new(),
    }
}

/// A policy that approves of what the host runs.
pub fn policy(host: &Host) -> Policy {
    let mut policy = Policy::new("fuzz").expect("a name");
    for record in &host.records {
        for event in record.events().expect("it was built") {
            if let event::Event::Load(load) | event::Event::Inventory(load) = event
                && let Some(digest) = load.digest
            {
                policy.allow(digest, Some(load.kind), Some(&load.path)).expect("few");
            }
        }
    }
    policy
}

/// The authority that is trusted: self-signed, P-256.
pub fn ca() -> Vec<u8> {
    include_bytes!("../data/ca.der").to_vec()
}

/// A certificate of that authority's, as it could be an endorsement key's.
const EK: &[u8] = include_bytes!("../data/ek.der");

fn list_signer() -> ListSigner {
    ListSigner::from_pkcs8(include_bytes!("../data/list.pk8")).expect("a key")
}

/// The key that lists are checked by.
pub fn list_key() -> Vec<u8> {
    list_signer().public().spki()
}

/// The one list that was ever signed, here without its signature.
pub fn draft() -> ListDraft {
    ListDraft {
        policy: "fuzz".to_owned(),
        host: None,
        serial: 7,
        issued: 1_700_000_000,
        expires: None,
        digests: vec![Sha256Digest::from([1; 32]), Sha256Digest::from([2; 32])],
    }
}

fn list() -> String {
    draft().sign(&list_signer()).expect("a good list")
}

/// A public area with the attributes of an attestation key.
pub fn ak_public() -> Vec<u8> {
    SoftKey::new().public(AK_ATTRIBUTES)
}

/// What a host says of itself, with a key that could be an endorsement key.
pub fn identity() -> Identity {
    Identity {
        version: 1,
        agent_version: "0.1.0".to_owned(),
        boot_id: assay_evidence::testing::BOOT.to_owned(),
        ek_public: B64(SoftKey::new().public(EK_ATTRIBUTES)),
        ek_certificate: Some(B64(EK.to_vec())),
        ak_public: B64(ak_public()),
        tpm_manufacturer: "IBM".to_owned(),
        tpm_firmware: "20191023".to_owned(),
        approved: None,
    }
}

/// Zeros, but for what has a form of its own.
fn luks1_header() -> Vec<u8> {
    let mut bytes = luks1::START.to_vec();
    for (at, text) in [
        (8, "aes"),
        (40, "xts-plain64"),
        (168, "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"),
    ] {
        bytes.resize(at, 0);
        bytes.extend_from_slice(text.as_bytes());
    }
    // A slot that is filled.
    bytes.resize(208, 0);
    bytes.extend_from_slice(&0x00AC_71F3_u32.to_be_bytes());
    bytes.resize(luks1::LEN, 0);
    bytes
}

/// Of the third version, with a LUKS header at 64 KiB.
fn qcow2_header() -> Vec<u8> {
    let mut bytes = qcow2::START.to_vec();
    for (at, number) in [
        (4, 3_u32),
        (28, 1 << 20),
        (32, 2),
        (100, 104),
        (104, 0x0537_BE77),
        (108, 16),
        (116, 1 << 16),
    ] {
        bytes.resize(at, 0);
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    // The end of the extensions.
    bytes.resize(136, 0);
    bytes
}

fn token() -> String {
    let verifiers = vec!["https://verifier:9443".to_owned()];
    let token = LuksToken::new(
        0,
        verifiers,
        Sha256Digest::of(b"ca"),
        "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed".to_owned(),
        "fuzz".to_owned(),
    );
    token.and_then(|token| token.to_json()).expect("a good token")
}

fn jwe() -> jwe::Jwe {
    let public = Public::parse(&ak_public()).expect("a key");
    let Parameters::P256 { point, .. } = public.parameters() else {
        unreachable!("a key on P-256")
    };
    jwe::wrap(point, "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed", b"a passphrase").expect("wrapped")
}

fn events(host: &Host) -> Vec<Vec<u8>> {
    let events = host
        .records
        .iter()
        .flat_map(|record| record.events().expect("it was built"));
    events
        .map(|event| event::encode(&event).expect("it was built"))
        .collect()
}

fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("a message has a JSON form")
}

fn messages(bundle: assay_evidence::bundle::Bundle) -> Vec<Vec<u8>> {
    let release = wire::ReleaseRequest {
        key_id: "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed".to_owned(),
        disk_uuid: assay_evidence::uuid::Uuid::new([3; 16]),
        bundle,
        release_key: wire::ReleaseKey {
            public: B64(ak_public()),
            certify_attest: B64(vec![1; 80]),
            certify_signature: B64(vec![2; 72]),
        },
        vm: Some("web-1".to_owned()),
    };
    let page = LogPage {
        from: 3,
        count: 1,
        data: B64(vec![9; 40]),
    };
    let join = JoinFile {
        version: 1,
        verifiers: vec!["https://verifier:9443".to_owned()],
        ca_pem: "-----BEGIN CERTIFICATE-----".to_owned(),
        list_key: Some(B64(list_key())),
    };
    let quote = wire::QuoteRequest {
        nonce: NONCE,
        log_from: 2,
        boot_log: true,
    };
    vec![
        json(&identity()),
        json(&release),
        json(&page),
        json(&join),
        json(&quote),
        json(&ErrorBody::new("key-refused", "no")),
        json(&wire::ReleaseResponse {
            jwe: jwe(),
            lease: Some(wire::Lease {
                seconds: Some(60),
                on_loss: assay_evidence::terms::OnLoss::Wipe,
            }),
        }),
        json(&wire::LeaseNews {
            keys: vec![wire::KeyNews {
                key_id: "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed".to_owned(),
                disk_uuid: assay_evidence::uuid::Uuid::new([3; 16]),
                lease: None,
                on_loss: Some(assay_evidence::terms::OnLoss::Suspend),
                reasons: vec!["/root/rogue".to_owned()],
            }],
        }),
        br#"{"groups":["dom0"],"not_after":"2027-01-31T00:00:00Z","hours":["mon-fri 08:00-18:00"],"lease_s":60}"#
            .to_vec(),
    ]
}

/// A crypto-agile log with a header and two events (TCG PC Client Platform Firmware Profile, "Event Logging").
fn boot_log() -> Vec<u8> {
    const EV_NO_ACTION: u32 = 3;
    const EV_IPL: u32 = 13;
    let sha256 = Algorithm::Sha256.tpm_id().to_le_bytes();
    // Signature, platform class, version 2.0 errata 0, uintn size 2; one bank; no vendor data.
    let banks = [&1_u32.to_le_bytes()[..], &sha256, &32_u16.to_le_bytes(), &[0]].concat();
    let header = [b"Spec ID Event03\0".as_slice(), &[0, 0, 0, 0, 0, 2, 0, 2], &banks].concat();
    let mut log = [0_u32.to_le_bytes(), EV_NO_ACTION.to_le_bytes()].concat();
    log.extend([0; 20]);
    log.extend(counted(&header));
    let global = b"\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c".as_slice();
    let secure_boot = [global, b"\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0P\0K\0\x01"].concat();
    // PCR, what is hashed, what is logged.
    let events: [(u32, &[u8], &[u8]); 6] = [
        (7, &secure_boot, &secure_boot),
        (4, b"loader", b"loader"),
        (8, b"linux /vmlinuz", b"grub_cmd: linux /vmlinuz\0"),
        (9, b"a kernel", b"/vmlinuz\0"),
        (11, b".linux\0", b".\0l\0i\0n\0u\0x\0\0\0"),
        (11, b"a kernel", b".\0l\0i\0n\0u\0x\0\0\0"),
    ];
    for (pcr, hashed, data) in events {
        let head = [pcr.to_le_bytes(), EV_IPL.to_le_bytes(), 1_u32.to_le_bytes()].concat();
        log.extend([&head[..], &sha256, &Algorithm::Sha256.hash(hashed), &counted(data)].concat());
    }
    assert!(bootlog::parse(&log).is_ok(), "a good log");
    log
}

/// Bytes behind their length.
pub fn counted(data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes()[..], data].concat()
}

fn ima_data(path: &[u8]) -> Vec<u8> {
    let digest = [b"sha256:\0".as_slice(), &Algorithm::Sha256.hash(path)].concat();
    [counted(&digest), counted(&[path, &[0]].concat())].concat()
}

/// Two entries of a SHA-1 list.
fn ima_log() -> Vec<u8> {
    let entry = |path: &[u8]| ima_entry("ima-ng", &ima_data(path));
    [entry(b"boot_aggregate"), entry(b"/usr/bin/true")].concat()
}

/// An entry of a SHA-1 list with the digest that belongs to it.
pub fn ima_entry(template: &str, data: &[u8]) -> Vec<u8> {
    let head = [&10_u32.to_le_bytes()[..], &Algorithm::Sha1.hash(data)].concat();
    [head, counted(template.as_bytes()), counted(data)].concat()
}

/// The same data for [`crate::ima_log`] to make entries of.
fn ima_fields() -> Vec<u8> {
    [&[1][..], &counted(&ima_data(b"/usr/bin/true"))].concat()
}
