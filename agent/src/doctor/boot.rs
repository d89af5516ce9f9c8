//! What of the boot is measured: each link, by the firmware's own log, or by the PCRs where the kernel has no log.

use std::fs::File;
use std::io::Read as _;

use assay_evidence::bootlog::{self, BootFacts, Role, SecureBoot};
use assay_evidence::digest::Algorithm;

use super::{Finding, Host, grub};

const LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";
/// Where the firmware tells the variable of that name (UEFI specification, EFI_GLOBAL_VARIABLE).
const SECURE_BOOT: &str = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// PCRs that GRUB measures into: its commands, and the files that it reads.
const GRUB_PCRS: [u32; 2] = [8, 9];

/// All links, from the firmware to the initrd.
pub(super) fn chain(host: &Host) -> Vec<Finding> {
    if !host.has("/sys/class/tpm/tpm0") {
        // Said already.
        return Vec::new();
    }
    match facts(host) {
        Ok(Some((facts, firmware))) => vec![
            firmware_link(&facts, firmware),
            secure_boot(host, facts.secure_boot),
            kernel_link(host, &facts),
        ],
        Ok(None) => without_log(host),
        Err(why) => {
            let remedy = "the verifier refuses such a log; update the firmware, and report it with `assay-verifier inspect boot-log`";
            vec![
                Finding::bad("boot-log", why, remedy),
                secure_boot(host, SecureBoot::Unknown),
            ]
        }
    }
}

/// The facts that the log proves, and whether the firmware measured itself; none without a log.
fn facts(host: &Host) -> Result<Option<(BootFacts, bool)>, String> {
    let mut bytes = Vec::new();
    let Ok(file) = File::open(host.path(LOG)) else {
        return Ok(None);
    };
    let limit = bootlog::MAX_LOG as u64;
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("{LOG} cannot be read: {error}"))?;
    if bytes.len() > bootlog::MAX_LOG {
        return Err(format!("{LOG} is larger than {limit} bytes"));
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    let log = bootlog::parse(&bytes).map_err(|error| format!("{LOG}: {}", crate::http::chain(&error)))?;
    let line = host.text("/proc/cmdline");
    let proven = log
        .proven(Algorithm::Sha256, line.as_deref())
        .map_err(|error| format!("{LOG}: {}", crate::http::chain(&error)))?;
    Ok(Some((BootFacts::of(&proven), log.extended_pcrs().contains(&0))))
}

fn firmware_link(facts: &BootFacts, measured: bool) -> Finding {
    const CHECK: &str = "boot-firmware";
    if !measured {
        let remedy = "the firmware's setup may have a switch for measured boot (TCG, TPM measurements)";
        return Finding::weak(CHECK, "the firmware does not measure itself into PCR 0", remedy);
    }
    let version = facts.firmware.as_deref().unwrap_or("of no stated version");
    let programs = facts.programs.len();
    Finding::good(
        CHECK,
        format!("measured: firmware {version}, {programs} programs that it started"),
    )
}

fn secure_boot(host: &Host, proven: SecureBoot) -> Finding {
    const CHECK: &str = "secure-boot";
    let remedy =
        "turn it on in the firmware's setup, if the host's boot loader and kernel are signed; policies can demand it";
    match proven {
        SecureBoot::On => Finding::good(CHECK, "on, and the boot log proves it"),
        SecureBoot::Off => Finding::weak(CHECK, "off", remedy),
        SecureBoot::Unknown => match secure_boot_variable(host) {
            Some(1) => Finding::weak(
                CHECK,
                "on, which no boot log proves",
                "approve the host by its golden PCR 7",
            ),
            Some(_) => Finding::weak(CHECK, "off", remedy),
            None => Finding::weak(CHECK, "none: this host was not booted by UEFI", remedy),
        },
    }
}

/// Kernel, command line and initrd, by whoever loaded them.
fn kernel_link(host: &Host, facts: &BootFacts) -> Finding {
    const CHECK: &str = "boot-kernel";
    let by_grub = |role| facts.grub_files.iter().any(|file| file.role == Some(role));
    if by_grub(Role::Xen) && by_grub(Role::Module) {
        return Finding::good(
            CHECK,
            "measured by GRUB: Xen, dom0's kernel, its initrd, and their command lines",
        );
    }
    if by_grub(Role::Kernel) {
        let initrd = if by_grub(Role::Initrd) { ", initrd" } else { "" };
        return Finding::good(CHECK, format!("measured by GRUB: kernel{initrd} and command line"));
    }
    if facts.sections.iter().any(|section| section.name == ".linux") {
        return Finding::good(
            CHECK,
            "measured as a unified kernel image: kernel, initrd and command line",
        );
    }
    // Whoever had the kernel's EFI stub load the initrd had the firmware start the kernel.
    if !facts.initrds.is_empty() {
        return Finding::good(
            CHECK,
            "measured by the firmware and the kernel's EFI stub: kernel, initrd and command line",
        );
    }
    unmeasured(host)
}

/// Nothing measured the kernel: what can be done depends on what loaded it.
fn unmeasured(host: &Host) -> Finding {
    let found = "nothing measures kernel, command line and initrd";
    let remedy = if !host.has("/sys/firmware/efi") {
        "GRUB measures only where UEFI starts it: boot this host by UEFI".to_owned()
    } else if let Some(path) = grub::find(host) {
        format!(
            "`assay-agent doctor --fix` makes GRUB measure them, with a line in {}; restart then",
            path.display()
        )
    } else {
        "start the kernel by a GRUB with the module `tpm`, or as a unified kernel image".to_owned()
    };
    Finding::weak("boot-kernel", found, remedy)
}

/// Kernels without the log (XCP-ng 8.3) still have the PCRs.
fn without_log(host: &Host) -> Vec<Finding> {
    let remedy = "no remedy is needed: approve the host by its golden PCR values (`assay-verifier policy capture`)";
    let mut findings = vec![
        Finding::weak(
            "boot-log",
            "this kernel has no boot log, so the verifier sees PCR values only",
            remedy,
        ),
        secure_boot(host, SecureBoot::Unknown),
    ];
    let empty = |pcr: &u32| {
        let value = host.text(&format!("/sys/class/tpm/tpm0/pcr-sha256/{pcr}"))?;
        Some(value.bytes().all(|digit| digit == b'0'))
    };
    let grub: Option<Vec<bool>> = GRUB_PCRS.iter().map(empty).collect();
    findings.extend(grub.map(|empty| match empty.contains(&true) {
        true => unmeasured(host),
        false => Finding::good(
            "boot-kernel",
            "something has measured into PCR 8 and 9, where GRUB puts kernel and initrd",
        ),
    }));
    findings
}

/// What the firmware itself says.
pub(super) fn secure_boot_is_on(host: &Host) -> bool {
    secure_boot_variable(host) == Some(1)
}

/// Four bytes of attributes, then the value (Linux, Documentation/filesystems/efivarfs).
fn secure_boot_variable(host: &Host) -> Option<u8> {
    std::fs::read(host.path(SECURE_BOOT)).ok()?.get(4).copied()
}
