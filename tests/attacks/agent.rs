//! Rows about the agent: its life, its kernel programs, its queue, its TPM and its disk.

use std::time::Duration;

use assay_ebpf::flags;
use assay_evidence::event::{Event, LoadKind, Mode, Violation};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;
use assay_tests::vm::{RestoreOptions, Vm};

use crate::common::PATIENCE;
use crate::loads::{TOOLS, perl_with};
use crate::log::Log;
use crate::payload::{EXIT, Payload, digest, tiny};
use crate::row::{Column, MODES, Outcome, Row};
use crate::scene::{EAGAIN, EPERM, Hook, Scene, about, count, image};

/// A try on the agent.
struct Attempt {
    name: &'static str,
    /// A Perl script; its first argument is the agent's process. Exits with 0 if it went through, with 100 and the errno if not.
    script: &'static str,
    kind: LoadKind,
    /// Words of the verdict.
    reason: &'static str,
}

/// `EACCES`: what the kernel makes of a refusal to look at a process.
const EACCES: i32 = 13;

/// Each is refused and recorded, and no policy allows it unasked.
fn play_attempts(row: &mut Row, scene: &Scene, mode: Mode, attempts: &[Attempt]) -> Result<(), HarnessError> {
    for attempt in attempts {
        let name = format!("{}, {mode}", attempt.name);
        let before = count(&scene.log()?, attempt.kind);
        let pid = scene.stage.agent.pid().to_string();
        let ended = perl_with(scene.guest(), attempt.script, &[&pid])?;
        let hook = Hook::of(&ended, 0)?;
        assert!(
            matches!(hook, Hook::Refused(EPERM | EACCES)),
            "{name}: {hook:?} {ended}"
        );
        let log = scene.wait_log(&name, |log| count(log, attempt.kind) > before)?;
        let record = log
            .loads()
            .into_iter()
            .rfind(|load| load.kind == attempt.kind)
            .expect("just counted");
        assert!(record.flags & flags::REFUSED != 0, "{name}: {record:?}");
        let perl = digest(&scene.guest().get("/usr/bin/perl")?);
        assert_eq!(
            record.digest.map(|digest| digest.to_string()),
            Some(perl),
            "{name}: {record:?}"
        );
        scene.distrusted_for(attempt.reason)?;
        row.set(Column::Assay(mode), attempt.name, Outcome::Refused);
    }
    // It lives, and measures.
    let path = format!("/root/after-{mode}");
    let program = Payload::Tiny.make(scene.guest())?;
    scene.guest().put(&path, 0o755, &program)?;
    Hook::run(scene.guest(), &[&path], EXIT)?;
    scene.wait_log("a program after the attempts", |log| {
        !about(log, &digest(&program)).is_empty()
    })?;
    Ok(())
}

