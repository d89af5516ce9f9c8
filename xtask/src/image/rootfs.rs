//! The guests' root filesystem: this machine's own release, small, with the kernel's modules, as one raw ext4 file.

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

/// Builds it, unless it is there.
pub fn ensure(system: &System, kernel: &Kernel) -> Result<PathBuf, Error> {
    let sources = sources(system)?;
    let name = Key::new("root filesystem 1")
        .text(&system.codename)
        .text(&sources.join("\n"))
        .text(PACKAGES)
        .text(SIZE)
        .text(&kernel.release)
        .text(SCRIPT)
        .name();
    let image = cache("root")?.join(format!("{}-{name}.ext4", system.codename));
    if image.exists() {
        return Ok(image);
    }
    let part = image.with_extension("part");
    let tar = image.with_extension("tar");
    bootstrap(system, &sources, &tar)?;
    make_image(kernel, &tar, &part)?;
    std::fs::rename(&part, &image).map_err(crate::run::io(format!("rename {}", part.display())))?;
    std::fs::remove_file(&tar).map_err(crate::run::io(format!("remove {}", tar.display())))?;
    super::keep_newest(&cache("root")?, 3)?;
    Ok(image)
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
    step("writing it to an image", &mut shell)
}
