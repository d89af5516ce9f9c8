//! `assay-agent join`.

use std::path::Path;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::pcr::RuntimePcr;

use super::{CliError, client, say};
use crate::config::Config;
use crate::daemon::tpm_config;
use crate::join::{self, Joined, Membership, Outcome};
use crate::log_view::LogView;
use crate::tpm::{AkKind, Handle};
use crate::unlock::api::Status;

/// Joins, and prints what the verifier's operator needs next.
pub(super) fn run(config: &Config, file: &Path, force: bool) -> Result<(), CliError> {
    let membership = Membership::read(file)?;
    // Before anything is written: a host without a TPM cannot be added to any verifier.
    let keys = Keys::of(config)?;
    let ek_sha256 = keys.ek_sha256;
    let outcome = join::join(&config.state_dir, file, &membership, force)?;
    say(match outcome {
        Outcome::Joined => "joined: this host has a new TLS key",
        Outcome::Updated => "joined before: the verifiers and the key for approved lists were brought up to date",
        Outcome::Unchanged => "joined before: nothing to do",
    })?;
    say(&format!("verifiers: {}", membership.verifiers().join(", ")))?;
    if let Some(joined) = Joined::load(&config.state_dir)? {
        say(&format!("tls key:   sha256:{}", joined.spki()))?;
    }
    say(&format!("ek:        sha256:{ek_sha256} ({})", keys.ek))?;
    say(&format!("ak:        {}", keys.ak))?;
    if outcome == Outcome::Joined && force {
        say("next, here:            systemctl restart assay-agent")?;
    }
    let name = host_name();
    if let Some(notice) = keys.notice(config, &name) {
        say(&notice)?;
    }
    let port = config.listen.port();
    let pcr = match config.tpm.pcr {
        usual if usual == RuntimePcr::DEFAULT.index() => String::new(),
        other => format!(" --pcr {other}"),
    };
    say(&format!(
        "next, on the verifier: assay-verifier host add {name} {name}:{port} --ek-sha256 {ek_sha256}{pcr}"
    ))
}

/// The keys that this host is enrolled with.
struct Keys {
    ek_sha256: Sha256Digest,
    ek: String,
    ak: String,
    replaced: Option<AkKind>,
}

impl Keys {
    /// From the running agent, which owns the TPM; or from the TPM itself where none runs.
    fn of(config: &Config) -> Result<Self, CliError> {
        match client::get::<Status>(&config.socket(), "/v1/status") {
            Ok(status) => {
                return Ok(Self {
                    ek_sha256: status.ek_sha256,
                    ek: status.ek,
                    ak: status.ak,
                    replaced: None,
                });
            }
            Err(CliError::Client(error)) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
        let handle = Handle::open(tpm_config(&config.tpm), LogView::new(String::new())).map_err(CliError::Tpm)?;
        let identity = handle.identity();
        Ok(Self {
            ek_sha256: Sha256Digest::of(&identity.ek_public),
            ek: identity.ek_kind.name().to_owned(),
            ak: identity.ak_kind.name().to_owned(),
            replaced: identity.ak_replaced,
        })
    }

    /// What follows from another attestation key than before: verifiers know the former one.
    fn notice(&self, config: &Config, name: &str) -> Option<String> {
        let wanted = config.tpm.ak;
        let anew = format!("on a verifier that knows this host first run: assay-verifier host remove {name}");
        if let Some(former) = self.replaced {
            return Some(format!(
                "the attestation key was {former} and is {wanted} now: this host must be enrolled anew; {anew}"
            ));
        }
        if let Some(wanted) = config.tpm.ek.filter(|wanted| self.ek != wanted.name()) {
            return Some(format!(
                "agent.toml has [tpm] ek = \"{wanted}\", but the running agent shows another endorsement key ({}): \
                 systemctl restart assay-agent, then run join again; after that this host must be enrolled anew; {anew}",
                self.ek
            ));
        }
        (self.ak != wanted.name()).then(|| {
            format!(
                "agent.toml has [tpm] ak = \"{wanted}\", but the running agent attests with another key ({}): \
                 systemctl restart assay-agent; after that this host must be enrolled anew; {anew}",
                self.ak
            )
        })
    }
}

/// A suggestion that the operator may change.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "HOST".to_owned(),
        name => name.to_owned(),
    }
}
