//! A client of the service that shows any certificate that a test wants.

use std::sync::Arc;

use assay_evidence::binding::{EXPORTER_LABEL, Exporter};
use assay_verifier::config::StateDir;
use assay_verifier::pki::{TlsIdentity, ca_certificate};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Runs a test's client, for a minute at most.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(async { tokio::time::timeout(std::time::Duration::from_secs(60), test).await })
        .expect("the client is stuck")
}

pub struct Client {
    stream: TlsStream<TcpStream>,
    pub exporter: Exporter,
}

impl Client {
    /// Connects to the service of this state directory, with this certificate or without any.
    pub async fn open(state: &StateDir, port: u16, identity: Option<TlsIdentity>) -> std::io::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(ca_certificate(state).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            Some(identity) => builder.with_client_auth_cert(identity.chain, identity.key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        let stream = TlsConnector::from(Arc::new(config))
            .connect("127.0.0.1".try_into().unwrap(), tcp)
            .await?;
        let exporter = stream
            .get_ref()
            .1
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .unwrap();
        Ok(Self {
            stream,
            exporter: Exporter::new(exporter),
        })
    }

    /// One request; the status and the JSON of the answer.
    pub async fn request(&mut self, method: &str, path: &str, body: &[u8]) -> std::io::Result<(u16, Value)> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.stream.write_all(head.as_bytes()).await?;
        // A refusal may come before the whole body is read.
        drop(self.stream.write_all(body).await);
        self.answer().await
    }

    pub async fn get(&mut self, path: &str) -> (u16, Value) {
        self.request("GET", path, &[]).await.unwrap()
    }

    pub async fn post(&mut self, path: &str, body: &impl serde::Serialize) -> (u16, Value) {
        self.request("POST", path, &serde_json::to_vec(body).unwrap())
            .await
            .unwrap()
    }

    /// Gets what is no JSON: status, media type and text.
    pub async fn get_text(&mut self, path: &str) -> (u16, String, String) {
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        self.stream.write_all(head.as_bytes()).await.unwrap();
        let (status, head, body) = self.read_answer().await.unwrap();
        let media_type = head.lines().find_map(|l| l.strip_prefix("content-type: ")).unwrap();
        (status, media_type.to_owned(), String::from_utf8(body).unwrap())
    }

    async fn answer(&mut self) -> std::io::Result<(u16, Value)> {
        let (status, _, body) = self.read_answer().await?;
        Ok((status, serde_json::from_slice(&body).unwrap()))
    }

    /// Status, head in lower case, and body.
    async fn read_answer(&mut self) -> std::io::Result<(u16, String, Vec<u8>)> {
        let mut bytes = Vec::new();
        loop {
            if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_ascii_lowercase();
                let status = head[9..12].parse().unwrap();
                let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).unwrap();
                let length: usize = length.parse().unwrap();
                while bytes.len() < end + 4 + length {
                    self.read_more(&mut bytes).await?;
                }
                return Ok((status, head, bytes[end + 4..].to_vec()));
            }
            self.read_more(&mut bytes).await?;
        }
    }

    async fn read_more(&mut self, bytes: &mut Vec<u8>) -> std::io::Result<()> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk).await? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                bytes.extend_from_slice(&chunk[..n]);
                Ok(())
            }
        }
    }
}
