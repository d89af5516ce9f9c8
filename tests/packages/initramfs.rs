//! The agent in the initramfs: nothing of the real root runs before it measures, and it hands over without a gap.

use std::time::Duration;

use assay_evidence::event::{Event, LoadKind};
use assay_tests::HarnessError;
use assay_tests::vm::BootOptions;

use crate::log::{LOG, Log};
use crate::machine::{PATIENCE, image, machine, property};

/// Making an initramfs takes this long at most, emulated and beside other machines.
const MAKING: Duration = Duration::from_secs(900);

/// EXT4_SUPER_MAGIC, of the real root (statfs(2)).
const EXT4: u64 = 0xef53;
/// Process 1 of the real root.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";

#[test]
fn an_agent_in_the_initramfs_measures_the_real_root_from_its_first_program_on() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    // The kernel was not installed by its package: what it can unpack is told by its configuration.
    let mut image = image()?;
    let config = format!("config-{}", image.kernel_release);
    guest.put_file(&format!("/boot/{config}"), 0o644, &image.kernel.with_file_name(&config))?;
    let asked = "dpkg --install /root/assay-agent_*.deb; systemctl --quiet enable assay-agent
        echo ASSAY=yes > /etc/initramfs-tools/conf.d/assay; echo MODULES=list > /etc/initramfs-tools/conf.d/modules
        printf '%s\\n' virtio_pci virtio_blk ext4 > /etc/initramfs-tools/modules
        mkinitramfs -o /root/initrd $(uname -r)";
    let ended = guest.run_with(&["bash", "-euc", asked], b"", MAKING)?;
    assert!(ended.ok(), "{ended}");
    let folder = tempfile::tempdir().map_err(HarnessError::io("make a folder for an initramfs"))?;
    let initrd = folder.path().join("initrd");
    std::fs::write(&initrd, guest.get("/root/initrd")?).map_err(HarnessError::io("write the initramfs"))?;
    guest.run_ok(&["sync"])?;

    image.initrd = vec![initrd];
    let options = BootOptions {
        cmdline: "root=/dev/vda rw".to_owned(),
        ..BootOptions::default()
    };
    let vm = vm.reboot(&image, &options)?;
    let guest = vm.guest();
    guest.run_with(&["systemctl", "is-system-running", "--wait"], b"", PATIENCE)?;
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
    // The real root's process 1 came after the first READY, as a load; so did all else of the real root.
    let ready = log.events.iter().position(|event| *event == Event::Ready);
    let started = log.events.iter().position(|event| {
        matches!(event, Event::Load(load) if load.kind == LoadKind::Program && load.path == SYSTEMD && load.digest.is_some())
    });
    assert!(ready < started && started.is_some(), "{ready:?} {started:?}");
    // What ran before is the initramfs's: nothing of it is on the disk.
    let early = log.inventory();
    assert!(early.iter().all(|found| found.fs_magic != EXT4), "{early:?}");
    assert!(
        early.iter().any(|found| found.path == "/usr/bin/assay-agent"),
        "{early:?}"
    );
    Ok(())
}
