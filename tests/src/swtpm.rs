//! A TPM 2.0 for one test: swtpm with its own state, on its own loopback ports, gone when dropped.

pub(crate) mod authority;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::HarnessError;
use crate::child::{self, Child};

/// How long swtpm may take to listen; it needs milliseconds, a loaded machine more.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Where swtpm keeps what outlasts a power cycle, below its state folder.
const STATE: &str = "tpm2-00.permall";

/// A running swtpm, made fresh: own seeds, PCRs at zero, SHA-1 and SHA-256 banks active.
#[derive(Debug)]
pub struct Swtpm {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Swtpm {
    /// Starts a TPM without an EK certificate.
    ///
    /// # Errors
    /// When swtpm is missing, or does not start.
    pub fn start() -> Result<Self, HarnessError> {
        Self::with_options(false)
    }

    /// Starts a TPM with an EK certificate (RSA-2048, NV index 0x01c00002) from a certificate authority of its own;
    /// [`Swtpm::ca_certificates`] gives that authority.
    ///
    /// # Errors
    /// When swtpm or swtpm_setup is missing, or does not start.
    pub fn start_with_ek_certificate() -> Result<Self, HarnessError> {
        Self::with_options(true)
    }

    /// Starts a TPM whose one EK certificate is that of its P-256 key (NV index 0x01c0000a), from a certificate authority of its own.
    ///
    /// # Errors
    /// When swtpm, swtpm_localca or tpm2-tools are missing, or fail.
    pub fn start_with_ecc_ek_certificate() -> Result<Self, HarnessError> {
        let tpm = Self::start()?;
        let certificate = authority::certify_p256(&tpm)?;
        tpm.store(0x01c0_000a, &certificate)?;
        Ok(tpm)
    }

    /// Stores something in the TPM's NV memory as its maker does, for anybody to read.
    ///
    /// # Errors
    /// When tpm2-tools are missing, or the TPM has no room.
    pub fn store(&self, index: u32, contents: &[u8]) -> Result<(), HarnessError> {
        let file = self.dir.path().join("nv.bin");
        std::fs::write(&file, contents).map_err(HarnessError::io(format!("write {}", file.display())))?;
        let (index, size) = (format!("{index:#x}"), contents.len().to_string());
        let attributes = "ppwrite|ppread|ownerread|authread|no_da|platformcreate";
        self.tool(&["nvdefine", "-C", "p", "-s", &size, "-a", attributes, &index])?;
        self.tool(&["nvwrite", "-C", "p", "-i", &file.to_string_lossy(), &index])
    }

    /// Runs one of the tpm2-tools on it, in its folder.
    fn tool(&self, arguments: &[&str]) -> Result<(), HarnessError> {
        let mut command = Command::new("tpm2");
        command
            .args(arguments)
            .env("TPM2TOOLS_TCTI", self.tcti())
            .current_dir(self.dir.path());
        child::run(&mut command)
    }

    /// Another TPM with this one's seeds, NV memory and counters, as from a copy of its state; it has been switched on since.
    ///
    /// # Errors
    /// When the state cannot be copied, or the TPM does not start.
    pub fn copy(&self) -> Result<Self, HarnessError> {
        let dir = state_dir()?;
        let (from, to) = (self.dir.path().join(STATE), dir.path().join(STATE));
        std::fs::copy(&from, &to).map_err(HarnessError::io(format!("copy {}", from.display())))?;
        Self::on_free_ports(dir)
    }

    fn with_options(ek_certificate: bool) -> Result<Self, HarnessError> {
        let dir = state_dir()?;
        set_up(dir.path(), ek_certificate)?;
        Self::on_free_ports(dir)
    }

    fn on_free_ports(dir: tempfile::TempDir) -> Result<Self, HarnessError> {
        for _ in 0..20 {
            let port = free_port_pair()?;
            if let Some(child) = Self::listen(dir.path(), port)? {
                return Ok(Self { child, port, dir });
            }
        }
        Err(HarnessError::NoPorts)
    }

