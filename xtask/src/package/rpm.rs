//! RPMs, by rpmbuild: for Enterprise Linux 10, for XCP-ng 8.3, and the one that marks an update as applied.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tree::Tree;
use super::{Part, version};
use crate::run::{Error, command, io, step};
use crate::workspace::root;

/// What RPMs are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dist {
    /// Enterprise Linux 10.
    El10,
    /// dom0 of XCP-ng 8.3, and XenServer 8.
    Xcpng83,
}

impl Dist {
    /// The ending of the release.
    pub(super) const fn tag(self) -> &'static str {
        match self {
            Self::El10 => ".el10",
            Self::Xcpng83 => ".xcpng8.3",
        }
    }
}

/// Makes the packages of these trees in `out`.
pub(super) fn build(trees: &[&Tree], dist: Dist, work: &Path, out: &Path, epoch: u64) -> Result<(), Error> {
    let lists = work.join(format!("trees{}", dist.tag()));
    fs::create_dir_all(&lists).map_err(io("make a folder for RPMs"))?;
    for tree in trees {
        let name = tree.part.name().trim_start_matches("assay-");
        fs::write(lists.join(format!("{name}.files")), files(tree, dist)).map_err(io("write a list of files"))?;
        std::os::unix::fs::symlink(&tree.root, lists.join(name)).map_err(io("link a tree"))?;
    }
    let mut rpmbuild = rpmbuild(dist, work, out, epoch);
    define(&mut rpmbuild, "assay_tree", &lists.display().to_string());
    for tree in trees {
        let name = tree.part.name().trim_start_matches("assay-");
        define(&mut rpmbuild, &format!("assay_with_{name}"), "1");
    }
    let what = format!("RPMs{}", dist.tag());
    step(&what, rpmbuild.arg(root().join("packaging/rpm/assay.spec")))
}

/// Makes the RPM that draws in the agent and marks the update; its path.
pub(super) fn marker(
    label: &str,
    uuid: &str,
    update: &Path,
    work: &Path,
    out: &Path,
    epoch: u64,
) -> Result<PathBuf, Error> {
    let mut rpmbuild = rpmbuild(Dist::Xcpng83, work, out, epoch);
    define(&mut rpmbuild, "assay_label", label);
    define(&mut rpmbuild, "assay_uuid", uuid);
    define(&mut rpmbuild, "assay_update", &update.display().to_string());
    define(&mut rpmbuild, "assay_epoch", &epoch.to_string());
    step(
        "RPM of the update",
        rpmbuild.arg(root().join("packaging/rpm/update.spec")),
    )?;
    Ok(out.join(format!("update-{label}-{}-1.noarch.rpm", version())))
}

fn rpmbuild(dist: Dist, work: &Path, out: &Path, epoch: u64) -> Command {
    let mut build = command("rpmbuild", ["-bb", "--target", "x86_64"]);
    let defines = [
        ("_topdir", work.join("rpmbuild").display().to_string()),
        ("_rpmdir", out.display().to_string()),
        ("_rpmfilename", "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm".into()),
        ("assay_version", version().into()),
        ("dist", dist.tag().into()),
        // The same bytes everywhere and at any time.
        ("_buildhost", "assay".into()),
        ("use_source_date_epoch_as_buildtime", "1".into()),
        ("clamp_mtime_to_source_date_epoch", "1".into()),
        // The files are finished: nothing is stripped, compressed or moved, and the programs have no debug information to part
        // with.
        ("__os_install_post", "%{nil}".into()),
        ("debug_package", "%{nil}".into()),
        ("_build_id_links", "none".into()),
        // What every rpm since 4.6 reads.
        ("_binary_payload", "w9.xzdio".into()),
        ("_binary_filedigest_algorithm", "8".into()),
    ];
    for (name, value) in defines {
        define(&mut build, name, &value);
    }
    build.env("SOURCE_DATE_EPOCH", epoch.to_string()).current_dir(work);
    build
}

fn define(rpmbuild: &mut Command, name: &str, value: &str) {
    rpmbuild.arg("--define").arg(format!("{name} {value}"));
}

/// Folders that every system has: of the packages `filesystem` and `systemd`.
const SHARED_FOLDERS: [&str; 16] = [
    "/",
    "/etc",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib/modules-load.d",
    "/usr/lib/systemd",
    "/usr/lib/systemd/system",
    "/usr/lib/systemd/system-preset",
    "/usr/lib/sysusers.d",
    "/usr/lib/tmpfiles.d",
    "/usr/share",
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/man/man5",
    "/usr/share/man/man8",
];
/// Where initramfs-tools looks for hooks and scripts.
const INITRAMFS_TOOLS: &str = "/usr/share/initramfs-tools";

/// The `%files` of a package: its files, and every folder that would otherwise be nobody's and stay after a removal. Of some of them
/// dracut and the shells are owners as well, where they are installed.
fn files(tree: &Tree, dist: Dist) -> String {
    let mut text = String::from("%defattr(-,root,root,-)\n");
    let mut folders = BTreeSet::new();
    for file in &tree.files {
        let path = Path::new("/").join(file);
        // Of Debian alone.
        if path.starts_with(INITRAMFS_TOOLS) {
            text.push_str(&format!("%exclude {}\n", path.display()));
            continue;
        }
        let what = if path.starts_with("/etc") {
            "%config(noreplace) "
        } else if path.starts_with("/usr/share/doc") {
            "%doc "
        } else {
            ""
        };
        folders.extend(path.ancestors().skip(1).map(Path::to_owned));
        text.push_str(&format!("{what}{}\n", path.display()));
    }
    for folder in folders {
        if !SHARED_FOLDERS.iter().any(|shared| folder == Path::new(shared)) {
            text.push_str(&format!("%dir {}\n", folder.display()));
        }
    }
    if tree.part == Part::Agent && dist == Dist::Xcpng83 {
        // systemd 219 makes no StateDirectory. Not taken away by a removal: what is in it keeps it.
        text.push_str("%dir %attr(0700,root,root) /var/lib/assay\n");
    }
    text
}
