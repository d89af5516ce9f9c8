//! The local socket: status, verdict, unlock, lock, keys of VHDs and approved lists for boot hooks and operators' commands, root only.
//!
//! HTTP/1.1 with JSON, so that a hook needs no library of ours. The file's mode keeps others out, and each connection's
//! credentials are checked as well: the mode can be changed by accident.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use assay_evidence::wire::MAX_VM;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::api::{
    DISK_BUSY, KEY_REFUSED, LockRequest, LockResponse, NOT_OPEN, Status, UnlockRequest, UnlockResponse,
    VERIFIER_UNREACHABLE, VerdictRequest, VhdKeyRequest,
};
use super::luks::DiskError;
use super::machine::Refusal;
use super::{UnlockError, Unlocker};
use crate::approved::ApprovedStore;
use crate::http::{self, ApiError, Response, chain};

/// Hooks of so many machines that start at once are served; more wait. Each of them waits for its turn at the TPM, and must not keep
/// others from asking for the status.
const MAX_CONNECTIONS: usize = 192;
const HEADER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
const TIMEOUT_RANGE: std::ops::RangeInclusive<u64> = 1..=3600;

/// Gives the daemon's state at the moment of the call.
pub type StatusSource = Arc<dyn Fn() -> Status + Send + Sync>;

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon answers on it.
    #[error("another assay-agent serves {0} already: stop it first")]
    InUse(PathBuf),
    /// It cannot be made.
    #[error("cannot make the socket {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It can no longer accept.
    #[error("the local socket failed")]
    Accept(#[source] io::Error),
}

/// The bound socket. Its file goes away with it.
pub struct SocketServer {
    listener: UnixListener,
    path: PathBuf,
    app: Arc<App>,
}

struct App {
    unlocker: Unlocker,
    approved: ApprovedStore,
    status: StatusSource,
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        // A left-over is replaced at the next start anyway.
        drop(fs::remove_file(&self.path));
    }
}

impl SocketServer {
    /// Binds the socket, in a folder that exists. A left-over of a daemon that was killed is replaced.
    ///
    /// # Errors
    /// [`SocketError::InUse`] when a daemon still answers on it, [`SocketError::Bind`].
    pub async fn bind(
        path: &Path,
        unlocker: Unlocker,
        approved: ApprovedStore,
        status: StatusSource,
    ) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Bind {
            path: path.to_owned(),
            source,
        };
        match UnixStream::connect(path).await {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => fs::remove_file(path).map_err(failed)?,
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            app: Arc::new(App {
                unlocker,
                approved,
                status,
            }),
        })
    }

    /// Serves until accepting fails for good.
    ///
    /// # Errors
    /// [`SocketError::Accept`]; the daemon should end then.
    pub async fn run(self) -> Result<std::convert::Infallible, SocketError> {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Never closed, so never an error; and then there is no limit to keep.
            let slot = Arc::clone(&slots).acquire_owned().await.ok();
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => match http::accept_trouble(&error) {
                    Some(pause) => {
                        tracing::warn!("accepting on the local socket failed, trying again: {error}");
                        tokio::time::sleep(pause).await;
                        continue;
                    }
                    None => return Err(SocketError::Accept(error)),
                },
            };
            if !allowed(&stream) {
                tracing::warn!("a process of another user than root was turned away from the local socket");
                continue;
            }
            let app = Arc::clone(&self.app);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let app = Arc::clone(&app);
                    async move { Ok::<_, std::convert::Infallible>(app.answer(request).await) }
                });
                let served = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!("local connection: {error}");
                }
                drop(slot);
            });
        }
    }
}

