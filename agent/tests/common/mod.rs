//! What the TPM tests share: a handle on a TPM of their own, and a source of measurements that they fill by hand.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect by panicking"
)]
#![allow(dead_code, reason = "each test binary uses its own part of this module")]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use assay_agent::bundle::Source;
use assay_agent::log_view::LogView;
use assay_agent::measure::source::{EventSource, Refusal, SourceError};
use assay_agent::measure::{Control, MeasureError, Measurer, Settings};
use assay_agent::tpm::{AkKind, EkKind, Handle, TpmConfig, TpmError};
use assay_ebpf::{HASH_ALGO_SHA256, PATH_MAX, Record, kind};
use assay_evidence::binding::{Binding, Exporter, Nonce};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, Mode};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::replay::{HeldLog, ReplayedLog};
use assay_evidence::tpm::AttestationKey;

pub const BOOT: &str = "3f0c7a52-9d1e-4b8a-8c47-2a61d05be901";
pub const AK_HANDLE: u32 = 0x8101_0a55;
pub const NONCE: [u8; 32] = [0x4e; 32];
pub const EXPORTER: [u8; 32] = [0x45; 32];

pub fn config(tcti: String, timeout: Duration) -> TpmConfig {
    TpmConfig {
        tcti,
        pcr: 13,
        ak_handle: AK_HANDLE,
        ak: AkKind::EcdsaP256,
        ek: None,
        timeout,
    }
}

/// With an attestation key of this kind.
pub fn open_with(tcti: String, ak: AkKind) -> Handle {
    open_keys(tcti, ak, None)
}

/// With keys of these kinds.
pub fn open_keys(tcti: String, ak: AkKind, ek: Option<EkKind>) -> Handle {
    let config = TpmConfig {
        ak,
        ek,
        ..config(tcti, Duration::from_secs(20))
    };
    Handle::open(config, LogView::new(BOOT.into())).expect("open the TPM")
}

pub fn open(tcti: String) -> Handle {
    open_boot(tcti, BOOT)
}

pub fn open_boot(tcti: String, boot_id: &str) -> Handle {
    Handle::open(config(tcti, Duration::from_secs(20)), LogView::new(boot_id.into())).expect("open the TPM")
}

pub fn open_for(tcti: String, timeout: Duration) -> Result<Handle, TpmError> {
    Handle::open(config(tcti, timeout), LogView::new(BOOT.into()))
}

pub fn ak(tpm: &Handle) -> AttestationKey {
    AttestationKey::new(&tpm.identity().ak_public).expect("an attestation key")
}

/// What the kernel programs would have queued.
#[derive(Clone, Default)]
pub struct Queue(Arc<Mutex<Queued>>);

#[derive(Default)]
struct Queued {
    records: VecDeque<Record>,
    fails: bool,
    lost: u64,
    no_room: u64,
    /// As if the kernel had numbered so many, by CPU.
    numbered: Vec<u64>,
}

impl Queue {
    pub fn push(&self, seqs: impl IntoIterator<Item = u64>) {
        self.0.lock().unwrap().records.extend(seqs.into_iter().map(record));
    }

    pub fn lose(&self, count: u64) {
        self.0.lock().unwrap().lost += count;
    }

    /// The kernel side breaks.
    pub fn fail(&self) {
        self.0.lock().unwrap().fails = true;
    }

    pub fn refuse_for_room(&self, count: u64) {
        self.0.lock().unwrap().no_room += count;
    }

    pub fn number(&self, counts: &[u64]) {
        self.0.lock().unwrap().numbered = counts.to_vec();
    }

    pub fn is_empty(&self) -> bool {
        self.0.lock().unwrap().records.is_empty()
    }
}

impl EventSource for Queue {
    fn read(&mut self, max: usize, take: &mut dyn FnMut(&Record) -> Result<(), Refusal>) -> Result<usize, SourceError> {
        let mut queued = self.0.lock().unwrap();
        let mut taken = 0;
        while taken < max {
            let Some(record) = queued.records.front() else { break };
            take(record).map_err(SourceError::Refused)?;
            queued.records.pop_front();
            taken += 1;
        }
        Ok(taken)
    }

    fn lost(&mut self) -> Result<u64, SourceError> {
        let queued = self.0.lock().unwrap();
        if queued.fails {
            return Err(SourceError::Refused("the kernel side is broken".into()));
        }
        Ok(queued.lost)
    }

    fn numbered(&mut self) -> Result<Vec<u64>, SourceError> {
        Ok(self.0.lock().unwrap().numbered.clone())
    }

