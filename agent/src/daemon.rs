//! The daemon: where measuring, serving and unlocking meet, through the TPM's handle and the log.
//!
//! The end of any part is the end of the daemon: a quote server beside a measuring loop that died would attest a stale state.
//! The kernel programs stay pinned and go on queueing, so that the next agent misses nothing.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use assay_evidence::approved::ApprovedList;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::Mode;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::approved::ApprovedStore;
use crate::bundle::Source;
use crate::config::{self, Config};
use crate::early::{self, EarlyError};
use crate::http;
use crate::join::{JoinError, Joined};
use crate::kernel_age;
use crate::leases::{Leases, boot_seconds};
use crate::log_view::LogView;
use crate::measure::hold::HoldSettings;
use crate::measure::kernel::{GateError, GateSettings, KernelError};
use crate::measure::probe::ProbeError;
use crate::measure::source::EventSource;
use crate::measure::trouble::FailureNote;
use crate::measure::{Approval, Control, MeasureError, Measurer, Settings, host};
use crate::memory;
use crate::nudge::nudge;
use crate::serve::{ServeError, Server};
use crate::supervisor;
use crate::tier::Plan;
use crate::tpm::{self, TpmConfig, TpmError};
use crate::unlock::Unlocker;
use crate::unlock::api::{DiskStatus, JoinedStatus, Status};
use crate::unlock::socket::{SocketError, SocketServer, StatusSource};

/// How often TPM and measuring loop are asked whether they live, unless systemd's watchdog wants it more often.
const CHECK_EVERY: Duration = Duration::from_secs(10);

/// The TPM's devices: with and without the kernel's resource manager.
const TPM_DEVICES: [&str; 2] = ["/dev/tpm0", "/dev/tpmrm0"];

/// How often a host that has joined nobody looks whether it has by now: at first, and when nobody seems to be about it.
const JOIN_POLLS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// How often it looks at the shorter of these intervals.
const JOIN_SOON: usize = 120;

/// What is left running after the daemon's end gets so long to notice.
const LAST_MOMENT: Duration = Duration::from_millis(200);

