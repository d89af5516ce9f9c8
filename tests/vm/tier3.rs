//! Tier 3: a kernel that runs without the BPF LSM, as one before 5.7 does, and what its probes detect.

use assay_ebpf::flags;
use assay_evidence::bundle::Bundle;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{LoadKind, Violation};
use assay_evidence::wire::QuoteRequest;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::verifier::Verifier;
use assay_tests::vm::{BootOptions, Image, Variant, Vm};
use assay_verifier::client::{Asker, Pin};
use assay_verifier::config::StateDir;
use assay_verifier::judge::fresh_nonce;

use crate::common::{PATIENCE, pcr13, put_new_program, sha256sum, trusted};
use crate::log::{LOG, Log, short};

/// The saved machine with a kernel of that series, booted without `bpf` among the security modules.
fn machine(series: &str) -> Result<Vm, HarnessError> {
    Vm::restore(&Image::load_kernel(series)?.booted(Variant::NoBpfLsm))
}

/// What a record of this path must say if it is a file that nobody touched.
fn hashed(vm: &Vm, kind: LoadKind, path: &str, more: u32) -> Result<(LoadKind, String, u32), HarnessError> {
    Ok((kind, sha256sum(vm, path)?, flags::USER_HASH | more))
}

/// Kernels that tier 3 is tried on: one that cannot have the BPF LSM as Debian builds it, and a new one booted without.
macro_rules! on_both_kernels {
    ($($test:ident, $old:ident, $new:ident;)+) => {
        $(
            #[test]
            fn $old() -> Result<(), HarnessError> {
                $test(&machine("5.10")?)
            }

            #[test]
            fn $new() -> Result<(), HarnessError> {
                $test(&machine("6.12")?)
            }
        )+
    };
}

on_both_kernels! {
    detects_files, vm_tier3_linux_5_10_detects_files, vm_tier3_linux_6_12_detects_files;
    detects_modules, vm_tier3_linux_5_10_detects_modules, vm_tier3_linux_6_12_detects_modules;
    detects_deeds, vm_tier3_linux_5_10_detects_deeds, vm_tier3_linux_6_12_detects_deeds;
    detects_the_short_lived, vm_tier3_linux_5_10_detects_the_short_lived, vm_tier3_linux_6_12_detects_the_short_lived;
    tells_itself, vm_tier3_linux_5_10_tells_itself, vm_tier3_linux_6_12_tells_itself;
}

/// The newest kernels name some members of their structures otherwise, and preempt tasks in the kernel, which makes them skip
/// probes now and then: what is not in the log must be among what the log says is missing.
#[test]
fn vm_tier3_linux_7_misses_nothing_silently() -> Result<(), HarnessError> {
    let vm = machine("7")?;
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    let run = |from: usize| format!("cd /root; for i in $(seq {from} {}); do ./q$i; done", from + SHORT - 1);
    guest.script(&format!(
        "cd /root; for i in $(seq 1 {}); do cp /usr/bin/true q$i; printf $i >> q$i; done; sleep 0.1",
        2 * SHORT
    ))?;
    guest.script(&run(1))?;
    // Once more, with other programs, so that the counts of the first are in the log.
    guest.script(&format!("sleep 5; {}", run(SHORT + 1)))?;
    let late = |log: &Log| (SHORT + 1..=2 * SHORT).any(|number| !log.of(&format!("/root/q{number}")).is_empty());
    Log::wait(guest, LOG, "a program of the second half", late)?;
    let log = Log::settled(&vm, LOG)?;
    let program = guest.get("/usr/bin/true")?;
    let mut missing = 0;
    for number in 1..=SHORT {
        let digest = Sha256Digest::of(&[program.as_slice(), number.to_string().as_bytes()].concat());
        let of = log.of(&format!("/root/q{number}"));
        let expected = [(LoadKind::Program, digest.to_string(), flags::USER_HASH)];
        assert!(of.is_empty() || of == expected, "{of:?}");
        missing += u64::from(of.is_empty());
    }
    assert!(missing < SHORT as u64 / 2, "{missing} of {SHORT} are not in the log");
    let counted = log.violations().iter().fold(0, |sum, violation| match violation {
        Violation::Lost { count } => sum + count,
        other => panic!("{other:?}"),
    });
    assert!(
        missing <= counted,
        "{missing} are not in the log, which says that {counted} are missing"
    );
    Ok(())
}

