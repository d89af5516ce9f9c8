//! Keys whose other halves a real OpenBao server has: kept, released, moved and removed; and each way in which the server can fail.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use assay_evidence::jwe::{self, Jwe};
use assay_evidence::uuid::Uuid;
use assay_tests::bao::Bao;
use serde_json::Value;

use crate::host::Machine;
use crate::http::run;
use crate::site::Site;
use crate::tpm_audit::{ask, shown};
use crate::tpm_release::{connect, ready, refused, request};

/// What a verifier may do there, as the manual page gives it.
const POLICY: &str = r#"
path "secret/data/assay/*" { capabilities = ["create", "read"] }
path "secret/metadata/assay/*" { capabilities = ["delete"] }
path "transit/encrypt/assay" { capabilities = ["update"] }
path "transit/decrypt/assay" { capabilities = ["update"] }
"#;

/// A server that knows this verifier by AppRole and by certificate.
fn bao_for(site: &Site) -> Bao {
    let bao = Bao::start().unwrap();
    introduce(&bao, site, "");
    bao
}

/// Makes the verifier known in a namespace, by AppRole and by certificate.
pub fn introduce(bao: &Bao, site: &Site, namespace: &str) {
    let run = |words: &str, input: &str| {
        let words: Vec<_> = words.split(' ').collect();
        bao.run_in(namespace, &words, input).unwrap()
    };
    run("policy write assay -", POLICY);
    run("secrets enable transit", "");
    run("write -f transit/keys/assay", "");
    run("auth enable approle", "");
    run("write auth/approle/role/assay token_policies=assay", "");
    run("auth enable cert", "");
    let ca = site.state().certificate("ca");
    let ca = format!("certificate=@{}", ca.display());
    let unit = "allowed_organizational_units=client";
    run(
        &format!("write auth/cert/certs/assay token_policies=assay {unit} {ca}"),
        "",
    );
}

fn secret_id_file(site: &Site) -> PathBuf {
    site.state().path().join("secret-id")
}

