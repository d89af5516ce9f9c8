//! Tools that come from crates.io: built once, into the cache.

use std::path::PathBuf;
use std::process::Command;

use crate::run::{Error, cargo, output, step};
use crate::workspace::cache;

/// Such a tool.
#[derive(Debug)]
pub struct Tool {
    /// Its crate and its program.
    pub name: &'static str,
    /// The one version that will do.
    pub version: &'static str,
}

/// bpf-linker: links the kernel programs with the compiler's own LLVM.
///
/// This is the last release that opens the compiler's libLLVM by itself (up to LLVM 22). Later ones link one LLVM of the
/// system: when the compiler's LLVM passes 22, this has to move together with an llvm-NN-dev package.
pub const LINKER: Tool = Tool {
    name: "bpf-linker",
    version: "0.10.4",
};

/// cargo-fuzz: builds the fuzz targets.
pub const FUZZER: Tool = Tool {
    name: "cargo-fuzz",
    version: "0.13.2",
};

impl Tool {
    /// The folder to put in PATH, if the right version is in the cache or in PATH.
    pub fn find(&self) -> Result<Option<PathBuf>, Error> {
        let own = self.folder()?.join("bin");
        let in_path = std::env::var_os("PATH").unwrap_or_default();
        let right = |dir: &PathBuf| {
            let program = dir.join(self.name);
            program.is_file()
                && output(Command::new(&program).arg("--version"))
                    .is_ok_and(|version| version.trim().ends_with(self.version))
        };
        Ok(std::iter::once(own).chain(std::env::split_paths(&in_path)).find(right))
    }

    /// Builds it into the cache.
    pub fn install(&self) -> Result<PathBuf, Error> {
        let folder = self.folder()?;
        let mut command = cargo();
        command
            .args(["install", self.name, "--version", self.version, "--locked", "--root"])
            .arg(&folder)
            // Half the time and a sixteenth of the size.
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env_remove("CARGO_TARGET_DIR");
        step(&format!("building {self} (2 minutes on 2 cores)"), &mut command)?;
        Ok(folder.join("bin"))
    }

    /// What [`Tool::find`] finds, or else what [`Tool::install`] installs.
    pub fn ensure(&self) -> Result<PathBuf, Error> {
        match self.find()? {
            Some(folder) => Ok(folder),
            None => self.install(),
        }
    }

    fn folder(&self) -> Result<PathBuf, Error> {
        cache(&format!("{}-{}", self.name, self.version))
    }
}

impl std::fmt::Display for Tool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}
