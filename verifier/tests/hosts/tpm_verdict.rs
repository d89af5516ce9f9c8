//! Verdicts for relying parties: who gets them, that somebody else's program finds the signature good, and what they say.

use std::path::Path;
use std::process::Command;

use assay_verifier::pki::{Role, TlsIdentity};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::host::{Machine, NEXT_BOOT};
use crate::http::{Client, run};
use crate::site::Site;

const NONCE: &str = "AAECAwQFBgcICQoL";
const MEDIA_TYPE: &str = r#"application/eat+jwt; eat_profile="tag:ietf.org,2026:rats/ear#04""#;

pub async fn operator(site: &Site) -> Client {
    let identity = TlsIdentity::load(&site.state(), Role::Operator).unwrap();
    Client::open(&site.state(), site.port, Some(identity)).await.unwrap()
}

fn part(token: &str, at: usize) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(token.split('.').nth(at).unwrap()).unwrap()
}

fn claims(token: &str) -> Value {
    serde_json::from_slice(&part(token, 1)).unwrap()
}

/// OpenSSL's opinion on a token. It wants signatures in DER: SEQUENCE { INTEGER r, INTEGER s }.
fn openssl_finds_good(token: &str, pem: &str, dir: &Path) -> bool {
    let integer = |bytes: &[u8]| {
        let bytes: Vec<u8> = bytes.iter().copied().skip_while(|byte| *byte == 0).collect();
        let sign = (bytes[0] >= 0x80).then_some(0);
        let content: Vec<u8> = sign.into_iter().chain(bytes).collect();
        [&[2, u8::try_from(content.len()).unwrap()], content.as_slice()].concat()
    };
    let signature = part(token, 2);
    let (r, s) = signature.split_at(32);
    let both = [integer(r), integer(s)].concat();
    let der = [&[0x30, u8::try_from(both.len()).unwrap()], both.as_slice()].concat();
    let (signed, _) = token.rsplit_once('.').unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let output = Command::new("openssl")
        .args(["dgst", "-sha256", "-verify"])
        .arg(put("key.pem", pem.as_bytes()))
        .arg("-signature")
        .arg(put("signature", &der))
        .arg(put("signed", signed.as_bytes()))
        .output()
        .expect("`cargo xtask setup` installs openssl");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("Verified OK") || said.contains("Verification failure"),
        "{said}"
    );
    output.status.success()
}

#[test]
fn a_verdict_is_a_token_that_another_program_finds_good() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let pem = site.run(&["host", "verdict-key", "--pem"]).good();
    let jwk: Value = serde_json::from_str(&site.run(&["host", "verdict-key"]).good()).unwrap();
    // The same key in both forms: a PEM's DER ends with both coordinates.
    let der = pem.lines().filter(|line| !line.starts_with('-')).collect::<String>();
    let der = STANDARD.decode(der).unwrap();
    let coordinate = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
    assert!(der.ends_with(&[coordinate("x"), coordinate("y")].concat()));

    let token = run(async {
        let mut client = operator(&site).await;
        let path = format!("/v1/hosts/alpha/verdict?nonce={NONCE}");
        let (status, media_type, token) = client.get_text(&path).await;
        assert_eq!((status, media_type.as_str()), (200, MEDIA_TYPE), "{token}");
        let (status, media_type, served) = client.get_text("/v1/verdict-key").await;
        assert_eq!((status, media_type.as_str()), (200, "application/jwk+json"));
        assert_eq!(serde_json::from_str::<Value>(&served).unwrap(), jwk);
        token
    });
    let header: Value = serde_json::from_slice(&part(&token, 0)).unwrap();
    assert_eq!((&header["alg"], &header["typ"]), (&json!("ES256"), &json!("eat+jwt")));
    let dir = tempfile::tempdir().unwrap();
    assert!(openssl_finds_good(&token, &pem, dir.path()));
    let found = claims(&token);
    assert_eq!(
        (&found["eat_nonce"], &found["ear_status"]),
        (&json!(NONCE), &json!("affirming"))
    );
    assert_eq!(
        found["submods"]["alpha"]["ear_trustworthiness_vector"],
        json!({"instance-identity": 2, "configuration": 2, "executables": 2, "hardware": 2})
    );
    let (issued, expires) = (found["iat"].as_i64().unwrap(), found["exp"].as_i64().unwrap());
    assert!(issued < expires && expires <= issued + 31, "{found:#}");

    // A log that went on by approved code alone is not judged anew, and is told as long as it is.
    let records = |shown: &Value| shown["records"].as_u64().unwrap();
    let before = records(&site.show("alpha"));
    let tool = machine.run_program("/root/tool");
    site.run(&["policy", "allow", &tool.to_string()]).good();
    site.wait_until("alpha", |shown| shown["state"] == "trusted" && records(shown) > before);
    machine.run_program("/root/tool");
    site.wait_until("alpha", |shown| records(shown) > before + 1);
    let told: Value = serde_json::from_str(&site.run(&["host", "verdict", "alpha", "--json"]).good()).unwrap();
    let host = &told["submods"]["alpha"]["assay_verdict"]["host"];
    assert_eq!(records(host), before + 2);

    let digest = machine.run_program("/root/rogue");
    site.wait_for("alpha", "untrusted");
    let bad = site.run(&["host", "verdict", "alpha", "--jwt"]).good();
    let bad = bad.trim_end();
    assert!(openssl_finds_good(bad, &pem, dir.path()));
    let found = claims(bad);
    let submod = &found["submods"]["alpha"];
    assert_eq!(
        (&found["ear_status"], &submod["ear_status"]),
        (&json!("contraindicated"), &json!("contraindicated"))
    );
    assert!(found.get("eat_nonce").is_none());
    let failure = &submod["assay_verdict"]["failures"][0];
    assert_eq!(
        ["rule", "kind", "path", "digest"].map(|name| failure[name].clone()),
        [
            json!("not-approved"),
            json!("program"),
            json!("/root/rogue"),
            json!(digest)
        ]
    );
    // A good token's signature under the bad one's claims, and the other way round.
    let cut = |token: &str| {
        token
            .rsplit_once('.')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap()
    };
    let ((good_text, good_signature), (bad_text, bad_signature)) = (cut(&token), cut(bad));
    assert!(!openssl_finds_good(
        &format!("{bad_text}.{good_signature}"),
        &pem,
        dir.path()
    ));
    assert!(!openssl_finds_good(
        &format!("{good_text}.{bad_signature}"),
        &pem,
        dir.path()
    ));
    let other = Site::init(10.0).run(&["host", "verdict-key", "--pem"]).good();
    assert!(
        !openssl_finds_good(&token, &other, dir.path()),
        "another verifier's key"
    );

    let text = site.run(&["host", "verdict", "alpha"]).good();
    for line in [
        "alpha: untrusted since 20",
        "/root/rogue",
        "\nEAR status  contraindicated\n",
        "\ngood until  20",
    ] {
        assert!(text.contains(line), "{line:?} is not in: {text}");
    }
    let shown = site
        .run(&["host", "verdict", "alpha", "--json", "--nonce", NONCE])
        .good();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["eat_nonce"], &shown["submods"]["alpha"]),
        (&json!(NONCE), submod)
    );
}

