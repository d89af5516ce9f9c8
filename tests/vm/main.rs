//! Tests that need a kernel: each restores its own machine with its own TPM. `cargo xtask test vm` runs them.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    reason = "what a helper of a test finds missing is a failure of that test"
)]

mod agent;
mod common;
mod deeds;
mod disks;
mod doctor;
mod enforce;
mod faults;
mod harness;
mod hold;
mod hooks;
mod kernel;
mod leases;
mod load;
mod log;
mod matrix;
mod measured_boot;
mod probe_object;
mod protect;
mod qcow2;
mod storm;
mod story;
mod tier2;
mod tier3;
mod update;
