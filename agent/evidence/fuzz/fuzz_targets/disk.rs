//! Disk tokens, headers of images, and wrapped keys.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assay_fuzz::disk(data));
