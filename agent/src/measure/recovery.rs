//! What an earlier agent of this boot left behind, and how to go on from there.
//!
//! A record is appended before it is extended, and only one is in flight. So the PCR can equal
//!
//! * the whole log: nothing was in flight;
//! * the log without its last record: that record is extended now;
//! * the log without an incomplete record at its end: that one is cut off, its events are still in the journal.
//!
//! Anything else cannot come from a crash. It is said in a violation record, the log goes on, and the verifier, for whom log and
//! PCR no longer fit, trusts this boot no more.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use assay_evidence::cel::{self, CelError, Head, Record};
use assay_evidence::digest::Algorithm;
use assay_evidence::event::{AgentStart, Event, Violation};

use super::MeasureError;
use super::log::{self, Position};
use crate::tpm::BankDigests;

/// Where to go on.
#[derive(Debug)]
pub struct Recovered {
    /// Where the log goes on.
    pub(super) position: Position,
    /// End of each of its records.
    pub ends: Vec<u64>,
    /// The PCR's value before the first record of the log.
    pub pcr_start: BankDigests,
    /// The last record, when it has still to be extended.
    pub resume: Option<Record>,
    /// What is wrong with log and PCR.
    pub mismatch: Option<String>,
    /// What the log says already.
    pub said: Said,
}

/// What the log of this boot says already.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// An agent started in this boot before.
    pub started: bool,
    /// Its inventory is complete.
    pub ready: bool,
    /// Sequence numbers of the kernel's records that are in the log.
    pub seqs: HashSet<u64>,
    /// Lost records that were reported.
    pub lost: u64,
}

/// Looks at the run folder's log, given the boot and the PCR as they are now.
///
/// A log of another boot, or one that is no log, is renamed, and a new one begins.
///
/// # Errors
/// [`MeasureError::File`], [`MeasureError::LogFull`] when the file is larger than a log may be.
pub fn recover(run_dir: &Path, boot_id: &str, pcr: u8, now: &BankDigests, max_bytes: u64) -> Result<Recovered, MeasureError> {
    let path = run_dir.join(log::NAME);
    let bytes = read_limited(&path, max_bytes)?;
    if bytes.is_empty() {
        return Ok(Recovered::fresh(now));
    }
    match parse(&bytes) {
        Ok(Parsed { records, .. }) if records.is_empty() => {
            // The very first record never got whole, so it was never extended.
            Ok(Recovered::fresh(now))
        }
        Ok(parsed) => match parsed.start() {
            Some(start) if start.boot_id == boot_id => {
                let pcr_start = start.pcr_start.clone();
                let recovered = judge(&parsed, pcr_start, pcr, now);
                if recovered.mismatch.is_some() && parsed.tail > 0 {
                    keep_copy(&path, "damaged")?;
                }
                Ok(recovered)
            }
            Some(start) => {
                set_aside(&path, &start.boot_id)?;
                set_aside(&run_dir.join(super::journal::NAME), &start.boot_id)?;
                Ok(Recovered::fresh(now))
            }
            None => damaged(&path, now, "it does not begin with AGENT_START"),
        },
        Err(error) => damaged(&path, now, &error.to_string()),
    }
}

impl Recovered {
    /// No log of this boot.
    fn fresh(now: &BankDigests) -> Self {
        Self {
            position: Position { end: 0, head: Head::new() },
            ends: Vec::new(),
            pcr_start: now.clone(),
            resume: None,
            mismatch: None,
            said: Said::default(),
        }
    }
}

/// A log as far as it can be read.
struct Parsed {
    records: Vec<Record>,
    events: Vec<Event>,
    ends: Vec<u64>,
    head: Head,
    /// Bytes of an incomplete record at the end.
    tail: u64,
}

