//! The agent's life: in which order it starts and stops, what survives its death, and what it refuses.

use std::time::Duration;

use assay_agent::measure::BROKEN;
use assay_ebpf::flags;
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::event::{Event, LoadKind, Violation};
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::guest::Guest;
use assay_tests::vm::Vm;

use crate::common::{PATIENCE, machine, pcr13, put_new_program, sha256sum};
use crate::log::{LOG, Log, short};

/// Receives what a service tells systemd, one line a message.
const NOTIFY_LISTENER: &str = r#"
import socket
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind("/run/notify")
while True:
    print(listener.recv(4096).decode().replace("\n", " "), flush=True)
"#;

/// Waits until the service has told systemd this.
fn wait_told(guest: &Guest, word: &str) -> Result<(), HarnessError> {
    Guest::wait_for(&format!("systemd was never told {word}"), PATIENCE, || {
        Ok(guest
            .get_text("/run/told")
            .ok()
            .filter(|told| told.contains(word))
            .map(drop))
    })
}

#[test]
fn vm_agent_starts_and_stops_in_order_and_tells_systemd() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    guest.script("cp /usr/bin/sleep /root/gone; printf x >> /root/gone")?;
    let gone = sha256sum(&vm, "/root/gone")?;
    guest.spawn(&["/root/gone", "1000"], "/dev/null")?;
    guest.spawn(&["python3", "-uc", NOTIFY_LISTENER], "/run/told")?;
    Guest::wait_for("no listener", PATIENCE, || {
        Ok(guest.run(&["test", "-S", "/run/notify"])?.ok().then_some(()))
    })?;
    guest.script("rm /root/gone")?;

    let pid = guest.spawn(
        &[
            "env",
            "NOTIFY_SOCKET=/run/notify",
            "WATCHDOG_USEC=6000000",
            "assay-agent",
            "run",
        ],
        agent::LOG,
    )?;
    wait_told(guest, "READY=1")?;
    let log = Log::read(guest, LOG)?;
    let found = |wanted: &dyn Fn(&Event) -> bool| log.events.iter().position(wanted);
    assert!(
        matches!(log.events.first(), Some(Event::AgentStart(_))),
        "{:?}",
        log.events.first()
    );
    let ready = found(&|event| *event == Event::Ready).expect("READY is in the log before systemd hears of it");
    let last_found = log
        .events
        .iter()
        .rposition(|event| matches!(event, Event::Inventory(_)))
        .expect("an inventory");
    assert!(last_found < ready && log.count(&Event::Ready) == 1);
    check_start_and_inventory(&vm, &log, &gone)?;

    // A second one changes nothing.
    let second = guest.run(&["assay-agent", "run"])?;
    assert_eq!(second.code, Some(1), "{second}");
    assert!(
        second.stderr.contains("another assay-agent") && second.stderr.contains("stop"),
        "{second}"
    );
    wait_told(guest, "WATCHDOG=1")?;

    guest.signal(pid, 15)?;
    assert_eq!(guest.wait(pid, PATIENCE)?.code, Some(0));
    wait_told(guest, "STOPPING=1")?;
    let log = Log::settled(&vm, LOG)?;
    assert_eq!(log.events.last(), Some(&Event::AgentStop));
    assert_eq!(log.starts().len(), 1);

    // What runs while no agent does waits for the next, which needs no second inventory.
    put_new_program(&vm, "/root/between")?;
    guest.run_ok(&["/root/between"])?;
    let _agent = Agent::start(guest)?;
    Log::wait(guest, LOG, "/root/between", |log| !log.of("/root/between").is_empty())?;
    let log = Log::settled(&vm, LOG)?;
    assert_eq!(
        log.of("/root/between"),
        [(LoadKind::Program, sha256sum(&vm, "/root/between")?, 0)]
    );
    let stop = log
        .events
        .iter()
        .position(|event| *event == Event::AgentStop)
        .expect("still there");
    assert!(
        !log.events[stop..]
            .iter()
            .any(|event| matches!(event, Event::Inventory(_)))
    );
    assert_eq!(
        (log.starts().len(), log.count(&Event::Ready), log.violations().len()),
        (2, 2, 0),
        "{:?}",
        log.violations()
    );
    let mut before = log.events[..stop]
        .iter()
        .filter_map(|event| if let Event::Load(load) = event { load.seq } else { None });
    assert_eq!(log.starts()[1].predecessor, before.next_back());
    log.assert_no_gap();
    Ok(())
}

