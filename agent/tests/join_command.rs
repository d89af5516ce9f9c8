//! `assay-agent join`, as an operator calls it, on a host whose agent does not run yet.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod verifier;

use std::path::Path;
use std::process::Command;

use assay_agent::log_view::LogView;
use assay_agent::tpm::Handle;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::wire::JoinFile;
use assay_tests::Swtpm;
use verifier::{Ca, tpm_config};

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new(tcti: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().display();
        let config = format!(
            "listen = \"0.0.0.0:9443\"\nstate_dir = \"{folder}/state\"\nrun_dir = \"{folder}\"\n[tpm]\ntcti = \"{tcti}\"\n"
        );
        std::fs::write(dir.path().join("agent.toml"), config).unwrap();
        Self { dir }
    }

    fn join(&self, file: &Path, force: bool) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_assay-agent"))
            .arg("--config")
            .arg(self.dir.path().join("agent.toml"))
            .arg("join")
            .arg(file)
            .args(force.then_some("--force"))
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn file(&self, ca: &Ca) -> std::path::PathBuf {
        let file = JoinFile {
            version: 1,
            verifiers: vec!["https://verifier.example:8444".into()],
            ca_pem: ca.pem.clone(),
            list_key: None,
        };
        let path = self.dir.path().join("join.json");
        std::fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
        path
    }
}

#[test]
fn join_prints_the_endorsement_key_and_what_to_do_on_the_verifier() {
    let swtpm = Swtpm::start().unwrap();
    let ek = {
        let handle = Handle::open(tpm_config(&swtpm.tcti()), LogView::new(String::new())).unwrap();
        Sha256Digest::of(&handle.identity().ek_public)
    };
    let host = Host::new(&swtpm.tcti());
    let ca = Ca::new("verifier");
    let (code, out, err) = host.join(&host.file(&ca), false);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("joined: "), "{out}");
    assert!(out.contains("assay-verifier host add "), "{out}");
    assert!(out.contains(&format!(":9443 --ek-sha256 {ek}")), "{out}");

    let (code, out, _) = host.join(&host.file(&ca), false);
    assert_eq!(code, 0);
    assert!(out.contains("nothing to do"), "{out}");

    let other = Ca::new("verifier");
    let (code, _, err) = host.join(&host.file(&other), false);
    assert_eq!(code, 1);
    assert!(err.contains("--force"), "{err}");
    let (code, out, _) = host.join(&host.file(&other), true);
    assert_eq!(code, 0);
    assert!(out.contains("systemctl restart assay-agent"), "{out}");
}

#[test]
fn another_kind_of_attestation_key_is_said_to_need_enrolment() {
    let swtpm = Swtpm::start().unwrap();
    let host = Host::new(&swtpm.tcti());
    let file = host.file(&Ca::new("verifier"));
    let (code, out, err) = host.join(&file, false);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("\nak:        ecdsa-p256\n") && !out.contains("anew"),
        "{out}"
    );

    let path = host.dir.path().join("agent.toml");
    let config = std::fs::read_to_string(&path).unwrap() + "ak = \"rsa-2048\"\n";
    std::fs::write(&path, config).unwrap();
    let (code, out, err) = host.join(&file, false);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("\nak:        rsa-2048\n"), "{out}");
    assert!(
        out.contains("was ecdsa-p256 and is rsa-2048 now: this host must be enrolled anew")
            && out.contains("assay-verifier host remove "),
        "{out}"
    );
    let (_, out, _) = host.join(&file, false);
    assert!(!out.contains("anew"), "said once: {out}");
}

#[test]
fn the_endorsement_key_is_the_one_that_the_operator_names() {
    let swtpm = Swtpm::start().unwrap();
    let host = Host::new(&swtpm.tcti());
    let file = host.file(&Ca::new("verifier"));
    let shown = || {
        let (code, out, err) = host.join(&file, false);
        assert_eq!(code, 0, "{err}");
        let line = out.lines().find_map(|line| line.strip_prefix("ek:        sha256:"));
        let (ek, kind) = line.unwrap().split_once(' ').unwrap();
        assert!(out.contains(&format!(" --ek-sha256 {ek}\n")), "{out}");
        (ek.to_owned(), kind.to_owned())
    };
    let (rsa, kind) = shown();
    assert_eq!(kind, "(rsa-2048)");
    let path = host.dir.path().join("agent.toml");
    let config = std::fs::read_to_string(&path).unwrap() + "ek = \"ecc-p256\"\n";
    std::fs::write(&path, config).unwrap();
    let (ecc, kind) = shown();
    assert_eq!(kind, "(ecc-p256)");
    assert_ne!(ecc, rsa);
}

#[test]
fn without_a_tpm_or_a_join_file_nothing_is_left_behind() {
    let host = Host::new("device:/nonexistent/tpmrm0");
    let (code, _, err) = host.join(&host.file(&Ca::new("verifier")), false);
    assert_eq!(code, 1);
    assert!(err.contains("no TPM at `device:/nonexistent/tpmrm0`"), "{err}");
    assert!(!host.dir.path().join("state").exists());

    let (code, _, err) = host.join(Path::new("/nonexistent/join.json"), false);
    assert_eq!(code, 1);
    assert!(err.contains("cannot read /nonexistent/join.json"), "{err}");
    let junk = host.dir.path().join("junk");
    std::fs::write(&junk, "{\"version\":1}").unwrap();
    let (code, _, err) = host.join(&junk, false);
    assert_eq!(code, 1);
    assert!(
        err.contains("is not a join file") && err.contains("missing field"),
        "{err}"
    );
    assert!(!host.dir.path().join("state").exists());
}
