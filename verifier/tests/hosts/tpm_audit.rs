//! The audit log: what the service writes down, and who it shows itself to when somebody has edited it.

use std::fs;
use std::path::PathBuf;

use assay_verifier::keystore::KeyInfo;
use serde_json::Value;

use crate::host::Machine;
use crate::http::run;
use crate::site::Site;
use crate::tpm_release::{connect, ready, refused, request};

/// Asks for a key.
pub fn ask(site: &Site, machine: &Machine, key: &KeyInfo) -> (u16, Value) {
    run(async {
        let mut client = connect(site, machine).await;
        let (_release, status, body) = request(&mut client, machine, key).await;
        (status, body)
    })
}

pub fn shown(site: &Site, filter: &[&str]) -> Vec<Value> {
    let text = site.run(&[&["audit", "show", "--json"], filter].concat()).good();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn log_file(site: &Site) -> PathBuf {
    let mut files: Vec<_> = fs::read_dir(site.state().audit_dir()).unwrap().collect();
    assert_eq!(files.len(), 1);
    files.pop().unwrap().unwrap().path()
}

/// Hash of the last record, as `audit verify` shows it.
fn head(site: &Site) -> String {
    let text = site.run(&["audit", "verify"]).good();
    text.split("head ").nth(1).unwrap().trim().to_owned()
}

#[test]
fn who_got_a_key_and_who_did_not_is_on_record() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    let (other, _) = site.new_key("nobody");
    assert_eq!(ask(&site, &machine, &key).0, 200);
    let early = head(&site);
    refused(&ask(&site, &machine, &other), 403, "no-policy", "nobody");
    let digest = machine.run_program("/root/rogue");
    refused(&ask(&site, &machine, &key), 403, "untrusted", "alpha");

    let records = shown(&site, &[]);
    let types: Vec<_> = records.iter().map(|r| r["event"]["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["released", "refused", "refused"]);
    let event = &records[0]["event"];
    let asked = &event["request"];
    assert_eq!((&asked["host"], &asked["vm"]), (&"alpha".into(), &"web-1".into()));
    assert_eq!(asked["key_id"], key.key_id.to_string());
    assert_eq!(asked["disk"], key.disk_uuid.to_string());
    assert_eq!(
        (&event["policy"], &event["boot_id"]),
        (&"default".into(), &crate::host::BOOT.into())
    );
    assert_eq!(records[1]["event"]["code"], "no-policy");
    let reasons = records[2]["event"]["reasons"].to_string();
    assert!(
        reasons.contains("/root/rogue") && reasons.contains(&digest.to_string()),
        "{reasons}"
    );

    assert_eq!(shown(&site, &["--key", &other.key_id.to_string()]), records[1..2]);
    assert_eq!(shown(&site, &["--host", "alpha"]).len(), 3);
    assert_eq!(shown(&site, &["--host", "beta"]).len(), 0);
    assert_eq!(shown(&site, &["--since", "2020-01-01"]).len(), 3);
    assert_eq!(shown(&site, &["--since", "9999-01-01"]).len(), 0);
    let text = site.run(&["audit", "show"]).good();
    assert!(
        text.contains("released  host alpha") && text.contains("for \"web-1\""),
        "{text}"
    );
    site.run(&["audit", "verify", "--from-head", &early]).good();
}

#[test]
fn an_edited_log_names_its_first_wrong_record() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    for _ in 0..3 {
        assert_eq!(ask(&site, &machine, &key).0, 200);
    }
    let (file, head) = (log_file(&site), head(&site));
    let good = fs::read_to_string(&file).unwrap();
    let lines: Vec<_> = good.lines().collect();
    let with = |lines: &[&str]| fs::write(&file, lines.join("\n") + "\n").unwrap();

    with(&[lines[0], lines[2]]);
    site.run(&["audit", "verify"])
        .refused(&["line 2", "record 2 is missing"]);
    with(&[lines[1], lines[0], lines[2]]);
    site.run(&["audit", "verify"])
        .refused(&["line 1", "record 1 is missing"]);
    let changed = lines[1].replacen('.', ".e30", 1);
    with(&[lines[0], &changed, lines[2]]);
    site.run(&["audit", "verify"])
        .refused(&["line 2", "record 2", "changed"]);
    site.run(&["audit", "show"]).refused(&["record 2"]);
    // Cut at its end, it is a good log; who remembers where it led sees more.
    with(&lines[..2]);
    site.run(&["audit", "verify"]).good();
    site.run(&["audit", "verify", "--from-head", &head])
        .refused(&["cut at its end", &head]);
    fs::write(&file, &good[..good.len() - 20]).unwrap();
    site.run(&["audit", "verify"]).refused(&["record 3", "torn"]);
    fs::write(&file, &good).unwrap();

    // Somewhere else, with the public key alone.
    let key = site.state().path().join("audit.pub");
    fs::write(&key, site.run(&["audit", "key"]).good()).unwrap();
    let elsewhere = site.state().path().join("copy.jws");
    fs::copy(&file, &elsewhere).unwrap();
    let [key, elsewhere] = [key, elsewhere].map(|path| path.to_str().unwrap().to_owned());
    site.run(&["audit", "verify", "--key", &key, "--from-head", &head, &elsewhere])
        .good();
    let stranger = site.state().path().join("list.pub");
    fs::write(&stranger, site.run(&["policy", "key"]).good()).unwrap();
    site.run(&["audit", "verify", "--key", stranger.to_str().unwrap()])
        .refused(&["record 1", "not signed with this key"]);
}

#[test]
fn without_a_record_no_key_leaves() {
    let (mut site, machine) = ready();
    let (key, _) = site.new_key("default");
    assert_eq!(ask(&site, &machine, &key).0, 200);
    // Somebody else's end of the log: the service can't go on from it.
    let file = log_file(&site);
    let good = fs::read_to_string(&file).unwrap();
    fs::write(&file, "e30.e30.e30\n").unwrap();
    refused(&ask(&site, &machine, &key), 500, "no-audit", "audit log");
    fs::write(&file, &good).unwrap();
    assert_eq!(ask(&site, &machine, &key).0, 200);
    // What a crash leaves is removed by the next start, which says so.
    site.stop();
    let whole = fs::read_to_string(&file).unwrap();
    fs::write(&file, whole.clone() + &good[..40]).unwrap();
    site.serve();
    assert!(site.log().contains("never finished"), "{}", site.log());
    let records = shown(&site, &[]);
    assert_eq!(records.last().unwrap()["event"]["bytes"], 40);
    assert_eq!(ask(&site, &machine, &key).0, 200);
    site.run(&["audit", "verify"]).good();
}
