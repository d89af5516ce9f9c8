//! Halves of keys in OpenBao or HashiCorp Vault (their HTTP API is the same here): KV version 2, or transit.
//!
//! One connection for each key, with the login on it where one is due; a token is kept in memory as long as it lives, renewed at
//! half of its time where the server lets it be, and fetched anew when the server knows it no more.

use std::time::Duration;

use assay_evidence::uuid::Uuid;
use assay_evidence::wire::B64;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::half::{Half, Held, SecretsServer};
use super::{KeyStoreError, io::read_private};
use crate::config::{Engine, KeySourceConfig, Login};
use crate::remote::{Connection, Remote, RemoteError, Trust};

mod error;
mod exchange;
mod token;

pub use error::SourceError;
use exchange::{Answer, exchange};
use token::{Token, Tokens};

/// An OpenBao or Vault server.
pub struct Bao {
    remote: Remote,
    server: String,
    namespace: Option<String>,
    timeout: Duration,
    engine: Engine,
    login: Login,
    tokens: Tokens,
}

impl Bao {
    /// Reads certificates; asks nothing yet.
    ///
    /// # Errors
    /// [`SourceError::Remote`] for certificates that can't be used; [`KeyStoreError::Permissions`] when others may read the
    /// certificate's key.
    pub fn open(config: &KeySourceConfig) -> Result<Self, KeyStoreError> {
        let identity = match &config.login {
            Login::AppRole { .. } => None,
            Login::Certificate {
                certificate_file,
                key_file,
                ..
            } => {
                drop(read_private(key_file, MAX_KEY_FILE)?);
                Some((certificate_file.as_path(), key_file.as_path()))
            }
        };
        let trust = Trust {
            ca_file: config.ca_file.as_deref(),
            identity,
        };
        let remote = Remote::new(config.url.clone(), trust).map_err(SourceError::Remote)?;
        Ok(Self {
            server: config.url.to_string(),
            remote,
            namespace: config.namespace.clone(),
            timeout: config.timeout,
            engine: config.engine.clone(),
            login: config.login.clone(),
            tokens: Tokens::default(),
        })
    }

    /// Asks for one thing, with a token; within the configured time, whatever it takes.
    fn ask(&self, method: &Method, path: &str, body: Option<&Value>) -> Result<Answer, KeyStoreError> {
        // On a runtime of its own: key stores are called from threads that may block, and commands have none.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(SourceError::Runtime)?;
        let asking = async {
            tokio::time::timeout(self.timeout, self.ask_unlimited(method, path, body))
                .await
                .unwrap_or_else(|_| Err(SourceError::Remote(self.remote.late("answer", self.timeout)).into()))
        };
        runtime.block_on(asking)
    }

    async fn ask_unlimited(&self, method: &Method, path: &str, body: Option<&Value>) -> Result<Answer, KeyStoreError> {
        let mut connection = self.remote.connect(self.timeout).await.map_err(SourceError::Remote)?;
        if let Some(token) = self.known_token(&mut connection).await? {
            let answer = self.send(&mut connection, method, path, Some(&token), body).await?;
            if answer.status != StatusCode::FORBIDDEN {
                return Ok(answer);
            }
            // It may be forbidden, or the token be gone: revoked, run out, or of a server that was started anew.
            self.tokens.forget(&token);
        }
        let token = self.new_token(&mut connection).await?;
        self.send(&mut connection, method, path, Some(&token), body).await
    }

    async fn send(
        &self,
        connection: &mut Connection,
        method: &Method,
        path: &str,
        token: Option<&Token>,
        body: Option<&Value>,
    ) -> Result<Answer, KeyStoreError> {
        let namespace = self.namespace.as_deref();
        let token = token.map(Token::expose);
        let answer = exchange(connection, method, path, namespace, token, body).await;
        Ok(answer.map_err(SourceError::Remote)?)
    }

    /// A token of before that lives; renewed when half of its time is over.
    async fn known_token(&self, connection: &mut Connection) -> Result<Option<Token>, KeyStoreError> {
        let Some(token) = self.tokens.living() else {
            return Ok(None);
        };
        if !token.is_to_be_renewed() {
            return Ok(Some(token));
        }
        let renewed = self
            .send(connection, &Method::POST, RENEW, Some(&token), Some(&json!({})))
            .await?;
        Ok(renewed.auth().and_then(|auth| self.tokens.keep(auth)))
    }

