//! `image seal` and `key list`, run as programs.

use std::fs;
use std::process::Command;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::token::LuksToken;
use serde_json::Value;

use super::program::{Ran, Site, verifier};

fn site_with_disk() -> Site {
    let site = Site::init();
    fs::write(site.path("disk.raw"), vec![0x42; 1024 * 1024]).unwrap();
    site
}

/// `name value` lines of a command's answer.
fn value_of<'a>(out: &'a str, name: &str) -> &'a str {
    let line = out.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in: {out}"))
}

#[test]
fn seals_and_lists_the_key() {
    let site = site_with_disk();
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
    let out = site.seal(&site.path("disk.raw"), &site.path("disk.luks")).good();
    let (key, disk) = (value_of(&out, "key"), value_of(&out, "disk"));
    assert_eq!(value_of(&out, "size"), "1048576 bytes");
    assert_eq!(value_of(&out, "policy"), "default");
    assert!(out.contains("policy capture HOST --name default"), "{out}");

    let list: Value = serde_json::from_str(&site.run(&["key", "list", "--json"]).good()).unwrap();
    assert_eq!(list["keys"].as_array().unwrap().len(), 1);
    assert_eq!(list["keys"][0]["key_id"], key);
    assert_eq!(list["keys"][0]["disk_uuid"], disk);
    assert_eq!(list["keys"][0]["image"], "disk.luks");
    assert_eq!(list["damaged"], Value::Array(Vec::new()));
    let text = site.run(&["key", "list"]).good();
    assert!(
        text.contains(key) && text.contains(disk) && text.contains("disk.luks"),
        "{text}"
    );
}

#[test]
fn the_token_names_this_verifier() {
    let site = site_with_disk();
    let out = site.seal(&site.path("disk.raw"), &site.path("disk.luks")).good();
    let dump = Command::new("cryptsetup")
        .args(["luksDump", "--dump-json-metadata"])
        .arg(site.path("disk.luks"))
        .output()
        .expect("cryptsetup is not installed: `cargo xtask setup` installs it");
    let json: Value = serde_json::from_slice(&dump.stdout).unwrap();
    let tokens: Vec<Value> = json["tokens"].as_object().unwrap().values().cloned().collect();
    let token = LuksToken::find(&tokens).unwrap();
    assert_eq!(token.key_id().to_string(), value_of(&out, "key"));

    // The CA of the join file, as a host computes it.
    let pem = fs::read(site.state().join("ca.pem")).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let spki = Sha256Digest::of(pem.parse_x509().unwrap().public_key().raw);
    assert!(
        token
            .allowed_verifiers(&["https://192.0.2.1:8440".to_owned()], &spki)
            .is_ok()
    );
}

#[test]
fn refusals_name_the_thing_and_leave_nothing() {
    let site = site_with_disk();
    let [input, output, odd, missing] = ["disk.raw", "disk.luks", "odd.raw", "missing.raw"].map(|name| site.path(name));
    fs::write(&odd, vec![0; 1000]).unwrap();
    site.seal(&odd, &output).refused(&["odd.raw", "1000 bytes", "truncate"]);
    site.seal(&missing, &output).refused(&["missing.raw", "No such file"]);
    fs::write(&output, "precious").unwrap();
    site.seal(&input, &output).refused(&["disk.luks", "exists already"]);
    assert_eq!(fs::read(&output).unwrap(), b"precious");
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
}

#[test]
fn no_room_says_how_much_is_needed() {
    let site = site_with_disk();
    // A file size limit stands in for a full disk: it can be had without a file system of one's own. 2048 blocks of
    // 512 bytes are less than the header.
    let script = "trap '' XFSZ; ulimit -f 2048; exec \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_assay-verifier"), "--state"])
        .arg(site.state())
        .args(["image", "seal"])
        .args([site.path("disk.raw"), site.path("disk.luks")])
        .output()
        .unwrap();
    Ran::new(output).refused(&["no room for", "disk.luks.partial", "5242880 bytes"]);
    assert!(!site.path("disk.luks").exists());
    assert!(!site.path("disk.luks.partial").exists());
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
}

#[test]
fn a_damaged_key_is_named_and_hides_no_other() {
    let site = site_with_disk();
    let first = site.seal(&site.path("disk.raw"), &site.path("a.luks")).good();
    let second = site.seal(&site.path("disk.raw"), &site.path("b.luks")).good();
    let file = site
        .state()
        .join("keys")
        .join(format!("{}.json", value_of(&first, "key")));
    let edited = fs::read_to_string(&file).unwrap().replace("default", "lenient");
    fs::write(&file, edited).unwrap();
    let ran = site.run(&["key", "list"]);
    assert!(
        ran.out.contains(value_of(&second, "key")) && !ran.out.contains(value_of(&first, "key")),
        "{}",
        ran.out
    );
    ran.refused(&[value_of(&first, "key"), "fails its authentication"]);
}

#[test]
fn without_a_verifier_nothing_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk.raw"), vec![0; 512]).unwrap();
    let state = dir.path().join("state");
    let [input, output] = ["disk.raw", "disk.luks"].map(|name| dir.path().join(name));
    let ran = verifier([
        "--state".as_ref(),
        state.as_os_str(),
        "image".as_ref(),
        "seal".as_ref(),
        input.as_os_str(),
        output.as_os_str(),
    ]);
    ran.refused(&["init"]);
    assert!(!output.exists());
}