    fn refused_for_room(&mut self) -> Result<u64, SourceError> {
        Ok(self.0.lock().unwrap().no_room)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A program load with this sequence number.
pub fn record(seq: u64) -> Record {
    let mut path = [0; PATH_MAX];
    let text = format!("/usr/bin/program-{seq}");
    path[..text.len()].copy_from_slice(text.as_bytes());
    Record {
        seq,
        time_ns: seq,
        size: 1,
        ino: seq,
        change: 1,
        cgroup: 1,
        fs_magic: 0xef53,
        dev: 1,
        generation: 1,
        kind: kind::PROGRAM,
        flags: 0,
        hash_algo: HASH_ALGO_SHA256,
        hash_error: 0,
        pid: 1,
        uid: 0,
        digest: *Sha256Digest::of(text.as_bytes()).as_bytes(),
        comm: *b"sh\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        path_len: u32::try_from(text.len()).unwrap(),
        pad: 0,
        path,
    }
}

pub fn settings(run_dir: &Path, fresh_hooks: bool) -> Settings {
    Settings {
        run_dir: run_dir.to_owned(),
        log_max_bytes: 64 << 20,
        pcr: 13,
        boot_id: BOOT.into(),
        bpf_digest: Sha256Digest::of(b"kernel programs"),
        tier: 1,
        mode: Mode::Observe,
        blind: String::new(),
        protected: false,
        fresh_hooks,
    }
}

/// A measuring loop in a thread of its own.
pub struct Running {
    pub control: Control,
    pub tpm: Handle,
    thread: JoinHandle<Result<(), MeasureError>>,
}

impl Running {
    /// Starts measuring and waits for READY.
    pub fn start(settings: Settings, queue: &Queue, tpm: &Handle) -> Self {
        let measurer = Measurer::open(settings, Box::new(queue.clone()), tpm.clone()).expect("start measuring");
        let control = measurer.control();
        let (say_ready, ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || measurer.run(|| say_ready.send(()).unwrap()));
        ready.recv_timeout(Duration::from_secs(60)).expect("READY");
        Self {
            control,
            tpm: tpm.clone(),
            thread,
        }
    }

    /// Waits until everything queued is in log and PCR.
    pub fn settle(&self, queue: &Queue) {
        wait_for("the queue to be empty", || queue.is_empty());
        // Two turns later what was taken has been batched; then wait for the log to stand still.
        let beats = self.control.beats();
        wait_for("the loop to turn", || self.control.beats() > beats + 2);
        self.settle_log();
    }

    /// Waits until the log stands still.
    pub fn settle_log(&self) {
        let mut last = self.tpm.log().snapshot();
        wait_for("the log to stand still", || {
            std::thread::sleep(Duration::from_millis(150));
            let now = self.tpm.log().snapshot();
            std::mem::replace(&mut last, now) == now
        });
    }

    pub fn stop(self) -> Result<(), MeasureError> {
        self.control.stop();
        self.end()
    }

    pub fn end(self) -> Result<(), MeasureError> {
        self.thread.join().unwrap()
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Quotes, and judges the quote as a verifier does that has seen nothing of this host before.
pub async fn attest(tpm: &Handle) -> Result<ReplayedLog, String> {
    let (nonce, exporter) = (Nonce::new(NONCE), Exporter::new(EXPORTER));
    let quote = tpm
        .quote(|log| {
            let binding = Binding::Quote {
                nonce: &Nonce::new(NONCE),
                exporter: &Exporter::new(EXPORTER),
            };
            binding.digest(log.records, &log.head)
        })
        .await
        .map_err(|error| error.to_string())?;
    let bundle = Source::new(tpm.log().clone(), "swtpm:")
        .bundle(quote, 0, false)
        .map_err(|error| error.to_string())?;
    let binding = Binding::Quote {
        nonce: &nonce,
        exporter: &exporter,
    };
    let verified = bundle
        .verify(&ak(tpm), &binding, &HeldLog::none())
        .map_err(|error| error.to_string())?;
    verified.replay(RuntimePcr::DEFAULT).map_err(|error| error.to_string())
}

/// Sequence numbers of the loads in a log, in its order.
pub fn seqs(log: &ReplayedLog) -> Vec<u64> {
    log.events()
        .filter_map(|(_, event)| match event {
            Event::Load(load) => load.seq,
            _ => None,
        })
        .collect()
}

/// Names of the log's events without the inventory.
pub fn names(log: &ReplayedLog) -> Vec<&'static str> {
    log.events()
        .filter(|(_, event)| !matches!(event, Event::Inventory(_)))
        .map(|(_, event)| event.name())
        .collect()
}
