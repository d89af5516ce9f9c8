//! The harness's side of the talk with a test machine: run, copy, start, stop.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::HarnessError;
use crate::wire::{self, Request, Response};

/// A program in a machine may take this long unless the caller says otherwise: emulation is slow, CI is loaded.
pub const RUN_TIMEOUT: Duration = Duration::from_secs(120);

/// How a program in the guest ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// It was killed because it took too long.
    pub timed_out: bool,
    /// What it printed, invalid UTF-8 replaced.
    pub stdout: String,
    /// What it complained.
    pub stderr: String,
}

impl Ended {
    /// Did it end by itself with exit status 0?
    pub fn ok(&self) -> bool {
        self.code == Some(0) && !self.timed_out
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.timed_out, self.code, self.signal) {
            (true, ..) => f.write_str("killed for taking too long")?,
            (_, Some(code), _) => write!(f, "exit status {code}")?,
            (_, _, signal) => write!(f, "killed by signal {}", signal.unwrap_or(0))?,
        }
        for stream in [&self.stdout, &self.stderr] {
            if !stream.trim().is_empty() {
                f.write_char('\n')?;
                f.write_str(stream.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A running test machine, seen through the helper inside it.
#[derive(Debug, Clone)]
pub struct Guest {
    port: u16,
}

impl Guest {
    /// A machine whose helper answers on this loopback port.
    pub fn at(port: u16) -> Self {
        Self { port }
    }

    /// The loopback port on which the helper answers.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Runs a program to its end, within [`RUN_TIMEOUT`].
    ///
    /// # Errors
    /// When the guest does not answer or cannot start it. An exit status other than 0 is not an error.
    pub fn run(&self, argv: &[&str]) -> Result<Ended, HarnessError> {
        self.run_with(argv, b"", RUN_TIMEOUT)
    }

    /// Runs a program with something on its standard input, to its end or for at most `timeout`.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn run_with(&self, argv: &[&str], stdin: &[u8], timeout: Duration) -> Result<Ended, HarnessError> {
        let timeout_ms = millis(timeout);
        let request = Request::Run {
            argv: strings(argv),
            env: Vec::new(),
            timeout_ms,
        };
        let answer = self.ask(&request, stdin, timeout + Duration::from_secs(30))?;
        self.ended(&format!("run {}", argv.join(" ")), answer)
    }

    /// Runs a program that must succeed, and gives what it printed.
    ///
    /// # Errors
    /// As [`Guest::run`], and [`HarnessError::Guest`] when its exit status is not 0.
    pub fn run_ok(&self, argv: &[&str]) -> Result<String, HarnessError> {
        let ended = self.run(argv)?;
        if ended.ok() {
            return Ok(ended.stdout);
        }
        Err(HarnessError::Guest {
            request: format!("run {}", argv.join(" ")),
            message: ended.to_string(),
        })
    }

    /// Runs a script with bash; it must succeed.
    ///
    /// # Errors
    /// As [`Guest::run_ok`].
    pub fn script(&self, script: &str) -> Result<String, HarnessError> {
        self.run_ok(&["bash", "-euc", script])
    }

    /// Starts a program that keeps running; both its output streams go to the file `log` in the guest.
    ///
    /// # Errors
    /// When the guest does not answer or cannot start it.
    pub fn spawn(&self, argv: &[&str], log: &str) -> Result<i32, HarnessError> {
        let request = Request::Spawn {
            argv: strings(argv),
            env: Vec::new(),
            log: log.to_owned(),
        };
        match self.ask(&request, b"", RUN_TIMEOUT)? {
            (Response::Started { pid }, _) => Ok(pid),
            (other, _) => Err(unexpected(&format!("start {}", argv.join(" ")), other)),
        }
    }

    /// Waits for a program that [`Guest::spawn`] started; `timed_out` tells that it still runs.
    ///
    /// # Errors
    /// When the guest does not answer or never started such a process.
    pub fn wait(&self, pid: i32, timeout: Duration) -> Result<Ended, HarnessError> {
        let request = Request::Wait {
            pid,
            timeout_ms: millis(timeout),
        };
        let answer = self.ask(&request, b"", timeout + Duration::from_secs(30))?;
        self.ended(&format!("wait for process {pid}"), answer)
    }

    /// Sends a signal by number (9: kill, 15: terminate).
    ///
    /// # Errors
    /// When the guest does not answer or has no such process.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), HarnessError> {
        self.done(&Request::Signal { pid, signal }, b"").map(drop)
    }

    /// Has PID 1 send the signal: to the kernel this is what a service manager does, and no other process can.
    ///
    /// # Errors
    /// When the guest does not answer, has no such process, or PID 1 is not allowed to.
    pub fn signal_from_init(&self, pid: i32, signal: i32) -> Result<(), HarnessError> {
        self.done(&Request::SignalFromInit { pid, signal }, b"").map(drop)
    }

    /// Writes a file with the given permission bits.
    ///
    /// # Errors
    /// When the guest does not answer or cannot write it.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<(), HarnessError> {
        self.done(
            &Request::Put {
                path: path.to_owned(),
                mode,
            },
            content,
        )
        .map(drop)
    }

    /// Copies a file of this machine into the guest, with the given permission bits.
    ///
    /// # Errors
    /// As [`Guest::put`], or when the file cannot be read.
    pub fn put_file(&self, path: &str, mode: u32, from: &Path) -> Result<(), HarnessError> {
        let content = std::fs::read(from).map_err(HarnessError::io(format!("read {}", from.display())))?;
        self.put(path, mode, &content)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When the guest does not answer or cannot read it.
    pub fn get(&self, path: &str) -> Result<Vec<u8>, HarnessError> {
        self.done(&Request::Get { path: path.to_owned() }, b"")
    }

    /// Reads a text file, invalid UTF-8 replaced.
    ///
    /// # Errors
    /// As [`Guest::get`].
    pub fn get_text(&self, path: &str) -> Result<String, HarnessError> {
        self.get(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// PCR `index` of the SHA-256 bank in lower-case hex, as the kernel shows it in sysfs: runs no program in the guest
    /// and leaves the TPM's device alone. Kernels before 5.12 do not show it.
    ///
    /// # Errors
    /// When the guest does not answer, or has no TPM, no such PCR, or too old a kernel.
    pub fn sysfs_pcr(&self, index: u32) -> Result<String, HarnessError> {
        let text = self.get_text(&format!("/sys/class/tpm/tpm0/pcr-sha256/{index}"))?;
        Ok(text.trim().to_lowercase())
    }

    /// Gives the guest this machine's time.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn set_clock(&self) -> Result<(), HarnessError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.done(&Request::SetClock { unix_ms: millis(now) }, b"").map(drop)
    }

    /// Powers the machine off; the answer is the last thing it says.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn power_off(&self) -> Result<(), HarnessError> {
        self.done(&Request::PowerOff, b"").map(drop)
    }

    /// Is the helper up? Gives the boot id and the kernel's release.
    ///
    /// # Errors
    /// When the guest does not answer within a second.
    pub fn ping(&self) -> Result<(String, String), HarnessError> {
        match self.ask(&Request::Ping, b"", Duration::from_secs(1))? {
            (Response::Pong { boot_id, kernel }, _) => Ok((boot_id, kernel)),
            (other, _) => Err(unexpected("answer a ping", other)),
        }
    }

    /// Asks `probe` until it says `Some`, or for at most `timeout`.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`] naming `what`; errors of `probe` end the waiting at once.
    pub fn wait_for<T>(
        what: &str,
        timeout: Duration,
        mut probe: impl FnMut() -> Result<Option<T>, HarnessError>,
    ) -> Result<T, HarnessError> {
        let start = Instant::now();
        loop {
            if let Some(value) = probe()? {
                return Ok(value);
            }
            if start.elapsed() > timeout {
                let detail = String::new();
                return Err(HarnessError::Timeout {
                    what: what.to_owned(),
                    seconds: timeout.as_secs(),
                    detail,
                });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn done(&self, request: &Request, body: &[u8]) -> Result<Vec<u8>, HarnessError> {
        match self.ask(request, body, RUN_TIMEOUT)? {
            (Response::Done, body) => Ok(body),
            (other, _) => Err(unexpected(&short(request), other)),
        }
    }

    fn ended(&self, what: &str, answer: (Response, Vec<u8>)) -> Result<Ended, HarnessError> {
        let (
            Response::Ended {
                code,
                signal,
                timed_out,
                stdout,
            },
            body,
        ) = answer
        else {
            return Err(unexpected(what, answer.0));
        };
        let cut = usize::try_from(stdout).unwrap_or(usize::MAX).min(body.len());
        let (stdout, stderr) = body.split_at(cut);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended {
            code,
            signal,
            timed_out,
            stdout: text(stdout),
            stderr: text(stderr),
        })
    }

    fn ask(&self, request: &Request, body: &[u8], timeout: Duration) -> Result<(Response, Vec<u8>), HarnessError> {
        let action = || format!("ask the guest on 127.0.0.1:{} to {}", self.port, short(request));
        let attempt = || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(timeout))?;
            wire::send(&mut stream, request, body)?;
            wire::receive(&mut stream)
        };
        attempt().map_err(HarnessError::io(action()))
    }
}

fn short(request: &Request) -> String {
    match request {
        Request::Ping => "answer a ping".to_owned(),
        Request::Run { argv, .. } => format!("run {}", argv.join(" ")),
        Request::Spawn { argv, .. } => format!("start {}", argv.join(" ")),
        Request::Wait { pid, .. } => format!("wait for process {pid}"),
        Request::Signal { pid, signal } => format!("send signal {signal} to process {pid}"),
        Request::SignalFromInit { pid, signal } => format!("have PID 1 send signal {signal} to process {pid}"),
        Request::Put { path, .. } => format!("write {path}"),
        Request::Get { path } => format!("read {path}"),
        Request::SetClock { .. } => "set its clock".to_owned(),
        Request::PowerOff => "power off".to_owned(),
    }
}

fn unexpected(what: &str, answer: Response) -> HarnessError {
    let message = match answer {
        Response::Failed { message } => message,
        other => format!("unexpected answer {other:?}"),
    };
    HarnessError::Guest {
        request: what.to_owned(),
        message,
    }
}

fn strings(argv: &[&str]) -> Vec<String> {
    argv.iter().map(|&argument| argument.to_owned()).collect()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
