//! Which request is answered by whom, and who may make it.

use std::sync::Arc;
use std::time::Instant;

use assay_evidence::ear::{MEDIA_TYPE, Nonce};
use assay_evidence::wire::{ChallengeRequest, LookAnswer, LookRequest, OwnVerdict, ReleaseRequest};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONNECTION, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::http::{MAX_REASONS, Refusal, content, json, read_json, shorten};
use super::{Asking, release};
use crate::store::{Host, HostState, StoreError};
use crate::verdicts::VerdictError;

/// Answers one request; a refusal is an answer, too.
pub(super) async fn answer(asking: &Asking, request: Request<Incoming>) -> Response<Full<Bytes>> {
    match route(asking, request).await {
        Ok(response) => response,
        Err(refusal) => {
            tracing::debug!("connection {}: {} {}", asking.number, refusal.code, refusal.message);
            // The body may be unread: the connection cannot go on.
            let mut response = refusal.into_response();
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
            response
        }
    }
}

async fn route(asking: &Asking, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Refusal> {
    let path = request.uri().path().to_owned();
    let post = [Method::POST];
    match path.as_str() {
        "/v1/release/challenge" if request.method() == Method::POST => {
            let host = require_host(asking).await?;
            let body: ChallengeRequest = read_json(request.into_body(), MAX_CHALLENGE).await?;
            Ok(json(StatusCode::OK, &release::challenge(asking, &host, body).await?))
        }
        "/v1/release" if request.method() == Method::POST => {
            let host = require_host(asking).await?;
            // Before the body: what is waiting here is a log in memory.
            let _turn = asking
                .service
                .judgements
                .acquire()
                .await
                .map_err(|e| Refusal::internal(&e))?;
            let body: ReleaseRequest = read_json(request.into_body(), MAX_RELEASE).await?;
            Ok(json(StatusCode::OK, &release::release(asking, host, body).await?))
        }
        "/v1/release/challenge" | "/v1/release" => Ok(wrong_method(&post)),
        "/v1/verdict" if request.method() == Method::GET => {
            let host = require_host(asking).await?;
            own_verdict(asking, host.pinned.name).await
        }
        "/v1/verdict" => Ok(wrong_method(&[Method::GET])),
        "/v1/look" if request.method() == Method::POST => {
            let host = require_host(asking).await?;
            let LookRequest {} = read_json(request.into_body(), MAX_LOOK).await?;
            let wait = asking.service.nudges.ask(host, Instant::now());
            let within_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            Ok(json(StatusCode::OK, &LookAnswer { within_ms }))
        }
        "/v1/look" => Ok(wrong_method(&post)),
        "/v1/hosts" => {
            require_operator(asking, request.method()).await?;
            let hosts = asking
                .service
                .store
                .run(|s| s.hosts())
                .await
                .map_err(|e| Refusal::internal(&e))?;
            Ok(json(
                StatusCode::OK,
                &hosts.iter().map(Host::to_json).collect::<Vec<_>>(),
            ))
        }
        "/v1/verdict-key" => {
            require_operator(asking, request.method()).await?;
            let jwk = asking.service.verdicts.key().jwk();
            Ok(content(StatusCode::OK, "application/jwk+json", jwk))
        }
        other => match other.strip_prefix("/v1/hosts/") {
            Some(rest) => {
                require_operator(asking, request.method()).await?;
                match rest.strip_suffix("/verdict") {
                    Some(name) => verdict(asking, name.to_owned(), request.uri().query()).await,
                    None => one_host(asking, rest.to_owned()).await,
                }
            }
            None => {
                known(asking).await?;
                Err(Refusal::new(
                    StatusCode::NOT_FOUND,
                    "not-found",
                    "there is nothing at this path",
                ))
            }
        },
    }
}

async fn one_host(asking: &Asking, name: String) -> Result<Response<Full<Bytes>>, Refusal> {
    let host = asking
        .service
        .store
        .run(move |s| s.host(&name))
        .await
        .map_err(no_host)?;
    Ok(json(StatusCode::OK, &host.to_json()))
}

/// The verdict on a host, signed.
async fn verdict(asking: &Asking, name: String, query: Option<&str>) -> Result<Response<Full<Bytes>>, Refusal> {
    let bad = |message: String| Refusal::new(StatusCode::BAD_REQUEST, "bad-nonce", message);
    let nonce = match query.map(|query| query.strip_prefix("nonce=")) {
        None => None,
        Some(None) => return Err(bad("the only parameter here is nonce=".to_owned())),
        Some(Some(text)) => Some(Nonce::parse(text).map_err(|e| bad(e.to_string()))?),
    };
    let verdicts = Arc::clone(&asking.service.verdicts);
    let signed = asking.service.store.run(move |store| {
        let fresh = verdicts.fresh(store, &name);
        Ok(fresh.and_then(|fresh| verdicts.token(&fresh, nonce.as_ref())))
    });
    match signed.await.map_err(|e| Refusal::internal(&e))? {
        Ok(token) => Ok(content(StatusCode::OK, MEDIA_TYPE, token)),
        Err(e) => Err(no_verdict(e)),
    }
}

/// What the last look at the asking host found; a look that was too long ago is none.
async fn own_verdict(asking: &Asking, name: String) -> Result<Response<Full<Bytes>>, Refusal> {
    let verdicts = Arc::clone(&asking.service.verdicts);
    let looked = asking.service.store.run(move |store| {
        let host = store.host(&name)?;
        Ok(verdicts.fresh(store, &name).map(|fresh| (host, fresh.age())))
    });
    let (host, age) = looked.await.map_err(no_host)?.map_err(no_verdict)?;
    let answer = OwnVerdict {
        host: host.pinned.name,
        trusted: host.state == HostState::Trusted,
        state: host.state.name().to_owned(),
        reasons: shorten(&host.reasons, MAX_REASONS),
        age_s: age,
    };
    Ok(json(StatusCode::OK, &answer))
}

fn no_verdict(error: VerdictError) -> Refusal {
    match error {
        VerdictError::Store(e) => no_host(e),
        e @ (VerdictError::NotJudged(_) | VerdictError::Stale { .. }) => {
            Refusal::new(StatusCode::CONFLICT, "no-fresh-verdict", e.to_string())
        }
        e @ VerdictError::Sign(..) => Refusal::internal(&e),
    }
}

fn no_host(error: StoreError) -> Refusal {
    match error {
        e @ StoreError::NoSuchHost(_) => Refusal::new(StatusCode::NOT_FOUND, "unknown-host", e.to_string()),
        e => Refusal::internal(&e),
    }
}

/// Who is asking.
enum Caller {
    Host(Box<Host>),
    Operator,
}

/// A host or an operator; looked up for each request, so that removing a host works at once.
async fn known(asking: &Asking) -> Result<Caller, Refusal> {
    let spki = asking.peer.spki_sha256;
    let host = asking
        .service
        .store
        .run(move |s| s.host_by_spki(&spki))
        .await
        .map_err(|e| Refusal::internal(&e))?;
    match (host, &asking.peer.not_operator) {
        (Some(host), _) => Ok(Caller::Host(Box::new(host))),
        (None, Ok(())) => Ok(Caller::Operator),
        (None, Err(why)) => {
            let key = hex::encode(spki);
            let message = format!(
                "this client's key (sha256 {key}) is neither an enrolled host's nor an operator's ({why}): enrol the host with `assay-verifier host add`"
            );
            Err(Refusal::forbidden("unknown-client", message))
        }
    }
}

async fn require_host(asking: &Asking) -> Result<Host, Refusal> {
    match known(asking).await? {
        Caller::Host(host) => Ok(*host),
        Caller::Operator => Err(Refusal::forbidden(
            "hosts-only",
            "this is for enrolled hosts only, not for operators",
        )),
    }
}

async fn require_operator(asking: &Asking, method: &Method) -> Result<(), Refusal> {
    match known(asking).await? {
        Caller::Operator if method == Method::GET => Ok(()),
        Caller::Operator => Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method-not-allowed",
            "this path wants GET",
        )),
        Caller::Host(_) => Err(Refusal::forbidden(
            "operators-only",
            "host states are shown to operators only, not to hosts",
        )),
    }
}

fn wrong_method(allowed: &[Method]) -> Response<Full<Bytes>> {
    let names = allowed.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
    let mut response = Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        format!("this path wants {names}"),
    )
    .into_response();
    if let Ok(value) = HeaderValue::from_str(&names) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

const MAX_CHALLENGE: usize = 64 * 1024;
const MAX_LOOK: usize = 1024;
const MAX_RELEASE: usize = 24 * 1024 * 1024;
