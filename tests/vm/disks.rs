//! Disks that are not what `assay-agent unlock` expects: each is refused with its own words, and none stays half open.

use std::path::Path;
use std::process::Command;

use assay_tests::HarnessError;
use assay_tests::agent::{self, QCOW2};
use assay_tests::child;

use crate::common::{HOST, Stage, trusted, verifier_binary};

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

    // Another header under the same UUID and token, with a key slot that whoever made it can open.
    guest.script(&format!(
        "cp /root/good.img /root/replaced.img; cd /root; {token} > token.json
         cryptsetup luksFormat --batch-mode --sector-size 512 --uuid \"$(cryptsetup luksUUID good.img)\" \
             --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --luks2-keyslots-size 256k --offset 8192 replaced.img token.json
         cryptsetup token import --token-id 0 replaced.img < token.json"
    ))?;
    let ended = agent::unlock(guest, "/root/replaced.img", 20)?;
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(ended.stderr.contains("not the one that was sealed"), "{ended}");
    // The same of LUKS1; and one without the file that says which key it wants.
    stage.disk_as("luks1", "/root/luks1.img", b"from LUKS1")?;
    guest.script(
        "cd /root; cp luks1.img alone.img; cp luks1.img replaced1.img; cp luks1.img.assay.json replaced1.img.assay.json
         cryptsetup luksFormat --batch-mode --type luks1 --uuid \"$(cryptsetup luksUUID luks1.img)\" \
             --pbkdf-force-iterations 1000 --offset 8192 replaced1.img token.json",
    )?;
    assert!(refused(&stage, "/root/alone.img")?.contains("/root/alone.img.assay.json"));
    let ended = agent::unlock(guest, "/root/replaced1.img", 20)?;
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(ended.stderr.contains("not the one that was sealed"), "{ended}");
    odd_qcow2(&stage)?;
    // What the owner may change: a slot more, and a token of another program.
    guest.script(&format!(
        "cp /root/good.img /root/more.img; cd /root; {token} > token.json
         cryptsetup token add --key-description other more.img"
    ))?;
    // The programs that did all this are new to the policy.
    stage.verifier.run_ok(&["policy", "capture", HOST, "--add"])?;
    stage.wait("trusted with them", |host| host.state == "trusted")?;
    // What of its key slot is left opens with no key, and nothing stays of the attempt.
    let ended = agent::unlock(guest, "/root/damaged2.img", 60)?;
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("does not open /root/damaged2.img"), "{ended}");
    assert_eq!(guest.run(&["pgrep", "qemu-nbd"])?.code, Some(1));
    for (image, holds) in [
        ("/root/more.img", "x"),
        ("/root/luks1.img", "from LUKS1"),
        ("/root/qcow2.img", "from qcow2"),
    ] {
        let ended = agent::unlock(guest, image, 60)?;
        assert!(ended.ok(), "{image}: {ended}\n{}", stage.agent.journal());
        let device = ended.stdout.trim();
        let content = guest.script(&format!(
            "mount -o ro {device} /mnt/disk; cat /mnt/disk/hello; umount /mnt/disk"
        ))?;
        assert_eq!(content, holds);
        guest.run_ok(&["assay-agent", "lock", device.trim_start_matches("/dev/mapper/")])?;
    }

    assert_eq!(
        guest.run_ok(&["ls", "/dev/mapper"])?.trim(),
        "control",
        "nothing may stay open"
    );
    Ok(())
}

/// qcow2: without a device to show it on, with the headers of another image, and one whose key slot is to be damaged.
fn odd_qcow2(stage: &Stage) -> Result<(), HarnessError> {
    let guest = stage.vm.guest();
    stage.disk_as("qcow2-luks", "/root/qcow2.img", b"from qcow2")?;
    let said = refused(stage, "/root/qcow2.img")?;
    assert!(said.contains("modprobe nbd"), "{said}");
    guest.script(&format!("{QCOW2}; pgrep none || true"))?;
    stage.disk_as("qcow2-luks", "/root/replaced2.img", b"another")?;
    // Into the header it is 168 bytes to the UUID, and 208 to the first key slot, which has its salt after 8.
    guest.script(
        "cd /root; cp qcow2.img.assay.json replaced2.img.assay.json
         cp qcow2.img damaged2.img; cp qcow2.img.assay.json damaged2.img.assay.json
         luks_at() { grep -abo -m 1 LUKS $1 | head -n 1 | cut -d : -f 1; }
         at=$(luks_at qcow2.img); there=$(luks_at replaced2.img)
         dd if=qcow2.img bs=1 skip=$((at + 168)) count=40 status=none |
             dd of=replaced2.img bs=1 seek=$((there + 168)) conv=notrunc status=none
         printf damaged | dd of=damaged2.img bs=1 seek=$((at + 216)) conv=notrunc status=none",
    )?;
    let ended = agent::unlock(guest, "/root/replaced2.img", 20)?;
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(ended.stderr.contains("not the one that was sealed"), "{ended}");
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
    let guest = stage.vm.guest();
    guest.run_ok(&["assay-agent", "lock", device.trim_start_matches("/dev/mapper/")])?;

    // Two at once: one opens it, and the other's failure takes nothing away from that.
    let said = guest.script(
        "cd /root; for n in 1 2; do (c=0; assay-agent unlock disk.img --timeout 60 > said.$n 2>&1 || c=$?; echo $c > code.$n) & done; wait; cat code.* said.*",
    )?;
    let codes = said.starts_with("0\n1\n") || said.starts_with("1\n0\n");
    assert!(codes && said.contains(&device), "{said}\n{}", stage.agent.journal());
    assert!(said.contains("being opened") || said.contains("already open"), "{said}");
    let disks = stage.agent.status()?["disks"].clone();
    assert_eq!(
        (disks.as_array().map(Vec::len), &disks[0]["state"]),
        (Some(1), &"open".into()),
        "{disks}"
    );
    Ok(())
}

