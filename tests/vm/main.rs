//! Tests that need a kernel: each restores its own machine with its own TPM. `cargo xtask test vm` runs them.

mod harness;