/// Runs its own content, a copy of a program, from a file that never had a name; lives for as long as it is told.
const MEMFD: &str = r#"
    my $name = "hidden"; my $fd = syscall(319, $name, 0); open(my $out, ">&=", $fd);
    open(my $in, "<", "/usr/bin/sleep"); local $/; print {$out} <$in>, "x"; $out->flush();
    open(my $exec, "<", "/proc/self/fd/$fd"); close($out); select(undef, undef, undef, 0.1);
    exec {"/proc/self/fd/" . fileno($exec)} "hidden", $ARGV[0]; die "exec: $!";"#;

fn detects_files(vm: &Vm) -> Result<(), HarnessError> {
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    put_new_program(vm, "/root/new")?;
    // The pause puts changes and runs into different ticks of the clock: else nobody could say what ran.
    guest.script(
        "cd /root; cp /bin/dash interpreter; printf '#!/root/interpreter\nexit 0\n' > script; chmod 755 script
         mkdir -p deep/er; mount -t tmpfs tmpfs deep/er; cp new deep/er/intmp; printf y >> deep/er/intmp
         cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so; sleep 0.1
         ./new; ./new; ./script; deep/er/intmp; LD_PRELOAD=/root/library.so /usr/bin/true",
    )?;
    guest.run_ok(&["perl", "-MIO::Handle", "-e", MEMFD, "2"])?;
    let memfd = "/memfd:hidden (deleted)";
    let log = Log::wait(guest, LOG, "the memfd", |log| !log.of(memfd).is_empty())?;

    let once = |kind, path: &str, more| -> Result<(), HarnessError> {
        assert_eq!(log.of(path), [hashed(vm, kind, path, more)?], "{path}");
        Ok(())
    };
    once(LoadKind::Program, "/root/new", 0)?;
    once(LoadKind::Program, "/root/script", flags::SCRIPT)?;
    once(LoadKind::Program, "/root/interpreter", flags::INTERPRETER)?;
    once(LoadKind::Program, "/root/deep/er/intmp", flags::TMPFS)?;
    once(LoadKind::Mapping, "/root/library.so", 0)?;
    let mut content = guest.get("/usr/bin/sleep")?;
    content.push(b'x');
    let digest = Sha256Digest::of(&content).to_string();
    let marks = flags::USER_HASH | flags::UNLINKED | flags::MEMFD | flags::TMPFS;
    assert!(
        log.of(memfd).contains(&(LoadKind::Program, digest, marks)),
        "{:?}",
        log.of(memfd)
    );

    // Changed content is another program, and so is the old content when it comes back.
    guest.script("cd /root; printf z >> new; sleep 0.1; ./new; truncate -s -1 new; sleep 0.1; ./new; ./new")?;
    let log = Log::wait(guest, LOG, "three states", |log| log.of("/root/new").len() >= 3)?;
    let states = log.of("/root/new");
    assert!(
        states.len() == 3 && states[0] == states[2] && states[0] != states[1],
        "{states:?}"
    );
    settled(vm)
}

