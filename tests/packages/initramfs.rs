//! The agent in the initramfs: nothing of the real root runs before it measures, and it hands over without a gap.

use std::time::{Duration, Instant};

use assay_evidence::event::{Event, LoadKind};
use assay_tests::HarnessError;
use assay_tests::vm::{BootOptions, Image, Vm};

use crate::log::{LOG, Log};
use crate::machine::{PATIENCE, image, machine, property};

/// Making an initramfs takes this long at most, emulated and beside other machines.
const MAKING: Duration = Duration::from_secs(900);

/// EXT4_SUPER_MAGIC, of the real root (statfs(2)).
const EXT4: u64 = 0xef53;
/// Process 1 of the real root.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
/// Both agents: the initramfs's, and the real root's.
const AGENT: &str = "/usr/bin/assay-agent";
/// Where the machine leaves its initramfs.
const INITRD: &str = "/root/initrd";
/// The drivers of the real root.
const DRIVERS: &str = "virtio_pci virtio_blk ext4";

#[test]
fn an_agent_in_the_initramfs_measures_the_real_root_from_its_first_program_on() -> Result<(), HarnessError> {
    assert_measured(&booted(&format!(
        "echo ASSAY=yes > /etc/initramfs-tools/conf.d/assay; echo MODULES=list > /etc/initramfs-tools/conf.d/modules
        printf '%s\\n' {DRIVERS} > /etc/initramfs-tools/modules
        mkinitramfs -o {INITRD} $(uname -r)"
    ))?)
}

#[test]
fn an_agent_in_the_initramfs_of_dracut_measures_the_real_root_from_its_first_program_on() -> Result<(), HarnessError> {
    assert_measured(&booted(&format!(
        "echo 'add_dracutmodules+=\" assay \"' > /etc/dracut.conf.d/assay.conf
        dracut --force --hostonly --add-drivers '{DRIVERS}' {INITRD} $(uname -r)"
    ))?)
}

/// A machine that was started with the initramfs that this script makes in it, the agent's package being installed.
fn booted(make: &str) -> Result<Vm, HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    // The kernel was not installed by its package: what it can unpack is told by its configuration.
    let image = image()?;
    let config = format!("config-{}", image.kernel_release);
    guest.put_file(&format!("/boot/{config}"), 0o644, &image.kernel.with_file_name(&config))?;
    let asked = format!("dpkg --install /root/assay-agent_*.deb; systemctl --quiet enable assay-agent\n{make}");
    let start = Instant::now();
    let ended = guest.run_with(&["bash", "-euc", &asked], b"", MAKING)?;
    assert!(ended.ok(), "{ended}");
    println!("{:>6.1} s  making it", start.elapsed().as_secs_f64());
    let folder = tempfile::tempdir().map_err(HarnessError::io("make a folder for an initramfs"))?;
    let initrd = folder.path().join("initrd");
    std::fs::write(&initrd, guest.get(INITRD)?).map_err(HarnessError::io("write the initramfs"))?;
    guest.run_ok(&["sync"])?;

    let image = Image {
        initrd: vec![initrd],
        ..image
    };
    let options = BootOptions {
        cmdline: "root=/dev/vda rw".to_owned(),
        ..BootOptions::default()
    };
    let start = Instant::now();
    let vm = vm.reboot(&image, &options)?;
    vm.guest()
        .run_with(&["systemctl", "is-system-running", "--wait"], b"", PATIENCE)?;
    println!("{:>6.1} s  starting with it", start.elapsed().as_secs_f64());
    Ok(vm)
}

fn assert_measured(vm: &Vm) -> Result<(), HarnessError> {
    let guest = vm.guest();
    assert_eq!(
        property(guest, "assay-agent.service", "ActiveState")?,
        "active",
        "{}",
        vm.console()
    );
    let log = Log::wait(guest, LOG, "both agents", |log| log.count(&Event::Ready) == 2)?;
    println!(
        "{} events in the inventory, {} loads",
        log.inventory().len(),
        log.loads().len()
    );

    // Two agents, one log, each record of the kernel once.
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    assert_eq!((log.starts().len(), log.count(&Event::AgentStop)), (2, 1));
    // The real root's process 1 came after the first READY, as a load; so did all else of the real root. The agent that saw it went on
    // there, until its successor was started and asked for its place.
    let ready = log.events.iter().position(|event| *event == Event::Ready);
    let (systemd, successor) = (started(&log, SYSTEMD), started(&log, AGENT));
    let stopped = log.events.iter().position(|event| *event == Event::AgentStop);
    let order = [ready, systemd, successor, stopped];
    let journal = || guest.script("journalctl -b --no-pager -o short-monotonic _PID=1 + SYSLOG_IDENTIFIER=assay-agent");
    assert!(
        order.iter().all(Option::is_some) && order.is_sorted(),
        "{order:?}\n{}",
        journal()?
    );
    // What ran before is the initramfs's: nothing of it is on the disk.
    let early = log.inventory();
    assert!(early.iter().all(|found| found.fs_magic != EXT4), "{early:?}");
    assert!(early.iter().any(|found| found.path == AGENT), "{early:?}");
    Ok(())
}

/// Where the log has the first start of this program of the real root. The initramfs may have its own by the same name.
fn started(log: &Log, path: &str) -> Option<usize> {
    log.events.iter().position(|event| {
        matches!(event, Event::Load(load) if load.kind == LoadKind::Program
            && load.path == path
            && load.fs_magic == EXT4
            && load.digest.is_some())
    })
}
