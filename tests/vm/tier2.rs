//! Tier 2: LSM programs on a kernel whose hash they may not call. The kernel has IMA; the configuration says to do without.

use assay_ebpf::flags;
use assay_evidence::event::LoadKind;
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;
use assay_tests::vm::Vm;

use crate::common::{machine, put_new_program, sha256sum, wait_log_matches_pcr};
use crate::log::{LOG, Log};

fn configure(guest: &Guest, mode: &str) -> Result<(), HarnessError> {
    let text = format!("[measure]\nmode = \"{mode}\"\ntier = 2\nprotect = false\n");
    guest.put("/etc/assay/agent.toml", 0o644, text.as_bytes())
}

/// The digests of a path's records that are loads, with the flags of each.
fn loaded(log: &Log, path: &str) -> Vec<(LoadKind, String, u32)> {
    let not_loads = flags::AHEAD | flags::REFUSED;
    let records = log.of(path).into_iter();
    records.filter(|(_, _, marks)| marks & not_loads == 0).collect()
}

fn wait_loaded(vm: &Vm, path: &str, count: usize) -> Result<Log, HarnessError> {
    Log::wait(vm.guest(), LOG, &format!("{count} loads of {path}"), |log| {
        loaded(log, path).len() >= count
    })
}

#[test]
fn vm_tier2_observe_records_the_digests_that_sha256sum_finds() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, "observe")?;
    let agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/a")?;
    let first = sha256sum(&vm, "/root/a")?;
    guest.script("/root/a; /root/a; printf x >> /root/a")?;
    let second = sha256sum(&vm, "/root/a")?;
    guest.script(
        "/root/a
         cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') /root/library.so; printf x >> /root/library.so
         LD_PRELOAD=/root/library.so /usr/bin/true
         echo 'exit 0' > /root/script.sh; bash /root/script.sh",
    )?;
    wait_loaded(&vm, "/root/library.so", 1)?;
    let log = wait_loaded(&vm, "/root/script.sh", 1)?;
    let hashed = flags::USER_HASH;
    assert_eq!(
        loaded(&log, "/root/a"),
        [(LoadKind::Program, first, hashed), (LoadKind::Program, second, hashed)]
    );
    assert_eq!(
        loaded(&log, "/root/library.so"),
        [(LoadKind::Mapping, sha256sum(&vm, "/root/library.so")?, hashed)]
    );
    assert_eq!(
        loaded(&log, "/root/script.sh"),
        [(LoadKind::Argument, sha256sum(&vm, "/root/script.sh")?, hashed)]
    );
    let start = log.starts().first().map(|start| (start.tier, start.blind.is_empty()));
    assert_eq!(start, Some((2, false)), "the log says what this tier cannot see");
    let status = agent.status()?;
    assert_eq!(status.get("tier").and_then(serde_json::Value::as_u64), Some(2));
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    wait_log_matches_pcr(&vm, &agent)
}

#[test]
fn vm_tier2_hold_lets_programs_wait_and_refuses_what_was_not_measured() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, "hold")?;
    let agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/a")?;
    guest.run_ok(&["/root/a"])?;
    let log = wait_loaded(&vm, "/root/a", 1)?;
    assert_eq!(
        loaded(&log, "/root/a"),
        [(LoadKind::Program, sha256sum(&vm, "/root/a")?, flags::USER_HASH)]
    );
    guest
        .script("cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') /root/library.so; printf x >> /root/library.so")?;
    let preload = "LD_PRELOAD=/root/library.so /usr/bin/true 2>&1 | grep -c 'cannot be preloaded' || true";
    assert_eq!(guest.script(preload)?.trim(), "1", "its first load is refused");
    let log = Log::wait(guest, LOG, "the refusal, and its measuring", |log| {
        log.of("/root/library.so").len() >= 2
    })?;
    let digest = sha256sum(&vm, "/root/library.so")?;
    assert_eq!(
        log.of("/root/library.so"),
        [
            (LoadKind::Mapping, digest.clone(), flags::REFUSED | flags::USER_HASH),
            (LoadKind::Mapping, digest.clone(), flags::AHEAD | flags::USER_HASH)
        ]
    );
    wait_log_matches_pcr(&vm, &agent)?;
    assert_eq!(guest.script(preload)?.trim(), "0", "and from then on it is known");
    let log = wait_loaded(&vm, "/root/library.so", 1)?;
    assert_eq!(loaded(&log, "/root/library.so"), [(LoadKind::Mapping, digest, 0)]);
    // While no agent runs, what is known runs and nothing else does: a byte more makes it unknown.
    agent.kill()?;
    guest.run_ok(&["/root/a"])?;
    guest.script("printf x >> /root/a")?;
    assert_eq!(
        guest.script("/root/a 2>&1 || echo refused")?.lines().last(),
        Some("refused")
    );
    Ok(())
}
