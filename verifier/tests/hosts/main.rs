//! Verifier and hosts together: the program as operators run it, beside agents with a TPM each, over real TLS. Only the
//! kernel's measurements are made up here; each is a kernel record, and goes the whole way through log and TPM. Modules named `tpm_` need swtpm.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod host;
mod http;
mod pki;
mod site;
mod store;
mod tpm_enrolment;
mod tpm_lifecycle;
mod tpm_lists;
mod tpm_release;
mod tpm_verdict;
