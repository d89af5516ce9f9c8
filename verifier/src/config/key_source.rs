//! `[key_source]` of `config.toml`: where the halves of disk keys are that the key store does not keep itself.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ConfigError, seconds};
use crate::remote::Endpoint;

/// An OpenBao or Vault server, ready for use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySourceConfig {
    /// The server: https, or http on this machine.
    pub url: Endpoint,
    /// PEM file of the CAs that its certificate may be of; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// Its namespace, if any.
    pub namespace: Option<String>,
    /// How long one key may take, with login.
    pub timeout: Duration,
    /// What new keys are kept in.
    pub engine: Engine,
    /// How the verifier logs in.
    pub login: Login,
}

/// A secrets engine, and the place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// KV version 2: the server keeps the half.
    Kv {
        /// Where it is mounted.
        mount: String,
        /// The folder for this verifier's keys.
        path: String,
    },
    /// Transit: the server encrypts the half, and keeps only its own key.
    Transit {
        /// Where it is mounted.
        mount: String,
        /// The name of the server's key.
        key: String,
    },
}

/// A login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// Role id and secret id.
    AppRole {
        /// Where the method is mounted.
        mount: String,
        /// Not secret.
        role_id: String,
        /// A private file (mode 0600) with the secret id.
        secret_id_file: PathBuf,
    },
    /// TLS client certificate.
    Certificate {
        /// Where the method is mounted.
        mount: String,
        /// The certificate role; `None`: whichever fits.
        role: Option<String>,
        /// PEM file with the certificate, and those between it and its CA.
        certificate_file: PathBuf,
        /// PEM file with its key (mode 0600).
        key_file: PathBuf,
    },
}

