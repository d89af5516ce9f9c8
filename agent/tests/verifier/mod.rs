//! A verifier's side for the tests of the quote server: a CA, certificates good and bad, and a client that can be as rude as a
//! test needs it to be.

#![allow(dead_code, reason = "each test binary uses its own part of this module")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use assay_agent::approved::ApprovedStore;
use assay_agent::bundle::Source;
use assay_agent::join::{self, Joined, Membership};
use assay_agent::log_view::LogView;
use assay_agent::measure::source::{EventSource, Refusal, SourceError};
use assay_agent::measure::{Measurer, Settings};
use assay_agent::serve::Server;
use assay_agent::tpm::{AkKind, Handle, TpmConfig};
use assay_evidence::approved::ListSigner;
use assay_evidence::binding::{EXPORTER_LABEL, Exporter};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::Mode;
use assay_evidence::wire::{B64, ErrorBody, JoinFile};
use assay_tests::{Swtpm, TpmProxy};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub const BOOT_ID: &str = "0f2ff0a2-9c5b-4f6e-8d3e-6f0e3f4a5b6c";

/// A certificate authority.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
    /// Signs approved lists.
    pub lists: ListSigner,
}

impl Ca {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec![]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        let pem = parameters.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(parameters, key),
            pem,
            lists: ListSigner::from_pkcs8(&KeyPair::generate().unwrap().serialize_der()).unwrap(),
        }
    }

    /// A certificate for the other side, changed as the test wants it.
    pub fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Client {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut parameters);
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        Client {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        }
    }

    pub fn client(&self) -> Client {
        self.issue(|_| {})
    }

    pub fn expired_client(&self) -> Client {
        self.issue(|parameters| {
            parameters.not_before = date_time_ymd(2020, 1, 1);
            parameters.not_after = date_time_ymd(2021, 1, 1);
        })
    }
}

/// A certificate and its key.
pub struct Client {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// A host with a TPM of its own, joined to a CA, serving quotes on a port of its own.
pub struct Host {
    pub address: SocketAddr,
    pub tpm: Handle,
    pub ca: Ca,
    pub state: tempfile::TempDir,
    /// Through which the agent reaches its TPM.
    pub proxy: TpmProxy,
    _swtpm: Swtpm,
    runtime: tokio::runtime::Runtime,
}

impl Host {
    /// A host whose log is empty.
    pub fn start() -> Self {
        Self::with_log(|_, _| {})
    }

    /// A host whose log `fill` has filled.
    pub fn with_log(fill: impl FnOnce(&Handle, &Path)) -> Self {
        let swtpm = Swtpm::start().unwrap();
        let log = LogView::new(BOOT_ID.to_owned());
        let proxy = TpmProxy::start(&swtpm).unwrap();
        let tpm = Handle::open(tpm_config(&proxy.tcti()), log.clone()).unwrap();
        let ca = Ca::new("verifier");
        let state = tempfile::tempdir().unwrap();
        fill(&tpm, state.path());
        let joined = join_to(&ca, &["https://127.0.0.1:8444"], state.path());
        // As the daemon: one thread, so that what one request costs is seen by the others.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let source = Source::new(log, &proxy.tcti());
        let listen = "127.0.0.1:0".parse().unwrap();
        let server = runtime
            .block_on(Server::bind(
                listen,
                &joined,
                tpm.clone(),
                source,
                ApprovedStore::open(state.path()),
            ))
            .unwrap();
        let address = server.local_addr().unwrap();
        runtime.spawn(async move { panic!("the server ended: {:?}", server.run().await.map(|_| ()).err()) });
        Self {
            address,
            tpm,
            ca,
            state,
            proxy,
            _swtpm: swtpm,
            runtime,
        }
    }

    /// Runs a test's client beside the server.
    pub fn run<T>(&self, test: impl Future<Output = T>) -> T {
        let limited = async { tokio::time::timeout(Duration::from_secs(120), test).await };
        self.runtime.block_on(limited).expect("the test's client is stuck")
    }

