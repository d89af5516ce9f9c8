//! What a key demands beside its policy: each refusal has its name, and tells the host why.

use assay_verifier::keystore::KeyInfo;
use serde_json::{Value, json};

use crate::host::Machine;
use crate::http::run;
use crate::site::Site;
use crate::tpm_release::{ONCE, connect, ready, refused, request};

pub fn ask(site: &Site, machine: &Machine, key: &KeyInfo) -> (u16, Value) {
    run(async {
        let mut client = connect(site, machine).await;
        let (_release, status, body) = request(&mut client, machine, key).await;
        (status, body)
    })
}

/// Changes a key's terms, and gives what is said of them then.
pub fn terms(site: &Site, key: &KeyInfo, options: &[&str]) -> String {
    let id = key.key_id.to_string();
    let said = site.run(&[&["key", "terms", &id], options].concat()).good();
    said.trim().strip_prefix(&format!("key {id}: ")).unwrap().to_owned()
}

#[test]
fn each_term_is_kept_and_refuses_by_its_name() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    assert_eq!(terms(&site, &key, &[]), "none");
    let (status, body) = ask(&site, &machine, &key);
    assert_eq!((status, body.get("lease")), (200, None));
    for (options, said, code, named) in [
        (
            ["--group", "others"],
            "groups others",
            "other-group",
            "judged by policy others",
        ),
        (
            ["--not-before", "2199-01-31"],
            "not before 2199-01-31T00:00:00Z",
            "not-yet",
            "2199",
        ),
        (
            ["--not-after", "2020-01-31"],
            "not after 2020-01-31T00:00:00Z",
            "key-expired",
            "2020",
        ),
    ] {
        assert_eq!(terms(&site, &key, &[&["--clear"], &options[..]].concat()), said);
        refused(&ask(&site, &machine, &key), 403, code, named);
    }
    // A quarter of an hour that is not now.
    let afternoon = time::OffsetDateTime::now_utc().hour() >= 12;
    let hours = if afternoon {
        "mon-sun 00:00-00:15"
    } else {
        "mon-sun 23:00-23:15"
    };
    assert_eq!(
        terms(&site, &key, &["--clear", "--hours", hours]),
        format!("hours {hours}")
    );
    refused(&ask(&site, &machine, &key), 403, "outside-hours", hours);
    // Several hours are each good.
    let all = [
        "--hours",
        "mon-wed 00:00-24:00",
        "--hours",
        "thu-sun 00:00-24:00",
        "--hours",
        hours,
    ];
    terms(&site, &key, &all);
    assert_eq!(ask(&site, &machine, &key).0, 200);

    let id = key.key_id.to_string();
    for (options, named) in [
        (["--hosts-at-once", "2"], "needs a lease"),
        (["--lease", "99999999"], "lease of 99999999 s"),
    ] {
        site.run(&[&["key", "terms", &id, "--clear"], &options[..]].concat())
            .refused(&[named, &id]);
    }
    // What was refused, and what was changed, is on record.
    let log = site.run(&["audit", "show", "--key", &id]).good();
    for line in [
        "other-group",
        "not-yet",
        "key-expired",
        "outside-hours",
        "groups others",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
    assert!(!log.contains("needs a lease"), "{log}");
    site.run(&["audit", "verify"]).good();
}

#[test]
fn only_so_many_hosts_hold_a_key_at_once() {
    let mut site = Site::serving(0.2);
    let [alpha, beta] = ["alpha", "beta"].map(|name| site.trusted_host(name));
    site.poll_every(ONCE);
    let (key, _) = site.new_key("default");
    let said = terms(
        &site,
        &key,
        &["--hosts-at-once", "1", "--lease", "3600", "--on-loss", "wipe"],
    );
    assert_eq!(said, "hosts at once 1; lease 3600 s; on loss wipe");
    let (status, body) = ask(&site, &alpha, &key);
    assert_eq!(status, 200);
    assert_eq!(body["lease"], json!({"seconds": 3600, "on_loss": "wipe"}));
    // The same host again is no other host.
    assert_eq!(ask(&site, &alpha, &key).0, 200);
    refused(&ask(&site, &beta, &key), 403, "too-many-hosts", "(1)");
    // The host is gone, and with it what it held.
    site.run(&["host", "remove", "alpha"]).good();
    assert_eq!(ask(&site, &beta, &key).0, 200);
}

#[test]
fn a_lease_that_ran_out_makes_room() {
    let mut site = Site::serving(0.2);
    let [alpha, beta] = ["alpha", "beta"].map(|name| site.trusted_host(name));
    site.poll_every(ONCE);
    let (key, _) = site.new_key("default");
    terms(&site, &key, &["--hosts-at-once", "1", "--lease", "2"]);
    assert_eq!(ask(&site, &alpha, &key).0, 200);
    let start = std::time::Instant::now();
    while ask(&site, &beta, &key).0 != 200 {
        assert!(start.elapsed() < std::time::Duration::from_secs(60), "{}", site.log());
    }
    refused(&ask(&site, &alpha, &key), 403, "too-many-hosts", "(1)");
}
