//! For tests: a host whose "TPM" is a software key that signs whatever a test wants, also what no TPM would.

use std::collections::BTreeMap;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};

use crate::binding::{Binding, Exporter, Nonce};
use crate::bundle::{Bundle, LogPart, Pcrs, QuotePart};
use crate::cel::{Head, Record};
use crate::digest::{Algorithm, Sha256Digest};
use crate::event::{AgentStart, Event, LoadKind, Measurement, Mode};
use crate::tpm::{AttestationKey, ClockInfo};
use crate::wire::{B64, Hex};

pub(crate) const BOOT: &str = "6b1f0e2a-93c4-4d5e-8f70-0123456789ab";
pub(crate) const OTHER_BOOT: &str = "11111111-2222-4333-8444-555555555555";
pub(crate) const NONCE: Nonce = Nonce::new([0x11; 32]);
pub(crate) const EXPORTER: Exporter = Exporter::new([0x22; 32]);
pub(crate) const BINDING: Binding<'static> = Binding::Quote {
    nonce: &NONCE,
    exporter: &EXPORTER,
};
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign.
pub(crate) const AK_ATTRIBUTES: u32 = 0x0005_0072;

pub(crate) fn agent_start(boot_id: &str) -> AgentStart {
    AgentStart {
        agent_version: "0.1.0".into(),
        agent_digest: Sha256Digest::of(b"agent"),
        bpf_digest: Sha256Digest::of(b"bpf"),
        boot_id: boot_id.into(),
        kernel_release: "6.12.0".into(),
        cmdline: "root=/dev/vda1 lsm=integrity,bpf".into(),
        lsm: "lockdown,capability,bpf".into(),
        lockdown: "none".into(),
        tier: 1,
        mode: Mode::Observe,
        pcr_start: vec![(Algorithm::Sha1, vec![0; 20]), (Algorithm::Sha256, vec![0; 32])],
        predecessor: None,
        blind: String::new(),
        protected: false,
    }
}

pub(crate) fn measurement(kind: LoadKind, path: &str, seq: Option<u64>) -> Measurement {
    Measurement {
        kind,
        flags: 0,
        digest: Some(Sha256Digest::of(path.as_bytes())),
        size: 4096,
        path: path.into(),
        comm: "sh".into(),
        seq,
        time_ns: 1_000_000,
        pid: 42,
        uid: 0,
        dev: 0x00fe_0001,
        ino: 1234,
        generation: 7,
        change: 99,
        fs_magic: 0xEF53,
        cgroup: 1,
    }
}

pub(crate) fn load(path: &str, seq: u64) -> Event {
    Event::Load(measurement(LoadKind::Program, path, Some(seq)))
}

/// A P-256 key in the role of an AK.
pub(crate) struct SoftKey {
    pair: EcdsaKeyPair,
}

impl SoftKey {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        Self { pair }
    }

    /// `TPMT_PUBLIC` with these attributes, ECDSA with SHA-256.
    pub(crate) fn public(&self, attributes: u32) -> Vec<u8> {
        let point = self.pair.public_key().as_ref();
        let mut out = vec![0x00, 0x23, 0x00, 0x0B];
        out.extend_from_slice(&attributes.to_be_bytes());
        // No policy; no cipher; ECDSA with SHA-256; P-256; no KDF.
        out.extend_from_slice(&[0, 0, 0, 0x10, 0, 0x18, 0, 0x0B, 0, 3, 0, 0x10]);
        for coordinate in point[1..].chunks(32) {
            out.extend_from_slice(&[0, 32]);
            out.extend_from_slice(coordinate);
        }
        out
    }

    pub(crate) fn ak(&self) -> AttestationKey {
        AttestationKey::new(&self.public(AK_ATTRIBUTES)).unwrap()
    }

    /// `TPMT_SIGNATURE`.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature = self.pair.sign(&SystemRandom::new(), message).unwrap();
        let mut out = vec![0, 0x18, 0, 0x0B];
        for number in signature.as_ref().chunks(32) {
            out.extend_from_slice(&[0, 32]);
            out.extend_from_slice(number);
        }
        out
    }
}

/// What goes into a `TPMS_ATTEST` of a quote.
#[derive(Clone)]
pub(crate) struct QuoteFields {
    pub(crate) magic: u32,
    pub(crate) kind: u16,
    pub(crate) extra_data: Vec<u8>,
    pub(crate) clock: ClockInfo,
    /// Algorithm id and bitmap.
    pub(crate) selections: Vec<(u16, Vec<u8>)>,
    pub(crate) digest: Vec<u8>,
}

impl QuoteFields {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = self.magic.to_be_bytes().to_vec();
        out.extend_from_slice(&self.kind.to_be_bytes());
        sized(&mut out, &[0x0B; 34]);
        sized(&mut out, &self.extra_data);
        out.extend_from_slice(&self.clock.clock.to_be_bytes());
        out.extend_from_slice(&self.clock.reset_count.to_be_bytes());
        out.extend_from_slice(&self.clock.restart_count.to_be_bytes());
        out.push(u8::from(self.clock.safe));
        out.extend_from_slice(&0x2019_1023_u64.to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.selections.len()).unwrap().to_be_bytes());
        for (bank, bitmap) in &self.selections {
            out.extend_from_slice(&bank.to_be_bytes());
            out.push(u8::try_from(bitmap.len()).unwrap());
            out.extend_from_slice(bitmap);
        }
        sized(&mut out, &self.digest);
        out
    }
}

