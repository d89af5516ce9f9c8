//! Keys: who gets one, and everybody who does not.

use assay_agent::tpm::{AkKind, EkKind};
use assay_evidence::binding::{Binding, Exporter, Nonce};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::ear::Submod;
use assay_evidence::jwe::{self, Jwe};
use assay_evidence::tpm::Name;
use assay_evidence::wire::{B64, ChallengeRequest, ChallengeResponse, ReleaseKey, ReleaseRequest};
use assay_tests::Swtpm;
use assay_verifier::keystore::KeyInfo;
use assay_verifier::pki::{Authority, Role, TlsIdentity};
use assay_verifier::store::{HostState, Store, Verdict};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};

use crate::host::{BOOT, Machine, NEXT_BOOT};
use crate::http::{Client, run};
use crate::site::Site;

/// Polls once and then not again while a test runs.
pub const ONCE: f64 = 3600.0;

/// A trusted host with a key waiting for it. The poller is out of the way, so that what is seen is the request's doing.
pub fn ready() -> (Site, Machine) {
    ready_with(AkKind::EcdsaP256, EkKind::Rsa2048)
}

/// With keys of these kinds.
fn ready_with(ak: AkKind, ek: EkKind) -> (Site, Machine) {
    let mut site = Site::serving(0.2);
    let machine = Machine::with_keys(Swtpm::start().unwrap(), &site.join_file(), ak, Some(ek));
    let machine = site.trusted("alpha", machine);
    site.poll_every(ONCE);
    (site, machine)
}

fn identity(machine: &Machine) -> TlsIdentity {
    let joined = machine.identity();
    TlsIdentity {
        chain: vec![joined.certificate()],
        key: joined.key(),
    }
}

pub async fn connect(site: &Site, machine: &Machine) -> Client {
    Client::open(&site.state(), site.port, Some(identity(machine)))
        .await
        .unwrap()
}

fn asked(key: &KeyInfo) -> ChallengeRequest {
    ChallengeRequest {
        key_id: key.key_id.to_string(),
        disk_uuid: key.disk_uuid,
        header_sha256: key.header,
    }
}

pub async fn challenge(client: &mut Client, key: &KeyInfo) -> ChallengeResponse {
    let (status, body) = client.post("/v1/release/challenge", &asked(key)).await;
    assert_eq!(status, 200, "{body:#}");
    serde_json::from_value(body).unwrap()
}

/// The agent's part of a key request, with the release key still in the TPM.
pub async fn prove(
    machine: &Machine,
    key: &KeyInfo,
    nonce: Nonce,
    exporter: Exporter,
    from: u64,
) -> (assay_agent::tpm::Release, ReleaseRequest) {
    let release = machine.tpm().release_begin().await.unwrap();
    let name = Name::parse(release.name()).unwrap();
    let (disk, key_id) = (*key.disk_uuid.as_bytes(), key.key_id.to_string());
    let evidence = release
        .attest(move |log| {
            Binding::Release {
                nonce: &nonce,
                exporter: &exporter,
                key_name: &name,
                disk,
                key_id: &key_id,
            }
            .digest(log.records, &log.head)
        })
        .await
        .unwrap();
    let release_key = ReleaseKey {
        public: B64(release.public().to_vec()),
        certify_attest: B64(evidence.certify_attest),
        certify_signature: B64(evidence.certify_signature),
    };
    let bundle = machine.source().bundle(evidence.quote, from, true).unwrap();
    let request = ReleaseRequest {
        key_id: key.key_id.to_string(),
        disk_uuid: key.disk_uuid,
        bundle,
        release_key,
        vm: Some("web-1".to_owned()),
    };
    (release, request)
}

/// Challenge, proof and request on one connection.
pub async fn request(client: &mut Client, machine: &Machine, key: &KeyInfo) -> (assay_agent::tpm::Release, u16, Value) {
    let challenge = challenge(client, key).await;
    let (release, request) = prove(machine, key, challenge.nonce, client.exporter, challenge.log_from).await;
    let (status, body) = client.post("/v1/release", &request).await;
    (release, status, body)
}

