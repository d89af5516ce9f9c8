//! What the threads and the measuring loop share: finished records, failures, and how the work gets on.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use assay_ebpf::Record;

use super::ProbeError;

/// Finished records that may wait for the measuring loop; beyond it the hasher waits.
const FINISHED: usize = 4096;

/// A file may be in the works so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Most of the time between two looks that counts: a host that was paused did not wait.
const STEP: Duration = Duration::from_secs(1);

/// Between the two threads and the measuring loop.
pub struct Shared {
    output: Mutex<Output>,
    room: Condvar,
    /// A byte lies here while there are records, or an error.
    wake: UnixStream,
    /// Records that the probes numbered and that never came.
    gaps: AtomicU64,
    stopping: AtomicBool,
    /// The reader's files.
    pub reading: Work,
    /// The hasher's files.
    pub hashing: Work,
}

struct Output {
    records: VecDeque<Record>,
    /// The number of the next record: in the order in which they are finished, without gaps.
    next_seq: u64,
    failed: Option<ProbeError>,
}

/// Files begun and done by a thread.
#[derive(Default)]
pub struct Work {
    begun: AtomicU64,
    done: AtomicU64,
}

/// How the measuring loop sees a thread's [`Work`].
pub struct Pace {
    done: u64,
    standing: Duration,
    looked: Instant,
}

impl Shared {
    /// With the stream that is readable while there is something to take.
    pub fn new() -> std::io::Result<(Arc<Self>, UnixStream)> {
        let (wake, ready) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        ready.set_nonblocking(true)?;
        let shared = Self {
            output: Mutex::new(Output {
                records: VecDeque::new(),
                next_seq: 0,
                failed: None,
            }),
            room: Condvar::new(),
            wake,
            gaps: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            reading: Work::default(),
            hashing: Work::default(),
        };
        Ok((Arc::new(shared), ready))
    }

    /// Runs `work` in a thread; an error that it ends with is what the measuring loop reads next.
    pub fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(&Self) -> Result<(), ProbeError> + Send + 'static,
    ) -> Result<(), ProbeError> {
        let shared = Arc::clone(self);
        let run = move || {
            if let Err(error) = work(&shared) {
                shared.fail(error);
            }
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map(drop)
            .map_err(ProbeError::Thread)
    }

    /// Hands over a finished record and numbers it. Waits while there is no room.
    pub fn push(&self, mut record: Record) {
        let mut output = self.lock();
        while output.records.len() >= FINISHED && !self.is_stopping() {
            output = self.room.wait(output).unwrap_or_else(PoisonError::into_inner);
        }
        record.seq = output.next_seq;
        output.next_seq = output.next_seq.saturating_add(1);
        output.records.push_back(record);
        if output.records.len() == 1 {
            self.wake();
        }
    }

    /// The first record that waits; it stays. With none, `ready` becomes unreadable.
    pub fn first(&self, mut ready: &UnixStream) -> Result<Option<Record>, ProbeError> {
        let mut output = self.lock();
        if let Some(record) = output.records.front() {
            return Ok(Some(*record));
        }
        // Under the lock: what comes from now on wakes anew. Nothing to read is no error.
        drop(ready.read(&mut [0; 16]));
        match output.failed.take() {
            Some(error) => Err(error),
            None => Ok(None),
        }
    }

    /// Frees the place of [`Self::first`].
    pub fn remove_first(&self) {
        self.lock().records.pop_front();
        self.room.notify_one();
    }

    /// Counts records that never came.
    pub fn add_gap(&self, count: u64) {
        self.gaps.fetch_add(count, Ordering::Relaxed);
    }

    /// How many never came.
    pub fn gaps(&self) -> u64 {
        self.gaps.load(Ordering::Relaxed)
    }

    /// Asks the threads to end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.room.notify_all();
    }

    /// Whether they should.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn fail(&self, error: ProbeError) {
        self.lock().failed.get_or_insert(error);
        self.wake();
    }

    fn wake(&self) {
        // A full stream wakes just as well, and without a reader there is nobody to wake.
        drop((&self.wake).write(&[0]));
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// Runs one piece of it.
    pub fn on<T>(&self, piece: impl FnOnce() -> T) -> T {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let result = piece();
        self.done.fetch_add(1, Ordering::Relaxed);
        result
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            done: 0,
            standing: Duration::ZERO,
            looked: Instant::now(),
        }
    }
}

