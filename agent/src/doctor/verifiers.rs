//! Whom this host answers to, whether they can be reached, and whether both clocks agree.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use assay_evidence::wire::OwnVerdict;
use rustls::ClientConfig;

use super::Finding;
use crate::config::Config;
use crate::http::chain;
use crate::join::Joined;
use crate::unlock::client::{self, ClientError, Connection};
use crate::unlock::url::VerifierUrl;

const CHECK: &str = "verifier";
/// For each verifier: connecting, and its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Leases and the terms of keys are told by the clock; certificates begin with it. More than this is no longer the network.
const CLOCKS_DIFFER: Duration = Duration::from_secs(30);

/// The join, and every verifier of it.
pub(super) fn check(config: &Config) -> Vec<Finding> {
    let joined = match Joined::load(&config.state_dir) {
        Ok(Some(joined)) => joined,
        Ok(None) => {
            let remedy =
                "make a join file on the verifier (`assay-verifier init` wrote one), then `assay-agent join FILE`";
            return vec![Finding::bad(
                "joined",
                "this host has joined no verifier, so nobody judges it",
                remedy,
            )];
        }
        Err(error) => return vec![Finding::error("joined", &error)],
    };
    let names = joined.membership.verifiers();
    let mut findings = vec![Finding::good("joined", names.join(", "))];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.map_err(|error| error.to_string()).and_then(|runtime| {
        let tls = client::tls_config(&joined).map_err(|error| chain(&error))?;
        Ok(runtime.block_on(ask_all(names, &tls)))
    });
    match asked {
        Ok(answers) => findings.extend(answers),
        Err(why) => findings.push(Finding::bad(
            CHECK,
            why,
            "run `assay-agent join FILE --force` with a new join file",
        )),
    }
    findings
}

async fn ask_all(names: &[String], tls: &Arc<ClientConfig>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in names {
        let mut date = None;
        let answer = ask(name, Arc::clone(tls), &mut date).await;
        findings.push(told(name, answer));
        findings.extend(date.map(|date| clock(name, date, SystemTime::now())));
    }
    findings
}

async fn ask(
    name: &str,
    tls: Arc<ClientConfig>,
    date: &mut Option<SystemTime>,
) -> Result<OwnVerdict, Box<dyn std::error::Error>> {
    let url = VerifierUrl::parse(name)?;
    let mut connection = Connection::open(&url, tls, PATIENCE).await?;
    let answer = connection.get("/v1/verdict", PATIENCE).await;
    *date = connection.date();
    Ok(answer?)
}

fn told(name: &str, answer: Result<OwnVerdict, Box<dyn std::error::Error>>) -> Finding {
    let error = match answer {
        Ok(verdict) if verdict.trusted => {
            return Finding::good(
                CHECK,
                format!("{name} answers, and trusts this host as {}", verdict.host),
            );
        }
        Ok(verdict) => {
            let reasons = verdict.reasons.join("; ");
            let found = format!("{name} answers; host {} is {}: {reasons}", verdict.host, verdict.state);
            let remedy = format!("`assay-verifier host show {}` there has all of it", verdict.host);
            return Finding::bad(CHECK, found, remedy);
        }
        Err(error) => error,
    };
    let found = format!("{name}: {}", chain(error.as_ref()));
    let remedy = match error.downcast_ref::<ClientError>() {
        Some(ClientError::Connect(_) | ClientError::Timeout(_)) => {
            "is it running, and does the way there let TCP through? A certificate that is not valid yet, or no more, may be the clock's fault"
        }
        Some(ClientError::Status { .. } | ClientError::Broken(_)) => {
            "it answers, but does not know this host: `assay-verifier host add` there"
        }
        _ => "run `assay-agent join FILE --force` with a new join file",
    };
    Finding::bad(CHECK, found, remedy)
}

fn clock(name: &str, theirs: SystemTime, ours: SystemTime) -> Finding {
    let apart = ours.duration_since(theirs).unwrap_or_else(|error| error.duration());
    let found = format!("{} s from that of {name}", apart.as_secs());
    if apart <= CLOCKS_DIFFER {
        Finding::good("clock", found)
    } else {
        Finding::weak("clock", found, "have both synchronised (chrony, systemd-timesyncd)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn clocks_may_be_apart_in_both_directions() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        for (seconds, state) in [
            (0, State::Good),
            (30, State::Good),
            (31, State::Weak),
            (1 << 30, State::Weak),
        ] {
            let apart = Duration::from_secs(seconds);
            assert_eq!(clock("v", now + apart, now).state, state, "{seconds} behind");
            assert_eq!(clock("v", now, now + apart).state, state, "{seconds} ahead");
        }
    }

    #[test]
    fn whoever_cannot_be_reached_is_named() {
        let refused = ClientError::Connect(std::io::ErrorKind::ConnectionRefused.into());
        let finding = told("https://v:1", Err(refused.into()));
        assert_eq!(finding.state, State::Bad);
        assert!(
            finding
                .found
                .contains("https://v:1: cannot connect: connection refused"),
            "{finding:?}"
        );
    }
}
