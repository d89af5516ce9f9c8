//! Rows at the borders: before the agent, beside the TPM, without room, and what is not measured at all.

use std::time::Duration;

use assay_evidence::event::{Event, LoadKind, Mode, Violation};
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::guest::Guest;
use assay_tests::vm::{Image, RestoreOptions, Variant, Vm};
use assay_verifier::keystore::{FileKeyStore, KeySource as _};

use crate::common::PATIENCE;
use crate::loads::TOOLS;
use crate::payload::{EXIT, Payload, digest};
use crate::row::{Column, MODES, Outcome, Row};
use crate::scene::{EAGAIN, EPERM, Hook, Scene, about, ima_has, ima_machine, image};

#[test]
fn attack_19_what_runs_before_the_agent() -> Result<(), HarnessError> {
    let mut row = Row::new(19, "unmeasured start: everything before the agent runs");
    let mut scene = Scene::set("", TOOLS)?;
    scene.guest().run_ok(&["sync"])?;
    scene.stage.vm.reset()?;
    let guest = scene.guest();
    // One that still runs, though its file is gone; a library that is mapped; a module; and one that has ended.
    let with_salt = |path: &str, salt: &str| -> Result<Vec<u8>, HarnessError> {
        let mut bytes = guest.get(path)?;
        bytes.extend(salt.bytes());
        Ok(bytes)
    };
    let running = with_salt("/usr/bin/sleep", "early")?;
    let library = with_salt("/usr/lib/x86_64-linux-gnu/libc.so.6", "early")?;
    let ended = Payload::Tiny.make(guest)?;
    guest.put("/root/early", 0o755, &running)?;
    guest.put("/root/early.so", 0o755, &library)?;
    guest.put("/root/ended", 0o755, &ended)?;
    guest.spawn(
        &["env", "LD_PRELOAD=/root/early.so", "/root/early", "1000"],
        "/dev/null",
    )?;
    assert_eq!(Hook::run(guest, &["/root/ended"], EXIT)?, Hook::Passed);
    guest.script("modprobe dummy; until grep -q early.so /proc/*/maps 2> /dev/null; do sleep 0.1; done; rm /root/early /root/ended")?;
    scene.stage.agent = Agent::start(guest)?;
    let log = scene.wait_log("all of the inventory", |log| log.events.contains(&Event::Ready))?;
    let found = |digest: &str| {
        let has = |found: &&assay_evidence::event::Measurement| found.digest.is_some_and(|of| of.to_string() == digest);
        log.inventory().into_iter().find(has).map(|found| found.kind)
    };
    assert_eq!(found(&digest(&running)), Some(LoadKind::Program));
    assert_eq!(found(&digest(&library)), Some(LoadKind::Mapping));
    let module = log
        .inventory()
        .into_iter()
        .any(|found| found.kind == LoadKind::LoadedModule && found.path.contains("dummy"));
    assert!(module, "the module is in the inventory");
    assert_eq!(found(&digest(&ended)), None);
    assert!(about(&log, &digest(&ended)).is_empty());
    scene.distrusted_for(&digest(&running))?;
    scene.distrusted_for(&digest(&library))?;
    scene.distrusted_for("dummy")?;
    row.set_modes("what still runs, is mapped or is loaded", Outcome::Recorded);
    row.set_modes("what has ended by then", Outcome::Unseen);

    let vm = ima_machine()?;
    let program = Payload::Tiny.make(vm.guest())?;
    vm.guest().put("/root/ended", 0o755, &program)?;
    assert_eq!(Hook::run(vm.guest(), &["/root/ended"], EXIT)?, Hook::Passed);
    let has = ima_has(vm.guest(), &digest(&program))?;
    row.set(Column::Ima, "", if has { Outcome::Recorded } else { Outcome::Unseen });
    row.note("the log begins with the agent: what has ended before is for measured boot (initramfs and command line), and for starting the agent early. IMA begins with the kernel");
    row.done();
    Ok(())
}

