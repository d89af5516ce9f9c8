//! Holding programs back until they are extended: fanotify makes them wait, the kernel programs decide.
//!
//! Whoever opens a file to run it waits in the kernel until a thread here answers. The thread has the kernel programs
//! hash the very descriptor that fanotify handed over, which queues a record like any other load; when that record's
//! batch is in the TPM's register, [`Holder::release`] answers all who wait for it, with one extend for all of them.
//!
//! Nothing rests on this being complete: it makes waiting possible, and permits nothing. A file that no event was seen
//! of (a memfd, a store through a mapping, a file system mounted this instant), and every file while no agent runs, is
//! met by the gate in the kernel, which refuses what is not extended. So neither a race nor the agent's death opens a gap.
//!
//! What these threads do must never wait for itself: they open nothing that is marked, start no program, and let every
//! open of the agent's own pass.

mod code;
mod marks;
mod waiting;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use assay_ebpf::{flags, kind, request};
use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyEvent, InitFlags, MaskFlags, Response};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use self::code::Code;
use self::marks::Marks;
use self::waiting::Waiting;
use super::kernel::request::{Reply, measure};
use super::kernel::{Answers, KernelError, Key};

/// Threads that measure: hashing is work for as many processors.
const THREADS: usize = 2;
/// A full queue is asked again after this long, at most [`PATIENCE`] times: it is the agent itself that empties it.
const PAUSE: Duration = Duration::from_millis(2);
/// See [`PAUSE`].
const PATIENCE: u32 = 2000;
/// So often a file that somebody has open for writing is asked about again: often that is a process which is about to close what
/// it inherited. Whoever really writes makes the start fail anyway.
const WRITTEN: u32 = 20;

/// What is held back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HoldSettings {
    /// Folders whose libraries, modules and firmware wait already when they are opened, with all below them.
    pub folders: Vec<PathBuf>,
    /// This kernel has no hash for its programs: the agent hashes (tier 2).
    pub user_hash: bool,
}

