//! The test machines: a Debian kernel of the series that the product runs on, a root filesystem of this machine's own
//! release (so that programs built here run there), an initramfs that carries the programs, and a saved machine.
//!
//! Each piece is cached under a name made from all that goes into it.

mod cpio;
mod initrd;
mod kernel;
mod rootfs;

use std::path::{Path, PathBuf};

use assay_tests::vm::{Accelerator, BootOptions, Image, SHELL_WORD, Vm};

pub use initrd::decompress;

use crate::build::{self, Built, Profile};
use crate::run::{Error, io, output};
use crate::setup::{self, System};
use crate::ui::{Step, note};
use crate::workspace::{Key, artifacts, cache, lock_cache, root};

/// Kernels from here on list `bpf` among their security modules by default; the machines say it outright, and keep the
/// rest of Debian's list that matters to Assay. No IMA policy: hosts have none either.
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet lsm=landlock,lockdown,yama,integrity,apparmor,bpf";
/// Saved machines that are kept: this tree's, and those of a few other states of it.
const SAVED_KEPT: usize = 3;

/// A script may run this long in a machine.
const SCRIPT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(600);

/// A machine with the given programs on board, without a saved state.
pub fn prepare(built: &Built) -> Result<Image, Error> {
    let system = System::detect();
    if !cfg!(target_arch = "x86_64") {
        return Err(Error::Missing("test machines exist for x86_64 only".to_owned()));
    }
    let _lock = lock_cache()?;
    let kernel = kernel::ensure(&system)?;
    let root = rootfs::ensure(&system, &kernel)?;
    let initrd = initrd::ensure(&kernel, built)?;
    Ok(Image {
        kernel_release: kernel.release.clone(),
        kernel: kernel.bzimage(),
        modules: kernel.modules(),
        initrd,
        root,
        cmdline: CMDLINE.to_owned(),
        snapshot: None,
    })
}

/// The machine that the tests restore: booted once for each content, and saved. Leaves its description where the
/// harness looks for it.
pub fn prepare_saved(built: &Built) -> Result<Image, Error> {
    let mut image = prepare(built)?;
    note(&format!(
        "machines: Linux {} on {}",
        image.kernel_release,
        Accelerator::detect()
    ));
    let saved = cache("saved")?.join(saved_name(&image)?);
    let lock = lock_cache()?;
    if !saved.exists() {
        save(&image, &saved)?;
    }
    drop(lock);
    image.snapshot = Some(saved);
    let text = serde_json::to_vec_pretty(&image).map_err(|error| Error::Io {
        action: "describe the test machine".to_owned(),
        source: error.into(),
    })?;
    let file = artifacts()?.join("vm.json");
    std::fs::write(&file, text).map_err(io(format!("write {}", file.display())))?;
    Ok(image)
}

/// `cargo xtask vm`.
pub fn console(build_only: bool, bare: bool, cmdline: String) -> Result<(), Error> {
    let tools = setup::install()?;
    let built = if bare {
        build::bare(&tools)?
    } else {
        build::all(&tools, Profile::Debug)?
    };
    if build_only {
        return prepare_saved(&built).map(drop);
    }
    let image = prepare(&built)?;
    note(&format!(
        "booting Linux {} on {}; `exit` or Ctrl-A X switches off",
        image.kernel_release,
        Accelerator::detect()
    ));
    let cmdline = format!("{SHELL_WORD} {cmdline}");
    let mut vm = Vm::boot(
        &image,
        &BootOptions {
            cmdline,
            interactive: true,
            ..BootOptions::default()
        },
    )?;
    Ok(vm.wait()?)
}

/// `cargo xtask vm --script`.
pub fn script(bare: bool, script: &str, files: &[PathBuf]) -> Result<(), Error> {
    let tools = setup::install()?;
    let built = if bare {
        build::bare(&tools)?
    } else {
        build::all(&tools, Profile::Debug)?
    };
    let vm = Vm::restore(&prepare_saved(&built)?)?;
    for file in files {
        let name = file
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        vm.guest().put_file(&format!("/root/{name}"), 0o755, file)?;
    }
    let ended = vm.guest().run_with(&["bash", "-c", script], b"", SCRIPT_TIMEOUT)?;
    print!("{}", ended.stdout);
    eprint!("{}", ended.stderr);
    if ended.ok() {
        return Ok(());
    }
    let how = ended.code.map_or_else(
        || "a signal, or lateness".to_owned(),
        |code| format!("exit status {code}"),
    );
    Err(Error::Tests(format!("the script ended by {how}")))
}

fn saved_name(image: &Image) -> Result<String, Error> {
    let version = |program: &str| output(std::process::Command::new(program).arg("--version"));
    Ok(Key::new("saved machine 1")
        // How a machine is put together: one that was put together otherwise cannot be restored.
        .file(&root().join("tests/src/vm/qemu.rs"))?
        .text(&image.root.display().to_string())
        .text(&image.initrd.display().to_string())
        .text(&image.kernel.display().to_string())
        .text(&image.cmdline)
        .text(&Accelerator::detect().to_string())
        .text(&version("qemu-system-x86_64")?)
        .text(&version("swtpm")?)
        .name())
}

fn save(image: &Image, to: &Path) -> Result<(), Error> {
    let step = Step::start("booting the test machine once, to save it");
    let part = to.with_extension("part");
    // What an interrupted run left.
    let _ = std::fs::remove_dir_all(&part);
    Vm::boot(image, &BootOptions::default())?.save(&part)?;
    std::fs::rename(&part, to).map_err(io(format!("rename {}", part.display())))?;
    step.done();
    prune(to)
}

/// Removes all but the latest saved machines.
fn prune(newest: &Path) -> Result<(), Error> {
    let Some(folder) = newest.parent() else {
        return Ok(());
    };
    keep_newest(folder, SAVED_KEPT)
}

/// Removes the oldest entries of a cache folder; another process may do the same at the same moment.
fn keep_newest(folder: &Path, count: usize) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(io(format!("list {}", folder.display())))?;
    let mut entries: Vec<(std::time::SystemTime, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    entries.sort();
    for (_, path) in entries.iter().rev().skip(count) {
        let _ = if path.is_dir() {
            std::fs::remove_dir_all(path)
        } else {
            std::fs::remove_file(path)
        };
    }
    Ok(())
}