#[track_caller]
pub fn refused(answer: &(u16, Value), status: u16, code: &str, named: &str) {
    let (found, body) = answer;
    assert_eq!(
        (*found, body["error"]["code"].as_str()),
        (status, Some(code)),
        "{body:#}"
    );
    assert!(body.to_string().contains(named), "{named:?} is not named in {body:#}");
}

#[test]
fn a_trusted_host_gets_the_key_and_an_untrusted_one_the_reason() {
    for (ak, ek) in [
        (AkKind::EcdsaP256, EkKind::Rsa2048),
        (AkKind::Rsa2048, EkKind::EccP256),
        (AkKind::EcdsaP256, EkKind::EccP256),
    ] {
        a_key_for_the_trusted(ak, ek);
    }
}

fn a_key_for_the_trusted(ak: AkKind, ek: EkKind) {
    let (site, machine) = ready_with(ak, ek);
    let (key, passphrase) = site.new_key("default");
    run(async {
        let mut client = connect(&site, &machine).await;
        let (release, status, body) = request(&mut client, &machine, &key).await;
        assert_eq!(status, 200, "{body:#}");
        let jwe: Jwe = serde_json::from_value(body["jwe"].clone()).unwrap();
        let opened = tokio::task::spawn_blocking(move || {
            jwe::unwrap(&jwe, |p| release.ecdh_blocking(p.x, p.y).map(|z| *z)).unwrap()
        });
        assert_eq!(opened.await.unwrap().as_slice(), passphrase.expose());

        let digest = machine.run_program("/root/rogue");
        let mut client = connect(&site, &machine).await;
        let (_, status, body) = request(&mut client, &machine, &key).await;
        refused(&(status, body.clone()), 403, "untrusted", "alpha");
        let reasons = body["reasons"].to_string();
        assert!(
            reasons.contains("/root/rogue") && reasons.contains(&digest.to_string()),
            "{reasons}"
        );
    });
    // The poller sleeps: it was the refused request that told.
    let shown = site.show("alpha");
    assert_eq!(shown["state"], "untrusted");
    assert!(shown["reasons"].to_string().contains("/root/rogue"));
    for line in [
        format!(
            "host alpha key {:?} disk {}: released",
            key.key_id.to_string(),
            key.disk_uuid
        ),
        "refused, untrusted".to_owned(),
    ] {
        assert!(site.log().contains(&line), "{line}: {}", site.log());
    }
}

#[test]
fn evidence_is_good_once_and_on_one_connection() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    run(async {
        let mut client = connect(&site, &machine).await;
        let mut other = connect(&site, &machine).await;

        // Relayed: made for the exporter of another connection.
        let asked_here = challenge(&mut client, &key).await;
        let (release, relayed) = prove(&machine, &key, asked_here.nonce, other.exporter, 0).await;
        drop(release);
        refused(
            &client.post("/v1/release", &relayed).await,
            403,
            "evidence",
            "another question",
        );

        // The nonce was used up by that.
        let mut client = connect(&site, &machine).await;
        let asked_here = challenge(&mut client, &key).await;
        let (release, good) = prove(&machine, &key, asked_here.nonce, client.exporter, 0).await;
        drop(release);
        // On a connection that did not ask.
        refused(
            &other.post("/v1/release", &good).await,
            403,
            "no-challenge",
            "ask for one",
        );
        assert_eq!(client.post("/v1/release", &good).await.0, 200);
        refused(
            &client.post("/v1/release", &good).await,
            403,
            "no-challenge",
            "ask for one",
        );

        // Replayed: answers an older nonce.
        let mut client = connect(&site, &machine).await;
        challenge(&mut client, &key).await;
        refused(
            &client.post("/v1/release", &good).await,
            403,
            "evidence",
            "another question",
        );
    });
}

