//! The machines' kernels: Debian's, one of each series that matters, in the build for virtual machines, and one that boots
//! on a hypervisor; unpacked privately.

use std::path::{Path, PathBuf};

use crate::run::{Error, command, io, output};
use crate::setup::{PrivateApt, System};
use crate::ui::note;
use crate::workspace::{cache, make_dir};

/// A series of kernels, and where Debian has it.
#[derive(Debug)]
pub struct Series {
    /// As the tests ask for it, and as its releases begin.
    pub name: &'static str,
    suites: &'static [&'static str],
    build: &'static str,
}

/// Debian's build for virtual machines.
const CLOUD: &str = "cloud-amd64";
/// Debian's build for all machines: alone in having what a Xen host needs.
const GENERIC: &str = "amd64";

/// The harness has the same names in `assay_tests::vm::KERNELS`.
pub const SERIES: &[Series] = &[
    // Before BPF LSM programs could sleep, and in Debian's build without IMA: no hook that hashes.
    Series {
        name: "5.10",
        suites: &["bullseye", "bullseye-security"],
        build: CLOUD,
    },
    Series {
        name: "6.1",
        suites: &["bookworm", "bookworm-security"],
        build: CLOUD,
    },
    // The series of XCP-ng 9 and Enterprise Linux 10.
    Series {
        name: "6.12",
        suites: &["trixie", "trixie-security"],
        build: CLOUD,
    },
    // The newest that Debian has.
    Series {
        name: "7",
        suites: &["sid"],
        build: CLOUD,
    },
];
/// That of the machines with a toolstack.
pub const HOST: Series = Series {
    name: "6.1",
    suites: &["bookworm", "bookworm-security"],
    build: GENERIC,
};

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

impl Series {
    /// The one of that name.
    pub fn named(name: &str) -> Result<&'static Self, Error> {
        SERIES.iter().find(|series| series.name == name).ok_or_else(|| {
            let names: Vec<&str> = SERIES.iter().map(|series| series.name).collect();
            Error::Missing(format!(
                "there are test machines for Linux {}, not for {name}",
                names.join(", ")
            ))
        })
    }

    /// Is a kernel of that release of this series?
    fn has(&self, release: &str) -> bool {
        let build = if release.ends_with(&format!("-{CLOUD}")) {
            CLOUD
        } else {
            GENERIC
        };
        let rest = release.strip_prefix(self.name);
        build == self.build && rest.is_some_and(|rest| rest.starts_with('.'))
    }

    /// The kernel in the cache, or else the newest in the archive. `cargo xtask` never replaces one by itself: a test
    /// that passed yesterday shall meet the same kernel today. Removing it from the folder `kernels` of the cache
    /// fetches a newer one.
    pub fn ensure(&self, system: &System) -> Result<Kernel, Error> {
        let folder = cache("kernels")?;
        let entries = std::fs::read_dir(&folder).map_err(io(format!("list {}", folder.display())))?;
        let there = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| self.has(name));
        match there.max() {
            Some(release) => Ok(Kernel {
                dir: folder.join(&release),
                release,
            }),
            None => self.fetch(system, &folder),
        }
    }

    fn fetch(&self, system: &System, folder: &Path) -> Result<Kernel, Error> {
        let apt = PrivateApt::debian(system, self.suites)?;
        apt.update()?;
        // Depends on the newest kernel of a Debian release.
        let meta = format!("linux-image-{}", self.build);
        let image = apt
            .depends(&meta)?
            .into_iter()
            .find(|name| name.starts_with("linux-image-"))
            .ok_or_else(|| Error::Missing(format!("{meta} depends on no kernel")))?;
        let release = image.trim_start_matches("linux-image-").to_owned();
        if !self.has(&release) {
            return Err(Error::Missing(format!(
                "Debian's {} has Linux {release} now, and no {} any more: say in xtask/src/image/kernel.rs which \
                 kernels the test machines shall have",
                self.suites.join(" and "),
                self.name
            )));
        }
        let version = apt.candidate(&image)?.unwrap_or_default();
        note(&format!("test machines get Debian's kernel {release} ({version})"));
        // Since 7.x its parts are packages of their own: linux-binary-RELEASE, linux-modules-RELEASE.
        let mut packages: Vec<String> = apt.depends(&image)?;
        packages.retain(|name| name.ends_with(&release));
        packages.push(image);
        let part = folder.join("part");
        // What an interrupted run left.
        let _ = std::fs::remove_dir_all(&part);
        make_dir(part.clone())?;
        apt.download("downloading it", &packages, &part)?;
        for deb in crate::setup::debs(&part)? {
            crate::setup::unpack(&deb, &part)?;
            std::fs::remove_file(&deb).map_err(io(format!("remove {}", deb.display())))?;
        }
        tidy(&part, &release)?;
        output(command("depmod", ["-b"]).arg(part.join("usr")).arg(&release))?;
        let dir = folder.join(&release);
        std::fs::rename(&part, &dir).map_err(io(format!("rename {}", part.display())))?;
        Ok(Kernel { release, dir })
    }
}

/// One layout for all: packages from before Debian 13 have their modules in /lib, and those of 7.x the kernel itself
/// among the modules.
fn tidy(dir: &Path, release: &str) -> Result<(), Error> {
    let modules = dir.join("usr/lib/modules");
    let moves = [
        (dir.join("lib/modules"), modules.clone()),
        (
            modules.join(release).join("vmlinuz"),
            dir.join("boot").join(format!("vmlinuz-{release}")),
        ),
    ];
    for (from, to) in moves {
        if !from.exists() {
            continue;
        }
        if let Some(folder) = to.parent() {
            make_dir(folder.to_owned())?;
        }
        std::fs::rename(&from, &to).map_err(io(format!("rename {}", from.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_knows_the_same_kernels() {
        let names: Vec<&str> = SERIES.iter().map(|series| series.name).collect();
        assert_eq!(names, assay_tests::vm::KERNELS);
        assert!(names.contains(&assay_tests::vm::DEFAULT_KERNEL));
    }

    #[test]
    fn a_release_belongs_to_one_series() -> Result<(), Error> {
        assert!(Series::named("6.1")?.has("6.1.0-56-cloud-amd64"));
        assert!(!Series::named("6.1")?.has("6.12.118+deb13-cloud-amd64"));
        assert!(Series::named("7")?.has("7.2.13+deb14-cloud-amd64"));
        assert!(!Series::named("7")?.has("part"));
        assert!(Series::named("4.19").is_err());
        assert!(!Series::named("6.1")?.has("6.1.0-56-amd64"));
        assert!(HOST.has("6.1.0-56-amd64") && !HOST.has("6.1.0-56-cloud-amd64"));
        Ok(())
    }
}
