//! The state directory and `config.toml`: the raw form as written in the file, and the usable form behind it.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use assay_evidence::host_port::HostPort;
use serde::{Deserialize, Serialize};
use thiserror::Error;

mod key_source;

pub use key_source::{Engine, KeySourceConfig, Login};

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The directory holds no verifier.
    #[error("{dir} holds no verifier: make one with `assay-verifier --state {dir} init --url https://NAME:PORT`", dir = .path.display())]
    NotInitialised {
        /// The directory.
        path: PathBuf,
    },
    /// The file is there but cannot be read.
    #[error("cannot read {0}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        cause: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{0} is not a valid configuration: correct or remove what the next lines name", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and key.
        #[source]
        cause: Box<toml::de::Error>,
    },
    /// A number outside of what makes sense.
    #[error("{key} = {value} is out of range: give {range}")]
    Range {
        /// The key in the file.
        key: &'static str,
        /// What was given.
        value: f64,
        /// What is accepted, in words.
        range: &'static str,
    },
    /// The URL is not one that hosts can use.
    #[error("url {0:?} cannot be used: {1}; give https://NAME_OR_IP:PORT")]
    Url(String, &'static str),
    /// The listening address is not one.
    #[error("listen = {0:?} is not an address: give ADDRESS:PORT, such as 0.0.0.0:8440 or [::]:8440")]
    Listen(String),
    /// The address of the key source is not one.
    #[error("[key_source]: url")]
    KeySourceUrl(#[source] crate::remote::RemoteError),
    /// The key source is not described in full, or contradicts itself.
    #[error("[key_source]: {0}")]
    KeySource(&'static str),
    /// The log level is unknown.
    #[error("log level {0:?} is unknown: give error, warn, info, debug or trace")]
    Level(String),
}

/// Where everything of one verifier lives. The one owner of the file names in it.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Names a directory; nothing is read.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// The configuration, written last by `init`: while it is missing there is no verifier.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }
    /// What a host needs to join: URL, CA and the key for approved lists.
    pub fn join_file(&self) -> PathBuf {
        self.0.join("join.json")
    }
    /// Hosts, logs and policies.
    pub fn database(&self) -> PathBuf {
        self.0.join("state.db")
    }
    /// Journals of images that are being sealed in place.
    pub fn sealing(&self) -> PathBuf {
        self.0.join("sealing")
    }
    /// Certificate file of a role (`ca`, `server`, `client`, `operator`).
    pub fn certificate(&self, role: &str) -> PathBuf {
        self.0.join(format!("{role}.pem"))
    }
    /// Private key that signs approved lists.
    pub fn list_key(&self) -> PathBuf {
        self.key("lists")
    }
    /// Private key that signs verdicts.
    pub fn verdict_key(&self) -> PathBuf {
        self.key("verdicts")
    }
    /// Private key that signs the audit log's records.
    pub fn audit_key(&self) -> PathBuf {
        self.key("audit")
    }
    /// The audit log's files.
    pub fn audit_dir(&self) -> PathBuf {
        self.0.join("audit")
    }
    /// Private key file of a role.
    pub fn key(&self, role: &str) -> PathBuf {
        self.0.join(format!("{role}.key"))
    }
}

/// `https://NAME_OR_IP:PORT`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceUrl(HostPort);

impl ServiceUrl {
    /// Where the service is.
    pub fn address(&self) -> &HostPort {
        &self.0
    }
}

impl fmt::Display for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.0)
    }
}

impl FromStr for ServiceUrl {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::Url(text.to_owned(), why);
        let rest = text
            .strip_prefix("https://")
            .ok_or_else(|| bad("it does not start with https://"))?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let address = HostPort::parse(rest, None).map_err(|error| bad(error.why()))?;
        let host = address.host();
        let label =
            |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let is_name = host.len() <= 253 && host.split('.').all(label);
        if !is_name && address.ip().is_none() {
            return Err(bad("the host is neither a DNS name nor an IP address"));
        }
        Ok(Self(address))
    }
}

/// How `serve` behaves, ready for use.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the service listens.
    pub listen: SocketAddr,
    /// How hosts reach it; also written into sealed images.
    pub url: ServiceUrl,
    /// Time between two quotes of one host (jittered by a tenth).
    pub poll_interval: Duration,
    /// How long one host may take to answer before it counts as unreachable.
    pub quote_timeout: Duration,
    /// What is written to the journal.
    pub log_level: tracing::Level,
    /// Where new disk keys are kept; `None`: in the key store's own files.
    pub key_source: Option<KeySourceConfig>,
}

