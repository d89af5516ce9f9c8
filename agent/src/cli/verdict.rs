//! `assay-agent verdict`: how this host stands, for people and for programs.

use super::{CliError, client, printable, say};
use crate::config::Config;
use crate::unlock::api::{VerdictRequest, VerdictResponse};

/// Prints the verifier's verdict on this host; not to be trusted is a failure.
pub(super) fn run(config: &Config, json: bool, timeout_s: Option<u64>) -> Result<(), CliError> {
    let request = VerdictRequest { timeout_s };
    show(client::post(&config.socket(), "/v1/verdict", &request)?, json)
}

/// The same for an answer that is there.
pub(super) fn show(answer: VerdictResponse, json: bool) -> Result<(), CliError> {
    let VerdictResponse { verifier, verdict } = answer;
    if json {
        say(&serde_json::to_string_pretty(&verdict).map_err(CliError::Json)?)?;
    }
    if !verdict.trusted {
        return Err(CliError::NotTrusted {
            host: verdict.host,
            state: verdict.state,
            verifier,
            reasons: verdict.reasons,
        });
    }
    if json {
        return Ok(());
    }
    let text = format!("host {} is trusted: {verifier}, {} s ago", verdict.host, verdict.age_s);
    say(&printable(&text))
}
