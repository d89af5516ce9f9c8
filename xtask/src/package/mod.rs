//! `cargo xtask package`: RPMs for Enterprise Linux 10, .debs for Debian 12 and 13, the agent's RPM and update ISO for XCP-ng 8.3, their
//! checksums and a bill of materials.
//!
//! The same sources give the same bytes: paths of the build are mapped away, and all times are SOURCE_DATE_EPOCH, or else the
//! commit's.

mod deb;
mod libraries;
mod rpm;
mod sbom;
mod sign;
mod tree;
mod units;
mod update;
mod xcpng;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use assay_tests::packages::{AGAIN_VARIABLE, DEBIAN13_VARIABLE, FOLDER_VARIABLE};
use sha2::{Digest as _, Sha256};

use crate::build::{self, Built};
use crate::image;
use crate::run::{Error, cargo, io, output, step};
use crate::setup::{self, Tools};
use crate::ui::{heading, note};
use crate::workspace::{root, target};

use rpm::Dist;
use sign::Signer;
use tree::Tree;
use xcpng::Component;

/// The date of files that come without a history: 1980, before which some archives know no dates.
const NO_COMMIT: &str = "315532800";

/// One of the two packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// `assay-agent`.
    Agent,
    /// `assay-verifier`.
    Verifier,
}

impl Part {
    const ALL: [Self; 2] = [Self::Agent, Self::Verifier];

    /// Name of the package and of its program.
    const fn name(self) -> &'static str {
        match self {
            Self::Agent => "assay-agent",
            Self::Verifier => "assay-verifier",
        }
    }
}

/// What the packages are made of.
struct Parts {
    /// The programs.
    built: Built,
    /// The agent for XCP-ng 8.3.
    xcpng: Built,
    /// What that one is linked from beside crates.
    components: Vec<Component>,
    /// Manual pages and completions.
    manuals: PathBuf,
}

/// Builds all packages into `out`, or into `target/package`; whatever was there of an earlier run is replaced. `key` signs RPMs and
/// the update ISO, see [`Signer::new`].
pub fn run(out: Option<PathBuf>, key: Option<&Path>) -> Result<(), Error> {
    let out = out.unwrap_or_else(|| target().join("package"));
    let epoch = epoch()?;
    let tools = setup::install()?;
    // Before anything takes minutes.
    let signer = Signer::new(key, epoch)?;
    for name in pack(&parts(&tools)?, &signer, &out, epoch)? {
        note(&format!("{}", out.join(name).display()));
    }
    Ok(())
}

/// Makes all packages, and once more beside them, for tests that are told of both.
pub fn for_tests(tests: &mut Command) -> Result<(), Error> {
    let epoch = epoch()?;
    let parts = parts(&setup::install()?)?;
    for (variable, name) in [(FOLDER_VARIABLE, "package"), (AGAIN_VARIABLE, "package-again")] {
        let out = target().join(name);
        pack(&parts, &Signer::new(None, epoch)?, &out, epoch)?;
        tests.env(variable, out);
    }
    tests.env(DEBIAN13_VARIABLE, image::debian13()?);
    Ok(())
}

fn parts(tools: &Tools) -> Result<Parts, Error> {
    heading("package");
    let (xcpng, components) = xcpng::agent(tools)?;
    Ok(Parts {
        built: build::shipped(tools)?,
        xcpng,
        components,
        manuals: manuals()?,
    })
}

