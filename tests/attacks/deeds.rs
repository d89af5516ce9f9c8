//! Rows about what a running program does, without a file that is loaded.

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{LoadKind, Mode};
use assay_tests::HarnessError;
use assay_tests::guest::Guest;
use assay_tests::vm::Image;

use crate::loads::{TOOLS, perl};
use crate::payload::{Payload, digest};
use crate::row::{Column, MODES, Outcome, Row};
use crate::scene::{EAGAIN, EPERM, Hook, Scene, count, ima_has, ima_machine};
use crate::way::{Way, play_with};

/// Something that a program does, and the record of it.
struct Deed {
    name: &'static str,
    script: &'static str,
    kind: LoadKind,
    /// Words of the verdict.
    reason: &'static str,
}

/// Plays each deed in every mode. All are let through unless `refused`, and recorded with the digest of the program that did it.
fn play_deeds(row: &mut Row, scene: &Scene, mode: Mode, deeds: &[Deed], refused: bool) -> Result<(), HarnessError> {
    let guest = scene.guest();
    for deed in deeds {
        let name = format!("{}, {mode}", deed.name);
        let before = count(&scene.log()?, deed.kind);
        let hook = perl(guest, deed.script, "/usr/bin/true", 0)?;
        let expected = if refused { Hook::Refused(EPERM) } else { Hook::Passed };
        assert_eq!(hook, expected, "{name}");
        let log = scene.wait_log(&name, |log| count(log, deed.kind) > before)?;
        let record = log
            .loads()
            .into_iter()
            .rfind(|load| load.kind == deed.kind)
            .expect("just counted");
        let by = record.digest.map(|digest| digest.to_string());
        let perl = digest(&guest.get("/usr/bin/perl")?);
        let file = digest(&guest.get("/usr/bin/true")?);
        assert!(
            by == Some(perl) || deed.kind == LoadKind::Protect && by == Some(file),
            "{name}: {record:?}"
        );
        let was_refused = record.flags & assay_ebpf::flags::REFUSED != 0;
        assert_eq!(was_refused, refused, "{name}: {record:?}");
        if !deed.reason.is_empty() && (!refused || mode != Mode::Enforce) {
            scene.distrusted_for(deed.reason)?;
        }
        row.set(
            Column::Assay(mode),
            deed.name,
            if refused { Outcome::Refused } else { Outcome::Recorded },
        );
    }
    Ok(())
}

const MEMORY: [Deed; 4] = [
    Deed {
        name: "memory written, then made executable",
        script: "my $at = syscall(9, 0, 4096, 3, 0x22, -1, 0); exit(syscall(10, $at, 4096, 5) == 0 ? 0 : 100 + $!);",
        kind: LoadKind::Anonymous,
        reason: "made memory executable",
    },
    Deed {
        name: "memory writable and executable at once",
        script: "my $at = syscall(9, 0, 4096, 7, 0x22, -1, 0); exit($at > 0 ? 0 : 100 + $!);",
        kind: LoadKind::Anonymous,
        reason: "made memory executable",
    },
    Deed {
        name: "private mapping of a file, changed, then made executable",
        script: r#"open(my $f, "<", $ARGV[0]) or die; open(my $zero, "<", "/dev/zero") or die;
            my $at = syscall(9, 0, 4096, 3, 2, fileno($f), 0); syscall(0, fileno($zero), $at, 8);
            exit(syscall(10, $at, 4096, 5) == 0 ? 0 : 100 + $!);"#,
        kind: LoadKind::Protect,
        reason: "changed in memory",
    },
    Deed {
        name: "mapping of approved code, made executable later",
        script: r#"open(my $f, "<", $ARGV[0]) or die; my $at = syscall(9, 0, 4096, 1, 2, fileno($f), 0);
            exit(syscall(10, $at, 4096, 5) == 0 ? 0 : 100 + $!);"#,
        kind: LoadKind::Protect,
        reason: "",
    },
];

#[test]
fn attack_09_memory_that_becomes_executable() -> Result<(), HarnessError> {
    let mut row = Row::new(
        9,
        "mprotect to executable, anonymous code, writing another process's memory",
    );
    let mut scene = Scene::set("", &format!("{TOOLS}; true"))?;
    let [anonymous @ .., approved] = &MEMORY;
    for &mode in MODES {
        scene.enter(mode)?;
        play_deeds(&mut row, &scene, mode, std::slice::from_ref(approved), false)?;
        play_deeds(&mut row, &scene, mode, anonymous, false)?;
        row.set(
            Column::Assay(mode),
            "ptrace, process_vm_writev on other processes",
            Outcome::Unseen,
        );
    }
    // Where it is wanted, none of it is let through.
    scene.enter_with(Mode::Hold, "deny_anonymous = true")?;
    let mut denied = Row::unkept(9);
    play_deeds(&mut denied, &scene, Mode::Hold, anonymous, true)?;
    ima_memory(&mut row)?;
    row.note("with `deny_anonymous = true` in agent.toml, the first three are refused as well, in every mode (played in hold). What is written into another process's memory is no load; on the agent itself it is refused (row 3)");
    row.done();
    Ok(())
}

