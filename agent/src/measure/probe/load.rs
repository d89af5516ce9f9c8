//! From the object file to attached probes.

use std::os::fd::AsFd as _;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use assay_ebpf::probe_record::{FILE_SIZE, Layout, STATE_SIZE, counter};
use aya::maps::perf::PerfEventArrayBuffer;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerfEventArray};
use aya::programs::{KProbe, ProgramError};
use aya::util::online_cpus;
use aya::{Ebpf, EbpfLoader};
use sha2::{Digest, Sha256};

use super::ProbeError;
use super::ask::ASKED;
use super::hasher::SEEN;
use super::version;
use crate::measure::kernel::{KernelError, OBJECT_LIMIT, Skipped, kernel_dev, read_limited};

/// The probes of the object and the functions that they go to.
const PROBES: [(&str, &str); 7] = [
    ("program", "security_bprm_check"),
    ("mapping", "security_mmap_file"),
    ("protect", "security_file_mprotect"),
    ("protect_memory", "security_file_mprotect"),
    ("opened", "security_file_open"),
    ("read_file", "security_kernel_post_read_file"),
    ("load_data", "security_kernel_load_data"),
];

/// Each CPU's buffer, in pages: 256 KiB hold about 1,000 records.
const PAGES: usize = 64;

const LAYOUT: &str = "LAYOUT";
const EVENTS: &str = "EVENTS";
const COUNTERS: &str = "COUNTERS";
const DEVICES: &str = "DEVICES";

/// Files in a known state, by number.
pub type Seen = HashMap<MapData, [u8; 16], [u8; STATE_SIZE]>;

/// Answers to an asker, by thread.
pub type Answers = HashMap<MapData, u64, [u8; FILE_SIZE]>;

/// The attached probes. They end when this goes.
pub struct Loaded {
    ebpf: Ebpf,
    path: PathBuf,
    digest: [u8; 32],
}

/// One CPU's records.
pub struct Buffer {
    /// The CPU's number.
    pub cpu: u32,
    /// Where they lie.
    pub records: PerfEventArrayBuffer<MapData>,
    /// The number of the next one.
    pub next: u64,
}

