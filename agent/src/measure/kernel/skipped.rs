//! Runs of a program that the kernel left out.
//!
//! Before Linux 6.2 an LSM program is not started on a CPU where it runs already, in another task that sleeps in it: while
//! one file is hashed, another load passes unseen. A kprobe's program is not started on a CPU where a task was interrupted in
//! bpf(2), which kernels that preempt do. The kernel counts these (kprobes from 6.7 on), and what it counts is a loss.

use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::programs::links::FdLink;
use aya::programs::{ProgramFd, ProgramInfo, loaded_programs};

use super::KernelError;

/// A look reads a file of each program, which must not be what an idle agent does most.
const PAUSE: Duration = Duration::from_secs(2);

/// Between two looks where the kernel has no reason to skip anything.
const LONG_PAUSE: Duration = Duration::from_secs(60);

/// The running programs' counters of skipped runs.
pub struct Skipped {
    programs: Vec<OwnedFd>,
    count: u64,
    looked: Option<Instant>,
    pause: Duration,
}

impl Skipped {
    /// Opens the programs behind these links.
    pub fn watch(links: &[FdLink]) -> Result<Self, KernelError> {
        let mut wanted = Vec::new();
        for link in links {
            let info = link.info().map_err(|error| KernelError::Link {
                path: "(a running program)".into(),
                step: "looked at",
                source: Box::new(error),
            })?;
            wanted.push(info.program_id());
        }
        let failed = |error| KernelError::Program {
            program: "(any)",
            step: "looked at",
            source: Box::new(error),
        };
        let mut programs = Vec::new();
        for info in loaded_programs() {
            let info: ProgramInfo = info.map_err(failed)?;
            if wanted.contains(&info.id()) {
                programs.push(Self::another(&info.fd().map_err(failed)?)?);
            }
        }
        let path = Path::new("/proc/sys/kernel/osrelease");
        let release = fs::read_to_string(path).map_err(KernelError::file("read", path))?;
        let pause = if skips(&release) { PAUSE } else { LONG_PAUSE };
        Ok(Self {
            pause,
            ..Self::of(programs)
        })
    }

    /// A descriptor to keep.
    pub fn another(program: &ProgramFd) -> Result<OwnedFd, KernelError> {
        let failed = KernelError::file("open once more", Path::new("(a running program)"));
        program.as_fd().try_clone_to_owned().map_err(failed)
    }

    /// Those of these programs.
    pub const fn of(programs: Vec<OwnedFd>) -> Self {
        Self {
            programs,
            count: 0,
            looked: None,
            pause: PAUSE,
        }
    }

    /// Skipped runs of all programs since they were loaded, as of a moment ago.
    pub fn count(&mut self) -> Result<u64, KernelError> {
        if self.looked.is_some_and(|at| at.elapsed() < self.pause) {
            return Ok(self.count);
        }
        let mut count = 0_u64;
        for program in &self.programs {
            let path = PathBuf::from(format!("/proc/self/fdinfo/{}", program.as_raw_fd()));
            count = count.saturating_add(read(&path)?);
        }
        (self.count, self.looked) = (count, Some(Instant::now()));
        Ok(count)
    }
}

/// Whether a kernel of this release (`uname -r`) skips LSM programs: before 6.2, and if it is no number.
fn skips(release: &str) -> bool {
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|number| number.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version < (6, 2)
}

fn read(path: &Path) -> Result<u64, KernelError> {
    let text = fs::read_to_string(path).map_err(KernelError::file("read", path))?;
    Ok(recursion_misses(&text))
}

/// From a program's fdinfo. Kernels before 5.12 don't say.
fn recursion_misses(text: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_told_by_their_release() {
        for old in [
            "6.1.0-56-cloud-amd64",
            "5.14.0-503.el9.x86_64",
            "4.19.0+1",
            "unknown",
            "",
        ] {
            assert!(skips(old), "{old}");
        }
        for new in ["6.2.0", "6.12.118+deb13-cloud-amd64", "7.0-rc1", "10.1"] {
            assert!(!skips(new), "{new}");
        }
    }

    #[test]
    fn the_counter_is_found_among_the_others() {
        let text = "pos:\t0\nprog_type:\t29\nrun_cnt:\t7\nrecursion_misses:\t42\nverified_insns:\t73\n";
        assert_eq!(recursion_misses(text), 42);
        assert_eq!(recursion_misses("pos:\t0\n"), 0);
    }
}
