//! Tier 1's kernel side, seen from the agent: loads or takes over the pinned programs and reads their queue.
//!
//! What the programs do is in `agent-ebpf`, and for readers in `agent/docs/kernel.md`. Programs, links and maps are
//! pinned: they go on measuring while no agent runs, and what they queue in the meantime is read by the next one.

mod btf;
mod error;
mod gate;
mod groups;
mod guard;
mod layout;
mod load;
mod orders;
mod pins;
mod preflight;
pub mod request;
mod skipped;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use assay_ebpf::{RING_BYTES, Record, counter};
use assay_evidence::event::Measurement;
use aya::maps::{Array, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::{ProgramError, loaded_programs};

pub(super) use self::btf::Btf;
pub use self::btf::BtfError;
pub use self::error::KernelError;
pub use self::gate::{GateError, GateSettings, OWN_LIBRARY, OWN_PROGRAM};
pub(super) use self::guard::kernel_dev;
pub(super) use self::load::{BTF_LIMIT, OBJECT_LIMIT, read_limited};
pub use self::orders::{Answers, Key, Orders};
pub use self::preflight::Preflight;
pub(super) use self::preflight::lockdown_state;
pub(super) use self::skipped::Skipped;

use self::gate::Gate;
use self::load::{EITHER, Object, PROGRAMS, SILENT, TIDIER};
use self::orders::{open, open_counters};
use self::pins::{COUNTERS, EVENTS, Pins, SEQUENCE};
use super::source::{EventSource, Refusal, SourceError};

/// Where the running programs came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// None were pinned: they were loaded now, and nothing before this moment was measured by them.
    Loaded,
    /// They were already running, loaded from this very object by an earlier agent.
    Adopted,
    /// Those of another object were running, all of them; ours took over its queue and counters before they were removed.
    Replaced,
}

/// The kernel side's counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Records of loads that went on and found no room in the queue, since the maps were made.
    pub lost: u64,
    /// Loads that were refused because their record found no room.
    pub no_room: u64,
    /// Records that each CPU has numbered.
    pub numbered: Vec<u64>,
    /// Loads that needed no hash, since the file had not changed.
    pub cache_hits: u64,
}

/// The running kernel programs and their queue.
pub struct Kernel {
    ring: RingBuf<MapData>,
    counters: Array<MapData, u64>,
    numbers: PerCpuArray<MapData, u64>,
    object_digest: [u8; 32],
    origin: Origin,
    skipped: Skipped,
    gate: Gate,
    /// Held so that removing a pin alone does not end a program while the agent lives.
    _links: Vec<FdLink>,
    _pins: Pins,
}

impl Kernel {
    /// Takes over the programs that are pinned in `bpf_dir` if they were made from the object file at `object`, or
    /// else loads them from it, attaches and pins them. They measure from before this returns, and until the host
    /// reboots or the pins are removed.
    ///
    /// Run [`Preflight::check`] before, for errors that people can act on.
    ///
    /// # Errors
    /// Any [`GateError`]; programs that ran before go on running.
    pub fn start(object: &Path, bpf_dir: &Path, gate: GateSettings) -> Result<Self, GateError> {
        let object = Object::read(object)?;
        let pins = Pins::open(bpf_dir)?;
        if pins.has_maps() {
            // Before anything that the running programs would refuse to others.
            gate::register(&pins)?;
        }
        let (links, origin) = match adopt(&pins, object.digest())? {
            Some(links) => (links, Origin::Adopted),
            None => {
                let origin = if still_measuring(&pins)? {
                    Origin::Replaced
                } else {
                    Origin::Loaded
                };
                let folder = pins.begin()?;
                let links = object.attach(&pins, &folder)?;
                pins.finish(&folder, object.digest())?;
                (links, origin)
            }
        };
        pins.retain(object.digest())?;
        Ok(Self {
            ring: open_ring(&pins)?,
            counters: open_counters(&pins)?,
            numbers: open(&pins, SEQUENCE)?,
            object_digest: *object.digest(),
            origin,
            skipped: Skipped::watch(&links)?,
            gate: Gate::open(&pins, &links, gate)?,
            _links: links,
            _pins: pins,
        })
    }

    /// SHA-256 of the object file that the running programs were made from.
    #[must_use]
    pub const fn object_digest(&self) -> &[u8; 32] {
        &self.object_digest
    }

    /// Where the running programs came from.
    #[must_use]
    pub const fn origin(&self) -> Origin {
        self.origin
    }

    /// The counters, each read for itself.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn counters(&self) -> Result<Counters, KernelError> {
        Ok(Counters {
            lost: self.counter(counter::LOST)?,
            no_room: self.counter(counter::NO_ROOM)?,
            numbered: self.numbers()?,
            cache_hits: self.counter(counter::CACHE_HIT)?,
        })
    }

    fn counter(&self, index: u32) -> Result<u64, KernelError> {
        self.counters.get(&index, 0).map_err(map_error(COUNTERS))
    }

    fn numbers(&self) -> Result<Vec<u64>, KernelError> {
        Ok(self.numbers.get(&0, 0).map_err(map_error(SEQUENCE))?.to_vec())
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digest = hex::encode(self.object_digest);
        f.debug_struct("Kernel")
            .field("origin", &self.origin)
            .field("object", &digest)
            .finish_non_exhaustive()
    }
}

