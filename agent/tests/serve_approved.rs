//! The approved list's ways to a host: a verifier's connection, the local socket, a file without an agent.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod verifier;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use assay_agent::approved::ApprovedStore;
use assay_agent::bundle::Source;
use assay_agent::leases::Leases;
use assay_agent::unlock::Unlocker;
use assay_agent::unlock::socket::SocketServer;
use assay_evidence::approved::{ListDraft, MAX_DIGESTS, MAX_LIST};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::wire::{Identity, ListHead};
use verifier::{Ca, Connection, Host, join_to};

fn draft(serial: u64) -> ListDraft {
    ListDraft {
        policy: "default".into(),
        host: None,
        serial,
        issued: 1,
        expires: None,
        digests: vec![Sha256Digest::of(&serial.to_be_bytes())],
    }
}

fn list(ca: &Ca, serial: u64) -> String {
    draft(serial).sign(&ca.lists).unwrap()
}

async fn held(connection: &mut Connection) -> Option<ListHead> {
    let identity: Identity = connection.get("/v1/identity").await.json();
    identity.approved.expect("the host has a key for lists").list
}

#[test]
fn a_verifier_brings_a_list_and_the_identity_tells_which_is_held() {
    let host = Host::start();
    host.run(async {
        let mut connection = host.connect().await;
        assert_eq!(held(&mut connection).await, None);
        let text = list(&host.ca, 2);
        let head: ListHead = connection.put("/v1/approved", text.as_bytes()).await.json();
        assert_eq!(head.sha256, Sha256Digest::of(text.as_bytes()));
        assert_eq!((head.serial, head.entries), (2, 1));
        assert_eq!(held(&mut connection).await, Some(head));

        for (refused, status, code) in [
            (list(&host.ca, 1), 409, "list-rollback"),
            (list(&Ca::new("other"), 3), 403, "list-signature"),
            (format!("{text}x"), 400, "list-malformed"),
            (String::new(), 400, "list-malformed"),
            (
                ListDraft {
                    expires: Some(2),
                    ..draft(3)
                }
                .sign(&host.ca.lists)
                .unwrap(),
                403,
                "list-expired",
            ),
            (
                ListDraft {
                    host: Some(Sha256Digest::ZERO),
                    ..draft(3)
                }
                .sign(&host.ca.lists)
                .unwrap(),
                403,
                "list-other-host",
            ),
            (
                ListDraft {
                    policy: "other".into(),
                    ..draft(2)
                }
                .sign(&host.ca.lists)
                .unwrap(),
                409,
                "list-serial",
            ),
        ] {
            let answer = connection.put("/v1/approved", refused.as_bytes()).await.error();
            assert_eq!((answer.0, answer.1.as_str()), (status, code), "{}", answer.2);
        }
        assert_eq!(held(&mut connection).await, Some(head));
        assert_eq!(connection.get("/v1/approved").await.error().0, 405);
    });
}

#[test]
fn the_longest_list_arrives_and_a_longer_one_is_refused_unread() {
    let host = Host::start();
    let numbered = |number: usize| Sha256Digest::of(&number.to_be_bytes());
    let longest = ListDraft {
        digests: (0..MAX_DIGESTS).map(numbered).collect(),
        ..draft(1)
    };
    let longest = longest.sign(&host.ca.lists).unwrap();
    host.run(async {
        let mut connection = host.connect().await;
        let head: ListHead = connection.put("/v1/approved", longest.as_bytes()).await.json();
        assert_eq!(head.entries, u64::try_from(MAX_DIGESTS).unwrap());
        let length = MAX_LIST + 1;
        let request = format!("PUT /v1/approved HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        connection.send(request.as_bytes()).await.unwrap();
        let answer = connection.receive().await.unwrap().error();
        assert_eq!((answer.0, answer.1.as_str()), (413, "body-too-large"));
    });
    assert_eq!(ApprovedStore::open(host.state.path()).head().unwrap().serial, 1);
}

/// `assay-agent approve FILE`: exit code, standard output, standard error.
fn approve(folder: &Path, state: &Path, file: &str) -> (i32, String, String) {
    let config = folder.join("agent.toml");
    std::fs::write(&config, format!("state_dir = {state:?}\nrun_dir = {folder:?}\n")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_assay-agent"))
        .arg("--config")
        .arg(config)
        .args(["approve", file])
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_file_is_taken_by_the_agent_that_runs_or_stored_for_the_next() {
    let host = Host::start();
    let folder = tempfile::tempdir().unwrap();
    let state = host.state.path();
    let saved = |serial| {
        let path = folder.path().join(format!("{serial}.jws"));
        std::fs::write(&path, format!("{}\n", list(&host.ca, serial))).unwrap();
        path.display().to_string()
    };
    let (code, out, err) = approve(folder.path(), state, &saved(1));
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("approved list 1 with 1 digests is stored"), "{out}");

    let store = ApprovedStore::open(state);
    let (told, tells) = std::sync::mpsc::channel();
    store.on_change(move |list| told.send(list.serial()).unwrap());
    let source = Source::new(host.tpm.log().clone(), &host.proxy.tcti());
    let unlocker = Unlocker::new(
        state.to_owned(),
        Duration::from_secs(1),
        host.tpm.clone(),
        source,
        Leases::open(state),
    )
    .unwrap();
    let status = Arc::new(|| unreachable!("nobody asks for it"));
    let socket = folder.path().join("agent.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime
        .block_on(SocketServer::bind(&socket, unlocker, store, status))
        .unwrap();
    runtime.spawn(async move { server.run().await.map(|_| ()) });
    let (code, out, err) = approve(folder.path(), state, &saved(2));
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("approved list 2 with 1 digests is held"), "{out}");
    assert_eq!(tells.try_recv(), Ok(2));
    let (code, _, err) = approve(folder.path(), state, &saved(1));
    assert!(code == 1 && err.contains("an older list is not taken back"), "{err}");
    let (code, _, err) = approve(folder.path(), state, "/nonexistent");
    assert!(code == 1 && err.contains("cannot read /nonexistent"), "{err}");
    runtime.shutdown_background();
}

#[test]
fn a_host_of_nobody_takes_no_list() {
    let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ca = Ca::new("verifier");
    let file = folder.path().join("list");
    std::fs::write(&file, list(&ca, 1)).unwrap();
    let file = file.display().to_string();
    let (code, _, err) = approve(folder.path(), state.path(), &file);
    assert!(code == 1 && err.contains("joined no verifier"), "{err}");
    join_to(&ca, &["https://127.0.0.1:8444"], state.path());
    assert_eq!(approve(folder.path(), state.path(), &file).0, 0);
}
