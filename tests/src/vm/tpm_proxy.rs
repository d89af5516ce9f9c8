//! Makes a machine's TPM as slow as a real one: stands between QEMU and swtpm, and keeps commands waiting, each `TPM2_PCR_Extend` or all.
//!
//! QEMU connects to swtpm's control socket and hands swtpm one end of a pair of sockets for the TPM's commands
//! (`CMD_SET_DATAFD`, swtpm's include/tpm_ioctl.h). Everything on the control socket goes through unchanged, saved
//! state included; only when a descriptor comes along does this proxy keep it, and passes on an end of a pair of its
//! own, so that the commands come by here.

use std::io::{IoSlice, IoSliceMut, Read as _, Result, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::tpm_pace::{Delays, Done};
use crate::HarnessError;
use crate::proxy::{CC_PCR_EXTEND, be_u32, read_message};

/// Read from the control socket at once; a saved state comes in pieces.
const CHUNK: usize = 16 * 1024;

/// `CMD_INIT` of swtpm's control channel (include/tpm_ioctl.h): what the reset line does to a TPM. Its answer is one word.
const CMD_INIT: u32 = 2;
/// What passes by is kept up to this many bytes.
const MAX_TRAFFIC: usize = 16 << 20;

#[derive(Debug, Default)]
struct Shared {
    delays: Mutex<Delays>,
    extends: AtomicU64,
    counted: Mutex<Counted>,
    /// Everything that went over the bus, both ways.
    traffic: Mutex<Vec<u8>>,
    /// swtpm's end of the control channel.
    control: Mutex<Option<UnixStream>>,
    /// Bytes of swtpm's next answer that are not for QEMU.
    swallow: AtomicUsize,
}

/// What the TPM has done, and since when that is counted.
#[derive(Debug, Default)]
struct Counted {
    done: Done,
    since: Option<Instant>,
}

impl Shared {
    fn tap(&self, message: &[u8]) {
        let mut traffic = lock(&self.traffic);
        if traffic.len() < MAX_TRAFFIC {
            traffic.extend_from_slice(message);
        }
    }

    /// Counts a command that was answered a moment ago.
    fn count(&self, code: u32, idle_since: Instant, came: Instant) {
        let mut counted = lock(&self.counted);
        let idle_since = counted.since.map_or(idle_since, |since| since.max(idle_since));
        let idle = came.saturating_duration_since(idle_since);
        counted.done.add(code, idle, came.elapsed());
    }
}

/// The proxy of one machine; gone with it.
#[derive(Debug)]
pub struct SlowTpm {
    socket: PathBuf,
    shared: Arc<Shared>,
}

impl SlowTpm {
    /// Listens at `socket` for QEMU, one connection, and passes it on to swtpm's control socket at `swtpm`.
    pub(super) fn start(socket: PathBuf, swtpm: &Path, delay: Duration) -> std::result::Result<Self, HarnessError> {
        // An earlier attempt to start this machine may have left it.
        let _ = std::fs::remove_file(&socket);
        let listener =
            UnixListener::bind(&socket).map_err(HarnessError::io(format!("listen at {}", socket.display())))?;
        let (swtpm, shared) = (swtpm.to_owned(), Arc::new(Shared::default()));
        let proxy = Self {
            socket,
            shared: Arc::clone(&shared),
        };
        proxy.set_delay(delay);
        std::thread::spawn(move || {
            // An error ends the machine's connection: QEMU says that its TPM is gone.
            let _ = listener
                .accept()
                .and_then(|(qemu, _)| control(&qemu, UnixStream::connect(&swtpm)?, &shared));
        });
        Ok(proxy)
    }

    /// From the next extend on, each waits this long before the TPM gets it, and no other command does; a hardware TPM needs
    /// 5 to 20 ms. Linux gives up on a TPM that takes longer than 750 ms.
    pub fn set_delay(&self, delay: Duration) {
        self.set_delays(Delays::extends(delay));
    }

    /// From the next command on, each waits so long before the TPM gets it.
    pub fn set_delays(&self, delays: Delays) {
        *lock(&self.shared.delays) = delays;
    }

    /// Resets the TPM as its reset line would, and leaves the machine alone. It answers nothing until somebody starts it up.
    ///
    /// # Errors
    /// When the control channel is not there (any more).
    pub fn reset_tpm(&self) -> std::result::Result<(), HarnessError> {
        let mut control = lock(&self.shared.control);
        let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
        self.shared.swallow.store(4, Ordering::SeqCst);
        let command = [CMD_INIT.to_be_bytes(), [0; 4]];
        control
            .as_mut()
            .ok_or_else(gone)
            .and_then(|control| control.write_all(command.as_flattened()))
            .map_err(HarnessError::io("reset the TPM"))?;
        let start = std::time::Instant::now();
        while self.shared.swallow.load(Ordering::SeqCst) > 0 {
            if start.elapsed() > Duration::from_secs(60) {
                return Err(HarnessError::io("reset the TPM")(std::io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What went over the bus since the machine was started or restored, commands and answers, up to 16 MiB: what a probe
    /// on it would see.
    pub fn traffic(&self) -> Vec<u8> {
        lock(&self.shared.traffic).clone()
    }

    /// How many extends have succeeded since the machine was started or restored, whoever made them.
    pub fn extends(&self) -> u64 {
        self.shared.extends.load(Ordering::SeqCst)
    }

    /// What the TPM has done since the machine was started or restored, or since it was counted anew.
    pub fn done(&self) -> Done {
        lock(&self.shared.counted).done.clone()
    }

    /// Counts from here on: what the TPM has done so far, and for how long it has been idle, is forgotten.
    pub fn count_anew(&self) {
        *lock(&self.shared.counted) = Counted {
            done: Done::default(),
            since: Some(Instant::now()),
        };
    }
}

impl Drop for SlowTpm {
    fn drop(&mut self) {
        // Wakes a thread to which QEMU never connected.
        let _ = UnixStream::connect(&self.socket);
    }
}

/// Passes the control channel both ways until either end closes.
fn control(qemu: &UnixStream, mut tpm: UnixStream, shared: &Arc<Shared>) -> Result<()> {
    let (from, to, own) = (tpm.try_clone()?, qemu.try_clone()?, Arc::clone(shared));
    *lock(&shared.control) = Some(tpm.try_clone()?);
    std::thread::spawn(move || {
        // Either end closing is the normal end of this copy.
        let _ = answers(from, &to, &own);
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut buffer = vec![0; CHUNK];
    loop {
        let (length, descriptor) = receive(qemu, &mut buffer)?;
        let bytes = buffer.get(..length).unwrap_or_default();
        match descriptor {
            _ if bytes.is_empty() => return tpm.shutdown(Shutdown::Both),
            None => tpm.write_all(bytes)?,
            Some(descriptor) => {
                let (here, there) = UnixStream::pair()?;
                let (commands, shared) = (UnixStream::from(descriptor), Arc::clone(shared));
                std::thread::spawn(move || {
                    // An error is one of the two hanging up.
                    let _ = serve(commands, here, &shared);
                });
                send(&tpm, bytes, &there)?;
            }
        }
    }
}

/// swtpm's answers on the control channel, less those that are this proxy's.
fn answers(mut from: UnixStream, mut to: &UnixStream, shared: &Shared) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = from.read(&mut buffer)?;
        let bytes = buffer.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(());
        }
        let own = shared.swallow.load(Ordering::SeqCst).min(length);
        shared.swallow.fetch_sub(own, Ordering::SeqCst);
        to.write_all(bytes.get(own..).unwrap_or_default())?;
    }
}

/// Bytes of the control channel, and the descriptor that came with them.
fn receive(from: &UnixStream, buffer: &mut [u8]) -> Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = loop {
        // The flag keeps the descriptor out of programs that other threads start meanwhile.
        match recvmsg::<()>(
            from.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    let mut descriptor = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            for raw in descriptors {
                #[expect(unsafe_code, reason = "recvmsg(2) gives descriptors as numbers")]
                // SAFETY: the kernel has just made this descriptor for this process; nobody else knows its number.
                let owned = unsafe { OwnedFd::from_raw_fd(raw) };
                descriptor = Some(owned);
            }
        }
    }
    Ok((message.bytes, descriptor))
}

/// The bytes that announce a descriptor, together with it.
fn send(to: &UnixStream, bytes: &[u8], descriptor: &UnixStream) -> Result<()> {
    let descriptors = [descriptor.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let sent = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::empty(), None)?;
    match bytes.get(sent..) {
        Some(rest) => { to }.write_all(rest),
        None => Ok(()),
    }
}

/// One command at a time: the TPM has no other way.
fn serve(mut qemu: UnixStream, mut tpm: UnixStream, shared: &Shared) -> Result<()> {
    let mut answered = Instant::now();
    loop {
        let command = read_message(&mut qemu)?;
        shared.tap(&command);
        let (code, start) = (command.get(6..10).map_or(0, be_u32), Instant::now());
        let delay = lock(&shared.delays).of(code);
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        tpm.write_all(&command)?;
        let answer = read_message(&mut tpm)?;
        shared.count(code, answered, start);
        answered = Instant::now();
        shared.tap(&answer);
        if code == CC_PCR_EXTEND && answer.get(6..10).is_some_and(|code| be_u32(code) == 0) {
            shared.extends.fetch_add(1, Ordering::SeqCst);
        }
        qemu.write_all(&answer)?;
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