#[test]
fn attack_26_a_probe_on_the_tpms_bus() -> Result<(), HarnessError> {
    let mut row = Row::new(26, "TPM bus: sniffing, interposer");
    let options = RestoreOptions {
        extend_delay: Some(Duration::ZERO),
    };
    let vm = Vm::restore_with(&image()?, &options)?;
    let scene = Scene::set_with_disks(vm, TOOLS)?;
    scene.stage.sealed_disk("/root/disk.img", b"x")?;
    let ended = agent::unlock(scene.guest(), "/root/disk.img", 60)?;
    assert!(ended.ok(), "{ended}");
    // The key of the disk, as text and as bytes.
    let store = FileKeyStore::open(&scene.stage.verifier.state_dir()).expect("the key store");
    let listed = store.list().expect("its keys");
    let key = store
        .get(listed.keys.first().expect("one key").key_id)
        .expect("the key");
    let passphrase = key.passphrase.expose();
    let traffic = scene.stage.vm.slow_tpm().expect("a proxy").traffic();
    assert!(traffic.len() > 10_000, "the probe saw {} bytes", traffic.len());
    for form in [passphrase.to_vec(), from_hex(passphrase)] {
        assert!(form.len() >= 32);
        assert!(
            !traffic.windows(form.len()).any(|window| window == form),
            "the key went over the bus"
        );
    }
    row.set_modes("sniffing", Outcome::Fails);
    row.set_modes("interposer", Outcome::OutOfScope);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("no disk key crosses the bus (tried: everything on it was recorded while a disk was opened). Who changes what is on the bus can forge extends and resets: that needs hands on the machine, and a firmware TPM or a bus that authenticates against it");
    row.done();
    Ok(())
}

fn from_hex(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    (0..text.len() / 2)
        .filter_map(|at| u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok())
        .collect()
}

#[test]
fn attack_27_a_broken_tpm() -> Result<(), HarnessError> {
    let mut row = Row::new(27, "breaks of firmware TPMs (faulTPM)");
    let scene = Scene::set("", TOOLS)?;
    // What a list of broken ones would go by is there to see.
    let status = scene.stage.agent.status()?;
    for (member, value) in [("tpm_manufacturer", "IBM"), ("tpm_firmware", ".")] {
        let found = status
            .get(member)
            .and_then(serde_json::Value::as_str)
            .unwrap_or_default();
        assert!(found.contains(value), "{member}: {status}");
    }
    row.set_modes("", Outcome::OutOfScope);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("everything rests on the TPM keeping its keys. Its maker and firmware are shown, and hosts are enrolled by their TPM's own key or its maker's certificate: what is known to be broken need not be enrolled");
    row.done();
    Ok(())
}

#[test]
fn attack_32_memory_attacks() -> Result<(), HarnessError> {
    let mut row = Row::new(32, "memory attacks, kernel exploits, io_uring");
    let scene = Scene::set("", TOOLS)?;
    // Whether the kernel keeps root out of its memory is in the log.
    let log = scene.log()?;
    let lockdown = scene.guest().get_text("/sys/kernel/security/lockdown")?;
    let active = lockdown.split(['[', ']']).nth(1).unwrap_or_default().to_owned();
    assert_eq!(log.start().lockdown, active, "{lockdown}");
    assert!(!log.start().lsm.is_empty() && !log.start().cmdline.is_empty());
    row.set_modes("", Outcome::OutOfScope);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("measuring loads says nothing of memory that is changed afterwards. Lockdown state, security modules and the kernel's command line are in the log's first record; io_uring has no way to run a program, and its opens pass the same hooks");
    row.done();
    Ok(())
}

/// Longer than Linux waits for a TPM.
const DEAD: Duration = Duration::from_secs(10);

/// A new program is run that the agent can't get into log and register any more: the agent ends for it, what is known
/// runs on, and the host is no longer trusted.
fn ends_the_agent(scene: &Scene, mode: Mode, program: &str) -> Result<Outcome, HarnessError> {
    let guest = scene.guest();
    let hook = Hook::run(guest, &[program], EXIT)?;
    let (expected, outcome) = match mode {
        Mode::Observe => (Hook::Passed, Outcome::Detected),
        Mode::Hold => (Hook::Refused(EAGAIN), Outcome::Refused),
        Mode::Enforce => (Hook::Refused(EPERM), Outcome::Refused),
    };
    assert_eq!(hook, expected, "{mode}");
    assert_eq!(
        Hook::run(guest, &["/usr/bin/true"], 0)?,
        Hook::Passed,
        "{mode}: what is known runs"
    );
    let ended = guest.wait(scene.stage.agent.pid(), PATIENCE)?;
    assert_eq!(ended.code, Some(1), "{ended}");
    scene.stage.wait("no longer trusted", |host| host.state != "trusted")?;
    Ok(outcome)
}

/// Starts the agent over and over, as systemd does, until the TPM has got over what it was asked before.
fn restart(guest: &Guest) -> Result<Agent, HarnessError> {
    Guest::wait_for("no agent finds the TPM in order again", PATIENCE, || {
        Ok(Agent::start(guest).ok())
    })
}

