//! The .debs on Debian 13, whose libraries are newer than those that they were built with: in a root filesystem of it,
//! without a kernel.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use assay_tests::packages::DEBIAN13_VARIABLE;

use crate::built::{named, package, told};
use crate::machine::name;

/// Debian 13, in a folder.
struct Root {
    folder: tempfile::TempDir,
}

impl Root {
    fn unpack() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let archive = named(DEBIAN13_VARIABLE);
        told(
            as_root("tar")
                .args(["--numeric-owner", "-xf"])
                .arg(archive)
                .arg("-C")
                .arg(folder.path()),
        );
        Self { folder }
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.folder.path().join(inside)
    }

    /// What a program prints that runs in it, which must succeed.
    fn told(&self, argv: &[&str]) -> String {
        told(
            as_root("chroot")
                .arg(self.folder.path())
                .args(argv)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    }

    /// The same, of a program that finds a /proc, as in a system that runs.
    fn told_running(&self, argv: &[&str]) -> String {
        let proc = format!("--mount-proc={}", self.path("proc").display());
        told(
            as_root("unshare")
                .args(["--mount", "--pid", "--fork", &proc, "chroot"])
                .arg(self.folder.path())
                .args(argv),
        )
    }
}

/// The program, as root, or as what passes for root in a namespace of its own.
fn as_root(program: &str) -> Command {
    let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    if root {
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--map-auto", program]);
    command
}

#[test]
fn the_debs_are_installed_on_debian_13_run_there_and_go() {
    let root = Root::unpack();
    assert!(root.told(&["cat", "/etc/debian_version"]).starts_with("13"));
    for program in ["assay-agent", "assay-verifier"] {
        let deb = package(program, "_amd64.deb");
        let file = name(&deb);
        fs::copy(&deb, root.path("root").join(&file)).expect("a copy of the package");
        // As whoever makes an image of a system does it, in which nothing runs yet. Refused where a package that it depends on is missing, or too old.
        root.told(&["dpkg", "--install", &format!("/root/{file}")]);
        // Every library is found, in a version that it can use.
        let version = root.told(&[program, "--version"]);
        assert_eq!(version.trim(), format!("{program} {}", env!("CARGO_PKG_VERSION")));
    }
    assert_eq!(root.told(&["dpkg", "--audit"]), "");
    init(&root);
    root.told(&["dpkg", "--purge", "assay-agent", "assay-verifier"]);
    for left in [
        "usr/bin/assay-agent",
        "usr/bin/assay-verifier",
        "etc/assay",
        "usr/lib/assay",
    ] {
        assert!(!root.path(left).exists(), "{left} is left");
    }
}

/// What the first boot does, and the first step of an operator, as the user that the package made.
fn init(root: &Root) {
    root.told_running(&["systemd-tmpfiles", "--create"]);
    let init = ["assay-verifier", "init", "--url", "https://verifier.example:8440"];
    root.told_running(&[&["runuser", "-u", "assay-verifier", "--"], &init[..]].concat());
    let join = root.path("var/lib/assay-verifier/join.json");
    assert!(join.exists(), "init made no join.json");
}
