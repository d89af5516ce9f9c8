//! The agent in the initramfs: it measures from there on, so that nothing of the real root runs unmeasured, until the agent of the
//! real root asks for its place.
//!
//! It talks to nobody and knows no secret: an initramfs is read by whoever reads the disk. It observes, whatever agent.toml says: a
//! host that refuses its own start could not be repaired. Modes hold and enforce begin with the agent of the real root.
//!
//! The two meet in the run folder, which an initramfs hands over. Signals would not do: in hold and enforce nobody but process 1
//! may send one.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use assay_evidence::event::Mode;
use tokio::signal::unix::{SignalKind, signal};

use crate::approved::ApprovedStore;
use crate::config::Config;
use crate::daemon::{self, DaemonError, Measuring, Parts};
use crate::supervisor;

/// In the run folder as soon as the log says READY; locked for as long as the early agent lives.
const RUNS: &str = "early";
/// In the run folder: the agent of the real root is there.
const RELIEVED: &str = "early-relieved";
/// How often the early agent looks whether it is, and whether the root has changed.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The early agent has so long to put its last record into the TPM.
const PATIENCE: Duration = Duration::from_secs(60);

/// The early agent does not make room.
#[derive(Debug, thiserror::Error)]
pub enum EarlyError {
    /// A file in the run folder.
    #[error("cannot {operation} {path}: check the folder that run_dir in agent.toml names")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It was asked to end, and lives on.
    #[error("the agent that the initramfs started has not ended after {} s (it holds {path}): restart the host", PATIENCE.as_secs())]
    Stays {
        /// Its lock.
        path: PathBuf,
    },
}

/// Measures until the agent of the real root asks for its place, or SIGTERM comes.
///
/// # Errors
/// Any [`DaemonError`]; the process should end with a status other than 0.
pub fn run(mut config: Config) -> Result<(), DaemonError> {
    config.measure.mode = Mode::Observe;
    config.measure.protect = false;
    make_run_dir(&config.run_dir)?;
    daemon::run_to_end(&config, measure)
}

/// Ends the early agent, if there is one, and waits until it has ended. What is loaded meanwhile waits in the kernel's queue.
///
/// # Errors
/// Any [`EarlyError`].
pub fn relieve(run_dir: &Path) -> Result<(), EarlyError> {
    let path = run_dir.join(RUNS);
    let lock = match File::open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(file("open", &path)(source)),
    };
    let (asked, start) = (run_dir.join(RELIEVED), Instant::now());
    create(&asked)?;
    loop {
        match lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => std::thread::sleep(LOOK_EVERY),
            Err(TryLockError::WouldBlock) => return Err(EarlyError::Stays { path }),
            Err(TryLockError::Error(source)) => return Err(file("lock", &path)(source)),
        }
    }
    for path in [path, asked] {
        std::fs::remove_file(&path).map_err(file("remove", &path))?;
    }
    tracing::info!("took over from the agent that the initramfs started");
    Ok(())
}

async fn measure(config: &Config, parts: Parts) -> Result<(), DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|source| DaemonError::SetUp {
        what: "signal handler",
        source,
    })?;
    let mut measuring = Measuring::start(parts, &ApprovedStore::open(&config.state_dir))?;
    let mut looks = tokio::time::interval(LOOK_EVERY);
    // Until the process ends.
    let mut runs = None;
    loop {
        tokio::select! {
            ended = &mut measuring.ended => return Err(daemon::ended_early(ended)),
            _ = &mut measuring.ready, if runs.is_none() => {
                runs = Some(say_ready(&config.run_dir)?);
                tracing::info!("ready in the initramfs: every load from here on is in the log");
                supervisor::notify(&[supervisor::READY]);
            }
            _ = looks.tick() => {
                match follow_root() {
                    Ok(false) => {}
                    Ok(true) => tracing::info!("the real root is there"),
                    // Paths would lead nowhere; the next look tries again.
                    Err(error) => tracing::warn!(%error, "the real root cannot be entered"),
                }
                if config.run_dir.join(RELIEVED).exists() {
                    break;
                }
            }
            _ = terminate.recv() => break,
        }
    }
    measuring.stop().await?;
    // The lock is the process's: by the time that the successor has it, all else is free as well.
    std::mem::forget(runs);
    Ok(())
}

fn say_ready(run_dir: &Path) -> Result<File, EarlyError> {
    let (path, new) = (run_dir.join(RUNS), run_dir.join("early.new"));
    let lock = create(&new)?;
    lock.lock().map_err(file("lock", &new))?;
    // Nobody shall find it without the lock: that would be an agent that is dead.
    std::fs::rename(&new, &path).map_err(file("rename", &new))?;
    Ok(lock)
}

/// Enters the root that was mounted over this process's own. An initramfs's root cannot be unmounted: the real one is moved on
/// top of it, and whoever ran before still sees what lies below, without /proc, /run and /sys. Whether there is a new one.
fn follow_root() -> io::Result<bool> {
    // "/" is this process's root itself; ".." of a root is the root again, but as what is mounted there now.
    const TOP: &str = "/..";
    let (ours, top) = (std::fs::metadata("/")?, std::fs::metadata(TOP)?);
    if (ours.st_dev(), ours.st_ino()) == (top.st_dev(), top.st_ino()) {
        return Ok(false);
    }
    nix::unistd::chroot(TOP)?;
    std::env::set_current_dir("/")?;
    Ok(true)
}

fn make_run_dir(run_dir: &Path) -> Result<(), EarlyError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(run_dir);
    made.map_err(file("create", run_dir))
}

fn create(path: &Path) -> Result<File, EarlyError> {
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        // Whoever may open it may hold the lock.
        .mode(0o600)
        .open(path);
    opened.map_err(file("create", path))
}

fn file(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EarlyError {
    let path = path.to_owned();
    move |source| EarlyError::File {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_relieved_where_nobody_runs_or_the_one_that_ran_is_dead() {
        let folder = tempfile::tempdir().unwrap();
        relieve(folder.path()).unwrap();
        drop(say_ready(folder.path()).unwrap());
        relieve(folder.path()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_successor_waits_until_the_early_agent_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let early = say_ready(folder.path()).unwrap();
        let run_dir = folder.path().to_owned();
        let successor = std::thread::spawn(move || relieve(&run_dir));
        while !folder.path().join(RELIEVED).exists() {
            std::thread::sleep(LOOK_EVERY);
        }
        assert!(!successor.is_finished());
        drop(early);
        successor.join().unwrap().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_root_is_followed_only_where_another_lies_over_it() {
        assert!(!follow_root().unwrap());
    }
}
