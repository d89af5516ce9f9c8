//! The README's quick start, executed; then what an operator does later: upgrade, go back, remove, purge.

use std::path::PathBuf;

use assay_evidence::event::Event;
use assay_tests::HarnessError;
use assay_tests::agent::{self, QCOW2};
use assay_tests::guest::Guest;
use assay_tests::vm::Vm;

use crate::built::package;
use crate::common::put_new_program;
use crate::log::{LOG, Log};
use crate::machine::{PATIENCE, changed, changed_with, exists, install, listening, machine, property};
use crate::readme::QuickStart;
use crate::xcpng::unpacked;

/// What the disk of step 5 begins with.
const CONTENT: &str = "from the sealed disk";
/// The version of an upgrade.
const NEWER: &str = "9.0-1";
/// The programs that seal a disk in qcow2, and that open it where there is a service manager, once.
const SEAL_QCOW2: &str = "pgrep none || true
    assay-verifier image seal --format qcow2-luks rehearsal.raw rehearsal.qcow2; systemd-run --scope --quiet true";
const AGENT: &str = "assay-agent.service";
const VERIFIER: &str = "assay-verifier.service";

/// Waits until the host is, or is not, trusted; the reasons.
fn wait_verdict(guest: &Guest, trusted: bool) -> Result<String, HarnessError> {
    let what = format!("the host is not yet {}", if trusted { "trusted" } else { "untrusted" });
    let mut last = String::new();
    let waited = Guest::wait_for(&what, PATIENCE, || {
        let ended = guest.run(&["assay-agent", "verdict"])?;
        last = ended.to_string();
        let is = match ended.code {
            Some(0) => Some(true),
            Some(3) => Some(false),
            _ => None,
        };
        Ok((is == Some(trusted)).then_some(()))
    });
    waited.inspect_err(|_| println!("{last}"))?;
    Ok(last)
}

/// Prints how long the agent took to be ready, and how much of this was the inventory.
fn print_start(guest: &Guest) -> Result<(), HarnessError> {
    let micros =
        |name: &str| Ok::<_, HarnessError>(property(guest, AGENT, name)?.parse::<f64>().unwrap_or_default() / 1e6);
    let (start, ready) = (
        micros("ExecMainStartTimestampMonotonic")?,
        micros("ActiveEnterTimestampMonotonic")?,
    );
    let journal = guest.run_ok(&["journalctl", "-u", AGENT, "-o", "cat", "--no-pager"])?;
    let taken = journal.lines().find(|line| line.contains("inventory complete"));
    let inventory: f64 = taken
        .and_then(|line| line.split("seconds=").nth(1)?.trim().parse().ok())
        .expect("how long the inventory took");
    println!(
        "the agent was ready after {:.2} s, of which inventory {inventory:.2} s; beyond it {:.2} s",
        ready - start,
        ready - start - inventory
    );
    Ok(())
}

/// The log since the boot has every record of the kernel, and nothing but this many starts of an agent.
fn assert_log_goes_on(vm: &Vm, starts: usize) -> Result<(), HarnessError> {
    let log = Log::wait(vm.guest(), LOG, "that the agent is ready again", |log| {
        log.count(&Event::Ready) == starts
    })?;
    log.assert_no_gap();
    assert_eq!(log.starts().len(), starts);
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}