/// The verifier's program in the machine, small enough for its memory, and the one library of it that machines lack.
fn put_verifier(stage: &Stage) -> Result<(), HarnessError> {
    let small = stage.verifier.scratch().join("assay-verifier");
    let mut strip = Command::new("objcopy");
    strip.arg("--strip-debug").args([&verifier_binary(), &small]);
    child::run(&mut strip)?;
    let guest = stage.vm.guest();
    guest.put_file("/root/assay-verifier", 0o755, &small)?;
    let libraries = Command::new("ldd").arg(&small).output().expect("ldd");
    let libraries = String::from_utf8(libraries.stdout).expect("text");
    let sqlite = libraries
        .lines()
        .find_map(|line| {
            line.trim()
                .strip_prefix("libsqlite3.so.0 => ")?
                .split_whitespace()
                .next()
        })
        .unwrap_or_else(|| panic!("no SQLite in {libraries}"));
    guest.put_file("/root/libsqlite3.so.0", 0o755, Path::new(sqlite))
}

/// Sealed from a block device, and in place on one, and read by stock cryptsetup with the recovery key.
const SEAL_DEVICES: &str = r#"
cd /root; mkdir /root/devices; cd /root/devices; umask 077
export LD_LIBRARY_PATH=/root
av() { /root/assay-verifier --state /root/devices/state "$@"; }
av init --url https://verifier.example:8440 > said
head -c 2097152 /dev/urandom > plain
cp plain room; truncate -s 6291456 room
from=$(losetup -f --show plain); in_place=$(losetup -f --show room)
av image seal --recovery-file one.key "$from" one.luks
cryptsetup open --key-file one.key one.luks one; cmp plain /dev/mapper/one
if av image seal --in-place --no-recovery "$in_place" 2> said; then exit 9; fi
grep -q -e --size said
av image seal --in-place --size 2097152 --recovery-file two.key "$in_place"
cryptsetup open --key-file two.key "$in_place" two; cmp plain /dev/mapper/two
if av image seal --no-recovery --in-place --size 2097152 "$in_place" 2> said; then exit 9; fi
cat said
cryptsetup close one; cryptsetup close two; losetup -d "$from" "$in_place"
"#;

#[test]
fn vm_block_devices_are_sealed_and_opened() -> Result<(), HarnessError> {
    let stage = trusted()?;
    let guest = stage.vm.guest();
    stage.sealed_disk("/root/disk.img", b"on a device")?;
    stage.disk_as("qcow2-luks", "/root/disk.qcow2", b"in qcow2")?;
    let attach = "losetup -f --show /root/disk.img; losetup -f --show /root/disk.qcow2";
    let devices = guest.script(attach)?;
    let [luks, qcow2] = devices.lines().collect::<Vec<_>>()[..] else {
        panic!("{devices}")
    };
    guest.script(&format!("{QCOW2}; cp /root/disk.qcow2.assay.json {qcow2}.assay.json"))?;
    stage.verifier.run_ok(&["policy", "capture", HOST, "--add"])?;
    stage.wait("trusted with losetup", |host| host.state == "trusted")?;
    for (device, holds) in [(luks, "on a device"), (qcow2, "in qcow2")] {
        let ended = agent::unlock(guest, device, 60)?;
        assert!(ended.ok(), "{ended}\n{}", stage.agent.journal());
        guest.run_ok(&["mount", "-o", "ro", ended.stdout.trim(), "/mnt/disk"])?;
        assert_eq!(guest.run_ok(&["cat", "/mnt/disk/hello"])?, holds);
        guest.run_ok(&["umount", "/mnt/disk"])?;
        let name = ended.stdout.trim().trim_start_matches("/dev/mapper/").to_owned();
        guest.run_ok(&["assay-agent", "lock", &name])?;
    }
    let loops = guest.run_ok(&["losetup", "-n", "-O", "NAME"])?;
    let mut loops: Vec<&str> = loops.lines().map(str::trim).collect();
    loops.sort_unstable();
    assert_eq!(loops, [luks, qcow2], "the caller's devices stay, and no others");
    guest.script(&format!("losetup -d {luks} {qcow2}"))?;

    put_verifier(&stage)?;
    let said = guest.script(SEAL_DEVICES)?;
    assert!(said.contains("in use") || said.contains("LUKS image already"), "{said}");
    Ok(())
}
