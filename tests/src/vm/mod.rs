//! Whole machines: QEMU with a Debian kernel and a virtual TPM, restored from a snapshot for each test.
//!
//! A machine has its own copy of the saved disk, its own TPM state, its own ports, and no trace of it is left when
//! the [`Vm`] is dropped. Machines of different tests share nothing.

mod accel;
mod efi;
mod image;
mod qemu;
mod qmp;
mod saved;
mod tpm_pace;
mod tpm_proxy;
mod variant;
mod xen;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::child::Child;
use crate::guest::Guest;
use crate::swtpm::{last_words, set_up};
use crate::{HarnessError, swtpm};

pub use accel::Accelerator;
pub use efi::{Efi, EfiBoot, GRUB_MODULES, Loader};
pub use image::{DEFAULT_KERNEL, IMAGE_VARIABLE, Image, KERNELS, LIBVIRT, XEN};
pub use qmp::Qmp;
pub use tpm_pace::{CC_CREATE_PRIMARY, Delays, Done};
pub use tpm_proxy::SlowTpm;
pub use variant::Variant;
pub use xen::Xen;

/// Where `assay-agent` listens inside the guest.
pub const AGENT_PORT: u16 = 8443;
/// On the kernel's command line: give a shell on the console, and switch off when it ends.
pub const SHELL_WORD: &str = "assay.shell";
/// From switching on to the helper's answer; 10 s on an idle machine under emulation, and ten times that with the agent in the initramfs
/// beside other machines.
const BOOT_TIMEOUT: Duration = Duration::from_secs(600);
/// QEMU ends with this when one emulated processor reads while another changes the map of the memory, as the firmware does
/// (QEMU 10.0, seen once). No machine that it has ended so was up.
const EMULATOR_FAULT: &str = "iotlb_to_section: Assertion";
/// So often a machine is started if that happens.
const STARTS: u32 = 3;
/// The name of the one snapshot in a saved disk.
const SNAPSHOT: &str = "ready";

/// How to boot a machine, where it should differ from the image's way.
#[derive(Debug, Clone, Default)]
pub struct BootOptions {
    /// Words added to the kernel's command line; a later `lsm=` replaces an earlier one.
    pub cmdline: String,
    /// No TPM at all.
    pub without_tpm: bool,
    /// Console on this terminal instead of a log file.
    pub interactive: bool,
    /// Virtual processors; `None`: two.
    pub cpus: Option<u32>,
    /// Memory in MiB; `None`: 1024, and 1536 under Xen.
    pub memory_mib: Option<u32>,
    /// Each extend waits this long before the TPM gets it, and is counted: [`Vm::slow_tpm`]. `None`: no proxy before
    /// the TPM.
    pub extend_delay: Option<Duration>,
    /// The machine's clock counts instructions, one a nanosecond, whatever this machine is busy with; emulated even
    /// where hardware virtualisation works. Such a machine cannot be restored, only booted.
    pub count_instructions: bool,
    /// From firmware and a boot loader, with that on the system partition; `None`: QEMU loads the kernel itself.
    pub efi: Option<EfiBoot>,
}

impl BootOptions {
    /// From firmware and a boot loader, on one virtual processor. What is tested so needs no second one, and with two, emulated on a busy
    /// machine, the kernel once waited for ever: no timer came on the second ("rcu_preempt kthread timer wakeup didn't happen", QEMU 10.0).
    /// Nor does anybody read while the firmware changes the map of the memory, of which QEMU once ended.
    #[must_use]
    pub fn by_firmware(efi: EfiBoot) -> Self {
        Self {
            cpus: Some(1),
            efi: Some(efi),
            ..Self::default()
        }
    }
}

/// How to restore a machine; all else is as it was when it was saved.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// As [`BootOptions::extend_delay`].
    pub extend_delay: Option<Duration>,
}

/// A running machine; switched off and removed on drop.
#[derive(Debug)]
pub struct Vm {
    // Dropped in this order: the machine before its TPM, both before their files.
    qemu: Child,
    slow_tpm: Option<SlowTpm>,
    tpm: Option<Child>,
    guest: Guest,
    variant: Variant,
    agent_port: u16,
    dir: tempfile::TempDir,
}

impl Vm {
    /// Boots a machine from power-on with a TPM of its own, made fresh with an EK certificate.
    ///
    /// # Errors
    /// When a program is missing or the machine does not come up.
    pub fn boot(image: &Image, options: &BootOptions) -> Result<Self, HarnessError> {
        for _ in 1..STARTS {
            match Self::boot_once(image, options) {
                // What has been switched on since has done nothing yet: another one is as good.
                Err(HarnessError::Failed { output, .. }) if output.contains(EMULATOR_FAULT) => {}
                booted => return booted,
            }
        }
        Self::boot_once(image, options)
    }