#[test]
fn a_release_key_must_be_the_certified_one() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    run(async {
        let mut client = connect(&site, &machine).await;
        let asked_here = challenge(&mut client, &key).await;
        let (release, mut swapped) = prove(&machine, &key, asked_here.nonce, client.exporter, 0).await;
        drop(release);
        let (release, other) = prove(&machine, &key, asked_here.nonce, client.exporter, 0).await;
        drop(release);
        swapped.release_key.certify_attest = other.release_key.certify_attest;
        refused(
            &client.post("/v1/release", &swapped).await,
            403,
            "release-key",
            "certified",
        );
    });
}

#[test]
fn keys_disks_and_policies_that_do_not_fit() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    let (other, _) = site.new_key("default");
    let (unruled, _) = site.new_key("nobody");
    let bound = site.bound_key(Sha256Digest::of(b"header"));
    run(async {
        let unknown = ChallengeRequest {
            key_id: NEXT_BOOT.to_owned(),
            ..asked(&key)
        };
        let mut client = connect(&site, &machine).await;
        refused(
            &client.post("/v1/release/challenge", &unknown).await,
            404,
            "unknown-key",
            NEXT_BOOT,
        );
        let odd = ChallengeRequest {
            key_id: "../../etc/passwd".to_owned(),
            ..asked(&key)
        };
        let mut client = connect(&site, &machine).await;
        refused(
            &client.post("/v1/release/challenge", &odd).await,
            404,
            "unknown-key",
            "passwd",
        );
        let wrong = ChallengeRequest {
            disk_uuid: other.disk_uuid,
            ..asked(&key)
        };
        let mut client = connect(&site, &machine).await;
        refused(
            &client.post("/v1/release/challenge", &wrong).await,
            403,
            "wrong-disk",
            &other.disk_uuid.to_string(),
        );

        for (seen, named) in [
            (Some(Sha256Digest::of(b"another header")), "somebody replaced"),
            (None, "update its agent"),
        ] {
            let replaced = ChallengeRequest {
                header_sha256: seen,
                ..asked(&bound)
            };
            let mut client = connect(&site, &machine).await;
            let answer = client.post("/v1/release/challenge", &replaced).await;
            refused(&answer, 403, "other-header", named);
        }
        let mut client = connect(&site, &machine).await;
        challenge(&mut client, &bound).await;

        let mut client = connect(&site, &machine).await;
        let (_, status, body) = request(&mut client, &machine, &unruled).await;
        refused(&(status, body), 403, "no-policy", "nobody");
    });
    assert_eq!(
        site.show("alpha")["state"],
        "trusted",
        "a key's missing policy is not the host's fault"
    );
}

#[test]
fn a_key_can_demand_tags_of_a_host() {
    let (site, machine) = ready();
    let (key, _) = site.new_key_for("default", &["pci", "rack-7"]);
    let ask = |status, code, named| {
        run(async {
            let mut client = connect(&site, &machine).await;
            let (_, found, body) = request(&mut client, &machine, &key).await;
            match code {
                "" => assert_eq!(found, status, "{body:#}"),
                code => refused(&(found, body), status, code, named),
            }
        });
    };
    ask(403, "missing-tags", "tagged pci and rack-7");
    site.run(&["host", "tag", "alpha", "--add", "no such tag"])
        .refused(&["no such tag"]);
    site.run(&["host", "tag", "beta", "--add", "pci"]).refused(&["beta"]);
    assert_eq!(
        site.run(&["host", "tag", "alpha", "--add", "pci"]).good(),
        "alpha: pci\n"
    );
    ask(403, "missing-tags", "tagged rack-7");
    // The rest comes from the policy: every host that meets it has that.
    let policy = site.state().path().join("policy.json");
    let policy = policy.to_str().unwrap();
    site.run(&["policy", "export", "default", "--out", policy]).good();
    let text = std::fs::read_to_string(policy).unwrap();
    std::fs::write(policy, text.replacen('{', "{\"tags\": [\"rack-7\"],", 1)).unwrap();
    site.run(&["policy", "import", policy, "--replace"]).good();
    ask(200, "", "");
    assert_eq!(site.show("alpha")["tags"], serde_json::json!(["pci"]));
    site.run(&["host", "tag", "alpha", "--remove", "pci"]).good();
    ask(403, "missing-tags", "tagged pci");
}

