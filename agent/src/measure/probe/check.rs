//! Do the probes tell the truth? Offsets of another kernel's BTF file would make them tell anything.
//!
//! The agent's own program is run, which prints its version and ends: the probes must tell of that program, with its path,
//! and of its libraries; and the probe that is asked must know it, too. All of it is known from stat(2).

use std::fs::File;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use assay_ebpf::kind;
use assay_ebpf::probe_record::File as Facts;

use super::ProbeError;
use super::ask::Asker;
use super::load::Loaded;
use super::reader::{Reader, own_program};
use super::record::OVERLAYFS;
use super::sighting::Sighting;

/// The probes have run before the program has; what takes time is a machine without any.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kernel that preempts may have skipped the very probe, see [`super::ask`].
const TRIES: u32 = 3;

/// What is known of the agent's own program.
struct Own {
    file: File,
    metadata: std::fs::Metadata,
    path: PathBuf,
}

/// Fails unless they do. What was read meanwhile stays with the reader.
pub fn tell_the_truth(reader: &mut Reader, loaded: &Loaded, btf: &Path) -> Result<(), ProbeError> {
    let failed = |operation| move |source| ProbeError::Own { operation, source };
    let file = own_program()?;
    let own = Own {
        metadata: file.metadata().map_err(failed("look at"))?,
        path: std::fs::read_link("/proc/self/exe").map_err(failed("find"))?,
        file,
    };
    let answer = Asker::for_this_thread(loaded.answers()?).ask(&own.file)?;
    own.compare(&answer, btf)?;

    let mut tries = (0..TRIES).map(|_| run_and_sight(reader));
    let program = loop {
        match tries.next() {
            Some(Err(ProbeError::Silent)) => {}
            Some(sighted) => break sighted?,
            None => return Err(ProbeError::Silent),
        }
    };
    own.compare(&program.file.unwrap_or_default(), btf)?;
    if program.path != own.path {
        return Err(ProbeError::Misfit {
            path: btf.to_owned(),
            what: "path",
            found: program.path.display().to_string(),
            expected: own.path.display().to_string(),
        });
    }
    Ok(())
}

/// Runs the agent's own program once; what the probes say of it.
fn run_and_sight(reader: &mut Reader) -> Result<Sighting, ProbeError> {
    let failed = |source| ProbeError::Own {
        operation: "run",
        source,
    };
    let mut child = Command::new("/proc/self/exe")
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let sighted = sighted(reader, child.id());
    child.wait().map_err(failed)?;
    sighted
}

/// What the probes say of the program that this process runs; they must have seen a mapping of it, too.
fn sighted(reader: &mut Reader, pid: u32) -> Result<Sighting, ProbeError> {
    let start = Instant::now();
    loop {
        reader.drain()?;
        let of = |wanted| {
            reader
                .sightings()
                .find(|sighting| sighting.pid == pid && sighting.kind == wanted)
        };
        if let (Some(program), Some(_)) = (of(kind::PROGRAM), of(kind::MAPPING)) {
            return Ok(program.clone());
        }
        if start.elapsed() > PATIENCE {
            return Err(ProbeError::Silent);
        }
        reader.wait()?;
    }
}

/// overlayfs may show another number than its inode has.
fn own_number(facts: &Facts, metadata: &std::fs::Metadata) -> u64 {
    if facts.magic == OVERLAYFS {
        facts.ino
    } else {
        metadata.st_ino()
    }
}

impl Own {
    /// What stat(2) and the probes must agree on, on every file system.
    fn compare(&self, facts: &Facts, btf: &Path) -> Result<(), ProbeError> {
        let metadata = &self.metadata;
        for (what, found, expected) in [
            ("inode number", facts.ino, own_number(facts, metadata)),
            ("size", facts.size, metadata.st_size()),
            ("change time", facts.ctime_sec, metadata.st_ctime().cast_unsigned()),
            (
                "change time (ns)",
                facts.ctime_nsec.into(),
                metadata.st_ctime_nsec().cast_unsigned(),
            ),
            ("mode", facts.mode.into(), metadata.mode().into()),
            ("link count", facts.links.into(), metadata.st_nlink()),
        ] {
            if found != expected {
                return Err(ProbeError::Misfit {
                    path: btf.to_owned(),
                    what,
                    found: found.to_string(),
                    expected: expected.to_string(),
                });
            }
        }
        Ok(())
    }
}
