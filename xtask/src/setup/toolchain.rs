//! The compiler of the kernel programs. Stable Rust ships no `core` for bpfel-unknown-none, so one of three is taken:
//! a rustup nightly with `rust-src`; a folder that `ASSAY_BPF_TOOLCHAIN` names; or Debian's rustc-web, whose archive
//! has a ready `core` for that target, unpacked privately and never installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::apt::{self, PrivateApt};
use super::system::{Family, System};
use crate::run::{Error, first_in_path, io, output};
use crate::ui::{Step, note};
use crate::workspace::{cache, make_dir};

/// Names a folder laid out like Debian's /usr: bin/rustc, lib/rustlib with `core` for bpfel-unknown-none.
const VARIABLE: &str = "ASSAY_BPF_TOOLCHAIN";
/// What bpf-linker can open, see [`super::crates::LINKER`].
const NEWEST_LLVM: u32 = 22;
/// Where Debian's libraries lie; rustc and bpf-linker find libLLVM there.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
/// Debian 12 gets new Rust releases for its browsers as security updates, with all of this in step.
const DEBIAN_RELEASE: &str = "bookworm";

/// What compiles the kernel programs.
#[derive(Debug)]
pub struct BpfCompiler {
    kind: Kind,
    linker: PathBuf,
}

#[derive(Debug)]
enum Kind {
    /// `cargo +nightly` builds `core` from its own sources.
    Nightly,
    /// A folder with rustc and a ready `core`.
    Folder(PathBuf),
}

impl std::fmt::Display for BpfCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kind {
            Kind::Nightly => f.write_str("rustup's nightly"),
            Kind::Folder(usr) => write!(f, "the compiler in {}", usr.display()),
        }
    }
}

impl BpfCompiler {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            linker: PathBuf::new(),
        }
    }

    pub(super) fn with_linker(self, linker: PathBuf) -> Self {
        Self { linker, ..self }
    }

    /// The compiler's own words on its version: part of the name of what it builds.
    pub fn describe(&self) -> Result<String, Error> {
        match &self.kind {
            Kind::Nightly => output(nightly().arg("-vV")),
            Kind::Folder(usr) => output(rustc(usr).arg("-vV")),
        }
    }

    /// Makes a cargo command compile with it.
    pub fn configure(&self, cargo: &mut Command) {
        first_in_path(cargo, &self.linker);
        cargo.env_remove("CARGO_TARGET_DIR");
        match &self.kind {
            Kind::Nightly => {
                cargo
                    .args(["+nightly", "-Z", "build-std=core"])
                    .env_remove("RUSTUP_TOOLCHAIN");
            }
            Kind::Folder(usr) => {
                // Target options of a tier-3 target count as unstable.
                cargo.env("RUSTC", usr.join("bin/rustc")).env("RUSTC_BOOTSTRAP", "1");
                cargo.env("LD_LIBRARY_PATH", usr.join(LIBRARIES));
            }
        }
    }
}

/// The first that is there and works.
pub fn find() -> Result<Option<BpfCompiler>, Error> {
    if nightly_is_usable() {
        return Ok(Some(BpfCompiler::new(Kind::Nightly)));
    }
    if let Some(usr) = std::env::var_os(VARIABLE).map(PathBuf::from) {
        if !is_complete(&usr) {
            return Err(Error::Missing(format!(
                "{VARIABLE}={} has no bin/rustc that runs, or no `core` for bpfel-unknown-none",
                usr.display()
            )));
        }
        return Ok(Some(BpfCompiler::new(Kind::Folder(usr))));
    }
    let usr = private_folder()?.join("usr");
    Ok(is_complete(&usr).then(|| BpfCompiler::new(Kind::Folder(usr))))
}

/// Downloads and unpacks Debian's.
pub fn install(system: &System) -> Result<BpfCompiler, Error> {
    if !system.has_apt() {
        return Err(Error::Missing(
            "no compiler for the kernel programs: `rustup toolchain install nightly -c rust-src`".to_owned(),
        ));
    }
    note("no nightly with rust-src: taking Debian's rustc-web, unpacked privately (110 MB)");
    let release = if system.family == Family::Debian {
        &system.codename
    } else {
        DEBIAN_RELEASE
    };
    let (apt, version) = match source(system, release)? {
        Some(found) => found,
        None => source(system, DEBIAN_RELEASE)?
            .ok_or_else(|| Error::Missing("Debian's archive has no libstd-rust-web-dev-bpf any more".to_owned()))?,
    };
    let folder = private_folder()?;
    let debs = make_dir(folder.join("debs"))?;
    apt.download(
        &format!("downloading rustc-web {version}"),
        &package_names(&apt, &version)?,
        &debs,
    )?;
    let step = Step::start("unpacking it");
    for deb in apt::debs(&debs)? {
        step.say(&deb.display().to_string());
        apt::unpack(&deb, &folder)?;
    }
    step.done();
    std::fs::remove_dir_all(&debs).map_err(io(format!("remove {}", debs.display())))?;
    let usr = folder.join("usr");
    if !is_complete(&usr) {
        return Err(Error::Missing(format!(
            "{} does not run: `ldd` on it says what it lacks",
            usr.join("bin/rustc").display()
        )));
    }
    Ok(BpfCompiler::new(Kind::Folder(usr)))
}

