//! libvirt with QEMU: a domain whose boot sector, on a sealed disk, is all its software. Emulated within an emulated machine,
//! that is the largest guest that is not slow.

use std::time::Duration;

use assay_tests::HarnessError;
use assay_tests::agent;
use assay_tests::guest::{Ended, Guest};
use assay_tests::hooks;
use assay_tests::vm::{Image, LIBVIRT, Vm};

use crate::common::{PATIENCE, ROGUE, enrolled_on};
use crate::{disk, seal};

/// What the domain says on its serial port.
const LINE: &str = "booted from a sealed disk";
const DAEMON_LOG: &str = "/var/log/libvirtd.log";
const MAIL: Sealed = Sealed {
    domain: "mail",
    image: "/srv/mail.luks",
};
/// The hook's own deadline is tested elsewhere.
pub const HOOK_DEADLINE: &str = "[unlock]\nhook_deadline_s = 150\n";
/// Under emulation within emulation.
const LIMIT: Duration = Duration::from_secs(300);

/// A domain whose one disk is a sealed image.
pub struct Sealed {
    pub domain: &'static str,
    pub image: &'static str,
}

impl Sealed {
    /// What its disk is called when it is open.
    fn device(&self) -> String {
        format!("assay-{}", self.domain)
    }

    /// Has libvirt know it, with the image in its metadata.
    pub fn define(&self, guest: &Guest) -> Result<(), HarnessError> {
        let (device, image) = (self.device(), self.image);
        let metadata = format!(
            "<assay:disks xmlns:assay='urn:assay:libvirt:1'><assay:disk name='{device}' image='{image}'/></assay:disks>"
        );
        let disk = format!("type='block'><source dev='/dev/mapper/{device}'/>");
        define(guest, self.domain, &metadata, &disk)
    }

    /// Starts the domain, which must succeed.
    pub fn start(&self, guest: &Guest) -> Result<(), HarnessError> {
        let ended = start(guest, self.domain)?;
        assert!(ended.ok(), "{ended}");
        Ok(())
    }

    /// Ends the domain, and waits until its disk is closed.
    pub fn end(&self, guest: &Guest) -> Result<(), HarnessError> {
        guest.run_ok(&["virsh", "destroy", self.domain])?;
        // libvirt calls `release` when all else is done.
        Guest::wait_for(&format!("{} stays open", self.device()), PATIENCE, || {
            Ok((!self.is_open(guest)?).then_some(()))
        })
    }

    fn is_open(&self, guest: &Guest) -> Result<bool, HarnessError> {
        let open = guest.run_ok(&["ls", "/dev/mapper"])?;
        Ok(open.split_whitespace().any(|name| name == self.device()))
    }
}

/// A disk whose boot sector says this.
fn bootable(line: &str) -> Vec<u8> {
    let mut disk = disk::boot_sector(line);
    // The firmware boots from no disk that has not even one whole cylinder.
    disk.resize(1 << 20, 0);
    disk
}

/// A machine with libvirtd up and the hook installed, as its documentation says.
pub fn host() -> Result<Vm, HarnessError> {
    let vm = Vm::restore(&Image::load_host(LIBVIRT)?)?;
    let guest = vm.guest();
    guest.put_file("/etc/libvirt/hooks/qemu", 0o755, &hooks::path("libvirt"))?;
    // The user is one that a package for hosts with systemd makes; nor is anything else here that comes with systemd.
    guest.script("useradd --system --user-group --no-create-home libvirt-qemu")?;
    guest.put(
        "/etc/libvirt/qemu.conf",
        0o600,
        b"security_driver = \"none\"\nstdio_handler = \"file\"\ncgroup_controllers = []\n",
    )?;
    guest.spawn(&["libvirtd"], DAEMON_LOG)?;
    let up = Guest::wait_for("libvirtd did not answer", PATIENCE, || {
        Ok(guest.run(&["virsh", "list"])?.ok().then_some(()))
    });
    assert!(up.is_ok(), "{up:?}\n{}", guest.get_text(DAEMON_LOG)?);
    Ok(vm)
}

/// Has libvirt know a domain with one disk.
fn define(guest: &Guest, name: &str, metadata: &str, disk: &str) -> Result<(), HarnessError> {
    let xml = format!(
        "<domain type='qemu'>
  <name>{name}</name>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk device='disk' {disk}<driver name='qemu' type='raw'/><target dev='vda' bus='virtio'/></disk>
    <serial type='file'><source path='/srv/{name}.serial'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>"
    );
    guest.put("/srv/domain.xml", 0o600, xml.as_bytes())?;
    guest.run_ok(&["virsh", "define", "/srv/domain.xml"]).map(drop)
}

fn start(guest: &Guest, name: &str) -> Result<Ended, HarnessError> {
    guest.run_with(&["virsh", "start", name], b"", LIMIT)
}

/// Waits until the domain has said this on its serial port.
pub fn wait_said(guest: &Guest, name: &str, line: &str) -> Result<(), HarnessError> {
    let serial = format!("/srv/{name}.serial");
    let heard = Guest::wait_for(&format!("{name} never said {line:?}"), LIMIT, || {
        Ok(guest
            .get_text(&serial)
            .ok()
            .filter(|said| said.contains(line))
            .map(drop))
    });
    assert!(
        heard.is_ok(),
        "{heard:?}\n{}",
        guest.get_text(&serial).unwrap_or_default()
    );
    Ok(())
}

/// What this host runs when it starts and ends a domain, and when a disk is refused, so that all of it is known good.
pub fn rehearse(guest: &Guest) -> Result<(), HarnessError> {
    agent::rehearse(guest)?;
    guest.put("/srv/plain", 0o600, &bootable("rehearsal"))?;
    define(guest, "plain", "", "type='file'><source file='/srv/plain'/>")?;
    let ended = start(guest, "plain")?;
    assert!(ended.ok(), "{ended}");
    wait_said(guest, "plain", "rehearsal")?;
    guest.run_ok(&["virsh", "destroy", "plain"])?;
    // There is no such image.
    let none = Sealed {
        domain: "none",
        image: "/srv/none.luks",
    };
    none.define(guest)?;
    let ended = start(guest, none.domain)?;
    assert!(!ended.ok() && ended.stderr.contains(none.image), "{ended}");
    assert!(!none.is_open(guest)?);
    Ok(())
}

#[test]
fn libvirt_domain_boots_from_its_sealed_disk_until_a_program_that_nobody_approved_has_run() -> Result<(), HarnessError>
{
    let stage = enrolled_on(host()?, HOOK_DEADLINE)?;
    let guest = stage.vm.guest();
    rehearse(guest)?;
    stage.capture()?;

    seal(&stage, MAIL.image, &bootable(LINE))?;
    MAIL.define(guest)?;
    MAIL.start(guest)?;
    wait_said(guest, MAIL.domain, LINE)?;
    let audit = stage.verifier.run_ok(&["audit", "show"])?;
    assert!(audit.contains("for \"mail\""), "{audit}");
    MAIL.end(guest)?;

    let digest = stage.spoil()?;
    let ended = start(guest, MAIL.domain)?;
    assert!(
        !ended.ok() && ended.stderr.contains(ROGUE) && ended.stderr.contains(&digest),
        "{ended}"
    );
    assert!(!MAIL.is_open(guest)?);
    Ok(())
}
