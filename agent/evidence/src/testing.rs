//! For tests, fuzz targets and benchmarks: a host whose "TPM" is a software key that signs whatever a test wants, also what no
//! TPM would. Outside this crate's own tests it takes the feature `testing`; nothing that is installed has it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test host that cannot be made is a failure of that test"
)]

use std::collections::BTreeMap;

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};

use crate::binding::{Binding, Exporter, Nonce};
use crate::bundle::{Bundle, LogPart, Pcrs, QuotePart};
use crate::cel::{Head, Record};
use crate::digest::{Algorithm, Sha256Digest};
use crate::event::{AgentStart, Event, LoadKind, Measurement, Mode};
use crate::pcr::RuntimePcr;
use crate::quote::{HeldLog, QUOTED_PCRS};
use crate::replay::ReplayedLog;
use crate::tpm::{AttestationKey, ClockInfo};
use crate::wire::{B64, Hex};

/// Unix time at which everything is judged: 2026-11-27.
pub const NOW: u64 = 1_795_737_600;
/// The boot id of [`Host::measuring`].
pub const BOOT: &str = "6b1f0e2a-93c4-4d5e-8f70-0123456789ab";
/// Another one.
pub const OTHER_BOOT: &str = "11111111-2222-4333-8444-555555555555";
/// The nonce of [`BINDING`].
pub const NONCE: Nonce = Nonce::new([0x11; 32]);
/// The TLS exporter of [`BINDING`].
pub const EXPORTER: Exporter = Exporter::new([0x22; 32]);
/// The question that is answered.
pub const BINDING: Binding<'static> = Binding::Quote {
    nonce: &NONCE,
    exporter: &EXPORTER,
};
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign.
pub const AK_ATTRIBUTES: u32 = 0x0005_0072;

