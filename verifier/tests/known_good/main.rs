//! Known-good digests, held against what dpkg, rpm, cpio, the compressors and sha256sum say of the same files.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod deb;
mod hostile;
mod initramfs;
mod root;
mod rpm;
mod tree;
