//! What is asked: the four requests, and what is refused of them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod verifier;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use assay_evidence::binding::{Binding, Nonce};
use assay_evidence::bundle::Bundle;
use assay_evidence::credential::make_credential;
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::replay::HeldLog;
use assay_evidence::tpm::{AttestationKey, Public};
use assay_evidence::wire::{ActivateRequest, ActivateResponse, B64, Identity, LogPage, QuoteRequest};
use assay_tests::proxy::CC_QUOTE;
use verifier::{BOOT_ID, Connection, Host, measure};

const NONCE: Nonce = Nonce::new([7; 32]);

async fn quote(connection: &mut Connection, nonce: Nonce, log_from: u64) -> Bundle {
    let request = QuoteRequest {
        nonce,
        log_from,
        boot_log: true,
    };
    let answer = connection
        .post("/v1/quote", &serde_json::to_string(&request).unwrap())
        .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    Bundle::from_json(&answer.body).unwrap()
}

fn attestation_key(host: &Host) -> AttestationKey {
    AttestationKey::new(&host.tpm.identity().ak_public).unwrap()
}

#[test]
fn a_quote_verifies_on_its_own_connection_and_no_other() {
    let host = Host::with_log(measure);
    let ak = attestation_key(&host);
    host.run(async {
        let mut connection = host.connect().await;
        let bundle = quote(&mut connection, NONCE, 0).await;
        let binding = Binding::Quote {
            nonce: &NONCE,
            exporter: &connection.exporter,
        };
        let replayed = bundle
            .verify(&ak, &binding, &HeldLog::none())
            .unwrap()
            .replay(RuntimePcr::DEFAULT)
            .unwrap();
        assert!(replayed.records() >= 2, "AGENT_START and the inventory at least");
        assert_eq!(replayed.boot_id(), BOOT_ID);

        let other = host.connect().await;
        let relayed = Binding::Quote {
            nonce: &NONCE,
            exporter: &other.exporter,
        };
        assert!(
            bundle.verify(&ak, &relayed, &HeldLog::none()).is_err(),
            "the quote is bound to its connection"
        );
        let replay = Binding::Quote {
            nonce: &Nonce::new([8; 32]),
            exporter: &connection.exporter,
        };
        assert!(
            bundle.verify(&ak, &replay, &HeldLog::none()).is_err(),
            "and to its nonce"
        );

        // The next poll costs only what is new, which is nothing.
        let held = replayed.to_held();
        let next = quote(&mut connection, NONCE, replayed.records()).await;
        assert_eq!((next.log.from, next.log.data.0.len()), (replayed.records(), 0));
        let binding = Binding::Quote {
            nonce: &NONCE,
            exporter: &connection.exporter,
        };
        next.verify(&ak, &binding, &held)
            .unwrap()
            .replay(RuntimePcr::DEFAULT)
            .unwrap();

        // Who holds a longer log than there is, holds another boot's: it gets the whole.
        assert_eq!(quote(&mut connection, NONCE, 1_000_000).await.log.from, 0);
    });
}

#[test]
fn the_log_comes_in_pages_that_fit_the_quote() {
    let host = Host::with_log(measure);
    host.run(async {
        let mut connection = host.connect().await;
        let bundle = quote(&mut connection, NONCE, 0).await;
        let mut log = Vec::new();
        let mut next = 0;
        while next < bundle.log.records {
            let page: LogPage = connection.get(&format!("/v1/log?from={next}")).await.json();
            assert_eq!(page.from, next);
            assert!(page.count > 0);
            log.extend_from_slice(&page.data.0);
            next += page.count;
        }
        assert_eq!(log, bundle.log.data.0);
        let end: LogPage = connection.get(&format!("/v1/log?from={next}")).await.json();
        assert_eq!((end.count, end.data.0.len()), (0, 0));
        let (status, code, _) = connection.get(&format!("/v1/log?from={}", next + 1)).await.error();
        assert_eq!((status, code.as_str()), (416, "no-such-record"));
    });
}

#[test]
fn the_attestation_key_is_activated_by_the_tpm_that_has_it() {
    let host = Host::start();
    host.run(async {
        let mut connection = host.connect().await;
        let identity: Identity = connection.get("/v1/identity").await.json();
        assert_eq!(identity.boot_id, BOOT_ID);
        let ek = Public::parse(&identity.ek_public.0).unwrap();
        let ak = Public::parse(&identity.ak_public.0).unwrap();
        let credential = make_credential(&ek, &ak.name(), b"known to the verifier only").unwrap();
        let request = ActivateRequest {
            credential_blob: B64(credential.blob),
            secret: B64(credential.encrypted_secret),
        };
        let answer = connection
            .post("/v1/activate", &serde_json::to_string(&request).unwrap())
            .await;
        assert_eq!(
            answer.json::<ActivateResponse>().secret.0,
            b"known to the verifier only"
        );

        // For another key than the AK: the TPM gives nothing out.
        let other = make_credential(&ek, &ek.name(), b"secret").unwrap();
        let request = ActivateRequest {
            credential_blob: B64(other.blob),
            secret: B64(other.encrypted_secret),
        };
        let answer = connection
            .post("/v1/activate", &serde_json::to_string(&request).unwrap())
            .await;
        let (status, code, _) = answer.error();
        assert_eq!((status, code.as_str()), (400, "credential-refused"));
    });
}