/// What programs do that is no load: memory that becomes executable, devices, code that is written to.
fn detects_deeds(vm: &Vm) -> Result<(), HarnessError> {
    let guest = vm.guest();
    guest
        .script("mkdir -p /etc/assay; printf '[measure]\nwatch_devices = [\"/dev/zero\"]\n' > /etc/assay/agent.toml")?;
    let _agent = Agent::start(guest)?;
    guest.script("cd /root; cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so; cp library.so data; sleep 0.1")?;
    // Twice memory without a file, which is one record a run; then a mapping that becomes executable.
    let memory = r#"for (1..2) { syscall(9, 0, 4096, 7, 0x22, -1, 0) > 0 or die "mmap: $!"; }
        open(my $f, "<", "/root/data") or die; my $at = syscall(9, 0, 4096, 1, 2, fileno($f), 0);
        $at > 0 or die "mmap: $!"; syscall(10, $at, 4096, 5) == 0 or die "mprotect: $!";"#;
    guest.run_ok(&["perl", "-e", memory])?;
    guest.script("dd if=/dev/zero of=/dev/vda count=0 conv=notrunc status=none")?;
    let digest = sha256sum(vm, "/root/library.so")?;
    guest.script(
        "LD_PRELOAD=/root/library.so sleep 3 & sleep 0.5; printf y >> /root/library.so; printf z >> /root/data; wait",
    )?;
    let log = Log::wait(guest, LOG, "the written library", |log| {
        log.loads().iter().any(|load| load.kind == LoadKind::CodeWrite)
    })?;
    let of = |kind| -> Vec<(String, String, u32)> {
        log.loads()
            .into_iter()
            .filter(|load| load.kind == kind)
            .map(|load| (load.path.to_string(), short(load).1, load.flags))
            .collect()
    };
    let by =
        |path: &str, program: &str| Ok::<_, HarnessError>((path.to_owned(), sha256sum(vm, program)?, flags::USER_HASH));
    assert_eq!(of(LoadKind::Anonymous), [by("/usr/bin/perl", "/usr/bin/perl")?]);
    assert_eq!(
        of(LoadKind::Protect),
        [("/root/data".to_owned(), digest.clone(), flags::USER_HASH)]
    );
    assert_eq!(of(LoadKind::Device), [by("/dev/zero", "/usr/bin/dd")?]);
    assert_eq!(of(LoadKind::BlockWrite), [by("/dev/vda", "/usr/bin/dd")?]);
    // The digest is the one that it had; what nobody has mapped may be written to.
    assert_eq!(
        of(LoadKind::CodeWrite),
        [("/root/library.so".to_owned(), digest, flags::USER_HASH)]
    );
    settled(vm)
}

/// Programs that end at once.
const SHORT: usize = 200;

/// A program that is gone when the agent looks is still in the log: by its path, through a neighbour in its mount namespace,
/// or, if no way leads to it any more, without a digest.
fn detects_the_short_lived(vm: &Vm) -> Result<(), HarnessError> {
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    guest.script(&format!(
        "cd /root; for i in $(seq 1 {SHORT}); do cp /usr/bin/true q$i; printf $i >> q$i; done; sleep 0.1
         for i in $(seq 1 {SHORT}); do ./q$i; done"
    ))?;
    guest.script(
        "unshare -m bash -c 'mount -t tmpfs tmpfs /mnt; cp /usr/bin/true /mnt/private; printf private >> /mnt/private
         sleep 0.1; /mnt/private; sleep 1'",
    )?;
    let last = format!("/root/q{SHORT}");
    let log = Log::wait(guest, LOG, "the last programs", |log| {
        !log.of(&last).is_empty() && !log.of("/mnt/private").is_empty()
    })?;
    let program = guest.get("/usr/bin/true")?;
    let expected = |more: &str, marks| {
        let digest = Sha256Digest::of(&[program.as_slice(), more.as_bytes()].concat());
        [(LoadKind::Program, digest.to_string(), flags::USER_HASH | marks)]
    };
    for number in 1..=SHORT {
        let path = format!("/root/q{number}");
        assert_eq!(log.of(&path), expected(&number.to_string(), 0), "{path}");
    }
    assert_eq!(log.of("/mnt/private"), expected("private", flags::TMPFS));
    settled(vm)?;

    guest.run_ok(&["perl", "-MIO::Handle", "-e", MEMFD, "0"])?;
    let memfd = "/memfd:hidden (deleted)";
    let log = Log::wait(guest, LOG, "the memfd", |log| !log.of(memfd).is_empty())?;
    let marks = flags::UNLINKED | flags::MEMFD | flags::TMPFS;
    for (_, digest, found) in log.of(memfd) {
        let how = if digest.is_empty() {
            flags::NOT_HASHED
        } else {
            flags::USER_HASH
        };
        assert_eq!(found, marks | how);
    }
    Ok(())
}

