//! Boot logs of real machines and clouds, against the PCR values that those machines reported.

use std::process::Command;

use assay_evidence::bootlog::{BootLogError, parse};
use assay_evidence::digest::Algorithm;
use assay_evidence::wire::Hex;
use serde_json::Value;

use crate::{read, read_json, vector};

/// Logs that come with the PCR values of their machines.
const REPORTED: &[&str] = &[
    "arch-linux-workstation",
    "cos-101-amd-sev",
    "cos-85-amd-sev",
    "debian-10",
    "glinux-alex",
    "ubuntu-1804-amd-sev",
    "ubuntu-2104-no-secure-boot",
];

fn bytes_of(hex: &Value) -> Vec<u8> {
    serde_json::from_value::<Hex>(hex.clone()).expect("hex").0
}

#[test]
fn vectors_boot_logs_replay_to_what_their_machines_reported() {
    for name in REPORTED {
        let log = parse(&read(&format!("boot-logs/{name}.bin"))).expect(name);
        let reported = read_json(&format!("boot-logs/{name}.pcrs.json"));
        for (bank, pcrs) in reported["pcrs"].as_object().expect("banks") {
            let replayed = log.replay(bank.parse().expect("a bank")).expect(name);
            for (pcr, value) in pcrs.as_object().expect("PCRs") {
                let index: u32 = pcr.parse().expect("a number");
                assert_eq!(replayed[&index], bytes_of(value), "{name}: PCR {pcr} of {bank}");
            }
        }
    }
}

#[test]
fn vectors_odd_boot_logs_are_read() {
    for name in [
        "option_rom_eventlog",
        "crypto_agile_eventlog",
        "sb_cert_eventlog",
        "short_no_action_eventlog",
    ] {
        let log = parse(&read(&format!("boot-logs/{name}.bin"))).expect(name);
        assert!(!log.events().is_empty(), "{name}");
        for bank in log.banks() {
            log.replay(*bank).expect(name);
        }
    }
    for name in [
        "keylime-binary_bios_measurements",
        "keylime-binary_bios_measurements-secureboot",
    ] {
        let log = parse(&read(&format!("boot-logs/{name}.bin"))).expect(name);
        assert!(log.extended_pcrs().contains(&7), "{name}");
        log.replay(Algorithm::Sha256).expect(name);
    }
}

#[test]
fn vectors_what_is_no_boot_log_is_refused() {
    let refused: Result<_, BootLogError> = parse(&read("boot-logs/keylime-binary_bios_measurements-bogus.bin"));
    assert!(refused.is_err(), "{refused:?}");
}

#[test]
fn vectors_boot_logs_cut_short_are_refused_and_never_panic() {
    for entry in std::fs::read_dir(vector("boot-logs")).expect("the folder").flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "bin") {
            continue;
        }
        let bytes = std::fs::read(&path).expect("a log");
        let whole = parse(&bytes).map(|log| log.events().len()).unwrap_or(0);
        // Each cut either falls between two events, and then shows fewer of them, or is an error.
        for length in (0..bytes.len()).step_by(97) {
            if let Ok(log) = parse(&bytes[..length]) {
                assert!(log.events().len() <= whole, "{} cut to {length}", path.display());
            }
        }
    }
}

/// Logs that tpm2_eventlog (tpm2-tools 5.4) reads; on the others it gives up, or falls over.
const READ_BY_OTHERS: &[&str] = &[
    "arch-linux-workstation",
    "cos-101-amd-sev",
    "cos-85-amd-sev",
    "crypto_agile_eventlog",
    "debian-10",
    "glinux-alex",
    "keylime-binary_bios_measurements",
    "keylime-binary_bios_measurements-secureboot",
    "sb_cert_eventlog",
    "ubuntu-1804-amd-sev",
    "ubuntu-2104-no-secure-boot",
];

/// The values below `pcrs:` in what tpm2_eventlog prints: `  sha1:`, then `    0  : 0x<hex>`; by bank and PCR.
fn values_of(text: &str) -> Vec<(String, u32, String)> {
    let (_, pcrs) = text.split_once("\npcrs:\n").expect("values");
    let mut bank = String::new();
    let mut values = Vec::new();
    for line in pcrs.lines() {
        match line.split_once(':').map(|(key, value)| (key.trim(), value.trim())) {
            Some((name, "")) => name.clone_into(&mut bank),
            Some((pcr, value)) => {
                let value = value.strip_prefix("0x").expect("hex").to_lowercase();
                values.push((bank.clone(), pcr.parse().expect("a number"), value));
            }
            None => {}
        }
    }
    values
}

/// A second opinion on every log that it reads: the same PCRs with the same values, in every bank that both know.
#[test]
fn vectors_boot_logs_replay_as_tpm2_eventlog_says() {
    for name in READ_BY_OTHERS {
        let path = vector(&format!("boot-logs/{name}.bin"));
        let said = Command::new("tpm2_eventlog")
            .arg(&path)
            .output()
            .expect("tpm2_eventlog");
        assert!(said.status.success(), "{name}: {said:?}");
        let log = parse(&std::fs::read(&path).expect("a log")).expect(name);
        let mut compared = 0;
        for (bank, pcr, value) in values_of(&String::from_utf8_lossy(&said.stdout)) {
            let Ok(bank) = bank.parse::<Algorithm>() else { continue };
            // It begins at locality 0 always; what the machine reported is another test's.
            if pcr == 0 && log.startup_locality() != 0 {
                continue;
            }
            let replayed = log.replay(bank).expect(name);
            assert_eq!(hex_of(&replayed[&pcr]), value, "{name}: PCR {pcr} of {bank}");
            compared += 1;
        }
        assert!(compared >= log.extended_pcrs().len(), "{name}: only {compared} values");
    }
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
