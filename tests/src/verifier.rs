//! The verifier, as programs see it: its binary, in a folder of its own, serving on a port of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::HarnessError;
use crate::child::Child;
use crate::swtpm::{free_port_pair, last_words};

/// The address under which a guest reaches this machine's loopback.
pub const FROM_GUEST: &str = "10.0.2.2";
/// The environment's name for the folder with the programs that a benchmark looks at, where they are not beside it.
pub const PROGRAMS_VARIABLE: &str = "ASSAY_PROGRAMS";
/// How long `serve` may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// One of these programs; `None` where nothing says where they are.
#[must_use]
pub fn benched(program: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(PROGRAMS_VARIABLE)?;
    Some(Path::new(&folder).join(program))
}

/// A verifier: initialised, serving, and gone on drop.
#[derive(Debug)]
pub struct Verifier {
    serve: Child,
    binary: PathBuf,
    port: u16,
    dir: tempfile::TempDir,
}

/// A host as the verifier sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState {
    /// trusted, untrusted, unreachable or unknown.
    pub state: String,
    /// Why, one failure each; empty when trusted.
    pub reasons: Vec<String>,
}

impl Verifier {
    /// Makes a verifier for guests of this machine with `assay-verifier init`, and serves. It asks hosts every second.
    ///
    /// # Errors
    /// When the program is missing, fails, or does not listen.
    pub fn start(binary: &Path) -> Result<Self, HarnessError> {
        let dir = tempfile::Builder::new()
            .prefix("assay-verifier-")
            .tempdir()
            .map_err(HarnessError::io("make a folder for a verifier"))?;
        let port = free_port_pair()?;
        let state = dir.path().join("state");
        let url = format!("https://{FROM_GUEST}:{port}");
        let listen = format!("127.0.0.1:{port}");
        let output = call(binary, &state, &["init", "--url", &url, "--listen", &listen])?;
        if !output.status.success() {
            return Err(failed(&output));
        }
        let config = state.join("config.toml");
        let text = std::fs::read_to_string(&config).map_err(HarnessError::io(format!("read {}", config.display())))?;
        let text = text.replace("poll_interval_s = 10\n", "poll_interval_s = 1\n");
        std::fs::write(&config, text).map_err(HarnessError::io(format!("write {}", config.display())))?;
        let serve = serve(binary, &state, &dir.path().join("serve.log"))?;
        let mut verifier = Self {
            serve,
            binary: binary.to_owned(),
            port,
            dir,
        };
        verifier.wait_until_listening()?;
        Ok(verifier)
    }

    /// Stops serving, as an outage does.
    pub fn stop(&mut self) {
        self.serve.kill();
    }

    /// Serves again after [`Verifier::stop`].
    ///
    /// # Errors
    /// As [`Verifier::start`].
    pub fn resume(&mut self) -> Result<(), HarnessError> {
        self.serve = serve(&self.binary, &self.state_dir(), &self.log_file())?;
        self.wait_until_listening()
    }

    /// Serves anew, and asks hosts at this interval after a first time.
    ///
    /// # Errors
    /// As [`Verifier::start`].
    pub fn poll_every(&mut self, seconds: u32) -> Result<(), HarnessError> {
        self.stop();
        let config = self.state_dir().join("config.toml");
        let failed = || HarnessError::io(format!("edit {}", config.display()));
        let text = std::fs::read_to_string(&config).map_err(failed())?;
        let line = |line: &str| match line.starts_with("poll_interval_s = ") {
            true => format!("poll_interval_s = {seconds}\n"),
            false => format!("{line}\n"),
        };
        let text: String = text.lines().map(line).collect();
        std::fs::write(&config, text).map_err(failed())?;
        self.resume()
    }