#[test]
fn a_host_that_is_silent_or_lies_is_not_affirmed() {
    let site = Site::serving(0.2);
    let mut machine = Machine::joined(&site.join_file());
    site.add("alpha", &machine).good();
    let verdict = || -> Value {
        let shown = site.run(&["host", "verdict", "alpha", "--json"]).good();
        serde_json::from_str(&shown).unwrap()
    };
    let basis = |found: &Value| found["submods"]["alpha"]["assay_verdict"]["basis"].clone();
    site.wait_until("alpha", |shown| !shown["last_quote"].is_null());
    let found = verdict();
    assert_eq!(
        (&found["ear_status"], basis(&found)),
        (&json!("none"), json!("no-policy"))
    );

    site.run(&["policy", "capture", "alpha"]).good();
    site.wait_for("alpha", "trusted");
    machine.stop();
    site.wait_for("alpha", "unreachable");
    let found = verdict();
    assert_eq!(
        (&found["ear_status"], basis(&found)),
        (&json!("none"), json!("no-evidence"))
    );

    machine.boot(NEXT_BOOT);
    let shown = site.wait_for("alpha", "untrusted");
    let found = verdict();
    assert_eq!(
        (&found["ear_status"], basis(&found)),
        (&json!("contraindicated"), json!("bad-evidence"))
    );
    let submod = &found["submods"]["alpha"];
    assert_eq!(submod["ear_trustworthiness_vector"], json!({"instance-identity": 99}));
    assert_eq!(submod["assay_verdict"]["reasons"], shown["reasons"]);
}

