//! The same promises on every kernel that there are machines for, and what the other ways to boot them give.

use std::collections::BTreeMap;

use assay_evidence::digest::Algorithm;
use assay_evidence::event::LoadKind;
use assay_evidence::imalog::{self, Extension};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;
use assay_tests::vm::{Image, Variant, Vm};

use crate::common::{PATIENCE, configure, put_new_program, sha256sum};
use crate::log::{LOG, Log};

/// The saved machine with a kernel of that series, booted that way; checked to be what it is called.
fn machine(series: &str, variant: Variant) -> Result<Vm, HarnessError> {
    let vm = Vm::restore(&Image::load_kernel(series)?.booted(variant))?;
    let release = vm.guest().ping()?.1;
    assert!(release.starts_with(&format!("{series}.")), "{release} is no {series}");
    let modules = vm.guest().get_text("/sys/kernel/security/lsm")?;
    let has_bpf = modules.trim().split(',').any(|name| name == "bpf");
    assert_eq!(has_bpf, variant != Variant::NoBpfLsm, "{modules}");
    Ok(vm)
}

/// Tier 1: from the agent's start to loads in a log that the PCR confirms.
fn measures(series: &str) -> Result<(), HarnessError> {
    let vm = machine(series, Variant::Default)?;
    let guest = vm.guest();
    configure(guest, "[log]\nlevel = \"debug\"\n")?;
    let agent = Agent::start(guest)?;
    are_verified_with_room(series, &agent.journal());
    put_new_program(&vm, "/root/new")?;
    let digest = sha256sum(&vm, "/root/new")?;
    guest.run_ok(&["/root/new"])?;
    guest.run_ok(&["modprobe", "dummy"])?;
    Log::wait(guest, LOG, "a module", |log| {
        log.loads().iter().any(|load| load.kind.is_module())
    })?;
    let log = Log::settled(&vm, LOG)?;
    assert_eq!(log.of("/root/new"), [(LoadKind::Program, digest, 0)]);
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    log.assert_no_gap();
    let start = log.start();
    assert_eq!(start.tier, 1);
    assert_eq!(start.kernel_release, guest.ping()?.1);
    Ok(())
}

/// How many instructions the kernel went through in each program, as the agent tells: far from the million at which it gives up. With
/// `--nocapture` they are shown, for the figures in kernel.md.
fn are_verified_with_room(series: &str, journal: &str) {
    let counts: BTreeMap<&str, u32> = journal
        .lines()
        .filter_map(|line| {
            let (_, said) = line.split_once("verified program=\"")?;
            let (program, count) = said.split_once("\" instructions=")?;
            Some((program, count.trim().parse().expect("a number")))
        })
        .collect();
    println!("Linux {series}: {counts:?}");
    assert_eq!(counts.len(), 28, "{counts:?}");
    assert!(counts.values().all(|count| *count < 500_000), "{counts:?}");
}

#[test]
fn vm_linux_6_1_measures() -> Result<(), HarnessError> {
    measures("6.1")
}

#[test]
fn vm_linux_6_12_measures() -> Result<(), HarnessError> {
    measures("6.12")
}

#[test]
fn vm_linux_7_measures() -> Result<(), HarnessError> {
    measures("7")
}

/// Without `bpf` among the security modules: the machine, its TPM, and the tracing that is left to measure by.
fn has_no_bpf_lsm(series: &str) -> Result<(), HarnessError> {
    let vm = machine(series, Variant::NoBpfLsm)?;
    let guest = vm.guest();
    let before = guest.run_ok(&["tpm2", "pcrread", "sha256:0,13"])?;
    assert!(!before.contains(&format!("0 : 0x{}", "0".repeat(64))), "{before}");
    guest.run_ok(&["tpm2", "pcrextend", &format!("13:sha256={}", "11".repeat(32))])?;
    assert_ne!(guest.run_ok(&["tpm2", "pcrread", "sha256:0,13"])?, before);
    guest
        .script("test -e /sys/kernel/tracing/kprobe_events && mountpoint -q /sys/fs/bpf")
        .map(drop)
}

