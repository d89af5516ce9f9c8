//! The hooks of toolstacks with a kernel that opens disks: the very files, called as xenopsd, libvirt, libxl, xapi-storage-script and systemd
//! call them. Without an agent, or with one that hangs, they are tested beside the agent.

use std::time::Duration;

use assay_tests::HarnessError;
use assay_tests::agent;
use assay_tests::guest::{Ended, Guest};
use assay_tests::hooks;
use serde_json::Value;

use crate::common::{HOST, ROGUE, Stage, enrolled};

const FOLDER: &str = "/usr/share/assay/hooks";
const STORE: &str = "/run/store";
const LIMIT: Duration = Duration::from_secs(180);

/// A trusted host with hooks that have run before, as any host's have: what they run is known good.
fn ready() -> Result<Stage, HarnessError> {
    let stage = enrolled()?;
    let guest = stage.vm.guest();
    // Emulation is slow; the hooks' deadlines are tested elsewhere.
    guest.put("/etc/assay/agent.toml", 0o644, b"[unlock]\nhook_deadline_s = 150\n")?;
    for name in hooks::FILES {
        guest.put_file(&format!("{FOLDER}/{name}"), 0o755, &hooks::path(name))?;
    }
    guest.put(
        &format!("{FOLDER}/block-common.sh"),
        0o644,
        hooks::BLOCK_COMMON.as_bytes(),
    )?;
    guest.script(&format!(
        "mkdir -p {STORE} {FOLDER}/assay+crypt; ln -s ../smapiv3-datapath {FOLDER}/assay+crypt/Datapath.attach
         for m in activate deactivate; do ln -s ../smapiv3-datapath {FOLDER}/assay+crypt/Datapath.$m; done
         echo data > /etc/hostname; cat /etc/hostname; test -b /dev/mapper/x || stat /dev/null > /dev/null"
    ))?;
    agent::rehearse(guest)?;
    stage.sealed_disk("/root/rehearsal.luks", b"x")?;
    libvirt(guest, "prepare", "begin", &domain(&[("assay-rehearsal", "/root/none")]))?;
    block(guest, "add", "/root/none")?;
    block(guest, "remove", "/root/none")?;
    gate(guest)?;
    datapath(guest, "Datapath.attach", "/root/none")?;
    // And what this test looks with.
    nothing_is_open(guest)?;
    stage.capture()?;
    Ok(stage)
}

fn gate(guest: &Guest) -> Result<Ended, HarnessError> {
    let script = format!("{FOLDER}/xapi-vm-pre-start");
    let arguments = ["-vmuuid", "6f9619ff-8b86-4011-b42d-00cf4fc964ff", "-reason", "none"];
    guest.run_with(&[&[&*script], &arguments[..]].concat(), b"", LIMIT)
}

fn domain(disks: &[(&str, &str)]) -> String {
    let named: String = disks
        .iter()
        .map(|(name, image)| format!("<a:disk name='{name}' image='{image}'/>"))
        .collect();
    let used: String = disks
        .iter()
        .map(|(name, _)| format!("<disk type='block' device='disk'><source dev='/dev/mapper/{name}'/></disk>"))
        .collect();
    format!(
        "<domain type='kvm'><name>mail</name><metadata><a:disks xmlns:a='urn:assay:libvirt:1'>{named}</a:disks></metadata>
         <devices>{used}</devices></domain>"
    )
}

fn libvirt(guest: &Guest, operation: &str, sub: &str, xml: &str) -> Result<Ended, HarnessError> {
    let script = format!("{FOLDER}/libvirt");
    guest.run_with(&[&script, "mail", operation, sub, "-"], xml.as_bytes(), LIMIT)
}

fn block(guest: &Guest, command: &str, target: &str) -> Result<Ended, HarnessError> {
    guest.put(&format!("{STORE}/params"), 0o600, target.as_bytes())?;
    guest.put(&format!("{STORE}/name"), 0o600, b"guest-1")?;
    let (script, store) = (format!("{FOLDER}/block-assay"), format!("STORE={STORE}"));
    let call = ["env", "XENBUS_PATH=backend/vbd/1/51712", &store, &script, command];
    guest.run_with(&call, b"", LIMIT)
}

