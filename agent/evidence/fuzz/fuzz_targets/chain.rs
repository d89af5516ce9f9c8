//! Everything from a bundle to a verdict.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assay_fuzz::chain(data));
