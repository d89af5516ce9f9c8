//! The machines' root filesystems: this machine's own release, small, with the kernel's modules, as one raw ext4 file each.
//! What all kernels share is made once, and takes most of the time.

use std::path::{Path, PathBuf};

use super::kernel::Kernel;
use crate::run::{Error, command, is_root, output, step};
use crate::setup::{DEBIAN_KEYRING, Family, System, debian_mirror};
use crate::workspace::Key;

/// What the agent and the verifier link to, what the tests run, independent tools for a second opinion, and what makes a whole
/// system of it where a test wants one: a service manager, and the tools that make an initramfs.
const PACKAGES: &str = "bash,kmod,util-linux,mount,iproute2,procps,e2fsprogs,busybox-static,python3-minimal,\
cryptsetup-bin,libcryptsetup12,qemu-utils,libsystemd0,libsqlite3-0,tpm2-tools,systemd,systemd-sysv,udev,initramfs-tools,dracut-core";
/// What hosts of virtual machines have beside that: Xen with xl; libvirt and an emulator for it; a program that fetches images.
const TOOLSTACKS: &str = "xen-system-amd64,libvirt-daemon,libvirt-clients,qemu-system-x86,curl";
/// The hypervisor that the first of them brings, compressed.
const HYPERVISOR: &str = "./boot/xen-*-amd64.gz";

/// Which packages a root filesystem has.
#[derive(Debug, Clone, Copy)]
pub enum Contents {
    /// Those that all machines have.
    Plain,
    /// Those, Xen's, and libvirt's.
    Toolstacks,
}

impl Contents {
    fn packages(self) -> String {
        match self {
            Self::Plain => PACKAGES.to_owned(),
            Self::Toolstacks => format!("{PACKAGES},{TOOLSTACKS}"),
        }
    }
}
/// Size of the filesystem; the file is sparse.
const SIZE: &str = "2G";

/// Files that are kept: three archives, a filesystem for each kernel, a hypervisor, and what an earlier state of this recipe left.
const KEPT: usize = 14;

/// The filesystem without a kernel's modules, as an archive; made unless it is there.
pub fn archive(system: &System, contents: Contents) -> Result<PathBuf, Error> {
    let (sources, packages) = (sources(system)?, contents.packages());
    let name = Key::new("root archive 1")
        .text(&system.codename)
        .text(&sources.join("\n"))
        .text(&packages)
        .name();
    cached(&format!("{}-{name}.tar", system.codename), |part| {
        bootstrap(&system.codename, &sources, &packages, part)
    })
}

/// A Debian 13 with what the packages depend on, as an archive: they are made on an older release, and must go with it.
pub fn debian13(system: &System) -> Result<PathBuf, Error> {
    const RELEASE: &str = "trixie";
    const PACKAGES: &str = "systemd,libcryptsetup12,libsqlite3-0,libtss2-esys-3.0.2-0t64,libtss2-mu-4.0.1-0t64,\
libtss2-tctildr0t64,libtss2-tcti-device0t64";
    let source = format!(
        "deb [signed-by={DEBIAN_KEYRING}] {} {RELEASE} main",
        debian_mirror(system, RELEASE)
    );
    let name = Key::new("debian 13 archive 1").text(&source).text(PACKAGES).name();
    cached(&format!("{RELEASE}-{name}.tar"), |part| {
        bootstrap(RELEASE, &[source], PACKAGES, part)
    })
}

/// The hypervisor that is in an archive with toolstacks, as QEMU starts it: unpacked.
pub fn hypervisor(archive: &Path) -> Result<PathBuf, Error> {
    let name = archive.file_stem().unwrap_or_default().to_string_lossy();
    cached(&format!("{name}.xen"), |part| {
        let script = r#"tar -xOf "$1" --wildcards "$2" | gzip -d > "$3"; test -s "$3""#;
        let mut shell = command("bash", ["-euo", "pipefail", "-c", script, "hypervisor"]);
        output(shell.arg(archive).arg(HYPERVISOR).arg(part)).map(drop)
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
    super::cached("root", name, KEPT, make)
}

fn bootstrap(release: &str, sources: &[String], packages: &str, tar: &Path) -> Result<(), Error> {
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
        .arg(format!("--include={packages}"))
        .arg(release)
        .arg(tar)
        .args(sources);
    step(
        &format!("making a {release} root filesystem (under a minute)"),
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
echo '127.0.0.1 localhost guest' > "$dir/etc/hosts"
# With an id it is no first boot, at which every unit would be enabled that is there.
echo 0a55a90a55a90a55a90a55a90a55a900 > "$dir/etc/machine-id"
# The harness's helper, where systemd is process 1.
unit="$dir/etc/systemd/system/assay-guest.service"
printf '%s\n' '[Unit]' 'After=multi-user.target' '[Service]' 'ExecStart=/usr/bin/assay-guest network' KillMode=process > "$unit"
mkdir -p "$dir/etc/systemd/system/default.target.wants"
ln -s /etc/systemd/system/assay-guest.service "$dir/etc/systemd/system/default.target.wants/"
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
