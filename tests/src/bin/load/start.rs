//! Starting programs and waiting for their end.

use std::collections::VecDeque;
use std::ffi::CString;
use std::io::{Error, Result};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use assay_tests::load::{self, Started};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Threads that start programs hold next to nothing on their stacks.
const STACK: usize = 64 * 1024;

/// How often a program is tried that somebody still has open for writing.
const BUSY: u32 = 1000;

/// What is told to every program alike; made once.
pub struct Starter {
    actions: PosixSpawnFileActions,
    attributes: PosixSpawnAttr,
    arguments: [CString; 1],
    environment: [CString; 0],
}

impl Starter {
    /// Nothing special: the program's name is `p`, its environment empty.
    pub fn new() -> Result<Self> {
        Ok(Self {
            actions: PosixSpawnFileActions::init()?,
            attributes: PosixSpawnAttr::init()?,
            arguments: [c"p".to_owned()],
            environment: [],
        })
    }

    /// Starts a program, by vfork and exec, and waits for its end. The inner error: the kernel refused.
    pub fn run(&self, program: &CString) -> Result<std::result::Result<(), Errno>> {
        let start = || {
            posix_spawn(
                program.as_c_str(),
                &self.actions,
                &self.attributes,
                &self.arguments,
                &self.environment,
            )
        };
        let mut spawned = start();
        // Another thread's child may hold the descriptor that wrote the program, until it has its own program.
        for _ in 0..BUSY {
            if spawned != Err(Errno::ETXTBSY) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
            spawned = start();
        }
        let pid = match spawned {
            Ok(pid) => pid,
            Err(refused) if is_refusal(refused) => return Ok(Err(refused)),
            Err(error) => return Err(error.into()),
        };
        match waitpid(pid, None)? {
            WaitStatus::Exited(_, 0) => Ok(Ok(())),
            other => Err(Error::other(format!("{} ended: {other:?}", program.to_string_lossy()))),
        }
    }
}

/// What a security module says that does not let a program run.
pub fn is_refusal(errno: Errno) -> bool {
    matches!(errno, Errno::EPERM | Errno::EACCES | Errno::EAGAIN | Errno::ETXTBSY)
}

/// One program over and over, on one processor, so that no wandering between two adds to the figure.
pub fn again(program: &str, count: u64) -> Result<Started> {
    let (starter, path) = (Starter::new()?, c_path(Path::new(program))?);
    let mut one = CpuSet::new();
    one.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    let (mut answer, begin) = (Started::default(), Instant::now());
    for number in 0..count {
        timed(&starter, &path, number, &mut answer)?;
    }
    answer.wall_ns = nanos(begin);
    Ok(answer)
}

/// Each of many programs once.
pub fn each(folder: &Path, numbers: std::ops::Range<u64>, jobs: usize) -> Result<Started> {
    let mut queue = numbers
        .map(|number| Ok((number, c_path(&folder.join(load::name(number)))?)))
        .collect::<Result<VecDeque<_>>>()?;
    if jobs <= 1 {
        let (starter, begin) = (Starter::new()?, Instant::now());
        let mut answer = Started::default();
        while let Some((number, path)) = queue.pop_front() {
            timed(&starter, &path, number, &mut answer)?;
        }
        answer.wall_ns = nanos(begin);
        return Ok(answer);
    }
    let (queue, begin) = (Mutex::new(queue), Instant::now());
    let mut answer = Started::default();
    for part in on_threads(jobs, |_| {
        let (starter, mut part) = (Starter::new()?, Started::default());
        loop {
            // The lock is held for the taking only, not while the program runs.
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some((number, path)) = next else { return Ok(part) };
            timed(&starter, &path, number, &mut part)?;
        }
    })? {
        answer.ns.extend(part.ns);
        answer.refused.extend(part.refused);
    }
    answer.wall_ns = nanos(begin);
    Ok(answer)
}

fn timed(starter: &Starter, path: &CString, number: u64, answer: &mut Started) -> Result<()> {
    let begin = Instant::now();
    match starter.run(path)? {
        Ok(()) => answer.ns.push(nanos(begin)),
        Err(errno) => answer.refused.push((number, errno as i32)),
    }
    Ok(())
}

/// Runs a job on so many threads at once, and collects what they give.
pub fn on_threads<T: Send>(count: usize, job: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads = (0..count)
            .map(|index| {
                let job = &job;
                std::thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, move || job(index))
            })
            .collect::<Result<Vec<_>>>()?;
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(Error::other("a thread died"))))
            .collect()
    })
}

/// A path as the kernel takes it.
pub fn c_path(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Time since `begin`.
pub fn nanos(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
