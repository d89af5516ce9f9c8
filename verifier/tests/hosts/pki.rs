//! What `init` leaves.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use assay_verifier::pki::{Role, TlsIdentity, ca_certificate, ca_spki_sha256, names_an_operator, spki_sha256};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::UnixTime;
use rustls::server::WebPkiClientVerifier;

use crate::site::Site;

#[test]
fn everything_is_private() {
    let site = Site::init(10.0);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(site.state().path()), 0o700);
    for entry in std::fs::read_dir(site.state().path()).unwrap() {
        let path = entry.unwrap().path();
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(&path), wanted, "{}", path.display());
    }
}

#[test]
fn nothing_is_overwritten() {
    let site = Site::init(10.0);
    let before = std::fs::read(site.state().key("ca")).unwrap();
    site.run(&["init", "--url", "https://192.0.2.1:1"])
        .refused(&["exists already", "--state"]);
    assert_eq!(std::fs::read(site.state().key("ca")).unwrap(), before);
    assert!(site.state().config().exists() && site.state().database().exists());
}

#[test]
fn without_init_there_is_no_verifier() {
    let dir = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_assay-verifier"))
        .arg("--state")
        .arg(dir.path())
        .arg("serve")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("init --url"));
}

#[test]
fn certificates_are_good_for_their_role_only() {
    let site = Site::init(10.0);
    let state = &site.state();
    let mut roots = RootCertStore::empty();
    roots.add(ca_certificate(state).unwrap()).unwrap();
    let (roots, provider) = (Arc::new(roots), Arc::new(rustls::crypto::ring::default_provider()));
    let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .unwrap();
    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .unwrap();
    let [server, client, operator] = [Role::Server, Role::Client, Role::Operator]
        .map(|role| TlsIdentity::load(state, role).unwrap().chain.remove(0));
    let now = UnixTime::now();
    for name in ["127.0.0.1", "localhost", "::1"] {
        servers
            .verify_server_cert(&server, &[], &name.try_into().unwrap(), &[], now)
            .unwrap();
    }
    servers
        .verify_server_cert(&server, &[], &"other.example".try_into().unwrap(), &[], now)
        .unwrap_err();
    servers
        .verify_server_cert(&client, &[], &"127.0.0.1".try_into().unwrap(), &[], now)
        .unwrap_err();
    clients.verify_client_cert(&client, &[], now).unwrap();
    clients.verify_client_cert(&operator, &[], now).unwrap();
    clients.verify_client_cert(&server, &[], now).unwrap_err();
    assert!(names_an_operator(&operator) && !names_an_operator(&client) && !names_an_operator(&server));
    assert_eq!(
        ca_spki_sha256(state).unwrap(),
        spki_sha256(&ca_certificate(state).unwrap()).unwrap()
    );
    assert_ne!(spki_sha256(&server).unwrap(), spki_sha256(&client).unwrap());
}
