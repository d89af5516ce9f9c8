//! Many machines that start at once: as many small disks are sealed, put into a machine, opened together and closed.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::HarnessError;
use crate::agent::Agent;
use crate::child;
use crate::guest::Guest;
use crate::verifier::Verifier;

/// Of each disk, in bytes: what is in it does not matter here.
const SIZE: u64 = 64 << 10;
/// How long all disks may take: the agent's clients are told less, so that it is they who say what is wrong.
const PATIENCE: Duration = Duration::from_secs(600);

/// Opens the first disks at once; a line for each: how it ended, and how long it took in milliseconds.
const OPEN: &str = r#"
cd /root/storm
rm -f -- *.said *.ended
set -- $(printf '%s\n' *.luks | head -n "$1")
for image; do
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

/// What those said that did not open.
const COMPLAINTS: &str = "cd /root/storm; grep -L ^/dev/mapper *.said | while read f; do echo \"$f: $(cat $f)\"; done";

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

/// How the disks opened, all of them.
#[derive(Debug, Clone)]
pub struct Opened {
    /// From the first call to the last disk.
    pub all: Duration,
    /// How long each took in milliseconds, from its call on.
    pub each_ms: Vec<f64>,
    /// For how long of that time the agent waited for the TPM.
    pub tpm: Duration,
}

/// Seals so many disks for hosts that meet the policy, and puts them into the machine. What opens and closes them has run there then:
/// a capture that follows approves it.
///
/// # Errors
/// When the verifier refuses, or the guest does not answer.
pub fn prepare(guest: &Guest, verifier: &Verifier, disks: usize) -> Result<(), HarnessError> {
    let folder = verifier.scratch().join("storm");
    let plain = verifier.scratch().join("plain-storm");
    std::fs::create_dir(&folder).map_err(HarnessError::io("make a folder for disks"))?;
    std::fs::File::create(&plain)
        .and_then(|file| file.set_len(SIZE))
        .map_err(HarnessError::io("write a disk"))?;
    for number in 0..disks {
        let sealed = folder.join(format!("{number:03}.luks"));
        let [from, to] = [&plain, &sealed].map(|path| path.to_string_lossy());
        verifier.run_ok(&["image", "seal", &from, &to])?;
    }
    let packed = verifier.scratch().join("storm.tar");
    let mut tar = Command::new("tar");
    // Their headers are mostly zeros, and written ones: no holes that a file system could tell of.
    tar.args(["--sparse", "--hole-detection=raw", "-C"])
        .arg(verifier.scratch())
        .arg("-cf")
        .args([packed.as_path(), Path::new("storm")]);
    child::run(&mut tar)?;
    guest.put_file("/root/storm.tar", 0o600, &packed)?;
    guest.script(
        "cd /root; tar -xf storm.tar; rm storm.tar; cat /etc/hostname; printf 'a\\n' | head -n 1; ls /dev/mapper
         modprobe dm-crypt; true",
    )?;
    close(guest)
}

/// Opens so many of them at once.
///
/// # Errors
/// When a disk does not open, with what was said about it and the agent's journal; when the guest does not answer.
pub fn open(guest: &Guest, agent: &Agent, disks: usize) -> Result<Opened, HarnessError> {
    let (worked, start) = (agent.tpm_worked()?, Instant::now());
    let said = guest.run_with(&["bash", "-c", OPEN, "storm", &disks.to_string()], b"", PATIENCE)?;
    let (all, worked) = (start.elapsed(), agent.tpm_worked()?.saturating_sub(worked));
    let millis = |line: &str| match line.split_once(' ') {
        Some(("0", millis)) => millis.parse().ok(),
        _ => None,
    };
    let each_ms: Vec<f64> = said.stdout.lines().filter_map(millis).collect();
    if each_ms.len() != disks {
        let complaints = guest.script(COMPLAINTS)?;
        return Err(HarnessError::Guest {
            request: format!("open {disks} disks at once"),
            message: format!("{said}\n{complaints}\n{}", agent.journal()),
        });
    }
    Ok(Opened {
        all,
        each_ms,
        tpm: worked,
    })
}

/// Closes all of them.
///
/// # Errors
/// When one does not close, or the guest does not answer.
pub fn close(guest: &Guest) -> Result<(), HarnessError> {
    let closed = guest.run_with(&["python3", "-c", CLOSE], b"", PATIENCE)?;
    match closed.ok() {
        true => Ok(()),
        false => Err(HarnessError::Guest {
            request: "close the disks".to_owned(),
            message: closed.to_string(),
        }),
    }
}
