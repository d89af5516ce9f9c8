//! The kernel's IMA list.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assay_fuzz::ima_log(data));
