//! Many machines that start at once on one host, also while its verifier restarts.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use assay_evidence::vhd::KeyHash;
use assay_verifier::keystore::{FileKeyStore, KeySource as _};
use serde_json::json;

use crate::site::Site;

const MACHINES: usize = 100;

/// Asks for the key of a VHD as the storage manager's plugin does; gives status and body.
fn ask(socket: &Path, hash: &KeyHash) -> (u16, Vec<u8>) {
    let body =
        json!({"key_hash": hash, "vdi_uuid": "6f9619ff-8b86-4011-b42d-00cf4fc964ff", "timeout_s": 60}).to_string();
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
    write!(
        stream,
        "POST /v1/vhd-key HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let status = String::from_utf8_lossy(&answer[9..12]).parse().unwrap();
    (status, answer.split_off(end))
}

/// Keeps so many keys, and gives their hashes.
fn keys(site: &Site, count: usize) -> Vec<KeyHash> {
    let make = |number| {
        let said = site.run(&["key", "make-vhd", &format!("vm-{number}")]).good();
        let hash = said.lines().find_map(|line| line.strip_prefix("key_hash "));
        hash.unwrap().parse().unwrap()
    };
    (0..count).map(make).collect()
}

/// Asks for all of them at once, and gives how long each took; `meanwhile` is done after the first answer.
fn ask_all(site: &mut Site, socket: &Path, keys: &[KeyHash], meanwhile: impl FnOnce(&mut Site)) -> Vec<Duration> {
    let (say, answered) = mpsc::channel();
    thread::scope(|scope| {
        let asked: Vec<_> = keys
            .iter()
            .map(|hash| {
                let say = say.clone();
                scope.spawn(move || {
                    let began = Instant::now();
                    let answer = ask(socket, hash);
                    say.send(()).unwrap();
                    (answer, began.elapsed())
                })
            })
            .collect();
        answered.recv().unwrap();
        meanwhile(site);
        let store = FileKeyStore::open(site.state().path()).unwrap();
        let answers = asked.into_iter().zip(keys).map(|(thread, hash)| {
            let ((status, key), took) = thread.join().unwrap();
            assert_eq!(status, 200, "{}\n{}", String::from_utf8_lossy(&key), site.log());
            assert_eq!(key, store.get(hash.key_id()).unwrap().passphrase.expose());
            took
        });
        answers.collect()
    })
}

#[test]
fn a_hundred_keys_asked_for_at_once_all_come_and_the_tpm_is_what_they_wait_for() {
    let mut site = Site::serving(1.0);
    let machine = site.trusted_host("alpha");
    let local = machine.local_socket();
    let socket = local.path();
    let keys = keys(&site, MACHINES);
    // One alone, as a machine that migrates asks on its new host.
    let (worked, start) = (machine.tpm().worked(), Instant::now());
    assert_eq!(ask(&socket, &keys[0]).0, 200);
    let (all, tpm) = (start.elapsed(), machine.tpm().worked() - worked);
    println!(
        "one key: {} ms, of which the TPM {} ms",
        all.as_millis(),
        tpm.as_millis()
    );

    let (worked, start) = (machine.tpm().worked(), Instant::now());
    let mut times = ask_all(&mut site, &socket, &keys, |_| {});
    let (all, tpm) = (start.elapsed(), machine.tpm().worked() - worked);
    times.sort();
    println!(
        "{MACHINES} keys at once: all within {} ms, p50 {} ms; the TPM worked {} % of that time",
        all.as_millis(),
        times[MACHINES / 2].as_millis(),
        tpm.as_millis() * 100 / all.as_millis().max(1),
    );
    let released = site.run(&["audit", "show"]).good().matches("released").count();
    assert_eq!(released, MACHINES + 1, "each key left once for each question");
    site.run(&["audit", "verify"]).good();
}

#[test]
fn keys_that_are_asked_for_while_the_verifier_restarts_come_all_the_same() {
    let mut site = Site::serving(1.0);
    let machine = site.trusted_host("alpha");
    let local = machine.local_socket();
    let socket = local.path();
    let keys = keys(&site, 12);
    // Killed with requests under way: challenges are lost, connections break.
    ask_all(&mut site, &socket, &keys, Site::serve_again);
    site.run(&["audit", "verify"]).good();
}