    /// `None`: another process took one of the ports between the look and the start.
    fn listen(dir: &Path, port: u16) -> Result<Option<Child>, HarnessError> {
        let log = dir.join("swtpm.log");
        let mut child = Child::spawn("swtpm", |command| {
            command
                .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
                .arg("--tpmstate")
                .arg(format!("dir={}", dir.display()))
                .arg("--server")
                .arg(format!("type=tcp,bindaddr=127.0.0.1,port={port}"))
                .arg("--ctrl")
                .arg(format!("type=tcp,bindaddr=127.0.0.1,port={}", port.saturating_add(1)))
                .arg("--log")
                .arg(format!("file={},level=1", log.display()))
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        })?;
        let start = Instant::now();
        while start.elapsed() < START_TIMEOUT {
            if child.ended().is_some() {
                return Ok(None);
            }
            if child.listens_on(&[port, port.saturating_add(1)]) {
                return Ok(Some(child));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(HarnessError::Timeout {
            what: "swtpm did not listen".to_owned(),
            seconds: START_TIMEOUT.as_secs(),
            detail: last_words(&log),
        })
    }

    /// The port of the command channel; the control channel is the next one.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The TCTI string that reaches it, as `tss-esapi`, `tpm2-tools` and `agent.toml` take it.
    pub fn tcti(&self) -> String {
        tcti(self.port)
    }

    /// The folder with its state, and with whatever a test wants to lay beside it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The PEM files of the authority that signed the EK certificate, root first; empty without a certificate.
    pub fn ca_certificates(&self) -> Vec<PathBuf> {
        authority::certificates(self.dir.path())
    }

    /// Switches the TPM off and on again, as a reboot of its host does: PCRs at zero, a new reset count, the same seeds.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn power_cycle(&mut self) -> Result<(), HarnessError> {
        for _ in 0..50 {
            // The state folder is locked by the old process: replace it only when that one is gone.
            self.child.kill();
            if let Some(child) = Self::listen(self.dir.path(), self.port)? {
                self.child = child;
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(HarnessError::NoPorts)
    }
}

fn state_dir() -> Result<tempfile::TempDir, HarnessError> {
    tempfile::Builder::new()
        .prefix("assay-swtpm-")
        .tempdir()
        .map_err(HarnessError::io("make a folder for a TPM's state"))
}

/// The TCTI string for a swtpm on `port` of this machine.
pub(crate) fn tcti(port: u16) -> String {
    format!("swtpm:host=127.0.0.1,port={port}")
}

/// Makes the TPM: without this step libtpms activates four PCR banks, which no real TPM does.
pub(crate) fn set_up(dir: &Path, ek_certificate: bool) -> Result<(), HarnessError> {
    let mut command = Command::new("swtpm_setup");
    command
        .arg("--tpm2")
        .arg("--tpmstate")
        .arg(dir)
        .args(["--overwrite", "--pcr-banks", "sha1,sha256"]);
    if ek_certificate {
        command
            .arg("--create-ek-cert")
            .arg("--config")
            .arg(authority::configure(dir)?);
    }
    child::run(&mut command)
}

/// A port whose neighbour is free as well: the swtpm TCTI expects the control channel there.
pub(crate) fn free_port_pair() -> Result<u16, HarnessError> {
    for _ in 0..200 {
        let Ok(first) = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)) else {
            continue;
        };
        let Ok(address) = first.local_addr() else {
            continue;
        };
        let Some(next) = address.port().checked_add(1) else {
            continue;
        };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, next)).is_ok() {
            return Ok(address.port());
        }
    }
    Err(HarnessError::NoPorts)
}

/// The end of a log file, to go into an error.
pub(crate) fn last_words(path: &Path) -> String {
    let Ok(bytes) = std::fs::read(path) else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines
        .iter()
        .skip(lines.len().saturating_sub(25))
        .copied()
        .collect::<Vec<_>>();
    if tail.is_empty() {
        String::new()
    } else {
        format!("; {} ends:\n{}", path.display(), tail.join("\n"))
    }
}
