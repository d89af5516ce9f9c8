//! `assay-agent doctor` on machines that lack something.

use assay_tests::HarnessError;
use assay_tests::guest::Guest;
use assay_tests::vm::{BootOptions, EfiBoot, GRUB_MODULES, Image, Loader, Vm};
use serde_json::Value;

use crate::common::{PATIENCE, machine};

const CONFIG: &str = "/root/grub.cfg";

/// What it found.
#[derive(Debug)]
pub struct Doctor {
    findings: Vec<Value>,
    /// Its exit status.
    pub code: Option<i32>,
}

impl Doctor {
    /// Runs it in a machine.
    pub fn ask(guest: &Guest) -> Result<Self, HarnessError> {
        let ended = guest.run_with(&["assay-agent", "doctor", "--json"], b"", PATIENCE)?;
        Ok(Self {
            findings: serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended}")),
            code: ended.code,
        })
    }

    /// How the check of that name ended.
    pub fn state(&self, check: &str) -> &str {
        self.find(check)["state"].as_str().expect("a word")
    }

    fn find(&self, check: &str) -> &Value {
        let found = self.findings.iter().find(|finding| finding["check"] == check);
        found.unwrap_or_else(|| panic!("no {check} in {:#?}", self.findings))
    }

    /// The check ended so, and its words and its remedy have these.
    fn says(&self, check: &str, state: &str, words: &[&str]) {
        let text = self.find(check).to_string();
        assert_eq!(self.state(check), state, "{text}");
        words
            .iter()
            .for_each(|word| assert!(text.contains(word), "no {word:?} in {text}"));
    }
}

#[test]
fn vm_doctor_says_what_is_missing_and_the_remedy() -> Result<(), HarnessError> {
    let vm = machine()?;
    let guest = vm.guest();
    let doctor = Doctor::ask(guest)?;
    assert_eq!(doctor.code, Some(1));
    doctor.says("tpm", "good", &["TPM 2.0"]);
    doctor.says("tier", "good", &["tier 1"]);
    doctor.says("agent", "bad", &["systemctl enable --now assay-agent"]);
    doctor.says("joined", "bad", &["assay-agent join FILE"]);
    doctor.says("boot-kernel", "weak", &["nothing measures", "UEFI"]);
    guest.put("/root/agent.toml", 0o600, b"[measure]\nmod = \"hold\"\n")?;
    let told = guest.run_with(
        &["assay-agent", "--config", "/root/agent.toml", "doctor"],
        b"",
        PATIENCE,
    )?;
    assert_eq!(told.code, Some(1), "{told}");
    for words in [
        "BAD  configuration",
        "/root/agent.toml",
        "unknown field `mod`",
        "BAD  agent",
    ] {
        assert!(told.stdout.contains(words), "no {words:?} in {told}");
    }
    Ok(())
}

#[test]
fn vm_doctor_has_a_grub_without_the_module_measure() -> Result<(), HarnessError> {
    let image = Image::load()?;
    let mut efi = EfiBoot::by(Loader::BareGrub);
    let options = |efi: &EfiBoot| BootOptions::by_firmware(efi.clone());
    let vm = Vm::boot(&image, &options(&efi))?;
    let guest = vm.guest();
    Doctor::ask(guest)?.says("boot-kernel", "weak", &["nothing measures kernel"]);

    let plain = EfiBoot::plain_script(&image.cmdline);
    guest.put(CONFIG, 0o644, plain.as_bytes())?;
    let fix = ["assay-agent", "doctor", "--fix", "--grub-config", CONFIG];
    let refused = guest.run_with(&fix, b"y\n", PATIENCE)?;
    assert!(
        refused.code == Some(1) && refused.stderr.contains("tpm.mod"),
        "{refused}"
    );
    guest.script(&format!("mkdir -p {GRUB_MODULES}; touch {GRUB_MODULES}/tpm.mod"))?;
    let refused = guest.run_with(&fix, b"y\n", PATIENCE)?;
    assert!(refused.code == Some(1) && refused.stderr.contains("--yes"), "{refused}");
    assert_eq!(guest.get_text(CONFIG)?, plain, "nobody agreed");
    guest.run_ok(&[&fix[..], &["--yes"]].concat())?;
    let fixed = guest.get_text(CONFIG)?;
    assert!(fixed.ends_with(&plain) && fixed.len() > plain.len(), "{fixed}");
    // An update writes it anew.
    guest.put(CONFIG, 0o644, plain.as_bytes())?;
    guest.run_ok(&["assay-agent", "doctor", "--reassert"])?;
    assert_eq!(guest.get_text(CONFIG)?, fixed);

    efi.script = Some(fixed);
    let vm = vm.reboot(&image, &options(&efi))?;
    // GRUB of this age starts the kernel past its EFI stub, so the kernel has no boot log, as on XCP-ng 8.3: the PCRs tell.
    Doctor::ask(vm.guest())?.says("boot-kernel", "good", &["PCR 8 and 9"]);
    Ok(())
}