fn datapath(guest: &Guest, method: &str, image: &str) -> Result<(Option<i32>, Value), HarnessError> {
    let script = format!("{FOLDER}/assay+crypt/{method}");
    let call = serde_json::json!({"dbg": "test", "uri": format!("assay+crypt://{image}"), "domain": "0"});
    let ended = guest.run_with(&[&script, "--json"], call.to_string().as_bytes(), LIMIT)?;
    let answer = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{method}: {error}: {ended}"));
    Ok((ended.code, answer))
}

/// What the disk's one file says.
fn content(guest: &Guest, device: &str) -> Result<String, HarnessError> {
    guest.run_ok(&["mount", "-o", "ro", device, "/mnt/disk"])?;
    let text = guest.run_ok(&["cat", "/mnt/disk/hello"])?;
    guest.run_ok(&["umount", "/mnt/disk"])?;
    Ok(text)
}

#[track_caller]
fn nothing_is_open(guest: &Guest) -> Result<(), HarnessError> {
    assert_eq!(guest.run_ok(&["ls", "/dev/mapper"])?.trim(), "control");
    Ok(())
}

#[test]
fn vm_hooks_open_disks_while_the_host_is_trusted_and_say_why_they_do_not() -> Result<(), HarnessError> {
    let stage = ready()?;
    let guest = stage.vm.guest();
    let (one, two) = ("/root/one.luks", "/root/two.luks");
    stage.sealed_disk(one, b"first")?;
    stage.sealed_disk(two, b"second")?;
    guest.put(
        "/etc/assay/disks",
        0o644,
        format!("# disks\nassay-one {one}\nassay-two {two} timeout=120\n").as_bytes(),
    )?;

    let ended = gate(guest)?;
    assert!(ended.ok() && ended.stdout.is_empty(), "{ended}");
    let told = guest.run_ok(&["assay-agent", "verdict", "--json"])?;
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(
        (&told["host"], &told["trusted"]),
        (&HOST.into(), &true.into()),
        "{told}"
    );
    libvirt_opens(guest, one, two)?;
    block_script_opens(guest, one)?;
    datapath_opens(guest, two)?;
    table_opens(guest)?;
    // The verifier has it from each caller what the disk was for.
    let audit = stage.verifier.run_ok(&["audit", "show"])?;
    for vm in ["mail", "guest-1", "0"] {
        assert!(audit.contains(&format!("for {vm:?}")), "{vm}: {audit}");
    }

    let digest = stage.spoil()?;
    let named = |said: &str| assert!(said.contains(ROGUE) && said.contains(&digest), "{said}");
    let ended = gate(guest)?;
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(
        ended.stdout.starts_with("Assay does not let this VM start here: "),
        "{ended}"
    );
    named(&ended.stdout);
    let ended = libvirt(guest, "prepare", "begin", &domain(&[("assay-one", one)]))?;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(3), ""), "{ended}");
    named(&ended.stderr);
    assert_eq!(block(guest, "add", one)?.code, Some(1));
    assert_eq!(guest.get_text(&format!("{STORE}/hotplug-status"))?, "error");
    named(&guest.get_text(&format!("{STORE}/hotplug-error"))?);
    let (code, answer) = datapath(guest, "Datapath.activate", two)?;
    assert_eq!((code, &answer["code"]), (Some(3), &"ASSAY_REFUSED".into()));
    named(&answer["params"].to_string());
    let ended = guest.run_with(&["assay-agent", "disks", "open", "assay-two"], b"", LIMIT)?;
    assert_eq!(ended.code, Some(3), "{ended}");
    named(&ended.stderr);
    nothing_is_open(guest)
}