#[test]
fn attack_30_the_tpm_stalls_or_is_gone() -> Result<(), HarnessError> {
    let mut row = Row::new(30, "TPM stall, TPM gone");
    let options = RestoreOptions {
        extend_delay: Some(Duration::ZERO),
    };
    let vm = Vm::restore_with(&image()?, &options)?;
    let mut scene = Scene::set_in(vm, "", TOOLS)?;
    let delay = |scene: &Scene, delay| scene.stage.vm.slow_tpm().expect("a proxy").set_delay(delay);
    for &mode in MODES {
        scene.enter(mode)?;
        let guest = scene.guest();
        let new = |name: &str| -> Result<(String, String), HarnessError> {
            let (path, program) = (format!("/root/{name}-{mode}"), Payload::Tiny.make(guest)?);
            guest.put(&path, 0o755, &program)?;
            Ok((path, digest(&program)))
        };
        let (slow, dead) = (new("slow")?, new("dead")?);
        delay(&scene, Duration::from_millis(400));
        let hook = Hook::run(guest, &[&slow.0], EXIT)?;
        let expected = if mode == Mode::Enforce {
            Hook::Refused(EPERM)
        } else {
            Hook::Passed
        };
        assert_eq!(hook, expected, "{mode}");
        scene.wait_log("the program", |log| !about(log, &slow.1).is_empty())?;
        row.set(
            Column::Assay(mode),
            "slow",
            match mode {
                Mode::Observe => Outcome::Recorded,
                Mode::Hold => Outcome::ExtendedFirst,
                Mode::Enforce => Outcome::Refused,
            },
        );
        delay(&scene, DEAD);
        let outcome = ends_the_agent(&scene, mode, &dead.0)?;
        row.set(Column::Assay(mode), "gone", outcome);
        delay(&scene, Duration::ZERO);
        scene.stage.agent = restart(scene.guest())?;
        scene.wait_log("what was tried meanwhile", |log| !about(log, &dead.1).is_empty())?;
    }
    let vm = Vm::restore_with(&Image::load()?.booted(Variant::ImaTcb), &options)?;
    let guest = vm.guest();
    let program = Payload::Tiny.make(guest)?;
    guest.put("/root/dead", 0o755, &program)?;
    vm.slow_tpm().expect("a proxy").set_delay(DEAD);
    assert_eq!(
        Hook::run(guest, &["/root/dead"], EXIT)?,
        Hook::Passed,
        "it runs, extended or not"
    );
    assert!(ima_has(guest, &digest(&program))?);
    row.set(Column::Ima, "slow", Outcome::Recorded);
    row.set(Column::Ima, "gone", Outcome::Recorded);
    row.note("without a TPM the agent ends: no quote, no trust, and in hold and enforce nothing new runs. IMA lets a program run though its extend has failed; it is in the log and not in the register");
    row.done();
    Ok(())
}

#[test]
fn attack_31_no_room_for_the_log() -> Result<(), HarnessError> {
    let mut row = Row::new(31, "log folder or disk full");
    // No agent has measured here before: its log would be gone.
    let vm = Vm::restore(&Image::load()?)?;
    vm.guest()
        .script("mkdir -p /run/assay; mount -t tmpfs -o size=2m tmpfs /run/assay")?;
    let mut scene = Scene::set_in(vm, "", TOOLS)?;
    for &mode in MODES {
        scene.enter(mode)?;
        let guest = scene.guest();
        let program = Payload::Tiny.make(guest)?;
        let path = format!("/root/last-{mode}");
        guest.put(&path, 0o755, &program)?;
        guest.run(&["dd", "if=/dev/zero", "of=/run/assay/filler", "bs=4096", "status=none"])?;
        let outcome = ends_the_agent(&scene, mode, &path)?;
        row.set(Column::Assay(mode), "", outcome);
        guest.run_ok(&["rm", "/run/assay/filler"])?;
        scene.stage.agent = Agent::start(scene.guest())?;
        // With room again the kernel's records come, and the log says that it broke off.
        let log = scene.wait_log("what the kernel kept", |log| !about(log, &digest(&program)).is_empty())?;
        let broke =
            |violation: &&Violation| matches!(violation, Violation::LogMismatch { .. } | Violation::LogFull { .. });
        assert!(log.violations().iter().any(broke), "{:?}", log.violations());
    }
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("the register is extended with a mark that no log explains, and the agent ends. IMA's log is kernel memory, without a limit");
    row.done();
    Ok(())
}
