//! System packages, and what they are called elsewhere.

use std::collections::HashSet;

use super::apt::{self, PrivateApt};
use super::system::{Family, System};
use crate::run::{Error, command, in_path, output, step};
use crate::ui::note;

/// Packages by what they are for. Of names separated by `|` one is enough: releases differ.
const PACKAGES: &[&str] = &[
    // To build.
    "gcc",
    // For libFuzzer.
    "g++",
    "libc6-dev",
    "binutils",
    "pkg-config|pkgconf",
    "clang",
    "libclang-dev",
    "libtss2-dev",
    "libsystemd-dev",
    "libcryptsetup-dev",
    // What the agent for XCP-ng 8.3 is linked from, and what brings its compiler.
    "libssl-dev",
    "libjson-c-dev",
    "uuid-dev",
    "libudev-dev",
    "python3-pip",
    "libsqlite3-dev",
    // What a privately unpacked compiler and its LLVM stand on.
    "libedit2",
    "libffi8",
    "libxml2|libxml2-16",
    "libz3-4",
    "libzstd1",
    "zlib1g",
    // To test.
    "swtpm",
    "swtpm-tools",
    "tpm2-tools",
    // A second opinion on signatures.
    "openssl",
    // Hooks of toolstacks are in it, and servers that tests ask.
    "python3",
    "python3-venv",
    "libtss2-tcti-swtpm0|libtss2-tcti-swtpm0t64",
    "cryptsetup-bin",
    "util-linux",
    "iproute2",
    "kmod",
    "busybox-static",
    "mmdebstrap",
    "fakeroot",
    "e2fsprogs",
    "xz-utils",
    // Packages and initramfs files, made and unpacked by the programs that everybody uses.
    "rpm",
    "gnupg",
    "createrepo-c",
    "xorriso",
    "libarchive-tools",
    "qemu-user",
    "cpio",
    "lz4",
    "zstd",
    "debian-archive-keyring",
    "ca-certificates",
    // Makes a GRUB without its `tpm` module, and one that starts from a disk by BIOS, and checks GRUB's configurations.
    "grub-common",
    "grub-efi-amd64-bin",
    "grub-pc-bin",
    "qemu-utils",
    "qemu-system-x86",
];

/// The same for Fedora and Enterprise Linux 10; printed, not installed.
const DNF: &str = "dnf install gcc gcc-c++ binutils pkgconf-pkg-config clang clang-devel tpm2-tss-devel systemd-devel \
cryptsetup-devel sqlite-devel swtpm swtpm-tools tpm2-tools openssl python3 cryptsetup util-linux iproute kmod e2fsprogs xz zstd lz4 \
cpio dpkg rpm-build qemu-img qemu-system-x86-core grub2-tools grub2-efi-x64-modules grub2-pc-modules";

/// What is missing, one name for each.
pub fn missing(system: &System) -> Result<Vec<String>, Error> {
    if !system.has_apt() {
        return Ok(missing_programs());
    }
    let installed = output(&mut command(
        "dpkg-query",
        ["-W", "-f", "${db:Status-Abbrev} ${Package}\n"],
    ))?;
    let installed: HashSet<&str> = installed
        .lines()
        .filter_map(|line| line.strip_prefix("ii"))
        .map(str::trim)
        .collect();
    let missing = PACKAGES
        .iter()
        .filter(|names| !names.split('|').any(|name| installed.contains(name)));
    missing.map(|names| pick(names)).collect()
}

/// The first of the names that the archive knows.
fn pick(names: &str) -> Result<String, Error> {
    let mut first = None;
    for name in names.split('|') {
        if !names.contains('|') || apt::candidate(name)?.is_some() {
            return Ok(name.to_owned());
        }
        first = first.or(Some(name));
    }
    Ok(first.unwrap_or(names).to_owned())
}

/// Without apt only programs can be looked for.
fn missing_programs() -> Vec<String> {
    [
        "gcc",
        // For libFuzzer.
        "g++",
        "pkg-config",
        "clang",
        "swtpm",
        "swtpm_setup",
        "tpm2",
        "openssl",
        "python3",
        "cryptsetup",
        "qemu-img",
        "qemu-system-x86_64",
    ]
    .into_iter()
    .filter(|program| !in_path(program))
    .map(str::to_owned)
    .collect()
}

/// Installs them.
pub fn install(system: &System, missing: &[String]) -> Result<(), Error> {
    match system.family {
        Family::Debian | Family::Ubuntu => {}
        Family::Dnf => {
            note("this distribution's packages are not installed for you; run as root:");
            note(DNF);
            return Err(Error::Missing(format!("missing: {}", missing.join(", "))));
        }
        Family::Other => {
            return Err(Error::Missing(format!(
                "missing: {}; this distribution is not known here, install them by hand (Fedora's names: {DNF})",
                missing.join(", ")
            )));
        }
    }
    note(&format!("installing {}", missing.join(" ")));
    let mut update = apt::as_root("apt-get")?;
    step(
        "fetching package lists",
        update.args(["-o", "DPkg::Lock::Timeout=600", "-q", "update"]),
    )?;
    let (qemu, rest): (Vec<String>, Vec<String>) = missing
        .iter()
        .cloned()
        .partition(|package| package.starts_with("qemu-"));
    if !rest.is_empty() {
        apt::install("installing packages", &[], &rest)?;
    }
    if qemu.is_empty() {
        Ok(())
    } else {
        install_qemu(system, &qemu)
    }
}

/// Where QEMU's tools came from backports, the machine emulator of the release itself breaks them, and would have apt
/// remove them: then it is taken from backports as well, through a configuration that changes nothing for other packages.
fn install_qemu(system: &System, packages: &[String]) -> Result<(), Error> {
    let simulate = command(
        "apt-get",
        ["-s", "-q", "install", "--no-install-recommends", "--no-remove"],
    )
    .args(packages)
    .output();
    if simulate.is_ok_and(|result| result.status.success()) {
        return apt::install("installing QEMU", &[], packages);
    }
    if system.family != Family::Debian {
        return Err(Error::Missing(format!(
            "apt cannot install {}: `apt-get install` says why",
            packages.join(" ")
        )));
    }
    let release = &system.codename;
    let backports = format!("{release}-backports");
    note(&format!(
        "QEMU's tools on this machine are from {backports}: taking the emulator from there"
    ));
    let (updates, security) = (format!("{release}-updates"), format!("{release}-security"));
    let private = PrivateApt::debian(system, &[release, &updates, &backports, &security])?;
    private.update()?;
    let mut options = private.sources();
    options.extend(["-t".to_owned(), backports]);
    apt::install("installing QEMU", &options, packages)
}
