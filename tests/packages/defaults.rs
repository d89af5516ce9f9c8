//! What a machine is like before anybody has joined or initialised anything, and what an installation that goes wrong leaves.

use assay_tests::HarnessError;
use assay_tests::guest::Guest;

use crate::built::package;
use crate::machine::{PATIENCE, changed, install, listening, machine, name, property};

const AGENT: &str = "assay-agent.service";
const VERIFIER: &str = "assay-verifier.service";
/// The most exposure of the verifier's unit, in tenths, as `systemd-analyze security` counts it.
const VERIFIER_LIMIT: u32 = 30;
/// And of the agent's, which is root and has to see everything: what it is today, so that it does not grow by chance.
const AGENT_LIMIT: u32 = 52;

/// Whatever these find is open to others.
const OPEN: &str = "find /var/lib/assay /var/lib/assay-verifier /run/assay -type d -perm /077; \
    find /var/lib/assay /var/lib/assay-verifier /run/assay -type f -perm /077 ! -name join.json ! -name '*.pem' ! -name config.toml";

#[test]
fn nothing_listens_before_init_and_join_and_what_is_private_is_made_so() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let before = listening(guest)?;
    // No mask takes away what a program has given too much.
    let run = |line: &str| {
        let ended = guest.run_with(&["bash", "-euc", &format!("umask 0; {line}")], b"", PATIENCE)?;
        assert!(ended.ok(), "{line}: {ended}");
        Ok::<_, HarnessError>(ended.stdout)
    };
    // Too old a kernel, which only the agent minds: doctor says which to use. (To this personality the kernel calls itself 2.6.)
    run("setarch --uname-2.6 dpkg --install /root/assay-*.deb 2>&1")?;
    let told = guest.run(&["setarch", "--uname-2.6", "assay-agent", "doctor"])?;
    assert!(
        !told.ok() && told.stdout.contains("install Linux 6.1 or newer"),
        "{told}"
    );
    for unit in [AGENT, VERIFIER] {
        assert_eq!(property(guest, unit, "UnitFileState")?, "disabled", "{unit}");
        assert_eq!(property(guest, unit, "ActiveState")?, "inactive", "{unit}");
    }
    assert_closed(guest)?;

    // An operator who starts them too early: the agent measures and waits, the verifier says what is missing.
    run("systemctl start assay-agent")?;
    assert!(
        !guest
            .run(&["runuser", "-u", "assay-verifier", "--", "assay-verifier", "serve"])?
            .ok()
    );
    assert_eq!(listening(guest)?, before);
    run("runuser -u assay-verifier -- assay-verifier init --url https://verifier.example:8440")?;
    assert_eq!(run(OPEN)?, "");
    run("systemctl start assay-verifier; assay-agent join /var/lib/assay-verifier/join.json")?;
    assert_eq!(run(OPEN)?, "");
    Guest::wait_for("agent and verifier do not listen", PATIENCE, || {
        let now = listening(guest)?;
        Ok([8440, 8443].iter().all(|port| now.contains(port)).then_some(()))
    })?;
    assert_eq!(run(OPEN)?, "");
    // A setting that nobody knows.
    run("echo 'listne = \"0.0.0.0:1\"' >> /etc/assay/agent.toml")?;
    let ended = guest.run(&["assay-agent", "status"])?;
    assert!(!ended.ok() && ended.stderr.contains("listne"), "{ended}");
    run("sed -i '$d' /etc/assay/agent.toml")?;

    goes_wrong(guest)
}

/// The units are well-formed, and no more open than they have to be.
fn assert_closed(guest: &Guest) -> Result<(), HarnessError> {
    for (unit, limit) in [(VERIFIER, VERIFIER_LIMIT), (AGENT, AGENT_LIMIT)] {
        let limit = format!("--threshold={limit}");
        let told = guest.run(&[
            "systemd-analyze",
            "security",
            "--no-pager",
            "--offline=true",
            &limit,
            unit,
        ])?;
        assert!(told.ok(), "{told}");
        println!("{}", told.stdout.lines().last().unwrap_or_default());
        let told = guest.run(&["systemd-analyze", "verify", "--man=no", unit])?;
        assert!(told.ok() && told.stderr.is_empty(), "{told}");
    }
    Ok(())
}

/// Each of these fails, says why, and leaves the version that was there at work.
fn goes_wrong(guest: &Guest) -> Result<(), HarnessError> {
    let folder = tempfile::tempdir().map_err(HarnessError::io("make a folder for packages"))?;
    let ours = package("assay-agent", "_amd64.deb");
    let version = property_of_package(guest, "Version")?;
    let pid = property(guest, AGENT, "MainPID")?;
    let assert_untouched = |what: &str| {
        assert_eq!(property(guest, AGENT, "MainPID")?, pid, "{what}");
        guest.run_ok(&["assay-agent", "status"])?;
        Ok::<_, HarnessError>(())
    };

    let ended = install(guest, &changed(folder.path(), &ours, "Architecture", "arm64"))?;
    assert!(!ended.ok() && ended.stderr.contains("does not match system"), "{ended}");
    assert_untouched("a package of another architecture")?;

    let newer = changed(folder.path(), &ours, "Version", "9.0-1");
    let on_machine = format!("/root/{}", name(&newer));
    guest.put_file(&on_machine, 0o644, &newer)?;
    guest.script(
        "fallocate -l $(($(stat -f -c '%f * %S' /) - (64 << 20))) /root/fill
         dd if=/dev/zero of=/root/rest bs=64k status=none 2>&1 || true",
    )?;
    let ended = guest.run_with(&["dpkg", "--install", &on_machine], b"", PATIENCE)?;
    assert!(
        !ended.ok() && ended.stderr.contains("No space left on device"),
        "{ended}"
    );
    assert_untouched("a full disk")?;
    guest.script("rm /root/fill /root/rest")?;
    assert_eq!(property_of_package(guest, "Version")?, version);

    // Unpacked, and then the power went.
    guest.run_ok(&["dpkg", "--unpack", &on_machine])?;
    assert_untouched("a package that is half installed")?;
    let beside = guest.run(&["assay-agent", "run"])?;
    assert!(
        !beside.ok() && beside.stderr.contains("systemctl stop assay-agent"),
        "two at once: {beside}"
    );
    assert_untouched("a second agent")?;
    let ended = guest.run_with(&["dpkg", "--configure", "-a"], b"", PATIENCE)?;
    assert!(ended.ok(), "{ended}");
    assert_eq!(property_of_package(guest, "Version")?, "9.0-1");
    assert_ne!(property(guest, AGENT, "MainPID")?, pid);
    assert_eq!(property(guest, AGENT, "ActiveState")?, "active");
    Ok(())
}

fn property_of_package(guest: &Guest, field: &str) -> Result<String, HarnessError> {
    guest.run_ok(&["dpkg-query", "-W", "-f", &format!("${{{field}}}"), "assay-agent"])
}
