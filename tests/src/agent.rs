//! The agent in a test machine: join, start, enrol, ask for keys - through its own commands, as an operator would.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::HarnessError;
use crate::child;
use crate::guest::{Ended, Guest};
use crate::verifier::Verifier;
use crate::vm::Vm;

/// Where the agent's journal goes in a guest.
pub const LOG: &str = "/var/log/assay-agent.log";
/// From its start to its first answer: the kernel checks its programs and it inventories whatever runs, under emulation and
/// beside other machines.
const START_TIMEOUT: Duration = Duration::from_secs(600);

/// A running `assay-agent run` in a machine.
#[derive(Debug, Clone)]
pub struct Agent {
    guest: Guest,
    pid: i32,
}

impl Agent {
    /// Starts it and waits for its socket.
    ///
    /// # Errors
    /// With the agent's last words when it does not come up.
    pub fn start(guest: &Guest) -> Result<Self, HarnessError> {
        let pid = guest.spawn(&["assay-agent", "run"], LOG)?;
        let agent = Self {
            guest: guest.clone(),
            pid,
        };
        let start = Instant::now();
        loop {
            if agent.status().is_ok() {
                return Ok(agent);
            }
            let ended = guest.wait(pid, Duration::ZERO)?;
            if !ended.timed_out || start.elapsed() > START_TIMEOUT {
                return Err(HarnessError::Guest {
                    request: "start assay-agent".to_owned(),
                    message: format!("{ended}\n{}", agent.journal()),
                });
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The same agent, after its machine was saved and restored.
    #[must_use]
    pub fn at(self, guest: &Guest) -> Self {
        Self {
            guest: guest.clone(),
            pid: self.pid,
        }
    }

    /// Its process id in the guest.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// `assay-agent status --json`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Value, HarnessError> {
        let text = self.guest.run_ok(&["assay-agent", "status", "--json"])?;
        serde_json::from_str(&text).map_err(|error| HarnessError::Io {
            action: "read `assay-agent status`".to_owned(),
            source: error.into(),
        })
    }

    /// How long its TPM has worked for it, the driver and its own library included.
    ///
    /// # Errors
    /// When it does not answer, or does not say.
    pub fn tpm_worked(&self) -> Result<Duration, HarnessError> {
        let worked = self.status()?.get("tpm_worked_us").and_then(Value::as_u64);
        worked.map(Duration::from_micros).ok_or_else(|| HarnessError::Guest {
            request: "tell how long the TPM worked".to_owned(),
            message: "`assay-agent status` has no tpm_worked_us".to_owned(),
        })
    }

    /// The runtime log as `assay-agent log` prints it, one line an event.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn log(&self) -> Result<String, HarnessError> {
        self.guest.run_ok(&["assay-agent", "log"])
    }

    /// Everything it has written to its journal.
    pub fn journal(&self) -> String {
        self.guest.get_text(LOG).unwrap_or_default()
    }

    /// Kills it as hard as can be (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn kill(self) -> Result<(), HarnessError> {
        self.guest.signal(self.pid, 9)?;
        self.guest.wait(self.pid, Duration::from_secs(60)).map(drop)
    }

    /// Enrols the machine at a verifier under `name`, by the hash of its endorsement key; gives what the command printed.
    ///
    /// # Errors
    /// When the agent does not answer or the verifier refuses.
    pub fn enrol(&self, vm: &Vm, verifier: &Verifier, name: &str) -> Result<String, HarnessError> {
        self.enrol_at(&vm.agent_address(), verifier, name)
    }

    /// The same, at an address that leads to the machine.
    ///
    /// # Errors
    /// As [`Agent::enrol`].
    pub fn enrol_at(&self, address: &str, verifier: &Verifier, name: &str) -> Result<String, HarnessError> {
        let status = self.status()?;
        let ek = status.get("ek_sha256").and_then(Value::as_str).unwrap_or_default();
        verifier.run_ok(&["host", "add", name, address, "--ek-sha256", ek])
    }
}

/// Joins a verifier, before the agent is started.
///
/// # Errors
/// When the guest does not answer or `assay-agent join` fails.
pub fn join(guest: &Guest, verifier: &Verifier) -> Result<String, HarnessError> {
    guest.put_file("/root/join.json", 0o600, &verifier.join_file())?;
    guest.run_ok(&["assay-agent", "join", "/root/join.json"])
}

/// `assay-agent unlock`: the exit status is the caller's to judge.
///
/// # Errors
/// When the guest does not answer.
pub fn unlock(guest: &Guest, image: &str, timeout_s: u32) -> Result<Ended, HarnessError> {
    let timeout = timeout_s.to_string();
    let limit = Duration::from_secs(u64::from(timeout_s) + 120);
    guest.run_with(&["assay-agent", "unlock", image, "--timeout", &timeout], b"", limit)
}

/// What disks in qcow2 need of the kernel (hooks.md), and the programs that open them, as a shell script.
pub const QCOW2: &str = "modprobe nbd nbds_max=64 max_part=0; qemu-nbd --version; dmsetup version";

/// Runs the programs that a host with disks runs, so that a capture approves them: opens a throw-away encrypted disk,
/// mounts it, reads from it, closes it.
///
/// # Errors
/// When one of them fails.
pub fn rehearse(guest: &Guest) -> Result<(), HarnessError> {
    // A cheap key derivation: emulation is slow, and this disk holds nothing.
    guest.script(
        "cd /root; umask 077; truncate -s 24M rehearsal.img; printf rehearsal > rehearsal.key
         cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 rehearsal.img rehearsal.key
         cryptsetup open --key-file rehearsal.key rehearsal.img rehearsal
         mke2fs -q -t ext4 /dev/mapper/rehearsal; mkdir -p /mnt/disk",
    )?;
    guest.run_ok(&["mount", "-o", "ro", "/dev/mapper/rehearsal", "/mnt/disk"])?;
    guest.run_ok(&["cat", "/etc/hostname"])?;
    guest.run_ok(&["umount", "/mnt/disk"])?;
    guest.script("cryptsetup close rehearsal; rm /root/rehearsal.*")?;
    // Fails, as it must; what matters is that insmod and its libraries have run.
    guest.run(&["insmod", "/nonexistent.ko"])?;
    Ok(())
}

/// A raw disk image: ext4 with one file, made without root and without mounting anything.
///
/// # Errors
/// When mke2fs is missing or fails, or a file cannot be written.
pub fn plain_image(image: &Path, name: &str, content: &[u8]) -> Result<(), HarnessError> {
    let dir = tempfile::tempdir().map_err(HarnessError::io("make a folder for a disk's files"))?;
    let file = dir.path().join(name);
    std::fs::write(&file, content).map_err(HarnessError::io(format!("write {}", file.display())))?;
    let size = 16 << 20;
    std::fs::File::create(image)
        .and_then(|file| file.set_len(size))
        .map_err(HarnessError::io(format!("write {}", image.display())))?;
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([dir.path(), image])
        .env("PATH", path);
    child::run(&mut command)
}
