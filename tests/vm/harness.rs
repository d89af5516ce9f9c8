//! What the machines themselves promise.

use std::time::{Duration, Instant};

use assay_tests::HarnessError;
use assay_tests::guest::Guest;
use assay_tests::vm::{BootOptions, Image, RestoreOptions, Vm};

use crate::common::{PATIENCE, pcr13};

fn pcrs(vm: &Vm) -> Result<String, HarnessError> {
    vm.guest().run_ok(&["tpm2", "pcrread", "sha256:0,1,2,3,4,5,6,7,8,9,13"])
}

#[test]
fn vm_runs_programs_and_carries_files() -> Result<(), HarnessError> {
    let vm = Vm::restore(&Image::load()?)?;
    let guest = vm.guest();

    let ended = guest.run_with(
        &["sh", "-c", "cat; echo err >&2; exit 7"],
        b"in",
        Duration::from_secs(60),
    )?;
    assert_eq!(
        (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
        (Some(7), "in", "err\n")
    );
    let late = guest.run_with(&["sleep", "100"], b"", Duration::from_millis(300))?;
    assert!(late.timed_out && !late.ok());
    assert!(guest.run(&["/no/such/program"]).is_err());

    guest.put("/tmp/new/file", 0o640, b"content")?;
    assert_eq!(guest.get("/tmp/new/file")?, b"content");
    assert_eq!(guest.run_ok(&["stat", "-c", "%a", "/tmp/new/file"])?, "640\n");

    let pid = guest.spawn(&["sleep", "1000"], "/tmp/sleep.log")?;
    assert!(guest.wait(pid, Duration::ZERO)?.timed_out);
    guest.signal(pid, 15)?;
    assert_eq!(guest.wait(pid, Duration::from_secs(60))?.signal, Some(15));
    Ok(())
}

#[test]
fn vm_has_what_a_host_has() -> Result<(), HarnessError> {
    let vm = Vm::restore(&Image::load()?)?;
    let guest = vm.guest();
    let lsm = guest.get_text("/sys/kernel/security/lsm")?;
    assert!(lsm.split(',').any(|name| name == "bpf"), "{lsm}");
    guest.script("test -c /dev/tpmrm0")?;
    assert!(guest.get("/sys/kernel/security/tpm0/binary_bios_measurements")?.len() > 1000);
    guest.script("test -e /sys/kernel/btf/vmlinux && mountpoint -q /sys/fs/bpf")?;
    // The guest believes the date that this machine believes, not that of the snapshot.
    let seconds: u64 = guest.run_ok(&["date", "+%s"])?.trim().parse().expect("a number");
    let here = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs();
    assert!(here.abs_diff(seconds) < 60, "guest {seconds}, here {here}");
    Ok(())
}

#[test]
fn vm_snapshot_brings_the_tpm_back_and_tests_do_not_meet() -> Result<(), HarnessError> {
    let image = Image::load()?;
    let first = Vm::restore(&image)?;
    let before = pcrs(&first)?;
    // The firmware and the kernel were measured when the machine was booted, before it was saved.
    assert!(!before.contains(&format!("0 : 0x{}", "0".repeat(64))), "{before}");
    first
        .guest()
        .run_ok(&["tpm2", "pcrextend", &format!("13:sha256={}", "11".repeat(32))])?;
    assert_ne!(pcrs(&first)?, before);

    let second = Vm::restore(&image)?;
    assert_eq!(pcrs(&second)?, before);
    Ok(())
}

#[test]
fn vm_reset_is_a_reboot() -> Result<(), HarnessError> {
    let mut vm = Vm::restore(&Image::load()?)?;
    vm.guest()
        .run_ok(&["tpm2", "pcrextend", &format!("13:sha256={}", "11".repeat(32))])?;
    vm.guest().put("/root/kept", 0o600, b"kept")?;
    vm.guest().put("/run/lost", 0o600, b"lost")?;
    vm.guest().run_ok(&["sync"])?;
    let started = Instant::now();
    vm.reset()?;
    assert!(started.elapsed() > Duration::from_millis(100));
    assert!(
        pcrs(&vm)?.contains(&format!("13: 0x{}", "0".repeat(64))),
        "{}",
        pcrs(&vm)?
    );
    assert_eq!(vm.guest().get("/root/kept")?, b"kept");
    assert!(vm.guest().get("/run/lost").is_err());
    Ok(())
}

/// Waits for one signal, and prints who sent it.
const WHO_SIGNALS: &str = "
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print('ready', flush=True)
print('from', signal.sigwaitinfo([signal.SIGUSR1]).si_pid, flush=True)";

#[test]
fn vm_signals_come_from_pid_1_when_they_must() -> Result<(), HarnessError> {
    let vm = Vm::restore(&Image::load()?)?;
    let guest = vm.guest();
    let sender = |log: &str, send: &dyn Fn(i32) -> Result<(), HarnessError>| {
        let pid = guest.spawn(&["python3", "-c", WHO_SIGNALS], log)?;
        Guest::wait_for("no program waited for a signal", PATIENCE, || {
            Ok(guest.get_text(log)?.contains("ready").then_some(()))
        })?;
        send(pid)?;
        assert!(guest.wait(pid, PATIENCE)?.ok());
        guest.get_text(log)
    };
    assert_eq!(
        sender("/run/init.log", &|pid| guest.signal_from_init(pid, 10))?,
        "ready\nfrom 1\n"
    );
    assert_ne!(
        sender("/run/helper.log", &|pid| guest.signal(pid, 10))?,
        "ready\nfrom 1\n"
    );
    let nobody = guest
        .signal_from_init(i32::MAX, 10)
        .expect_err("there is no such process");
    assert!(nobody.to_string().contains("No such process"), "{nobody}");
    // And it still obeys.
    assert!(guest.signal_from_init(i32::MAX, 10).is_err());
    Ok(())
}

fn extend_pcr13(vm: &Vm) -> Result<(), HarnessError> {
    let digest = format!("13:sha256={}", "11".repeat(32));
    vm.guest().run_ok(&["tpm2", "pcrextend", &digest]).map(drop)
}

#[test]
fn vm_a_slow_tpm_is_slow_in_extends_only_and_counts_them() -> Result<(), HarnessError> {
    let delay = Duration::from_millis(300);
    let image = Image::load()?;
    let options = RestoreOptions {
        extend_delay: Some(delay),
    };
    let vm = Vm::restore_with(&image, &options)?;
    let before = vm.guest().sysfs_pcr(13)?;
    assert_eq!(vm.extends(), Some(0), "reading a PCR is no extend");
    let started = Instant::now();
    for count in 1..=3 {
        extend_pcr13(&vm)?;
        assert_eq!(vm.extends(), Some(count));
    }
    assert!(started.elapsed() >= delay * 3);
    let after = vm.guest().sysfs_pcr(13)?;
    assert_ne!(after, before);
    assert_eq!(after, pcr13(&vm)?, "sysfs and tpm2-tools read the same PCR");
    // What the TPM refuses is no extend: this PCR belongs to another locality.
    let refused = format!("17:sha256={}", "11".repeat(32));
    let refused = vm.guest().run(&["tpm2", "pcrextend", &refused])?;
    assert!(refused.stderr.contains("locality"), "{refused}");
    assert_eq!(vm.extends(), Some(3));

    // The TPM's state passes through when a machine is saved and restored.
    let folder = tempfile::tempdir().expect("a scratch folder");
    vm.slow_tpm().expect("it has one").set_delay(Duration::ZERO);
    let mut saved = image;
    saved.saved = folder.path().to_owned();
    vm.save(&saved.snapshot())?;
    let vm = Vm::restore_with(&saved, &options)?;
    assert_eq!(vm.guest().sysfs_pcr(13)?, after);
    extend_pcr13(&vm)?;
    assert_eq!(vm.extends(), Some(1));
    assert_ne!(vm.guest().sysfs_pcr(13)?, after);
    assert_eq!(Vm::restore(&saved)?.extends(), None);
    Ok(())
}

#[test]
fn vm_boots_with_the_processors_memory_and_tpm_that_the_test_wants() -> Result<(), HarnessError> {
    let options = BootOptions {
        cpus: Some(1),
        memory_mib: Some(640),
        extend_delay: Some(Duration::ZERO),
        ..BootOptions::default()
    };
    let mut vm = Vm::boot(&Image::load()?, &options)?;
    assert_eq!(vm.guest().run_ok(&["nproc"])?.trim(), "1");
    let total = "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    let memory: u32 = vm.guest().script(total)?.trim().parse().expect("a number");
    assert!((400..640).contains(&memory), "{memory} MiB");
    // The firmware and the kernel measure what they start, and do so again after a reset.
    let booted = vm.extends().unwrap_or_default();
    assert!(booted >= 8, "{booted} extends");
    vm.reset()?;
    assert!(vm.extends().unwrap_or_default() >= booted + 8);
    Ok(())
}
