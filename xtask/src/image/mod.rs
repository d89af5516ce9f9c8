//! The test machines: Debian's kernels, a root filesystem of this machine's own release (so that programs built here
//! run there), an initramfs that carries the programs, and saved machines.
//!
//! Each piece is cached under a name made from all that goes into it.

mod cpio;
mod efi;
mod initrd;
mod kernel;
mod rootfs;
mod toolstacks;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use assay_tests::vm::{Accelerator, BootOptions, DEFAULT_KERNEL, Efi, Image, SHELL_WORD, Variant, Vm, Xen};
use kernel::{Kernel, SERIES, Series};
use rootfs::Contents;

pub use initrd::decompress;
pub use toolstacks::prepare as prepare_toolstacks;

use crate::build::{self, Built, Profile};
use crate::run::{Error, io, output};
use crate::setup::{self, System};
use crate::ui::{Step, note};
use crate::workspace::{Key, artifacts, cache, lock_cache, make_dir, root};

/// Kernels from 6.1 on list `bpf` among their security modules by default; the machines say it outright, and keep the
/// rest of Debian's list that matters to Assay. No IMA policy: hosts have none either. Where the machine below is busy, an emulated timer is late for the
/// kernel's check of it, and without one nothing goes on.
const CMDLINE: &str = "panic=-1 quiet no_timer_check lsm=landlock,lockdown,yama,integrity,apparmor,bpf";
/// Folders of saved machines that are kept, one a kernel: this tree's, and those of a few other states of it.
const SAVED_KEPT: usize = 10;
/// What was used this lately stays: the tests of another tree may be under way with it.
const IN_USE: Duration = Duration::from_secs(3600);

/// A script may run this long in a machine.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(600);

/// What goes into machines of any kernel.
struct Parts {
    system: System,
    root: PathBuf,
    programs: PathBuf,
    efi: Efi,
}

impl Parts {
    fn ensure(built: &Built, contents: Contents) -> Result<Self, Error> {
        if !cfg!(target_arch = "x86_64") {
            return Err(Error::Missing("test machines exist for x86_64 only".to_owned()));
        }
        let system = System::detect();
        Ok(Self {
            root: rootfs::archive(&system, contents)?,
            programs: initrd::programs(built)?,
            efi: efi::ensure(&system)?,
            system,
        })
    }

    fn image(&self, series: &Series) -> Result<Image, Error> {
        self.image_with(&series.ensure(&self.system)?, None)
    }

    /// With this kernel, under a hypervisor where there is one.
    fn image_with(&self, kernel: &Kernel, xen: Option<Xen>) -> Result<Image, Error> {
        let console = if xen.is_some() { "hvc0" } else { "ttyS0" };
        let mut image = Image {
            kernel: kernel.bzimage(),
            modules: kernel.modules(),
            initrd: vec![initrd::drivers(kernel)?, self.programs.clone()],
            root: rootfs::ensure(&self.root, kernel)?,
            efi: self.efi.clone(),
            cmdline: format!("console={console} {CMDLINE}"),
            kernel_release: kernel.release.clone(),
            xen,
            saved: PathBuf::new(),
            variant: Variant::Default,
        };
        let saved = cache("machines")?;
        image.saved = make_dir(saved.join(saved_name(&image)?))?;
        used(&image.saved);
        keep_newest(&saved, SAVED_KEPT)?;
        Ok(image)
    }
}

/// The default machine with the given programs on board.
pub fn prepare(built: &Built) -> Result<Image, Error> {
    prepare_kernel(built, DEFAULT_KERNEL)
}

/// The machine with a kernel of that series, with the given programs on board.
fn prepare_kernel(built: &Built, series: &str) -> Result<Image, Error> {
    let series = Series::named(series)?;
    let _lock = lock_cache()?;
    Parts::ensure(built, Contents::Plain)?.image(series)
}

/// The machines that the tests restore, each described where the harness looks for it. The default one is booted here
/// and saved, once for each content; the others by the first test that wants them.
pub fn prepare_saved(built: &Built) -> Result<(), Error> {
    let lock = lock_cache()?;
    let parts = Parts::ensure(built, Contents::Plain)?;
    let folder = artifacts()?;
    let mut releases = Vec::new();
    for series in SERIES {
        let image = parts.image(series)?;
        describe(&image, &folder.join(Image::file_name(series.name)))?;
        if series.name == DEFAULT_KERNEL {
            describe(&image, &folder.join("vm.json"))?;
        }
        releases.push(image.kernel_release);
    }
    drop(lock);
    note(&format!(
        "machines: Linux {} on {}",
        releases.join(", "),
        Accelerator::detect()
    ));
    save(&Image::read(&folder.join("vm.json"))?)
}

/// The root filesystem of Debian 13 in which packages are installed, as an archive.
pub fn debian13() -> Result<PathBuf, Error> {
    let _lock = lock_cache()?;
    rootfs::debian13(&System::detect())
}