/// The counters that each CPU has.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Loaded {
    /// Loads the programs; they are attached when there are buffers, see [`Self::attach`].
    pub fn new(path: &Path, layout: &Layout) -> Result<Self, ProbeError> {
        let too_large = || KernelError::ObjectTooLarge {
            path: path.to_owned(),
            limit: OBJECT_LIMIT,
        };
        let mut bytes = read_limited(path, OBJECT_LIMIT)
            .map_err(KernelError::file("read the kernel programs", path))?
            .ok_or_else(too_large)?;
        let digest = Sha256::digest(&bytes).into();
        // Without the note, a kernel that asks for the version gets one that it refuses, and says so.
        if version::put(&mut bytes, version::compiled_as().unwrap_or(0)).is_none() {
            return Err(ProbeError::NoVersion { path: path.to_owned() });
        }
        let object = |source| KernelError::Object {
            path: path.to_owned(),
            source: Box::new(source),
        };
        // No BTF of the kernel: there may be none.
        let ebpf = EbpfLoader::new().btf(None).load(&bytes).map_err(object)?;
        let mut loaded = Self {
            ebpf,
            path: path.to_owned(),
            digest,
        };
        loaded.set_layout(layout)?;
        for (name, _) in PROBES {
            let not_permitted = |error| match KernelError::load(name, error) {
                KernelError::NotPermitted { .. } => ProbeError::NotPermitted,
                other => other.into(),
            };
            loaded.probe(name)?.load().map_err(not_permitted)?;
        }
        Ok(loaded)
    }

    /// Has openers of these devices told. What does not exist, or is no character device, is left out.
    pub fn watch(&mut self, devices: &[PathBuf]) -> Result<(), KernelError> {
        let table = self.ebpf.map_mut(DEVICES).ok_or_else(|| no_map(DEVICES))?;
        let mut table = HashMap::<_, u32, u32>::try_from(table).map_err(map_error(DEVICES))?;
        for path in devices {
            let Ok(metadata) = std::fs::metadata(path) else {
                continue;
            };
            if metadata.file_type().is_char_device() {
                let device = kernel_dev(metadata.st_rdev());
                table.insert(device, 1, 0).map_err(map_error(DEVICES))?;
            }
        }
        Ok(())
    }

    fn set_layout(&mut self, layout: &Layout) -> Result<(), KernelError> {
        let table = self.ebpf.map_mut(LAYOUT).ok_or_else(|| no_map(LAYOUT))?;
        let mut table = Array::<_, [u32; Layout::WORDS]>::try_from(table).map_err(map_error(LAYOUT))?;
        table.set(0, layout.words(), 0).map_err(map_error(LAYOUT))
    }

    fn probe(&mut self, name: &'static str) -> Result<&mut KProbe, KernelError> {
        self.ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| KernelError::NoProgram {
                path: self.path.clone(),
                program: name,
            })
    }

    /// SHA-256 of the object file.
    pub const fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Makes a buffer for each CPU that is there. What runs on one that comes later is counted as lost.
    pub fn buffers(&mut self) -> Result<Vec<Buffer>, ProbeError> {
        let events = self.ebpf.take_map(EVENTS).ok_or_else(|| no_map(EVENTS))?;
        let mut events = PerfEventArray::try_from(events).map_err(map_error(EVENTS))?;
        let cpus = online_cpus().map_err(|(path, source)| ProbeError::Cpus { path, source })?;
        cpus.into_iter()
            .map(|cpu| {
                let records = events.open(cpu, Some(PAGES)).map_err(|source| ProbeError::Buffer {
                    cpu,
                    source: Box::new(source),
                })?;
                Ok(Buffer { cpu, records, next: 0 })
            })
            .collect()
    }

    /// Attaches every probe.
    pub fn attach(&mut self) -> Result<(), ProbeError> {
        for (name, function) in PROBES {
            self.probe(name)?
                .attach(function, 0)
                .map_err(|error| attach_error(name, function, error))?;
        }
        Ok(())
    }

    /// The counters of skipped runs.
    pub fn skipped(&mut self) -> Result<Skipped, KernelError> {
        let mut programs = Vec::with_capacity(PROBES.len());
        for (name, _) in PROBES {
            let fd = self.probe(name)?.fd().map_err(|error| KernelError::Program {
                program: name,
                step: "looked at",
                source: Box::new(error),
            });
            programs.push(Skipped::another(fd?)?);
        }
        Ok(Skipped::of(programs))
    }

    /// Another handle on the counters.
    pub fn counters(&self) -> Result<Counters, ProbeError> {
        let map = self.another(COUNTERS)?;
        Ok(Counters(PerCpuArray::try_from(map).map_err(map_error(COUNTERS))?))
    }

    /// Another handle on the answers.
    pub fn answers(&self) -> Result<Answers, ProbeError> {
        Ok(HashMap::try_from(self.another(ASKED)?).map_err(map_error(ASKED))?)
    }

    /// Another handle on the files in a known state.
    pub fn seen(&self) -> Result<Seen, ProbeError> {
        Ok(HashMap::try_from(self.another(SEEN)?).map_err(map_error(SEEN))?)
    }

    fn another(&self, name: &'static str) -> Result<Map, KernelError> {
        let data = match self.ebpf.map(name) {
            Some(Map::PerCpuArray(data) | Map::HashMap(data) | Map::LruHashMap(data)) => data,
            _ => return Err(no_map(name)),
        };
        let fd = data
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| KernelError::File {
                operation: "open once more",
                path: name.into(),
                source,
            })?;
        MapData::from_fd(fd)
            .and_then(Map::from_map_data)
            .map_err(map_error(name))
    }
}

impl Counters {
    /// Records for which the buffers had no room.
    pub fn lost(&self) -> Result<u64, KernelError> {
        let values = self.0.get(&counter::LOST, 0).map_err(map_error(COUNTERS))?;
        Ok(values.iter().fold(0, |sum, count| count.saturating_add(sum)))
    }

    /// Each CPU's next number.
    pub fn next(&self) -> Result<Vec<u64>, KernelError> {
        let values = self.0.get(&counter::SEQ, 0).map_err(map_error(COUNTERS))?;
        Ok(values.iter().copied().collect())
    }
}

/// For `map_err` on map operations.
pub fn map_error(name: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map {
        name,
        source: Box::new(source),
    }
}

fn no_map(name: &'static str) -> KernelError {
    map_error(name)(MapError::InvalidName { name: name.to_owned() })
}

/// A function that the kernel lacks, or anything else.
fn attach_error(name: &'static str, function: &'static str, error: ProgramError) -> ProbeError {
    match &error {
        ProgramError::SyscallError(call) if call.io_error.raw_os_error() == Some(nix::libc::ENOENT) => {
            ProbeError::NoFunction { function }
        }
        _ => KernelError::Program {
            program: name,
            step: "attached",
            source: Box::new(error),
        }
        .into(),
    }
}