/// `config.toml` as written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    listen: String,
    url: String,
    #[serde(default = "default_poll_interval")]
    poll_interval_s: f64,
    #[serde(default = "default_quote_timeout")]
    quote_timeout_s: f64,
    #[serde(default)]
    log: RawLog,
    key_source: Option<key_source::RawKeySource>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLog {
    #[serde(default = "default_level")]
    level: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { level: default_level() }
    }
}

fn default_poll_interval() -> f64 {
    10.0
}
fn default_quote_timeout() -> f64 {
    30.0
}
fn default_level() -> String {
    "info".to_owned()
}

impl Config {
    /// Reads and checks `config.toml`.
    pub fn load(state: &StateDir) -> Result<Self, ConfigError> {
        let path = state.config();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(ConfigError::NotInitialised {
                    path: state.path().to_owned(),
                });
            }
            Err(cause) => return Err(ConfigError::Read { path, cause }),
        };
        Self::parse(&text, &path)
    }

    /// Checks the text of a `config.toml`; `path` is only for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|cause| ConfigError::Parse {
            path: path.to_owned(),
            cause: Box::new(cause),
        })?;
        Ok(Self {
            listen: raw
                .listen
                .parse()
                .map_err(|_| ConfigError::Listen(raw.listen.clone()))?,
            url: raw.url.parse()?,
            poll_interval: seconds(
                "poll_interval_s",
                raw.poll_interval_s,
                0.05,
                86_400.0,
                "0.05 to 86400 seconds",
            )?,
            quote_timeout: seconds("quote_timeout_s", raw.quote_timeout_s, 0.1, 600.0, "0.1 to 600 seconds")?,
            log_level: raw
                .log
                .level
                .parse()
                .map_err(|_| ConfigError::Level(raw.log.level.clone()))?,
            key_source: raw.key_source.map(key_source::RawKeySource::usable).transpose()?,
        })
    }

    /// The text `init` writes: every key with its default and what it means.
    pub fn template(listen: SocketAddr, url: &ServiceUrl) -> String {
        format!(
            "# assay-verifier serve\n\n\
             # Where the service listens, and how hosts reach it (the server certificate is made for this name).\n\
             listen = \"{listen}\"\n\
             url = \"{url}\"\n\n\
             # Time between two quotes of one host, and how long a host may take to answer. Fractions are allowed.\n\
             poll_interval_s = 10\n\
             quote_timeout_s = 30\n\n\
             [log]\n\
             # error, warn, info, debug or trace\n\
             level = \"info\"\n"
        )
    }
}

fn seconds(key: &'static str, value: f64, low: f64, high: f64, range: &'static str) -> Result<Duration, ConfigError> {
    let refused = || ConfigError::Range { key, value, range };
    if !(low..=high).contains(&value) {
        return Err(refused());
    }
    Duration::try_from_secs_f64(value).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("config.toml"))
    }

    #[test]
    fn the_template_is_a_valid_configuration() {
        let url: ServiceUrl = "https://verifier.example:8440".parse().unwrap();
        let config = parse(&Config::template("0.0.0.0:8440".parse().unwrap(), &url)).unwrap();
        assert_eq!(config.url, url);
        assert_eq!(config.poll_interval, Duration::from_secs(10));
    }

    #[test]
    fn an_unknown_key_is_named() {
        let text = "listen=\"0.0.0.0:1\"\nurl=\"https://a:1\"\npol_interval_s=1\n";
        let error = parse(text).unwrap_err();
        let ConfigError::Parse { cause, .. } = error else {
            panic!("{error}")
        };
        assert!(cause.to_string().contains("pol_interval_s"));
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for bad in ["0", "-1", "nan", "1e300"] {
            let text = format!("listen=\"0.0.0.0:1\"\nurl=\"https://a:1\"\npoll_interval_s={bad}\n");
            let error = parse(&text).unwrap_err();
            assert!(
                matches!(
                    error,
                    ConfigError::Range {
                        key: "poll_interval_s",
                        ..
                    } | ConfigError::Parse { .. }
                ),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn urls() {
        for good in [
            "https://a.example:8440",
            "https://192.0.2.1:8440",
            "https://[2001:db8::1]:8440",
        ] {
            assert_eq!(good.parse::<ServiceUrl>().unwrap().to_string(), good);
        }
        for bad in [
            "http://a:1",
            "https://a",
            "https://a:0",
            "https://a:99999",
            "https://:1",
            "https://a b:1",
            "https://[x]:1",
            "https://a:1/x",
        ] {
            assert!(matches!(bad.parse::<ServiceUrl>(), Err(ConfigError::Url(..))), "{bad}");
        }
    }
}
