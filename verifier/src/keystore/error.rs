//! Why a key store refuses.

use std::{io, path::PathBuf};

use assay_evidence::uuid::Uuid;

use super::SourceError;

/// A refusal of the key store. Each names the thing and what to do; none carries a secret.
#[derive(Debug, thiserror::Error)]
pub enum KeyStoreError {
    /// The master key file isn't there.
    #[error(
        "key store: master key {path} is missing; restore it from your backup (without it no stored key can be read), or run `assay-verifier init` for a new verifier"
    )]
    MasterMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// A master key would have been overwritten, and with it every stored key lost.
    #[error("key store: master key {path} exists already and is not overwritten, since every stored key depends on it")]
    MasterExists {
        /// Where it is.
        path: PathBuf,
    },
    /// The master key file isn't 32 bytes long.
    #[error("key store: master key {path} has {len} bytes instead of 32; restore it from your backup")]
    MasterSize {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// Somebody other than the owner may read or write the file.
    #[error(
        "key store: {path} has mode {mode:04o}, which lets others in; check who could read it, then `chmod go= {path}`"
    )]
    Permissions {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// There is no key with this id.
    #[error("key store: no key {key_id}; `assay-verifier key list` shows those that exist")]
    NotFound {
        /// The id asked for.
        key_id: Uuid,
    },
    /// A key with this id exists already.
    #[error("key store: a key {key_id} exists already and is not overwritten")]
    Exists {
        /// The id.
        key_id: Uuid,
    },
    /// A file in the key directory is not named like a key.
    #[error("key store: {path} is not named <uuid>.json; move it out of the key directory")]
    StrangeFile {
        /// The file.
        path: PathBuf,
    },
    /// The file is longer than any key file.
    #[error("key store: {path} has {len} bytes, more than the {limit} of any key file; restore it from your backup")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file isn't JSON of the expected shape.
    #[error("key store: {path} is not a key file; restore it from your backup")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the JSON reader says.
        #[source]
        source: serde_json::Error,
    },
    /// The file is of a version that this program doesn't know.
    #[error(
        "key store: {path} has format version {version}, this program knows version {known}; use the program that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        version: u32,
        /// The version that this program knows.
        known: u32,
    },
    /// The file holds another key than its name says.
    #[error("key store: {path} holds key {key_id}: the file was renamed; give it its own name back")]
    Renamed {
        /// The file.
        path: PathBuf,
        /// The id inside.
        key_id: Uuid,
    },
    /// The file was changed after it was written, or under another master key.
    #[error(
        "key store: {path} fails its authentication: it was changed, or written under another master key; restore file and master key from the same backup"
    )]
    Tampered {
        /// The file.
        path: PathBuf,
    },
    /// Tags that no host can have.
    #[error(
        "key store: key {key_id} can't demand these tags: at most 64, each 1 to 64 letters, digits, '-', '_' or '.'"
    )]
    Tags {
        /// The key.
        key_id: Uuid,
    },
    /// A lease of a key that the agent gives away.
    #[error(
        "key store: key {key_id} is a VHD's: the storage manager gets it from the agent, which cannot take it back, so it can have neither a lease nor a rule for its loss"
    )]
    VhdLease {
        /// The key.
        key_id: Uuid,
    },
    /// Terms that make no sense.
    #[error("key store: key {key_id} can't have these terms")]
    Terms {
        /// The key.
        key_id: Uuid,
        /// What is wrong with them.
        #[source]
        source: assay_evidence::terms::TermsError,
    },
    /// A name is longer than the format can hold.
    #[error("key store: {field} has {len} bytes, at most {limit} fit; choose a shorter one")]
    FieldTooLong {
        /// Which field.
        field: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Not as many bytes as a VHD's key has.
    #[error("key store: the key of a VHD has 32 or 64 raw bytes, this one has {len}")]
    VhdKey {
        /// Its length in bytes.
        len: usize,
    },
    /// The system gave no random bytes.
    #[error("key store: the system gives no random bytes; check that getrandom(2) works for this process")]
    Random,
    /// The sealing operation itself failed, which takes inputs of impossible size.
    #[error("key store: AES-256-GCM refused to encrypt key {key_id}")]
    Encrypt {
        /// The key.
        key_id: Uuid,
    },
    /// The key's other half is on a server, and no server is configured.
    #[error(
        "key store: the other half of key {key_id} is in a key source ({engine}), and config.toml names none: give it `[key_source]` again"
    )]
    NoSource {
        /// The key.
        key_id: Uuid,
        /// The server's engine.
        engine: &'static str,
    },
    /// The server gave a half of another key.
    #[error(
        "key store: what the key source has for key {key_id} is not its other half: it was overwritten there; restore it from that server's backup"
    )]
    OtherHalf {
        /// The key.
        key_id: Uuid,
    },
    /// The key is where it was to be moved.
    #[error("key store: key {key_id} is {place} already")]
    Stays {
        /// The key.
        key_id: Uuid,
        /// Where it is.
        place: &'static str,
    },
    /// Keys were to be moved to a key source, and none is configured.
    #[error("key store: config.toml names no key source that keys could be moved to: give it `[key_source]`")]
    NoTarget,
    /// The key source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An operation on a file failed.
    #[error("key store: can't {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}