    fn boot_once(image: &Image, options: &BootOptions) -> Result<Self, HarnessError> {
        let dir = machine_dir()?;
        qemu::make_overlay(&image.root, &dir.path().join("disk.qcow2"))?;
        if !options.without_tpm {
            let state = dir.path().join("tpm");
            std::fs::create_dir(&state).map_err(HarnessError::io(format!("make {}", state.display())))?;
            set_up(&state, true)?;
        }
        let mut vm = Self::start(image, dir, options, false, None)?;
        if !options.interactive {
            vm.wait_until_up(BOOT_TIMEOUT)?;
            image.variant.prepare(&vm.guest)?;
        }
        Ok(vm)
    }

    /// Restores the image's saved machine, and sets its clock. The first to want a machine boots and saves it.
    ///
    /// # Errors
    /// When a program is missing, or the machine does not come up or does not answer.
    pub fn restore(image: &Image) -> Result<Self, HarnessError> {
        Self::restore_with(image, &RestoreOptions::default())
    }

    /// Restores the image's saved machine with a TPM that behaves otherwise, and sets its clock.
    ///
    /// # Errors
    /// As [`Vm::restore`].
    pub fn restore_with(image: &Image, options: &RestoreOptions) -> Result<Self, HarnessError> {
        let snapshot = saved::ensure(image)?;
        let dir = machine_dir()?;
        let (disk, from) = (dir.path().join("disk.qcow2"), Image::snapshot_disk(&snapshot));
        std::fs::copy(&from, &disk).map_err(HarnessError::io(format!("copy {}", from.display())))?;
        copy_dir(&Image::snapshot_tpm(&snapshot), &dir.path().join("tpm"))?;
        let options = BootOptions {
            extend_delay: options.extend_delay,
            ..BootOptions::default()
        };
        let mut vm = Self::start(image, dir, &options, true, None)?;
        vm.wait_until_up(BOOT_TIMEOUT)?;
        vm.guest.set_clock()?;
        Ok(vm)
    }

    /// The helper inside: run programs, copy files.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The proxy before the TPM, where the machine was started with a delay for extends (which may be zero).
    pub fn slow_tpm(&self) -> Option<&SlowTpm> {
        self.slow_tpm.as_ref()
    }

    /// How many extends the TPM has done since the machine was started or restored, whoever asked. `None`: nobody
    /// counts, because the machine was started without [`BootOptions::extend_delay`].
    pub fn extends(&self) -> Option<u64> {
        self.slow_tpm().map(SlowTpm::extends)
    }

    /// Where the agent inside is reached from this machine, as `host:port`.
    pub fn agent_address(&self) -> String {
        format!("127.0.0.1:{}", self.agent_port)
    }

    /// The PEM files of the authority that signed the TPM's EK certificate, root first.
    pub fn ca_certificates(&self) -> Vec<PathBuf> {
        swtpm::authority::certificates(&self.dir.path().join("tpm"))
    }

