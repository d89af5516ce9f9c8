//! Whom this host answers to: the join file, and the TLS identity that is made with it.
//!
//! A join file carries what the verifier's `init` wrote: its CA and its addresses. From then on the agent serves quotes to
//! certificates of that CA only, and asks only those addresses for keys. The agent's own certificate is self-signed; the
//! verifier pins its public key at `host add`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use assay_evidence::approved::{ListKey, ListKeyError};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::wire::JoinFile;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::files::replace_private;
use crate::unlock::url::{UrlError, VerifierUrl};

/// A join file larger than this is not one.
const MAX_FILE: u64 = 64 * 1024;
const MAX_VERIFIERS: usize = 8;
const VERSION: u32 = 1;

const JOIN_FILE: &str = "join.json";
const KEY_FILE: &str = "tls.key";
const CERTIFICATE_FILE: &str = "tls.pem";

/// Why a join file, or the state that it left, is refused.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file or the state folder could not be written.
    #[error("cannot write {path}; join needs root and a writable state_dir")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Far too large.
    #[error("{path} is larger than {MAX_FILE} bytes: this is not a join file")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not the JSON of a join file.
    #[error("{path} is not a join file; take the one that `assay-verifier init` made")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's words; they name the key.
        #[source]
        source: serde_json::Error,
    },
    /// A later version's join file.
    #[error("{path} has version {version}, this agent knows version {VERSION}: update the agent")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// No verifier, or too many.
    #[error("{path} lists {count} verifiers; 1 to {MAX_VERIFIERS} are possible")]
    VerifierCount {
        /// The file.
        path: PathBuf,
        /// How many it lists.
        count: usize,
    },
    /// An address that cannot be asked.
    #[error("{path} lists a verifier that cannot be asked")]
    VerifierUrl {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: UrlError,
    },
    /// `ca_pem` is not one PEM certificate.
    #[error("the CA in {path} is not exactly one PEM certificate")]
    CaPem {
        /// The file.
        path: PathBuf,
    },
    /// The certificate cannot be a CA's.
    #[error("the CA certificate in {path} is refused: {reason}")]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// `list_key` is no key.
    #[error("the key for approved lists (list_key) in {path} cannot be used")]
    ListKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ListKeyError,
    },
    /// This host has joined somebody else.
    #[error(
        "this host has joined a verifier whose CA key is sha256:{present}, and {path} is of sha256:{wanted}; \
         to leave the former for good, run join with --force (the host must then be added on the new verifier)"
    )]
    OtherCa {
        /// The new join file.
        path: PathBuf,
        /// SPKI digest of the CA joined now.
        present: Sha256Digest,
        /// SPKI digest of the new one.
        wanted: Sha256Digest,
    },
    /// The state folder holds half a join.
    #[error(
        "{path} is missing or damaged, though this host has joined a verifier: run `assay-agent join FILE --force`"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// No TLS key could be made.
    #[error("cannot make a TLS key and certificate")]
    MakeKey(#[source] rcgen::Error),
}

/// A join file that passed every check.
#[derive(Debug, Clone)]
pub struct Membership {
    file: JoinFile,
    ca: CertificateDer<'static>,
    ca_spki: Sha256Digest,
    list_key: Option<ListKey>,
}

impl Membership {
    /// Reads and checks a join file.
    ///
    /// # Errors
    /// One variant of [`JoinError`] for each reason.
    pub fn read(path: &Path) -> Result<Self, JoinError> {
        let text = read_limited(path)?;
        let own = || path.to_owned();
        let file: JoinFile =
            serde_json::from_slice(&text).map_err(|source| JoinError::Malformed { path: own(), source })?;
        if file.version != VERSION {
            return Err(JoinError::Version {
                path: own(),
                version: file.version,
            });
        }
        if file.verifiers.is_empty() || file.verifiers.len() > MAX_VERIFIERS {
            return Err(JoinError::VerifierCount {
                path: own(),
                count: file.verifiers.len(),
            });
        }
        for url in &file.verifiers {
            VerifierUrl::parse(url).map_err(|source| JoinError::VerifierUrl { path: own(), source })?;
        }
        let (ca, ca_spki) = check_ca(&file.ca_pem, path)?;
        let list_key = file.list_key.as_ref().map(|spki| ListKey::from_spki(spki.as_ref()));
        let list_key = list_key
            .transpose()
            .map_err(|source| JoinError::ListKey { path: own(), source })?;
        Ok(Self {
            file,
            ca,
            ca_spki,
            list_key,
        })
    }