/// Log and PCR agree, nothing is missing, and nothing was a violation.
fn settled(vm: &Vm) -> Result<(), HarnessError> {
    let log = Log::settled(vm, LOG)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    let odd: Vec<_> = log
        .loads()
        .into_iter()
        .filter(|load| load.flags & (flags::NOT_HASHED | flags::UNSTABLE | flags::PATH_CUT) != 0)
        .filter(|load| load.kind != LoadKind::ModuleBuffer)
        .collect();
    assert!(odd.is_empty(), "{odd:?}");
    Ok(())
}

fn detects_modules(vm: &Vm) -> Result<(), HarnessError> {
    let guest = vm.guest();
    let _agent = Agent::start(guest)?;
    guest.script(
        "cd /root; file=$(modinfo -n dummy)
         case $file in *.xz) busybox xzcat $file > plain.ko;; *) cp $file plain.ko;; esac; sleep 0.1",
    )?;
    // finit_module twice, then init_module: each load counts.
    guest.script("insmod /root/plain.ko; rmmod dummy; insmod /root/plain.ko; rmmod dummy")?;
    let init = r#"open(my $f, "<", $ARGV[0]) or die; local $/; my $image = <$f>; my $none = "";
        exit(syscall(175, $image, length($image), $none) == 0 ? 0 : 1);"#;
    guest.run_ok(&["perl", "-e", init, "/root/plain.ko"])?;
    let modules = |log: &Log| log.loads().iter().filter(|load| load.kind.is_module()).count();
    let log = Log::wait(guest, LOG, "three modules", |log| modules(log) >= 3)?;
    let found: Vec<_> = log
        .loads()
        .into_iter()
        .filter(|load| load.kind.is_module())
        .map(|load| (load.path.to_string(), short(load)))
        .collect();
    let file = (
        "/root/plain.ko".to_owned(),
        hashed(vm, LoadKind::ModuleFile, "/root/plain.ko", 0)?,
    );
    // The content of a buffer is out of a probe's reach, and the log says so.
    let buffer = (
        String::new(),
        (LoadKind::ModuleBuffer, String::new(), flags::NOT_HASHED),
    );
    assert_eq!(found, [file.clone(), file, buffer]);
    settled(vm)
}

