//! qemu-nbd, which has the key of an image, and the network block device as which it shows the disk.
//!
//! It outlives the agent: a service manager puts it into a scope of its own, outside the agent's control group. No core file is made
//! of it, and the kernel spares it when memory runs out, since both are so of the agent that starts it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use procfs::ProcError;
use serde_json::{Value, json};

use super::super::{DiskError, Header, wrong_key};
use super::program::{Ended, command, run};

const PROGRAM: &str = "qemu-nbd";
/// Where the kernel lists its block devices.
const BLOCK: &str = "/sys/class/block";
/// What the secret is called within qemu.
const SECRET: &str = "assay";
/// How its socket's name ends; it begins with the device's.
const SOCKET: &str = ".sock";
/// How long it may take until it shows the disk: it reads the image's tables, on storage that may be slow.
const START: Duration = Duration::from_secs(30);
/// How long one that was killed may take to be gone: the kernel first ends what it has under way.
const KILLED: Duration = Duration::from_secs(2);
/// Between two looks at it.
const PAUSE: Duration = Duration::from_millis(5);
/// What qemu says of a secret that opens no key slot.
const NO_SLOT: &str = "Invalid password";
/// Where a service manager that knows scopes says that it runs (`sd_booted(3)`).
const SYSTEMD: &str = "/run/systemd/system";
/// Only version 2 of control groups can keep a group from being swapped out.
const CGROUP_2: &str = "/sys/fs/cgroup/cgroup.controllers";

/// A network block device, by its name, such as `nbd3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device(String);

impl Device {
    /// Has an image's disk shown, on the first device that is free.
    ///
    /// # Errors
    /// [`DiskError::NoDevice`], [`DiskError::NameNotText`], [`DiskError::WrongKey`], [`DiskError::Program`], [`DiskError::Said`]; where it
    /// took too long also those of [`Device::end`].
    pub(super) fn show(header: &Header, key: &[u8], run_dir: &Path) -> Result<Self, DiskError> {
        let (device, start) = (Self::free()?, Instant::now());
        let mut command = in_a_scope(header);
        command.args([
            format!("--object=secret,id={SECRET},file=/proc/self/fd/0"),
            // Where it would be otherwise, others may be. Once the kernel has connected nobody else can.
            format!("--socket={}/{}{SOCKET}", run_dir.display(), device.0),
            device.connect(),
            name(&header.image)?,
        ]);
        let said = match run(&mut command, PROGRAM, key, START)? {
            // It says so before the kernel has begun.
            Ended::Well if device.is_ready_within(START.saturating_sub(start.elapsed())) => return Ok(device),
            Ended::Well | Ended::Late => {
                device.end(KILLED)?;
                format!("no disk was shown within {} s", START.as_secs())
            }
            Ended::Said(words) => words,
        };
        if said.contains(NO_SLOT) {
            return Err(wrong_key(header));
        }
        Err(DiskError::Said {
            program: PROGRAM,
            about: header.image.clone(),
            said,
        })
    }

    /// The first on which nothing is shown, and which nobody holds.
    ///
    /// # Errors
    /// [`DiskError::NoDevice`].
    pub(super) fn free() -> Result<Self, DiskError> {
        free(Path::new(BLOCK))
    }

    /// The one that lies below a mapping, by the mapping's folder in `/sys`.
    pub(super) fn below(mapping: &Path) -> Option<Self> {
        let mut below = fs::read_dir(mapping.join("slaves")).ok()?.flatten();
        below.find_map(|entry| Self::named(&entry.file_name().to_string_lossy()))
    }

    /// What has such a name, and is no partition.
    fn named(name: &str) -> Option<Self> {
        name.strip_prefix("nbd")?.parse::<u16>().ok()?;
        Some(Self(name.to_owned()))
    }

    /// A device-mapper table with all of it.
    ///
    /// # Errors
    /// [`DiskError::Device`].
    pub(super) fn table(&self) -> Result<String, DiskError> {
        let sectors = self.sectors().map_err(|source| DiskError::Device {
            device: self.path(),
            source,
        })?;
        Ok(format!("0 {sectors} linear {} 0", self.path().display()))
    }

