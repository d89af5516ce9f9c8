//! How this host stands with its verifier: for hooks that refuse a start before anything is opened.
//!
//! The first verifier that answers decides, whatever the others would say, as with keys. A verdict is the verifier's last look, not a new
//! one; a key is never released on it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use assay_evidence::wire::OwnVerdict;
use hyper::StatusCode;
use rustls::ClientConfig;

use super::UnlockError;
use super::api::VerdictResponse;
use super::client::{self, ClientError, Connection};
use super::machine::Refusal;
use super::turns::{HANDSHAKE, share};
use super::url::VerifierUrl;
use crate::http::chain;
use crate::join::{JoinError, Joined};

/// The verifier looks it up, and is quick about it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Asks the verifiers in turn until one answers, or `within` has passed.
///
/// # Errors
/// [`UnlockError::Refused`] when none answers, or one answers that it has no verdict; [`UnlockError::Tls`] and
/// [`UnlockError::Join`] when what the join left cannot be used.
pub async fn ask(joined: &Joined, within: Duration) -> Result<VerdictResponse, UnlockError> {
    let tls = client::tls_config(joined).map_err(UnlockError::Tls)?;
    let start = Instant::now();
    let mut pause = FIRST_WAIT;
    loop {
        let mut attempts = Vec::new();
        let verifiers = joined.membership.verifiers();
        for (place, name) in verifiers.iter().enumerate() {
            let left = within.saturating_sub(start.elapsed());
            let left = share(left, place, verifiers.len(), HANDSHAKE);
            match ask_one(name, Arc::clone(&tls), left).await? {
                Ok(verdict) => {
                    return Ok(VerdictResponse {
                        verifier: name.clone(),
                        verdict,
                    });
                }
                Err(why) => attempts.push(format!("{name}: {}", chain(&why))),
            }
        }
        let left = within.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(Refusal::Unreachable { within, attempts }.into());
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = pause.saturating_mul(2).min(LONGEST_WAIT);
    }
}

/// The inner error is one that another try, or another verifier, may not have.
async fn ask_one(
    name: &str,
    tls: Arc<ClientConfig>,
    left: Duration,
) -> Result<Result<OwnVerdict, ClientError>, UnlockError> {
    let url = VerifierUrl::parse(name).map_err(|source| JoinError::VerifierUrl {
        path: "join.json".into(),
        source,
    })?;
    let answer = match Connection::open(&url, tls, left).await {
        Ok(mut connection) => connection.get("/v1/verdict", ANSWER_TIMEOUT.min(left)).await,
        Err(error) => Err(error),
    };
    match answer {
        Err(ClientError::Status {
            status,
            message,
            reasons,
            ..
        }) if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
            Err(Refusal::Refused { message, reasons }.into())
        }
        answer => Ok(answer),
    }
}
