//! GRUB's module `tpm`, which measures the commands that follow it into PCR 8 and the files that they read into PCR 9 (GRUB manual,
//! "Measured Boot").
//!
//! XCP-ng 8's GRUB is built without it, though the file lies beside it, so Xen, dom0's kernel, initrd and command line are not measured.
//! [`Fix`] adds the lines that load it. Whatever writes the configuration anew (an update) leaves them out; the unit `assay-grub.path` then
//! has [`reassert`] put them back, on hosts whose operator agreed.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Host;

/// Where XenServer and XCP-ng have the configuration of the GRUB that UEFI starts.
const KNOWN: [&str; 3] = [
    "/boot/efi/EFI/xenserver/grub.cfg",
    "/boot/efi/EFI/xcp-ng/grub.cfg",
    "/boot/grub/grub-efi.cfg",
];
/// The module, on the host's root file system.
const MODULE: &str = "/usr/lib/grub/x86_64-efi/tpm.mod";
/// Says which file the operator wanted changed; to remove it withdraws that.
pub const CONSENT: &str = "/etc/assay/measure-grub";
const BEGIN: &str =
    "# assay: GRUB measures what follows (`assay-agent doctor --fix`; remove /etc/assay/measure-grub first to undo)";
const END: &str = "# assay: end";
/// A configuration file of GRUB is a few kilobytes.
const MAX_FILE: u64 = 1024 * 1024;
/// What checks a configuration's syntax, by the names that distributions have for it.
const CHECKERS: [&str; 2] = ["grub-script-check", "grub2-script-check"];

/// Why GRUB cannot be made to measure.
#[derive(Debug, thiserror::Error)]
pub enum GrubError {
    /// No configuration.
    #[error("there is no configuration of GRUB where XenServer and XCP-ng have it: name it with --grub-config FILE")]
    NoConfig,
    /// The host was not started by UEFI.
    #[error(
        "GRUB measures only where UEFI starts it, and this host was booted by BIOS: change that in the firmware's setup, then install anew"
    )]
    Bios,
    /// The module is not there.
    #[error(
        "{path} is not there, so GRUB has nothing to measure with: install the package that has it (grub-efi, grub-efi-amd64-bin)"
    )]
    NoModule {
        /// The file.
        path: PathBuf,
    },
    /// Secure Boot.
    #[error(
        "with Secure Boot on, GRUB loads no modules that are not built in: have one with `tpm` built in (Debian's signed one has)"
    )]
    SecureBoot,
    /// It says nowhere by what GRUB finds the root file system.
    #[error("{path} has no `search … --set root …` with plain words, so it is not known how GRUB finds {MODULE}")]
    NoSearch {
        /// The configuration.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}; nothing was changed")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// GRUB's own checker refuses the result.
    #[error("{checker} refuses the changed {path}, so nothing was changed: {said}")]
    Refused {
        /// The program.
        checker: &'static str,
        /// The configuration.
        path: PathBuf,
        /// Its words.
        said: String,
    },
}

/// A change of GRUB's configuration that was worked out, and not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fix {
    /// The configuration.
    pub path: PathBuf,
    /// The lines that are put before all others.
    pub lines: String,
    /// All of the file, with them.
    text: String,
    consent: PathBuf,
}

/// The configuration that this host's GRUB reads, if it is in one of XenServer's places.
#[must_use]
pub fn find(host: &Host) -> Option<PathBuf> {
    KNOWN.iter().map(|path| host.path(path)).find(|path| path.is_file())
}

impl Fix {
    /// Works out the change; none when the lines are there already.
    ///
    /// # Errors
    /// Any [`GrubError`] but [`GrubError::Refused`].
    pub fn plan(host: &Host, config: Option<&Path>) -> Result<Option<Self>, GrubError> {
        if !host.has("/sys/firmware/efi") {
            return Err(GrubError::Bios);
        }
        if super::boot::secure_boot_is_on(host) {
            return Err(GrubError::SecureBoot);
        }
        let path = config
            .map(Path::to_owned)
            .or_else(|| find(host))
            .ok_or(GrubError::NoConfig)?;
        let module = host.path(MODULE);
        if !module.is_file() {
            return Err(GrubError::NoModule { path: module });
        }
        let text = read(&path)?;
        if text.lines().any(|line| line == BEGIN) {
            return Ok(None);
        }
        let search = search(&text).ok_or_else(|| GrubError::NoSearch { path: path.clone() })?;
        let lines = format!("{BEGIN}\n{search}\ninsmod ($assay_root){MODULE}\n{END}\n");
        Ok(Some(Self {
            text: format!("{lines}{text}"),
            consent: host.path(CONSENT),
            path,
            lines,
        }))
    }

