use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

use super::*;
use crate::testing::sized;
use crate::wire::B64;

/// 2026-11-23.
const NOW: i64 = 1_795_392_000;
/// fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt.
const ATTRIBUTES: u32 = 0x0003_00B2;
const EK_PURPOSE: &[u64] = &[2, 23, 133, 8, 1];

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    certificate: Certificate,
}

fn ca_params(name: &str, edit: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2040, 1, 1);
    edit(&mut params);
    params
}

fn root(name: &str, edit: impl FnOnce(&mut CertificateParams)) -> Ca {
    let (params, key) = (ca_params(name, edit), KeyPair::generate().unwrap());
    let certificate = params.self_signed(&key).unwrap();
    Ca {
        params,
        key,
        certificate,
    }
}

impl Ca {
    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn intermediate(&self, name: &str, edit: impl FnOnce(&mut CertificateParams)) -> Self {
        let (params, key) = (ca_params(name, edit), KeyPair::generate().unwrap());
        let certificate = params.signed_by(&key, &self.issuer()).unwrap();
        Self {
            params,
            key,
            certificate,
        }
    }

    /// An EK certificate as TPM makers make them, in DER.
    fn leaf(&self, key: &KeyPair, edit: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.key_usages = vec![KeyUsagePurpose::KeyAgreement];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(EK_PURPOSE.to_vec())];
        params.not_before = date_time_ymd(2024, 1, 1);
        params.not_after = date_time_ymd(2034, 1, 1);
        edit(&mut params);
        params.signed_by(key, &self.issuer()).unwrap().der().to_vec()
    }

    fn der(&self) -> Vec<u8> {
        self.certificate.der().to_vec()
    }
}

/// `TPMT_PUBLIC` of a P-256 EK.
fn ek_public(key: &KeyPair, attributes: u32) -> Vec<u8> {
    let mut area = vec![0x00, 0x23, 0x00, 0x0B];
    area.extend_from_slice(&attributes.to_be_bytes());
    area.extend_from_slice(&[0, 0, 0, 0x06, 0, 128, 0, 0x43, 0, 0x10, 0, 3, 0, 0x10]);
    for coordinate in key.public_key_raw()[1..].chunks(32) {
        sized(&mut area, coordinate);
    }
    area
}

