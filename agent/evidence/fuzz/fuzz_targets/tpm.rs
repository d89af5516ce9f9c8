//! What a TPM says.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assay_fuzz::tpm(data));