#[test]
fn the_readme_leads_to_a_trusted_host_which_is_upgraded_and_removed() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let mut readme = QuickStart::read();
    // 1 and 2: the packages, the verifier, the host.
    readme.step(guest, "verifier", &[])?;
    guest.script("cp /var/lib/assay-verifier/join.json /root/")?;
    let told = readme.step(guest, "host", &[])?;
    print_start(guest)?;
    assert_eq!(
        listening(guest)?
            .iter()
            .filter(|port| [8440, 8443].contains(port))
            .count(),
        2
    );
    // 3: what `join` printed is what the README means by HEX.
    let ek = told
        .split("--ek-sha256 ")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next());
    readme.step(guest, "verifier", &[("HEX", ek.expect("the command for the verifier"))])?;
    // 4, after what this host will do: open disks, and be the verifier as well.
    agent::rehearse(guest)?;
    guest.script(&format!(
        "truncate -s 16M rehearsal.raw; assay-verifier image seal rehearsal.raw rehearsal.luks
         truncate -s 16M vm.raw; printf '{CONTENT}' | dd of=vm.raw conv=notrunc status=none; ss -tl
         {QCOW2}; {SEAL_QCOW2}"
    ))?;
    readme.step(guest, "verifier", &[])?;
    wait_verdict(guest, true)?;
    // 5.
    readme.step(guest, "verifier", &[])?;
    readme.step(guest, "host", &[])?;
    // 6.
    put_new_program(&vm, "/usr/bin/thing")?;
    guest.run_ok(&["/usr/bin/thing"])?;
    let reasons = wait_verdict(guest, false)?;
    let digest = reasons
        .lines()
        .find(|line| line.contains("/usr/bin/thing"))
        .and_then(|line| line.split("sha256:").nth(1)?.get(..64));
    let refused = agent::unlock(guest, "/root/vm.luks", 60)?;
    assert_eq!(refused.code, Some(3), "{refused}");
    readme.step(
        guest,
        "verifier",
        &[("SHA256", digest.expect("the digest of what ran"))],
    )?;
    assert!(readme.is_done());
    wait_verdict(guest, true)?;
    let opened = agent::unlock(guest, "/root/vm.luks", 60)?;
    assert!(opened.ok(), "{opened}");
    let device = opened.stdout.trim();
    assert!(
        guest.get_text(device).is_ok_and(|text| text.starts_with(CONTENT)),
        "{device}"
    );

    let qcow2 = qcow2_opened(guest)?;
    upgraded_and_back(&vm, device)?;
    qcow2_closed(guest, &qcow2)?;
    removed(&vm, device)
}

/// Opens a disk in qcow2: who has its key is no part of the agent's service.
fn qcow2_opened(guest: &Guest) -> Result<String, HarnessError> {
    guest.script("assay-verifier image seal --format qcow2-luks vm.raw vm.qcow2")?;
    let opened = agent::unlock(guest, "/root/vm.qcow2", 60)?;
    assert!(opened.ok(), "{opened}");
    let server = guest.run_ok(&["pgrep", "qemu-nbd"])?;
    let group = guest.get_text(&format!("/proc/{}/cgroup", server.trim()))?;
    let scope = group.trim().rsplit('/').next().unwrap_or_default();
    assert!(scope.ends_with(".scope"), "{group}");
    assert_eq!(property(guest, scope, "MemorySwapMax")?, "0");
    assert!(property(guest, scope, "Description")?.contains("/root/vm.qcow2"));
    Ok(opened.stdout.trim().to_owned())
}

/// It was open over two restarts, as the agent knows, and is closed.
fn qcow2_closed(guest: &Guest, device: &str) -> Result<(), HarnessError> {
    let name = device.trim_start_matches("/dev/mapper/");
    assert!(guest.run_ok(&["assay-agent", "status"])?.contains(name));
    guest.script("echo 3 > /proc/sys/vm/drop_caches")?;
    assert!(guest.get_text(device)?.starts_with(CONTENT));
    guest.run_ok(&["assay-agent", "lock", name])?;
    assert_eq!(guest.run(&["pgrep", "qemu-nbd"])?.code, Some(1));
    assert!(!exists(guest, device)?);
    Ok(())
}

/// An upgrade restarts both services, and loses nothing; so does the way back, which dpkg calls a downgrade. The newer agent is the one
/// that was made for XCP-ng 8.3.
fn upgraded_and_back(vm: &Vm, device: &str) -> Result<(), HarnessError> {
    let guest = vm.guest();
    let folder = tempfile::tempdir().map_err(HarnessError::io("make a folder for packages"))?;
    guest.script("echo '# ours' >> /etc/assay/agent.toml")?;
    let [agent, verifier] = ["assay-agent", "assay-verifier"].map(|program| package(program, "_amd64.deb"));
    let xcpng = unpacked();
    let program = xcpng.path().join("usr/bin/assay-agent");
    let newer = [
        changed_with(folder.path(), &agent, "Version", NEWER, Some(&program)),
        changed(folder.path(), &verifier, "Version", NEWER),
    ];
    replaced(vm, &newer, 2)?;
    let reasons = wait_verdict(guest, false)?;
    // The host is the same to the verifier: what it has against it is what ran, not who it is.
    assert!(reasons.contains("assay-agent"), "{reasons}");
    xcpng_agent_opens(guest, device)?;
    replaced(vm, &[agent, verifier], 3)
}