#[test]
fn vm_linux_5_10_boots_without_bpf_lsm() -> Result<(), HarnessError> {
    has_no_bpf_lsm("5.10")
}

#[test]
fn vm_linux_6_12_boots_without_bpf_lsm() -> Result<(), HarnessError> {
    has_no_bpf_lsm("6.12")
}

/// What IMA's own log holds of a path.
fn ima_has(vm: &Vm, path: &str) -> Result<Option<String>, HarnessError> {
    let log = vm
        .guest()
        .get_text("/sys/kernel/security/ima/ascii_runtime_measurements")?;
    let line = log.lines().find(|line| line.split(' ').nth(4) == Some(path));
    Ok(line.and_then(|line| line.split(' ').nth(3)).map(str::to_owned))
}

/// IMA measures loads; what root reads only where `reads`.
fn ima_measures(variant: Variant, reads: bool) -> Result<Vm, HarnessError> {
    let vm = machine("6.12", variant)?;
    let guest = vm.guest();
    put_new_program(&vm, "/root/new")?;
    guest.script(
        "cd /root; printf text > read; cp new /tmp/new; cp $(modinfo -n dummy) dummy.ko.xz; busybox xzcat dummy.ko.xz > dummy.ko
         cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so",
    )?;
    let digest = |path: &str| Ok::<_, HarnessError>(Some(format!("sha256:{}", sha256sum(&vm, path)?)));
    let loads = ["/root/new", "/root/library.so", "/root/dummy.ko"];
    let before = guest.sysfs_pcr(10)?;
    guest.script("cat /root/read; /tmp/new; LD_PRELOAD=/root/library.so /root/new; insmod /root/dummy.ko")?;
    assert_ne!(guest.sysfs_pcr(10)?, before);
    for path in loads {
        assert_eq!(ima_has(&vm, path)?, digest(path)?, "{path}");
    }
    assert_eq!(ima_has(&vm, "/root/read")?.is_some(), reads);
    assert_eq!(
        ima_has(&vm, "/tmp/new")?,
        None,
        "IMA's own policy leaves file systems in memory out"
    );
    Ok(vm)
}

#[test]
fn vm_ima_tcb_measures_loads_and_what_root_reads() -> Result<(), HarnessError> {
    let vm = ima_measures(Variant::ImaTcb, true)?;
    ima_replays(&vm)
}

/// The kernel's list, in its common form and in that of the bank, leads to what PCR 10 shows.
fn ima_replays(vm: &Vm) -> Result<(), HarnessError> {
    for (name, list) in [("", Algorithm::Sha1), ("_sha256", Algorithm::Sha256)] {
        let path = format!("/sys/kernel/security/ima/binary_runtime_measurements{name}");
        // Something may be measured between the two.
        Guest::wait_for("IMA's list and PCR 10 never agreed", PATIENCE, || {
            let bytes = vm.guest().get(&path)?;
            let log = imalog::parse(&bytes, list).expect("a list of IMA's");
            let pcrs = log.replay(Algorithm::Sha256, Extension::OwnDigest, &BTreeMap::new());
            let replayed: String = pcrs[&10].iter().map(|byte| format!("{byte:02x}")).collect();
            let shown = vm.guest().sysfs_pcr(10)?;
            Ok((log.entries().len() > 1 && replayed == shown).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn vm_ima_exec_measures_loads_only() -> Result<(), HarnessError> {
    let mut vm = ima_measures(Variant::ImaExec, false)?;
    vm.guest().run_ok(&["sync"])?;
    // The kernel forgets this policy at a reboot; the machine does not.
    vm.reset()?;
    vm.guest().run_ok(&["/root/new"])?;
    assert!(ima_has(&vm, "/root/new")?.is_some());
    assert_eq!(ima_has(&vm, "/root/read")?, None);
    Ok(())
}