const ON_ITS_LIFE: [Attempt; 16] = [
    Attempt {
        name: "SIGKILL",
        script: "kill(9, $ARGV[0]) or exit(100 + $!);",
        kind: LoadKind::AttemptSignal,
        reason: "by a signal",
    },
    Attempt {
        name: "SIGSTOP",
        script: "kill(19, $ARGV[0]) or exit(100 + $!);",
        kind: LoadKind::AttemptSignal,
        reason: "by a signal",
    },
    Attempt {
        name: "SIGTERM from others than systemd",
        script: "kill(15, $ARGV[0]) or exit(100 + $!);",
        kind: LoadKind::AttemptSignal,
        reason: "by a signal",
    },
    Attempt {
        name: "ptrace",
        // PTRACE_ATTACH
        script: "syscall(101, 16, $ARGV[0] + 0, 0, 0) == 0 or exit(100 + $!);",
        kind: LoadKind::AttemptTrace,
        reason: "debug the agent",
    },
    Attempt {
        name: "/proc/PID/mem",
        script: r#"open(my $memory, "+<", "/proc/$ARGV[0]/mem") or exit(100 + $!);"#,
        kind: LoadKind::AttemptTrace,
        reason: "debug the agent",
    },
    Attempt {
        name: "pidfd_getfd",
        script: "my $p = syscall(434, $ARGV[0] + 0, 0); syscall(438, $p, 3, 0) >= 0 or exit(100 + $!);",
        kind: LoadKind::AttemptTrace,
        reason: "debug the agent",
    },
    Attempt {
        name: "out-of-memory killer",
        script: r#"open(my $f, ">", "/proc/$ARGV[0]/oom_score_adj") or exit(100 + $!);"#,
        kind: LoadKind::AttemptLimit,
        reason: "limits or scheduling",
    },
    Attempt {
        name: "resource limits",
        script: r#"my $limit = pack("QQ", 1, 1); syscall(302, $ARGV[0] + 0, 0, $limit, 0) == 0 or exit(100 + $!);"#,
        kind: LoadKind::AttemptLimit,
        reason: "limits or scheduling",
    },
    Attempt {
        name: "cgroup freezer",
        script: r#"open(my $f, ">", "/sys/fs/cgroup/own/cgroup.freeze") or exit(100 + $!);"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    // Where it would be moved to. Whoever opens the file can write the agent's number into it.
    Attempt {
        name: "moved into a frozen control group",
        script: r#"my $up = "/sys/fs/cgroup/frozen"; mkdir($up); mkdir("$up/down"); open(my $f, ">", "$up/cgroup.freeze") or die;
            syswrite($f, "1") or die; close($f); open(my $p, ">", "$up/down/cgroup.procs") or exit(100 + $!); syswrite($p, $ARGV[0]);"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    Attempt {
        name: "moved to where the freezer is open",
        script: r#"my $up = "/sys/fs/cgroup/ahead"; mkdir($up); mkdir("$up/down"); open(my $f, ">", "$up/cgroup.freeze") or die;
            open(my $p, ">", "$up/down/cgroup.procs") or exit(100 + $!); syswrite($p, $ARGV[0]); syswrite($f, "1");"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    Attempt {
        name: "moved to where cgroup.kill is open",
        script: r#"my $up = "/sys/fs/cgroup/ahead"; mkdir($up); open(my $f, ">", "$up/cgroup.kill") or die;
            open(my $p, ">", "$up/cgroup.threads") or exit(100 + $!); syswrite($p, $ARGV[0]); syswrite($f, "1");"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    Attempt {
        name: "freezing where something can be moved to",
        script: r#"my $up = "/sys/fs/cgroup/ahead"; mkdir($up); mkdir("$up/down"); open(my $p, ">", "$up/down/cgroup.procs") or die;
            open(my $f, ">", "$up/cgroup.freeze") or exit(100 + $!); syswrite($f, "1"); syswrite($p, $ARGV[0]);"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    Attempt {
        name: "version 1's freezer",
        // Mounted beside version 2, where it may be already (EBUSY).
        script: r#"my ($none, $at, $type, $what) = ("none", "/root/v1", "cgroup", "freezer");
            syscall(165, $none, $at, $type, 0, $what) == 0 or $! == 16 or die; mkdir("$at/job");
            open(my $f, ">", "$at/job/freezer.state") or exit(100 + $!); syswrite($f, "FROZEN");"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    Attempt {
        name: "moved to where version 1 has frozen before",
        script: r#"open(my $p, ">", "/root/v1/ice/below/tasks") or exit(100 + $!); syswrite($p, $ARGV[0]);"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
    Attempt {
        name: "the freezer by a file handle",
        // name_to_handle_at, and open_by_handle_at once the kernel has forgotten the file's name. Of both versions, each refused.
        script: r#"for my $group ("/sys/fs/cgroup/own/cgroup.freeze", "/root/v1/job/freezer.state") {
            my ($path, $handle, $mount) = ($group, pack("Ll x128", 128, 0), pack("l", 0));
            syscall(303, -100, $path, $handle, $mount, 0) == 0 or die; open(my $d, ">", "/proc/sys/vm/drop_caches") or die;
            syswrite($d, "2"); close($d); open(my $at, "<", $path =~ s{/[^/]*/[^/]*$}{}r) or die;
            exit(0) if syscall(304, fileno($at), $handle, 1) >= 0; } exit(100 + $!);"#,
        kind: LoadKind::AttemptFreeze,
        reason: "control group",
    },
];

/// Puts the agent into a control group of its own, as systemd does.
fn into_own_group(scene: &Scene) -> Result<(), HarnessError> {
    let pid = scene.stage.agent.pid();
    let script = format!("mkdir -p /sys/fs/cgroup/own; echo {pid} > /sys/fs/cgroup/own/cgroup.procs");
    scene.guest().script(&script)?;
    Guest::wait_for("the agent did not notice its control group", PATIENCE, || {
        let journal = scene.stage.agent.journal();
        let last = journal
            .lines()
            .rfind(|line| line.contains("control group") || line.contains("ready"));
        Ok(last.filter(|line| line.contains("/own")).map(drop))
    })
}

/// Freezes a group of version 1, and leaves it behind without a mount.
const ICE: &str = r#"my ($none, $at, $type, $what) = ("none", "/root/v1", "cgroup", "freezer"); mkdir($at);
    syscall(165, $none, $at, $type, 0, $what) == 0 or die; mkdir("$at/ice") or die; open(my $f, ">", "$at/ice/freezer.state") or die;
    syswrite($f, "FROZEN") or die; close($f); mkdir("$at/ice/below") or die; syscall(166, $at, 0) == 0 or die;"#;

#[test]
fn attack_03_the_agent_killed_stopped_or_traced() -> Result<(), HarnessError> {
    let mut row = Row::new(
        3,
        "root kills or stops the agent (SIGKILL, SIGSTOP, cgroup freeze, ptrace, OOM)",
    );
    let mut scene = Scene::set("", TOOLS)?;
    let ended = perl_with(scene.guest(), ICE, &[])?;
    assert_eq!(Hook::of(&ended, 0)?, Hook::Passed, "{ended}");
    for &mode in MODES {
        scene.enter(mode)?;
        if mode == Mode::Observe {
            unprotected(&mut row, &mut scene)?;
            continue;
        }
        into_own_group(&scene)?;
        play_attempts(&mut row, &scene, mode, &ON_ITS_LIFE)?;
        moved_and_frozen(&scene, mode)?;
        others_are_frozen_and_moved(&scene, mode)?;
        // Not even process 1 may do more than ask.
        let refused = scene.guest().signal_from_init(scene.stage.agent.pid(), 9);
        assert!(refused.is_err_and(|error| error.to_string().contains("not permitted")));
        gone(&mut scene, mode)?;
    }
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("in observe nothing is refused: the kernel programs go on, and what ran meanwhile is in the log of the next agent. With the agent gone (systemd may ask it to stop), hold and enforce let run what is known and nothing else. IMA has no agent");
    row.done();
    Ok(())
}

/// A control group that is frozen after the agent was moved into one below it: guarded from the moment of the move, and in version 1
/// ever.
fn moved_and_frozen(scene: &Scene, mode: Mode) -> Result<(), HarnessError> {
    for (root, freezer, word) in [
        ("/sys/fs/cgroup", "cgroup.freeze", "1"),
        ("/root/v1", "freezer.state", "FROZEN"),
    ] {
        let script = format!(
            r#"my $up = "{root}/up-{mode}"; mkdir($up); mkdir("$up/down");
            open(my $p, ">", "$up/down/cgroup.procs") or die; syswrite($p, $ARGV[0]) or die; close($p);
            open(my $f, ">", "$up/{freezer}") or exit(100 + $!); syswrite($f, "{word}") or exit(100 + $!);"#
        );
        let pid = scene.stage.agent.pid().to_string();
        let before = count(&scene.log()?, LoadKind::AttemptFreeze);
        let ended = perl_with(scene.guest(), &script, &[&pid])?;
        assert_eq!(Hook::of(&ended, 0)?, Hook::Refused(EPERM), "{root}: {ended}");
        scene.wait_log("the move and the attempt", |log| {
            count(log, LoadKind::AttemptFreeze) >= before + 2
        })?;
    }
    Ok(())
}

/// What container runtimes do with groups of their own is none of it: a process is moved into one, frozen, thawed, and moved out.
const ORDINARY: &str = r#"my ($root, $job) = ("/sys/fs/cgroup", "/sys/fs/cgroup/job"); mkdir($job); mkdir("$job/task"); my $pid = fork();
    if (!$pid) { sleep(60); exit(0); }
    sub set { open(my $f, ">", $_[0]) or exit(100 + $!); syswrite($f, $_[1]) or exit(100 + $!); close($f); }
    sub is { for (1..6000) { open(my $f, "<", "$job/task/cgroup.events") or die; local $/; return if <$f> =~ /frozen $_[0]/; select(undef, undef, undef, 0.01); } die; }
    set("$job/task/cgroup.procs", $pid); set("$job/cgroup.freeze", 1); is(1); set("$job/cgroup.freeze", 0); is(0);
    set("$root/cgroup.procs", $pid); kill(9, $pid); waitpid($pid, 0); rmdir("$job/task") or die; rmdir($job) or die;"#;

/// Nor is it if the kernel forgets files of groups in between, and gives their memory to others of the same groups: of those that are
/// frozen by to those that are moved into by, and back.
const FORGOTTEN: &str = r#"my @groups = ("/sys/fs/cgroup/job"); push(@groups, "$groups[-1]/job") for 1..25; mkdir($_) for @groups;
    sub set { open(my $f, ">", $_[0]) or exit(100 + $!); syswrite($f, $_[1]); }
    sub forget { set("/proc/sys/vm/drop_caches", 2); select(undef, undef, undef, 0.03); }
    for (1..15) {
        for my $group (@groups) { set("$group/cgroup.$_", "") for qw(freeze kill); } forget();
        for my $group (reverse @groups) { set("$group/cgroup.$_", "") for qw(procs threads); } forget();
    }
    for (reverse @groups) { rmdir($_) or die; }"#;

fn others_are_frozen_and_moved(scene: &Scene, mode: Mode) -> Result<(), HarnessError> {
    let before = count(&scene.all_so_far()?, LoadKind::AttemptFreeze);
    for script in [ORDINARY, FORGOTTEN] {
        let ended = perl_with(scene.guest(), script, &[])?;
        assert_eq!(Hook::of(&ended, 0)?, Hook::Passed, "{mode}: {ended} {script}");
    }
    assert_eq!(count(&scene.all_so_far()?, LoadKind::AttemptFreeze), before, "{mode}");
    Ok(())
}

/// The agent has stopped in an orderly way: what is known runs, nothing else does.
fn gone(scene: &mut Scene, mode: Mode) -> Result<(), HarnessError> {
    let guest = scene.guest();
    let program = Payload::Tiny.make(guest)?;
    let path = format!("/root/gone-{mode}");
    guest.put(&path, 0o755, &program)?;
    scene.stop()?;
    let errno = if mode == Mode::Enforce { EPERM } else { EAGAIN };
    assert_eq!(Hook::run(guest, &[&path], EXIT)?, Hook::Refused(errno), "{mode}");
    assert_eq!(Hook::run(guest, &["/usr/bin/true"], 0)?, Hook::Passed, "{mode}");
    scene.stage.agent = Agent::start(scene.guest())?;
    let log = scene.wait_log("what was refused meanwhile", |log| {
        !about(log, &digest(&program)).is_empty()
    })?;
    assert!(log.events.contains(&Event::AgentStop));
    Ok(())
}

/// Without protection it dies; the kernel programs do not.
fn unprotected(row: &mut Row, scene: &mut Scene) -> Result<(), HarnessError> {
    for (name, signal) in [("SIGSTOP", 19), ("SIGKILL", 9)] {
        let guest = scene.guest();
        guest.signal(scene.stage.agent.pid(), signal)?;
        let program = Payload::Tiny.make(guest)?;
        let path = format!("/root/unprotected-{signal}");
        guest.put(&path, 0o755, &program)?;
        assert_eq!(Hook::run(guest, &[&path], EXIT)?, Hook::Passed, "{name}");
        if signal == 9 {
            guest.wait(scene.stage.agent.pid(), PATIENCE)?;
            scene.stage.agent = Agent::start(scene.guest())?;
        } else {
            guest.signal(scene.stage.agent.pid(), 18)?;
        }
        let log = scene.wait_log(&path, |log| !about(log, &digest(&program)).is_empty())?;
        log.assert_no_gap();
        scene.distrusted_for(&digest(&program))?;
        row.set(Column::Assay(Mode::Observe), name, Outcome::Recorded);
    }
    Ok(())
}

/// Each bpf() command that gives a descriptor by number, tried on all numbers: at least one is refused, and nothing but
/// the agent's has such an answer.
const BY_NUMBER: &str = r#"my $refused = 0; for my $id (1..400) { my $attr = pack("L x124", $id);
    my $fd = syscall(321, COMMAND, $attr, 128); $refused ||= $!{EPERM} if $fd < 0; syscall(3, $fd) if $fd >= 0; } exit($refused ? 101 : 0);"#;

