//! What the kernel programs record, load by load: the digest, how often, and with which marks.

use std::time::Duration;

use assay_ebpf::flags;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{LoadKind, Violation};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::vm::Vm;

use crate::common::{machine, put_new_program, sha256sum};
use crate::log::{LOG, Log, short};

const NONE: u32 = 0;

/// Runs a program and waits until the log has `count` records of `path`.
fn run_and_wait(vm: &Vm, argv: &[&str], path: &str, count: usize) -> Result<Log, HarnessError> {
    vm.guest().run_ok(argv)?;
    Log::wait(vm.guest(), LOG, &format!("{count} records of {path}"), |log| {
        log.of(path).len() >= count
    })
}

#[test]
fn vm_kernel_programs_are_recorded_once_for_each_state() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/a")?;
    let first = sha256sum(&vm, "/root/a")?;
    run_and_wait(&vm, &["/root/a"], "/root/a", 1)?;
    // Neither a second run, nor another name, nor another link, nor other permissions make it another program...
    guest.script("/root/a; chmod 700 /root/a; /root/a; ln /root/a /root/link; /root/link; mv /root/link /root/moved; /root/moved")?;
    // ...but changed content does, and so does the old content when it comes back, and a copy.
    guest.script("printf x >> /root/a")?;
    let second = sha256sum(&vm, "/root/a")?;
    guest.script("/root/a; /root/a; truncate -s -1 /root/a; /root/a; /root/a; cp /root/a /root/copy; /root/copy")?;
    // On a file system in memory, in place and without a change of size.
    guest.script(
        "cp /root/a /tmp/t; /tmp/t; /tmp/t
         printf y | dd of=/tmp/t bs=1 seek=$(($(stat -c %s /tmp/t) - 1)) conv=notrunc status=none; /tmp/t; /tmp/t",
    )?;
    let third = sha256sum(&vm, "/tmp/t")?;

    let log = Log::wait(guest, LOG, "/tmp/t twice", |log| log.of("/tmp/t").len() >= 2)?;
    let program = |digest: &String| (LoadKind::Program, digest.clone(), NONE);
    // A change of permissions, links or names moves the change cookie: measuring once more is allowed, nothing else.
    let mut states = log.of("/root/a");
    states.extend(log.of("/root/link"));
    states.extend(log.of("/root/moved"));
    assert!(
        states
            .iter()
            .all(|state| *state == program(&first) || *state == program(&second)),
        "{states:?}"
    );
    let mut changes = log.of("/root/a");
    changes.dedup();
    assert_eq!(changes, [program(&first), program(&second), program(&first)]);
    assert_eq!(log.of("/root/copy"), [program(&first)]);
    let in_memory = |digest: &String| (LoadKind::Program, digest.clone(), flags::TMPFS);
    assert_eq!(log.of("/tmp/t"), [in_memory(&first), in_memory(&third)]);
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

