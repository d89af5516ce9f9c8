//! Keys that a host may not hold any more: what becomes of its open disks, in a real kernel; and where a key is not to be found.

use assay_evidence::uuid::Uuid;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent, QCOW2};
use assay_tests::guest::Guest;
use assay_verifier::keystore::{FileKeyStore, KeySource as _};
use serde_json::Value;

use crate::common::{PATIENCE, Stage, enrolled, put_new_program, stop, trusted};

/// Seals a disk with these terms, opens it as this name, and mounts it there. One called as a format is that.
fn opened(stage: &Stage, name: &str, terms: &[&str]) -> Result<Uuid, HarnessError> {
    let guest = stage.vm.guest();
    let image = format!("/root/{name}.img");
    let before = keys(stage)?;
    match name {
        "luks1" | "qcow2-luks" => stage.disk_as(name, &image, name.as_bytes())?,
        _ => stage.sealed_disk(&image, name.as_bytes())?,
    }
    let key = keys(stage)?
        .into_iter()
        .find(|key| !before.contains(key))
        .expect("a new key");
    let id = key.to_string();
    stage
        .verifier
        .run_ok(&[&["key", "terms", id.as_str()], terms].concat())?;
    stage.open_as(&image, name)?;
    let device = format!("/dev/mapper/{name}");
    guest.script(&format!("mkdir -p /mnt/{name}"))?;
    guest.run_ok(&["mount", "-o", "ro", &device, &format!("/mnt/{name}")])?;
    Ok(key)
}

/// The ids of all keys.
pub fn keys(stage: &Stage) -> Result<Vec<Uuid>, HarnessError> {
    let listed: Value = serde_json::from_str(&stage.verifier.run_ok(&["key", "list", "--json"])?).expect("JSON");
    let keys = listed["keys"].as_array().expect("a list");
    Ok(keys
        .iter()
        .map(|key| key["key_id"].as_str().and_then(|id| id.parse().ok()).expect("an id"))
        .collect())
}

