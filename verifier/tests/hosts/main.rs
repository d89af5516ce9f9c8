//! Verifier and hosts together: the program as operators run it, beside agents with a TPM each, over real TLS. Only the
//! kernel's measurements are made up here; each is a kernel record, and goes the whole way through log and TPM.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod enrolment;
mod host;
mod http;
mod lifecycle;
mod pki;
mod release;
mod site;
mod store;
