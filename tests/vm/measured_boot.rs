//! Measured boot: firmware, boot loader and kernel measure one another, the agent sends the firmware's own log, and whatever
//! changes in the boot makes the host untrusted, by name.

use std::process::Command;
use std::time::Duration;

use assay_evidence::bootlog::{self, BootFacts, BootLog, Role, SecureBoot};
use assay_evidence::digest::Algorithm;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::guest::Guest;
use assay_tests::verifier::Verifier;
use assay_tests::vm::{BootOptions, EfiBoot, Image, Loader, Vm};

use crate::common::{HOST, configure, verifier_binary};
use crate::doctor::Doctor;

/// The log as Linux has it from the firmware.
const BOOT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";
/// The verdict on a machine that has just booted: the agent's log is fetched anew.
const PATIENCE: Duration = Duration::from_secs(240);
/// What the changed boot has on its kernel's command line.
const WORD: &str = "assay.changed=1";

/// A host that was booted by this loader, captured in that state, and trusted.
struct Host {
    image: Image,
    loader: Loader,
    verifier: Verifier,
    vm: Vm,
}

impl Host {
    fn trusted(loader: Loader) -> Result<Self, HarnessError> {
        let image = Image::load()?;
        let vm = Vm::boot(&image, &BootOptions::by_firmware(EfiBoot::by(loader)))?;
        configure(vm.guest(), "")?;
        let verifier = Verifier::start(&verifier_binary())?;
        agent::join(vm.guest(), &verifier)?;
        let agent = Agent::start(vm.guest())?;
        agent.enrol(&vm, &verifier, HOST)?;
        verifier.run_ok(&["policy", "capture", HOST, "--part", "golden"])?;
        verifier.wait_host(HOST, "trusted", PATIENCE, |host| host.state == "trusted")?;
        Ok(Self {
            image,
            loader,
            verifier,
            vm,
        })
    }

    /// Boots from this; the reasons why the host is untrusted then.
    fn reboot(mut self, cmdline: &str, efi: EfiBoot) -> Result<(Self, Reasons), HarnessError> {
        let options = BootOptions {
            cmdline: cmdline.to_owned(),
            ..BootOptions::by_firmware(efi)
        };
        self.vm = self.vm.reboot(&self.image, &options)?;
        Agent::start(self.vm.guest())?;
        // Until then the verdict is that of the boot before.
        let (boot, _) = self.vm.guest().ping()?;
        Guest::wait_for("the verifier has not met the new boot", PATIENCE, || {
            let shown = self.verifier.run_ok(&["host", "show", HOST, "--json"])?;
            Ok(shown.contains(&boot).then_some(()))
        })?;
        let host = self
            .verifier
            .wait_host(HOST, "untrusted", PATIENCE, |host| host.state == "untrusted")?;
        Ok((self, Reasons(host.reasons)))
    }

    /// With another command line, another initrd and another kernel, one after the other.
    fn change_all(self) -> Result<Changed, HarnessError> {
        let (image, same) = (self.image.clone(), EfiBoot::by(self.loader));
        let (host, cmdline) = self.reboot(WORD, same.clone())?;
        let other_initrd = EfiBoot {
            other_initrd: true,
            ..same.clone()
        };
        let (host, initrd) = host.reboot("", other_initrd.clone())?;
        let other_kernel = EfiBoot {
            other_kernel: true,
            ..same.clone()
        };
        let (_, kernel) = host.reboot("", other_kernel.clone())?;
        Ok(Changed {
            cmdline,
            initrd,
            kernel,
            initrds: (sha256(&other_initrd.initrd(&image)?), sha256(&same.initrd(&image)?)),
            kernels: (sha256(&other_kernel.kernel(&image)?), sha256(&same.kernel(&image)?)),
        })
    }

    /// The boot log, which this machine's programs and the TPM agree about.
    fn boot_log(&self) -> Result<BootLog, HarnessError> {
        let bytes = self.vm.guest().get(BOOT_LOG)?;
        let log = bootlog::parse(&bytes).expect("the firmware's own log");
        let replayed = log.replay(Algorithm::Sha256).expect("a log of the bank that is quoted");
        for pcr in log.extended_pcrs() {
            assert_eq!(hex(&replayed[&pcr]), self.vm.guest().sysfs_pcr(pcr)?, "PCR {pcr}");
        }
        let file = tempfile::NamedTempFile::new().expect("a scratch file");
        std::fs::write(file.path(), &bytes).expect("written");
        let said = Command::new("tpm2_eventlog")
            .arg(file.path())
            .output()
            .expect("tpm2_eventlog");
        assert!(said.status.success(), "{said:?}");
        let said = String::from_utf8_lossy(&said.stdout).to_lowercase();
        let (_, values) = said.split_once("\npcrs:\n").expect("its replay");
        for pcr in log.extended_pcrs() {
            assert!(
                values.contains(&format!("{pcr:<2} : 0x{}", hex(&replayed[&pcr]))),
                "PCR {pcr}: {values}"
            );
        }
        Ok(log)
    }

    fn facts(&self, log: &BootLog) -> Result<BootFacts, HarnessError> {
        let line = self.vm.guest().get_text("/proc/cmdline")?;
        let proven = log.proven(Algorithm::Sha256, Some(line.trim_end())).expect("that bank");
        Ok(BootFacts::of(&proven))
    }
}

/// Reasons for each change, and the digests of what was changed: as found, as approved.
struct Changed {
    cmdline: Reasons,
    initrd: Reasons,
    kernel: Reasons,
    initrds: (String, String),
    kernels: (String, String),
}