/// An agent's start in this boot.
pub fn agent_start(boot_id: &str) -> AgentStart {
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

/// A load of this file; its digest is that of its path.
pub fn measurement(kind: LoadKind, path: &str, seq: Option<u64>) -> Measurement {
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

/// A program that was started.
pub fn load(path: &str, seq: u64) -> Event {
    Event::Load(measurement(LoadKind::Program, path, Some(seq)))
}

/// A P-256 key in the role of an AK.
#[derive(Debug)]
pub struct SoftKey {
    pair: EcdsaKeyPair,
}

impl SoftKey {
    /// A new key.
    #[expect(clippy::new_without_default, reason = "a key is made, not a default")]
    pub fn new() -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        Self { pair }
    }

    /// `TPMT_PUBLIC` with these attributes, ECDSA with SHA-256.
    pub fn public(&self, attributes: u32) -> Vec<u8> {
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

    /// As the verifier holds it.
    pub fn ak(&self) -> AttestationKey {
        AttestationKey::new(&self.public(AK_ATTRIBUTES)).unwrap()
    }

    /// `TPMT_SIGNATURE`.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
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
#[derive(Debug, Clone)]
pub struct QuoteFields {
    /// TPM_GENERATED_VALUE, if it is what a TPM would say.
    pub magic: u32,
    /// TPM_ST_ATTEST_QUOTE, likewise.
    pub kind: u16,
    /// Qualifying data.
    pub extra_data: Vec<u8>,
    /// The TPM's clock and counters.
    pub clock: ClockInfo,
    /// Algorithm id and bitmap.
    pub selections: Vec<(u16, Vec<u8>)>,
    /// Over the selected PCRs.
    pub digest: Vec<u8>,
}

impl QuoteFields {
    /// TPMS_ATTEST.
    pub fn encode(&self) -> Vec<u8> {
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

/// A TPM2B: bytes behind their length.
pub fn sized(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Bytes behind their length, as in the kernel's IMA log.
pub fn counted(data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [length.to_le_bytes().as_slice(), data].concat()
}

/// An entry of an IMA log with these fields, as the kernel writes it.
pub fn ima_entry(bank: Algorithm, template: &str, fields: &[&[u8]]) -> Vec<u8> {
    let data: Vec<u8> = fields.iter().flat_map(|field| counted(field)).collect();
    let digest = bank.hash(&data);
    let head = [10_u32.to_le_bytes().as_slice(), &digest, &counted(template.as_bytes())].concat();
    [head, counted(&data)].concat()
}

/// The field `d-ng` of an IMA entry.
pub fn ima_digest(algorithm: &str, digest: &[u8]) -> Vec<u8> {
    [algorithm.as_bytes(), b":\0", digest].concat()
}

/// What a verifier that knows nothing of this host makes of its evidence.
pub fn replayed(host: &Host) -> ReplayedLog {
    host.bundle(&BINDING, 0)
        .verify(&host.key.ak(), &BINDING, &HeldLog::none())
        .unwrap()
        .replay(RuntimePcr::new(host.pcr).unwrap())
        .unwrap()
}

/// A host that measures: log, PCRs and counters move together, unless a test moves one alone.
#[derive(Debug)]
pub struct Host {
    /// Its attestation key.
    pub key: SoftKey,
    /// Its boot id.
    pub boot_id: String,
    /// The TPM's clock and counters.
    pub clock: ClockInfo,
    /// PCRs of the SHA-256 bank.
    pub pcrs: BTreeMap<u8, Hex>,
    /// The runtime log.
    pub records: Vec<Record>,
    /// The firmware's log.
    pub boot_log: Option<Vec<u8>>,
    /// The kernel's own log.
    pub ima_log: Option<Vec<u8>>,
    /// Where its agent keeps the log.
    pub pcr: u8,
    /// The banks that its TPM has.
    pub banks: Vec<Algorithm>,
}

impl Host {
    /// A host before its agent starts: PCRs 0 to 7 measured by firmware, an empty log.
    pub fn booted(boot_id: &str, reset_count: u32) -> Self {
        let value = |index| match index {
            0..8 => index + 1,
            17 | 18 => 0xFF,
            _ => 0,
        };
        let pcrs = QUOTED_PCRS.into_iter();
        let pcrs = pcrs.map(|index| (index, Hex(vec![value(index); 32]))).collect();
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
            ima_log: None,
            pcr: 13,
            banks: vec![Algorithm::Sha1, Algorithm::Sha256],
        }
    }

    /// A host with three records: start with inventory and READY, and two loads.
    pub fn measuring() -> Self {
        Self::measuring_in(13)
    }

    /// As [`Host::measuring`], with the log in another PCR.
    pub fn measuring_in(pcr: u8) -> Self {
        let mut host = Self::booted(BOOT, 5);
        host.pcr = pcr;
        host.measure();
        host
    }

    /// As [`Host::measuring`], with a TPM that has only the bank that is quoted, as new ones come.
    pub fn without_sha1() -> Self {
        let mut host = Self::booted(BOOT, 5);
        host.banks = vec![Algorithm::Sha256];
        host.measure();
        host
    }

    fn measure(&mut self) {
        self.record(&[
            Event::from(agent_start(BOOT)),
            Event::Inventory(measurement(LoadKind::Mapping, "/lib/libc.so.6", None)),
            Event::Ready,
        ]);
        self.record(&[load("/bin/true", 0)]);
        self.record(&[load("/bin/ls", 1)]);
    }

    /// The same host after a reboot.
    pub fn reboot(self, boot_id: &str) -> Self {
        let mut after = Self::booted(boot_id, self.clock.reset_count + 1);
        after.key = self.key;
        after.pcr = self.pcr;
        after.banks = self.banks;
        after.clock.clock = self.clock.clock + 10_000;
        after
    }

    /// Appends a record and extends its PCR.
    pub fn record(&mut self, events: &[Event]) {
        let number = u64::try_from(self.records.len()).unwrap();
        let record = Record::build(number, self.pcr, events, &self.banks).unwrap();
        self.append(record);
    }

    /// Appends this record and extends its PCR.
    pub fn append(&mut self, record: Record) {
        let digest = record.digest(Algorithm::Sha256).unwrap().to_vec();
        self.extend(&digest);
        self.records.push(record);
        self.clock.clock += 10;
    }

    /// Its kernel measures a file, too; `None`: it could not tell what was read. SHA-1 in the list, and each bank its own.
    pub fn ima(&mut self, path: &str, digest: Option<(&str, &[u8])>) {
        let name = [path.as_bytes(), &[0]].concat();
        let field = match digest {
            Some((algorithm, digest)) => ima_digest(algorithm, digest),
            None => ima_digest("sha256", &[0; 32]),
        };
        let fields = [field.as_slice(), &name];
        let mut entry = ima_entry(Algorithm::Sha1, "ima-ng", &fields);
        let data: Vec<u8> = fields.iter().flat_map(|field| counted(field)).collect();
        let mut extended = Algorithm::Sha256.hash(&data);
        if digest.is_none() {
            entry[4..24].fill(0);
            extended.fill(0xFF);
        }
        self.ima_log.get_or_insert_default().extend(entry);
        let pcr = self.pcrs.get_mut(&10).unwrap();
        pcr.0 = Algorithm::Sha256.extend(&pcr.0, &extended);
    }

    /// Extends its PCR alone.
    pub fn extend(&mut self, digest: &[u8]) {
        let pcr = self.pcrs.get_mut(&self.pcr).unwrap();
        pcr.0 = Algorithm::Sha256.extend(&pcr.0, digest);
    }

    /// The log's head.
    pub fn head(&self) -> Head {
        let mut head = Head::new();
        for record in &self.records {
            head.push(record).unwrap();
        }
        head
    }

    /// The log from this record on, encoded.
    pub fn log_bytes(&self, from: usize) -> Vec<u8> {
        self.records[from..].iter().flat_map(Record::encode).collect()
    }

    /// What its TPM would sign for this question.
    pub fn quote_fields(&self, binding: &Binding<'_>) -> QuoteFields {
        let head = self.head();
        let values: Vec<u8> = self.pcrs.values().flat_map(|value| value.0.clone()).collect();
        QuoteFields {
            magic: 0xFF54_4347,
            kind: 0x8018,
            extra_data: binding.digest(head.records(), &head.value()).to_vec(),
            clock: self.clock,
            selections: vec![(0x000B, vec![0xFF, 0xFF, 0x06])],
            digest: Algorithm::Sha256.hash(&values),
        }
    }

    /// Evidence with a quote over these fields.
    pub fn bundle_with(&self, fields: &QuoteFields, from: usize) -> Bundle {
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
            ima_log: self.ima_log.clone().map(B64),
        }
    }

    /// Evidence, as an agent would send it.
    pub fn bundle(&self, binding: &Binding<'_>, from: usize) -> Bundle {
        self.bundle_with(&self.quote_fields(binding), from)
    }
}
