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
use assay_evidence::event::{AgentStart, Event, Violation};

use super::MeasureError;
use super::log::{self, Position};
use super::sequence::Gap;
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
    /// The events of the last record that is in the PCR, or will be when `resume` is extended.
    pub last: Vec<Event>,
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
    /// The last of them, also of kernel programs that are gone.
    pub last: Option<u64>,
    /// Sequence numbers whose absence was reported.
    pub gaps: Vec<Gap>,
    /// Lost records that were reported.
    pub lost: u64,
    /// The limit that the log reached, if it did.
    pub full: Option<u64>,
}

/// Looks at the run folder's log, given the boot and the PCR as they are now.
///
/// A log of another boot, or one that is no log, is renamed, and a new one begins.
///
/// # Errors
/// [`MeasureError::File`], [`MeasureError::LogFull`] when the file is larger than a log may be.
pub fn recover(
    run_dir: &Path,
    boot_id: &str,
    pcr: u8,
    now: &BankDigests,
    max_bytes: u64,
) -> Result<Recovered, MeasureError> {
    let path = run_dir.join(log::NAME);
    let bytes = read_limited(&path, max_bytes)?;
    if bytes.is_empty() {
        return Ok(Recovered::fresh(now));
    }
    match parse(&bytes) {
        // The very first record never got whole, so it was never extended.
        Ok(parsed) if parsed.ends.is_empty() => Ok(Recovered::fresh(now)),
        Ok(parsed) if parsed.start.boot_id == boot_id => {
            let recovered = judge(parsed, pcr, now);
            if recovered.mismatch.is_some() && recovered.position.end < bytes.len() as u64 {
                keep_copy(&path, "damaged")?;
            }
            Ok(recovered)
        }
        Ok(parsed) => {
            set_aside(&path, &parsed.start.boot_id)?;
            set_aside(&run_dir.join(super::journal::NAME), &parsed.start.boot_id)?;
            Ok(Recovered::fresh(now))
        }
        Err(error) => damaged(&path, now, &error.to_string()),
    }
}

impl Recovered {
    /// No log of this boot.
    fn fresh(now: &BankDigests) -> Self {
        Self {
            position: Position {
                end: 0,
                head: Head::new(),
            },
            ends: Vec::new(),
            pcr_start: now.clone(),
            resume: None,
            last: Vec::new(),
            mismatch: None,
            said: Said::default(),
        }
    }
}

/// A log as far as it can be read. One record is looked at after the other: a long log costs no memory but its own bytes.
#[derive(Default)]
struct Parsed {
    start: Start,
    ends: Vec<u64>,
    head: Head,
    last: Option<Record>,
    /// What the PCRs show after all records but the last, and after all; nothing when a record lacks a bank.
    without_last: Option<BankDigests>,
    whole: Option<BankDigests>,
    /// PCRs that the records are of.
    pcrs: Vec<u8>,
    /// Bytes of an incomplete record at the end.
    tail: usize,
    said: Said,
}

/// What the log's first event says.
#[derive(Default)]
struct Start {
    boot_id: String,
    pcr_start: BankDigests,
}

