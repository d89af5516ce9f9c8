//! Who may ask: TLS 1.3 with a certificate of the joined CA, and nobody else.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod verifier;

use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use verifier::{Ca, Client, Connection, Host};

/// In TLS 1.3 a client learns only from its first read that its certificate was refused.
async fn is_served(host: &Host, client: Option<Client>) -> bool {
    let Ok(mut connection) = Connection::open(host, client).await else {
        return false;
    };
    if connection
        .send(b"GET /v1/identity HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .is_err()
    {
        return false;
    }
    connection.receive().await.is_ok_and(|answer| answer.status == 200)
}

#[test]
fn only_certificates_of_the_joined_ca_that_are_valid_now_are_served() {
    let host = Host::start();
    host.run(async {
        assert!(
            is_served(&host, Some(host.ca.client())).await,
            "the verifier's own certificate"
        );
        assert!(!is_served(&host, None).await, "no certificate");
        assert!(
            !is_served(&host, Some(host.ca.expired_client())).await,
            "an expired certificate"
        );
        let early = host
            .ca
            .issue(|parameters| parameters.not_before = date_time_ymd(2999, 1, 1));
        assert!(
            !is_served(&host, Some(early)).await,
            "a certificate that is not valid yet"
        );
        let server = host
            .ca
            .issue(|parameters| parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
        assert!(!is_served(&host, Some(server)).await, "a server's certificate");
        // Same name, other key.
        assert!(
            !is_served(&host, Some(Ca::new("verifier").client())).await,
            "a foreign CA's certificate"
        );
        assert!(
            is_served(&host, Some(host.ca.client())).await,
            "and the server is none the worse for it"
        );
    });
}

#[test]
fn tls_1_2_is_refused() {
    // RFC 5246 §7.4.1.2: a client that knows nothing newer, with a suite and a group that the server would otherwise take.
    let mut hello = vec![0x03, 0x03];
    hello.extend([0x5a; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups: secp256r1
        0, 11, 0, 2, 1, 0, // ec_point_formats: uncompressed
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms: ecdsa_secp256r1_sha256
    ];
    hello.extend([0, u8::try_from(extensions.len()).unwrap()]);
    hello.extend(extensions);
    let length = u8::try_from(hello.len()).unwrap();
    let record = [&[0x16, 3, 1, 0, length + 4, 1, 0, 0, length], hello.as_slice()].concat();

    let host = Host::start();
    host.run(async {
        let mut tcp = tokio::net::TcpStream::connect(host.address).await.unwrap();
        tcp.write_all(&record).await.unwrap();
        let mut answer = Vec::new();
        tcp.read_to_end(&mut answer).await.unwrap();
        // An alert, fatal, protocol_version (RFC 8446 §6.2), and the end.
        assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 70]);
    });
}

#[test]
fn the_server_shows_the_key_that_join_made() {
    let host = Host::start();
    let joined = assay_agent::join::Joined::load(host.state.path()).unwrap().unwrap();
    host.run(async {
        let connection = host.connect().await;
        assert_eq!(connection.server_certificate, joined.certificate());
    });
}

#[test]
fn strangers_that_only_connect_do_not_keep_verifiers_out() {
    let host = Host::start();
    host.run(async {
        let mut idle = Vec::new();
        for _ in 0..40 {
            idle.push(tokio::net::TcpStream::connect(host.address).await.unwrap());
        }
        // More strangers than handshakes at once: the verifier waits for the handshake timeout, not for ever.
        assert!(is_served(&host, Some(host.ca.client())).await);
    });
}