/// The archive of a Debian release, if it has the compiler and the ready `core`, and at which version.
fn source(system: &System, release: &str) -> Result<Option<(PrivateApt, String)>, Error> {
    let apt = PrivateApt::debian(system, &[release, &format!("{release}-security")])?;
    apt.update()?;
    let version = apt.candidate("libstd-rust-web-dev-bpf")?;
    Ok(version.map(|version| (apt, version)))
}

/// All of one version: `core` is tied to the very compiler that it was built with.
fn package_names(apt: &PrivateApt, version: &str) -> Result<Vec<String>, Error> {
    let mut names: Vec<String> = ["rustc-web", "libstd-rust-web-dev", "libstd-rust-web-dev-bpf"]
        .map(str::to_owned)
        .into();
    let runtime = apt
        .depends("libstd-rust-web-dev")?
        .into_iter()
        .find(|name| is_runtime(name));
    let runtime =
        runtime.ok_or_else(|| Error::Missing("libstd-rust-web-dev depends on no libstd-rust-web-*".to_owned()))?;
    let llvm = apt
        .depends(&runtime)?
        .into_iter()
        .find(|name| name.starts_with("libllvm"));
    let llvm = llvm.ok_or_else(|| Error::Missing(format!("{runtime} depends on no libllvm")))?;
    if llvm
        .trim_start_matches("libllvm")
        .parse::<u32>()
        .is_ok_and(|major| major > NEWEST_LLVM)
    {
        return Err(Error::Missing(format!(
            "Debian's rustc-web {version} uses {llvm}, but bpf-linker {} opens LLVM {NEWEST_LLVM} at most: a newer \
             bpf-linker and an older compiler are the ways out (set {VARIABLE})",
            super::crates::LINKER.version
        )));
    }
    names.push(runtime);
    for name in &names {
        let candidate = apt.candidate(name)?.unwrap_or_default();
        if source_version(&candidate) != source_version(version) {
            return Err(Error::Missing(format!(
                "Debian's archive has {name} {candidate} beside libstd-rust-web-dev-bpf {version}: try again when they \
                 agree, or set {VARIABLE}"
            )));
        }
    }
    names.push(llvm);
    Ok(names)
}

/// Without the mark of a rebuild (`+b1`): packages for one architecture are rebuilt, those for all are not.
fn source_version(version: &str) -> &str {
    match version.rsplit_once("+b") {
        Some((source, build)) if build.chars().all(|c| c.is_ascii_digit()) => source,
        _ => version,
    }
}

fn is_runtime(name: &str) -> bool {
    name.strip_prefix("libstd-rust-web-")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn is_complete(usr: &Path) -> bool {
    let core = usr.join("lib/rustlib/bpfel-unknown-none/lib");
    core.is_dir() && output(rustc(usr).arg("-vV")).is_ok()
}

fn rustc(usr: &Path) -> Command {
    let mut command = Command::new(usr.join("bin/rustc"));
    command.env("LD_LIBRARY_PATH", usr.join(LIBRARIES));
    command
}

fn nightly() -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "rustc"]);
    command
}

fn nightly_is_usable() -> bool {
    let Ok(sysroot) = output(nightly().args(["--print", "sysroot"])) else {
        return false;
    };
    if !Path::new(sysroot.trim())
        .join("lib/rustlib/src/rust/library/core/Cargo.toml")
        .exists()
    {
        return false;
    }
    let llvm = output(nightly().arg("-vV")).ok().and_then(|text| {
        text.lines().find_map(|line| {
            line.strip_prefix("LLVM version: ")?
                .split('.')
                .next()?
                .parse::<u32>()
                .ok()
        })
    });
    if llvm.is_some_and(|major| major > NEWEST_LLVM) {
        note("rustup's nightly uses an LLVM that bpf-linker cannot open: leaving it alone");
        return false;
    }
    true
}

fn private_folder() -> Result<PathBuf, Error> {
    cache("rustc-web")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rebuild_is_the_same_version() {
        assert_eq!(source_version("1.96.0+dfsg1-1~deb13u1+b1"), "1.96.0+dfsg1-1~deb13u1");
        assert_eq!(source_version("1.96.0+dfsg1-1~deb12u2"), "1.96.0+dfsg1-1~deb12u2");
        assert_eq!(source_version("1.0+bpo12"), "1.0+bpo12");
    }
}
