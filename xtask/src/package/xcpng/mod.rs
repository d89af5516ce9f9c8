//! The agent for XCP-ng 8.3, whose dom0 is of CentOS 7's age: glibc 2.17, processors of the first x86-64.
//!
//! It is compiled against that glibc by Zig's C compiler, which carries the symbols of every release since. tpm2-tss and cryptsetup are
//! not on those hosts: they are linked statically, from the sources that Debian 13 has.

mod libraries;
mod sources;
mod zig;

use crate::build::{self, Built};
use crate::run::Error;
use crate::setup::{System, Tools};
use crate::workspace::lock_cache;

pub(super) use libraries::Component;

/// Builds the program; with it, what it is linked from beside crates.
pub(super) fn agent(tools: &Tools) -> Result<(Built, Vec<Component>), Error> {
    let system = System::detect();
    if !system.has_apt() {
        return Err(Error::Missing(
            "the package for XCP-ng 8.3 takes C libraries from Debian's archive: make packages on Debian 12".to_owned(),
        ));
    }
    let (compiler, libraries) = {
        let _lock = lock_cache()?;
        let compiler = zig::ensure()?;
        let libraries = libraries::ensure(&system, &compiler)?;
        (compiler, libraries)
    };
    let built = build::agent_for_xcpng(tools, |cargo| {
        compiler.configure(cargo);
        libraries.configure(cargo);
    })?;
    Ok((built, libraries.components))
}