impl Pace {
    /// An error when the same piece of work has been going on for too long.
    pub fn check(&mut self, work: &Work, what: &'static str) -> Result<(), ProbeError> {
        self.check_at(work, what, Instant::now())
    }

    fn check_at(&mut self, work: &Work, what: &'static str, now: Instant) -> Result<(), ProbeError> {
        let passed = now.saturating_duration_since(self.looked).min(STEP);
        let (done, begun) = (work.done.load(Ordering::Relaxed), work.begun.load(Ordering::Relaxed));
        self.standing = if done == begun || done != self.done {
            Duration::ZERO
        } else {
            self.standing.saturating_add(passed)
        };
        (self.done, self.looked) = (done, now);
        if self.standing < PATIENCE {
            return Ok(());
        }
        Err(ProbeError::Stalled {
            what,
            seconds: PATIENCE.as_secs(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            seq: 77,
            time_ns: 0,
            size: 0,
            ino: 0,
            change: 0,
            cgroup: 0,
            fs_magic: 0,
            dev: 0,
            generation: 0,
            kind: 1,
            flags: 0,
            hash_algo: 4,
            hash_error: 0,
            pid: 0,
            uid: 0,
            digest: [0; 32],
            comm: [0; 16],
            path_len: 0,
            pad: 0,
            path: [0; 512],
        }
    }

    fn readable(stream: &UnixStream) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd as _;
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn records_are_numbered_and_stay_until_they_are_removed() {
        let (shared, ready) = Shared::new().unwrap();
        assert!(!readable(&ready));
        shared.push(record());
        shared.push(record());
        assert!(readable(&ready));
        for seq in 0..2 {
            assert_eq!(shared.first(&ready).unwrap().unwrap().seq, seq);
            assert_eq!(shared.first(&ready).unwrap().unwrap().seq, seq, "still there");
            shared.remove_first();
        }
        assert!(shared.first(&ready).unwrap().is_none());
        assert!(!readable(&ready), "nothing waits, nothing wakes");
        shared.push(record());
        assert!(readable(&ready));
    }

    #[test]
    fn a_thread_that_fails_is_told_after_its_last_record() {
        let (shared, ready) = Shared::new().unwrap();
        shared.push(record());
        shared.spawn("test", |_| Err(ProbeError::Silent)).unwrap();
        while shared.lock().failed.is_none() {
            std::thread::yield_now();
        }
        assert!(shared.first(&ready).unwrap().is_some());
        shared.remove_first();
        assert!(matches!(shared.first(&ready), Err(ProbeError::Silent)));
    }

    #[test]
    fn only_one_piece_of_work_that_goes_on_and_on_is_a_stall() {
        let (work, mut now) = (Work::default(), Instant::now());
        let mut pace = Pace {
            done: 0,
            standing: Duration::ZERO,
            looked: now,
        };
        let mut wait = |pace: &mut Pace, seconds: u64, step: Duration| {
            let end = now + Duration::from_secs(seconds);
            let mut result = Ok(());
            while now < end && result.is_ok() {
                now += step;
                result = pace.check_at(&work, "hashing", now);
            }
            result
        };
        let half = Duration::from_millis(500);
        assert!(wait(&mut pace, 600, half).is_ok(), "idle");
        for _ in 0..5 {
            work.on(|| ());
            work.begun.fetch_add(1, Ordering::Relaxed);
            assert!(wait(&mut pace, 50, half).is_ok(), "busy, and gets on");
            work.done.fetch_add(1, Ordering::Relaxed);
        }
        work.begun.fetch_add(1, Ordering::Relaxed);
        assert!(
            wait(&mut pace, 3600, Duration::from_secs(3600)).is_ok(),
            "a pause of the host"
        );
        assert!(matches!(wait(&mut pace, 100, half), Err(ProbeError::Stalled { .. })));
    }
}
