//! What the harness and the helper inside a test machine say to one another: one definition for both sides.
//!
//! One request a connection. A frame is the length of a JSON head (4 bytes, big endian), the length of a raw body
//! (8 bytes, big endian), the head, the body.

use std::io::{Error, ErrorKind, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The TCP port on which the helper listens inside the guest.
pub const GUEST_PORT: u16 = 7000;
/// Longest head in bytes.
const MAX_HEAD: usize = 1 << 20;
/// Longest body in bytes: larger files do not fit the guest's memory.
const MAX_BODY: u64 = 512 << 20;

/// What the harness asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Are you there? Answered with [`Response::Pong`].
    Ping,
    /// Run a program to its end; the body is its standard input. Answered with [`Response::Ended`].
    Run {
        /// Program (looked up in PATH) and arguments.
        argv: Vec<String>,
        /// Variables added to the environment.
        env: Vec<(String, String)>,
        /// After this many milliseconds its whole process group is killed.
        timeout_ms: u64,
    },
    /// Start a program and leave it running. Answered with [`Response::Started`].
    Spawn {
        /// Program (looked up in PATH) and arguments.
        argv: Vec<String>,
        /// Variables added to the environment.
        env: Vec<(String, String)>,
        /// File that takes both its output streams.
        log: String,
    },
    /// Wait for a program that `Spawn` started. Answered with [`Response::Ended`], without output.
    Wait {
        /// Its process id.
        pid: i32,
        /// How long to wait, in milliseconds; after that the answer says `timed_out`.
        timeout_ms: u64,
    },
    /// Send a signal.
    Signal {
        /// To this process.
        pid: i32,
        /// The signal's number.
        signal: i32,
    },
    /// Have PID 1 send a signal, as a service manager would.
    SignalFromInit {
        /// To this process.
        pid: i32,
        /// The signal's number.
        signal: i32,
    },
    /// Write the body to a file, replacing it; folders above it are made.
    Put {
        /// Absolute path.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Answered with [`Response::Done`] and the file as the body.
    Get {
        /// Absolute path.
        path: String,
    },
    /// Set the wall clock: a restored machine believes it is still the day of its snapshot.
    SetClock {
        /// Milliseconds since 1970-01-01 UTC.
        unix_ms: u64,
    },
    /// Write what is cached to the disk and power off at once.
    PowerOff,
}

/// What the helper answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Response {
    /// The helper is up.
    Pong {
        /// The kernel's id of this boot.
        boot_id: String,
        /// The kernel's release, as `uname -r`.
        kernel: String,
    },
    /// A program ended, or was killed for lateness. The body is standard output, then standard error.
    Ended {
        /// Exit status; `None` when a signal ended it.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
        /// It was killed because it took too long.
        timed_out: bool,
        /// How many bytes of the body are standard output.
        stdout: u64,
    },
    /// A program runs in the background.
    Started {
        /// Its process id.
        pid: i32,
    },
    /// It was done.
    Done,
    /// It could not be done.
    Failed {
        /// Why.
        message: String,
    },
}

/// Writes one frame.
///
/// # Errors
/// As the stream's, or `InvalidInput` when head or body are too long.
pub fn send<T: Serialize>(stream: &mut impl Write, head: &T, body: &[u8]) -> Result<(), Error> {
    let head = serde_json::to_vec(head)?;
    let head_length = u32::try_from(head.len()).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let body_length = body.len() as u64;
    if head.len() > MAX_HEAD || body_length > MAX_BODY {
        return Err(ErrorKind::InvalidInput.into());
    }
    stream.write_all(&head_length.to_be_bytes())?;
    stream.write_all(&body_length.to_be_bytes())?;
    stream.write_all(&head)?;
    stream.write_all(body)?;
    stream.flush()
}

/// Reads one frame.
///
/// # Errors
/// As the stream's, or `InvalidData` when a length is over its limit or the head is not the JSON expected.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> Result<(T, Vec<u8>), Error> {
    let (mut head_length, mut body_length) = ([0; 4], [0; 8]);
    stream.read_exact(&mut head_length)?;
    stream.read_exact(&mut body_length)?;
    let head_length = usize::try_from(u32::from_be_bytes(head_length)).unwrap_or(usize::MAX);
    let body_length = u64::from_be_bytes(body_length);
    if head_length > MAX_HEAD || body_length > MAX_BODY {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut head = vec![0; head_length];
    stream.read_exact(&mut head)?;
    let mut body = Vec::new();
    stream.take(body_length).read_to_end(&mut body)?;
    if body.len() as u64 != body_length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok((serde_json::from_slice(&head)?, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_went() -> Result<(), Error> {
        let mut bytes = Vec::new();
        send(&mut bytes, &Request::Get { path: "/a".to_owned() }, b"body")?;
        let (head, body) = receive::<Request>(&mut bytes.as_slice())?;
        assert!(matches!(head, Request::Get { path } if path == "/a"));
        assert_eq!(body, b"body");
        Ok(())
    }

    #[test]
    fn a_cut_or_oversized_frame_is_an_error() -> Result<(), Error> {
        let mut bytes = Vec::new();
        send(&mut bytes, &Response::Done, b"body")?;
        let cut = bytes.get(..bytes.len() - 1).unwrap_or_default();
        assert!(receive::<Response>(&mut &*cut).is_err());
        bytes.splice(0..4, [0xff; 4]);
        assert!(receive::<Response>(&mut bytes.as_slice()).is_err());
        Ok(())
    }
}
