//! The keys of encrypted VHDs, from the storage manager's plugin to the verifier and back: the very file that XCP-ng imports, the agent's
//! socket, its TPM, and the verifier's program.

use std::path::Path;
use std::process::Command;

use assay_evidence::vhd::KeyHash;
use assay_tests::{hooks, pythons};
use assay_verifier::keystore::{FileKeyStore, KeySource as _};
use serde_json::Value;

use crate::host::LocalSocket;
use crate::site::Site;

const VDI: &str = "6f9619ff-8b86-4011-b42d-00cf4fc964ff";
/// A snapshot of it, say.
const OTHER_VDI: &str = "7a1f51c4-0b1d-4c6e-9a55-0d9f3a1b2c3d";

/// Prints the key in hex, or why there is none.
const LOAD: &str = "
import binascii, sys, assay_keys
assay_keys.ASK_S = 2
try:
    key = assay_keys.load_key(sys.argv[1], sys.argv[2])
    assert isinstance(key, bytes)
    print('key ' + binascii.hexlify(key).decode('ascii'))
except assay_keys.Refused as refusal:
    print('refused ' + str(refusal))
";

/// What a run of the plugin says, with this folder of modules beside it.
fn load_with(python: &Path, socket: &LocalSocket, modules: &Path, hash: &str, vdi: &str) -> String {
    let mut path = hooks::path("").into_os_string();
    path.push(":");
    path.push(modules);
    let output = Command::new(python)
        .args(["-c", LOAD, hash, vdi])
        .env("PYTHONPATH", path)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("ASSAY_SOCKET", socket.path())
        .output()
        .unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), errors.as_str()), (Some(0), ""));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn load(python: &Path, socket: &LocalSocket, hash: &str, vdi: &str) -> String {
    load_with(python, socket, Path::new("/nonexistent"), hash, vdi)
}

/// A new key; its hash, and itself in hex.
fn make(site: &Site, more: &[&str]) -> (KeyHash, String) {
    let arguments = [&["key", "make-vhd", "mail"], more].concat();
    let said = site.run(&arguments).good();
    let hash: KeyHash = said
        .lines()
        .find_map(|line| line.strip_prefix("key_hash "))
        .unwrap()
        .parse()
        .unwrap();
    let key = FileKeyStore::open(site.state().path())
        .unwrap()
        .get(hash.key_id())
        .unwrap();
    (hash, hex::encode(key.passphrase.expose()))
}

#[test]
fn a_trusted_host_gives_the_storage_manager_the_key_of_a_vhd_and_its_clones() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let socket = machine.local_socket();
    let python = &pythons()[0];
    for bytes in ["64", "32"] {
        let (hash, key) = make(&site, &["--bytes", bytes]);
        for vdi in [VDI, OTHER_VDI] {
            assert_eq!(load(python, &socket, &hash.to_string(), vdi), format!("key {key}"));
            let line = format!("host alpha key \"{}\" disk {vdi}: released", hash.key_id());
            assert!(site.log().contains(&line), "{line:?} is not in {}", site.log());
        }
    }
    // The same file in every interpreter that a dom0 has.
    let (hash, key) = make(&site, &[]);
    for python in pythons() {
        assert_eq!(load(&python, &socket, &hash.to_string(), VDI), format!("key {key}"));
    }
    assert!(!site.log().contains(&key));
}

#[test]
fn an_untrusted_host_gets_no_key_and_the_plugin_says_why() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let socket = machine.local_socket();
    let python = &pythons()[0];
    let unknown = "ab".repeat(32);
    let said = load(python, &socket, &unknown, VDI);
    assert!(
        said.starts_with("refused no key for VDI") && said.contains("no verifier has this key"),
        "{said}"
    );

    let (tagged, _) = make(&site, &["--require-tag", "pci"]);
    let said = load(python, &socket, &tagged.to_string(), VDI);
    assert!(said.contains("tagged pci"), "{said}");

    let (hash, _) = make(&site, &[]);
    let digest = machine.run_program("/root/rogue");
    for python in pythons() {
        let said = load(&python, &socket, &hash.to_string(), VDI);
        assert!(said.starts_with("refused no key for VDI"), "{said}");
        assert!(
            said.contains("/root/rogue") && said.contains(&digest.to_string()),
            "{said}"
        );
    }
    for (hash, vdi, named) in [
        (
            hash.to_string().to_uppercase().as_str(),
            VDI,
            "is not the hash of a key",
        ),
        ("", VDI, "is not the hash of a key"),
        (&hash.to_string(), "../x", "not a UUID"),
    ] {
        let said = load(python, &socket, hash, vdi);
        assert!(said.starts_with("refused ") && said.contains(named), "{said}");
    }
}

/// A key file that was put under another id holds what its own hash says; the verifier refuses it as damaged, and a host has nothing to
/// check. What a host must check itself is that the answer's key, whoever made it, is the one that the hash stands for.
#[test]
fn a_key_that_is_not_the_hashs_is_not_given_out() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let socket = machine.local_socket();
    let (hash, key) = make(&site, &[]);
    // Its id has but 122 bits of the hash: another hash can have the same.
    let mut text = hash.to_string().into_bytes();
    let last = text.last_mut().unwrap();
    *last = if *last == b'0' { b'1' } else { b'0' };
    let near: KeyHash = String::from_utf8(text).unwrap().parse().unwrap();
    assert_eq!(near.key_id(), hash.key_id());
    let said = load(&pythons()[0], &socket, &near.to_string(), VDI);
    assert!(
        said.contains("is not the key with hash") && !said.contains(&key),
        "{said}"
    );
}

/// The storage manager's own module, with what xapi would say of the VDI.
fn xapi_saying(dir: &Path, sm_config: &Value) {
    let module = format!(
        "class _Session(object):\n    def login_with_password(self, *_): pass\n    xenapi = property(lambda self: self)\n    \
         VDI = session = property(lambda self: self)\n    def get_by_uuid(self, uuid): return uuid\n    \
         def get_sm_config(self, vdi): return {sm_config}\n    def logout(self): pass\n\ndef xapi_local(): return _Session()\n"
    );
    std::fs::write(dir.join("XenAPI.py"), module).unwrap();
}

#[test]
fn a_qcow2_vdi_and_one_of_another_hash_are_refused_before_any_key_is_asked_for() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let socket = machine.local_socket();
    let (hash, key) = make(&site, &[]);
    let hash = hash.to_string();
    for (config, named) in [
        (
            serde_json::json!({"key_hash": hash, "image-format": "qcow2"}),
            "in clear",
        ),
        (
            serde_json::json!({"key_hash": "00", "image-format": "vhd"}),
            "has key hash 00",
        ),
    ] {
        for python in pythons() {
            let dir = tempfile::tempdir().unwrap();
            xapi_saying(dir.path(), &config);
            let said = load_with(&python, &socket, dir.path(), &hash, VDI);
            assert!(said.starts_with("refused ") && said.contains(named), "{said}");
        }
    }
    assert!(!site.log().contains("released"));
    for config in [
        serde_json::json!({"key_hash": hash}),
        serde_json::json!({"key_hash": hash, "image-format": "vhd"}),
    ] {
        let dir = tempfile::tempdir().unwrap();
        xapi_saying(dir.path(), &config);
        assert_eq!(
            load_with(&pythons()[0], &socket, dir.path(), &hash, VDI),
            format!("key {key}")
        );
    }
}
