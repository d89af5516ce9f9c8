//! Processor, kernel and TPM.

use super::{Finding, Host, Running};
use crate::config::Config;
use crate::kernel_age;

pub(super) fn processor() -> Finding {
    let arch = std::env::consts::ARCH;
    match arch {
        "x86_64" => Finding::good("processor", arch),
        _ => Finding::bad(
            "processor",
            format!("{arch}, for which there are no kernel programs"),
            "Assay measures on x86-64 only",
        ),
    }
}

pub(super) fn kernel() -> Finding {
    const CHECK: &str = "kernel";
    match kernel_age::release() {
        Ok(release) if kernel_age::is_too_old(&release) => {
            Finding::bad(CHECK, format!("Linux {release}, which is too old"), kernel_age::REMEDY)
        }
        Ok(release) => Finding::good(CHECK, format!("Linux {release}")),
        Err(error) => Finding::error(CHECK, &error),
    }
}

/// The TPM, without talking to it: a running agent owns it, and may keep others away from it.
pub(super) fn tpm(host: &Host, config: Option<&Config>, running: &Running) -> Vec<Finding> {
    const CHECK: &str = "tpm";
    if let Some(config) = config
        && !config.tpm.tcti.starts_with("device:")
    {
        let found = format!("[tpm] tcti is {}, which is no device of this host", config.tpm.tcti);
        let remedy = "such a TPM does not know what this host booted; use device:/dev/tpmrm0 but for trials";
        return vec![Finding::weak(CHECK, found, remedy)];
    }
    if !host.has("/sys/class/tpm/tpm0") {
        let remedy = "turn it on in the firmware's setup (TPM, PTT or fTPM) and restart; in a virtual machine, give it a TPM 2.0";
        return vec![Finding::bad(CHECK, "the kernel has no TPM", remedy)];
    }
    if host.text("/sys/class/tpm/tpm0/tpm_version_major").as_deref() == Some("1") {
        let remedy = "set it to 2.0 in the firmware's setup, if it is capable of that; Assay needs TPM 2.0";
        return vec![Finding::bad(CHECK, "a TPM 1.2", remedy)];
    }
    if !host.has("/dev/tpmrm0") {
        let found = "a TPM without /dev/tpmrm0, the kernel's resource manager";
        return vec![Finding::bad(
            CHECK,
            found,
            "is this container or kernel without its device files?",
        )];
    }
    let found = match running {
        Running::Yes(status) => format!("TPM 2.0, {}, firmware {}", status.tpm_manufacturer, status.tpm_firmware),
        Running::No | Running::Silent(_) => "TPM 2.0".to_owned(),
    };
    let mut findings = vec![Finding::good(CHECK, found)];
    findings.extend(bank(host));
    findings
}

/// Kernels before 5.12 do not tell the banks here; then the agent's own start does.
fn bank(host: &Host) -> Option<Finding> {
    let banks: Vec<&str> = ["sha1", "sha256", "sha384", "sha512", "sm3_256"]
        .into_iter()
        .filter(|bank| host.has(&format!("/sys/class/tpm/tpm0/pcr-{bank}")))
        .collect();
    if banks.is_empty() {
        return None;
    }
    let found = format!("PCR banks: {}", banks.join(", "));
    Some(if banks.contains(&"sha256") {
        Finding::good("tpm-bank", found)
    } else {
        let remedy = "turn the SHA-256 bank on (`tpm2_pcrallocate sha256:all`, or the firmware's setup) and restart";
        Finding::bad("tpm-bank", found, remedy)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::doctor::State;

    /// Paths and contents.
    type Files<'a> = &'a [(&'a str, &'a str)];
    /// Checks, and how they ended.
    type Found<'a> = &'a [(&'a str, State)];

    /// What is found where these files are, each with its content.
    fn found(files: Files<'_>) -> Vec<(&'static str, State)> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let config = Config::parse("", Path::new("agent.toml")).unwrap();
        let host = Host::below(root.path());
        let findings = tpm(&host, Some(&config), &Running::No);
        assert!(
            findings
                .iter()
                .all(|finding| (finding.state == State::Good) == finding.remedy.is_none()),
            "{findings:?}"
        );
        findings.iter().map(|finding| (finding.check, finding.state)).collect()
    }

    #[test]
    fn each_thing_that_is_missing_has_its_remedy() {
        let tpm = ("sys/class/tpm/tpm0/tpm_version_major", "2\n");
        let (device, bank) = (("dev/tpmrm0", ""), ("sys/class/tpm/tpm0/pcr-sha256/0", ""));
        let sha1 = ("sys/class/tpm/tpm0/pcr-sha1/0", "");
        let (good, bad) = (State::Good, State::Bad);
        let cases: [(Files<'_>, Found<'_>); 6] = [
            (&[tpm, device, bank], &[("tpm", good), ("tpm-bank", good)]),
            (&[tpm, device], &[("tpm", good)]),
            (&[], &[("tpm", bad)]),
            (
                &[("sys/class/tpm/tpm0/tpm_version_major", "1\n"), device],
                &[("tpm", bad)],
            ),
            (&[tpm], &[("tpm", bad)]),
            (&[tpm, device, sha1], &[("tpm", good), ("tpm-bank", bad)]),
        ];
        for (files, expected) in cases {
            assert_eq!(found(files), expected, "{files:?}");
        }
    }
}