/// Why a file is no runtime log.
#[derive(Debug, thiserror::Error)]
enum ParseError {
    #[error(transparent)]
    Record(#[from] CelError),
    #[error("it does not begin with AGENT_START")]
    NoStart,
}

fn parse(bytes: &[u8]) -> Result<Parsed, ParseError> {
    let mut parsed = Parsed::default();
    let (mut rest, mut end) = (bytes, 0_u64);
    while !rest.is_empty() {
        let (record, used) = match cel::read(rest) {
            Ok(read) => read,
            Err(CelError::Short(_)) => break,
            Err(error) => return Err(error.into()),
        };
        record.check_digests()?;
        parsed.take(record)?;
        end += used as u64;
        parsed.ends.push(end);
        rest = rest.get(used..).unwrap_or_default();
    }
    parsed.tail = rest.len();
    Ok(parsed)
}

impl Parsed {
    fn take(&mut self, record: Record) -> Result<(), ParseError> {
        let events = record.events()?;
        if self.ends.is_empty() {
            let Some(Event::AgentStart(first)) = events.first() else {
                return Err(ParseError::NoStart);
            };
            let AgentStart { boot_id, pcr_start, .. } = first.as_ref();
            self.whole = Some(pcr_start.clone());
            self.start = Start {
                boot_id: boot_id.clone(),
                pcr_start: pcr_start.clone(),
            };
        }
        self.head.push(&record)?;
        for event in &events {
            self.said.hear(event);
        }
        if !self.pcrs.contains(&record.pcr) {
            self.pcrs.push(record.pcr);
        }
        let whole = self.whole.as_ref().and_then(|values| extended(values, &record));
        self.without_last = std::mem::replace(&mut self.whole, whole);
        self.last = Some(record);
        Ok(())
    }
}

impl Said {
    fn hear(&mut self, event: &Event) {
        match event {
            Event::AgentStart(_) => self.started = true,
            Event::Ready => self.ready = true,
            Event::Load(load) => {
                self.seqs.extend(load.seq);
                self.last = load.seq.or(self.last);
            }
            Event::Violation(Violation::SequenceGap { expected, found }) => self.gaps.push(Gap {
                expected: *expected,
                found: *found,
            }),
            // Other kernel programs from here on, which count and number anew.
            Event::Violation(Violation::HooksMissing { .. }) => {
                self.seqs.clear();
                self.gaps.clear();
                self.lost = 0;
            }
            Event::Violation(Violation::Lost { count }) => self.lost = self.lost.saturating_add(*count),
            Event::Violation(Violation::LogFull { max_bytes }) => self.full = Some(*max_bytes),
            Event::Inventory(_) | Event::Violation(_) | Event::AgentStop | Event::Notice(_) => {}
        }
    }
}

/// Compares the log with the PCR. Pure; the whole of the rule above.
fn judge(parsed: Parsed, pcr: u8, now: &BankDigests) -> Recovered {
    let last = parsed
        .last
        .as_ref()
        .and_then(|record| record.events().ok())
        .unwrap_or_default();
    let (resume, mismatch) = if parsed.pcrs != [pcr] {
        (
            None,
            Some(format!(
                "the log is of PCR {:?}, but the agent now uses PCR {pcr}",
                parsed.pcrs
            )),
        )
    } else if same(parsed.whole.as_ref(), now) {
        (None, None)
    } else if parsed.tail == 0 && same(parsed.without_last.as_ref(), now) {
        (parsed.last, None)
    } else {
        let tail = if parsed.tail > 0 { " and an incomplete one" } else { "" };
        let shown = now
            .iter()
            .map(|(bank, value)| format!("{bank} {}", hex::encode(value)))
            .collect::<Vec<_>>()
            .join(", ");
        let records = parsed.ends.len();
        (
            None,
            Some(format!(
                "the log has {records} records{tail}, which do not lead to the PCR's value ({shown})"
            )),
        )
    };
    Recovered {
        position: Position {
            end: parsed.ends.last().copied().unwrap_or(0),
            head: parsed.head,
        },
        ends: parsed.ends,
        pcr_start: parsed.start.pcr_start,
        resume,
        last,
        mismatch,
        said: parsed.said,
    }
}

/// What PCRs that hold `values` show after this record; nothing when it lacks a bank.
fn extended(values: &BankDigests, record: &Record) -> Option<BankDigests> {
    values
        .iter()
        .map(|(bank, value)| Some((*bank, bank.extend(value, record.digest(*bank)?))))
        .collect()
}

fn same(replayed: Option<&BankDigests>, now: &BankDigests) -> bool {
    let Some(replayed) = replayed else { return false };
    replayed.len() == now.len() && now.iter().all(|value| replayed.contains(value))
}

fn damaged(path: &Path, now: &BankDigests, what: &str) -> Result<Recovered, MeasureError> {
    set_aside(path, "damaged")?;
    let mismatch = Some(format!(
        "the log of an earlier agent cannot be read ({what}); it was set aside"
    ));
    Ok(Recovered {
        mismatch,
        ..Recovered::fresh(now)
    })
}

fn read_limited(path: &Path, max_bytes: u64) -> Result<Vec<u8>, MeasureError> {
    match std::fs::metadata(path) {
        // One record may be cut short behind the last one that fitted.
        Ok(metadata) if metadata.len() > max_bytes + cel::MAX_RECORD as u64 => {
            return Err(MeasureError::LogFull {
                path: path.to_owned(),
                max_bytes,
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(MeasureError::File {
                operation: "look at",
                path: path.to_owned(),
                source,
            });
        }
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
    std::fs::copy(path, aside(path, why))
        .map(drop)
        .map_err(MeasureError::file("copy", path))
}

/// `log.cel.<why>`, with nothing in the name that a damaged log could have put there.
fn aside(path: &Path, why: &str) -> PathBuf {
    let why: String = why
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(40)
        .collect();
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(why);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use assay_evidence::digest::{Algorithm, Sha256Digest};
    use assay_evidence::event::Mode;

    use super::*;

    const BOOT: &str = "11111111-2222-4333-8444-555555555555";
    const BANKS: [Algorithm; 2] = [Algorithm::Sha1, Algorithm::Sha256];

    fn zeros() -> BankDigests {
        BANKS.iter().map(|bank| (*bank, vec![0; bank.size()])).collect()
    }

    fn start() -> Event {
        Event::from(AgentStart {
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
            blind: String::new(),
            protected: false,
        })
    }

    fn records() -> Vec<Record> {
        let batches = [
            vec![start()],
            vec![Event::Ready],
            vec![Event::Violation(Violation::Lost { count: 3 }), Event::AgentStop],
        ];
        (0..)
            .zip(batches)
            .map(|(number, events)| Record::build(number, 13, &events, &BANKS).unwrap())
            .collect()
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

    fn replay(start: &BankDigests, records: &[Record]) -> Option<BankDigests> {
        records
            .iter()
            .try_fold(start.clone(), |values, record| extended(&values, record))
    }

    #[test]
    fn a_log_that_equals_the_pcr_goes_on() {
        let records = records();
        let now = replay(&zeros(), &records).unwrap();
        let (_, recovered) = recover_in(&encode(&records), &now);
        assert!(recovered.mismatch.is_none() && recovered.resume.is_none());
        assert_eq!(recovered.position.head.records(), 3);
        assert_eq!(
            recovered.said,
            Said {
                started: true,
                ready: true,
                seqs: HashSet::new(),
                last: None,
                gaps: Vec::new(),
                lost: 3,
                full: None
            }
        );
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
            assert!(
                recovered.mismatch.is_none() && recovered.resume.is_none(),
                "cut at {cut}"
            );
            assert_eq!(recovered.position.end, whole as u64);
            let (dir, recovered) = recover_in(&bytes[..cut], &extended);
            assert!(
                recovered.mismatch.is_some() && recovered.resume.is_none(),
                "cut at {cut}"
            );
            assert!(dir.path().join("log.cel.damaged").exists());
        }
    }

    #[test]
    fn any_other_pcr_value_is_a_mismatch() {
        let records = records();
        for now in [
            zeros(),
            replay(&zeros(), &records[..1]).unwrap(),
            vec![(Algorithm::Sha256, vec![9; 32])],
        ] {
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
