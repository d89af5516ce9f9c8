//! What the machines themselves promise.

use std::time::{Duration, Instant};

use assay_tests::HarnessError;
use assay_tests::vm::{Image, Vm};

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
