//! Guest.
fn main() {}
