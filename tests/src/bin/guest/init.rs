//! The start of a test machine.

use std::convert::Infallible;
use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::symlink;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::wait;
use nix::unistd::Pid;

use assay_tests::vm::SHELL_WORD;

/// Loaded before anything is measured, so that opening a disk or a connection loads no module of its own.
const MODULES: &[&str] = &[
    "virtio_net",
    "virtio_rng",
    "loop",
    "dm_mod",
    "dm_crypt",
    "aesni_intel",
    "xts",
    "cbc",
    "algif_skcipher",
    "algif_hash",
    "sha256_generic",
    "ext4",
];

/// The kernel gives PID 1 no useful one.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is mounted: type, place, must it work?
const MOUNTS: &[(&str, &str, bool)] = &[
    ("tmpfs", "/run", true),
    ("tmpfs", "/tmp", true),
    ("tmpfs", "/dev/shm", true),
    ("devpts", "/dev/pts", true),
    ("cgroup2", "/sys/fs/cgroup", true),
    ("securityfs", "/sys/kernel/security", true),
    ("bpf", "/sys/fs/bpf", true),
    ("debugfs", "/sys/kernel/debug", false),
    ("tracefs", "/sys/kernel/tracing", false),
];

/// Brings the machine up, starts the helper, and collects orphans for ever.
pub fn run() -> Result<()> {
    for &(kind, place, needed) in MOUNTS {
        if let Err(error) = mount_one(kind, place)
            && needed
        {
            return Err(Error::other(format!("mount {kind} at {place}: {error}")));
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        // devtmpfs starts without them; shells and scripts count on them.
        let _ = symlink(target, link);
    }
    std::fs::write("/proc/sys/kernel/hostname", "guest")?;
    for module in MODULES {
        // Built in, or not made for this kernel: what is really missing shows where it is used.
        let _ = Command::new("modprobe").args(["-q", module]).env("PATH", PATH).status();
    }
    network()?;
    let mut helper = Command::new("/proc/self/exe")
        .env("PATH", PATH)
        .stdin(super::from_init::obey()?)
        .spawn()?;
    let helper_pid = i32::try_from(helper.id()).map_err(Error::other)?;
    let shell_pid = shell()?;
    loop {
        let status = wait()?;
        let pid = status.pid().map(Pid::as_raw);
        if pid == Some(helper_pid) {
            return Err(Error::other(format!("the helper ended: {:?}", helper.try_wait())));
        }
        if pid.is_some() && pid == shell_pid {
            // Whoever used the console is done with the machine.
            return Ok(());
        }
    }
}

/// A shell on the console, where the kernel's command line asks for one with [`SHELL_WORD`].
fn shell() -> Result<Option<i32>> {
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    if !cmdline.split_whitespace().any(|word| word == SHELL_WORD) {
        return Ok(None);
    }
    let console = File::options().read(true).write(true).open("/dev/ttyS0")?;
    let shell = Command::new("setsid")
        .args(["--ctty", "bash", "-i"])
        .env("PATH", PATH)
        .env("HOME", "/root")
        .current_dir("/root")
        .stdin(console.try_clone()?)
        .stdout(console.try_clone()?)
        .stderr(console)
        .spawn()?;
    Ok(i32::try_from(shell.id()).ok())
}

/// Writes what is cached to the disk and switches the machine off.
pub fn power_off() {
    nix::unistd::sync();
    let _: nix::Result<Infallible> = reboot(RebootMode::RB_POWER_OFF);
}

fn mount_one(kind: &str, place: &str) -> Result<()> {
    std::fs::create_dir_all(place)?;
    Ok(mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)?)
}

/// The addresses that QEMU's user-mode network expects.
pub fn network() -> Result<()> {
    // Where another process 1 leaves this to udev, it may not have come to it yet.
    let _ = Command::new("modprobe")
        .args(["-q", "virtio_net"])
        .env("PATH", PATH)
        .status();
    let device = (0..100)
        .find_map(|attempt| {
            if attempt > 0 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            std::fs::read_dir("/sys/class/net")
                .ok()?
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .find(|name| name != "lo")
        })
        .ok_or_else(|| Error::other("no network device"))?;
    for arguments in [
        "link set lo up".to_owned(),
        format!("link set {device} up"),
        format!("addr add 10.0.2.15/24 dev {device}"),
        "route add default via 10.0.2.2".to_owned(),
    ] {
        let status = Command::new("ip")
            .args(arguments.split(' '))
            .env("PATH", PATH)
            .status()?;
        if !status.success() {
            return Err(Error::other(format!("ip {arguments}: {status}")));
        }
    }
    Ok(())
}
