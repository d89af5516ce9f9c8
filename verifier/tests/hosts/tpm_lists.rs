//! Approved lists on their way from the verifier to the agents.

use std::path::Path;

use assay_agent::approved::ApprovedStore;
use assay_agent::join::{self, Membership};
use assay_evidence::approved::{ApprovedList, ListDraft};
use assay_evidence::digest::Sha256Digest;
use assay_verifier::lists::read_key;
use serde_json::Value;

use crate::host::{Machine, NEXT_BOOT};
use crate::site::Site;

/// The list that a machine has on its disk.
fn on_disk(machine: &Machine) -> Option<ApprovedList> {
    ApprovedStore::open(machine.state.path()).load().unwrap()
}

fn holds(shown: &Value) -> bool {
    shown["approved_list"]["held"] == true
}

/// Why it does not hold its list.
fn problem(shown: &Value) -> &str {
    shown["approved_list"]["problem"].as_str().unwrap_or_default()
}

fn serial(shown: &Value) -> u64 {
    shown["approved_list"]["serial"].as_u64().unwrap()
}

#[track_caller]
fn wait_for_newer(site: &Site, than: u64) -> Value {
    site.wait_until("alpha", |shown| holds(shown) && serial(shown) > than)
}

/// Polls this often, and then some.
fn some_polls(site: &Site) {
    let last = |shown: &Value| shown["last_quote"].clone();
    for _ in 0..2 {
        let before = last(&site.show("alpha"));
        site.wait_until("alpha", |shown| last(shown) != before);
    }
}

#[test]
fn a_host_gets_what_its_policy_approves_and_again_when_that_changes() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let shown = wait_for_newer(&site, 0);
    let list = on_disk(&machine).unwrap();
    assert_eq!((list.serial(), list.policy()), (serial(&shown), "default"));
    assert_eq!(shown["approved_list"]["sha256"], list.sha256().to_string());
    let policy: Value = serde_json::from_str(&site.run(&["policy", "show", "default", "--json"]).good()).unwrap();
    for name in ["agents", "kernel_programs", "code"] {
        let entries = policy["sets"][0][name].as_array().unwrap();
        assert!(!entries.is_empty());
        for entry in entries {
            let digest = entry.as_str().or_else(|| entry["sha256"].as_str()).unwrap();
            let digest: Sha256Digest = digest.parse().unwrap();
            assert!(list.digests().contains(&digest), "{name} {digest}");
        }
    }

    // Nothing new to say, nothing said.
    some_polls(&site);
    assert_eq!(serial(&site.show("alpha")), list.serial());

    // One more digest approved: another list. A deed is no code, so it makes none.
    let digest = Sha256Digest::of(b"new");
    site.run(&["policy", "allow", &digest.to_string()]).good();
    let shown = wait_for_newer(&site, list.serial());
    let newer = on_disk(&machine).unwrap();
    assert!(newer.digests().contains(&digest) && newer.digests().len() == list.digests().len() + 1);
    let deed = Sha256Digest::of(b"jit").to_string();
    site.run(&["policy", "allow", &deed, "--kind", "anonymous"]).good();
    some_polls(&site);
    assert_eq!(serial(&site.show("alpha")), serial(&shown));
    let text = site.run(&["host", "show", "alpha"]).good();
    assert!(
        text.contains(&format!("\napproved    list {}, held\n", newer.serial())),
        "{text}"
    );

    // A host that is not trusted is told all the same what is good.
    machine.run_program("/root/rogue");
    site.wait_for("alpha", "untrusted");
    let later = Sha256Digest::of(b"later");
    site.run(&["policy", "allow", &later.to_string()]).good();
    wait_for_newer(&site, newer.serial());
    assert!(on_disk(&machine).unwrap().digests().contains(&later));
}

#[test]
fn a_host_that_lost_its_list_gets_it_again() {
    let mut site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    let before = serial(&wait_for_newer(&site, 0));
    // The service remembers across its own restart, too.
    site.serve_again();
    some_polls(&site);
    assert_eq!(serial(&site.show("alpha")), before);

    machine.stop();
    std::fs::remove_file(machine.state.path().join("approved.jws")).unwrap();
    machine.swtpm.power_cycle().unwrap();
    machine.boot(NEXT_BOOT);
    wait_for_newer(&site, before);
    assert!(on_disk(&machine).unwrap().serial() > before);
}

/// A join file without the key for approved lists, as before there was one.
fn without_key(join_file: &Path) -> tempfile::NamedTempFile {
    let mut file: Value = serde_json::from_slice(&std::fs::read(join_file).unwrap()).unwrap();
    file.as_object_mut()
        .unwrap()
        .remove("list_key")
        .expect("a key in the join file");
    let old = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(old.path(), file.to_string()).unwrap();
    old
}

