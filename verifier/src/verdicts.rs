//! Verdicts for relying parties: the last one on a host as an EAT Attestation Result, signed by a key of its own.
//!
//! A verdict is only worth something while it is fresh. A result expires when three polls should have come and gone, and the time
//! that the last of them may take; from then on no result is made, until the poller has looked again.

use std::time::Duration;

use assay_evidence::ear::{EarError, Issue, Nonce};
use assay_evidence::jws::{Key, Signer};
use thiserror::Error;

use crate::config::{Config, StateDir};
use crate::signing::{self, SigningError};
use crate::store::{Standing, Store, StoreError};
use crate::time::now;

/// Program and version, as results name them.
pub const BUILD: &str = concat!("assay-verifier ", env!("CARGO_PKG_VERSION"));

/// Polls after which a verdict is stale.
const POLLS: u32 = 3;

/// Why there is no verdict to give.
#[derive(Debug, Error)]
pub enum VerdictError {
    /// No such host, or the database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Enrolled, and not looked at since.
    #[error("host {0} has not been judged yet: is `assay-verifier serve` running?")]
    NotJudged(String),
    /// The last look was long ago.
    #[error(
        "the last verdict on host {host} is {age} s old, and was good for {good} s: is `assay-verifier serve` running? (`assay-verifier host show {host}` shows the old one)"
    )]
    Stale {
        /// The host.
        host: String,
        /// Seconds since the last look.
        age: i64,
        /// Seconds that a verdict is good for.
        good: i64,
    },
    /// The result could not be signed.
    #[error("the verdict on host {0} cannot be given")]
    Sign(String, #[source] EarError),
}

/// Gives verdicts.
pub struct Verdicts {
    signer: Signer,
    good: i64,
}

/// A verdict that is fresh.
pub struct Fresh {
    host: String,
    standing: Standing,
    issued: i64,
    expires: i64,
}

impl Verdicts {
    /// Reads the key. A state directory of before there were verdicts for others gets one.
    pub fn open(state: &StateDir, config: &Config) -> Result<Self, SigningError> {
        let (signer, made) = signing::open_key(&state.verdict_key())?;
        if made {
            tracing::info!("made a key for verdicts; `assay-verifier host verdict-key` shows its public half");
        }
        let good = lifetime(config.poll_interval, config.quote_timeout);
        Ok(Self { signer, good })
    }

    /// What relying parties check by.
    #[must_use]
    pub const fn key(&self) -> &Key {
        self.signer.public()
    }

    /// The last verdict on a host, if it still stands.
    pub fn fresh(&self, store: &Store, host: &str) -> Result<Fresh, VerdictError> {
        let standing = store.standing(host)?;
        let standing = standing.ok_or_else(|| VerdictError::NotJudged(host.to_owned()))?;
        let (issued, expires) = (now(), standing.judged.saturating_add(self.good));
        // A clock that was set back since makes it stale as well: its age is not known.
        if issued >= expires || issued < standing.judged {
            return Err(VerdictError::Stale {
                host: host.to_owned(),
                age: issued.saturating_sub(standing.judged),
                good: self.good,
            });
        }
        Ok(Fresh {
            host: host.to_owned(),
            standing,
            issued,
            expires,
        })
    }

    /// A fresh verdict as a signed token.
    pub fn token(&self, fresh: &Fresh, nonce: Option<&Nonce>) -> Result<String, VerdictError> {
        let result = fresh.standing.submod.result(&fresh.issue(nonce));
        let signed = result.sign(&self.signer);
        signed.map_err(|error| VerdictError::Sign(fresh.host.clone(), error))
    }
}

impl Fresh {
    /// The claims, as they would be signed.
    pub fn to_json(&self, nonce: Option<&Nonce>) -> Result<serde_json::Value, VerdictError> {
        let result = self.standing.submod.result(&self.issue(nonce));
        serde_json::to_value(result).map_err(|error| VerdictError::Sign(self.host.clone(), EarError::Json(error)))
    }

    /// What was judged, and when.
    #[must_use]
    pub const fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Unix time from which on it does not stand any more.
    #[must_use]
    pub const fn expires(&self) -> i64 {
        self.expires
    }

    /// Seconds since the look.
    #[must_use]
    pub fn age(&self) -> u64 {
        u64::try_from(self.issued.saturating_sub(self.standing.judged)).unwrap_or(0)
    }

    fn issue<'a>(&'a self, nonce: Option<&'a Nonce>) -> Issue<'a> {
        Issue {
            host: &self.host,
            build: BUILD,
            issued: self.issued,
            expires: self.expires,
            nonce,
        }
    }
}

/// In whole seconds, at least one.
fn lifetime(poll_interval: Duration, quote_timeout: Duration) -> i64 {
    let time = poll_interval.saturating_mul(POLLS).saturating_add(quote_timeout);
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_good_for_three_polls_and_an_answer() {
        let seconds = Duration::from_secs_f64;
        assert_eq!(lifetime(seconds(10.0), seconds(30.0)), 60);
        assert_eq!(lifetime(seconds(0.05), seconds(0.1)), 1);
        assert_eq!(lifetime(Duration::MAX, Duration::MAX), i64::MAX);
    }
}