/// These packages in the place of those that are there: their agent's is the log's start of this number.
fn replaced(vm: &Vm, packages: &[PathBuf], starts: usize) -> Result<(), HarnessError> {
    let guest = vm.guest();
    let pids = || {
        Ok::<_, HarnessError>([
            property(guest, AGENT, "MainPID")?,
            property(guest, VERIFIER, "MainPID")?,
        ])
    };
    let before = pids()?;
    for package in packages {
        let ended = install(guest, package)?;
        assert!(ended.ok(), "{ended}");
        println!("{ended}");
    }
    assert!(before.iter().zip(pids()?).all(|(before, now)| *before != now));
    for unit in [AGENT, VERIFIER] {
        assert_eq!(property(guest, unit, "ActiveState")?, "active", "{unit}");
    }
    assert_log_goes_on(vm, starts)?;
    assert!(guest.get_text("/etc/assay/agent.toml")?.ends_with("# ours\n"));
    Ok(())
}

/// The libcryptsetup and libdevmapper that are linked into the agent for XCP-ng 8.3 close the disk and open it again.
fn xcpng_agent_opens(guest: &Guest, device: &str) -> Result<(), HarnessError> {
    let pid = property(guest, AGENT, "MainPID")?;
    let maps = guest.get_text(&format!("/proc/{pid}/maps"))?;
    assert!(
        maps.contains("/usr/bin/assay-agent") && !maps.contains("libcryptsetup"),
        "{maps}"
    );
    // Also so that the program which looks is captured with the rest.
    assert!(exists(guest, device)?);
    guest.script("runuser -u assay-verifier -- assay-verifier policy capture dom0-1 --add")?;
    wait_verdict(guest, true)?;
    guest.run_ok(&["assay-agent", "lock", device.trim_start_matches("/dev/mapper/")])?;
    assert!(!exists(guest, device)?);
    let opened = agent::unlock(guest, "/root/vm.luks", 60)?;
    assert!(opened.ok() && opened.stdout.trim() == device, "{opened}");
    assert!(guest.get_text(device)?.starts_with(CONTENT));
    Ok(())
}

/// A removal stops both and keeps what cannot be had again; a purge takes the host's part, and never the disk keys.
fn removed(vm: &Vm, device: &str) -> Result<(), HarnessError> {
    let guest = vm.guest();
    guest.run_ok(&["assay-agent", "lock", device.trim_start_matches("/dev/mapper/")])?;
    guest.script("dpkg --remove assay-agent assay-verifier 2>&1")?;
    assert!(listening(guest)?.iter().all(|port| ![8440, 8443].contains(port)));
    for (gone, kept) in [
        ("/usr/bin/assay-agent", "/etc/assay/agent.toml"),
        ("/usr/bin/assay-verifier", "/var/lib/assay/join.json"),
        ("/run/assay/agent.sock", "/var/lib/assay-verifier/config.toml"),
    ] {
        assert!(!exists(guest, gone)?, "a removal left {gone}");
        assert!(exists(guest, kept)?, "a removal took {kept}");
    }
    let told = guest.script("dpkg --purge assay-agent assay-verifier 2>&1")?;
    assert!(told.contains("it holds the disk keys"), "{told}");
    for gone in ["/etc/assay", "/var/lib/assay"] {
        assert!(!exists(guest, gone)?, "a purge left {gone}");
    }
    assert!(exists(guest, "/var/lib/assay-verifier/config.toml")?);
    assert_eq!(
        guest.script("systemctl --failed --no-legend --plain | grep assay || true")?,
        ""
    );
    Ok(())
}