fn ima_memory(row: &mut Row) -> Result<(), HarnessError> {
    let vm = ima_machine()?;
    let guest = vm.guest();
    guest.run_ok(&["perl", "-MIO::Handle", "-MFcntl", "-e", "1"])?;
    guest.run_ok(&["cat", "/usr/bin/true"])?;
    let lines = || Ok::<_, HarnessError>(ima_log(guest)?.lines().count());
    for deed in &MEMORY {
        let before = lines()?;
        assert_eq!(
            perl(guest, deed.script, "/usr/bin/true", 0)?,
            Hook::Passed,
            "{}",
            deed.name
        );
        let recorded = lines()? > before;
        row.set(
            Column::Ima,
            deed.name,
            if recorded { Outcome::Recorded } else { Outcome::Unseen },
        );
    }
    row.set(
        Column::Ima,
        "ptrace, process_vm_writev on other processes",
        Outcome::Unseen,
    );
    Ok(())
}

fn ima_log(guest: &Guest) -> Result<String, HarnessError> {
    guest.get_text("/sys/kernel/security/ima/ascii_runtime_measurements")
}

#[test]
fn attack_12_devices_that_reach_the_hypervisor() -> Result<(), HarnessError> {
    let mut row = Row::new(12, "dom0: hypervisor calls through /dev/xen/privcmd");
    let mut scene = Scene::set("watch_devices = [\"/dev/loop-control\"]", TOOLS)?;
    let deed = [Deed {
        name: "",
        script: r#"open(my $device, "+<", "/dev/loop-control") or exit(100 + $!); exit(0);"#,
        kind: LoadKind::Device,
        reason: "/dev/loop-control",
    }];
    for &mode in MODES {
        scene.enter(mode)?;
        play_deeds(&mut row, &scene, mode, &deed, false)?;
    }
    let vm = ima_machine()?;
    let guest = vm.guest();
    guest.run_ok(&["perl", "-MIO::Handle", "-MFcntl", "-e", "1"])?;
    let before = ima_log(guest)?.lines().count();
    assert_eq!(perl(guest, deed[0].script, "", 0)?, Hook::Passed);
    let recorded = ima_log(guest)?.lines().count() > before;
    row.set(
        Column::Ima,
        "",
        if recorded { Outcome::Recorded } else { Outcome::Unseen },
    );
    row.note("each opener is recorded, and must be permitted by the policy; what it then asks of the hypervisor is out of scope. The machine has no Xen: another watched device (`watch_devices`) stands for privcmd");
    row.done();
    Ok(())
}

/// What Assay says of a BPF program: SHA-256 over that of the instructions, the type and the attach type.
fn bpf_digest(instructions: &[u8], kind: u32) -> String {
    let mut identity = digest_bytes(instructions);
    identity.extend(kind.to_le_bytes());
    identity.extend(0_u32.to_le_bytes());
    digest(&identity)
}

fn digest_bytes(bytes: &[u8]) -> Vec<u8> {
    Sha256Digest::of(bytes).as_bytes().to_vec()
}

/// BPF_PROG_TYPE_SOCKET_FILTER and BPF_PROG_TYPE_TRACEPOINT.
const FILTER: u32 = 1;
const TRACEPOINT: u32 = 5;

fn load_bpf(guest: &Guest, path: &str, kind: u32) -> Result<Hook, HarnessError> {
    let script = format!(
        r#"open(my $f, "<", $ARGV[0]) or die; binmode($f); local $/; my $code = <$f>; my $license = "GPL\0";
        my $attr = pack("LLQQLLQLLx88", {kind}, length($code) / 8, unpack("Q", pack("p", $code)), unpack("Q", pack("p", $license)), 0, 0, 0, 0, 0);
        exit(syscall(321, 5, $attr, length($attr)) >= 0 ? 0 : 100 + $!);"#
    );
    perl(guest, &script, path, 0)
}

