//! Approved lists: what each host may run in enforce mode, signed here and taken by its agent.
//!
//! A host gets its own list whenever what its policy approves has changed, and not otherwise: what the last one said and its
//! digest are in the database, and the agent's identity tells which one it holds. Serial numbers are Unix times, or one more
//! than the last; so they go up even when the database is restored from a backup.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use assay_evidence::approved::{ListDraft, ListError, ListSigner};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::policy::Policy;
use assay_evidence::wire::{B64, JoinFile, ListHead, ListStatus};
use thiserror::Error;

use crate::client::{Agent, ClientError};
use crate::config::StateDir;
use crate::files::replace_private;
use crate::judge::reason;
use crate::signing::{self, SigningError};
use crate::store::{Host, HostList, Store, StoreError};
use crate::time::unix_now;

/// Why approved lists can't be signed.
#[derive(Debug, Error)]
pub enum ListsError {
    /// The key.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// A file could not be written.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The join file could not be read.
    #[error("cannot read {}: restore it from a backup of the state directory", .0.display())]
    JoinRead(PathBuf, #[source] io::Error),
    /// The join file is none.
    #[error("{} is not a join file: restore it from a backup of the state directory", .0.display())]
    Join(PathBuf, #[source] serde_json::Error),
    /// The list itself.
    #[error("no list can be made from policy {0}")]
    List(String, #[source] ListError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reads the key of a state directory.
pub fn read_key(state: &StateDir) -> Result<ListSigner, SigningError> {
    signing::read_key(&state.list_key())
}

/// Signs lists, and brings them to hosts.
pub struct Lists {
    signer: ListSigner,
    /// Hosts that did not take a list: what it said, and when to try again.
    refused: Mutex<HashMap<i64, (Sha256Digest, Instant)>>,
}

/// A signed list.
pub struct Signed {
    /// As it goes to the host.
    pub text: String,
    /// What identifies it.
    pub head: ListHead,
}

/// What a host's policy approves now.
pub struct Wanted {
    policy: String,
    digests: Vec<Sha256Digest>,
    content: Sha256Digest,
}

impl Wanted {
    /// Takes what the policy enforces now.
    #[must_use]
    pub fn of(policy: &Policy) -> Self {
        let digests = policy.enforced(unix_now());
        let mut parts = vec![policy.name().as_bytes(), &[0]];
        parts.extend(digests.iter().map(AsRef::as_ref));
        Self {
            policy: policy.name().to_owned(),
            content: Sha256Digest::of_parts(&parts),
            digests,
        }
    }
}

impl Lists {
    /// Reads the key. A state directory of before there were lists gets one, and its join file names it from then on.
    pub fn open(state: &StateDir) -> Result<Self, ListsError> {
        let (signer, made) = signing::open_key(&state.list_key())?;
        if made {
            tracing::info!("made a key for approved lists; hosts know it once they join again");
        }
        name_in_join_file(state, &signer)?;
        Ok(Self {
            signer,
            refused: Mutex::default(),
        })
    }

    /// Signs what a policy approves, for every host of this verifier.
    pub fn sign_for_all(&self, store: &Store, policy: &Policy, expires: Option<u64>) -> Result<Signed, ListsError> {
        self.sign(store, Wanted::of(policy), None, expires)
    }

    /// Signs what a policy approves, for one host; a poll of this host then finds that it holds what it should.
    pub fn sign_for(
        &self,
        store: &Store,
        host: &Host,
        wanted: Wanted,
        expires: Option<u64>,
    ) -> Result<Signed, ListsError> {
        let content = wanted.content;
        let signed = self.sign(
            store,
            wanted,
            Some(Sha256Digest::new(host.pinned.tls_spki_sha256)),
            expires,
        )?;
        let list = HostList {
            serial: signed.head.serial,
            sha256: signed.head.sha256,
            content,
            problem: Some(NOT_YET.to_owned()),
        };
        store.put_host_list(host.id, &list)?;
        Ok(signed)
    }

    fn sign(
        &self,
        store: &Store,
        wanted: Wanted,
        host: Option<Sha256Digest>,
        expires: Option<u64>,
    ) -> Result<Signed, ListsError> {
        let entries = u64::try_from(wanted.digests.len()).unwrap_or(u64::MAX);
        let serial = store.next_list_serial()?;
        let draft = ListDraft {
            policy: wanted.policy.clone(),
            host,
            serial,
            issued: unix_now(),
            expires,
            digests: wanted.digests,
        };
        let text = draft
            .sign(&self.signer)
            .map_err(|cause| ListsError::List(wanted.policy, cause))?;
        let sha256 = Sha256Digest::of(text.as_bytes());
        Ok(Signed {
            text,
            head: ListHead {
                serial,
                sha256,
                entries,
            },
        })
    }

    /// Brings a host its list, unless it holds it already; whether it did. What keeps it from the host is written down, and is
    /// no reason to end the service.
    pub async fn deliver(
        self: &Arc<Self>,
        store: &Store,
        host: &Host,
        agent: &mut Agent,
        status: Option<&ListStatus>,
        wanted: Wanted,
    ) -> Result<bool, StoreError> {
        let problem = match self.try_to_deliver(store, host, agent, status, wanted).await {
            Ok(Outcome::Later) => return Ok(false),
            Ok(Outcome::Held) => None,
            Err(Refused::Store(error)) => return Err(error),
            Err(Refused::Problem(problem) | Refused::Broken(problem)) => Some(problem),
        };
        let (id, text) = (host.id, problem.clone());
        let changed = store.run(move |s| s.set_list_problem(id, text.as_deref())).await?;
        let held = problem.is_none();
        if let (true, Some(problem)) = (changed, problem) {
            tracing::warn!(
                "host {}: its approved list is not delivered: {problem}",
                host.pinned.name
            );
        }
        Ok(held)
    }

    async fn try_to_deliver(
        self: &Arc<Self>,
        store: &Store,
        host: &Host,
        agent: &mut Agent,
        status: Option<&ListStatus>,
        wanted: Wanted,
    ) -> Result<Outcome, Refused> {
        let status = self.usable(status).map_err(|text| Refused::Problem(text.to_owned()))?;
        let (id, content) = (host.id, wanted.content);
        let last = store.run(move |s| s.host_list(id)).await.map_err(Refused::Store)?;
        let held = status.list.map(|list| list.sha256);
        if last.is_some_and(|last| last.content == content && Some(last.sha256) == held) {
            self.took(id);
            return Ok(Outcome::Held);
        }
        if self.must_wait(id, content) {
            return Ok(Outcome::Later);
        }
        let delivered = self.bring(store, host, agent, wanted).await;
        match &delivered {
            Ok(()) => self.took(id),
            Err(Refused::Broken(_)) => self.wait(id, content, RETRY_BROKEN),
            Err(_) => self.wait(id, content, RETRY),
        }
        delivered.map(|()| Outcome::Held)
    }

    async fn bring(
        self: &Arc<Self>,
        store: &Store,
        host: &Host,
        agent: &mut Agent,
        wanted: Wanted,
    ) -> Result<(), Refused> {
        let problem = |error: &dyn std::error::Error| Refused::Problem(reason(error));
        let (lists, row) = (Arc::clone(self), host.clone());
        let signed = store.run(move |s| Ok(lists.sign_for(s, &row, wanted, None))).await;
        let Signed { text, head } = signed.map_err(Refused::Store)?.map_err(|error| match error {
            ListsError::Store(error) => Refused::Store(error),
            error => problem(&error),
        })?;
        let answer = agent.put_approved(text).await.map_err(|error| match error {
            ClientError::Refused(_) => problem(&error),
            _ => Refused::Broken(reason(&error)),
        })?;
        if answer != head {
            return Err(Refused::Problem(format!(
                "the agent says that it holds list {} after it was brought list {}",
                answer.serial, head.serial
            )));
        }
        tracing::info!(
            "host {}: took approved list {} with {} digests",
            host.pinned.name,
            head.serial,
            head.entries
        );
        Ok(())
    }

    /// Whether the agent would take a list of ours.
    fn usable<'a>(&self, status: Option<&'a ListStatus>) -> Result<&'a ListStatus, &'static str> {
        match status {
            None => Err(
                "its join file has no key for approved lists: run `assay-agent join FILE` there again, with the present join file",
            ),
            Some(status) if status.key_sha256 != self.signer.public().spki_sha256() => Err(
                "it checks approved lists by another key: run `assay-agent join FILE` there again, with the present join file",
            ),
            Some(status) => Ok(status),
        }
    }

    fn must_wait(&self, host: i64, content: Sha256Digest) -> bool {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused
            .get(&host)
            .is_some_and(|(said, until)| *said == content && Instant::now() < *until)
    }

    fn wait(&self, host: i64, content: Sha256Digest, after: Duration) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.insert(host, (content, Instant::now() + after));
    }

    fn took(&self, host: i64) {
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&host);
    }
}

enum Outcome {
    /// The host holds what it should.
    Held,
    /// It refused this one a short time ago.
    Later,
}

enum Refused {
    Store(StoreError),
    Problem(String),
    /// The connection did not last.
    Broken(String),
}

/// Adds the key to a join file that does not name it yet.
fn name_in_join_file(state: &StateDir, signer: &ListSigner) -> Result<(), ListsError> {
    let path = state.join_file();
    let text = std::fs::read(&path).map_err(|error| ListsError::JoinRead(path.clone(), error))?;
    let mut file: JoinFile = serde_json::from_slice(&text).map_err(|error| ListsError::Join(path.clone(), error))?;
    let key = Some(B64(signer.public().spki()));
    if file.list_key == key {
        return Ok(());
    }
    file.list_key = key;
    let text = serde_json::to_vec_pretty(&file).map_err(|error| ListsError::Join(path.clone(), error))?;
    replace_private(&path, &text).map_err(|error| ListsError::Write(path, error))
}

/// A list of megabytes that was refused is not brought again with every poll.
const RETRY: Duration = Duration::from_secs(600);
/// Nor one over a line that breaks.
const RETRY_BROKEN: Duration = Duration::from_secs(20);
/// What stands in the database between signing and the agent's answer.
const NOT_YET: &str = "signed, and not delivered yet";
