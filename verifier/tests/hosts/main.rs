//! Verifier and hosts together: the program as operators run it, beside agents with a TPM each, over real TLS. Only the
//! kernel's measurements are made up here; each is a kernel record, and goes the whole way through log and TPM. Modules named `tpm_` need
//! swtpm, those named `peer_` that and the server of somebody else.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod harness;
mod host;
mod http;
mod peer_key_source;
mod peer_key_source_login;
mod pki;
mod site;
mod store;
mod tpm_audit;
mod tpm_counters;
mod tpm_enrolment;
mod tpm_hooks;
mod tpm_hostile;
mod tpm_leases;
mod tpm_lifecycle;
mod tpm_lists;
mod tpm_looks;
mod tpm_migration;
mod tpm_release;
mod tpm_storm;
mod tpm_terms;
mod tpm_verdict;