const ON_ITS_PROGRAMS: [Attempt; 8] = [
    Attempt {
        name: "unlinking a pin",
        script: r#"my ($pin) = glob("/sys/fs/bpf/assay/programs-*/mapping"); unlink($pin) or exit(100 + $!);"#,
        kind: LoadKind::AttemptPin,
        reason: "pinned",
    },
    Attempt {
        name: "renaming a folder with pins",
        script: r#"my ($maps) = glob("/sys/fs/bpf/assay/maps-*"); rename($maps, "/sys/fs/bpf/gone") or exit(100 + $!);"#,
        kind: LoadKind::AttemptPin,
        reason: "pinned",
    },
    Attempt {
        name: "unmounting the pins",
        // MNT_DETACH
        script: r#"my $place = "/sys/fs/bpf"; syscall(166, $place, 2) == 0 or exit(100 + $!);"#,
        kind: LoadKind::AttemptPin,
        reason: "pinned",
    },
    Attempt {
        name: "mounting over the pins",
        script: r#"my ($place, $type) = ("/sys/fs/bpf/assay", "tmpfs"); syscall(165, $type, $place, $type, 0, 0) == 0 or exit(100 + $!);"#,
        kind: LoadKind::AttemptPin,
        reason: "pinned",
    },
    Attempt {
        name: "opening a pinned map",
        script: r#"my ($pin) = glob("/sys/fs/bpf/assay/maps-*/EXTENDED"); my $attr = pack("QLL x112", unpack("Q", pack("p", $pin)), 0, 0);
            syscall(321, 7, $attr, 128) >= 0 or exit(100 + $!);"#,
        kind: LoadKind::AttemptBpf,
        reason: "kernel programs or maps",
    },
    Attempt {
        name: "a map by its number",
        script: "COMMAND 14",
        kind: LoadKind::AttemptBpf,
        reason: "kernel programs or maps",
    },
    Attempt {
        name: "a program by its number",
        script: "COMMAND 13",
        kind: LoadKind::AttemptBpf,
        reason: "kernel programs or maps",
    },
    Attempt {
        name: "a link by its number",
        script: "COMMAND 30",
        kind: LoadKind::AttemptBpf,
        reason: "kernel programs or maps",
    },
];