    /// Runs one of the operator's commands; its exit status is the caller's to judge.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Result<Output, HarnessError> {
        call(&self.binary, &self.state_dir(), arguments)
    }

    /// Runs one of the operator's commands, which must succeed, and gives what it printed.
    ///
    /// # Errors
    /// [`HarnessError::Failed`] with its words when it does not.
    pub fn run_ok(&self, arguments: &[&str]) -> Result<String, HarnessError> {
        let output = self.run(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(failed(&output))
    }

    /// How a host stands now.
    ///
    /// # Errors
    /// When there is no such host, or the answer is not the documented JSON.
    pub fn host(&self, name: &str) -> Result<HostState, HarnessError> {
        let text = self.run_ok(&["host", "show", name, "--json"])?;
        let value: Value = serde_json::from_str(&text).map_err(|error| HarnessError::Io {
            action: "read `host show --json`".to_owned(),
            source: error.into(),
        })?;
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let reasons = value.get("reasons").and_then(Value::as_array);
        Ok(HostState {
            state: value.get("state").map(word).unwrap_or_default(),
            reasons: reasons.map(|list| list.iter().map(word).collect()).unwrap_or_default(),
        })
    }

    /// Waits until a host stands as `is` wants it.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`] with the state it had last.
    pub fn wait_host(
        &self,
        name: &str,
        what: &str,
        timeout: Duration,
        is: impl Fn(&HostState) -> bool,
    ) -> Result<HostState, HarnessError> {
        let start = Instant::now();
        loop {
            let host = self.host(name)?;
            if is(&host) {
                return Ok(host);
            }
            if start.elapsed() > timeout {
                let detail = format!("; it is {}: {}", host.state, host.reasons.join("; "));
                let what = format!("host {name} did not become {what}");
                return Err(HarnessError::Timeout {
                    what,
                    seconds: timeout.as_secs(),
                    detail,
                });
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Processor time that `serve` has taken so far, in the system's clock ticks.
    ///
    /// # Errors
    /// When it is not there.
    pub fn processor_time(&self) -> Result<Duration, HarnessError> {
        let process = i32::try_from(self.serve.id()).unwrap_or(i32::MAX);
        let stat = procfs::process::Process::new(process).and_then(|process| process.stat());
        let stat =
            stat.map_err(|error| HarnessError::io("ask how long the verifier computed")(std::io::Error::other(error)))?;
        let ticks = u32::try_from(stat.utime.saturating_add(stat.stime)).unwrap_or(u32::MAX);
        let second = u32::try_from(procfs::ticks_per_second()).unwrap_or(u32::MAX);
        Ok(Duration::from_secs(1).saturating_mul(ticks) / second.max(1))
    }

    /// What a host needs to join.
    pub fn join_file(&self) -> PathBuf {
        self.state_dir().join("join.json")
    }

    /// Its state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A folder for the caller's own files, gone with the verifier.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// The end of what `serve` wrote to its journal.
    pub fn last_words(&self) -> String {
        last_words(&self.log_file())
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("serve.log")
    }

    fn wait_until_listening(&mut self) -> Result<(), HarnessError> {
        let start = Instant::now();
        while !self.serve.listens_on(&[self.port]) {
            if self.serve.ended().is_some() || start.elapsed() > START_TIMEOUT {
                return Err(HarnessError::Timeout {
                    what: "the verifier did not listen".to_owned(),
                    seconds: start.elapsed().as_secs(),
                    detail: self.last_words(),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn serve(binary: &Path, state: &Path, log: &Path) -> Result<Child, HarnessError> {
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(log)
        .map_err(HarnessError::io(format!("write {}", log.display())))?;
    Child::spawn(&binary.to_string_lossy(), |command| {
        command
            .arg("--state")
            .arg(state)
            .arg("serve")
            .stdout(Stdio::null())
            .stderr(file);
    })
}

fn call(binary: &Path, state: &Path, arguments: &[&str]) -> Result<Output, HarnessError> {
    Command::new(binary)
        .arg("--state")
        .arg(state)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HarnessError::Start {
            program: binary.display().to_string(),
            source,
        })
}

fn failed(output: &Output) -> HarnessError {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    HarnessError::Failed {
        program: "assay-verifier".to_owned(),
        status: output.status,
        output: text,
    }
}