#[test]
fn strangers_operators_and_hosts_each_get_their_own() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    let operator = || TlsIdentity::load(&site.state(), Role::Operator).unwrap();
    let stranger = Machine::joined(&site.join_file());
    run(async {
        let mut client = Client::open(&site.state(), site.port, Some(operator())).await.unwrap();
        let (status, hosts) = client.get("/v1/hosts").await;
        assert_eq!(
            (status, &hosts[0]["name"], &hosts[0]["state"]),
            (200, &json!("alpha"), &json!("trusted"))
        );
        assert_eq!(client.get("/v1/hosts/alpha").await.1, hosts[0]);
        refused(&client.get("/v1/hosts/beta").await, 404, "unknown-host", "beta");
        let mut client = Client::open(&site.state(), site.port, Some(operator())).await.unwrap();
        refused(
            &client.post("/v1/release/challenge", &asked(&key)).await,
            403,
            "hosts-only",
            "hosts",
        );

        let mut client = connect(&site, &machine).await;
        refused(&client.get("/v1/hosts").await, 403, "operators-only", "operators");

        let mut client = connect(&site, &stranger).await;
        refused(
            &client.post("/v1/release/challenge", &asked(&key)).await,
            403,
            "unknown-client",
            "host add",
        );

        let mut nobody = Client::open(&site.state(), site.port, None).await.unwrap();
        nobody.request("GET", "/v1/hosts", &[]).await.unwrap_err();
    });
    site.run(&["host", "remove", "alpha"]).good();
    run(async {
        let mut client = connect(&site, &machine).await;
        refused(
            &client.post("/v1/release/challenge", &asked(&key)).await,
            403,
            "unknown-client",
            "host add",
        );
    });
}

#[test]
fn certificates_that_are_no_operators() {
    let (site, other) = (Site::serving(ONCE), Site::init(ONCE));
    let (authority, foreign) = (
        Authority::load(&site.state()).unwrap(),
        Authority::load(&other.state()).unwrap(),
    );
    let now = OffsetDateTime::now_utc();
    let past = now - Duration::days(10);
    let expired = authority
        .issue_until(Role::Operator, &[], past, now - Duration::days(1))
        .unwrap();
    for (issued, why) in [
        (expired, "expired"),
        (
            foreign.issue(Role::Operator, &[], now).unwrap(),
            "invalid peer certificate",
        ),
        (
            authority.issue(Role::Client, &[], now).unwrap(),
            "not issued to an operator",
        ),
        (
            authority.issue(Role::Server, &["x".to_owned()], now).unwrap(),
            "invalid peer certificate",
        ),
    ] {
        let chain = vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
        run(async {
            let mut client = Client::open(&site.state(), site.port, Some(TlsIdentity { chain, key }))
                .await
                .unwrap();
            refused(&client.get("/v1/hosts").await, 403, "unknown-client", why);
        });
    }
}

#[test]
fn requests_have_limits() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    run(async {
        let mut client = connect(&site, &machine).await;
        refused(
            &client
                .request("POST", "/v1/release/challenge", &vec![b' '; 65 * 1024])
                .await
                .unwrap(),
            413,
            "body-too-large",
            "65536",
        );
        let mut client = connect(&site, &machine).await;
        let unknown = json!({"key_id": key.key_id.to_string(), "disk_uuid": key.disk_uuid, "colour": "red"});
        refused(
            &client.post("/v1/release/challenge", &unknown).await,
            400,
            "bad-request",
            "colour",
        );
        let mut client = connect(&site, &machine).await;
        refused(&client.get("/v1/release").await, 405, "method-not-allowed", "POST");
        let mut client = connect(&site, &machine).await;
        refused(&client.get("/v1/nothing").await, 404, "not-found", "path");
    });
}

