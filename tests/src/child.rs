//! Child processes that never outlive their owner.
//!
//! A [`Child`] is killed on drop. For a test process that is itself killed, the kernel does it: each child runs under
//! `setpriv --pdeathsig KILL`. That signal is tied to the *thread* that started the child, and every test has its own
//! short-lived thread, so one thread that lives as long as the process starts them all.

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::HarnessError;

type Job = (Command, Sender<std::io::Result<std::process::Child>>);

/// A process that is killed and waited for when this value is dropped.
#[derive(Debug)]
pub struct Child {
    inner: std::process::Child,
    program: String,
}

impl Child {
    /// Starts `program` with `configure`d arguments and streams. Its standard input is empty unless configured.
    ///
    /// # Errors
    /// [`HarnessError::Start`] when it, or `setpriv`, is not there.
    pub fn spawn(program: &str, configure: impl FnOnce(&mut Command)) -> Result<Self, HarnessError> {
        let fail = |source| HarnessError::Start {
            program: program.to_owned(),
            source,
        };
        find_program(program).map_err(fail)?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", program])
            .stdin(Stdio::null());
        configure(&mut command);
        let (answer, result) = channel();
        let gone = || std::io::Error::other("the starting thread is gone");
        spawner().send((command, answer)).map_err(|_| fail(gone()))?;
        let inner = result.recv().map_err(|_| fail(gone()))?.map_err(fail)?;
        Ok(Self {
            inner,
            program: program.to_owned(),
        })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.inner.id()
    }

    /// Whether this very process listens on all of these TCP ports of 127.0.0.1, or of all addresses. That somebody answers there proves
    /// nothing: another test may have taken one of them since it was free, and this process is about to find out and end.
    pub fn listens_on(&self, ports: &[u16]) -> bool {
        // While it starts, and when it ends, there is nothing to see.
        let (Ok(own), Ok(all)) = (sockets(self.id()), procfs::net::tcp()) else {
            return false;
        };
        ports.iter().all(|port| {
            all.iter().any(|entry| {
                entry.state == procfs::net::TcpState::Listen
                    && entry.local_address.port() == *port
                    && own.contains(&entry.inode)
            })
        })
    }

    /// The exit status when it has ended by itself, else `None`.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.inner.try_wait().ok().flatten()
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        // It may have ended by itself; then there is nothing to kill, and waiting returns at once.
        let _ = self.inner.kill();
        let _ = self.inner.wait();
    }

    /// Takes the pipe to its standard output, when it was configured to have one.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.inner.stdout.take()
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// [`HarnessError::Io`] when waiting fails.
    pub fn wait(&mut self) -> Result<std::process::ExitStatus, HarnessError> {
        self.inner
            .wait()
            .map_err(HarnessError::io(format!("wait for {}", self.program)))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Inodes of the sockets that a process has open.
fn sockets(process: u32) -> procfs::ProcResult<Vec<u64>> {
    let process = procfs::process::Process::new(process.try_into().unwrap_or(i32::MAX))?;
    let mut own = Vec::new();
    for file in process.fd()? {
        if let procfs::process::FDTarget::Socket(inode) = file?.target {
            own.push(inode);
        }
    }
    Ok(own)
}

/// `setpriv` reports a missing program only by its exit status; look before.
fn find_program(program: &str) -> std::io::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = program.contains('/') && std::path::Path::new(program).exists()
        || std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    if found {
        Ok(())
    } else {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

fn spawner() -> &'static Sender<Job> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (jobs, queue): (Sender<Job>, Receiver<Job>) = channel();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                // A receiver that is gone took its owner's interest with it.
                let _ = answer.send(command.spawn());
            }
        });
        jobs
    })
}

/// Runs a program to its end.
///
/// # Errors
/// When it cannot be started, or fails: then with its words.
pub fn run(command: &mut Command) -> Result<(), HarnessError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = match command.output() {
        Ok(output) => output,
        Err(source) => return Err(HarnessError::Start { program, source }),
    };
    if output.status.success() {
        return Ok(());
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(HarnessError::Failed {
        program,
        status: output.status,
        output: text,
    })
}
