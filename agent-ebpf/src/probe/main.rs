//! The kernel side of tier 3: probes on the security hooks' own functions, which tell what is about to be loaded.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask`, an object of its own, loaded by `assay_agent::measure::probe`. It
//! keeps to what the verifier of Linux 4.19 takes: no read-only data, no jump backwards, no function calls, at most 4096
//! instructions a program, instruction set v2, no helper that is newer. `tests/vm/tier3.rs` checks the object for that.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    unsafe_code,
    reason = "kernel memory: read with bpf_probe_read, which checks every address; own memory is proved by the verifier"
)]

mod deeds;
mod file;
mod hooks;
mod kernel;
mod path;
mod send;

/// The helpers that read the kernel's memory are for programs with a GPL-compatible licence only. The source is
/// Apache-2.0 OR MIT like the rest; MIT is GPL-compatible, and the kernel knows that pair as "Dual MIT/GPL".
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Kernels before 5.0 load probes only for the very version that these name.
#[unsafe(link_section = "version")]
#[unsafe(no_mangle)]
static VERSION: u32 = assay_ebpf::probe_record::VERSION;

/// Never reached: nothing here panics.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
