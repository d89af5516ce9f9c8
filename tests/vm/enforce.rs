//! Mode enforce: what the verifier's policy approves runs, and nothing else does.

use assay_ebpf::flags;
use assay_evidence::event::{Event, LoadKind, Notice};
use assay_tests::HarnessError;
use assay_tests::guest::Guest;

use crate::common::{HOST, PATIENCE, RUN, Stage, enrolled_with, perl_on, put_new_program, sha256sum, try_run};
use crate::log::{LOG, Log, short};

/// The configuration.
pub const ENFORCE: &str = "[measure]\nmode = \"enforce\"\n";
const EPERM: i32 = 1;
/// Where the agent keeps the list that is in force.
const LIST: &str = "/var/lib/assay/approved.jws";

/// Approved lists that were put in force since the log began.
fn lists(log: &Log) -> usize {
    let is_list = |event: &&Event| matches!(event, Event::Notice(Notice::ListInForce { .. }));
    log.events.iter().filter(is_list).count()
}

/// Takes what ran so far as known good, and waits until the host has the list and is trusted.
pub fn capture(stage: &Stage) -> Result<(), HarnessError> {
    let guest = stage.vm.guest();
    Log::at_rest(guest)?;
    stage.capture()?;
    Log::wait(guest, LOG, "a list in force", |log| lists(log) >= 1)?;
    Ok(())
}

/// Approves one more digest, and waits until the host has the list.
pub fn allow(stage: &Stage, digest: &str) -> Result<(), HarnessError> {
    let guest = stage.vm.guest();
    let before = lists(&Log::read(guest, LOG)?);
    stage.verifier.run_ok(&["policy", "allow", digest])?;
    Log::wait(guest, LOG, "another list in force", |log| lists(log) > before)?;
    Ok(())
}

/// Maps a file executable, as a loader does.
const MAP: &str = r#"open(my $f, "<", "PATH") or die; my $at = syscall(9, 0, 4096, 5, 2, fileno($f), 0);
    print $! + 0 if $at == -1;"#;
/// Hands a module to the kernel, from a file.
const MODULE: &str = r#"open(my $f, "<", "PATH") or die; my $none = "";
    print $! + 0 if syscall(313, fileno($f), $none, 0) != 0;"#;

#[test]
fn vm_enforce_runs_what_is_approved_and_nothing_else() -> Result<(), HarnessError> {
    let stage = enrolled_with(ENFORCE)?;
    let guest = stage.vm.guest();
    put_new_program(&stage.vm, "/root/early")?;
    // Without a list there is nothing that it could refuse by.
    assert_eq!(try_run(guest, "/root/early")?, 0, "no list yet: held, not refused");
    guest.script(
        "cd /root; cp /usr/bin/true new; printf n >> new; printf '#!/bin/sh\\nexit 0\\n' > script; chmod 755 script
         cp $(ldd /usr/bin/true | awk '/libc.so/{print $3}') library.so; printf x >> library.so
         busybox xzcat $(modinfo -n dummy) > module.ko; printf z >> module.ko; cp $(modinfo -n dummy) packed.ko.xz",
    )?;
    let cases = [
        (RUN, "/root/new", LoadKind::Program),
        (RUN, "/root/script", LoadKind::Program),
        (MAP, "/root/library.so", LoadKind::Mapping),
        (MODULE, "/root/module.ko", LoadKind::ModuleFile),
    ];
    let mut digests = Vec::new();
    for (_, path, _) in cases {
        digests.push(sha256sum(&stage.vm, path)?);
    }
    guest.script(
        "sh -c true; cat /etc/hostname; true; cp /etc/hostname /root/copy; head -c 1 /etc/hostname; tail -c 1 /etc/hostname",
    )?;
    capture(&stage)?;
    assert_eq!(try_run(guest, "/root/early")?, 0, "it was captured");

    let of = |log: &Log, kind: LoadKind, digest: &str| -> Vec<u32> {
        let loads = log.loads().into_iter().map(short);
        let same = loads.filter(|(one, found, _)| *one == kind && found == digest);
        same.map(|(.., marks)| marks & flags::REFUSED).collect()
    };
    for ((code, path, kind), digest) in cases.into_iter().zip(&digests) {
        for _ in 0..2 {
            assert_eq!(perl_on(guest, code, path)?, EPERM, "{path} is not approved");
        }
        let log = Log::wait(guest, LOG, path, |log| !of(log, kind, digest).is_empty())?;
        assert!(
            of(&log, kind, digest).iter().all(|marks| *marks == flags::REFUSED),
            "{path}"
        );
    }
    // What was refused did not run, so the host is as good as before; the operator is told all the same.
    let show = || stage.verifier.run_ok(&["host", "show", HOST]);
    Guest::wait_for("the operator was not told", PATIENCE, || {
        let text = show()?;
        let told = cases
            .iter()
            .zip(&digests)
            .all(|(_, digest)| text.contains(digest.as_str()));
        Ok((told && text.contains("refused")).then_some(()))
    })?;
    let host = stage.verifier.host(HOST)?;
    assert_eq!((host.state.as_str(), host.reasons.len()), ("trusted", 0), "{host:?}");

    let old = guest.get(LIST)?;
    for ((code, path, kind), digest) in cases.into_iter().zip(&digests) {
        allow(&stage, digest)?;
        // What may run still waits for its extend, once if it cannot be held.
        Guest::wait_for(&format!("{path} never ran"), PATIENCE, || {
            Ok((perl_on(guest, code, path)? == 0).then_some(()))
        })?;
        Log::wait(guest, LOG, path, |log| of(log, kind, digest).contains(&0))?;
    }
    stage.wait("still trusted", |host| host.state == "trusted")?;

    // An older list, and one that was changed, are none.
    let new = guest.get(LIST)?;
    let mut changed = new.clone();
    let middle = changed.len() / 2;
    changed[middle] = if changed[middle] == b'A' { b'B' } else { b'A' };
    for (what, content) in [("older", &old), ("changed", &changed)] {
        guest.put("/root/list", 0o600, content)?;
        let ended = guest.run(&["assay-agent", "approve", "/root/list"])?;
        assert!(ended.code.is_some_and(|code| code != 0), "an {what} list: {ended}");
    }
    assert_eq!(guest.get(LIST)?, new);
    assert_eq!(try_run(guest, "/root/new")?, 0);
    let log = Log::at_rest(guest)?;
    log.assert_no_gap();
    assert!(log.violations().is_empty(), "{:?}", log.violations());
    Ok(())
}