#[test]
fn attack_13_bpf_programs() -> Result<(), HarnessError> {
    let mut row = Row::new(13, "bpf() as code loading, eBPF rootkits");
    let mut scene = Scene::set("", TOOLS)?;
    let way = Way {
        payload: Payload::Bpf,
        digest: |code| bpf_digest(code, TRACEPOINT),
        kind: LoadKind::BpfProgram,
        waits: false,
        ima: false,
        play: |guest, path| load_bpf(guest, path, TRACEPOINT),
        ..Way::program("tracing program", "/tmp")
    };
    let filter = Way {
        name: "socket filter",
        digest: |code| bpf_digest(code, FILTER),
        // It sees only what its own process receives.
        passes: true,
        play: |guest, path| load_bpf(guest, path, FILTER),
        ..way
    };
    play_with(&mut row, &mut scene, &[way, filter], "true")?;
    row.done();
    Ok(())
}

#[test]
fn attack_11_kexec() -> Result<(), HarnessError> {
    let mut row = Row::new(11, "kexec (kexec_file_load, kexec_load)");
    let image = Image::load()?;
    let mut scene = Scene::set("", TOOLS)?;
    let content = std::fs::read(&image.kernel).expect("the machines' kernel");
    // KEXEC_FILE_NO_INITRAMFS; afterwards it is thrown away again.
    let load = r#"open(my $f, "<", $ARGV[0]) or die; my $line = "quiet\0";
        syscall(320, fileno($f), -1, length($line), $line, 4) == 0 or exit(100 + $!);
        syscall(320, -1, -1, 0, 0, 1); exit(0);"#;
    let pieces = "exit(syscall(246, 0, 0, 0, 0) == 0 ? 0 : 100 + $!);";
    for &mode in MODES {
        let mut kernel = content.clone();
        kernel.extend(mode.name().bytes());
        let path = format!("/root/kernel-{mode}");
        scene.guest().put(&path, 0o600, &kernel)?;
        let digest = digest(&kernel);
        scene.enter(mode)?;
        let guest = scene.guest();
        let first = perl(guest, load, &path, 0)?;
        let outcome = match mode {
            Mode::Observe => (Hook::Passed, Outcome::Recorded),
            Mode::Hold => (Hook::Refused(EAGAIN), Outcome::RefusedFirst),
            Mode::Enforce => (Hook::Refused(EPERM), Outcome::Refused),
        };
        assert_eq!(first, outcome.0, "{mode}");
        let log = scene.wait_log("the kernel", |log| !crate::scene::about(log, &digest).is_empty())?;
        let records = crate::scene::about(&log, &digest);
        assert!(
            records.iter().all(|load| load.kind == LoadKind::KexecImage),
            "{records:?}"
        );
        match mode {
            Mode::Enforce => drop(scene.still_trusted()?),
            Mode::Hold => {
                Guest::wait_for("the kernel is refused for ever", crate::common::PATIENCE, || {
                    Ok((perl(guest, load, &path, 0)? == Hook::Passed).then_some(()))
                })?;
                scene.distrusted_for(&digest)?;
            }
            Mode::Observe => drop(scene.distrusted_for(&digest)?),
        }
        row.set(Column::Assay(mode), "kexec_file_load", outcome.1);

        // In pieces, which nobody can measure: refused wherever anything is refused.
        let before = count(&scene.log()?, LoadKind::KexecLoad);
        let hook = perl(guest, pieces, "", 0)?;
        let outcome = if mode == Mode::Observe {
            (Hook::Passed, Outcome::Recorded)
        } else {
            (Hook::Refused(EPERM), Outcome::Refused)
        };
        assert_eq!(hook, outcome.0, "{mode}");
        scene.wait_log("kexec_load", |log| count(log, LoadKind::KexecLoad) > before)?;
        row.set(Column::Assay(mode), "kexec_load", outcome.1);
    }
    scene.distrusted_for("kexec kernel")?;

    let vm = ima_machine()?;
    let guest = vm.guest();
    // In memory, where IMA does not notice that it is read.
    guest.put("/tmp/kernel", 0o600, &content)?;
    guest.run_ok(&["perl", "-MIO::Handle", "-MFcntl", "-e", "1"])?;
    assert_eq!(perl(guest, load, "/tmp/kernel", 0)?, Hook::Passed);
    let has = ima_has(guest, &digest(&content))?;
    row.set(
        Column::Ima,
        "kexec_file_load",
        if has { Outcome::Recorded } else { Outcome::Unseen },
    );
    let before = ima_log(guest)?.lines().count();
    assert_eq!(perl(guest, pieces, "", 0)?, Hook::Passed);
    let recorded = ima_log(guest)?.lines().count() > before;
    row.set(
        Column::Ima,
        "kexec_load",
        if recorded { Outcome::Recorded } else { Outcome::Unseen },
    );
    row.note("a kernel that was started by kexec leaves the TPM's registers as they were: the verifier sees a new boot without a reset of the TPM, and refuses it");
    row.done();
    Ok(())
}