/// The first record tells the truth about agent, kernel and boot; the inventory has what ran.
fn check_start_and_inventory(vm: &Vm, log: &Log, gone: &str) -> Result<(), HarnessError> {
    let start = log.start();
    let guest = vm.guest();
    assert_eq!(start.agent_digest.to_string(), sha256sum(vm, "/usr/bin/assay-agent")?);
    assert_eq!(
        start.bpf_digest.to_string(),
        sha256sum(vm, "/usr/lib/assay/assay-ebpf.o")?
    );
    assert_eq!(start.boot_id, guest.get_text("/proc/sys/kernel/random/boot_id")?.trim());
    assert_eq!(start.cmdline, guest.get_text("/proc/cmdline")?.trim_end_matches('\n'));
    assert_eq!(start.predecessor, None);
    assert!(
        start
            .pcr_start
            .iter()
            .all(|(_, value)| value.iter().all(|byte| *byte == 0)),
        "{:?}",
        start.pcr_start
    );
    let inventory: Vec<_> = log
        .inventory()
        .into_iter()
        .map(|found| (found.path.to_string(), short(found)))
        .collect();
    let module = guest.run_ok(&["modinfo", "-n", "dm_mod"])?.trim().to_owned();
    for (kind, path) in [
        (LoadKind::Program, "/usr/bin/assay-agent"),
        (LoadKind::Program, "/usr/bin/assay-guest"),
        (LoadKind::Mapping, "/usr/lib/x86_64-linux-gnu/libc.so.6"),
        (LoadKind::LoadedModule, module.as_str()),
    ] {
        let expected = (path.to_owned(), (kind, sha256sum(vm, path)?, 0));
        assert!(inventory.contains(&expected), "{expected:?} is not in {inventory:?}");
    }
    let deleted = (
        "/root/gone (deleted)".to_owned(),
        (LoadKind::Program, gone.to_owned(), flags::UNLINKED),
    );
    assert!(inventory.contains(&deleted), "{deleted:?} is not in {inventory:?}");
    Ok(())
}

/// Programs that run while agents are killed.
const PROGRAMS: usize = 90;

