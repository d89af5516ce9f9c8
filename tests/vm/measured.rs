//! What is measured: every way in which code gets in, and that none of it gets lost.

use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;

use crate::common::{PATIENCE, machine, put_new_program, sha256sum, wait_log_matches_pcr};

/// Waits until the log has a line that contains all of `words`.
fn wait_logged(agent: &Agent, words: &[&str]) -> Result<String, HarnessError> {
    Guest::wait_for(&format!("the log never showed {words:?}"), PATIENCE, || {
        let log = agent.log()?;
        Ok(log
            .lines()
            .find(|line| words.iter().all(|word| line.contains(word)))
            .map(str::to_owned))
    })
}

#[test]
fn vm_programs_scripts_libraries_and_modules_are_measured() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;

    put_new_program(&vm, "/root/new-program")?;
    guest.run_ok(&["/root/new-program"])?;
    guest.put("/root/script", 0o755, b"#!/bin/sh\nexit 0\n")?;
    guest.run_ok(&["/root/script"])?;
    guest.script(
        "cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') /root/library.so; printf x >> /root/library.so
         LD_PRELOAD=/root/library.so /usr/bin/true
         cd /root; xz -dc < $(modinfo -n dummy) > dummy.ko 2>/dev/null || busybox xz -dc < $(modinfo -n dummy) > dummy.ko
         insmod dummy.ko",
    )?;
    // kmod of this release unpacks a compressed module itself and gives the kernel the buffer.
    guest.run_ok(&["modprobe", "veth"])?;

    for (kind, path) in [
        ("program", "/root/new-program"),
        ("program", "/root/script"),
        ("mapping", "/root/library.so"),
        ("module-file", "/root/dummy.ko"),
    ] {
        let digest = sha256sum(&vm, path)?;
        wait_logged(&agent, &[kind, path, &digest])?;
    }
    wait_logged(&agent, &["module-", "modprobe"])?;
    wait_log_matches_pcr(&vm, &agent)
}

#[test]
fn vm_a_changed_file_is_measured_again_and_an_unchanged_one_is_not() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/twice")?;
    let first = sha256sum(&vm, "/root/twice")?;
    guest.run_ok(&["/root/twice"])?;
    guest.run_ok(&["/root/twice"])?;
    wait_logged(&agent, &["/root/twice", &first])?;
    guest.script("printf y >> /root/twice")?;
    let second = sha256sum(&vm, "/root/twice")?;
    guest.run_ok(&["/root/twice"])?;
    wait_logged(&agent, &["/root/twice", &second])?;
    let log = agent.log()?;
    assert_eq!(
        log.lines()
            .filter(|line| line.contains("/root/twice") && line.contains(&first))
            .count(),
        1,
        "{log}"
    );
    Ok(())
}

#[test]
fn vm_an_agent_killed_with_events_queued_loses_none() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;
    guest.run_ok(&["true"])?;
    for number in 0..20 {
        put_new_program(&vm, &format!("/root/queued-{number}"))?;
    }
    // Half of them run just before it dies, the rest while nobody listens: the pinned programs keep queueing.
    guest.script("for i in 0 1 2 3 4 5 6 7 8 9; do /root/queued-$i; done")?;
    agent.kill()?;
    guest.script("for i in 10 11 12 13 14 15 16 17 18 19; do /root/queued-$i; done")?;

    let agent = Agent::start(guest)?;
    wait_logged(&agent, &["/root/queued-19"])?;
    let log = agent.log()?;
    for number in 0..20 {
        let path = format!("/root/queued-{number} ");
        assert!(log.lines().any(|line| line.contains(&path)), "{path}is missing:\n{log}");
    }
    assert!(!log.to_lowercase().contains("violation"), "{log}");
    wait_log_matches_pcr(&vm, &agent)
}
