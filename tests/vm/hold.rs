//! Mode hold: nothing new runs before it is extended, whether the agent lives or not.

use std::time::Duration;

use assay_ebpf::flags;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, LoadKind};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;
use assay_tests::vm::{Image, RestoreOptions, Vm};

use crate::common::{PATIENCE, RUN, configure, machine, perl, perl_on, put_new_program, sha256sum, stop, try_run};
use crate::log::{LOG, Log, short};

const HOLD: &str = "[measure]\nmode = \"hold\"\n";
/// For tests that have to kill the agent.
const UNPROTECTED: &str = "[measure]\nmode = \"hold\"\nprotect = false\n";
/// What `errno` has when something is refused for now.
const EAGAIN: i32 = 11;

/// A machine with a TPM that can be made slow, and the agent in it in mode hold.
fn slow_machine() -> Result<(Vm, Agent), HarnessError> {
    let options = RestoreOptions {
        extend_delay: Some(Duration::ZERO),
    };
    let vm = Vm::restore_with(&Image::load()?, &options)?;
    configure(vm.guest(), HOLD)?;
    let agent = Agent::start(vm.guest())?;
    Ok((vm, agent))
}

fn set_delay(vm: &Vm, millis: u64) {
    let tpm = vm.slow_tpm().expect("a TPM that can be slow");
    tpm.set_delay(Duration::from_millis(millis));
}

/// What a program does here: it writes down the PCR as it is when it runs.
const LOOK: &str = "read -r pcr < /sys/class/tpm/tpm0/pcr-sha256/13; echo $pcr > /root/seen";

#[test]
fn vm_hold_new_code_runs_at_the_first_try_and_after_its_extend() -> Result<(), HarnessError> {
    let (vm, _agent) = slow_machine()?;
    let guest = vm.guest();
    guest.script(&format!(
        "cd /root; lib=/usr/lib/x86_64-linux-gnu/libheld.so; module=$(dirname $(modinfo -n dummy))/held.ko
         cp /bin/dash program; printf a >> program; cp /bin/dash interpreter; printf b >> interpreter
         printf '#!/root/interpreter\\n{LOOK}\\n' > script; chmod 755 script
         cp $(ldd /usr/bin/true | awk '/libc.so/{{print $3}}') $lib; printf c >> $lib
         busybox xzcat $(modinfo -n dummy) > $module; printf d >> $module; ln -s $module held.ko; ln -s $lib held.so
         mkdir others; for i in $(seq 40); do cp /bin/true others/$i; printf $i >> others/$i; done"
    ))?;
    // The TPM is never idle, so that whatever does not wait for its own extend comes before it.
    set_delay(&vm, 250);
    let others = guest.spawn(
        &["bash", "-c", "for i in $(seq 40); do /root/others/$i; done"],
        "/root/others.log",
    )?;
    let preloaded = format!("LD_PRELOAD=$(readlink /root/held.so) /bin/dash -c '{LOOK}'");
    let with_module = format!("insmod $(readlink /root/held.ko); {LOOK}");
    let cases: [(&str, &[&str], &str); 5] = [
        ("a program", &["/root/program", "-c", LOOK], "/root/program"),
        ("a script", &["/root/script"], "/root/script"),
        ("its interpreter", &["/root/script"], "/root/interpreter"),
        ("a library", &["bash", "-euc", &preloaded], "/root/held.so"),
        ("a module", &["bash", "-euc", &with_module], "/root/held.ko"),
    ];
    let mut seen = Vec::new();
    for (what, command, path) in cases {
        let ended = guest.run(command)?;
        assert!(ended.ok() && ended.stderr.is_empty(), "{what}: {ended}");
        seen.push((what, path, guest.get_text("/root/seen")?.trim().to_lowercase()));
    }
    set_delay(&vm, 0);
    assert!(guest.wait(others, PATIENCE)?.ok());
    let digests = seen
        .iter()
        .map(|(.., path, _)| sha256sum(&vm, path))
        .collect::<Result<Vec<_>, _>>()?;
    let log = Log::at_rest(guest)?;
    for ((what, _, pcr), digest) in seen.iter().zip(digests) {
        let extended = log.extended_at(pcr);
        let loads = extended.iter().filter_map(Event::code).map(short);
        let found: Vec<_> = loads.filter(|(_, found, _)| *found == digest).collect();
        assert!(!found.is_empty(), "{what} ran before it was extended");
        assert!(found.iter().all(|(.., marks)| marks & flags::REFUSED == 0), "{found:?}");
    }
    let refused: Vec<_> = log
        .loads()
        .into_iter()
        .filter(|load| load.flags & flags::REFUSED != 0)
        .collect();
    assert!(refused.is_empty(), "{refused:?}");
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

/// Maps a file executable, as a loader does, and prints the error if it could not.
const MAP: &str = r#"open(my $f, "<", "PATH") or die; my $at = syscall(9, 0, 4096, 5, 2, fileno($f), 0);
    print $! + 0 if $at == -1;"#;
/// Runs a program's content from a file that never had a name.
const MEMFD: &str = r#"use IO::Handle; my $name = "hidden"; my $fd = syscall(319, $name, 0); open(my $out, ">&=", $fd);
    open(my $in, "<", "PATH"); local $/; print {$out} <$in>; $out->flush();
    open(my $exec, "<", "/proc/self/fd/$fd"); close($out);
    exec {"/proc/self/fd/" . fileno($exec)} "hidden"; print $! + 0;"#;
/// Hands a module to the kernel from memory.
const MODULE: &str = r#"open(my $f, "<", "PATH") or die; local $/; my $image = <$f>; my $none = "";
    print $! + 0 if syscall(175, $image, length($image), $none) != 0;"#;
/// Has an interpreter run a script by its name, and prints whether it did.
const ARGUMENT: &str = r#"my $said = `bash PATH 2>&1`; print 11 if $said =~ /Resource temporarily unavailable/;"#;

#[test]
fn vm_hold_what_cannot_wait_is_refused_once_with_a_record() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, HOLD)?;
    let _agent = Agent::start(guest)?;
    guest.script(
        "cd /root; cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so
         cp /usr/bin/true nameless; printf y >> nameless; echo 'exit 0' > argument.sh
         busybox xzcat $(modinfo -n dummy) > buffer.ko; printf z >> buffer.ko",
    )?;
    for (code, path, kind) in [
        (MAP, "/root/library.so", LoadKind::Mapping),
        (MEMFD, "/root/nameless", LoadKind::Program),
        (MODULE, "/root/buffer.ko", LoadKind::ModuleBuffer),
        (ARGUMENT, "/root/argument.sh", LoadKind::Argument),
    ] {
        let digest = sha256sum(&vm, path)?;
        let of = |log: &Log| -> Vec<u32> {
            let loads = log.loads().into_iter().map(short);
            let same = loads.filter(|(one, found, _)| *one == kind && *found == digest);
            same.map(|(.., marks)| marks & flags::REFUSED).collect()
        };
        assert_eq!(perl_on(guest, code, path)?, EAGAIN, "{path}, the first time");
        Log::wait(guest, LOG, path, |log| of(log) == [flags::REFUSED])?;
        Log::at_rest(guest)?;
        assert_eq!(perl_on(guest, code, path)?, 0, "{path}, the second time");
        Log::wait(guest, LOG, path, |log| of(log) == [flags::REFUSED, 0])?;
    }
    let log = Log::at_rest(guest)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