    pub async fn connect(&self) -> Connection {
        Connection::open(self, Some(self.ca.client())).await.unwrap()
    }
}

pub fn tpm_config(tcti: &str) -> TpmConfig {
    tpm_config_with(tcti, AkKind::EcdsaP256)
}

/// With an attestation key of this kind.
pub fn tpm_config_with(tcti: &str, ak: AkKind) -> TpmConfig {
    TpmConfig {
        tcti: tcti.to_owned(),
        pcr: 13,
        ak_handle: 0x8101_0A55,
        ak,
        ek: None,
        timeout: Duration::from_secs(30),
    }
}

/// Kernel programs that see nothing.
struct Quiet;

impl EventSource for Quiet {
    fn read(
        &mut self,
        _: usize,
        _: &mut dyn FnMut(&assay_ebpf::Record) -> Result<(), Refusal>,
    ) -> Result<usize, SourceError> {
        Ok(0)
    }

    fn lost(&mut self) -> Result<u64, SourceError> {
        Ok(0)
    }

    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// Starts to measure this very machine and returns when it is READY: a log as a host's is, with its records in the TPM. The loop goes
/// on as long as the test's TPM.
pub fn measure(tpm: &Handle, dir: &Path) {
    let settings = Settings {
        run_dir: dir.join("run"),
        log_max_bytes: 64 * 1024 * 1024,
        pcr: 13,
        boot_id: BOOT_ID.to_owned(),
        bpf_digest: Sha256Digest::of(b"no kernel programs"),
        tier: 1,
        mode: Mode::Observe,
        blind: String::new(),
        protected: false,
        fresh_hooks: true,
    };
    std::fs::create_dir(&settings.run_dir).unwrap();
    let measurer = Measurer::open(settings, Box::new(Quiet), tpm.clone()).unwrap();
    let (ready, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || measurer.run(|| ready.send(()).unwrap()));
    wait.recv_timeout(Duration::from_secs(60))
        .expect("measuring did not get ready");
}

/// Joins a state folder to a CA and its verifiers.
pub fn join_to(ca: &Ca, verifiers: &[&str], state: &Path) -> Joined {
    let verifiers = verifiers.iter().map(|url| (*url).to_owned()).collect();
    let file = JoinFile {
        version: 1,
        verifiers,
        ca_pem: ca.pem.clone(),
        list_key: Some(B64(ca.lists.public().spki())),
    };
    let path = state.join("given.json");
    std::fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
    join::join(state, &path, &Membership::read(&path).unwrap(), false).unwrap();
    Joined::load(state).unwrap().unwrap()
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Status, code and message of a refusal.
    pub fn error(&self) -> (u16, String, String) {
        let body: ErrorBody = serde_json::from_slice(&self.body).unwrap();
        (self.status, body.error.code, body.error.message)
    }
}

/// A client that writes what it is told to.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    pub exporter: Exporter,
    pub server_certificate: CertificateDer<'static>,
}

impl Connection {
    pub async fn open(host: &Host, client: Option<Client>) -> std::io::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)));
        let config = match client {
            Some(client) => config.with_client_auth_cert(client.chain, client.key).unwrap(),
            None => config.with_no_client_auth(),
        };
        let tcp = TcpStream::connect(host.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("assay-agent").unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        let tls = stream.get_ref().1;
        let exporter = Exporter::new(tls.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap());
        let server_certificate = tls.peer_certificates().unwrap()[0].clone().into_owned();
        Ok(Self {
            stream,
            exporter,
            server_certificate,
        })
    }

    pub async fn get(&mut self, path: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())
            .await
            .unwrap();
        self.receive().await.unwrap()
    }

    pub async fn post(&mut self, path: &str, body: &str) -> Answer {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.send(format!("{head}{body}").as_bytes()).await.unwrap();
        self.receive().await.unwrap()
    }

    pub async fn put(&mut self, path: &str, body: &[u8]) -> Answer {
        let head = format!(
            "PUT {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat()).await.unwrap();
        self.receive().await.unwrap()
    }

    pub async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// One answer with a content-length; an error when the connection ends first.
    pub async fn receive(&mut self) -> std::io::Result<Answer> {
        let mut bytes = Vec::new();
        let head_end = loop {
            if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => bytes.extend_from_slice(&chunk[..read]),
            }
        };
        let head = String::from_utf8(bytes[..head_end].to_vec())
            .unwrap()
            .to_ascii_lowercase();
        let length: usize = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.trim().parse().unwrap());
        let mut body = bytes.split_off(head_end);
        let have = body.len();
        body.resize(length.max(have), 0);
        self.stream.read_exact(&mut body[have..]).await?;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok(Answer { status, head, body })
    }
}

/// The pin is tested with the verifier; here any server will do, as long as it proves to have its key.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