    /// Makes the change, and notes that it was wanted, so that [`reassert`] may repeat it. The file as it was stays beside it, with
    /// `.before-assay` behind its name.
    ///
    /// # Errors
    /// [`GrubError::Refused`], [`GrubError::File`]; the configuration is as it was then.
    pub fn apply(&self) -> Result<(), GrubError> {
        let new = beside(&self.path, ".assay-new");
        let mode = fs::metadata(&self.path).map(|found| found.permissions().mode() & 0o777);
        let mode = mode.map_err(file("look at", &self.path))?;
        write(&new, &self.text, mode)?;
        if let Err(error) = check(&new, &self.path) {
            drop(fs::remove_file(&new));
            return Err(error);
        }
        fs::copy(&self.path, beside(&self.path, ".before-assay")).map_err(file("keep a copy of", &self.path))?;
        if let Some(folder) = self.consent.parent() {
            fs::create_dir_all(folder).map_err(file("make", folder))?;
        }
        write(&self.consent, &format!("{}\n", self.path.display()), 0o644)?;
        fs::rename(&new, &self.path).map_err(file("replace", &self.path))
    }
}

/// Puts the lines back, where the operator wanted them and an update left them out; whether it did.
///
/// # Errors
/// Any [`GrubError`].
pub fn reassert(host: &Host) -> Result<bool, GrubError> {
    let consent = host.path(CONSENT);
    if !consent.exists() {
        return Ok(false);
    }
    let path = PathBuf::from(read(&consent)?.trim_end());
    let Some(fix) = Fix::plan(host, Some(&path))? else {
        return Ok(false);
    };
    fix.apply()?;
    Ok(true)
}

/// The command by which GRUB finds the root file system, to another variable.
///
/// Words that are more than letters, digits and a little are not understood, and their line is passed over: what is put before all
/// other lines must not fail.
fn search(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        if words.next()? != "search" {
            return None;
        }
        let words: Vec<&str> = words.collect();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.=,/".contains(c);
        if words.is_empty() || !words.iter().all(|word| word.chars().all(plain)) {
            return None;
        }
        let mut kept = Vec::new();
        let mut sets_root = false;
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next() {
            match word {
                "--set=root" => sets_root = true,
                "--set" | "-s" => {
                    // The variable is `root` when it is not named.
                    words.next_if_eq(&"root");
                    sets_root = true;
                }
                _ if word.starts_with("--set=") => return None,
                _ => kept.push(word),
            }
        }
        let selects = kept.iter().any(|word| !word.starts_with('-'));
        (sets_root && selects).then(|| format!("search --set=assay_root {}", kept.join(" ")))
    })
}

fn check(new: &Path, path: &Path) -> Result<(), GrubError> {
    for checker in CHECKERS {
        let answer = Command::new(checker).arg(new).stdin(Stdio::null()).output();
        match answer {
            Ok(answer) if answer.status.success() => return Ok(()),
            Ok(answer) => {
                return Err(GrubError::Refused {
                    checker,
                    path: path.to_owned(),
                    said: String::from_utf8_lossy(&answer.stderr).trim().to_owned(),
                });
            }
            // Hosts without the program: the lines are of a form that is known to be good.
            Err(_) => {}
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, GrubError> {
    let found = fs::metadata(path).map_err(file("read", path))?;
    if found.len() > MAX_FILE {
        let source = io::Error::other(format!("it is larger than {MAX_FILE} bytes"));
        return Err(file("read", path)(source));
    }
    fs::read_to_string(path).map_err(file("read", path))
}

/// All of it is on the disk when this returns: a host that loses power now must find the one or the other.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), GrubError> {
    let written = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    written().map_err(file("write", path))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GrubError {
    let path = path.to_owned();
    move |source| GrubError::File { action, path, source }
}

#[cfg(test)]
mod tests;
