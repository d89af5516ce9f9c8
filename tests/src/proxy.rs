//! A TPM that misbehaves on request: a proxy between a client and a [`Swtpm`], command by command.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::swtpm::{free_port_pair, tcti};
use crate::{HarnessError, Swtpm};

/// `TPM_RC_RETRY` (TPM 2.0 part 2, 6.6.3): "the TPM was not able to start the command".
pub const TPM_RC_RETRY: u32 = 0x922;
/// `TPM2_CC_PCR_Extend`, to aim a fault at extends only.
pub const CC_PCR_EXTEND: u32 = 0x182;
/// `TPM2_CC_Quote`, to aim a fault at quotes only.
pub const CC_QUOTE: u32 = 0x158;

/// Longest command or response that swtpm takes; anything longer is a client gone mad.
const MAX_MESSAGE: usize = 16 * 1024;

#[derive(Debug, Default)]
struct Faults {
    /// Commands still to be answered with an error: (how many, the response code).
    errors: (u32, u32),
    /// Commands whose answer never comes since the connection ends: (how many, the TPM gets them).
    hangups: (u32, bool),
    hang: bool,
    delay: Duration,
    /// Faults touch only this command code; `None`: each command.
    only: Option<u32>,
    /// The codes of all commands that came, in order.
    seen: Vec<u32>,
    /// Every byte that crossed, both ways, once it is wanted.
    crossed: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<Faults>,
    changed: Condvar,
    closed: AtomicBool,
}

/// Stands in front of a [`Swtpm`] (which must outlive it) and passes everything on until told otherwise.
#[derive(Debug)]
pub struct TpmProxy {
    port: u16,
    shared: Arc<Shared>,
}

impl TpmProxy {
    /// Listens on two neighbouring ports of its own.
    ///
    /// # Errors
    /// When no ports are free.
    pub fn start(tpm: &Swtpm) -> Result<Self, HarnessError> {
        let shared = Arc::new(Shared::default());
        for _ in 0..20 {
            let port = free_port_pair()?;
            let (Ok(data), Ok(control)) = (
                TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
                TcpListener::bind((Ipv4Addr::LOCALHOST, port.saturating_add(1))),
            ) else {
                continue;
            };
            let upstream = tpm.port();
            accept(data, Arc::clone(&shared), move |client, shared| {
                // An error ends this client's connection; it sees a TPM that hung up.
                let _ = serve(client, upstream, shared);
            });
            accept(control, Arc::clone(&shared), move |client, _| {
                let _ = pass(client, upstream.saturating_add(1));
            });
            return Ok(Self { port, shared });
        }
        Err(HarnessError::NoPorts)
    }

    /// The TCTI string that reaches the TPM through this proxy.
    pub fn tcti(&self) -> String {
        tcti(self.port)
    }

    /// Faults set from now on touch only the command `code` ([`CC_PCR_EXTEND`], [`CC_QUOTE`]); `None`: every command.
    pub fn only(&self, code: Option<u32>) {
        self.set(|faults| faults.only = code);
    }

    /// The next `count` commands are not passed on but answered with `TPM_RC_RETRY`.
    pub fn retry_next(&self, count: u32) {
        self.fail_next(count, TPM_RC_RETRY);
    }

    /// The next `count` commands are not passed on but answered with `response_code`.
    pub fn fail_next(&self, count: u32, response_code: u32) {
        self.set(|faults| faults.errors = (count, response_code));
    }

    /// The next `count` commands end their connection instead of being answered, as a driver's time-out does. `passed_on`:
    /// the TPM has carried them out.
    pub fn hang_up_next(&self, count: u32, passed_on: bool) {
        self.set(|faults| faults.hangups = (count, passed_on));
    }

    /// Commands are taken and not answered, until [`TpmProxy::resume`].
    pub fn hang(&self) {
        self.set(|faults| faults.hang = true);
    }

    /// Answers again; a command that was kept waiting is passed on now.
    pub fn resume(&self) {
        self.set(|faults| faults.hang = false);
    }

    /// Each command waits this long before it is passed on: a hardware TPM needs 5 to 300 ms.
    pub fn delay(&self, delay: Duration) {
        self.set(|faults| faults.delay = delay);
    }

    /// How many commands with this code have come so far, failed ones included.
    pub fn count(&self, code: u32) -> usize {
        let faults = self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.seen.iter().filter(|&&seen| seen == code).count()
    }

    /// Keeps what crosses from now on, as somebody does who listens on the TPM's bus.
    pub fn listen(&self) {
        self.set(|faults| faults.crossed = Some(Vec::new()));
    }

