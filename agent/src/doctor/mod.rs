//! What of this host's chain is measured, what keeps the agent from working, and what to do about each.
//!
//! Each check looks by itself and tells what it found, so that one that fails hides no other. Nothing here changes anything but
//! [`grub::Fix::apply`], which an operator has agreed to.

mod boot;
pub mod grub;
mod measuring;
mod platform;
mod verifiers;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::{Config, ConfigError};
use crate::http::chain;
use crate::unlock::api::Status;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Good,
    /// The agent works, and proves less than it could.
    Weak,
    /// Something does not work.
    Bad,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check; the same in every version.
    pub check: &'static str,
    /// How it ended.
    pub state: State,
    /// What there is.
    pub found: String,
    /// What to do, where something can be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Good,
            found: found.into(),
            remedy: None,
        }
    }

    fn weak(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Weak,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn bad(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Bad,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    /// An error whose own words have the remedy.
    fn error(check: &'static str, error: &dyn std::error::Error) -> Self {
        Self {
            check,
            state: State::Bad,
            found: chain(error),
            remedy: None,
        }
    }
}

/// The running agent, as the one who asks could see it.
#[derive(Debug)]
pub enum Running {
    /// It answered.
    Yes(Box<Status>),
    /// There is none.
    No,
    /// There is one, perhaps, that gives no usable answer; why.
    Silent(String),
}

/// The host's files, which tests have elsewhere.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Host {
    /// A host whose files are below `root`.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where the file with this absolute path is.
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// A small file of the kernel's, trimmed; none when it is not there.
    fn text(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }
}

/// Runs every check, the boot's first.
///
/// Verifiers get ten seconds each to answer; all else is quick.
pub fn examine(host: &Host, config: &Result<Config, ConfigError>, running: &Running) -> Vec<Finding> {
    let mut findings = vec![platform::processor(), platform::kernel()];
    findings.extend(platform::tpm(host, config.as_ref().ok(), running));
    findings.extend(boot::chain(host));
    match config {
        Ok(config) => {
            findings.push(Finding::good("configuration", "can be used"));
            findings.push(measuring::tier(config));
            findings.extend(measuring::agent(running));
            findings.extend(verifiers::check(config));
        }
        Err(error) => {
            findings.push(Finding::error("configuration", error));
            findings.extend(measuring::agent(running));
        }
    }
    findings
}
