//! libvirt with QEMU: a domain whose boot sector, on a sealed disk, is all its software. Emulated within an emulated machine,
//! that is the largest guest that is not slow.

use std::time::Duration;

use assay_tests::HarnessError;
use assay_tests::agent;
use assay_tests::guest::{Ended, Guest};
use assay_tests::hooks;
use assay_tests::vm::{Image, LIBVIRT, Vm};

use crate::common::{HOST, PATIENCE, enrolled_on, put_new_program, sha256sum};
use crate::seal;

/// What the domain says on its serial port.
const LINE: &str = "booted from a sealed disk";
const IMAGE: &str = "/srv/mail.luks";
const DAEMON_LOG: &str = "/var/log/libvirtd.log";
const SERIAL: &str = "/srv/mail.serial";
/// Real mode: clears DS, sends what follows to the first serial port up to a zero byte, and halts for ever.
const CODE: [u8; 22] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0xfc, // cld
    0xbe, 0x16, 0x7c, // mov si, 0x7c16: behind this
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz end
    0xee, // out dx, al
    0xeb, 0xf8, // jmp next
    0xf4, // end: hlt
    0xeb, 0xfd, // jmp end
];
/// Under emulation within emulation.
const LIMIT: Duration = Duration::from_secs(300);

/// A disk whose boot sector says this.
fn bootable(line: &str) -> Vec<u8> {
    let mut disk = [&CODE, line.as_bytes()].concat();
    disk.resize(510, 0);
    disk.extend([0x55, 0xaa]);
    // The firmware boots from no disk that has not even one whole cylinder.
    disk.resize(1 << 20, 0);
    disk
}

/// A machine with libvirtd up and the hook installed, as its documentation says.
fn host() -> Result<Vm, HarnessError> {
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

fn define_sealed(guest: &Guest) -> Result<(), HarnessError> {
    let metadata = format!(
        "<assay:disks xmlns:assay='urn:assay:libvirt:1'><assay:disk name='assay-mail' image='{IMAGE}'/></assay:disks>"
    );
    define(
        guest,
        "mail",
        &metadata,
        "type='block'><source dev='/dev/mapper/assay-mail'/>",
    )
}

fn start(guest: &Guest, name: &str) -> Result<Ended, HarnessError> {
    guest.run_with(&["virsh", "start", name], b"", LIMIT)
}

fn wait_said(guest: &Guest, serial: &str, line: &str) -> Result<(), HarnessError> {
    Guest::wait_for(&format!("{serial} never said {line:?}"), LIMIT, || {
        Ok(guest.get_text(serial).ok().filter(|said| said.contains(line)).map(drop))
    })
}

fn is_open(guest: &Guest) -> Result<bool, HarnessError> {
    Ok(guest.run_ok(&["ls", "/dev/mapper"])?.contains("assay-mail"))
}

/// What this host runs when it starts and ends a domain, and when a disk is refused, so that all of it is known good.
fn rehearse(guest: &Guest) -> Result<(), HarnessError> {
    agent::rehearse(guest)?;
    guest.put("/srv/plain", 0o600, &bootable("rehearsal"))?;
    define(guest, "plain", "", "type='file'><source file='/srv/plain'/>")?;
    let ended = start(guest, "plain")?;
    assert!(ended.ok(), "{ended}");
    wait_said(guest, "/srv/plain.serial", "rehearsal")?;
    guest.run_ok(&["virsh", "destroy", "plain"])?;
    define_sealed(guest)?;
    // There is no such image yet.
    let ended = start(guest, "mail")?;
    assert!(!ended.ok() && ended.stderr.contains(IMAGE), "{ended}");
    assert!(!is_open(guest)?);
    Ok(())
}

#[test]
fn libvirt_domain_boots_from_its_sealed_disk_until_a_program_that_nobody_approved_has_run() -> Result<(), HarnessError>
{
    // The hook's own deadline is tested elsewhere.
    let stage = enrolled_on(host()?, "[unlock]\nhook_deadline_s = 150\n")?;
    let guest = stage.vm.guest();
    rehearse(guest)?;
    stage.verifier.run_ok(&["policy", "capture", HOST])?;
    stage.wait("trusted", |host| host.state == "trusted")?;

    seal(&stage, IMAGE, &bootable(LINE))?;
    let ended = start(guest, "mail")?;
    assert!(ended.ok(), "{ended}");
    wait_said(guest, SERIAL, LINE)?;
    let audit = stage.verifier.run_ok(&["audit", "show"])?;
    assert!(audit.contains("for \"mail\""), "{audit}");
    guest.run_ok(&["virsh", "destroy", "mail"])?;
    // libvirt calls `release` when all else is done.
    Guest::wait_for("the disk stays open", PATIENCE, || Ok((!is_open(guest)?).then_some(())))?;

    put_new_program(&stage.vm, "/root/rogue")?;
    guest.run_ok(&["/root/rogue"])?;
    let digest = sha256sum(&stage.vm, "/root/rogue")?;
    stage.wait("untrusted for /root/rogue", |host| {
        host.state == "untrusted" && host.reasons.iter().any(|reason| reason.contains("/root/rogue"))
    })?;
    let ended = start(guest, "mail")?;
    assert!(
        !ended.ok() && ended.stderr.contains("/root/rogue") && ended.stderr.contains(&digest),
        "{ended}"
    );
    assert!(!is_open(guest)?);
    Ok(())
}