#[test]
fn vm_kernel_scripts_libraries_and_nameless_files_are_recorded() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    guest.script(
        "cd /root
         cp /bin/dash interpreter; printf '#!/root/interpreter\\nexit 0\\n' > script; chmod 755 script
         cp /lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 loader; cp /usr/bin/true loaded
         cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so
         ./script; ./script; ./loader ./loaded; LD_PRELOAD=/root/library.so /usr/bin/true",
    )?;
    // A program in a file that has no name, nor ever had: as often as it runs, since nothing tells whether it changed.
    let memfd = r#"
        my $name = "hidden"; my $fd = syscall(319, $name, 0); open(my $out, ">&=", $fd);
        open(my $in, "<", "/usr/bin/true"); local $/; print {$out} <$in>, "x"; $out->flush();
        open(my $exec, "<", "/proc/self/fd/$fd"); close($out);
        exec {"/proc/self/fd/" . fileno($exec)} "hidden"; die "exec: $!";"#;
    guest.run_ok(&["perl", "-MIO::Handle", "-e", memfd])?;
    let name = "/memfd:hidden (deleted)";
    let log = run_and_wait(&vm, &["perl", "-MIO::Handle", "-e", memfd], name, 2)?;

    let recorded = |kind, path: &str, marks| -> Result<(), HarnessError> {
        assert_eq!(log.of(path), [(kind, sha256sum(&vm, path)?, marks)], "{path}");
        Ok(())
    };
    recorded(LoadKind::Program, "/root/script", flags::SCRIPT)?;
    recorded(LoadKind::Program, "/root/interpreter", flags::INTERPRETER)?;
    recorded(LoadKind::Program, "/root/loader", NONE)?;
    recorded(LoadKind::Mapping, "/root/loaded", NONE)?;
    recorded(LoadKind::Mapping, "/root/library.so", NONE)?;
    let position = |path: &str| log.loads().iter().position(|load| load.path == path);
    assert!(
        position("/root/script") < position("/root/interpreter"),
        "the script comes before its interpreter"
    );
    let mut hidden = guest.get("/usr/bin/true")?;
    hidden.push(b'x');
    let hidden = Sha256Digest::of(&hidden).to_string();
    let marks = flags::UNLINKED | flags::MEMFD | flags::TMPFS;
    let (program, mapping) = (
        (LoadKind::Program, hidden.clone(), marks),
        (LoadKind::Mapping, hidden, marks),
    );
    let found = log.of(name);
    assert!(found.iter().all(|one| *one == program || *one == mapping), "{found:?}");
    assert_eq!(found.iter().filter(|one| **one == program).count(), 2, "{found:?}");
    log.assert_no_gap();
    Ok(())
}

#[test]
fn vm_kernel_modules_are_recorded_however_they_get_in() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    guest.script("cd /root; cp $(modinfo -n dummy) packed.ko.xz; busybox xzcat packed.ko.xz > plain.ko; cp plain.ko buffer.ko; printf z >> buffer.ko")?;
    guest.script("printf 'this is no kernel module, and is measured before the kernel finds out' > /root/garbage")?;
    let init = r#"open(my $f, "<", $ARGV[0]) or die; local $/; my $image = <$f>; my $none = "";
        exit(syscall(175, $image, length($image), $none) == 0 ? 0 : 1);"#;
    let finit = r#"open(my $f, "<", $ARGV[0]) or die; my $none = "";
        exit(syscall(313, fileno($f), $none, $ARGV[1] + 0) == 0 ? 0 : 1);"#;
    guest.script("insmod /root/plain.ko; rmmod dummy")?;
    guest.run_ok(&["perl", "-e", init, "/root/buffer.ko"])?;
    guest.run_ok(&["rmmod", "dummy"])?;
    // 4: MODULE_INIT_COMPRESSED_FILE, the kernel unpacks it.
    guest.run_ok(&["perl", "-e", finit, "/root/packed.ko.xz", "4"])?;
    guest.run_ok(&["rmmod", "dummy"])?;
    assert_eq!(guest.run(&["perl", "-e", finit, "/root/garbage", "0"])?.code, Some(1));
    // Every load counts, also of what was seen before.
    guest.script("insmod /root/plain.ko; rmmod dummy")?;

    let log = Log::wait(guest, LOG, "five modules", |log| {
        log.loads().iter().filter(|load| load.kind.is_module()).count() >= 5
    })?;
    let modules: Vec<_> = log.loads().into_iter().filter(|load| load.kind.is_module()).collect();
    let file =
        |path: &str| Ok::<_, HarnessError>((path.to_owned(), (LoadKind::ModuleFile, sha256sum(&vm, path)?, NONE)));
    let expected = [
        file("/root/plain.ko")?,
        (
            String::new(),
            (LoadKind::ModuleBuffer, sha256sum(&vm, "/root/buffer.ko")?, NONE),
        ),
        file("/root/packed.ko.xz")?,
        file("/root/garbage")?,
        file("/root/plain.ko")?,
    ];
    assert_eq!(
        modules
            .iter()
            .map(|load| (load.path.to_string(), short(load)))
            .collect::<Vec<_>>(),
        expected
    );
    Ok(())
}