    /// Everything that the kernel and the helper have written to the console.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.dir.path().join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Presses the reset button and waits until the machine is up again: same disk, same TPM, PCRs at zero.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn reset(&mut self) -> Result<(), HarnessError> {
        let before = self.guest.ping()?.0;
        self.qmp()?.execute("system_reset", &json!({}))?;
        Guest::wait_for("the machine did not come back after a reset", BOOT_TIMEOUT, || {
            Ok(self.guest.ping().ok().filter(|(boot_id, _)| *boot_id != before))
        })?;
        self.variant.prepare(&self.guest)?;
        self.guest.set_clock()
    }

    /// Switches the machine off, and boots it in another way: same disk, same TPM, PCRs at zero. In good order: a TPM takes
    /// each power cut for a guess at a secret, and answers no questions after a few.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn reboot(self, image: &Image, options: &BootOptions) -> Result<Self, HarnessError> {
        self.guest.power_off()?;
        // Where a verifier looks for it.
        let ports = (self.guest.port(), self.agent_port);
        let Self {
            mut qemu,
            mut tpm,
            variant,
            dir,
            ..
        } = self;
        qemu.wait()?;
        if let Some(tpm) = &mut tpm {
            tpm.wait()?;
        }
        let mut vm = Self::start(image, dir, options, false, Some(ports))?;
        vm.wait_until_up(BOOT_TIMEOUT)?;
        variant.prepare(&vm.guest)?;
        Ok(vm)
    }

    /// Saves the machine as it stands, TPM included, into the folder `to`, and switches it off.
    ///
    /// # Errors
    /// When QEMU refuses, or the folder cannot be written.
    pub fn save(mut self, to: &Path) -> Result<(), HarnessError> {
        let mut qmp = self.qmp()?;
        qmp.monitor(&format!("savevm {SNAPSHOT}"))?;
        // QEMU may hang up before it has answered.
        let _ = qmp.execute("quit", &json!({}));
        self.qemu.wait()?;
        // swtpm ends with QEMU's connection and leaves its files complete.
        if let Some(tpm) = &mut self.tpm {
            tpm.wait()?;
        }
        std::fs::create_dir_all(to).map_err(HarnessError::io(format!("make {}", to.display())))?;
        let (from, disk) = (self.dir.path().join("disk.qcow2"), Image::snapshot_disk(to));
        std::fs::copy(&from, &disk).map_err(HarnessError::io(format!("write {}", disk.display())))?;
        copy_dir(&self.dir.path().join("tpm"), &Image::snapshot_tpm(to))
    }

    /// Waits until the machine has been switched off from inside.
    ///
    /// # Errors
    /// When QEMU cannot be waited for.
    pub fn wait(&mut self) -> Result<(), HarnessError> {
        self.qemu.wait().map(drop)
    }

    /// A connection to the machine's monitor; one at a time.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn qmp(&self) -> Result<Qmp, HarnessError> {
        Qmp::connect(&self.dir.path().join("qmp.sock"))
    }

    /// `ports`: those that the machine had before, if they are still free.
    fn start(
        image: &Image,
        dir: tempfile::TempDir,
        options: &BootOptions,
        restored: bool,
        mut ports: Option<(u16, u16)>,
    ) -> Result<Self, HarnessError> {
        qemu::make_initrd(&image.initrd, dir.path())?;
        if let Some(efi) = &options.efi {
            efi.lay_out(image, &qemu::cmdline(image, options), dir.path())?;
        }
        for _ in 0..10 {
            let tpm = if options.without_tpm {
                None
            } else {
                Some(qemu::start_tpm(dir.path())?)
            };
            let slow_tpm = match options.extend_delay {
                Some(delay) if tpm.is_some() => Some(SlowTpm::start(
                    dir.path().join(qemu::SLOW_TPM_SOCKET),
                    &dir.path().join(qemu::TPM_SOCKET),
                    delay,
                )?),
                _ => None,
            };
            let (guest_port, agent_port) = match ports.take() {
                Some(ports) => ports,
                None => qemu::free_ports()?,
            };
            let mut qemu = Child::spawn("qemu-system-x86_64", |command| {
                qemu::configure(command, image, dir.path(), options, (guest_port, agent_port));
                if restored {
                    command.args(["-loadvm", SNAPSHOT]);
                }
            })?;
            if options.interactive || Self::lives(&mut qemu, dir.path())? {
                return Ok(Self {
                    qemu,
                    slow_tpm,
                    tpm,
                    guest: Guest::at(guest_port),
                    variant: image.variant,
                    agent_port,
                    dir,
                });
            }
            // Another process took one of the ports between the look and the start.
        }
        Err(HarnessError::NoPorts)
    }

    /// Waits for QEMU's monitor. `Ok(false)`: it ended because it could not bind a port.
    fn lives(qemu: &mut Child, dir: &Path) -> Result<bool, HarnessError> {
        let (log, start) = (dir.join("qemu.log"), Instant::now());
        loop {
            if let Some(status) = qemu.ended() {
                let output = std::fs::read_to_string(&log).unwrap_or_default();
                if output.contains("Could not set up host forwarding rule") {
                    return Ok(false);
                }
                return Err(HarnessError::Failed {
                    program: "qemu-system-x86_64".to_owned(),
                    status,
                    output,
                });
            }
            if Qmp::connect(&dir.join("qmp.sock")).is_ok() {
                return Ok(true);
            }
            if start.elapsed() > BOOT_TIMEOUT {
                let (what, seconds) = ("QEMU did not start".to_owned(), BOOT_TIMEOUT.as_secs());
                return Err(HarnessError::Timeout {
                    what,
                    seconds,
                    detail: last_words(&log),
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_until_up(&mut self, timeout: Duration) -> Result<(), HarnessError> {
        let start = Instant::now();
        while start.elapsed() < timeout {
            if self.guest.ping().is_ok() {
                return Ok(());
            }
            if let Some(status) = self.qemu.ended() {
                let mut output = last_words(&self.dir.path().join("console.log"));
                output.push_str(&last_words(&self.dir.path().join("qemu.log")));
                return Err(HarnessError::Failed {
                    program: "qemu-system-x86_64".to_owned(),
                    status,
                    output,
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(HarnessError::Timeout {
            what: "the machine did not come up".to_owned(),
            seconds: timeout.as_secs(),
            detail: last_words(&self.dir.path().join("console.log")),
        })
    }
}

/// A machine's files. Under TMPDIR: paths of UNIX sockets are limited to 107 bytes.
fn machine_dir() -> Result<tempfile::TempDir, HarnessError> {
    tempfile::Builder::new()
        .prefix("assay-vm-")
        .tempdir()
        .map_err(HarnessError::io("make a folder for a test machine"))
}

fn copy_dir(from: &Path, to: &Path) -> Result<(), HarnessError> {
    let action = || format!("copy {}", from.display());
    std::fs::create_dir_all(to).map_err(HarnessError::io(action()))?;
    for entry in std::fs::read_dir(from).map_err(HarnessError::io(action()))? {
        let entry = entry.map_err(HarnessError::io(action()))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_dir(&path, &target)?;
        } else if path.is_file() && entry.file_name() != ".lock" {
            std::fs::copy(&path, &target).map_err(HarnessError::io(action()))?;
        }
    }
    Ok(())
}