impl Parsed {
    fn start(&self) -> Option<&AgentStart> {
        match self.events.first() {
            Some(Event::AgentStart(start)) => Some(start),
            _ => None,
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Parsed, CelError> {
    let mut parsed = Parsed { records: Vec::new(), events: Vec::new(), ends: Vec::new(), head: Head::new(), tail: 0 };
    let (mut rest, mut end) = (bytes, 0_u64);
    while !rest.is_empty() {
        let (record, used) = match cel::read(rest) {
            Ok(read) => read,
            Err(CelError::Short(_)) => break,
            Err(error) => return Err(error),
        };
        record.check_digests()?;
        parsed.head.push(&record)?;
        parsed.events.extend(record.events()?);
        parsed.records.push(record);
        end += used as u64;
        parsed.ends.push(end);
        rest = rest.get(used..).unwrap_or_default();
    }
    parsed.tail = rest.len() as u64;
    Ok(parsed)
}

/// Compares the log with the PCR. Pure; the whole of the rule above.
fn judge(parsed: &Parsed, pcr_start: BankDigests, pcr: u8, now: &BankDigests) -> Recovered {
    let before_last = parsed.records.len().saturating_sub(1);
    let (earlier, last) = parsed.records.split_at(before_last);
    let without_last = replay(&pcr_start, earlier);
    let whole = without_last.as_ref().and_then(|values| replay(values, last));
    let wrong_pcr = parsed.records.iter().find(|record| record.pcr != pcr);
    let (resume, mismatch) = if let Some(record) = wrong_pcr {
        (None, Some(format!("record {} is of PCR {}, but the agent now uses PCR {pcr}", record.number, record.pcr)))
    } else if same(whole.as_ref(), now) {
        (None, None)
    } else if parsed.tail == 0 && same(without_last.as_ref(), now) {
        (last.first().cloned(), None)
    } else {
        let tail = if parsed.tail > 0 { " and an incomplete one" } else { "" };
        let shown = now.iter().map(|(bank, value)| format!("{bank} {}", hex::encode(value))).collect::<Vec<_>>().join(", ");
        let records = parsed.records.len();
        (None, Some(format!("the log has {records} records{tail}, which do not lead to the PCR's value ({shown})")))
    };
    Recovered {
        position: Position { end: parsed.ends.last().copied().unwrap_or(0), head: parsed.head },
        ends: parsed.ends.clone(),
        pcr_start,
        resume,
        mismatch,
        said: said(&parsed.events),
    }
}

/// What PCRs that hold `start` show after these records; nothing when a record lacks a bank.
fn replay(start: &BankDigests, records: &[Record]) -> Option<BankDigests> {
    start.iter().map(|(bank, value)| Some((*bank, replay_bank(*bank, value, records)?))).collect()
}

fn replay_bank(bank: Algorithm, start: &[u8], records: &[Record]) -> Option<Vec<u8>> {
    records.iter().try_fold(start.to_vec(), |value, record| Some(bank.extend(&value, record.digest(bank)?)))
}

fn same(replayed: Option<&BankDigests>, now: &BankDigests) -> bool {
    let Some(replayed) = replayed else { return false };
    replayed.len() == now.len() && now.iter().all(|value| replayed.contains(value))
}

fn said(events: &[Event]) -> Said {
    let mut said = Said::default();
    for event in events {
        match event {
            Event::AgentStart(_) => said.started = true,
            Event::Ready => said.ready = true,
            Event::Load(load) => said.seqs.extend(load.seq),
            Event::Violation(Violation::Lost { count }) => said.lost = said.lost.saturating_add(*count),
            Event::Inventory(_) | Event::Violation(_) | Event::AgentStop => {}
        }
    }
    said
}

fn damaged(path: &Path, now: &BankDigests, what: &str) -> Result<Recovered, MeasureError> {
    set_aside(path, "damaged")?;
    let mismatch = Some(format!("the log of an earlier agent cannot be read ({what}); it was set aside"));
    Ok(Recovered { mismatch, ..Recovered::fresh(now) })
}

fn read_limited(path: &Path, max_bytes: u64) -> Result<Vec<u8>, MeasureError> {
    match std::fs::metadata(path) {
        // One record may be cut short behind the last one that fitted.
        Ok(metadata) if metadata.len() > max_bytes + cel::MAX_RECORD as u64 => {
            return Err(MeasureError::LogFull { path: path.to_owned(), max_bytes });
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(MeasureError::File { operation: "look at", path: path.to_owned(), source }),
    }
    std::fs::read(path).map_err(MeasureError::file("read the runtime log", path))
}

fn set_aside(path: &Path, why: &str) -> Result<(), MeasureError> {
    match std::fs::rename(path, aside(path, why)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        renamed => renamed.map_err(MeasureError::file("rename", path)),
    }
}

fn keep_copy(path: &Path, why: &str) -> Result<(), MeasureError> {
    std::fs::copy(path, aside(path, why)).map(drop).map_err(MeasureError::file("copy", path))
}

/// `log.cel.<why>`, with nothing in the name that a damaged log could have put there.
fn aside(path: &Path, why: &str) -> PathBuf {
    let why: String = why.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(why);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use assay_evidence::digest::Sha256Digest;
    use assay_evidence::event::Mode;

    use super::*;

    const BOOT: &str = "11111111-2222-4333-8444-555555555555";
    const BANKS: [Algorithm; 2] = [Algorithm::Sha1, Algorithm::Sha256];

    fn zeros() -> BankDigests {
        BANKS.iter().map(|bank| (*bank, vec![0; bank.size()])).collect()
    }

    fn start() -> Event {
        Event::AgentStart(AgentStart {
            agent_version: "1".into(),
            agent_digest: Sha256Digest::ZERO,
            bpf_digest: Sha256Digest::ZERO,
            boot_id: BOOT.into(),
            kernel_release: "6".into(),
            cmdline: String::new(),
            lsm: String::new(),
            lockdown: String::new(),
            tier: 1,
            mode: Mode::Observe,
            pcr_start: zeros(),
            predecessor: None,
        })
    }

    fn records() -> Vec<Record> {
        let batches = [vec![start()], vec![Event::Ready], vec![Event::Violation(Violation::Lost { count: 3 }), Event::AgentStop]];
        (0..).zip(batches).map(|(number, events)| Record::build(number, 13, &events, &BANKS).unwrap()).collect()
    }

    fn recover_in(bytes: &[u8], now: &BankDigests) -> (tempfile::TempDir, Recovered) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(log::NAME), bytes).unwrap();
        let recovered = recover(dir.path(), BOOT, 13, now, 1 << 20).unwrap();
        (dir, recovered)
    }

    fn encode(records: &[Record]) -> Vec<u8> {
        records.iter().flat_map(Record::encode).collect()
    }

    #[test]
    fn a_log_that_equals_the_pcr_goes_on() {
        let records = records();
        let now = replay(&zeros(), &records).unwrap();
        let (_, recovered) = recover_in(&encode(&records), &now);
        assert!(recovered.mismatch.is_none() && recovered.resume.is_none());
        assert_eq!(recovered.position.head.records(), 3);
        assert_eq!(recovered.said, Said { started: true, ready: true, seqs: HashSet::new(), lost: 3 });
    }

    #[test]
    fn a_last_record_that_was_not_extended_is_extended_now() {
        let records = records();
        let now = replay(&zeros(), &records[..2]).unwrap();
        let (_, recovered) = recover_in(&encode(&records), &now);
        assert!(recovered.mismatch.is_none());
        assert_eq!(recovered.resume.as_ref(), records.last());
    }

    #[test]
    fn an_incomplete_record_goes_only_if_it_was_not_extended() {
        let records = records();
        let bytes = encode(&records);
        let whole = encode(&records[..2]).len();
        let not_extended = replay(&zeros(), &records[..2]).unwrap();
        let extended = replay(&zeros(), &records).unwrap();
        for cut in whole + 1..bytes.len() {
            let (_, recovered) = recover_in(&bytes[..cut], &not_extended);
            assert!(recovered.mismatch.is_none() && recovered.resume.is_none(), "cut at {cut}");
            assert_eq!(recovered.position.end, whole as u64);
            let (dir, recovered) = recover_in(&bytes[..cut], &extended);
            assert!(recovered.mismatch.is_some() && recovered.resume.is_none(), "cut at {cut}");
            assert!(dir.path().join("log.cel.damaged").exists());
        }
    }

    #[test]
    fn any_other_pcr_value_is_a_mismatch() {
        let records = records();
        for now in [zeros(), replay(&zeros(), &records[..1]).unwrap(), vec![(Algorithm::Sha256, vec![9; 32])]] {
            assert!(recover_in(&encode(&records), &now).1.mismatch.is_some());
        }
        let mut one_bank_off = replay(&zeros(), &records).unwrap();
        one_bank_off[0].1[0] ^= 1;
        assert!(recover_in(&encode(&records), &one_bank_off).1.mismatch.is_some());
    }

    #[test]
    fn another_boots_log_is_set_aside_and_a_damaged_one_is_told() {
        let records = records();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(log::NAME), encode(&records)).unwrap();
        std::fs::write(dir.path().join("journal"), b"x").unwrap();
        let recovered = recover(dir.path(), "another-boot", 13, &zeros(), 1 << 20).unwrap();
        assert!(!recovered.said.started && recovered.mismatch.is_none());
        assert!(dir.path().join(format!("log.cel.{BOOT}")).exists() && !dir.path().join(log::NAME).exists());
        assert!(!dir.path().join("journal").exists());

        let (dir, recovered) = recover_in(b"\x07 this is no log, and long enough to say so", &zeros());
        assert!(recovered.mismatch.is_some());
        assert!(dir.path().join("log.cel.damaged").exists());
    }
}