/// Makes the packages and puts them into `out`; their names.
fn pack(parts: &Parts, signer: &Signer, out: &Path, epoch: u64) -> Result<Vec<String>, Error> {
    let work = tempfile::tempdir_in(target()).map_err(io("make a folder for the packages' contents"))?;
    let work = work.path();
    let lay_out = |part, dist, built| Tree::lay_out(part, dist, work, built, &parts.manuals, epoch);
    let agent = lay_out(Part::Agent, Dist::El10, &parts.built)?;
    let verifier = lay_out(Part::Verifier, Dist::El10, &parts.built)?;
    let xcpng = lay_out(Part::Agent, Dist::Xcpng83, &parts.xcpng)?;
    // Complete, or not there at all.
    let made = work.join("made");
    fs::create_dir(&made).map_err(io("make the folder of the packages"))?;
    for tree in [&agent, &verifier] {
        deb::build(tree, work, &made, epoch)?;
    }
    rpm::build(&[&agent, &verifier], Dist::El10, work, &made, epoch)?;
    rpm::build(&[&xcpng], Dist::Xcpng83, work, &made, epoch)?;
    for name in names(&made)?.iter().filter(|name| name.ends_with(".rpm")) {
        signer.rpm(&made.join(name))?;
    }
    let rpm = made.join(format!("assay-agent-{}-1{}.x86_64.rpm", version(), Dist::Xcpng83.tag()));
    update::build(&xcpng, &rpm, signer, work, &made, epoch)?;
    fs::write(made.join(signer.key_name()), signer.public()?).map_err(io("write the public key"))?;
    let materials = sbom::make(&parts.components, epoch)?;
    fs::write(made.join("assay.cdx.json"), materials).map_err(io("write the bill of materials"))?;
    let names = sums(&made)?;
    replace(&made, out)?;
    Ok(names)
}

/// Seconds since 1970 that every file in the packages has.
fn epoch() -> Result<u64, Error> {
    let mut commit = Command::new("git");
    commit.args(["log", "-1", "--format=%ct"]).current_dir(root());
    let text = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => output(&mut commit).unwrap_or_else(|_| {
            note("there is no commit to take the time from: the files are dated 1980, unless SOURCE_DATE_EPOCH says otherwise");
            NO_COMMIT.to_owned()
        }),
    };
    text.trim().parse().map_err(|_| {
        Error::Missing(format!(
            "SOURCE_DATE_EPOCH is {:?}: it has to be a number of seconds since 1970",
            text.trim()
        ))
    })
}

/// Manual pages and completions, made by the programs' own descriptions of their commands.
fn manuals() -> Result<PathBuf, Error> {
    let folder = target().join("assay/manuals");
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(io("remove the old manual pages"))?;
    }
    let mut command = cargo();
    command.args(["run", "-q", "-p", "assay-verifier", "--example", "manuals", "--"]);
    step("making manual pages and completions", command.arg(&folder))?;
    Ok(folder)
}

/// The version in Cargo.toml, which all of the workspace shares.
const fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// The names of a folder's files, in order.
fn names(folder: &Path) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io("list the packages"))? {
        let entry = entry.map_err(io("list the packages"))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Writes SHA256SUMS, in the form of sha256sum(1); the names of all files.
fn sums(folder: &Path) -> Result<Vec<String>, Error> {
    let mut names = names(folder)?;
    let mut text = String::new();
    for name in &names {
        let bytes = fs::read(folder.join(name)).map_err(io(format!("read {name}")))?;
        text.push_str(&format!("{}  {name}\n", hex::encode(Sha256::digest(bytes))));
    }
    fs::write(folder.join("SHA256SUMS"), text).map_err(io("write SHA256SUMS"))?;
    names.push("SHA256SUMS".into());
    Ok(names)
}

fn replace(made: &Path, out: &Path) -> Result<(), Error> {
    fs::create_dir_all(out).map_err(io(format!("make {}", out.display())))?;
    for entry in fs::read_dir(out).map_err(io(format!("list {}", out.display())))? {
        let path = entry.map_err(io(format!("list {}", out.display())))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Only what an earlier run made: the folder may be somebody's home.
        if [
            "assay-agent",
            "assay-verifier",
            "assay.cdx.json",
            "RPM-GPG-KEY-assay",
            "SHA256SUMS",
        ]
        .iter()
        .any(|start| name.starts_with(start))
            && path.is_file()
        {
            fs::remove_file(&path).map_err(io(format!("remove {}", path.display())))?;
        }
    }
    for entry in fs::read_dir(made).map_err(io("list the packages"))? {
        let from = entry.map_err(io("list the packages"))?.path();
        let to = out.join(from.file_name().unwrap_or_default());
        fs::copy(&from, &to).map_err(io(format!("write {}", to.display())))?;
    }
    Ok(())
}
