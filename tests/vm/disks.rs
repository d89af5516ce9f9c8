//! Disks that are not what `assay-agent unlock` expects: each is refused with its own words, and none stays half open.

use assay_tests::HarnessError;
use assay_tests::agent;

use crate::common::{Stage, trusted};

/// Asks for a disk that must be refused before any key is asked for, and gives what the agent said.
fn refused(stage: &Stage, image: &str) -> Result<String, HarnessError> {
    let ended = agent::unlock(stage.vm.guest(), image, 20)?;
    assert_eq!(ended.code, Some(1), "{image}: {ended}");
    assert_eq!(ended.stdout, "", "{image}");
    Ok(ended.stderr)
}

#[test]
fn vm_odd_images_are_refused_each_with_its_own_words() -> Result<(), HarnessError> {
    let stage = trusted()?;
    let guest = stage.vm.guest();
    stage.sealed_disk("/root/good.img", b"x")?;

    assert!(refused(&stage, "/root/missing.img")?.contains("/root/missing.img"));
    guest.script("truncate -s 20M /root/raw.img")?;
    let said = refused(&stage, "/root/raw.img")?;
    assert!(said.contains("LUKS"), "{said}");

    let token = "cryptsetup token export --token-id 0 /root/good.img";
    let with_token = |name: &str, edit: &str| {
        guest.script(&format!(
            "cp /root/good.img /root/{name}; cd /root; {token} > token.json; {edit}
             cryptsetup token remove --token-id 0 {name}
             [ ! -s token.json ] || cryptsetup token import --token-id 0 {name} < token.json"
        ))
    };
    with_token("no-token.img", ": > token.json")?;
    let said = refused(&stage, "/root/no-token.img")?;
    assert!(said.contains("token"), "{said}");

    with_token(
        "foreign.img",
        "sed -i 's|https://[^\"]*|https://192.0.2.7:8440|' token.json",
    )?;
    let said = refused(&stage, "/root/foreign.img")?;
    assert!(said.contains("192.0.2.7"), "{said}");

    with_token("malformed.img", "sed -i 's|\"version\": *1|\"version\":77|' token.json")?;
    let said = refused(&stage, "/root/malformed.img")?;
    assert!(said.contains("token"), "{said}");

    with_token(
        "unknown-key.img",
        "sed -i -E 's|(\"key_id\": *\")........|\\100000000|' token.json",
    )?;
    let ended = agent::unlock(guest, "/root/unknown-key.img", 20)?;
    assert!(!ended.ok() && ended.code != Some(4), "{ended}");

    assert_eq!(
        guest.run_ok(&["ls", "/dev/mapper"])?.trim(),
        "control",
        "nothing may stay open"
    );
    Ok(())
}

#[test]
fn vm_a_disk_that_is_open_already_is_said_to_be() -> Result<(), HarnessError> {
    let stage = trusted()?;
    stage.sealed_disk("/root/disk.img", b"x")?;
    let ended = agent::unlock(stage.vm.guest(), "/root/disk.img", 60)?;
    assert!(ended.ok(), "{ended}");
    let device = ended.stdout.trim().to_owned();
    let said = refused(&stage, "/root/disk.img")?;
    assert!(said.contains("open") || said.contains("in use"), "{said}");
    stage.vm.guest().run_ok(&["test", "-b", &device])?;
    Ok(())
}