#[test]
fn attack_04_detaching_or_replacing_the_kernel_programs() -> Result<(), HarnessError> {
    let mut row = Row::new(
        4,
        "detaching, unpinning or replacing the kernel programs, rewriting their maps",
    );
    let mut scene = Scene::set("", TOOLS)?;
    for &mode in MODES {
        scene.enter(mode)?;
        if mode != Mode::Observe {
            play_attempts(&mut row, &scene, mode, &on_programs())?;
            under_a_debugger(&mut row, &scene, mode)?;
            continue;
        }
        // Nothing is refused here; the next start finds out.
        let [unpin, ..] = &ON_ITS_PROGRAMS;
        let ended = perl_with(scene.guest(), unpin.script, &["0"])?;
        assert_eq!(Hook::of(&ended, 0)?, Hook::Passed, "{ended}");
        scene.stop()?;
        scene.stage.agent = Agent::start(scene.guest())?;
        scene.wait_log("that a program was missing", |log| {
            log.violations()
                .iter()
                .any(|violation| matches!(violation, Violation::HooksMissing { .. }))
        })?;
        scene.distrusted_for("kernel programs were missing")?;
        row.set(Column::Assay(mode), "", Outcome::Recorded);
    }
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("IMA has no parts that could be detached; root can change its policy on kernels that allow it. Against code in the kernel neither stands");
    row.done();
    Ok(())
}

