//! What programs do that no load tells: memory made executable, devices opened, code written to.

use assay_ebpf::flags;
use assay_evidence::event::{LoadKind, Measurement};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::vm::Vm;

use crate::common::{configure, machine, perl, sha256sum};
use crate::log::{LOG, Log};

/// Memory that is executable from the start.
const ANONYMOUS: &str = "print $! + 0 if syscall(9, 0, 4096, 7, 0x22, -1, 0) == -1;";
/// Memory that becomes executable, twice.
const LATER: &str = "for (1, 2) { my $at = syscall(9, 0, 4096, 3, 0x22, -1, 0); if (syscall(10, $at, 4096, 5) == -1) { print $! + 0; exit 0; } }";
/// A file that is mapped and becomes executable; with a second argument, not before something else was written over it.
const FILE: &str = r#"open(my $f, "<", $ARGV[0]) or die; my $at = syscall(9, 0, 4096, 3, 2, fileno($f), 0);
    if ($ARGV[1]) { open(my $other, "<", "/etc/passwd") or die; syscall(0, fileno($other), $at, 16) == 16 or die; }
    print $! + 0 if syscall(10, $at, 4096, 5) == -1;"#;
const OPEN: &str = r#"print $! + 0 unless open(my $f, "+<", $ARGV[0]);"#;

/// All records of this kind that Perl, or a part of it, is the cause of.
fn of_perl(log: &Log, kind: LoadKind) -> Vec<Measurement> {
    let loads = log.loads().into_iter();
    loads
        .filter(|load| load.kind == kind && load.comm == "perl")
        .cloned()
        .collect()
}

fn wait_for(vm: &Vm, kind: LoadKind, count: usize) -> Result<Vec<Measurement>, HarnessError> {
    let log = Log::wait(vm.guest(), LOG, &format!("{count} records of {kind}"), |log| {
        of_perl(log, kind).len() >= count
    })?;
    Ok(of_perl(&log, kind))
}

fn digest(record: &Measurement) -> String {
    record.digest.map(|digest| digest.to_string()).unwrap_or_default()
}

#[test]
fn vm_deeds_are_recorded_with_the_program_that_did_them() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, "[measure]\nwatch_devices = [\"/dev/full\"]\n")?;
    let _agent = Agent::start(guest)?;
    perl(guest, "", &[])?;
    let program = sha256sum(&vm, "/usr/bin/perl")?;

    // One record for each run of a program, however often it does it.
    assert_eq!(perl(guest, ANONYMOUS, &[])?, 0);
    assert_eq!(perl(guest, LATER, &[])?, 0);
    assert_eq!(perl(guest, OPEN, &["/dev/full"])?, 0);
    assert_eq!(perl(guest, OPEN, &["/dev/zero"])?, 0);
    let disk = "/dev/vda";
    guest.script("truncate -s 4M /root/image; ln -sf $(losetup -f --show /root/image) /root/loop")?;
    let free = guest.run_ok(&["readlink", "/root/loop"])?.trim().to_owned();
    assert_eq!(perl(guest, OPEN, &[&free])?, 0);
    assert_eq!(perl(guest, OPEN, &[disk])?, 0);
    Log::wait(guest, LOG, "the disk", |log| !log.of(disk).is_empty())?;
    let (idle, devices): (Vec<_>, Vec<_>) = wait_for(&vm, LoadKind::BlockWrite, 2)?
        .into_iter()
        .partition(|record| record.flags & flags::IDLE != 0);
    let paths = |records: &[Measurement]| records.iter().map(|record| record.path.to_string()).collect::<Vec<_>>();
    assert_eq!(paths(&devices), [disk]);
    assert!(
        paths(&idle).contains(&free),
        "what nobody has mounted is marked: {idle:?}"
    );
    let anonymous = wait_for(&vm, LoadKind::Anonymous, 2)?;
    assert_eq!(anonymous.len(), 2, "{anonymous:?}");
    let watched = wait_for(&vm, LoadKind::Device, 1)?;
    assert_eq!(
        (watched.len(), watched[0].path.as_str(), watched[0].dev),
        (1, "/dev/full", 1 << 20 | 7)
    );
    for record in anonymous.iter().chain(&devices).chain(&watched) {
        assert_eq!((digest(record), record.flags), (program.clone(), 0), "{record:?}");
    }
    let log = Log::settled(&vm, LOG)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

#[test]
fn vm_deeds_on_files_are_recorded_with_the_files_digest() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    guest.script("cd /root; cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so")?;
    let library = sha256sum(&vm, "/root/library.so")?;
    guest.spawn(&["env", "LD_PRELOAD=/root/library.so", "sleep", "1000"], "/dev/null")?;
    Log::wait(guest, LOG, "the library", |log| !log.of("/root/library.so").is_empty())?;

    assert_eq!(perl(guest, FILE, &["/root/library.so"])?, 0);
    assert_eq!(perl(guest, FILE, &["/root/library.so", "changed"])?, 0);
    let made = wait_for(&vm, LoadKind::Protect, 2)?;
    let found: Vec<_> = made.iter().map(|record| (digest(record), record.flags)).collect();
    assert_eq!(found, [(library.clone(), 0), (library.clone(), flags::MODIFIED)]);

    // Opened for writing, while somebody has it mapped.
    assert_eq!(perl(guest, OPEN, &["/root/library.so"])?, 0);
    let written = wait_for(&vm, LoadKind::CodeWrite, 1)?;
    let found: Vec<_> = written
        .iter()
        .map(|record| (digest(record), record.path.to_string()))
        .collect();
    assert_eq!(found, [(library, "/root/library.so".to_owned())]);
    Log::settled(&vm, LOG)?.assert_no_gap();
    Ok(())
}

#[test]
fn vm_deeds_with_memory_can_be_refused() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, "[measure]\ndeny_anonymous = true\n")?;
    let _agent = Agent::start(guest)?;
    guest.script("cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') /root/library.so")?;
    for (code, arguments) in [
        (ANONYMOUS, [].as_slice()),
        (LATER, &[]),
        (FILE, &["/root/library.so", "changed"]),
    ] {
        assert_eq!(perl(guest, code, arguments)?, 1, "{code}");
    }
    // The file as it is may become executable.
    assert_eq!(perl(guest, FILE, &["/root/library.so"])?, 0);
    let refused = wait_for(&vm, LoadKind::Anonymous, 2)?;
    assert!(
        refused.iter().all(|record| record.flags & flags::REFUSED != 0),
        "{refused:?}"
    );
    let made = wait_for(&vm, LoadKind::Protect, 2)?;
    let marks: Vec<_> = made
        .iter()
        .map(|record| record.flags & (flags::REFUSED | flags::MODIFIED))
        .collect();
    assert_eq!(marks, [flags::REFUSED | flags::MODIFIED, 0]);
    Ok(())
}
