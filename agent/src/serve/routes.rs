//! The questions and their answers.

use assay_evidence::binding::{Binding, Exporter};
use assay_evidence::wire::{
    ActivateRequest, ActivateResponse, B64, Identity, LeaseAnswer, LeaseNews, LogPage, QuoteRequest,
};
use hyper::body::{Body, Bytes};
use hyper::{Method, Request, StatusCode};
use tokio::sync::Semaphore;

use crate::approved::ApprovedStore;
use crate::bundle::{Source, SourceError};
use crate::http::{self, ApiError, Response, chain, read_json};
use crate::leases::{Leases, boot_seconds};
use crate::log_view::LogViewError;
use crate::tpm::{Handle, TpmError};

/// Most bytes of log in one page.
const MAX_PAGE: u64 = 1024 * 1024;
/// A bundle with less log than this is put together where it is asked for; more would keep the others waiting.
const SMALL: u64 = 64 * 1024;
/// Large answers in memory at once.
const MAX_LARGE: usize = 2;
/// A credential's parts are a few hundred bytes (TPM 2.0 part 2: TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET).
const MAX_CREDENTIAL: usize = 2048;

pub(super) struct Routes {
    tpm: Handle,
    source: Source,
    approved: ApprovedStore,
    identity: Identity,
    large: Semaphore,
    lists: Semaphore,
    pub(super) leases: Option<Leases>,
}

impl Routes {
    pub(super) fn new(tpm: Handle, source: Source, approved: ApprovedStore) -> Self {
        let known = tpm.identity();
        let identity = Identity {
            version: 1,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: source.log().boot_id().to_owned(),
            ek_public: B64(known.ek_public.clone()),
            ek_certificate: known.ek_certificate.clone().map(B64),
            ak_public: B64(known.ak_public.clone()),
            tpm_manufacturer: known.manufacturer.clone(),
            tpm_firmware: known.firmware.clone(),
            approved: None,
        };
        Self {
            tpm,
            source,
            approved,
            identity,
            large: Semaphore::new(MAX_LARGE),
            lists: Semaphore::new(1),
            leases: None,
        }
    }

    pub(super) async fn answer<B>(&self, request: Request<B>, exporter: Exporter) -> Response
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path();
        let wanted = match path {
            "/v1/identity" | "/v1/log" => Method::GET,
            "/v1/activate" | "/v1/quote" | "/v1/leases" => Method::POST,
            "/v1/approved" => Method::PUT,
            _ => return ApiError::not_found(path).into_response(),
        };
        if request.method() != wanted {
            return http::method_not_allowed(path, &wanted);
        }
        let answer = match path {
            "/v1/identity" => Ok(self.identity()),
            "/v1/approved" => self.approve(request).await,
            "/v1/log" => self.log(request.uri().query()).await,
            "/v1/leases" => self.leases(request).await,
            "/v1/quote" => self.quote(request, exporter).await,
            _ => self.activate(request).await,
        };
        answer.unwrap_or_else(|error| {
            if error.status.is_server_error() {
                tracing::warn!("a verifier's question failed: {error}");
            } else {
                tracing::debug!("a verifier's question was refused: {error}");
            }
            error.into_response()
        })
    }

    /// Never asks the TPM: all of it is known since the start, but for the approved list.
    fn identity(&self) -> Response {
        let mut identity = self.identity.clone();
        identity.approved = self.approved.status();
        http::ok(&identity)
    }

    /// Takes an approved list. It is checked by its own signature: that a verifier brings it says nothing.
    async fn approve<B>(&self, request: Request<B>) -> Result<Response, ApiError>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        // One at a time, for the memory that the largest one takes.
        let turn = self.lists.acquire().await;
        let answer = self.approved.receive(request).await;
        drop(turn);
        answer
    }

    /// What becomes of the keys of open disks. That it is a verifier who says so, the connection shows.
    async fn leases<B>(&self, request: Request<B>) -> Result<Response, ApiError>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let news: LeaseNews = read_json(request).await?;
        let held = self.leases.as_ref().map(|leases| leases.tell(&news, boot_seconds()));
        Ok(http::ok(&held.unwrap_or(LeaseAnswer { held: Vec::new() })))
    }

    async fn activate<B>(&self, request: Request<B>) -> Result<Response, ApiError>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let ActivateRequest {
            credential_blob,
            secret,
        } = read_json(request).await?;
        if credential_blob.0.len() > MAX_CREDENTIAL || secret.0.len() > MAX_CREDENTIAL {
            let message = format!("credential_blob and secret may have {MAX_CREDENTIAL} bytes each");
            return Err(ApiError::bad_request("credential-too-long", message));
        }
        match self.tpm.activate(credential_blob.0, secret.0).await {
            Ok(opened) => Ok(http::ok(&ActivateResponse {
                secret: B64(opened.to_vec()),
            })),
            // A credential for another TPM is the asker's mistake (or this host's swapped TPM), not a failure here.
            Err(error @ TpmError::Refused { .. }) => Err(ApiError::bad_request("credential-refused", chain(&error))),
            Err(error) => Err(error.into()),
        }
    }

    async fn quote<B>(&self, request: Request<B>, exporter: Exporter) -> Result<Response, ApiError>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let QuoteRequest {
            nonce,
            log_from,
            boot_log,
        } = read_json(request).await?;
        let digest = move |log: &crate::log_view::Snapshot| {
            Binding::Quote {
                nonce: &nonce,
                exporter: &exporter,
            }
            .digest(log.records, &log.head)
        };
        let quote = self.tpm.quote(digest).await?;
        let bytes = self
            .source
            .log()
            .length(Source::start(&quote, log_from), quote.log.records)?;
        let source = self.source.clone();
        let make = move || -> Result<Bytes, ApiError> {
            let bundle = source.bundle(quote, log_from, boot_log)?;
            bundle
                .to_json()
                .map(Bytes::from)
                .map_err(|error| ApiError::failed("no-bundle", &error, false))
        };
        if bytes <= SMALL {
            return make().map(http::ok_bytes);
        }
        self.large(make).await
    }

    async fn log(&self, query: Option<&str>) -> Result<Response, ApiError> {
        let from = parse_from(query)?;
        let log = self.source.log().clone();
        self.large(move || {
            let page = log.page(from, MAX_PAGE)?;
            let page = LogPage {
                from: page.from,
                count: page.count,
                data: B64(page.data),
            };
            serde_json::to_vec(&page)
                .map(Bytes::from)
                .map_err(|error| ApiError::failed("no-page", &error, false))
        })
        .await
    }

    /// Makes a large answer off the async thread, a few at a time: memory is the limit, not time.
    async fn large(
        &self,
        make: impl FnOnce() -> Result<Bytes, ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let permit = self.large.acquire().await;
        let made = tokio::task::spawn_blocking(make).await;
        drop(permit);
        made.map_err(|error| ApiError::failed("worker-failed", &error, true))?
            .map(http::ok_bytes)
    }
}