/// `[key_source]` as written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawKeySource {
    url: String,
    ca_file: Option<PathBuf>,
    namespace: Option<String>,
    #[serde(default = "default_timeout")]
    timeout_s: f64,
    kv: Option<RawKv>,
    transit: Option<RawTransit>,
    approle: Option<RawAppRole>,
    certificate: Option<RawCertificate>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKv {
    #[serde(default = "kv_mount")]
    mount: String,
    #[serde(default = "assay")]
    path: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTransit {
    #[serde(default = "transit_mount")]
    mount: String,
    #[serde(default = "assay")]
    key: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAppRole {
    #[serde(default = "approle_mount")]
    mount: String,
    role_id: String,
    secret_id_file: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCertificate {
    #[serde(default = "certificate_mount")]
    mount: String,
    role: Option<String>,
    certificate_file: PathBuf,
    key_file: PathBuf,
}

fn default_timeout() -> f64 {
    5.0
}
fn kv_mount() -> String {
    "secret".to_owned()
}
fn transit_mount() -> String {
    "transit".to_owned()
}
fn approle_mount() -> String {
    "approle".to_owned()
}
fn certificate_mount() -> String {
    "cert".to_owned()
}
fn assay() -> String {
    "assay".to_owned()
}

impl RawKeySource {
    pub(super) fn usable(self) -> Result<KeySourceConfig, ConfigError> {
        let refused = |why| ConfigError::KeySource(why);
        let url: Endpoint = self.url.parse().map_err(ConfigError::KeySourceUrl)?;
        if !url.is_private() {
            return Err(refused("its url is http to another machine: give https"));
        }
        let engine = match (self.kv, self.transit) {
            (Some(RawKv { mount, path }), None) => Engine::Kv { mount, path },
            (None, Some(RawTransit { mount, key })) => Engine::Transit { mount, key },
            _ => return Err(refused("give one of [key_source.kv] and [key_source.transit]")),
        };
        let login = match (self.approle, self.certificate) {
            (
                Some(RawAppRole {
                    mount,
                    role_id,
                    secret_id_file,
                }),
                None,
            ) => Login::AppRole {
                mount,
                role_id,
                secret_id_file,
            },
            (
                None,
                Some(RawCertificate {
                    mount,
                    role,
                    certificate_file,
                    key_file,
                }),
            ) => {
                if !url.is_https() {
                    return Err(refused("a login by certificate takes an https url"));
                }
                Login::Certificate {
                    mount,
                    role,
                    certificate_file,
                    key_file,
                }
            }
            _ => return Err(refused("give one of [key_source.approle] and [key_source.certificate]")),
        };
        let (place, login_mount) = (engine.names(), login.mount());
        if !place.into_iter().chain([login_mount]).all(is_path) {
            return Err(refused(
                "a mount, path or key has characters besides letters, digits, '-', '_', '.' and '/', or is empty or longer than 256",
            ));
        }
        Ok(KeySourceConfig {
            url,
            ca_file: self.ca_file,
            namespace: self.namespace,
            timeout: seconds("key_source.timeout_s", self.timeout_s, 0.1, 60.0, "0.1 to 60 seconds")?,
            engine,
            login,
        })
    }
}

impl Engine {
    /// Its name in messages and files.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Kv { .. } => "kv",
            Self::Transit { .. } => "transit",
        }
    }

    fn names(&self) -> [&str; 2] {
        match self {
            Self::Kv { mount, path } => [mount, path],
            Self::Transit { mount, key } => [mount, key],
        }
    }
}

impl Login {
    fn mount(&self) -> &str {
        match self {
            Self::AppRole { mount, .. } | Self::Certificate { mount, .. } => mount,
        }
    }
}

/// What can stand in a URL's path as it is.
fn is_path(text: &str) -> bool {
    let part = |part: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        !part.is_empty() && part != "." && part != ".." && part.bytes().all(plain)
    };
    text.len() <= 256 && text.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Config;
    use super::*;

    const APPROLE: &str = "[key_source.approle]\nrole_id = \"r\"\nsecret_id_file = \"/s\"\n";

    fn parse(source: &str) -> Result<Option<KeySourceConfig>, ConfigError> {
        let text = format!("listen=\"0.0.0.0:1\"\nurl=\"https://a:1\"\n{source}");
        Config::parse(&text, Path::new("config.toml")).map(|config| config.key_source)
    }

    #[test]
    fn without_the_section_keys_are_in_files() {
        assert_eq!(parse("").unwrap(), None);
    }

    #[test]
    fn what_is_not_said_has_the_servers_own_names() {
        let text = format!("[key_source]\nurl = \"https://bao:8200\"\n[key_source.kv]\n{APPROLE}");
        let config = parse(&text).unwrap().unwrap();
        assert_eq!(config.timeout, Duration::from_secs(5));
        assert_eq!(
            config.engine,
            Engine::Kv {
                mount: "secret".into(),
                path: "assay".into()
            }
        );
        let Login::AppRole { mount, .. } = config.login else {
            panic!("a login by AppRole was asked for")
        };
        assert_eq!(mount, "approle");
    }

    #[test]
    fn what_is_half_said_or_unsafe_is_refused() {
        let head = "[key_source]\nurl = \"https://bao:8200\"\n";
        let plain = "[key_source]\nurl = \"http://bao:8200\"\n";
        let local = "[key_source]\nurl = \"http://127.0.0.1:8200\"\n";
        let certificate = "[key_source.certificate]\ncertificate_file = \"/c\"\nkey_file = \"/k\"\n";
        for (text, named) in [
            (format!("{head}{APPROLE}"), "key_source.kv"),
            (
                format!("{head}[key_source.kv]\n[key_source.transit]\n{APPROLE}"),
                "key_source.kv",
            ),
            (format!("{head}[key_source.kv]\n"), "key_source.approle"),
            (
                format!("{head}[key_source.kv]\n{APPROLE}{certificate}"),
                "key_source.approle",
            ),
            (format!("{plain}[key_source.kv]\n{APPROLE}"), "https"),
            (format!("{local}[key_source.kv]\n{certificate}"), "https"),
            (
                format!("{head}[key_source.kv]\npath = \"a/../b\"\n{APPROLE}"),
                "characters",
            ),
            (
                format!("{head}[key_source.transit]\nkey = \"a?b\"\n{APPROLE}"),
                "characters",
            ),
            (format!("{head}timeout_s = 0\n[key_source.kv]\n{APPROLE}"), "timeout_s"),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}{error}");
        }
        let unknown = parse(&format!("{head}mont = \"x\"\n[key_source.kv]\n{APPROLE}")).unwrap_err();
        assert!(crate::cli::chain(&unknown).contains("mont"), "{unknown}");
    }
}
