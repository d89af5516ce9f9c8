//! Why an image did not get into a store, or out of it.

use std::io;
use std::path::PathBuf;

use hyper::StatusCode;
use thiserror::Error;

use crate::remote::RemoteError;

/// A transfer that failed.
#[derive(Debug, Error)]
pub enum ImageStoreError {
    /// The store can't be reached, or broke off.
    #[error("image store")]
    Remote(#[from] RemoteError),
    /// A token would have gone over the network in the clear.
    #[error("image store: no token is sent to {0} in the clear: use https")]
    TokenInClear(String),
    /// The store says no.
    #[error("image store: {store} answers {path} with {status}: {words}")]
    Refused {
        /// The store.
        store: String,
        /// The path of the request.
        path: String,
        /// HTTP status.
        status: StatusCode,
        /// What it says.
        words: String,
    },
    /// Glance looks into what it is given, and knows no LUKS2.
    #[error(
        "image store: {store} looked into the image and refuses it ({words}): Glance takes LUKS1 as it is (`image seal --format luks1`), and LUKS2 under a container format that its operator adds to container_formats, named with --container-format"
    )]
    Uninspectable {
        /// The store.
        store: String,
        /// What it says.
        words: String,
    },
    /// An answer that such a store does not give.
    #[error("image store: {store} answers {path} with something else than {what}")]
    Malformed {
        /// The store.
        store: String,
        /// The path of the request.
        path: String,
        /// What was expected.
        what: &'static str,
    },
    /// There is nothing to hold the image against.
    #[error("image store: there is no {url}.sha256: name the image's digest with --sha256")]
    NoDigest {
        /// The image's URL.
        url: String,
    },
    /// What was got is not what was sealed.
    #[error("image store: what {store} has is not the image: its SHA-256 is {found}, not {wanted}; {} was removed", .partial.display())]
    OtherDigest {
        /// The store.
        store: String,
        /// The digest of what came.
        found: String,
        /// The digest that was expected.
        wanted: String,
        /// What had been got.
        partial: PathBuf,
    },
    /// The store took something else than was sent.
    #[error(
        "image store: {store} has {found} after the upload, not {wanted}: the image there was removed; push it again"
    )]
    OtherUpload {
        /// The store.
        store: String,
        /// What it says that it has.
        found: String,
        /// What was sent.
        wanted: String,
    },
    /// Breaks off again and again.
    #[error("image store: {store} broke off {times} times in a row; {} stays, and the same command goes on from there", .partial.display())]
    BreaksOff {
        /// The store.
        store: String,
        /// How often.
        times: u32,
        /// What has been got.
        partial: PathBuf,
        /// The last time.
        #[source]
        cause: Box<ImageStoreError>,
    },
    /// A file here.
    #[error("image store: can't {operation} {}", .path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ImageStoreError {
    /// Turns a failed operation on a file into an error that names it.
    pub(super) fn file<'a>(operation: &'static str, path: &'a std::path::Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::File {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the connection broke, and another one may do better.
    pub(super) fn is_broken_off(&self) -> bool {
        let Self::Remote(error) = self else { return false };
        matches!(
            error,
            RemoteError::Broken { .. }
                | RemoteError::Timeout { .. }
                | RemoteError::Body { .. }
                | RemoteError::Connect { .. }
        )
    }
}