#[test]
fn nobody_gets_a_verdict_that_is_not_fresh_or_not_theirs() {
    let mut site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    run(async {
        let mut client = operator(&site).await;
        assert_eq!(client.get_text("/v1/hosts/alpha/verdict").await.0, 200);
        let long = format!("nonce={}", "A".repeat(2000));
        for query in [
            "nonce=",
            "nonce=AAAA",
            "nonce=AAECAwQFBgc%3D",
            "nonce",
            "other=AAECAwQFBgc",
            "",
            &long,
        ] {
            let mut client = operator(&site).await;
            let (status, body) = client.get(&format!("/v1/hosts/alpha/verdict?{query}")).await;
            assert_eq!(
                (status, &body["error"]["code"]),
                (400, &json!("bad-nonce")),
                "{query}: {body:#}"
            );
        }
        let mut client = operator(&site).await;
        let (status, body) = client.get("/v1/hosts/beta/verdict").await;
        assert_eq!((status, &body["error"]["code"]), (404, &json!("unknown-host")));
        for path in ["/v1/hosts/alpha/verdict", "/v1/verdict-key"] {
            let joined = machine.identity();
            let identity = TlsIdentity {
                chain: vec![joined.certificate()],
                key: joined.key(),
            };
            let mut client = Client::open(&site.state(), site.port, Some(identity)).await.unwrap();
            let (status, body) = client.get(path).await;
            assert_eq!(
                (status, &body["error"]["code"]),
                (403, &json!("operators-only")),
                "{path}"
            );
        }
    });
    let wrong = site.run(&["host", "verdict", "alpha", "--nonce", "AAAA"]);
    assert!(wrong.code == Some(2) && wrong.err.contains("8 to 64"), "{}", wrong.err);

    // As if nobody had looked for a day.
    site.poll_every(3600.0);
    let database = rusqlite::Connection::open(site.state().database()).unwrap();
    let age = |seconds: i64| {
        let aged = database.execute("UPDATE standings SET judged = judged - ?1", [seconds]);
        assert_eq!(aged.unwrap(), 1);
    };
    age(86_400);
    for arguments in [
        &["host", "verdict", "alpha"][..],
        &["host", "verdict", "alpha", "--jwt"],
    ] {
        site.run(arguments).refused(&["alpha", "s old", "assay-verifier serve"]);
    }
    run(async {
        let (status, body) = operator(&site).await.get("/v1/hosts/alpha/verdict").await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (409, &json!("no-fresh-verdict")),
            "{body:#}"
        );
    });
    // From the future: the clock was set back.
    age(-2 * 86_400);
    site.run(&["host", "verdict", "alpha", "--jwt"]).refused(&["s old"]);
    site.run(&["host", "remove", "alpha"]).good();
    site.run(&["host", "verdict", "alpha"]).refused(&["no host alpha"]);
    site.stop();
    site.add("alpha", &machine).good();
    site.run(&["host", "verdict", "alpha"])
        .refused(&["has not been judged yet"]);
}

#[test]
fn a_host_learns_how_it_stands_itself_and_nothing_of_others() {
    let mut site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let other = Machine::joined(&site.join_file());
    let ask = |machine: &Machine| {
        let joined = machine.identity();
        let identity = TlsIdentity {
            chain: vec![joined.certificate()],
            key: joined.key(),
        };
        let (state, port) = (site.state(), site.port);
        run(async move {
            let mut client = Client::open(&state, port, Some(identity)).await.unwrap();
            client.get("/v1/verdict").await
        })
    };
    let (status, body) = ask(&machine);
    assert_eq!(
        (status, &body["host"], &body["trusted"], &body["state"]),
        (200, &json!("alpha"), &json!(true), &json!("trusted"))
    );
    assert!(
        body.get("reasons").is_none() && body["age_s"].as_u64().unwrap() < 60,
        "{body:#}"
    );
    let (status, body) = ask(&other);
    assert_eq!((status, &body["error"]["code"]), (403, &json!("unknown-client")));

    let digest = machine.run_program("/root/rogue");
    site.wait_for("alpha", "untrusted");
    let (status, body) = ask(&machine);
    assert_eq!(
        (status, &body["trusted"], &body["state"]),
        (200, &json!(false), &json!("untrusted"))
    );
    let reasons = body["reasons"].to_string();
    assert!(
        reasons.contains("/root/rogue") && reasons.contains(&digest.to_string()),
        "{reasons}"
    );

    run(async {
        let (status, body) = operator(&site).await.get("/v1/verdict").await;
        assert_eq!((status, &body["error"]["code"]), (403, &json!("hosts-only")));
        let mut client = operator(&site).await;
        let (status, body) = client.post("/v1/verdict", &json!({})).await;
        assert_eq!((status, &body["error"]["code"]), (405, &json!("method-not-allowed")));
    });
    // As if nobody had looked for a day.
    site.poll_every(3600.0);
    let database = rusqlite::Connection::open(site.state().database()).unwrap();
    database
        .execute("UPDATE standings SET judged = judged - 86400", [])
        .unwrap();
    let joined = machine.identity();
    let identity = TlsIdentity {
        chain: vec![joined.certificate()],
        key: joined.key(),
    };
    run(async {
        let mut client = Client::open(&site.state(), site.port, Some(identity)).await.unwrap();
        let (status, body) = client.get("/v1/verdict").await;
        assert_eq!((status, &body["error"]["code"]), (409, &json!("no-fresh-verdict")));
    });
}

#[test]
fn a_verifier_of_before_there_were_verdicts_makes_a_key_and_keeps_it() {
    let mut site = Site::init(0.2);
    let key = |site: &Site| site.run(&["host", "verdict-key"]).good();
    let first = key(&site);
    assert_eq!(key(&site), first);
    std::fs::remove_file(site.state().verdict_key()).unwrap();
    site.serve();
    let second = key(&site);
    assert_ne!(second, first);
    site.serve_again();
    assert_eq!(key(&site), second);
    std::fs::write(site.state().verdict_key(), "no key").unwrap();
    site.run(&["host", "verdict-key"])
        .refused(&["verdicts.key", "backup of the state directory"]);
}
