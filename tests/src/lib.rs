//! What the tests of this workspace stand on: a TPM of their own ([`Swtpm`]), a way to make it misbehave
//! ([`TpmProxy`]), and whole machines with a kernel and a virtual TPM ([`vm::Vm`]).
//!
//! Every process started here dies with its owner: on drop, on panic, and when the test process is killed.
//! This library needs no system package to build, so that `xtask` can use it before anything is installed.

pub mod agent;
pub mod bao;
pub mod child;
pub mod guest;
pub mod hooks;
pub mod image_store;
pub mod load;
pub mod packages;
pub mod proxy;
mod python;
pub mod stats;
pub mod storm;
pub mod swtpm;
pub mod tiny;
pub mod verifier;
pub mod vm;
pub mod wire;

use std::path::PathBuf;

pub use proxy::TpmProxy;
pub use python::pythons;
pub use swtpm::Swtpm;

/// Why the harness could not do what a test asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarnessError {
    /// A file or socket operation failed.
    #[error("cannot {action}")]
    Io {
        /// What was being done, naming the file or address.
        action: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program that the harness needs is not installed, or cannot be started.
    #[error("cannot start {program}: `cargo xtask setup` installs it")]
    Start {
        /// The program's name.
        program: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program ended with an error.
    #[error("{program} failed ({status}): {output}")]
    Failed {
        /// The program's name.
        program: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it printed, both streams.
        output: String,
    },
    /// A program was started but never became ready, or a machine did not answer.
    #[error("{what} within {seconds} s{detail}")]
    Timeout {
        /// What did not happen.
        what: String,
        /// How long it was waited for.
        seconds: u64,
        /// Last words, such as the end of a log, with their own separator; may be empty.
        detail: String,
    },
    /// No pair of neighbouring loopback ports was free after many attempts.
    #[error("no two neighbouring TCP ports are free on 127.0.0.1")]
    NoPorts,
    /// The guest refused a request.
    #[error("the guest could not {request}: {message}")]
    Guest {
        /// The request, in short.
        request: String,
        /// What the guest said.
        message: String,
    },
    /// A file that the image builder writes is missing or does not read.
    #[error("{path} is unusable ({message}): run `cargo xtask test vm`, or `cargo xtask vm --build-only`")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

impl HarnessError {
    /// Adds to an I/O error what was being done.
    pub fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}
