use super::*;
use crate::policy::Policy;
use crate::quote::HeldLog;
use crate::testing::{AK_ATTRIBUTES, EXPORTER, Host, NONCE, NOW, SoftKey, load, sized};
use crate::wire::B64;
use ring::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey};
use ring::rand::SystemRandom;

const DISK: [u8; 16] = [9; 16];
const KEY_ID: &str = "6f9619ff-8b86-d011-b42d-00cf4fc964ff";

/// A host that asks for a key: what its TPM made for the request.
struct Asking {
    host: Host,
    private: EphemeralPrivateKey,
    public: Vec<u8>,
    certify: CertifyFields,
}

#[derive(Clone)]
struct CertifyFields {
    magic: u32,
    kind: u16,
    extra_data: Vec<u8>,
    reset_count: u32,
    restart_count: u32,
    name: Vec<u8>,
    hierarchy: u32,
}

impl CertifyFields {
    fn encode(&self) -> Vec<u8> {
        let mut out = self.magic.to_be_bytes().to_vec();
        out.extend_from_slice(&self.kind.to_be_bytes());
        sized(&mut out, &[0x0B; 34]);
        sized(&mut out, &self.extra_data);
        out.extend_from_slice(&2000u64.to_be_bytes());
        out.extend_from_slice(&self.reset_count.to_be_bytes());
        out.extend_from_slice(&self.restart_count.to_be_bytes());
        out.push(1);
        out.extend_from_slice(&7u64.to_be_bytes());
        sized(&mut out, &self.name);
        let qualified = [self.hierarchy.to_be_bytes().as_slice(), &self.name].concat();
        sized(&mut out, Name::new(Algorithm::Sha256, &qualified).as_bytes());
        out
    }
}

/// `TPMT_PUBLIC` of a P-256 key without cipher and scheme.
fn public_area(attributes: u32, policy: &[u8], scheme: &[u8], point: &EccPoint) -> Vec<u8> {
    let mut out = vec![0x00, 0x23, 0x00, 0x0B];
    out.extend_from_slice(&attributes.to_be_bytes());
    sized(&mut out, policy);
    out.extend_from_slice(&[0, 0x10]);
    out.extend_from_slice(scheme);
    out.extend_from_slice(&[0, 3, 0, 0x10]);
    sized(&mut out, &point.x);
    sized(&mut out, &point.y);
    out
}

const NO_SCHEME: &[u8] = &[0, 0x10];
const ATTRIBUTES: u32 = 0x0002_0432;

impl Asking {
    fn new(host: Host) -> Self {
        let private = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).unwrap();
        let point = crate::jwe::from_sec1(private.compute_public_key().unwrap().as_ref()).unwrap();
        let public = public_area(ATTRIBUTES, policy_pcr_digest(&host.pcrs).as_ref(), NO_SCHEME, &point);
        let name = Name::new(Algorithm::Sha256, &public);
        let certify = CertifyFields {
            magic: 0xFF54_4347,
            kind: 0x8017,
            extra_data: host.quote_fields(&binding(&name)).extra_data,
            reset_count: host.clock.reset_count,
            restart_count: host.clock.restart_count,
            name: name.as_bytes().to_vec(),
            hierarchy: NULL_HIERARCHY,
        };
        Self {
            host,
            private,
            public,
            certify,
        }
    }

    fn name(&self) -> Name {
        Name::new(Algorithm::Sha256, &self.public)
    }

    fn log(&self, binding: &Binding<'_>) -> ReplayedLog {
        let bundle = self.host.bundle(binding, 0);
        bundle
            .verify(&self.host.key.ak(), binding, &HeldLog::none())
            .unwrap()
            .replay(crate::pcr::RuntimePcr::DEFAULT)
            .unwrap()
    }

    fn key(&self) -> ReleaseKey {
        let attest = self.certify.encode();
        let signature = self.host.key.sign(&attest);
        ReleaseKey {
            public: B64(self.public.clone()),
            certify_attest: B64(attest),
            certify_signature: B64(signature),
        }
    }

    fn check(&self) -> Result<ReleaseTarget, ReleaseError> {
        let name = self.name();
        check_release_key(
            &self.log(&binding(&name)),
            &self.host.key.ak(),
            &binding(&name),
            &self.key(),
        )
    }

    /// Puts another public area in, certified and quoted as if it had been this one from the start.
    fn with_public(mut self, public: Vec<u8>) -> Self {
        self.public = public;
        let name = self.name();
        self.certify.extra_data = self.host.quote_fields(&binding(&name)).extra_data;
        self.certify.name = name.as_bytes().to_vec();
        self
    }

    fn point(&self) -> EccPoint {
        crate::jwe::from_sec1(self.private.compute_public_key().unwrap().as_ref()).unwrap()
    }
}