impl EventSource for Kernel {
    fn read(&mut self, max: usize, take: &mut dyn FnMut(&Record) -> Result<(), Refusal>) -> Result<usize, SourceError> {
        self.gate.check()?;
        let mut taken = 0;
        while taken < max {
            let Some(item) = self.ring.next() else { break };
            let outcome = match Record::read(&item) {
                Some(record) => take(&record).map_err(SourceError::Refused),
                None => Err(KernelError::ForeignRecord { length: item.len() }.into()),
            };
            if let Err(error) = outcome {
                // Dropping the item would free its place; forgotten, it is the next one to be read again.
                std::mem::forget(item);
                return Err(error);
            }
            taken += 1;
        }
        Ok(taken)
    }

    fn lost(&mut self) -> Result<u64, SourceError> {
        Ok(self.counter(counter::LOST)?.saturating_add(self.skipped.count()?))
    }

    fn numbered(&mut self) -> Result<Vec<u64>, SourceError> {
        Ok(self.numbers()?)
    }

    fn refused_for_room(&mut self) -> Result<u64, SourceError> {
        Ok(self.counter(counter::NO_ROOM)?)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.as_fd())
    }

    fn landed(&mut self, loads: &mut dyn Iterator<Item = &Measurement>) -> Result<(), SourceError> {
        Ok(self.gate.landed(loads)?)
    }

    fn ready(&mut self) -> Result<(), SourceError> {
        self.gate.look_after_own_files()?;
        Ok(self.gate.close()?)
    }

    fn full(&mut self) -> Result<(), SourceError> {
        Ok(self.gate.give_up()?)
    }

    fn tick(&mut self) -> Result<(), SourceError> {
        Ok(self.gate.look_after_own_files()?)
    }

    fn approve(&mut self, digests: &mut dyn Iterator<Item = [u8; 32]>) -> Result<(), SourceError> {
        Ok(self.gate.approve(digests)?)
    }
}

/// The links of the object with this digest, if all of them are pinned.
fn adopt(pins: &Pins, digest: &[u8; 32]) -> Result<Option<Vec<FdLink>>, KernelError> {
    links_in(&pins.programs(digest), pins)
}

/// Whether the programs of some other object measure to this moment. A folder that lacks a link, or cannot be shown to be
/// whole, does not count: what ran since its programs ended was not seen, and that must be told.
fn still_measuring(pins: &Pins) -> Result<bool, KernelError> {
    let folders = pins.program_folders()?;
    Ok(folders
        .iter()
        .any(|folder| matches!(links_in(folder, pins), Ok(Some(_)))))
}

/// The links in a folder, if all of them are pinned. A program that queues elsewhere is not ours.
fn links_in(folder: &Path, pins: &Pins) -> Result<Option<Vec<FdLink>>, KernelError> {
    let there = |name: &str| folder.join(name).exists();
    let chosen = EITHER.map(|pair| pair.map(|(name, _)| name).into_iter().find(|name| there(name)));
    let Some(wanted) = PROGRAMS
        .iter()
        // Objects of before had none.
        .filter(|(name, _)| *name != TIDIER || there(name))
        .map(|(name, _)| there(name).then_some(*name))
        .chain(chosen)
        .collect::<Option<Vec<&'static str>>>()
    else {
        return Ok(None);
    };
    let events = MapData::from_pin(pins.map(EVENTS)).map_err(map_error(EVENTS))?;
    let events = events.info().map_err(map_error(EVENTS))?.id();
    let mut links = Vec::new();
    for name in wanted {
        let path = folder.join(name);
        let failed = |error: LinkError| KernelError::Link {
            path: path.clone(),
            step: "opened",
            source: Box::new(error),
        };
        let link = FdLink::from(PinnedLink::from_pin(&path).map_err(failed)?);
        let program = link.info().map_err(failed)?.program_id();
        if !SILENT.contains(&name) && !queues_to(name, program, events)? {
            return Err(KernelError::ForeignPins { path });
        }
        links.push(link);
    }
    Ok(Some(links))
}

fn queues_to(name: &'static str, program: u32, map: u32) -> Result<bool, KernelError> {
    let failed = |error: ProgramError| KernelError::Program {
        program: name,
        step: "looked at",
        source: Box::new(error),
    };
    for info in loaded_programs() {
        let info = info.map_err(failed)?;
        if info.id() == program {
            return Ok(info.map_ids().map_err(failed)?.is_some_and(|ids| ids.contains(&map)));
        }
    }
    Ok(false)
}

fn open_ring(pins: &Pins) -> Result<RingBuf<MapData>, KernelError> {
    let path = pins.map(EVENTS);
    let map = MapData::from_pin(&path).map_err(map_error(EVENTS))?;
    if map.info().map_err(map_error(EVENTS))?.max_entries() != RING_BYTES {
        return Err(KernelError::ForeignPins { path });
    }
    Map::from_map_data(map)
        .and_then(RingBuf::try_from)
        .map_err(map_error(EVENTS))
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map {
        name,
        source: Box::new(source),
    }
}
