//! The agent defends itself: what others try on it is refused and recorded, and an orderly stop is not.

use assay_ebpf::flags;
use assay_evidence::event::{Event, LoadKind};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;
use assay_tests::vm::Vm;

use crate::common::{PATIENCE, configure, machine, perl, put_new_program, sha256sum, stop, try_run};
use crate::log::{LOG, Log, short};

const HOLD: &str = "[measure]\nmode = \"hold\"\n";
const EPERM: i32 = 1;
const EACCES: i32 = 13;
/// A control group of the agent's own, as a service has.
const GROUP: &str = "/sys/fs/cgroup/assay-test";

const KILL: &str = "print $! + 0 unless kill $ARGV[1], $ARGV[0];";
/// `ptrace`: attach (16), and seize (16902).
const TRACE: &str = "print $! + 0 if syscall(101, $ARGV[1] + 0, $ARGV[0] + 0, 0, 0) == -1;";
const MEMORY: &str = r#"print $! + 0 unless open(my $f, "+<", "/proc/$ARGV[0]/mem");"#;
/// `process_vm_writev` of a few bytes.
const WRITE: &str = r#"my $bytes = "assay"; my $here = pack("PQ", $bytes, 5); print $! + 0 if syscall(311, $ARGV[0] + 0, $here, 1, $here, 1, 0) == -1;"#;
/// `pidfd_open` and `pidfd_getfd`: a copy of one of its descriptors.
const DESCRIPTOR: &str = r#"my $pid = syscall(434, $ARGV[0] + 0, 0); print $! + 0 if syscall(438, $pid, 1, 0) == -1;"#;
/// `prlimit`: how much of the processor it may use.
const LIMIT: &str = r#"my $limit = pack("QQ", 1, 1); print $! + 0 if syscall(302, $ARGV[0] + 0, 0, $limit, 0) == -1;"#;
/// `sched_setaffinity`: on which processor.
const AFFINITY: &str = r#"my $mask = pack("Q", 1); print $! + 0 if syscall(203, $ARGV[0] + 0, 8, $mask) == -1;"#;
/// Opens a file of the kernel's for writing, and writes.
const SET: &str =
    r#"if (open(my $f, ">", $ARGV[1])) { print {$f} $ARGV[2]; close($f) or print $! + 0; } else { print $! + 0; }"#;
const OPEN: &str = r#"print $! + 0 unless open(my $f, "+<", $ARGV[1]);"#;
/// `BPF_OBJ_GET` of a pin.
const PIN: &str = r#"my $path = $ARGV[1] . "\0"; my $what = pack("pLL", $path, 0, 0); print $! + 0 if syscall(321, 7, $what, 16) == -1;"#;
const UNLINK: &str = "print $! + 0 unless unlink $ARGV[1];";
const RENAME: &str = "print $! + 0 unless rename $ARGV[1], $ARGV[2];";
const RMDIR: &str = "print $! + 0 unless rmdir $ARGV[1];";
/// `umount2`: at once, and lazily (2).
const UNMOUNT: &str = "print $! + 0 if syscall(166, $ARGV[1], $ARGV[2] + 0) == -1;";
const MOUNT: &str =
    r#"my ($from, $kind) = ("none", "tmpfs"); print $! + 0 if syscall(165, $from, $ARGV[1], $kind, 0, 0) == -1;"#;
const BIND: &str =
    r#"my ($from, $kind) = ("/root", "none"); print $! + 0 if syscall(165, $from, $ARGV[1], $kind, 4096, 0) == -1;"#;

const PINS: &str = "/sys/fs/bpf/assay";
const MAP: &str = "/sys/fs/bpf/assay/maps-3/CONTROL";