/// Starts this many programs in the same moment; the exit status counts those that did not run.
const AT_ONCE: &str = r#"pipe(my $gate, my $open); my $failed = 0;
    for my $number (1..64) { next if fork; close($open); my $none; sysread($gate, $none, 1); exec "/root/many/$number"; exit 1; }
    close($open); while (wait() != -1) { $failed++ if $?; } exit $failed;"#;

#[test]
fn vm_hold_one_extend_releases_all_who_wait() -> Result<(), HarnessError> {
    let (vm, _agent) = slow_machine()?;
    let guest = vm.guest();
    guest
        .script("mkdir /root/many; cd /root/many; for i in $(seq 64); do cp /usr/bin/true $i; printf $i >> $i; done")?;
    // So that Perl itself is known.
    perl(guest, "", &[])?;
    set_delay(&vm, 100);
    let before = vm.extends().expect("counted");
    guest.run_ok(&["perl", "-e", AT_ONCE])?;
    let extends = vm.extends().expect("counted") - before;
    set_delay(&vm, 0);
    assert!((1..=20).contains(&extends), "{extends} extends for 64 programs");

    let log = Log::at_rest(guest)?;
    let program = guest.get("/usr/bin/true")?;
    for number in 1..=64 {
        let digest = Sha256Digest::of(&[program.as_slice(), number.to_string().as_bytes()].concat()).to_string();
        let found = log.of(&format!("/root/many/{number}"));
        assert_eq!(found, [(LoadKind::Program, digest, 0)], "program {number}");
    }
    let largest = log.records.iter().map(|record| record.events().expect("events").len());
    assert!(largest.max().unwrap_or(0) >= 4);
    log.assert_no_gap();
    Ok(())
}

