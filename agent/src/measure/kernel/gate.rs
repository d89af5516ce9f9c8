//! The gate as the agent works it: who the agent is, what has been extended, when the gate closes.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use assay_ebpf::{control, flags, kind, request};
use assay_evidence::event::{LoadKind, Measurement, Mode};
use aya::programs::links::FdLink;

use super::guard::{Guard, name_word};
use super::orders::{Answers, Key, Orders};
use super::request::{Reply, measure};
use super::{KernelError, Pins, groups};
use crate::measure::hold::{HoldError, HoldSettings, Holder};
use crate::measure::own::OwnFiles;

/// What the agent's configuration says of the gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GateSettings {
    /// Whether new code waits, and whether only approved code runs.
    pub mode: Mode,
    /// What waits already when it is opened.
    pub hold: HoldSettings,
    /// Refuse memory that becomes executable without a file.
    pub deny_anonymous: bool,
    /// Keep other processes away from the agent.
    pub protect: bool,
    /// What the agent is made of besides what it has mapped, such as the object with the kernel programs.
    pub own: Vec<PathBuf>,
    /// The TPM's devices, which nobody else may open while the agent is protected.
    pub tpms: Vec<PathBuf>,
    /// Devices whose opening is recorded.
    pub devices: Vec<PathBuf>,
    /// Programs whose script arguments are measured.
    pub interpreters: Vec<PathBuf>,
}

/// The gate.
pub struct Gate {
    settings: GateSettings,
    orders: Orders,
    guard: Guard,
    answers: Answers,
    holder: Option<Holder>,
    own: OwnFiles,
}

/// Tells the kernel programs who the agent is now. Where an earlier agent left them, this comes before anything that they
/// would refuse to others.
pub fn register(pins: &Pins) -> Result<Orders, KernelError> {
    let mut orders = Orders::open(pins)?;
    let id = std::process::id();
    orders.set(control::AGENT_START, own_start()?)?;
    orders.set(control::AGENT_NAME, name_word(id))?;
    orders.set(control::AGENT, u64::from(id))?;
    Ok(orders)
}

impl Gate {
    /// Names what is guarded, and begins to hold programs back if the mode wants it. The gate itself stays as it is until
    /// [`Gate::close`]: open on a fresh start, shut where an earlier agent shut it.
    pub fn open(pins: &Pins, links: &[FdLink], settings: GateSettings) -> Result<Self, GateError> {
        let mut orders = register(pins)?;
        let mut guard = Guard::open(pins)?;
        guard.pins(pins, links, &mut orders)?;
        guard.devices(&settings.tpms, &settings.devices)?;
        guard.cgroups()?;
        guard.interpreters(&settings.interpreters)?;
        orders.set(control::USER_HASH, u64::from(settings.hold.user_hash))?;
        let holder = if settings.mode == Mode::Observe && !settings.hold.user_hash {
            None
        } else {
            Some(Holder::start(&settings.hold, || Answers::open(pins))?)
        };
        let own = OwnFiles::new(&settings.own);
        Ok(Self {
            settings,
            orders,
            guard,
            answers: Answers::open(pins)?,
            holder,
            own,
        })
    }

    /// Everything up to here is in log and register: from now on the mode is in force.
    pub fn close(&mut self) -> Result<(), GateError> {
        let before = self.orders.get(control::MODE)?;
        let mode = u64::from(self.settings.mode.code());
        self.orders
            .set(control::DENY_ANONYMOUS, u64::from(self.settings.deny_anonymous))?;
        self.orders.set(control::PROTECT, u64::from(self.settings.protect))?;
        self.orders.set(control::MODE, mode)?;
        if self.settings.protect {
            groups::look_through()?;
        }
        if before != mode {
            self.orders.new_epoch()?;
        }
        Ok(())
    }

    /// These events are in the TPM's register: what they loaded may be loaded, and whoever waits for it goes on.
    pub fn landed(&mut self, loads: &mut dyn Iterator<Item = &Measurement>) -> Result<(), GateError> {
        let mut digests: Vec<Key> = Vec::new();
        for load in loads {
            if let Some(digest) = load.digest.filter(|_| !load.kind.is_deed()) {
                digests.push(*digest.as_bytes());
            }
            if load.flags & flags::REFUSED != 0
                && waits_in_a_folder(load.kind)
                && let Some(holder) = &self.holder
            {
                holder.refused(&load.path);
            }
            if self.settings.hold.user_hash && load.flags & flags::REFUSED != 0 {
                self.measure_refused(load)?;
            }
        }
        self.orders.extended(&digests)?;
        if let Some(holder) = &self.holder {
            holder.release(&digests)?;
        }
        Ok(())
    }