    /// Its size, which is 0 while nothing is shown on it.
    fn sectors(&self) -> io::Result<u64> {
        let text = fs::read_to_string(Path::new(BLOCK).join(&self.0).join("size"))?;
        text.trim().parse().map_err(io::Error::other)
    }

    fn is_ready_within(&self, limit: Duration) -> bool {
        let start = Instant::now();
        loop {
            if self.sectors().is_ok_and(|sectors| sectors > 0) {
                return true;
            }
            let gone = || self.servers().is_ok_and(|servers| servers.is_empty());
            if start.elapsed() > limit || gone() {
                return false;
            }
            thread::sleep(PAUSE);
        }
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.0)
    }

    /// Ends the qemu-nbd that shows it. It writes back what it holds first; if that takes longer than this, it is killed.
    ///
    /// # Errors
    /// [`DiskError::StillThere`], [`DiskError::Processes`].
    pub(super) fn end(&self, within: Duration) -> Result<(), DiskError> {
        for (signal, within) in [(Signal::SIGTERM, within), (Signal::SIGKILL, KILLED)] {
            let servers = self.servers()?;
            for pid in &servers {
                if let Err(error) = kill(*pid, signal) {
                    tracing::debug!(%pid, %error, "qemu-nbd was not signalled");
                }
            }
            let start = Instant::now();
            while servers.iter().any(is_there) && start.elapsed() <= within {
                thread::sleep(PAUSE);
            }
        }
        match self.servers()?.is_empty() {
            true => Ok(()),
            false => Err(DiskError::StillThere { device: self.path() }),
        }
    }

    /// The processes that were started to show it; also one that does not do so yet, or does no more. One that cannot be looked at is an error:
    /// it may be the one that has the key.
    fn servers(&self) -> Result<Vec<Pid>, DiskError> {
        let failed = |source| DiskError::Processes { source };
        let mut servers = Vec::new();
        for process in procfs::process::all_processes().map_err(failed)? {
            match process.and_then(|process| Ok((process.pid, process.cmdline()?, process.uid()?))) {
                Ok((pid, line, uid)) if uid == 0 && self.is_shown_by(&line) => servers.push(Pid::from_raw(pid)),
                Ok(_) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(servers)
    }

    /// Whether this is the command line of a program that shows it.
    fn is_shown_by(&self, line: &[String]) -> bool {
        let is_program = |part: &String| part.rsplit('/').next() == Some(PROGRAM);
        line.iter().any(is_program) && line.contains(&self.connect())
    }

    /// Whether something lies on it.
    pub(super) fn is_held(&self) -> bool {
        self.is_held_in(Path::new(BLOCK))
    }

    fn is_held_in(&self, block: &Path) -> bool {
        let holders = fs::read_dir(block.join(&self.0).join("holders"));
        holders.is_ok_and(|mut holders| holders.next().is_some())
    }

    fn connect(&self) -> String {
        format!("--connect=/dev/{}", self.0)
    }
}

/// Whether a process is there that has not ended. Of one that has, and was not waited for, there is no command line.
fn is_there(pid: &Pid) -> bool {
    match fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(line) => !line.is_empty(),
        Err(error) => !is_gone(&ProcError::Io(error, None)),
    }
}

/// Whether a process could not be looked at since it has ended.
fn is_gone(error: &ProcError) -> bool {
    match error {
        ProcError::NotFound(_) => true,
        ProcError::Io(error, _) => {
            error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
        }
        _ => false,
    }
}

/// The devices that have a socket in the run folder.
pub(super) fn shown(run_dir: &Path) -> Vec<Device> {
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten();
    let device = |entry: fs::DirEntry| Device::named(entry.file_name().to_string_lossy().strip_suffix(SOCKET)?);
    entries.filter_map(device).collect()
}

fn free(block: &Path) -> Result<Device, DiskError> {
    let entries = fs::read_dir(block).into_iter().flatten().flatten();
    let mut all: Vec<Device> = entries
        .filter_map(|entry| Device::named(&entry.file_name().to_string_lossy()))
        .collect();
    all.sort_by_key(|device| (device.0.len(), device.0.clone()));
    let is_free = |device: &&Device| !device.is_held_in(block) && !block.join(&device.0).join("pid").exists();
    all.iter()
        .find(is_free)
        .cloned()
        .ok_or(DiskError::NoDevice { of: all.len() })
}