/// Waits until the agent says this of a disk.
fn wait_disk(agent: &Agent, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value, HarnessError> {
    Guest::wait_for(what, PATIENCE, || {
        let status = agent.status()?;
        let disks = status["disks"].as_array().cloned().unwrap_or_default();
        Ok(disks.into_iter().find(|disk| disk["name"] == name && is(disk)))
    })
}

/// Waits until the agent says that a disk is in this state.
fn wait_state(agent: &Agent, name: &str, state: &str) -> Result<Value, HarnessError> {
    wait_disk(agent, name, &format!("{name} is not {state}"), |disk| {
        disk["state"] == state
    })
}

/// Whether the kernel says that a device waits.
fn suspended(guest: &Guest, name: &str) -> Result<bool, HarnessError> {
    let said = guest.run_ok(&["dmsetup", "info", "-c", "--noheadings", "-o", "suspended", name])?;
    Ok(said.trim() == "Suspended")
}

/// Disks that lose their key.
const WIPED: [&str; 3] = ["wiped", "luks1", "qcow2-luks"];

#[test]
fn vm_a_host_that_turns_bad_loses_its_keys_and_gets_them_back() -> Result<(), HarnessError> {
    let mut stage = enrolled()?;
    agent::rehearse(stage.vm.guest())?;
    stage.vm.guest().script(QCOW2)?;
    stage.capture()?;
    for name in WIPED {
        opened(&stage, name, &["--lease", "600", "--on-loss", "wipe"])?;
    }
    opened(&stage, "waits", &["--on-loss", "suspend"])?;

    // An agent that is started again knows them.
    stop(stage.vm.guest(), &stage.agent)?;
    stage.agent = Agent::start(stage.vm.guest())?;
    let guest = stage.vm.guest();
    for name in WIPED {
        wait_disk(&stage.agent, name, "the disk is known", |disk| {
            disk["state"] == "open" && disk["on_loss"] == "wipe" && disk["lease_left_s"].as_u64() > Some(0)
        })?;
    }

    put_new_program(&stage.vm, "/root/rogue")?;
    guest.run_ok(&["/root/rogue"])?;
    let lost = wait_state(&stage.agent, "wiped", "wiped")?;
    assert!(
        lost["lost"].as_str().is_some_and(|why| why.contains("/root/rogue")),
        "{lost}"
    );
    wait_state(&stage.agent, "luks1", "wiped")?;
    wait_state(&stage.agent, "qcow2-luks", "wiped")?;
    wait_state(&stage.agent, "waits", "suspended")?;
    for name in ["wiped", "luks1", "qcow2-luks", "waits"] {
        assert!(suspended(guest, name)?, "{name}");
    }
    // The key of the one in qcow2 is nowhere, since who had it is gone.
    assert_eq!(guest.run(&["pgrep", "qemu-nbd"])?.code, Some(1));
    // The kernel has no key that it could go on with.
    for name in ["wiped", "luks1"] {
        assert!(!guest.run(&["dmsetup", "resume", name])?.ok());
        assert!(suspended(guest, name)?);
    }
    let refused = agent::unlock(guest, "/root/wiped.img", 20)?;
    assert_eq!(refused.code, Some(3), "{refused}");

    // Approved and trusted again: the one goes on by itself, the other needs its key anew.
    Guest::wait_for("the host is not trusted again", PATIENCE, || {
        stage
            .verifier
            .run_ok(&["policy", "capture", crate::common::HOST, "--add"])?;
        Ok((stage.verifier.host(crate::common::HOST)?.state == "trusted").then_some(()))
    })?;
    wait_state(&stage.agent, "waits", "open")?;
    assert_eq!(guest.run_ok(&["cat", "/mnt/waits/hello"])?, "waits");
    assert!(suspended(guest, "wiped")?);
    for name in WIPED {
        let ended = agent::unlock(guest, &format!("/root/{name}.img"), 60)?;
        assert!(ended.ok(), "{ended}\n{}", stage.agent.journal());
        assert_eq!(ended.stdout.trim(), format!("/dev/mapper/{name}"));
        assert!(!suspended(guest, name)?);
        assert_eq!(guest.run_ok(&["cat", &format!("/mnt/{name}/hello")])?, name);
    }
    for name in WIPED {
        guest.run_ok(&["umount", &format!("/mnt/{name}")])?;
        guest.run_ok(&["assay-agent", "lock", name])?;
    }
    assert_eq!(
        guest.run(&["pgrep", "qemu-nbd"])?.code,
        Some(1),
        "it ends with the disk"
    );
    Ok(())
}

/// When the verifier looked at the host last.
fn last_quote(stage: &Stage) -> Result<Value, HarnessError> {
    let shown = stage
        .verifier
        .run_ok(&["host", "show", crate::common::HOST, "--json"])?;
    let mut shown: Value = serde_json::from_str(&shown).expect("JSON");
    Ok(shown["last_quote"].take())
}

/// The verifier asks by itself once more, and then in an hour.
fn poll_seldom(stage: &mut Stage) -> Result<(), HarnessError> {
    stage.verifier.stop();
    let before = last_quote(stage)?;
    // Times are in seconds.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    stage.verifier.poll_every(3600)?;
    Guest::wait_for("the first poll", PATIENCE, || {
        Ok((last_quote(stage)? != before).then_some(()))
    })
}

#[test]
fn vm_an_unapproved_program_costs_the_key_at_once_and_not_with_the_next_poll() -> Result<(), HarnessError> {
    let mut stage = trusted()?;
    poll_seldom(&mut stage)?;
    opened(&stage, "wiped", &["--on-loss", "wipe"])?;
    let guest = stage.vm.guest();
    put_new_program(&stage.vm, "/root/rogue")?;
    let start = std::time::Instant::now();
    guest.run_ok(&["/root/rogue"])?;
    let lost = wait_state(&stage.agent, "wiped", "wiped")?;
    println!(
        "from the program's start to the wiped key: {} ms, emulated or not",
        start.elapsed().as_millis()
    );
    assert!(
        lost["lost"].as_str().is_some_and(|why| why.contains("/root/rogue")),
        "{lost}"
    );
    assert!(suspended(guest, "wiped")?);
    Ok(())
}

/// Suspends the machine to RAM; the real-time clock wakes it. No program is needed for it that has not run before.
const SLEEP: &str = "echo +35 > /sys/class/rtc/rtc0/wakealarm; echo mem > /sys/power/state";

#[test]
fn vm_a_lease_ends_while_the_host_sleeps_and_measuring_goes_on_when_it_wakes() -> Result<(), HarnessError> {
    let mut stage = trusted()?;
    opened(&stage, "slept", &["--lease", "25", "--on-loss", "wipe"])?;
    opened(&stage, "kept", &[])?;
    // Until now it was renewed.
    stage.verifier.stop();
    let guest = stage.vm.guest();
    wait_disk(&stage.agent, "slept", "it is open", |disk| {
        disk["state"] == "open" && disk["lease_left_s"].as_u64() > Some(0)
    })?;
    assert!(guest.get_text("/sys/power/mem_sleep")?.contains("[deep]"));
    guest.script(SLEEP)?;
    assert_eq!(guest.get_text("/sys/power/suspend_stats/success")?.trim(), "1");

    let lost = wait_state(&stage.agent, "slept", "wiped")?;
    assert!(lost["lost"].as_str().is_some_and(|why| why.contains("lease")), "{lost}");
    wait_state(&stage.agent, "kept", "open")?;
    guest.script("echo 3 > /proc/sys/vm/drop_caches")?;
    assert_eq!(guest.run_ok(&["cat", "/mnt/kept/hello"])?, "kept");

    // The TPM has kept the PCRs, and the agent's keys: the verifier sees the same host, and what runs from now on.
    let before = last_quote(&stage)?;
    stage.verifier.resume()?;
    Guest::wait_for("a poll after the sleep", PATIENCE, || {
        Ok((last_quote(&stage)? != before).then_some(()))
    })?;
    let host = stage.verifier.host(crate::common::HOST)?;
    assert_eq!(host.state, "trusted", "{:?}", host.reasons);
    let ended = agent::unlock(guest, "/root/slept.img", 60)?;
    assert!(ended.ok(), "{ended}\n{}", stage.agent.journal());
    assert_eq!(guest.run_ok(&["cat", "/mnt/slept/hello"])?, "slept");
    stage.spoil().map(drop)
}

/// Prints how often what each line of a file stands for, in hex, is in the memory of a process: perl, since it reads where no file is
/// mapped as well.
pub const SEARCH: &str = r#"
my ($pid, $file) = @ARGV;
open(my $f, '<', $file) or die; my @needles = <$f>; chomp @needles;
@needles = map { pack 'H*', $_ } @needles;
my %found = map { $_ => 0 } @needles;
open(my $maps, '<', "/proc/$pid/maps") or die; open(my $mem, '<', "/proc/$pid/mem") or die;
while (<$maps>) {
    my ($from, $to, $rights) = /^([0-9a-f]+)-([0-9a-f]+) (\S+)/ or next;
    next if $rights !~ /^r/ or /\[v(var|syscall)/;
    ($from, $to) = (hex $from, hex $to);
    for (my ($at, $tail) = ($from, ''); $at < $to; ) {
        sysseek($mem, $at, 0) or last;
        my $read = sysread($mem, my $block, $to - $at < 1048576 ? $to - $at : 1048576) or last;
        $at += $read;
        $block = $tail . $block;
        for my $needle (@needles) { $found{$needle}++ while $block =~ /\Q$needle\E/g }
        $tail = substr($block, -64);
    }
}
print "$found{$_}\n" for @needles;
"#;

/// Neither half is in what others see of the process, or in a file.
pub fn assert_unseen(guest: &Guest, pid: i32, [first, second]: [&str; 2]) -> Result<(), HarnessError> {
    for file in ["environ", "cmdline"] {
        let text = guest.get(&format!("/proc/{pid}/{file}"))?;
        assert!(!String::from_utf8_lossy(&text).contains(first), "{file}");
    }
    for place in ["/run/assay", "/var/lib/assay", "/var/log", "/tmp"] {
        let found = guest.run(&["grep", "-r", "-l", "-F", "-e", first, "-e", second, place])?;
        assert_eq!(found.stdout, "", "{place}");
    }
    Ok(())
}

#[test]
fn vm_a_key_is_nowhere_once_the_disk_is_open() -> Result<(), HarnessError> {
    let stage = trusted()?;
    let (guest, pid) = (stage.vm.guest(), stage.agent.pid());
    let key = opened(&stage, "secret", &["--lease", "600", "--on-loss", "wipe"])?;
    let stored = FileKeyStore::open(&stage.verifier.state_dir()).expect("the verifier's keys");
    let stored = stored.get(key).expect("the key");
    let passphrase = String::from_utf8_lossy(stored.passphrase.expose()).into_owned();

    // The key's id is there, as it must be: the search finds what there is. Halves, for copies that were overwritten in part.
    let (first, second) = passphrase.split_at(32);
    // The disk's own key as well: it is taken from its key slot before the kernel gets it.
    guest.put("/root/passphrase", 0o600, passphrase.as_bytes())?;
    let dump = ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key"];
    let files = [
        "--key-file",
        "/root/passphrase",
        "--volume-key-file",
        "/root/volume-key",
    ];
    guest.run_ok(&[&dump[..], &files, &["/root/secret.img"]].concat())?;
    let volume_key = guest.get("/root/volume-key")?;
    assert_eq!(volume_key.len(), 64);
    let (third, fourth) = volume_key.split_at(32);
    let id = key.to_string();
    let needles = [id.as_bytes(), first.as_bytes(), second.as_bytes(), third, fourth];
    let needles: String = needles.iter().map(|needle| hex::encode(needle) + "\n").collect();
    guest.put("/root/needles", 0o600, needles.as_bytes())?;
    let pid_text = pid.to_string();
    let counts = guest.run_ok(&["perl", "-e", SEARCH, &pid_text, "/root/needles"])?;
    let counts: Vec<u32> = counts.lines().map(|line| line.parse().expect("a number")).collect();
    assert!(counts[0] > 0, "the key's id is in the agent's memory: {counts:?}");
    assert_eq!(counts[1..], [0; 4], "parts of the keys in the agent's memory");

    assert_unseen(guest, pid, [first, second])?;
    assert!(!stage.agent.journal().contains(first));

    // What it has in memory stays there: nothing of it can be swapped out, and no core file is left.
    let status = String::from_utf8_lossy(&guest.get(&format!("/proc/{pid}/status"))?).into_owned();
    let number = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok())
    };
    assert!(number("VmLck:") > Some(0), "{status}");
    guest.script(&format!(
        "echo /root/core.%p > /proc/sys/kernel/core_pattern; prlimit --pid {pid} --core=unlimited; kill -SEGV {pid}"
    ))?;
    guest.wait(pid, PATIENCE)?;
    assert_eq!(guest.run_ok(&["find", "/root", "-name", "core*"])?, "", "a core file");
    Ok(())
}
