//! Hosts that lack something, and hosts that break: each says what is wrong and what to do.

use std::time::Duration;

use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::vm::{BootOptions, Image, Vm};

use crate::common::{machine, trusted};

/// Runs the agent, which must give up by itself with status 1, and gives what it said.
fn agent_gives_up(vm: &Vm, arguments: &[&str]) -> Result<String, HarnessError> {
    let mut command = vec!["assay-agent"];
    command.extend_from_slice(arguments);
    let ended = vm.guest().run_with(&command, b"", Duration::from_secs(180))?;
    assert_eq!(ended.code, Some(1), "{ended}");
    Ok(ended.stderr)
}

#[test]
fn vm_a_kernel_without_bpf_lsm_says_what_is_missing_and_how_to_turn_it_on() -> Result<(), HarnessError> {
    let options = BootOptions {
        cmdline: "lsm=lockdown,yama,apparmor".to_owned(),
        ..BootOptions::default()
    };
    let vm = Vm::boot(&Image::load()?, &options)?;
    // By itself the agent falls to tier 3 there.
    vm.guest()
        .put("/etc/assay/agent.toml", 0o644, b"[measure]\ntier = 1\n")?;
    let said = agent_gives_up(&vm, &["run"])?;
    assert!(said.contains("lsm=") && said.contains("bpf"), "{said}");
    Ok(())
}

#[test]
fn vm_a_host_without_a_tpm_says_so() -> Result<(), HarnessError> {
    let options = BootOptions {
        without_tpm: true,
        ..BootOptions::default()
    };
    let vm = Vm::boot(&Image::load()?, &options)?;
    let said = agent_gives_up(&vm, &["run"])?;
    assert!(said.contains("/dev/tpmrm0"), "{said}");
    Ok(())
}

#[test]
fn vm_an_unknown_configuration_key_is_named() -> Result<(), HarnessError> {
    let vm = machine()?;
    vm.guest()
        .put("/etc/assay/agent.toml", 0o644, b"listne = \"0.0.0.0:8443\"\n")?;
    let said = agent_gives_up(&vm, &["run"])?;
    assert!(
        said.contains("listne") && said.contains("/etc/assay/agent.toml"),
        "{said}"
    );
    Ok(())
}

#[test]
fn vm_a_full_log_folder_ends_the_agent_and_nothing_is_half_done() -> Result<(), HarnessError> {
    let vm = machine()?;
    vm.guest()
        .script("mkdir -p /run/assay; mount -t tmpfs -o size=8k tmpfs /run/assay")?;
    let said = agent_gives_up(&vm, &["run"])?;
    assert!(said.contains("/run/assay"), "{said}");
    // With room again it starts, and log and PCR agree.
    vm.guest().script("umount /run/assay")?;
    let agent = Agent::start(vm.guest())?;
    assert!(
        agent
            .status()?
            .get("records")
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0)
            > 0
    );
    Ok(())
}

#[test]
fn vm_an_unreachable_verifier_is_retried_until_the_deadline_and_then_refused() -> Result<(), HarnessError> {
    let mut stage = trusted()?;
    stage.sealed_disk("/root/disk.img", b"x")?;
    stage.verifier.stop();
    let ended = agent::unlock(stage.vm.guest(), "/root/disk.img", 4)?;
    assert_eq!(ended.code, Some(4), "{ended}");
    // One that comes back within the deadline serves.
    let guest = stage.vm.guest().clone();
    let waiting = std::thread::spawn(move || agent::unlock(&guest, "/root/disk.img", 90));
    std::thread::sleep(Duration::from_secs(3));
    stage.verifier.resume()?;
    let ended = waiting.join().expect("no panic")?;
    assert!(ended.ok(), "{ended}");
    Ok(())
}
