//! The initramfs, in two archives: enough drivers to find the disk, one a kernel; and the programs under test, one a
//! build, which are laid over the root filesystem at boot so that a new build needs no new filesystem.

use std::path::{Path, PathBuf};

use super::cpio::Archive;
use super::kernel::Kernel;
use crate::build::{Built, strip_debug};
use crate::run::{Error, command, io, output};
use crate::workspace::Key;

/// Drivers of the disk, and of the TPM, which must be there before anything measures; what they need comes with them.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "ext4", "tpm_tis"];

/// Archives that are kept: the kernels', a guest's, and those of a few builds.
const KEPT: usize = 12;

/// PID 1 until the disk is there.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module" || echo "initramfs: cannot load $module"; done
tries=0
while [ ! -b /dev/vda ] && [ "$tries" -lt 200 ]; do sleep 0.05; tries=$((tries + 1)); done
mount -t ext4 -o rw,noatime /dev/vda /new || { echo "initramfs: no root filesystem"; poweroff -f; }
init=/usr/bin/assay-guest
for word in $(cat /proc/cmdline); do
    case "$word" in init=*) init="${word#init=}";; esac
done
if [ "$init" = /usr/bin/assay-guest ]; then
    cp -a /payload/. /new/
else
    # A system with a process 1 of its own has what its packages bring, and the helper.
    cp -a /payload/usr/bin/assay-guest /new/usr/bin/
fi
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec switch_root /new "$init"
"#;

/// The one driver of a Xen guest that is to read its disk.
const GUEST_MODULES: &[&str] = &["xen_blkfront"];
/// PID 1 of such a guest: says what its disk says, and switches off.
const GUEST_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module" || echo "guest: cannot load $module"; done
tries=0
while [ ! -b /dev/xvda ] && [ "$tries" -lt 600 ]; do sleep 0.05; tries=$((tries + 1)); done
echo "guest: the disk says: $(head -n 1 /dev/xvda)"
poweroff -f
"#;

/// The archive that boots the kernel; the other one comes after it.
pub fn drivers(kernel: &Kernel) -> Result<PathBuf, Error> {
    let key = Key::new("initramfs drivers 1")
        .text(&kernel.release)
        .text(INIT)
        .text(&MODULES.join(" "));
    cached(&format!("{}-{}", kernel.release, key.name()), || {
        let mut archive = Archive::default();
        for dir in ["bin", "modules", "proc", "sys", "dev", "new", "payload"] {
            archive.dir(dir);
        }
        archive.file("init", 0o755, INIT.as_bytes());
        archive.file("bin/busybox", 0o755, &read(&busybox()?)?);
        modules(&mut archive, kernel, MODULES)?;
        Ok(archive)
    })
}

/// All that a Xen guest with that kernel runs: it shows the first line of its disk on its console.
pub fn guest(kernel: &Kernel) -> Result<PathBuf, Error> {
    let key = Key::new("initramfs guest 1")
        .text(&kernel.release)
        .text(GUEST_INIT)
        .text(&GUEST_MODULES.join(" "));
    cached(&format!("guest-{}-{}", kernel.release, key.name()), || {
        let mut archive = Archive::default();
        for dir in ["bin", "modules", "dev"] {
            archive.dir(dir);
        }
        archive.file("init", 0o755, GUEST_INIT.as_bytes());
        archive.file("bin/busybox", 0o755, &read(&busybox()?)?);
        modules(&mut archive, kernel, GUEST_MODULES)?;
        Ok(archive)
    })
}

/// Puts the modules of these names, and those that they need, into the archive.
fn modules(archive: &mut Archive, kernel: &Kernel, names: &[&str]) -> Result<(), Error> {
    for (index, module) in module_files(kernel, names)?.iter().enumerate() {
        // The shell's glob gives them back in this order.
        let name = format!("modules/{index:02}-{}", file_name(module).trim_end_matches(".xz"));
        archive.file(&name, 0o644, &decompress(module)?);
    }
    Ok(())
}

/// The archive with the programs under test.
pub fn programs(built: &Built) -> Result<PathBuf, Error> {
    let programs: Vec<PathBuf> = built.on_board.iter().map(|name| built.bin.join(name)).collect();
    let mut key = Key::new("initramfs programs 1");
    for file in programs.iter().chain([&built.bpf_object, &built.probe_object]) {
        key = key.file(file)?;
    }
    cached(&format!("programs-{}", key.name()), || {
        let mut archive = Archive::default();
        for dir in [
            "payload",
            "payload/usr",
            "payload/usr/bin",
            "payload/usr/lib",
            "payload/usr/lib/assay",
        ] {
            archive.dir(dir);
        }
        let scratch = tempfile::tempdir().map_err(io("make a scratch folder"))?;
        for program in &programs {
            let name = file_name(program);
            let stripped = scratch.path().join(&name);
            strip_debug(program, &stripped)?;
            archive.file(&format!("payload/usr/bin/{name}"), 0o755, &read(&stripped)?);
        }
        archive.file("payload/usr/lib/assay/assay-ebpf.o", 0o644, &read(&built.bpf_object)?);
        archive.file(
            "payload/usr/lib/assay/assay-ebpf-probe.o",
            0o644,
            &read(&built.probe_object)?,
        );
        Ok(archive)
    })
}

fn cached(name: &str, build: impl FnOnce() -> Result<Archive, Error>) -> Result<PathBuf, Error> {
    super::cached("initramfs", &format!("{name}.cpio"), KEPT, |part| {
        std::fs::write(part, build()?.finish()).map_err(io(format!("write {}", part.display())))
    })
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn busybox() -> Result<PathBuf, Error> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .ok_or_else(|| Error::Missing("busybox is missing: install busybox-static".to_owned()))
}

/// The modules' files in the order in which they must be loaded.
fn module_files(kernel: &Kernel, names: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let mut files: Vec<PathBuf> = Vec::new();
    for module in names {
        let mut modprobe = command("modprobe", ["-S", &kernel.release, "-d"]);
        modprobe.arg(kernel.module_base()).args(["--show-depends", module]);
        for line in output(&mut modprobe)?.lines() {
            // "builtin NAME" needs no file.
            let Some(file) = line.strip_prefix("insmod ").map(|file| PathBuf::from(file.trim())) else {
                continue;
            };
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// A module as the kernel loads it: Debian 13 ships them compressed.
pub fn decompress(module: &Path) -> Result<Vec<u8>, Error> {
    if module.extension().is_none_or(|extension| extension != "xz") {
        return read(module);
    }
    let result = command("xz", ["-dc"])
        .arg(module)
        .output()
        .map_err(|source| Error::Start {
            program: "xz".to_owned(),
            source,
        })?;
    if result.status.success() {
        return Ok(result.stdout);
    }
    let output = String::from_utf8_lossy(&result.stderr).into_owned();
    Err(Error::Failed {
        command: format!("xz -dc {}", module.display()),
        status: result.status,
        output,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(io(format!("read {}", path.display())))
}
