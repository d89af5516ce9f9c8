//! `assay-verifier init`: everything a new verifier needs, made once and never overwritten.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use assay_evidence::wire::{B64, JoinFile};
use thiserror::Error;
use time::OffsetDateTime;

use super::{CliError, print};
use crate::config::{Config, ConfigError, ServiceUrl, StateDir};
use crate::files::{create_private, create_private_dir, sync_dir};
use crate::keystore::{KeyStoreError, create_master};
use crate::lists;
use crate::pki::{Authority, Issued, PkiError, Role};
use crate::signing::{SigningError, new_key};
use crate::store::{Store, StoreError};

/// Why no verifier was made.
#[derive(Debug, Error)]
pub enum InitError {
    /// There is one already.
    #[error("{} exists already: this verifier is initialised, and its hosts and sealed images depend on it; give another --state directory, or move this one away", .0.display())]
    Exists(PathBuf),
    /// The directory could not be made.
    #[error("cannot create {}", .0.display())]
    Directory(PathBuf, #[source] io::Error),
    /// A file could not be written.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The URL cannot be used.
    #[error(transparent)]
    Url(#[from] ConfigError),
    /// Certificates could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A key to sign with could not be made.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// The key store could not be made.
    #[error(transparent)]
    KeyStore(#[from] KeyStoreError),
    /// The database could not be made.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The join file could not be written as JSON.
    #[error("cannot render the join file")]
    Join(#[source] serde_json::Error),
}

/// Options of `init`.
#[derive(Debug, clap::Args)]
pub(super) struct InitArgs {
    /// How hosts reach this verifier; the server certificate is made for this name or address
    #[arg(long, value_name = "https://NAME_OR_IP:PORT")]
    url: String,
    /// Address to listen on [default: every address, with the port of --url]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
}

pub(super) fn run(state: &StateDir, args: InitArgs) -> Result<(), CliError> {
    let url = args.url.parse().map_err(InitError::Url)?;
    create(state, &url, args.listen)?;
    print(&format!(
        "A new verifier is in {dir}\n\
         Hosts reach it at {url}\n\
         Join file: {join}\n\n\
         Next:\n  \
           assay-verifier --state {dir} serve\n  \
           on each host: copy the join file there and run: assay-agent join {name}\n  \
           assay-verifier --state {dir} host add NAME ADDRESS:PORT --ek-sha256 HEX\n",
        dir = state.path().display(),
        join = state.join_file().display(),
        name = state.join_file().file_name().unwrap_or_default().display(),
    ))
}

/// Makes a verifier in `state`. On failure, what was made is removed again.
pub fn create(state: &StateDir, url: &ServiceUrl, listen: Option<SocketAddr>) -> Result<(), InitError> {
    create_private_dir(state.path()).map_err(|e| InitError::Directory(state.path().to_owned(), e))?;
    // The first file is also the lock: of two that start at once, one finds it there.
    let mut made = Made::default();
    let now = OffsetDateTime::now_utc();
    let authority = Authority::generate(url, now)?;
    made.write(&state.key("ca"), authority.certificate().key_pem.as_bytes())?;
    made.write(
        &state.certificate("ca"),
        authority.certificate().certificate_pem.as_bytes(),
    )?;
    for role in [Role::Server, Role::Client, Role::Operator] {
        let names = if role == Role::Server {
            vec![url.address().host().to_owned()]
        } else {
            Vec::new()
        };
        let Issued {
            certificate_pem,
            key_pem,
        } = authority.issue(role, &names, now)?;
        made.write(&state.key(role.file()), key_pem.as_bytes())?;
        made.write(&state.certificate(role.file()), certificate_pem.as_bytes())?;
    }
    made.key_store(state.path())?;
    made.database(&state.database())?;
    made.write(&state.list_key(), new_key()?.as_bytes())?;
    made.write(&state.verdict_key(), new_key()?.as_bytes())?;
    made.write(&state.audit_key(), new_key()?.as_bytes())?;
    let list_key = lists::read_key(state)?.public().spki();
    let ca_pem = authority.certificate().certificate_pem.clone();
    let join = JoinFile {
        version: 1,
        verifiers: vec![url.to_string()],
        ca_pem,
        list_key: Some(B64(list_key)),
    };
    let join = serde_json::to_vec_pretty(&join).map_err(InitError::Join)?;
    made.write(&state.join_file(), &join)?;
    // Last: while config.toml is missing, every other command says that there is no verifier.
    let listen = listen.unwrap_or_else(|| every_address(url));
    made.write(&state.config(), Config::template(listen, url).as_bytes())?;
    sync_dir(state.path()).map_err(|e| InitError::Write(state.path().to_owned(), e))?;
    made.keep();
    Ok(())
}

/// The address that listens for everyone, of the URL's family.
fn every_address(url: &ServiceUrl) -> SocketAddr {
    let any = match url.address().ip() {
        Some(IpAddr::V6(_)) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    SocketAddr::new(any, url.address().port())
}

/// The files made so far; dropped before [`Made::keep`], it removes them: a failed `init` leaves nothing half done.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Made {
    fn write(&mut self, path: &Path, content: &[u8]) -> Result<(), InitError> {
        match create_private(path, content) {
            Ok(()) => self.0.push(path.to_owned()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(InitError::Exists(path.to_owned())),
            Err(e) => {
                self.0.push(path.to_owned());
                return Err(InitError::Write(path.to_owned(), e));
            }
        }
        Ok(())
    }

    fn key_store(&mut self, dir: &Path) -> Result<(), InitError> {
        create_master(dir)?;
        self.0.push(dir.join(crate::keystore::MASTER_FILE));
        Ok(())
    }

    fn database(&mut self, path: &Path) -> Result<(), InitError> {
        if path.exists() {
            return Err(InitError::Exists(path.to_owned()));
        }
        self.0.push(path.to_owned());
        Store::open(path)?;
        Ok(())
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            // The first error is the one to report; a file left over shows itself at the next try.
            let _left_over = std::fs::remove_file(path);
        }
    }
}