    /// Tier 2: what was refused because no hook could read it is measured now, so that it is let through when it is tried
    /// again.
    fn measure_refused(&mut self, load: &Measurement) -> Result<(), GateError> {
        let place = Path::new("/proc").join(load.pid.to_string()).join("root");
        let Some(below) = load.path.strip_prefix('/') else {
            return Ok(());
        };
        // It may have gone, and its process with it: then it is refused once more, and measured then.
        let Ok(file) = File::open(place.join(below)).or_else(|_| File::open(load.path.as_str())) else {
            return Ok(());
        };
        if file
            .metadata()
            .is_ok_and(|metadata| metadata.is_file() && metadata.st_ino() == load.ino)
        {
            let argument = ahead(load.pid, u32::from(load.kind.code()));
            measure(file.as_fd(), argument, &mut self.answers, true)?;
        }
        Ok(())
    }

    /// Nothing will be extended any more: nobody is held back, and what is not extended is refused.
    pub fn give_up(&self) -> Result<(), GateError> {
        match &self.holder {
            Some(holder) => Ok(holder.give_up()?),
            None => Ok(()),
        }
    }

    /// Puts a list of approved digests in force.
    pub fn approve(&mut self, digests: &mut dyn Iterator<Item = Key>) -> Result<(), GateError> {
        Ok(self.orders.approve(digests)?)
    }

    /// Measures ahead what the agent needs to start again, where it has changed: nobody could do it later.
    pub fn look_after_own_files(&mut self) -> Result<(), GateError> {
        self.guard.interpreters(&self.settings.interpreters)?;
        if self.settings.mode == Mode::Observe && !self.settings.protect {
            return Ok(());
        }
        self.guard.cgroups()?;
        for (path, file, kind) in self.own.changed() {
            let argument = request::argument(std::process::id(), kind, self.marks(&path));
            let reply = measure(file.as_fd(), argument, &mut self.answers, self.settings.hold.user_hash)?;
            if kind == OWN_PROGRAM
                && matches!(reply, Reply::Known | Reply::Queued)
                && let Some(digest) = self.answers.last()?
            {
                self.guard.heir(digest)?;
            }
            match reply {
                Reply::Unanswered => return Err(HoldError::Unanswered.into()),
                Reply::Known | Reply::Queued => {}
                // It is being written, or its approval is still to come.
                reply if self.own.again(&path) => {
                    tracing::warn!(path = %path.display(), ?reply, "a file of the agent's own cannot be measured: it may not start again");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What the record of a file of the agent's own is marked with. What a successor loads counts as loaded already: it
    /// must need no record of its own when the queue is full, since only the successor can empty that.
    fn marks(&self, path: &Path) -> u32 {
        if self.settings.own.iter().any(|own| own == path) {
            flags::AHEAD
        } else {
            0
        }
    }

    /// Whether all that holds programs back still lives.
    pub fn check(&self) -> Result<(), GateError> {
        match &self.holder {
            Some(holder) => Ok(holder.check()?),
            None => Ok(()),
        }
    }
}

/// Why the gate cannot be worked.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The kernel programs' maps.
    #[error("the kernel programs cannot be told")]
    Kernel(#[from] KernelError),
    /// Programs cannot be held back.
    #[error("programs cannot be held back")]
    Hold(#[from] HoldError),
}

/// Loads that wait when their file is opened, if its folder is marked.
const fn waits_in_a_folder(kind: LoadKind) -> bool {
    matches!(
        kind,
        LoadKind::Mapping | LoadKind::ModuleFile | LoadKind::ModuleCompressed | LoadKind::Firmware
    )
}

fn ahead(pid: u32, kind: u32) -> u64 {
    request::argument(pid, kind, flags::AHEAD)
}

/// When this process started, in the unit of [`control::AGENT_START`].
fn own_start() -> Result<u64, KernelError> {
    let path = Path::new("/proc/self/stat");
    let stat = procfs::process::Process::myself().and_then(|process| process.stat());
    stat.map(|stat| stat.starttime)
        .map_err(|error| KernelError::file("read", path)(std::io::Error::other(error)))
}

/// Kinds of the agent's own files.
pub const OWN_PROGRAM: u32 = kind::PROGRAM;
/// See [`OWN_PROGRAM`].
pub const OWN_LIBRARY: u32 = kind::MAPPING;
