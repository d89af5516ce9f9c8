//! Why a key source has no key for us, sorted by whether asking again can help.

use std::io;
use std::path::PathBuf;

use hyper::StatusCode;
use thiserror::Error;

use crate::remote::RemoteError;

/// A refusal of an OpenBao or Vault server, or silence. None of these carries a secret.
#[derive(Debug, Error)]
pub enum SourceError {
    /// It can't be reached, or asked.
    #[error("key source")]
    Remote(#[source] RemoteError),
    /// It runs, and has not been unsealed.
    #[error("key source: {server} is sealed: unseal it (`bao operator unseal`), then try again")]
    Sealed {
        /// The server.
        server: String,
    },
    /// It runs, and cannot answer now.
    #[error("key source: {server} answers {path} with {status} ({words}): look into its own log, then try again")]
    Unwell {
        /// The server.
        server: String,
        /// The path of the request.
        path: String,
        /// HTTP status.
        status: StatusCode,
        /// What it says.
        words: String,
    },
    /// It refuses the login.
    #[error(
        "key source: {server} refuses the {method} login ({words}): check what `[key_source]` in config.toml names, and whether it has run out"
    )]
    Login {
        /// The server.
        server: String,
        /// The login method.
        method: &'static str,
        /// What it says.
        words: String,
    },
    /// The login worked, and does not allow this.
    #[error("key source: {server} denies {path}: the policy of the verifier's login there must allow it")]
    Denied {
        /// The server.
        server: String,
        /// The path of the request.
        path: String,
    },
    /// There is nothing.
    #[error(
        "key source: {server} has nothing at {path}: it was deleted there, or is on another server; restore it from that server's backup"
    )]
    Missing {
        /// The server.
        server: String,
        /// The path of the request.
        path: String,
    },
    /// Something is there where a new key's half should go.
    #[error(
        "key source: {server} has something at {path} already, which is not overwritten; if it is what an interrupted command left, delete it there"
    )]
    Taken {
        /// The server.
        server: String,
        /// The path of the request.
        path: String,
    },
    /// It refuses for another reason.
    #[error("key source: {server} refuses {path}: {words} ({status})")]
    Refused {
        /// The server.
        server: String,
        /// The path of the request.
        path: String,
        /// HTTP status.
        status: StatusCode,
        /// What it says.
        words: String,
    },
    /// Not what such a server answers, or not what this verifier put there.
    #[error("key source: {server} answers {path} with something else than this verifier put there")]
    Malformed {
        /// The server.
        server: String,
        /// The path of the request.
        path: String,
    },
    /// The file is no secret id.
    #[error("key source: {} is not text, and so no secret id", .path.display())]
    SecretId {
        /// The file.
        path: PathBuf,
    },
    /// The runtime for asking can't be started.
    #[error("key source: cannot start the async runtime")]
    Runtime(#[source] io::Error),
}

impl SourceError {
    /// Whether the same request can work later, with nothing changed on this verifier.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Remote(_) | Self::Sealed { .. } | Self::Unwell { .. } | Self::Runtime(_)
        )
    }
}
