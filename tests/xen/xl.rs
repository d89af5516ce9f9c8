//! Xen, with Debian's own start script and xl: a paravirtualised guest whose disk `block-assay` opens.

use std::time::Duration;

use assay_tests::HarnessError;
use assay_tests::agent;
use assay_tests::guest::{Ended, Guest};
use assay_tests::hooks;
use assay_tests::vm::{Image, Vm, XEN, Xen};

use crate::common::{PATIENCE, Stage, enrolled_on, sha256sum};
use crate::seal;

/// What the guest's disk says.
const LINE: &str = "a line that only a trusted host can read";
const IMAGE: &str = "/srv/mail.luks";
const MODULE: &str = "/root/dummy.ko";
/// Where Xen's console daemon writes what the guest says.
const CONSOLE: &str = "/var/log/xen/console/guest-mail.log";
/// For xl: libxl gives the block script 40 s, and the domain's kernel has to be unpacked.
const LIMIT: Duration = Duration::from_secs(300);

/// A dom0 with Xen's daemons up and the hook installed, as its documentation says.
fn dom0(image: &Image, xen: &Xen) -> Result<Vm, HarnessError> {
    let vm = Vm::restore(image)?;
    let guest = vm.guest();
    guest.put_file("/etc/xen/scripts/block-assay", 0o755, &hooks::path("block-assay"))?;
    guest.put_file("/srv/vmlinuz", 0o644, &xen.guest_kernel)?;
    guest.put_file("/srv/initrd", 0o644, &xen.guest_initrd)?;
    guest.put_file(MODULE, 0o644, &image.modules.join("kernel/drivers/net/dummy.ko"))?;
    // What the guest says is written down; its disks' driver is loaded as udev would load it.
    guest.script(
        "echo XENCONSOLED_ARGS=--log=guest >> /etc/default/xen
         mkdir -p /var/log/xen/console
         /etc/init.d/xen start
         modprobe xen-blkback",
    )?;
    Ok(vm)
}

fn create(guest: &Guest, target: &str) -> Result<Ended, HarnessError> {
    let config = format!(
        "name = 'mail'
type = 'pv'
kernel = '/srv/vmlinuz'
ramdisk = '/srv/initrd'
extra = 'console=hvc0 quiet panic=-1'
memory = 160
vcpus = 1
disk = [ 'script=block-assay,vdev=xvda,target={target}' ]
on_poweroff = 'destroy'
on_reboot = 'destroy'
on_crash = 'destroy'
"
    );
    guest.put("/etc/xen/mail.cfg", 0o644, config.as_bytes())?;
    guest.run_with(&["xl", "create", "/etc/xen/mail.cfg"], b"", LIMIT)
}

/// Neither the domain nor its disk is there.
fn nothing_is_left(guest: &Guest) -> Result<bool, HarnessError> {
    let domains = guest.run_ok(&["xl", "list"])?;
    let open = guest.run_ok(&["ls", "/dev/mapper"])?;
    Ok(!domains.contains("mail") && open.trim() == "control")
}

#[test]
fn xen_guest_reads_its_sealed_disk_until_a_module_that_nobody_approved_is_loaded() -> Result<(), HarnessError> {
    let image = Image::load_host(XEN)?;
    let xen = image.xen.clone().expect("an image with Xen");
    let stage = enrolled_on(dom0(&image, &xen)?, "")?;
    let guest = stage.vm.guest();
    rehearse(&stage)?;
    stage.capture()?;

    seal(&stage, IMAGE, format!("{LINE}\n").as_bytes())?;
    let ended = create(guest, IMAGE)?;
    assert!(ended.ok(), "{ended}\n{}", hotplug_log(guest));
    Guest::wait_for("the guest did not end, or its disk stays open", PATIENCE, || {
        Ok(nothing_is_left(guest)?.then_some(()))
    })?;
    let console = guest.get_text(CONSOLE)?;
    assert!(console.contains(&format!("the disk says: {LINE}")), "{console}");
    let audit = stage.verifier.run_ok(&["audit", "show"])?;
    assert!(audit.contains("for \"mail\""), "{audit}");

    guest.run_ok(&["insmod", MODULE])?;
    let digest = sha256sum(&stage.vm, MODULE)?;
    stage.distrusted_for(MODULE)?;
    let ended = create(guest, IMAGE)?;
    assert!(!ended.ok(), "{ended}");
    assert!(
        ended.stderr.contains("Assay: ") && ended.stderr.contains(MODULE) && ended.stderr.contains(&digest),
        "{ended}\n{}",
        hotplug_log(guest)
    );
    assert!(nothing_is_left(guest)?);
    Ok(())
}

/// What this host runs when it starts a guest and when a disk is refused, so that all of it is known good.
fn rehearse(stage: &Stage) -> Result<(), HarnessError> {
    let guest = stage.vm.guest();
    agent::rehearse(guest)?;
    let ended = create(guest, "/srv/none")?;
    assert!(
        !ended.ok() && ended.stderr.contains("Assay: ") && ended.stderr.contains("/srv/none"),
        "{ended}\n{}",
        hotplug_log(guest)
    );
    assert!(nothing_is_left(guest)?);
    Ok(())
}

fn hotplug_log(guest: &Guest) -> String {
    guest.get_text("/var/log/xen/xen-hotplug.log").unwrap_or_default()
}
