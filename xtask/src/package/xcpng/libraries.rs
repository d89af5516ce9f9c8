//! tpm2-tss, libdevmapper and libcryptsetup as static archives for the old glibc, beside those that Debian has ready.
//!
//! Compiled file by file, without the projects' own build systems: what those would find out of a host is known here, and stands in
//! packaging/xcpng/*.h.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use super::sources::{CRYPTSETUP, DEVMAPPER, Source, TSS2};
use super::zig::Zig;
use crate::run::{Error, command, io, output};
use crate::setup::System;
use crate::ui::Step;
use crate::workspace::{Key, cache, make_dir, root};

/// Changed whenever what is below makes other bytes.
const RECIPE: &str = "libraries for XCP-ng 8.3, 1";
/// No debug information: nobody strips archives later.
const FLAGS: &[&str] = &[
    "-O2",
    "-g0",
    "-fPIC",
    "-ffunction-sections",
    "-fdata-sections",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-D_FILE_OFFSET_BITS=64",
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
    // Other people's code, and a newer compiler than they had.
    "-Wno-everything",
];
/// Where Debian's compiler looks for libraries of this machine.
const DEBIAN_LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
/// Archives that Debian has ready, with the package of each. They are of a newer glibc than 2.17; what they need of it that neither 2.17
/// nor packaging/xcpng/compat.c has ends the link.
const READY: [(&str, &str); 3] = [
    ("libcrypto.a", "libssl-dev"),
    ("libjson-c.a", "libjson-c-dev"),
    ("libuuid.a", "uuid-dev"),
];
/// Headers of those, and of libudev: not all of /usr/include, where glibc's own lie.
const HEADERS: [&str; 5] = [
    "/usr/include/openssl",
    "/usr/include/x86_64-linux-gnu/openssl",
    "/usr/include/json-c",
    "/usr/include/uuid",
    "/usr/include/libudev.h",
];

/// One archive to compile.
struct Library {
    /// `libNAME.a`, and its configuration `packaging/xcpng/NAME.h`.
    name: &'static str,
    source: &'static Source,
    /// Folders with headers.
    includes: &'static [&'static str],
    /// Folders of which every C file is taken.
    folders: &'static [&'static str],
    /// C files beside those.
    files: &'static [&'static str],
    /// C files of packaging/xcpng beside those.
    ours: &'static [&'static str],
    /// C files of the folders that are left out.
    without: &'static [&'static str],
    /// Headers that crates and the libraries after this one want.
    headers: &'static [&'static str],
    /// What pkg-config calls it.
    modules: &'static [&'static str],
    /// What a program that uses it is linked with.
    link: &'static str,
}

const LIBRARIES: [Library; 3] = [
    Library {
        name: "tss2",
        source: &TSS2,
        includes: &[
            "include/tss2",
            "include",
            "src",
            "src/tss2-mu",
            "src/tss2-sys",
            "src/tss2-esys",
            "src/tss2-tcti",
            "src/util",
            ".",
        ],
        folders: &[
            "src/tss2-mu",
            "src/tss2-sys",
            "src/tss2-sys/api",
            "src/tss2-esys",
            "src/tss2-esys/api",
            "src/util",
            "src/util-io",
        ],
        files: &[
            "src/tss2-tcti/tcti-common.c",
            "src/tss2-tcti/tcti-device.c",
            "src/tss2-tcti/tctildr.c",
            "src/tss2-tcti/tctildr-nodl.c",
        ],
        ours: &["tcti-swtpm.c"],
        without: &["src/tss2-esys/esys_crypto_mbed.c"],
        headers: &["include/tss2"],
        modules: &["tss2-sys", "tss2-esys", "tss2-mu", "tss2-tctildr"],
        link: "-ltss2 -lcrypto -lcompat",
    },
    Library {
        name: "devmapper",
        source: &DEVMAPPER,
        includes: &[".", "libdm", "lib", "include"],
        folders: &["libdm", "libdm/datastruct", "libdm/regex"],
        files: &["libdm/mm/dbg_malloc.c", "libdm/mm/pool.c", "libdm/ioctl/libdm-iface.c"],
        ours: &[],
        without: &[],
        headers: &["libdm/libdevmapper.h"],
        modules: &["devmapper"],
        link: "-ldevmapper -ludev",
    },
    Library {
        name: "cryptsetup",
        source: &CRYPTSETUP,
        includes: &["lib", "lib/crypto_backend", "lib/crypto_backend/argon2"],
        folders: &[
            "lib",
            "lib/integrity",
            "lib/loopaes",
            "lib/tcrypt",
            "lib/luks1",
            "lib/verity",
            "lib/luks2",
            "lib/luks2/hw_opal",
            "lib/bitlk",
            "lib/fvault2",
            "lib/crypto_backend",
            "lib/crypto_backend/argon2",
            "lib/crypto_backend/argon2/blake2",
        ],
        files: &[],
        ours: &[],
        without: &[
            "lib/crypto_backend/crypto_gcrypt.c",
            "lib/crypto_backend/crypto_kernel.c",
            "lib/crypto_backend/crypto_nettle.c",
            "lib/crypto_backend/crypto_nss.c",
            "lib/crypto_backend/pbkdf2_generic.c",
            "lib/crypto_backend/argon2/opt.c",
        ],
        headers: &["lib/libcryptsetup.h"],
        modules: &["libcryptsetup"],
        link: "-lcryptsetup -ldevmapper -luuid -ljson-c -lcrypto -ludev -lcompat",
    },
];

