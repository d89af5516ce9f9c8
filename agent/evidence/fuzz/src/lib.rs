//! Fuzz targets: each takes bytes from a stranger and must neither panic nor accept what it could not have written itself.
//! `cargo xtask fuzz` builds and runs them.

mod chain;
mod samples;

use std::collections::BTreeMap;
use std::convert::Infallible;

use assay_evidence::approved::{ListKey, UntrustedList};
use assay_evidence::bootlog::{self, BootFacts, Claim, Meaning, Proven};
use assay_evidence::bundle::Bundle;
use assay_evidence::cel::{self, Head, Record};
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::ek::EkTrust;
use assay_evidence::event;
use assay_evidence::imalog::{self, Extension};
use assay_evidence::jwe::{self, Jwe};
use assay_evidence::luks1::Luks1;
use assay_evidence::policy::Policy;
use assay_evidence::qcow2::Qcow2;
use assay_evidence::token::LuksToken;
use assay_evidence::tpm::{Attest, AttestationKey, Name, Public, Signature};
use assay_evidence::wire::{self, B64, Identity};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::chain::chain;
pub use self::samples::{TARGETS, samples};

/// Whether the digest is a hash of what it is said to prove.
fn covers(bank: Algorithm, event: &Proven<'_>) -> bool {
    let is_hash_of = |data: &[u8]| bank.hash(data) == event.digest();
    match event.meaning() {
        Meaning::Separator { error: true } => is_hash_of(&[1, 0, 0, 0]),
        Meaning::Separator { error: false } => is_hash_of(&[0; 4]) || is_hash_of(&[0xFF; 4]),
        Meaning::Content { claimed } => is_hash_of(claimed.value),
        Meaning::Section(name) => is_hash_of(format!("{name}\0").as_bytes()),
        Meaning::Data { data, .. } => is_hash_of(data),
        Meaning::Text { text, claimed } if *claimed == Claim::GrubCommand => is_hash_of(text.as_bytes()),
        _ => true,
    }
}

/// The firmware's event log: parsed, replayed in each bank, shown, and nothing called proven that its digest does not cover.
pub fn boot_log(data: &[u8]) {
    let Ok(log) = bootlog::parse(data) else { return };
    for bank in log.banks() {
        if let Ok(pcrs) = log.replay(*bank) {
            assert!(
                pcrs.values().all(|value| value.len() == bank.size()),
                "{bank}: a value of another size"
            );
        }
        let Ok(proven) = log.proven(*bank, Some("root=/dev/vda ro")) else {
            continue;
        };
        for event in &proven {
            let text = event.describe();
            assert!(text.chars().count() <= bootlog::MAX_DESCRIPTION, "{text}");
            assert!(!text.chars().any(char::is_control), "{text:?}");
            assert!(covers(*bank, event), "{event:?}");
        }
        drop(BootFacts::of(&proven).to_string());
    }
    drop(log.to_string());
    drop(log.to_json());
}

/// The kernel's IMA list, of each bank that it could be of; and once more with entries whose digests are right, whatever the
/// fields say.
pub fn ima_log(data: &[u8]) {
    ima_list(data);
    let templates = [
        "ima",
        "ima-ng",
        "ima-ngv2",
        "ima-sig",
        "ima-sigv2",
        "ima-buf",
        "ima-modsig",
        "evm-sig",
    ];
    let mut entries = Vec::new();
    let mut rest = data;
    while let Some((&template, behind)) = rest.split_first()
        && let Some((length, behind)) = behind.split_first_chunk()
    {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (fields, behind) = behind.split_at(length.min(behind.len()));
        let template = templates.get(usize::from(template) % templates.len()).unwrap_or(&"ima");
        entries.extend(samples::ima_entry(template, fields));
        rest = behind;
    }
    ima_list(&entries);
}

fn ima_list(data: &[u8]) {
    for own in [Algorithm::Sha1, Algorithm::Sha256] {
        let Ok(log) = imalog::parse(data, own) else { continue };
        for bank in Algorithm::ALL {
            for extension in [Extension::OwnDigest, Extension::PaddedSha1] {
                drop(log.replay(bank, extension, &BTreeMap::new()));
            }
        }
        drop(log.to_string());
        drop(log.to_json());
    }
}

/// The runtime log: what is read is written again byte for byte.
pub fn cel(data: &[u8]) {
    let Ok(records) = cel::read_all(data) else { return };
    let again: Vec<u8> = records.iter().flat_map(Record::encode).collect();
    assert_eq!(again, data, "written in another way than it was read");
    let mut head = Head::new();
    for record in &records {
        drop(record.events());
        drop(record.check_digests());
        drop(cel::to_json(record));
        if head.push(record).is_err() {
            break;
        }
    }
}

/// One event of the runtime log, likewise.
pub fn event(data: &[u8]) {
    if let Ok(event) = event::decode(data) {
        let again = event::encode(&event).expect("what was read is written");
        assert_eq!(again, data, "written in another way than it was read");
    }
    drop(event::decode_all(data));
}

