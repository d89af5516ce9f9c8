//! Updates, rotations and restarts while the host is busy, in each mode: the agent never stands in its own way, nor for
//! good in anybody else's.

use assay_ebpf::flags;
use assay_evidence::event::{Event, LoadKind};
use assay_tests::HarnessError;
use assay_tests::agent::Agent;
use assay_tests::guest::Guest;

use crate::common::{PATIENCE, configure, enrolled_with, machine, sha256sum, stop};
use crate::enforce::{ENFORCE, allow, capture};
use crate::log::{LOG, Log};

/// Starts known and new programs, again and again, until it is told to end or as often as its argument says. A new one
/// that may not run is tried again, but for `never`: there it is given up. Nothing may take two minutes.
const BUSY: &str = r#"cd /root; mkdir -p busy
for ((round = 0; round < $1; round++)); do
    [ -e enough ] && break
    cp /usr/bin/true busy/new; printf "$2 $round" >> busy/new
    timeout 120 /usr/bin/true; echo known $? >> progress
    for ((try = 0; try < 1000; try++)); do
        timeout 120 busy/new 2>> complaints; status=$?
        [ $status = 126 ] && [ "$3" != never ] || break
        sleep 0.1
    done
    echo new $status >> progress; rm busy/new
done; echo over >> progress"#;

/// Ends the agent in order and starts another.
fn restart(guest: &Guest, agent: &Agent) -> Result<Agent, HarnessError> {
    stop(guest, agent)?;
    Agent::start(guest)
}

/// Makes another file of this, one byte longer; gives its path and digest.
fn longer(guest: &Guest, path: &str) -> Result<(String, String), HarnessError> {
    let path = guest.run_ok(&["readlink", "-f", path])?.trim().to_owned();
    let new = format!("{path}.new");
    guest.script(&format!("cp -p {path} {new}; printf x >> {new}"))?;
    let digest = guest.run_ok(&["sha256sum", &new])?;
    Ok((path, digest.split_whitespace().next().unwrap_or_default().to_owned()))
}

/// Replaces it as a package manager does.
fn replace(guest: &Guest, path: &str) -> Result<(), HarnessError> {
    guest.script(&format!("mv {path}.new {path}")).map(drop)
}

/// What happens to new programs while nobody approves them.
#[derive(Clone, Copy, PartialEq)]
enum New {
    Runs,
    Never,
}

/// The agent's own library, which it opens by name when it starts.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/libtss2-tcti-device.so.0";

/// Three restarts: as it is; after an update of the agent and a rotation of its journal; after an update of a library.
fn goes_on(
    guest: &Guest,
    agent: Agent,
    new: New,
    approve: &dyn Fn(&str) -> Result<(), HarnessError>,
) -> Result<(), HarnessError> {
    let word = if new == New::Never { "never" } else { "later" };
    guest.script("rm -f /root/progress")?;
    let busy = guest.spawn(&["bash", "-c", BUSY, "busy", "100000", "load", word], "/root/busy.log")?;
    let progress = |least: usize| {
        Guest::wait_for("the load stands still", PATIENCE, || {
            let lines = guest.get_text("/root/progress").unwrap_or_default().lines().count();
            Ok((lines >= least).then_some(lines))
        })
    };
    let seen = progress(4)?;
    let agent = restart(guest, &agent)?;
    let seen = progress(seen + 4)?;

    let (program, digest) = longer(guest, "/usr/bin/assay-agent")?;
    approve(&digest)?;
    replace(guest, &program)?;
    guest.script("mv /var/log/assay-agent.log /var/log/assay-agent.log.1")?;
    let agent = restart(guest, &agent)?;
    let log = Log::read(guest, LOG)?;
    assert_eq!(log.starts().last().expect("a start").agent_digest.to_string(), digest);
    let seen = progress(seen + 4)?;

    let (library, other) = longer(guest, LIBRARY)?;
    approve(&other)?;
    replace(guest, &library)?;
    let agent = restart(guest, &agent)?;
    progress(seen + 4)?;

    guest.put("/root/enough", 0o600, b"")?;
    let ended = guest.wait(busy, PATIENCE)?;
    assert!(ended.ok(), "{ended}");
    let text = guest.get_text("/root/progress")?;
    assert!(text.ends_with("over\n"), "{text}");
    let wanted = if new == New::Never { "new 126" } else { "new 0" };
    for line in text.lines() {
        assert!(
            ["known 0", wanted, "over"].contains(&line),
            "{line}\n{}",
            guest.get_text("/root/complaints")?
        );
    }
    assert!(agent.status().is_ok());
    let log = Log::at_rest(guest)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    assert_eq!((log.starts().len(), log.count(&Event::AgentStop)), (4, 3));
    // The new program and the new library were loaded by the agents that came after, not refused.
    for (kind, path, digest) in [
        (LoadKind::Program, program, digest),
        (LoadKind::Mapping, library, other),
    ] {
        let loaded = |record: &(LoadKind, String, u32)| {
            record.0 == kind && record.1 == digest && record.2 & (flags::REFUSED | flags::AHEAD) == 0
        };
        assert!(log.of(&path).iter().any(loaded), "{path}: {:?}", log.of(&path));
    }
    Ok(())
}

fn without_approval(settings: &str) -> Result<(), HarnessError> {
    let vm = machine()?;
    configure(vm.guest(), settings)?;
    let agent = Agent::start(vm.guest())?;
    goes_on(vm.guest(), agent, New::Runs, &|_| Ok(()))
}

#[test]
fn vm_load_updates_rotations_and_restarts_in_observe() -> Result<(), HarnessError> {
    without_approval("")
}

#[test]
fn vm_load_updates_rotations_and_restarts_in_hold() -> Result<(), HarnessError> {
    without_approval("[measure]\nmode = \"hold\"\n")
}

#[test]
fn vm_load_updates_rotations_and_restarts_in_enforce() -> Result<(), HarnessError> {
    let stage = enrolled_with(ENFORCE)?;
    let guest = stage.vm.guest();
    // All that will run has run when the policy is made.
    guest.run_ok(&["bash", "-c", BUSY, "busy", "2", "rehearsal", "later"])?;
    guest.script(
        "cd /root; cp -p /usr/bin/true a.new; printf x >> a.new; mv a.new a; readlink -f a; rm -f b; sleep 0.1",
    )?;
    sha256sum(&stage.vm, "/root/a")?;
    capture(&stage)?;
    goes_on(guest, stage.agent.clone(), New::Never, &|digest| allow(&stage, digest))
}
