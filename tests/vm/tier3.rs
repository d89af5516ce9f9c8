//! Tier 3: a kernel that runs without the BPF LSM, as one before 5.7 does, and what its probes detect.

use assay_ebpf::flags;
use assay_evidence::event::LoadKind;
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::vm::{Image, Variant, Vm};

use crate::common::{put_new_program, sha256sum};
use crate::log::{LOG, Log};

/// The saved machine with a kernel of that series, booted without `bpf` among the security modules.
fn machine(series: &str) -> Result<Vm, HarnessError> {
    Vm::restore(&Image::load_kernel(series)?.booted(Variant::NoBpfLsm))
}

/// What a record of this path must say if it is a file that nobody touched.
fn hashed(vm: &Vm, kind: LoadKind, path: &str, more: u32) -> Result<(LoadKind, String, u32), HarnessError> {
    Ok((kind, sha256sum(vm, path)?, flags::USER_HASH | more))
}

#[test]
fn vm_tier3_linux_6_12_detects_files() -> Result<(), HarnessError> {
    detects_files("6.12")
}

#[test]
fn vm_tier3_linux_5_10_detects_files() -> Result<(), HarnessError> {
    detects_files("5.10")
}

fn detects_files(series: &str) -> Result<(), HarnessError> {
    let vm = machine(series)?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;

    // What is left of a second after a change: nothing that the clock could hide.
    put_new_program(&vm, "/root/new")?;
    guest.script(
        "cd /root; cp /bin/dash interpreter; printf '#!/root/interpreter\nexit 0\n' > script; chmod 755 script
         cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so; sleep 0.1",
    )?;
    guest.script("/root/new; /root/new; /root/script; LD_PRELOAD=/root/library.so /usr/bin/true")?;
    let log = Log::wait(guest, LOG, "the library", |log| !log.of("/root/library.so").is_empty())?;
    assert_eq!(log.of("/root/new"), [hashed(&vm, LoadKind::Program, "/root/new", 0)?]);
    assert_eq!(
        log.of("/root/script"),
        [hashed(&vm, LoadKind::Program, "/root/script", flags::SCRIPT)?]
    );
    assert_eq!(
        log.of("/root/interpreter"),
        [hashed(&vm, LoadKind::Program, "/root/interpreter", flags::INTERPRETER)?]
    );
    assert_eq!(
        log.of("/root/library.so"),
        [hashed(&vm, LoadKind::Mapping, "/root/library.so", 0)?]
    );
    println!("{}", agent.journal());
    let log = Log::settled(&vm, LOG)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}
