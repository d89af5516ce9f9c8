//! Other people's data: logs and quotes of real machines, with what those machines reported. It lies in
//! `../shared/vectors` beside the repository; `cargo xtask test vectors` runs this, and says so where it is absent.

mod boot_logs;
mod cel;
mod ima;
mod quotes;

use std::path::{Path, PathBuf};

/// A file or folder among the vectors.
fn vector(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/vectors")
        .join(path)
}

/// A vector's bytes.
fn read(path: &str) -> Vec<u8> {
    std::fs::read(vector(path)).expect("a vector")
}

/// A vector in JSON.
fn read_json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&read(path)).expect("JSON")
}

/// A field of a JSON vector, as text.
fn text<'a>(value: &'a serde_json::Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(serde_json::Value::as_str)
        .expect("a text field")
}

/// Standard base64.
fn base64(text: &str) -> Vec<u8> {
    serde_json::from_value::<assay_evidence::wire::B64>(text.into())
        .expect("base64")
        .0
}