fn binding(name: &Name) -> Binding<'_> {
    Binding::Release {
        nonce: &NONCE,
        exporter: &EXPORTER,
        key_name: name,
        disk: DISK,
        key_id: KEY_ID,
    }
}

fn asking() -> Asking {
    Asking::new(Host::measuring())
}

#[derive(Debug, thiserror::Error)]
#[error("no agreement")]
struct NoAgreement;

#[test]
fn a_trusted_host_gets_its_key() {
    let asking = asking();
    let name = asking.name();
    let log = asking.log(&binding(&name));
    let policy = Policy::capture("default", "first", &log).unwrap();
    let target = asking.check().unwrap();
    assert_eq!((target.key_id(), target.disk()), (KEY_ID, DISK));
    let jwe = release(
        &log.appraise(&policy, NOW),
        &target,
        KEY_ID,
        &Secret::new(b"passphrase".to_vec()),
    )
    .unwrap();
    let opened = jwe::unwrap(&jwe, |epk| {
        let epk = UnparsedPublicKey::new(&ECDH_P256, epk.uncompressed());
        agreement::agree_ephemeral(asking.private, &epk, |z| z.try_into().unwrap()).map_err(|_| NoAgreement)
    });
    assert_eq!(opened.unwrap().as_slice(), b"passphrase");
}

#[test]
fn an_untrusted_host_gets_every_reason_and_no_key() {
    let mut host = Host::measuring();
    let good = asking();
    let name = good.name();
    let policy = Policy::capture("default", "first", &good.log(&binding(&name))).unwrap();
    host.record(&[load("/root/rogue", 2)]);
    host.record(&[load("/root/other", 3)]);
    let asking = Asking::new(host);
    let name = asking.name();
    let appraisal = asking.log(&binding(&name)).appraise(&policy, NOW);
    let target = asking.check().unwrap();
    let refused = release(&appraisal, &target, KEY_ID, &Secret::new(b"passphrase".to_vec())).unwrap_err();
    assert_eq!(refused.reasons().len(), 2);
    assert!(matches!(&refused, ReleaseError::NotTrusted { reasons } if reasons[0].contains("/root/rogue")));
    assert!(refused.to_string().contains("/root/other"), "{refused}");
}

#[test]
fn verdict_key_and_request_belong_together() {
    let first = asking();
    let name = first.name();
    let log = first.log(&binding(&name));
    let policy = Policy::capture("default", "first", &log).unwrap();
    let appraisal = log.appraise(&policy, NOW);
    let second = asking();
    let secret = Secret::new(b"passphrase".to_vec());
    let other = release(&appraisal, &second.check().unwrap(), KEY_ID, &secret);
    assert!(matches!(other, Err(ReleaseError::OtherEvidence)));
    let other = release(&appraisal, &first.check().unwrap(), "another", &secret);
    assert!(matches!(other, Err(ReleaseError::KeyId { .. })));
}

#[test]
fn evidence_of_another_question_is_refused() {
    let asking = asking();
    let (name, ak) = (asking.name(), asking.host.key.ak());
    // Quoted without a release key.
    let quote = Binding::Quote {
        nonce: &NONCE,
        exporter: &EXPORTER,
    };
    let log = asking.log(&quote);
    assert!(matches!(
        check_release_key(&log, &ak, &quote, &asking.key()),
        Err(ReleaseError::Binding)
    ));
    assert!(matches!(
        check_release_key(&log, &ak, &binding(&name), &asking.key()),
        Err(ReleaseError::Binding)
    ));
    // Quoted for another disk, another key id, another release key.
    let log = asking.log(&binding(&name));
    let (nonce, exporter, key_name) = (&NONCE, &EXPORTER, &name);
    for other in [
        Binding::Release {
            nonce,
            exporter,
            key_name,
            disk: [8; 16],
            key_id: KEY_ID,
        },
        Binding::Release {
            nonce,
            exporter,
            key_name,
            disk: DISK,
            key_id: "other",
        },
        Binding::Release {
            nonce,
            exporter,
            key_name: &Name::new(Algorithm::Sha256, b"x"),
            disk: DISK,
            key_id: KEY_ID,
        },
    ] {
        assert!(matches!(
            check_release_key(&log, &ak, &other, &asking.key()),
            Err(ReleaseError::Binding)
        ));
    }
}