/// Why the daemon could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No tier works, and the kernel is older than any that has one.
    #[error("Linux {release} is too old to be measured: {}", kernel_age::REMEDY)]
    OldKernel {
        /// Its release.
        release: String,
        /// What is missing first.
        #[source]
        source: Box<Self>,
    },
    /// The kernel side.
    #[error("the kernel programs cannot measure this host")]
    Kernel(#[from] KernelError),
    /// The gate in the kernel.
    #[error("the gate in the kernel cannot be worked")]
    Gate(#[from] GateError),
    /// A promise that tier 3 cannot keep.
    #[error(
        "tier 3 cannot refuse anything, and agent.toml wants mode = \"{mode}\" and protect = {protect} under [measure]: use a kernel with the \
         BPF LSM (`bpf` in lsm=), or mode = \"observe\" and protect = false"
    )]
    OnlyDetects {
        /// The configured mode.
        mode: assay_evidence::event::Mode,
        /// Whether the agent shall protect itself.
        protect: bool,
    },
    /// The probes of tier 3.
    #[error("the probes cannot measure this host")]
    Probe(#[from] ProbeError),
    /// The TPM.
    #[error("the TPM cannot be used")]
    Tpm(#[from] TpmError),
    /// Log and PCR.
    #[error("measuring has ended")]
    Measure(#[from] MeasureError),
    /// The measuring thread ended without a result.
    #[error("the measuring thread has ended")]
    MeasureGone,
    /// The measuring loop no longer turns.
    #[error("the measuring loop has hung: the daemon ends rather than attest a stale state")]
    Hung,
    /// The join state.
    #[error("the join state cannot be used")]
    Join(#[from] JoinError),
    /// The quote server.
    #[error("the quote server has ended")]
    Serve(#[from] ServeError),
    /// The local socket.
    #[error("the local socket has ended")]
    Socket(#[from] SocketError),
    /// The agent of the initramfs.
    #[error("the agent that the initramfs started cannot be relieved")]
    Early(#[from] EarlyError),
    /// The runtime, a thread or a signal handler could not be set up.
    #[error("the daemon cannot be set up: {what}")]
    SetUp {
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What the daemon is made of: the TPM, and where measurements come from.
pub struct Parts {
    /// The TPM; its log view is what is served.
    pub tpm: tpm::Handle,
    /// The measurements.
    pub source: Box<dyn EventSource>,
    /// How they are put into the log.
    pub settings: Settings,
}

/// Runs the agent on this host until SIGTERM or SIGINT: the kernel programs measure, the TPM of the configuration vouches.
///
/// # Errors
/// Any [`DaemonError`]; the process should end with a status other than 0.
pub fn run(config: Config) -> Result<(), DaemonError> {
    early::relieve(&config.run_dir)?;
    run_to_end(&config, run_with)
}

/// Runs this part of a daemon with the host's real parts, and ends what it leaves.
pub(crate) fn run_to_end(
    config: &Config,
    part: impl AsyncFnOnce(&Config, Parts) -> Result<(), DaemonError>,
) -> Result<(), DaemonError> {
    // Before anything large: the kernel's type information alone is megabytes.
    memory::give_back_early();
    memory::stay_in_memory();
    let parts = real_parts(config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| DaemonError::SetUp {
            what: "async runtime",
            source,
        })?;
    let tpm = parts.tpm.clone();
    let result = runtime.block_on(part(config, parts));
    // A disk that is being opened, or a TPM that hangs, must not keep the process.
    runtime.shutdown_timeout(LAST_MOMENT);
    tpm.end(LAST_MOMENT);
    result
}

/// The parts that `assay-agent run` uses: the TPM first, since without it nothing should be left in the kernel.
fn real_parts(config: &Config) -> Result<Parts, DaemonError> {
    let plan = Plan::choose(config)?;
    let boot_id = host::boot_id()?;
    let tpm = tpm::Handle::open(tpm_config(&config.tpm), LogView::new(boot_id.clone()))?;
    let started = plan.start(config)?;
    let settings = Settings {
        run_dir: config.run_dir.clone(),
        log_max_bytes: config.measure.log_max,
        pcr: config.tpm.pcr,
        boot_id,
        bpf_digest: started.object,
        tier: started.tier,
        blind: started.blind.to_owned(),
        mode: config.measure.mode,
        protected: config.measure.protect,
        fresh_hooks: started.fresh,
    };
    Ok(Parts {
        tpm,
        source: started.source,
        settings,
    })
}

/// What the gate in the kernel is told.
pub(crate) fn gate(config: &Config, user_hash: bool) -> GateSettings {
    GateSettings {
        mode: config.measure.mode,
        hold: HoldSettings {
            folders: config.measure.hold_folders.clone(),
            user_hash,
        },
        deny_anonymous: config.measure.deny_anonymous,
        protect: config.measure.protect,
        own: vec![config.bpf_object.clone()],
        tpms: TPM_DEVICES.iter().map(std::path::PathBuf::from).collect(),
        devices: config.measure.watch_devices.clone(),
        interpreters: config.measure.interpreters.clone(),
    }
}

/// The signals by which the daemon is ended in an orderly way.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    fn listen() -> Result<Self, DaemonError> {
        let handler = |kind| {
            signal(kind).map_err(|source| DaemonError::SetUp {
                what: "signal handler",
                source,
            })
        };
        Ok(Self {
            terminate: handler(SignalKind::terminate())?,
            interrupt: handler(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of them.
    async fn come(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs the agent with these parts until SIGTERM or SIGINT. Tests and benches bring a source without a kernel.
///
/// # Errors
/// Any [`DaemonError`].
pub async fn run_with(config: &Config, parts: Parts) -> Result<(), DaemonError> {
    let mut end = EndSignals::listen()?;
    let tpm = parts.tpm.clone();
    let (tier, blind) = (parts.settings.tier, parts.settings.blind.clone());
    let approved = ApprovedStore::open(&config.state_dir);
    let mut measuring = Measuring::start(parts, &approved)?;
    let stopped = tokio::select! {
        ended = &mut measuring.ended => return Err(ended_early(ended)),
        () = end.come() => true,
        _ = &mut measuring.ready => false,
    };
    if stopped {
        return measuring.stop().await;
    }
    tracing::info!(
        records = tpm.log().snapshot().records,
        "ready: every load from here on is in the log"
    );

    let mut source = Source::new(tpm.log().clone(), &config.tpm.tcti);
    if tier == 3 {
        source = source.with_ima_log();
    }
    let leases = Leases::open(&config.run_dir);
    let unlocker = Unlocker::new(
        config.state_dir.clone(),
        config.unlock.timeout,
        tpm.clone(),
        source.clone(),
        leases.clone(),
    )
    .map_err(|source| DaemonError::SetUp {
        what: "disk threads",
        source,
    })?;
    let status = status(
        config,
        (tier, blind),
        tpm.clone(),
        measuring.control.clone(),
        leases.clone(),
    );
    let guard = unlocker.clone().guard();
    let nudge = nudge(measuring.control.clone(), leases.clone(), config.state_dir.clone());
    let socket = SocketServer::bind(&config.socket(), unlocker, approved.clone(), status).await?;
    let serving = Serving {
        config,
        tpm: &tpm,
        source: &source,
        approved: &approved,
        leases: &leases,
    };
    let server = match Joined::load(&config.state_dir)? {
        Some(joined) => Some(serving.bind(&joined).await?),
        None => {
            tracing::warn!(
                "this host has joined no verifier: it measures, and serves no quotes until `assay-agent join FILE`"
            );
            None
        }
    };
    supervisor::notify(&[supervisor::READY, ("STATUS", "measuring")]);

    let result = tokio::select! {
        ended = &mut measuring.ended => return Err(ended_early(ended)),
        served = serving.serve(server) => served.map(never),
        never_ends = guard => match never_ends {},
        never_ends = nudge => match never_ends {},
        local = socket.run() => local.map(never).map_err(DaemonError::from),
        watched = watch(&tpm, &measuring.control) => watched.map(never),
        () = end.come() => Ok(()),
    };
    supervisor::notify(&[supervisor::STOPPING]);
    match result {
        Ok(()) => measuring.stop().await,
        Err(error) => {
            if let DaemonError::Tpm(error) = &error {
                FailureNote::new(&config.run_dir, tpm.log().boot_id()).leave(error);
            }
            Err(error)
        }
    }
}

/// The measuring thread, seen from the async side.
pub(crate) struct Measuring {
    control: Control,
    pub(crate) ready: oneshot::Receiver<()>,
    pub(crate) ended: oneshot::Receiver<Result<(), MeasureError>>,
}

impl Measuring {
    /// Opens log and PCR, and starts the loop. Returns when AGENT_START is in both.
    pub(crate) fn start(parts: Parts, approved: &ApprovedStore) -> Result<Self, DaemonError> {
        let enforces = parts.settings.mode == Mode::Enforce;
        let measurer = Measurer::open(parts.settings, parts.source, parts.tpm)?;
        let control = measurer.control();
        if enforces {
            follow_list(&control, approved);
        }
        let (say_ready, ready) = oneshot::channel();
        let (say_ended, ended) = oneshot::channel();
        let mut say_ready = Some(say_ready);
        let run = move || {
            let result = measurer.run(|| {
                if let Some(Err(())) = say_ready.take().map(|ready| ready.send(())) {
                    tracing::debug!("the daemon ends before measuring is ready");
                }
            });
            drop(say_ended.send(result));
        };
        std::thread::Builder::new()
            .name("measure".into())
            .spawn(run)
            .map_err(|source| DaemonError::SetUp {
                what: "measuring thread",
                source,
            })?;
        Ok(Self { control, ready, ended })
    }

    /// Puts AGENT_STOP into log and PCR.
    pub(crate) async fn stop(self) -> Result<(), DaemonError> {
        self.control.stop();
        match self.ended.await {
            Ok(result) => Ok(result?),
            Err(_) => Err(DaemonError::MeasureGone),
        }
    }
}

/// Puts the approved list that is there in force, and each that comes.
fn follow_list(control: &Control, approved: &ApprovedStore) {
    let told = control.clone();
    approved.on_change(move |list| told.approve(approval(list)));
    match approved.load() {
        Ok(Some(list)) => control.approve(approval(&list)),
        Ok(None) => {
            tracing::warn!("no approved list yet: until the verifier sends one, new code is held and not refused")
        }
        Err(error) => {
            tracing::warn!(error = %http::chain(&error), "the approved list cannot be used: until the verifier sends one, new code is held and not refused")
        }
    }
}

fn approval(list: &ApprovedList) -> Approval {
    let head = list.head();
    Approval {
        serial: head.serial,
        list: head.sha256,
        digests: list.digests().to_vec(),
    }
}

pub(crate) fn ended_early(ended: Result<Result<(), MeasureError>, oneshot::error::RecvError>) -> DaemonError {
    match ended {
        Ok(Err(error)) => error.into(),
        Ok(Ok(())) | Err(_) => DaemonError::MeasureGone,
    }
}

/// What the quote server is made of.
struct Serving<'a> {
    config: &'a Config,
    tpm: &'a tpm::Handle,
    source: &'a Source,
    approved: &'a ApprovedStore,
    leases: &'a Leases,
}

impl Serving<'_> {
    async fn bind(&self, joined: &Joined) -> Result<Server, DaemonError> {
        let (listen, approved) = (self.config.listen, self.approved.clone());
        let server = Server::bind(listen, joined, self.tpm.clone(), self.source.clone(), approved).await?;
        tracing::info!(%listen, "serving quotes");
        Ok(server.with_leases(self.leases.clone()))
    }

    /// Serves quotes; a host that has not joined yet waits until it has.
    async fn serve(&self, server: Option<Server>) -> Result<Infallible, DaemonError> {
        let server = match server {
            Some(server) => server,
            None => self.bind(&joined(self.config).await).await?,
        };
        Ok(server.run().await?)
    }
}

async fn joined(config: &Config) -> Joined {
    let [soon, later] = JOIN_POLLS;
    let mut pauses = std::iter::repeat_n(soon, JOIN_SOON).chain(std::iter::repeat(later));
    loop {
        tokio::time::sleep(pauses.next().unwrap_or(later)).await;
        match Joined::load(&config.state_dir) {
            Ok(Some(joined)) => return joined,
            Ok(None) => {}
            // A join that is being written right now.
            Err(error) => tracing::debug!(%error, "the join state is not complete yet"),
        }
    }
}

/// Asks TPM and measuring loop whether they live, and tells systemd. Returns only when one of them does not.
async fn watch(tpm: &tpm::Handle, control: &Control) -> Result<Infallible, DaemonError> {
    let watchdog = supervisor::watchdog();
    let every = watchdog.map_or(CHECK_EVERY, |period| CHECK_EVERY.min(period / 3));
    let (mut beats, mut suspected) = (control.beats(), false);
    loop {
        tokio::time::sleep(every).await;
        tpm.ping().await?;
        tpm.check()?;
        // Once proves nothing: a process or a machine that was paused wakes up with a timer that is long over.
        let now = control.beats();
        let silent = now == beats && every > MIN_BEAT;
        if silent && suspected {
            return Err(DaemonError::Hung);
        }
        (beats, suspected) = (now, silent);
        if watchdog.is_some() && !silent {
            supervisor::notify(&[supervisor::WATCHDOG]);
        }
    }
}

/// The measuring loop turns once a second and more; a check in shorter intervals proves nothing.
const MIN_BEAT: Duration = Duration::from_secs(2);

fn status(
    config: &Config,
    (tier, blind): (u8, String),
    tpm: tpm::Handle,
    control: Control,
    leases: Leases,
) -> StatusSource {
    let config = config.clone();
    Arc::new(move || {
        let (log, identity) = (tpm.log().snapshot(), tpm.identity());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            boot_id: tpm.log().boot_id().to_owned(),
            tier,
            blind: blind.clone(),
            mode: config.measure.mode.name().to_owned(),
            pcr: config.tpm.pcr,
            records: log.records,
            log_bytes: log.bytes,
            log_head: log.head,
            lost: control.lost(),
            no_room: control.no_room(),
            log_full: control.log_full(),
            ek_sha256: Sha256Digest::of(&identity.ek_public),
            ek: identity.ek_kind.name().to_owned(),
            ak: identity.ak_kind.name().to_owned(),
            tpm_manufacturer: identity.manufacturer.clone(),
            tpm_firmware: identity.firmware.clone(),
            tpm_worked_us: u64::try_from(tpm.worked().as_micros()).unwrap_or(u64::MAX),
            joined: joined_status(&config),
            disks: disks(&leases),
        }
    })
}

fn disks(leases: &Leases) -> Vec<DiskStatus> {
    let now = boot_seconds();
    leases
        .list()
        .into_iter()
        .map(|disk| DiskStatus::of(disk, now))
        .collect()
}

fn joined_status(config: &Config) -> Option<JoinedStatus> {
    let joined = Joined::load(&config.state_dir).ok()??;
    Some(JoinedStatus {
        listen: config.listen.to_string(),
        tls_spki_sha256: joined.spki(),
        verifiers: joined.membership.verifiers().to_vec(),
        ca_spki_sha256: joined.membership.ca_spki(),
    })
}

/// The `[tpm]` section as the TPM's thread takes it.
pub(crate) fn tpm_config(config: &config::Tpm) -> TpmConfig {
    TpmConfig {
        tcti: config.tcti.clone(),
        pcr: config.pcr,
        ak_handle: config.ak_handle,
        ak: config.ak,
        ek: config.ek,
        timeout: config.timeout,
    }
}

/// A server never ends well.
fn never(impossible: Infallible) {
    match impossible {}
}
