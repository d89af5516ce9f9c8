//! What the agent tells its kernel programs: mode, who the agent is, what has been extended, what is approved.

use assay_ebpf::{control, counter};
use aya::maps::{Array, HashMap, Map, MapData, MapError};

use super::KernelError;
use super::map_error;
use super::pins::{APPROVED, CONTROL, COUNTERS, DIGESTS, EXTENDED, Pins};

/// A SHA-256 digest, as the maps have it.
pub type Key = [u8; 32];

/// The maps that only the agent writes.
pub struct Orders {
    control: Array<MapData, u64>,
    extended: HashMap<MapData, Key, u32>,
    approved: HashMap<MapData, Key, u64>,
}

impl Orders {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        Ok(Self {
            control: open(pins, CONTROL)?,
            extended: open(pins, EXTENDED)?,
            approved: open(pins, APPROVED)?,
        })
    }

    /// Sets one order, see [`control`].
    pub fn set(&mut self, index: u32, value: u64) -> Result<(), KernelError> {
        self.control.set(index, value, 0).map_err(map_error(CONTROL))
    }

    /// One order as it stands.
    pub fn get(&self, index: u32) -> Result<u64, KernelError> {
        self.control.get(&index, 0).map_err(map_error(CONTROL))
    }

    /// Makes the kernel programs ask again for each file that they let through so far.
    pub fn new_epoch(&mut self) -> Result<(), KernelError> {
        let epoch = self.get(control::EPOCH)?;
        // The programs compare the lower half.
        self.set(control::EPOCH, (epoch + 1) & u64::from(u32::MAX))
    }

    /// Tells that these digests are in the TPM's register.
    pub fn extended(&mut self, digests: &[Key]) -> Result<(), KernelError> {
        for digest in digests {
            self.extended.insert(digest, 1, 0).map_err(map_error(EXTENDED))?;
        }
        Ok(())
    }

    /// Puts this list in force in the place of the one before it.
    pub fn approve(&mut self, digests: impl Iterator<Item = Key>) -> Result<(), KernelError> {
        let list = self.get(control::LIST)? + 1;
        for digest in digests {
            self.approved.insert(digest, list, 0).map_err(map_error(APPROVED))?;
        }
        self.set(control::LIST, list)?;
        self.new_epoch()?;
        let stale: Vec<Key> = self
            .approved
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, of)| *of != list)
            .map(|(digest, _)| digest)
            .collect();
        for digest in stale {
            self.approved.remove(&digest).map_err(map_error(APPROVED))?;
        }
        Ok(())
    }

    /// Whether a list is in force.
    pub fn has_list(&self) -> Result<bool, KernelError> {
        Ok(self.get(control::LIST)? != 0)
    }
}

/// What a thread that holds programs back reads: the digest of its last question, and what has been extended.
pub struct Answers {
    digests: HashMap<MapData, u64, Key>,
    extended: HashMap<MapData, Key, u32>,
}

impl Answers {
    /// Opens the pinned maps once more: each thread has descriptors of its own.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        Ok(Self {
            digests: open(pins, DIGESTS)?,
            extended: open(pins, EXTENDED)?,
        })
    }

    /// The digest that the calling thread's last request was answered about.
    pub fn last(&self) -> Result<Option<Key>, KernelError> {
        found(self.digests.get(&own_key(), 0)).map_err(map_error(DIGESTS))
    }

    /// Tier 2: hands over the digest that the calling thread made.
    pub fn hand_over(&mut self, digest: Key) -> Result<(), KernelError> {
        self.digests.insert(own_key(), digest, 0).map_err(map_error(DIGESTS))
    }

    /// Whether this digest is in the TPM's register.
    pub fn is_extended(&self, digest: &Key) -> Result<bool, KernelError> {
        Ok(found(self.extended.get(digest, 0))
            .map_err(map_error(EXTENDED))?
            .is_some())
    }
}

/// What `bpf_get_current_pid_tgid` says of the calling thread.
fn own_key() -> u64 {
    let thread = u64::from(nix::unistd::gettid().as_raw().unsigned_abs());
    u64::from(std::process::id()) << 32 | thread
}

fn found<T>(looked_up: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match looked_up {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A pinned map as its type.
pub(super) fn open<T>(pins: &Pins, name: &'static str) -> Result<T, KernelError>
where
    T: TryFrom<Map, Error = MapError>,
{
    MapData::from_pin(pins.map(name))
        .and_then(Map::from_map_data)
        .and_then(T::try_from)
        .map_err(map_error(name))
}

/// The counters, checked to be as many as this version has.
pub(super) fn open_counters(pins: &Pins) -> Result<Array<MapData, u64>, KernelError> {
    let counters: Array<MapData, u64> = open(pins, COUNTERS)?;
    if counters.len() == counter::COUNT {
        Ok(counters)
    } else {
        Err(KernelError::ForeignPins {
            path: pins.map(COUNTERS),
        })
    }
}