#[test]
fn the_certification_is_checked_field_by_field() {
    type Case = (fn(&mut CertifyFields), fn(&ReleaseError) -> bool);
    let cases: [Case; 8] = [
        (
            |c| c.magic = 1,
            |e| matches!(e, ReleaseError::Attest(TpmError::Magic(1))),
        ),
        (
            |c| c.kind = 0x8014,
            |e| matches!(e, ReleaseError::Attest(TpmError::Unsupported { .. })),
        ),
        (|c| c.extra_data = vec![0; 32], |e| matches!(e, ReleaseError::ExtraData)),
        (|c| c.extra_data = Vec::new(), |e| matches!(e, ReleaseError::ExtraData)),
        (|c| c.name[5] ^= 1, |e| matches!(e, ReleaseError::Name { .. })),
        (|c| c.hierarchy = 0x4000_0001, |e| matches!(e, ReleaseError::Hierarchy)),
        (
            |c| c.reset_count += 1,
            |e| {
                matches!(
                    e,
                    ReleaseError::Counters {
                        counter: "reset count",
                        ..
                    }
                )
            },
        ),
        (
            |c| c.restart_count += 1,
            |e| {
                matches!(
                    e,
                    ReleaseError::Counters {
                        counter: "restart count",
                        ..
                    }
                )
            },
        ),
    ];
    for (number, (edit, expected)) in cases.into_iter().enumerate() {
        let mut asking = asking();
        edit(&mut asking.certify);
        let refused = asking.check().unwrap_err();
        assert!(expected(&refused), "case {number}: {refused:?}");
    }
}

#[test]
fn the_certification_must_be_the_enrolled_keys() {
    let asking = asking();
    let name = asking.name();
    let log = asking.log(&binding(&name));
    let good = asking.key();
    let check = |key: &ReleaseKey| check_release_key(&log, &asking.host.key.ak(), &binding(&name), key).unwrap_err();
    let forged = B64(SoftKey::new().sign(good.certify_attest.as_ref()));
    let key = ReleaseKey {
        certify_signature: forged,
        ..good.clone()
    };
    assert!(matches!(check(&key), ReleaseError::Signature(SignatureError::Invalid)));
    let key = ReleaseKey {
        certify_signature: B64(vec![0; 3]),
        ..good.clone()
    };
    assert!(matches!(check(&key), ReleaseError::SignatureForm(_)));
    let key = ReleaseKey {
        public: B64(vec![1; 9]),
        ..good.clone()
    };
    assert!(matches!(check(&key), ReleaseError::Public(_)));
    let mut flipped = good.clone();
    flipped.certify_attest.0[40] ^= 1;
    assert!(matches!(
        check(&flipped),
        ReleaseError::Signature(SignatureError::Invalid)
    ));
    // A quote in the place of a certification.
    let quote = asking.host.quote_fields(&binding(&name)).encode();
    let signature = B64(asking.host.key.sign(&quote));
    let key = ReleaseKey {
        certify_attest: B64(quote),
        certify_signature: signature,
        ..good
    };
    assert!(matches!(check(&key), ReleaseError::NotACertification));
}

#[test]
fn the_release_key_must_be_of_the_one_kind() {
    let fits = |attributes: u32, policy: Option<&[u8]>, scheme: &[u8]| {
        let asking = asking();
        let wanted = policy_pcr_digest(&asking.host.pcrs);
        let policy = policy.unwrap_or(wanted.as_ref()).to_vec();
        let public = public_area(attributes, &policy, scheme, &asking.point());
        asking.with_public(public).check()
    };
    assert!(fits(ATTRIBUTES, None, NO_SCHEME).is_ok());
    // Each attribute too much or too little: userWithAuth, adminWithPolicy, restricted, sign; not fixedTPM, …
    for bit in [1, 4, 5, 6, 7, 10, 16, 17, 18] {
        let refused = fits(ATTRIBUTES ^ (1 << bit), None, NO_SCHEME);
        assert!(matches!(refused, Err(ReleaseError::Attributes { .. })), "bit {bit}");
    }
    // ECDH with a hash is another scheme.
    assert!(matches!(
        fits(ATTRIBUTES, None, &[0, 0x19, 0, 0x0B]),
        Err(ReleaseError::KeyType)
    ));
    // No policy, another policy.
    assert!(matches!(
        fits(ATTRIBUTES, Some(&[]), NO_SCHEME),
        Err(ReleaseError::Policy { .. })
    ));
    assert!(matches!(
        fits(ATTRIBUTES, Some(&[7; 32]), NO_SCHEME),
        Err(ReleaseError::Policy { .. })
    ));
    // The attestation key itself is none.
    let asking = asking();
    let public = asking.host.key.public(AK_ATTRIBUTES);
    assert!(matches!(
        asking.with_public(public).check(),
        Err(ReleaseError::Attributes { .. })
    ));
}
