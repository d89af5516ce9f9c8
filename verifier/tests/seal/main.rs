//! Sealed images, held against stock cryptsetup and qemu: they must read the header, open the key slot, and give back the very
//! disk that went in, with none of our code involved.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod bench;
mod formats;
mod in_place;
mod recovery;
mod rotation;
mod sealing;