/// A bundle: what is read is the same after it was written.
pub fn bundle(data: &[u8]) {
    let Ok(bundle) = Bundle::from_json(data) else { return };
    let json = bundle.to_json().expect("a bundle has a JSON form");
    assert_eq!(Bundle::from_json(&json).expect("what was written is read"), bundle);
}

/// A policy, likewise.
pub fn policy(data: &[u8]) {
    let Ok(policy) = Policy::from_json(data) else { return };
    let again = Policy::from_json(policy.to_json().as_bytes()).expect("what was written is read");
    assert_eq!(again, policy);
    let mut both = again;
    if both.merge(&policy).is_ok() {
        assert_eq!(both, policy, "a policy merged with itself is itself");
    }
}

/// Attestations, public areas, names, signatures.
pub fn tpm(data: &[u8]) {
    drop(Attest::parse(data));
    drop(Name::parse(data));
    if let Ok(public) = Public::parse(data) {
        assert_eq!(public.as_bytes(), data);
        drop(public.name());
    }
    if let Ok(signature) = Signature::parse(data) {
        for key in [samples::ak_public().as_slice(), samples::RSA_AK] {
            let key = AttestationKey::new(key).expect("an attestation key");
            key.verify(b"never signed", &signature)
                .expect_err("a signature over something else");
        }
    }
    drop(AttestationKey::new(data));
}

/// Signed lists of what may run; the key is not the one that could have signed them.
pub fn approved(data: &[u8]) {
    let Ok(key) = ListKey::from_spki(&samples::list_key()) else {
        return;
    };
    if let Ok(list) = UntrustedList::new(data)
        && let Ok(list) = list.verify(&key, &Sha256Digest::of(b"this host"))
    {
        assert_eq!(list.digests(), samples::draft().digests, "a list that was never signed");
    }
    if let Ok(key) = ListKey::from_spki(data) {
        assert_eq!(
            ListKey::from_spki(&key.spki()).map(|key| key.spki()).ok(),
            Some(key.spki())
        );
    }
}

/// Disk tokens, headers of LUKS1 and qcow2, and wrapped keys with a key agreement that gives the same for all.
pub fn disk(data: &[u8]) {
    if let Ok(header) = Luks1::parse(data) {
        let read = data.get(..assay_evidence::luks1::LEN).expect("so much was read");
        assert_eq!(Luks1::parse(read), Ok(header), "what follows says nothing");
    }
    drop(Qcow2::parse(data));
    if let Ok(token) = LuksToken::parse(data) {
        let json = token.to_json().expect("a token has a JSON form");
        assert_eq!(
            LuksToken::parse(json.as_bytes()).expect("what was written is read"),
            token
        );
    }
    if let Ok(wrapped) = serde_json::from_slice::<Jwe>(data) {
        drop(wrapped.untrusted_key_id());
        jwe::unwrap(&wrapped, |_| Ok::<_, Infallible>([7; 32])).expect_err("nobody has wrapped anything to this key");
    }
}

/// Certificates, as a host shows its own and as an operator gives those to trust.
pub fn certificate(data: &[u8]) {
    drop(EkTrust::read_ca_file(data));
    let trust = EkTrust::Roots(vec![samples::ca()]);
    let identity = Identity {
        ek_certificate: Some(B64(data.to_vec())),
        ..samples::identity()
    };
    trust
        .check(&identity, samples::NOW)
        .expect_err("the trusted authority signed nothing");
}

/// Messages: what is read is the same after it was written.
pub fn wire(data: &[u8]) {
    fn same<T: DeserializeOwned + Serialize>(data: &[u8]) {
        let Ok(message) = serde_json::from_slice::<T>(data) else {
            return;
        };
        let json = serde_json::to_value(&message).expect("a message has a JSON form");
        let again: T = serde_json::from_value(json.clone()).expect("what was written is read");
        assert_eq!(serde_json::to_value(&again).expect("a message has a JSON form"), json);
    }
    same::<Identity>(data);
    same::<wire::ActivateRequest>(data);
    same::<wire::QuoteRequest>(data);
    same::<wire::LogPage>(data);
    same::<wire::ChallengeRequest>(data);
    same::<wire::ChallengeResponse>(data);
    same::<wire::ReleaseRequest>(data);
    same::<wire::ReleaseResponse>(data);
    same::<wire::LeaseNews>(data);
    same::<wire::LeaseAnswer>(data);
    same::<assay_evidence::terms::Terms>(data);
    same::<wire::ErrorBody>(data);
    same::<wire::JoinFile>(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_takes_its_samples_whole_cut_and_changed() {
        for (name, target) in TARGETS {
            let samples = samples(name);
            assert!(!samples.is_empty(), "{name}");
            for sample in samples {
                target(&sample);
                for cut in 0..sample.len().min(64) {
                    target(&sample[..cut]);
                    let mut changed = sample.clone();
                    changed[cut] ^= 0x40;
                    target(&changed);
                }
            }
        }
    }
}