/// Why nothing can be held back (any more).
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The kernel has no permission events.
    #[error(
        "fanotify cannot be set up: modes hold and enforce need a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, and CAP_SYS_ADMIN"
    )]
    SetUp(#[source] Errno),
    /// Events can no longer be read or answered.
    #[error("the programs that wait can no longer be {step}")]
    Events {
        /// `asked for` or `answered`.
        step: &'static str,
        /// What the system said.
        #[source]
        source: Errno,
    },
    /// The mounted file systems cannot be listed.
    #[error("the mounted file systems cannot be listed (/proc/self/mountinfo)")]
    Mounts(#[source] procfs::ProcError),
    /// The kernel programs do not answer the agent.
    #[error("the kernel programs do not answer the agent: they were removed, or another agent took over")]
    Unanswered,
    /// The kernel programs' maps.
    #[error("the kernel programs' answers cannot be read")]
    Kernel(#[from] KernelError),
    /// A thread or a pipe could not be made.
    #[error("a thread that holds programs back cannot be started")]
    Thread(#[source] std::io::Error),
}

/// The running threads.
pub struct Holder {
    waiting: Arc<Waiting>,
    marks: Marks,
    failure: Arc<Mutex<Option<HoldError>>>,
}

impl Holder {
    /// Marks what is mounted and begins to answer.
    ///
    /// # Errors
    /// Any [`HoldError`].
    pub fn start(
        settings: &HoldSettings,
        answers: impl Fn() -> Result<Answers, KernelError>,
    ) -> Result<Self, HoldError> {
        let init = InitFlags::FAN_CLASS_CONTENT
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS;
        let files = EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC | EventFFlags::O_LARGEFILE;
        raise_descriptors();
        let group = Arc::new(Fanotify::init(init, files).map_err(HoldError::SetUp)?);
        let waiting = Arc::new(Waiting::new(group.clone(), answers()?));
        let failure = Arc::new(Mutex::new(None));
        for number in 0..THREADS {
            let worker = Worker {
                group: group.clone(),
                waiting: waiting.clone(),
                answers: answers()?,
                user_hash: settings.user_hash,
            };
            let failure = failure.clone();
            spawn(format!("hold-{number}"), move || keep(&failure, worker.run()))?;
        }
        // Only now: nobody may wait before there is somebody who answers.
        let marks = Marks::start(group, settings, failure.clone())?;
        Ok(Self {
            waiting,
            marks,
            failure,
        })
    }

    /// These digests are in the TPM's register, and the kernel programs know it: whoever waits for them goes on.
    ///
    /// # Errors
    /// [`HoldError::Events`].
    pub fn release(&self, digests: &[Key]) -> Result<(), HoldError> {
        self.waiting.release(digests)
    }

    /// No digest will be extended any more: nobody waits from now on, and the gate answers all.
    ///
    /// # Errors
    /// [`HoldError::Events`].
    pub fn give_up(&self) -> Result<(), HoldError> {
        self.waiting.give_up()
    }

    /// The gate refused to load this file: its folder is marked if it is one of those that should be.
    pub fn refused(&self, path: &str) {
        self.marks.refused(path);
    }

    /// Whether a thread has ended, and why.
    ///
    /// # Errors
    /// What it ended with.
    pub fn check(&self) -> Result<(), HoldError> {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// Each program that waits is a descriptor; one that gets none is refused.
fn raise_descriptors() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised: fewer programs can wait at a time");
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<(), HoldError> {
    let started = thread::Builder::new().name(name).spawn(body);
    started.map(drop).map_err(HoldError::Thread)
}

/// Leaves an error for the measuring loop, which ends the daemon with it.
fn keep(failure: &Mutex<Option<HoldError>>, result: Result<(), HoldError>) {
    if let Err(error) = result {
        *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

struct Worker {
    group: Arc<Fanotify>,
    waiting: Arc<Waiting>,
    answers: Answers,
    user_hash: bool,
}

impl Worker {
    fn run(mut self) -> Result<(), HoldError> {
        loop {
            match self.group.read_events() {
                Ok(events) => {
                    for event in events {
                        self.handle(event)?;
                    }
                }
                // A descriptor for the event could not be made, and whoever waits was refused: the others go on.
                Err(Errno::EINTR | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ETXTBSY | Errno::EPERM) => {}
                Err(source) => {
                    return Err(HoldError::Events {
                        step: "asked for",
                        source,
                    });
                }
            }
        }
    }

    /// Answers one who waits, or puts it with those who wait for an extend.
    fn handle(&mut self, event: FanotifyEvent) -> Result<(), HoldError> {
        let Some(file) = event.fd() else { return Ok(()) };
        let pid = event.pid().unsigned_abs();
        if pid == std::process::id() || self.waiting.is_over() {
            return self.waiting.answer(&event, Response::FAN_ALLOW);
        }
        let runs = event.mask().contains(MaskFlags::FAN_OPEN_EXEC_PERM);
        let (kind, marks) = match (code::look(file), runs) {
            (Code::Script, true) => (kind::PROGRAM, flags::SCRIPT),
            (_, true) => (kind::PROGRAM, 0),
            (Code::None, false) => return self.waiting.let_pass(&event),
            (Code::Script, false) => (kind::ARGUMENT, flags::AHEAD),
            (Code::Elf, false) => (kind::MAPPING, flags::AHEAD),
            (Code::Module, false) => (kind::MODULE_FILE, flags::AHEAD),
            (Code::Firmware, false) => (kind::FIRMWARE, flags::AHEAD),
        };
        let argument = request::argument(pid, kind, marks);
        let mut asked = 0;
        let reply = loop {
            match measure(file, argument, &mut self.answers, self.user_hash)? {
                Reply::NoRoom if asked < PATIENCE => thread::sleep(PAUSE),
                Reply::Unstable if runs && asked < WRITTEN => thread::sleep(PAUSE),
                reply => break reply,
            }
            asked += 1;
        };
        match reply {
            Reply::Known => self.waiting.let_pass(&event),
            Reply::Queued | Reply::NoRoom => match self.answers.last()? {
                Some(digest) => self.waiting.wait(digest, event),
                None => self.waiting.answer(&event, Response::FAN_DENY),
            },
            // Reading it harms nobody, and running it is refused.
            Reply::NotApproved | Reply::NotHashed if runs => self.waiting.answer(&event, Response::FAN_DENY),
            // The gate looks again, once writers are kept out.
            Reply::NotApproved | Reply::NotHashed | Reply::Unstable | Reply::HashIt => {
                self.waiting.answer(&event, Response::FAN_ALLOW)
            }
            Reply::Unanswered => Err(HoldError::Unanswered),
        }
    }
}
