//! A hundred machines that start at once, in a real kernel: each disk opens, none is left behind.

use std::path::{Path, PathBuf};
use std::process::Command;

use assay_evidence::digest::Sha256Digest;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::child;
use assay_verifier::config::StateDir;
use assay_verifier::keystore::FileKeyStore;
use assay_verifier::pki::ca_spki_sha256;
use assay_verifier::seal::{self, Format, Request, Terms};

use crate::common::{HOST, Stage, enrolled};

const DISKS: usize = 100;
/// Of each disk, in bytes: what is in it does not matter here.
const SIZE: u64 = 64 << 10;

/// Opens all disks at once; a line for each: how it ended, and how long it took in milliseconds.
const STORM: &str = r#"
cd /root/storm
for image in *.luks; do
    (
        start=$EPOCHREALTIME
        assay-agent unlock "/root/storm/$image" --name "storm-${image%.luks}" --timeout 540 > "$image.said" 2>&1; code=$?
        end=$EPOCHREALTIME
        echo "$code $(( (${end/./} - ${start/./}) / 1000 ))" > "$image.ended"
    ) &
done
wait
cat *.ended
"#;

/// Closes them: one program for all, since each start takes long in an emulated machine.
const CLOSE: &str = r#"
import os, socket
for name in os.listdir('/dev/mapper'):
    if name.startswith('storm-'):
        body = '{"name": "%s"}' % name
        agent = socket.socket(socket.AF_UNIX)
        agent.connect('/run/assay/agent.sock')
        agent.sendall(('POST /v1/lock HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s' % (len(body), body)).encode())
        answer = agent.recv(4096)
        assert b' 200 ' in answer, answer
"#;

/// Seals this many small disks, for hosts that meet the policy, and packs them.
fn sealed_disks(stage: &Stage) -> Result<PathBuf, HarnessError> {
    let folder = stage.verifier.scratch().join("storm");
    let plain = stage.verifier.scratch().join("plain");
    std::fs::create_dir(&folder).expect("a folder");
    std::fs::File::create(&plain)
        .and_then(|file| file.set_len(SIZE))
        .expect("a disk");
    let state = StateDir::new(stage.verifier.state_dir());
    let keys = FileKeyStore::open(state.path()).expect("the verifier's keys");
    let ca = Sha256Digest::new(ca_spki_sha256(&state).expect("the CA"));
    let join: serde_json::Value =
        serde_json::from_slice(&std::fs::read(stage.verifier.join_file()).expect("the join file")).expect("JSON");
    let verifiers = [join["verifiers"][0].as_str().expect("a verifier").to_owned()];
    for number in 0..DISKS {
        let output = folder.join(format!("{number:03}.luks"));
        let request = Request {
            input: &plain,
            input_format: None,
            output: &output,
            format: Format::Luks2,
            terms: Terms {
                policy: "default",
                tags: &[],
                verifiers: &verifiers,
                verifier_spki_sha256: ca,
                recovery: None,
                now: 0,
            },
        };
        seal::seal(&request, &keys, &mut |_, _| {}).expect("sealed");
    }
    let packed = stage.verifier.scratch().join("storm.tar");
    let mut tar = Command::new("tar");
    // Their headers are mostly zeros, and written ones: no holes that a file system could tell of.
    tar.args(["--sparse", "--hole-detection=raw", "-C"])
        .arg(stage.verifier.scratch())
        .arg("-cf")
        .args([packed.as_path(), Path::new("storm")]);
    child::run(&mut tar)?;
    Ok(packed)
}

fn worked_us(agent: &Agent) -> Result<u64, HarnessError> {
    Ok(agent.status()?["tpm_worked_us"].as_u64().unwrap_or_default())
}

#[test]
fn vm_a_hundred_disks_that_are_opened_at_once_all_open_and_none_is_left_behind() -> Result<(), HarnessError> {
    let stage = enrolled()?;
    let (guest, agent) = (stage.vm.guest(), &stage.agent);
    guest.put_file("/root/storm.tar", 0o600, &sealed_disks(&stage)?)?;
    // What the storm runs is known before it begins.
    guest.script(
        "cd /root; tar -xf storm.tar; rm storm.tar; cat /etc/hostname; ls /dev/mapper; modprobe dm-crypt; true",
    )?;
    agent::rehearse(guest)?;
    stage.verifier.run_ok(&["policy", "capture", HOST])?;
    stage.wait("trusted", |host| host.state == "trusted")?;

    let (worked, start) = (worked_us(agent)?, std::time::Instant::now());
    let said = guest.run_with(&["bash", "-c", STORM], b"", std::time::Duration::from_secs(600))?;
    let (all, worked) = (start.elapsed(), worked_us(agent)? - worked);
    let numbers = |line: &str| {
        let mut words = line
            .split_whitespace()
            .map(|word| word.parse::<u64>().expect("a number"));
        (words.next().expect("a code"), words.next().expect("a time"))
    };
    let mut ended: Vec<(u64, u64)> = said.stdout.lines().map(numbers).collect();
    let failed =
        guest.script("cd /root/storm; grep -L ^/dev/mapper *.said | while read f; do echo \"$f: $(cat $f)\"; done")?;
    assert!(
        ended.len() == DISKS && ended.iter().all(|(code, _)| *code == 0),
        "{said}\n{failed}\n{}",
        agent.journal()
    );
    ended.sort_by_key(|(_, millis)| *millis);
    println!(
        "{DISKS} disks at once: all open within {} ms, p50 {} ms; the TPM worked {} % of that time",
        all.as_millis(),
        ended[DISKS / 2].1,
        u128::from(worked) / 10 / all.as_millis().max(1)
    );
    let devices = guest.run_ok(&["ls", "/dev/mapper"])?;
    assert_eq!(devices.matches("storm-").count(), DISKS, "{devices}");
    assert_eq!(agent.status()?["disks"].as_array().map(Vec::len), Some(DISKS));

    let closed = guest.run_with(&["python3", "-c", CLOSE], b"", std::time::Duration::from_secs(300))?;
    assert!(closed.ok(), "{closed}");
    assert_eq!(guest.run_ok(&["ls", "/dev/mapper"])?.trim(), "control");
    assert_eq!(guest.run_ok(&["losetup", "-a"])?.trim(), "", "a loop device is left");
    assert_eq!(agent.status()?.get("disks"), None);
    Ok(())
}
