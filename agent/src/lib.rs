//! The Assay agent: measures what a host runs, attests to it, and opens encrypted disks while it is trusted.
//!
//! [`measure`] turns kernel events into the runtime log and the PCR, [`serve`] answers verifiers over mutual TLS, [`unlock`]
//! fetches disk keys. These three never import one another; they meet in [`daemon`], through the TPM's [`tpm::Handle`] and
//! the [`log_view::LogView`].

pub mod approved;
pub mod bundle;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod early;
pub mod files;
pub mod http;
pub mod join;
pub mod kernel_age;
pub mod leases;
pub mod log_view;
pub mod measure;
pub mod memory;
pub mod nudge;
pub mod serve;
pub mod supervisor;
pub mod tier;
pub mod tpm;
pub mod unlock;
