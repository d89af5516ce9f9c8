//! What is remembered of a TPM that makes trouble: how slow it was, and that an earlier agent ended because of it.

use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use assay_evidence::event::{MAX_TEXT, cut};

use crate::http::chain;
use crate::tpm::TpmError;

/// An extend that takes longer is told of,
const SLOW: Duration = Duration::from_secs(1);

/// but not more often than this.
const SLOW_AGAIN: Duration = Duration::from_secs(10);

/// The slowest extend that has not been told of.
#[derive(Debug, Default)]
pub(super) struct Slowest {
    worst: Option<Duration>,
    told: Option<Instant>,
}

impl Slowest {
    /// An extend took this long.
    pub(super) fn took(&mut self, time: Duration) {
        if time > SLOW {
            self.worst = self.worst.max(Some(time));
        }
    }

    /// What the next record should say, in milliseconds.
    pub(super) fn tell(&mut self, now: Instant) -> Option<u64> {
        let lately = |told| now.saturating_duration_since(told) < SLOW_AGAIN;
        if self.told.is_some_and(lately) {
            return None;
        }
        let worst = self.worst.take()?;
        self.told = Some(now);
        Some(u64::try_from(worst.as_millis()).unwrap_or(u64::MAX))
    }
}

/// File name in the run folder.
const NAME: &str = "tpm-failed";

/// A note for the next agent of this boot: the TPM failed. It has two lines, the boot's id and what the TPM answered.
#[derive(Clone, Debug)]
pub struct FailureNote {
    path: PathBuf,
    boot_id: String,
}

impl FailureNote {
    /// The note in this run folder, for agents of this boot.
    #[must_use]
    pub fn new(run_dir: &Path, boot_id: &str) -> Self {
        Self {
            path: run_dir.join(NAME),
            boot_id: boot_id.to_owned(),
        }
    }

    /// Leaves the note. One that cannot be written is a warning: the agent ends with the error itself.
    pub fn leave(&self, error: &TpmError) {
        use std::io::Write as _;

        let (boot_id, text) = (&self.boot_id, chain(error));
        let opened = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.path);
        let written =
            opened.and_then(|mut file| file.write_all(format!("{boot_id}\n{}\n", cut(&text, MAX_TEXT)).as_bytes()));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "the next agent cannot be told that the TPM failed");
        }
    }

    /// What an earlier agent of this boot left. A note of another boot is none.
    pub(super) fn find(&self) -> Option<String> {
        let mut text = Vec::new();
        // Longer than any note: what is cut off is no part of one.
        let limit = 2 * MAX_TEXT as u64;
        std::fs::File::open(&self.path)
            .and_then(|file| file.take(limit).read_to_end(&mut text))
            .ok()?;
        let text = String::from_utf8_lossy(&text);
        let (boot_id, detail) = text.split_once('\n')?;
        (boot_id == self.boot_id).then(|| cut(detail.trim_end(), MAX_TEXT).to_owned())
    }

    /// It is in the log: the note goes.
    pub(super) fn clear(&self) {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "a note that the TPM failed stays and will be told of again");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_told_and_not_too_often() {
        let (mut slowest, now) = (Slowest::default(), Instant::now());
        slowest.took(SLOW);
        assert_eq!(slowest.tell(now), None, "not slow");
        for millis in [1500, 3000, 2000] {
            slowest.took(Duration::from_millis(millis));
        }
        assert_eq!(slowest.tell(now), Some(3000));
        slowest.took(Duration::from_millis(1700));
        assert_eq!(slowest.tell(now + SLOW_AGAIN / 2), None);
        slowest.took(Duration::from_millis(1600));
        assert_eq!(slowest.tell(now + SLOW_AGAIN), Some(1700));
        assert_eq!(slowest.tell(now + SLOW_AGAIN * 9), None);
    }

    #[test]
    fn a_note_is_found_in_its_boot_until_it_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let note = FailureNote::new(dir.path(), "this-boot");
        assert_eq!(note.find(), None);
        note.leave(&TpmError::Stopped);
        assert_eq!(note.find(), Some(TpmError::Stopped.to_string()));
        assert_eq!(FailureNote::new(dir.path(), "another-boot").find(), None);
        std::fs::write(dir.path().join(NAME), format!("this-boot\n{}", "\u{e9}".repeat(4000))).unwrap();
        assert!(note.find().unwrap().len() <= MAX_TEXT);
        note.clear();
        note.clear();
        assert_eq!(note.find(), None);
    }
}