#[test]
fn one_key_holds_few_connections_and_leaves_the_others_theirs() {
    let (site, machine) = ready();
    let (key, _) = site.new_key("default");
    run(async {
        let mut held = Vec::new();
        for _ in 0..8 {
            let mut client = connect(&site, &machine).await;
            challenge(&mut client, &key).await;
            held.push(client);
        }
        let mut ninth = connect(&site, &machine).await;
        ninth.request("GET", "/v1/hosts", &[]).await.unwrap_err();
        let operator = TlsIdentity::load(&site.state(), Role::Operator).unwrap();
        let mut client = Client::open(&site.state(), site.port, Some(operator)).await.unwrap();
        assert_eq!(client.get("/v1/hosts").await.0, 200);
    });
}

/// As if the last poll had not reached the host: what is held of it may be of a boot that is over.
fn lose_sight(site: &Site, name: &str) {
    let store = Store::open(&site.state().database()).unwrap();
    let verdict = Verdict {
        state: HostState::Unreachable,
        reasons: vec!["switched off".to_owned()],
        notes: Vec::new(),
        tags: Vec::new(),
        quoted: None,
        submod: Submod::no_evidence(Vec::new()),
    };
    let host = store.host(name).unwrap();
    store.record_verdict(host.id, &verdict).unwrap();
}

#[test]
fn a_rebooted_host_gets_its_key_before_the_next_poll() {
    let (site, mut machine) = ready();
    let (key, _) = site.new_key("default");
    machine.reboot(NEXT_BOOT);
    // The inventory is this very machine's: other programs may run by now.
    site.run(&["policy", "capture", "alpha", "--add"]).good();
    run(async {
        // Asked while the old boot was thought to be the present one, and answered below when the new one is known.
        let mut early = connect(&site, &machine).await;
        let asked_early = challenge(&mut early, &key).await;
        assert_ne!(asked_early.log_from, 0);

        lose_sight(&site, "alpha");
        let mut client = connect(&site, &machine).await;
        let asked_here = challenge(&mut client, &key).await;
        assert_eq!(asked_here.log_from, 0);
        for (client, nonce) in [(&mut client, asked_here.nonce), (&mut early, asked_early.nonce)] {
            let (_release, proof) = prove(&machine, &key, nonce, client.exporter, 0).await;
            let (status, body) = client.post("/v1/release", &proof).await;
            assert_eq!(status, 200, "{body:#}");
        }
    });
    assert_eq!(site.show("alpha")["boot_id"], NEXT_BOOT);
}

/// The host's log is thrown away while the verifier cannot see it, and a shorter one begun in the same boot.
#[test]
fn a_shortened_log_gets_no_key_from_a_verifier_that_lost_sight() {
    let mut site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    for number in 0..8 {
        machine.run_program(&format!("/usr/bin/program-{number}"));
    }
    let records = machine.tpm().log().snapshot().records;
    site.wait_until("alpha", |shown| shown["records"] == records);
    site.poll_every(ONCE);
    let (key, _) = site.new_key("default");
    machine.stop();
    machine.boot(BOOT);
    assert!(machine.tpm().log().snapshot().records < records);
    lose_sight(&site, "alpha");
    run(async {
        let mut client = connect(&site, &machine).await;
        let asked_here = challenge(&mut client, &key).await;
        assert_eq!(asked_here.log_from, 0);
        let (_release, proof) = prove(&machine, &key, asked_here.nonce, client.exporter, 0).await;
        refused(
            &client.post("/v1/release", &proof).await,
            403,
            "evidence",
            "the log shrank",
        );

        // Made longer again than what was held, it still is another log.
        for number in 0..8 {
            machine.run_program(&format!("/usr/bin/program-{number}"));
        }
        let mut client = connect(&site, &machine).await;
        let asked_here = challenge(&mut client, &key).await;
        let (_release, proof) = prove(&machine, &key, asked_here.nonce, client.exporter, 0).await;
        refused(&client.post("/v1/release", &proof).await, 403, "evidence", "rewritten");
    });
}