fn on_programs() -> Vec<Attempt> {
    ON_ITS_PROGRAMS
        .into_iter()
        .map(|attempt| match attempt.script.strip_prefix("COMMAND ") {
            None => attempt,
            Some(number) => Attempt {
                script: BY_NUMBER.replace("COMMAND", number).leak(),
                ..attempt
            },
        })
        .collect()
}

/// The agent's own program, started by the attacker under a debugger: it has the digest that may open pins and TPM, and the
/// attacker's instructions.
const DEBUGGED: &str = r#"
    my $pid = fork(); if (!$pid) { syscall(101, 0, 0, 0, 0); exec("/usr/bin/assay-agent", "status"); exit(100 + $!); }
    waitpid($pid, 0); exit($? >> 8) if ($? & 255) == 0; my $regs = "\0" x 216; syscall(101, 12, $pid, 0, $regs) == 0 or exit(100 + $!);
    my @r = unpack("Q27", $regs); my ($rip, $rsp) = ($r[16], $r[19] - 4096);
    my $path = "/dev/tpmrm0\0\0\0\0\0"; for my $i (0, 8) { syscall(101, 5, $pid, $rsp + $i, unpack("Q", substr($path, $i, 8))) == 0 or exit(100 + $!); }
    syscall(101, 4, $pid, $rip, unpack("Q", "\x0f\x05\xcc\x90\x90\x90\x90\x90")) == 0 or exit(100 + $!);
    $r[10] = 2; $r[15] = 0xffffffffffffffff; $r[14] = $rsp; $r[13] = 2; $r[12] = 0;
    $regs = pack("Q27", @r); syscall(101, 13, $pid, 0, $regs) == 0 or exit(100 + $!);
    syscall(101, 7, $pid, 0, 0); waitpid($pid, 0); $regs = "\0" x 216; syscall(101, 12, $pid, 0, $regs);
    my ($answer) = (unpack("q27", $regs))[10]; kill(9, $pid); waitpid($pid, 0);
    exit($answer >= 0 ? 0 : 100 - $answer);"#;

