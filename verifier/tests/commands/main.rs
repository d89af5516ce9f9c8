//! The operator's commands, run as programs.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod image;
mod inspect;
mod known_good;
mod peer_glance;
mod policy;
mod program;
mod transfer;
mod vhd;