    /// Whether these bytes have crossed in clear, either way, since [`TpmProxy::listen`].
    pub fn heard(&self, bytes: &[u8]) -> bool {
        let faults = self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let crossed = faults.crossed.as_deref().unwrap_or_default();
        !bytes.is_empty() && crossed.windows(bytes.len()).any(|window| window == bytes)
    }

    fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.changed.notify_all();
    }
}

impl Drop for TpmProxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        // Wakes both accepting threads, which then see `closed`.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port.saturating_add(1)));
    }
}

fn accept(listener: TcpListener, shared: Arc<Shared>, handle: impl Fn(TcpStream, &Shared) + Clone + Send + 'static) {
    std::thread::spawn(move || {
        for client in listener.incoming() {
            if shared.closed.load(Ordering::SeqCst) {
                return;
            }
            let Ok(client) = client else { continue };
            let (shared, handle) = (Arc::clone(&shared), handle.clone());
            std::thread::spawn(move || handle(client, &shared));
        }
    });
}

/// Copies both ways until either side closes.
fn pass(mut client: TcpStream, upstream: u16) -> std::io::Result<()> {
    let mut tpm = TcpStream::connect((Ipv4Addr::LOCALHOST, upstream))?;
    let (mut back_from, mut back_to) = (tpm.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || {
        // Either end closing is the normal end of this copy.
        let _ = std::io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    std::io::copy(&mut client, &mut tpm)?;
    tpm.shutdown(Shutdown::Both)
}

/// One command at a time: the TPM has no other way. Each has a connection of its own to the TPM, which talks to one client only: tpm2-tss
/// lets its sockets pass to children, and one that is open in some child, long closed here, must not keep the next from the TPM.
fn serve(mut client: TcpStream, upstream: u16, shared: &Shared) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let connect = || {
        let tpm = TcpStream::connect((Ipv4Addr::LOCALHOST, upstream))?;
        tpm.set_nodelay(true)?;
        std::io::Result::Ok(tpm)
    };
    loop {
        let command = read_message(&mut client)?;
        let code = command.get(6..10).map_or(0, be_u32);
        match decide(shared, code) {
            Decision::Hangup => return Ok(()),
            Decision::HangupAfter => {
                let mut tpm = connect()?;
                tpm.write_all(&command)?;
                return read_message(&mut tpm).map(drop);
            }
            Decision::Answer(response_code) => {
                let mut response = vec![0x80, 0x01, 0, 0, 0, 10];
                response.extend_from_slice(&response_code.to_be_bytes());
                client.write_all(&response)?;
            }
            Decision::Pass(delay) => {
                std::thread::sleep(delay);
                let mut tpm = connect()?;
                tpm.write_all(&command)?;
                let response = read_message(&mut tpm)?;
                // Before the client has it: it may ask at once what was heard.
                hear(shared, &[&command, &response]);
                client.write_all(&response)?;
            }
        }
    }
}

fn hear(shared: &Shared, messages: &[&[u8]]) {
    let mut faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(crossed) = &mut faults.crossed {
        crossed.extend(messages.iter().copied().flatten());
    }
}

enum Decision {
    Pass(Duration),
    Answer(u32),
    Hangup,
    HangupAfter,
}

fn decide(shared: &Shared, code: u32) -> Decision {
    let mut faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
    faults.seen.push(code);
    if faults.only.is_some_and(|only| only != code) {
        return Decision::Pass(Duration::ZERO);
    }
    while faults.hang {
        if shared.closed.load(Ordering::SeqCst) {
            return Decision::Hangup;
        }
        faults = shared.changed.wait(faults).unwrap_or_else(PoisonError::into_inner);
    }
    let (count, response_code) = faults.errors;
    if count > 0 {
        faults.errors = (count.saturating_sub(1), response_code);
        return Decision::Answer(response_code);
    }
    let (count, passed_on) = faults.hangups;
    if count > 0 {
        faults.hangups = (count.saturating_sub(1), passed_on);
        return if passed_on {
            Decision::HangupAfter
        } else {
            Decision::Hangup
        };
    }
    Decision::Pass(faults.delay)
}

/// A command or a response: both start with a tag of two bytes and the whole length in four.
pub(crate) fn read_message(stream: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; 6];
    stream.read_exact(&mut message)?;
    let length = message.get(2..6).map_or(0, be_u32) as usize;
    if !(10..=MAX_MESSAGE).contains(&length) {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    message.resize(length, 0);
    if let Some(rest) = message.get_mut(6..) {
        stream.read_exact(rest)?;
    }
    Ok(message)
}

pub(crate) fn be_u32(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .take(4)
        .fold(0, |value, &byte| (value << 8) | u32::from(byte))
}
