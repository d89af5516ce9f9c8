//! Boot logs of real machines replay to the PCR values that those machines reported.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

use assay_evidence::bootlog::{self, BootFacts, BootLogError, Format, Meaning, Role, SecureBoot};
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

fn facts_of(name: &str) -> Option<BootFacts> {
    let log = bootlog::parse(&std::fs::read(folder()?.join(name).with_extension("bin")).unwrap()).unwrap();
    let bank = *log.banks().last().unwrap();
    Some(BootFacts::of(&log.proven(bank, None).unwrap()))
}

/// What is known of the machines that the logs are from.
#[test]
fn real_boots_in_short() {
    let known = [
        // Firmware, Secure Boot, programs, GRUB commands, command lines, key databases.
        (
            "arch-linux-workstation",
            Some("546bfb1e-1d0c-4055-a4ad-4ef4bf17b83a"),
            SecureBoot::Off,
            2,
            0,
            1,
            4,
        ),
        (
            "cos-101-amd-sev",
            Some("GCE Virtual Firmware v1"),
            SecureBoot::On,
            4,
            14,
            1,
            4,
        ),
        (
            "cos-85-amd-sev",
            Some("GCE Virtual Firmware v1"),
            SecureBoot::On,
            3,
            14,
            1,
            4,
        ),
        ("debian-10", Some("GCE Virtual Firmware v1"), SecureBoot::On, 3, 0, 0, 4),
        (
            "keylime-binary_bios_measurements",
            Some("N40ET41W"),
            SecureBoot::Off,
            3,
            52,
            1,
            4,
        ),
        ("option_rom_eventlog", None, SecureBoot::On, 1, 0, 0, 4),
        ("short_no_action_eventlog", None, SecureBoot::Unknown, 0, 0, 0, 0),
        (
            "ubuntu-2104-no-secure-boot",
            Some("GCE Virtual Firmware v1"),
            SecureBoot::Off,
            2,
            66,
            1,
            4,
        ),
    ];
    for (name, firmware, secure_boot, programs, commands, lines, keys) in known {
        let Some(facts) = facts_of(name) else { return };
        assert_eq!(facts.firmware.as_deref(), firmware, "{name}");
        assert_eq!(facts.secure_boot, secure_boot, "{name}");
        assert_eq!(facts.programs.len(), programs, "{name}");
        assert_eq!(facts.grub_commands.len(), commands, "{name}");
        assert_eq!(facts.command_lines.len(), lines, "{name}");
        assert_eq!(facts.keys.len(), keys, "{name}");
        assert!(facts.command_lines.iter().all(|line| line.text.is_some()), "{name}");
        assert!(facts.keys.iter().all(|database| database.keys.is_some()), "{name}");
    }
}

#[test]
fn a_real_boot_by_shim_and_grub() {
    let Some(facts) = facts_of("keylime-binary_bios_measurements") else {
        return;
    };
    let files: Vec<_> = facts
        .programs
        .iter()
        .filter_map(|program| program.claimed.as_deref())
        .collect();
    assert_eq!(files[1..], [r"\EFI\fedora\shimx64.efi", r"\EFI\fedora\grubx64.efi"]);
    let used = |role: Role| -> Vec<&str> {
        let files = facts.grub_files.iter().filter(|file| file.role == Some(role));
        files.filter_map(|file| file.file.claimed.as_deref()).collect()
    };
    assert_eq!(used(Role::Kernel), ["(hd3,gpt2)/vmlinuz-6.11.5-300.fc41.x86_64"]);
    assert_eq!(used(Role::Initrd), ["(hd3,gpt2)/initramfs-6.11.5-300.fc41.x86_64.img"]);
    let line = facts.command_lines[0].text.as_deref().unwrap();
    assert!(
        line.starts_with("(hd3,gpt2)/vmlinuz-6.11.5-300.fc41.x86_64 root=UUID="),
        "{line}"
    );
    let names: Vec<_> = facts.keys.iter().map(|database| database.name.as_str()).collect();
    assert_eq!(names, ["PK", "KEK", "db", "dbx"]);

    let Some(facts) = facts_of("debian-10") else { return };
    assert_eq!(facts.started_by.len(), 2, "{:?}", facts.started_by);
    assert!(facts.started_by[0].ends_with("CN=Microsoft Corporation UEFI CA 2011"));
    assert!(facts.started_by[1].contains("Debian Secure Boot"));
}

/// Whoever changes an event's data proves nothing new: what is believed of it stays, or is lost.
#[test]
fn changed_data_is_not_believed() {
    let Some(folder) = folder() else { return };
    let mut lost = 0;
    for path in logs(&folder) {
        let bytes = std::fs::read(&path).unwrap();
        let Ok(log) = bootlog::parse(&bytes) else { continue };
        let bank = log.banks()[0];
        let honest = log.proven(bank, None).unwrap();
        for event in &honest {
            let logged = &log.events()[event.number()];
            let end = log
                .events()
                .get(event.number() + 1)
                .map_or(bytes.len(), bootlog::BootEvent::at);
            let length = logged.untrusted_data().len();
            for at in [0, length / 2, length.saturating_sub(2)]
                .into_iter()
                .filter(|&at| at < length)
            {
                let mut changed = bytes.clone();
                changed[end - length + at] ^= 1;
                let changed = bootlog::parse(&changed).unwrap();
                let changed = changed.proven(bank, None).unwrap();
                let now = changed.iter().find(|other| other.number() == event.number()).unwrap();
                match (event.meaning(), now.meaning()) {
                    (before, now) if before == now => {}
                    (_, Meaning::Digest { .. }) => lost += 1,
                    // The name was a claim before, too.
                    (Meaning::Content { claimed: before }, Meaning::Content { claimed: now }) => {
                        assert_eq!(before.value, now.value, "{}: {}", path.display(), event.number());
                    }
                    (before, now) => panic!(
                        "{}, event {}: {before:?} became {now:?}",
                        path.display(),
                        event.number()
                    ),
                }
            }
        }
    }
    assert!(lost > 1000, "only {lost} lies");
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
