//! Debian packages, by dpkg-deb.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::tree::Tree;
use super::{libraries, version};
use crate::run::{Error, command, io, step};
use crate::workspace::root;

/// Revision of the packaging.
const REVISION: u32 = 1;
/// Control files beside `control`, each if the package has one, with its mode.
const CONTROL: [(&str, u32); 5] = [
    ("conffiles", 0o644),
    ("preinst", 0o755),
    ("postinst", 0o755),
    ("prerm", 0o755),
    ("postrm", 0o755),
];

/// Makes one package in `out`.
pub(super) fn build(tree: &Tree, work: &Path, out: &Path, epoch: u64) -> Result<(), Error> {
    let name = tree.part.name();
    let templates = root().join("packaging/deb");
    let control = tree.root.join("DEBIAN");
    let writing = |file: &str| io(format!("write the control file {file} of {name}"));
    fs::create_dir(&control).map_err(writing("folder"))?;
    let version = format!("{}-{REVISION}", version());
    let text = fs::read_to_string(templates.join(format!("{name}.control"))).map_err(writing("control"))?;
    let text = text
        .replace("@VERSION@", &version)
        // In KiB, as dpkg-gencontrol counts it.
        .replace("@INSTALLED_SIZE@", &tree.size()?.div_ceil(1024).to_string())
        .replace(
            "@LIBRARIES@",
            &libraries::depends(&tree.root.join("usr/bin").join(name))?,
        );
    fs::write(control.join("control"), text).map_err(writing("control"))?;
    for (file, mode) in CONTROL {
        let template = templates.join(format!("{name}.{file}"));
        if template.exists() {
            let to = control.join(file);
            fs::copy(&template, &to).map_err(writing(file))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(mode)).map_err(writing(file))?;
        }
    }
    tree.settle()?;
    let package = out.join(format!("{name}_{version}_amd64.deb"));
    let mut build = command("dpkg-deb", ["--root-owner-group", "-Zxz", "--build"]);
    build
        .arg(&tree.root)
        .arg(&package)
        .env("SOURCE_DATE_EPOCH", epoch.to_string());
    let built = step(&format!("{name}.deb"), build.current_dir(work));
    // The RPMs are made of the same tree.
    fs::remove_dir_all(&control).map_err(io("remove the control files"))?;
    tree.settle()?;
    built
}
