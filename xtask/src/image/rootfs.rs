//! The guests' root filesystem: this machine's own release, small, with the kernel's modules, as one raw ext4 file.
//! What all kernels share is made once, and takes most of the time.

use std::path::{Path, PathBuf};

use super::kernel::Kernel;
use crate::run::{Error, command, is_root, step};
use crate::setup::{Family, System};
use crate::workspace::{Key, cache};

/// What the agent links to, what the tests run, and independent tools for a second opinion.
const PACKAGES: &str = "bash,kmod,util-linux,mount,iproute2,procps,e2fsprogs,busybox-static,python3-minimal,\
cryptsetup-bin,libcryptsetup12,libsystemd0,tpm2-tools";
/// Size of the filesystem; the file is sparse.
const SIZE: &str = "2G";

/// Files that are kept: the archive, a filesystem for each kernel, and what an earlier state of this recipe left.
const KEPT: usize = 8;

/// The filesystem without a kernel's modules, as an archive; made unless it is there.
pub fn archive(system: &System) -> Result<PathBuf, Error> {
    let sources = sources(system)?;
    let name = Key::new("root archive 1")
        .text(&system.codename)
        .text(&sources.join("\n"))
        .text(PACKAGES)
        .name();
    cached(&format!("{}-{name}.tar", system.codename), |part| {
        bootstrap(system, &sources, part)
    })
}

/// The filesystem with one kernel's modules; made from the archive unless it is there.
pub fn ensure(archive: &Path, kernel: &Kernel) -> Result<PathBuf, Error> {
    let name = Key::new("root filesystem 2")
        .text(&archive.file_name().unwrap_or_default().to_string_lossy())
        .text(SIZE)
        .text(SCRIPT)
        .name();
    cached(&format!("{}-{name}.ext4", kernel.release), |part| {
        make_image(kernel, archive, part)
    })
}

fn cached(name: &str, make: impl FnOnce(&Path) -> Result<(), Error>) -> Result<PathBuf, Error> {
    let folder = cache("root")?;
    let path = folder.join(name);
    if path.exists() {
        super::used(&path);
        return Ok(path);
    }
    let part = folder.join(format!("{name}.part"));
    make(&part)?;
    std::fs::rename(&part, &path).map_err(crate::run::io(format!("rename {}", part.display())))?;
    super::keep_newest(&folder, KEPT)?;
    Ok(path)
}

fn bootstrap(system: &System, sources: &[String], tar: &Path) -> Result<(), Error> {
    let mode = if is_root() { "root" } else { "unshare" };
    let mut mmdebstrap = command("mmdebstrap", [format!("--mode={mode}")]);
    mmdebstrap.args([
        "--variant=apt",
        "--format=tar",
        "--aptopt=APT::Install-Recommends \"false\"",
    ]);
    for folder in ["man", "doc", "locale", "info"] {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    mmdebstrap
        .arg(format!("--include={PACKAGES}"))
        .arg(&system.codename)
        .arg(tar)
        .args(sources);
    step(
        &format!("making a {} root filesystem (under a minute)", system.codename),
        &mut mmdebstrap,
    )
}

/// The same archives as this machine's: its libraries and the guest's must be of one age.
fn sources(system: &System) -> Result<Vec<String>, Error> {
    let release = &system.codename;
    let (main, components) = match system.family {
        Family::Debian => ("http://deb.debian.org/debian", "main"),
        Family::Ubuntu => ("http://archive.ubuntu.com/ubuntu", "main universe"),
        Family::Dnf | Family::Other => {
            return Err(Error::Missing(
                "test machines are made from the packages of Debian or Ubuntu; this machine runs neither".to_owned(),
            ));
        }
    };
    let fallback = |suite: &str| match system.family {
        Family::Debian if suite.ends_with("-security") => "http://deb.debian.org/debian-security".to_owned(),
        _ => main.to_owned(),
    };
    let suites = [
        release.clone(),
        format!("{release}-updates"),
        format!("{release}-security"),
    ];
    Ok(suites
        .iter()
        .map(|suite| {
            let uri = system.mirror(suite).unwrap_or_else(|| fallback(suite));
            format!("deb {uri} {suite} {components}")
        })
        .collect())
}

/// Unpacks, adds the modules, and writes the filesystem without mounting anything. With a journal: tests press the
/// reset button.
const SCRIPT: &str = r#"set -eu
tar="$1" modules="$2" release="$3" image="$4" size="$5"
dir=$(mktemp -d "$image.XXXXXX")
trap 'rm -rf "$dir"' EXIT
tar -xf "$tar" -C "$dir" --numeric-owner
rm -rf "$dir"/var/lib/apt/lists/* "$dir"/var/cache/apt/*
mkdir -p "$dir/usr/lib/modules"
cp -a "$modules" "$dir/usr/lib/modules/$release"
chown -R 0:0 "$dir/usr/lib/modules"
echo guest > "$dir/etc/hostname"
rm -f "$image"
truncate -s "$size" "$image"
mke2fs -q -F -t ext4 -J size=16 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard -L root -d "$dir" "$image"
"#;

fn make_image(kernel: &Kernel, tar: &Path, image: &Path) -> Result<(), Error> {
    // Owners and device files need root, or something that remembers them.
    let mut shell = if is_root() {
        command("sh", ["-c"])
    } else {
        command("fakeroot", ["sh", "-c"])
    };
    shell
        .args([SCRIPT, "image"])
        .arg(tar)
        .arg(kernel.modules())
        .arg(&kernel.release)
        .arg(image)
        .arg(SIZE);
    step(
        &format!("writing it to an image for Linux {}", kernel.release),
        &mut shell,
    )
}