pub(crate) fn sized(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
    out.extend_from_slice(bytes);
}

/// A host that measures: log, PCRs and counters move together, unless a test moves one alone.
pub(crate) struct Host {
    pub(crate) key: SoftKey,
    pub(crate) boot_id: String,
    pub(crate) clock: ClockInfo,
    pub(crate) pcrs: BTreeMap<u8, Hex>,
    pub(crate) records: Vec<Record>,
    pub(crate) boot_log: Option<Vec<u8>>,
    /// Where its agent keeps the log.
    pub(crate) pcr: u8,
}

impl Host {
    /// A host before its agent starts: PCRs 0 to 7 measured by firmware, an empty log.
    pub(crate) fn booted(boot_id: &str, reset_count: u32) -> Self {
        let pcrs = (0..16)
            .map(|index| (index, Hex(vec![if index < 8 { index + 1 } else { 0 }; 32])))
            .collect();
        Self {
            key: SoftKey::new(),
            boot_id: boot_id.into(),
            clock: ClockInfo {
                clock: 1000,
                reset_count,
                restart_count: 0,
                safe: true,
            },
            pcrs,
            records: Vec::new(),
            boot_log: None,
            pcr: 13,
        }
    }

    /// A host with three records: start with inventory and READY, and two loads.
    pub(crate) fn measuring() -> Self {
        Self::measuring_in(13)
    }

    /// As [`Host::measuring`], with the log in another PCR.
    pub(crate) fn measuring_in(pcr: u8) -> Self {
        let mut host = Self::booted(BOOT, 5);
        host.pcr = pcr;
        host.record(&[
            Event::AgentStart(agent_start(BOOT)),
            Event::Inventory(measurement(LoadKind::Mapping, "/lib/libc.so.6", None)),
            Event::Ready,
        ]);
        host.record(&[load("/bin/true", 0)]);
        host.record(&[load("/bin/ls", 1)]);
        host
    }

    /// The same host after a reboot.
    pub(crate) fn reboot(self, boot_id: &str) -> Self {
        let mut after = Self::booted(boot_id, self.clock.reset_count + 1);
        after.key = self.key;
        after.pcr = self.pcr;
        after.clock.clock = self.clock.clock + 10_000;
        after
    }

    /// Appends a record and extends its PCR.
    pub(crate) fn record(&mut self, events: &[Event]) {
        let number = u64::try_from(self.records.len()).unwrap();
        let record = Record::build(number, self.pcr, events, &[Algorithm::Sha1, Algorithm::Sha256]).unwrap();
        self.append(record);
    }

    pub(crate) fn append(&mut self, record: Record) {
        let digest = record.digest(Algorithm::Sha256).unwrap().to_vec();
        self.extend(&digest);
        self.records.push(record);
        self.clock.clock += 10;
    }

    /// Extends its PCR alone.
    pub(crate) fn extend(&mut self, digest: &[u8]) {
        let pcr = self.pcrs.get_mut(&self.pcr).unwrap();
        pcr.0 = Algorithm::Sha256.extend(&pcr.0, digest);
    }

    pub(crate) fn head(&self) -> Head {
        let mut head = Head::new();
        for record in &self.records {
            head.push(record).unwrap();
        }
        head
    }

    pub(crate) fn log_bytes(&self, from: usize) -> Vec<u8> {
        self.records[from..].iter().flat_map(Record::encode).collect()
    }

    /// What its TPM would sign for this question.
    pub(crate) fn quote_fields(&self, binding: &Binding<'_>) -> QuoteFields {
        let head = self.head();
        let values: Vec<u8> = self.pcrs.values().flat_map(|value| value.0.clone()).collect();
        QuoteFields {
            magic: 0xFF54_4347,
            kind: 0x8018,
            extra_data: binding.digest(head.records(), &head.value()).to_vec(),
            clock: self.clock,
            selections: vec![(0x000B, vec![0xFF, 0xFF, 0x00])],
            digest: Algorithm::Sha256.hash(&values),
        }
    }

    /// Evidence with a quote over these fields.
    pub(crate) fn bundle_with(&self, fields: &QuoteFields, from: usize) -> Bundle {
        let attest = fields.encode();
        let signature = self.key.sign(&attest);
        Bundle {
            version: 1,
            boot_id: self.boot_id.clone(),
            quote: QuotePart {
                attest: B64(attest),
                signature: B64(signature),
            },
            pcrs: Pcrs::from([(Algorithm::Sha256, self.pcrs.clone())]),
            log: LogPart {
                from: u64::try_from(from).unwrap(),
                records: self.head().records(),
                data: B64(self.log_bytes(from)),
            },
            boot_log: self.boot_log.clone().map(B64),
            ima_log: None,
        }
    }

    pub(crate) fn bundle(&self, binding: &Binding<'_>, from: usize) -> Bundle {
        self.bundle_with(&self.quote_fields(binding), from)
    }
}