/// What the agent says of itself, where the offsets come from, and what its end costs.
fn tells_itself(vm: &Vm) -> Result<(), HarnessError> {
    let guest = vm.guest();
    // A kernel may have no description of its own: this one is at a place that only agent.toml names.
    guest.script(
        "mkdir -p /etc/assay; cp /sys/kernel/btf/vmlinux /root/kernel.btf; mount -t tmpfs none /sys/kernel/btf",
    )?;
    let refused = guest.run_with(&["assay-agent", "run"], b"", PATIENCE)?;
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(
        refused.stderr.contains("/sys/kernel/btf/vmlinux") && refused.stderr.contains("btf = "),
        "{refused}"
    );
    guest.put(
        "/etc/assay/agent.toml",
        0o644,
        b"[measure]\nbtf = \"/root/kernel.btf\"\n",
    )?;
    let agent = Agent::start(guest)?;
    let log = Log::read(guest, LOG)?;
    let start = log.start();
    assert_eq!((start.tier, start.protected), (3, false));
    assert!(start.blind.contains("after the fact"), "{}", start.blind);
    assert_eq!(
        start.bpf_digest.to_string(),
        sha256sum(vm, "/usr/lib/assay/assay-ebpf-probe.o")?
    );
    let status = agent.status()?;
    assert_eq!(status.get("tier").and_then(serde_json::Value::as_u64), Some(3));
    assert_eq!(
        status.get("blind").and_then(serde_json::Value::as_str),
        Some(start.blind.as_str())
    );
    let shown = guest.run_ok(&["assay-agent", "status"])?;
    assert!(shown.contains("tier 3") && shown.contains("after the fact"), "{shown}");

    is_quickly_verified(vm, agent.pid())?;

    // No probe outlives an agent: the next one has to say that it does not know what happened in between.
    agent.kill()?;
    put_new_program(vm, "/root/between")?;
    guest.run_ok(&["/root/between"])?;
    let agent = Agent::start(guest)?;
    let log = Log::settled(vm, LOG)?;
    assert!(
        matches!(log.violations()[..], [Violation::HooksMissing { .. }]),
        "{:?}",
        log.violations()
    );
    assert_eq!((log.of("/root/between"), log.starts().len()), (Vec::new(), 2));

    // Root switches the probes off: an agent that hears nothing more ends, and the TPM knows.
    guest.script("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug; echo 0 > /sys/kernel/debug/kprobes/enabled")?;
    let ended = guest.wait(agent.pid(), PATIENCE)?;
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(agent.journal().contains("the probes are silent"), "{}", agent.journal());
    assert_ne!(pcr13(vm)?, Log::read(guest, LOG)?.pcr());
    let refused = guest.run_with(&["assay-agent", "run"], b"", PATIENCE)?;
    assert!(refused.stderr.contains("kprobes/enabled"), "{refused}");
    Ok(())
}

/// The verifier of 4.19 gives up after 131,072 instructions, and sees less quickly that it has been somewhere before.
fn is_quickly_verified(vm: &Vm, agent: i32) -> Result<(), HarnessError> {
    // A program may be open more than once.
    let counts = vm.guest().script(&format!(
        "cat /proc/{agent}/fdinfo/* 2>/dev/null | awk '/^prog_id/{{id = $2}} /^verified_insns/{{if (!seen[id]++) print $2}}'"
    ))?;
    let counts: Vec<u32> = counts
        .lines()
        .map(|line| line.trim().parse().expect("a number"))
        .collect();
    // Kernels before 5.16 do not say.
    let says = !vm.guest().ping()?.1.starts_with("5.10.");
    assert_eq!(counts.len(), if says { 7 } else { 0 }, "{counts:?}");
    assert!(counts.iter().all(|count| *count < 16_384), "{counts:?}");
    Ok(())
}

/// More than the buffers between probes and agent hold.
const FLOOD: u64 = 12_000;

#[test]
fn vm_tier3_what_found_no_room_is_counted_in_the_log() -> Result<(), HarnessError> {
    let vm = machine("6.12")?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;
    Log::settled(&vm, LOG)?;
    // A file that somebody has open for writing counts each time it is mapped executable.
    let flood = r#"open(my $f, "+<", "/root/flood") or die; my $count = $ARGV[0];
        for (1..$count) { my $at = syscall(9, 0, 4096, 5, 2, fileno($f), 0); syscall(11, $at, 4096); }"#;
    guest.put("/root/flood", 0o600, b"a small file")?;
    guest.signal(agent.pid(), 19)?;
    guest.run_ok(&["perl", "-e", flood, &FLOOD.to_string()])?;
    guest.signal(agent.pid(), 18)?;
    let lost = |log: &Log| -> u64 {
        let count = |violation: &&Violation| {
            if let Violation::Lost { count } = violation {
                *count
            } else {
                0
            }
        };
        log.violations().iter().map(count).sum()
    };
    let total = |log: &Log| log.of("/root/flood").len() as u64 + lost(log);
    Log::wait(guest, LOG, "all of it", |log| total(log) >= FLOOD)?;
    let log = Log::settled(&vm, LOG)?;
    let recorded = log.of("/root/flood");
    let digest = sha256sum(&vm, "/root/flood")?;
    let unstable = flags::USER_HASH | flags::UNSTABLE;
    assert!(
        recorded
            .iter()
            .all(|one| *one == (LoadKind::Mapping, digest.clone(), unstable))
    );
    // Perl's own libraries may be among the lost ones.
    assert!(
        lost(&log) > 0 && total(&log) < FLOOD + 50,
        "{} lost, {} recorded, {:?}",
        lost(&log),
        recorded.len(),
        log.violations()
    );
    assert_eq!(
        agent.status()?.get("lost").and_then(serde_json::Value::as_u64),
        Some(lost(&log))
    );
    log.assert_no_gap();
    Ok(())
}

