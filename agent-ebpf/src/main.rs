//! The kernel programs of tiers 1 and 2: hash what is about to run, before it runs, queue a record of it, and in the modes
//! *hold* and *enforce* refuse what is not extended or not approved.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask`, one object, loaded by `assay_agent::measure::kernel`.
//! A program that answers 0 never turns another module's refusal into a permission, since the kernel stops at the first
//! program or module that answers with an error.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    unsafe_code,
    reason = "kernel pointers: every access is proved by the verifier at load time"
)]

mod argument;
mod bpf;
mod deeds;
mod file;
mod gate;
mod groups;
mod guard;
mod kernel;
mod module;
mod queue;
mod sha256;
mod task;

/// The kernel offers `bpf_d_path`, `bpf_ima_file_hash` and `bpf_probe_read_kernel` only to programs that declare a
/// GPL-compatible licence, so the programs in this object do. The source is Apache-2.0 OR MIT like the rest; MIT is
/// GPL-compatible, and the kernel knows that pair as "Dual MIT/GPL".
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: nothing here panics, and the verifier would refuse a loop without an end.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
