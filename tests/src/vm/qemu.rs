//! How a machine is put together: QEMU's arguments, and the TPM beside it. A machine that was saved can be restored
//! only into the same parts, so saved machines carry the content of this file in their names.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::HarnessError;
use crate::child::{self, Child};
use crate::swtpm::last_words;
use crate::wire::GUEST_PORT;

use super::accel::EMULATED;
use super::{AGENT_PORT, Accelerator, BOOT_TIMEOUT, BootOptions, Image, xen};

/// Virtual processors, unless the test says otherwise.
const CPUS: u32 = 2;
/// Memory in MiB, unless the test says otherwise.
const MEMORY: u32 = 1024;
/// The initramfs, in the machine's folder.
const INITRD: &str = "initrd";
/// swtpm's control socket, in the machine's folder.
pub(super) const TPM_SOCKET: &str = "swtpm.sock";
/// The control socket of the proxy before it, where there is one.
pub(super) const SLOW_TPM_SOCKET: &str = "slow-tpm.sock";

/// An empty disk over the root filesystem.
pub(super) fn make_overlay(root: &Path, disk: &Path) -> Result<(), HarnessError> {
    let mut command = Command::new("qemu-img");
    command
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([root, disk]);
    child::run(&mut command)
}

/// One initramfs of its parts, which the kernel unpacks one after the other.
pub(super) fn make_initrd(parts: &[PathBuf], dir: &Path) -> Result<(), HarnessError> {
    let path = dir.join(INITRD);
    let join = || -> std::io::Result<()> {
        let mut whole = File::create(&path)?;
        for part in parts {
            std::io::copy(&mut File::open(part)?, &mut whole)?;
        }
        Ok(())
    };
    join().map_err(HarnessError::io(format!("write {}", path.display())))
}

/// Starts swtpm on the state that is in the machine's folder.
pub(super) fn start_tpm(dir: &Path) -> Result<Child, HarnessError> {
    let (socket, log) = (dir.join(TPM_SOCKET), dir.join("swtpm.log"));
    let _ = std::fs::remove_file(&socket);
    let mut child = Child::spawn("swtpm", |command| {
        command
            .args([
                "socket",
                "--tpm2",
                "--terminate",
                "--flags",
                "not-need-init",
                "--tpmstate",
            ])
            .arg(format!("dir={}", dir.join("tpm").display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", socket.display()))
            .arg("--log")
            .arg(format!("file={},level=1", log.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
    })?;
    let start = Instant::now();
    while !socket.exists() {
        if child.ended().is_some() || start.elapsed() > BOOT_TIMEOUT {
            let (what, seconds) = ("swtpm did not start".to_owned(), start.elapsed().as_secs());
            return Err(HarnessError::Timeout {
                what,
                seconds,
                detail: last_words(&log),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child)
}

/// QEMU's arguments for the machine, `ports` of this machine leading to the helper's and the agent's.
pub(super) fn configure(command: &mut Command, image: &Image, dir: &Path, options: &BootOptions, ports: (u16, u16)) {
    let file = |name: &str| dir.join(name).display().to_string();
    command.args(["-M", "q35", "-nographic", "-nodefaults"]);
    let usual = if image.xen.is_some() { xen::MEMORY } else { MEMORY };
    let (cpus, memory) = (options.cpus.unwrap_or(CPUS), options.memory_mib.unwrap_or(usual));
    command.args(["-smp", &cpus.to_string(), "-m", &memory.to_string()]);
    if let Some(xen) = &image.xen {
        xen.configure(&image.kernel, &cmdline(image, options), &dir.join(INITRD), command);
    } else {
        configure_linux(command, image, dir, options);
    }
    // The disk lives as long as the test: nothing needs to reach the platter.
    command.args([
        "-drive",
        &format!("file={},format=qcow2,if=virtio,cache=unsafe", file("disk.qcow2")),
    ]);
    let (guest, agent) = ports;
    command.args([
        "-netdev",
        &format!(
            "user,id=n0,hostfwd=tcp:127.0.0.1:{guest}-10.0.2.15:{GUEST_PORT},hostfwd=tcp:127.0.0.1:{agent}-10.0.2.15:{AGENT_PORT}"
        ),
        // Without an empty romfile the firmware spends seconds on network boot.
        "-device",
        "virtio-net-pci,netdev=n0,romfile=",
        "-device",
        "virtio-rng-pci",
        "-qmp",
        &format!("unix:{},server=on,wait=off", file("qmp.sock")),
    ]);
    if !options.without_tpm {
        let socket = options.extend_delay.map_or(TPM_SOCKET, |_| SLOW_TPM_SOCKET);
        command.args([
            "-chardev",
            &format!("socket,id=tc,path={}", file(socket)),
            "-tpmdev",
            "emulator,id=t0,chardev=tc",
            "-device",
            "tpm-tis,tpmdev=t0",
        ]);
    }
    if options.interactive {
        command.args(["-serial", "mon:stdio"]).stdin(Stdio::inherit());
        return;
    }
    command.args(["-serial", &format!("file:{}", file("console.log"))]);
    let log = File::create(dir.join("qemu.log")).map_or_else(|_| Stdio::null(), Stdio::from);
    command.stdout(Stdio::null()).stderr(log);
}

/// Processor, and what is started on it, where there is no hypervisor in between.
fn configure_linux(command: &mut Command, image: &Image, dir: &Path, options: &BootOptions) {
    if options.count_instructions {
        command.args(["-accel", "tcg,thread=single", "-cpu", EMULATED, "-icount", "shift=0"]);
    } else {
        command.args(Accelerator::detect().arguments());
    }
    match &options.efi {
        Some(efi) => efi.configure(&image.efi, dir, command),
        None => {
            command.arg("-kernel").arg(&image.kernel);
            command.arg("-initrd").arg(dir.join(INITRD));
            command.arg("-append").arg(cmdline(image, options));
        }
    }
}

/// The kernel's command line.
pub(super) fn cmdline(image: &Image, options: &BootOptions) -> String {
    let mut words = vec![image.cmdline.as_str(), image.variant.cmdline(), &options.cmdline];
    words.retain(|words| !words.is_empty());
    words.join(" ")
}

/// Two free loopback ports.
pub(super) fn free_ports() -> Result<(u16, u16), HarnessError> {
    let listen =
        || TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
    match (listen(), listen()) {
        (Ok((first, _one)), Ok((second, _two))) => Ok((first, second)),
        _ => Err(HarnessError::NoPorts),
    }
}