/// The program, in a scope of its own where there is a service manager to make one.
fn in_a_scope(header: &Header) -> Command {
    if !Path::new(SYSTEMD).is_dir() {
        return command(PROGRAM);
    }
    let mut command = command("systemd-run");
    command.args(["--scope", "--quiet"]);
    command.arg(format!("--description=Key and disk of {}", header.image.display()));
    if Path::new(CGROUP_2).exists() {
        command.arg("--property=MemorySwapMax=0");
    }
    command.args(["--", PROGRAM]);
    command
}

/// The image as qemu takes it: no name is mistaken for a protocol, no content for another format, and no other file is opened, whatever its
/// header names by then.
fn name(image: &Path) -> Result<String, DiskError> {
    let text = image.to_str().ok_or_else(|| DiskError::NameNotText {
        image: image.to_owned(),
    })?;
    let kind = if image.is_file() { "file" } else { "host_device" };
    let options = json!({
        "driver": "qcow2",
        "backing": Value::Null,
        "encrypt": {"format": "luks", "key-secret": SECRET},
        "file": {"driver": kind, "filename": text},
    });
    Ok(format!("json:{options}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_device_that_nobody_holds_is_taken() {
        let block = tempfile::tempdir().unwrap();
        let none = free(block.path()).unwrap_err();
        assert!(matches!(none, DiskError::NoDevice { of: 0 }), "{none}");
        for folder in ["nbd0", "nbd1/holders/dm-0", "nbd2/nbd2p1", "nbd10", "nbd2p1", "sda"] {
            fs::create_dir_all(block.path().join(folder)).unwrap();
        }
        let take = || free(block.path()).map(|device| device.0);
        assert_eq!(take().unwrap(), "nbd0");
        fs::write(block.path().join("nbd0/pid"), "7").unwrap();
        assert_eq!(take().unwrap(), "nbd2");
        fs::write(block.path().join("nbd2/pid"), "8").unwrap();
        assert_eq!(take().unwrap(), "nbd10");
        fs::write(block.path().join("nbd10/pid"), "9").unwrap();
        let none = take().unwrap_err();
        assert!(matches!(none, DiskError::NoDevice { of: 4 }), "{none}");
    }

    #[test]
    fn only_what_was_started_to_show_it_is_ended() {
        let device = Device("nbd1".to_owned());
        let line = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        let own = device.connect();
        for shows in [
            line(&["qemu-nbd", "--object=x", &own]),
            line(&["/usr/bin/systemd-run", "--scope", "--", "qemu-nbd", &own]),
            line(&["/usr/bin/qemu-nbd", &own, "json:{}"]),
        ] {
            assert!(device.is_shown_by(&shows), "{shows:?}");
        }
        for other in [
            line(&["qemu-nbd", "--connect=/dev/nbd10"]),
            line(&["qemu-nbd", "--connect=/dev/nbd0"]),
            line(&["grep", &own]),
            line(&[]),
        ] {
            assert!(!device.is_shown_by(&other), "{other:?}");
        }
        // Nobody shows it here, and each process of this machine could be looked at.
        assert_eq!(device.servers().unwrap(), []);
        device.end(Duration::ZERO).unwrap();
        let mut child = Command::new("true").spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        while is_there(&pid) {
            thread::sleep(PAUSE);
        }
        child.wait().unwrap();
        assert!(!is_there(&pid));
        assert!(is_there(&Pid::this()));
    }

    #[test]
    fn a_name_is_no_protocol_and_no_option() {
        let name = name(Path::new("/x/json:{},nbd:\"1\".img")).unwrap();
        let options: Value = serde_json::from_str(name.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(options["file"]["filename"], "/x/json:{},nbd:\"1\".img");
        assert_eq!(options["backing"], Value::Null);
        assert_eq!(options["encrypt"]["format"], "luks");
    }
}