impl App {
    async fn answer(&self, request: Request<Incoming>) -> Response {
        let path = request.uri().path().to_owned();
        let wanted = match path.as_str() {
            "/v1/status" => Method::GET,
            "/v1/unlock" | "/v1/lock" | "/v1/vhd-key" | "/v1/verdict" => Method::POST,
            "/v1/approved" => Method::PUT,
            _ => return ApiError::not_found(&path).into_response(),
        };
        if request.method() != wanted {
            return http::method_not_allowed(&path, &wanted);
        }
        let answer = match path.as_str() {
            "/v1/status" => Ok(http::ok(&(self.status)())),
            "/v1/unlock" => self.unlock(request).await,
            "/v1/vhd-key" => self.vhd_key(request).await,
            "/v1/verdict" => self.verdict(request).await,
            "/v1/approved" => self.approved.receive(request).await,
            _ => self.lock(request).await,
        };
        answer.unwrap_or_else(ApiError::into_response)
    }

    async fn unlock(&self, request: Request<Incoming>) -> Result<Response, ApiError> {
        let request: UnlockRequest = http::read_json(request).await?;
        check_timeout(request.timeout_s)?;
        if request.vm.as_ref().is_some_and(|vm| vm.chars().count() > MAX_VM) {
            return Err(ApiError::bad_request(
                "bad-vm",
                format!("vm may have {MAX_VM} characters"),
            ));
        }
        let image = request.image.clone();
        // A task of its own: a hook that is killed must not leave an exchange half done.
        let (unlocker, request) = (self.unlocker.clone(), request);
        let done = tokio::spawn(async move { unlocker.unlock(request).await }).await;
        match done {
            Ok(Ok(device)) => Ok(http::ok(&UnlockResponse { device })),
            Ok(Err(error)) => {
                tracing::warn!(image = %image.display(), "unlock failed: {}", chain(&error));
                Err(error.into())
            }
            Err(error) => Err(ApiError::failed("unlock-failed", &error, false)),
        }
    }

    async fn vhd_key(&self, request: Request<Incoming>) -> Result<Response, ApiError> {
        let request: VhdKeyRequest = http::read_json(request).await?;
        check_timeout(request.timeout_s)?;
        let vdi = request.vdi_uuid;
        // As an unlock: whoever asks may be gone before the exchange is over.
        let unlocker = self.unlocker.clone();
        match tokio::spawn(async move { unlocker.vhd_key(request).await }).await {
            Ok(Ok(key)) => Ok(http::ok_secret(key)),
            Ok(Err(error)) => {
                tracing::warn!(%vdi, "no key for a VHD: {}", chain(&error));
                Err(error.into())
            }
            Err(error) => Err(ApiError::failed("key-failed", &error, false)),
        }
    }

    async fn verdict(&self, request: Request<Incoming>) -> Result<Response, ApiError> {
        let request: VerdictRequest = http::read_json(request).await?;
        check_timeout(request.timeout_s)?;
        Ok(http::ok(&self.unlocker.verdict(request).await?))
    }

    async fn lock(&self, request: Request<Incoming>) -> Result<Response, ApiError> {
        let LockRequest { name } = http::read_json(request).await?;
        self.unlocker.lock(name.clone()).await?;
        Ok(http::ok(&LockResponse { name }))
    }
}

fn check_timeout(seconds: Option<u64>) -> Result<(), ApiError> {
    if seconds.is_none_or(|seconds| TIMEOUT_RANGE.contains(&seconds)) {
        Ok(())
    } else {
        let message = "timeout_s must be between 1 and 3600 seconds";
        Err(ApiError::bad_request("bad-timeout", message))
    }
}