/// More than the queue between kernel and agent holds.
const FLOOD: u64 = 7000;

#[test]
fn vm_kernel_records_that_found_no_room_are_counted_in_the_log() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/unseen")?;
    // A file that somebody has open for writing is measured each time it is mapped executable.
    let flood = r#"open(my $f, "+<", "/root/flood") or die; my $count = $ARGV[0];
        for (1..$count) { my $at = syscall(9, 0, 4096, 5, 2, fileno($f), 0); syscall(11, $at, 4096); }"#;
    guest.put("/root/flood", 0o600, b"a small file")?;
    guest.run_ok(&["perl", "-e", flood, "1"])?;
    Log::wait(guest, LOG, "the file", |log| log.of("/root/flood").len() == 1)?;
    agent.kill()?;
    guest.run_ok(&["perl", "-e", flood, &FLOOD.to_string()])?;
    guest.run_ok(&["/root/unseen"])?;

    let agent = Agent::start(guest)?;
    let (program, digest) = (sha256sum(&vm, "/root/unseen")?, sha256sum(&vm, "/root/flood")?);
    Log::wait(guest, LOG, "the loss", |log| {
        log.of("/root/flood").len() > 6000 && !log.violations().is_empty()
    })?;
    let log = Log::settled(&vm, LOG)?;
    let recorded = log.of("/root/flood");
    assert!(
        recorded
            .iter()
            .all(|one| *one == (LoadKind::Mapping, digest.clone(), flags::UNSTABLE))
    );
    let mut lost = 0;
    for violation in log.violations() {
        match violation {
            Violation::Lost { count } => lost += *count,
            other => panic!("{other}"),
        }
    }
    // One was recorded before the flood; lost after it were the program, and what the new agent loaded for the first time.
    let total = recorded.len() as u64 + lost;
    assert!(
        (FLOOD + 2..FLOOD + 50).contains(&total),
        "{lost} lost, {} recorded",
        recorded.len()
    );
    assert_eq!(
        agent.status()?.get("lost").and_then(serde_json::Value::as_u64),
        Some(lost)
    );
    assert_eq!(log.of("/root/unseen"), []);
    log.assert_no_gap();
    // What was not recorded does not count as measured: the next run is.
    let log = run_and_wait(&vm, &["/root/unseen"], "/root/unseen", 1)?;
    assert_eq!(log.of("/root/unseen"), [(LoadKind::Program, program, NONE)]);
    Ok(())
}

/// Programs that each of the loops below runs, each of them new to the kernel programs.
const EACH: usize = 150;

#[test]
fn vm_kernel_each_cpu_numbers_its_records_without_a_gap() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;
    // Four loops on two CPUs: what runs on one comes between what runs on the other, and between itself.
    guest.script(&format!(
        "mkdir /root/many; cd /root/many
         for loop in 1 2 3 4; do
             (for n in $(seq {EACH}); do cp /bin/true $loop-$n; printf $loop-$n >> $loop-$n; ./$loop-$n; done) &
         done; wait"
    ))?;
    let log = Log::wait(guest, LOG, "all of them", |log| {
        let many = log
            .loads()
            .into_iter()
            .filter(|load| load.path.starts_with("/root/many/"));
        let count = many.filter(|load| load.kind == LoadKind::Program).count();
        println!("{count} of {} records so far", 4 * EACH);
        count >= 4 * EACH
    })
    .inspect_err(|_| println!("{}", agent.journal()))?;
    let numbers = log.numbers();
    assert!(
        numbers.len() > 1 && numbers.values().all(|cpu| cpu.len() > EACH / 4),
        "one CPU only"
    );
    // Longer than a missing number is waited for: the kernel has counted no further than the log goes.
    std::thread::sleep(Duration::from_secs(8));
    let log = Log::settled(&vm, LOG)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    agent.kill()?;
    let _agent = Agent::start(guest)?;
    guest.script("cp /bin/true /root/after; printf after >> /root/after; /root/after")?;
    let log = Log::wait(guest, LOG, "/root/after", |log| !log.of("/root/after").is_empty())?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}
