//! An agent that lies at its enrolment: the endorsement key of one TPM with the attestation key of another.

use std::sync::Arc;

use assay_agent::tpm::Handle;
use assay_evidence::wire::{ActivateRequest, ActivateResponse, B64, ErrorBody, Identity};
use assay_tests::Swtpm;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::host::Machine;
use crate::site::Site;

/// What it does with the credential that it cannot open.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// Has the TPM with this endorsement key try.
    AskTheGood,
    /// Has the TPM with this attestation key try.
    AskTheBad,
    /// Guesses.
    Guess,
    /// Says nothing at all.
    Nothing,
}

struct Liar {
    good: Handle,
    bad: Handle,
    lie: Lie,
}

impl Liar {
    /// Serves one connection after another; gives the address.
    async fn serve(self) -> String {
        let certified = rcgen::generate_simple_self_signed(vec!["agent".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let mut stream = acceptor.accept(tcp).await.unwrap();
                while let Some((path, body)) = read_request(&mut stream).await {
                    let (status, answer) = self.answer(&path, &body).await;
                    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", answer.len());
                    stream.write_all(&[head.into_bytes(), answer].concat()).await.unwrap();
                }
            }
        });
        address
    }

    async fn answer(&self, path: &str, body: &[u8]) -> (&'static str, Vec<u8>) {
        if path == "/v1/identity" {
            return ("200 OK", serde_json::to_vec(&self.identity()).unwrap());
        }
        assert_eq!(path, "/v1/activate", "nothing else is asked of a liar");
        let request: ActivateRequest = serde_json::from_slice(body).unwrap();
        let (blob, secret) = (request.credential_blob.0, request.secret.0);
        let secret = match self.lie {
            Lie::AskTheGood => self.good.activate(blob, secret).await.map(|secret| secret.to_vec()),
            Lie::AskTheBad => self.bad.activate(blob, secret).await.map(|secret| secret.to_vec()),
            Lie::Guess => Ok(vec![0x5e; 32]),
            Lie::Nothing => Ok(Vec::new()),
        };
        match secret {
            Ok(secret) => (
                "200 OK",
                serde_json::to_vec(&ActivateResponse { secret: B64(secret) }).unwrap(),
            ),
            Err(error) => {
                let refused = ErrorBody::new("credential-refused", error.to_string());
                ("403 Forbidden", serde_json::to_vec(&refused).unwrap())
            }
        }
    }

    fn identity(&self) -> Identity {
        let (good, bad) = (self.good.identity(), self.bad.identity());
        Identity {
            version: 1,
            agent_version: "0.1.0".to_owned(),
            boot_id: self.bad.log().boot_id().to_owned(),
            ek_public: B64(good.ek_public.clone()),
            ek_certificate: good.ek_certificate.clone().map(B64),
            ak_public: B64(bad.ak_public.clone()),
            tpm_manufacturer: good.manufacturer.clone(),
            tpm_firmware: good.firmware.clone(),
            approved: None,
        }
    }
}

/// Path and body of the next request.
async fn read_request(stream: &mut TlsStream<TcpStream>) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.unwrap();
    Some((path, body))
}

#[test]
fn the_endorsement_key_of_another_tpm_enrols_no_attestation_key() {
    let site = Site::init(10.0);
    for start in [Swtpm::start_with_ek_certificate, Swtpm::start_with_ecc_ek_certificate] {
        let good = Machine::with_tpm(start().unwrap(), &site.join_file());
        let bad = Machine::joined(&site.join_file());
        let issuer = good.swtpm.ca_certificates()[1].to_str().unwrap().to_owned();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for (lie, named) in [
            (Lie::AskTheGood, "cannot activate the credential"),
            (Lie::AskTheBad, "cannot activate the credential"),
            (Lie::Guess, "returned a wrong secret"),
            (Lie::Nothing, "returned a wrong secret"),
        ] {
            let (good, bad) = (good.tpm(), bad.tpm());
            let address = runtime.block_on(Liar { good, bad, lie }.serve());
            // The key that it shows is good, by the maker's word.
            let added = site.run(&["host", "add", "alpha", &address, "--ek-ca", &issuer]);
            added.refused(&[named, "does not hold the attestation key"]);
            assert_eq!(site.run(&["host", "list", "--json"]).good().trim(), "[]", "{lie:?}");
        }
    }
}
