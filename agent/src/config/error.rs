//! Everything that a configuration can be refused for.

use std::path::PathBuf;

use super::MAX_FILE;

/// Why a configuration was refused. The text names the file, and the key where there is one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing or unreadable.
    #[error("cannot read configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is far larger than any configuration.
    #[error("{path} is larger than {MAX_FILE} bytes: this is not a configuration file")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{path}:{line}: {message}; correct or remove this line")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The parser's words; they name the key.
        message: String,
    },
    /// A register that is not ours to extend.
    #[error("{path}: tpm.pcr = {pcr} is refused: {reason}; use 12, 13 (the default) or 14")]
    Pcr {
        /// The file.
        path: PathBuf,
        /// The register asked for.
        pcr: i64,
        /// Who owns it.
        reason: &'static str,
    },
    /// A word that is not a mode at all.
    #[error("{path}: measure.mode = {mode:?} is not a mode; use \"observe\", \"hold\" or \"enforce\"")]
    ModeUnknown {
        /// The file.
        path: PathBuf,
        /// The word.
        mode: String,
    },
    /// A number outside of its range.
    #[error("{path}: {key} = {value} is out of range; use {range}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The key with its section.
        key: &'static str,
        /// The value given.
        value: String,
        /// What is accepted.
        range: &'static str,
    },
    /// A folder or file given relative to nobody knows what.
    #[error("{path}: {key} = {value:?} is not an absolute path; start it with /")]
    RelativePath {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The value given.
        value: PathBuf,
    },
    /// A log level that does not exist.
    #[error("{path}: log.level = {value:?} is unknown; use error, warn, info, debug or trace")]
    Level {
        /// The file.
        path: PathBuf,
        /// The word.
        value: String,
    },
}