#[test]
fn vm_hold_without_an_agent_known_code_runs_and_new_code_waits_in_the_kernels_queue() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, HOLD)?;
    let agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/known")?;
    put_new_program(&vm, "/root/later")?;
    guest.script("printf 1 >> /root/later")?;
    let later = sha256sum(&vm, "/root/later")?;
    assert_eq!(try_run(guest, "/root/known")?, 0);
    stop(guest, &agent)?;
    let log = Log::at_rest(guest)?;
    assert_eq!(log.events.last(), Some(&Event::AgentStop));

    for _ in 0..2 {
        assert_eq!(try_run(guest, "/root/known")?, 0, "known code runs");
        assert_eq!(try_run(guest, "/root/later")?, EAGAIN, "new code does not");
    }

    let _agent = Agent::start(guest)?;
    Log::wait(guest, LOG, "/root/later", |log| !log.of("/root/later").is_empty())?;
    Log::at_rest(guest)?;
    assert_eq!(try_run(guest, "/root/later")?, 0, "with an agent it runs");
    Log::wait(guest, LOG, "/root/later", |log| log.of("/root/later").len() == 2)?;
    let log = Log::at_rest(guest)?;
    let record = |marks| (LoadKind::Program, later.clone(), marks);
    assert_eq!(log.of("/root/later"), [record(flags::REFUSED), record(0)]);
    assert_eq!(log.starts().len(), 2);
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

#[test]
fn vm_hold_a_killed_agent_lets_nobody_through_who_waits() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, UNPROTECTED)?;
    let agent = Agent::start(guest)?;
    perl(guest, "", &[])?;
    guest.script("cd /root; for i in 1 2 3; do cp /usr/bin/true wait$i; printf $i >> wait$i; done")?;
    Log::at_rest(guest)?;
    guest.signal(agent.pid(), 19)?;
    let mut waiting = Vec::new();
    for number in 1..=3 {
        let (path, said) = (format!("/root/wait{number}"), format!("/root/said{number}"));
        waiting.push((guest.spawn(&["perl", "-e", &RUN.replace("PATH", &path)], &said)?, said));
    }
    // They wait for the agent, which is stopped: the kernel says in what.
    for (pid, _) in &waiting {
        Guest::wait_for("nobody waits", PATIENCE, || {
            let at = guest.get_text(&format!("/proc/{pid}/wchan"))?;
            Ok(at.contains("fanotify").then_some(()))
        })?;
    }
    agent.kill()?;
    for (pid, said) in &waiting {
        assert!(guest.wait(*pid, PATIENCE)?.ok());
        assert_eq!(guest.get_text(said)?, EAGAIN.to_string());
    }
    let _agent = Agent::start(guest)?;
    Log::wait(guest, LOG, "all three", |log| {
        (1..=3).all(|number| !log.of(&format!("/root/wait{number}")).is_empty())
    })?;
    Log::at_rest(guest)?;
    for number in 1..=3 {
        assert_eq!(try_run(guest, &format!("/root/wait{number}"))?, 0);
    }
    let log = Log::at_rest(guest)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

/// A file that somebody has open for writing is measured each time it is mapped executable.
const FLOOD: &str = r#"open(my $f, "+<", "/root/flood") or die; my $ran = 0;
    for (1..7000) { $ran++ if syscall(9, 0, 4096, 5, 2, fileno($f), 0) != -1; } print $ran;"#;

#[test]
fn vm_hold_what_finds_no_room_in_the_queue_does_not_run() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, HOLD)?;
    let agent = Agent::start(guest)?;
    guest.put("/root/flood", 0o600, b"a small file")?;
    // Their content is known, and they are files of their own: their loads must be recorded.
    guest.script("cp /usr/bin/true /root/before; cp /usr/bin/true /root/after; true")?;
    assert_eq!(try_run(guest, "/usr/bin/true")?, 0);
    stop(guest, &agent)?;
    assert_eq!(try_run(guest, "/root/before")?, 0, "there is room for its record");
    assert_eq!(perl(guest, FLOOD, &[])?, 0, "none of these may be mapped");
    assert_eq!(
        try_run(guest, "/root/after")?,
        EAGAIN,
        "there is no room for its record"
    );
    assert_eq!(try_run(guest, "/usr/bin/true")?, 0, "it needs no record");

    let _agent = Agent::start(guest)?;
    let digest = sha256sum(&vm, "/root/after")?;
    Log::at_rest(guest)?;
    assert_eq!(try_run(guest, "/root/after")?, 0);
    let log = Log::wait(guest, LOG, "/root/after", |log| !log.of("/root/after").is_empty())?;
    for path in ["/root/before", "/root/after"] {
        assert_eq!(log.of(path), [(LoadKind::Program, digest.clone(), 0)], "{path}");
    }
    assert!(
        log.of("/root/flood")
            .iter()
            .all(|(.., marks)| marks & flags::REFUSED != 0)
    );
    log.assert_no_gap();
    Ok(())
}