/// One thing that the program is linked from, for the bill of materials.
#[derive(Debug, Clone)]
pub(in crate::package) struct Component {
    /// Name of the package.
    pub(in crate::package) name: &'static str,
    /// Its version.
    pub(in crate::package) version: String,
    /// SHA-256 and licence, of what was compiled here.
    pub(in crate::package) source: Option<(&'static str, &'static str)>,
}

/// The archives, ready to link.
pub(super) struct Libraries {
    prefix: PathBuf,
    /// What they are of.
    pub(super) components: Vec<Component>,
}

/// What is in the cache, or else compiled now.
pub(super) fn ensure(system: &System, zig: &Zig) -> Result<Libraries, Error> {
    let components = components()?;
    let key = Key::new(RECIPE)
        .text(&Zig::describe())
        .text(&FLAGS.join(" "))
        .text(&format!("{components:?}"))
        .tree(&root().join("packaging/xcpng"))?
        .name();
    let prefix = cache("xcpng")?.join(key);
    if !prefix.exists() {
        let work = tempfile::tempdir_in(cache("xcpng")?).map_err(io("make a folder for libraries"))?;
        let made = make_dir(work.path().join("prefix"))?;
        stage(zig, &made)?;
        for library in &LIBRARIES {
            library.build(system, zig, work.path(), &made)?;
        }
        // Complete, or not there at all.
        fs::rename(&made, &prefix).map_err(io(format!("make {}", prefix.display())))?;
    }
    for library in &LIBRARIES {
        library.describe(&prefix)?;
    }
    Ok(Libraries { prefix, components })
}

impl Libraries {
    /// Makes crates find them, and nothing else.
    pub(super) fn configure(&self, cargo: &mut Command) {
        cargo
            .env("PKG_CONFIG_LIBDIR", self.prefix.join("lib/pkgconfig"))
            .env("PKG_CONFIG_ALL_STATIC", "1");
    }
}

/// What the archives are of: three compiled here, three of Debian's.
fn components() -> Result<Vec<Component>, Error> {
    let compiled = LIBRARIES.iter().map(|library| Component {
        name: library.source.name,
        version: library.source.version.to_owned(),
        source: Some((library.source.sha256, library.source.licence)),
    });
    let mut components: Vec<Component> = compiled.collect();
    for (_, package) in READY {
        let version = output(&mut command("dpkg-query", ["-W", "-f", "${Version}", package]))?;
        components.push(Component {
            name: package,
            version,
            source: None,
        });
    }
    Ok(components)
}

