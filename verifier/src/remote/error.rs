//! Why a service could not be asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// A service that could not be asked, or gave no usable answer. None of these carries a secret.
#[derive(Debug, Error)]
pub enum RemoteError {
    /// Not an address that can be used.
    #[error("{url:?} cannot be used: {why}; give https://NAME[:PORT][/PATH]")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A PEM file can't be read, or isn't one.
    #[error("{} cannot be read as PEM", .path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        #[source]
        cause: rustls::pki_types::pem::Error,
    },
    /// A file of CAs has none.
    #[error("{} has no CA certificate that can be used", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The system's own CAs are not where they are elsewhere.
    #[error("this system has no file of trusted CAs where distributions have it: name the CA's PEM file")]
    NoRoots,
    /// TLS can't be set up.
    #[error("TLS cannot be set up with the certificates that are configured")]
    Tls(#[source] rustls::Error),
    /// The name does not resolve, or nothing listens there.
    #[error("cannot connect to {server}")]
    Connect {
        /// As configured.
        server: String,
        /// The system's answer.
        #[source]
        cause: io::Error,
    },
    /// The server's certificate is refused, or ours, or it speaks no TLS 1.3.
    #[error("TLS handshake with {server} failed")]
    Handshake {
        /// As configured.
        server: String,
        /// What TLS says.
        #[source]
        cause: io::Error,
    },
    /// Too slow.
    #[error("{server} did not {step} within {} s", .after.as_secs_f64())]
    Timeout {
        /// As configured.
        server: String,
        /// What was waited for.
        step: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The connection broke. TLS 1.3 reports a refused client certificate only here.
    #[error("{server} broke off the connection")]
    Broken {
        /// As configured.
        server: String,
        /// What HTTP says.
        #[source]
        cause: hyper::Error,
    },
    /// No request can be made of this.
    #[error("no request to {server} can be made of these names")]
    Request {
        /// As configured.
        server: String,
        /// What HTTP says.
        #[source]
        cause: hyper::http::Error,
    },
    /// A secret that no header can carry.
    #[error(
        "the value for the header {0} has characters that no header can have: is the file that it is read from the right one?"
    )]
    Header(&'static str),
    /// The answer is longer than any honest one, or cut off.
    #[error("the answer of {server} is cut off or longer than {limit} bytes")]
    Body {
        /// As configured.
        server: String,
        /// The limit in bytes.
        limit: usize,
    },
}