#[test]
fn vm_agent_killed_at_any_moment_loses_and_repeats_nothing() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let mut agent = Agent::start(guest)?;
    guest.script(&format!(
        "cd /root; for i in $(seq 0 {}); do cp /usr/bin/true q$i; printf $i >> q$i; done",
        PROGRAMS - 1
    ))?;
    // Stopped, so that events wait in the kernel when it is killed; then killed while it works on them.
    for (round, programs) in (0..PROGRAMS).collect::<Vec<_>>().chunks(PROGRAMS / 3).enumerate() {
        let run = programs
            .iter()
            .map(|number| format!("/root/q{number}"))
            .collect::<Vec<_>>()
            .join("; ");
        if round == 0 {
            guest.signal(agent.pid(), 19)?;
            guest.script(&run)?;
            agent.kill()?;
        } else {
            let running = guest.spawn(&["bash", "-euc", &run], "/root/run.log")?;
            std::thread::sleep(Duration::from_millis(if round == 1 { 150 } else { 400 }));
            agent.kill()?;
            let ended = guest.wait(running, PATIENCE)?;
            assert!(ended.ok(), "{ended}");
        }
        agent = Agent::start(guest)?;
    }
    let last = format!("/root/q{}", PROGRAMS - 1);
    Log::wait(guest, LOG, &last, |log| !log.of(&last).is_empty())?;
    let log = Log::settled(&vm, LOG)?;
    let program = guest.get("/usr/bin/true")?;
    for number in 0..PROGRAMS {
        let digest = Sha256Digest::of(&[program.as_slice(), number.to_string().as_bytes()].concat()).to_string();
        assert_eq!(
            log.of(&format!("/root/q{number}")),
            [(LoadKind::Program, digest, 0)],
            "program {number}"
        );
    }
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    assert_eq!(log.starts().len(), 4);
    let status = agent.status()?;
    assert_eq!(
        status.get("log_head").and_then(|head| head.as_str()),
        Some(log.pcr().as_str())
    );
    assert_eq!(
        status.get("records").and_then(serde_json::Value::as_u64),
        Some(log.records.len() as u64)
    );
    // The printed log says what the file says.
    let printed = guest.run_ok(&["assay-agent", "log", "--json"])?;
    let printed: Vec<serde_json::Value> = printed
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let expected: Vec<_> = log.records.iter().map(assay_evidence::cel::to_json).collect();
    assert_eq!(printed, expected);
    Ok(())
}

#[test]
fn vm_agent_tells_that_a_kernel_program_was_removed() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let agent = Agent::start(guest)?;
    Log::settled(&vm, LOG)?;
    agent.kill()?;
    // One of several, and the folder stays: nobody knows what it would have seen until the next start.
    guest.script("rm /sys/fs/bpf/assay/programs-*/mapping")?;
    let _agent = Agent::start(guest)?;
    let log = Log::settled(&vm, LOG)?;
    // Others may follow: the queue outlived the programs, and its numbers do not begin anew.
    assert!(
        matches!(log.violations().first(), Some(Violation::HooksMissing { .. })),
        "{:?}",
        log.violations()
    );
    assert_eq!(
        (log.starts().len(), log.count(&Event::Ready)),
        (2, 2),
        "a new inventory"
    );
    Ok(())
}

#[test]
fn vm_agent_refuses_bad_settings_and_leaves_nothing_behind() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    guest.script("mkdir /root/ro; mount -t tmpfs -o ro tmpfs /root/ro")?;
    let refused = |settings: &str, words: &[&str]| -> Result<(), HarnessError> {
        guest.put("/root/agent.toml", 0o600, settings.as_bytes())?;
        let ended = guest.run_with(&["assay-agent", "--config", "/root/agent.toml", "run"], b"", PATIENCE)?;
        assert_eq!(ended.code, Some(1), "{settings}: {ended}");
        for word in words {
            assert!(ended.stderr.contains(word), "{settings}: no {word:?} in\n{ended}");
        }
        Ok(())
    };
    refused("[tpm]\npcrs = 13\n", &["pcrs", "/root/agent.toml"])?;
    refused("[tpm]\ntcti = \"device:/dev/tpm9\"\n", &["/dev/tpm9", "[tpm] tcti"])?;
    refused("bpf_object = \"/root/none.o\"\n", &["/root/none.o"])?;
    assert_eq!(
        guest.run_ok(&["ls", "/sys/fs/bpf"])?,
        "",
        "nothing may be left in the kernel"
    );
    refused(
        "run_dir = \"/root/ro/assay\"\n",
        &["/root/ro/assay", "run_dir", "writable"],
    )?;
    assert_eq!(
        pcr13(&vm)?,
        "0".repeat(64),
        "nothing was logged, so nothing may be extended"
    );
    Ok(())
}

