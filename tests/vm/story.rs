//! The main job, from trust to refusal, and back.

use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};

use crate::common::{HOST, ROGUE, trusted};

#[test]
fn vm_trusted_released_opened_then_refused_and_allowed_again() -> Result<(), HarnessError> {
    let stage = trusted()?;
    let guest = stage.vm.guest();
    stage.sealed_disk("/root/disk.img", b"from the sealed disk")?;

    let ended = agent::unlock(guest, "/root/disk.img", 60)?;
    assert!(ended.ok(), "{ended}\n{}", stage.agent.journal());
    let device = ended.stdout.trim();
    assert!(device.starts_with("/dev/mapper/assay-"), "{device}");
    guest.run_ok(&["mount", "-o", "ro", device, "/mnt/disk"])?;
    assert_eq!(guest.run_ok(&["cat", "/mnt/disk/hello"])?, "from the sealed disk");
    guest.run_ok(&["umount", "/mnt/disk"])?;
    guest.run_ok(&["assay-agent", "lock", device.trim_start_matches("/dev/mapper/")])?;

    stage.spoil()?;
    let refused = agent::unlock(guest, "/root/disk.img", 60)?;
    assert_eq!(refused.code, Some(3), "{refused}");
    assert!(refused.stderr.contains(ROGUE), "{refused}");

    // The operator looks at it, approves what ran, and the host is trusted again.
    for reason in &stage.wait("untrusted", |host| host.state == "untrusted")?.reasons {
        let sha256 = reason
            .split("sha256:")
            .nth(1)
            .map(|rest| rest.chars().take(64).collect::<String>());
        if let Some(sha256) = sha256 {
            stage.verifier.run_ok(&["policy", "allow", &sha256])?;
        }
    }
    stage.wait("trusted again", |host| host.state == "trusted")?;
    let ended = agent::unlock(guest, "/root/disk.img", 60)?;
    assert!(ended.ok(), "{ended}");
    Ok(())
}

#[test]
fn vm_a_host_without_a_policy_gets_no_key() -> Result<(), HarnessError> {
    let stage = trusted()?;
    stage.sealed_disk("/root/disk.img", b"x")?;
    stage.verifier.run_ok(&["host", "remove", HOST])?;
    let refused = agent::unlock(stage.vm.guest(), "/root/disk.img", 20)?;
    assert_eq!(refused.code, Some(3), "{refused}");
    Ok(())
}

#[test]
fn vm_a_reboot_starts_a_new_log_and_the_host_is_trusted_again() -> Result<(), HarnessError> {
    let mut stage = trusted()?;
    let before = stage.vm.guest().get("/run/assay/log.cel")?;
    // The reset button spares what has reached the disk, and this disk has no journal.
    stage.vm.guest().run_ok(&["sync"])?;
    stage.vm.reset()?;
    stage.wait("unreachable while its agent is down", |host| {
        host.state == "unreachable"
    })?;

    // Somebody brings the old boot's log back: the agent knows its own boot, and the TPM knows better than any log.
    let guest = stage.vm.guest();
    guest.put("/run/assay/log.cel", 0o600, &before)?;
    let agent = Agent::start(guest)?;
    stage.wait("trusted in its new boot", |host| host.state == "trusted")?;
    agent::rehearse(guest)?;
    stage.sealed_disk("/root/disk.img", b"x")?;
    let ended = agent::unlock(guest, "/root/disk.img", 60)?;
    assert!(ended.ok(), "{ended}");
    crate::common::wait_log_matches_pcr(&stage.vm, &agent)
}
