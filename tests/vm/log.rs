//! A machine's runtime log, read byte by byte with `assay-evidence` and checked against the TPM: what the agent says about
//! itself is not asked.

use std::collections::BTreeMap;

use assay_ebpf::seq;
use assay_evidence::cel::{self, CelError, Head, Record};
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::event::{AgentStart, Event, LoadKind, Measurement, Violation};
use assay_tests::HarnessError;
use assay_tests::guest::Guest;
use assay_tests::vm::Vm;

use crate::common::{PATIENCE, pcr13};

/// Where the agent writes its log by default.
pub const LOG: &str = "/run/assay/log.cel";

/// All whole records of a log, numbered without a gap and each with the digests of its content.
pub struct Log {
    pub records: Vec<Record>,
    pub events: Vec<Event>,
}

impl Log {
    /// Reads the log as it is now; a record that is being written does not count.
    pub fn read(guest: &Guest, path: &str) -> Result<Self, HarnessError> {
        let bytes = guest.get(path)?;
        let (mut records, mut head, mut rest) = (Vec::new(), Head::new(), bytes.as_slice());
        while !rest.is_empty() {
            let (record, used) = match cel::read(rest) {
                Err(CelError::Short(_)) => break,
                other => other.expect("a log that can be read"),
            };
            record.check_digests().expect("digests of the content");
            head.push(&record).expect("the next number");
            records.push(record);
            rest = rest.get(used..).unwrap_or_default();
        }
        let events = records
            .iter()
            .flat_map(|record| record.events().expect("events that can be read"))
            .collect();
        Ok(Self { records, events })
    }

    /// Waits until the log is as `is` wants it.
    pub fn wait(guest: &Guest, path: &str, what: &str, is: impl Fn(&Self) -> bool) -> Result<Self, HarnessError> {
        Guest::wait_for(&format!("the log never showed {what}"), PATIENCE, || {
            // Until the agent has made it there is none.
            Ok(Self::read(guest, path).ok().filter(|log| is(log)))
        })
    }

    /// Waits until log and PCR agree, with nothing left to come.
    pub fn settled(vm: &Vm, path: &str) -> Result<Self, HarnessError> {
        // tpm2 is itself measured when it runs for the first time; only then can both stand still.
        pcr13(vm)?;
        Guest::wait_for("log and PCR 13 never agreed", PATIENCE, || {
            let log = Self::read(vm.guest(), path)?;
            Ok((pcr13(vm)? == log.pcr()).then_some(log))
        })
    }

    /// As [`Log::settled`], where the TPM's device is closed to others: the kernel itself is asked for the PCR.
    pub fn at_rest(guest: &Guest) -> Result<Self, HarnessError> {
        Guest::wait_for("log and PCR 13 never agreed", PATIENCE, || {
            let log = Self::read(guest, LOG)?;
            Ok((guest.sysfs_pcr(13)? == log.pcr()).then_some(log))
        })
    }

    /// The events of the records that had been extended when PCR 13 showed this.
    pub fn extended_at(&self, pcr: &str) -> Vec<Event> {
        let last = (1..=self.records.len()).find(|count| self.pcr_after(*count) == pcr);
        let last = last.unwrap_or_else(|| panic!("PCR 13 showed {pcr}, which follows from no part of the log"));
        self.records[..last]
            .iter()
            .flat_map(|record| record.events().expect("events that can be read"))
            .collect()
    }

    /// What PCR 13 (SHA-256) shows if this log is all that was extended, in hex.
    pub fn pcr(&self) -> String {
        self.pcr_after(self.records.len())
    }

    fn pcr_after(&self, records: usize) -> String {
        let first = self.start();
        let mut value = first
            .pcr_start
            .iter()
            .find(|(bank, _)| *bank == Algorithm::Sha256)
            .expect("a SHA-256 bank")
            .1
            .clone();
        for record in self.records.iter().take(records) {
            value = Algorithm::Sha256.extend(&value, record.digest(Algorithm::Sha256).expect("a SHA-256 digest"));
        }
        value.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The first start of an agent, with which every log begins.
    pub fn start(&self) -> &AgentStart {
        let first = self.events.first();
        first.and_then(start_of).expect("a log begins with the agent's start")
    }

    /// Every start of an agent.
    pub fn starts(&self) -> Vec<&AgentStart> {
        self.events.iter().filter_map(start_of).collect()
    }

    /// Everything that the kernel programs recorded.
    pub fn loads(&self) -> Vec<&Measurement> {
        self.events
            .iter()
            .filter_map(|event| {
                if let Event::Load(load) = event {
                    Some(load)
                } else {
                    None
                }
            })
            .collect()
    }

    /// Everything that the inventory found.
    pub fn inventory(&self) -> Vec<&Measurement> {
        self.events
            .iter()
            .filter_map(|event| {
                if let Event::Inventory(found) = event {
                    Some(found)
                } else {
                    None
                }
            })
            .collect()
    }

    /// What was recorded of this path: kind, digest in hex, flags.
    pub fn of(&self, path: &str) -> Vec<(LoadKind, String, u32)> {
        self.loads()
            .into_iter()
            .filter(|load| load.path == path)
            .map(short)
            .collect()
    }

    /// Every attempt on the agent of this kind.
    pub fn attempts(&self, kind: LoadKind) -> usize {
        self.loads().iter().filter(|load| load.kind == kind).count()
    }

    /// All violations.
    pub fn violations(&self) -> Vec<&Violation> {
        self.events
            .iter()
            .filter_map(|event| {
                if let Event::Violation(violation) = event {
                    Some(violation)
                } else {
                    None
                }
            })
            .collect()
    }

    /// How often this event is in it.
    pub fn count(&self, wanted: &Event) -> usize {
        self.events.iter().filter(|event| *event == wanted).count()
    }

    /// Positions of the kernel's records, in order, for each CPU that made any.
    pub fn numbers(&self) -> BTreeMap<u64, Vec<u64>> {
        let mut numbers = BTreeMap::<u64, Vec<u64>>::new();
        for (cpu, position) in self.loads().iter().filter_map(|load| load.seq).map(seq::split) {
            numbers.entry(cpu).or_default().push(position);
        }
        numbers.values_mut().for_each(|positions| positions.sort_unstable());
        numbers
    }

    /// Each CPU numbers its records: all of them are here, from the first to the last, each once.
    pub fn assert_no_gap(&self) {
        for (cpu, positions) in self.numbers() {
            let expected: Vec<u64> = (0..positions.len() as u64).collect();
            assert!(
                positions == expected,
                "the records of CPU {cpu} have gaps or repetitions: {positions:?}"
            );
        }
    }
}

fn start_of(event: &Event) -> Option<&AgentStart> {
    if let Event::AgentStart(start) = event {
        Some(start)
    } else {
        None
    }
}

/// Kind, digest in hex, flags.
pub fn short(load: &Measurement) -> (LoadKind, String, u32) {
    (
        load.kind,
        load.digest
            .map(|digest: Sha256Digest| digest.to_string())
            .unwrap_or_default(),
        load.flags,
    )
}
