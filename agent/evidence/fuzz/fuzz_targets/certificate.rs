//! Certificates of endorsement keys, from hosts and from operators.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assay_fuzz::certificate(data));
