//! What the verifier remembers: hosts with their pins and state, the logs held of their present boot, and policies.
//!
//! SQLite in WAL mode, so that `serve` and the operator's commands use one file at the same time. Calls block; async
//! code goes through [`Store::run`]. Nonces are not here: they die with the process on purpose.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use thiserror::Error;

mod holdings;
mod hosts;
mod lists;
mod logs;
mod policies;
mod schema;
mod standing;

pub use holdings::{Holding, Taking};
pub use hosts::{Host, HostState, MAX_TAGS, Measuring, NewHost, Quoted, Transition, Verdict, valid_name};
pub use lists::HostList;
pub use standing::Standing;

/// Why the store refused or failed.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The database file cannot be opened.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// SQLite's answer.
        #[source]
        cause: rusqlite::Error,
    },
    /// The file was written by a newer version.
    #[error("the database has schema version {found}, this program knows up to {known}: use the newer assay-verifier")]
    TooNew {
        /// Version in the file.
        found: u32,
        /// Newest version known here.
        known: u32,
    },
    /// A statement failed.
    #[error("the database could not {doing}")]
    Sql {
        /// What was being done.
        doing: &'static str,
        /// SQLite's answer.
        #[source]
        cause: rusqlite::Error,
    },
    /// A stored value cannot be read back.
    #[error("the database holds an unreadable {what}: restore state.db from a backup")]
    Corrupt {
        /// What kind of value.
        what: &'static str,
    },
    /// A host or policy name that would not survive a URL or a command line.
    #[error(
        "{0:?} is not a usable name: give 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    )]
    BadName(String),
    /// A tag that could not be demanded.
    #[error("{0:?} is no tag: 1 to 64 letters, digits, '-', '_' or '.'")]
    BadTag(String),
    /// More tags than anybody needs.
    #[error("a host with {0} tags: at most {MAX_TAGS} are kept")]
    TooManyTags(usize),
    /// The name is in use.
    #[error("host {0} exists already; to enrol it again, first run `assay-verifier host remove {0}`")]
    HostExists(String),
    /// Another host has one of these identities.
    #[error(
        "this {what} is already enrolled as host {host}; if the machine was renamed, first run `assay-verifier host remove {host}`"
    )]
    IdentityTaken {
        /// EK, AK or TLS key.
        what: &'static str,
        /// Who has it.
        host: String,
    },
    /// No host of this name.
    #[error("there is no host {0}: `assay-verifier host list` shows those that exist")]
    NoSuchHost(String),
    /// No policy of this name.
    #[error("there is no policy {0}: make it with `assay-verifier policy capture HOST --name {0}`")]
    NoSuchPolicy(String),
    /// The policy text is not one.
    #[error("policy {0} cannot be used")]
    Policy(String, #[source] assay_evidence::policy::PolicyError),
    /// The thread that ran the statement is gone; only at shutdown.
    #[error("the database thread ended before its answer")]
    Interrupted,
}

/// A handle to the database; clones share one connection.
#[derive(Clone)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
}

impl Store {
    /// Opens the database, creating or migrating it as needed.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |cause| StoreError::Open {
            path: path.to_owned(),
            cause,
        };
        if !path.exists() {
            // SQLite creates files by umask, and gives WAL and shared memory files the database's mode.
            let _created_by_another_process = crate::files::create_private(path, &[]);
        }
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection
            .pragma_update(None, "synchronous", "NORMAL")
            .map_err(failed)?;
        connection.pragma_update(None, "foreign_keys", true).map_err(failed)?;
        schema::migrate(&mut connection)?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// Runs blocking calls on the thread pool.
    pub async fn run<R, F>(&self, work: F) -> Result<R, StoreError>
    where
        R: Send + 'static,
        F: FnOnce(&Store) -> Result<R, StoreError> + Send + 'static,
    {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .map_err(|_| StoreError::Interrupted)?
    }

    /// One transaction; it counts only if `work` succeeds.
    fn transaction<R>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        // Immediate: a transaction that reads first and writes later could otherwise fail as busy half way.
        let transaction = connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(sql(doing))?;
        let result = work(&transaction)?;
        transaction.commit().map_err(sql(doing))?;
        Ok(result)
    }

    /// Reads without a transaction of its own.
    fn read<R>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Connection) -> rusqlite::Result<R>,
    ) -> Result<R, StoreError> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        work(&connection).map_err(sql(doing))
    }
}

fn sql(doing: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |cause| StoreError::Sql { doing, cause }
}

/// The other process writes for milliseconds; whoever waits longer than this meets a stuck one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