fn libvirt_opens(guest: &Guest, one: &str, two: &str) -> Result<(), HarnessError> {
    let both = domain(&[("assay-one", one), ("assay-two", two)]);
    let ended = libvirt(guest, "prepare", "begin", &both)?;
    assert!(ended.ok() && ended.stdout.is_empty(), "{ended}");
    assert_eq!(content(guest, "/dev/mapper/assay-one")?, "first");
    assert_eq!(content(guest, "/dev/mapper/assay-two")?, "second");
    // Twice at a time is once too often.
    let ended = libvirt(guest, "prepare", "begin", &both)?;
    assert!(
        ended.code == Some(1) && ended.stderr.contains("already open"),
        "{ended}"
    );
    let ended = libvirt(guest, "release", "end", &both)?;
    assert!(ended.ok(), "{ended}");
    nothing_is_open(guest)?;
    assert!(libvirt(guest, "release", "end", &both)?.ok(), "what is closed stays so");

    // The first one opens, the second cannot: neither stays.
    let half = domain(&[("assay-one", one), ("assay-two", "/root/none")]);
    let ended = libvirt(guest, "prepare", "begin", &half)?;
    assert!(ended.code == Some(1) && ended.stderr.contains("/root/none"), "{ended}");
    nothing_is_open(guest)
}

fn block_script_opens(guest: &Guest, image: &str) -> Result<(), HarnessError> {
    let ended = block(guest, "add", image)?;
    assert!(
        ended.ok(),
        "{ended} {:?}",
        guest.get_text(&format!("{STORE}/hotplug-error"))
    );
    let wrote = |name: &str| guest.get_text(&format!("{STORE}/{name}"));
    let device = wrote("physical-device-path")?;
    assert!(device.starts_with("/dev/mapper/assay-"), "{device}");
    let numbers = guest.run_ok(&["stat", "-L", "-c", "%t:%T", &device])?;
    assert_eq!(
        (wrote("physical-device")?.as_str(), wrote("hotplug-status")?.as_str()),
        (numbers.trim(), "connected")
    );
    assert_eq!(content(guest, &device)?, "first");
    assert!(block(guest, "remove", image)?.ok());
    nothing_is_open(guest)
}

fn datapath_opens(guest: &Guest, image: &str) -> Result<(), HarnessError> {
    let (code, attached) = datapath(guest, "Datapath.attach", image)?;
    assert_eq!(code, Some(0), "{attached}");
    let device = attached["implementations"][0][1]["params"].as_str().expect("a path");
    assert_eq!(datapath(guest, "Datapath.activate", image)?, (Some(0), Value::Null));
    assert_eq!(content(guest, device)?, "second");
    assert_eq!(datapath(guest, "Datapath.deactivate", image)?, (Some(0), Value::Null));
    nothing_is_open(guest)
}

fn table_opens(guest: &Guest) -> Result<(), HarnessError> {
    let disks = |arguments: &[&str]| {
        let call = [&["assay-agent", "disks"], arguments].concat();
        guest.run_with(&call, b"", LIMIT)
    };
    // As `assay-disk@assay-two.service` has it.
    let ended = disks(&["open", "--", "assay-two"])?;
    assert_eq!(
        (ended.code, ended.stdout.trim()),
        (Some(0), "/dev/mapper/assay-two"),
        "{ended}"
    );
    assert_eq!(content(guest, "/dev/mapper/assay-two")?, "second");
    // The one that is open already fails, and the other is opened all the same.
    let ended = disks(&["open"])?;
    assert_eq!(
        (ended.code, ended.stdout.trim()),
        (Some(1), "/dev/mapper/assay-one"),
        "{ended}"
    );
    assert!(
        ended.stderr.contains("already open") && ended.stderr.contains("1 of 2 disks failed"),
        "{ended}"
    );
    assert!(disks(&["close"])?.ok());
    nothing_is_open(guest)?;
    let ended = disks(&["open", "assay-three"])?;
    assert!(
        ended.code == Some(1) && ended.stderr.contains("has no disk \"assay-three\""),
        "{ended}"
    );
    Ok(())
}
