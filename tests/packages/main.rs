//! The packages that `cargo xtask package` makes, read by the programs that will install them, and installed in machines.
//! `cargo xtask test packages` builds them, twice, and names the folders in two variables.
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

mod built;
mod contents;
mod debian13;
mod defaults;
mod initramfs;
mod machine;
mod quick_start;
mod readme;
mod update;
mod xcpng;