fn under_a_debugger(row: &mut Row, scene: &Scene, mode: Mode) -> Result<(), HarnessError> {
    let before = count(&scene.log()?, LoadKind::AttemptTrace);
    let ended = perl_with(scene.guest(), DEBUGGED, &[])?;
    assert_eq!(Hook::of(&ended, 0)?, Hook::Refused(EPERM), "{mode}: {ended}");
    scene.wait_log("an agent under a debugger", |log| {
        count(log, LoadKind::AttemptTrace) > before
    })?;
    row.set(Column::Assay(mode), "a second agent under a debugger", Outcome::Refused);
    Ok(())
}

/// More records than the queue holds.
const FLOOD: u32 = 7000;
/// Maps a file that somebody has open for writing, over and over: each time is a record.
const MAPPINGS: &str = r#"open(my $f, "+<", "/root/flood") or die;
    for (1..$ARGV[0]) { my $at = syscall(9, 0, 4096, 5, 2, fileno($f), 0); syscall(11, $at, 4096) if $at > 0; }"#;

#[test]
fn attack_05_the_queue_overflows() -> Result<(), HarnessError> {
    let mut row = Row::new(5, "map or ring overflow, event dropping");
    let rehearsal = format!("{TOOLS}; /root/base || true");
    let mut scene = Scene::set_after("", &rehearsal, |guest| {
        guest.put("/root/flood", 0o600, b"a small file")?;
        guest.put("/root/base", 0o755, &tiny(EXIT, "approved"))
    })?;
    for &mode in MODES {
        scene.enter(mode)?;
        // Nobody reads the queue.
        if mode == Mode::Observe {
            scene.guest().signal(scene.stage.agent.pid(), 9)?;
            scene.guest().wait(scene.stage.agent.pid(), PATIENCE)?;
        } else {
            scene.stop()?;
        }
        let guest = scene.guest();
        let ended = perl_with(guest, MAPPINGS, &[&FLOOD.to_string()])?;
        assert!(ended.ok(), "{ended}");
        // Approved and extended, but another file: its load would be a record.
        let copy = format!("/root/copy-{mode}");
        guest.put(&copy, 0o755, &tiny(EXIT, "approved"))?;
        let hook = Hook::run(guest, &[&copy], EXIT)?;
        scene.stage.agent = Agent::start(scene.guest())?;
        if mode == Mode::Observe {
            assert_eq!(hook, Hook::Passed);
            scene.wait_log("the loss", |log| !losses(log).is_empty())?;
            scene.distrusted_for("were lost in the kernel")?;
            row.set(Column::Assay(mode), "", Outcome::Recorded);
        } else {
            assert_eq!(hook, Hook::Refused(EAGAIN), "{mode}: what finds no room must not run");
            // What was refused for want of room is no loss: nothing ran that is not in the log.
            let log = scene.settled()?;
            assert!(losses(&log).is_empty(), "{mode}: {:?}", log.violations());
            row.set(Column::Assay(mode), "", Outcome::Refused);
        }
    }
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("in observe what finds no room is counted, and the count is a violation in the log. IMA has no queue: it makes whoever loads wait");
    row.done();
    Ok(())
}

