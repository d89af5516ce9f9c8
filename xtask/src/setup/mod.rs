//! `cargo xtask setup`: what building and testing needs, installed where missing.

mod apt;
mod crates;
mod packages;
mod servers;
mod system;
mod toolchain;

pub use apt::{DEBIAN_KEYRING, PrivateApt, debian_mirror, debs, unpack};
pub use servers::SERVERS;
pub use system::{Family, System};
pub use toolchain::BpfCompiler;

use std::path::PathBuf;
use std::process::Command;

use self::crates::{FUZZER, LINKER};
use crate::run::{Error, first_in_path};
use crate::ui::{heading, note};
use crate::workspace::lock_cache;

/// Tools that are not found through PATH.
#[derive(Debug)]
pub struct Tools {
    /// What compiles the kernel programs.
    pub bpf: BpfCompiler,
    /// What builds the fuzz targets.
    pub fuzzer: Fuzzer,
}

/// cargo-fuzz, by its folder.
#[derive(Debug)]
pub struct Fuzzer(PathBuf);

impl Fuzzer {
    /// Lets a cargo command find it.
    pub fn configure(&self, cargo: &mut Command) {
        first_in_path(cargo, &self.0);
    }
}

/// Reports what is missing, and changes nothing.
pub fn check() -> Result<(), Error> {
    let system = System::detect();
    let mut missing: Vec<String> = packages::missing(&system)?
        .iter()
        .map(|package| format!("package {package}"))
        .collect();
    for tool in [LINKER, FUZZER] {
        if tool.find()?.is_none() {
            missing.push(tool.to_string());
        }
    }
    for server in SERVERS {
        if !server.is_there()? {
            missing.push(server.to_string());
        }
    }
    match toolchain::find()? {
        Some(compiler) => note(&format!("kernel programs are compiled with {compiler}")),
        None => missing.push("a Rust compiler with `core` for bpfel-unknown-none".to_owned()),
    }
    if missing.is_empty() {
        note(&format!("{system}: nothing is missing"));
        return Ok(());
    }
    Err(Error::Missing(format!(
        "missing on {system}: {} (`cargo xtask setup` installs it)",
        missing.join(", ")
    )))
}

/// Installs what is missing, saying what. Takes well under a second when nothing is.
pub fn install() -> Result<Tools, Error> {
    let system = System::detect();
    let packages = packages::missing(&system)?;
    if !packages.is_empty() {
        heading(&format!("set-up on {system}"));
        packages::install(&system, &packages)?;
    }
    let _lock = lock_cache()?;
    let linker = LINKER.ensure()?;
    let fuzzer = Fuzzer(FUZZER.ensure()?);
    let bpf = match toolchain::find()? {
        Some(compiler) => compiler,
        None => toolchain::install(&system)?,
    };
    Ok(Tools {
        bpf: bpf.with_linker(linker),
        fuzzer,
    })
}

/// Installs the servers that the layer `peers` asks, where they are missing.
pub fn install_servers() -> Result<(), Error> {
    let _lock = lock_cache()?;
    SERVERS.iter().try_for_each(servers::Server::ensure)
}
