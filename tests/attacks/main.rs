//! The attacks of the attack table (agent/docs/attacks.md), one test a row, each played in a machine: what the hook answers,
//! what the log says, what the verifier makes of it - and what the kernel's own IMA recorded of the same attack.
//! `cargo xtask test attacks --matrix` runs them and prints the table.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    reason = "what a helper of a test finds missing is a failure of that test"
)]

#[expect(dead_code, reason = "shared with the tests of the layer vm")]
#[path = "../vm/common.rs"]
mod common;
#[expect(dead_code, reason = "shared with the tests of the layer vm")]
#[path = "../vm/log.rs"]
mod log;

mod agent;
mod beyond;
mod deeds;
mod evidence;
mod loads;
mod payload;
mod races;
mod row;
mod scene;
mod way;
