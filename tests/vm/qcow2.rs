//! Disks in qcow2, which qemu-nbd opens: by approved programs alone, and with the key in no other process.

use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent, QCOW2};
use assay_tests::guest::Guest;
use assay_verifier::keystore::{FileKeyStore, KeySource as _};

use crate::common::{PATIENCE, enrolled, enrolled_with, stop};
use crate::enforce::{ENFORCE, capture};
use crate::leases::{SEARCH, assert_unseen, keys};

const IMAGE: &str = "/root/vm.qcow2";
const NAME: &str = "vm";

/// The one qemu-nbd.
fn server(guest: &Guest) -> Result<i32, HarnessError> {
    let found = guest.run_ok(&["pgrep", "qemu-nbd"])?;
    Ok(found.trim().parse().expect("one process"))
}

#[test]
fn vm_enforce_opens_qcow2_by_approved_programs_alone() -> Result<(), HarnessError> {
    let stage = enrolled_with(ENFORCE)?;
    let guest = stage.vm.guest();
    agent::rehearse(guest)?;
    // What cannot wait is refused until it is extended.
    Guest::wait_for("no module", PATIENCE, || {
        Ok(guest.run(&["bash", "-euc", QCOW2])?.ok().then_some(()))
    })?;
    guest.script("cp -p /etc/hostname /root/copy; pgrep none || true; ls /dev/mapper")?;
    capture(&stage)?;
    stage.disk_as("qcow2-luks", IMAGE, b"enforced")?;
    stage.open_as(IMAGE, NAME)?;
    guest.run_ok(&["mount", "-o", "ro", "/dev/mapper/vm", "/mnt/disk"])?;
    assert_eq!(guest.run_ok(&["cat", "/mnt/disk/hello"])?, "enforced");
    guest.run_ok(&["umount", "/mnt/disk"])?;
    server(guest)?;
    guest.run_ok(&["assay-agent", "lock", NAME])?;

    // Another qemu-nbd may not run, and gets no key therefore.
    guest.script("cp -p /usr/bin/qemu-nbd /root/kept; printf x >> /usr/bin/qemu-nbd")?;
    let refused = agent::unlock(guest, IMAGE, 60)?;
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.stderr.contains("qemu-nbd cannot be run"), "{refused}");
    assert_eq!(guest.run_ok(&["ls", "/dev/mapper"])?.trim(), "control");
    guest.script("cp -p /root/kept /usr/bin/qemu-nbd")?;
    stage.open_as(IMAGE, NAME)?;
    guest.run_ok(&["assay-agent", "lock", NAME])?;
    assert_eq!(guest.run(&["pgrep", "qemu-nbd"])?.code, Some(1));
    Ok(())
}

#[test]
fn vm_the_key_of_a_qcow2_disk_is_in_qemu_nbd_alone() -> Result<(), HarnessError> {
    let mut stage = enrolled()?;
    let guest = stage.vm.guest();
    agent::rehearse(guest)?;
    guest.script(QCOW2)?;
    stage.capture()?;
    stage.disk_as("qcow2-luks", IMAGE, b"x")?;
    let stored = FileKeyStore::open(&stage.verifier.state_dir()).expect("the verifier's keys");
    let key = stored.get(keys(&stage)?[0]).expect("the key");
    let passphrase = String::from_utf8_lossy(key.passphrase.expose()).into_owned();
    stage.open_as(IMAGE, NAME)?;
    let server = server(guest)?;

    let (first, second) = passphrase.split_at(32);
    let needles: String = [first, second].map(|half| hex::encode(half) + "\n").concat();
    guest.put("/root/needles", 0o600, needles.as_bytes())?;
    let count = |pid: i32| -> Result<Vec<u32>, HarnessError> {
        let counts = guest.run_ok(&["perl", "-e", SEARCH, &pid.to_string(), "/root/needles"])?;
        Ok(counts.lines().map(|line| line.parse().expect("a number")).collect())
    };
    // It has what it was given, so the search finds what there is.
    assert!(count(server)?.iter().all(|count| *count > 0));
    assert_eq!(
        count(stage.agent.pid())?,
        [0, 0],
        "parts of the key in the agent's memory"
    );
    assert_unseen(guest, server, [first, second])?;
    let limits = guest.get_text(&format!("/proc/{server}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size"));
    let core: Vec<&str> = core.unwrap_or_default().split_whitespace().skip(4).collect();
    assert_eq!(core, ["0", "0", "bytes"], "{limits}");

    // What an agent had not got open when it ended, the next one ends; a disk that is open stays.
    guest.script(
        "truncate -s 1M /root/stray
         qemu-nbd --format=raw --socket=/run/assay/nbd7.sock --connect=/dev/nbd7 /root/stray",
    )?;
    let servers = || guest.run_ok(&["pgrep", "qemu-nbd"]).map(|found| found.lines().count());
    assert_eq!(servers()?, 2);
    stop(guest, &stage.agent)?;
    stage.agent = Agent::start(guest)?;
    Guest::wait_for("the stray is still there", PATIENCE, || {
        Ok((servers()? == 1).then_some(()))
    })?;
    guest.run_ok(&["head", "-c", "1024", "/dev/mapper/vm"])?;
    Ok(())
}
