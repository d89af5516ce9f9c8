//! apt, in two ways: the machine's own configuration, and private ones that leave it untouched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::system::{Family, System};
use crate::run::{Error, command, io, is_root, output, step};
use crate::workspace::{cache, make_dir};

/// Signs the Debian archive; Ubuntu has it in the package debian-archive-keyring.
pub const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Package lists older than this are fetched again before something is downloaded.
const FRESH: Duration = Duration::from_secs(12 * 3600);

/// `program`, as root: through sudo where this process is not.
pub fn as_root(program: &str) -> Result<Command, Error> {
    if is_root() {
        return Ok(command::<&str>(program, []));
    }
    if !crate::run::in_path("sudo") {
        return Err(Error::Missing(format!(
            "{program} needs root, and there is no sudo: run `cargo xtask setup` as root"
        )));
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(program);
    Ok(sudo)
}

/// `apt-get install`, waiting for another apt rather than failing, and asking nothing.
pub fn install(what: &str, options: &[String], packages: &[String]) -> Result<(), Error> {
    let mut apt = as_root("apt-get")?;
    apt.args(["-o", "DPkg::Lock::Timeout=600", "-q"])
        .args(options)
        // What is on the machine stays: setting up Assay takes nothing away from anybody.
        .args(["install", "-y", "--no-install-recommends", "--no-remove"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    step(what, &mut apt)
}

/// An apt of its own: sources, lists and cache in a private folder. Trusts what Debian signed, from the machine's own
/// mirror where it has one for that suite.
#[derive(Debug)]
pub struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    /// Configures it for Debian's `suites` of one release, such as `["trixie", "trixie-security"]`.
    pub fn debian(system: &System, suites: &[&str]) -> Result<Self, Error> {
        Self::of(system, suites, "deb")
    }

    /// The same for source packages.
    pub fn debian_sources(system: &System, suites: &[&str]) -> Result<Self, Error> {
        Self::of(system, suites, "deb-src")
    }

    fn of(system: &System, suites: &[&str], types: &str) -> Result<Self, Error> {
        if !Path::new(DEBIAN_KEYRING).exists() {
            return Err(Error::Missing(format!(
                "{DEBIAN_KEYRING} is missing: install debian-archive-keyring"
            )));
        }
        let sources = if types == "deb" { "" } else { "source-" };
        let dir = cache(&format!("apt/{sources}{}", suites.join("+")))?;
        for part in ["lists/partial", "archives/partial", "none"] {
            make_dir(dir.join(part))?;
        }
        let mut sources = String::new();
        for suite in suites {
            sources.push_str(&stanza(types, suite, &debian_mirror(system, suite)));
        }
        let file = dir.join("debian.sources");
        std::fs::write(&file, sources).map_err(io(format!("write {}", file.display())))?;
        Ok(Self { dir })
    }

    /// Fetches the package lists, unless that was done lately.
    pub fn update(&self) -> Result<(), Error> {
        let stamp = self.dir.join("updated");
        let age = std::fs::metadata(&stamp)
            .and_then(|file| file.modified())
            .ok()
            .and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age < FRESH) {
            return Ok(());
        }
        step(
            "fetching Debian's package lists",
            command("apt-get", self.options()).args(["-q", "update"]),
        )?;
        std::fs::write(&stamp, "").map_err(io(format!("write {}", stamp.display())))
    }

    /// The options that make apt-get and apt-cache use this configuration. Nothing counts as installed.
    pub fn options(&self) -> Vec<String> {
        let mut options = self.sources();
        options.push("-oDir::State::status=/dev/null".to_owned());
        options.push(format!("-oDir::Cache={}", self.dir.display()));
        options.push(format!(
            "-oDir::Cache::archives={}",
            self.dir.join("archives").display()
        ));
        options
    }

    /// The options for installing into this machine from these sources.
    pub fn sources(&self) -> Vec<String> {
        vec![
            format!("-oDir::Etc::sourcelist={}", self.dir.join("debian.sources").display()),
            format!("-oDir::Etc::sourceparts={}", self.dir.join("none").display()),
            format!("-oDir::State::lists={}", self.dir.join("lists").display()),
            "-oAPT::Sandbox::User=root".to_owned(),
        ]
    }

    /// The version that would be taken, if the package exists.
    pub fn candidate(&self, package: &str) -> Result<Option<String>, Error> {
        let text = output(command("apt-cache", self.options()).args(["policy", package]))?;
        Ok(candidate_in(&text))
    }

    /// The names that a package depends on.
    pub fn depends(&self, package: &str) -> Result<Vec<String>, Error> {
        let text = output(command("apt-cache", self.options()).args(["depends", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// Downloads packages into `dir`, checked against the archive's signature.
    pub fn download(&self, what: &str, packages: &[String], dir: &Path) -> Result<(), Error> {
        let mut apt = command("apt-get", self.options());
        step(what, apt.args(["-q", "download"]).args(packages).current_dir(dir))
    }

    /// Downloads a source package's files into `dir`, checked against the archive's signature.
    pub fn download_source(&self, what: &str, package: &str, dir: &Path) -> Result<(), Error> {
        let mut apt = command("apt-get", self.options());
        step(
            what,
            apt.args(["-q", "source", "--download-only", package]).current_dir(dir),
        )
    }
}

/// Which version would the machine's own apt install, if it knows the package?
pub fn candidate(package: &str) -> Result<Option<String>, Error> {
    Ok(candidate_in(&output(&mut command("apt-cache", ["policy", package]))?))
}

fn candidate_in(policy: &str) -> Option<String> {
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

/// Where this machine takes a suite of Debian from: its own mirror, or Debian's.
pub fn debian_mirror(system: &System, suite: &str) -> String {
    let security = suite.ends_with("-security");
    let own = (system.family == Family::Debian).then(|| {
        let same = if security {
            format!("{}-security", system.codename)
        } else {
            system.codename.clone()
        };
        system.mirror(suite).or_else(|| system.mirror(&same))
    });
    own.flatten().unwrap_or_else(|| {
        let path = if security { "debian-security" } else { "debian" };
        format!("http://deb.debian.org/{path}")
    })
}

fn stanza(types: &str, suite: &str, uri: &str) -> String {
    format!("Types: {types}\nURIs: {uri}\nSuites: {suite}\nComponents: main\nSigned-By: {DEBIAN_KEYRING}\n\n")
}

/// Unpacks a .deb without installing it.
pub fn unpack(deb: &Path, to: &Path) -> Result<(), Error> {
    output(command("dpkg-deb", ["-x"]).args([deb, to])).map(drop)
}

/// The .deb files in a folder.
pub fn debs(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = std::fs::read_dir(dir).map_err(io(format!("list {}", dir.display())))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect())
}