#[test]
fn malformed_requests_are_named_and_the_connection_goes_on() {
    let host = Host::start();
    host.run(async {
        let mut connection = host.connect().await;
        let long = format!("{{\"credential_blob\":\"{}\",\"secret\":\"\"}}", "AAAA".repeat(1000));
        for (path, body, code, names) in [
            (
                "/v1/quote",
                "{\"nonce\":\"AAAA\",\"log_from\":0}",
                "malformed-request",
                "32",
            ),
            (
                "/v1/quote",
                "{\"nonce\":\"?\",\"log_from\":0}",
                "malformed-request",
                "base64",
            ),
            ("/v1/quote", "{\"log_from\":0}", "malformed-request", "`nonce`"),
            ("/v1/quote", "{\"nonse\":\"AAAA\"}", "malformed-request", "`nonse`"),
            (
                "/v1/quote",
                "{\"nonce\":\"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\",\"log_from\":-1}",
                "malformed-request",
                "-1",
            ),
            ("/v1/quote", "", "malformed-request", "EOF"),
            ("/v1/activate", "{}", "malformed-request", "`credential_blob`"),
            ("/v1/activate", long.as_str(), "credential-too-long", "2048"),
        ] {
            let (status, found, message) = connection.post(path, body).await.error();
            assert_eq!((status, found.as_str()), (400, code), "{body}");
            assert!(message.contains(names), "{message}");
        }
        for query in ["", "?from=", "?from=x", "?from=-1", "?from=1&from=2", "?since=1"] {
            let (status, code, _) = connection.get(&format!("/v1/log{query}")).await.error();
            assert_eq!((status, code.as_str()), (400, "bad-from"), "{query}");
        }
        let (status, code, _) = connection.get("/v1/secrets").await.error();
        assert_eq!((status, code.as_str()), (404, "not-found"));
        let wrong = connection.get("/v1/quote").await;
        assert!(wrong.head.contains("allow: post"), "{}", wrong.head);
        assert_eq!(wrong.error().0, 405);
        assert_eq!(connection.post("/v1/identity", "{}").await.error().0, 405);
        assert_eq!(
            connection.get("/v1/identity").await.status,
            200,
            "all on one connection"
        );
    });
}

#[test]
fn a_body_of_10_mib_is_refused_by_its_length_or_as_soon_as_it_is_too_long() {
    let host = Host::start();
    host.run(async {
        let mut connection = host.connect().await;
        connection
            .send(b"POST /v1/quote HTTP/1.1\r\nhost: a\r\ncontent-length: 10485760\r\n\r\n")
            .await
            .unwrap();
        let (status, code, _) = connection.receive().await.unwrap().error();
        assert_eq!(
            (status, code.as_str()),
            (413, "body-too-large"),
            "before a byte of it was sent"
        );

        // A client that sends all before it reads still sees the answer.
        let mut connection = host.connect().await;
        connection
            .send(b"POST /v1/quote HTTP/1.1\r\nhost: a\r\ncontent-length: 10485760\r\n\r\n")
            .await
            .unwrap();
        connection.send(&vec![b' '; 10 * 1024 * 1024]).await.unwrap();
        assert_eq!(connection.receive().await.unwrap().error().0, 413);

        let mut connection = host.connect().await;
        connection
            .send(b"POST /v1/quote HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            .await
            .unwrap();
        let chunk = [b"8000\r\n".as_slice(), &[b' '; 0x8000], b"\r\n"].concat();
        for _ in 0..3 {
            connection.send(&chunk).await.unwrap();
        }
        assert_eq!(
            connection.receive().await.unwrap().error().0,
            413,
            "chunks without a declared length"
        );
        let mut after = host.connect().await;
        assert_eq!(after.get("/v1/identity").await.status, 200);
    });
}

#[test]
fn the_identity_does_not_wait_for_quotes() {
    let host = Host::start();
    host.run(async {
        // No quote can be answered from here on; what the TPM does not matter for goes on.
        host.proxy.only(Some(CC_QUOTE));
        host.proxy.hang();
        let answered = AtomicUsize::new(0);
        let asking = async {
            let mut clients = Vec::new();
            for _ in 0..8 {
                let mut connection = host.connect().await;
                let answered = &answered;
                clients.push(async move {
                    quote(&mut connection, NONCE, 0).await;
                    answered.fetch_add(1, Ordering::Relaxed);
                });
            }
            join_all(clients).await
        };
        let meanwhile = async {
            let mut connection = host.connect().await;
            while host.proxy.count(CC_QUOTE) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            for _ in 0..100 {
                assert_eq!(connection.get("/v1/identity").await.status, 200);
            }
            assert_eq!(
                answered.load(Ordering::Relaxed),
                0,
                "the identity came first, 100 times"
            );
            host.proxy.resume();
        };
        tokio::join!(asking, meanwhile);
        assert_eq!(answered.load(Ordering::Relaxed), 8, "and no quote was lost");
    });
}

/// Runs futures of one type side by side.
async fn join_all<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut pinned: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(move |context| {
        for (future, result) in &mut pinned {
            if result.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *result = Some(value);
            }
        }
        if pinned.iter().all(|(_, result)| result.is_some()) {
            return std::task::Poll::Ready(pinned.drain(..).filter_map(|(_, result)| result).collect());
        }
        std::task::Poll::Pending
    })
    .await
}