    /// The verifiers' addresses, in order of preference.
    #[must_use]
    pub fn verifiers(&self) -> &[String] {
        &self.file.verifiers
    }

    /// The CA that signs both the verifiers' server and their client certificates.
    #[must_use]
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// SHA-256 of the CA's SubjectPublicKeyInfo (DER).
    #[must_use]
    pub fn ca_spki(&self) -> Sha256Digest {
        self.ca_spki
    }

    /// The key that signs approved lists; none in a join file of before there were any.
    #[must_use]
    pub const fn list_key(&self) -> Option<&ListKey> {
        self.list_key.as_ref()
    }
}

/// What a join did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The host joined, with a new TLS key.
    Joined,
    /// The host had joined this CA; only the list of verifiers or the key for approved lists changed.
    Updated,
    /// The host had joined just so.
    Unchanged,
}

/// A joined host's TLS identity and the verifiers it answers to.
#[derive(Debug)]
pub struct Joined {
    /// Whom the host has joined.
    pub membership: Membership,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    spki: Sha256Digest,
}

impl Joined {
    /// Loads the identity from the state folder; `None` before the first join.
    ///
    /// # Errors
    /// [`JoinError::Damaged`] when only a part is there, and those of [`Membership::read`].
    pub fn load(state_dir: &Path) -> Result<Option<Self>, JoinError> {
        let membership = match Membership::read(&state_dir.join(JOIN_FILE)) {
            Err(JoinError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let (key_path, certificate_path) = (state_dir.join(KEY_FILE), state_dir.join(CERTIFICATE_FILE));
        let damaged = |path: &Path| JoinError::Damaged { path: path.to_owned() };
        let key = Zeroizing::new(read_limited(&key_path).map_err(|_| damaged(&key_path))?);
        let key = PrivatePkcs8KeyDer::from_pem_slice(&key).map_err(|_| damaged(&key_path))?;
        let certificate = read_limited(&certificate_path).map_err(|_| damaged(&certificate_path))?;
        let certificate = CertificateDer::from_pem_slice(&certificate).map_err(|_| damaged(&certificate_path))?;
        let spki = spki_digest(&certificate).ok_or_else(|| damaged(&certificate_path))?;
        Ok(Some(Self {
            membership,
            certificate,
            key,
            spki,
        }))
    }

    /// The agent's self-signed certificate.
    #[must_use]
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The private key of [`Joined::certificate`].
    #[must_use]
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }

    /// SHA-256 of the SubjectPublicKeyInfo (DER) of the agent's certificate: what the verifier pins.
    #[must_use]
    pub fn spki(&self) -> Sha256Digest {
        self.spki
    }
}

/// Joins: writes key, certificate and join file into the state folder, the join file last, so that a join that was
/// interrupted counts as none.
///
/// # Errors
/// [`JoinError::OtherCa`] without `force`, when another CA has been joined; nothing is changed then.
pub fn join(state_dir: &Path, source: &Path, wanted: &Membership, force: bool) -> Result<Outcome, JoinError> {
    if !force && let Some(present) = Joined::load(state_dir)? {
        let present = present.membership;
        if present.ca != wanted.ca {
            return Err(JoinError::OtherCa {
                path: source.to_owned(),
                present: present.ca_spki,
                wanted: wanted.ca_spki,
            });
        }
        if present.file == wanted.file {
            return Ok(Outcome::Unchanged);
        }
        write_private(state_dir, JOIN_FILE, &json(wanted, source)?)?;
        return Ok(Outcome::Updated);
    }
    let (key, certificate) = make_identity().map_err(JoinError::MakeKey)?;
    make_private_dir(state_dir)?;
    match fs::remove_file(state_dir.join(JOIN_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(JoinError::Write {
                path: state_dir.join(JOIN_FILE),
                source: error,
            });
        }
        _ => {}
    }
    write_private(state_dir, KEY_FILE, key.as_bytes())?;
    write_private(state_dir, CERTIFICATE_FILE, certificate.as_bytes())?;
    write_private(state_dir, JOIN_FILE, &json(wanted, source)?)?;
    Ok(Outcome::Joined)
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo (DER).
fn spki_digest(certificate: &[u8]) -> Option<Sha256Digest> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(Sha256Digest::of(parsed.public_key().raw))
}

fn check_ca(pem: &str, path: &Path) -> Result<(CertificateDer<'static>, Sha256Digest), JoinError> {
    let not_one = || JoinError::CaPem { path: path.to_owned() };
    let refused = |reason| JoinError::Ca {
        path: path.to_owned(),
        reason,
    };
    let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
    let ca = certificates.next().ok_or_else(not_one)?.map_err(|_| not_one())?;
    if certificates.next().is_some() {
        return Err(not_one());
    }
    let (rest, parsed) = x509_parser::parse_x509_certificate(&ca).map_err(|_| refused("it is not X.509"))?;
    if !rest.is_empty() {
        return Err(refused("it is not X.509"));
    }
    if !parsed
        .basic_constraints()
        .ok()
        .flatten()
        .is_some_and(|constraints| constraints.value.ca)
    {
        return Err(refused("it is not a CA's (basicConstraints)"));
    }
    if !parsed.validity().is_valid() {
        return Err(refused("it is not valid now; check its dates and this host's clock"));
    }
    let spki = Sha256Digest::of(parsed.public_key().raw);
    Ok((ca, spki))
}

/// A P-256 key and a certificate for it, PEM. Nobody reads names or dates in it: the verifier pins the key.
fn make_identity() -> Result<(Zeroizing<String>, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut parameters = rcgen::CertificateParams::new(vec!["assay-agent".to_owned()])?;
    parameters
        .distinguished_name
        .push(rcgen::DnType::CommonName, "assay-agent");
    parameters.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![
        rcgen::ExtendedKeyUsagePurpose::ServerAuth,
        rcgen::ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let certificate = parameters.self_signed(&key)?;
    Ok((Zeroizing::new(key.serialize_pem()), certificate.pem()))
}

fn json(wanted: &Membership, source: &Path) -> Result<Vec<u8>, JoinError> {
    serde_json::to_vec_pretty(&wanted.file).map_err(|error| JoinError::Malformed {
        path: source.to_owned(),
        source: error,
    })
}

fn read_limited(path: &Path) -> Result<Vec<u8>, JoinError> {
    let failed = |source| JoinError::Read {
        path: path.to_owned(),
        source,
    };
    let mut data = Vec::new();
    // `take` and not the file's size, which a pipe or a growing file does not have.
    File::open(path)
        .map_err(failed)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut data)
        .map_err(failed)?;
    if data.len() as u64 > MAX_FILE {
        return Err(JoinError::TooLarge { path: path.to_owned() });
    }
    Ok(data)
}

fn make_private_dir(dir: &Path) -> Result<(), JoinError> {
    let failed = |source| JoinError::Write {
        path: dir.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed)?;
    fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(failed)
}

fn write_private(dir: &Path, name: &str, data: &[u8]) -> Result<(), JoinError> {
    replace_private(dir, name, data).map_err(|source| JoinError::Write {
        path: dir.join(name),
        source,
    })
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