/// All that is tried on an agent that lives: what, with which arguments behind the agent's id, and how it is recorded.
const ATTEMPTS: [(&str, &[&str], LoadKind); 28] = [
    (KILL, &["9"], LoadKind::AttemptSignal),
    (KILL, &["15"], LoadKind::AttemptSignal),
    (KILL, &["19"], LoadKind::AttemptSignal),
    (KILL, &["2"], LoadKind::AttemptSignal),
    (KILL, &["11"], LoadKind::AttemptSignal),
    (TRACE, &["16"], LoadKind::AttemptTrace),
    (TRACE, &["16902"], LoadKind::AttemptTrace),
    (MEMORY, &[], LoadKind::AttemptTrace),
    (WRITE, &[], LoadKind::AttemptTrace),
    (DESCRIPTOR, &[], LoadKind::AttemptTrace),
    (OPEN, &["/dev/tpmrm0"], LoadKind::AttemptTpm),
    (OPEN, &["/dev/tpm0"], LoadKind::AttemptTpm),
    (PIN, &[MAP], LoadKind::AttemptBpf),
    (UNLINK, &[MAP], LoadKind::AttemptPin),
    (RENAME, &[MAP, "/sys/fs/bpf/assay/maps-3/OTHER"], LoadKind::AttemptPin),
    (RENAME, &[PINS, "/sys/fs/bpf/other"], LoadKind::AttemptPin),
    (RMDIR, &["/sys/fs/bpf/assay/maps-3"], LoadKind::AttemptPin),
    (UNMOUNT, &["/sys/fs/bpf", "0"], LoadKind::AttemptPin),
    (UNMOUNT, &["/sys/fs/bpf", "2"], LoadKind::AttemptPin),
    (MOUNT, &["/sys/fs/bpf"], LoadKind::AttemptPin),
    (MOUNT, &[PINS], LoadKind::AttemptPin),
    (BIND, &[PINS], LoadKind::AttemptPin),
    (
        SET,
        &["/sys/fs/cgroup/assay-test/cgroup.freeze", "1"],
        LoadKind::AttemptFreeze,
    ),
    (
        SET,
        &["/sys/fs/cgroup/assay-test/cgroup.kill", "1"],
        LoadKind::AttemptFreeze,
    ),
    (
        SET,
        &["/sys/fs/cgroup/assay-test/memory.max", "1"],
        LoadKind::AttemptLimit,
    ),
    (LIMIT, &[], LoadKind::AttemptLimit),
    (AFFINITY, &[], LoadKind::AttemptLimit),
    (SET, &["/proc/AGENT/oom_score_adj", "1000"], LoadKind::AttemptLimit),
];

/// The agent, in a control group of its own.
fn start(vm: &Vm, settings: &str) -> Result<Agent, HarnessError> {
    let guest = vm.guest();
    configure(guest, settings)?;
    // The helper, whose child the agent will be, goes into the group, and then out again.
    guest.script(&format!(
        "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
         echo +memory > /sys/fs/cgroup/cgroup.subtree_control
         mkdir -p {GROUP}; echo $PPID > {GROUP}/cgroup.procs"
    ))?;
    let agent = Agent::start(guest)?;
    guest.script("echo $PPID > /sys/fs/cgroup/cgroup.procs")?;
    Ok(agent)
}

#[test]
fn vm_protect_every_attempt_of_roots_is_refused_and_recorded() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = start(&vm, HOLD)?;
    let pid = agent.pid().to_string();
    perl(guest, "", &[])?;
    let tried_by = sha256sum(&vm, "/usr/bin/perl")?;
    let attempts = |log: &Log| -> Vec<_> {
        let loads = log.loads().into_iter();
        loads.filter(|load| load.kind.is_attempt()).map(short).collect()
    };
    assert_eq!(attempts(&Log::at_rest(guest)?), []);

    let mut expected = Vec::new();
    for (code, arguments, kind) in ATTEMPTS {
        let arguments: Vec<String> = arguments.iter().map(|text| text.replace("AGENT", &pid)).collect();
        let all: Vec<&str> = [pid.as_str()]
            .into_iter()
            .chain(arguments.iter().map(String::as_str))
            .collect();
        let errno = perl(guest, code, &all)?;
        // To the kernel, memory that may not be touched is no permission in the file system's sense.
        let refused = errno == EPERM || kind == LoadKind::AttemptTrace && errno == EACCES;
        assert!(refused, "{code} {arguments:?}: error {errno}");
        expected.push((kind, tried_by.clone(), flags::REFUSED));
    }
    assert!(agent.status().is_ok());
    Log::wait(guest, LOG, "all attempts", |log| attempts(log).len() >= expected.len())?;
    let log = Log::at_rest(guest)?;
    assert_eq!(attempts(&log), expected);
    assert!(log.start().protected);
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());

    // Process 1 may ask it to end.
    stop(guest, &agent)?;
    assert_eq!(Log::at_rest(guest)?.events.last(), Some(&Event::AgentStop));
    Ok(())
}

/// Opens a freezer, says so, and uses it when it is told to.
const HOLDER: &str = r#"my ($freezer, $word, $said) = @ARGV; open(my $f, ">", $freezer) or die; open(my $h, ">", $said) or die; close($h);
    select(undef, undef, undef, 0.01) until -e "/run/go"; syswrite($f, $word) or die; sleep(600);"#;

