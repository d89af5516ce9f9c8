//! A host: TPM, measuring loop, log and quote server of the real agent, in this process.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use assay_agent::approved::ApprovedStore;
use assay_agent::bundle::Source;
use assay_agent::join::{self, Joined, Membership};
use assay_agent::leases::Leases;
use assay_agent::log_view::LogView;
use assay_agent::measure::source::{EventSource, Refusal, SourceError};
use assay_agent::measure::{Control, Measurer, Settings};
use assay_agent::nudge::nudge;
use assay_agent::serve::Server;
use assay_agent::tpm::{AkKind, EkKind, Handle, TpmConfig};
use assay_agent::unlock::Unlocker;
use assay_agent::unlock::socket::SocketServer;
use assay_ebpf::{HASH_ALGO_SHA256, PATH_MAX, Record, kind};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::Mode;
use assay_tests::{Swtpm, TpmProxy};
use tempfile::TempDir;
use tokio::runtime::Runtime;

pub const BOOT: &str = "0f2ff0a2-9c5b-4f6e-8d3e-6f0e3f4a5b6c";
pub const NEXT_BOOT: &str = "7a1f51c4-0b1d-4c6e-9a55-0d9f3a1b2c3d";

/// A machine: what stays when it is switched off.
pub struct Machine {
    /// Goes first: its last words are for the TPM.
    running: Option<Running>,
    pub swtpm: Swtpm,
    pub state: TempDir,
    address: SocketAddr,
    /// What its attestation key signs with, from the next boot on.
    pub ak: AkKind,
    /// Its endorsement key, from the next boot on; none: the one that has a certificate.
    pub ek: Option<EkKind>,
}

/// One boot of it.
struct Running {
    tpm: Handle,
    kernel: Kernel,
    control: Control,
    leases: Leases,
    measuring: Option<JoinHandle<()>>,
    runtime: Option<Runtime>,
    _run_dir: TempDir,
    /// These tests start programs all the time, which must not keep the TPM's connection.
    _proxy: TpmProxy,
}

impl Machine {
    /// A machine that has joined, running.
    pub fn joined(join_file: &Path) -> Self {
        Self::with_tpm(Swtpm::start().unwrap(), join_file)
    }

    pub fn with_tpm(swtpm: Swtpm, join_file: &Path) -> Self {
        Self::with_keys(swtpm, join_file, AkKind::EcdsaP256, None)
    }

    pub fn with_keys(swtpm: Swtpm, join_file: &Path, ak: AkKind, ek: Option<EkKind>) -> Self {
        let state = tempfile::tempdir().unwrap();
        join::join(state.path(), join_file, &Membership::read(join_file).unwrap(), false).unwrap();
        let mut machine = Self {
            running: None,
            swtpm,
            state,
            address: "127.0.0.1:0".parse().unwrap(),
            ak,
            ek,
        };
        machine.boot(BOOT);
        machine
    }