fn identity(key: &KeyPair, certificate: Option<Vec<u8>>) -> Identity {
    Identity {
        version: 1,
        agent_version: "0.1.0".into(),
        boot_id: crate::testing::BOOT.into(),
        ek_public: B64(ek_public(key, ATTRIBUTES)),
        ek_certificate: certificate.map(B64),
        ak_public: B64(Vec::new()),
        tpm_manufacturer: "TEST".into(),
        tpm_firmware: "1".into(),
        approved: None,
    }
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

/// Checks a leaf made by `edit` under a fresh root.
fn leaf_error(edit: impl FnOnce(&mut CertificateParams)) -> ChainError {
    let (root, key) = (root("root", |_| {}), key());
    let trust = EkTrust::Roots(vec![root.der()]);
    match trust
        .check(&identity(&key, Some(root.leaf(&key, edit))), NOW)
        .unwrap_err()
    {
        EkError::Chain(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pinned_key_needs_no_certificate() {
    let (ours, other) = (key(), key());
    let pinned = Sha256Digest::of(&ek_public(&ours, ATTRIBUTES));
    let trust = EkTrust::PinnedSha256(pinned);
    let trusted = trust.check(&identity(&ours, None), NOW).unwrap();
    assert_eq!(
        (trusted.sha256(), trusted.public().name().digest()),
        (pinned, pinned.as_ref())
    );
    assert!(matches!(
        trust.check(&identity(&other, None), NOW),
        Err(EkError::NotPinned { .. })
    ));
}

#[test]
fn only_an_endorsement_key_is_one() {
    let ours = key();
    // Not restricted, able to sign, or able to leave its TPM.
    for attributes in [ATTRIBUTES & !0x0001_0000, ATTRIBUTES | 0x0004_0000, ATTRIBUTES & !2] {
        let mut identity = identity(&ours, None);
        identity.ek_public = B64(ek_public(&ours, attributes));
        let trust = EkTrust::PinnedSha256(Sha256Digest::of(identity.ek_public.as_ref()));
        assert!(
            matches!(trust.check(&identity, NOW), Err(EkError::Attributes { .. })),
            "{attributes:#x}"
        );
    }
    let mut nonsense = identity(&ours, None);
    nonsense.ek_public = B64(vec![1, 2, 3]);
    assert!(matches!(
        EkTrust::PinnedSha256(Sha256Digest::ZERO).check(&nonsense, NOW),
        Err(EkError::Public(_))
    ));
}

#[test]
fn a_certificate_chains_to_any_configured_anchor() {
    let root = root("root", |_| {});
    let middle = root.intermediate("middle", |_| {});
    let low = middle.intermediate("low", |_| {});
    let ours = key();
    let leaf = low.leaf(&ours, |_| {});
    // The TPM's NV area: the certificate, its intermediates, then padding.
    let stored = [leaf.clone(), low.der(), middle.der(), vec![0xFF; 37]].concat();
    let check = |anchors: &[&Ca], certificate: &[u8]| {
        let trust = EkTrust::Roots(anchors.iter().map(|ca| ca.der()).collect());
        trust.check(&identity(&ours, Some(certificate.to_vec())), NOW)
    };
    assert!(check(&[&root], &stored).is_ok());
    assert!(check(&[&middle], &stored).is_ok());
    assert!(check(&[&low], &leaf).is_ok());
    assert!(check(&[&low], &[leaf.clone(), vec![0; 100]].concat()).is_ok());
    let missing = check(&[&root], &leaf);
    assert!(matches!(missing, Err(EkError::Chain(ChainError::NoAnchor { issuer, .. })) if issuer == "CN=low"));
    assert!(matches!(check(&[], &leaf), Err(EkError::NoAnchors)));
    // Another CA of the same name did not sign it; if both are configured, the right one is found.
    let impostor = self::root("low", |_| {});
    assert!(matches!(
        check(&[&impostor], &leaf),
        Err(EkError::Chain(ChainError::Signature { .. }))
    ));
    assert!(check(&[&impostor, &low], &leaf).is_ok());
    let no_certificate = EkTrust::Roots(vec![root.der()]).check(&identity(&ours, None), NOW);
    assert!(matches!(no_certificate, Err(EkError::NoCertificate(_))));
}

#[test]
fn the_certificate_must_be_for_the_shown_key() {
    let (root, ours, other) = (root("root", |_| {}), key(), key());
    let trust = EkTrust::Roots(vec![root.der()]);
    let foreign = identity(&ours, Some(root.leaf(&other, |_| {})));
    assert!(matches!(trust.check(&foreign, NOW), Err(EkError::KeyMismatch(_))));
}

#[test]
fn leaves_that_are_no_ek_certificate_are_refused() {
    assert!(matches!(
        leaf_error(|p| p.not_after = date_time_ymd(2025, 1, 1)),
        ChainError::Validity { .. }
    ));
    assert!(matches!(
        leaf_error(|p| p.not_before = date_time_ymd(2027, 1, 1)),
        ChainError::Validity { .. }
    ));
    let ca = |p: &mut CertificateParams| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert!(matches!(leaf_error(ca), ChainError::LeafIsCa(_)));
    let signs = |p: &mut CertificateParams| p.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    assert!(matches!(leaf_error(signs), ChainError::LeafUsage(_)));
    let web = |p: &mut CertificateParams| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    assert!(matches!(leaf_error(web), ChainError::LeafUsage(_)));
    let critical = |oid: &[u64]| {
        let mut extension = CustomExtension::from_oid_content(oid, vec![5, 0]);
        extension.set_criticality(true);
        extension
    };
    let unknown = critical(&[1, 2, 3, 4]);
    assert!(
        matches!(leaf_error(|p| p.custom_extensions.push(unknown)), ChainError::UnknownCritical { oid, .. } if oid == "1.2.3.4")
    );

    // The TCG's own critical extensions are no reason; nor is a missing extended key usage.
    let (root, ours) = (root("root", |_| {}), key());
    let leaf = root.leaf(&ours, |p| {
        p.custom_extensions.push(critical(&[2, 23, 133, 2, 16]));
        p.extended_key_usages.clear();
    });
    assert!(
        EkTrust::Roots(vec![root.der()])
            .check(&identity(&ours, Some(leaf)), NOW)
            .is_ok()
    );
}

#[test]
fn issuers_must_be_cas() {
    let root = root("root", |_| {});
    let ours = key();
    let through = |edit: fn(&mut CertificateParams)| {
        let middle = root.intermediate("middle", edit);
        let stored = [middle.leaf(&ours, |_| {}), middle.der()].concat();
        match EkTrust::Roots(vec![root.der()])
            .check(&identity(&ours, Some(stored)), NOW)
            .unwrap_err()
        {
            EkError::Chain(error) => error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(through(|p| p.is_ca = IsCa::NoCa), ChainError::NotCa(_)));
    assert!(matches!(
        through(|p| p.is_ca = IsCa::ExplicitNoCa),
        ChainError::NotCa(_)
    ));
    assert!(matches!(
        through(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign]),
        ChainError::NotCa(_)
    ));
    assert!(matches!(
        through(|p| p.not_after = date_time_ymd(2022, 1, 1)),
        ChainError::Validity { .. }
    ));
    // A path length of 0 allows leaves alone.
    let top = root.intermediate("top", |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let low = top.intermediate("low", |_| {});
    let stored = [low.leaf(&ours, |_| {}), low.der(), top.der()].concat();
    let refused = EkTrust::Roots(vec![root.der()]).check(&identity(&ours, Some(stored)), NOW);
    assert!(matches!(refused, Err(EkError::Chain(ChainError::PathLength(name))) if name == "CN=top"));
    // An expired anchor is none.
    let old = self::root("old", |p| p.not_after = date_time_ymd(2022, 1, 1));
    let leaf = old.leaf(&ours, |_| {});
    let refused = EkTrust::Roots(vec![old.der()]).check(&identity(&ours, Some(leaf)), NOW);
    assert!(matches!(refused, Err(EkError::Chain(ChainError::Validity { .. }))));
}

#[test]
fn certificates_are_limited_and_whole() {
    let (root, ours) = (root("root", |_| {}), key());
    let trust = EkTrust::Roots(vec![root.der()]);
    let check = |certificate: Vec<u8>| trust.check(&identity(&ours, Some(certificate)), NOW).unwrap_err();
    assert!(matches!(check(Vec::new()), EkError::Chain(ChainError::Malformed(_))));
    assert!(matches!(
        check(vec![0xFF; 64]),
        EkError::Chain(ChainError::Malformed(_))
    ));
    assert!(matches!(
        check([root.leaf(&ours, |_| {}), vec![1, 2]].concat()),
        EkError::Chain(ChainError::Malformed(_))
    ));
    assert!(matches!(
        check(root.leaf(&ours, |_| {}).repeat(MAX_INTERMEDIATES + 2)),
        EkError::Chain(ChainError::TooMuch(_))
    ));
    let broken = EkTrust::Roots(vec![vec![1, 2, 3]]).check(&identity(&ours, Some(root.leaf(&ours, |_| {}))), NOW);
    assert!(matches!(broken, Err(EkError::Chain(ChainError::Malformed(_)))));
    // A loop of two CAs that name each other ends.
    let a = self::root("a", |_| {});
    let b = a.intermediate("b", |_| {});
    let again = b.intermediate("a", |_| {});
    let stored = [b.leaf(&ours, |_| {}), b.der(), again.der()].concat();
    assert!(matches!(check(stored), EkError::Chain(_)));
}

#[test]
fn ca_files_are_pem_or_der() {
    let (one, two) = (root("one", |_| {}), root("two", |_| {}));
    let pem = [one.certificate.pem(), two.certificate.pem()].concat();
    assert_eq!(EkTrust::read_ca_file(pem.as_bytes()).unwrap(), [one.der(), two.der()]);
    assert_eq!(EkTrust::read_ca_file(&one.der()).unwrap(), [one.der()]);
    assert!(matches!(EkTrust::read_ca_file(b"hello"), Err(EkError::CaFile)));
    assert!(matches!(
        EkTrust::read_ca_file(key().serialize_pem().as_bytes()),
        Err(EkError::CaFile)
    ));
    assert!(matches!(EkTrust::read_ca_file(&[0x30, 0x00]), Err(EkError::Chain(_))));
}
