//! An update that is approved from its package, before the host has ever seen it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use assay_evidence::event::LoadKind;
use assay_tests::HarnessError;
use assay_tests::child;
use assay_tests::guest::Guest;
use assay_tests::vm::Image;

use crate::common::{enrolled, perl_on, put_new_program};
use crate::log::{LOG, Log};

/// Has the kernel unpack a module: 4 is MODULE_INIT_COMPRESSED_FILE.
const PACKED_MODULE: &str = r#"open(my $f, "<", "PATH") or die; my $none = "";
    print $! + 0 if syscall(313, fileno($f), $none, 4) != 0;"#;

/// A package with a program, an interpreter's file, a script that runs when it is installed, and a module of the machine's own
/// kernel as Debian ships it.
fn package(folder: &Path, name: &str, module: &Path, release: &str) -> Result<PathBuf, HarnessError> {
    let tree = folder.join(name);
    let put = |path: &str, mode: u32, content: &[u8]| {
        use std::os::unix::fs::PermissionsExt as _;
        let path = tree.join(path);
        let written = std::fs::create_dir_all(path.parent().expect("a folder above it"))
            .and_then(|()| std::fs::write(&path, content))
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)));
        written.map_err(HarnessError::io(format!("write {}", path.display())))
    };
    let read = |path: &Path| std::fs::read(path).map_err(HarnessError::io(format!("read {}", path.display())));
    let mut program = read(Path::new("/bin/true"))?;
    program.extend(name.as_bytes());
    put(&format!("usr/bin/{name}"), 0o755, &program)?;
    put(
        &format!("usr/share/{name}/plugin.py"),
        0o644,
        format!("print('{name}')\n").as_bytes(),
    )?;
    put(
        &format!(
            "usr/lib/modules/{release}/{name}/{}",
            module.file_name().expect("a file").display()
        ),
        0o644,
        &read(module)?,
    )?;
    put(
        "DEBIAN/control",
        0o644,
        format!("Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Assay <assay@example.org>\nDescription: {name}\n")
            .as_bytes(),
    )?;
    put(
        "DEBIAN/postinst",
        0o755,
        format!("#!/bin/sh\n# {name}\nexit 0\n").as_bytes(),
    )?;
    let deb = folder.join(format!("{name}.deb"));
    let mut build = Command::new("dpkg-deb");
    build.args(["-Zxz", "--root-owner-group", "-b"]).arg(&tree).arg(&deb);
    child::run(&mut build)?;
    Ok(deb)
}

/// Installs a package, and uses all that is in it; gives the path of its module.
fn install_and_use(guest: &Guest, name: &str, deb: &Path, module: &str) -> Result<String, HarnessError> {
    guest.put_file("/root/package.deb", 0o600, deb)?;
    guest.run_ok(&["dpkg", "-i", "/root/package.deb"])?;
    guest.run_ok(&[&format!("/usr/bin/{name}")])?;
    guest.run_ok(&["python3", &format!("/usr/share/{name}/plugin.py")])?;
    let path = guest
        .script(&format!("echo /usr/lib/modules/*/{name}/*"))?
        .trim()
        .to_owned();
    // Unpacked by insmod, then by the kernel.
    guest.run_ok(&["insmod", &path])?;
    guest.run_ok(&["rmmod", module])?;
    assert_eq!(perl_on(guest, PACKED_MODULE, &path)?, 0);
    guest.run_ok(&["rmmod", module])?;
    Ok(path)
}

/// What the log has of this path must be what the scan gave, and there must be something.
fn assert_scanned(log: &Log, path: &str, kind: LoadKind, scanned: &str) {
    let found = log.of(path);
    assert!(
        found.iter().any(|(found, ..)| *found == kind),
        "no {kind} of {path}: {found:?}"
    );
    assert!(
        found.iter().all(|(_, digest, _)| scanned.contains(digest.as_str())),
        "{path}: {found:?}"
    );
}

#[test]
fn vm_an_update_approved_from_its_package_leaves_the_host_trusted() -> Result<(), HarnessError> {
    let stage = enrolled()?;
    let guest = stage.vm.guest();
    let image = Image::load()?;
    let (release, folder) = (&image.kernel_release, stage.verifier.scratch());
    let module = |name: &str| image.modules.join(format!("kernel/drivers/net/{name}.ko.xz"));
    // What installs and uses a package is known: the machine has done it before, with another one.
    let first = package(folder, "first", &module("ifb"), release)?;
    install_and_use(guest, "first", &first, "ifb")?;
    stage.capture()?;

    let update = package(folder, "update", &module("dummy"), release)?;
    let deb = update.display().to_string();
    let scanned = stage.verifier.run_ok(&["policy", "scan", &deb])?;
    let added = stage.verifier.run_ok(&["policy", "add", &deb, "--set", "update"])?;
    assert_eq!(
        added, "policy default: 5 digests are new, of 5 entries in set update\n",
        "{scanned}"
    );
    let installed = install_and_use(guest, "update", &update, "dummy")?;
    let modules = |log: &Log| -> BTreeSet<String> {
        let loads = log.loads().into_iter().filter(|load| load.kind.is_module());
        let digests = loads.filter_map(|load| load.digest).map(|digest| digest.to_string());
        digests.filter(|digest| scanned.contains(digest.as_str())).collect()
    };
    // One digest is the image's, the other the file's; the scan has named both.
    let log = Log::wait(guest, LOG, "the module twice", |log| modules(log).len() == 2)?;
    assert_scanned(&log, &installed, LoadKind::ModuleFile, &scanned);
    assert_scanned(&log, "/usr/bin/update", LoadKind::Program, &scanned);
    assert_scanned(&log, "/var/lib/dpkg/info/update.postinst", LoadKind::Program, &scanned);
    assert_scanned(&log, "/usr/share/update/plugin.py", LoadKind::Argument, &scanned);

    // What comes last is not approved: once the verifier has seen it, it has seen all before it.
    put_new_program(&stage.vm, "/root/rogue")?;
    guest.run_ok(&["/root/rogue"])?;
    let host = stage.wait("untrusted for what comes last", |host| host.state == "untrusted")?;
    assert!(
        host.reasons.iter().all(|reason| reason.contains("/root/rogue")),
        "{:?}\n{scanned}",
        host.reasons
    );
    Ok(())
}
