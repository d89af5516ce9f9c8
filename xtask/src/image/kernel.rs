//! The guests' kernel: Debian 13's 6.12 (the series of XCP-ng 9 and Enterprise Linux 10), in the build for virtual
//! machines, unpacked privately.

use std::path::{Path, PathBuf};

use crate::run::{Error, command, io, output};
use crate::setup::{PrivateApt, System};
use crate::ui::note;
use crate::workspace::{cache, make_dir};

/// The release with that kernel.
const SUITES: &[&str] = &["trixie", "trixie-security"];
/// Depends on the newest kernel of the release.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r`.
    pub release: String,
    dir: PathBuf,
}

impl Kernel {
    /// The compressed kernel.
    pub fn bzimage(&self) -> PathBuf {
        self.dir.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// What belongs at /usr/lib/modules/RELEASE.
    pub fn modules(&self) -> PathBuf {
        self.module_base().join("lib/modules").join(&self.release)
    }

    /// The folder whose lib/modules depmod and modprobe shall use.
    pub fn module_base(&self) -> PathBuf {
        self.dir.join("usr")
    }
}

/// The kernel in the cache, or else the newest in the archive. `cargo xtask` never replaces one by itself: a test that
/// passed yesterday shall meet the same kernel today. Removing the folder `kernel` of the cache fetches a newer one.
pub fn ensure(system: &System) -> Result<Kernel, Error> {
    let folder = cache("kernel")?;
    let entries = std::fs::read_dir(&folder).map_err(io(format!("list {}", folder.display())))?;
    let mut there: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    there.sort();
    match there
        .into_iter()
        .rfind(|name| name.starts_with(|c: char| c.is_ascii_digit()))
    {
        Some(release) => Ok(Kernel {
            dir: folder.join(&release),
            release,
        }),
        None => fetch(system, &folder),
    }
}

fn fetch(system: &System, folder: &Path) -> Result<Kernel, Error> {
    let apt = PrivateApt::debian(system, SUITES)?;
    apt.update()?;
    let package = apt
        .depends(META_PACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::Missing(format!("{META_PACKAGE} depends on no kernel")))?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let version = apt.candidate(&package)?.unwrap_or_default();
    note(&format!("test machines get Debian's kernel {release} ({version})"));
    let part = make_dir(folder.join("part"))?;
    apt.download("downloading the kernel", &[package], &part)?;
    for deb in crate::setup::debs(&part)? {
        crate::setup::unpack(&deb, &part)?;
        std::fs::remove_file(&deb).map_err(io(format!("remove {}", deb.display())))?;
    }
    output(command("depmod", ["-b"]).arg(part.join("usr")).arg(&release))?;
    let dir = folder.join(&release);
    std::fs::rename(&part, &dir).map_err(io(format!("rename {}", part.display())))?;
    Ok(Kernel { release, dir })
}
