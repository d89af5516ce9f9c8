//! `assay-verifier`: see [`assay_verifier::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    assay_verifier::cli::main()
}