#[test]
fn vm_protect_a_freezer_that_was_open_before_is_told_and_a_frozen_agent_replaced() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let freezer = format!("{GROUP}/cgroup.freeze");
    guest.script(&format!(
        "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup; mkdir -p {GROUP} /run/v1
         mount -t cgroup -o freezer none /run/v1; mkdir /run/v1/job"
    ))?;
    for (freezer, word, said) in [
        (freezer.as_str(), "1", "/run/held"),
        ("/run/v1/job/freezer.state", "FROZEN", "/run/held-v1"),
    ] {
        guest.spawn(&["perl", "-e", HOLDER, freezer, word, said], "/run/holder.log")?;
        Guest::wait_for("nobody opened the freezer", PATIENCE, || Ok(guest.get(said).ok()))?;
    }
    // Nobody sees this mount any more, and whoever has a file of it open can write to that.
    guest.run_ok(&["umount", "-l", "/run/v1"])?;
    let mut agent = start(&vm, HOLD)?;
    let log = Log::wait(guest, LOG, "that both freezers are open", |log| {
        log.attempts(LoadKind::AttemptFreeze) >= 2
    })?;
    let told: Vec<_> = log.loads().into_iter().filter(|load| load.kind.is_attempt()).collect();
    let told: Vec<_> = told
        .iter()
        .map(|load| (load.path.as_str(), load.flags & flags::REFUSED))
        .collect();
    assert_eq!(told, [(freezer.as_str(), 0), ("/job/freezer.state", 0)]);

    guest.put("/run/go", 0o600, b"")?;
    Guest::wait_for("the agent was not frozen", PATIENCE, || {
        let events = guest.get_text(&format!("{GROUP}/cgroup.events"))?;
        Ok(events.contains("frozen 1").then_some(()))
    })?;
    // Root can't kill it for that, but systemd's watchdog can, and starts the next one.
    let refused = guest.signal(agent.pid(), 9);
    assert!(refused.is_err_and(|error| error.to_string().contains("not permitted")));
    guest.signal_from_init(agent.pid(), 9)?;
    assert_eq!(guest.wait(agent.pid(), PATIENCE)?.signal, Some(9));
    agent = Agent::start(guest)?;
    let log = Log::wait(guest, LOG, "the signal", |log| {
        log.attempts(LoadKind::AttemptSignal) > 0
    })?;
    log.assert_no_gap();
    assert!(agent.status().is_ok());
    Ok(())
}

/// Asks for a descriptor of everything that there is, by number: prints how many were refused, and how many were not, of one class.
const BY_NUMBER: &str = r#"my ($next, $get) = @ARGV; my ($id, $refused, $given) = (0, 0, 0);
    while (1) {
        my $what = pack("LLL", $id, 0, 0); last if syscall(321, $next + 0, $what, 12) != 0;
        (undef, $id) = unpack("LL", $what);
        $what = pack("LLL", $id, 0, 0);
        if (syscall(321, $get + 0, $what, 12) == -1) { $refused++ if $! == 1 } else { $given++ }
    } print "$refused $given";"#;

#[test]
fn vm_protect_maps_programs_and_links_are_not_given_by_number_either() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    configure(guest, HOLD)?;
    let count = |next: &str, get: &str| -> Result<(usize, usize), HarnessError> {
        let said = guest.run_ok(&["perl", "-e", BY_NUMBER, next, get])?;
        let mut numbers = said.split(' ').map(|number| number.parse().expect("a number"));
        Ok((numbers.next().expect("refused"), numbers.next().expect("given")))
    };
    // Programs, maps, links: what next, and a descriptor.
    let classes = [("11", "13"), ("12", "14"), ("31", "30")];
    let mut before = Vec::new();
    for (next, get) in classes {
        before.push(count(next, get)?);
    }
    let agent = Agent::start(guest)?;
    let mut all = 0;
    for ((next, get), (_, given)) in classes.into_iter().zip(before) {
        let (refused, now) = count(next, get)?;
        assert_eq!(now, given, "{next}: the agent's are refused, and no others");
        assert!(refused >= 18, "{next}: {refused}");
        all += refused;
    }
    let kind = LoadKind::AttemptBpf;
    Log::wait(guest, LOG, "all attempts", |log| log.attempts(kind) >= all)?;
    assert_eq!(Log::at_rest(guest)?.attempts(kind), all);
    assert!(agent.status().is_ok());
    Ok(())
}

#[test]
fn vm_protect_is_off_in_observe_unless_it_is_asked_for() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = start(&vm, "")?;
    let pid = agent.pid().to_string();
    for (code, argument) in [
        (KILL, "18"),
        (TRACE, "16902"),
        (MEMORY, ""),
        (OPEN, "/dev/tpmrm0"),
        (PIN, MAP),
        (AFFINITY, ""),
    ] {
        assert_eq!(perl(guest, code, &[&pid, argument])?, 0, "{code}");
    }
    let tried = |log: &Log| log.loads().iter().filter(|load| load.kind.is_attempt()).count();
    assert_eq!(tried(&Log::at_rest(guest)?), 0);
    assert_eq!(perl(guest, KILL, &[&pid, "9"])?, 0);
    assert_eq!(guest.wait(agent.pid(), PATIENCE)?.signal, Some(9));

    let agent = start(&vm, "[measure]\nprotect = true\n")?;
    let pid = agent.pid().to_string();
    assert_eq!(perl(guest, KILL, &[&pid, "9"])?, EPERM);
    assert_eq!(perl(guest, PIN, &[&pid, MAP])?, EPERM);
    Log::wait(guest, LOG, "both attempts", |log| tried(log) == 2)?;
    // Observing refuses no code.
    put_new_program(&vm, "/root/new")?;
    assert_eq!(try_run(guest, "/root/new")?, 0);
    Ok(())
}
