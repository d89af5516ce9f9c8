//! Whoever holds the keys, for the tests of unlocking: TLS, a challenge, and the judgement of `assay-evidence`.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use assay_evidence::binding::{Binding, EXPORTER_LABEL, Exporter, Nonce};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::policy::Policy;
use assay_evidence::release::{Secret, check_release_key, release};
use assay_evidence::replay::HeldLog;
use assay_evidence::terms::OnLoss;
use assay_evidence::tpm::{AttestationKey, EccPoint, Parameters, Public};
use assay_evidence::wire::{ChallengeRequest, ChallengeResponse, ErrorBody, Lease, ReleaseRequest, ReleaseResponse};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rcgen::ExtendedKeyUsagePurpose;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::verifier::{Ca, Client};

pub const PASSPHRASE: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
pub const KEY_ID: &str = "0d4c1f6e-7f0a-4f5e-9c53-2a6d6a0f9e11";
pub const DISK: &str = "6f9619ff-8b86-4011-b42d-00cf4fc964ff";

const LEASE: Lease = Lease {
    seconds: Some(60),
    on_loss: OnLoss::Wipe,
};

/// How a broker takes requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// As a real one does, with the policy "as this host is now".
    Judge,
    /// The host is not trusted.
    Refuse,
    /// It has no such key.
    NoSuchKey,
    /// It answers with another key.
    OtherKey,
    /// It has something else under the key's id, and gives it for a minute.
    WrongSecret,
    /// It gives its challenge at once, and all else when nobody waits for it any more.
    SlowToRelease,
    /// It takes connections, and answers too late.
    SlowToChallenge,
}

/// Longer than anybody here waits.
const LATE: Duration = Duration::from_secs(60);

pub struct Broker {
    ca: Arc<Ca>,
    port: u16,
    inner: Arc<Inner>,
    runtime: Option<tokio::runtime::Runtime>,
}

struct Inner {
    mood: Mood,
    ak: Mutex<Option<AttestationKey>>,
    asked: AtomicUsize,
    released: AtomicUsize,
}

impl Broker {
    pub fn start(mood: Mood) -> Self {
        Self::start_under(mood, Arc::new(Ca::new("verifier")))
    }

    /// With a certificate of this CA.
    pub fn start_under(mood: Mood, ca: Arc<Ca>) -> Self {
        let Client { chain, key } = ca.issue(|parameters| {
            parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            parameters.subject_alt_names = vec![rcgen::SanType::IpAddress([127, 0, 0, 1].into())];
        });
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let inner = Arc::new(Inner {
            mood,
            ak: Mutex::default(),
            asked: AtomicUsize::new(0),
            released: AtomicUsize::new(0),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(serve(listener, TlsAcceptor::from(Arc::new(config)), Arc::clone(&inner)));
        Self {
            ca,
            port,
            inner,
            runtime: Some(runtime),
        }
    }

    pub fn ca(&self) -> Arc<Ca> {
        Arc::clone(&self.ca)
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub fn enrol(&self, ak_public: &[u8]) {
        *self.inner.ak.lock().unwrap() = Some(AttestationKey::new(ak_public).unwrap());
    }

    pub fn asked(&self) -> usize {
        self.inner.asked.load(Ordering::SeqCst)
    }

    pub fn released(&self) -> usize {
        self.inner.released.load(Ordering::SeqCst)
    }

    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, inner: Arc<Inner>) {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        let Ok(stream) = acceptor.accept(tcp).await else {
            continue;
        };
        let exporter = stream
            .get_ref()
            .1
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .unwrap();
        let (exporter, inner) = (Exporter::new(exporter), Arc::clone(&inner));
        let served = AtomicU8::new(0);
        let service = service_fn(move |request: Request<Incoming>| {
            // Challenge and release come in turn; each pair has a nonce of its own.
            let (inner, turn) = (Arc::clone(&inner), served.fetch_add(1, Ordering::SeqCst) / 2);
            let nonce = Nonce::new([turn; 32]);
            async move {
                inner.asked.fetch_add(1, Ordering::SeqCst);
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                match inner.mood {
                    Mood::SlowToChallenge => tokio::time::sleep(LATE).await,
                    Mood::SlowToRelease if path == "/v1/release" => tokio::time::sleep(LATE).await,
                    _ => {}
                }
                Ok::<_, Infallible>(inner.answer(&path, &body, nonce, exporter))
            }
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

impl Inner {
    fn answer(&self, path: &str, body: &[u8], nonce: Nonce, exporter: Exporter) -> Response<Full<Bytes>> {
        if path == "/v1/release/challenge" {
            let request: ChallengeRequest = serde_json::from_slice(body).unwrap();
            assert_eq!(
                (request.key_id.as_str(), request.disk_uuid.to_string().as_str()),
                (KEY_ID, DISK)
            );
            return match self.mood {
                Mood::NoSuchKey => json(404, &ErrorBody::new("unknown-key", format!("there is no key {KEY_ID}"))),
                _ => json(
                    200,
                    &ChallengeResponse {
                        nonce,
                        log_from: 0,
                        expires_in_s: 30,
                    },
                ),
            };
        }
        assert_eq!(path, "/v1/release");
        if self.mood == Mood::Refuse {
            let mut body = ErrorBody::new("untrusted", "host h does not meet policy default");
            body.reasons = vec!["program /root/rogue is not approved".to_owned()];
            return json(403, &body);
        }
        let request: ReleaseRequest = serde_json::from_slice(body).unwrap();
        let ak = self.ak.lock().unwrap().clone().unwrap();
        let key_name = Public::parse(&request.release_key.public.0).unwrap().name();
        let disk = *request.disk_uuid.as_bytes();
        let binding = Binding::Release {
            nonce: &nonce,
            exporter: &exporter,
            key_name: &key_name,
            disk,
            key_id: &request.key_id,
        };
        let log = request
            .bundle
            .verify(&ak, &binding, &HeldLog::none())
            .unwrap()
            .replay(RuntimePcr::DEFAULT)
            .unwrap();
        let target = check_release_key(&log, &ak, &binding, &request.release_key).unwrap();
        let appraisal = log.appraise(&Policy::capture("default", "first", &log).unwrap(), 0);
        let (secret, lease) = match self.mood {
            Mood::WrongSecret => ([b'f'; 64].to_vec(), Some(LEASE)),
            _ => (PASSPHRASE.as_bytes().to_vec(), None),
        };
        let secret = Secret::new(secret);
        let jwe = match self.mood {
            Mood::OtherKey => {
                let public = Public::parse(&request.release_key.public.0).unwrap();
                assay_evidence::jwe::wrap(
                    &release_point(&public),
                    "00000000-0000-4000-8000-000000000000",
                    PASSPHRASE.as_bytes(),
                )
                .unwrap()
            }
            _ => release(&appraisal, &target, &request.key_id, &secret).unwrap(),
        };
        self.released.fetch_add(1, Ordering::SeqCst);
        json(200, &ReleaseResponse { jwe, lease })
    }
}

fn release_point(public: &Public) -> EccPoint {
    match public.parameters() {
        Parameters::P256 { point, .. } => *point,
        other => panic!("not an ECC key: {other:?}"),
    }
}

fn json<T: Serialize>(status: u16, body: &T) -> Response<Full<Bytes>> {
    let body = Full::new(Bytes::from(serde_json::to_vec(body).unwrap()));
    Response::builder().status(status).body(body).unwrap()
}