/// A new secret id, in its file.
fn new_secret_id(site: &Site, bao: &Bao, namespace: &str) {
    let made = bao.run_in(
        namespace,
        &["write", "-f", "-field=secret_id", "auth/approle/role/assay/secret-id"],
        "",
    );
    let file = secret_id_file(site);
    fs::write(&file, made.unwrap() + "\n").unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The sections of config.toml, for the root namespace.
fn configure(site: &Site, bao: &Bao, engine: &str, approle: bool) {
    configure_in(site, bao, "", engine, approle);
}

/// The sections of config.toml.
pub fn configure_in(site: &Site, bao: &Bao, namespace: &str, engine: &str, approle: bool) {
    let state = site.state();
    let login = if approle {
        new_secret_id(site, bao, namespace);
        let read = ["read", "-field=role_id", "auth/approle/role/assay/role-id"];
        let role = bao.run_in(namespace, &read, "").unwrap();
        let file = secret_id_file(site);
        format!("[key_source.approle]\nrole_id = {role:?}\nsecret_id_file = {file:?}\n")
    } else {
        let (certificate, key) = (state.certificate("client"), state.key("client"));
        format!("[key_source.certificate]\nrole = \"assay\"\ncertificate_file = {certificate:?}\nkey_file = {key:?}\n")
    };
    let (url, ca) = (bao.url(), bao.ca_file());
    let namespace = match namespace {
        "" => String::new(),
        name => format!("namespace = {name:?}\n"),
    };
    site.configure_more(&format!(
        "\n[key_source]\nurl = {url:?}\nca_file = {ca:?}\n{namespace}timeout_s = 20\n[key_source.{engine}]\n{login}"
    ));
}

fn listed(site: &Site) -> Vec<Value> {
    let list: Value = serde_json::from_str(&site.run(&["key", "list", "--json"]).good()).unwrap();
    list["keys"].as_array().unwrap().clone()
}

fn has_half(bao: &Bao, key: &str) -> bool {
    bao.run(&["kv", "get", "-field=half", &format!("secret/assay/{key}")], "")
        .is_ok()
}

#[test]
fn an_owners_keys_live_in_both_engines_with_both_logins() {
    for (engine, approle) in [("kv", true), ("transit", false)] {
        let site = Site::init(10.0);
        let bao = bao_for(&site);
        configure(&site, &bao, engine, approle);
        let path = |name: &str| site.state().path().join(name).to_str().unwrap().to_owned();
        let [raw, image, out] = ["disk.raw", "disk.luks", "out.raw"].map(path);
        let clear: Vec<u8> = (0_u32..65536).flat_map(u32::to_le_bytes).collect();
        fs::write(&raw, &clear).unwrap();

        site.run(&["image", "seal", &raw, &image]).good();
        let keys = listed(&site);
        assert_eq!((keys.len(), &keys[0]["held"]), (1, &engine.into()));
        let key = keys[0]["key_id"].as_str().unwrap().to_owned();
        assert_eq!(has_half(&bao, &key), engine == "kv");
        site.run(&["key", "terms", &key, "--hours", "mon-fri 08:00-18:00"])
            .good();

        site.run(&["image", "unseal", &image, &out]).good();
        assert!(fs::read(&out).unwrap() == clear);

        // Without the server, nothing.
        bao.seal().unwrap();
        fs::remove_file(&out).unwrap();
        site.run(&["image", "unseal", &image, &out])
            .refused(&["is sealed", "unseal"]);
        site.run(&["image", "seal", &raw, &path("other.luks")])
            .refused(&["is sealed"]);
        assert!(!PathBuf::from(path("other.luks")).exists());
        // What belongs to the key is here.
        site.run(&["image", "inspect", &image]).good();
        bao.unseal().unwrap();

        site.run(&["key", "move", &key, "--to", "source"])
            .refused(&[&key, "already"]);
        site.run(&["key", "move", "--all", "--to", "files"]).good();
        assert!(listed(&site)[0]["held"].is_null() && !has_half(&bao, &key));
        site.run(&["key", "move", "--all", "--to", "source"]).good();
        let keys = listed(&site);
        assert_eq!(keys[0]["held"], engine);
        assert_eq!(keys[0]["terms"]["hours"][0], "mon-fri 08:00-18:00");
        site.run(&["image", "unseal", &image, &out]).good();

        site.run(&["key", "remove", &key, "--forever"]).good();
        assert!(listed(&site).is_empty() && !has_half(&bao, &key));
        assert_eq!(shown(&site, &[]).last().unwrap()["event"]["type"], "removed");
    }
}

#[test]
fn a_half_of_another_key_opens_nothing_and_none_is_overwritten() {
    let site = Site::init(10.0);
    let bao = bao_for(&site);
    configure(&site, &bao, "kv", true);
    let keys = [site.new_key("default").0, site.new_key("default").0].map(|key| key.key_id.to_string());
    let half = |key: &str| {
        bao.run(&["kv", "get", "-field=half", &format!("secret/assay/{key}")], "")
            .unwrap()
    };
    let put = format!("half={}", half(&keys[1]));
    bao.run(&["kv", "put", &format!("secret/assay/{}", keys[0]), &put], "")
        .unwrap();
    site.run(&["key", "move", &keys[0], "--to", "files"])
        .refused(&[&keys[0], "not its other half"]);
    // Somebody else's secret stands where a key's half should go.
    site.run(&["key", "move", &keys[1], "--to", "files"]).good();
    bao.run(&["kv", "put", &format!("secret/assay/{}", keys[1]), "half=x"], "")
        .unwrap();
    let moved = || site.run(&["key", "move", &keys[1], "--to", "source"]);
    moved().refused(&[&keys[1], "denies"]);
    // With a policy that is wider than it need be.
    bao.run(
        &["policy", "write", "assay", "-"],
        &POLICY.replace("\"create\"", "\"create\", \"update\""),
    )
    .unwrap();
    moved().refused(&[&keys[1], "not overwritten"]);
    assert_eq!(half(&keys[1]).trim(), "x");
    // Where the half is, is under the file's authentication.
    let file = site.state().path().join(format!("keys/{}.json", keys[0]));
    let text = fs::read_to_string(&file).unwrap();
    for (from, to) in [("\"secret\"", "\"other\""), ("\"version\": 5", "\"version\": 4")] {
        assert_eq!(text.matches(from).count(), 1, "{text}");
        fs::write(&file, text.replace(from, to)).unwrap();
        site.run(&["key", "list"])
            .refused(&[&keys[0], "fails its authentication"]);
    }
    fs::write(&file, text).unwrap();
    // A secret id that others may read.
    fs::set_permissions(secret_id_file(&site), fs::Permissions::from_mode(0o644)).unwrap();
    site.run(&["key", "move", &keys[0], "--to", "files"])
        .refused(&["secret-id", "chmod"]);
}

/// Asks for the key, which is given, and is the right one.
#[track_caller]
fn given(
    site: &Site,
    machine: &Machine,
    key: &(assay_verifier::keystore::KeyInfo, assay_verifier::keystore::Passphrase),
) {
    let opened = run(async {
        let mut client = connect(site, machine).await;
        let (release, status, body) = request(&mut client, machine, &key.0).await;
        assert_eq!(status, 200, "{body:#}\n{}", site.log());
        let jwe: Jwe = serde_json::from_value(body["jwe"].clone()).unwrap();
        let opening =
            tokio::task::spawn_blocking(move || jwe::unwrap(&jwe, |p| release.ecdh_blocking(p.x, p.y).map(|z| *z)));
        opening.await.unwrap().unwrap()
    });
    assert_eq!(opened.as_slice(), key.1.expose());
}

#[test]
fn a_host_gets_the_key_and_each_failure_of_the_server_has_a_name() {
    let (mut site, machine) = ready();
    let mut bao = bao_for(&site);
    configure(&site, &bao, "kv", true);
    site.serve_again();
    let key = site.new_key("default");
    let id = key.0.key_id;
    let not_given = |site: &Site, status, code: &str, named: &str| {
        refused(&ask(site, &machine, &key.0), status, code, &id.to_string());
        assert!(site.log().contains(named), "{named:?} is not in {}", site.log());
        let last = shown(site, &[]).pop().unwrap();
        assert_eq!(
            (last["event"]["type"].as_str(), last["event"]["code"].as_str()),
            (Some("refused"), Some(code))
        );
    };
    given(&site, &machine, &key);

    // A token that is gone before its time, and one that runs out.
    bao.run(&["lease", "revoke", "-force", "-prefix", "auth/approle/login"], "")
        .unwrap();
    given(&site, &machine, &key);
    bao.run(
        &[
            "write",
            "auth/approle/role/assay",
            "token_policies=assay",
            "token_ttl=1s",
            "token_max_ttl=1s",
        ],
        "",
    )
    .unwrap();
    bao.run(&["lease", "revoke", "-force", "-prefix", "auth/approle/login"], "")
        .unwrap();
    given(&site, &machine, &key);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    given(&site, &machine, &key);

    bao.seal().unwrap();
    not_given(&site, 503, "key-source-sealed", "is sealed: unseal it");
    bao.unseal().unwrap();
    given(&site, &machine, &key);

    bao.run(
        &["policy", "write", "assay", "-"],
        "path \"secret/data/other\" { capabilities = [\"read\"] }",
    )
    .unwrap();
    not_given(&site, 404, "key-source-denied", "/v1/secret/data/assay/");
    bao.run(&["policy", "write", "assay", "-"], POLICY).unwrap();
    given(&site, &machine, &key);

    let good = fs::read(secret_id_file(&site)).unwrap();
    fs::write(secret_id_file(&site), "0f2ff0a2-9c5b-4f6e-8d3e-6f0e3f4a5b6c").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    not_given(&site, 404, "key-source-login", "AppRole");
    fs::write(secret_id_file(&site), good).unwrap();
    given(&site, &machine, &key);

    bao.run(&["kv", "delete", &format!("secret/assay/{id}")], "").unwrap();
    not_given(&site, 404, "key-source-missing", "nothing at");
    bao.run(&["kv", "undelete", "-versions=1", &format!("secret/assay/{id}")], "")
        .unwrap();
    given(&site, &machine, &key);

    bao.kill();
    not_given(&site, 503, "key-source-unreachable", "cannot connect to");
    no_secrets_in(&site, &key.1, id);
    // No server is asked for a host that is not good.
    machine.run_program("/root/rogue");
    refused(&ask(&site, &machine, &key.0), 403, "untrusted", "alpha");
}

/// Neither journal nor audit log has the key.
fn no_secrets_in(site: &Site, passphrase: &assay_verifier::keystore::Passphrase, id: Uuid) {
    let text = std::str::from_utf8(passphrase.expose()).unwrap().to_owned();
    let audit = format!("{:?}", shown(site, &["--key", &id.to_string()]));
    assert!(!site.log().contains(&text) && !audit.contains(&text));
    let secret = fs::read_to_string(secret_id_file(site)).unwrap();
    assert!(!site.log().contains(secret.trim()));
}