#[test]
fn vm_agent_whose_log_gets_full_says_so_and_the_tpm_knows() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let log_path = "/root/small/log.cel";
    guest.script(
        "mkdir /root/small /etc/assay; mount -t tmpfs -o size=1m tmpfs /root/small
         echo 'run_dir = \"/root/small\"' > /etc/assay/agent.toml",
    )?;
    let agent = Agent::start(guest)?;
    put_new_program(&vm, "/root/last")?;
    // What fills it must be in the log by then: a record that is on its way leaves half a page in which the next one fits.
    let fill = "dd if=/dev/zero of=/root/small/filler bs=4096 status=none";
    guest.script(&format!("{fill} count=1"))?;
    Log::settled(&vm, log_path)?;
    guest.script(&format!("{fill} || true"))?;
    guest.run_ok(&["/root/last"])?;
    let ended = guest.wait(agent.pid(), PATIENCE)?;
    assert_eq!(ended.code, Some(1), "{ended}");
    let said = agent.journal();
    assert!(
        said.contains("/root/small") && said.contains("full") && said.contains("run_dir"),
        "{said}"
    );
    // A log that ends is not a log with nothing to say: the PCR has what no log explains.
    let log = Log::read(guest, log_path)?;
    let log_says: Vec<u8> = (0..64)
        .step_by(2)
        .map(|at| u8::from_str_radix(&log.pcr()[at..at + 2], 16).expect("hex"))
        .collect();
    let broken = Algorithm::Sha256.extend(&log_says, &Algorithm::Sha256.hash(BROKEN));
    let broken: String = broken.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(pcr13(&vm)?, broken);

    // With room again, the next agent goes on, says that there was a hole, and has what the kernel kept.
    guest.script("rm /root/small/filler")?;
    let _agent = Agent::start(guest)?;
    let log = Log::wait(guest, log_path, "/root/last", |log| !log.of("/root/last").is_empty())?;
    assert!(
        matches!(log.violations()[..], [Violation::LogMismatch { .. }]),
        "{:?}",
        log.violations()
    );
    assert_eq!(
        log.of("/root/last"),
        [(LoadKind::Program, sha256sum(&vm, "/root/last")?, 0)]
    );
    log.assert_no_gap();
    Ok(())
}

#[test]
fn vm_agent_after_a_reboot_sets_the_old_log_aside() -> Result<(), HarnessError> {
    let mut vm = machine()?;
    // On a disk, where the old boot's log survives.
    let log_path = "/var/lib/assay-run/log.cel";
    vm.guest()
        .put("/etc/assay/agent.toml", 0o644, b"run_dir = \"/var/lib/assay-run\"\n")?;
    let agent = Agent::start(vm.guest())?;
    put_new_program(&vm, "/root/before")?;
    vm.guest().run_ok(&["/root/before"])?;
    Log::wait(vm.guest(), log_path, "/root/before", |log| {
        log.of("/root/before").len() == 1
    })?;
    Log::settled(&vm, log_path)?;
    agent.kill()?;
    let old = vm.guest().get(log_path)?;
    let old_boot = Log::read(vm.guest(), log_path)?.start().boot_id.clone();
    vm.guest().run_ok(&["sync"])?;
    vm.reset()?;

    let _agent = Agent::start(vm.guest())?;
    let log = Log::settled(&vm, log_path)?;
    assert_eq!(
        vm.guest().get(&format!("{log_path}.{old_boot}"))?,
        old,
        "the old log is kept as it was"
    );
    let start = log.start();
    assert_ne!(start.boot_id, old_boot);
    assert_eq!(
        start.boot_id,
        vm.guest().get_text("/proc/sys/kernel/random/boot_id")?.trim()
    );
    assert!(
        start
            .pcr_start
            .iter()
            .all(|(_, value)| value.iter().all(|byte| *byte == 0)),
        "{:?}",
        start.pcr_start
    );
    assert_eq!(
        (log.starts().len(), log.violations().len(), log.of("/root/before").len()),
        (1, 0, 0)
    );
    assert!(log.count(&Event::Ready) == 1 && !log.inventory().is_empty());
    log.assert_no_gap();
    Ok(())
}
