use std::os::unix::fs::PermissionsExt as _;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use super::*;

fn ca(change: impl FnOnce(&mut CertificateParams)) -> String {
    let mut parameters = CertificateParams::new(vec![]).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    change(&mut parameters);
    parameters.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
}

struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn read(&self, json: &serde_json::Value) -> Result<(PathBuf, Membership), JoinError> {
        let path = self.dir.path().join("file.json");
        fs::write(&path, json.to_string()).unwrap();
        Membership::read(&path).map(|membership| (path, membership))
    }

    fn join(&self, json: &serde_json::Value, force: bool) -> Result<Outcome, JoinError> {
        let (path, membership) = self.read(json)?;
        join(&self.state(), &path, &membership, force)
    }
}

fn file(ca: &str, verifier: &str) -> serde_json::Value {
    serde_json::json!({"version": 1, "verifiers": [verifier], "ca_pem": ca})
}

#[test]
fn a_join_leaves_private_files_that_load_again() {
    let setup = Setup::new();
    assert!(Joined::load(&setup.state()).unwrap().is_none());
    assert_eq!(
        setup.join(&file(&ca(|_| {}), "https://v:1"), false).unwrap(),
        Outcome::Joined
    );
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(setup.state()), 0o700);
    for name in [JOIN_FILE, KEY_FILE, CERTIFICATE_FILE] {
        assert_eq!(mode(setup.state().join(name)), 0o600, "{name}");
    }
    assert_eq!(
        fs::read_dir(setup.state()).unwrap().count(),
        3,
        "no temporary file is left"
    );
    let joined = Joined::load(&setup.state()).unwrap().unwrap();
    assert_eq!(joined.membership.verifiers(), ["https://v:1"]);
    assert_eq!(Some(joined.spki()), spki_digest(&joined.certificate()));
}

#[test]
fn joining_again_keeps_the_key_and_another_ca_wants_force() {
    let setup = Setup::new();
    let (first, second) = (ca(|_| {}), ca(|_| {}));
    setup.join(&file(&first, "https://v:1"), false).unwrap();
    let spki = || Joined::load(&setup.state()).unwrap().unwrap().spki();
    let before = spki();
    assert_eq!(
        setup.join(&file(&first, "https://v:1"), false).unwrap(),
        Outcome::Unchanged
    );
    assert_eq!(
        setup.join(&file(&first, "https://w:1"), false).unwrap(),
        Outcome::Updated
    );
    assert_eq!(
        Joined::load(&setup.state()).unwrap().unwrap().membership.verifiers(),
        ["https://w:1"]
    );
    let error = setup.join(&file(&second, "https://v:1"), false).unwrap_err();
    assert!(matches!(error, JoinError::OtherCa { .. }));
    assert!(error.to_string().contains("--force"));
    assert_eq!(spki(), before, "nothing changed");
    assert_eq!(
        setup.join(&file(&second, "https://v:1"), true).unwrap(),
        Outcome::Joined
    );
    assert_ne!(spki(), before, "the former verifier's pin is worth nothing now");
}

#[test]
fn half_a_join_is_named_and_force_repairs_it() {
    let setup = Setup::new();
    let json = file(&ca(|_| {}), "https://v:1");
    setup.join(&json, false).unwrap();
    for name in [KEY_FILE, CERTIFICATE_FILE] {
        fs::write(setup.state().join(name), "").unwrap();
        assert!(
            matches!(Joined::load(&setup.state()), Err(JoinError::Damaged { .. })),
            "{name}"
        );
        assert!(matches!(setup.join(&json, false), Err(JoinError::Damaged { .. })));
        assert_eq!(setup.join(&json, true).unwrap(), Outcome::Joined);
    }
    fs::remove_file(setup.state().join(JOIN_FILE)).unwrap();
    assert!(
        Joined::load(&setup.state()).unwrap().is_none(),
        "the join file comes last, so this is a join that never was"
    );
    assert_eq!(setup.join(&json, false).unwrap(), Outcome::Joined);
}

#[test]
fn each_fault_of_a_join_file_has_its_own_error() {
    let setup = Setup::new();
    let good = ca(|_| {});
    let with = |key: &str, value: serde_json::Value| {
        let mut json = file(&good, "https://v:1");
        json[key] = value;
        setup.read(&json).unwrap_err()
    };
    assert!(matches!(with("surprise", 1.into()), JoinError::Malformed { .. }));
    assert!(with("surprise", 1.into()).source_text().contains("surprise"));
    assert!(matches!(
        with("version", 2.into()),
        JoinError::Version { version: 2, .. }
    ));
    assert!(matches!(
        with("verifiers", serde_json::json!([])),
        JoinError::VerifierCount { count: 0, .. }
    ));
    assert!(matches!(
        with("verifiers", serde_json::json!(["http://v:1"])),
        JoinError::VerifierUrl { .. }
    ));
    assert!(matches!(with("ca_pem", "".into()), JoinError::CaPem { .. }));
    assert!(matches!(
        with("ca_pem", format!("{good}{good}").into()),
        JoinError::CaPem { .. }
    ));
    assert!(matches!(
        with("ca_pem", ca(|p| p.is_ca = IsCa::NoCa).into()),
        JoinError::Ca { .. }
    ));
    assert!(matches!(with("list_key", "AAAA".into()), JoinError::ListKey { .. }));
    let expired = ca(|p| {
        p.not_before = rcgen::date_time_ymd(2020, 1, 1);
        p.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    assert!(matches!(with("ca_pem", expired.into()), JoinError::Ca { .. }));
    assert!(matches!(
        with("ca_pem", " ".repeat(70_000).into()),
        JoinError::TooLarge { .. }
    ));
    assert!(matches!(
        Membership::read(Path::new("/nonexistent")),
        Err(JoinError::Read { .. })
    ));
    assert!(!setup.state().exists());
}

trait SourceText {
    fn source_text(&self) -> String;
}

impl SourceText for JoinError {
    fn source_text(&self) -> String {
        std::error::Error::source(self)
            .map(ToString::to_string)
            .unwrap_or_default()
    }
}
