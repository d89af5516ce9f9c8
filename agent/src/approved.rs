//! The approved list on this host: what may run in enforce mode, as the joined verifier signed it.
//!
//! Lists come from the verifier's connection or from a file (`assay-agent approve`); either way only the signature counts.
//! The last one taken is in the state folder as it came, and is verified again whenever it is read. An older one is refused;
//! whoever can write to the state folder can put an older one there all the same, which the verifier sees: the log names the
//! list in force, and what runs is measured and judged in any case.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use assay_evidence::approved::{ApprovedList, ListError, MAX_LIST, UntrustedList};
use assay_evidence::wire::{ListHead, ListStatus};
use hyper::body::Body;
use hyper::{Request, StatusCode};

use crate::files::replace_private;
use crate::http::{self, ApiError, Response, chain};
use crate::join::{JoinError, Joined};

/// In the state folder.
const FILE: &str = "approved.jws";
/// For the largest list over a slow line.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a list is not taken, or the one that is held can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ApprovedError {
    /// Nobody could have signed it.
    #[error(
        "this host has joined no verifier, so there is no key to check an approved list by: run `assay-agent join FILE`"
    )]
    NotJoined,
    /// The join file is of before there were lists.
    #[error(
        "the join file that this host has joined with has no key for approved lists: take the verifier's present join file \
         and run `assay-agent join FILE` again"
    )]
    NoKey,
    /// The join state.
    #[error("the join state cannot be used")]
    Join(#[from] JoinError),
    /// The list.
    #[error("the approved list is refused")]
    List(#[from] ListError),
    /// The list that is held could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The list could not be stored.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The thread that checked it is gone; only at shutdown.
    #[error("the agent ends")]
    Interrupted,
}

/// Called with each list that is taken, after it is on disk.
type Hook = Box<dyn Fn(&ApprovedList) + Send>;

/// The list of this host; clones share it.
#[derive(Clone)]
pub struct ApprovedStore(Arc<Shared>);

struct Shared {
    state_dir: PathBuf,
    /// The list itself stays on disk: it can be megabytes, and is needed when it changes.
    head: Mutex<Option<ListHead>>,
    /// Held while a list is being taken, so that this is done one by one; `head` is never held for long.
    taking: Mutex<Option<Hook>>,
}

impl ApprovedStore {
    /// The store in this state folder. A list there that can't be used (any more) counts as none; [`ApprovedStore::load`]
    /// tells why.
    #[must_use]
    pub fn open(state_dir: &Path) -> Self {
        let store = Self(Arc::new(Shared {
            state_dir: state_dir.to_owned(),
            head: Mutex::new(None),
            taking: Mutex::new(None),
        }));
        match store.load() {
            Ok(list) => *lock(&store.0.head) = list.map(|list| list.head()),
            Err(ApprovedError::NotJoined | ApprovedError::NoKey) => {}
            Err(error) => tracing::warn!(
                "the approved list that this host held cannot be used: {}",
                chain(&error)
            ),
        }
        store
    }

    /// The list that is held, verified anew; `None` when there is none yet. Whether it is expired does not matter: a host
    /// that is cut off from its verifier must be able to boot.
    ///
    /// # Errors
    /// [`ApprovedError`]: there is one that can't be used.
    pub fn load(&self) -> Result<Option<ApprovedList>, ApprovedError> {
        let path = self.0.state_dir.join(FILE);
        let bytes = match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| ApprovedError::Read { path, source })?,
        };
        self.verify(&bytes).map(Some)
    }

    /// What the verifier is told: by which key lists are checked, and which one is held. `None` without such a key.
    #[must_use]
    pub fn status(&self) -> Option<ListStatus> {
        // Read anew: joining once more can bring the key while the agent runs.
        let joined = Joined::load(&self.0.state_dir).ok()??;
        Some(ListStatus {
            key_sha256: joined.membership.list_key()?.spki_sha256(),
            list: self.head(),
        })
    }

    /// Which list is held.
    #[must_use]
    pub fn head(&self) -> Option<ListHead> {
        *lock(&self.0.head)
    }

    /// From now on, `hook` is called with each list that is taken, in their order and one at a time; the
    /// next waits until it returns. It must not take a list itself. A list that was there before is not told: [`ApprovedStore::load`] gives it.
    pub fn on_change(&self, hook: impl Fn(&ApprovedList) + Send + 'static) {
        *lock(&self.0.taking) = Some(Box::new(hook));
    }

    /// Takes a signed list as it came, if it is this host's and not older than the one that is held; it is on disk when this
    /// returns. Gives what is held then. `now` is Unix time. Blocks for as long as a disk takes.
    ///
    /// # Errors
    /// [`ApprovedError`]; what is held stays.
    pub fn accept(&self, bytes: &[u8], now: u64) -> Result<ListHead, ApprovedError> {
        let list = self.verify(bytes)?;
        let hook = lock(&self.0.taking);
        let held = match self.load() {
            // Of a verifier that was left, or damaged: no reason to refuse a good one.
            Err(ApprovedError::List(error)) => {
                tracing::warn!(
                    "the approved list that was held is replaced, it could not be used: {}",
                    chain(&error)
                );
                None
            }
            other => other?,
        };
        if !list.replaces(held.as_ref(), now)? {
            return Ok(held.as_ref().unwrap_or(&list).head());
        }
        drop(held);
        replace_private(&self.0.state_dir, FILE, bytes).map_err(|source| ApprovedError::Write {
            path: self.0.state_dir.join(FILE),
            source,
        })?;
        let head = list.head();
        *lock(&self.0.head) = Some(head);
        tracing::info!(
            serial = head.serial,
            digests = head.entries,
            policy = list.policy(),
            "a new approved list was taken"
        );
        if let Some(hook) = hook.as_ref() {
            hook(&list);
        }
        Ok(head)
    }

    /// Takes the list that is a request's body.
    ///
    /// # Errors
    /// As the asker sees them.
    pub async fn receive<B>(&self, request: Request<B>) -> Result<Response, ApiError>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let bytes = http::read_body(request, MAX_LIST, BODY_TIMEOUT).await?;
        let store = self.clone();
        let taken = tokio::task::spawn_blocking(move || store.accept(&bytes, now()))
            .await
            .map_err(|_| ApprovedError::Interrupted)?;
        match taken {
            Ok(head) => Ok(http::ok(&head)),
            Err(error) => {
                tracing::warn!("an approved list is not taken: {}", chain(&error));
                Err(error.into())
            }
        }
    }

    fn verify(&self, bytes: &[u8]) -> Result<ApprovedList, ApprovedError> {
        let joined = Joined::load(&self.0.state_dir)?.ok_or(ApprovedError::NotJoined)?;
        let key = joined.membership.list_key().ok_or(ApprovedError::NoKey)?;
        Ok(UntrustedList::new(bytes)?.verify(key, &joined.spki())?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unix time; 0 on a host whose clock is before 1970.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Reads a list's file, and not much more than a list can be long.
///
/// # Errors
/// What the system says.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One more for a line end, and one to tell that it is too long.
    File::open(path)?
        .take((MAX_LIST as u64).saturating_add(2))
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl From<ApprovedError> for ApiError {
    fn from(error: ApprovedError) -> Self {
        let (status, code) = match &error {
            ApprovedError::NotJoined => (StatusCode::CONFLICT, "not-joined"),
            ApprovedError::NoKey => (StatusCode::CONFLICT, "no-list-key"),
            ApprovedError::Join(_) => (StatusCode::INTERNAL_SERVER_ERROR, "join-damaged"),
            ApprovedError::List(error) => list_code(error),
            ApprovedError::Read { .. } | ApprovedError::Write { .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, "list-not-stored")
            }
            ApprovedError::Interrupted => (StatusCode::SERVICE_UNAVAILABLE, "worker-failed"),
        };
        Self::new(status, code, chain(&error))
    }
}

const fn list_code(error: &ListError) -> (StatusCode, &'static str) {
    match error {
        ListError::Signature => (StatusCode::FORBIDDEN, "list-signature"),
        ListError::OtherHost { .. } => (StatusCode::FORBIDDEN, "list-other-host"),
        ListError::Expired { .. } => (StatusCode::FORBIDDEN, "list-expired"),
        ListError::Rollback { .. } => (StatusCode::CONFLICT, "list-rollback"),
        ListError::SameSerial(_) => (StatusCode::CONFLICT, "list-serial"),
        ListError::TooLong(_) => (StatusCode::PAYLOAD_TOO_LARGE, "body-too-large"),
        _ => (StatusCode::BAD_REQUEST, "list-malformed"),
    }
}

#[cfg(test)]
#[path = "approved_tests.rs"]
mod tests;