/// A policy that was made from a tier 1 host does not take a tier 3 host, until somebody says so; and its bundles carry
/// what IMA itself has logged.
#[test]
fn vm_tier3_is_named_in_the_verdict_and_relays_the_log_of_ima() -> Result<(), HarnessError> {
    let stage = trusted()?;
    let options = BootOptions {
        cmdline: format!("{} {}", Variant::NoBpfLsm.cmdline(), Variant::ImaTcb.cmdline()),
        ..BootOptions::default()
    };
    let vm = Vm::boot(&Image::load()?, &options)?;
    let guest = vm.guest();
    agent::join(guest, &stage.verifier)?;
    let agent = Agent::start(guest)?;
    agent.enrol(&vm, &stage.verifier, "old")?;
    let is_tier = |reason: &String| reason.contains("tier 3") && reason.contains("not allowed");
    stage
        .verifier
        .wait_host("old", "untrusted for its tier", PATIENCE, |host| {
            host.state == "untrusted" && host.reasons.iter().any(is_tier)
        })?;
    agent::rehearse(guest)?;
    put_new_program(&vm, "/root/new")?;
    guest.script("sleep 0.1; /root/new")?;
    Log::wait(guest, LOG, "/root/new", |log| !log.of("/root/new").is_empty())?;
    Log::settled(&vm, LOG)?;
    stage.verifier.run_ok(&["policy", "capture", "old", "--add"])?;
    stage
        .verifier
        .wait_host("old", "trusted", PATIENCE, |host| host.state == "trusted")?;

    let bundle = quoted(&stage.verifier, &vm.agent_address());
    let ima = bundle.ima_log.expect("the log of IMA");
    let listed = guest.get_text("/sys/kernel/security/ima/ascii_runtime_measurements")?;
    let line = format!("sha256:{} /root/new", sha256sum(&vm, "/root/new")?);
    assert!(listed.contains(&line), "{}\n{listed}", guest.get_text("/proc/cmdline")?);
    let has = |wanted: &[u8]| ima.0.windows(wanted.len()).any(|bytes| bytes == wanted);
    assert!(has(b"/root/new\0") && has(b"boot_aggregate\0"), "{} bytes", ima.0.len());
    assert!(
        quoted(&stage.verifier, &stage.vm.agent_address()).ima_log.is_none(),
        "tier 1 needs it not"
    );
    Ok(())
}

/// What a host answers to a verifier's question.
fn quoted(verifier: &Verifier, address: &str) -> Bundle {
    let asker = Asker::load(&StateDir::new(verifier.state_dir())).expect("the verifier's identity");
    let request = QuoteRequest {
        nonce: fresh_nonce().expect("random bytes"),
        log_from: 0,
        boot_log: true,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut agent = asker
            .connect(address, Pin::FirstContact, PATIENCE)
            .await
            .expect("a connection");
        agent.quote(&request).await.expect("a bundle")
    })
}
