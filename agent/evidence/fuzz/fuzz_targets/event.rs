//! Single events of the runtime log.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| assay_fuzz::event(data));