    /// Another machine with a copy of its state and its TPM, in this boot.
    pub fn cloned(&self, boot_id: &str) -> Self {
        let state = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(self.state.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), state.path().join(entry.file_name())).unwrap();
        }
        let mut clone = Self {
            running: None,
            swtpm: self.swtpm.copy().unwrap(),
            state,
            address: "127.0.0.1:0".parse().unwrap(),
            ak: self.ak,
            ek: self.ek,
        };
        clone.boot(boot_id);
        clone
    }

    /// Starts kernel and agent.
    pub fn boot(&mut self, boot_id: &str) {
        let log = LogView::new(boot_id.to_owned());
        let proxy = TpmProxy::start(&self.swtpm).unwrap();
        let config = TpmConfig {
            tcti: proxy.tcti(),
            pcr: 13,
            ak_handle: 0x8101_0A55,
            ak: self.ak,
            ek: self.ek,
            timeout: Duration::from_secs(30),
        };
        let tpm = Handle::open(config, log.clone()).unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let kernel = Kernel::default();
        let settings = Settings {
            run_dir: run_dir.path().to_owned(),
            log_max_bytes: 64 << 20,
            pcr: 13,
            boot_id: boot_id.to_owned(),
            bpf_digest: Sha256Digest::of(b"kernel programs"),
            tier: 1,
            mode: Mode::Observe,
            blind: String::new(),
            protected: false,
            fresh_hooks: true,
        };
        let measurer = Measurer::open(settings, Box::new(kernel.clone()), tpm.clone()).unwrap();
        let control = measurer.control();
        let (say_ready, ready) = mpsc::channel();
        let measuring = std::thread::spawn(move || measurer.run(|| say_ready.send(()).unwrap()).unwrap());
        ready
            .recv_timeout(Duration::from_secs(120))
            .expect("the inventory is complete");

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let joined = Joined::load(self.state.path()).unwrap().unwrap();
        let source = Source::new(log, &self.swtpm.tcti());
        let approved = ApprovedStore::open(self.state.path());
        let server = runtime
            .block_on(Server::bind(self.address, &joined, tpm.clone(), source, approved))
            .unwrap();
        self.address = server.local_addr().unwrap();
        let leases = Leases::open(run_dir.path());
        runtime.spawn(server.with_leases(leases.clone()).run());
        let (measuring, runtime) = (Some(measuring), Some(runtime));
        self.running = Some(Running {
            tpm,
            kernel,
            control,
            leases,
            measuring,
            runtime,
            _run_dir: run_dir,
            _proxy: proxy,
        });
    }

    /// Stops kernel and agent; the TPM keeps its power.
    pub fn stop(&mut self) {
        self.running = None;
    }

    /// Switches off and on again.
    pub fn reboot(&mut self, boot_id: &str) {
        self.stop();
        self.swtpm.power_cycle().unwrap();
        self.boot(boot_id);
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("the machine is on")
    }

    pub fn tpm(&self) -> Handle {
        self.running().tpm.clone()
    }

    /// The disks that are open.
    pub fn leases(&self) -> Leases {
        self.running().leases.clone()
    }

    /// Starts to ask the verifiers for a look when something happens, as the daemon does.
    pub fn nudges(&self) {
        let running = self.running();
        let (control, leases) = (running.control.clone(), running.leases.clone());
        let state = self.state.path().to_owned();
        let runtime = running.runtime.as_ref().unwrap();
        runtime.spawn(async move { match nudge(control, leases, state).await {} });
    }

    pub fn source(&self) -> Source {
        Source::new(self.tpm().log().clone(), &self.swtpm.tcti())
    }

    /// Starts to serve the agent's local socket.
    pub fn local_socket(&self) -> LocalSocket {
        let dir = tempfile::tempdir().unwrap();
        let socket = LocalSocket { dir };
        let state = self.state.path().to_owned();
        let approved = ApprovedStore::open(&state);
        let unlocker = Unlocker::new(state, Duration::from_secs(60), self.tpm(), self.source(), self.leases()).unwrap();
        let status = Arc::new(|| panic!("nobody asks for the status here"));
        let runtime = self.running().runtime.as_ref().unwrap();
        let server = runtime.block_on(SocketServer::bind(&socket.path(), unlocker, approved, status));
        let server = server.unwrap();
        runtime.spawn(async move { server.run().await.map(|_| ()) });
        socket
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    pub fn ek_sha256(&self) -> String {
        Sha256Digest::of(&self.tpm().identity().ek_public).to_string()
    }

    pub fn identity(&self) -> Joined {
        Joined::load(self.state.path()).unwrap().unwrap()
    }

    /// A program runs, and is in the log and in the TPM when this returns. Gives its digest.
    pub fn run_program(&self, path: &str) -> Sha256Digest {
        let digest = Sha256Digest::of(path.as_bytes());
        self.load(kind::PROGRAM, path, digest);
        digest
    }

    /// Something is loaded, and is in the log and in the TPM when this returns.
    pub fn load(&self, kind: u32, path: &str, digest: Sha256Digest) {
        let log = self.tpm().log().clone();
        let before = log.snapshot().records;
        self.running().kernel.queue(kind, path, digest);
        for _ in 0..2000 {
            if log.snapshot().records > before {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{path} was not measured");
    }
}

impl Machine {
    /// Many programs run, all with one digest, until the log is longer than this.
    pub fn run_until_longer(&self, bytes: u64, digest: Sha256Digest) {
        let log = self.tpm().log().clone();
        let mut number = 0_u32;
        while log.snapshot().bytes < bytes {
            for _ in 0..4096 {
                let path = format!("/{number:0>500}");
                self.running().kernel.queue(kind::PROGRAM, &path, digest);
                number += 1;
            }
            while !self.running().kernel.is_empty() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        self.control.stop();
        if let Some(measuring) = self.measuring.take() {
            drop(measuring.join());
        }
    }
}

/// The agent's local socket.
pub struct LocalSocket {
    dir: TempDir,
}

impl LocalSocket {
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }
}

/// The kernel side: a queue of records.
#[derive(Clone, Default)]
struct Kernel(Arc<Mutex<(u64, VecDeque<Record>)>>);

impl Kernel {
    fn queue(&self, kind: u32, path: &str, digest: Sha256Digest) {
        let mut inner = self.0.lock().unwrap();
        let seq = inner.0;
        inner.0 += 1;
        inner.1.push_back(record(seq, kind, path, digest));
    }
}

impl Kernel {
    fn is_empty(&self) -> bool {
        self.0.lock().unwrap().1.is_empty()
    }
}

impl EventSource for Kernel {
    fn read(&mut self, max: usize, take: &mut dyn FnMut(&Record) -> Result<(), Refusal>) -> Result<usize, SourceError> {
        let mut inner = self.0.lock().unwrap();
        let mut taken = 0;
        while taken < max
            && let Some(record) = inner.1.front()
        {
            take(record).map_err(SourceError::Refused)?;
            inner.1.pop_front();
            taken += 1;
        }
        Ok(taken)
    }

    fn lost(&mut self) -> Result<u64, SourceError> {
        Ok(0)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn record(seq: u64, kind: u32, path: &str, digest: Sha256Digest) -> Record {
    let mut bytes = [0; PATH_MAX];
    bytes[..path.len()].copy_from_slice(path.as_bytes());
    let mut comm = [0; 16];
    comm[..4].copy_from_slice(b"bash");
    Record {
        seq,
        time_ns: 1_000_000_000 + seq,
        size: 4096,
        ino: 1000 + seq,
        change: 1,
        cgroup: 1,
        fs_magic: 0xEF53,
        dev: 0x0080_0001,
        generation: 7,
        kind,
        flags: 0,
        hash_algo: HASH_ALGO_SHA256,
        hash_error: 0,
        pid: 4242,
        uid: 0,
        digest: *digest.as_bytes(),
        comm,
        path_len: u32::try_from(path.len()).unwrap(),
        pad: 0,
        path: bytes,
    }
}
