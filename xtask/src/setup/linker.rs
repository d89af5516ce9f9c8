//! bpf-linker: links the kernel programs with the compiler's own LLVM.

use std::path::PathBuf;
use std::process::Command;

use crate::run::{Error, cargo, output, step};
use crate::workspace::cache;

/// The last release that opens the compiler's libLLVM by itself (up to LLVM 22). Later ones link one LLVM of the
/// system: when the compiler's LLVM passes 22, this has to move together with an llvm-NN-dev package.
pub const VERSION: &str = "0.10.4";

/// The folder to put in PATH, if the right version is in the cache or in PATH.
pub fn find() -> Result<Option<PathBuf>, Error> {
    let own = folder()?.join("bin");
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let right = |dir: &PathBuf| {
        let program = dir.join("bpf-linker");
        program.is_file()
            && output(Command::new(&program).arg("--version")).is_ok_and(|version| version.trim().ends_with(VERSION))
    };
    Ok(std::iter::once(own).chain(std::env::split_paths(&in_path)).find(right))
}

/// Builds it into the cache.
pub fn install() -> Result<PathBuf, Error> {
    let folder = folder()?;
    let mut command = cargo();
    command
        .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--root"])
        .arg(&folder)
        // Half the time and a sixteenth of the size.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env_remove("CARGO_TARGET_DIR");
    step(
        &format!("building bpf-linker {VERSION} (2 minutes on 2 cores)"),
        &mut command,
    )?;
    Ok(folder.join("bin"))
}

fn folder() -> Result<PathBuf, Error> {
    cache(&format!("bpf-linker-{VERSION}"))
}
