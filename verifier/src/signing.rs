//! Keys of the state directory that sign: one for approved lists, one for verdicts. Neither is the CA's.

use std::io;
use std::path::{Path, PathBuf};

use assay_evidence::jws::{KeyError, Signer};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{PrivatePkcs8KeyDer, pem};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::files::create_private;

/// Why there is no key to sign with.
#[derive(Debug, Error)]
pub enum SigningError {
    /// No key could be made.
    #[error("cannot make a signing key")]
    Make(#[source] rcgen::Error),
    /// The key could not be written.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The key could not be read.
    #[error("{} is not a private key in PEM: restore it from a backup of the state directory", .path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        #[source]
        cause: pem::Error,
    },
    /// The key is of another kind.
    #[error("the key in {} cannot sign: restore it from a backup of the state directory", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: KeyError,
    },
}

/// A new key, PKCS#8 in PEM.
pub fn new_key() -> Result<Zeroizing<String>, SigningError> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(SigningError::Make)?;
    Ok(Zeroizing::new(key.serialize_pem()))
}

/// Reads a key.
pub fn read_key(path: &Path) -> Result<Signer, SigningError> {
    let key = PrivatePkcs8KeyDer::from_pem_file(path).map_err(|cause| SigningError::Pem {
        path: path.to_owned(),
        cause,
    })?;
    Signer::from_pkcs8(key.secret_pkcs8_der()).map_err(|cause| SigningError::Key {
        path: path.to_owned(),
        cause,
    })
}

/// Reads a key; a state directory of before there was this one gets it. Whether that was so.
pub fn open_key(path: &Path) -> Result<(Signer, bool), SigningError> {
    let made = match create_private(path, new_key()?.as_bytes()) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(SigningError::Write(path.to_owned(), error)),
    };
    Ok((read_key(path)?, made))
}
