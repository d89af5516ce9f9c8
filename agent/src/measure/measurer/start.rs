//! How the loop starts: with what an earlier agent left in run folder and PCR, and with AGENT_START.

use std::collections::{HashSet, VecDeque};
use std::time::Instant;

use assay_evidence::digest::Algorithm;
use assay_evidence::event::{Event, Violation};

use super::{Inventory, Measurer, Settings, Stopping};
use crate::measure::control::{self, Message};
use crate::measure::journal::Journal;
use crate::measure::lock::lock;
use crate::measure::log::{self, LogWriter, Room};
use crate::measure::recovery::{self, Recovered, Said};
use crate::measure::sequence::Sequence;
use crate::measure::source::EventSource;
use crate::measure::trouble::{FailureNote, Slowest};
use crate::measure::{MeasureError, host, inventory};
use crate::tpm;

impl Measurer {
    /// Takes the run folder, recovers what an earlier agent left, and puts AGENT_START into log and PCR. Blocks for as long.
    ///
    /// # Errors
    /// Every [`MeasureError`]; nothing runs then.
    pub fn open(settings: Settings, source: Box<dyn EventSource>, tpm: tpm::Handle) -> Result<Self, MeasureError> {
        let run_dir = settings.run_dir.as_path();
        let lock = lock(run_dir)?;
        let now = tpm.read_pcr_blocking()?;
        let recovered = recovery::recover(run_dir, &settings.boot_id, settings.pcr, &now, settings.log_max_bytes)?;
        let (journal, journaled) = Journal::open(run_dir)?;
        let (control, mailbox) = control::channel().map_err(MeasureError::Wait)?;
        let banks: Vec<Algorithm> = tpm.identity().banks.clone();
        let path = run_dir.join(log::NAME);
        let log = LogWriter::open(&path, settings.log_max_bytes, recovered.position, settings.pcr, banks)?;
        tpm.log()
            .attach(log.reader()?, recovered.ends.clone(), recovered.position.head.value());

        let mut measurer = Self {
            source,
            tpm,
            log,
            journal,
            pending: VecDeque::new(),
            in_flight: None,
            known: HashSet::new(),
            sequence: Sequence::after(&HashSet::new(), &[], Instant::now()),
            compared: Instant::now(),
            taken: 0,
            ticked: Instant::now(),
            lost_reported: recovered.said.lost,
            lost_seen: 0,
            inventory: Inventory::Running,
            full: false,
            slowest: Slowest::default(),
            note: FailureNote::new(run_dir, &settings.boot_id),
            stopping: Stopping::No,
            mailbox,
            control,
            _lock: lock,
        };
        match measurer.begin(&settings, recovered, journaled) {
            Ok(()) => Ok(measurer),
            Err(error) => {
                measurer.leave_note(&error);
                Err(error)
            }
        }
    }

    fn begin(&mut self, settings: &Settings, recovered: Recovered, journaled: Vec<Event>) -> Result<(), MeasureError> {
        if let Some(record) = recovered.resume {
            tracing::warn!(
                record = record.number,
                "an earlier agent died between log and PCR: its last record is extended now"
            );
            self.tpm.extend_blocking(record.digests, None)?;
        }
        // The earlier agent may have ended between an extend and telling the kernel programs of it.
        let told = recovered.last.iter().filter_map(Event::code);
        self.source.landed(&mut told.into_iter())?;
        let Said {
            started,
            ready,
            seqs,
            last,
            gaps,
            full,
            ..
        } = recovered.said;
        let start = host::agent_start(settings, recovered.pcr_start, last)?;
        let mut first = vec![Event::from(start)];
        if let Some(detail) = recovered.mismatch {
            tracing::error!(
                detail,
                "log and PCR do not fit together: this boot cannot be trusted any more"
            );
            first.push(Event::Violation(Violation::LogMismatch { detail }));
        }
        if started && settings.fresh_hooks {
            let detail = "the kernel programs of the earlier agent were gone when this one started".to_owned();
            first.push(Event::Violation(Violation::HooksMissing { detail }));
        }
        if let Some(detail) = self.note.find() {
            tracing::warn!(detail, "an earlier agent ended because the TPM failed");
            first.push(Event::Violation(Violation::TpmFailed { detail }));
        }
        let (record, advance) = self.log.append(&first, Room::Start)?;
        self.tpm.extend_blocking(record.digests, Some(advance))?;
        self.note.clear();

        self.known = seqs;
        for event in journaled {
            if self.is_news(&event) {
                self.pending.push_back(event);
            }
        }
        if settings.fresh_hooks {
            // Their numbers begin anew, and so does their count of losses.
            self.known.clear();
            self.lost_reported = 0;
        } else {
            self.sequence = Sequence::after(&self.known, &gaps, Instant::now());
        }
        if full.is_some_and(|limit| limit >= self.log.max_bytes()) {
            self.stand_still()?;
            self.inventory = Inventory::Done;
            if ready {
                self.source.ready()?;
            }
        } else if ready && !settings.fresh_hooks {
            self.pending.push_back(Event::Ready);
            self.inventory = Inventory::Queued;
        } else {
            self.start_inventory()?;
        }
        Ok(())
    }

    fn start_inventory(&self) -> Result<(), MeasureError> {
        let control = self.control.clone();
        let release = host::kernel_release()?;
        std::thread::Builder::new()
            .name("inventory".into())
            .spawn(move || control.send(Message::Inventory(inventory::take(&release))))
            .map_err(MeasureError::Thread)?;
        Ok(())
    }

    /// Whether an event is not in the log yet; remembers those that come from the kernel.
    fn is_news(&mut self, event: &Event) -> bool {
        match event {
            Event::Load(load) => load.seq.is_none_or(|seq| self.known.insert(seq)),
            _ => true,
        }
    }
}
