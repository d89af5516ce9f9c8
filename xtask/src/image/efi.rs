//! Firmware and boot loaders of the machines that boot as real ones do: Debian's, signed, unpacked privately.

use std::path::{Path, PathBuf};

use assay_tests::vm::Efi;

use crate::run::{Error, io};
use crate::setup::{PrivateApt, System, debs, unpack};
use crate::workspace::{Key, cache, make_dir};

/// The release whose kernel the machines have by default: its shim lets that kernel start.
const SUITES: &[&str] = &["trixie", "trixie-security"];
/// Firmware, the two loaders, and what begins a unified kernel image.
const PACKAGES: &[&str] = &["ovmf", "shim-signed", "grub-efi-amd64-signed", "systemd-boot-efi"];

/// Those in the cache, or else the newest in the archive. As with kernels: never replaced by themselves, removing the
/// folder `efi` of the cache fetches newer ones.
pub fn ensure(system: &System) -> Result<Efi, Error> {
    let name = Key::new("boot loaders 1")
        .text(&SUITES.join("+"))
        .text(&PACKAGES.join(" "))
        .name();
    let dir = cache("efi")?.join(name);
    if !dir.exists() {
        fetch(system, &dir)?;
    }
    let ovmf = |code: &str, variables: &str| -> (PathBuf, PathBuf) {
        let folder = dir.join("usr/share/OVMF");
        (folder.join(code), folder.join(variables))
    };
    let efi = Efi {
        firmware: ovmf("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
        secure_firmware: ovmf("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"),
        shim: dir.join("usr/lib/shim/shimx64.efi.signed"),
        grub: dir.join("usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"),
        stub: dir.join("usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
    };
    if let Some(file) = efi.files().into_iter().find(|file| !file.exists()) {
        return Err(Error::Missing(format!(
            "{} is missing: Debian's {} have it elsewhere now; say where in xtask/src/image/efi.rs",
            file.display(),
            PACKAGES.join(", ")
        )));
    }
    Ok(efi)
}

fn fetch(system: &System, dir: &Path) -> Result<(), Error> {
    let apt = PrivateApt::debian(system, SUITES)?;
    apt.update()?;
    let part = dir.with_extension("part");
    // What an interrupted run left.
    let _ = std::fs::remove_dir_all(&part);
    make_dir(part.clone())?;
    let packages: Vec<String> = PACKAGES.iter().map(|&name| name.to_owned()).collect();
    apt.download("downloading firmware and boot loaders", &packages, &part)?;
    for deb in debs(&part)? {
        unpack(&deb, &part)?;
        std::fs::remove_file(&deb).map_err(io(format!("remove {}", deb.display())))?;
    }
    std::fs::rename(&part, dir).map_err(io(format!("rename {}", part.display())))
}