/// Root, or the user that the daemon itself runs as.
fn allowed(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

impl From<UnlockError> for ApiError {
    fn from(error: UnlockError) -> Self {
        let (status, code) = match &error {
            UnlockError::NotJoined => (StatusCode::CONFLICT, "not-joined"),
            UnlockError::Join(_) | UnlockError::Tls(_) => (StatusCode::INTERNAL_SERVER_ERROR, "join-damaged"),
            UnlockError::Disk(error) => disk_code(error),
            UnlockError::Foreign { .. } => (StatusCode::BAD_REQUEST, "foreign-verifier"),
            UnlockError::Tpm(_) => (StatusCode::INTERNAL_SERVER_ERROR, "tpm-failed"),
            UnlockError::Evidence(_) => (StatusCode::INTERNAL_SERVER_ERROR, "no-evidence"),
            UnlockError::UnderWay { .. } => (StatusCode::CONFLICT, "already-open"),
            UnlockError::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            UnlockError::RelativePath(_) => (StatusCode::BAD_REQUEST, "relative-path"),
            UnlockError::NotAKey(_) | UnlockError::OtherKey { .. } | UnlockError::OtherHash { .. } => {
                (StatusCode::BAD_GATEWAY, "not-a-key")
            }
            UnlockError::Refused(refusal) => match refusal {
                Refusal::Unreachable { .. } => (StatusCode::GATEWAY_TIMEOUT, VERIFIER_UNREACHABLE),
                Refusal::Refused { .. } => (StatusCode::FORBIDDEN, KEY_REFUSED),
                Refusal::KeyUnknown { .. } => (StatusCode::NOT_FOUND, "key-unknown"),
                Refusal::StateKeepsChanging { .. } => (StatusCode::SERVICE_UNAVAILABLE, "state-keeps-changing"),
            },
        };
        let mut answer = Self::new(status, code, chain(&error));
        if let UnlockError::Refused(Refusal::Refused { reasons, .. }) = error {
            answer.reasons = reasons;
        }
        answer
    }
}

fn disk_code(error: &DiskError) -> (StatusCode, &'static str) {
    match error {
        DiskError::Open { .. } => (StatusCode::BAD_REQUEST, "image-unreadable"),
        DiskError::NotLuks { .. } => (StatusCode::BAD_REQUEST, "not-luks"),
        DiskError::Header { .. }
        | DiskError::Luks1 { .. }
        | DiskError::Qcow2 { .. }
        | DiskError::Fingerprint { .. } => (StatusCode::BAD_REQUEST, "header-unreadable"),
        DiskError::NotEncrypted { .. } => (StatusCode::BAD_REQUEST, "not-luks"),
        DiskError::NotAlone { .. } => (StatusCode::BAD_REQUEST, "not-alone"),
        DiskError::NameNotText { .. } => (StatusCode::BAD_REQUEST, "image-unreadable"),
        DiskError::NoDevice { .. } => (StatusCode::CONFLICT, "no-device"),
        DiskError::Cipher { .. } => (StatusCode::BAD_REQUEST, "cipher-refused"),
        DiskError::Cost { .. } => (StatusCode::BAD_REQUEST, "cost-refused"),
        DiskError::Changed { .. } => (StatusCode::CONFLICT, "header-changed"),
        DiskError::Token { .. } => (StatusCode::BAD_REQUEST, "token-refused"),
        DiskError::Sidecar { .. } => (StatusCode::BAD_REQUEST, "no-sidecar"),
        DiskError::AlreadyOpen { .. } => (StatusCode::CONFLICT, "already-open"),
        DiskError::NameTaken { .. } => (StatusCode::CONFLICT, "name-taken"),
        DiskError::BadName { .. } => (StatusCode::BAD_REQUEST, "bad-name"),
        DiskError::NotOpen { .. } => (StatusCode::NOT_FOUND, NOT_OPEN),
        DiskError::NotOurs { .. } => (StatusCode::FORBIDDEN, "not-ours"),
        DiskError::Busy { .. } => (StatusCode::CONFLICT, DISK_BUSY),
        DiskError::WrongKey { .. } => (StatusCode::CONFLICT, "wrong-key"),
        DiskError::Activate { .. }
        | DiskError::Copy { .. }
        | DiskError::Deactivate { .. }
        | DiskError::Suspend { .. }
        | DiskError::Device { .. }
        | DiskError::Program { .. }
        | DiskError::Said { .. }
        | DiskError::StillThere { .. }
        | DiskError::Processes { .. }
        | DiskError::Stopped => (StatusCode::INTERNAL_SERVER_ERROR, "disk-failed"),
    }
}

impl From<DiskError> for ApiError {
    fn from(error: DiskError) -> Self {
        let (status, code) = disk_code(&error);
        Self::new(status, code, chain(&error))
    }
}