#[test]
fn a_host_without_the_key_is_told_to_join_again_and_then_gets_its_list() {
    let site = Site::serving(0.2);
    let machine = Machine::joined(without_key(&site.join_file()).path());
    site.add("alpha", &machine).good();
    site.run(&["policy", "capture", "alpha"]).good();
    site.wait_until("alpha", |shown| problem(shown).contains("assay-agent join FILE"));
    // It is no reason against the host.
    site.wait_for("alpha", "trusted");

    let present = site.join_file();
    join::join(
        machine.state.path(),
        &present,
        &Membership::read(&present).unwrap(),
        false,
    )
    .unwrap();
    wait_for_newer(&site, 0);
    assert!(on_disk(&machine).is_some());
}

#[test]
fn a_verifier_of_before_there_were_lists_makes_a_key_and_names_it() {
    let mut site = Site::init(0.2);
    let old = std::fs::read(without_key(&site.join_file()).path()).unwrap();
    std::fs::write(site.join_file(), old).unwrap();
    std::fs::remove_file(site.state().list_key()).unwrap();
    site.serve();
    let key = read_key(&site.state()).unwrap();
    let named = Membership::read(&site.join_file()).unwrap();
    assert_eq!(named.list_key(), Some(key.public()));
    let machine = site.trusted_host("alpha");
    wait_for_newer(&site, 0);
    assert!(on_disk(&machine).is_some());
}

#[test]
fn a_list_in_a_file_is_for_its_host_or_for_all() {
    let mut site = Site::serving(0.2);
    let mut alpha = site.trusted_host("alpha");
    let beta = Machine::joined(&site.join_file());
    let pushed = serial(&wait_for_newer(&site, 0));
    site.stop();
    alpha.stop();

    let folder = tempfile::tempdir().unwrap();
    let sign = |site: &Site, name: &str, whom: &[&str]| {
        let path = folder.path().join(name);
        let out = path.display().to_string();
        site.run(&[&["policy", "sign-list", "--out", &out], whom].concat())
            .good();
        std::fs::read(path).unwrap()
    };
    let accept = |machine: &Machine, list: &[u8]| {
        ApprovedStore::open(machine.state.path()).accept(list, assay_agent::approved::now())
    };
    let own = sign(&site, "own", &["alpha"]);
    let refused = accept(&beta, &own).unwrap_err();
    assert!(
        assay_agent::http::chain(&refused).contains("is for the host"),
        "{refused}"
    );
    let all = sign(&site, "all", &["--policy", "default", "--expires-in-days", "1"]);
    accept(&beta, &all).unwrap();
    assert!(accept(&alpha, &own).unwrap().serial > pushed);

    // The next polls find what they would have brought.
    alpha.reboot(NEXT_BOOT);
    site.serve();
    site.wait_until("alpha", |shown| shown["boot_id"] == NEXT_BOOT && holds(shown));
    assert_eq!(
        on_disk(&alpha).unwrap().sha256(),
        Sha256Digest::of(own.trim_ascii_end())
    );

    let out = folder.path().join("own").display().to_string();
    site.run(&["policy", "sign-list", "alpha", "--out", &out])
        .refused(&[&out, "exists"]);
    let out = folder.path().join("none").display().to_string();
    site.run(&["policy", "sign-list", "gamma", "--out", &out])
        .refused(&["gamma"]);
    site.run(&["policy", "sign-list", "--policy", "other", "--out", &out])
        .refused(&["other", "policy capture"]);
    assert_eq!(site.run(&["policy", "sign-list", "--out", &out]).code, Some(2));
}

#[test]
fn a_list_that_the_host_refuses_is_shown_and_not_brought_with_every_poll() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let shown = wait_for_newer(&site, 0);
    // By the verifier's own key, but from the future.
    let future = ListDraft {
        policy: "default".into(),
        host: None,
        serial: u64::MAX,
        issued: 1,
        expires: None,
        digests: vec![Sha256Digest::ZERO],
    };
    let future = future.sign(&read_key(&site.state()).unwrap()).unwrap();
    let mut machine = machine;
    machine.stop();
    ApprovedStore::open(machine.state.path())
        .accept(future.as_bytes(), 1)
        .unwrap();
    machine.swtpm.power_cycle().unwrap();
    machine.boot(NEXT_BOOT);
    let refused = site.wait_until("alpha", |shown| problem(shown).contains("list-rollback"));
    let tried = serial(&refused);
    assert!(tried > serial(&shown));
    some_polls(&site);
    assert_eq!(serial(&site.show("alpha")), tried);
    assert_eq!(site.log().matches("list-rollback").count(), 1, "{}", site.log());
}
