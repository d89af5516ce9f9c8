//! A TPM 2.0 for one test: swtpm with its own state, on its own loopback ports, gone when dropped.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::HarnessError;
use crate::child::{self, Child};

/// How long swtpm may take to listen; it needs milliseconds, a loaded machine more.
const START_TIMEOUT: Duration = Duration::from_secs(20);

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

    fn with_options(ek_certificate: bool) -> Result<Self, HarnessError> {
        let dir = tempfile::Builder::new()
            .prefix("assay-swtpm-")
            .tempdir()
            .map_err(HarnessError::io("make a folder for a TPM's state"))?;
        set_up(dir.path(), ek_certificate)?;
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
            if listens(child.id(), [port, port.saturating_add(1)]) {
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
        ca_certificates(self.dir.path())
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

/// The authority that [`set_up`] leaves in a state folder.
pub(crate) fn ca_certificates(state: &Path) -> Vec<PathBuf> {
    ["swtpm-localca-rootca-cert.pem", "issuercert.pem"]
        .into_iter()
        .map(|name| state.join("ca").join(name))
        .filter(|path| path.exists())
        .collect()
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
            .arg(write_ca_config(dir)?);
    }
    child::run(&mut command)
}

/// A certificate authority in the TPM's own folder: nothing under /etc or /var is read, no root is needed.
fn write_ca_config(dir: &Path) -> Result<PathBuf, HarnessError> {
    let ca = dir.join("ca");
    let write = |path: &Path, text: String| {
        std::fs::write(path, text).map_err(HarnessError::io(format!("write {}", path.display())))
    };
    std::fs::create_dir_all(&ca).map_err(HarnessError::io(format!("make {}", ca.display())))?;
    let (localca, options, setup) = (
        dir.join("localca.conf"),
        dir.join("localca.options"),
        dir.join("setup.conf"),
    );
    let c = ca.display();
    write(
        &localca,
        format!(
            "statedir = {c}\nsigningkey = {c}/signkey.pem\nissuercert = {c}/issuercert.pem\ncertserial = {c}/certserial\n"
        ),
    )?;
    write(
        &options,
        "--platform-manufacturer Assay\n--platform-version 1.0\n--platform-model test\n".to_owned(),
    )?;
    write(
        &setup,
        format!(
            "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\nactive_pcr_banks = sha1,sha256\n",
            localca.display(),
            options.display()
        ),
    )?;
    Ok(setup)
}

/// Whether this very process listens on all of these ports. That somebody answers there proves nothing: another test may have
/// taken one of them since it was free, and this process is about to find out and end.
fn listens(process: u32, ports: [u16; 2]) -> bool {
    let sockets = || -> procfs::ProcResult<Vec<u64>> {
        let process = procfs::process::Process::new(process.try_into().unwrap_or(i32::MAX))?;
        let mut own = Vec::new();
        for file in process.fd()? {
            if let procfs::process::FDTarget::Socket(inode) = file?.target {
                own.push(inode);
            }
        }
        Ok(own)
    };
    // While it starts, and when it ends, there is nothing to see.
    let (Ok(own), Ok(all)) = (sockets(), procfs::net::tcp()) else {
        return false;
    };
    ports.into_iter().all(|port| {
        all.iter().any(|entry| {
            entry.state == procfs::net::TcpState::Listen
                && entry.local_address.port() == port
                && own.contains(&entry.inode)
        })
    })
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
