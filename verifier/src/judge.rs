//! From a host's answer to a verdict. The judging is all `assay-evidence`'s; here is what it needs: the question that
//! was asked, the connection it was asked on, what is held of the host, and the policy.

use std::time::{Duration, Instant};

use assay_evidence::appraise::Appraisal;
use assay_evidence::binding::{Binding, Exporter, Nonce};
use assay_evidence::bundle::Bundle;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::ear::Submod;
use assay_evidence::policy::Policy;
use assay_evidence::quote::{Judged, MAX_WHOLE_LOG, QuoteError, VerifiedQuote};
use assay_evidence::replay::{HeldLog, ReplayError, ReplayedLog};
use assay_evidence::tpm::{AkError, Attest, AttestationKey, Parameters, Public, TpmError};
use assay_evidence::wire::{B64, Identity, ListStatus, QuoteRequest};
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;

use crate::cli::chain;
use crate::client::{Agent, ClientError};
use crate::keystore::KeyInfo;
use crate::serve::shorten;
use crate::store::{Host, HostState, Quoted, Verdict};
use crate::time::unix_now;

/// Why looking at a host gave no log that can be appraised.
#[derive(Debug, Error)]
pub enum LookError {
    /// The agent could not be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No random numbers.
    #[error("the system gives no random numbers for a nonce")]
    Random,
    /// The answer took longer than a nonce lives.
    #[error("the quote took longer than {} s", NONCE_LIFETIME.as_secs())]
    Late,
    /// A page of the log is not what was asked for.
    #[error("the agent's log page is not what was asked for: it begins at record {found} instead of {wanted}")]
    Page {
        /// Asked for.
        wanted: u64,
        /// Given.
        found: u64,
    },
    /// The log grows faster than it can be fetched, or is endless.
    #[error("the agent's log is longer than {MAX_WHOLE_LOG} bytes")]
    LogTooLong,
    /// The host shows another endorsement key than it was enrolled with. That is only claimed, as its attestation key answers for it: an
    /// operator learns of a change here, nobody is kept from lying.
    #[error(
        "the host shows the endorsement key sha256:{found} ({found_kind}), enrolled is sha256:{enrolled} ({enrolled_kind}): \
         another TPM answers under this host's name, or its [tpm] ek was changed; then change it back, or enrol the host anew (assay-verifier host remove, then host add)"
    )]
    OtherEk {
        /// SHA-256 of the key that it shows.
        found: Sha256Digest,
        /// What kind of key that is.
        found_kind: &'static str,
        /// SHA-256 of the key that was pinned.
        enrolled: Sha256Digest,
        /// What kind of key that is.
        enrolled_kind: &'static str,
    },
    /// The quote's statement cannot be read.
    #[error("the quote cannot be read")]
    Attest(#[source] TpmError),
    /// The stored attestation key is unusable.
    #[error("the enrolled attestation key is unusable: remove the host and add it again")]
    Ak(#[source] AkError),
    /// The quote does not verify.
    #[error("the evidence does not verify")]
    Quote(#[from] QuoteError),
    /// The log does not replay.
    #[error("the log does not replay")]
    Replay(#[from] ReplayError),
}

impl LookError {
    /// What this says about the host: that it gave bad evidence, or that there is none.
    pub fn state(&self) -> HostState {
        match self {
            Self::Client(error) if !error.is_bad_evidence() => HostState::Unreachable,
            Self::Random | Self::Late | Self::Ak(_) => HostState::Unreachable,
            _ => HostState::Untrusted,
        }
    }
}

/// A host's answer together with the question.
pub struct Evidence {
    bundle: Bundle,
    nonce: Nonce,
    exporter: Exporter,
    held: HeldLog,
    shown: Shown,
}

/// What an agent says of itself with each look; only claimed.
struct Shown {
    ek_public: Vec<u8>,
    approved: Option<ListStatus>,
}

impl Shown {
    /// Asks for it, and for the boot id, which is only a hint here: a wrong one makes the evidence fail.
    async fn ask(agent: &mut Agent) -> Result<(String, Self), LookError> {
        let Identity {
            boot_id,
            ek_public,
            approved,
            ..
        } = agent.identity().await?;
        let ek_public = ek_public.0;
        Ok((boot_id, Self { ek_public, approved }))
    }

    fn check_ek(&self, host: &Host) -> Result<(), LookError> {
        if self.ek_public == host.pinned.ek_public {
            return Ok(());
        }
        let enrolled = &host.pinned.ek_public;
        Err(LookError::OtherEk {
            found: Sha256Digest::of(&self.ek_public),
            found_kind: ek_kind(&self.ek_public),
            enrolled: Sha256Digest::of(enrolled),
            enrolled_kind: ek_kind(enrolled),
        })
    }
}

/// An endorsement key's kind by its name in agent.toml, where it has one.
fn ek_kind(public: &[u8]) -> &'static str {
    match Public::parse(public).as_ref().map(Public::parameters) {
        Ok(Parameters::Rsa { bits: 2048, .. }) => "rsa-2048",
        Ok(Parameters::P256 { .. }) => "ecc-p256",
        _ => "another kind",
    }
}

impl Evidence {
    /// Asks for a quote, and for the log from where `held` ends, or all of it if `whole`.
    pub async fn ask(agent: &mut Agent, held: HeldLog, whole: bool) -> Result<Self, LookError> {
        let (boot_id, shown) = Shown::ask(agent).await?;
        let same_boot = boot_id == held.boot_id;
        let from = if same_boot && !whole { held.records } else { 0 };
        match quote(agent, from, true).await {
            Ok((bundle, nonce)) => return Ok(Self::new(agent, bundle, nonce, held, shown)),
            Err(LookError::Client(ClientError::Refused(refusal))) if refusal.code == LOG_TOO_LONG => {}
            Err(error) => return Err(error),
        }
        if same_boot {
            let held = fetch_log(agent, held).await?;
            let (bundle, nonce) = quote(agent, held.records, true).await?;
            return Ok(Self::new(agent, bundle, nonce, held, shown));
        }
        let new = HeldLog {
            boot_id,
            ..HeldLog::none()
        };
        let new = fetch_log(agent, new).await?;
        let (bundle, nonce) = quote(agent, new.records, true).await?;
        let mut evidence = Self::new(agent, bundle, nonce, new, shown);
        evidence.follow_boot(held)?;
        Ok(evidence)
    }

    /// Asks for what is new since `held`, of which the log's bytes and the firmware's log are elsewhere: `None` where only
    /// [`Evidence::ask`] can go on, since the host was rebooted or has more to tell than fits into one answer.
    pub async fn ask_for_news(agent: &mut Agent, held: HeldLog) -> Result<Option<Self>, LookError> {
        let (boot_id, shown) = Shown::ask(agent).await?;
        if boot_id != held.boot_id {
            return Ok(None);
        }
        match quote(agent, held.records, false).await {
            Ok((bundle, nonce)) => Ok(Some(Self::new(agent, bundle, nonce, held, shown))),
            Err(LookError::Client(ClientError::Refused(refusal))) if refusal.code == LOG_TOO_LONG => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds what [`Evidence::ask_for_news`] left out. `false`: it does not belong to this.
    pub fn complete(&mut self, held: HeldLog, boot_log: Option<B64>) -> bool {
        let fits = held.boot_id == self.bundle.boot_id && held.records == self.held.records;
        if fits {
            self.held = held;
            self.bundle.boot_log = boot_log;
        }
        fits
    }

    /// The firmware's log, if it came along.
    pub const fn boot_log(&self) -> Option<&B64> {
        self.bundle.boot_log.as_ref()
    }

    /// Whether the kernel's own log came along. It comes whole each time it is asked for.
    pub const fn has_ima_log(&self) -> bool {
        self.bundle.ima_log.is_some()
    }

    /// Whether this is what was judged, signed anew, and nothing else.
    pub fn unchanged(&self, host: &Host, judged: &Judged) -> Option<Judged> {
        self.shown.check_ek(host).ok()?;
        let key = attestation_key(host).ok()?;
        self.bundle.verify_unchanged(&key, &self.binding(), judged)
    }

    /// Whether this is what was judged as trusted, and nothing came since but code that the policy approves.
    pub fn progress(&self, host: &Host, judged: &Judged, policy: &Policy) -> Option<Judged> {
        self.shown.check_ek(host).ok()?;
        let key = attestation_key(host).ok()?;
        self.bundle
            .verify_progress(&key, &self.binding(), judged, &policy.passes(unix_now()))
    }

    /// What came of the log.
    pub fn news(&self) -> &[u8] {
        self.bundle.log.data.as_ref()
    }

    /// Asks a host of which nothing is known.
    pub async fn ask_first(agent: &mut Agent) -> Result<Self, LookError> {
        Self::ask(agent, HeldLog::none(), false).await
    }

    fn new(agent: &Agent, bundle: Bundle, nonce: Nonce, held: HeldLog, shown: Shown) -> Self {
        let exporter = *agent.exporter();
        Self {
            bundle,
            nonce,
            exporter,
            held,
            shown,
        }
    }

    /// How the agent says that it stands with approved lists.
    pub const fn approved(&self) -> Option<&ListStatus> {
        self.shown.approved.as_ref()
    }

    /// A new boot whose log came in pages: what was held of the boot before must still bear on the check, so that a
    /// boot without a TPM reset (kexec) is refused here as it is everywhere. The counter is only claimed yet; the
    /// signature over it is checked with the rest.
    fn follow_boot(&mut self, before: HeldLog) -> Result<(), LookError> {
        let attest = Attest::parse(self.bundle.quote.attest.as_ref()).map_err(LookError::Attest)?;
        let found = attest.clock.reset_count;
        if !before.is_none() && found == before.reset_count {
            return Err(QuoteError::BootWithoutReset {
                held: before.boot_id,
                found: self.bundle.boot_id.clone(),
            }
            .into());
        }
        if found < before.reset_count {
            let [held, found] = [before.reset_count, found].map(u64::from);
            return Err(QuoteError::StaleQuote {
                counter: "reset count",
                held,
                found,
            }
            .into());
        }
        self.held.reset_count = found;
        Ok(())
    }

    /// Whether this key quoted an answer to our question.
    pub fn verify(&self, ak: &AttestationKey) -> Result<VerifiedQuote, LookError> {
        Ok(self.bundle.verify(ak, &self.binding(), &self.held)?)
    }

    const fn binding(&self) -> Binding<'_> {
        Binding::Quote {
            nonce: &self.nonce,
            exporter: &self.exporter,
        }
    }

    /// Whether it is the host's answer, and its log leads to the quoted values. What was held is part of the log from then on.
    pub fn replay(&mut self, host: &Host) -> Result<ReplayedLog, LookError> {
        self.shown.check_ek(host)?;
        let held = std::mem::replace(&mut self.held, HeldLog::none());
        let quote = self
            .bundle
            .verify_taking(&attestation_key(host)?, &self.binding(), held)?;
        Ok(quote.replay(host.pinned.pcr)?)
    }
}

/// Asks for a quote with a nonce of its own.
async fn quote(agent: &mut Agent, log_from: u64, boot_log: bool) -> Result<(Bundle, Nonce), LookError> {
    let nonce = fresh_nonce()?;
    let asked = Instant::now();
    let request = QuoteRequest {
        nonce,
        log_from,
        boot_log,
    };
    let bundle = agent.quote(&request).await?;
    if asked.elapsed() > NONCE_LIFETIME {
        Err(LookError::Late)
    } else {
        Ok((bundle, nonce))
    }
}

/// Fetches the log in pages from where `held` ends, until nothing is new. What is fetched is only claimed; the quote
/// after it covers it.
async fn fetch_log(agent: &mut Agent, mut held: HeldLog) -> Result<HeldLog, LookError> {
    for _ in 0..MAX_PAGES {
        let page = agent.log(held.records).await?;
        if page.from != held.records {
            return Err(LookError::Page {
                wanted: held.records,
                found: page.from,
            });
        }
        if page.count == 0 {
            return Ok(held);
        }
        held.records = held.records.saturating_add(page.count);
        held.bytes.extend_from_slice(page.data.as_ref());
        if held.bytes.len() > MAX_WHOLE_LOG {
            return Err(LookError::LogTooLong);
        }
    }
    Err(LookError::LogTooLong)
}

/// The host's pinned attestation key.
pub fn attestation_key(host: &Host) -> Result<AttestationKey, LookError> {
    AttestationKey::new(&host.pinned.ak_public).map_err(LookError::Ak)
}

/// What a log means for its host's state.
pub fn verdict(log: &ReplayedLog, policy: &str, appraisal: Option<&Appraisal>) -> Verdict {
    let (state, reasons) = match appraisal {
        None => (HostState::Unknown, vec![no_policy(policy)]),
        Some(appraisal) if appraisal.is_trusted() => (HostState::Trusted, Vec::new()),
        Some(appraisal) => (HostState::Untrusted, reasons(appraisal)),
    };
    let submod = appraisal.map_or_else(|| Submod::no_policy(reasons.clone()), Submod::appraised);
    let boot_id = log.boot_id().to_owned();
    let quoted = Quoted {
        boot_id,
        reset_count: log.reset_count(),
        records: log.records(),
        measuring: log.last_agent_start().into(),
    };
    let notes = appraisal
        .map(|appraisal| shorten(appraisal.notes(), MAX_REASONS))
        .unwrap_or_default();
    let tags = match (state, appraisal) {
        (HostState::Trusted, Some(appraisal)) => appraisal.tags().to_vec(),
        _ => Vec::new(),
    };
    Verdict {
        state,
        reasons,
        notes,
        tags,
        quoted: Some(quoted),
        submod,
    }
}

/// Why this host may not have a key, if the key demands tags that neither its operator nor the policy that it meets gives it.
pub fn missing_tags(key: &KeyInfo, host: &Host, by_policy: &[String]) -> Option<String> {
    let has = |tag: &&String| host.tags.contains(*tag) || by_policy.contains(*tag);
    let missing: Vec<_> = key.tags.iter().filter(|tag| !has(tag)).map(String::as_str).collect();
    let (key, name) = (key.key_id, &host.pinned.name);
    let tags = missing.join(" and ");
    (!missing.is_empty()).then(|| format!("key {key} is for hosts that are tagged {tags}, which {name} is not"))
}

/// Appraises by a policy, if there is one, as it is now.
pub fn appraise(log: &ReplayedLog, policy: Option<&Policy>) -> Option<Appraisal> {
    policy.map(|policy| log.appraise(policy, unix_now()))
}

/// An error as a reason: one line, whatever a host wrote into it.
pub fn reason(error: &dyn std::error::Error) -> String {
    let line = chain(error);
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// One line for each failure.
pub fn reasons(appraisal: &Appraisal) -> Vec<String> {
    shorten(&appraisal.reasons(), MAX_REASONS)
}

/// The reason of a host whose policy does not exist.
pub fn no_policy(name: &str) -> String {
    if name == "default" {
        "no policy: capture one".to_owned()
    } else {
        format!("no policy {name}: capture one")
    }
}

/// 32 random bytes.
pub fn fresh_nonce() -> Result<Nonce, LookError> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| LookError::Random)?;
    Ok(Nonce::new(bytes))
}

/// How long a nonce of ours is good for.
const NONCE_LIFETIME: Duration = crate::serve::NONCE_LIFETIME;
/// The agent's code for a log that does not fit one answer.
const LOG_TOO_LONG: &str = "log-too-long";
/// Pages of one log; each honest one is far from empty.
const MAX_PAGES: usize = 10_000;
/// Reasons kept for a host.
const MAX_REASONS: usize = 1000;
