//! Asks the verifiers to look at this host now, rather than with their next poll.
//!
//! The agent cannot judge what it measures, and does not act on its own: it says that there is something to see. What becomes of the open
//! disks is the verifier's word, over the connection on which it looks.

use std::sync::Arc;
use std::time::Duration;

use assay_evidence::wire::{LookAnswer, LookRequest};
use rustls::ClientConfig;
use tokio::task::JoinSet;

use super::client::{self, ClientError, Connection};
use super::url::VerifierUrl;
use crate::http::chain;
use crate::join::Joined;

/// For connection and answer each: a verifier that takes longer looks with its next poll.
const LIMIT: Duration = Duration::from_secs(3);

/// Asks each verifier of this host. One that does not answer is not asked again: the next record is another reason to.
pub async fn ask(joined: &Joined) {
    let tls = match client::tls_config(joined) {
        Ok(tls) => tls,
        Err(error) => {
            tracing::warn!("no verifier can be asked for a look: {}", chain(&error));
            return;
        }
    };
    let mut asked = JoinSet::new();
    for name in joined.membership.verifiers() {
        let Ok(url) = VerifierUrl::parse(name) else { continue };
        let (name, tls) = (name.clone(), Arc::clone(&tls));
        asked.spawn(async move {
            match ask_one(&url, tls).await {
                Ok(LookAnswer { within_ms }) => tracing::debug!(name, within_ms, "the verifier was asked for a look"),
                Err(error) => tracing::debug!(name, "the verifier was asked for a look: {}", chain(&error)),
            }
        });
    }
    while asked.join_next().await.is_some() {}
}

async fn ask_one(url: &VerifierUrl, tls: Arc<ClientConfig>) -> Result<LookAnswer, ClientError> {
    let mut connection = Connection::open(url, tls, LIMIT).await?;
    connection.post("/v1/look", &LookRequest {}, LIMIT).await
}
