//! Boot logs of real machines replay to the PCR values that those machines reported.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

use assay_evidence::bootlog::{self, BootLogError, Format};
use assay_evidence::digest::Algorithm;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The folder of other projects' vectors, or `None` with a line that says so.
fn folder() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors/boot-logs");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: no test vectors at {}", folder.display());
    None
}

fn logs(folder: &Path) -> Vec<PathBuf> {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "bin"))
        .collect();
    logs.sort();
    assert!(logs.len() >= 13, "only {} logs in {}", logs.len(), folder.display());
    logs
}

fn bank(name: &str) -> Algorithm {
    match name {
        "sha1" => Algorithm::Sha1,
        "sha256" => Algorithm::Sha256,
        "sha384" => Algorithm::Sha384,
        other => panic!("the vectors name a bank {other}"),
    }
}

#[derive(serde::Deserialize)]
struct Reported {
    pcrs: BTreeMap<String, BTreeMap<u32, String>>,
}

#[test]
fn logs_replay_to_the_reported_pcrs() {
    let Some(folder) = folder() else { return };
    let mut compared = 0;
    for path in logs(&folder) {
        let Ok(reported) = std::fs::read(path.with_extension("pcrs.json")) else {
            continue;
        };
        let reported: Reported = serde_json::from_slice(&reported).unwrap();
        let log = bootlog::parse(&std::fs::read(&path).unwrap()).unwrap();
        for (name, pcrs) in reported.pcrs {
            // A TPM 1.2 form log has SHA-1 digests alone, whatever else the machine reported.
            if log.format() == Format::Tpm12 && name != "sha1" {
                assert!(matches!(log.replay(bank(&name)), Err(BootLogError::NoBank(..))));
                continue;
            }
            let replayed = log.replay(bank(&name)).unwrap();
            for (pcr, value) in pcrs {
                assert_eq!(
                    hex::encode(&replayed[&pcr]),
                    value,
                    "{} {name} PCR {pcr}",
                    path.display()
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 50, "only {compared} PCR values compared");
}

#[test]
fn odd_but_genuine_logs_are_read_and_the_bogus_one_is_not() {
    let Some(folder) = folder() else { return };
    for path in logs(&folder) {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let parsed = bootlog::parse(&std::fs::read(&path).unwrap());
        if name.ends_with("-bogus") {
            assert!(
                matches!(parsed, Err(BootLogError::NoSuchPcr { event: 0, .. })),
                "{parsed:?}"
            );
            continue;
        }
        let log = parsed.unwrap_or_else(|error| panic!("{name}: {error}"));
        for &bank in log.banks() {
            log.replay(bank).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert!(log.to_string().lines().count() > log.events().len(), "{name}");
        assert_eq!(
            log.to_json()["events"].as_array().unwrap().len(),
            log.events().len(),
            "{name}"
        );
        match name {
            "short_no_action_eventlog" => {
                assert_eq!(
                    (log.format(), log.startup_locality(), log.events().len()),
                    (Format::Tpm12, 3, 1)
                );
            }
            "option_rom_eventlog" => assert_eq!(log.format(), Format::Tpm12),
            "crypto_agile_eventlog" => assert_eq!(log.format(), Format::CryptoAgile),
            _ => {}
        }
    }
}

/// No prefix of a log panics, and none but those that end between two events is a log.
#[test]
fn shortened_logs_are_refused() {
    let Some(folder) = folder() else { return };
    let bytes = std::fs::read(folder.join("arch-linux-workstation.bin")).unwrap();
    let events = bootlog::parse(&bytes).unwrap().events().len();
    let whole = (0..bytes.len())
        .filter(|&end| bootlog::parse(&bytes[..end]).is_ok())
        .count();
    assert_eq!(whole, events - 1);
}

/// A flipped bit in any extended digest changes a PCR.
#[test]
fn a_changed_digest_changes_the_replay() {
    let Some(folder) = folder() else { return };
    let bytes = std::fs::read(folder.join("crypto_agile_eventlog.bin")).unwrap();
    let good = bootlog::parse(&bytes).unwrap();
    let (bank, digest) = good
        .events()
        .iter()
        .find(|event| event.is_extended())
        .unwrap()
        .digests()[0]
        .clone();
    let at = bytes.windows(digest.len()).position(|window| window == digest).unwrap();
    let mut changed = bytes;
    changed[at] ^= 1;
    let changed = bootlog::parse(&changed).unwrap();
    assert_ne!(good.replay(bank).unwrap(), changed.replay(bank).unwrap());
}