/// The default machine alone, saved, and described in a file of its own, which is given back: a benchmark's programs are
/// not those of the tests.
pub fn prepare_bench(built: &Built) -> Result<PathBuf, Error> {
    let image = prepare(built)?;
    let file = artifacts()?.join("vm-bench.json");
    describe(&image, &file)?;
    save(&image)?;
    Ok(file)
}

fn describe(image: &Image, file: &Path) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(image).map_err(|error| Error::Io {
        action: "describe a test machine".to_owned(),
        source: error.into(),
    })?;
    std::fs::write(file, text).map_err(io(format!("write {}", file.display())))
}

/// Boots the machine once, to restore it from then on.
fn save(image: &Image) -> Result<(), Error> {
    if image.snapshot().exists() {
        return Ok(());
    }
    let step = Step::start("booting the test machine once, to save it");
    image.save()?;
    step.done();
    Ok(())
}

/// `cargo xtask vm`.
pub fn console(build_only: bool, bare: bool, kernel: &str, cmdline: String) -> Result<(), Error> {
    let tools = setup::install()?;
    let built = if bare {
        build::bare(&tools)?
    } else {
        build::all(&tools, Profile::Debug)?
    };
    if build_only {
        return prepare_saved(&built);
    }
    let image = prepare_kernel(&built, kernel)?;
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
pub fn script(bare: bool, kernel: &str, variant: Variant, script: &str, files: &[PathBuf]) -> Result<(), Error> {
    let tools = setup::install()?;
    let built = if bare {
        build::bare(&tools)?
    } else {
        build::all(&tools, Profile::Debug)?
    };
    let image = prepare_kernel(&built, kernel)?.booted(variant);
    save(&image)?;
    let vm = Vm::restore(&image)?;
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

/// A name for everything that a saved machine of this image depends on.
fn saved_name(image: &Image) -> Result<String, Error> {
    let version = |program: &str| output(std::process::Command::new(program).arg("--version"));
    let mut key = Key::new("saved machine 2")
        // How a machine is put together, and how it is booted: one that was made otherwise is another one.
        .file(&root().join("tests/src/vm/qemu.rs"))?
        .file(&root().join("tests/src/vm/accel.rs"))?
        .file(&root().join("tests/src/vm/variant.rs"))?
        .file(&root().join("tests/src/vm/xen.rs"))?;
    let hypervisor = image.xen.iter().map(|xen| &xen.hypervisor);
    let files = [&image.root, &image.kernel].into_iter().chain(&image.initrd);
    for file in files.chain(hypervisor) {
        key = key.text(&file.display().to_string());
    }
    Ok(key
        .text(&image.cmdline)
        .text(&Accelerator::detect().to_string())
        .text(&version("qemu-system-x86_64")?)
        .text(&version("swtpm")?)
        .name())
}

/// An entry of this folder of the cache, in which so many are kept: made unless it is there. One that is not finished is none.
fn cached(
    folder: &str,
    name: &str,
    kept: usize,
    make: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let folder = cache(folder)?;
    let path = folder.join(name);
    if path.exists() {
        used(&path);
        return Ok(path);
    }
    let part = folder.join(format!("{name}.part"));
    make(&part)?;
    std::fs::rename(&part, &path).map_err(io(format!("rename {}", part.display())))?;
    keep_newest(&folder, kept)?;
    Ok(path)
}

/// Notes that an entry of the cache was of use, so that [`keep_newest`] keeps it.
fn used(path: &Path) {
    // An entry that cannot be marked is made again sooner, that is all.
    let _ = std::fs::File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes the entries of a cache folder that were not used for longest; another process may do the same at the same
/// moment.
fn keep_newest(folder: &Path, count: usize) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(io(format!("list {}", folder.display())))?;
    let mut entries: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    entries.sort();
    for (last_used, path) in entries.iter().rev().skip(count) {
        if last_used.elapsed().is_ok_and(|age| age < IN_USE) {
            continue;
        }
        let _ = if path.is_dir() {
            std::fs::remove_dir_all(path)
        } else {
            std::fs::remove_file(path)
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_stays_in_the_cache() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let ages = [("now", 0), ("lately", 60), ("old", 7200), ("older", 9000)];
        for (name, age) in ages {
            let path = folder.path().join(name);
            std::fs::create_dir(&path)?;
            std::fs::File::open(&path)?.set_modified(SystemTime::now() - Duration::from_secs(age))?;
        }
        used(&folder.path().join("older"));
        keep_newest(folder.path(), 1).map_err(std::io::Error::other)?;
        let left = |name: &str| folder.path().join(name).exists();
        assert_eq!(["now", "lately", "old", "older"].map(left), [true, true, false, true]);
        Ok(())
    }
}
