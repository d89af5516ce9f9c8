//! `policy scan` and `policy add`, run as programs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::policy::Policy;
use assay_verifier::config::StateDir;
use assay_verifier::store::Store;
use serde_json::Value;

use super::program::{Site, verifier};

/// A folder with a script, and the script's digest.
fn root(site: &Site, name: &str, script: &str) -> (PathBuf, String) {
    let root = site.path(name);
    let path = root.join("usr/bin").join(name);
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    (root, Sha256Digest::of(script.as_bytes()).to_string())
}

#[test]
fn a_scan_shows_what_would_be_added_and_needs_no_verifier() {
    let site = Site::init();
    let (one, first) = root(&site, "one", "#!/bin/sh\n# one\n");
    let (two, second) = root(&site, "two", "#!/bin/sh\n# two\n");
    let arguments = ["--state", "/nowhere", "policy", "scan"].map(PathBuf::from);
    let ran = verifier(arguments.iter().chain([&one, &two]));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert_eq!(
        ran.out,
        format!("program            sha256:{first}  /usr/bin/one\nprogram            sha256:{second}  /usr/bin/two\n")
    );
    // One line for each input, beside the answer.
    assert_eq!(ran.err.lines().count(), 2, "{}", ran.err);
    assert!(ran.err.contains("installed root, 1 files, 1 entries"), "{}", ran.err);

    let ran = verifier(["policy".as_ref(), "scan".as_ref(), one.as_os_str(), "--json".as_ref()]);
    let list: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(
        list,
        serde_json::json!([{"kind": "program", "path": "/usr/bin/one", "sha256": first}])
    );
}

#[test]
fn all_of_it_is_added_at_once_and_after_an_error_nothing() {
    let site = Site::init();
    let (one, first) = root(&site, "one", "#!/bin/sh\n# one\n");
    let (two, second) = root(&site, "two", "#!/bin/sh\n# two\n");
    let one = one.display().to_string();
    let two = two.display().to_string();
    site.run(&["policy", "add", &one, "--name", "fleet"])
        .refused(&["fleet", "policy"]);

    let store = Store::open(&StateDir::new(site.state()).database()).unwrap();
    store
        .put_policy("fleet", &Policy::new("fleet").unwrap(), false)
        .unwrap();
    let ran = site.run(&["policy", "add", &one, "--name", "fleet"]);
    assert_eq!(
        ran.out, "policy fleet: 1 digests are new, of 1 entries in set allowed\n",
        "{}",
        ran.err
    );
    let ran = site.run(&["policy", "add", &one, &two, "--name", "fleet", "--set", "update-7"]);
    let wanted = "policy fleet: 1 digests are new, of 2 entries in set update-7\n";
    assert_eq!(ran.out, wanted, "{}", ran.err);
    let allowed = |digest: &str| {
        let policy = store.policy("fleet").unwrap().unwrap();
        policy.allows(&digest.parse().unwrap(), 0)
    };
    assert!(allowed(&first) && allowed(&second));

    let (three, third) = root(&site, "three", "#!/bin/sh\n# three\n");
    let damaged = site.path("damaged.deb");
    fs::write(&damaged, "!<arch>\nand then nothing that makes sense").unwrap();
    let text = site
        .run(&[
            "policy",
            "add",
            &damaged.display().to_string(),
            &three.display().to_string(),
            "--name",
            "fleet",
        ])
        .refused(&["damaged.deb"]);
    assert!(text.contains("fetch it again"), "{text}");
    assert!(!allowed(&third));
    // An update that is withdrawn goes as it came.
    site.run(&["policy", "drop", "fleet", "update-7"]).good();
    assert!(allowed(&first) && !allowed(&second));
}