/// `from=N`, once and nothing else: a number that is not one is an error, never "from the start".
fn parse_from(query: Option<&str>) -> Result<u64, ApiError> {
    let refuse = |what: &str| {
        let shown: String = query.unwrap_or("").chars().take(100).collect();
        ApiError::bad_request(
            "bad-from",
            format!("{what}: {shown:?}; ask for /v1/log?from=N with N a record number"),
        )
    };
    let mut from = None;
    for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("from", number)) if from.is_none() => {
                // `parse` alone would take a leading plus sign.
                let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
                from = Some(
                    number
                        .parse()
                        .ok()
                        .filter(|_| digits)
                        .ok_or_else(|| refuse("from is not a number"))?,
                );
            }
            Some(("from", _)) => return Err(refuse("from is given twice")),
            _ => return Err(refuse("the query has something that is not from=")),
        }
    }
    from.ok_or_else(|| refuse("from is missing"))
}

impl From<TpmError> for ApiError {
    fn from(error: TpmError) -> Self {
        let transient = error.is_transient();
        Self::failed(if transient { "tpm-busy" } else { "tpm-failed" }, &error, transient)
    }
}

impl From<LogViewError> for ApiError {
    fn from(error: LogViewError) -> Self {
        match &error {
            LogViewError::OutOfRange { .. } => {
                Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "no-such-record", chain(&error))
            }
            LogViewError::Read(_) => Self::failed("log-unreadable", &error, false),
        }
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Log(error) => error.into(),
            SourceError::LogTooLong { .. } => Self::new(StatusCode::CONFLICT, "log-too-long", chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_is_a_number_given_once() {
        assert_eq!(parse_from(Some("from=0")).unwrap(), 0);
        assert_eq!(parse_from(Some("from=18446744073709551615")).unwrap(), u64::MAX);
        for query in [
            None,
            Some(""),
            Some("from"),
            Some("from="),
            Some("from=x"),
            Some("from=-1"),
            Some("from=+1"),
            Some("from=1.5"),
            Some("from=0x10"),
            Some("from=18446744073709551616"),
            Some("from=1&from=2"),
            Some("from=1&to=2"),
        ] {
            let error = parse_from(query).unwrap_err();
            assert_eq!(
                (error.status, error.code),
                (StatusCode::BAD_REQUEST, "bad-from"),
                "{query:?}"
            );
        }
    }
}
