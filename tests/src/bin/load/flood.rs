//! Loads without a pause, as many as the machine makes up to a given rate.

use std::fs::File;
use std::io::{Error, Result};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use assay_tests::load::{self, Flooded};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::start::{Starter, c_path, is_refusal, nanos, on_threads};

/// Bytes of a new program: one page.
const SIZE: usize = 4096;
const PAGE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// What is to be started.
pub struct Plan {
    /// Where the programs are made.
    pub folder: PathBuf,
    /// The number of the first; it is the one that is started again and again.
    pub from: u64,
    /// Programs a second, at most.
    pub rate: u64,
    /// For so long.
    pub seconds: u64,
    /// So many at a time.
    pub jobs: usize,
    /// Every so many-th program is new; 0: none.
    pub new: u64,
}

/// Programs, most of them known, some new: made on the spot, run once, and removed.
pub fn programs(plan: &Plan) -> Result<Flooded> {
    crate::make(&plan.folder, plan.from, SIZE)?;
    let known = c_path(&plan.folder.join(load::name(plan.from)))?;
    Starter::new()?.run(&known)?.map_err(Error::from)?;
    let (next, pace) = (AtomicU64::new(1), Pace::new(plan.rate, plan.seconds));
    let parts = on_threads(plan.jobs, |_| {
        let (starter, mut part) = (Starter::new()?, Flooded::default());
        loop {
            let turn = next.fetch_add(1, Ordering::Relaxed);
            if !pace.wait(turn) {
                return Ok(part);
            }
            let number = plan.from.saturating_add(turn);
            let new = plan.new > 0 && turn.is_multiple_of(plan.new);
            let ran = if new {
                crate::make(&plan.folder, number, SIZE)?;
                let path = plan.folder.join(load::name(number));
                let ran = starter.run(&c_path(&path)?)?;
                std::fs::remove_file(&path)?;
                ran
            } else {
                starter.run(&known)?
            };
            match ran {
                Ok(()) => part.done = part.done.saturating_add(1),
                Err(_) => part.refused = part.refused.saturating_add(1),
            }
            if new && ran.is_ok() {
                part.new.push(number);
            }
        }
    })?;
    let mut all = Flooded {
        wall_ns: nanos(pace.begin),
        ..Flooded::default()
    };
    for part in parts {
        all.done = all.done.saturating_add(part.done);
        all.refused = all.refused.saturating_add(part.refused);
        all.new.extend(part.new);
    }
    Ok(all)
}

/// A file that somebody has open for writing is measured each time it is mapped executable.
pub fn mappings(path: &Path, rate: u64, seconds: u64) -> Result<Flooded> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    if file.metadata()?.len() == 0 {
        file.set_len(4096)?;
    }
    let pace = Pace::new(rate, seconds);
    let mut flooded = Flooded::default();
    for turn in 1.. {
        if !pace.wait(turn) {
            break;
        }
        match map(&file)? {
            Ok(()) => flooded.done = flooded.done.saturating_add(1),
            Err(_) => flooded.refused = flooded.refused.saturating_add(1),
        }
    }
    flooded.wall_ns = nanos(pace.begin);
    Ok(flooded)
}

#[expect(
    unsafe_code,
    reason = "a mapping is a raw address; it is never read from, and unmapped at once"
)]
fn map(file: &File) -> Result<std::result::Result<(), Errno>> {
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_EXEC;
    // SAFETY: a new mapping, where the kernel likes it; nothing is read from it.
    let mapped = unsafe { mmap(None, PAGE, prot, MapFlags::MAP_PRIVATE, file, 0) };
    match mapped {
        Ok(address) => {
            // SAFETY: the mapping made above, and nobody else knows of it.
            unsafe { munmap(address, PAGE.get())? };
            Ok(Ok(()))
        }
        Err(refused) if is_refusal(refused) => Ok(Err(refused)),
        Err(error) => Err(error.into()),
    }
}

/// Turn n is due n/rate seconds after the start; whoever is late goes on at once.
struct Pace {
    begin: Instant,
    end: Instant,
    rate: u64,
}

impl Pace {
    fn new(rate: u64, seconds: u64) -> Self {
        let begin = Instant::now();
        Self {
            begin,
            end: begin + Duration::from_secs(seconds.min(3600)),
            rate: rate.max(1),
        }
    }

    /// False: time is up.
    fn wait(&self, turn: u64) -> bool {
        let nanos = u128::from(turn) * 1_000_000_000 / u128::from(self.rate);
        let due = self.begin + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let now = Instant::now();
        if now >= self.end || due >= self.end {
            return false;
        }
        // A sleep overshoots by more than a turn is long: small leads are let pass.
        if due > now + Duration::from_millis(1) {
            std::thread::sleep(due - now);
        }
        true
    }
}