/// Debian's archives and headers, what stands for libudev, and what the old glibc lacks.
fn stage(zig: &Zig, prefix: &Path) -> Result<(), Error> {
    let (lib, include) = (make_dir(prefix.join("lib"))?, make_dir(prefix.join("include"))?);
    for (archive, package) in READY {
        let from = Path::new(DEBIAN_LIBRARIES).join(archive);
        fs::copy(&from, lib.join(archive)).map_err(io(format!(
            "read {}: it is in Debian's package {package}",
            from.display()
        )))?;
    }
    for header in HEADERS {
        output(command("cp", ["-rL", header]).arg(&include))?;
    }
    let packaging = root().join("packaging/xcpng");
    let mut stub = Command::new(zig.driver());
    stub.args(["-shared", "-nostdlib", "-Wl,-soname,libudev.so.1"])
        .arg(format!(
            "-Wl,--version-script={}",
            packaging.join("libudev.map").display()
        ))
        .arg(packaging.join("libudev.c"))
        .arg("-o")
        .arg(lib.join("libudev.so"));
    output(&mut stub)?;
    let object = lib.join("compat.o");
    let mut compat = Command::new(zig.driver());
    compat.args(FLAGS).arg("-c").arg(packaging.join("compat.c"));
    output(compat.arg("-o").arg(&object))?;
    zig.archive(&lib.join("libcompat.a"), &[object])
}

impl Library {
    fn build(&self, system: &System, zig: &Zig, work: &Path, prefix: &Path) -> Result<(), Error> {
        let source = self.source.unpack(system, work)?;
        let step = Step::start(&format!("compiling {} {}", self.source.name, self.source.version));
        let objects = self.compile(zig, &source, prefix)?;
        zig.archive(&prefix.join(format!("lib/lib{}.a", self.name)), &objects)?;
        for header in self.headers {
            output(
                command("cp", ["-r"])
                    .arg(source.join(header))
                    .arg(prefix.join("include")),
            )?;
        }
        step.done();
        Ok(())
    }

    /// The C files, as paths in the sources, in order; ours are put there.
    fn files(&self, source: &Path) -> Result<Vec<String>, Error> {
        let mut files: Vec<String> = self.files.iter().map(|&file| file.to_owned()).collect();
        for folder in self.folders {
            let listing = || format!("list {folder} of {}", self.source.name);
            for entry in fs::read_dir(source.join(folder)).map_err(io(listing()))? {
                let name = entry.map_err(io(listing()))?.file_name();
                let file = format!("{folder}/{}", name.to_string_lossy());
                if file.ends_with(".c") && !self.without.contains(&file.as_str()) {
                    files.push(file);
                }
            }
        }
        for file in self.ours {
            let from = root().join("packaging/xcpng").join(file);
            fs::copy(&from, source.join(file)).map_err(io(format!("read {}", from.display())))?;
            files.push((*file).to_owned());
        }
        files.sort();
        Ok(files)
    }

    /// Compiles all of them, on every processor; their objects, in order.
    fn compile(&self, zig: &Zig, source: &Path, prefix: &Path) -> Result<Vec<PathBuf>, Error> {
        let objects = make_dir(source.join("assay-objects"))?;
        let files = self.files(source)?;
        let queue = Mutex::new(files.iter());
        let done = Mutex::new(BTreeMap::new());
        let work = || -> Result<(), Error> {
            loop {
                let next = queue.lock().ok().and_then(|mut files| files.next());
                let Some(file) = next else { return Ok(()) };
                let object = objects.join(file.replace('/', "_")).with_extension("o");
                let mut cc = Command::new(zig.driver());
                cc.current_dir(source).args(FLAGS).arg("-include");
                cc.arg(root().join(format!("packaging/xcpng/{}.h", self.name)));
                for include in self.includes {
                    cc.arg(format!("-I{include}"));
                }
                cc.arg("-isystem").arg(prefix.join("include"));
                output(cc.args(["-c", file, "-o"]).arg(&object))?;
                if let Ok(mut done) = done.lock() {
                    done.insert(file, object);
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(Error::Missing(format!("compiling {} ended early", self.name))))
            })
        })?;
        let done = done.into_inner().unwrap_or_default();
        Ok(done.into_values().collect())
    }

    /// Writes what pkg-config is asked for.
    fn describe(&self, prefix: &Path) -> Result<(), Error> {
        let folder = make_dir(prefix.join("lib/pkgconfig"))?;
        for module in self.modules {
            let text = format!(
                "Name: {module}\nDescription: {} for XCP-ng 8.3\nVersion: {}\nLibs: -L{prefix}/lib {}\nCflags: -I{prefix}/include\n",
                self.source.name,
                self.source.version,
                self.link,
                prefix = prefix.display(),
            );
            let file = folder.join(format!("{module}.pc"));
            fs::write(&file, text).map_err(io(format!("write {}", file.display())))?;
        }
        Ok(())
    }
}
