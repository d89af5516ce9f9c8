//! How others talk to the measuring loop: messages, and a pipe that wakes it from its poll.

use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::Event;
use tokio::sync::Notify;

use super::MeasureError;
use crate::tpm::TpmError;

/// What the loop is told.
pub(super) enum Message {
    /// The record in flight is in the PCR, and how long that took, or it is not.
    Extended(Result<Duration, TpmError>),
    /// The inventory is taken.
    Inventory(Result<Vec<Event>, MeasureError>),
    /// From now on these digests are approved.
    Approve(Approval),
    /// Come to an end.
    Stop,
}

/// A list of what may run in enforce mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approval {
    /// The list's serial number.
    pub serial: u64,
    /// SHA-256 of the signed list as it came.
    pub list: Sha256Digest,
    /// What it approves.
    pub digests: Vec<Sha256Digest>,
}

/// Stops the loop from outside, and shows that it lives. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control {
    messages: mpsc::Sender<Message>,
    wake: Arc<PipeWriter>,
    beats: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    no_room: Arc<AtomicU64>,
    log_full: Arc<AtomicBool>,
    news: Arc<News>,
}

/// What has landed in log and PCR since it was last asked for.
#[derive(Debug, Default)]
struct News {
    landed: Notify,
    alarm: AtomicBool,
}

/// The loop's end.
pub(super) struct Mailbox {
    messages: mpsc::Receiver<Message>,
    woken: PipeReader,
}

pub(super) fn channel() -> std::io::Result<(Control, Mailbox)> {
    let (woken, wake) = std::io::pipe()?;
    let (sender, messages) = mpsc::channel();
    let control = Control {
        messages: sender,
        wake: Arc::new(wake),
        beats: Arc::default(),
        lost: Arc::default(),
        no_room: Arc::default(),
        log_full: Arc::default(),
        news: Arc::default(),
    };
    Ok((control, Mailbox { messages, woken }))
}

impl Control {
    /// Asks the loop to put what it has and AGENT_STOP into log and PCR, and to return.
    pub fn stop(&self) {
        self.send(Message::Stop);
    }

    /// Puts a list in force, and says so in the log.
    pub fn approve(&self, approval: Approval) {
        self.send(Message::Approve(approval));
    }

    /// Turns of the loop so far. A number that stays the same for seconds means that measuring hangs.
    #[must_use]
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Measurements that the kernel could not deliver in this boot, as far as reported in the log.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Loads that were refused in this boot because the queue had no room for their record.
    #[must_use]
    pub fn no_room(&self) -> u64 {
        self.no_room.load(Ordering::Relaxed)
    }

    /// The log has reached its limit: nothing is recorded any more.
    #[must_use]
    pub fn log_full(&self) -> bool {
        self.log_full.load(Ordering::Relaxed)
    }

    /// Returns once a record has landed in log and PCR since the last call; true when something in it tells of a violation, or was
    /// refused. For one caller.
    pub async fn news(&self) -> bool {
        self.news.landed.notified().await;
        self.news.alarm.swap(false, Ordering::Relaxed)
    }

    pub(super) fn landed(&self, alarm: bool) {
        self.news.alarm.fetch_or(alarm, Ordering::Relaxed);
        self.news.landed.notify_one();
    }

    pub(super) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_lost(&self, lost: u64) {
        self.lost.store(lost, Ordering::Relaxed);
    }

    pub(super) fn set_no_room(&self, count: u64) {
        self.no_room.store(count, Ordering::Relaxed);
    }

    pub(super) fn set_log_full(&self) {
        self.log_full.store(true, Ordering::Relaxed);
    }

    pub(super) fn send(&self, message: Message) {
        // Neither can fail while the loop lives, and without it there is nobody to tell.
        drop(self.messages.send(message));
        drop((&*self.wake).write(&[0]));
    }
}

impl Mailbox {
    /// The next message, if there is one.
    pub(super) fn next(&self) -> Option<Message> {
        self.messages.try_recv().ok()
    }

    /// Becomes readable when there are messages.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }

    /// Makes the descriptor unreadable again; to be called when it is readable.
    pub(super) fn opened(&mut self) -> std::io::Result<()> {
        // One read takes what there is, up to the buffer; the rest wakes again.
        self.woken.read(&mut [0; 64]).map(drop)
    }
}