/// What the verifier holds against a host.
#[derive(Debug)]
struct Reasons(Vec<String>);

impl Reasons {
    /// All are about these PCRs, and the one about `pcr` has these words.
    fn names(&self, pcrs: &[u32], pcr: u32, words: &[String]) {
        let begin: Vec<String> = pcrs.iter().map(|pcr| format!("PCR {pcr} is sha256:")).collect();
        assert_eq!(self.0.len(), begin.len(), "{self:#?}");
        for (reason, begin) in self.0.iter().zip(&begin) {
            assert!(reason.starts_with(begin), "{begin}: {self:#?}");
        }
        let start = format!("PCR {pcr} ");
        let reason = self.0.iter().find(|reason| reason.starts_with(&start));
        for word in words {
            assert!(reason.is_some_and(|reason| reason.contains(word)), "{word}: {self:#?}");
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(data: &[u8]) -> String {
    hex(&Algorithm::Sha256.hash(data))
}

/// How a reason tells of an event whose text is in the log.
fn texts(kind: &str, found: &str, approved: &str) -> [String; 2] {
    [
        format!("is \"{found}\" (claimed {kind})"),
        format!("approved is \"{approved}\" (claimed {kind})"),
    ]
}

/// How it tells of one whose digest alone is known.
fn digests(kind: &str, (found, approved): &(String, String)) -> [String; 1] {
    [format!(
        "is claimed {kind} (sha256:{found}), approved is claimed {kind} (sha256:{approved})"
    )]
}

#[test]
fn vm_boot_by_shim_and_grub_is_told_and_judged() -> Result<(), HarnessError> {
    let host = Host::trusted(Loader::Grub)?;
    let (image, boot) = (host.image.clone(), EfiBoot::by(Loader::Grub));
    let facts = host.facts(&host.boot_log()?)?;
    assert_eq!(facts.secure_boot, SecureBoot::On);
    let names: Vec<_> = facts.keys.iter().map(|keys| keys.name.as_str()).collect();
    assert_eq!(names[..4], ["PK", "KEK", "db", "dbx"]);
    for subject in ["Microsoft", "Debian Secure Boot"] {
        assert!(facts.started_by.iter().any(|by| by.contains(subject)), "{facts}");
    }
    let files = |role: Role| -> Vec<String> {
        let files = facts.grub_files.iter().filter(|file| file.role == Some(role));
        files.map(|file| hex(&file.file.digest.0)).collect()
    };
    assert_eq!(files(Role::Kernel), [sha256(&boot.kernel(&image)?)]);
    assert_eq!(files(Role::Initrd), [sha256(&boot.initrd(&image)?)]);
    let line = format!("/vmlinuz {}", image.cmdline);
    let told = |line: &str| {
        facts
            .command_lines
            .iter()
            .any(|told| told.text.as_deref() == Some(line))
    };
    // By GRUB, and by the kernel's EFI stub, which was started with a word more.
    assert!(told(&line) && told(&format!("BOOT_IMAGE={line}")), "{facts}");
    let doctor = Doctor::ask(host.vm.guest())?;
    for check in [
        "tpm",
        "tpm-bank",
        "boot-firmware",
        "secure-boot",
        "boot-kernel",
        "tier",
        "agent",
        "joined",
        "verifier",
        "clock",
    ] {
        assert_eq!(doctor.state(check), "good", "{check}: {doctor:?}");
    }
    assert_eq!(doctor.code, Some(0), "{doctor:?}");

    let changed = host.change_all()?;
    let (was, is) = (format!("linux {line}"), format!("linux {line} {WORD}"));
    changed.cmdline.names(&[8, 9], 8, &texts("GRUB command", &is, &was));
    changed
        .initrd
        .names(&[9], 9, &digests("file /initrd", &changed.initrds));
    changed
        .kernel
        .names(&[9], 9, &digests("file /vmlinuz", &changed.kernels));
    Ok(())
}

#[test]
fn vm_boot_by_a_unified_image_is_told_and_judged() -> Result<(), HarnessError> {
    let host = Host::trusted(Loader::UnifiedImage)?;
    let (image, boot) = (host.image.clone(), EfiBoot::by(Loader::UnifiedImage));
    let facts = host.facts(&host.boot_log()?)?;
    assert_eq!(facts.secure_boot, SecureBoot::Off);
    let section = |name: &str| {
        let section = facts.sections.iter().find(|section| section.name == name);
        section.map(|section| hex(&section.digest.0)).unwrap_or_default()
    };
    assert_eq!(section(".linux"), sha256(&boot.kernel(&image)?));
    assert_eq!(section(".initrd"), sha256(&boot.initrd(&image)?));
    assert_eq!(section(".cmdline"), sha256(image.cmdline.as_bytes()));
    // The stub gives it to the kernel, whose own stub measures it again.
    assert_eq!(
        facts.command_lines.first().and_then(|line| line.text.as_deref()),
        Some(image.cmdline.as_str())
    );

    let changed = host.change_all()?;
    let is = format!("{} {WORD}", image.cmdline);
    changed
        .cmdline
        .names(&[4, 9, 11], 9, &texts("load options", &is, &image.cmdline));
    changed.initrd.names(
        &[4, 9, 11],
        11,
        &digests("content of section .initrd", &changed.initrds),
    );
    changed
        .kernel
        .names(&[4, 11], 11, &digests("content of section .linux", &changed.kernels));
    Ok(())
}