    async fn new_token(&self, connection: &mut Connection) -> Result<Token, KeyStoreError> {
        let (mount, method, body) = match &self.login {
            Login::AppRole {
                mount,
                role_id,
                secret_id_file,
            } => {
                let secret = read_private(secret_id_file, MAX_SECRET_ID)?;
                let secret = std::str::from_utf8(&secret).map_err(|_| SourceError::SecretId {
                    path: secret_id_file.clone(),
                })?;
                let body = json!({"role_id": role_id, "secret_id": secret.trim()});
                (mount, "AppRole", body)
            }
            Login::Certificate { mount, role, .. } => {
                let body = role.as_ref().map_or_else(|| json!({}), |role| json!({"name": role}));
                (mount, "certificate", body)
            }
        };
        let path = format!("/v1/auth/{mount}/login");
        let answer = self.send(connection, &Method::POST, &path, None, Some(&body)).await?;
        if answer.is_refusal() {
            return Err(SourceError::Login {
                server: self.server.clone(),
                method,
                words: answer.words(),
            }
            .into());
        }
        let auth = answer.good(&self.server, &path)?.auth();
        let malformed = || SourceError::Malformed {
            server: self.server.clone(),
            path: path.clone(),
        };
        Ok(auth.and_then(|auth| self.tokens.keep(auth)).ok_or_else(malformed)?)
    }

    /// The half in an answer.
    fn half(&self, text: Option<B64>, path: &str) -> Result<Half, KeyStoreError> {
        let bytes = text.map(|B64(bytes)| Zeroizing::new(bytes));
        let half = bytes.and_then(|bytes| Half::from_bytes(&bytes));
        Ok(half.ok_or_else(|| SourceError::Malformed {
            server: self.server.clone(),
            path: path.to_owned(),
        })?)
    }
}

impl SecretsServer for Bao {
    fn keep(&self, key_id: Uuid, half: &Half) -> Result<Held, KeyStoreError> {
        let text = B64(half.expose().to_vec());
        match &self.engine {
            Engine::Kv { mount, path } => {
                let secret = format!("{path}/{key_id}");
                let url = format!("/v1/{mount}/data/{secret}");
                // Only if there is none: another verifier's key is not overwritten.
                let body = json!({"options": {"cas": 0}, "data": {"half": text}});
                let answer = self.ask(&Method::POST, &url, Some(&body))?;
                if answer.status == StatusCode::BAD_REQUEST && answer.words().contains("check-and-set") {
                    return Err(SourceError::Taken {
                        server: self.server.clone(),
                        path: url,
                    }
                    .into());
                }
                answer.good(&self.server, &url)?;
                Ok(Held::Kv {
                    mount: mount.clone(),
                    path: secret,
                })
            }
            Engine::Transit { mount, key } => {
                let url = format!("/v1/{mount}/encrypt/{key}");
                let answer = self.ask(&Method::POST, &url, Some(&json!({"plaintext": text})))?;
                let made: Option<Encrypted> = answer.good(&self.server, &url)?.data();
                let made = made.filter(|made| made.ciphertext.len() <= MAX_CIPHERTEXT);
                Ok(Held::Transit {
                    mount: mount.clone(),
                    key: key.clone(),
                    ciphertext: made
                        .ok_or_else(|| SourceError::Malformed {
                            server: self.server.clone(),
                            path: url,
                        })?
                        .ciphertext,
                })
            }
        }
    }

    fn reveal(&self, held: &Held) -> Result<Half, KeyStoreError> {
        match held {
            Held::Kv { mount, path } => {
                let url = format!("/v1/{mount}/data/{path}");
                let answer = self.ask(&Method::GET, &url, None)?;
                let read: Option<Versioned> = answer.good(&self.server, &url)?.data();
                self.half(read.map(|read| read.data.half), &url)
            }
            Held::Transit { mount, key, ciphertext } => {
                let url = format!("/v1/{mount}/decrypt/{key}");
                let answer = self.ask(&Method::POST, &url, Some(&json!({"ciphertext": ciphertext})))?;
                let read: Option<Decrypted> = answer.good(&self.server, &url)?.data();
                self.half(read.map(|read| read.plaintext), &url)
            }
        }
    }

    fn forget(&self, held: &Held) -> Result<(), KeyStoreError> {
        let Held::Kv { mount, path } = held else {
            // It has nothing of the key; the file with the ciphertext goes.
            return Ok(());
        };
        // With all of its versions: a deleted one could be had back.
        let url = format!("/v1/{mount}/metadata/{path}");
        match self.ask(&Method::DELETE, &url, None)?.good(&self.server, &url) {
            Ok(_) | Err(SourceError::Missing { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// `data` of a KV version 2 answer.
#[derive(Deserialize)]
struct Versioned {
    data: Secret,
}

#[derive(Deserialize)]
struct Secret {
    half: B64,
}

#[derive(Deserialize)]
struct Encrypted {
    ciphertext: String,
}

#[derive(Deserialize)]
struct Decrypted {
    plaintext: B64,
}

impl From<RemoteError> for SourceError {
    fn from(error: RemoteError) -> Self {
        Self::Remote(error)
    }
}

const RENEW: &str = "/v1/auth/token/renew-self";
/// A secret id is a UUID, or what an operator chose.
const MAX_SECRET_ID: u64 = 4096;
/// A PEM key.
const MAX_KEY_FILE: u64 = 16 * 1024;
/// "vault:v1:" and base64 of 60 bytes, or a little more with another cipher.
const MAX_CIPHERTEXT: usize = 4096;