fn losses(log: &Log) -> Vec<&Violation> {
    let lost = |violation: &&Violation| matches!(violation, Violation::Lost { .. });
    log.violations().into_iter().filter(lost).collect()
}

/// New programs that are started at once.
const NEW: usize = 64;
/// Makes a process for each program of which the path begins so, and has all of them become these programs once the last is there: however
/// slow the machine is, they come together. Prints how each ended.
const TOGETHER: &str = r#"my ($new, $path) = @ARGV; my @pids; pipe(my $wait, my $go) or die;
    for my $number (0..$new - 1) {
        defined(my $pid = fork()) or die; push(@pids, $pid); next if $pid;
        close($go); sysread($wait, my $none, 1); exec {"$path-$number"} "$path-$number"; exit(100 + $!);
    }
    close($go); for my $pid (@pids) { waitpid($pid, 0); print($? >> 8, "\n"); }"#;

#[test]
fn attack_29_a_flood_of_new_programs() -> Result<(), HarnessError> {
    let mut row = Row::new(29, "denial of service by many new programs, with a slow TPM");
    let delay = Duration::from_millis(20);
    let vm = Vm::restore_with(
        &image()?,
        &RestoreOptions {
            extend_delay: Some(delay),
        },
    )?;
    let mut scene = Scene::set_in(vm, "", TOOLS)?;
    for &mode in MODES.iter().filter(|mode| **mode != Mode::Enforce) {
        let mut digests = Vec::new();
        for number in 0..NEW {
            let program = Payload::Tiny.make(scene.guest())?;
            scene
                .guest()
                .put(&format!("/root/flood-{mode}-{number}"), 0o755, &program)?;
            digests.push(digest(&program));
        }
        scene.enter(mode)?;
        let before = scene.stage.vm.extends().expect("counted");
        let ended = perl_with(
            scene.guest(),
            TOGETHER,
            &[&NEW.to_string(), &format!("/root/flood-{mode}")],
        )?;
        let statuses: Vec<&str> = ended.stdout.lines().collect();
        assert_eq!(
            statuses,
            vec![EXIT.to_string(); NEW],
            "{mode}: each of them runs: {ended}"
        );
        // In observe nobody has waited for the records: they may still be on their way.
        for digest in &digests {
            scene.wait_log(&format!("{digest}, {mode}"), |log| !about(log, digest).is_empty())?;
        }
        scene.settled()?;
        let extends = scene.stage.vm.extends().expect("counted") - before;
        println!("{mode}: {extends} extends for {NEW} programs");
        assert!(
            extends < NEW as u64 / 2,
            "{mode}: {extends} extends for {NEW} programs that came together"
        );
        let log = scene.all_so_far()?;
        assert!(losses(&log).is_empty(), "{mode}: {:?}", log.violations());
        row.set(Column::Assay(mode), "", Outcome::Detected);
    }
    row.set(Column::Assay(Mode::Enforce), "", Outcome::Refused);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.done();
    Ok(())
}
