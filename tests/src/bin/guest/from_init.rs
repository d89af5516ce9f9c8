//! Signals that come from PID 1 itself. A service manager may stop a protected process where nobody else may, and on
//! these machines the service manager is this program.
//!
//! PID 1 and the helper share a pair of sockets, the helper's end being its standard input: no path that anything else
//! in the machine could open. An order is two numbers (process, signal), the answer one (`errno`, or 0).

use std::io::{Error, Read, Result, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One order at a time: answers carry no number.
static ORDERS: Mutex<()> = Mutex::new(());

/// PID 1's side: obeys for as long as the helper lives. Gives what the helper needs as its standard input.
pub fn obey() -> Result<Stdio> {
    let (mut here, helper) = UnixStream::pair()?;
    std::thread::spawn(move || {
        let mut order = [[0; 4]; 2];
        while here.read_exact(order.as_flattened_mut()).is_ok() {
            let [pid, signal] = order.map(i32::from_ne_bytes);
            let result = Signal::try_from(signal).and_then(|signal| kill(Pid::from_raw(pid), signal));
            let errno = result.err().map_or(0, |errno| errno as i32);
            if here.write_all(&errno.to_ne_bytes()).is_err() {
                return;
            }
        }
    });
    Ok(Stdio::from(OwnedFd::from(helper)))
}

/// The helper's side: has PID 1 send the signal.
pub fn signal(pid: i32, signal: i32) -> Result<()> {
    let _one = ORDERS.lock();
    let mut init = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    init.write_all([pid, signal].map(i32::to_ne_bytes).as_flattened())?;
    let mut errno = [0; 4];
    init.read_exact(&mut errno)?;
    match i32::from_ne_bytes(errno) {
        0 => Ok(()),
        errno => Err(Error::from(Errno::from_raw(errno))),
    }
}
